"""Benchmarks: measurements, their results and reports; nothing else in the package imports them."""
