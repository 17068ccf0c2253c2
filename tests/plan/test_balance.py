"""How evenly the passes of a plan occupy a GPU, by a simulation that takes nothing but the plan."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import cases
from benchmarks.problem import Problem
from canvas_engineering.plan.balance import balance, simulate

LEAST_POSITIONS = 8192


@pytest.mark.parametrize("form", ["joint", "edge"])
def test_every_long_case_is_as_balanced_as_whole_tiles_can_be(form):
    checked = 0
    for case in cases.GPU:
        table = Problem(case).plan(form).table
        if table.n_positions < LEAST_POSITIONS:
            continue
        for found in balance(table, case.batch * case.heads, case.head_dim, torch.bfloat16):
            assert found.predicted >= found.possible - 0.02, (case.name, found)
            checked += 1
    assert checked > 50


def test_long_tiles_of_all_heads_start_first():
    """528 steps of work for 16 multiprocessors: head by head, the last head's long tile ends after 45 of them."""
    blocks = np.array([22, *[1] * 36])
    assert simulate(blocks, 0, 4, 16)[:2] == (33, 45)
    assert simulate(blocks, 1, 4, 16)[:2] == (33, 33)


def test_few_programs_leave_multiprocessors_idle():
    assert simulate(np.array([8, 8]), 0, 1, 4) == (5, 10, 10)


def test_a_kernel_that_is_not_built_has_no_balance():
    table = Problem(cases.TOY[0]).plan("joint").table
    with pytest.raises(ValueError, match="512"):
        balance(table, 1, 512, torch.bfloat16)
