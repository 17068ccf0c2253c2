"""Strided groups: query ranges at equal distances, computed on strided views of the canvas, with nothing gathered.

A row of a group lies in one segment, so the output is the row's coefficient times plain attention, and the backward
that of plain attention with the coefficient multiplied into the upstream gradient. Large members run by the flash
kernel and save its output and log-sum-exp; others are batched products and save their probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .flash import flash_backward, flash_forward
from .groups import StridedGroup
from .indices import Indices, Step, StridedCall, is_whole

# Products with at least this many elements per matrix, of at least this many terms each, accumulate in place, which
# torch computes matrix by matrix; others use a temporary.
MIN_INPLACE_NUMEL, MIN_INPLACE_K = 1 << 12, 32
# Tensor layouts that a group caches.
MAX_LAYOUTS = 32

softmax_out = torch.softmax
_softmax_backward_out = torch._softmax_backward_data  # pyright: ignore[reportPrivateImportUsage] it has no public name


def saved_sizes(group: StridedGroup, flash: bool, heads: int, dim: int) -> tuple[int, ...]:
    """Returns the numbers of elements that forward saves of a group: (output, log-sum-exp) or (probabilities,)."""
    rows = heads * group.members * group.rows
    return (rows * dim, rows) if flash else (rows * group.keys,)


def forward_strided(
    number: int,
    step: Step,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
    flash: bool,
    saved: tuple[torch.Tensor, ...] | None,
    lse: torch.Tensor,
    total: torch.Tensor,
    overwrite: bool,
) -> None:
    """Adds group ``number`` to ``total`` (n, X, D), or writes it there if ``overwrite``. Fills ``saved``, flat tensors
    of :func:`saved_sizes`, unless it is None, and base-2 log-sum-exp ``lse`` (X, n_slots) unless that has no slots."""
    forward = _forward_flash if flash else _forward_products
    slots = lse if lse.shape[1] else None
    calls = step.calls[number]
    if not is_whole(calls):
        # saved tensors are deterministic too
        for part in saved or ():
            part.zero_()
    for call, part in zip(calls, _saved_of_calls(saved, calls, flash, inputs[0])):
        if call.copies is None:
            forward(call, step.indices, inputs, scale, part, slots, total, overwrite)
            continue
        rows, _ = call.copies
        result = total.new_empty(len(rows), *total.shape[1:])
        forward(call, step.indices, _copies(inputs, *call.copies), scale, part, slots, result, True)
        total.index_add_(0, rows, result)


def backward_strided(
    number: int,
    step: Step,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
    flash: bool,
    saved: tuple[torch.Tensor, ...],
    totals: list[torch.Tensor],
    per_segment: torch.Tensor | None,
    overwrite: tuple[bool, bool],
) -> None:
    """Adds group ``number`` to ``totals`` dq, dk, dv (n, X, D), or writes it: ``overwrite`` for rows, for keys. Adds
    Σ_rows s · δ to ``per_segment``, unless that is None."""
    backward = _backward_flash if flash else _backward_products
    need_delta, calls = per_segment is not None, step.calls[number]
    for call, part in zip(calls, _saved_of_calls(saved, calls, flash, inputs[0])):
        if call.copies is None:
            # [G, R]: Σ over heads and elements of dO ∘ f
            delta = backward(call, inputs, scale, part, totals, need_delta, overwrite)
        else:
            rows, keys = call.copies
            sides = (rows, keys, keys)
            results = [total.new_empty(len(side), *total.shape[1:]) for total, side in zip(totals, sides)]
            delta = backward(call, _copies(inputs, *call.copies), scale, part, results, need_delta, (True, True))
            for total, side, result in zip(totals, sides, results):
                total.index_add_(0, side, result)
        if per_segment is not None and delta is not None:
            segment, entry = step.indices.strided_rows(number)
            if call.entries is not None:
                segment, entry = segment[call.entries], entry[call.entries]
            factor = step.row_scale.to(delta.dtype).reshape(-1).index_select(0, entry)
            per_segment.put_(segment, delta.reshape(-1) * factor, accumulate=True)


def _saved_of_calls(saved: tuple[torch.Tensor, ...] | None, calls: list[StridedCall], flash: bool, q: torch.Tensor):
    """Splits the saved tensors of a group by call; None if nothing is saved."""
    if saved is None or is_whole(calls):
        return [saved] * len(calls)
    parts, begin = [], [0] * len(saved)
    for call in calls:
        sizes = saved_sizes(call.group, flash, *q.shape[1:])
        parts.append(tuple(flat[first : first + size] for flat, first, size in zip(saved, begin, sizes)))
        begin = [first + size for first, size in zip(begin, sizes)]
    return parts


def _copies(inputs: tuple[torch.Tensor, ...], rows: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Copies the rows of q, and of grad_out if given, and the keys of k and v."""
    sides = (rows, keys, keys, rows)
    return tuple(x.index_select(0, side) for x, side in zip(inputs, sides))


