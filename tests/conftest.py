"""What every test shares: one thread, reproducible hypothesis runs, Triton's interpreter, and the ``gpu`` marker."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

if not torch.cuda.is_available():
    # Read when a kernel is defined, so it has to stand before anything imports triton. Tests that compile ahead of time
    # run in a process of their own without it.
    os.environ["TRITON_INTERPRET"] = "1"

# No deadline: two shared cores are slow, not wrong. Derandomised: one commit, one verdict.
settings.register_profile("house", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
