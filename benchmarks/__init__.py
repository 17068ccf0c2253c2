"""Measurements, run from the project's root: ``python -m benchmarks.dispatcher``. Never imported by the library."""
