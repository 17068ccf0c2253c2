"""Index tensors and coefficients of the torch executor: what one table needs on one device, made on first use and kept.

The executor works on rows (n, X, D), X being batch · heads. Gathered rows of a stage lie as [batch][x][unit][row or
key].
"""

from __future__ import annotations

import functools
import weakref
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from ..block_table import BlockTable
from ..derived import Store, derived, to_device
from .grouping import group
from .groups import Batch, Slab, compacted, narrowed

QUERIES, KEYS = 0, 1


# Index tensors of one kind kept per (table, X, dtype, device).
MAX_INDICES = 256


class Side(NamedTuple):
    """Query or key rows of a stage: ``position`` and ``valid`` [m] per batch."""

    position: list[np.ndarray]
    valid: list[np.ndarray]


class Reduce(NamedTuple):
    """Gather-reduce of a stage's rows to canvas rows, in the order of their memory: bags of ``index`` rows from
    ``offset`` on. ``target`` names the canvas rows, None where the stage alone makes all of them."""

    index: torch.Tensor
    offset: torch.Tensor
    target: torch.Tensor | None


class Indices:
    """Of one table, for X = batch · heads, a computing dtype and a device."""

    def __init__(self, table: BlockTable, heads: int, dtype: torch.dtype, device: torch.device):
        # the table's store holds this object: a strong reference back would keep both until the cycle is collected
        self.table = weakref.proxy(table)
        self.grouping, self.heads, self.dtype, self.device = group(table), heads, dtype, device
        self.sides = [_sides(stage) for stage in self.grouping.stages]
        self.store = Store()

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        return to_device(array, self.device)

    def _spread(self, parts: list[np.ndarray], by_head: int = 0, by_position: int = 1) -> torch.Tensor:
        """by_head · x + by_position · part per batch, flattened [batch][x][row]: int32 unless that overflows."""
        base = by_head * np.arange(self.heads)[:, None]
        flat = np.concatenate([(base + by_position * part).reshape(-1) for part in parts])
        return self.tensor(flat if flat.max() >= 2**31 else flat.astype(np.int32))

    # -- batches -------------------------------------------------------------------------------------------------------

    @derived(MAX_INDICES)
    def gather(self, stage: int, side: int, strides: tuple[int, int]) -> torch.Tensor:
        """Rows that the stage takes of a tensor whose positions and heads are ``strides`` rows apart."""
        by_position, by_head = strides
        return self._spread(self.sides[stage][side].position, by_head, by_position)

    @derived(MAX_INDICES)
    def reduce(self, stage: int, side: int, strides: tuple[int, int]) -> Reduce:
        """For canvas rows whose positions and heads lie ``strides`` rows apart."""
        return self._reduce(stage, side, *strides)

    def _reduce(self, stage: int, side: int, by_position: int, by_head: int) -> Reduce:
        # entry e of canvas row (position[e], x) is gathered row first[e] + x · stride[e]
        first, stride, position, begin = [], [], [], 0
        for part, valid in zip(*self.sides[stage][side]):
            first.append(begin + valid.nonzero()[0])
            stride.append(np.full(len(first[-1]), len(part)))
            position.append(part[valid])
            begin += self.heads * len(part)
        first, stride, position = (np.concatenate(x) for x in (first, stride, position))
        order = np.argsort(position, kind="stable")
        first, stride, position = first[order], stride[order], position[order]
        count = np.bincount(position, minlength=self.table.n_positions)
        target, x = None, np.arange(self.heads)
        if len(self.grouping.stages) > 1 or self.grouping.slabs:
            touched = count.nonzero()[0]
            count = count[touched]
            target = touched[:, None] * by_position + x * by_head
            target = self.tensor((target.T if by_head > by_position else target).reshape(-1))
        index = np.empty(self.heads * len(first), np.int64)
        if by_head > by_position:
            index[:] = (first + x[:, None] * stride).reshape(-1)
            counts = np.tile(count, self.heads)
        else:
            # the bag of (position p, x) starts at X · start[p] + x · count[p]
            start = np.cumsum(count) - count
            bag = np.repeat(np.arange(len(count)), count)
            place = self.heads * start[bag] + x[:, None] * count[bag] + np.arange(len(first)) - start[bag]
            index[place] = first + x[:, None] * stride
            counts = np.repeat(count, self.heads)
        offset = np.concatenate([[0], np.cumsum(counts)])
        dtype = np.int64 if max(begin, len(index)) >= 2**31 else np.int32
        return Reduce(self.tensor(index.astype(dtype)), self.tensor(offset.astype(dtype)), target)

    @derived(MAX_INDICES)
    def segment_of_key(self, stage: int) -> torch.Tensor:
        """Number of the segment that each gathered key row belongs to; the number of segments for padding."""
        none = len(self.grouping.weight)

        def numbers(batch: Batch) -> np.ndarray:
            return np.repeat(np.where(batch.segment < 0, none, batch.segment).reshape(-1), batch.keys.shape[2])

        return self._spread([numbers(b) for b in self.grouping.stages[stage]])

    @derived(MAX_INDICES)
    def scale_of_row(self, stage: int) -> torch.Tensor:
        """Entry of the flattened row_scale that scales each gathered query row; 2 n for padding."""
        n, parts = self.table.n_positions, []
        for batch, position, valid in zip(self.grouping.stages[stage], *self.sides[stage][QUERIES]):
            replace = np.repeat(self.grouping.replace[batch.segment[:, 0]], batch.rows.shape[1])
            parts.append(np.where(valid, replace * n + position, 2 * n))
        return self._spread(parts)

    @derived(MAX_INDICES)
    def bias(self, stage: int, number: int) -> torch.Tensor | None:
        """[1, G, 1, S·W]"""
        bias = self.grouping.stages[stage][number].bias
        return None if bias is None else self.tensor(bias).to(self.dtype)[None, :, None]

    @derived(MAX_INDICES)
    def own_keys(self, stage: int) -> torch.Tensor | None:
        """:func:`key_coefficient` of the table's own weights; None where all are 1."""
        coefficient = key_coefficient(self, stage, self.segments()[0])
        return None if bool((coefficient == 1).all()) else coefficient

    @derived(MAX_INDICES)
    def own_rows(self, stage: int) -> torch.Tensor:
        """:func:`row_coefficient` of the table's own row scale."""
        return row_coefficient(self, stage, self.row_scale())

    @derived(MAX_INDICES)
    def padding(self, stage: int) -> torch.Tensor | None:
        """Joint form, [gathered query rows, 1]: 0 for padding and 1 for others; None where there is no padding."""
        parts = [np.where(valid, 1, 0) for valid in self.sides[stage][QUERIES].valid]
        return None if all(part.all() for part in parts) else self._spread(parts).to(self.dtype)[:, None]

    # -- slabs ---------------------------------------------------------------------------------------------------------

    @derived(MAX_INDICES)
    def slab_bias(self, number: int) -> torch.Tensor | None:
        """[G, 1, 1, keys]"""
        bias = self.grouping.slabs[number].bias
        return None if bias is None else self.tensor(bias).to(self.dtype)[:, None, None]

    @derived(MAX_INDICES)
    def slab_entries(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 [G, R]: the segment of each row, and its entry of the flattened row_scale."""
        slab = self.grouping.slabs[number]
        positions = slab.positions(slab.row_ranges)
        return slab.segment, self.grouping.replace[slab.segment] * self.table.n_positions + positions

    @derived(MAX_INDICES)
    def slab_rows(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[G · R]: :meth:`slab_entries` as tensors."""
        return tuple(self.tensor(part.reshape(-1)) for part in self.slab_entries(number))

    @derived(MAX_INDICES)
    def own_slab_rows(self, number: int) -> torch.Tensor | float:
        """Coefficients [G, R, 1] of the table's own weights and row scale; a number where all are equal."""
        coefficient = slab_coefficient(self, number, self.segments()[0], self.row_scale())
        first = coefficient.flatten()[0]
        return float(first) if bool((coefficient == first).all()) else coefficient

    @derived(1)
    def own_runs(self) -> list[list[SlabRun]]:
        """What runs of every slab where a call has no gain, activity or row scale of its own."""
        return Step(self, None, None, None).slab_runs()

    # -- segments ------------------------------------------------------------------------------------------------------

    @derived(1)
    def segments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(weight, edge) of every segment."""
        return self.tensor(self.grouping.weight).to(self.dtype), self.tensor(self.grouping.edge)

    @derived(1)
    def per_edge(self) -> torch.Tensor | None:
        """Number of segments of every connection; segments ascend with their connections."""
        count = self.table.n_edges
        return self.tensor(np.bincount(self.grouping.edge, minlength=count)) if count else None

    def row_scale(self) -> torch.Tensor:
        """The table's own (2, n)."""
        return self.table.row_scale(self.device, self.dtype)

    @derived(1)
    def own_scaled(self) -> np.ndarray | None:
        """bool [2 · n]: entries of the table's own row scale that are not 0; None where no segment's rows have a 0."""
        scaled = (self.row_scale() != 0).cpu().numpy().reshape(-1)
        slabs = range(len(self.grouping.slabs))
        everywhere = all(scaled[self.slab_entries(number)[1]].all() for number in slabs)
        padded = np.append(scaled, True)
        stages = range(len(self.grouping.stages))
        everywhere &= all(padded[self.scale_of_row(stage).cpu().numpy()].all() for stage in stages)
        return None if everywhere else scaled


@derived(limit=2)
def indices_of(table: BlockTable, heads: int, dtype: torch.dtype, device: torch.device) -> Indices:
    """Returns the indices of a table for X = ``heads``; the last few numbers of heads are kept."""
    return Indices(table, heads, dtype, device)


def _sides(stage: tuple[Batch, ...]) -> tuple[Side, Side]:
    # padded segments repeat real keys with coefficient 0: their zero gradients need not be added
    real = [(batch.key_valid & (batch.segment[..., None] >= 0)).reshape(-1) for batch in stage]
    queries = Side([batch.rows.reshape(-1) for batch in stage], [batch.row_valid.reshape(-1) for batch in stage])
    return queries, Side([batch.keys.reshape(-1) for batch in stage], real)


def key_coefficient(indices: Indices, stage: int, coefficient: torch.Tensor) -> torch.Tensor:
    """[gathered key rows, 1]: the coefficient of each row's segment, 0 for padding."""
    return F.pad(coefficient, (0, 1)).index_select(0, indices.segment_of_key(stage))[:, None]


def row_coefficient(indices: Indices, stage: int, row_scale: torch.Tensor) -> torch.Tensor:
    """[gathered query rows, 1]: the row scale of each row in its segments' class, 0 for padding."""
    flat = F.pad(row_scale.to(indices.dtype).reshape(-1), (0, 1))
    return flat.index_select(0, indices.scale_of_row(stage))[:, None]


def slab_coefficient(indices: Indices, number: int, coefficient: torch.Tensor, row_scale: torch.Tensor) -> torch.Tensor:
    """[G, R, 1]: coefficient · row scale of each row of a slab."""
    segment, entry = indices.slab_rows(number)
    product = coefficient.index_select(0, segment) * row_scale.to(indices.dtype).reshape(-1).index_select(0, entry)
    return product.view(indices.grouping.slabs[number].cells, -1, 1)


class SlabRun(NamedTuple):
    """What of a slab runs in a call: ``slab``, on views of the canvas, or where ``rows`` and ``keys`` name positions on
    copies of these; ``entries`` [G · R] chooses its rows among those of the whole slab, None for all."""

    slab: Slab
    bias: torch.Tensor | None
    coefficient: torch.Tensor | float
    entries: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    keys: torch.Tensor | None = None


def is_whole(runs: list[SlabRun]) -> bool:
    """Whether they are one, of all of a slab."""
    return len(runs) == 1 and runs[0].entries is None


class Step:
    """One call's coefficients and what of the table runs: what gain, active and row_scale make of it.

    Rows and segments that are inactive, or scaled by 0, are left out rather than multiplied by 0, so that what is not
    finite there reaches nothing. On a CPU, reading activity waits for nothing.
    """

    def __init__(self, indices: Indices, gain, active, row_scale):
        self.indices = indices
        self.joint = indices.table.form == "joint"
        self.own_weights = gain is None and active is None
        self.own_row_scale = row_scale is None
        self.live_segments = self.scaled = None
        if self.joint:
            return
        self.row_scale = indices.row_scale() if row_scale is None else row_scale.detach()
        self.coefficient, edge = indices.segments()
        if gain is not None:
            self.coefficient = self.coefficient * gain.detach().to(indices.dtype)[edge]
        if active is not None:
            on = active.detach() != 0
            self.coefficient = torch.where(on[edge], self.coefficient, 0.0)
            self.live_segments = on.numpy()[indices.grouping.edge]
        if row_scale is None:
            self.scaled = indices.own_scaled()
        else:
            self.scaled = (self.row_scale != 0).reshape(-1).numpy()

    @functools.cached_property
    def runs(self) -> list[list[SlabRun]]:
        """What runs of every slab."""
        return self.indices.own_runs() if self.own_weights and self.own_row_scale else self.slab_runs()

    @property
    def everything(self) -> bool:
        """Whether every slab runs as a whole."""
        return all(map(is_whole, self.runs))

    def keys(self, stage: int) -> torch.Tensor | None:
        if self.joint:
            return None
        if self.own_weights:
            return self.indices.own_keys(stage)
        return key_coefficient(self.indices, stage, self.coefficient)

    def rows(self, stage: int) -> torch.Tensor | None:
        if self.joint:
            return self.indices.padding(stage)
        if self.own_row_scale:
            return self.indices.own_rows(stage)
        return row_coefficient(self.indices, stage, self.row_scale)

    def dead_keys(self, stage: int) -> torch.Tensor | None:
        """bool [gathered key rows, 1]: those of inactive segments, and padding; None where all are active."""
        if self.live_segments is None:
            return None
        dead = torch.from_numpy(np.append(~self.live_segments, True))
        return dead.index_select(0, self.indices.segment_of_key(stage))[:, None]

    def dead_rows(self, stage: int) -> torch.Tensor | None:
        """bool [gathered query rows, 1]: those that are scaled by 0, and padding; None where there is none but it."""
        return None if self.scaled is None else self.rows(stage) == 0

    def has_active(self, batch: Batch) -> bool:
        """Whether any of a batch's segments is active."""
        return self.live_segments is None or bool(self.live_segments[batch.segment[batch.segment >= 0]].any())

    def slab_runs(self) -> list[list[SlabRun]]:
        """Of every slab: all of it, the same rows of every cell, or copies of cells with equal rows."""
        return [self._runs_of(number) for number in range(len(self.indices.grouping.slabs))]

    def _runs_of(self, number: int) -> list[SlabRun]:
        slab, bias = self.indices.grouping.slabs[number], self.indices.slab_bias(number)
        if self.joint:
            return [SlabRun(slab, bias, 1.0)]
        segment, entry = self.indices.slab_entries(number)
        live = np.ones(segment.shape, bool)
        if self.scaled is not None:
            live &= self.scaled[entry]
        if self.live_segments is not None:
            live &= self.live_segments[segment]
        if self.own_weights and self.own_row_scale and live.all():
            return [SlabRun(slab, bias, self.indices.own_slab_rows(number))]
        if not live.any():
            return []
        coefficient = slab_coefficient(self.indices, number, self.coefficient, self.row_scale)
        if live.all():
            return [SlabRun(slab, bias, coefficient)]
        tensor = self.indices.tensor
        if (live == live[:1]).all():
            entries = tensor(live.reshape(-1).nonzero()[0])
            rows = coefficient.index_select(1, tensor(live[0].nonzero()[0]))
            return [SlabRun(narrowed(slab, live[0]), bias, rows, entries)]
        found = []
        positions, keys = slab.positions(slab.row_ranges), slab.positions(slab.key_ranges)
        patterns, pattern = np.unique(live, axis=0, return_inverse=True)
        for i, rows in enumerate(patterns):
            if rows.any():
                cells = pattern.reshape(-1) == i
                kept = np.ix_(cells, rows)
                entries = tensor(np.arange(live.size).reshape(live.shape)[kept].reshape(-1))
                own = coefficient.view(-1).index_select(0, entries).view(int(cells.sum()), -1, 1)
                copies = (tensor(positions[kept].reshape(-1)), tensor(keys[cells].reshape(-1)))
                found.append(SlabRun(compacted(slab, cells, rows), None, own, entries, *copies))
        return found
