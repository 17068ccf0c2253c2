"""Single cases under pytest-benchmark: ``pytest "benchmarks/test_cases.py::test_case[robot-edge-ours]"``.

Forward + backward on one thread, after the gate. The suite (``python -m canvas_engineering bench``) compares
contestants in turns; this is for work on one of them, with pytest-benchmark's ``--benchmark-save`` and ``-compare``.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import cases, contestants, suite
from benchmarks.problem import Problem

NAMES = [("joint", "ours"), ("joint", "sdpa_mask"), ("edge", "ours"), ("edge", "per_edge_loop"), ("edge", "grouped")]


@pytest.mark.parametrize(("form", "name"), NAMES)
@pytest.mark.parametrize("case", cases.CPU, ids=lambda case: case.name)
def test_case(benchmark, case, form, name):
    if name in case.without:
        pytest.skip(case.without[name])
    torch.set_num_threads(1)
    problem, settings = Problem(case), suite.Settings()
    found = next(c for c in contestants.of("cpu") if (c.form, c.name) == (form, name))
    inputs = problem.inputs("cpu", settings.dtype)
    try:
        runner = suite.prepare(found, problem, inputs, suite.Gate(problem, inputs, settings), settings, {})
    except contestants.Unavailable as cause:
        pytest.skip(str(cause))
    benchmark.extra_info |= {"density": problem.plan(form).density, "tokens": problem.tokens}
    benchmark(runner.step, "cpu")
