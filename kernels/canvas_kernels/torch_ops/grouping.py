"""Grouping: the query ranges of a BlockTable as a few batched dense products (host, numpy, once per table).

A *strided group* is a sequence of equal query ranges at equal distances, so that views hold all of its queries and
keys: one attention call, nothing gathered. Rows that attend to the same keys are merged there. What is too small or too
scattered for that becomes a *gathered group*: query ranges of equal shape whose rows are gathered; segments of the same
rows share one product. Grouping is a function of the table alone: three constants determine it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ..block_table import BlockTable
from ..derived import derived
from ..ranges import expand_ranges
from .groups import GatheredGroup, Grouping, StridedGroup

# All query ranges are strided if that takes at most so many groups; tried up to so many query ranges.
MAX_STRIDED, STRIDED_RANGES = 64, 4096
# Else candidates of at least so many (query, key) pairs are strided and the rest is gathered.
STRIDED_PAIRS = 2048
# With more shapes than this, those of gathered groups are rounded up to 1, 2, 3, 4, 6, 8, 12, 16, 24, …
MAX_SHAPES = 8
# Row ranges of one member where rows that attend to the same keys are merged.
MAX_ROW_RANGES = 4
# Members with at least this many pairs, rows and keys run by the flash kernel, which saves no probabilities.
FLASH_PAIRS, FLASH_SIDE = 160_000, 192
# If strided groups would save more probabilities per head than this, 64 MiB, all run by the flash kernel.
MAX_SAVED_PROBS = 1 << 24
# At most this many probabilities per position and head_dim element are saved for backward (16: four times the bytes of
# q, k, v and out); above it gathered groups recompute them and strided groups run by the flash kernel.
SAVED_PROBS_RATIO = 16
# With more ranges to zero than this, everything is zeroed.
MAX_RANGES_TO_ZERO = 8
# Rows that one bundle gathers per (batch, head): 64 MB of float32 at head_dim 64.
BUNDLE_ROWS = 1 << 18
# Pairs of one gathered group per (batch, head): 8 MB of probabilities where they are not saved.
GATHERED_PAIRS = 1 << 21


@derived(limit=1)
def group_table(table: BlockTable) -> Grouping:
    """Returns the table's grouping."""
    weight, edge, replace = _segments(table)
    if not len(table.query_ranges().segment):
        return Grouping((), (), (), (), weight, edge, replace)
    strided, gathered = choose_groups(_KeyRanges(table), replace)
    strided, rows_to_zero, keys_to_zero = _mark_overwrites(strided, table.n_positions)
    return Grouping(_bundles(gathered), strided, rows_to_zero, keys_to_zero, weight, edge, replace)


def choose_groups(key_ranges: _KeyRanges, replace: np.ndarray) -> tuple[list[StridedGroup], list[GatheredGroup]]:
    """Returns the strided and the gathered groups of a table's key ranges."""
    if len(key_ranges.keys) <= STRIDED_RANGES:
        strided, _ = _strided_groups(key_ranges, replace, least_pairs=1)
        if len(strided) <= MAX_STRIDED:
            return strided, []
    strided, covered = _strided_groups(key_ranges, replace, STRIDED_PAIRS)
    rest = (~covered).nonzero()[0]
    return strided, _gathered_groups(key_ranges.table, rest, replace) if len(rest) else []


def _segments(table: BlockTable) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if table.form == "joint":
        return np.ones(1), np.zeros(1, np.int64), np.zeros(1, np.int64)
    first = np.unique(table.segment, return_index=True)[1]
    weight, edge, replace = table.weight[first], table.edge[first], table.replace[first]
    return weight.astype(np.float64), edge.astype(np.int64), replace.astype(np.int64)


# -- strided groups ---------------------------------------------------------------------------------------------------


