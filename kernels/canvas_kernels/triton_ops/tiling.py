"""Tilings: one pass's walk over a BlockTable, as the flat tables that kernels read (``kernels/README.md`` has the
format)."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

from ..ranges import expand_ranges

if TYPE_CHECKING:
    from ..block_table import BlockTable

TENSORS = ("tiles", "segments", "weight", "full", "partial", "masks")


ONE_CLASS = 1 + 1 / 32
"""How much more a single class of tiles may cost: another one is a launch, with an end of its own."""


def partial_width(block_n: int) -> int:
    """Rows of a partial block, a bit each of a mask's word: wide ones would be emptier, and masking takes registers."""
    return min(block_n, 32)


class TileClass(NamedTuple):
    """A tile size that kernels are built for: ``block_m`` tile rows × ``block_n`` walked rows, and the time of one
    such block relative to the other classes'."""

    block_m: int
    block_n: int
    cost: float = 1.0


@dataclass(frozen=True, eq=False)
class Tiling:
    """One launch.

    Attributes:
        block_m, block_n: rows of a tile, and of a full block that it walks.
        pairs, walked: pairs of the table among its tiles, and pairs of the blocks; their ratio is the fill.
        blocks: float64 [T], what each tile walks, in full blocks.
        tiles, segments, weight, full, partial, masks: the tensors of ``kernels/README.md``.
    """

    block_m: int
    block_n: int
    pairs: int
    walked: int
    blocks: np.ndarray
    tiles: torch.Tensor
    segments: torch.Tensor
    weight: torch.Tensor
    full: torch.Tensor
    partial: torch.Tensor
    masks: torch.Tensor

    @property
    def n_tiles(self) -> int:
        return len(self.blocks)

    @property
    def n_long(self) -> int:
        """Tiles that walk more than twice the mean: they start first, of all heads."""
        return _count_long(self.blocks)

    @functools.cached_property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(getattr(self, name) for name in TENSORS)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors)

    def to(self, device: torch.device | str) -> Tiling:
        return replace(self, **{name: getattr(self, name).to(device) for name in TENSORS})


