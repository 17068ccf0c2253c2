"""Attention without a normaliser on every executor, against dense float64 sums over segments."""

from __future__ import annotations

import math

import pytest
import torch

from canvas_kernels import block_attention
from canvas_kernels.block_table import BlockTable
from canvas_kernels.torch_ops import sigmoid
from tests.kernels.tables import TABLES, error, membership

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EDGE_TABLES = [name for name in TABLES if not name.startswith("joint")]
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5, torch.float16: 4e-3}


def dense(q, k, v, table, scale, gain=None, active=None):
    """Σ_r w·gain·active·row_scale · σ(scale q kᵀ) v over dense matrices, row scales from the same weights."""
    n, on = table.n_positions, torch.ones(table.n_edges) if active is None else (active.cpu() != 0).double()
    first = {s: table.segment.tolist().index(s) for s in set(table.segment.tolist())}
    matrices = {s: torch.from_numpy(membership(table)[s] * table.weight[r]).to(q) for s, r in first.items()}
    sums = torch.zeros(2, n, dtype=q.dtype, device=q.device)
    for s, pairs in matrices.items():
        sums[int(table.replace[first[s]])] += pairs.amax(1) * on[table.edge[first[s]]].to(q)
    row_scale = [
        torch.where((sums[1] > 0) | (sums[0] == 0), 0.0, 1 / sums[0]),
        torch.where(sums[1] > 0, 1 / sums[1], 0.0),
    ]
    out = torch.zeros_like(q)
    for s, pairs in matrices.items():
        r = first[s]
        factor = float(table.weight[r]) * float(on[table.edge[r]]) * row_scale[int(table.replace[r])]
        if gain is not None:
            factor = factor * gain[table.edge[r]]
        p = torch.sigmoid(scale * q @ k.transpose(-1, -2)) * (pairs > 0)
        out = out + factor[:, None] * (p @ v)
    return out


def inputs(table, dtype, batch=2, heads=2, dim=20):
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(batch, heads, table.n_positions, dim, device=DEVICE) for _ in range(4))
    gain = torch.rand(table.n_edges, device=DEVICE) - 0.3
    active = (torch.arange(table.n_edges, device=DEVICE) % 3 != 1).float()
    return [x.to(dtype).requires_grad_() for x in (q, k, v)], grad.to(dtype), gain.requires_grad_(), active


EXECUTORS = [
    ("reference", torch.float64),
    ("torch", torch.float64),
    ("torch", torch.float32),
    ("triton", torch.float32),
    ("triton", torch.float16),
]


