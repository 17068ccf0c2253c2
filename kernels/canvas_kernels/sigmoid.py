"""Attention without a normaliser, out_i = Σ_r c_ri Σ_j σ(scale · q_i·k_j) v_j: the operators and their torch executor.

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

from .dropout import Part, parts_of
from .gathers import RowMap, gather_rows, sum_rows
from .grouping import group
from .indices import Indices, indices_of
from .table import BlockTable

# Pairs computed at once: 2 MB of float32, which stay in the cache; 8 MB took a tenth longer for 4,096² pairs.
MAX_PAIRS = 1 << 19

_sigmoid_backward_out = torch.ops.aten.sigmoid_backward.grad_input


@dataclass(frozen=True, eq=False)
class Places:
    """The parts of a table, their rows and keys one after another, on one device.

    ``queries`` and ``keys`` are RowMaps over positions. ``segment`` and ``scale`` are those of the parts, flattened;
    ``edges`` maps the same entries over edges, padding over one more.
    """

    parts: list[Part]
    queries: RowMap
    keys: RowMap
    segment: torch.Tensor
    scale: torch.Tensor
    edges: RowMap


def places_of(table: BlockTable, indices: Indices) -> Places:
    """Made once per table, dtype and device."""
    key = ("sigmoid", indices.dtype, indices.device)
    if key not in table.cache:
        parts = parts_of(table, indices)
        columns = ([getattr(part, name).reshape(-1).cpu() for part in parts] for name in ("rows", "keys", "segment"))
        rows, keys, segment = (torch.cat(column).numpy() for column in columns)
        edge = np.append(group(table).edge, table.n_edges)[segment]
        table.cache[key] = Places(
            parts,
            RowMap.of(rows, table.n_positions, indices.device),
            RowMap.of(keys, table.n_positions, indices.device),
            indices.tensor(segment),
            torch.cat([part.scale.reshape(-1) for part in parts]),
            RowMap.of(edge, table.n_edges + 1, indices.device),
        )
    return table.cache[key]


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
    """One call on one table: gathers, coefficients, and the way back."""

    def __init__(self, table: BlockTable, q: torch.Tensor, gain, active, row_scale):
        self.batch, self.heads, self.n, self.dim = q.shape
        self.lanes = self.batch * self.heads
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        indices = indices_of(table, q.new_empty((self.n, self.lanes, 0), dtype=self.dtype))
        self.places = places_of(table, indices)
        row_scale = indices.row_scale(active) if row_scale is None else row_scale
        weight, edge = indices.segments()
        if active is not None:
            weight = weight * (active != 0).to(self.dtype)[edge]
        scales = F.pad(row_scale.to(self.dtype).reshape(-1), (0, 1))
        # of every (row, segment) entry: what is multiplied by gain
        self.share = F.pad(weight, (0, 1))[self.places.segment] * scales[self.places.scale]
        self.factor = self.share
        if gain is not None:
            self.factor = self.share * F.pad(gain.to(self.dtype), (0, 1))[self.places.edges.index]

    def gather(self, x: torch.Tensor, side: RowMap, which: str, scale: float = 1.0) -> list[torch.Tensor]:
        """x (B, H, n, D) times ``scale`` by part: [X, G, R or S·W, D], contiguous."""
        x = x.to(self.dtype)
        rows = gather_rows((x if scale == 1.0 else scale * x).permute(2, 0, 1, 3).flatten(1), side)
        sizes = [getattr(part, which).numel() for part in self.places.parts]
        return [
            piece.unflatten(0, (len(part.rows), -1))
            .unflatten(2, (self.lanes, self.dim))
            .permute(2, 0, 1, 3)
            .contiguous()
            for part, piece in zip(self.places.parts, rows.split(sizes))
        ]

    def spread(self, parts: list[torch.Tensor], side: RowMap) -> torch.Tensor:
        """The adjoint: sums (B, H, n, D) of what parts [X, G, R or S·W, D] give to each position."""
        rows = torch.cat([part.permute(1, 2, 0, 3).flatten(2).flatten(0, 1) for part in parts])
        return sum_rows(rows, side).view(self.n, self.batch, self.heads, self.dim).permute(1, 2, 0, 3)

    def chunks(self) -> Iterator[_Chunk]:
        """Everything, at most MAX_PAIRS pairs at a time: rows of one unit and lane, units of one lane, or lanes."""
        sizes = [part.segment.numel() for part in self.places.parts]
        for number, (part, factor) in enumerate(zip(self.places.parts, self.factor.split(sizes))):
            units, rows, segments = part.segment.shape
            factor, width = factor.view(units, rows, segments), part.keys.shape[1] * part.keys.shape[2]
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
        sizes = [self.lanes * part.segment[..., 0].numel() * part.keys[0].numel() for part in self.places.parts]
        widest = max(part.keys[0].numel() for part in self.places.parts)
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
    """out (B, H, n, D) in q's dtype, by plain torch; tensors as :func:`.ops.block_attention` checks them."""
    if not q.numel() or not len(table.weight):
        return q.new_zeros(q.shape)
    step = _Step(table, q, gain, active, row_scale)
    places = step.places
    queries, keys, values = (
        step.gather(q, places.queries, "rows", scale),
        step.gather(k, places.keys, "keys"),
        step.gather(v, places.keys, "keys"),
    )
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
    return step.spread(results, places.queries).to(q.dtype).contiguous()