def _coefficient(call: StridedCall) -> torch.Tensor | float:
    """Returns the coefficient of a call's rows: [G, 1, R, 1], or one number for all."""
    return call.coefficient[:, None] if isinstance(call.coefficient, torch.Tensor) else call.coefficient


def _write_lse(lse: torch.Tensor, natural_lse: torch.Tensor, indices: Indices, group: StridedGroup) -> None:
    """Writes ``natural_lse`` [G, X, R] to its slots of ``lse`` (X, n_slots)."""
    values = natural_lse + indices.tensor(group.offset).to(lse)[:, None, None]
    slots = indices.tensor(group.slot.reshape(-1))
    lse.index_copy_(1, slots, values.transpose(0, 1).reshape(lse.shape[0], -1) / math.log(2))


# -- flash: the whole group in one call --------------------------------------------------------------------------------


def _view(x: torch.Tensor, group: StridedGroup, start: int, move: int, length: int) -> torch.Tensor:
    """Views ``length`` rows of each member in ``x`` (n, X, D) as [G, X, length, D]."""
    by_position, by_head = x.stride(0), x.stride(1)
    return x.as_strided(
        (group.members, x.shape[1], length, x.shape[2]),
        (move * by_position, by_head, by_position, 1),
        x.storage_offset() + start * by_position,
    )


def _views(x: torch.Tensor, group: StridedGroup, ranges) -> list[torch.Tensor]:
    return [_view(x, group, first, move, length) for first, length, move in ranges]


def _gather(x: torch.Tensor, group: StridedGroup, ranges) -> torch.Tensor:
    """Returns the rows of ``ranges`` in ``x`` (n, X, D) as [G, X, length, D], a view if there is one range."""
    if len(ranges) > 1 and group.members == 1 and x.stride(0) > x.stride(1):
        # in memory order, position by position: a fifth of the time of head by head
        parts = [x[first : first + length] for first, length, _ in ranges]
        return torch.cat(parts).transpose(0, 1)[None]
    views = _views(x, group, ranges)
    return views[0] if len(views) == 1 else torch.cat(views, 2)


def _rows(x: torch.Tensor, group: StridedGroup) -> torch.Tensor:
    return _gather(x, group, group.row_ranges)


def _keys(x: torch.Tensor, group: StridedGroup) -> torch.Tensor:
    return _gather(x, group, group.key_ranges)


def _add(view: torch.Tensor, x: torch.Tensor, coefficient: torch.Tensor | float, overwrite: bool) -> None:
    """Adds coefficient · x to ``view``, or writes it if ``overwrite``."""
    if overwrite:
        torch.mul(x, coefficient, out=view)
    elif isinstance(coefficient, torch.Tensor):
        view.addcmul_(x, coefficient)
    else:
        view.add_(x, alpha=coefficient)


def _add_ranges(total, group: StridedGroup, ranges, x, coefficient: torch.Tensor | float, overwrite: bool) -> None:
    """Applies :func:`_add` of x [G, X, length, D] to the rows of ``ranges`` in ``total`` (n, X, D)."""
    begin = 0
    for view, (_, length, move) in zip(_views(total, group, ranges), ranges):
        part, factor = x, coefficient
        if len(ranges) > 1:
            part = x[:, :, begin : begin + length]
            if isinstance(coefficient, torch.Tensor):
                factor = coefficient[:, :, begin : begin + length]
        begin += length
        if group.members > 1 and move == 0:
            # all members have the same rows
            _add(view[0], part.sum(0), factor, False)
        else:
            _add(view, part, factor, overwrite)


def _forward_flash(call: StridedCall, indices: Indices, inputs, scale, saved, lse, total, overwrite) -> None:
    group = call.group
    q, k, v = _rows(inputs[0], group), _keys(inputs[1], group), _keys(inputs[2], group)
    out, natural_lse = flash_forward(q, k, v, scale, _mask(call, q, k))
    if saved is not None:
        # in the flash kernel's layout: [G, R, X, D] and [G, R, X]
        saved[0].view(group.members, group.rows, -1, out.shape[3]).copy_(out.transpose(1, 2))
        saved[1].view(group.members, group.rows, -1).copy_(natural_lse.transpose(1, 2))
    if lse is not None:
        _write_lse(lse, natural_lse, indices, group)
    _add_ranges(total, group, group.row_ranges, out, _coefficient(call), overwrite)


