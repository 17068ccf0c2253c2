"""Tables that are nothing but equal frames run as dense attention on views: which they are, and the numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from canvas_kernels import BlockTable, block_attention, costs, frames, grouping, ops


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

    def spied(q, k, v, count, scale, mask):
        rows.append(count)
        return frames.frames_attention(q, k, v, count, scale, mask)

    monkeypatch.setattr(ops, "frames_attention", spied)
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
    assert frames._frame_rows(grouping.group(weighted), 4) == 0


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 3), (2, 1), (2, 3)])
@pytest.mark.parametrize(("form", "count", "rows", "weight"), [("edge", 5, 7, 0.3), ("joint", 2, 260, 0.3)])
def test_numbers_are_the_references(form, count, rows, weight, batch, heads, heads_first, apart, taken, monkeypatch):
    monkeypatch.setattr(frames, "APART_KEYS", 1 if apart else 1 << 30)
    own = equal(count, rows, form, weight)
    leaves, upstream = inputs(batch, heads, own.n_positions, 16, heads_first)
    are_the_references(own, leaves, upstream)
    # canvases of several heads that lie head by head have no frames of all heads side by side
    assert taken == ([] if heads_first and heads > 1 and batch > 1 and count > 1 else [rows])


# -- under a mask ------------------------------------------------------------------------------------------------------


def regions(sizes, reads, weights) -> BlockTable:
    """Joint form: regions one after the other, and which reads which."""
    stop = np.cumsum(sizes)
    start, (rows, keys) = stop - sizes, zip(*reads)
    q_start, q_stop, k_start, k_stop = start[list(rows)], stop[list(rows)], start[list(keys)], stop[list(keys)]
    places = {"q_start": q_start, "q_stop": q_stop, "k_start": k_start, "k_stop": k_stop}
    return BlockTable.from_rectangles("joint", int(stop[-1]), 0, **places, weight=weights)


RING = [(0, 0), (0, 2), (1, 1), (1, 0), (2, 1), (2, 3), (3, 2)]
RING_WEIGHTS = [1.0, 0.5, 2.0, 0.25, 1.0, 3.0, 0.7]


@pytest.fixture
def free_masks(monkeypatch):
    """Whatever may run under a mask does."""
    monkeypatch.setattr(frames, "MASKED_SHARE", math.inf)


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_numbers_under_a_mask_are_the_references(batch, heads, heads_first, taken, free_masks):
    own = regions((5, 31, 8, 13), RING, RING_WEIGHTS)
    leaves, upstream = inputs(batch, heads, 57, 16, heads_first)
    are_the_references(own, leaves, upstream)
    assert taken == [57] and frames.frame_mask(own.key, torch.float64).shape == (57, 57)


@pytest.mark.parametrize("seed", range(20))
def test_random_tables_under_a_mask_are_the_references(seed, taken, free_masks):
    generator = np.random.default_rng(seed)
    sizes = generator.integers(2, 30, generator.integers(2, 7))
    reads = [(i, j) for i in range(len(sizes)) for j in range(len(sizes)) if i == j or generator.random() < 0.5]
    own = regions(sizes, reads, generator.uniform(0.1, 3, len(reads)))
    leaves, upstream = inputs(1, 2, own.n_positions, 8, bool(seed % 2))
    leaves = [x.detach().float().requires_grad_() for x in leaves]
    out = block_attention(*leaves, own, backend="torch")
    exact = block_attention(*(x.double() for x in leaves), own, backend="reference")
    gradients = (torch.autograd.grad(x, leaves, upstream.to(x.dtype)) for x in (out, exact))
    for a, b in ((out, exact), *zip(*gradients)):
        assert (a - b).abs().max() <= 3e-6 * b.abs().max()
    assert taken == [own.n_positions]


def test_which_tables_run_under_a_mask(free_masks, monkeypatch):
    assert frames.frame_rows(regions((4, 3), [(0, 0), (1, 0), (1, 1)], [1.0] * 3).key) == 7
    assert frames.frame_rows(regions((4, 3), [(0, 0), (0, 1)], [1.0, 0.5]).key) == 0  # rows that read nothing
    assert frames.frame_rows(regions((4, 1), [(0, 0), (1, 1)], [1.0, 0.5]).key) == 0  # a row that reads itself alone
    twice = BlockTable.from_rectangles(
        "joint", 4, 0, q_start=[0, 0], q_stop=[4, 4], k_start=[0, 1], k_stop=[3, 2], weight=[1.0, 1.0]
    )
    assert frames._addends(twice) is None  # a key that is read twice counts twice
    edge = table(6, [(0, 0, 6), (0, 0, 3), (3, 3, 3)])
    assert frames.frame_rows(edge.key) == 0 and frames.frame_mask(edge.key, torch.float32) is None
    for n, expected in ((frames.MASKED_ROWS, frames.MASKED_ROWS), (frames.MASKED_ROWS + 1, 0)):
        assert frames.frame_rows(regions((10, n - 10), [(0, 0), (1, 0), (1, 1)], [1.0] * 3).key) == expected
    monkeypatch.setattr(frames, "MASKED_SHARE", 0.0)
    assert frames.frame_rows(regions((5, 3), [(0, 0), (1, 0), (1, 1)], [1.0] * 3).key) == 0


def test_a_mask_is_taken_where_rates_say_that_it_is_faster(monkeypatch):
    own = regions((5, 31, 8, 13), RING, RING_WEIGHTS)
    rates = dict.fromkeys(costs.COUNTS, 0.0) | {"frame_pair": 1.0, "slab": 1e6, "batch": 1e6}
    monkeypatch.setattr(costs, "choosing", lambda: rates)
    seconds = grouping.group_seconds(grouping.group(own), 57)
    assert seconds > 0 and frames._masked_seconds(57) == 4 * 57 * 57
    for share, rows in ((0.99, 0), (1.01, 57)):
        own.cache.pop("frames", None)
        monkeypatch.setattr(frames, "MASKED_SHARE", share * 4 * 57 * 57 / seconds)
        assert frames.frame_rows(own.key) == rows * (share > 1)


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


@pytest.mark.parametrize("masked", [False, True])
def test_compiled_without_a_break(masked, taken, free_masks):
    own = regions((5, 31, 8, 13), RING, RING_WEIGHTS) if masked else equal(3, 210)
    leaves, upstream = inputs(1, 2, own.n_positions, 8, False)
    compiled = torch.compile(lambda q, k, v: block_attention(q, k, v, own), backend="aot_eager", fullgraph=True)
    out, eager = compiled(*leaves), block_attention(*leaves, own)
    gradients = (torch.autograd.grad(x, leaves, upstream) for x in (out, eager))
    for a, b in ((out, eager), *zip(*gradients)):
        assert (a - b).abs().max() <= 1e-13 * b.abs().max()