class _KeyRanges:
    """Key ranges of every query range with adjacent rectangles joined: CSR ``ptr``, ``start``, ``stop``; and a number
    per distinct key set (``key_set``, weights included) and per distinct sequence of lengths (``lengths``)."""

    def __init__(self, table: BlockTable):
        ranges = table.query_ranges()
        self.table = table
        start = table.k_start[ranges.rectangle].astype(np.int64)
        stop = table.k_stop[ranges.rectangle].astype(np.int64)
        weight = table.weight[ranges.rectangle] if table.form == "joint" else np.ones(len(start), np.float32)
        owner = np.repeat(np.arange(len(ranges.segment)), np.diff(ranges.ptr))
        begins = np.ones(len(start), bool)
        begins[1:] = (owner[1:] != owner[:-1]) | (start[1:] != stop[:-1]) | (weight[1:] != weight[:-1])
        first = begins.nonzero()[0]
        self.start, self.stop = start[first], stop[np.append(first[1:], len(start)) - 1]
        self.weight = weight[first].astype(np.float64)
        self.ptr = np.concatenate([[0], np.cumsum(np.bincount(owner[first], minlength=len(ranges.segment)))])
        self.keys = np.add.reduceat(self.stop - self.start, self.ptr[:-1])
        self.key_set = self._number(np.stack([self.start, self.stop, self.weight.view(np.int64)], axis=1))
        self.lengths = self._number((self.stop - self.start)[:, None])

    def _number(self, rows: np.ndarray) -> np.ndarray:
        """Numbers query ranges, equally exactly where their ``rows`` are equal."""
        _, kind = np.unique(rows, axis=0, return_inverse=True)
        count = np.diff(self.ptr)
        number = np.zeros(len(count), np.int64)
        kind = kind.reshape(-1)
        # column by column: numbers of (previous number, this range)
        for column in range(int(count.max())):
            has = count > column
            pair = np.full((len(count), 2), -1, np.int64)
            pair[:, 0] = number
            pair[has, 1] = kind[self.ptr[:-1][has] + column]
            number = np.unique(pair, axis=0, return_inverse=True)[1].reshape(-1)
        return number


def _strided_groups(
    key_ranges: _KeyRanges, replace: np.ndarray, least_pairs: int
) -> tuple[list[StridedGroup], np.ndarray]:
    """Returns strided groups of at least ``least_pairs`` pairs, and bool [query ranges]: which they cover.

    Rows that attend to the same keys are merged into one block of up to ``MAX_ROW_RANGES`` more row ranges.
    """
    ranges = key_ranges.table.query_ranges()
    kind, covered = replace[ranges.segment], np.zeros(len(key_ranges.keys), bool)
    # a block is one query range, or several merged
    order = np.lexsort((ranges.q_start, key_ranges.key_set, kind))
    merged, separate = _merges(ranges.q_start[order], ranges.q_stop[order], (kind[order], key_ranges.key_set[order]))
    block_first = (~merged).nonzero()[0]
    block_count = np.diff(np.append(block_first, len(order)))
    lead = order[block_first]
    start, first_key = ranges.q_start[lead], key_ranges.start[key_ranges.ptr[lead]]
    rows = np.add.reduceat((ranges.q_stop - ranges.q_start)[order], block_first)
    n_row_ranges = 1 + np.add.reduceat(separate.astype(np.int64), block_first)
    edge = key_ranges.table.edge[ranges.rectangle[ranges.ptr[lead]]]

    strided = []
    free = np.ones(len(lead), bool)
    # sequences of blocks at equal distances: first within a connection, then among blocks at one distance from their
    # keys, then among blocks of the same keys; single blocks last
    for key in (edge, first_key - start, first_key, None):
        candidates = (free if key is None else free & (n_row_ranges == 1)).nonzero()[0]
        if not len(candidates):
            continue
        if key is None:
            large = (rows * key_ranges.keys[lead])[candidates] >= least_pairs
            runs = [(candidate,) for candidate in candidates[large].tolist()]
        else:
            columns = (kind[lead], rows, key_ranges.lengths[lead], key)
            candidates = candidates[np.lexsort((start[candidates], *(x[candidates] for x in columns[::-1])))]
            same = np.ones(len(candidates) - 1, bool)
            for column in columns:
                same &= column[candidates][1:] == column[candidates][:-1]
            runs = (candidates[low:high] for low, high in _runs(candidates, same, start, rows, lead, key_ranges))
        for members in runs:
            members = np.asarray(members)
            first = members[0]
            if len(members) * rows[first] * key_ranges.keys[lead[first]] >= least_pairs:
                free[members] = False
                covered[order[expand_ranges(block_first[members], block_count[members])[1]]] = True
                strided.append(_strided_group(key_ranges, order, block_first[members], block_count[members]))
    return strided, covered


