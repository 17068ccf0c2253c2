"""Modules of forward(queries, keys, values) in a dispatcher: groups of equal reads against one call for each read."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from canvas_engineering import (
    ATTENTION_REGISTRY,
    CanvasLayout,
    CanvasTopology,
    Connection,
    CrossAttention,
    MaskSpec,
    RegionSpec,
    TemporalFill,
    register_attention,
)
from canvas_engineering.attention.base import is_fused, set_groups
from tests import dispatchers, family_oracle
from tests.dispatchers import oracle_step
from tests.strategies import canvases

D_MODEL = 6
randomised = functools.partial(dispatchers.randomised, d_model=D_MODEL)


class Ranked(nn.Module):
    """Tells rows of a read by their places: what grouping may not mix up."""

    def __init__(self, d_model, n_heads=4, dropout=0.0):
        super().__init__()
        self.proj = nn.Linear(d_model, d_model)
        self.shapes = set()

    def forward(self, queries, keys, values):
        assert keys is values
        self.shapes.add(tuple(queries.shape) + tuple(keys.shape[1:2]))
        place = torch.arange(1, keys.shape[1] + 1, dtype=keys.dtype)[:, None]
        total = (self.proj(keys) / place).sum(1, keepdim=True)
        return total * torch.tanh(queries) * torch.arange(queries.shape[1], dtype=keys.dtype)[:, None]


def ranked(p, x_q, x_k, n_heads):
    projected = x_k @ p["proj.weight"].T + p["proj.bias"]
    total = sum(projected[:, j] / (j + 1) for j in range(x_k.shape[1]))
    return torch.stack([i * total * torch.tanh(x_q[:, i]) for i in range(x_q.shape[1])], 1)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(family_oracle.FUNCTIONS, "ranked", ranked)
    register_attention("ranked", Ranked)
    yield
    del ATTENTION_REGISTRY["ranked"]


@settings(max_examples=50)
@given(
    canvas=canvases(60, pairs=False, write_modes=("add", "replace", "gate"), fns=("ranked", "ranked", None, "none")),
    choose=st.booleans(),
    batch=st.integers(1, 2),
)
def test_a_custom_function_runs_with_all_modes_fills_and_masks(canvas, choose, batch):
    layout, topology = canvas
    dispatcher = randomised(layout, topology)
    x = torch.randn(batch, layout.num_positions, D_MODEL, dtype=torch.float64, requires_grad=True)
    names = sorted(layout.regions)[:1] if choose else None
    active = None if names is None else [c.src in names for c in topology.connections]
    out, expected = dispatcher(x, names), oracle_step(dispatcher, x, active)
    # weights and row scales are float32
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    leaves, grad = [x, *dispatcher.parameters()], torch.randn_like(x)
    found = torch.autograd.grad(out, leaves, grad, allow_unused=True) if out.requires_grad else []
    for a, b in zip(found, torch.autograd.grad(expected, leaves, grad, allow_unused=True)):
        a, b = (torch.zeros((), dtype=torch.float64) if g is None else g for g in (a, b))
        torch.testing.assert_close(*torch.broadcast_tensors(a, b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["add", "replace", "gate"])
@pytest.mark.parametrize("fill", TemporalFill)
def test_a_custom_function_under_each_mode_and_fill(mode, fill):
    """Every edge group: two of equal reads that a fill makes, one dense, one of another function beside them."""
    regions = {
        "a": RegionSpec((0, 4, 0, 1, 0, 2)),
        "b": RegionSpec((0, 3, 1, 2, 0, 2), period=2),
        "c": RegionSpec((0, 4, 0, 2, 2, 3), period=3),
    }
    layout = CanvasLayout(T=4, H=2, W=3, d_model=D_MODEL, regions=regions)
    edges = [
        Connection("a", "b", t_src=0, t_dst=offset, temporal_fill=fill, interpolation_order=order, write_mode=mode)
        for offset, order in ((0, 1), (1, 2), (-1, 3))
    ]
    edges = [dataclasses.replace(c, fn="ranked", weight=0.5 + i) for i, c in enumerate(edges)]
    edges += [
        Connection("c", "a", fn="ranked", write_mode=mode),
        Connection("a", "c", fn="ranked", weight=2.0),
        Connection("a", "a", weight=0.5, write_mode="gate"),
    ]
    dispatcher = randomised(layout, CanvasTopology(edges))
    table = dispatcher.plan.table
    assert set(table.edge) == set(range(6)) and table.replace.any() == (mode == "replace")
    x = torch.randn(2, layout.num_positions, D_MODEL, dtype=torch.float64, requires_grad=True)
    for names in (None, ["a"], ["c"]):
        out = dispatcher(x, names)
        expected = oracle_step(dispatcher, x, None if names is None else [c.src in names for c in edges])
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
        leaves, grad = [x, *dispatcher.parameters()], torch.randn_like(x)
        grads = (torch.autograd.grad(y, leaves, grad, materialize_grads=True) for y in (out, expected))
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def fleet(count=6):
    regions = {f"r{i}": (0, 2, 0, 1, 2 * i, 2 * i + 2) for i in range(count)}
    layout = CanvasLayout(T=2, H=1, W=2 * count, d_model=D_MODEL, regions=regions)
    edges = [Connection(a, b, fn="ranked", weight=0.5 + i) for i, a in enumerate(regions) for b in regions if a != b]
    return layout, CanvasTopology(edges)


def test_equal_reads_are_one_call():
    layout, topology = fleet()
    dispatcher = randomised(layout, topology)
    dispatcher(torch.randn(1, layout.num_positions, D_MODEL, dtype=torch.float64))
    assert len(topology.connections) == 30 and dispatcher.fn_modules["ranked"].shapes == {(30, 4, D_MODEL, 4)}


def test_a_step_with_groups_compiles_whole_and_runs_under_autocast():
    layout, topology = fleet(3)
    topology = CanvasTopology([*topology.connections, Connection("r0", "r1", write_mode="gate", fn="ranked")])
    dispatcher = randomised(layout, topology)
    x = torch.randn(2, layout.num_positions, D_MODEL, dtype=torch.float64, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(dispatcher, fullgraph=True, backend="aot_eager")
    out, expected = compiled(x), dispatcher(x)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    leaves = [x, *dispatcher.parameters()]
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (out, expected))):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    single, low = dispatcher.float(), x.detach().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = single(low)
    assert result.dtype == torch.float32
    error = (result - single(low)).abs().max() / single(low).abs().max()
    assert 0 < error < 0.05


def test_backward_gives_the_same_bits():
    layout, topology = fleet()
    dispatcher = randomised(layout, topology).float()
    x = torch.randn(2, layout.num_positions, D_MODEL, requires_grad=True)
    first, second = (torch.autograd.grad(dispatcher(x).square().sum(), x)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_inherited_attend_does_not_hide_an_overridden_forward():
    class Halved(CrossAttention):
        def forward(self, queries, keys, values):
            return 0.5 * super().forward(queries, keys, values)

    assert is_fused(CrossAttention) and not is_fused(Halved) and not is_fused(nn.Linear)
    register_attention("ranked", Halved)
    layout, topology = fleet(2)
    dispatcher = randomised(layout, topology)
    x = torch.randn(1, layout.num_positions, D_MODEL, dtype=torch.float64)
    a, b = (dispatcher.plan.order.tolist() for _ in range(2))
    (module,) = dispatcher.fn_modules.values()
    first = [0, 1, 4, 5]
    second = [2, 3, 6, 7]
    assert sorted(a) == sorted(first + second) == sorted(b)
    torch.testing.assert_close(dispatcher(x)[:, first], module(x[:, first], x[:, second], x[:, second]))


def test_what_does_not_fit_is_named():
    layout = CanvasLayout(T=1, H=1, W=4, d_model=D_MODEL, regions={"a": (0, 1, 0, 1, 0, 2), "b": (0, 1, 0, 1, 2, 4)})
    pairs = MaskSpec("sparse", pattern=((True, False), (False, True)))
    with pytest.raises(ValueError, match=r"connection 1, 'a' attends to 'b' by 'ranked'.*pairs.*cross_attention"):
        randomised(layout, CanvasTopology([Connection("a", "a"), Connection("a", "b", fn="ranked", mask=pairs)]))
    plain = CanvasTopology([Connection("a", "b", fn="ranked")])
    with pytest.raises(ValueError, match="backend 'triton' does not run 'ranked': use auto, torch, reference"):
        randomised(layout, plain, backend="triton")
    dispatcher = randomised(layout, CanvasTopology([Connection("a", "b", fn="ranked")]))
    dispatcher.fn_modules["ranked"].forward = lambda q, k, v: q[:, :1]
    with pytest.raises(ValueError, match=r"Ranked returned \(1, 1, 6\) for queries \(1, 2, 6\) and keys \(1, 2, 6\)"):
        dispatcher(torch.zeros(1, 4, D_MODEL, dtype=torch.float64))


def test_groups_are_cached_by_plan_and_stand_in_canvas_order():
    layout = CanvasLayout(T=2, H=2, W=3, d_model=D_MODEL, regions={"a": (0, 2, 0, 2, 0, 2), "b": (0, 2, 0, 2, 1, 3)})
    boxes = MaskSpec("sparse", pattern=(((True, False), (False, True)), ((False, True), (True, True))))
    dispatcher = randomised(layout, CanvasTopology([Connection("a", "b", fn="ranked", mask=boxes)]))
    plan = dispatcher.plan
    groups = set_groups(plan)
    assert groups is set_groups(plan) and [(g.sets, g.n, g.m) for g in groups.groups] == [(1, 8, 5)]
    order = torch.from_numpy(plan.order.copy())
    assert order[groups.queries.index.copy()].tolist() == [0, 1, 3, 4, 6, 7, 9, 10]
    assert order[groups.keys.index.copy()].tolist() == [1, 5, 8, 10, 11]