def cut_tiles(n: int, start: np.ndarray, stop: np.ndarray, block: int, borders: ArrayLike = ()) -> np.ndarray:
    """Tile starts for rows [0, n), ascending, int64: no tile is longer than ``block`` or lies across ``borders``.

    Ranges of at least ``block`` rows get tiles of their own (a tile across two of them would walk both); runs of
    shorter ranges are cut evenly, tiles straddling them.
    """
    marks = np.unique(np.concatenate([[0, n], start, stop]))
    long = np.diff(marks) >= block
    keep = np.isin(marks, borders)
    keep[[0, -1]] = True
    keep[1:-1] |= long[:-1] | long[1:]
    zones = marks[keep]
    owner, number = expand_ranges(np.zeros(len(zones) - 1), -(-np.diff(zones) // block))
    return zones[owner] + number * block


class _Axes(NamedTuple):
    """Ranges of every rectangle on the axis that is cut into tiles and on that of the rows that tiles walk.

    ``span`` numbers the connected query range of a segment that it belongs to: the slot of its row i is span + i.
    ``shift`` is what leads from the axis of the tiles to rows, ``borders`` what no tile may lie across.
    """

    n: int
    start: np.ndarray
    stop: np.ndarray
    walk_start: np.ndarray
    walk_stop: np.ndarray
    span: np.ndarray
    shift: np.ndarray
    borders: np.ndarray

    @classmethod
    def of(cls, table: BlockTable, transposed: bool, by_slot: bool) -> _Axes:
        bounds = (table.q_start, table.q_stop, table.k_start, table.k_stop)
        start, stop, key_start, key_stop = (x.astype(np.int64) for x in bounds)
        span = table.slot - start
        if transposed:
            return cls(table.n_positions, key_start, key_stop, start, stop, span, np.zeros_like(span), span[:0])
        if not by_slot:
            return cls(table.n_positions, start, stop, key_start, key_stop, span, np.zeros_like(span), span[:0])
        start, stop = start + span, stop + span
        # rectangles lie by segment and first query: a range begins where the span or the segment changes
        fresh = np.append(True, (span[1:] != span[:-1]) | (table.segment[1:] != table.segment[:-1]))[: len(span)]
        return cls(table.n_slots, start, stop, key_start, key_stop, span, -span, start[fresh])


def build_tilings(
    table: BlockTable, classes: tuple[TileClass, ...], transposed: bool = False, by_slot: bool = False
) -> tuple[Tiling, ...]:
    """Cuts rows into tiles, each of the class whose blocks cost the least; all of one class where that does as well.

    Tiles are of query rows that walk keys; of key rows that walk queries if ``transposed``; of the rows of one segment
    each, which walk its keys, if ``by_slot``. ``classes`` go from large to small, each ``block_m`` a multiple of the
    next. Cost: rectangles × tiles met, vectorised.
    """
    axes = _Axes.of(table, transposed, by_slot)
    if axes.n == 0:
        return ()
    largest = cut_tiles(axes.n, axes.start, axes.stop, classes[0].block_m, axes.borders)
    length = np.diff(np.append(largest, axes.n))
    cuts, walks, costs = [], [], []
    for tile_class in classes:
        parent, number = expand_ranges(np.zeros(len(largest)), -(-length // tile_class.block_m))
        start = largest[parent] + number * tile_class.block_m
        cuts.append((parent, start, np.diff(np.append(start, axes.n))))
        walks.append(_walk(table, axes, start, cuts[-1][2], tile_class))
        costs.append(np.bincount(parent, walks[-1]["blocks"] * tile_class.cost, len(largest)))
    cost = np.stack(costs)
    choice, total = cost.argmin(0), cost.sum(1)
    if total.min() <= ONE_CLASS * cost.min(0).sum():
        choice[:] = total.argmin()
    tilings = []
    for i, tile_class in enumerate(classes):
        parent, start, rows = cuts[i]
        chosen = choice[parent] == i
        if chosen.any():
            walk = walks[i] if chosen.all() else _walk(table, axes, start[chosen], rows[chosen], tile_class)
            tilings.append(_tiling(tile_class, walk))
    return tuple(tilings)


def _tiling(tile_class: TileClass, walk: dict) -> Tiling:
    # longest walks first: the short ones fill the last wave
    order = np.argsort(-walk["blocks"], kind="stable")
    blocks, behind = walk["blocks"][order], np.array([[_count_long(walk["blocks"]), 0, 0, 0]], np.int32)
    walk = walk | {"tiles": np.concatenate([walk["tiles"][order], behind])}
    walked = int(blocks.sum() * tile_class.block_m * tile_class.block_n)
    tensors = {name: torch.from_numpy(walk[name]) for name in TENSORS}
    return Tiling(tile_class.block_m, tile_class.block_n, walk["pairs"], walked, blocks, **tensors)


def _count_long(blocks: np.ndarray) -> int:
    return int((blocks > 2 * blocks.mean()).sum())


def _walk(table: BlockTable, axes: _Axes, start: np.ndarray, rows: np.ndarray, tile_class: TileClass) -> dict:
    """A Tiling's fields as arrays, for tiles of ``rows`` rows from ``start``, ascending and disjoint."""
    block_n, joint = tile_class.block_n, table.form == "joint"
    width = partial_width(block_n)
    first = np.searchsorted(start + rows, axes.start, "right")
    r, tile = expand_ranges(first, np.searchsorted(start, axes.stop, "left") - first)
    order = np.lexsort((axes.walk_start[r], table.weight[r], axes.span[r], table.segment[r], tile))
    r, tile = r[order], tile[order]
    low = np.maximum(axes.start[r] - start[tile], 0)
    high = np.minimum(axes.stop[r] - start[tile], rows[tile])
    # a tile's segment: in joint form every tile has the one, which writes what nothing else does
    fresh = _changes(tile, table.segment[r], axes.span[r])
    segment = tile if joint else np.cumsum(fresh) - 1
    lead = fresh.nonzero()[0]
    owner = np.arange(len(start)) if joint else tile[lead]
    unit = np.cumsum(_changes(segment, table.weight[r])) - 1
    walk_start, walk_stop = axes.walk_start[r], axes.walk_stop[r]
    # of rectangles as high as the tile their full blocks
    whole = np.where((low == 0) & (high == rows[tile]), (walk_stop - walk_start) // block_n, 0)
    rest = walk_start + whole * block_n
    ragged = (rest < walk_stop).nonzero()[0]
    part = _partial_blocks(unit[ragged], low[ragged], high[ragged], rest[ragged], walk_stop[ragged], width)
    # of the first rectangle of each block's unit
    of_block = np.searchsorted(unit, part.unit)
    first_of = _complete(part, rows[tile[of_block]] * width, width, block_n // width)
    left = np.ones(len(of_block), bool)
    left[first_of[:, None] + np.arange(block_n // width)] = False
    bias = np.log2(table.weight[r]) if joint else np.zeros(len(r), np.float32)
    runs, more = whole.nonzero()[0], of_block[first_of]
    full, first_full, n_full = _full_lists(
        np.append(segment[runs], segment[more]),
        np.append(walk_start[runs], part.start[first_of]),
        np.append(whole[runs], np.ones(len(more), np.int64)),
        np.append(bias[runs], bias[more]),
        len(owner),
        block_n,
    )
    masks, number = _masks(part, left, tile_class)
    of_left = of_block[left]
    entries = np.stack([part.start[left], part.rows[left], number, _bits(bias[of_left])], 1).astype(np.int32)
    partial = np.concatenate([entries, np.zeros((1, 4), np.int32)])
    n_partial = np.bincount(segment[of_left], minlength=len(owner))
    segments = np.zeros((len(owner), 8), np.int32)
    segments[:, :4] = np.stack([first_full, n_full, np.cumsum(n_partial) - n_partial, n_partial], 1)
    weight = np.ones(len(owner), np.float32)
    if joint:
        segments[:, 5] = rows << 16
    elif len(lead):
        of_lead = r[lead]
        segments[:, 4] = axes.span[of_lead]
        segments[:, 5] = np.minimum.reduceat(low, lead) | np.maximum.reduceat(high, lead) << 16
        segments[:, 6], segments[:, 7] = table.edge[of_lead], table.replace[of_lead]
        weight = table.weight[of_lead]
    count = np.bincount(owner, minlength=len(start))
    shift = np.zeros(len(start), np.int64)
    shift[tile] = axes.shift[r]
    tiles = np.stack([start + shift, rows, np.cumsum(count) - count, count], 1).astype(np.int32)
    blocks = np.bincount(owner, n_full + n_partial * width / block_n, len(start))
    pairs = int((high - low) @ (walk_stop - walk_start))
    walk = {"pairs": pairs, "blocks": blocks, "tiles": tiles, "segments": segments, "weight": weight}
    return walk | {"full": full, "partial": partial, "masks": masks}


def _changes(*columns: np.ndarray) -> np.ndarray:
    """bool: where some column differs from the entry before; the first one does."""
    fresh = np.ones(len(columns[0]), bool)
    fresh[1:] = np.any([column[1:] != column[:-1] for column in columns], 0)
    return fresh


def _bits(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32).view(np.int32)


# -- blocks that are not full ------------------------------------------------------------------------------------------


class _Blocks(NamedTuple):
    """Blocks, by unit and start: walked rows up to the last that is attended to, pairs; and in order of the blocks what
    they hold, rectangles of tile rows [low, high) and block rows [left, right)."""

    unit: np.ndarray
    start: np.ndarray
    rows: np.ndarray
    pairs: np.ndarray
    block: np.ndarray
    low: np.ndarray
    high: np.ndarray
    left: np.ndarray
    right: np.ndarray


def _partial_blocks(unit, low, high, walk_start, walk_stop, block_n: int) -> _Blocks:
    """Blocks that hold the rectangles of tile rows [low, high) and walked rows [walk_start, walk_stop) of each unit."""
    # one axis for all: units lie further apart than any block reaches
    stride = int(walk_stop.max(initial=0)) + block_n
    begin, end = unit * stride + walk_start, unit * stride + walk_stop
    at = cover(begin, end, block_n, stride)
    first = np.searchsorted(at, begin, "right") - 1
    item, block = expand_ranges(first, np.searchsorted(at, end, "left") - first)
    order = np.argsort(block, kind="stable")
    item, block = item[order], block[order]
    left, right = np.maximum(begin[item] - at[block], 0), np.minimum(end[item] - at[block], block_n)
    rows = np.zeros(len(at), np.int64)
    np.maximum.at(rows, block, right)
    pairs = np.bincount(block, (high - low)[item] * (right - left), len(at))
    return _Blocks(at // stride, at % stride, rows, pairs, block, low[item], high[item], left, right)


def _complete(part: _Blocks, area: np.ndarray, width: int, ratio: int) -> np.ndarray:
    """The first block of every ``ratio`` that follow one another and hold all pairs of theirs: a full block."""
    complete = part.pairs == area
    follows = ~_changes(part.unit) & (np.diff(part.start, prepend=0) == width) & complete
    follows[1:] &= complete[:-1]
    number = np.arange(len(complete))
    number -= np.maximum.accumulate(np.where(follows, 0, number))
    return (complete & (number % ratio == ratio - 1)).nonzero()[0] - (ratio - 1)


def cover(start: np.ndarray, stop: np.ndarray, block: int, stride: int) -> np.ndarray:
    """Starts of as few blocks as hold the ranges [start, stop), ascending: each begins at the first row that those
    before leave. Ranges in one stride share blocks; no block begins in one and ends in the next.

    >>> cover(np.array([3, 5, 30, 130]), np.array([9, 12, 31, 170]), 16, 100).tolist()
    [3, 30, 130, 146, 162]
    """
    order = np.argsort(start, kind="stable")
    start, reach = start[order], np.maximum.accumulate(stop[order])
    fresh = np.append(True, start[1:] > reach[:-1])[: len(start)]
    first, last = start[fresh], reach[np.append(fresh[1:], True)[: len(start)]]
    own = first // stride
    head = _changes(own).nonzero()[0]
    at, group, starts = first[head], own[head], []
    while len(at):
        range_of = np.searchsorted(last, at, "right")
        inside = range_of < len(last)
        inside[inside] = own[range_of[inside]] == group[inside]
        group, range_of = group[inside], range_of[inside]
        at = np.maximum(at[inside], first[range_of])
        count = np.maximum((last[range_of] - at) // block, 1)
        owner, number = expand_ranges(np.zeros(len(at)), count)
        starts.append(at[owner] + number * block)
        at = at + count * block
    return np.sort(np.concatenate(starts)) if starts else first


def _masks(part: _Blocks, left: np.ndarray, tile_class: TileClass) -> tuple[np.ndarray, np.ndarray]:
    """(masks, number): distinct masks int32 [M, block_m], bit j of a row for row j of the block, and which one each
    block has that is ``left``."""
    keep = left[part.block]
    block = (np.cumsum(left) - 1)[part.block[keep]]
    low, high, begin, end = (x[keep] for x in (part.low, part.high, part.left, part.right))
    number, first = _distinct(block, ((low << 8 | high) << 12 | begin) << 12 | end, int(left.sum()))
    shown = np.zeros(int(left.sum()), bool)
    shown[first] = True
    items = shown[block].nonzero()[0]
    item, row = expand_ranges(low[items], (high - low)[items])
    item = items[item]
    masks = np.zeros((len(first), tile_class.block_m), np.int64)
    # ranges of one row are disjoint: adding sets bits
    np.add.at(masks, (number[block[item]], row), (1 << end[item]) - (1 << begin[item]))
    return masks.astype(np.uint32).view(np.int32), number


def _distinct(owner: np.ndarray, code: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(number, first): owners with the same set of codes get the same number; ``first`` has one owner of each.

    Sets are told apart by two sums of 64-bit hashes.
    """
    sums = []
    for seed in (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03):
        mixed = code.astype(np.uint64) ^ np.uint64(seed)
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            mixed = (mixed ^ (mixed >> np.uint64(33))) * np.uint64(factor)
        total = np.zeros(count, np.uint64)
        np.add.at(total, owner, mixed ^ (mixed >> np.uint64(33)))
        sums.append(total)
    order = np.lexsort(sums)
    fresh = _changes(*(total[order] for total in sums))
    number = np.empty(count, np.int64)
    number[order] = np.cumsum(fresh) - 1
    return number, order[fresh]


# -- full blocks -------------------------------------------------------------------------------------------------------


def _full_lists(segment, start, count, bias, n_segments: int, block_n: int):
    """(full, first, number): int64 [F + 1], starts below and log2 w above, and per segment of a tile where its blocks
    begin there and how many they are.

    A segment's runs are ``count`` blocks from ``start`` on each. A segment of one run, as most are, takes a part of a
    list that all runs share which begin at the same row of a block: its size grows with n, not with pairs. Others
    have a list for each different sequence of runs.
    """
    order = np.lexsort((start, bias, segment))
    segment, start, count, bias = segment[order], start[order], count[order], _bits(bias[order]).astype(np.int64)
    # runs that touch are one
    reach = np.append(0, (start + count * block_n)[:-1])
    fresh = _changes(segment, bias) | (start != reach)
    lead = fresh.nonzero()[0]
    count = np.add.reduceat(count, lead) if len(lead) else count
    segment, start, bias = segment[lead], start[lead], bias[lead]
    runs = np.bincount(segment, minlength=n_segments)
    first, number = np.zeros(n_segments, np.int64), np.bincount(segment, count, n_segments).astype(np.int64)
    alone = runs[segment] == 1
    shared, at = _progressions(start[alone], count[alone], bias[alone], block_n)
    first[segment[alone]] = at
    own, index = np.unique(segment[~alone], return_inverse=True)
    lists, at = _sequences(index, start[~alone], count[~alone], bias[~alone], len(own), block_n)
    first[own] = len(shared) + at
    return np.concatenate([shared, lists, np.zeros(1, np.int64)]), first, number


def _progressions(start, count, bias, block_n: int) -> tuple[np.ndarray, np.ndarray]:
    """(lists, first): of all runs that begin at the same row of a block and have the same bias one list, which holds
    each of them from ``first`` on."""
    kinds, kind = np.unique(np.stack([start % block_n, bias], 1), axis=0, return_inverse=True)
    kind, step = kind.reshape(-1), start // block_n
    low, high = np.full(len(kinds), 1 << 31), np.zeros(len(kinds), np.int64)
    np.minimum.at(low, kind, step)
    np.maximum.at(high, kind, step + count)
    owner, step_of = expand_ranges(low, high - low)
    first = np.cumsum(high - low) - high
    return kinds[owner, 0] + step_of * block_n | kinds[owner, 1] << 32, first[kind] + step


def _sequences(owner, start, count, bias, n_owners: int, block_n: int) -> tuple[np.ndarray, np.ndarray]:
    """(lists, first): of every owner's runs their blocks, once where owners have the same."""
    _, code = np.unique(np.stack([start, count, bias], 1), axis=0, return_inverse=True)
    number, chosen = _distinct(owner, code.reshape(-1), n_owners)
    shown = np.zeros(n_owners, bool)
    shown[chosen] = True
    run = shown[owner].nonzero()[0]
    item, step = expand_ranges(np.zeros(len(run)), count[run])
    item = run[item]
    length = np.bincount(owner[run], count[run], n_owners).astype(np.int64)
    first = (np.cumsum(length) - length)[chosen][number]
    return start[item] + step * block_n | bias[item] << 32, first
