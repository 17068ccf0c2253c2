"""Index tensors and coefficients of the torch executor for a table on a device, cached.

The executor works on rows (n, X, D), X being batch · heads. Rows of a bundle are [group][x][member][row or key].
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
from .grouping import group_table
from .groups import GatheredGroup, StridedGroup, compact, select_rows

QUERIES, KEYS = 0, 1


# Index tensors of one kind cached per (table, X, dtype, device).
MAX_INDICES = 256


class Side(NamedTuple):
    """Query or key rows of a bundle: ``position`` and ``valid`` [m] per group."""

    position: list[np.ndarray]
    valid: list[np.ndarray]


class Reduce(NamedTuple):
    """Gather-reduce of a bundle's rows to canvas rows, in memory order: bags of ``index`` rows from ``offset`` on.
    ``target`` are the canvas rows, None if the bundle writes all of them."""

    index: torch.Tensor
    offset: torch.Tensor
    target: torch.Tensor | None


class Indices:
    """Index tensors of one table, for X = batch · heads, a computing dtype and a device."""

    def __init__(self, table: BlockTable, heads: int, dtype: torch.dtype, device: torch.device):
        # the table's store holds this object: a strong reference back would be a cycle
        self.table = weakref.proxy(table)
        self.grouping, self.heads, self.dtype, self.device = group_table(table), heads, dtype, device
        self.sides = [_sides(bundle) for bundle in self.grouping.bundles]
        self.store = Store()

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        return to_device(array, self.device)

    def _spread(self, parts: list[np.ndarray], by_head: int = 0, by_position: int = 1) -> torch.Tensor:
        """Returns by_head · x + by_position · part per group, as [group][x][row]: int32 unless that overflows."""
        base = by_head * np.arange(self.heads)[:, None]
        flat = np.concatenate([(base + by_position * part).reshape(-1) for part in parts])
        return self.tensor(flat if flat.max() >= 2**31 else flat.astype(np.int32))

    # -- gathered groups ----------------------------------------------------------------------------------------------

    @derived(MAX_INDICES)
    def gather(self, bundle: int, side: int, strides: tuple[int, int]) -> torch.Tensor:
        """Returns the bundle's rows of a tensor with ``strides`` of positions and heads, in rows."""
        by_position, by_head = strides
        return self._spread(self.sides[bundle][side].position, by_head, by_position)

    @derived(MAX_INDICES)
    def reduce(self, bundle: int, side: int, strides: tuple[int, int]) -> Reduce:
        """Returns the reduction to canvas rows with ``strides`` of positions and heads, in rows."""
        return self._reduce(bundle, side, *strides)

    def _reduce(self, bundle: int, side: int, by_position: int, by_head: int) -> Reduce:
        # entry e of canvas row (position[e], x) is gathered row first[e] + x · stride[e]
        first, stride, position, begin = [], [], [], 0
        for part, valid in zip(*self.sides[bundle][side]):
            first.append(begin + valid.nonzero()[0])
            stride.append(np.full(len(first[-1]), len(part)))
            position.append(part[valid])
            begin += self.heads * len(part)
        first, stride, position = (np.concatenate(x) for x in (first, stride, position))
        order = np.argsort(position, kind="stable")
        first, stride, position = first[order], stride[order], position[order]
        count = np.bincount(position, minlength=self.table.n_positions)
        target, x = None, np.arange(self.heads)
        if len(self.grouping.bundles) > 1 or self.grouping.strided:
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
            index_of_bag = self.heads * start[bag] + x[:, None] * count[bag] + np.arange(len(first)) - start[bag]
            index[index_of_bag] = first + x[:, None] * stride
            counts = np.repeat(count, self.heads)
        offset = np.concatenate([[0], np.cumsum(counts)])
        dtype = np.int64 if max(begin, len(index)) >= 2**31 else np.int32
        return Reduce(self.tensor(index.astype(dtype)), self.tensor(offset.astype(dtype)), target)

    @derived(MAX_INDICES)
    def segment_of_key(self, bundle: int) -> torch.Tensor:
        """Returns the segment of each gathered key row; the number of segments for padding."""
        none = len(self.grouping.weight)

        def numbers(group: GatheredGroup) -> np.ndarray:
            return np.repeat(np.where(group.segment < 0, none, group.segment).reshape(-1), group.keys.shape[2])

        return self._spread([numbers(group) for group in self.grouping.bundles[bundle]])

    @derived(MAX_INDICES)
    def scale_of_row(self, bundle: int) -> torch.Tensor:
        """Returns the entry of the flattened row_scale of each gathered query row; 2 n for padding."""
        n, parts = self.table.n_positions, []
        for group, position, valid in zip(self.grouping.bundles[bundle], *self.sides[bundle][QUERIES]):
            replace = np.repeat(self.grouping.replace[group.segment[:, 0]], group.rows.shape[1])
            parts.append(np.where(valid, replace * n + position, 2 * n))
        return self._spread(parts)

    @derived(MAX_INDICES)
    def bias(self, bundle: int, number: int) -> torch.Tensor | None:
        """Returns the bias [1, G, 1, S·W]."""
        bias = self.grouping.bundles[bundle][number].bias
        return None if bias is None else self.tensor(bias).to(self.dtype)[None, :, None]

    @derived(MAX_INDICES)
    def own_keys(self, bundle: int) -> torch.Tensor | None:
        """Returns :func:`key_coefficient` of the table's own weights; None if all are 1."""
        coefficient = key_coefficient(self, bundle, self.segments()[0])
        return None if bool((coefficient == 1).all()) else coefficient

    @derived(MAX_INDICES)
    def own_rows(self, bundle: int) -> torch.Tensor:
        """Returns :func:`row_coefficient` of the table's own row scale."""
        return row_coefficient(self, bundle, self.row_scale())

    @derived(MAX_INDICES)
    def padding(self, bundle: int) -> torch.Tensor | None:
        """Returns in joint form [gathered query rows, 1]: 0 for padding and 1 for others; None without padding."""
        parts = [np.where(valid, 1, 0) for valid in self.sides[bundle][QUERIES].valid]
        return None if all(part.all() for part in parts) else self._spread(parts).to(self.dtype)[:, None]

    # -- strided groups -----------------------------------------------------------------------------------------------

    @derived(MAX_INDICES)
    def strided_bias(self, number: int) -> torch.Tensor | None:
        """Returns the bias [G, 1, 1, keys]."""
        bias = self.grouping.strided[number].bias
        return None if bias is None else self.tensor(bias).to(self.dtype)[:, None, None]

    @derived(MAX_INDICES)
    def strided_entries(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns int64 [G, R]: the segment of each row, and its entry of the flattened row_scale."""
        group = self.grouping.strided[number]
        positions = group.positions(group.row_ranges)
        return group.segment, self.grouping.replace[group.segment] * self.table.n_positions + positions

    @derived(MAX_INDICES)
    def strided_rows(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns :meth:`strided_entries` as tensors [G · R]."""
        segment, entry = self.strided_entries(number)
        return self.tensor(segment.reshape(-1)), self.tensor(entry.reshape(-1))

    @derived(MAX_INDICES)
    def own_strided_rows(self, number: int) -> torch.Tensor | float:
        """Returns coefficients [G, R, 1] of the table's own weights and row scale; a number if all are equal."""
        coefficient = strided_coefficient(self, number, self.segments()[0], self.row_scale())
        first = coefficient.flatten()[0]
        return float(first) if bool((coefficient == first).all()) else coefficient

    @derived(1)
    def own_calls(self) -> list[list[StridedCall]]:
        """Returns the calls of every strided group without gain, activity and row scale."""
        return Step(self, None, None, None).strided_calls()

    # -- segments ------------------------------------------------------------------------------------------------------

    @derived(1)
    def segments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (weight, edge) of every segment."""
        return self.tensor(self.grouping.weight).to(self.dtype), self.tensor(self.grouping.edge)

    @derived(1)
    def per_edge(self) -> torch.Tensor | None:
        """Returns the number of segments of every connection; segments ascend with their connections."""
        count = self.table.n_edges
        return self.tensor(np.bincount(self.grouping.edge, minlength=count)) if count else None

    def row_scale(self) -> torch.Tensor:
        """Returns the table's own row scale (2, n)."""
        return self.table.row_scale(self.device, self.dtype)

    @derived(1)
    def own_scaled(self) -> np.ndarray | None:
        """Returns bool [2 · n]: nonzero entries of the table's own row scale; None if no segment's rows have a 0."""
        scaled = (self.row_scale() != 0).cpu().numpy().reshape(-1)
        strided = range(len(self.grouping.strided))
        everywhere = all(scaled[self.strided_entries(number)[1]].all() for number in strided)
        padded = np.append(scaled, True)
        bundles = range(len(self.grouping.bundles))
        everywhere &= all(padded[self.scale_of_row(bundle).cpu().numpy()].all() for bundle in bundles)
        return None if everywhere else scaled


@derived(limit=2)
def indices_of(table: BlockTable, heads: int, dtype: torch.dtype, device: torch.device) -> Indices:
    """Returns the indices of a table for X = ``heads``; cached for the last few values."""
    return Indices(table, heads, dtype, device)


def _sides(bundle: tuple[GatheredGroup, ...]) -> tuple[Side, Side]:
    # padded segments repeat real keys with coefficient 0: skip their zero gradients
    real = [(group.key_valid & (group.segment[..., None] >= 0)).reshape(-1) for group in bundle]
    queries = Side([group.rows.reshape(-1) for group in bundle], [group.row_valid.reshape(-1) for group in bundle])
    return queries, Side([group.keys.reshape(-1) for group in bundle], real)


def key_coefficient(indices: Indices, bundle: int, coefficient: torch.Tensor) -> torch.Tensor:
    """Returns [gathered key rows, 1]: the coefficient of each row's segment, 0 for padding."""
    return F.pad(coefficient, (0, 1)).index_select(0, indices.segment_of_key(bundle))[:, None]


def row_coefficient(indices: Indices, bundle: int, row_scale: torch.Tensor) -> torch.Tensor:
    """Returns [gathered query rows, 1]: the row scale of each row in its segments' class, 0 for padding."""
    flat = F.pad(row_scale.to(indices.dtype).reshape(-1), (0, 1))
    return flat.index_select(0, indices.scale_of_row(bundle))[:, None]


def strided_coefficient(
    indices: Indices, number: int, coefficient: torch.Tensor, row_scale: torch.Tensor
) -> torch.Tensor:
    """Returns [G, R, 1]: coefficient · row scale of each row of a strided group."""
    segment, entry = indices.strided_rows(number)
    product = coefficient.index_select(0, segment) * row_scale.to(indices.dtype).reshape(-1).index_select(0, entry)
    return product.view(indices.grouping.strided[number].members, -1, 1)


class StridedCall(NamedTuple):
    """One call for a strided group, on views of the canvas, or on copies of the rows and keys at the positions
    ``copies``. ``entries`` [G · R] selects its rows among those of the whole group, None for all."""

    group: StridedGroup
    bias: torch.Tensor | None
    coefficient: torch.Tensor | float
    entries: torch.Tensor | None = None
    copies: tuple[torch.Tensor, torch.Tensor] | None = None


def is_whole(calls: list[StridedCall]) -> bool:
    """Whether the only call is the whole group."""
    return len(calls) == 1 and calls[0].entries is None


class Step:
    """Coefficients and active parts of one step, from gain, active and row_scale.

    Rows and segments that are inactive, or scaled by 0, are left out rather than multiplied by 0, so that NaN and inf
    there reach nothing. On a CPU, reading activity does not synchronise.
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
    def calls(self) -> list[list[StridedCall]]:
        """The calls of every strided group."""
        return self.indices.own_calls() if self.own_weights and self.own_row_scale else self.strided_calls()

    @property
    def everything(self) -> bool:
        """Whether every strided group runs as a whole."""
        return all(map(is_whole, self.calls))

    def keys(self, bundle: int) -> torch.Tensor | None:
        if self.joint:
            return None
        if self.own_weights:
            return self.indices.own_keys(bundle)
        return key_coefficient(self.indices, bundle, self.coefficient)

    def rows(self, bundle: int) -> torch.Tensor | None:
        if self.joint:
            return self.indices.padding(bundle)
        if self.own_row_scale:
            return self.indices.own_rows(bundle)
        return row_coefficient(self.indices, bundle, self.row_scale)

    def inactive_keys(self, bundle: int) -> torch.Tensor | None:
        """Returns bool [gathered key rows, 1]: inactive segments and padding; None if all are active."""
        if self.live_segments is None:
            return None
        inactive = torch.from_numpy(np.append(~self.live_segments, True))
        return inactive.index_select(0, self.indices.segment_of_key(bundle))[:, None]

    def inactive_rows(self, bundle: int) -> torch.Tensor | None:
        """Returns bool [gathered query rows, 1]: rows scaled by 0 and padding; None if none is scaled by 0."""
        return None if self.scaled is None else self.rows(bundle) == 0

    def has_active(self, group: GatheredGroup) -> bool:
        """Whether any of a group's segments is active."""
        return self.live_segments is None or bool(self.live_segments[group.segment[group.segment >= 0]].any())

    def strided_calls(self) -> list[list[StridedCall]]:
        """Returns the calls of every strided group: the whole, the same rows of every member, or copies of members with
        equal active rows."""
        return [self._calls_of(number) for number in range(len(self.indices.grouping.strided))]

    def _calls_of(self, number: int) -> list[StridedCall]:
        group, bias = self.indices.grouping.strided[number], self.indices.strided_bias(number)
        if self.joint:
            return [StridedCall(group, bias, 1.0)]
        segment, entry = self.indices.strided_entries(number)
        live = np.ones(segment.shape, bool)
        if self.scaled is not None:
            live &= self.scaled[entry]
        if self.live_segments is not None:
            live &= self.live_segments[segment]
        if self.own_weights and self.own_row_scale and live.all():
            return [StridedCall(group, bias, self.indices.own_strided_rows(number))]
        if not live.any():
            return []
        coefficient = strided_coefficient(self.indices, number, self.coefficient, self.row_scale)
        if live.all():
            return [StridedCall(group, bias, coefficient)]
        tensor = self.indices.tensor
        if (live == live[:1]).all():
            entries = tensor(live.reshape(-1).nonzero()[0])
            rows = coefficient.index_select(1, tensor(live[0].nonzero()[0]))
            return [StridedCall(select_rows(group, live[0]), bias, rows, entries)]
        calls = []
        positions, keys = group.positions(group.row_ranges), group.positions(group.key_ranges)
        patterns, pattern = np.unique(live, axis=0, return_inverse=True)
        for i, rows in enumerate(patterns):
            if rows.any():
                members = pattern.reshape(-1) == i
                selection = np.ix_(members, rows)
                entries = tensor(np.arange(live.size).reshape(live.shape)[selection].reshape(-1))
                own = coefficient.view(-1).index_select(0, entries).view(int(members.sum()), -1, 1)
                copies = (tensor(positions[selection].reshape(-1)), tensor(keys[members].reshape(-1)))
                calls.append(StridedCall(compact(group, members, rows), None, own, entries, copies))
        return calls
