"""Which pairs inside a connection are computed: mask specifications, boxes and rectangle covers.

A *box* is an int64 array ``[1 + n_spatial, 2]`` of half-open ranges, ``((t0, t1), (s0_lo, s0_hi), ...)``, in canvas
coordinates. Only `mask_to_index_pairs` enumerates positions.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from canvas_engineering.canvas.layout import CanvasLayout
from canvas_engineering.checked import checked_choice, checked_int, checked_ints, checked_kind, shown
from canvas_engineering.notices import warn

__all__ = [
    "MaskSpec",
    "PatternCover",
    "Rect",
    "mask_parts",
    "mask_to_index_pairs",
    "pattern_cover",
    "rect_cover",
    "split_boxes",
]

_KINDS = ("full", "tile", "sparse")


def _nested(values: Any) -> Any:
    return tuple(_nested(value) for value in values) if isinstance(values, list) else values


def _checked_pattern(pattern: Any) -> tuple:
    try:
        array = pattern.detach().cpu().numpy() if isinstance(pattern, torch.Tensor) else np.asarray(pattern)
    except (TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise ValueError(
            f"MaskSpec pattern must be a nested tuple of bools with rows of equal length: {error}"
        ) from error
    if array.dtype != np.bool_ or array.ndim < 2 or array.size == 0:
        raise ValueError(
            "MaskSpec pattern must be a nested tuple of bools of dst's box shape (t, s0, ...) or of shape "
            f"(|src|, |dst|), got dtype {array.dtype} and shape {array.shape}"
        )
    return _nested(array.tolist())


@dataclass(frozen=True)
class MaskSpec:
    """Splits or masks the attention sets of a connection.

    Args:
        kind: "full" (every query attends to every key of its set), "tile" (one set per tile of src's spatial grid, with
            dst's keys in the same absolute tile, or all of dst's keys where it has none there) or "sparse" (only the
            pairs that ``pattern`` marks).
        tile_h: tile size along the first spatial dimension, where `CanvasLayout.H` lies.
        tile_w: tile size along the second spatial dimension, where `CanvasLayout.W` lies.
        tile_shape: tile size along every spatial dimension; wins over ``tile_h`` and ``tile_w``.
        pattern: for "sparse", bools either of dst's box shape ``(t, s0, ...)``, which select the keys of every query,
            or of shape ``(|src|, |dst|)``, which select pairs; None masks nothing, with a UserWarning. Lists,
            arrays and tensors of bools are stored as nested tuples, so that the spec is hashable.

    Tiles lie on the absolute grid of the canvas: tile ``i`` along a dimension holds the coordinates from
    ``i * size`` up to ``(i + 1) * size``, wherever the regions begin.

    Raises:
        ValueError: an unknown kind, a tile size below 1, or a pattern with another kind than "sparse".

    >>> MaskSpec("tile", tile_h=4, tile_w=2).tiles(2)
    (4, 2)
    """

    kind: str = "full"
    tile_h: int = 1
    tile_w: int = 1
    tile_shape: tuple[int, ...] | None = None
    pattern: tuple | None = None

    def __post_init__(self) -> None:
        checked_choice(self.kind, "mask kind", _KINDS)
        for name in ("tile_h", "tile_w"):
            size = checked_int(getattr(self, name), f"MaskSpec {name}", 1, kind="an int of at least 1")
            object.__setattr__(self, name, size)
        if self.tile_shape is not None:
            sizes = checked_ints(self.tile_shape, "MaskSpec tile_shape", 1, kind="an int of at least 1")
            object.__setattr__(self, "tile_shape", sizes)
        if self.kind != self.effective_kind:
            warn("a mask of kind 'sparse' without a pattern masks nothing: it is the same as 'full'")
        if self.pattern is not None:
            if self.kind != "sparse":
                raise ValueError(f"a mask of kind {self.kind!r} takes no pattern: only 'sparse' does")
            object.__setattr__(self, "pattern", _checked_pattern(self.pattern))

    def __hash__(self) -> int:
        # A pattern may hold a million bools and the spec is part of every cache key, so its hash is computed once.
        # Only ints and bools enter it: it is then the same in every process, and a pickled one stays right.
        cached = self.__dict__.get("_hash")
        if cached is None:
            fields = (_KINDS.index(self.kind), self.tile_h, self.tile_w, self.tile_shape or (), self.pattern or ())
            cached = hash(fields)
            object.__setattr__(self, "_hash", cached)
        return cached

    @property
    def effective_kind(self) -> str:
        """``kind``, but "full" for a sparse mask without a pattern."""
        return "full" if self.kind == "sparse" and self.pattern is None else self.kind

    def tiles(self, n_spatial: int) -> tuple[int, ...]:
        """Returns the tile size along each of the layout's ``n_spatial`` spatial dimensions.

        ``tile_shape``, if given. Otherwise ``tile_h`` and ``tile_w`` belong to the first two spatial
        dimensions, as H and W do, and any further dimension has tiles of size 1.

        Raises:
            ValueError: ``tile_shape`` of another length, or, on a canvas with one spatial dimension, a ``tile_w``
                that has nothing to apply to and differs from ``tile_h``.

        >>> MaskSpec("tile", tile_h=4, tile_w=2).tiles(3)
        (4, 2, 1)
        """
        if self.tile_shape is not None:
            if len(self.tile_shape) != n_spatial:
                raise ValueError(
                    f"tile_shape {self.tile_shape} has {len(self.tile_shape)} dimensions, the canvas has {n_spatial} "
                    "spatial dimensions"
                )
            return self.tile_shape
        if n_spatial == 1:
            if self.tile_w not in (1, self.tile_h):
                raise ValueError(
                    f"tile_h={self.tile_h}, tile_w={self.tile_w} is ambiguous on a canvas with one spatial dimension: "
                    "give tile_shape"
                )
            return (self.tile_h,)
        return (self.tile_h, self.tile_w) + (1,) * (n_spatial - 2)


def split_boxes(spec: MaskSpec, q_box: np.ndarray, k_box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Splits one attention set into one per absolute tile that its queries lie in.

    Args:
        spec: a mask of kind "tile"; "full" returns the set as the only row.
        q_box: queries, int64 ``[D, 2]``.
        k_box: keys, int64 ``[D, 2]``.

    Returns:
        ``(q_boxes, k_boxes)``, int64 ``[n, D, 2]`` each: tiles in row-major order; the keys of a row are those of
        ``k_box`` in the same spatial tile, or all of ``k_box`` where it has none there. Time is not split.

    Raises:
        ValueError: a mask of kind "sparse" (see `pattern_cover`), or tiles that do not fit the number of dimensions.

    >>> spec = MaskSpec("tile", tile_shape=(2,))
    >>> queries, keys = split_boxes(spec, np.array([[0, 1], [1, 4]]), np.array([[0, 1], [3, 9]]))
    >>> queries[:, 1].tolist(), keys[:, 1].tolist()
    ([[1, 2], [2, 4]], [[3, 9], [3, 4]])
    """
    q_box, k_box = np.asarray(q_box, dtype=np.int64), np.asarray(k_box, dtype=np.int64)
    if spec.effective_kind == "full":
        return q_box[None].copy(), k_box[None].copy()
    if spec.effective_kind == "sparse":
        raise ValueError("a sparse mask has no tiles: use pattern_cover() for its rectangles")
    size = np.array(spec.tiles(len(q_box) - 1), dtype=np.int64)
    first = q_box[1:, 0] // size
    counts = (q_box[1:, 1] - 1) // size - first + 1
    tiles = np.indices(tuple(counts), dtype=np.int64).reshape(len(size), -1).T + first  # [n, n_spatial]
    low, high = tiles * size, (tiles + 1) * size
    q_boxes = np.empty((len(tiles), len(q_box), 2), dtype=np.int64)
    q_boxes[:, 0] = q_box[0]
    q_boxes[:, 1:, 0] = np.maximum(low, q_box[1:, 0])
    q_boxes[:, 1:, 1] = np.minimum(high, q_box[1:, 1])
    shared = np.stack([np.maximum(low, k_box[1:, 0]), np.minimum(high, k_box[1:, 1])], axis=-1)
    meets = (shared[..., 0] < shared[..., 1]).all(axis=1)
    k_boxes = np.repeat(k_box[None], len(tiles), axis=0)
    k_boxes[meets, 1:] = shared[meets]
    return q_boxes, k_boxes


