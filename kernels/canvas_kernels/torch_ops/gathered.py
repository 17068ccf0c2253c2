"""Batches: gathered rows, one product, one softmax and one product each, and one gather-reduce back.

With c the coefficient of a segment and s the row scale, and P the softmax per segment,

    out += s ∘ (P (c V))      dO' = s ∘ dO      dV = c Pᵀ dO'      dS = P ∘ (dO' Vᵀ − rowsum(P ∘ dO' Vᵀ))
    dQ = scale · dS (c K)     dK = scale · c dSᵀ Q                 dgain = w · active · Σ V ∘ Pᵀ dO'

c meets keys only and s rows only, so that neither costs a pass over the pairs.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from .groups import Batch
from .indices import KEYS, QUERIES, Indices, Step

_softmax_out = torch.ops.aten._softmax.out
_softmax_backward_out = torch.ops.aten._softmax_backward_data.out
_gather_reduce = torch.ops.aten._embedding_bag_forward_only.default


def forward_stage(
    number: int,
    step: Step,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
    kept: list[torch.Tensor] | None,
    lse: torch.Tensor,
    total: torch.Tensor,
) -> None:
    """Adds what stage ``number`` contributes to ``total`` (n, X, D), or writes it if it is alone. Probabilities go to
    ``kept``, a flat tensor per batch, unless it is None; log-sum-exp to ``lse`` (X, n_slots) unless that has no
    slots."""
    indices = step.indices
    q, k, v = inputs
    queries = _gather(q, indices, number, QUERIES)
    keys, values = _gather(k, indices, number, KEYS), _gather(v, indices, number, KEYS)
    dead_keys, dead_rows = step.dead_keys(number), step.dead_rows(number)
    _clear((keys, values), dead_keys)
    _clear((queries,), dead_rows)
    coefficient = step.keys(number)
    if coefficient is not None:
        values.mul_(coefficient)
    results = torch.empty_like(queries)
    for i, batch, rows, columns in _walk(indices, number, q.shape[2]):
        result = _part(results, rows)
        if not step.has_active(batch):
            result.zero_()
            if kept is not None:
                kept[i].zero_()
            continue
        a, b = _part(queries, rows), _part(keys, columns)
        p = _pairs(q.new_empty(a.shape[0] * a.shape[1] * b.shape[1]) if kept is None else kept[i], batch)
        write = LseWriter(lse, batch) if lse.shape[1] else None
        _probabilities(p, a, b, batch, indices.bias(number, i), scale, write)
        torch.bmm(p, _part(values, columns), out=result)
    coefficient = step.rows(number)
    if coefficient is not None:
        results.mul_(coefficient)
    _clear((results,), dead_rows)
    _accumulate(total, results, indices, number, QUERIES)


def backward_stage(
    number: int,
    step: Step,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
    kept: list[torch.Tensor] | None,
    totals: tuple[torch.Tensor, ...],
    per_segment: torch.Tensor | None,
) -> None:
    """Adds what stage ``number`` contributes to ``totals``, dq, dk, dv (n, X, D), or writes it if it is alone, from
    ``inputs`` q, k, v and grad_out (n, X, D). ``kept`` as forward left it, None to compute it again. Adds Σ_rows s · δ
    to ``per_segment``, unless that is None."""
    indices = step.indices
    q, k, v, grad_out = inputs
    queries, upstream = _gather(q, indices, number, QUERIES), _gather(grad_out, indices, number, QUERIES)
    keys, values = _gather(k, indices, number, KEYS), _gather(v, indices, number, KEYS)
    dead_keys, dead_rows = step.dead_keys(number), step.dead_rows(number)
    _clear((keys, values), dead_keys)
    _clear((queries, upstream), dead_rows)
    row_coefficient, coefficient = step.rows(number), step.keys(number)
    if row_coefficient is not None:
        upstream.mul_(row_coefficient)
    scaled_keys = keys
    if coefficient is not None:
        # computing the probabilities again needs the keys as they are
        scaled_keys = keys * coefficient if kept is None else keys.mul_(coefficient)
    dq, dk, dv = torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(values)
    for i, batch, rows, columns in _walk(indices, number, q.shape[2]):
        a, g, da = (_part(x, rows) for x in (queries, upstream, dq))
        b, scaled_b, c, db, dc = (_part(x, columns) for x in (keys, scaled_keys, values, dk, dv))
        if not step.has_active(batch):
            for x in (da, db, dc):
                x.zero_()
            continue
        p = _pairs(q.new_empty(a.shape[0] * a.shape[1] * b.shape[1]) if kept is None else kept[i], batch)
        if kept is None:
            _probabilities(p, a, b, batch, indices.bias(number, i), scale)
        torch.bmm(p.transpose(1, 2), g, out=dc)
        if per_segment is not None:
            _add_gain(per_segment, batch, c, dc)
        if batch.shape[3] == 1:
            # of one key the probability is 1 whatever the logit
            da.zero_()
            db.zero_()
            continue
        ds = _pairs(q.new_empty(p.numel()), batch)
        _product(ds, g, c, batch)
        by_segment, dim = _by_segment(ds, batch)
        _softmax_backward_out(by_segment, _by_segment(p, batch)[0], dim, p.dtype, grad_input=by_segment)
        torch.baddbmm(da, ds, scaled_b, beta=0, alpha=scale, out=da)
        torch.baddbmm(db, ds.transpose(1, 2), a, beta=0, alpha=scale, out=db)
    if coefficient is not None:
        dk.mul_(coefficient)
        dv.mul_(coefficient)
    _clear((dk, dv), dead_keys)
    _clear((dq,), dead_rows)
    for total, rows, side in zip(totals, (dq, dk, dv), (QUERIES, KEYS, KEYS)):
        _accumulate(total, rows, indices, number, side)


# -- rows --------------------------------------------------------------------------------------------------------------


def _clear(tensors: tuple[torch.Tensor, ...], dead: torch.Tensor | None) -> None:
    """Zeros in the rows that are ``dead``: times 0, what is not finite would stay."""
    if dead is not None:
        for x in tensors:
            x.masked_fill_(dead, 0.0)


def _gather(x: torch.Tensor, indices: Indices, number: int, side: int) -> torch.Tensor:
    """The stage's rows of ``x`` (n, X, D), whose rows are D apart in memory."""
    flat, strides = _flat_rows(x)
    return flat.index_select(0, indices.gather(number, side, strides))


