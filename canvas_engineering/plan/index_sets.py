"""The reads of a plan as lists of rows: what functions want that are not softmax over rectangles."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from canvas_kernels.block_table import BlockTable
from canvas_kernels.ranges import expand_ranges

from .attention_sets import Reads
from .ordering import PackedOrder


@dataclass(frozen=True, eq=False)
class ReadShape:
    """What the sets of one or more reads look like, wherever they lie.

    Attributes:
        queries, keys: extents (frames, s0, …) of the smallest boxes that hold the two sets; for reads of a slot bank,
            which has no grid, their lengths alone, (n,) and (m,).
        places: int64 [m], where each key stands in its box, row-major; None where the keys are the whole box.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    places: np.ndarray | None = None

    @property
    def n(self) -> int:
        """Number of queries."""
        return math.prod(self.queries)

    @property
    def m(self) -> int:
        """Number of keys."""
        return math.prod(self.keys) if self.places is None else len(self.places)


@dataclass(frozen=True, eq=False)
class ReadSets:
    """R reads over S distinct sets of rows. All arrays int64 but ``weight``.

    Set s holds the packed rows ``rows[ptr[s] : ptr[s + 1]]`` in canvas order, (t, s0, s1, …). Read r attends from the
    set ``queries[r]`` over the set ``keys[r]`` with ``weight[r]`` (float64) and belongs to ``connection[r]``. Equal
    reads of one connection are one read of their summed weight; ``largest[r]`` (float64) is that of one of them.
    ``boxes[s]`` ([S, D, 2]) is the smallest box that holds set s, ``members[s]`` the boxes that it joins, if several;
    ``banks`` (bool [S]) marks the sets of slots. These three are empty for sets that were split from a table.
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

    def shapes(self) -> list[tuple[ReadShape, np.ndarray]]:
        """Every shape of a read, with the numbers of the reads that have it."""
        extent = self.boxes[:, :, 1] - self.boxes[:, :, 0]
        joined, kinds = np.zeros(len(self.boxes), np.int64), {}
        for number in self.members:
            places = self._places(number, tuple(extent[number].tolist())).tobytes()
            joined[number] = 1 + kinds.setdefault(places, len(kinds))
        slots = self.banks[self.keys][:, None]
        extents = [np.where(slots, 0, extent[side]) for side in (self.queries, self.keys)]
        lengths = [np.where(slots, self.lengths(side)[:, None], 0) for side in (self.queries, self.keys)]
        columns = np.concatenate([*lengths, *extents, joined[self.keys][:, None]], 1)
        _, first, inverse = np.unique(columns, axis=0, return_index=True, return_inverse=True)
        by_shape = np.split(np.argsort(inverse.reshape(-1), kind="stable"), np.cumsum(np.bincount(inverse.reshape(-1))))
        return [(self._shape(read), reads) for read, reads in zip(first.tolist(), by_shape)]

    def _shape(self, read: int) -> ReadShape:
        queries, keys = int(self.queries[read]), int(self.keys[read])
        if self.banks[keys]:
            n, m = self.lengths(np.array([queries, keys])).tolist()
            return ReadShape((n,), (m,))
        q_extent, k_extent = (
            tuple((box[:, 1] - box[:, 0]).tolist()) for box in (self.boxes[queries], self.boxes[keys])
        )
        return ReadShape(q_extent, k_extent, self._places(keys, k_extent) if keys in self.members else None)

    def _places(self, number: int, extent: tuple[int, ...]) -> np.ndarray:
        parts = []
        for box in self.members[number]:
            first, shape = box[:, 0] - self.boxes[number][:, 0], box[:, 1] - box[:, 0]
            parts.append(np.ravel_multi_index(np.indices(shape).reshape(len(shape), -1) + first[:, None], extent))
        return np.sort(np.concatenate(parts))

    def lengths(self, sets: np.ndarray) -> np.ndarray:
        """How many rows each of ``sets`` holds."""
        return np.diff(self.ptr)[sets]

    def rows_of(self, sets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(place, row) of every row of ``sets``, one set after another: ``place`` counts in ``sets``."""
        place, at = expand_ranges(self.ptr[sets], self.lengths(sets))
        return place, self.rows[at]


