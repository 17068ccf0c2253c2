"""Mask specifications, tiles, patterns and rectangle covers."""

from __future__ import annotations

import itertools
import json
import math
import pickle
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from canvas_engineering import CanvasLayout, MaskSpec, Rect, RegionSpec, mask_to_index_pairs, rect_cover
from canvas_engineering.masks import mask_parts, pattern_cover, split_boxes


@st.composite
def bool_tensors(draw, max_dims=3, max_side=7, min_dims=1):
    shape = draw(st.lists(st.integers(1, max_side), min_size=min_dims, max_size=max_dims))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.2, 0.5, 0.8, 0.95, 1.0]))


def _cells(rect):
    return tuple(slice(low, high) for low, high in rect.ranges)


def _largest(cells):
    """Volume of the largest box of True cells, by trying all of them."""
    best = 0
    for corner in np.ndindex(*cells.shape):
        for extent in np.ndindex(*(size - low for size, low in zip(cells.shape, corner))):
            box = tuple(slice(low, low + more + 1) for low, more in zip(corner, extent))
            if cells[box].size > best and cells[box].all():
                best = cells[box].size
    return best


# --- Rect


def test_rect_forms_are_equal():
    flat = Rect(0, 2, 1, 4, 3, 8)
    ranges = ((0, 2), (1, 4), (3, 8))
    assert flat == Rect(*ranges) == Rect(ranges) == Rect(ranges=[[0, 2], [1, 4], [3, 8]])
    assert hash(flat) == hash(Rect(ranges=ranges))
    assert flat != Rect(0, 2, 1, 4, 3, 9)
    assert flat != ranges
    assert flat.ranges == ranges
    assert flat.volume == 2 * 3 * 5
    assert (flat.t0, flat.t1, flat.h0, flat.h1, flat.w0, flat.w1) == (0, 2, 1, 4, 3, 8)
    assert pickle.loads(pickle.dumps(flat)) == flat
    assert repr(flat) == "Rect(0, 2, 1, 4, 3, 8)"


def test_rect_is_immutable_and_knows_its_dimensions():
    rect = Rect(0, 2, 1, 4)
    with pytest.raises(AttributeError, match=r"immutable.*'ranges'"):
        rect.ranges = ()
    with pytest.raises(AttributeError, match="2 dimensions has no w0"):
        _ = rect.w0


@pytest.mark.parametrize(
    "arguments, ranges, message",
    [
        ((), None, "either flat"),
        ((0, 1), ((0, 1),), "either flat"),
        ((0, 1, 2), None, r"pairs, got .*\(2,\)"),
        ((0, 1.5), None, "must be ints.*1.5"),
        ((), ((0, 1, 2),), r"pairs, got \(\(0, 1, 2\),\)"),
        ((3, 1), None, r"\(3, 1\) ends before it starts"),
    ],
)
def test_bad_rects(arguments, ranges, message):
    with pytest.raises(ValueError, match=message):
        Rect(*arguments, ranges=ranges)


# --- rect_cover


@given(bool_tensors(max_dims=4, max_side=5), st.sampled_from([1, 2, 4, 9]))
def test_cover_is_exact_and_disjoint(mask, min_area):
    count = torch.zeros(mask.shape, dtype=torch.int64)
    for rect in rect_cover(mask, min_area):
        count[_cells(rect)] += 1
    assert torch.equal(count, mask.long())


@given(bool_tensors(max_dims=3, max_side=4), st.sampled_from([1, 4]))
def test_cover_takes_the_largest_box_first(mask, min_area):
    left = mask.numpy().copy()
    for rect in rect_cover(mask, min_area):
        largest = _largest(left)
        if largest >= min_area:
            assert rect.volume == largest
        left[_cells(rect)] = False
    assert not left.any()


def test_cover_of_the_remainder_goes_by_runs():
    mask = torch.tensor([[1, 1, 1, 0, 1], [0, 0, 0, 1, 0]], dtype=torch.bool)
    assert rect_cover(mask, min_area=4) == [Rect(0, 1, 0, 3), Rect(0, 1, 4, 5), Rect(1, 2, 3, 4)]


def test_cover_of_simple_masks():
    assert rect_cover(torch.zeros(3, 4, dtype=torch.bool)) == []
    assert rect_cover(torch.ones(3, 4, 5, dtype=torch.bool)) == [Rect(0, 3, 0, 4, 0, 5)]
    blocks = torch.block_diag(torch.ones(20, 30), torch.ones(10, 5)).bool()
    assert rect_cover(blocks) == [Rect(0, 20, 0, 30), Rect(20, 30, 30, 35)]
    assert rect_cover(np.array([True, True])) == [Rect(0, 2)]
    with pytest.raises(ValueError, match="at least one dimension"):
        rect_cover(torch.tensor(True))
    with pytest.raises(ValueError, match="min_area of at least 1, got 0"):
        rect_cover(torch.ones(1, dtype=torch.bool), 0)