def _merges(start: np.ndarray, stop: np.ndarray, kinds: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Returns which query ranges, in order of ``kinds`` and start, are merged with the previous one, and which of these
    as a separate row range."""
    merged, separate = np.zeros(len(start), bool), np.zeros(len(start), bool)
    same = np.ones(max(len(start) - 1, 0), bool)
    for kind in kinds:
        same &= kind[1:] == kind[:-1]
    merged[1:] = same & (start[1:] == stop[:-1])
    separate[1:] = same & (start[1:] > stop[:-1])
    block = np.cumsum(~(merged | separate)) - 1
    separate &= np.bincount(block, weights=separate)[block] < MAX_ROW_RANGES
    return merged | separate, separate


def use_flash(rows, keys):
    """Whether members with so many rows and keys run by the flash kernel rather than by products."""
    return (rows * keys >= FLASH_PAIRS) & (np.minimum(rows, keys) >= FLASH_SIDE)


def max_saved_probs(n: int, head_dim: int) -> int:
    """Returns the most probabilities to save for backward, per batch · head of ``n`` positions."""
    return SAVED_PROBS_RATIO * n * head_dim


def use_flash_everywhere(strided: Sequence[StridedGroup], n: int, head_dim: int) -> bool:
    """Whether all groups run by the flash kernel, since the others would save too much."""
    saved = sum(group.pairs for group in strided if not use_flash(group.rows, group.keys))
    return saved > min(max_saved_probs(n, head_dim), MAX_SAVED_PROBS)


def _runs(candidates, same, start, rows, lead, key_ranges):
    """Yields [low, high) in ``candidates`` of two or more blocks at equal distances of rows and keys, rows disjoint."""
    row_step = np.diff(start[candidates])
    sound, steady = _range_steps(candidates, lead, key_ranges)
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


def _range_steps(candidates, lead, key_ranges) -> tuple[np.ndarray, np.ndarray]:
    """Returns for every pair of neighbouring blocks whether each range moves by at least its length or not at all, and
    whether all ranges move as in the previous pair."""
    pairs = len(candidates) - 1
    sound, steady = np.ones(pairs, bool), np.ones(pairs, bool)
    count = np.diff(key_ranges.ptr)[lead[candidates]]
    base = key_ranges.ptr[lead[candidates]]
    for column in range(int(count.max())):
        both = (count[1:] > column) & (count[:-1] > column)
        here = np.where(count > column, base + column, 0)
        step = np.where(both, np.diff(key_ranges.start[here]), 0)
        length = (key_ranges.stop - key_ranges.start)[here][:-1]
        sound &= ~both | (step == 0) | (step >= length)
        steady[1:] &= step[1:] == step[:-1]
    return sound, steady


def _strided_group(key_ranges: _KeyRanges, order: np.ndarray, first: np.ndarray, count: np.ndarray) -> StridedGroup:
    """Returns the strided group of blocks with the query ranges ``order[first[b] : first[b] + count[b]]``."""
    ranges = key_ranges.table.query_ranges()
    lead = order[first]
    low, high = int(key_ranges.ptr[lead[0]]), int(key_ranges.ptr[lead[0] + 1])
    n_ranges = high - low
    starts = key_ranges.start[key_ranges.ptr[lead][:, None] + np.arange(n_ranges)]
    steps = starts[1] - starts[0] if len(lead) > 1 else np.zeros(n_ranges, np.int64)
    lengths = (key_ranges.stop - key_ranges.start)[low:high]
    member = order[expand_ranges(first, count)[1]]
    height = ranges.q_stop[member] - ranges.q_start[member]
    of_row, offset_in = expand_ranges(np.zeros(len(member)), height)
    segment = ranges.segment[member][of_row].reshape(len(lead), -1)
    slot = (ranges.slot[member][of_row] + offset_in).reshape(len(lead), -1)
    log_weight = np.log(key_ranges.weight[key_ranges.ptr[lead][:, None] + np.arange(n_ranges)])
    bias, offset = None, log_weight[:, 0]
    if (log_weight != offset[:, None]).any():
        bias, offset = np.repeat(log_weight, lengths, axis=1), np.zeros(len(lead))
    # row ranges of the first block; several blocks have one each
    own = member[: count[0]]
    begins = np.append(True, ranges.q_start[own][1:] != ranges.q_stop[own][:-1])
    row_start = ranges.q_start[own][begins]
    row_stop = ranges.q_stop[own][np.append(begins[1:], True)]
    row_step = int(ranges.q_start[lead[1]] - ranges.q_start[lead[0]]) if len(lead) > 1 else 0
    return StridedGroup(
        tuple((int(a), int(b - a), row_step) for a, b in zip(row_start, row_stop)),
        tuple(zip(starts[0].tolist(), lengths.tolist(), steps.tolist())),
        segment,
        slot,
        bias,
        offset,
    )


def _mark_overwrites(strided: list[StridedGroup], n: int):
    """Marks groups that overwrite rows or keys; returns them and the ranges to zero, of rows and of keys."""
    # largest first, but groups of unwritten rows come before the others
    strided = sorted(strided, key=lambda group: -group.pairs)
    row_written, first, later = np.zeros(n, bool), [], []
    for group in strided:
        rows = group.positions(group.row_ranges)
        (later if row_written[rows].any() else first).append(group)
        if first and first[-1] is group:
            row_written[rows] = True
    row_written, key_written, result = np.zeros(n, bool), np.zeros(n, bool), []
    row_to_zero, key_to_zero = np.ones(n, bool), np.ones(n, bool)
    for group in (*first, *later):
        rows, keys = group.positions(group.row_ranges), group.positions(group.key_ranges)
        overwrites_rows = not row_written[rows].any()
        # ranges with step 0 repeat their keys, as do ranges that move onto each other
        overwrites_keys = not key_written[keys].any() and len(np.unique(keys)) == keys.size
        row_written[rows] = True
        key_written[keys] = True
        row_to_zero[rows] &= not overwrites_rows
        key_to_zero[keys] &= not overwrites_keys
        result.append(dataclasses.replace(group, overwrites_rows=overwrites_rows, overwrites_keys=overwrites_keys))
    return tuple(result), _flagged_ranges(row_to_zero), _flagged_ranges(key_to_zero)


def _flagged_ranges(flags: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Returns the ranges of flagged positions; all positions if there are too many ranges."""
    marks = np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8))
    ranges = tuple(zip((marks == 1).nonzero()[0].tolist(), (marks == -1).nonzero()[0].tolist()))
    return ranges if len(ranges) <= MAX_RANGES_TO_ZERO else ((0, len(flags)),)


