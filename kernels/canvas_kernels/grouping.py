"""Grouping: the cells of a BlockTable as a few batched dense products (host, numpy, once per table).

Small cells of equal shape become one *batch*; segments that the same query rows read, each with equally many keys, stand side by side in it, so
that their logits are one matrix product. Shapes that are rare are padded into a neighbour's batch where that costs less than a batch
of their own. Cells above ``LARGE_PAIRS`` stay alone and are executed on slices, without gathering anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .table import BlockTable
from .tiling import expand_ranges

# One thread, float32, 4 heads of 64, forward + backward: flash on slices against a batched product with stored probabilities, ns per pair and
# head: 128² 13.9 / 13.2, 192² 12.6 / 12.9, 256² 11.3 / 13.5 (8 cells each). Gathering its keys costs the batched form more on wide cells.
LARGE_PAIRS = 192 * 192
# Rows that one stage may gather per (batch, head): 64 MB of float32 at head_dim 64.
STAGE_ROWS = 1 << 18
# Pairs of one batch per (batch, head): 8 MB of probabilities where they are not kept.
BATCH_PAIRS = 1 << 21
# Time model for padding, ns with four heads: one batch's calls; a pair; a gathered row with its shares of gather, scale and reduce.
BATCH_NS, PAIR_NS, ROW_NS = 90e3, 4 * 12.0, 4 * 280.0
# Above this many distinct shapes, rows and keys are first rounded up to a ladder of sizes.
MAX_SHAPES = 64


@dataclass(frozen=True, eq=False)
class Batch:
    """G units of R query rows; each unit reads S segments of W keys.

    ``rows`` int64 [G, R] and ``row_valid`` bool [G, R]; ``keys`` int64 [G, S, W] and ``key_valid`` bool [G, S, W]; ``segment`` int64 [G, S], −1 where a
    unit has fewer than S; ``slot`` int64 [G, S], the slot of the unit's first row. Padding repeats a valid position. ``bias`` float64
    [G, S·W]: ln of the keys' weights, −inf on padded keys; None where it is constant along every unit's keys, then ``offset`` float64 [G] holds the
    constant, which cancels in the softmax and shows in lse alone.
    """

    rows: np.ndarray
    row_valid: np.ndarray
    keys: np.ndarray
    key_valid: np.ndarray
    segment: np.ndarray
    slot: np.ndarray
    bias: np.ndarray | None
    offset: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(G, R, S, W)"""
        return (*self.rows.shape, *self.keys.shape[1:])

    @property
    def pairs(self) -> int:
        units, rows, segments, width = self.shape
        return units * rows * segments * width


@dataclass(frozen=True, eq=False)
class LargeCell:
    """Query rows ``[start, stop)`` of one segment and their keys: ``ranges`` of key rows, merged, ascending.

    ``bias`` float64 [keys]: ln of the keys' weights; None where they are equal, then ``offset`` holds it.
    """

    start: int
    stop: int
    ranges: tuple[tuple[int, int], ...]
    segment: int
    slot: int
    bias: np.ndarray | None
    offset: float

    @property
    def keys(self) -> int:
        return sum(stop - start for start, stop in self.ranges)


@dataclass(frozen=True, eq=False)
class Grouping:
    """What the torch executor runs: ``stages`` of batches, then ``large`` cells.

    Per segment: ``weight`` float64, ``edge`` and ``replace`` int64 (joint form: one segment of weight 1).
    """

    stages: tuple[tuple[Batch, ...], ...]
    large: tuple[LargeCell, ...]
    weight: np.ndarray
    edge: np.ndarray
    replace: np.ndarray

    @property
    def batches(self) -> tuple[Batch, ...]:
        return tuple(batch for stage in self.stages for batch in stage)


def group(table: BlockTable) -> Grouping:
    """The table's grouping, cached on it."""
    if "grouping" not in table.cache:
        table.cache["grouping"] = build_grouping(table)
    return table.cache["grouping"]


def build_grouping(table: BlockTable, large_pairs: int | None = None) -> Grouping:
    large_pairs = LARGE_PAIRS if large_pairs is None else large_pairs
    weight, edge, replace = _segments(table)
    cells = table.cells()
    if not len(cells.segment):
        return Grouping((), (), weight, edge, replace)
    lengths = (table.k_stop - table.k_start).astype(np.int64)[cells.rectangle]
    width = np.add.reduceat(lengths, cells.ptr[:-1])
    rows = cells.q_stop - cells.q_start
    is_large = rows * width >= large_pairs
    large = tuple(_large_cell(table, c) for c in is_large.nonzero()[0].tolist())
    small = (~is_large).nonzero()[0]
    stages = _stages(_batches(table, small, rows[small], width[small], replace)) if len(small) else ()
    return Grouping(stages, large, weight, edge, replace)


def _segments(table: BlockTable) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if table.form == "joint":
        return np.ones(1), np.zeros(1, np.int64), np.zeros(1, np.int64)
    first = np.unique(table.segment, return_index=True)[1]
    return table.weight[first].astype(np.float64), table.edge[first].astype(np.int64), table.replace[first].astype(np.int64)


def _large_cell(table: BlockTable, c: int) -> LargeCell:
    cells = table.cells()
    members = cells.rectangle[cells.ptr[c] : cells.ptr[c + 1]]
    start, stop = table.k_start[members], table.k_stop[members]
    joins = start[1:] == stop[:-1]
    ranges = tuple(zip(start[np.append(True, ~joins)].tolist(), stop[np.append(~joins, True)].tolist()))
    log_weight = np.log(table.weight[members].astype(np.float64)) if table.form == "joint" else np.zeros(len(members))
    bias, offset = None, float(log_weight[0])
    if (log_weight != offset).any():
        bias, offset = np.repeat(log_weight, stop - start), 0.0
    bounds = int(cells.q_start[c]), int(cells.q_stop[c])
    return LargeCell(*bounds, ranges, int(cells.segment[c]), int(cells.slot[c]), bias, offset)


