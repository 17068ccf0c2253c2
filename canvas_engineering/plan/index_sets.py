"""Attention sets as lists of rows, for functions that do not run on rectangles."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from canvas_kernels.block_table import BlockTable
from canvas_kernels.ranges import expand_ranges

from .attention_sets import AttentionSets
from .ordering import PackedOrder


@dataclass(frozen=True, eq=False)
class SetShape:
    """The shape of an attention set, wherever it lies on the canvas.

    Attributes:
        queries, keys: extents (frames, s0, …) of the smallest boxes that hold the queries and the keys; for sets over a
            slot bank, which has no grid, their lengths alone, (n,) and (m,).
        key_index: int64 [m], the row-major index of each key in its box; None where the keys are the whole box.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    key_index: np.ndarray | None = None

    @property
    def n(self) -> int:
        """Number of queries."""
        return math.prod(self.queries)

    @property
    def m(self) -> int:
        """Number of keys."""
        return math.prod(self.keys) if self.key_index is None else len(self.key_index)


@dataclass(frozen=True, eq=False)
class RowSets:
    """R attention sets over S distinct sets of rows. All arrays are int64 but ``weight`` and ``largest``.

    Row set s holds the packed rows ``rows[ptr[s] : ptr[s + 1]]`` in canvas order, (t, s0, s1, …). Attention set r lets
    the row set ``queries[r]`` attend to the row set ``keys[r]`` with ``weight[r]`` (float64) and belongs to
    ``connection[r]``. Equal sets of one connection are merged, weights added; ``largest[r]`` (float64) is the weight of
    one of them. ``boxes[s]`` ([S, D, 2]) is the smallest box that holds row set s, ``members[s]`` the boxes that it
    joins, if several; ``banks`` (bool [S]) marks slot banks. These three are empty for split sets.
    """

    ptr: np.ndarray
    rows: np.ndarray
    queries: np.ndarray
    keys: np.ndarray
    weight: np.ndarray
    connection: np.ndarray
    largest: np.ndarray
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 2), np.int64))
    members: dict[int, np.ndarray] = field(default_factory=dict)
    banks: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))

    def shapes(self) -> list[tuple[SetShape, np.ndarray]]:
        """Returns the distinct shapes of the attention sets, each with the numbers of the sets that have it."""
        extent = self.boxes[:, :, 1] - self.boxes[:, :, 0]
        joined, kinds = np.zeros(len(self.boxes), np.int64), {}
        for number in self.members:
            key_index = self._key_index(number, tuple(extent[number].tolist())).tobytes()
            joined[number] = 1 + kinds.setdefault(key_index, len(kinds))
        slots = self.banks[self.keys][:, None]
        extents = [np.where(slots, 0, extent[side]) for side in (self.queries, self.keys)]
        lengths = [np.where(slots, self.lengths(side)[:, None], 0) for side in (self.queries, self.keys)]
        columns = np.concatenate([*lengths, *extents, joined[self.keys][:, None]], 1)
        _, first, inverse = np.unique(columns, axis=0, return_index=True, return_inverse=True)
        by_shape = np.split(np.argsort(inverse.reshape(-1), kind="stable"), np.cumsum(np.bincount(inverse.reshape(-1))))
        return [(self._shape(number), numbers) for number, numbers in zip(first.tolist(), by_shape)]

    def _shape(self, number: int) -> SetShape:
        queries, keys = int(self.queries[number]), int(self.keys[number])
        if self.banks[keys]:
            n, m = self.lengths(np.array([queries, keys])).tolist()
            return SetShape((n,), (m,))
        q_extent, k_extent = (
            tuple((box[:, 1] - box[:, 0]).tolist()) for box in (self.boxes[queries], self.boxes[keys])
        )
        return SetShape(q_extent, k_extent, self._key_index(keys, k_extent) if keys in self.members else None)

    def _key_index(self, number: int, extent: tuple[int, ...]) -> np.ndarray:
        parts = []
        for box in self.members[number]:
            first, shape = box[:, 0] - self.boxes[number][:, 0], box[:, 1] - box[:, 0]
            parts.append(np.ravel_multi_index(np.indices(shape).reshape(len(shape), -1) + first[:, None], extent))
        return np.sort(np.concatenate(parts))

    def lengths(self, sets: np.ndarray) -> np.ndarray:
        """Returns how many rows each of the row sets ``sets`` holds."""
        return np.diff(self.ptr)[sets]

    def rows_of(self, sets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (number, row) of every row of the row sets ``sets``, ``number`` counting in ``sets``."""
        number, at = expand_ranges(self.ptr[sets], self.lengths(sets))
        return number, self.rows[at]


def row_sets(sets: AttentionSets, packed: PackedOrder, n_canvas: int) -> RowSets:
    """Returns attention sets as rows; positions from ``n_canvas`` on are slots.

    Raises:
        ValueError: the queries of a set attend to different keys (a mask of pairs); the message names the connection.
    """
    queries, keys, members = _sets(sets)
    # merge equal sets of one connection
    triple = np.stack([sets.connection, queries, keys], 1)
    triple, inverse = np.unique(triple, axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    weight = np.bincount(inverse, weights=sets.weight, minlength=len(triple))
    largest = np.zeros(len(triple))
    np.maximum.at(largest, inverse, sets.weight)
    connection, queries, keys = triple.T
    used, numbers = np.unique(np.concatenate([queries, keys]), return_inverse=True)
    member_set, member_box = members
    selection = np.isin(member_set, used)
    member_set, member_box = np.searchsorted(used, member_set[selection]), member_box[selection]
    # members → intervals → rows
    owner, interval = expand_ranges(packed.ptr[member_box], np.diff(packed.ptr)[member_box])
    owner = member_set[owner]
    start = packed.interval_start[interval]
    interval_number, row = expand_ranges(start, packed.interval_stop[interval] - start)
    owner = owner[interval_number]
    row = row[np.lexsort((packed.order[row], owner))]
    ptr = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(used)))])
    numbers = numbers.reshape(-1)
    boxes = np.full((len(used), *sets.boxes.shape[1:]), [np.iinfo(np.int64).max, 0])
    np.minimum.at(boxes[:, :, 0], member_set, sets.boxes[member_box][:, :, 0])
    np.maximum.at(boxes[:, :, 1], member_set, sets.boxes[member_box][:, :, 1])
    several = (np.bincount(member_set, minlength=len(used)) > 1).nonzero()[0]
    return RowSets(
        ptr,
        row,
        numbers[: len(triple)],
        numbers[len(triple) :],
        weight,
        connection,
        largest,
        boxes,
        {int(number): sets.boxes[member_box[member_set == number]] for number in several},
        packed.order[row[ptr[:-1]]] >= n_canvas,
    )


def uniform_row_sets(table: BlockTable) -> RowSets:
    """Returns the attention sets of a table in edge form, split so that all queries of a set attend to the same keys.

    Rows are in packed order: for functions that serve each query by itself and ignore the order of keys.
    """
    ranges = table.query_ranges()
    count = len(ranges.q_start)
    owner, q_rows = expand_ranges(ranges.q_start, ranges.q_stop - ranges.q_start)
    start = table.k_start[ranges.rectangle]
    interval_number, k_rows = expand_ranges(start, table.k_stop[ranges.rectangle] - start)
    key_owner = np.repeat(np.arange(count), np.diff(ranges.ptr))[interval_number]
    lengths = np.concatenate([np.bincount(owner, minlength=count), np.bincount(key_owner, minlength=count)])
    lead = ranges.rectangle[ranges.ptr[:-1]]
    number, weight = np.arange(count), table.weight[lead].astype(np.float64)
    return RowSets(
        np.concatenate([[0], np.cumsum(lengths)]),
        np.concatenate([q_rows, k_rows]),
        number,
        count + number,
        weight,
        table.edge[lead].astype(np.int64),
        weight,
    )


def has_pairs(sets: AttentionSets) -> bool:
    """Whether the queries of some set attend to different keys."""
    first = np.searchsorted(sets.part_set, np.arange(len(sets.weight)))
    return bool((sets.part_q != sets.part_q[first][sets.part_set]).any())


def _sets(sets: AttentionSets):
    """Returns the row sets of every attention set's queries and keys, and (row set, box) of every member."""
    first = np.searchsorted(sets.part_set, np.arange(len(sets.weight)))
    count = np.diff(np.append(first, len(sets.part_set)))
    queries, keys = sets.part_q[first], sets.part_k[first].copy()
    differs = sets.part_q != queries[sets.part_set]
    if differs.any():
        connection = int(sets.connection[sets.part_set[differs.argmax()]])
        raise ValueError(
            f"connection {connection} gives each query its own keys (a mask of pairs): its sets are no lists of rows"
        )
    n_boxes = len(sets.boxes)
    unions: dict[bytes, int] = {}
    member_set, member_box = [np.arange(n_boxes)], [np.arange(n_boxes)]
    for number in (count > 1).nonzero()[0]:
        boxes = np.sort(sets.part_k[first[number] : first[number] + count[number]])
        union = unions.setdefault(boxes.tobytes(), n_boxes + len(unions))
        if union == n_boxes + len(member_set) - 1:
            member_set.append(np.full(len(boxes), union))
            member_box.append(boxes)
        keys[number] = union
    return queries, keys, (np.concatenate(member_set), np.concatenate(member_box))
