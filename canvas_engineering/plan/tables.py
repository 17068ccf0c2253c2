"""Attention sets in packed order → canvas_kernels.BlockTable, in edge form and in joint form."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from canvas_kernels.block_table import BlockTable
from canvas_kernels.ranges import expand_ranges

from .attention_sets import AttentionSets
from .ordering import PackedOrder


def edge_table(sets: AttentionSets, packed: PackedOrder, n_connections: int, replace: np.ndarray) -> BlockTable:
    """Returns the table with one softmax per attention set: segments are sets.

    ``replace`` (bool [n_connections]) is the class of each connection. Equal sets of one connection (several reference
    frames that hold the same frame) are merged, weights added: the weighted sum over sets is linear.
    """
    part_set, weight = sets.part_set, sets.weight.copy()
    parts_per_set = np.bincount(part_set, minlength=len(weight))
    single = parts_per_set[part_set] == 1
    keep = np.ones(len(part_set), bool)
    if single.any():
        rows = single.nonzero()[0]
        key = (sets.connection[part_set[rows]], sets.part_q[rows], sets.part_k[rows])
        order = np.lexsort(key)
        fresh = np.ones(len(rows), bool)
        fresh[1:] = np.any([k[order][1:] != k[order][:-1] for k in key], axis=0)
        group = np.cumsum(fresh) - 1
        total = np.bincount(group, weights=sets.weight[part_set[rows[order]]])
        leader = rows[order[fresh]]
        weight[part_set[leader]] = total
        keep[rows] = False
        keep[leader] = True
    part, q0, q1, k0, k1 = _rectangles(sets, packed, keep.nonzero()[0])
    set_number = part_set[part]
    connection = sets.connection[set_number]
    return BlockTable.from_rectangles(
        "edge",
        len(packed.order),
        n_connections,
        q_start=q0,
        q_stop=q1,
        k_start=k0,
        k_stop=k1,
        segment=set_number,
        weight=weight[set_number],
        edge=connection,
        replace=replace[connection],
    )


def join_tables(tables: Sequence[BlockTable]) -> BlockTable:
    """Concatenates tables in edge form over the same positions and connections; their segments stay distinct."""
    if len(tables) == 1:
        return tables[0]
    names = ("q_start", "q_stop", "k_start", "k_stop", "weight", "edge", "replace")
    columns = {name: np.concatenate([getattr(table, name) for table in tables]) for name in names}
    first = np.cumsum([0] + [int(table.segment.max(initial=-1)) + 1 for table in tables])
    segment = np.concatenate([table.segment + start for table, start in zip(tables, first)])
    return BlockTable.from_rectangles("edge", tables[0].n_positions, tables[0].n_edges, segment=segment, **columns)


def joint_table(sets: AttentionSets, packed: PackedOrder) -> BlockTable:
    """Returns the table with one softmax per query: disjoint rectangles with the largest weight of each pair."""
    n = len(packed.order)
    part, q0, q1, k0, k1 = _rectangles(sets, packed, np.arange(len(sets.part_set)))
    if not len(part):
        nothing = dict.fromkeys(("q_start", "q_stop", "k_start", "k_stop", "weight"), ())
        return BlockTable.from_rectangles("joint", n, 1, **nothing)
    weight = sets.weight[sets.part_set[part]]
    marks = np.unique(np.concatenate([q0, q1]))
    low = np.searchsorted(marks, q0)
    owner, span = expand_ranges(low, np.searchsorted(marks, q1) - low)
    span, k0, k1, weight = _largest_per_key(span, k0[owner], k1[owner], weight[owner], n)
    # rectangles of equal keys and weight in consecutive row ranges are one rectangle
    order = np.lexsort((span, weight, k1, k0))
    span, k0, k1, weight = span[order], k0[order], k1[order], weight[order]
    fresh = np.ones(len(span), bool)
    fresh[1:] = (k0[1:] != k0[:-1]) | (k1[1:] != k1[:-1]) | (weight[1:] != weight[:-1]) | (span[1:] != span[:-1] + 1)
    first = fresh.nonzero()[0]
    last = np.append(first[1:], len(span)) - 1
    return BlockTable.from_rectangles(
        "joint",
        n,
        1,
        q_start=marks[span[first]],
        q_stop=marks[span[last] + 1],
        k_start=k0[first],
        k_stop=k1[first],
        weight=weight[first],
    )


def _rectangles(sets: AttentionSets, packed: PackedOrder, parts: np.ndarray):
    """Returns (part, q_start, q_stop, k_start, k_stop): all pairs of a part's query and key intervals."""
    count = np.diff(packed.ptr)
    q_box, k_box = sets.part_q[parts], sets.part_k[parts]
    owner, pair = expand_ranges(np.zeros(len(parts)), count[q_box] * count[k_box])
    q, k = np.divmod(pair, count[k_box][owner])
    q += packed.ptr[q_box][owner]
    k += packed.ptr[k_box][owner]
    start, stop = packed.interval_start, packed.interval_stop
    return parts[owner], start[q], stop[q], start[k], stop[k]


def _largest_per_key(span, k0, k1, weight, n):
    """Returns disjoint key ranges per range of query rows, each with its largest weight.

    Takes and returns arrays of one length: row range number, key range, weight; the result is sorted by (row range,
    key) and adjacent ranges of equal weight are joined.
    """
    base = span * (n + 1)
    marks = np.unique(np.concatenate([base + k0, base + k1]))
    low = np.searchsorted(marks, base + k0)
    owner, interval = expand_ranges(low, np.searchsorted(marks, base + k1) - low)
    order = np.argsort(interval, kind="stable")
    owner, interval = owner[order], interval[order]
    first = np.ones(len(interval), bool)
    first[1:] = interval[1:] != interval[:-1]
    starts = first.nonzero()[0]
    largest = np.maximum.reduceat(weight[owner], starts)
    interval = interval[starts]
    span = span[owner[starts]]
    k0, k1 = marks[interval] - span * (n + 1), marks[interval + 1] - span * (n + 1)
    fresh = np.ones(len(interval), bool)
    fresh[1:] = (span[1:] != span[:-1]) | (k0[1:] != k1[:-1]) | (largest[1:] != largest[:-1])
    first = fresh.nonzero()[0]
    last = np.append(first[1:], len(interval)) - 1
    return span[first], k0[first], k1[last], largest[first]
