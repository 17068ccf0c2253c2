"""Measurements, run from the project's root: ``python -m benchmarks.bench``. Never imported by the library."""

import os

# torch's profiler tells of its start and end on stderr unless this is set before torch is loaded
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