@pytest.mark.parametrize("name", EDGE_TABLES)
@pytest.mark.parametrize(("backend", "dtype"), EXECUTORS)
def test_outputs_and_gradients(backend, dtype, name):
    # in one executor or another every table is run both with gains and activity and without
    extras = (EDGE_TABLES.index(name) + EXECUTORS.index((backend, dtype))) % 2 == 0
    if backend == "triton":
        pytest.importorskip("triton")
    table = TABLES[name]()
    leaves, grad, gain, active = inputs(table, dtype, batch=1)
    options = {"gain": gain, "active": active} if extras else {}
    out = block_attention(*leaves, table, scale=0.3, backend=backend, activation="sigmoid", **options)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    wide_gain = gain.detach().double().requires_grad_()
    expected = dense(*wide, table, 0.3, wide_gain if extras else None, active if extras else None)
    assert out.dtype == dtype and error(out, expected) < TOLERANCE[dtype]
    found = torch.autograd.grad(out, leaves + [gain] * extras, grad)
    wanted = torch.autograd.grad(expected, wide + [wide_gain] * extras, grad.double())
    for a, b in zip(found, wanted):
        assert error(a, b) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_inactive_edges_are_as_if_they_were_not_there(backend):
    if backend == "triton":
        pytest.importorskip("triton")
    table = TABLES["overlap"]()
    (q, k, v), grad, _, _ = inputs(table, torch.float32, batch=1)
    keep = table.edge != 1
    names = ("q_start", "q_stop", "k_start", "k_stop", "segment", "weight", "edge", "replace")
    columns = {name: getattr(table, name)[keep] for name in names}
    without = BlockTable.from_rectangles("edge", table.n_positions, table.n_edges, **columns)
    active = torch.tensor([1.0, 0.0, 1.0], device=DEVICE)
    options = {"scale": 0.3, "backend": backend, "activation": "sigmoid"}
    first = block_attention(q, k, v, table, active=active, **options)
    second = block_attention(q, k, v, without, **options)
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)
    active.fill_(0.0)
    a, b = (torch.autograd.grad(out, (q, k, v), grad) for out in (first, second))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_chunks_change_nothing(monkeypatch):
    table = TABLES["pieces"]()
    leaves, grad, gain, active = inputs(table, torch.float64)

    def run():
        out = block_attention(*leaves, table, gain=gain, active=active, backend="torch", activation="sigmoid")
        return [out, *torch.autograd.grad(out, [*leaves, gain], grad)]

    whole = run()
    monkeypatch.setattr(sigmoid, "MAX_PAIRS", 4 * 50)
    for a, b in zip(run(), whole):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_operators_are_well_formed():
    table = TABLES["replace"]()
    leaves, _, gain, active = inputs(table, torch.float64, batch=1, heads=1, dim=3)
    arguments = (*leaves, gain, active, None, table.key, "", 0.5, "torch", "sigmoid", False, True)
    torch.library.opcheck(torch.ops.canvas_kernels.attention.default, arguments)


def test_extreme_logits_are_numbers():
    table = TABLES["dense"]()
    q = torch.full((1, 1, 70, 4), 1e4, device=DEVICE)
    v = torch.ones_like(q)
    for backend in ("reference", "torch", "triton"):
        high = block_attention(q, q, v, table, backend=backend, activation="sigmoid")
        low = block_attention(q, -q, v, table, backend=backend, activation="sigmoid")
        torch.testing.assert_close(high, torch.full_like(q, 70.0))
        assert torch.equal(low, torch.zeros_like(q))


def test_dropout_keeps_the_mean():
    table = TABLES["dense"]()
    torch.manual_seed(0)
    q = torch.randn(1, 64, 70, 4)
    v = torch.ones_like(q)
    for backend in ("torch", "reference"):
        kept = block_attention(q, q, v, table, backend=backend, activation="sigmoid")
        dropped = block_attention(q, q, v, table, backend=backend, activation="sigmoid", dropout_p=0.25)
        assert not torch.equal(kept, dropped) and math.isclose(kept.mean(), dropped.mean(), rel_tol=1e-2)
    with pytest.raises(ValueError, match="backend 'triton' has no dropout"):
        block_attention(q, q, v, table, backend="triton", activation="sigmoid", dropout_p=0.25)


def test_what_does_not_fit_is_named():
    table, joint = TABLES["dense"](), TABLES["joint dense"]()
    q = torch.randn(1, 1, 70, 4)
    with pytest.raises(ValueError, match="activation must be one of softmax, sigmoid; got 'relu'"):
        block_attention(q, q, q, table, activation="relu")
    with pytest.raises(ValueError, match="activation 'sigmoid' belongs to the edge form"):
        block_attention(q, q, q, joint, activation="sigmoid")
    with pytest.raises(ValueError, match="activation 'sigmoid' has no log-sum-exp"):
        block_attention(q, q, q, table, activation="sigmoid", return_lse=True)


def test_an_empty_table_gives_zeros():
    names = ("q_start", "q_stop", "k_start", "k_stop", "segment", "weight", "edge")
    table = BlockTable.from_rectangles("edge", 5, 1, **dict.fromkeys(names, ()))
    q = torch.randn(1, 2, 5, 4, requires_grad=True)
    out = block_attention(q, q, q, table, backend="torch", activation="sigmoid")
    assert torch.equal(out, torch.zeros_like(q))
    assert torch.equal(torch.autograd.grad(out.sum(), q)[0], torch.zeros_like(q))
