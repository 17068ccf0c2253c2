"""Tables of some rows and some keys, and results over some keys that merge into those over all."""

from __future__ import annotations

from functools import partial
from random import Random

import numpy as np
import pytest
import torch

from canvas_kernels import block_attention
from canvas_kernels.block_table import BlockTable
from canvas_kernels.parts import attention_part
from canvas_kernels.ranges import clip_ranges, join_ranges, runs_of
from tests.parallel.cases import frames_plan, random_plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:.*have no keys on this layout:UserWarning")


def some_of(rng: Random, n: int) -> np.ndarray:
    share = rng.choice([0.0, 0.3, 0.7, 1.0])
    return np.array([i for i in range(n) if rng.random() < share], np.int64)


@pytest.mark.parametrize("form", ["joint", "edge"])
def test_a_subtable_has_the_pairs_of_its_rows_and_keys(form):
    for seed in range(40):
        rng = Random(f"{form} {seed}")
        table = random_plan(rng, form).table
        queries, keys = (some_of(rng, table.n_positions) for _ in range(2))
        rows = np.union1d(queries, keys)
        kept = np.zeros((table.n_positions,) * 2)
        kept[np.ix_(queries, keys)] = table.to_dense()[np.ix_(queries, keys)]
        subtable = table.subtable(queries, keys)
        assert np.array_equal(subtable.to_dense(), kept[np.ix_(rows, rows)])
        assert (subtable.form, subtable.n_edges) == (table.form, table.n_edges)


def test_a_subtable_of_everything_is_the_table():
    table = frames_plan("edge").table
    rows = np.arange(table.n_positions)
    assert table.subtable(rows, rows) is table


def test_rectangles_stay_whole_where_rows_between_them_leave():
    table = frames_plan("joint", frames=50).table
    rows = np.arange(60, 100)
    assert len(table.subtable(rows, rows).weight) <= 0.6 * len(table.weight)


def test_ranges_of_rows():
    assert [x.tolist() for x in runs_of(np.array([0, 1, 4, 7, 8]))] == [[0, 4, 7], [2, 5, 9]]
    joined = join_ranges(np.array([5, 0, 2, 9]), np.array([7, 3, 5, 9]))
    assert [x.tolist() for x in joined] == [[0, 9], [7, 9]]
    clipped = clip_ranges(np.array([0, 3, 3]), np.array([9, 3, 5]), np.array([1, 4]), np.array([2, 6]))
    assert [x.tolist() for x in clipped] == [[0, 0, 2], [0, 1, 1], [1, 4, 4], [2, 6, 5]]


@pytest.mark.parametrize(
    ("backend", "dtype", "budget"), [("torch", torch.float64, 1e-12), ("triton", torch.float32, 2e-5)]
)
def test_results_over_halves_of_the_keys_merge(backend, dtype, budget):
    for seed in range(3 if backend == "triton" else 10):
        plan = frames_plan("joint") if seed == 0 else random_plan(Random(f"parts {seed}"), "joint")
        table, rows = plan.table, np.arange(plan.n_packed)
        if not len(table.weight):
            continue
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(4, 1, 2, table.n_positions, 8, generator=generator, dtype=dtype).to(DEVICE)
        inputs, upstream = [x.clone().requires_grad_() for x in drawn[:3]], drawn[3]
        halves = [table.subtable(rows, rows[side::2]) for side in (0, 1)]
        parts = torch.stack([attention_part(*inputs, half, scale=0.6, backend=backend) for half in halves])
        # rows without keys have no share at all
        share = torch.softmax(parts[..., -1:], 0).nan_to_num()
        out = (share * parts[..., :-1]).sum(0)
        expected = block_attention(*inputs, table, scale=0.6, backend="reference")
        has_keys = torch.from_numpy(table.has_keys()).to(DEVICE)
        upstream = upstream * has_keys[:, None]
        pairs = [(out, expected)]
        pairs += zip(torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(expected, inputs, upstream))
        for x, wanted in pairs:
            assert (x - wanted).abs().max() <= budget * max(wanted.abs().max().item(), 1.0), seed


def test_log_sum_exps_have_gradients_of_any_order():
    table = frames_plan("joint", frames=2, tokens=2, text=1).table
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 1, 1, table.n_positions, 2, generator=generator, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for x in inputs]
    run = partial(attention_part, table=table, scale=0.6, backend="torch")
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_edge_form_has_no_parts():
    table = BlockTable.from_rectangles(
        "edge", 1, 1, q_start=[0], q_stop=[1], k_start=[0], k_stop=[1], weight=[1], segment=[0], edge=[0]
    )
    x = torch.randn(1, 1, 1, 4)
    with pytest.raises(ValueError, match="joint form"):
        attention_part(x, x, x, table, scale=None)


def test_triton_differentiates_lse_where_nothing_else_has_a_gradient():
    """With dO = 0 the gradient of lse alone is left: that of softmax's logarithm."""
    plan = frames_plan("joint")
    q, k, v = (torch.randn(1, 2, plan.table.n_positions, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    results = []
    for backend in ("triton", "torch"):
        lse = attention_part(q, k, v, plan.table, scale=0.3, backend=backend)[..., -1]
        total = torch.where(lse.isfinite(), lse, 0.0).sum()
        results.append(torch.autograd.grad(total, [q, k, v]))
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert results[1][0].abs().max() > 0.01
