"""Attention without a normaliser, out_i = Σ_r c_ri Σ_j σ(scale · q_i·k_j) v_j: its torch executor for CPUs.

The pairs are those of the table's cells, grouped as for softmax. Nothing couples the keys of a row, so probabilities
are computed again in backward rather than kept, a bounded number at a time. Edge form only.
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
from .grouping import group
from .indices import indices_of

# Pairs computed at once: 2 MB of float32, which stay in the cache; 8 MB took a tenth longer for 4,096² pairs.
MAX_PAIRS = 1 << 19

_sigmoid_backward_out = torch.ops.aten.sigmoid_backward.grad_input


class _Part(NamedTuple):
    """G cells of R rows that attend to S segments of W keys; ``bias`` (G, S · W), −inf at padding, or None."""

    shape: tuple[int, int, int, int]
    bias: torch.Tensor | None

    @property
    def entries(self) -> tuple[int, int, int]:
        """(G, R, S)"""
        return self.shape[:3]

    @property
    def width(self) -> int:
        """Keys of a cell."""
        return self.shape[2] * self.shape[3]


@dataclass(frozen=True, eq=False)
class Places:
    """The parts of a table, their rows and keys one after another, on one device.

    ``queries`` and ``keys`` take positions. ``segment`` and ``scale`` number the segment and the entry of the flattened
    row_scale of every (row, segment), those past the last at padding; ``edges`` takes connections, one more at padding.
    """

    parts: list[_Part]
    queries: IndexMap
    keys: IndexMap
    segment: torch.Tensor
    scale: torch.Tensor
    edges: IndexMap


@derived(limit=4)
def places_of(table: BlockTable, dtype: torch.dtype, device: torch.device) -> Places:
    """Returns where the parts of a table lie."""
    grouping, n = group(table), table.n_positions
    parts, columns = [], []
    for rows, keys, segment, _slot, _offset, bias in group_arrays(table):
        bias = None if bias is None else to_device(bias, device).to(dtype)
        parts.append(_Part((*rows.shape, *keys.shape[1:]), bias))
        entry = np.where(segment < 0, 2 * n, grouping.replace[segment] * n + rows[..., None])
        segment = np.where(segment < 0, len(grouping.weight), segment)
        columns.append([array.reshape(-1) for array in (rows, keys, segment, entry)])
    rows, keys, segment, entry = (np.concatenate(column) for column in zip(*columns))
    edge = np.append(grouping.edge, table.n_edges)[segment]
    return Places(
        parts,
        IndexMap.gather(rows, n),
        IndexMap.gather(keys, n),
        to_device(segment, device),
        to_device(entry, device),
        IndexMap.gather(edge, table.n_edges + 1),
    )


class _Chunk(NamedTuple):
    """Some lanes, units and rows of part ``part``: ``rows`` and ``keys`` index its [X, G, R, D] and [X, G, S·W, D]
    tensors so that lanes and units make one dimension Y; ``factor`` [g, r, S]; ``bias`` [g, 1, S·W], −inf at padding,
    or None."""

    part: int
    rows: tuple[slice, ...]
    keys: tuple[slice, ...]
    factor: torch.Tensor
    bias: torch.Tensor | None


class _Step:
    """One call on one table: gathers, coefficients, and the way back. What is inactive or scaled by 0 is cleared on
    both ways: times 0, what is not finite there would stay."""

    def __init__(self, table: BlockTable, q: torch.Tensor, gain, active, row_scale):
        self.batch, self.heads, self.n, self.dim = q.shape
        self.lanes = self.batch * self.heads
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        indices = indices_of(table, self.lanes, self.dtype, q.device)
        self.places = places_of(table, self.dtype, q.device)
        row_scale = indices.row_scale() if row_scale is None else row_scale.detach()
        weight, edge = indices.segments()
        if active is not None:
            weight = torch.where((active.detach() != 0)[edge], weight, 0.0)
        scales = F.pad(row_scale.to(self.dtype).reshape(-1), (0, 1))
        # of every (row, segment) entry: what is multiplied by gain
        self.share = F.pad(weight, (0, 1))[self.places.segment] * scales[self.places.scale]
        self.factor = self.share
        if gain is not None:
            padded = F.pad(gain.detach().to(self.dtype), (0, 1))[:, None]
            self.factor = self.share * apply_now(padded, self.places.edges)[:, 0]
        sizes = [math.prod(part.entries) for part in self.places.parts]
        live = [piece.view(part.entries) for part, piece in zip(self.places.parts, (self.share != 0).split(sizes))]
        # [1, G, R, 1] and [1, G, S · W, 1]
        self.dead_rows = [~x.any(2)[None, :, :, None] for x in live]
        self.dead_keys = [
            ~x.any(1).repeat_interleave(part.shape[3], 1)[None, :, :, None] for part, x in zip(self.places.parts, live)
        ]

    def gather(self, x: torch.Tensor, queries: bool, scale: float = 1.0) -> list[torch.Tensor]:
        """x (B, H, n, D) times ``scale`` by part: [X, G, R or S·W, D], contiguous."""
        x, side = x.to(self.dtype), self._side(queries)
        rows = apply_now((x if scale == 1.0 else scale * x).permute(2, 0, 1, 3).flatten(1), side)
        units = [(part.shape[0], part.shape[1] if queries else part.width) for part in self.places.parts]
        pieces = [
            piece.unflatten(0, shape).unflatten(2, (self.lanes, self.dim)).permute(2, 0, 1, 3).contiguous()
            for shape, piece in zip(units, rows.split([math.prod(shape) for shape in units]))
        ]
        return self._cleared(pieces, queries)

    def spread(self, parts: list[torch.Tensor], queries: bool) -> torch.Tensor:
        """The adjoint: sums (B, H, n, D) of what parts [X, G, R or S·W, D] give to each position."""
        parts = self._cleared(parts, queries)
        rows = torch.cat([part.permute(1, 2, 0, 3).flatten(2).flatten(0, 1) for part in parts])
        sums = apply_now(rows, self._side(queries), True)
        return sums.view(self.n, self.batch, self.heads, self.dim).permute(1, 2, 0, 3)

    def _side(self, queries: bool) -> IndexMap:
        # both sides may be one object, as equal maps are
        return self.places.queries if queries else self.places.keys

    def _cleared(self, parts: list[torch.Tensor], queries: bool) -> list[torch.Tensor]:
        return [x.masked_fill_(dead, 0.0) for x, dead in zip(parts, self.dead_rows if queries else self.dead_keys)]

    def chunks(self) -> Iterator[_Chunk]:
        """Everything, at most MAX_PAIRS pairs at a time: rows of one unit and lane, units of one lane, or lanes."""
        sizes = [math.prod(part.entries) for part in self.places.parts]
        for number, (part, factor) in enumerate(zip(self.places.parts, self.factor.split(sizes))):
            units, rows, segments = part.entries
            factor, width = factor.view(units, rows, segments), part.width
            bias = None if part.bias is None else part.bias.view(units, 1, width)
            r = max(1, min(rows, MAX_PAIRS // width))
            g = 1 if r < rows else max(1, min(units, MAX_PAIRS // (width * rows)))
            x = 1 if g < units else max(1, min(self.lanes, MAX_PAIRS // (width * rows * units)))
            for lane, unit, row in itertools.product(range(0, self.lanes, x), range(0, units, g), range(0, rows, r)):
                keys = (slice(lane, lane + x), slice(unit, unit + g))
                index = (*keys, slice(row, row + r))
                yield _Chunk(number, index, keys, factor[index[1:]], None if bias is None else bias[keys[1]])

    def buffer(self) -> torch.Tensor:
        """Flat, for the pairs of any chunk: pages that are written once cost less than fresh ones for each chunk."""
        sizes = [self.lanes * math.prod(part.shape) for part in self.places.parts]
        widest = max(part.width for part in self.places.parts)
        return torch.empty(max(widest, min(MAX_PAIRS, max(sizes))), dtype=self.dtype, device=self.factor.device)


def _flat(x: torch.Tensor) -> torch.Tensor:
    """A chunk's [x, g, length, D] as [Y, length, D], a view."""
    return x.view(-1, *x.shape[2:])


