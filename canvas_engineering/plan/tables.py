"""Reads in packed order → canvas_kernels.BlockTable, in edge form and in joint form."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from canvas_kernels.block_table import BlockTable
from canvas_kernels.ranges import expand_ranges

from .attention_sets import Reads
from .ordering import PackedOrder


def edge_table(reads: Reads, packed: PackedOrder, n_connections: int, replace: np.ndarray) -> BlockTable:
    """One softmax per read: segments are reads, edges are connections.

    ``replace`` (bool [n_connections]) is the class of each connection. Equal reads of one connection (several reference
    frames that hold the same frame) become one whose weight is their sum: the weighted sum over reads is linear.
    """
    part_read, weight = reads.part_read, reads.weight.copy()
    parts_per_read = np.bincount(part_read, minlength=len(weight))
    single = parts_per_read[part_read] == 1
    keep = np.ones(len(part_read), bool)
    if single.any():
        rows = single.nonzero()[0]
        key = (reads.connection[part_read[rows]], reads.part_q[rows], reads.part_k[rows])
        order = np.lexsort(key)
        fresh = np.ones(len(rows), bool)
        fresh[1:] = np.any([k[order][1:] != k[order][:-1] for k in key], axis=0)
        group = np.cumsum(fresh) - 1
        total = np.bincount(group, weights=reads.weight[part_read[rows[order]]])
        leader = rows[order[fresh]]
        weight[part_read[leader]] = total
        keep[rows] = False
        keep[leader] = True
    part, q0, q1, k0, k1 = _rectangles(reads, packed, keep.nonzero()[0])
    read = part_read[part]
    connection = reads.connection[read]
    return BlockTable.from_rectangles(
        "edge",
        len(packed.order),
        n_connections,
        q_start=q0,
        q_stop=q1,
        k_start=k0,
        k_stop=k1,
        segment=read,
        weight=weight[read],
        edge=connection,
        replace=replace[connection],
    )


def join_tables(tables: Sequence[BlockTable]) -> BlockTable:
    """The rectangles of several tables over the same positions and edges as one table, segments apart. Edge form."""
    if len(tables) == 1:
        return tables[0]
    names = ("q_start", "q_stop", "k_start", "k_stop", "weight", "edge", "replace")
    columns = {name: np.concatenate([getattr(table, name) for table in tables]) for name in names}
    first = np.cumsum([0] + [int(table.segment.max(initial=-1)) + 1 for table in tables])
    segment = np.concatenate([table.segment + start for table, start in zip(tables, first)])
    return BlockTable.from_rectangles("edge", tables[0].n_positions, tables[0].n_edges, segment=segment, **columns)


def joint_table(reads: Reads, packed: PackedOrder) -> BlockTable:
    """One softmax per query: disjoint rectangles whose weight is the largest over the reads that make each pair."""
    n = len(packed.order)
    part, q0, q1, k0, k1 = _rectangles(reads, packed, np.arange(len(reads.part_read)))
    if not len(part):
        nothing = dict.fromkeys(("q_start", "q_stop", "k_start", "k_stop", "weight"), ())
        return BlockTable.from_rectangles("joint", n, 1, **nothing)
    weight = reads.weight[reads.part_read[part]]
    marks = np.unique(np.concatenate([q0, q1]))
    low = np.searchsorted(marks, q0)
    owner, run = expand_ranges(low, np.searchsorted(marks, q1) - low)
    run, k0, k1, weight = _largest_per_key(run, k0[owner], k1[owner], weight[owner], n)
    # rectangles of equal keys and weight in consecutive runs are one rectangle
    order = np.lexsort((run, weight, k1, k0))
    run, k0, k1, weight = run[order], k0[order], k1[order], weight[order]
    fresh = np.ones(len(run), bool)
    fresh[1:] = (k0[1:] != k0[:-1]) | (k1[1:] != k1[:-1]) | (weight[1:] != weight[:-1]) | (run[1:] != run[:-1] + 1)
    first = fresh.nonzero()[0]
    last = np.append(first[1:], len(run)) - 1
    return BlockTable.from_rectangles(
        "joint",
        n,
        1,
        q_start=marks[run[first]],
        q_stop=marks[run[last] + 1],
        k_start=k0[first],
        k_stop=k1[first],
        weight=weight[first],
    )


def _rectangles(reads: Reads, packed: PackedOrder, parts: np.ndarray):
    """(part, q_start, q_stop, k_start, k_stop): every query interval of a part with every key interval of it."""
    count = np.diff(packed.ptr)
    q_box, k_box = reads.part_q[parts], reads.part_k[parts]
    owner, pair = expand_ranges(np.zeros(len(parts)), count[q_box] * count[k_box])
    q, k = np.divmod(pair, count[k_box][owner])
    q += packed.ptr[q_box][owner]
    k += packed.ptr[k_box][owner]
    start, stop = packed.interval_start, packed.interval_stop
    return parts[owner], start[q], stop[q], start[k], stop[k]


def _largest_per_key(run, k0, k1, weight, n):
    """Disjoint key ranges per run of query rows, each with the largest weight over the given ranges that hold it.

    Non-empty arrays of one length: run number, key range, weight; the result likewise, sorted by (run, key), adjacent
    ranges of equal weight joined.
    """
    base = run * (n + 1)
    marks = np.unique(np.concatenate([base + k0, base + k1]))
    low = np.searchsorted(marks, base + k0)
    owner, piece = expand_ranges(low, np.searchsorted(marks, base + k1) - low)
    order = np.argsort(piece, kind="stable")
    owner, piece = owner[order], piece[order]
    first = np.ones(len(piece), bool)
    first[1:] = piece[1:] != piece[:-1]
    starts = first.nonzero()[0]
    largest = np.maximum.reduceat(weight[owner], starts)
    piece = piece[starts]
    run = run[owner[starts]]
    k0, k1 = marks[piece] - run * (n + 1), marks[piece + 1] - run * (n + 1)
    fresh = np.ones(len(piece), bool)
    fresh[1:] = (run[1:] != run[:-1]) | (k0[1:] != k1[:-1]) | (largest[1:] != largest[:-1])
    first = fresh.nonzero()[0]
    last = np.append(first[1:], len(piece)) - 1
    return run[first], k0[first], k1[last], largest[first]