@dataclass(frozen=True, eq=False)
class PatternCover:
    """The marked pairs of a sparse mask as disjoint rectangles, relative to the regions' full boxes.

    Attributes:
        pair: whether the pattern marks (query, key) pairs; otherwise it marks keys, the same for every query.
        k_boxes: for ``pair=False``, int64 ``[n, D, 2]``: disjoint boxes, relative to dst's first corner, that hold
            exactly the marked keys; ``[0, D, 2]`` otherwise.
        rects: for ``pair=True``, int64 ``[n, 2, 2]``: disjoint rectangles ``((i0, i1), (j0, j1))`` over the row-major
            lists of src's and dst's positions, that hold exactly the marked pairs; ``[0, 2, 2]`` otherwise.

    Time is the slowest axis, so frames are contiguous ranges of either list. All keys of a query belong to one softmax,
    however many rectangles hold them.
    """

    pair: bool
    k_boxes: np.ndarray
    rects: np.ndarray


@lru_cache(maxsize=1024)
def pattern_cover(spec: MaskSpec, q_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> PatternCover:
    """Covers the pattern of a sparse mask by rectangles, for regions of the given box shapes ``(t, s0, ...)``.

    Raises:
        ValueError: the mask has no pattern, or one whose shape is neither ``k_shape`` nor ``(|src|, |dst|)``.

    >>> spec = MaskSpec("sparse", pattern=((True, True), (False, False)))
    >>> pattern_cover(spec, (2, 2), (2, 2)).k_boxes.tolist()
    [[[0, 1], [0, 2]]]
    """
    if spec.pattern is None:
        raise ValueError(f"a mask of kind {spec.kind!r} has no pattern")
    q_shape, k_shape = tuple(q_shape), tuple(k_shape)
    pattern = np.array(spec.pattern, dtype=bool)
    pair_shape = (math.prod(q_shape), math.prod(k_shape))
    if pattern.shape not in (k_shape, pair_shape):
        raise ValueError(
            f"mask pattern of shape {pattern.shape} fits neither dst's box shape {k_shape} nor the (|src|, |dst|) "
            f"pairs {pair_shape} of a src box of shape {q_shape}"
        )
    # Both shapes are equal only where src and dst's frame count are 1, and then both mean the same pairs.
    pair = pattern.shape != k_shape
    ranges = np.array([rect.ranges for rect in rect_cover(torch.from_numpy(pattern))], dtype=np.int64)
    ranges = ranges.reshape(-1, pattern.ndim, 2)
    ranges.setflags(write=False)
    empty = np.zeros((0, 2 if not pair else len(k_shape), 2), dtype=np.int64)
    return PatternCover(pair, k_boxes=empty if pair else ranges, rects=ranges if pair else empty)


def mask_parts(
    spec: MaskSpec,
    q_region: np.ndarray,
    k_region: np.ndarray,
    q_frames: np.ndarray,
    k_frames: np.ndarray,
    whole_keys: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Splits or masks the attention sets of one connection, for all frames at once.

    Args:
        spec: the mask.
        q_region, k_region: the boxes of src and of dst, int64 ``[D, 2]``.
        q_frames, k_frames: int64 ``[n, 2]``: the query and key frames of each of the connection's n sets.
        whole_keys: whether queries with any key under the mask attend to all keys of their frames.

    Returns:
        ``(row, part_set, q_boxes, k_boxes)``: ``row`` int64 ``[R]``, ascending, is the original set of each resulting
        set. ``part_set`` int64 ``[P]``, ascending, is the resulting set of each part, in which the queries of
        ``q_boxes[i]`` attend to the keys of ``k_boxes[i]``, int64 ``[P, D, 2]`` each; no pair is repeated.

    Raises:
        ValueError: tiles or a pattern that do not fit the regions.

    >>> frame, box = np.array([[0, 1]]), np.array([[0, 1], [0, 3]])
    >>> spec = MaskSpec("sparse", pattern=((True, True, False), (False, True, False), (False, True, True)))
    >>> row, part_set, queries, keys = mask_parts(spec, box, box, frame, frame)
    >>> part_set.tolist(), queries[:, 1].tolist(), keys[:, 1].tolist()
    ([0, 0, 0], [[0, 1], [1, 2], [2, 3]], [[0, 2], [1, 2], [1, 3]])
    """
    if spec.effective_kind != "sparse":
        q_boxes, k_boxes = split_boxes(spec, q_region, k_region)
        row, tile = (part.ravel() for part in np.indices((len(q_frames), len(q_boxes))))
        q_boxes, k_boxes = q_boxes[tile], k_boxes[tile] if not whole_keys else np.repeat(k_region[None], len(row), 0)
        q_boxes[:, 0], k_boxes[:, 0] = q_frames[row], k_frames[row]
        return row, np.arange(len(row)), q_boxes, k_boxes
    q_size, k_size = (tuple(np.diff(region).ravel().tolist()) for region in (q_region, k_region))
    cover = pattern_cover(spec, q_size, k_size)
    if cover.pair:
        q_ranges = (q_frames - q_region[0, 0]) * math.prod(q_size[1:])
        k_ranges = (k_frames - k_region[0, 0]) * math.prod(k_size[1:])
        q_rects, k_rects = cover.rects[:, 0], cover.rects[:, 1]
        row, rect = np.nonzero(_overlaps(q_ranges, q_rects) & _overlaps(k_ranges, k_rects))
        queries, keys = _clipped(q_rects[rect], q_ranges[row]), _clipped(k_rects[rect], k_ranges[row])
        if whole_keys:
            row, queries = _joined_ranges(row, queries)
            keys = k_ranges[row]
        owner, q_boxes = _range_boxes(queries, q_size)
        k_owner, k_boxes = _range_boxes(keys, k_size)
        # every box of a rectangle's queries with every box of its keys
        count = np.bincount(k_owner, minlength=len(row))
        first, count = (np.cumsum(count) - count)[owner], count[owner]
        q_at = np.repeat(np.arange(len(owner)), count)
        k_at = np.arange(len(q_at)) + np.repeat(first - np.cumsum(count) + count, count)
        row = row[owner[q_at]]
        q_boxes, k_boxes = q_boxes[q_at] + q_region[:, :1], k_boxes[k_at] + k_region[:, :1]
    else:
        key_boxes = cover.k_boxes + k_region[:, :1]
        row, box = np.nonzero(_overlaps(k_frames, key_boxes[:, 0]))
        k_boxes = key_boxes[box]
        if whole_keys:
            row = np.unique(row)
            k_boxes = np.repeat(k_region[None], len(row), 0)
        k_boxes[:, 0] = _clipped(k_boxes[:, 0], k_frames[row])
        q_boxes = np.repeat(q_region[None], len(row), 0)
        q_boxes[:, 0] = q_frames[row]
    row, part_set = np.unique(row, return_inverse=True)
    return row, part_set.reshape(-1), q_boxes, k_boxes


def _overlaps(ranges: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns bool ``[n, m]``: which of ``ranges`` ``[n, 2]`` overlap which of ``others`` ``[m, 2]``."""
    return (ranges[:, :1] < others[:, 1]) & (others[:, 0] < ranges[:, 1:])


def _clipped(ranges: np.ndarray, limits: np.ndarray) -> np.ndarray:
    return np.clip(ranges, limits[:, :1], limits[:, 1:])


def _joined_ranges(row: np.ndarray, ranges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the union of the ranges ``[n, 2]`` of each row, as rows and disjoint ranges, both ascending."""
    order = np.lexsort((ranges[:, 0], row))
    row, ranges = row[order], ranges[order]
    # shifted so that the ranges of different rows are disjoint, with a gap
    shift = row * (ranges.max(initial=0) + 1)
    reached = np.maximum.accumulate(ranges[:, 1] + shift)
    starts = np.flatnonzero(np.append(True, ranges[1:, 0] + shift[1:] > reached[:-1])[: len(row)])
    stops = np.append(starts[1:], len(row))[: len(starts)] - 1
    return row[starts], np.stack([ranges[starts, 0], (reached - shift)[stops]], axis=1)


def _range_boxes(ranges: np.ndarray, size: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (owner, boxes): boxes ``[m, D, 2]`` that hold, in order, the elements of each range ``[n, 2]`` of the
    row-major list of a box of ``size``; ``owner`` is the range of each."""
    if len(size) == 1:
        return np.arange(len(ranges)), ranges[:, None]
    volume = math.prod(size[1:])
    low, high = ranges.T
    first, last = -(-low // volume), high // volume  # the frames that a range holds whole
    stop = np.minimum(high, first * volume)
    before, whole = np.flatnonzero(low < stop), np.flatnonzero(first < last)
    after = np.flatnonzero((first <= last) & (last * volume < high))
    owner = np.concatenate([before, after])
    index = np.concatenate([low[before] // volume, last[after]])
    inner = np.stack([np.concatenate([low[before], last[after] * volume]), np.concatenate([stop[before], high[after]])])
    part, inner_boxes = _range_boxes((inner - index * volume).T, size[1:])
    full = np.broadcast_to(np.array([[0, length] for length in size[1:]]), (len(whole), len(size) - 1, 2))
    outer_boxes = np.concatenate([np.stack([index, index + 1], axis=1)[part], np.stack([first, last], axis=1)[whole]])
    boxes = np.concatenate([outer_boxes[:, None], np.concatenate([inner_boxes, full])], axis=1)
    owner = np.concatenate([owner[part], whole])
    order = np.lexsort((outer_boxes[:, 0], owner))
    return owner[order], boxes[order]


class Rect:
    """A box of grid elements: half-open ranges, one per dimension. Immutable, hashable, equal by ranges.

    Takes flat (lo, hi) pairs or nested ranges.

    >>> Rect(0, 2, 1, 4, 0, 3) == Rect(ranges=((0, 2), (1, 4), (0, 3)))
    True
    >>> Rect(0, 2, 1, 4, 0, 3).volume
    18

    Raises:
        ValueError: an odd number of bounds, a bound that is not an int, or a range that ends before it starts.
    """

    __slots__ = ("ranges",)
    ranges: tuple[tuple[int, int], ...]

    def __init__(self, *args: Any, ranges: tuple[tuple[int, int], ...] | None = None) -> None:
        if (ranges is None) == (not args):
            raise ValueError(f"Rect takes either flat (lo, hi) pairs or ranges, got {args!r} and ranges={ranges!r}")
        given = args if ranges is None else ranges
        try:
            if isinstance(given, bytes):
                raise TypeError
            if len(args) == 1:  # Rect(((t0, t1), (h0, h1), ...))
                given = args[0]
            if not isinstance(given[0], (tuple, list)):
                given = [given[start : start + 2] for start in range(0, len(given), 2)]
            pairs = tuple((checked_int(low, "a bound"), checked_int(high, "a bound")) for low, high in given)
        except (TypeError, ValueError, LookupError):
            raise ValueError(f"Rect bounds must be ints in (lo, hi) pairs, got {shown(given)}") from None
        for low, high in pairs:
            if low > high:
                raise ValueError(f"Rect range ({low}, {high}) ends before it starts")
        object.__setattr__(self, "ranges", pairs)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"Rect is immutable: cannot set {name!r}")

    def __reduce__(self) -> tuple:
        return _rect_from_ranges, (self.ranges,)

    def __eq__(self, other: object) -> bool:
        return self.ranges == other.ranges if isinstance(other, Rect) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.ranges)

    def __repr__(self) -> str:
        return f"Rect({', '.join(str(bound) for pair in self.ranges for bound in pair)})"

    @property
    def volume(self) -> int:
        """Number of elements."""
        return math.prod(high - low for low, high in self.ranges)

    def _bound(self, name: str, axis: int, end: int) -> int:
        if axis >= len(self.ranges):
            raise AttributeError(f"a Rect of {len(self.ranges)} dimensions has no {name}")
        return self.ranges[axis][end]

    @property
    def t0(self) -> int:
        """First index along the first of the dimensions (t, h, w)."""
        return self._bound("t0", 0, 0)

    @property
    def t1(self) -> int:
        """End along t."""
        return self._bound("t1", 0, 1)

    @property
    def h0(self) -> int:
        """First index along h."""
        return self._bound("h0", 1, 0)

    @property
    def h1(self) -> int:
        """End along h."""
        return self._bound("h1", 1, 1)

    @property
    def w0(self) -> int:
        """First index along w."""
        return self._bound("w0", 2, 0)

    @property
    def w1(self) -> int:
        """End along w."""
        return self._bound("w1", 2, 1)


def _rect_from_ranges(ranges: tuple[tuple[int, int], ...]) -> Rect:
    return Rect(ranges=ranges)


def _merge_equal_planes(grid: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Merges equal neighbouring hyperplanes along every axis; returns the remaining grid and its bounds."""
    axis_bounds = []
    for axis, length in enumerate(grid.shape):
        rows = np.moveaxis(grid, axis, 0).reshape(length, -1)
        starts = np.concatenate([[0], np.flatnonzero((rows[1:] != rows[:-1]).any(axis=1)) + 1])
        grid = np.take(grid, starts, axis=axis)
        axis_bounds.append(np.append(starts, length).astype(np.int64))
    return grid, axis_bounds


def _runs(grid: np.ndarray, axis_bounds: np.ndarray) -> np.ndarray:
    """Returns the length, in original elements, of the run of True that starts at each element along the last axis."""
    stops = np.where(grid, axis_bounds[-1], axis_bounds[:-1])
    next_false = np.minimum.accumulate(stops[..., ::-1], axis=-1)[..., ::-1]
    return np.where(grid, next_false - axis_bounds[:-1], 0)


def rect_cover(mask: torch.Tensor, min_area: int = 4) -> list[Rect]:
    """Covers the True elements of a mask by disjoint boxes, greedily, largest first.

    Args:
        mask: bool, any number of dimensions from 1 up.
        min_area: smaller boxes are covered by runs along the last dimension.

    Returns:
        Boxes that cover every True element exactly once and no other. Boxes of equal size are ordered by their first
        corner, so that the result is deterministic.

    Raises:
        ValueError: a mask of other values than bools, or without dimensions, or a min_area below 1.

    >>> rect_cover(torch.tensor([[1, 1, 0], [1, 1, 1]], dtype=torch.bool))
    [Rect(0, 2, 0, 2), Rect(1, 2, 2, 3)]
    """
    try:
        grid = np.array(mask.detach().cpu().numpy() if isinstance(mask, torch.Tensor) else mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"rect_cover needs a mask of bools with rows of equal length: {error}") from None
    if grid.dtype != np.bool_:
        raise ValueError(f"rect_cover needs a mask of bools, got {grid.dtype}: compare it first, as in mask > 0")
    if grid.ndim == 0:
        raise ValueError("rect_cover needs a mask of at least one dimension, got a scalar")
    min_area = checked_int(min_area, "rect_cover", 1, kind="given a min_area of at least 1")
    if not grid.any():
        return []
    # Equal neighbouring hyperplanes always belong to the same boxes, so the search may treat them as one.
    grid, axis_bounds = _merge_equal_planes(grid)
    ranges = _remove_largest(grid, axis_bounds, min_area)
    shifted = np.concatenate([np.zeros_like(grid[..., :1]), grid[..., :-1]], axis=-1)
    starts = np.argwhere(grid & ~shifted)
    if len(starts):
        lengths = _runs(grid, axis_bounds[-1])[tuple(starts.T)]
        corners = np.stack([axis_bounds[axis][starts[:, axis]] for axis in range(grid.ndim)], axis=1)
        ends = np.stack([axis_bounds[axis][starts[:, axis] + 1] for axis in range(grid.ndim)], axis=1)
        ends[:, -1] = corners[:, -1] + lengths
        ranges += [
            tuple(zip(low, high, strict=True)) for low, high in zip(corners.tolist(), ends.tolist(), strict=True)
        ]
    return [Rect(ranges=pairs) for pairs in ranges]


def _remove_largest(grid: np.ndarray, axis_bounds: list[np.ndarray], min_area: int) -> list[tuple]:
    """Removes the largest box from ``grid``, in place, while one of ``min_area`` elements is left.

    A heap holds, per element, an upper bound on the largest box with that first corner. Removing elements only shrinks
    boxes, so a bound that is exact when popped is the maximum, and stale bounds are updated only then.
    """
    outer = grid.ndim - 1
    runs = _runs(grid, axis_bounds[-1])
    bounds = runs.copy()
    reach = np.empty((outer, *grid.shape), dtype=np.int64)  # end index of the run up each outer axis, at the start
    for axis in range(outer):
        along = np.moveaxis(grid, axis, -1)
        lengths = _runs(along, axis_bounds[axis])
        bounds *= np.moveaxis(lengths, -1, axis)
        ends = np.searchsorted(axis_bounds[axis], lengths + axis_bounds[axis][:-1])
        reach[axis] = np.moveaxis(ends, -1, axis)

    corners = np.flatnonzero(bounds >= min_area)
    heap = [(-bound, corner) for bound, corner in zip(bounds.flat[corners].tolist(), corners.tolist(), strict=True)]
    heapq.heapify(heap)
    boxes = []
    while heap:
        bound, corner = heap[0]
        index = np.unravel_index(corner, grid.shape)
        if not grid[index]:
            heapq.heappop(heap)
            continue
        stops = reach[(slice(None), *index)]
        box = tuple(slice(start, stop) for start, stop in zip(index[:-1], stops, strict=True))
        low = runs[(*box, index[-1])]
        for axis in range(outer):
            low = np.minimum.accumulate(low, axis=axis)
        volume = low
        for axis, part in enumerate(box):
            extent = axis_bounds[axis][part.start + 1 : part.stop + 1] - axis_bounds[axis][part.start]
            volume = volume * extent.reshape((-1,) + (1,) * (outer - 1 - axis))
        best = int(np.argmax(volume))
        largest = int(volume.reshape(-1)[best])
        if largest < min_area:
            heapq.heappop(heap)
        elif largest < -bound:
            heapq.heapreplace(heap, (-largest, corner))
        else:
            heapq.heappop(heap)
            reached = np.unravel_index(best, volume.shape)
            lows = [int(axis_bounds[axis][index[axis]]) for axis in range(grid.ndim)]
            highs = [int(axis_bounds[axis][index[axis] + reached[axis] + 1]) for axis in range(outer)]
            highs.append(lows[-1] + int(low[reached]))
            rows = tuple(slice(index[axis], index[axis] + int(reached[axis]) + 1) for axis in range(outer))
            stop = int(np.searchsorted(axis_bounds[-1], highs[-1]))
            grid[(*rows, slice(index[-1], stop))] = False
            runs[rows] = _runs(grid[rows], axis_bounds[-1])
            boxes.append(tuple(zip(lows, highs, strict=True)))
    return boxes


def mask_to_index_pairs(
    mask_spec: MaskSpec, layout: CanvasLayout, src: str, dst: str
) -> list[tuple[list[int], list[int]]]:
    """Returns (queries, keys) lists of flat canvas indices for a mask on a connection that is dense in time.

    Every position of the first list attends to all of the second. "full" gives one pair of lists; "tile" one pair
    per tile of src's spatial box, over all timesteps; "sparse" one pair per distinct set of marked keys (none for
    queries without any).

    Raises:
        KeyError: a region that the layout does not have.
        ValueError: tiles or a pattern that do not fit the layout.

    >>> layout = CanvasLayout(T=1, d_model=8, spatial_shape=(1, 4), regions={"a": (0, 1, 0, 1, 0, 4)})
    >>> mask_to_index_pairs(MaskSpec("tile", tile_h=1, tile_w=2), layout, "a", "a")
    [([0, 1], [0, 1]), ([2, 3], [2, 3])]
    """
    checked_kind(mask_spec, "mask_spec", MaskSpec), checked_kind(layout, "layout", CanvasLayout)
    q_box, k_box = layout.region_box(src), layout.region_box(dst)
    if mask_spec.effective_kind != "sparse":
        boxes = zip(*split_boxes(mask_spec, q_box, k_box), strict=True)
        return [(_box_indices(layout, rows).tolist(), _box_indices(layout, keys).tolist()) for rows, keys in boxes]
    queries, keys = layout.region_positions(src), layout.region_positions(dst)
    pattern = np.array(mask_spec.pattern, dtype=bool)
    if not pattern_cover(mask_spec, layout.region_size(src), layout.region_size(dst)).pair:
        keys = keys[pattern.reshape(-1)].tolist()
        return [(queries.tolist(), keys)] if keys else []
    rows, first, member = np.unique(pattern, axis=0, return_index=True, return_inverse=True)
    in_order = (row for row in np.argsort(first).tolist() if rows[row].any())
    return [(queries[member.reshape(-1) == row].tolist(), keys[rows[row]].tolist()) for row in in_order]


def _box_indices(layout: CanvasLayout, box: np.ndarray) -> np.ndarray:
    grid = np.arange(layout.num_positions).reshape(layout.T, *layout.spatial_shape)
    return grid[tuple(slice(low, high) for low, high in box.tolist())].reshape(-1)
