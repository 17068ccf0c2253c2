"""Which rows shards need of one another: keys that are pulled, and queries that travel to their keys."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from canvas_kernels.block_table import BlockTable
from canvas_kernels.ranges import clip_ranges, expand_ranges, join_ranges, runs_of


class Owners(NamedTuple):
    """The owners of all rows: range ``start_i … stop_i − 1``, ascending in i, belongs to shard ``shard_i``."""

    start: np.ndarray
    stop: np.ndarray
    shard: np.ndarray

    @classmethod
    def of(cls, owner: np.ndarray) -> Owners:
        """Returns the ranges of an owner array, int64 [n]."""
        start = np.flatnonzero(np.diff(owner, prepend=-1))
        return cls(start, np.append(start[1:], len(owner))[: len(start)], owner[start])

    def shard_of(self, rows: np.ndarray) -> np.ndarray:
        """Returns the shards that own these rows."""
        return self.shard[np.searchsorted(self.start, rows, "right") - 1]


class Needs(NamedTuple):
    """Ranges of rows, sorted by (target, source, start): rows of shard ``source`` that shard ``target`` needs."""

    target: np.ndarray
    source: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    def counts(self, shards: int) -> np.ndarray:
        """Returns the number of rows, int64 [target, source]."""
        rows = np.zeros((shards, shards), np.int64)
        np.add.at(rows, (self.target, self.source), self.stop - self.start)
        return rows

    def rows_of(self, chosen: np.ndarray) -> np.ndarray:
        """Returns the rows of the ranges with the mask ``chosen``, one range after another."""
        start, stop = self.start[chosen], self.stop[chosen]
        return expand_ranges(start, stop - start)[1]


def needs(start, stop, other_start, other_stop, owners: Owners, n: int) -> Needs:
    """Returns which rows of the second ranges every shard needs that owns some of the first.

    Args:
        start, stop: int64 [R], ranges of rows.
        other_start, other_stop: int64 [R], the ranges that they need.
        owners: of all rows.
        n: number of rows.
    """
    owner, run, *_ = clip_ranges(start, stop, owners.start, owners.stop)
    # ranges of a shard lie in its own interval of numbers
    base = owners.shard[run].astype(np.int64) * (n + 1)
    first, last = join_ranges(base + other_start[owner], base + other_stop[owner])
    target = first // (n + 1)
    part, run, first, last = clip_ranges(first - target * (n + 1), last - target * (n + 1), owners.start, owners.stop)
    target, source = target[part], owners.shard[run].astype(np.int64)
    order = np.lexsort((first, source, target))
    return Needs(target[order], source[order], first[order], last[order])


def pulls(table: BlockTable, travels: np.ndarray, owners: Owners) -> Needs:
    """Returns the key rows that every shard needs for its own queries, those aside that travel."""
    q_start, q_stop, k_start, k_stop = _with_queries(table, ~travels)
    return needs(q_start, q_stop, k_start, k_stop, owners, table.n_positions)


def visits(table: BlockTable, travels: np.ndarray, owners: Owners) -> Needs:
    """Returns the travelling query rows that every shard computes, for their keys are its own."""
    q_start, q_stop, k_start, k_stop = _with_queries(table, travels)
    return needs(k_start, k_stop, q_start, q_stop, owners, table.n_positions)


def _with_queries(table: BlockTable, chosen: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns (q_start, q_stop, k_start, k_stop) of rectangles, queries clipped to a mask of rows."""
    runs = runs_of(chosen.nonzero()[0])
    owner, _, start, stop = clip_ranges(table.q_start.astype(np.int64), table.q_stop.astype(np.int64), *runs)
    return start, stop, table.k_start[owner].astype(np.int64), table.k_stop[owner].astype(np.int64)


def pairs_of_rows(table: BlockTable, travels: np.ndarray) -> np.ndarray:
    """Returns the pairs that the owner of each row computes, int64 [n]: of its own keys, or, as a key, of the queries
    that travel to it."""
    total = np.zeros(table.n_positions + 1, np.int64)
    for chosen, by_key in ((~travels, False), (travels, True)):
        q_start, q_stop, k_start, k_stop = _with_queries(table, chosen)
        start, stop, count = (k_start, k_stop, q_stop - q_start) if by_key else (q_start, q_stop, k_stop - k_start)
        np.add.at(total, start, count)
        np.add.at(total, stop, -count)
    return np.cumsum(total)[:-1]


def local_pairs(table: BlockTable, owners: Owners) -> int:
    """Returns the number of pairs whose query and key have one owner."""
    owner, run, start, stop = clip_ranges(
        table.q_start.astype(np.int64), table.q_stop.astype(np.int64), owners.start, owners.stop
    )
    rows, shard = stop - start, owners.shard[run]
    part, run, start, stop = clip_ranges(
        table.k_start.astype(np.int64)[owner], table.k_stop.astype(np.int64)[owner], owners.start, owners.stop
    )
    return int((rows[part] * (stop - start))[shard[part] == owners.shard[run]].sum())


def keys_of_rows(table: BlockTable) -> np.ndarray:
    """Returns the number of keys of each row over all attention sets, int64 [n]."""
    return pairs_of_rows(table, np.zeros(table.n_positions, bool))