def read_sets(reads: Reads, packed: PackedOrder, n_canvas: int) -> ReadSets:
    """The reads, each of which must let all of its queries see the same keys. Positions from ``n_canvas`` on are slots.

    Raises:
        ValueError: a read whose queries see different keys (a mask of (query, key) pairs), naming the connection.
    """
    queries, keys, members = _sets(reads)
    # equal reads of one connection become one
    triple = np.stack([reads.connection, queries, keys], 1)
    triple, inverse = np.unique(triple, axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    weight = np.bincount(inverse, weights=reads.weight, minlength=len(triple))
    largest = np.zeros(len(triple))
    np.maximum.at(largest, inverse, reads.weight)
    connection, queries, keys = triple.T
    used, numbers = np.unique(np.concatenate([queries, keys]), return_inverse=True)
    member_set, member_box = members
    kept = np.isin(member_set, used)
    member_set, member_box = np.searchsorted(used, member_set[kept]), member_box[kept]
    # members → intervals → rows
    owner, interval = expand_ranges(packed.ptr[member_box], np.diff(packed.ptr)[member_box])
    owner = member_set[owner]
    start = packed.interval_start[interval]
    piece, row = expand_ranges(start, packed.interval_stop[interval] - start)
    owner = owner[piece]
    row = row[np.lexsort((packed.order[row], owner))]
    ptr = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(used)))])
    numbers = numbers.reshape(-1)
    boxes = np.full((len(used), *reads.boxes.shape[1:]), [np.iinfo(np.int64).max, 0])
    np.minimum.at(boxes[:, :, 0], member_set, reads.boxes[member_box][:, :, 0])
    np.maximum.at(boxes[:, :, 1], member_set, reads.boxes[member_box][:, :, 1])
    several = (np.bincount(member_set, minlength=len(used)) > 1).nonzero()[0]
    return ReadSets(
        ptr,
        row,
        numbers[: len(triple)],
        numbers[len(triple) :],
        weight,
        connection,
        largest,
        boxes,
        {int(number): reads.boxes[member_box[member_set == number]] for number in several},
        packed.order[row[ptr[:-1]]] >= n_canvas,
    )


def cell_sets(table: BlockTable) -> ReadSets:
    """The reads of a table in edge form, split into such as see the same keys in all of their rows, which stand in
    packed order: for functions that serve each query by itself, whatever the order of its keys."""
    cells = table.cells()
    count = len(cells.q_start)
    owner, q_rows = expand_ranges(cells.q_start, cells.q_stop - cells.q_start)
    start = table.k_start[cells.rectangle]
    piece, k_rows = expand_ranges(start, table.k_stop[cells.rectangle] - start)
    key_owner = np.repeat(np.arange(count), np.diff(cells.ptr))[piece]
    lengths = np.concatenate([np.bincount(owner, minlength=count), np.bincount(key_owner, minlength=count)])
    lead = cells.rectangle[cells.ptr[:-1]]
    number, weight = np.arange(count), table.weight[lead].astype(np.float64)
    return ReadSets(
        np.concatenate([[0], np.cumsum(lengths)]),
        np.concatenate([q_rows, k_rows]),
        number,
        count + number,
        weight,
        table.edge[lead].astype(np.int64),
        weight,
    )


def has_pairs(reads: Reads) -> bool:
    """Whether the queries of some read see different keys."""
    first = np.searchsorted(reads.part_read, np.arange(len(reads.weight)))
    return bool((reads.part_q != reads.part_q[first][reads.part_read]).any())


def _sets(reads: Reads):
    """Set numbers of every read's queries and keys, and (set, box) of every member: boxes first, then unions."""
    first = np.searchsorted(reads.part_read, np.arange(len(reads.weight)))
    count = np.diff(np.append(first, len(reads.part_read)))
    queries, keys = reads.part_q[first], reads.part_k[first].copy()
    differs = reads.part_q != queries[reads.part_read]
    if differs.any():
        connection = int(reads.connection[reads.part_read[differs.argmax()]])
        raise ValueError(f"connection {connection} lets each query see other keys: its reads are no sets of rows")
    n_boxes = len(reads.boxes)
    unions: dict[bytes, int] = {}
    member_set, member_box = [np.arange(n_boxes)], [np.arange(n_boxes)]
    for read in (count > 1).nonzero()[0]:
        boxes = np.sort(reads.part_k[first[read] : first[read] + count[read]])
        number = unions.setdefault(boxes.tobytes(), n_boxes + len(unions))
        if number == n_boxes + len(member_set) - 1:
            member_set.append(np.full(len(boxes), number))
            member_box.append(boxes)
        keys[read] = number
    return queries, keys, (np.concatenate(member_set), np.concatenate(member_box))