def _flat_rows(x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    """x (n, X, D) as all rows of D elements in its memory, and how many of them positions and lanes are apart."""
    n, heads, dim = x.shape
    strides = (x.stride(0) // dim, x.stride(1) // dim)
    count = 1 + (n - 1) * strides[0] + (heads - 1) * strides[1]
    return x.as_strided((count, dim), (dim, 1)), strides


def _accumulate(total: torch.Tensor, rows: torch.Tensor, indices: Indices, number: int, side: int) -> None:
    flat, strides = _flat_rows(total)
    index, offset, target = indices.reduce(number, side, strides)
    reduced = _gather_reduce(rows, index, offset, False, 0, False, None, True)[0]
    if target is None:
        n, heads, dim = total.shape
        if strides[1] > strides[0]:
            total.copy_(reduced.view(heads, n, dim).transpose(0, 1))
        else:
            total.copy_(reduced.view(n, heads, dim))
        return
    # targets are distinct: additions happen in the order of slabs and stages
    flat.index_add_(0, target, reduced)


def _walk(indices: Indices, number: int, dim: int):
    """(i, batch, query rows, key rows) of a stage; rows as (slice, shape) of the gathered rows."""
    row = key = 0
    for i, batch in enumerate(indices.grouping.stages[number]):
        units, rows, segments, width = batch.shape
        m, columns = indices.heads * units, segments * width
        yield i, batch, (row, row + m * rows, (m, rows, dim)), (key, key + m * columns, (m, columns, dim))
        row += m * rows
        key += m * columns


def _part(x: torch.Tensor, where: tuple[int, int, tuple[int, int, int]]) -> torch.Tensor:
    start, stop, shape = where
    return x[start:stop].view(shape)


# -- pairs -------------------------------------------------------------------------------------------------------------


def _pairs(flat: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[m, R, S·W] on ``flat``, whose memory is keys first where the batch says so."""
    _, rows, segments, width = batch.shape
    if batch.keys_first:
        return flat.view(-1, segments * width, rows).transpose(1, 2)
    return flat.view(-1, rows, segments * width)


def _by_segment(x: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, int]:
    """``x`` [m, R, S·W] as its memory lies, with one dimension for the keys of a segment, and which it is."""
    _, rows, segments, width = batch.shape
    if batch.keys_first:
        return x.transpose(1, 2).view(-1, width, rows), 1
    return x.view(-1, rows, segments, width), 3


def _product(out, a, b, batch: Batch, beta: int = 0, scale: float = 1.0) -> None:
    """out [m, R, S·W] ← beta · out + scale · a bᵀ, computed in the order in which ``out`` lies in memory."""
    if batch.keys_first:
        out, a, b = out.transpose(1, 2), b, a
    torch.baddbmm(out, a, b.transpose(1, 2), beta=beta, alpha=scale, out=out)


def _probabilities(out, queries, keys, batch: Batch, bias, scale, write_lse=None) -> None:
    """out [m, R, S·W] ← softmax(scale · Q Kᵀ + bias) over each segment's keys."""
    units, _, segments, width = batch.shape
    if width == 1 and bias is None and write_lse is None:
        out.fill_(1.0)
        return
    if bias is not None:
        # [X, G, R, S·W]
        out.unflatten(0, (-1, units)).copy_(bias)
    _product(out, queries, keys, batch, beta=0 if bias is None else 1, scale=scale)
    if write_lse is not None:
        write_lse(out.unflatten(2, (segments, width)))
    by_segment, dim = _by_segment(out, batch)
    _softmax_out(by_segment, dim, False, out=by_segment)


class LseWriter:
    """Writes a batch's log-sum-exp to its slots of ``lse`` (X, n_slots)."""

    def __init__(self, lse: torch.Tensor, batch: Batch):
        # [G, R, S]
        valid = batch.row_valid[:, :, None] & (batch.segment >= 0)[:, None]
        slots = batch.slot[:, None] + np.arange(batch.rows.shape[1])[:, None]
        offset = np.broadcast_to(batch.offset[:, None, None], valid.shape)
        self.lse = lse
        self.slots = torch.from_numpy(slots[valid]).to(lse.device)
        self.source = torch.from_numpy(valid.reshape(-1).nonzero()[0]).to(lse.device)
        self.offset = torch.from_numpy(offset[valid]).to(lse)

    def __call__(self, logits: torch.Tensor) -> None:
        """``logits`` [m, R, S, W]"""
        values = torch.logsumexp(logits, -1).reshape(self.lse.shape[0], -1).index_select(1, self.source)
        self.lse.index_copy_(1, self.slots, (values + self.offset) / math.log(2))


def _add_gain(per_segment: torch.Tensor, batch: Batch, values: torch.Tensor, gradient: torch.Tensor) -> None:
    units, _, segments, width = batch.shape
    # Σ V ∘ Pᵀ dO' over batch, heads and keys: [G · S]
    sums = (values * gradient).view(-1, units * segments, width * values.shape[2]).sum((0, 2))
    valid = (batch.segment >= 0).reshape(-1).nonzero()[0]
    if len(valid) < len(sums):
        sums = sums[torch.from_numpy(valid).to(sums.device)]
    index = torch.from_numpy(batch.segment.reshape(-1)[valid]).to(sums.device)
    # a segment may have several cells in one batch
    per_segment.put_(index, sums, accumulate=True)
