"""The reference against a dense float64 oracle built from rectangles, written from kernels/README.md alone."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from canvas_kernels import BlockTable, block_attention, reference
from canvas_kernels.block_table import row_scale
from tests.kernels.tables import error

SEEDS = range(12)


# -- oracle: dense, float64, from the rectangles -----------------------------------------------------------------------


def random_table(form: str, seed: int) -> BlockTable:
    """Segments of several rectangles on random ranges, which overlap; both classes; rows without keys."""
    rng = np.random.default_rng(seed)
    n, n_edges = int(rng.integers(1, 40)), int(rng.integers(1, 5))
    cuts = np.unique(rng.integers(0, n + 1, 5))
    rows = []
    if form == "joint":
        for k0, k1 in pairwise(cuts):
            if rng.random() < 0.7:
                q0, q1 = np.sort(rng.choice(n + 1, 2, replace=False))
                rows.append((q0, q1, k0, k1, float(rng.choice([0.25, 1.0, 1.0, 3.0]))))
        rows = rows or [(0, n, 0, n, 0.5)]
        q0, q1, k0, k1, weight = zip(*rows)
        return BlockTable.from_rectangles("joint", n, 0, q_start=q0, q_stop=q1, k_start=k0, k_stop=k1, weight=weight)
    segment = 0
    for edge in range(n_edges):
        for _ in range(rng.integers(0, 4)):
            weight, replace = float(rng.uniform(0.1, 2.0)), bool(rng.random() < 0.25)
            for k0, k1 in pairwise(cuts):
                if rng.random() < 0.7:
                    q0, q1 = np.sort(rng.choice(n + 1, 2, replace=False))
                    rows.append((q0, q1, k0, k1, segment, weight, edge, replace))
            segment += 1
    rows = rows or [(0, n, 0, n, 0, 1.5, 0, False)]
    q0, q1, k0, k1, segments, weight, edge, replace = zip(*rows)
    return BlockTable.from_rectangles(
        "edge", n, n_edges, q_start=q0, q_stop=q1, k_start=k0, k_stop=k1, segment=segments, weight=weight, edge=edge,
        replace=replace,
    )  # fmt: skip


def random_case(form: str, seed: int, dtype=torch.float64, head_dim: int = 8, batch: int = 2) -> tuple:
    """(table, {q, k, v, gain}, options): every third edge case with gain (one of them 0, one negative), half with
    activity, some with a row scale of the caller's."""
    table = random_table(form, seed)
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed + 1000)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    shape = (batch, table.n_positions, 2, head_dim)
    inputs = {name: draw(*shape).transpose(1, 2).requires_grad_() for name in "qkv"}
    options = {}
    if form == "edge":
        if seed % 3:
            gain = draw(table.n_edges)
            gain[0] = 0.0
            inputs["gain"] = gain.requires_grad_()
        if seed % 2:
            options["active"] = torch.from_numpy(rng.random(table.n_edges) < 0.6)
        if seed % 4 == 3:
            options["row_scale"] = torch.from_numpy(rng.random((2, table.n_positions)).astype(np.float32))
    return table, inputs, options


