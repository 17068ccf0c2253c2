"""What a table's cells are grouped into: slabs, which are strided views, and batches, which are gathered."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

# Cells with fewer rows or keys than this are copied side by side, others walked one by one or head by head where
# several cells and heads meet. µs for a product over 28 (cell, head) of 8 × 256 as it lies 320, copied 253; of 64 × 64
# alike, so that the copies would be all loss.
THIN_SIDE = 32
# Softmax over fewer keys than this runs along the middle dimension, keys first, wherever rows are at least as many:
# over the last one torch does not use its vector units for short rows.
KEYS_FIRST = 64


@dataclass(frozen=True, eq=False)
class Slab:
    """G cells of R query rows and the same numbers of keys, at equal distances.

    Cell g holds, for each (first, length, step) of ``row_ranges`` and of ``key_ranges``, the positions
    ``[first + g · step, first + g · step + length)``, ranges in ascending order. Rows never repeat. ``segment`` and
    ``slot`` int64 [G, R] are those of each row. ``bias`` float64 [G, keys]: ln of the keys' weights, None where it is
    constant along each cell's keys; ``offset`` float64 [G] holds the constant, which shows in lse alone.
    ``fresh_rows``: no slab before this one holds any of its rows; ``fresh_keys``: the same of its keys, and they are
    distinct.
    """

    row_ranges: tuple[tuple[int, int, int], ...]
    key_ranges: tuple[tuple[int, int, int], ...]
    segment: np.ndarray
    slot: np.ndarray
    bias: np.ndarray | None
    offset: np.ndarray
    fresh_rows: bool = False
    fresh_keys: bool = False

    @cached_property
    def keys_first(self) -> bool:
        """Whether probabilities are stored [keys, rows] rather than [rows, keys]."""
        return self.keys < KEYS_FIRST and self.keys <= self.rows

    @cached_property
    def thin(self) -> bool:
        """Whether several cells are copied side by side."""
        return min(self.rows, self.keys) < THIN_SIDE

    @cached_property
    def places(self) -> dict:
        """Where its ranges lie in tensors of the layouts met so far, which :mod:`.strided` keeps here."""
        return {}

    def positions(self, ranges: tuple[tuple[int, int, int], ...]) -> np.ndarray:
        """int64 [G, length]: what ``row_ranges`` or ``key_ranges`` hold."""
        g = np.arange(self.cells)[:, None]
        return np.concatenate([first + g * step + np.arange(length) for first, length, step in ranges], axis=1)

    @cached_property
    def pairs(self) -> int:
        return self.cells * self.rows * self.keys

    @cached_property
    def cells(self) -> int:
        return len(self.segment)

    @cached_property
    def rows(self) -> int:
        return sum(length for _, length, _ in self.row_ranges)

    @cached_property
    def keys(self) -> int:
        return sum(length for _, length, _ in self.key_ranges)


@dataclass(frozen=True, eq=False)
class Batch:
    """G units of R query rows; each unit reads S segments of W keys.

    ``rows`` int64 [G, R] and ``row_valid`` bool [G, R]; ``keys`` int64 [G, S, W] and ``key_valid`` bool [G, S, W];
    ``segment`` int64 [G, S], −1 where a unit has fewer than S; ``slot`` int64 [G, S], the slot of the unit's first row.
    Padding repeats a valid position. ``bias`` float64 [G, S·W]: ln of the keys' weights, −inf on padded keys; None
    where it is constant along every unit's keys, then ``offset`` float64 [G] holds the constant.
    """

    rows: np.ndarray
    row_valid: np.ndarray
    keys: np.ndarray
    key_valid: np.ndarray
    segment: np.ndarray
    slot: np.ndarray
    bias: np.ndarray | None
    offset: np.ndarray

    @cached_property
    def shape(self) -> tuple[int, int, int, int]:
        """(G, R, S, W)"""
        return (*self.rows.shape, *self.keys.shape[1:])

    @cached_property
    def keys_first(self) -> bool:
        """Whether probabilities are stored [keys, rows] rather than [rows, keys]."""
        _, rows, _, width = self.shape
        return width < KEYS_FIRST and width <= rows

    @cached_property
    def pairs(self) -> int:
        units, rows, segments, width = self.shape
        return units * rows * segments * width


@dataclass(frozen=True, eq=False)
class Grouping:
    """What the torch executor runs: ``slabs``, then ``stages`` of batches.

    ``stale_rows`` and ``stale_keys``: ranges of positions that no fresh slab holds as row, as key, and that have to be
    cleared where slabs write first. Per segment: ``weight`` float64, ``edge`` and ``replace`` int64 (joint form: one
    segment of weight 1).
    """

    stages: tuple[tuple[Batch, ...], ...]
    slabs: tuple[Slab, ...]
    stale_rows: tuple[tuple[int, int], ...]
    stale_keys: tuple[tuple[int, int], ...]
    weight: np.ndarray
    edge: np.ndarray
    replace: np.ndarray

    @cached_property
    def batches(self) -> tuple[Batch, ...]:
        return tuple(batch for stage in self.stages for batch in stage)


def narrowed(slab: Slab, rows: np.ndarray) -> Slab:
    """The slab with some of its rows: ``rows`` bool [R], the same of every cell."""
    ranges, begin = [], 0
    for first, length, move in slab.row_ranges:
        own = np.zeros(length + 2, bool)
        own[1:-1] = rows[begin : begin + length]
        marks = (own[1:] != own[:-1]).nonzero()[0]
        ranges += [(first + start, stop - start, move) for start, stop in marks.reshape(-1, 2).tolist()]
        begin += length
    kept = {"row_ranges": tuple(ranges), "segment": slab.segment[:, rows], "slot": slab.slot[:, rows]}
    return replace(slab, **kept, fresh_rows=False, fresh_keys=False)


def compacted(slab: Slab, cells: np.ndarray, rows: np.ndarray) -> Slab:
    """The slab with some cells, bool [G], and some rows of each, bool [R], whose rows and keys are copied one cell
    after another: its ranges lie in these copies."""
    kept = np.ix_(cells, rows)
    n_rows, n_keys = int(rows.sum()), slab.keys
    ranges = {"row_ranges": ((0, n_rows, n_rows),), "key_ranges": ((0, n_keys, n_keys),)}
    own = {"segment": slab.segment[kept], "slot": slab.slot[kept], "offset": slab.offset[cells]}
    return replace(slab, **ranges, **own, fresh_rows=True, fresh_keys=True)
