"""What every test shares: one thread, reproducible hypothesis runs, Triton's interpreter, and the markers."""

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


def pytest_collection_modifyitems(config, items):
    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = "needs an NVIDIA GPU"
    if "slow" not in config.option.markexpr:
        missing["slow"] = "takes minutes: make slow"
    for item in items:
        for marker, reason in missing.items():
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))
