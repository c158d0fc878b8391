"""The checks of ``python -m offcut.benchmarks.gpu_check``, a room for each subject."""