def _backward_flash(call: StridedCall, inputs, scale, saved, totals, need_delta, overwrite):
    group, (q, k, v, grad_out) = call.group, inputs
    heads, dim = q.shape[1:]
    out = saved[0].view(group.members, group.rows, heads, dim).transpose(1, 2)
    natural_lse = saved[1].view(group.members, group.rows, heads).transpose(1, 2)
    upstream = scaled = _rows(grad_out, group)
    coefficient = _coefficient(call)
    if not isinstance(coefficient, float):
        scaled, coefficient = upstream * coefficient, 1.0
    q, k, v = _rows(q, group), _keys(k, group), _keys(v, group)
    dq, dk, dv = flash_backward(scaled, q, k, v, out, natural_lse, scale, _mask(call, q, k))
    _add_ranges(totals[0], group, group.row_ranges, dq, coefficient, overwrite[0])
    _add_ranges(totals[1], group, group.key_ranges, dk, coefficient, overwrite[1])
    _add_ranges(totals[2], group, group.key_ranges, dv, coefficient, overwrite[1])
    return (upstream * out).sum((1, 3)) if need_delta else None


# -- products: batched matrix products ---------------------------------------------------------------------------------
# Members and heads form the batch dimension Y of a product where that is a view; otherwise the group is computed in
# slices, one for each member or one for each head, whichever are fewer. Thin members are copied into one slice. For up
# to a thousand positions a tenth of the time is spent between products, so views are cached by tensor layout.


def _slice_count(group: StridedGroup, heads: int) -> int:
    return 1 if group.thin else min(group.members, heads)


def _slices(x: torch.Tensor, group: StridedGroup, ranges) -> list[tuple[torch.Tensor, ...]]:
    """Returns the slices of ``x`` (n, X, D) for each range: views [Y, length, D], or one [G, X, length, D] if thin."""
    key = ranges, x.shape, x.stride()
    layouts = group.layout_cache.get(key)
    if layouts is None:
        if len(group.layout_cache) >= MAX_LAYOUTS:
            group.layout_cache.clear()
        layouts = group.layout_cache[key] = [_layout(x, group, *each) for each in ranges]
    begin, views = x.storage_offset(), []
    for size, strides, first, several in layouts:
        view = x.as_strided(size, strides, begin + first)
        views.append(view.unbind() if several else (view,))
    return views


def _layout(x: torch.Tensor, group: StridedGroup, start: int, length: int, move: int):
    """Returns (size, strides, first element, several) of a range in tensors with the layout of ``x``: [slices, Y,
    length, D] if slices are ``several``."""
    heads, dim = x.shape[1:]
    by_position, by_head, _ = x.stride()
    members, slices = (group.members, move * by_position), (heads, by_head)
    if group.members <= heads or group.thin:
        members, slices = slices, members
    several = _slice_count(group, heads) > 1
    outer = (slices, members) if several or slices[0] > 1 else (members,)
    size, strides = zip(*outer, (length, by_position), (dim, 1))
    return size, strides, start * by_position, several


def _inputs(x: torch.Tensor, group: StridedGroup, ranges) -> Sequence[torch.Tensor]:
    """Returns the slices [Y, length, D] of the rows of ``ranges`` in ``x`` (n, X, D)."""
    if len(ranges) > 1:
        return _split_slices(_gather(x, group, ranges), group)
    slices = _slices(x, group, ranges)[0]
    return slices if slices[0].dim() == 3 else [x.reshape(-1, *x.shape[2:]) for x in slices]


def _split_slices(x: torch.Tensor, group: StridedGroup) -> Sequence[torch.Tensor]:
    """Splits [G, X, …] into slices [Y, …]."""
    members, heads = x.shape[:2]
    if _slice_count(group, heads) == 1:
        return [x.reshape(-1, *x.shape[2:])]
    return x.unbind(0 if members <= heads else 1)


def _stack_slices(slices: list[torch.Tensor], group: StridedGroup, heads: int) -> torch.Tensor:
    """Inverts :func:`_split_slices`."""
    if len(slices) == 1:
        return slices[0].view(group.members, heads, *slices[0].shape[1:])
    return torch.stack(slices, 0 if group.members <= heads else 1)


def _pair_slices(flat: torch.Tensor, group: StridedGroup, heads: int) -> Sequence[torch.Tensor]:
    """Views ``flat`` as slices [Y, keys, R] if keys come first, else [Y, R, keys]."""
    shape = (group.keys, group.rows) if group.keys_first else (group.rows, group.keys)
    count = _slice_count(group, heads)
    return (flat.view(-1, *shape),) if count == 1 else flat.view(count, -1, *shape).unbind()


