"""Gathered groups: gathered rows, one product, one softmax and one product each, and one gather-reduce back.

With c the coefficient of a segment and s the row scale, and P the softmax per segment,

    out += s ∘ (P (c V))      dO' = s ∘ dO      dV = c Pᵀ dO'      dS = P ∘ (dO' Vᵀ − rowsum(P ∘ dO' Vᵀ))
    dQ = scale · dS (c K)     dK = scale · c dSᵀ Q                 dgain = w · active · Σ V ∘ Pᵀ dO'

c is folded into K and V and s into Q and O, so neither touches the score matrix.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from .groups import GatheredGroup
from .indices import KEYS, QUERIES, Indices, Step

softmax_out = torch.ops.aten._softmax.out
_softmax_backward_out = torch.ops.aten._softmax_backward_data.out
_gather_reduce = torch.ops.aten._embedding_bag_forward_only.default


def forward_bundle(
    number: int,
    step: Step,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
    probs: list[torch.Tensor] | None,
    lse: torch.Tensor,
    total: torch.Tensor,
) -> None:
    """Adds bundle ``number`` to ``total`` (n, X, D), or writes it if there is no other group. Saves probabilities to
    ``probs``, a flat tensor per group, unless it is None, and log-sum-exp to ``lse`` (X, n_slots) unless that has no
    slots."""
    indices = step.indices
    q, k, v = inputs
    queries = _gather(q, indices, number, QUERIES)
    keys, values = _gather(k, indices, number, KEYS), _gather(v, indices, number, KEYS)
    inactive_keys, inactive_rows = step.inactive_keys(number), step.inactive_rows(number)
    _clear((keys, values), inactive_keys)
    _clear((queries,), inactive_rows)
    coefficient = step.keys(number)
    if coefficient is not None:
        values.mul_(coefficient)
    results = torch.empty_like(queries)
    for i, group, rows, columns in _groups(indices, number, q.shape[2]):
        result = _view(results, rows)
        if not step.has_active(group):
            result.zero_()
            if probs is not None:
                probs[i].zero_()
            continue
        a, b = _view(queries, rows), _view(keys, columns)
        p = _pairs(q.new_empty(a.shape[0] * a.shape[1] * b.shape[1]) if probs is None else probs[i], group)
        write = LseWriter(lse, group) if lse.shape[1] else None
        _probabilities(p, a, b, group, indices.bias(number, i), scale, write)
        torch.bmm(p, _view(values, columns), out=result)
    coefficient = step.rows(number)
    if coefficient is not None:
        results.mul_(coefficient)
    _clear((results,), inactive_rows)
    _accumulate(total, results, indices, number, QUERIES)


def backward_bundle(
    number: int,
    step: Step,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
    probs: list[torch.Tensor] | None,
    totals: list[torch.Tensor],
    per_segment: torch.Tensor | None,
) -> None:
    """Adds bundle ``number`` to ``totals``, dq, dk, dv (n, X, D), or writes it if there is no other group, from
    ``inputs`` q, k, v and grad_out (n, X, D). ``probs`` are those that forward saved, recomputed if None. Adds Σ_rows s
    · δ to ``per_segment``, unless that is None."""
    indices = step.indices
    q, k, v, grad_out = inputs
    queries, upstream = _gather(q, indices, number, QUERIES), _gather(grad_out, indices, number, QUERIES)
    keys, values = _gather(k, indices, number, KEYS), _gather(v, indices, number, KEYS)
    inactive_keys, inactive_rows = step.inactive_keys(number), step.inactive_rows(number)
    _clear((keys, values), inactive_keys)
    _clear((queries, upstream), inactive_rows)
    row_coefficient, coefficient = step.rows(number), step.keys(number)
    if row_coefficient is not None:
        upstream.mul_(row_coefficient)
    scaled_keys = keys
    if coefficient is not None:
        # recomputing the probabilities needs the unscaled keys
        scaled_keys = keys * coefficient if probs is None else keys.mul_(coefficient)
    dq, dk, dv = torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(values)
    for i, group, rows, columns in _groups(indices, number, q.shape[2]):
        a, g, da = (_view(x, rows) for x in (queries, upstream, dq))
        b, scaled_b, c, db, dc = (_view(x, columns) for x in (keys, scaled_keys, values, dk, dv))
        if not step.has_active(group):
            for x in (da, db, dc):
                x.zero_()
            continue
        p = _pairs(q.new_empty(a.shape[0] * a.shape[1] * b.shape[1]) if probs is None else probs[i], group)
        if probs is None:
            _probabilities(p, a, b, group, indices.bias(number, i), scale)
        torch.bmm(p.transpose(1, 2), g, out=dc)
        if per_segment is not None:
            _add_gain(per_segment, group, c, dc)
        if group.shape[3] == 1:
            # softmax over a single key is always 1
            da.zero_()
            db.zero_()
            continue
        ds = _pairs(q.new_empty(p.numel()), group)
        _product(ds, g, c, group)
        by_segment, dim = _by_segment(ds, group)
        _softmax_backward_out(by_segment, _by_segment(p, group)[0], dim, p.dtype, grad_input=by_segment)
        torch.baddbmm(da, ds, scaled_b, beta=0, alpha=scale, out=da)
        torch.baddbmm(db, ds.transpose(1, 2), a, beta=0, alpha=scale, out=db)
    if coefficient is not None:
        dk.mul_(coefficient)
        dv.mul_(coefficient)
    _clear((dk, dv), inactive_keys)
    _clear((dq,), inactive_rows)
    for total, rows, side in zip(totals, (dq, dk, dv), (QUERIES, KEYS, KEYS)):
        _accumulate(total, rows, indices, number, side)


# -- rows --------------------------------------------------------------------------------------------------------------


def _clear(tensors: tuple[torch.Tensor, ...], inactive: torch.Tensor | None) -> None:
    """Zeros ``inactive`` rows: NaN and inf times 0 would remain."""
    if inactive is not None:
        for x in tensors:
            x.masked_fill_(inactive, 0.0)


def _gather(x: torch.Tensor, indices: Indices, number: int, side: int) -> torch.Tensor:
    """Gathers the bundle's rows of ``x`` (n, X, D)."""
    flat, strides = _flat_rows(x)
    return flat.index_select(0, indices.gather(number, side, strides))