def _batches(table, small, rows, width, replace) -> list[Batch]:
    """Batches of the small cells; ``rows`` and ``width`` are theirs."""
    cells = table.cells()
    start, segment = cells.q_start[small], cells.segment[small]
    # units: cells with the same rows, class and number of keys, one after another in order of their segments
    order = np.lexsort((segment, width, rows, start, replace[segment]))
    small, rows, width, start, segment = small[order], rows[order], width[order], start[order], segment[order]
    fresh = np.ones(len(small), bool)
    for array in (replace[segment], start, rows, width):
        fresh[1:] &= array[1:] == array[:-1]
    fresh[1:] = ~fresh[1:]
    unit = np.cumsum(fresh) - 1
    first = fresh.nonzero()[0]
    count = np.diff(np.append(first, len(small)))
    batch_of_unit, shapes = _assign(np.stack([rows[first], count, width[first]], axis=1))

    owner, keys = expand_ranges(table.k_start[cells.rectangle], (table.k_stop - table.k_start)[cells.rectangle])
    cell_of_key = np.repeat(np.arange(len(cells.segment)), np.diff(cells.ptr))[owner]
    key_first = np.concatenate([[0], np.cumsum(np.bincount(cell_of_key, minlength=len(cells.segment)))])
    log_weight = np.log(table.weight.astype(np.float64))[cells.rectangle[owner]] if table.form == "joint" else None

    batches = []
    for b, (n_rows, n_segments, n_keys) in enumerate(shapes.tolist()):
        units = (batch_of_unit == b).nonzero()[0]
        if not len(units):
            continue
        # members: the cells of these units, with their place (g, s)
        g, member = expand_ranges(first[units], count[units])
        s = member - first[units][g]
        valid = np.arange(n_rows) < rows[first[units]][:, None]
        row_index = start[first[units]][:, None] + np.where(valid, np.arange(n_rows), 0)
        # keys beyond a segment's own repeat its first one; segments beyond a unit's own repeat the unit's first segment
        column = np.arange(n_keys)
        has = column < width[member][:, None]
        source = key_first[small[member]][:, None] + np.where(has, column, 0)
        key_index = np.repeat(keys[key_first[small[first[units]]]], n_segments * n_keys).reshape(len(units), n_segments, n_keys)
        key_valid = np.zeros(key_index.shape, bool)
        key_index[g, s], key_valid[g, s] = keys[source], has
        segments = np.full((len(units), n_segments), -1, np.int64)
        slots = np.zeros((len(units), n_segments), np.int64)
        segments[g, s], slots[g, s] = segment[member], cells.slot[small[member]]
        bias = np.zeros(key_index.shape)
        bias[g, s] = np.where(has, 0.0 if log_weight is None else log_weight[source], -np.inf)
        bias, offset = bias.reshape(len(units), -1), np.zeros(len(units))
        if (bias == bias[:, :1]).all():
            bias, offset = None, bias[:, 0]
        batches.append(Batch(row_index, valid, key_index, key_valid, segments, slots, bias, offset))
    return batches


def _assign(shapes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(batch of every unit, shape of every batch) for units of shape (rows, segments, keys): equal shapes together, rare ones merged."""
    kinds, kind = np.unique(shapes, axis=0, return_inverse=True)
    if len(kinds) > MAX_SHAPES:
        kinds, kind = np.unique(_round_up(shapes), axis=0, return_inverse=True)
    kind = kind.reshape(-1)
    size = np.bincount(kind, minlength=len(kinds)).astype(np.float64)
    target = np.arange(len(kinds))
    shape = kinds.astype(np.float64)

    def cost(shape, size):
        rows, segments, keys = np.moveaxis(shape, -1, 0)
        return BATCH_NS + size * (PAIR_NS * rows * segments * keys + ROW_NS * (rows + segments * keys))

    while len(size) > 1:
        own = cost(shape, size)
        merged = np.maximum(shape[:, None], shape[None])
        saving = own[:, None] + own[None] - cost(merged, size[:, None] + size[None])
        np.fill_diagonal(saving, -np.inf)
        i, j = sorted(divmod(int(saving.argmax()), len(size)))
        if saving[i, j] <= 0:
            break
        shape[i], size[i] = merged[i, j], size[i] + size[j]
        shape, size = np.delete(shape, j, 0), np.delete(size, j)
        target[target == j] = i
        target[target > j] -= 1
    return target[kind], shape.astype(np.int64)


def _round_up(shapes: np.ndarray) -> np.ndarray:
    """Sizes rounded up to 1, 2, 3, 4, 6, 8, 12, 16, 24, …: at most a half more."""
    ladder = np.unique([[2**i, 3 * 2**i // 2] for i in range(31)])
    return ladder[np.searchsorted(ladder, shapes)]


def _stages(batches: list[Batch]) -> tuple[tuple[Batch, ...], ...]:
    """Batches, cut where one gathers more than ``STAGE_ROWS`` rows, collected into stages that stay below it."""
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
    arrays = (batch.rows, batch.row_valid, batch.keys, batch.key_valid, batch.segment, batch.slot, batch.bias, batch.offset)
    return Batch(*(None if array is None else array[low:high] for array in arrays))