def _add_product(views, group: StridedGroup, heads: int, ranges, left, right, coefficient, overwrite: bool) -> None:
    """Adds coefficient · left right to the rows of ``ranges`` in one slice, or writes it if ``overwrite``.

    ``views``: one per range, from :func:`_slices`. ``left`` [Y, lengths, …]; coefficient [Y, lengths, 1] or float.
    """
    constant, begin = isinstance(coefficient, float), 0
    for view, (_, length, move) in zip(views, ranges):
        part, factor = left, coefficient
        if len(ranges) > 1:
            part = left[:, begin : begin + length]
            factor = coefficient if constant else coefficient[:, begin : begin + length]
            begin += length
        _, terms, dim = right.shape
        if move == 0 and group.members > 1 and (group.thin or group.members > heads):
            # all members have the same rows, and are in the batch dimension
            _add(view[0], torch.bmm(part, right).view(view.shape).sum(0), factor, False)
        elif constant and length * dim >= MIN_INPLACE_NUMEL and terms >= MIN_INPLACE_K and view.dim() == 3:
            view.baddbmm_(part, right, beta=0 if overwrite else 1, alpha=factor)
        elif view.dim() == 3:
            _add(view, torch.bmm(part, right), factor, overwrite)
        else:
            factor = factor if constant else factor.view(*view.shape[:3], 1)
            _add(view, torch.bmm(part, right).view(view.shape), factor, overwrite)


def _coefficient_slices(call: StridedCall, heads: int) -> Sequence[torch.Tensor | float]:
    """Returns the coefficient of each slice, [Y, R, 1] or a number."""
    coefficient = _coefficient(call)
    if isinstance(coefficient, torch.Tensor):
        return _split_slices(coefficient.expand(-1, heads, -1, -1), call.group)
    return (coefficient,) * _slice_count(call.group, heads)


def _forward_products(call: StridedCall, indices: Indices, inputs, scale, saved, lse, total, overwrite) -> None:
    group, bias = call.group, call.bias
    q, k, v = inputs
    heads, keys_first, rows = q.shape[1], group.keys_first, group.row_ranges
    bias_slices = None if bias is None else _split_slices(bias.expand(-1, heads, -1, -1), group)
    slices = zip(
        _pair_slices(q.new_empty(heads * group.pairs) if saved is None else saved[0], group, heads),
        _inputs(q, group, rows),
        _inputs(k, group, group.key_ranges),
        _inputs(v, group, group.key_ranges),
        zip(*_slices(total, group, rows)),
        _coefficient_slices(call, heads),
    )
    lse_slices = []
    for number, (pairs, queries, keys, values, out, coefficient) in enumerate(slices):
        if bias_slices is not None:
            pairs.copy_(bias_slices[number].mT if keys_first else bias_slices[number])
        left, right = (keys, queries) if keys_first else (queries, keys)
        pairs.baddbmm_(left, right.mT, beta=0 if bias is None else 1, alpha=scale)
        if lse is not None:
            lse_slices.append(torch.logsumexp(pairs, 1 if keys_first else 2))
        softmax_out(pairs, 1 if keys_first else 2, out=pairs)
        _add_product(out, group, heads, rows, pairs.mT if keys_first else pairs, values, coefficient, overwrite)
    if lse is not None:
        _write_lse(lse, _stack_slices(lse_slices, group, heads), indices, group)


def _backward_products(call: StridedCall, inputs, scale, saved, totals, need_delta, overwrite):
    group = call.group
    heads, keys_first = inputs[0].shape[1], group.keys_first
    rows, keys = group.row_ranges, group.key_ranges
    slices = zip(
        _pair_slices(saved[0], group, heads),
        *[_inputs(x, group, ranges) for x, ranges in zip(inputs, (rows, keys, keys, rows))],
        *[zip(*_slices(total, group, ranges)) for total, ranges in zip(totals, (rows, keys, keys))],
        _coefficient_slices(call, heads),
    )
    delta = []
    for pairs, q, k, v, upstream, dq, dk, dv, alpha in slices:
        p, p_t = (pairs.mT, pairs) if keys_first else (pairs, pairs.mT)
        if need_delta:
            delta.append((upstream * torch.bmm(p, v)).sum(2))
        if not isinstance(alpha, float):
            upstream, alpha = upstream * alpha, 1.0
        ds = torch.bmm(v, upstream.mT) if keys_first else torch.bmm(upstream, v.mT)
        _softmax_backward_out(ds, pairs, 1 if keys_first else 2, pairs.dtype, grad_input=ds)
        # last, while the probabilities are in cache: saves 6 %
        _add_product(dv, group, heads, keys, p_t, upstream, alpha, overwrite[1])
        ds, ds_t = (ds.mT, ds) if keys_first else (ds, ds.mT)
        _add_product(dq, group, heads, rows, ds, k, scale * alpha, overwrite[0])
        _add_product(dk, group, heads, keys, ds_t, q, scale * alpha, overwrite[1])
    return _stack_slices(delta, group, heads).sum(1) if need_delta else None


def _mask(call: StridedCall, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    return None if call.bias is None else call.bias.expand(q.shape[0], 1, q.shape[2], k.shape[2])