def _flat_rows(x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    """Views the memory of x (n, X, D) as rows of D elements; returns it and the strides (position, head) in rows."""
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
    # targets are distinct: additions happen in the order of groups
    flat.index_add_(0, target, reduced)


def _groups(indices: Indices, number: int, dim: int):
    """Yields (i, group, query rows, key rows) of a bundle; rows as (start, stop, shape) of the gathered rows."""
    row = key = 0
    for i, group in enumerate(indices.grouping.bundles[number]):
        members, rows, segments, width = group.shape
        m, columns = indices.heads * members, segments * width
        yield i, group, (row, row + m * rows, (m, rows, dim)), (key, key + m * columns, (m, columns, dim))
        row += m * rows
        key += m * columns


def _view(x: torch.Tensor, where: tuple[int, int, tuple[int, int, int]]) -> torch.Tensor:
    start, stop, shape = where
    return x[start:stop].view(shape)


# -- pairs -------------------------------------------------------------------------------------------------------------


def _pairs(flat: torch.Tensor, group: GatheredGroup) -> torch.Tensor:
    """Views ``flat`` as [m, R, S·W], whose memory is keys first if the group's is."""
    _, rows, segments, width = group.shape
    if group.keys_first:
        return flat.view(-1, segments * width, rows).transpose(1, 2)
    return flat.view(-1, rows, segments * width)


def _by_segment(x: torch.Tensor, group: GatheredGroup) -> tuple[torch.Tensor, int]:
    """Views ``x`` [m, R, S·W] in memory order, and returns the dimension of a segment's keys."""
    _, rows, segments, width = group.shape
    if group.keys_first:
        return x.transpose(1, 2).view(-1, width, rows), 1
    return x.view(-1, rows, segments, width), 3


def _product(out, a, b, group: GatheredGroup, beta: int = 0, scale: float = 1.0) -> None:
    """Sets out [m, R, S·W] to beta · out + scale · a bᵀ, computed in memory order of ``out``."""
    if group.keys_first:
        out, a, b = out.transpose(1, 2), b, a
    torch.baddbmm(out, a, b.transpose(1, 2), beta=beta, alpha=scale, out=out)


def _probabilities(out, queries, keys, group: GatheredGroup, bias, scale, write_lse=None) -> None:
    """Sets out [m, R, S·W] to softmax(scale · Q Kᵀ + bias) over each segment's keys."""
    members, _, segments, width = group.shape
    if width == 1 and bias is None and write_lse is None:
        out.fill_(1.0)
        return
    if bias is not None:
        # [X, G, R, S·W]
        out.unflatten(0, (-1, members)).copy_(bias)
    _product(out, queries, keys, group, beta=0 if bias is None else 1, scale=scale)
    if write_lse is not None:
        write_lse(out.unflatten(2, (segments, width)))
    by_segment, dim = _by_segment(out, group)
    softmax_out(by_segment, dim, False, out=by_segment)


class LseWriter:
    """Writes the log-sum-exp of a group to its slots of ``lse`` (X, n_slots)."""

    def __init__(self, lse: torch.Tensor, group: GatheredGroup):
        # [G, R, S]
        valid = group.row_valid[:, :, None] & (group.segment >= 0)[:, None]
        slots = group.slot[:, None] + np.arange(group.rows.shape[1])[:, None]
        offset = np.broadcast_to(group.offset[:, None, None], valid.shape)
        self.lse = lse
        self.slots = torch.from_numpy(slots[valid]).to(lse.device)
        self.source = torch.from_numpy(valid.reshape(-1).nonzero()[0]).to(lse.device)
        self.offset = torch.from_numpy(offset[valid]).to(lse)

    def __call__(self, logits: torch.Tensor) -> None:
        """Writes the log-sum-exp of ``logits`` [m, R, S, W]."""
        values = torch.logsumexp(logits, -1).reshape(self.lse.shape[0], -1).index_select(1, self.source)
        self.lse.index_copy_(1, self.slots, (values + self.offset) / math.log(2))


def _add_gain(per_segment: torch.Tensor, group: GatheredGroup, values: torch.Tensor, gradient: torch.Tensor) -> None:
    members, _, segments, width = group.shape
    # Σ V ∘ Pᵀ dO' over batch, heads and keys: [G · S]
    sums = (values * gradient).view(-1, members * segments, width * values.shape[2]).sum((0, 2))
    valid = (group.segment >= 0).reshape(-1).nonzero()[0]
    if len(valid) < len(sums):
        sums = sums[torch.from_numpy(valid).to(sums.device)]
    index = torch.from_numpy(group.segment.reshape(-1)[valid]).to(sums.device)
    # a segment may have several members in one group
    per_segment.put_(index, sums, accumulate=True)
