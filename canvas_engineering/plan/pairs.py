"""Plans of functions that choose, from the shape of a read alone, which keys each query sees: windows, fixed draws."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from canvas_kernels.block_table import BlockTable

from .index_sets import ReadShape
from .plan import AttentionPlan

# Of a read of that shape: (query, key) of every pair that counts, int64, each counted in canvas order, without repeats.
Choice = Callable[[ReadShape], tuple[np.ndarray, np.ndarray]]


def choose_pairs(plan: AttentionPlan, choice: Choice) -> AttentionPlan:
    """The plan with only the pairs that ``choice(shape)`` keeps of each read. Queries that keep no key lose the read:
    its weight does not count for them.

    Host only; cost and memory go with the pairs that are kept.

    Raises:
        ValueError: a read whose queries see different keys.
    """
    sets = plan.sets()
    parts = []
    for shape, reads in sets.shapes():
        query, key = choice(shape)
        # [reads, pairs] packed rows
        q_row, k_row = (
            sets.rows[sets.ptr[side[reads]][:, None] + place]
            for side, place in ((sets.queries, query), (sets.keys, key))
        )
        parts.append(tuple(a.reshape(-1) for a in (np.broadcast_to(reads[:, None], q_row.shape), q_row, k_row)))
    read, q_row, k_row = (np.concatenate([np.zeros(0, np.int64), *column]) for column in zip(*parts))
    read, q0, q1, k0, k1 = pair_rectangles(read, q_row, k_row)
    connection = sets.connection[read]
    spans = {"q_start": q0, "q_stop": q1, "k_start": k0, "k_stop": k1}
    kinds = {"segment": read, "edge": connection, "replace": plan.replace[connection]}

    def table_of(weight: np.ndarray) -> BlockTable:
        return BlockTable.from_rectangles(
            "edge", plan.n_packed, plan.n_connections, weight=weight[read], **spans, **kinds
        )

    table = pairs = table_of(sets.weight)
    if (sets.largest != sets.weight).any():
        # of equal reads that are one, the matrix M has the largest weight, and not the sum
        pairs = table_of(sets.largest)
    return dataclasses.replace(plan, table=table, pairs=pairs)


def pair_rectangles(read: np.ndarray, q_row: np.ndarray, k_row: np.ndarray):
    """Distinct (read, query row, key row) triples as rectangles ``(read, q_start, q_stop, k_start, k_stop)``: runs of
    keys, and consecutive query rows of equal runs together."""
    order = np.lexsort((k_row, q_row, read))
    read, q_row, k_row = read[order], q_row[order], k_row[order]
    first = _breaks((read, q_row), k_row).nonzero()[0]
    read, q_row, k0 = read[first], q_row[first], k_row[first]
    k1 = k_row[np.append(first[1:], len(k_row)) - 1] + 1 if len(first) else k0
    order = np.lexsort((q_row, k1, k0, read))
    read, q_row, k0, k1 = read[order], q_row[order], k0[order], k1[order]
    first = _breaks((read, k0, k1), q_row).nonzero()[0]
    q1 = q_row[np.append(first[1:], len(q_row)) - 1] + 1 if len(first) else q_row[first]
    return read[first], q_row[first], q1, k0[first], k1[first]


def _breaks(same: tuple[np.ndarray, ...], step: np.ndarray) -> np.ndarray:
    """bool: where a run begins, of equal values in ``same`` along which ``step`` grows by one."""
    fresh = np.ones(len(step), bool)
    fresh[1:] = step[1:] != step[:-1] + 1
    for values in same:
        fresh[1:] |= values[1:] != values[:-1]
    return fresh
