"""Benchmarks: every measure beside its yardstick, in one run. `python -m benchmarks`."""
