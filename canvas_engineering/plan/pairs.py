"""Plans of functions with a fixed sparsity pattern within each attention set: windows, random keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from canvas_kernels.block_table import BlockTable

from .index_sets import SetShape
from .plan import AttentionPlan

# (query, key) int64 of every pair in the pattern of a set of this shape, numbered in canvas order, without repeats.
Pattern = Callable[[SetShape], tuple[np.ndarray, np.ndarray]]


def select_pairs(plan: AttentionPlan, pattern: Pattern) -> AttentionPlan:
    """Returns the plan with only the pairs that ``pattern(shape)`` keeps of each attention set. Queries without a key
    leave the set: its weight does not count for them.

    Runs on the host; cost and memory are proportional to the pairs kept.

    Raises:
        ValueError: the queries of a set attend to different keys (a mask of pairs).
    """
    sets = plan.row_sets()
    parts = []
    for shape, numbers in sets.shapes():
        query, key = pattern(shape)
        # [sets, pairs] packed rows
        q_row, k_row = (
            sets.rows[sets.ptr[side[numbers]][:, None] + offset]
            for side, offset in ((sets.queries, query), (sets.keys, key))
        )
        parts.append(tuple(a.reshape(-1) for a in (np.broadcast_to(numbers[:, None], q_row.shape), q_row, k_row)))
    set_number, q_row, k_row = (np.concatenate([np.zeros(0, np.int64), *column]) for column in zip(*parts))
    set_number, q0, q1, k0, k1 = pair_rectangles(set_number, q_row, k_row)
    connection = sets.connection[set_number]
    spans = {"q_start": q0, "q_stop": q1, "k_start": k0, "k_stop": k1}
    kinds = {"segment": set_number, "edge": connection, "replace": plan.replace[connection]}

    def table_of(weight: np.ndarray) -> BlockTable:
        return BlockTable.from_rectangles(
            "edge", plan.n_packed, plan.n_connections, weight=weight[set_number], **spans, **kinds
        )

    table = pairs = table_of(sets.weight)
    if (sets.largest != sets.weight).any():
        # where equal sets were merged, the matrix M has the largest weight, not the sum
        pairs = table_of(sets.largest)
    return dataclasses.replace(plan, table=table, pairs=pairs)


def pair_rectangles(set_number: np.ndarray, q_row: np.ndarray, k_row: np.ndarray):
    """Returns distinct (set, query row, key row) triples as rectangles ``(set, q_start, q_stop, k_start, k_stop)``:
    consecutive keys, and consecutive query rows with equal keys, are joined."""
    order = np.lexsort((k_row, q_row, set_number))
    set_number, q_row, k_row = set_number[order], q_row[order], k_row[order]
    first = _breaks((set_number, q_row), k_row).nonzero()[0]
    set_number, q_row, k0 = set_number[first], q_row[first], k_row[first]
    k1 = k_row[np.append(first[1:], len(k_row)) - 1] + 1 if len(first) else k0
    order = np.lexsort((q_row, k1, k0, set_number))
    set_number, q_row, k0, k1 = set_number[order], q_row[order], k0[order], k1[order]
    first = _breaks((set_number, k0, k1), q_row).nonzero()[0]
    q1 = q_row[np.append(first[1:], len(q_row)) - 1] + 1 if len(first) else q_row[first]
    return set_number[first], q_row[first], q1, k0[first], k1[first]


def _breaks(same: tuple[np.ndarray, ...], step: np.ndarray) -> np.ndarray:
    """Returns bool: where a run of equal values in ``same`` begins, along which ``step`` grows by one."""
    fresh = np.ones(len(step), bool)
    fresh[1:] = step[1:] != step[:-1] + 1
    for values in same:
        fresh[1:] |= values[1:] != values[:-1]
    return fresh