def test_cover_of_a_larger_random_mask_is_deterministic():
    mask = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) < 0.6
    rects = rect_cover(mask)
    assert rects == rect_cover(mask.numpy())
    assert sum(rect.volume for rect in rects) == mask.sum()
    volumes = [rect.volume for rect in rects if rect.volume >= 4]
    assert volumes == sorted(volumes, reverse=True)
    assert len(rects) < mask.sum() / 2


# --- MaskSpec


def test_tiles_in_every_number_of_dimensions():
    spec = MaskSpec("tile", tile_h=4, tile_w=2)
    assert spec.tiles(2) == (4, 2)
    assert spec.tiles(3) == (4, 2, 1)
    assert MaskSpec("tile", tile_h=4).tiles(1) == (4,)
    assert MaskSpec("tile", tile_h=4, tile_w=4).tiles(1) == (4,)
    assert MaskSpec("tile", tile_shape=[2, 3, 5]).tiles(3) == (2, 3, 5)
    with pytest.raises(ValueError, match="tile_h=4, tile_w=2 is ambiguous"):
        spec.tiles(1)
    with pytest.raises(ValueError, match=r"tile_shape \(2, 3, 5\).*2 spatial"):
        MaskSpec("tile", tile_shape=(2, 3, 5)).tiles(2)


def test_patterns_are_hashable_whatever_they_were_given():
    rows = [[True, False], [False, True]]
    forms = [rows, tuple(map(tuple, rows)), torch.tensor(rows), np.array(rows)]
    specs = {MaskSpec("sparse", pattern=form) for form in forms}
    assert specs == {MaskSpec("sparse", pattern=((True, False), (False, True)))}
    assert MaskSpec("sparse", pattern=rows) != MaskSpec("sparse", pattern=[[True, False], [True, True]])


def test_hashes_are_the_same_in_every_process():
    # Strings and None hash differently from one process to the next; ints, bools and their tuples do not.
    assert hash(MaskSpec("sparse", tile_h=2, pattern=((True, False),))) == hash((2, 2, 1, (), ((True, False),)))
    assert hash(MaskSpec("tile", tile_shape=(3, 4))) == hash((1, 1, 1, (3, 4), ()))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"kind": "banded"}, "unknown mask kind 'banded': choose one of full, tile, sparse"),
        ({"tile_h": 0}, "tile_h must be an int of at least 1, got 0"),
        ({"tile_w": True}, "tile_w must be an int of at least 1, got True"),
        ({"tile_shape": (2, 1.5)}, "tile_shape must be an int of at least 1, got 1.5"),
        ({"tile_shape": 2}, "tile_shape must be a tuple of ints, got 2"),
        ({"kind": "tile", "pattern": ((True,),)}, "'tile' takes no pattern"),
        ({"pattern": ((True,),)}, "'full' takes no pattern"),
        ({"kind": "sparse", "pattern": ((True,), (True, False))}, "rows of equal length"),
        ({"kind": "sparse", "pattern": ((1, 0),)}, "nested tuple of bools.*int64"),
        ({"kind": "sparse", "pattern": (True, False)}, r"nested tuple of bools.*\(2,\)"),
        ({"kind": "sparse", "pattern": ()}, "nested tuple of bools"),
    ],
)
def test_bad_masks(fields, message):
    with pytest.raises(ValueError, match=message):
        MaskSpec(**fields)


# --- split_boxes


@st.composite
def boxes(draw, sizes):
    low = [draw(st.integers(0, size - 1)) for size in sizes]
    return np.array([(a, draw(st.integers(a + 1, size))) for a, size in zip(low, sizes)], dtype=np.int64)


