"""Sigmoid attention, out_i = Σ_r c_ri Σ_j σ(scale · q_i·k_j) v_j: the torch executor for CPUs.

Pairs are grouped as for softmax. The keys of a row are independent, so backward recomputes probabilities, a bounded
number at a time. Edge form only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from ..block_table import BlockTable
from ..derived import derived, to_device
from ..packing import IndexMap, apply_now
from .composition import group_arrays
from .grouping import group_table
from .indices import indices_of

# Pairs computed at once: 2 MB of float32 fit the cache.
MAX_PAIRS = 1 << 19

_sigmoid_backward_out = torch.ops.aten.sigmoid_backward.grad_input


class _Group(NamedTuple):
    """G members of R rows that attend to S segments of W keys; ``bias`` (G, S · W), −inf at padding, or None."""

    shape: tuple[int, int, int, int]
    bias: torch.Tensor | None

    @property
    def entries(self) -> tuple[int, int, int]:
        """(G, R, S)"""
        return self.shape[:3]

    @property
    def width(self) -> int:
        """Keys of a member."""
        return self.shape[2] * self.shape[3]


@dataclass(frozen=True, eq=False)
class GatherIndex:
    """The groups of a table, their rows and keys one after another, on one device.

    Attributes:
        queries, keys: maps from positions.
        segment, scale: the segment and the entry of the flattened row_scale of every (row, segment), past the last for
            padding.
        edges: map from connections, one more for padding.
    """

    groups: list[_Group]
    queries: IndexMap
    keys: IndexMap
    segment: torch.Tensor
    scale: torch.Tensor
    edges: IndexMap


@derived(limit=4)
def gather_index(table: BlockTable, dtype: torch.dtype, device: torch.device) -> GatherIndex:
    """Returns the gather index of a table."""
    grouping, n = group_table(table), table.n_positions
    parts, columns = [], []
    for rows, keys, segment, _slot, _offset, bias in group_arrays(table):
        bias = None if bias is None else to_device(bias, device).to(dtype)
        parts.append(_Group((*rows.shape, *keys.shape[1:]), bias))
        entry = np.where(segment < 0, 2 * n, grouping.replace[segment] * n + rows[..., None])
        segment = np.where(segment < 0, len(grouping.weight), segment)
        columns.append([array.reshape(-1) for array in (rows, keys, segment, entry)])
    rows, keys, segment, entry = (np.concatenate(column) for column in zip(*columns))
    edge = np.append(grouping.edge, table.n_edges)[segment]
    return GatherIndex(
        parts,
        IndexMap.gather(rows, n),
        IndexMap.gather(keys, n),
        to_device(segment, device),
        to_device(entry, device),
        IndexMap.gather(edge, table.n_edges + 1),
    )


class _Chunk(NamedTuple):
    """Some heads, members and rows of group ``part``: ``rows`` and ``keys`` index its [X, G, R, D] and [X, G, S·W, D]
    tensors so that heads and members form one dimension Y; ``factor`` [g, r, S]; ``bias`` [g, 1, S·W], −inf at padding,
    or None."""

    part: int
    rows: tuple[slice, ...]
    keys: tuple[slice, ...]
    factor: torch.Tensor
    bias: torch.Tensor | None


class _Step:
    """One step on a table: gathers, coefficients and scatters. Inactive rows and rows scaled by 0 are zeroed on both
    ways: NaN and inf times 0 would remain."""

    def __init__(self, table: BlockTable, q: torch.Tensor, gain, active, row_scale):
        self.batch, self.heads, self.n, self.dim = q.shape
        self.batch_heads = self.batch * self.heads
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        indices = indices_of(table, self.batch_heads, self.dtype, q.device)
        self.index = gather_index(table, self.dtype, q.device)
        row_scale = indices.row_scale() if row_scale is None else row_scale.detach()
        weight, edge = indices.segments()
        if active is not None:
            weight = torch.where((active.detach() != 0)[edge], weight, 0.0)
        scales = F.pad(row_scale.to(self.dtype).reshape(-1), (0, 1))
        # of every (row, segment) entry, without gain
        self.scale = F.pad(weight, (0, 1))[self.index.segment] * scales[self.index.scale]
        self.factor = self.scale
        if gain is not None:
            padded = F.pad(gain.detach().to(self.dtype), (0, 1))[:, None]
            self.factor = self.scale * apply_now(padded, self.index.edges)[:, 0]
        sizes = [math.prod(group.entries) for group in self.index.groups]
        live = [x.view(group.entries) for group, x in zip(self.index.groups, (self.scale != 0).split(sizes))]
        # [1, G, R, 1] and [1, G, S · W, 1]
        self.inactive_rows = [~x.any(2)[None, :, :, None] for x in live]
        self.inactive_keys = [
            ~x.any(1).repeat_interleave(group.shape[3], 1)[None, :, :, None]
            for group, x in zip(self.index.groups, live)
        ]

    def gather(self, x: torch.Tensor, queries: bool, scale: float = 1.0) -> list[torch.Tensor]:
        """Gathers x (B, H, n, D) times ``scale`` by group: [X, G, R or S·W, D], contiguous."""
        x, side = x.to(self.dtype), self._side(queries)
        rows = apply_now((x if scale == 1.0 else scale * x).permute(2, 0, 1, 3).flatten(1), side)
        units = [(group.shape[0], group.shape[1] if queries else group.width) for group in self.index.groups]
        gathered = [
            x.unflatten(0, shape).unflatten(2, (self.batch_heads, self.dim)).permute(2, 0, 1, 3).contiguous()
            for shape, x in zip(units, rows.split([math.prod(shape) for shape in units]))
        ]
        return self._cleared(gathered, queries)

    def spread(self, parts: list[torch.Tensor], queries: bool) -> torch.Tensor:
        """Computes the adjoint of :meth:`gather`: sums of [X, G, R or S·W, D] at each position, (B, H, n, D)."""
        parts = self._cleared(parts, queries)
        rows = torch.cat([part.permute(1, 2, 0, 3).flatten(2).flatten(0, 1) for part in parts])
        sums = apply_now(rows, self._side(queries), True)
        return sums.view(self.n, self.batch, self.heads, self.dim).permute(1, 2, 0, 3)

    def _side(self, queries: bool) -> IndexMap:
        # equal maps are one object, so both sides may be one
        return self.index.queries if queries else self.index.keys

    def _cleared(self, parts: list[torch.Tensor], queries: bool) -> list[torch.Tensor]:
        inactive = self.inactive_rows if queries else self.inactive_keys
        return [x.masked_fill_(rows, 0.0) for x, rows in zip(parts, inactive)]

    def chunks(self) -> Iterator[_Chunk]:
        """Yields chunks of at most MAX_PAIRS pairs: rows of one member and head, members of one head, or heads."""
        sizes = [math.prod(group.entries) for group in self.index.groups]
        for number, (group, factor) in enumerate(zip(self.index.groups, self.factor.split(sizes))):
            units, rows, segments = group.entries
            factor, width = factor.view(units, rows, segments), group.width
            bias = None if group.bias is None else group.bias.view(units, 1, width)
            r = max(1, min(rows, MAX_PAIRS // width))
            g = 1 if r < rows else max(1, min(units, MAX_PAIRS // (width * rows)))
            x = 1 if g < units else max(1, min(self.batch_heads, MAX_PAIRS // (width * rows * units)))
            steps = range(0, self.batch_heads, x), range(0, units, g), range(0, rows, r)
            for head, unit, row in itertools.product(*steps):
                keys = (slice(head, head + x), slice(unit, unit + g))
                index = (*keys, slice(row, row + r))
                yield _Chunk(number, index, keys, factor[index[1:]], None if bias is None else bias[keys[1]])

    def buffer(self) -> torch.Tensor:
        """Returns a flat buffer for the pairs of any chunk, reused to avoid page faults."""
        sizes = [self.batch_heads * math.prod(group.shape) for group in self.index.groups]
        widest = max(group.width for group in self.index.groups)
        return torch.empty(max(widest, min(MAX_PAIRS, max(sizes))), dtype=self.dtype, device=self.factor.device)


def _flat(x: torch.Tensor) -> torch.Tensor:
    """Views a chunk's [x, g, length, D] as [Y, length, D]."""
    return x.view(-1, *x.shape[2:])


