"""The parts of RESULTS.md, for `benchmarks/results.py`."""