@given(st.data())
def test_split_boxes_equal_the_definition(data):
    n_spatial = data.draw(st.integers(1, 3))
    sizes = [3] + [data.draw(st.integers(1, 6)) for _ in range(n_spatial)]
    tile = tuple(data.draw(st.integers(1, 4)) for _ in range(n_spatial))
    q_box, k_box = data.draw(boxes(sizes)), data.draw(boxes(sizes))

    def cells(box):
        return set(itertools.product(*(range(low, high) for low, high in box.tolist())))

    def tile_of(cell):
        return tuple(c // size for c, size in zip(cell[1:], tile))

    q_boxes, k_boxes = split_boxes(MaskSpec("tile", tile_shape=tile), q_box, k_box)
    assert q_boxes.dtype == k_boxes.dtype == np.int64
    tiles = sorted({tile_of(cell) for cell in cells(q_box)})
    assert len(q_boxes) == len(k_boxes) == len(tiles)
    for this, queries, keys in zip(tiles, q_boxes, k_boxes):  # row-major order
        assert cells(queries) == {cell for cell in cells(q_box) if tile_of(cell) == this}
        assert cells(keys) == ({cell for cell in cells(k_box) if tile_of(cell) == this} or cells(k_box))


def test_tiles_lie_on_the_absolute_grid():
    # src starts in the middle of tile (2, 4): its first read has one column of queries, and dst's keys of that tile.
    q_box, k_box = np.array([[0, 2], [3, 7]]), np.array([[0, 2], [2, 4]])
    queries, keys = split_boxes(MaskSpec("tile", tile_shape=(2,)), q_box, k_box)
    assert queries[:, 1].tolist() == [[3, 4], [4, 6], [6, 7]]
    assert keys[:, 1].tolist() == [[2, 4], [2, 4], [2, 4]]  # tiles (4, 6) and (6, 8) hold no key: all of dst


def test_split_boxes_of_other_kinds():
    box = np.array([[0, 1], [0, 2]])
    queries, keys = split_boxes(MaskSpec(), box, box + 1)
    assert queries.tolist() == [box.tolist()]
    assert keys.tolist() == [(box + 1).tolist()]
    with pytest.raises(ValueError, match="sparse mask has no tiles"):
        split_boxes(MaskSpec("sparse", pattern=((True,),)), box, box)


# --- pattern_cover


@given(bool_tensors(min_dims=2, max_dims=4, max_side=4))
def test_a_box_pattern_is_covered_by_boxes(pattern):
    cover = pattern_cover(MaskSpec("sparse", pattern=pattern), (2, 3, 1), tuple(pattern.shape))
    count = torch.zeros(pattern.shape, dtype=torch.int64)
    for box in cover.k_boxes.tolist():
        count[tuple(slice(low, high) for low, high in box)] += 1
    assert torch.equal(count, pattern.long())
    assert not cover.pair
    assert cover.rects.shape == (0, 2, 2)


@given(st.integers(0, 2**32))
def test_a_pair_pattern_is_covered_by_rectangles(seed):
    pattern = torch.rand(6, 8, generator=torch.Generator().manual_seed(seed)) < 0.5
    cover = pattern_cover(MaskSpec("sparse", pattern=pattern), (1, 2, 3), (2, 2, 2))
    count = torch.zeros(6, 8, dtype=torch.int64)
    for (i0, i1), (j0, j1) in cover.rects.tolist():
        count[i0:i1, j0:j1] += 1
    assert torch.equal(count, pattern.long())
    assert cover.pair
    assert cover.k_boxes.shape == (0, 3, 2)


def test_patterns_that_do_not_fit():
    with pytest.raises(
        ValueError, match=r"shape \(2, 3\).*box shape \(2, 2\).*pairs \(4, 4\).*src box of shape \(1, 4\)"
    ):
        pattern_cover(MaskSpec("sparse", pattern=((True,) * 3,) * 2), (1, 4), (2, 2))
    with pytest.raises(ValueError, match="kind 'tile' has no pattern"):
        pattern_cover(MaskSpec("tile"), (1, 4), (2, 2))


# --- mask_parts


def _positions(box):
    return set(itertools.product(*(range(low, high) for low, high in box.tolist())))


@pytest.mark.parametrize("seed", range(60))
def test_parts_of_a_pattern_equal_the_definition(seed):
    rng = np.random.default_rng(seed)
    sizes = [3, *rng.integers(2, 5, size=rng.integers(1, 4))]

    def ranges(limits):
        low = [rng.integers(a, b) for a, b in limits]
        return np.array([[start, rng.integers(start + 1, stop + 1)] for start, (_, stop) in zip(low, limits)])

    q_box, k_box = (ranges([(0, size) for size in sizes]) for _ in range(2))
    q_frames, k_frames = (ranges([box[0]] * 3) for box in (q_box, k_box))
    whole_keys, of_pairs, share = seed % 2 == 0, seed % 3 > 0, rng.choice([0.1, 0.5, 0.9])
    queries, keys = sorted(_positions(q_box)), sorted(_positions(k_box))
    pattern = rng.random((len(queries), len(keys)) if of_pairs else tuple(np.diff(k_box).ravel())) < share
    marked = pattern if pattern.shape == (len(queries), len(keys)) else [pattern.ravel()] * len(queries)

    row, read, q_parts, k_parts = mask_parts(
        MaskSpec("sparse", pattern=pattern), q_box, k_box, q_frames, k_frames, whole_keys
    )
    assert (np.diff(row) > 0).all()  # at most one read of each of the three
    assert read.tolist() == sorted(read.tolist())
    for number in range(3):
        (q0, q1), (k0, k1) = q_frames[number].tolist(), k_frames[number].tolist()
        wanted = {
            (query, key)
            for query, marks in zip(queries, marked)
            for key, mark in zip(keys, marks)
            if mark and q0 <= query[0] < q1 and k0 <= key[0] < k1
        }
        if whole_keys:
            wanted = {(query, key) for query, _ in wanted for key in keys if k0 <= key[0] < k1}
        parts = np.flatnonzero(row[read] == number)
        found = [pair for i in parts for pair in itertools.product(_positions(q_parts[i]), _positions(k_parts[i]))]
        assert len(found) == len(set(found))
        assert set(found) == wanted
        assert (number in row.tolist()) == bool(wanted)


@pytest.mark.parametrize("kind", ["tile", "sparse"])
def test_parts_take_no_python_for_each_frame_or_rectangle(kind):
    def calls(side, frames):
        box = np.array([[0, frames], [0, side], [0, 1]])
        pattern = np.random.default_rng(0).random((frames * side,) * 2) < 0.5
        spec = MaskSpec("tile") if kind == "tile" else MaskSpec("sparse", pattern=pattern)
        if kind == "sparse":
            pattern_cover(spec, (frames, side, 1), (frames, side, 1))  # is kept for every read of the mask
        each = np.stack([np.arange(frames), np.arange(frames) + 1], axis=1)
        seen = []
        sys.setprofile(lambda frame, event, argument: seen.append(event))
        try:
            mask_parts(spec, box, box, each, each)
        finally:
            sys.setprofile(None)
        return len(seen)

    assert calls(16, 8) == calls(4, 2)


# --- mask_to_index_pairs


def two_regions():
    regions = {"a": (0, 2, 1, 4, 0, 2), "b": RegionSpec((1, 3, 0, 3, 1, 3))}
    return CanvasLayout(T=3, H=4, W=3, d_model=4, regions=regions)


def test_index_pairs_of_a_full_mask():
    layout = two_regions()
    assert mask_to_index_pairs(MaskSpec(), layout, "a", "b") == [
        (layout.region_indices("a"), layout.region_indices("b"))
    ]


@pytest.mark.parametrize("tile", [(1, 1), (2, 2), (3, 1), (9, 9)])
def test_index_pairs_of_tiles(tile):
    layout = two_regions()
    a, b = (list(map(list, np.argwhere(_marked(layout, name)))) for name in "ab")
    expected = {}
    for cell in a:
        this = (cell[1] // tile[0], cell[2] // tile[1])
        keys = [key for key in b if (key[1] // tile[0], key[2] // tile[1]) == this] or b
        queries, _ = expected.setdefault(this, ([], [layout.flat_index(*key) for key in keys]))
        queries.append(layout.flat_index(*cell))
    pairs = mask_to_index_pairs(MaskSpec("tile", tile_h=tile[0], tile_w=tile[1]), layout, "a", "b")
    assert pairs == [expected[this] for this in sorted(expected)]


def _marked(layout, name):
    marked = np.zeros(layout.num_positions, dtype=bool)
    marked[layout.region_indices(name)] = True
    return marked.reshape(layout.T, *layout.spatial_shape)


def test_index_pairs_of_a_box_pattern():
    layout = two_regions()
    pattern = np.zeros((2, 3, 2), dtype=bool)
    pattern[0, 1, 0] = pattern[1, 2, 1] = True
    pairs = mask_to_index_pairs(MaskSpec("sparse", pattern=pattern), layout, "a", "b")
    assert pairs == [(layout.region_indices("a"), [layout.flat_index(1, 1, 1), layout.flat_index(2, 2, 2)])]
    none = MaskSpec("sparse", pattern=np.zeros((2, 3, 2), dtype=bool))
    assert mask_to_index_pairs(none, layout, "a", "b") == []


def test_index_pairs_keep_all_marked_keys_of_a_query_together():
    layout = CanvasLayout(T=1, H=8, d_model=4, regions={"a": (0, 1, 0, 4), "b": (0, 1, 4, 7)})
    pattern = ((True, False, True), (False, False, False), (False, True, False), (True, False, True))
    pairs = mask_to_index_pairs(MaskSpec("sparse", pattern=pattern), layout, "a", "b")
    assert pairs == [([0, 3], [4, 6]), ([2], [5])]


def test_index_pairs_of_unknown_regions():
    with pytest.raises(KeyError, match="no region 'c'"):
        mask_to_index_pairs(MaskSpec(), two_regions(), "a", "c")


def test_patterns_are_json():
    spec = MaskSpec("sparse", pattern=((True, False), (False, True)))
    assert MaskSpec("sparse", pattern=json.loads(json.dumps(spec.pattern))) == spec
    assert math.prod(np.shape(spec.pattern)) == 4