def _product(buffer: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Multiplies [Y, r, D] by [Y, S·W, D] transposed, in ``buffer``."""
    shape = (left.shape[0], left.shape[1], right.shape[1])
    return torch.bmm(left, right.transpose(1, 2), out=buffer[: math.prod(shape)].view(shape))


def _probabilities(buffer, queries: torch.Tensor, keys: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Returns probabilities [Y, r, S·W] of queries that are scaled already, which is cheaper than scaling pairs."""
    logits = _product(buffer, queries, keys)
    if bias is not None:
        logits.unflatten(0, (-1, len(bias))).add_(bias)
    return logits.sigmoid_()


def _weigh(pairs: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiplies ``pairs`` [Y, r, S·W] by the factor of each row and segment [g, r, S], in place."""
    units, rows, segments = factor.shape
    pairs.view(-1, units, rows, segments, pairs.shape[2] // segments).mul_(factor[..., None])
    return pairs


def forward(q, k, v, table: BlockTable, *, scale: float, gain=None, active=None, row_scale=None) -> torch.Tensor:
    """Returns out (B, H, n, D) in q's dtype; arguments as checked by :func:`..ops.block_attention`."""
    if not q.numel() or not len(table.weight):
        return q.new_zeros(q.shape)
    step = _Step(table, q, gain, active, row_scale)
    queries, keys, values = step.gather(q, True, scale), step.gather(k, False), step.gather(v, False)
    results, buffer = [torch.empty_like(x) for x in queries], step.buffer()
    for chunk in step.chunks():
        b, c = (_flat(x[chunk.part][chunk.keys]) for x in (keys, values))
        p = _probabilities(buffer, _flat(queries[chunk.part][chunk.rows]), b, chunk.bias)
        result = results[chunk.part][chunk.rows]
        if chunk.factor.shape[2] == 1:
            # c scales rows, which needs no pass over the pairs
            torch.bmm(p, c, out=_flat(result))
            result.mul_(chunk.factor)
        else:
            torch.bmm(_weigh(p, chunk.factor), c, out=_flat(result))
    return step.spread(results, True).to(q.dtype).contiguous()


def backward(
    grad_out, q, k, v, table: BlockTable, *, scale: float, gain=None, active=None, row_scale=None, need_gain=False
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
    """Returns ``(gradients, dgain)``: dq, dk, dv (B, H, n, D) in q's dtype; dgain (n_edges,), None unless
    ``need_gain``."""
    if not q.numel() or not len(table.weight):
        return tuple(q.new_zeros(q.shape) for _ in range(3)), q.new_zeros(table.n_edges) if need_gain else None
    step = _Step(table, q, gain, active, row_scale)
    index = step.index
    queries = step.gather(q, True, scale)
    upstream = step.gather(grad_out, True)
    keys, values = (step.gather(x, False) for x in (k, v))
    dq = [torch.empty_like(x) for x in queries]
    dk, dv = ([torch.zeros_like(x) for x in keys] for _ in range(2))
    entry_grads = [dq[0].new_zeros(group.entries) for group in index.groups]
    buffer, other = step.buffer(), step.buffer()
    for chunk in step.chunks():
        part, factor = chunk.part, chunk.factor
        a, da = (_flat(x[part][chunk.rows]) for x in (queries, dq))
        b, c, db, dc = (_flat(x[part][chunk.keys]) for x in (keys, values, dk, dv))
        upstream_rows = upstream[part][chunk.rows]
        p = _probabilities(buffer, a, b, chunk.bias)
        by_row = factor.shape[2] == 1 and not need_gain
        # with one segment per row c scales rows, which needs no pass over the pairs
        g = _flat(upstream_rows * factor if by_row else upstream_rows)
        dp = _product(other, g, c)
        if need_gain:
            pairs = (p * dp).view(-1, *factor.shape, p.shape[2] // factor.shape[2])
            entry_grads[part][chunk.rows[1:]] += pairs.sum((0, -1))
        if not by_row:
            _weigh(dp, factor)
        # dS = c p (1 − p) dP, in place of dP
        ds = _sigmoid_backward_out(dp, p, grad_input=dp)
        dc.baddbmm_((p if by_row else _weigh(p, factor)).transpose(1, 2), g)
        torch.baddbmm(da, ds, b, beta=0, alpha=scale, out=da)
        db.baddbmm_(ds.transpose(1, 2), a)
    sides = (True, False, False)
    gradients = tuple(step.spread(x, side).to(q.dtype).contiguous() for x, side in zip((dq, dk, dv), sides))
    if not need_gain:
        return gradients, None
    # inactive entries may hold 0 · inf
    entries = torch.cat([grad.reshape(-1) for grad in entry_grads])
    entries = torch.where(step.scale != 0, entries * step.scale, 0.0)
    return gradients, apply_now(entries[:, None], index.edges, True)[:-1, 0]
