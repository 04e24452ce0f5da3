"""Experiments and comparisons: ``python -m benchmarks NAME``."""