# -- gathered groups --------------------------------------------------------------------------------------------------


def _gathered_groups(table: BlockTable, members: np.ndarray, replace: np.ndarray) -> list[GatheredGroup]:
    """Returns the gathered groups of the query ranges ``members``."""
    ranges = table.query_ranges()
    owner, keys = expand_ranges(table.k_start[ranges.rectangle], (table.k_stop - table.k_start)[ranges.rectangle])
    per_rectangle = (table.k_stop - table.k_start).astype(np.int64)[ranges.rectangle]
    width = np.add.reduceat(per_rectangle, ranges.ptr[:-1])
    key_first = np.cumsum(width) - width
    log_weight = np.log(table.weight.astype(np.float64))[ranges.rectangle[owner]] if table.form == "joint" else None

    # units: query ranges with the same rows, class and number of keys, in order of their segments
    rows = ranges.q_stop - ranges.q_start
    kind = replace[ranges.segment]
    order = np.lexsort(tuple(x[members] for x in (ranges.segment, width, rows, ranges.q_start, kind)))
    members = members[order]
    begins = np.zeros(len(members), bool)
    begins[0] = True
    for array in (kind, ranges.q_start, rows, width):
        begins[1:] |= array[members][1:] != array[members][:-1]
    first = begins.nonzero()[0]
    count = np.diff(np.append(first, len(members)))
    unit_range = members[first]
    group_of_unit, shapes = _assign(np.stack([rows[unit_range], count, width[unit_range]], axis=1))

    gathered = []
    for number, (n_rows, n_segments, n_keys) in enumerate(shapes.tolist()):
        units = (group_of_unit == number).nonzero()[0]
        lead = unit_range[units]
        # the query ranges of these units, with their index (g, s)
        g, member = expand_ranges(first[units], count[units])
        s = member - first[units][g]
        member = members[member]
        row_valid = np.arange(n_rows) < rows[lead][:, None]
        row_index = ranges.q_start[lead][:, None] + np.where(row_valid, np.arange(n_rows), 0)
        # padded keys repeat the segment's first key; padded segments repeat the unit's first key
        has = np.arange(n_keys) < width[member][:, None]
        source = key_first[member][:, None] + np.where(has, np.arange(n_keys), 0)
        shape = (len(units), n_segments, n_keys)
        key_index = np.broadcast_to(keys[key_first[lead]][:, None, None], shape).copy()
        key_valid = np.zeros(shape, bool)
        key_index[g, s], key_valid[g, s] = keys[source], has
        segment = np.full(shape[:2], -1, np.int64)
        slot = np.zeros(shape[:2], np.int64)
        segment[g, s], slot[g, s] = ranges.segment[member], ranges.slot[member]
        bias, offset = np.zeros(shape), np.zeros(len(units))
        bias[g, s] = np.where(has, 0.0 if log_weight is None else log_weight[source], -np.inf)
        bias = bias.reshape(len(units), -1)
        if (bias == bias[:, :1]).all():
            bias, offset = None, bias[:, 0]
        gathered.append(GatheredGroup(row_index, row_valid, key_index, key_valid, segment, slot, bias, offset))
    return gathered


