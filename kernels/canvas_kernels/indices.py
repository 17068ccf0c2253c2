"""Index tensors and coefficients of the torch executor: what one table needs on one device, made on first use and kept.

The executor works on rows (n, X, D), X being batch · heads. Gathered rows of a stage lie as [batch][x][unit][row or
key].
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from . import reference
from .grouping import group
from .groups import Batch, Slab, narrowed
from .table import BlockTable

QUERIES, KEYS = 0, 1
# Index tensors kept per (table, X, dtype, device); the oldest goes first.
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
        # the table's cache holds this object: a strong reference back would keep both until the cycle is collected
        self.table = weakref.proxy(table)
        self.grouping, self.heads, self.dtype, self.device = group(table), heads, dtype, device
        self.sides = [_sides(stage) for stage in self.grouping.stages]
        self._made: dict = {}

    def _cached(self, key, make):
        if key not in self._made:
            if len(self._made) >= MAX_INDICES:
                self._made.pop(next(iter(self._made)))
            self._made[key] = make()
        return self._made[key]

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def _spread(self, parts: list[np.ndarray], by_head: int = 0, by_position: int = 1) -> torch.Tensor:
        """by_head · x + by_position · part per batch, flattened [batch][x][row]: int32 unless that overflows."""
        base = by_head * np.arange(self.heads)[:, None]
        flat = np.concatenate([(base + by_position * part).reshape(-1) for part in parts])
        return self.tensor(flat if flat.max() >= 2**31 else flat.astype(np.int32))

    # -- batches -------------------------------------------------------------------------------------------------------

    def gather(self, stage: int, side: int, strides: tuple[int, int]) -> torch.Tensor:
        """Rows that the stage reads of a tensor whose positions and heads are ``strides`` rows apart."""
        by_position, by_head = strides
        return self._cached(
            ("gather", stage, side, strides),
            lambda: self._spread(self.sides[stage][side].position, by_head, by_position),
        )

    def reduce(self, stage: int, side: int, strides: tuple[int, int]) -> Reduce:
        """For canvas rows whose positions and heads lie ``strides`` rows apart."""
        return self._cached(("reduce", stage, side, strides), lambda: self._reduce(stage, side, *strides))

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

    def segment_of_key(self, stage: int) -> torch.Tensor:
        """Number of the segment that each gathered key row belongs to; the number of segments for padding."""
        none = len(self.grouping.weight)

        def numbers(batch: Batch) -> np.ndarray:
            return np.repeat(np.where(batch.segment < 0, none, batch.segment).reshape(-1), batch.keys.shape[2])

        return self._cached(
            ("segment_of_key", stage), lambda: self._spread([numbers(b) for b in self.grouping.stages[stage]])
        )

    def scale_of_row(self, stage: int) -> torch.Tensor:
        """Entry of the flattened row_scale that scales each gathered query row; 2 n for padding."""
        n = self.table.n_positions

        def make():
            parts = []
            for batch, position, valid in zip(self.grouping.stages[stage], *self.sides[stage][QUERIES]):
                replace = np.repeat(self.grouping.replace[batch.segment[:, 0]], batch.rows.shape[1])
                parts.append(np.where(valid, replace * n + position, 2 * n))
            return self._spread(parts)

        return self._cached(("scale_of_row", stage), make)

    def bias(self, stage: int, number: int) -> torch.Tensor | None:
        """[1, G, 1, S·W]"""
        bias = self.grouping.stages[stage][number].bias
        if bias is None:
            return None
        return self._cached(("bias", stage, number), lambda: self.tensor(bias).to(self.dtype)[None, :, None])

    def own_keys(self, stage: int) -> torch.Tensor | None:
        """:func:`key_coefficient` of the table's own weights; None where all are 1."""

        def make():
            coefficient = key_coefficient(self, stage, self.segments()[0])
            return None if bool((coefficient == 1).all()) else coefficient

        return self._cached(("own_keys", stage), make)

    def own_rows(self, stage: int) -> torch.Tensor:
        """:func:`row_coefficient` of the table's own row scale."""
        return self._cached(("own_rows", stage), lambda: row_coefficient(self, stage, self.row_scale()))

    def padding(self, stage: int) -> torch.Tensor | None:
        """Joint form, [gathered query rows, 1]: 0 for padding and 1 for others; None where there is no padding."""

        def make():
            parts = [np.where(valid, 1, 0) for valid in self.sides[stage][QUERIES].valid]
            return None if all(part.all() for part in parts) else self._spread(parts).to(self.dtype)[:, None]

        return self._cached(("padding", stage), make)

    # -- slabs ---------------------------------------------------------------------------------------------------------

    def slab_bias(self, number: int) -> torch.Tensor | None:
        """[G, 1, 1, keys]"""
        bias = self.grouping.slabs[number].bias
        if bias is None:
            return None
        return self._cached(("slab_bias", number), lambda: self.tensor(bias).to(self.dtype)[:, None, None])

    def slab_segments(self, number: int) -> torch.Tensor:
        """[G · R]: the segment of each row."""
        return self._cached(
            ("slab_segments", number), lambda: self.tensor(self.grouping.slabs[number].segment.reshape(-1))
        )

    def slab_scales(self, number: int) -> torch.Tensor:
        """[G · R]: the entry of the flattened row_scale of each row."""

        def make():
            slab = self.grouping.slabs[number]
            replace = self.grouping.replace[slab.segment].reshape(-1)
            return self.tensor(replace * self.table.n_positions + slab.positions(slab.row_ranges).reshape(-1))

        return self._cached(("slab_scales", number), make)

    def own_slab_rows(self, number: int) -> torch.Tensor | float:
        """:func:`slab_coefficient` of the table's own weights and row scale; a number where all are equal."""

        def make():
            coefficient = slab_coefficient(self, number, self.segments()[0], self.row_scale())
            first = coefficient.flatten()[0]
            return float(first) if bool((coefficient == first).all()) else coefficient

        return self._cached(("own_slab_rows", number), make)

    # -- segments ------------------------------------------------------------------------------------------------------

    def segments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(weight, edge) of every segment."""
        grouping = self.grouping
        return self._cached(
            "segments", lambda: (self.tensor(grouping.weight).to(self.dtype), self.tensor(grouping.edge))
        )

    def per_edge(self) -> torch.Tensor:
        """Number of segments of every edge; segments ascend with their edges."""
        count = self.table.n_edges
        return self._cached(
            "per_edge", lambda: self.tensor(np.bincount(self.grouping.edge, minlength=count)) if count else None
        )

    def row_scale(self, active: torch.Tensor | None = None) -> torch.Tensor:
        """The table's own (2, n), in float64 where that is computed in."""
        if self.dtype == torch.float64:
            return reference.row_scales(self.table, active, torch.float64, self.device)
        return self.table.row_scale(active, self.device)


