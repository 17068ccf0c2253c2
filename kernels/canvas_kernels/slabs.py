"""Slabs: cells at equal distances, attended over on strided views of the canvas, with nothing gathered.

A row of a slab lies in one segment, so the output is the row's coefficient times plain attention, and the backward that of
plain attention with the coefficient multiplied into the upstream gradient. Large cells take the flash kernel and keep
its output and log-sum-exp; others are plain batched products and keep their probabilities.
"""

from __future__ import annotations

import math

import torch

from .grouping import Slab
from .indices import Indices, Step, slab_row_scale

# Where there is no flash kernel that gives lse (other devices than the CPU), logits of at most this many floats at once.
DENSE_FLOATS = 1 << 26

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_softmax_out = torch.ops.aten._softmax.out
_softmax_backward_out = torch.ops.aten._softmax_backward_data.out


def rows_view(x: torch.Tensor, slab: Slab) -> torch.Tensor:
    """The slab's query rows of ``x`` (n, X, D): a view [G, X, R, D]."""
    by_position, by_head = x.stride(0), x.stride(1)
    return x.as_strided(
        (slab.cells, x.shape[1], slab.rows, x.shape[2]),
        (slab.step * by_position, by_head, by_position, 1),
        x.storage_offset() + slab.start * by_position,
    )


def key_views(x: torch.Tensor, slab: Slab) -> list[torch.Tensor]:
    """The slab's key rows of ``x`` (n, X, D): a view [G, X, length, D] per range."""
    by_position, by_head = x.stride(0), x.stride(1)
    return [
        x.as_strided(
            (slab.cells, x.shape[1], length, x.shape[2]),
            (step * by_position, by_head, by_position, 1),
            x.storage_offset() + first * by_position,
        )
        for first, length, step in slab.ranges
    ]


def _keys(x: torch.Tensor, slab: Slab) -> torch.Tensor:
    views = key_views(x, slab)
    return views[0] if len(views) == 1 else torch.cat(views, 2)


def saved_parts(slab: Slab, flash: bool, heads: int, dim: int) -> tuple[int, ...]:
    """Elements that forward keeps of a slab: (output, log-sum-exp) or (probabilities,)."""
    rows = heads * slab.cells * slab.rows
    return (rows * dim, rows) if flash else (rows * slab.keys,)


def forward_slab(
    number: int,
    step: Step,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
    flash: bool,
    saved: tuple[torch.Tensor, ...] | None,
    lse: torch.Tensor,
    total: torch.Tensor,
    fresh: bool,
) -> None:
    """Adds slab ``number`` to ``total`` (n, X, D), or writes it there if ``fresh``. Fills ``saved``, flat tensors as
    :func:`saved_parts` says, unless it is None; base-2 log-sum-exp goes to ``lse`` (X, n_slots) unless that has no slots."""
    indices = step.indices
    slab = indices.grouping.slabs[number]
    q, k, v = inputs
    queries, keys, values, bias = rows_view(q, slab), _keys(k, slab), _keys(v, slab), indices.slab_bias(number)
    if flash:
        out, natural_lse = _dense(queries, keys, values, bias, scale)
        if saved is not None:
            # as the flash kernel lays them out: [G, R, X, D] and [G, R, X]
            saved[0].view(slab.cells, slab.rows, -1, out.shape[3]).copy_(out.transpose(1, 2))
            saved[1].view(slab.cells, slab.rows, -1).copy_(natural_lse.transpose(1, 2))
        if lse.shape[1]:
            _write_lse(lse, natural_lse, indices, slab)
    else:
        p = q.new_empty(q.shape[1] * slab.cells * slab.rows * slab.keys) if saved is None else saved[0]
        p = _pairs(p, slab, q.shape[1])
        _products(p, queries, keys, 0 if bias is None else 1, scale, bias)
        if lse.shape[1]:
            _write_lse(lse, torch.logsumexp(p, -1), indices, slab)
        memory, dim = _memory(p)
        _softmax_out(memory, dim, False, out=memory)
        out = _product_rows(p, values)
    coefficient = step.slab_rows(number)
    rows = rows_view(total, slab)
    if not fresh:
        rows.add_(out) if coefficient is None else rows.addcmul_(out, coefficient)
    elif coefficient is None:
        rows.copy_(out)
    else:
        torch.mul(out, coefficient, out=rows)


