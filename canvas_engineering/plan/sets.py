"""The reads of a plan as lists of rows: what functions want that are not softmax over rectangles."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from canvas_kernels.table import BlockTable
from canvas_kernels.tiling import expand_ranges

from .order import PackedOrder
from .reads import Reads


@dataclass(frozen=True, eq=False)
class ReadSets:
    """R reads over S distinct sets of rows. All arrays int64 but ``weight``.

    Set s holds the packed rows ``rows[ptr[s] : ptr[s + 1]]`` in canvas order, (t, s0, s1, …). Read r attends from the
    set ``queries[r]`` over the set ``keys[r]`` with ``weight[r]`` (float64) and belongs to ``connection[r]``. Equal
    reads of one connection are one read of their summed weight; ``largest[r]`` (float64) is that of one of them.
    """

    ptr: np.ndarray
    rows: np.ndarray
    queries: np.ndarray
    keys: np.ndarray
    weight: np.ndarray
    connection: np.ndarray
    largest: np.ndarray

    def lengths(self, sets: np.ndarray) -> np.ndarray:
        """How many rows each of ``sets`` holds."""
        return np.diff(self.ptr)[sets]

    def rows_of(self, sets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(place, row) of every row of ``sets``, one set after another: ``place`` counts in ``sets``."""
        place, at = expand_ranges(self.ptr[sets], self.lengths(sets))
        return place, self.rows[at]


def read_sets(reads: Reads, packed: PackedOrder) -> ReadSets:
    """The reads, each of which must let all of its queries see the same keys.

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
    return ReadSets(ptr, row, numbers[: len(triple)], numbers[len(triple) :], weight, connection, largest)


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
