"""Slabs: cells at equal distances, attended over on strided views of the canvas, with nothing gathered.

A row of a slab lies in one segment, so the output is the row's coefficient times plain attention, and the backward that
of plain attention with the coefficient multiplied into the upstream gradient. Large cells take the flash kernel and
keep its output and log-sum-exp; others are plain batched products and keep their probabilities.
"""

from __future__ import annotations

import math

import torch

from .grouping import Slab
from .indices import Indices, Step, slab_row_scale

# Where there is no flash kernel that gives lse (other devices than the CPU), logits of at most this many floats at
# once.
DENSE_FLOATS = 1 << 26
# Products whose matrices have at least this many elements are added to the canvas by the product itself, which torch
# then calls matrix by matrix; smaller ones through a temporary. µs for four heads of 64, directly / through a
# temporary: 448 × 32 93 / 124, 215 × 180 193 / 207, 64 × 64 37 / 35, 30 × 215 47 / 42.
DIRECT_ELEMENTS = 1 << 13

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_softmax_out = torch.ops.aten._softmax.out
_softmax_backward_out = torch.ops.aten._softmax_backward_data.out


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
    :func:`saved_parts` says, unless it is None; base-2 log-sum-exp goes to ``lse`` (X, n_slots) unless that has no
    slots."""
    forward = _forward_flash if flash else _forward_products
    forward(number, step, inputs, scale, saved, lse if lse.shape[1] else None, total, fresh)


def backward_slab(
    number: int,
    step: Step,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
    flash: bool,
    saved: tuple[torch.Tensor, ...],
    totals: list[torch.Tensor],
    per_segment: torch.Tensor | None,
    fresh: tuple[bool, bool],
) -> None:
    """Adds slab ``number`` to ``totals`` dq, dk, dv (n, X, D), or writes it: ``fresh`` for rows, for keys. Adds
    Σ_rows s · δ to ``per_segment``, unless that is None."""
    backward = _backward_flash if flash else _backward_products
    # [G, R]: Σ over heads and elements of dO ∘ f
    delta = backward(number, step, inputs, scale, saved, totals, per_segment is not None, fresh)
    if per_segment is not None:
        delta = delta.reshape(-1) * slab_row_scale(step.indices, number, step.row_scale)
        per_segment.put_(step.indices.slab_segments(number), delta, accumulate=True)


# -- flash: the whole slab in one call ---------------------------------------------------------------------------------


def _view(x: torch.Tensor, slab: Slab, start: int, move: int, length: int) -> torch.Tensor:
    """``length`` rows of each cell in ``x`` (n, X, D): a view [G, X, length, D]."""
    by_position, by_head = x.stride(0), x.stride(1)
    return x.as_strided(
        (slab.cells, x.shape[1], length, x.shape[2]),
        (move * by_position, by_head, by_position, 1),
        x.storage_offset() + start * by_position,
    )


def _rows(x: torch.Tensor, slab: Slab) -> torch.Tensor:
    return _view(x, slab, slab.start, slab.step, slab.rows)


def _keys(x: torch.Tensor, slab: Slab) -> torch.Tensor:
    views = [_view(x, slab, first, move, length) for first, length, move in slab.ranges]
    return views[0] if len(views) == 1 else torch.cat(views, 2)


def _add(view: torch.Tensor, x: torch.Tensor, coefficient: torch.Tensor | float, fresh: bool) -> None:
    """view ← coefficient · x, added unless ``fresh``."""
    if fresh:
        torch.mul(x, coefficient, out=view)
    elif isinstance(coefficient, float):
        view.add_(x, alpha=coefficient)
    else:
        view.addcmul_(x, coefficient)


def _forward_flash(number, step: Step, inputs, scale, saved, lse, total, fresh) -> None:
    indices, slab = step.indices, step.indices.grouping.slabs[number]
    q, k, v = inputs
    bias = indices.slab_bias(number)
    out, natural_lse = _dense(_rows(q, slab), _keys(k, slab), _keys(v, slab), bias, scale)
    if saved is not None:
        # as the flash kernel lays them out: [G, R, X, D] and [G, R, X]
        saved[0].view(slab.cells, slab.rows, -1, out.shape[3]).copy_(out.transpose(1, 2))
        saved[1].view(slab.cells, slab.rows, -1).copy_(natural_lse.transpose(1, 2))
    if lse is not None:
        values = natural_lse + indices.tensor(slab.offset).to(lse)[:, None, None]
        slots = indices.tensor(slab.slot.reshape(-1))
        lse.index_copy_(1, slots, values.transpose(0, 1).reshape(lse.shape[0], -1) / math.log(2))
    coefficient = step.slab_rows(number)
    if isinstance(coefficient, torch.Tensor):
        coefficient = coefficient[:, None]
    _add(_rows(total, slab), out, coefficient, fresh)


def _backward_flash(number, step: Step, inputs, scale, saved, totals, need_delta, fresh):
    indices, slab = step.indices, step.indices.grouping.slabs[number]
    q, k, v, grad_out = inputs
    heads, dim = q.shape[1:]
    out = saved[0].view(slab.cells, slab.rows, heads, dim).transpose(1, 2)
    natural_lse = saved[1].view(slab.cells, slab.rows, heads).transpose(1, 2)
    upstream = scaled = _rows(grad_out, slab)
    coefficient = step.slab_rows(number)
    if isinstance(coefficient, torch.Tensor):
        scaled, coefficient = upstream * coefficient[:, None], 1.0
    bias = indices.slab_bias(number)
    dq, dk, dv = _dense_backward(scaled, _rows(q, slab), _keys(k, slab), _keys(v, slab), out, natural_lse, bias, scale)
    _add(_rows(totals[0], slab), dq, coefficient, fresh[0])
    for total, gradient in ((totals[1], dk), (totals[2], dv)):
        begin = 0
        for first, length, move in slab.ranges:
            view = _view(total, slab, first, move, length)
            part = gradient[:, :, begin : begin + length]
            begin += length
            if slab.cells > 1 and move == 0:
                # every cell reads the same keys
                _add(view[0], part.sum(0), coefficient, False)
            else:
                _add(view, part, coefficient, fresh[1])
    return (upstream * out).sum((1, 3)) if need_delta else None


# -- products: batched matrix products on strided views ----------------------------------------------------------------
#  Cells and heads cannot be flattened into the one batch dimension of a product without a copy. So a slab is walked in
# lanes, one for each cell or one for each head, whichever are fewer; the others are the batch, Y of them.


def _lanes(x: torch.Tensor, slab: Slab, start: int, move: int, length: int) -> list[torch.Tensor]:
    """``length`` rows of each cell in ``x`` (n, X, D), lane by lane: views [Y, length, D]."""
    by_position, by_head = x.stride(0), x.stride(1)
    heads, dim = x.shape[1:]
    at = x.storage_offset() + start * by_position
    if slab.cells <= heads:
        size, stride = (heads, length, dim), (by_head, by_position, 1)
        return [x.as_strided(size, stride, at + cell * move * by_position) for cell in range(slab.cells)]
    size, stride = (slab.cells, length, dim), (move * by_position, by_position, 1)
    return [x.as_strided(size, stride, at + head * by_head) for head in range(heads)]


def _row_lanes(x: torch.Tensor, slab: Slab) -> list[torch.Tensor]:
    return _lanes(x, slab, slab.start, slab.step, slab.rows)


def _key_lanes(x: torch.Tensor, slab: Slab) -> list[torch.Tensor]:
    ranges = [_lanes(x, slab, first, move, length) for first, length, move in slab.ranges]
    return ranges[0] if len(ranges) == 1 else [torch.cat(parts, 1) for parts in zip(*ranges)]


def _pair_lanes(flat: torch.Tensor, slab: Slab, heads: int) -> tuple[torch.Tensor, ...]:
    """``flat`` as a lane after another: [Y, keys, R] where keys come first, [Y, R, keys] otherwise."""
    shape = (slab.keys, slab.rows) if slab.keys_first else (slab.rows, slab.keys)
    lanes, batch = sorted((slab.cells, heads))
    return flat.view(lanes, batch, *shape).unbind(0)


def _coefficient_lanes(coefficient: torch.Tensor | float, slab: Slab, lanes: int):
    """[1 or Y, R, 1] per lane."""
    if isinstance(coefficient, float):
        return [coefficient] * lanes
    return coefficient.unbind(0) if lanes == slab.cells else [coefficient] * lanes


def _logits(pairs, queries, keys, slab: Slab, scale: float, bias: torch.Tensor | None) -> None:
    """pairs ← scale · queries keysᵀ + bias, in the order of its memory."""
    beta = 0
    if bias is not None:
        # [1 or Y, 1, keys]
        pairs.copy_(bias.transpose(1, 2) if slab.keys_first else bias)
        beta = 1
    left, right = (keys, queries) if slab.keys_first else (queries, keys)
    torch.baddbmm(pairs, left, right.transpose(1, 2), beta=beta, alpha=scale, out=pairs)


def _product(left: torch.Tensor, right: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    if alpha == 1.0:
        return torch.bmm(left, right)
    out = right.new_empty(left.shape[0], left.shape[1], right.shape[2])
    return torch.baddbmm(out, left, right, beta=0, alpha=alpha, out=out)


def _add_product(view: torch.Tensor, left: torch.Tensor, right: torch.Tensor, alpha: float, fresh: bool) -> None:
    """view ← alpha · left right, added unless ``fresh``."""
    if left.shape[1] * right.shape[2] >= DIRECT_ELEMENTS:
        view.baddbmm_(left, right, beta=0 if fresh else 1, alpha=alpha)
    elif fresh:
        view.copy_(_product(left, right, alpha))
    else:
        view.add_(_product(left, right, alpha))


def _forward_products(number, step: Step, inputs, scale, saved, lse, total, fresh) -> None:
    indices, slab = step.indices, step.indices.grouping.slabs[number]
    q, k, v = inputs
    heads = q.shape[1]
    flat = q.new_empty(heads * slab.pairs) if saved is None else saved[0]
    key_dim = 1 if slab.keys_first else 2
    pair_lanes = _pair_lanes(flat, slab, heads)
    coefficients = _coefficient_lanes(step.slab_rows(number), slab, len(pair_lanes))
    bias = _bias_lanes(indices.slab_bias(number), slab, len(pair_lanes))
    lanes = zip(pair_lanes, _row_lanes(q, slab), _key_lanes(k, slab), _key_lanes(v, slab), _row_lanes(total, slab))
    for lane, (pairs, queries, keys, values, out) in enumerate(lanes):
        _logits(pairs, queries, keys, slab, scale, bias[lane])
        if lse is not None:
            _write_lse(lse, lane, torch.logsumexp(pairs, key_dim), indices, slab)
        _softmax_out(pairs, key_dim, False, out=pairs)
        p = pairs.transpose(1, 2) if slab.keys_first else pairs
        if isinstance(coefficients[lane], float):
            _add_product(out, p, values, coefficients[lane], fresh)
        else:
            _add(out, torch.bmm(p, values), coefficients[lane], fresh)


def _bias_lanes(bias: torch.Tensor | None, slab: Slab, lanes: int):
    """[1 or Y, 1, keys] per lane."""
    if bias is None:
        return [None] * lanes
    # [G, 1, 1, keys]
    return bias.unbind(0) if lanes == slab.cells else [bias[:, 0]] * lanes


def _write_lse(lse: torch.Tensor, lane: int, values: torch.Tensor, indices: Indices, slab: Slab) -> None:
    """``values`` [Y, R], natural logarithms, to their slots of ``lse`` (X, n_slots)."""
    offset, slots = indices.tensor(slab.offset).to(lse), indices.tensor(slab.slot)
    if slab.cells <= lse.shape[0]:
        lse.index_copy_(1, slots[lane], (values + offset[lane]) / math.log(2))
    else:
        lse[lane].index_copy_(0, slots.view(-1), ((values + offset[:, None]) / math.log(2)).view(-1))


def _backward_products(number, step: Step, inputs, scale, saved, totals, need_delta, fresh):
    slab = step.indices.grouping.slabs[number]
    q, k, v, grad_out = inputs
    heads = q.shape[1]
    key_dim = 1 if slab.keys_first else 2
    pair_lanes = _pair_lanes(saved[0], slab, heads)
    coefficients = _coefficient_lanes(step.slab_rows(number), slab, len(pair_lanes))
    delta = q.new_zeros(slab.cells, slab.rows) if need_delta else None
    lanes = zip(
        pair_lanes,
        _row_lanes(q, slab),
        _key_lanes(k, slab),
        _key_lanes(v, slab),
        _row_lanes(grad_out, slab),
        _row_lanes(totals[0], slab),
        zip(*(_lanes(totals[1], slab, first, move, length) for first, length, move in slab.ranges)),
        zip(*(_lanes(totals[2], slab, first, move, length) for first, length, move in slab.ranges)),
    )
    for lane, (pairs, queries, keys, values, upstream, dq, dk, dv) in enumerate(lanes):
        p = pairs.transpose(1, 2) if slab.keys_first else pairs
        alpha, scaled = coefficients[lane], upstream
        if not isinstance(alpha, float):
            alpha, scaled = 1.0, upstream * alpha
        if need_delta:
            # [Y, R]
            per_row = (upstream * torch.bmm(p, values)).sum(2)
            if slab.cells <= heads:
                delta[lane] = per_row.sum(0)
            else:
                delta += per_row
        _add_key_product(dv, p.transpose(1, 2), scaled, alpha, slab, heads, fresh[1])
        ds = torch.empty_like(pairs)
        _logits(ds, scaled, values, slab, 1.0, None)
        _softmax_backward_out(ds, pairs, key_dim, pairs.dtype, grad_input=ds)
        ds = ds.transpose(1, 2) if slab.keys_first else ds
        _add_product(dq, ds, keys, scale * alpha, fresh[0])
        _add_key_product(dk, ds.transpose(1, 2), queries, scale * alpha, slab, heads, fresh[1])
    return delta


def _add_key_product(views, left, right, alpha: float, slab: Slab, heads: int, fresh: bool) -> None:
    """Like :func:`_add_product`, into the key rows of one lane, which ``views`` hold a range after another."""
    begin = 0
    for view, (_, length, move) in zip(views, slab.ranges):
        part = left if len(views) == 1 else left[:, begin : begin + length]
        begin += length
        if move == 0 and slab.cells > heads:
            # the batch is cells, which all read the same keys
            view[0].add_(_product(part, right, alpha).sum(0))
        else:
            _add_product(view, part, right, alpha, fresh)


# -- plain attention ---------------------------------------------------------------------------------------------------


def _dense(q, k, v, bias, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, natural log-sum-exp [G, X, R]) of plain attention over [G, X, R or keys, D]."""
    if _has_flash(q):
        return _flash(q, k, v, attn_mask=_mask(bias, q, k), scale=scale)
    pieces = []
    for rows in q.split(_dense_rows(q, k), 2):
        logits = scale * (rows @ k.transpose(-1, -2))
        if bias is not None:
            logits += bias
        pieces.append((torch.softmax(logits, -1) @ v, torch.logsumexp(logits, -1)))
    return tuple(torch.cat(piece, 2) for piece in zip(*pieces))


def _dense_backward(grad_out, q, k, v, out, lse, bias, scale):
    if _has_flash(q):
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


def _has_flash(x: torch.Tensor) -> bool:
    return x.device.type == "cpu"


def _dense_rows(q: torch.Tensor, k: torch.Tensor) -> int:
    return max(1, DENSE_FLOATS // (q.shape[0] * q.shape[1] * k.shape[2]))


def _mask(bias, q, k):
    return None if bias is None else bias.expand(q.shape[0], 1, q.shape[2], k.shape[2])
