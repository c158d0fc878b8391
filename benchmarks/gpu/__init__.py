"""The checks of ``python -m offcut.benchmarks.gpu_check``."""
