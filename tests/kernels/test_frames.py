"""Tables that are nothing but equal frames run as dense attention on views: which they are, and the numbers."""

from __future__ import annotations

import pytest
import torch

from canvas_kernels import BlockTable, block_attention
from canvas_kernels.torch_ops import frames


def table(n: int, reads, form: str = "edge", weight: float = 1.0) -> BlockTable:
    """``reads``: (first query, first key, length), a segment each."""
    q, k, length = zip(*reads)
    places = {"q_start": q, "q_stop": [a + b for a, b in zip(q, length)], "k_start": k}
    places |= {"k_stop": [a + b for a, b in zip(k, length)], "weight": [weight] * len(reads)}
    if form == "joint":
        return BlockTable.from_rectangles("joint", n, 0, **places)
    return BlockTable.from_rectangles("edge", n, 1, **places, segment=range(len(reads)), edge=[0] * len(reads))


def equal(count: int, rows: int, form: str = "edge", weight: float = 1.0) -> BlockTable:
    return table(count * rows, [(t * rows, t * rows, rows) for t in range(count)], form, weight)


def inputs(batch: int, heads: int, n: int, dim: int, heads_first: bool):
    generator = torch.Generator().manual_seed(0)
    shape = (batch, heads, n, dim) if heads_first else (batch, n, heads, dim)
    found = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4)]
    found = [x if heads_first else x.transpose(1, 2) for x in found]
    return [x.requires_grad_() for x in found[:3]], found[3]


def are_the_references(own: BlockTable, leaves: list[torch.Tensor], upstream: torch.Tensor) -> None:
    """Result and gradients, in float64."""
    found = {}
    for backend in ("torch", "reference"):
        out = block_attention(*leaves, own, scale=0.7, backend=backend)
        found[backend] = out, *torch.autograd.grad(out, leaves, upstream)
    for ours, exact in zip(found["torch"], found["reference"]):
        assert (ours - exact).abs().max() <= 1e-12 * exact.abs().max()


@pytest.fixture
def taken(monkeypatch) -> list[int]:
    """Rows of the frames of each call that ran on views."""
    rows = []

    run = frames.forward

    def spied(q, k, v, count, scale):
        rows.append(count)
        return run(q, k, v, count, scale)

    monkeypatch.setattr(frames, "forward", spied)
    return rows


@pytest.mark.parametrize("form", ["joint", "edge"])
@pytest.mark.parametrize(("count", "rows"), [(1, 5), (7, 3), (3, 20), (1, 300), (2, 201), (40, 1)])
def test_which_tables_are_frames(form, count, rows):
    assert frames.frame_rows(equal(count, rows, form).key) == rows


@pytest.mark.parametrize(
    "reads",
    [
        [(0, 3, 3), (3, 0, 3)],  # each the other
        [(0, 0, 3), (3, 3, 2)],  # of two sizes
        [(0, 0, 3)],  # positions that read nothing
        [(0, 0, 2), (3, 3, 2)],  # a gap
        [(0, 0, 3), (3, 3, 3), (3, 0, 3)],  # the frame before, too
        [(0, 0, 6), (0, 0, 6)],  # twice
    ],
)
def test_which_tables_are_not(reads):
    assert frames.frame_rows(table(6, reads).key) == 0


def test_weights_that_differ_within_a_frame_are_no_plain_frames():
    places = {"q_start": [0, 0], "q_stop": [4, 4], "k_start": [0, 2], "k_stop": [2, 4]}
    assert frames.frame_rows(BlockTable.from_rectangles("joint", 4, 0, **places, weight=[1.0, 1.0]).key) == 4
    weighted = BlockTable.from_rectangles("joint", 4, 0, **places, weight=[1.0, 0.5])
    assert frames.frame_rows(weighted.key) == 0


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 3), (2, 1), (2, 3)])
@pytest.mark.parametrize(("form", "count", "rows", "weight"), [("edge", 5, 7, 0.3), ("joint", 2, 260, 0.3)])
def test_numbers_are_the_references(form, count, rows, weight, batch, heads, heads_first, apart, taken, monkeypatch):
    monkeypatch.setattr(frames, "SPLIT_HEADS_KEYS", 1 if apart else 1 << 30)
    own = equal(count, rows, form, weight)
    leaves, upstream = inputs(batch, heads, own.n_positions, 16, heads_first)
    are_the_references(own, leaves, upstream)
    # canvases of several heads that lie head by head have no frames of all heads side by side
    assert taken == ([] if heads_first and heads > 1 and batch > 1 and count > 1 else [rows])


def test_a_softmax_for_each_frame_is_none_over_all():
    """Queries that attend to every frame in a softmax of its own, averaged: equal frames, yet several segments."""
    own = table(12, [(0, 0, 4)])
    q = {"q_start": [0] * 3, "q_stop": [12] * 3, "k_start": [0, 4, 8], "k_stop": [4, 8, 12]}
    own = BlockTable.from_rectangles("edge", 12, 1, **q, segment=range(3), weight=[1.0] * 3, edge=[0] * 3)
    assert frames.frame_rows(own.key) == 0
    leaves, upstream = inputs(2, 2, 12, 8, False)
    are_the_references(own, leaves, upstream)


# -- what does not -----------------------------------------------------------------------------------------------------


def test_sizes_in_between_and_options_are_the_executors(taken):
    own = equal(2, 100)
    leaves, _ = inputs(1, 2, 200, 64, False)
    block_attention(*leaves, own, backend="torch")
    assert taken == []
    own = equal(2, 200)
    leaves, _ = inputs(1, 2, 400, 8, False)
    one = torch.ones(1, dtype=torch.float64)
    for options in ({"return_lse": True}, {"gain": one}, {"active": one}, {"row_scale": one.expand(2, 400)}):
        block_attention(*leaves, own, backend="torch", **options)
    block_attention(*(x.bfloat16() for x in leaves), own, backend="torch")
    with torch.autocast("cpu", torch.bfloat16):
        block_attention(*(x.float() for x in leaves), own, backend="torch")
    assert taken == []
    block_attention(*leaves, own)
    assert taken == [200]


def test_compiled_without_a_break(taken):
    own = equal(3, 210)
    leaves, upstream = inputs(1, 2, own.n_positions, 8, False)
    compiled = torch.compile(lambda q, k, v: block_attention(q, k, v, own), backend="aot_eager", fullgraph=True)
    out, eager = compiled(*leaves), block_attention(*leaves, own)
    gradients = (torch.autograd.grad(x, leaves, upstream) for x in (out, eager))
    for a, b in ((out, eager), *zip(*gradients)):
        assert (a - b).abs().max() <= 1e-13 * b.abs().max()
    assert set(taken) == {210}


def test_layouts_that_change_between_the_passes_change_nothing():
    """Saved tensors may come back laid out another way, as from an offload to the host."""
    own = equal(4, 20)
    leaves, upstream = inputs(2, 2, 80, 16, False)
    found = []
    for unpack in (lambda x: x, lambda x: x.contiguous().clone()):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
            out = block_attention(*leaves, own, scale=0.7, backend="torch")
        found.append(torch.autograd.grad(out, leaves, upstream))
    for a, b in zip(*found):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()
