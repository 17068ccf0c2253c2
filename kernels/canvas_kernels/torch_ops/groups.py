"""Groups of query ranges that one call computes: strided groups on views, gathered groups on copies."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

# Members with fewer rows or keys than this are copied into one batched product; others are computed member by member or
# head by head. A product over 28 (member, head) of 8 × 256 takes 320 µs on views, 253 µs with copies; 64 × 64 the same.
THIN_SIDE = 32
# Softmax over fewer keys than this, if there are as many rows, runs along the middle dimension, keys first: torch does
# not vectorise over a short last dimension.
KEYS_FIRST = 64


@dataclass(frozen=True, eq=False)
class StridedGroup:
    """G members of R query rows and the same numbers of keys, at equal distances, so that views hold them.

    A member is a query range, or several with equal keys. Member g holds, for each (first, length, step) of
    ``row_ranges`` and of ``key_ranges``, the positions ``[first + g · step, first + g · step + length)``, ranges in
    ascending order. Rows are never repeated.

    Attributes:
        segment, slot: int64 [G, R], of each row.
        bias: float64 [G, keys], ln of the keys' weights; None where it is constant for each member.
        offset: float64 [G], that constant, which only lse needs.
        overwrites_rows: whether no earlier group holds any of its rows, so that results are written, not added.
        overwrites_keys: the same for its keys, which are distinct.
    """

    row_ranges: tuple[tuple[int, int, int], ...]
    key_ranges: tuple[tuple[int, int, int], ...]
    segment: np.ndarray
    slot: np.ndarray
    bias: np.ndarray | None
    offset: np.ndarray
    overwrites_rows: bool = False
    overwrites_keys: bool = False

    @cached_property
    def keys_first(self) -> bool:
        """Whether probabilities are stored [keys, rows] rather than [rows, keys]."""
        return self.keys < KEYS_FIRST and self.keys <= self.rows

    @cached_property
    def thin(self) -> bool:
        """Whether members are copied into one batched product."""
        return min(self.rows, self.keys) < THIN_SIDE

    @cached_property
    def layout_cache(self) -> dict:
        """Sizes and strides of its ranges by tensor layout, filled by :mod:`.strided`."""
        return {}

    def positions(self, ranges: tuple[tuple[int, int, int], ...]) -> np.ndarray:
        """Returns int64 [G, length]: the positions of ``row_ranges`` or ``key_ranges``."""
        g = np.arange(self.members)[:, None]
        return np.concatenate([first + g * step + np.arange(length) for first, length, step in ranges], axis=1)

    @cached_property
    def pairs(self) -> int:
        return self.members * self.rows * self.keys

    @cached_property
    def members(self) -> int:
        return len(self.segment)

    @cached_property
    def rows(self) -> int:
        return sum(length for _, length, _ in self.row_ranges)

    @cached_property
    def keys(self) -> int:
        return sum(length for _, length, _ in self.key_ranges)


@dataclass(frozen=True, eq=False)
class GatheredGroup:
    """G members of R query rows, each attending to S segments of W keys, gathered and padded.

    Attributes:
        rows, row_valid: int64 and bool [G, R]. Padding repeats a valid position, here and below.
        keys, key_valid: int64 and bool [G, S, W].
        segment: int64 [G, S], −1 where a member has fewer than S.
        slot: int64 [G, S], the slot of the member's first row.
        bias: float64 [G, S·W], ln of the keys' weights, −inf on padded keys; None where it is constant for each member.
        offset: float64 [G], that constant.
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
    """The groups of a table: ``strided``, then ``bundles`` of gathered groups whose rows are gathered in one call.

    Attributes:
        rows_to_zero, keys_to_zero: ranges of positions that no overwriting group holds as row, as key.
        weight, edge, replace: float64, int64 and int64 per segment (joint form: one segment of weight 1).
    """

    bundles: tuple[tuple[GatheredGroup, ...], ...]
    strided: tuple[StridedGroup, ...]
    rows_to_zero: tuple[tuple[int, int], ...]
    keys_to_zero: tuple[tuple[int, int], ...]
    weight: np.ndarray
    edge: np.ndarray
    replace: np.ndarray

    @cached_property
    def gathered(self) -> tuple[GatheredGroup, ...]:
        return tuple(group for bundle in self.bundles for group in bundle)


def select_rows(group: StridedGroup, rows: np.ndarray) -> StridedGroup:
    """Returns the group with some of its rows: ``rows`` bool [R], the same for every member."""
    ranges, begin = [], 0
    for first, length, move in group.row_ranges:
        own = np.zeros(length + 2, bool)
        own[1:-1] = rows[begin : begin + length]
        marks = (own[1:] != own[:-1]).nonzero()[0]
        ranges += [(first + start, stop - start, move) for start, stop in marks.reshape(-1, 2).tolist()]
        begin += length
    changes = {"row_ranges": tuple(ranges), "segment": group.segment[:, rows], "slot": group.slot[:, rows]}
    return replace(group, **changes, overwrites_rows=False, overwrites_keys=False)


def compact(group: StridedGroup, members: np.ndarray, rows: np.ndarray) -> StridedGroup:
    """Returns the group with some members, bool [G], and some rows of each, bool [R], on contiguous copies of their
    rows and keys."""
    selection = np.ix_(members, rows)
    n_rows, n_keys = int(rows.sum()), group.keys
    ranges = {"row_ranges": ((0, n_rows, n_rows),), "key_ranges": ((0, n_keys, n_keys),)}
    own = {"segment": group.segment[selection], "slot": group.slot[selection], "offset": group.offset[members]}
    return replace(group, **ranges, **own, overwrites_rows=True, overwrites_keys=True)