def indices_of(table: BlockTable, rows: torch.Tensor) -> Indices:
    key = ("rectangles", rows.shape[1], rows.dtype, rows.device)
    made = table.cache.get(key)
    if made is None:
        made = table.cache[key] = Indices(table, rows.shape[1], rows.dtype, rows.device)
    return made


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
    product = coefficient.index_select(0, indices.slab_segments(number)) * slab_row_scale(indices, number, row_scale)
    return product.view(indices.grouping.slabs[number].cells, -1, 1)


def slab_row_scale(indices: Indices, number: int, row_scale: torch.Tensor) -> torch.Tensor:
    """[G · R]: the row scale of each row of a slab."""
    return row_scale.to(indices.dtype).reshape(-1).index_select(0, indices.slab_scales(number))


class Step:
    """Coefficients of one call: what gain, active and row_scale make of the table."""

    def __init__(self, indices: Indices, gain, active, row_scale):
        self.indices = indices
        self.joint = indices.table.form == "joint"
        self.own_weights = gain is None and active is None
        self.own_row_scale = row_scale is None and active is None
        self.live = None
        self._slabs: dict[int, tuple[Slab, torch.Tensor | None]] = {}
        if self.joint:
            return
        self.row_scale = indices.row_scale(active) if row_scale is None else row_scale
        self.coefficient, edge = indices.segments()
        if gain is not None:
            self.coefficient = self.coefficient * gain.detach().to(indices.dtype)[edge]
        if active is not None:
            on = active != 0
            self.coefficient = self.coefficient * on.to(indices.dtype)[edge]
            if active.device.type == "cpu":
                # reading activity waits for nothing here, so what is inactive need not be computed
                self.live = on.numpy()[indices.grouping.edge]

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

    def slab(self, number: int) -> Slab:
        """Slab ``number`` without the rows that are known to be inactive, where those are the same of all cells."""
        return self._live_slab(number)[0]

    def slab_rows(self, number: int) -> torch.Tensor | float:
        """Coefficient · row scale of a slab's rows: [G, R, 1], or a number that holds for all."""
        if self.joint:
            return 1.0
        if self.own_weights and self.own_row_scale:
            return self.indices.own_slab_rows(number)
        coefficient = slab_coefficient(self.indices, number, self.coefficient, self.row_scale)
        rows = self._live_slab(number)[1]
        return coefficient if rows is None else coefficient.index_select(1, rows)

    def of_slab_rows(self, values: torch.Tensor, number: int) -> torch.Tensor:
        """Of ``values`` [G · R], one for each row of a slab, those of the rows that run."""
        slab, rows = self._live_slab(number)
        return values if rows is None else values.view(slab.cells, -1).index_select(1, rows).reshape(-1)

    def _live_slab(self, number: int) -> tuple[Slab, torch.Tensor | None]:
        slab = self.indices.grouping.slabs[number]
        if self.live is None:
            return slab, None
        if number not in self._slabs:
            live, found = self.live[slab.segment], (slab, None)
            if not live.all() and (live == live[:1]).all():
                found = narrowed(slab, live[0]), self.indices.tensor(live[0].nonzero()[0])
            self._slabs[number] = found
        return self._slabs[number]

    def runs(self, part: Batch | Slab) -> bool:
        """Whether any of its segments is active, as far as that can be known without waiting for a device."""
        return self.live is None or bool(self.live[part.segment[part.segment >= 0]].any())