def _write_lse(lse: torch.Tensor, natural_lse: torch.Tensor, indices: Indices, slab: Slab) -> None:
    values = natural_lse + indices.tensor(slab.offset).to(natural_lse)[:, None, None]
    slots = indices.tensor(slab.slot.reshape(-1))
    lse.index_copy_(1, slots, values.transpose(0, 1).reshape(lse.shape[0], -1) / math.log(2))


def backward_slab(
    number: int,
    step: Step,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
    flash: bool,
    saved: tuple[torch.Tensor, ...],
    totals: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    per_segment: torch.Tensor | None,
    fresh: tuple[bool, bool],
) -> None:
    """Adds slab ``number`` to ``totals`` dq, dk, dv (n, X, D), or writes it: ``fresh`` for rows, for keys. Adds
    Σ_rows s · δ to ``per_segment``, unless that is None."""
    indices = step.indices
    slab = indices.grouping.slabs[number]
    q, k, v, grad_out = inputs
    heads, dim = q.shape[1:]
    queries, keys, values = rows_view(q, slab), _keys(k, slab), _keys(v, slab)
    upstream = rows_view(grad_out, slab)
    coefficient = step.slab_rows(number)
    scaled = upstream if coefficient is None else upstream * coefficient
    if flash:
        out = saved[0].view(slab.cells, slab.rows, heads, dim).transpose(1, 2)
        natural_lse = saved[1].view(slab.cells, slab.rows, heads).transpose(1, 2)
        bias = indices.slab_bias(number)
        dq, dk, dv = _dense_backward(scaled, queries, keys, values, out, natural_lse, bias, scale)
    else:
        p = _pairs(saved[0], slab, heads)
        out = None if per_segment is None else _product_rows(p, values)
        dv = _product_rows(p.transpose(2, 3), scaled)
        if slab.keys == 1:
            # of one key the probability is 1 whatever the logit
            dq, dk = torch.zeros_like(queries), torch.zeros_like(dv)
        else:
            ds = _pairs(torch.empty_like(saved[0]), slab, heads)
            _products(ds, scaled, values)
            memory, dim = _memory(ds)
            _softmax_backward_out(memory, _memory(p)[0], dim, p.dtype, grad_input=memory)
            dq, dk = _product_rows(ds, keys, scale), _product_rows(ds.transpose(2, 3), queries, scale)
    if per_segment is not None:
        delta = (upstream * out).sum((1, 3)).view(-1) * slab_row_scale(indices, number, step.row_scale)
        per_segment.put_(indices.slab_segments(number), delta, accumulate=True)
    rows = rows_view(totals[0], slab)
    rows.copy_(dq) if fresh[0] else rows.add_(dq)
    for total, gradient in ((totals[1], dk), (totals[2], dv)):
        begin = 0
        for view, (_, length, move) in zip(key_views(total, slab), slab.ranges):
            part = gradient[:, :, begin : begin + length]
            begin += length
            if slab.cells > 1 and move == 0:
                # every cell reads the same keys
                view[0].add_(part.sum(0))
            elif fresh[1]:
                view.copy_(part)
            else:
                view.add_(part)


# -- batched products on strided views -----------------------------------------------------------------------------------
#
# [G, X, ...] cannot be flattened into the one batch dimension of a product without a copy, so the product is called once
# for each of the fewer: per cell or per head.