def dense_oracle(q, k, v, table, *, scale, gain=None, active=None, row_scale=None):
    """(out, {slot: lse [B, H]}) with (n, n) matrices, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    n = table.n_positions
    logits = scale * (q @ k.transpose(-1, -2))
    rectangles = list(
        zip(*(getattr(table, name).tolist() for name in ("q_start", "q_stop", "k_start", "k_stop", "segment")))
    )
    lse, out = {}, torch.zeros_like(q)
    if table.form == "edge":
        row_scale = oracle_row_scale(table, active) if row_scale is None else row_scale.double()
    for segment in sorted({r[4] for r in rectangles}):
        members = [i for i, r in enumerate(rectangles) if r[4] == segment]
        weights = torch.zeros(n, n, dtype=torch.float64)
        slots = {}
        for i in members:
            q0, q1, k0, k1, _ = rectangles[i]
            weights[q0:q1, k0:k1] = float(table.weight[i]) if table.form == "joint" else 1.0
            slots.update({row: int(table.slot[i]) + row - q0 for row in range(q0, q1)})
        first = members[0]
        edge = int(table.edge[first])
        if table.form == "edge" and active is not None and not bool(active[edge]):
            continue
        rows = torch.tensor(sorted(slots))
        masked = logits[:, :, rows] + torch.log(weights[rows])
        for position, row in enumerate(rows.tolist()):
            lse[slots[row]] = torch.logsumexp(masked[:, :, position], -1) / math.log(2)
        piece = torch.softmax(masked, -1) @ v
        if table.form == "edge":
            c = float(table.weight[first]) * row_scale[int(table.replace[first]), rows]
            if gain is not None:
                c = c * gain.double()[edge]
            piece = c[:, None] * piece
        full = torch.zeros_like(q)
        full[:, :, rows] = piece
        out = out + full
    return out, lse


def oracle_row_scale(table, active=None) -> torch.Tensor:
    """Row by row: 1 / Σ w over the segments of the class in force."""
    n = table.n_positions
    seen: list[dict[int, int]] = [{} for _ in range(n)]
    for i in range(len(table.weight)):
        if active is None or bool(active[int(table.edge[i])]):
            for row in range(table.q_start[i], table.q_stop[i]):
                seen[row][int(table.segment[i])] = i
    scale = torch.zeros(2, n, dtype=torch.float64)
    for row, segments in enumerate(seen):
        sums = [0.0, 0.0]
        for i in segments.values():
            sums[int(table.replace[i])] += float(table.weight[i])
        kind = 1 if sums[1] > 0 else 0
        if sums[kind]:
            scale[kind, row] = 1 / sums[kind]
    return scale


def check(table, inputs, options, tolerance, backend="torch", scale=0.7):
    """Output, lse and every gradient against the oracle."""
    wanted = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    expected, expected_lse = dense_oracle(**wanted, table=table, scale=scale, **options)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    out, lse = block_attention(**inputs, table=table, scale=scale, backend=backend, return_lse=True, **options)
    assert out.dtype == inputs["q"].dtype and out.shape == inputs["q"].shape
    assert error(out.detach(), expected.detach()) <= tolerance
    want_lse = torch.full(lse.shape, math.inf, dtype=torch.float64)
    for slot, value in expected_lse.items():
        want_lse[..., slot] = value.detach()
    if table.form == "edge":
        # out of force where scaled by 0
        scales = options.get("row_scale")
        scales = oracle_row_scale(table, options.get("active")) if scales is None else scales
        layout = table.slot_layout(torch.device("cpu"))
        want_lse[..., (scales[layout.replace, layout.position] == 0)] = math.inf
    finite = torch.isfinite(want_lse)
    assert torch.equal(torch.isfinite(lse), finite) and bool((lse[~finite] == math.inf).all())
    assert error(lse[finite], want_lse[finite]) <= tolerance
    gradients = torch.autograd.grad(out, list(inputs.values()), upstream.to(out.dtype))
    if expected.requires_grad:
        expected_gradients = torch.autograd.grad(expected, list(wanted.values()), upstream, allow_unused=True)
    else:
        expected_gradients = [None] * len(wanted)
    for name, found, want in zip(inputs, gradients, expected_gradients):
        want = torch.zeros_like(wanted[name]) if want is None else want
        assert found.shape == want.shape and found.dtype == inputs[name].dtype
        assert error(found, want) <= tolerance, name


# -- tests -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["edge", "joint"])
@pytest.mark.parametrize("seed", SEEDS)
def test_float64_meets_the_oracle(form, seed):
    check(*random_case(form, seed), 1e-12, backend="reference")


@pytest.mark.parametrize("form", ["edge", "joint"])
def test_float32_meets_the_oracle(form):
    for seed in range(4):
        check(*random_case(form, seed, torch.float32), 1e-5, backend="reference")


def test_a_small_case_by_hand():
    # row 0 reads keys {0, 1} with equal logits (edge 0, weight 3) and key 1 alone (edge 1, weight 1); row 1 nothing
    table = BlockTable.from_rectangles(
        "edge", 2, 2, q_start=[0, 0], q_stop=[1, 1], k_start=[0, 1], k_stop=[2, 2], segment=[0, 1], weight=[3, 1],
        edge=[0, 1],
    )  # fmt: skip
    q = torch.zeros(1, 1, 2, 1, dtype=torch.float64)
    v = torch.tensor([4.0, 8.0], dtype=torch.float64).view(1, 1, 2, 1)
    out, lse = reference.attention(q, q, v, table, scale=1.0)
    assert out.flatten().tolist() == [(3 * 6 + 8) / 4, 0.0]
    assert lse.flatten().tolist() == [1.0, 0.0]
    out, _ = reference.attention(q, q, v, table, scale=1.0, gain=torch.tensor([1.0, 0.5]))
    assert out.flatten().tolist() == [(3 * 6 + 0.5 * 8) / 4, 0.0]
    out, _ = reference.attention(q, q, v, table, scale=1.0, active=torch.tensor([0, 1]))
    assert out.flatten().tolist() == [8.0, 0.0]


def test_joint_weights_enter_the_logits():
    table = BlockTable.from_rectangles(
        "joint", 2, 0, q_start=[0, 0], q_stop=[2, 2], k_start=[0, 1], k_stop=[1, 2], weight=[1.0, 3.0]
    )
    x = torch.zeros(1, 1, 2, 1, dtype=torch.float64)
    v = torch.tensor([4.0, 8.0], dtype=torch.float64).view(1, 1, 2, 1)
    out, lse = reference.attention(x, x, v, table, scale=1.0)
    assert torch.allclose(out.flatten(), torch.full((2,), 7.0, dtype=torch.float64), rtol=0, atol=1e-14)
    assert torch.allclose(lse.flatten(), torch.full((2,), 2.0, dtype=torch.float64), rtol=0, atol=1e-14)


def test_an_inactive_edge_is_as_if_it_were_not_there():
    table, inputs, _ = random_case("edge", 5)
    keep = table.edge != 0
    names = ("q_start", "q_stop", "k_start", "k_stop", "segment", "weight", "edge", "replace")
    assert keep.any() and not keep.all()
    without = BlockTable.from_rectangles(
        "edge", table.n_positions, table.n_edges, **{name: getattr(table, name)[keep] for name in names}
    )
    active = torch.ones(table.n_edges)
    active[0] = 0
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    found, _ = reference.attention(q, k, v, table, scale=1.0, active=active)
    expected, _ = reference.attention(q, k, v, without, scale=1.0)
    assert torch.equal(found, expected)


def test_a_table_without_rectangles_gives_zeros_and_zero_gradients():
    empty = np.zeros(0)
    table = BlockTable.from_rectangles(
        "edge", 3, 2, q_start=empty, q_stop=empty, k_start=empty, k_stop=empty, segment=empty, weight=empty, edge=empty
    )
    for backend in ("reference", "torch"):
        inputs = [torch.randn(1, 1, 3, 4, requires_grad=True) for _ in range(3)]
        gain = torch.ones(2, requires_grad=True)
        out, lse = block_attention(*inputs, table, gain=gain, backend=backend, return_lse=True)
        assert torch.equal(out, torch.zeros_like(out)) and lse.shape == (1, 1, 0)
        gradients = torch.autograd.grad(out.sum(), [*inputs, gain])
        assert all(not gradient.any() for gradient in gradients)


def test_row_scales_are_those_of_the_oracle_and_of_the_table():
    for seed in SEEDS:
        table, _, options = random_case("edge", seed)
        active = options.get("active")
        expected = oracle_row_scale(table, active)
        for dtype, budget in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
            assert error(row_scale(table, active, dtype, torch.device("cpu")), expected) <= budget


def test_second_derivatives():
    table = BlockTable.from_rectangles(
        "edge", 3, 2, q_start=[0, 1], q_stop=[2, 3], k_start=[0, 1], k_stop=[3, 3], segment=[0, 1], weight=[1, 0.5],
        edge=[0, 1],
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 1, 3, 2, generator=generator, dtype=torch.float64, requires_grad=True) for _ in "qkv"]
    gain = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)

    def run(q, k, v, gain):
        return block_attention(q, k, v, table, scale=0.7, gain=gain, backend="reference")

    assert torch.autograd.gradgradcheck(run, (*inputs, gain))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_dropout_drops_probabilities_and_keeps_the_mean(backend):
    table, inputs, options = random_case("edge", 1, torch.float32)
    q, k = inputs["q"].detach(), inputs["k"].detach()
    v = torch.ones_like(q)
    torch.manual_seed(0)
    kept = {"table": table, "backend": backend, **options}
    clean = block_attention(q, k, v, **kept)
    runs = torch.stack([block_attention(q, k, v, dropout_p=0.4, **kept) for _ in range(300)])
    assert not torch.equal(runs[0], runs[1])
    assert (runs.mean(0) - clean).abs().max() < 0.25 and (
        runs.mean((0, 1, 2, 4)) - clean.mean((0, 1, 3))
    ).abs().max() < 0.1
    torch.manual_seed(3)
    first = block_attention(q, k, v, dropout_p=0.4, **kept)
    torch.manual_seed(3)
    assert torch.equal(first, block_attention(q, k, v, dropout_p=0.4, **kept))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_dropout_of_one_key_is_all_or_a_scaled_value(backend):
    table = BlockTable.from_rectangles("joint", 64, 0, q_start=[0], q_stop=[64], k_start=[5], k_stop=[6], weight=[2.0])
    x = torch.ones(1, 1, 64, 2)
    torch.manual_seed(0)
    out = block_attention(x, x, 3 * x, table, dropout_p=0.25, backend=backend)
    values = {round(value, 4) for value in out.flatten().tolist()}
    assert values == {0.0, 4.0}
    assert torch.equal(out[..., 0], out[..., 1])