def backward(
    grad_out, q, k, v, table: BlockTable, *, scale: float, gain=None, active=None, row_scale=None, need_gain=False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``(gradients, dgain)``: dq, dk, dv as (3, B, H, n, D) in q's dtype; dgain (n_edges,), None unless
    ``need_gain``."""
    if not q.numel() or not len(table.weight):
        return q.new_zeros((3, *q.shape)), q.new_zeros(table.n_edges) if need_gain else None
    step = _Step(table, q, gain, active, row_scale)
    places = step.places
    queries = step.gather(q, places.queries, "rows", scale)
    upstream = step.gather(grad_out, places.queries, "rows")
    keys, values = (step.gather(x, places.keys, "keys") for x in (k, v))
    dq = [torch.empty_like(x) for x in queries]
    dk, dv = ([torch.zeros_like(x) for x in keys] for _ in range(2))
    shares = [part.segment.new_zeros(part.segment.shape, dtype=step.dtype) for part in places.parts]
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
    sides = (places.queries, places.keys, places.keys)
    gradients = torch.stack([step.spread(parts, side) for parts, side in zip((dq, dk, dv), sides)]).to(q.dtype)
    if not need_gain:
        return gradients, None
    entries = torch.cat([share.reshape(-1) for share in shares]) * step.share
    return gradients, sum_rows(entries[:, None], places.edges)[:-1, 0]


# -- operators ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("canvas_kernels::sigmoid_attention", mutates_args=())
def sigmoid_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gain: torch.Tensor | None,
    active: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    table: str,
    scale: float,
    backend: str,
) -> torch.Tensor:
    found = BlockTable.lookup(table)
    options = {"scale": scale, "gain": gain, "active": active, "row_scale": row_scale}
    if backend != "triton":
        return forward(q, k, v, found, **options)
    from . import launch

    return launch.sigmoid_forward(q, k, v, found, **options)


@sigmoid_attention.register_fake
def _(q, k, v, gain, active, row_scale, table, scale, backend):
    return q.new_empty(q.shape)


@torch.library.custom_op("canvas_kernels::sigmoid_attention_backward", mutates_args=())
def _sigmoid_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gain: torch.Tensor | None,
    active: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    table: str,
    scale: float,
    backend: str,
    need_gain: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    found = BlockTable.lookup(table)
    options = {"scale": scale, "gain": gain, "active": active, "row_scale": row_scale, "need_gain": need_gain}
    if backend != "triton":
        gradients, dgain = backward(grad_out, q, k, v, found, **options)
    else:
        from . import launch

        gradients, dgain = launch.sigmoid_backward(grad_out, q, k, v, found, **options)
    return gradients, q.new_empty(0) if dgain is None else dgain.to(gain.dtype)


@_sigmoid_backward.register_fake
def _(grad_out, q, k, v, gain, active, row_scale, table, scale, backend, need_gain):
    return q.new_empty((3, *q.shape)), gain.new_empty(gain.shape) if need_gain else q.new_empty(0)


def _setup(ctx, inputs, output):
    *tensors, table, scale, backend = inputs
    ctx.save_for_backward(*tensors)
    # this call's graph keeps its table alive
    ctx.table, ctx.options = BlockTable.lookup(table), (table, scale, backend)


def _backward(ctx, grad_out):
    tensors = ctx.saved_tensors
    need_gain = tensors[3] is not None and ctx.needs_input_grad[3]
    gradients, dgain = _sigmoid_backward(grad_out, *tensors, *ctx.options, need_gain)
    return *gradients.unbind(), dgain if need_gain else None, None, None, None, None, None


sigmoid_attention.register_autograd(_backward, setup_context=_setup)