def _pairs(flat: torch.Tensor, slab: Slab, heads: int) -> torch.Tensor:
    """[G, X, R, keys] on ``flat``: memory has the fewer of G and X outside, and keys before rows where the slab says so."""
    outer, inner = sorted((slab.cells, heads))
    if slab.keys_first:
        pairs = flat.view(outer, inner, slab.keys, slab.rows).transpose(2, 3)
    else:
        pairs = flat.view(outer, inner, slab.rows, slab.keys)
    return pairs if outer == slab.cells else pairs.transpose(0, 1)


def _memory(pairs: torch.Tensor) -> tuple[torch.Tensor, int]:
    """``pairs`` as it lies in memory, and the dimension of the keys there."""
    outside_first = pairs if pairs.shape[0] <= pairs.shape[1] else pairs.transpose(0, 1)
    if outside_first.is_contiguous():
        return outside_first, 3
    return outside_first.transpose(2, 3), 2


def _outer(*tensors: torch.Tensor):
    """The tensors [G, X, ...] one after another along the shorter of their first two dimensions: each [inner, ...]."""
    first = tensors[0]
    return zip(*(x.unbind(0 if first.shape[0] <= first.shape[1] else 1) for x in tensors))


def _products(out, a, b, beta: int = 0, scale: float = 1.0, bias: torch.Tensor | None = None) -> None:
    """out [G, X, R, keys] ← bias + scale · a bᵀ"""
    if bias is not None:
        out.copy_(bias)
    if not _memory(out)[1] == 3:
        out, a, b = out.transpose(2, 3), b, a
    for pairs, left, right in _outer(out, a, b):
        torch.baddbmm(pairs, left, right.transpose(1, 2), beta=beta, alpha=scale, out=pairs)


def _product_rows(pairs: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """scale · pairs b: [G, X, rows, D]"""
    cells, heads, rows, _ = pairs.shape
    by_cell = cells <= heads
    out = b.new_empty(*((cells, heads) if by_cell else (heads, cells)), rows, b.shape[3])
    out = out if by_cell else out.transpose(0, 1)
    for result, left, right in _outer(out, pairs, b):
        torch.baddbmm(result, left, right, beta=0, alpha=scale, out=result)
    return out


# -- one call ------------------------------------------------------------------------------------------------------------


def _dense(q, k, v, bias, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, natural log-sum-exp [G, X, R]) of plain attention over [G, X, R or keys, D]."""
    if q.device.type == "cpu":
        return _flash(q, k, v, attn_mask=_mask(bias, q, k), scale=scale)
    pieces = []
    for rows in q.split(_dense_rows(q, k), 2):
        logits = scale * (rows @ k.transpose(-1, -2))
        if bias is not None:
            logits += bias
        pieces.append((torch.softmax(logits, -1) @ v, torch.logsumexp(logits, -1)))
    return tuple(torch.cat(piece, 2) for piece in zip(*pieces))


def _dense_backward(grad_out, q, k, v, out, lse, bias, scale):
    if q.device.type == "cpu":
        return _flash_backward(grad_out, q, k, v, out, lse, 0.0, False, attn_mask=_mask(bias, q, k), scale=scale)
    dq, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
    step = _dense_rows(q, k)
    for rows, upstream, result, normaliser in zip(*(x.split(step, 2) for x in (q, grad_out, out, lse))):
        logits = scale * (rows @ k.transpose(-1, -2))
        if bias is not None:
            logits += bias
        p = torch.exp(logits - normaliser[..., None])
        delta = (upstream * result).sum(-1, keepdim=True)
        ds = scale * p * (upstream @ v.transpose(-1, -2) - delta)
        dq.append(ds @ k)
        dk += ds.transpose(-1, -2) @ rows
        dv += p.transpose(-1, -2) @ upstream
    return torch.cat(dq, 2), dk, dv


def _dense_rows(q: torch.Tensor, k: torch.Tensor) -> int:
    return max(1, DENSE_FLOATS // (q.shape[0] * q.shape[1] * k.shape[2]))


def _mask(bias, q, k):
    return None if bias is None else bias.expand(q.shape[0], 1, q.shape[2], k.shape[2])