def _assign(shapes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (group of every unit, shape of every group) for units of shape (rows, segments, keys)."""
    if len(np.unique(shapes, axis=0)) > MAX_SHAPES:
        ladder = np.unique([[2**i, 3 * 2**i // 2] for i in range(31)])
        shapes = ladder[np.searchsorted(ladder, shapes)]
    kinds, kind = np.unique(shapes, axis=0, return_inverse=True)
    return kind.reshape(-1), kinds


def _bundles(gathered: list[GatheredGroup]) -> tuple[tuple[GatheredGroup, ...], ...]:
    """Splits groups that gather too many rows or pairs, and bundles them by at most ``BUNDLE_ROWS`` rows."""
    bundles: list[list[GatheredGroup]] = []
    n_rows = BUNDLE_ROWS
    for group in gathered:
        units, rows, segments, width = group.shape
        per_unit = rows + segments * width
        step = max(1, min(BUNDLE_ROWS // per_unit, GATHERED_PAIRS // (rows * segments * width)))
        for low in range(0, units, step):
            part = group if step >= units else _slice(group, low, low + step)
            size = part.shape[0] * per_unit
            if n_rows + size > BUNDLE_ROWS:
                bundles.append([])
                n_rows = 0
            bundles[-1].append(part)
            n_rows += size
    return tuple(tuple(bundle) for bundle in bundles)


def _slice(group: GatheredGroup, low: int, high: int) -> GatheredGroup:
    arrays = (group.rows, group.row_valid, group.keys, group.key_valid, group.segment, group.slot)
    rows, row_valid, keys, key_valid, segment, slot = (array[low:high] for array in arrays)
    bias = None if group.bias is None else group.bias[low:high]
    return GatheredGroup(rows, row_valid, keys, key_valid, segment, slot, bias, group.offset[low:high])
