"""Grouping: the cells of a BlockTable as a few batched dense products (host, numpy, once per table).

A *strided group* is a row of equal cells at equal distances, so that plain views hold all of its queries and all of its
keys: one attention call, nothing gathered. Rows that attend to the same keys share a cell there. What is too small or
too scattered for that becomes a *gathered group*: cells of equal shape whose rows are gathered, segments that the same
rows attend to side by side in one product. Grouping is a function of the table alone: three constants choose it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ..block_table import BlockTable
from ..derived import derived
from ..ranges import expand_ranges
from .groups import Batch, Grouping, Slab

# Everything is strided where that takes at most so many groups; tried up to so many cells.
MAX_STRIDED, STRIDED_CELLS = 64, 4096
# Else candidates of at least so many (query, key) pairs are strided and the rest is gathered.
STRIDED_PAIRS = 2048
# Above so many shapes, those of gathered cells are rounded up to a ladder: 1, 2, 3, 4, 6, 8, 12, 16, 24, …
MAX_SHAPES = 8
# Pieces that the rows of one cell may have, where rows that attend to the same keys are merged.
MAX_PIECES = 4
# Slabs whose cells have at least this many pairs, and at least this many rows and keys, take the flash kernel, which
# keeps no probabilities.
FLASH_PAIRS, FLASH_SIDE = 160_000, 192
# Where slabs would keep more than this per head, 64 MiB, the flash kernel keeps none: memory comes page by page.
MOST_KEPT = 1 << 24
# Probabilities are kept for backward up to this many per position and head_dim element (16: four times the bytes of q,
# k, v and out); above it batches are computed again and slabs take the flash kernel.
KEPT_PAIRS = 16
# Where more ranges of positions than this are nobody's first write, all are cleared beforehand.
MAX_STALE = 8
# Rows that one stage may gather per (batch, head): 64 MB of float32 at head_dim 64.
STAGE_ROWS = 1 << 18
# Pairs of one batch per (batch, head): 8 MB of probabilities where they are not kept.
BATCH_PAIRS = 1 << 21


@derived(limit=1)
def group(table: BlockTable) -> Grouping:
    """Returns the table's grouping."""
    weight, edge, replace = _segments(table)
    if not len(table.query_ranges().segment):
        return Grouping((), (), (), (), weight, edge, replace)
    slabs, batches = _parts(_Pieces(table), replace)
    slabs, stale_rows, stale_keys = _mark_fresh(slabs, table.n_positions)
    return Grouping(_stages(batches), slabs, stale_rows, stale_keys, weight, edge, replace)


def _parts(pieces: _Pieces, replace: np.ndarray) -> tuple[list[Slab], list[Batch]]:
    if len(pieces.keys) <= STRIDED_CELLS:
        slabs, _ = _slabs(pieces, replace, least_pairs=1)
        if len(slabs) <= MAX_STRIDED:
            return slabs, []
    slabs, taken = _slabs(pieces, replace, STRIDED_PAIRS)
    left = (~taken).nonzero()[0]
    return slabs, _batches(pieces.table, left, replace) if len(left) else []


def _segments(table: BlockTable) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if table.form == "joint":
        return np.ones(1), np.zeros(1, np.int64), np.zeros(1, np.int64)
    first = np.unique(table.segment, return_index=True)[1]
    weight, edge, replace = table.weight[first], table.edge[first], table.replace[first]
    return weight.astype(np.float64), edge.astype(np.int64), replace.astype(np.int64)


# -- slabs -------------------------------------------------------------------------------------------------------------


