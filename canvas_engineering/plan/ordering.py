"""A packed order of positions in which attention sets are few rectangles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from canvas_kernels.ranges import expand_ranges

from ..canvas import CanvasLayout
from .attention_sets import AttentionSets, SlotBank


@dataclass(frozen=True, eq=False)
class PackedOrder:
    """The n positions that attention sets use, in packed order, and each of their boxes as intervals of it.

    Attributes:
        order: int64 [n], the canvas position of each packed row. Slots come last, numbered from N on.
        interval_start, interval_stop: int64 [I], half-open packed ranges, ascending within a box.
        ptr: int64 [U + 1], box u has the intervals ``ptr[u] … ptr[u + 1] − 1``.
    """

    order: np.ndarray
    interval_start: np.ndarray
    interval_stop: np.ndarray
    ptr: np.ndarray


def pack_positions(layout: CanvasLayout, sets: AttentionSets, banks: Sequence[SlotBank] = ()) -> PackedOrder:
    """Orders positions so that every box of the attention sets is as few intervals as this heuristic finds.

    Positions that no set uses are left out: nothing is projected, loaded or written for them. Positions that lie in the
    same boxes are interchangeable and come together. Within the first declared region that holds them they are sorted
    by time and then by space, or by space and then by time (for spatial tiles over all frames), whichever gives fewer
    intervals. Regions follow one another, or are interleaved frame by frame, smallest first, where that splits no box
    and the queries of equal keys lie in fewer intervals (such rows make one taller rectangle).
    """
    box, position = _box_positions(layout, sets.boxes)
    n = layout.num_positions + sum(bank.size for bank in banks)
    frame_size = layout.num_positions // layout.T
    # A slot bank follows all regions, in its own frame after the canvas's: no order may split or permute banks.
    own = np.repeat(np.arange(len(banks)), np.array([bank.size for bank in banks], dtype=np.int64))
    claim = np.concatenate([_first_claims(layout), len(layout.regions) + 1 + own])
    time = np.concatenate([np.arange(layout.num_positions) // frame_size, layout.T + own])
    # Positions with equal sums lie in the same boxes: with 64 random bits per box a false match has probability 1e-12.
    mark = np.random.default_rng(0).integers(1, 2**63, size=len(sets.boxes), dtype=np.uint64)
    signature = np.zeros(n, np.uint64)
    np.add.at(signature, position, mark[box])
    spatial, spatial_mark = _unique_spatial_boxes(sets.boxes)
    spatial_key = np.zeros(n, np.uint64)
    np.add.at(spatial_key, position, spatial_mark[spatial][box])
    unused = signature == 0
    canvas = np.arange(n)
    by_time = np.lexsort((canvas, signature, time, claim, unused))
    rank = np.empty(n, np.int64)
    rank[by_time] = canvas
    intervals = _intervals(box, position, rank, len(sets.boxes))
    used = ~unused
    if len(np.unique(spatial_key[used])) > len(np.unique(claim[used])):
        # some region has more than one spatial class: the other order may need fewer intervals
        by_space = np.lexsort((canvas, signature, time, _by_first_seen(spatial_key), claim, unused))
        other_rank = np.empty(n, np.int64)
        other_rank[by_space] = canvas
        other = _intervals(box, position, other_rank, len(sets.boxes))
        if len(other[0]) < len(intervals[0]):
            by_time, intervals = by_space, other
    size = np.bincount(claim[used], minlength=int(claim.max(initial=0)) + 1)
    if np.count_nonzero(size) > 1:
        by_frame = np.lexsort((canvas, signature, claim, size[claim], time, unused))
        other_rank = np.empty(n, np.int64)
        other_rank[by_frame] = canvas
        other = _intervals(box, position, other_rank, len(sets.boxes))
        if len(other[0]) <= len(intervals[0]) and _query_intervals(sets, *other) < _query_intervals(sets, *intervals):
            by_time, intervals = by_frame, other
    return PackedOrder(by_time[: int(used.sum())], *intervals)


def _query_intervals(sets: AttentionSets, start: np.ndarray, stop: np.ndarray, ptr: np.ndarray) -> int:
    """Counts the intervals of the queries that attend to the same box, summed over the boxes of keys."""
    key, query = np.unique(np.stack([sets.part_k, sets.part_q]), axis=1)
    owner, interval = expand_ranges(ptr[query], np.diff(ptr)[query])
    key, start, stop = key[owner], start[interval], stop[interval]
    by_key = np.lexsort((start, key))
    # offsets keep the keys' ranges disjoint, so that one running maximum serves all
    base = key[by_key] * (int(stop.max(initial=0)) + 2)
    start, reach = base + start[by_key], np.maximum.accumulate(base + stop[by_key])
    return int(len(start) and 1 + np.count_nonzero(start[1:] > reach[:-1]))


def _box_positions(layout: CanvasLayout, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (box, position) of every position of every box, positions ascending within a box."""
    if not len(boxes):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    shape = boxes[:, :, 1] - boxes[:, :, 0]
    owner, rest = expand_ranges(np.zeros(len(boxes)), shape.prod(axis=1))
    position, stride = np.zeros(len(owner), np.int64), 1
    for axis in reversed(range(boxes.shape[1])):
        size = shape[:, axis][owner]
        rest, offset = np.divmod(rest, size)
        position += (boxes[:, axis, 0][owner] + offset) * stride
        stride *= (layout.T, *layout.spatial_shape)[axis]
    # slots are the first position of frames after the canvas (see SlotBank): one position per frame there
    n = layout.num_positions
    return owner, np.where(position < n, position, n + position * layout.T // max(n, 1) - layout.T)


def _first_claims(layout: CanvasLayout) -> np.ndarray:
    """Returns int64 [N]: the first declared region that holds each position; the number of regions where none does."""
    grid = np.full((layout.T, *layout.spatial_shape), len(layout.regions), np.int64)
    for number, name in reversed(list(enumerate(layout.regions))):
        bounds = layout.region_spec(name).bounds
        grid[tuple(map(slice, bounds[::2], bounds[1::2]))] = number
    return grid.ravel()


def _unique_spatial_boxes(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns a number for each box without its time axis, and a random mark for each number."""
    _, inverse = np.unique(boxes[:, 1:].reshape(len(boxes), boxes.shape[1] * 2 - 2), axis=0, return_inverse=True)
    marks = np.random.default_rng(1).integers(1, 2**63, size=int(inverse.max(initial=-1)) + 1, dtype=np.uint64)
    return inverse.reshape(-1), marks


def _by_first_seen(values: np.ndarray) -> np.ndarray:
    """Numbers equal values equally, in the order of their first occurrence on the canvas."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse.reshape(-1)]


def _intervals(box: np.ndarray, position: np.ndarray, rank: np.ndarray, n_boxes: int):
    """Returns the packed intervals (start, stop, ptr) of boxes given as (box, position) lists."""
    packed = rank[position]
    same_box = box[1:] == box[:-1]
    if (same_box & (packed[1:] <= packed[:-1])).any():
        ordered = np.lexsort((packed, box))
        packed = packed[ordered]  # `box` ascends already
    fresh = np.ones(len(packed), bool)
    fresh[1:] = ~same_box | (packed[1:] != packed[:-1] + 1)
    first = fresh.nonzero()[0]
    stop = packed[np.append(first[1:], len(packed)) - 1] + 1 if len(first) else packed
    count = np.bincount(box[first], minlength=n_boxes)
    return packed[first], stop, np.concatenate([[0], np.cumsum(count)])