def _product(buffer: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """[Y, r, D] times [Y, S·W, D] transposed, in ``buffer``."""
    shape = (left.shape[0], left.shape[1], right.shape[1])
    return torch.bmm(left, right.transpose(1, 2), out=buffer[: math.prod(shape)].view(shape))


def _probabilities(buffer, queries: torch.Tensor, keys: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """[Y, r, S·W] of queries that hold the scale already: on their elements it costs less than on the pairs."""
    logits = _product(buffer, queries, keys)
    if bias is not None:
        logits.unflatten(0, (-1, len(bias))).add_(bias)
    return logits.sigmoid_()


def _weigh(pairs: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """``pairs`` [Y, r, S·W] times the factor of each row and segment [g, r, S], in place."""
    units, rows, segments = factor.shape
    pairs.view(-1, units, rows, segments, pairs.shape[2] // segments).mul_(factor[..., None])
    return pairs


def forward(q, k, v, table: BlockTable, *, scale: float, gain=None, active=None, row_scale=None) -> torch.Tensor:
    """out (B, H, n, D) in q's dtype, by plain torch; tensors as :func:`..ops.block_attention` checks them."""
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
            # c meets rows: nothing that costs a pass over the pairs
            torch.bmm(p, c, out=_flat(result))
            result.mul_(chunk.factor)
        else:
            torch.bmm(_weigh(p, chunk.factor), c, out=_flat(result))
    return step.spread(results, True).to(q.dtype).contiguous()


def backward(
    grad_out, q, k, v, table: BlockTable, *, scale: float, gain=None, active=None, row_scale=None, need_gain=False
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
    """``(gradients, dgain)``: dq, dk, dv (B, H, n, D) in q's dtype; dgain (n_edges,), None unless ``need_gain``."""
    if not q.numel() or not len(table.weight):
        return tuple(q.new_zeros(q.shape) for _ in range(3)), q.new_zeros(table.n_edges) if need_gain else None
    step = _Step(table, q, gain, active, row_scale)
    places = step.places
    queries = step.gather(q, True, scale)
    upstream = step.gather(grad_out, True)
    keys, values = (step.gather(x, False) for x in (k, v))
    dq = [torch.empty_like(x) for x in queries]
    dk, dv = ([torch.zeros_like(x) for x in keys] for _ in range(2))
    shares = [dq[0].new_zeros(part.entries) for part in places.parts]
    buffer, other = step.buffer(), step.buffer()
    for chunk in step.chunks():
        part, factor = chunk.part, chunk.factor
        a, da = (_flat(x[part][chunk.rows]) for x in (queries, dq))
        b, c, db, dc = (_flat(x[part][chunk.keys]) for x in (keys, values, dk, dv))
        upstream_rows = upstream[part][chunk.rows]
        p = _probabilities(buffer, a, b, chunk.bias)
        by_row = factor.shape[2] == 1 and not need_gain
        # c meets rows where each has one segment: nothing that costs a pass over the pairs
        g = _flat(upstream_rows * factor if by_row else upstream_rows)
        dp = _product(other, g, c)
        if need_gain:
            pairs = (p * dp).view(-1, *factor.shape, p.shape[2] // factor.shape[2])
            shares[part][chunk.rows[1:]] += pairs.sum((0, -1))
        if not by_row:
            _weigh(dp, factor)
        # dS = c p (1 − p) dP, where dP was
        ds = _sigmoid_backward_out(dp, p, grad_input=dp)
        dc.baddbmm_((p if by_row else _weigh(p, factor)).transpose(1, 2), g)
        torch.baddbmm(da, ds, b, beta=0, alpha=scale, out=da)
        db.baddbmm_(ds.transpose(1, 2), a)
    sides = (True, False, False)
    gradients = tuple(step.spread(x, side).to(q.dtype).contiguous() for x, side in zip((dq, dk, dv), sides))
    if not need_gain:
        return gradients, None
    # an entry that is dead may hold 0 · inf
    entries = torch.cat([share.reshape(-1) for share in shares])
    entries = torch.where(step.share != 0, entries * step.share, 0.0)
    return gradients, apply_now(entries[:, None], places.edges, True)[:-1, 0]