class _Pieces:
    """Key ranges of every cell with adjacent rectangles joined: CSR ``ptr``, ``start``, ``stop``; and a number per
    distinct key set (``key_set``, weights included) and per distinct sequence of lengths (``lengths``)."""

    def __init__(self, table: BlockTable):
        cells = table.query_ranges()
        self.table = table
        start = table.k_start[cells.rectangle].astype(np.int64)
        stop = table.k_stop[cells.rectangle].astype(np.int64)
        weight = table.weight[cells.rectangle] if table.form == "joint" else np.ones(len(start), np.float32)
        owner = np.repeat(np.arange(len(cells.segment)), np.diff(cells.ptr))
        fresh = np.ones(len(start), bool)
        fresh[1:] = (owner[1:] != owner[:-1]) | (start[1:] != stop[:-1]) | (weight[1:] != weight[:-1])
        first = fresh.nonzero()[0]
        self.start, self.stop = start[first], stop[np.append(first[1:], len(start)) - 1]
        self.weight = weight[first].astype(np.float64)
        self.ptr = np.concatenate([[0], np.cumsum(np.bincount(owner[first], minlength=len(cells.segment)))])
        self.keys = np.add.reduceat(self.stop - self.start, self.ptr[:-1])
        self.key_set = self._number(np.stack([self.start, self.stop, self.weight.view(np.int64)], axis=1))
        self.lengths = self._number((self.stop - self.start)[:, None])

    def _number(self, rows: np.ndarray) -> np.ndarray:
        """A number per cell, equal exactly where the cells' rows are equal."""
        _, kind = np.unique(rows, axis=0, return_inverse=True)
        count = np.diff(self.ptr)
        number = np.zeros(len(count), np.int64)
        kind = kind.reshape(-1)
        # one column of ranges after another: numbers of (so far, this range)
        for column in range(int(count.max())):
            has = count > column
            pair = np.full((len(count), 2), -1, np.int64)
            pair[:, 0] = number
            pair[has, 1] = kind[self.ptr[:-1][has] + column]
            number = np.unique(pair, axis=0, return_inverse=True)[1].reshape(-1)
        return number


def _slabs(pieces: _Pieces, replace: np.ndarray, least_pairs: int) -> tuple[list[Slab], np.ndarray]:
    """Slabs of at least ``least_pairs`` pairs, and which cells, bool [cells], they take. Rows that attend to the same
    keys become one taller cell of up to ``MAX_PIECES`` pieces of rows beside the first."""
    cells = pieces.table.query_ranges()
    kind, taken = replace[cells.segment], np.zeros(len(pieces.keys), bool)
    # a block is one cell, or several joined
    order = np.lexsort((cells.q_start, pieces.key_set, kind))
    joined, apart = _joins(cells.q_start[order], cells.q_stop[order], (kind[order], pieces.key_set[order]))
    block_first = (~joined).nonzero()[0]
    block_count = np.diff(np.append(block_first, len(order)))
    lead = order[block_first]
    start, first_key = cells.q_start[lead], pieces.start[pieces.ptr[lead]]
    rows = np.add.reduceat((cells.q_stop - cells.q_start)[order], block_first)
    n_pieces = 1 + np.add.reduceat(apart.astype(np.int64), block_first)
    edge = pieces.table.edge[cells.rectangle[cells.ptr[lead]]]

    slabs = []
    free = np.ones(len(lead), bool)
    # rows of blocks at equal distances: first within a connection, then among blocks at one distance from their keys,
    # then among blocks of the same keys; alone at last
    for key in (edge, first_key - start, first_key, None):
        candidates = (free if key is None else free & (n_pieces == 1)).nonzero()[0]
        if not len(candidates):
            continue
        if key is None:
            large = (rows * pieces.keys[lead])[candidates] >= least_pairs
            runs = [(candidate,) for candidate in candidates[large].tolist()]
        else:
            columns = (kind[lead], rows, pieces.lengths[lead], key)
            candidates = candidates[np.lexsort((start[candidates], *(x[candidates] for x in columns[::-1])))]
            same = np.ones(len(candidates) - 1, bool)
            for column in columns:
                same &= column[candidates][1:] == column[candidates][:-1]
            runs = (candidates[low:high] for low, high in _runs(candidates, same, start, rows, lead, pieces))
        for members in runs:
            members = np.asarray(members)
            first = members[0]
            if len(members) * rows[first] * pieces.keys[lead[first]] >= least_pairs:
                free[members] = False
                taken[order[expand_ranges(block_first[members], block_count[members])[1]]] = True
                slabs.append(_slab(pieces, order, block_first[members], block_count[members]))
    return slabs, taken


def _joins(start: np.ndarray, stop: np.ndarray, kinds: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Of cells in order of ``kinds`` and start: which are joined to the one before, and which as another piece."""
    joined, apart = np.zeros(len(start), bool), np.zeros(len(start), bool)
    same = np.ones(max(len(start) - 1, 0), bool)
    for kind in kinds:
        same &= kind[1:] == kind[:-1]
    joined[1:] = same & (start[1:] == stop[:-1])
    apart[1:] = same & (start[1:] > stop[:-1])
    block = np.cumsum(~(joined | apart)) - 1
    apart &= np.bincount(block, weights=apart)[block] < MAX_PIECES
    return joined | apart, apart


def takes_flash(rows, keys):
    """Whether slabs of such cells take the flash kernel rather than products."""
    return (rows * keys >= FLASH_PAIRS) & (np.minimum(rows, keys) >= FLASH_SIDE)


def kept_pairs(n: int, head_dim: int) -> int:
    """How many probabilities are kept at most for backward, per batch · head of ``n`` positions."""
    return KEPT_PAIRS * n * head_dim


def all_take_flash(slabs: Sequence[Slab], n: int, head_dim: int) -> bool:
    """Whether the flash kernel takes every slab, because the others would keep too much."""
    kept = sum(slab.pairs for slab in slabs if not takes_flash(slab.rows, slab.keys))
    return kept > min(kept_pairs(n, head_dim), MOST_KEPT)


def _runs(candidates, same, start, rows, lead, pieces):
    """[low, high) in ``candidates`` of two or more blocks whose rows and keys lie at equal distances, rows apart."""
    row_step = np.diff(start[candidates])
    sound, steady = _range_steps(candidates, lead, pieces)
    good = same & (row_step >= rows[candidates][:-1]) & sound
    continues = np.zeros(len(good), bool)
    continues[1:] = good[1:] & good[:-1] & (row_step[1:] == row_step[:-1]) & steady[1:]
    begins, breaks = good.nonzero()[0], np.append((~continues).nonzero()[0], len(good))
    low = 0
    while True:
        at = np.searchsorted(begins, low)
        if at == len(begins):
            return
        low = begins[at]
        high = breaks[np.searchsorted(breaks, low, side="right")] + 1
        yield low, high
        low = high


def _range_steps(candidates, lead, pieces) -> tuple[np.ndarray, np.ndarray]:
    """For every neighbouring pair of blocks: whether no range moves backwards or by less than its length (unless it
    stands still), and whether all ranges move as they did in the pair before."""
    pairs = len(candidates) - 1
    sound, steady = np.ones(pairs, bool), np.ones(pairs, bool)
    count = np.diff(pieces.ptr)[lead[candidates]]
    base = pieces.ptr[lead[candidates]]
    for column in range(int(count.max())):
        both = (count[1:] > column) & (count[:-1] > column)
        here = np.where(count > column, base + column, 0)
        step = np.where(both, np.diff(pieces.start[here]), 0)
        length = (pieces.stop - pieces.start)[here][:-1]
        sound &= ~both | (step == 0) | (step >= length)
        steady[1:] &= step[1:] == step[:-1]
    return sound, steady


def _slab(pieces: _Pieces, order: np.ndarray, first: np.ndarray, count: np.ndarray) -> Slab:
    """The slab of the blocks whose cells are ``order[first[b] : first[b] + count[b]]``."""
    cells = pieces.table.query_ranges()
    lead = order[first]
    low, high = int(pieces.ptr[lead[0]]), int(pieces.ptr[lead[0] + 1])
    n_ranges = high - low
    starts = pieces.start[pieces.ptr[lead][:, None] + np.arange(n_ranges)]
    steps = starts[1] - starts[0] if len(lead) > 1 else np.zeros(n_ranges, np.int64)
    lengths = (pieces.stop - pieces.start)[low:high]
    member = order[expand_ranges(first, count)[1]]
    height = cells.q_stop[member] - cells.q_start[member]
    of_row, offset_in = expand_ranges(np.zeros(len(member)), height)
    segment = cells.segment[member][of_row].reshape(len(lead), -1)
    slot = (cells.slot[member][of_row] + offset_in).reshape(len(lead), -1)
    log_weight = np.log(pieces.weight[pieces.ptr[lead][:, None] + np.arange(n_ranges)])
    bias, offset = None, log_weight[:, 0]
    if (log_weight != offset[:, None]).any():
        bias, offset = np.repeat(log_weight, lengths, axis=1), np.zeros(len(lead))
    # pieces of rows, as the first block has them: several blocks have one each
    own = member[: count[0]]
    fresh = np.append(True, cells.q_start[own][1:] != cells.q_stop[own][:-1])
    row_start = cells.q_start[own][fresh]
    row_stop = cells.q_stop[own][np.append(fresh[1:], True)]
    row_step = int(cells.q_start[lead[1]] - cells.q_start[lead[0]]) if len(lead) > 1 else 0
    return Slab(
        tuple((int(a), int(b - a), row_step) for a, b in zip(row_start, row_stop)),
        tuple(zip(starts[0].tolist(), lengths.tolist(), steps.tolist())),
        segment,
        slot,
        bias,
        offset,
    )


def _mark_fresh(slabs: list[Slab], n: int):
    """Slabs with their fresh flags, and the ranges that fresh ones leave out, of rows and of keys."""
    # largest first, but those of rows that no other has written come before the others
    slabs = sorted(slabs, key=lambda slab: -slab.pairs)
    row_seen, first, later = np.zeros(n, bool), [], []
    for slab in slabs:
        rows = slab.positions(slab.row_ranges)
        (later if row_seen[rows].any() else first).append(slab)
        if first and first[-1] is slab:
            row_seen[rows] = True
    row_seen, key_seen, marked = np.zeros(n, bool), np.zeros(n, bool), []
    row_stale, key_stale = np.ones(n, bool), np.ones(n, bool)
    for slab in (*first, *later):
        rows, keys = slab.positions(slab.row_ranges), slab.positions(slab.key_ranges)
        fresh_rows = not row_seen[rows].any()
        # ranges that stand still repeat their keys, and so do ranges that move to where another one was
        fresh_keys = not key_seen[keys].any() and len(np.unique(keys)) == keys.size
        row_seen[rows] = True
        key_seen[keys] = True
        row_stale[rows] &= not fresh_rows
        key_stale[keys] &= not fresh_keys
        marked.append(dataclasses.replace(slab, fresh_rows=fresh_rows, fresh_keys=fresh_keys))
    return tuple(marked), _stretches(row_stale), _stretches(key_stale)


def _stretches(flags: np.ndarray) -> tuple[tuple[int, int], ...]:
    """The ranges of positions that are flagged; all positions where those are too many."""
    marks = np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8))
    ranges = tuple(zip((marks == 1).nonzero()[0].tolist(), (marks == -1).nonzero()[0].tolist()))
    return ranges if len(ranges) <= MAX_STALE else ((0, len(flags)),)


# -- batches -----------------------------------------------------------------------------------------------------------


def _batches(table: BlockTable, members: np.ndarray, replace: np.ndarray) -> list[Batch]:
    """Batches of the cells ``members``."""
    cells = table.query_ranges()
    owner, keys = expand_ranges(table.k_start[cells.rectangle], (table.k_stop - table.k_start)[cells.rectangle])
    per_rectangle = (table.k_stop - table.k_start).astype(np.int64)[cells.rectangle]
    width = np.add.reduceat(per_rectangle, cells.ptr[:-1])
    key_first = np.cumsum(width) - width
    log_weight = np.log(table.weight.astype(np.float64))[cells.rectangle[owner]] if table.form == "joint" else None

    # units: cells with the same rows, class and number of keys, one after another in order of their segments
    rows = cells.q_stop - cells.q_start
    kind = replace[cells.segment]
    order = np.lexsort(tuple(x[members] for x in (cells.segment, width, rows, cells.q_start, kind)))
    members = members[order]
    fresh = np.zeros(len(members), bool)
    fresh[0] = True
    for array in (kind, cells.q_start, rows, width):
        fresh[1:] |= array[members][1:] != array[members][:-1]
    first = fresh.nonzero()[0]
    count = np.diff(np.append(first, len(members)))
    unit_cell = members[first]
    batch_of_unit, shapes = _assign(np.stack([rows[unit_cell], count, width[unit_cell]], axis=1))

    batches = []
    for b, (n_rows, n_segments, n_keys) in enumerate(shapes.tolist()):
        units = (batch_of_unit == b).nonzero()[0]
        lead = unit_cell[units]
        # the cells of these units, with their place (g, s)
        g, member = expand_ranges(first[units], count[units])
        s = member - first[units][g]
        member = members[member]
        row_valid = np.arange(n_rows) < rows[lead][:, None]
        row_index = cells.q_start[lead][:, None] + np.where(row_valid, np.arange(n_rows), 0)
        # keys beyond a segment's own repeat its first one; segments beyond a unit's own repeat the unit's first key
        has = np.arange(n_keys) < width[member][:, None]
        source = key_first[member][:, None] + np.where(has, np.arange(n_keys), 0)
        shape = (len(units), n_segments, n_keys)
        key_index = np.broadcast_to(keys[key_first[lead]][:, None, None], shape).copy()
        key_valid = np.zeros(shape, bool)
        key_index[g, s], key_valid[g, s] = keys[source], has
        segment = np.full(shape[:2], -1, np.int64)
        slot = np.zeros(shape[:2], np.int64)
        segment[g, s], slot[g, s] = cells.segment[member], cells.slot[member]
        bias, offset = np.zeros(shape), np.zeros(len(units))
        bias[g, s] = np.where(has, 0.0 if log_weight is None else log_weight[source], -np.inf)
        bias = bias.reshape(len(units), -1)
        if (bias == bias[:, :1]).all():
            bias, offset = None, bias[:, 0]
        batches.append(Batch(row_index, row_valid, key_index, key_valid, segment, slot, bias, offset))
    return batches


def _assign(shapes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(batch of every unit, shape of every batch) for units of shape (rows, segments, keys): equal shapes together."""
    if len(np.unique(shapes, axis=0)) > MAX_SHAPES:
        ladder = np.unique([[2**i, 3 * 2**i // 2] for i in range(31)])
        shapes = ladder[np.searchsorted(ladder, shapes)]
    kinds, kind = np.unique(shapes, axis=0, return_inverse=True)
    return kind.reshape(-1), kinds


def _stages(batches: list[Batch]) -> tuple[tuple[Batch, ...], ...]:
    """Batches, cut where one gathers too many rows or pairs, collected into stages of at most ``STAGE_ROWS`` rows."""
    stages: list[list[Batch]] = []
    held = STAGE_ROWS
    for batch in batches:
        units, rows, segments, width = batch.shape
        per_unit = rows + segments * width
        step = max(1, min(STAGE_ROWS // per_unit, BATCH_PAIRS // (rows * segments * width)))
        for low in range(0, units, step):
            part = batch if step >= units else _slice(batch, low, low + step)
            size = part.shape[0] * per_unit
            if held + size > STAGE_ROWS:
                stages.append([])
                held = 0
            stages[-1].append(part)
            held += size
    return tuple(tuple(stage) for stage in stages)


def _slice(batch: Batch, low: int, high: int) -> Batch:
    arrays = (batch.rows, batch.row_valid, batch.keys, batch.key_valid, batch.segment, batch.slot, batch.bias)
    return Batch(*(None if array is None else array[low:high] for array in (*arrays, batch.offset)))
