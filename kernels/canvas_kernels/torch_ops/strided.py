"""Slabs: cells at equal distances, attended over on strided views of the canvas, with nothing gathered.

A row of a slab lies in one segment, so the output is the row's coefficient times plain attention, and the backward that
of plain attention with the coefficient multiplied into the upstream gradient. Large cells take the flash kernel and
keep its output and log-sum-exp; others are plain batched products and keep their probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .flash import flash_backward, flash_forward
from .groups import Slab
from .indices import Indices, SlabRun, Step, is_whole

# Products whose matrices have at least this many elements, sums of at least this many terms each, are added to the
# canvas by the product itself, which torch then calls matrix by matrix; others through a temporary.
DIRECT_ELEMENTS, DIRECT_TERMS = 1 << 12, 32
# Layouts of tensors that a slab remembers.
MAX_PLACES = 32

_softmax_out = torch.softmax
_softmax_backward_out = torch._softmax_backward_data


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
    lse = lse if lse.shape[1] else None
    runs = step.runs[number]
    if not is_whole(runs):
        # results are the same bits every time, also those that only backward sees
        for part in saved or ():
            part.zero_()
    for run, part in zip(runs, _pieces(saved, runs, flash, inputs[0])):
        if run.rows is None:
            forward(run, step.indices, inputs, scale, part, lse, total, fresh)
            continue
        result = total.new_empty(len(run.rows), *total.shape[1:])
        forward(run, step.indices, _copies(inputs, run), scale, part, lse, result, True)
        total.index_add_(0, run.rows, result)


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
    need_delta, runs = per_segment is not None, step.runs[number]
    for run, part in zip(runs, _pieces(saved, runs, flash, inputs[0])):
        if run.rows is None:
            # [G, R]: Σ over heads and elements of dO ∘ f
            delta = backward(run, inputs, scale, part, totals, need_delta, fresh)
        else:
            sides = (run.rows, run.keys, run.keys)
            results = [total.new_empty(len(side), *total.shape[1:]) for total, side in zip(totals, sides)]
            delta = backward(run, _copies(inputs, run), scale, part, results, need_delta, (True, True))
            for total, side, result in zip(totals, sides, results):
                total.index_add_(0, side, result)
        if need_delta:
            segment, entry = step.indices.slab_rows(number)
            if run.entries is not None:
                segment, entry = segment[run.entries], entry[run.entries]
            factor = step.row_scale.to(delta.dtype).reshape(-1).index_select(0, entry)
            per_segment.put_(segment, delta.reshape(-1) * factor, accumulate=True)


def _pieces(saved: tuple[torch.Tensor, ...] | None, runs: list[SlabRun], flash: bool, q: torch.Tensor):
    """What is kept of a slab, run by run; None where nothing is kept."""
    if saved is None or is_whole(runs):
        return [saved] * len(runs)
    pieces, begin = [], [0] * len(saved)
    for run in runs:
        sizes = saved_parts(run.slab, flash, *q.shape[1:])
        pieces.append(tuple(flat[first : first + size] for flat, first, size in zip(saved, begin, sizes)))
        begin = [first + size for first, size in zip(begin, sizes)]
    return pieces


def _copies(inputs: tuple[torch.Tensor, ...], run: SlabRun) -> tuple[torch.Tensor, ...]:
    """The rows of q and of grad_out, if there is one, and the keys of k and v that a run copies."""
    sides = (run.rows, run.keys, run.keys, run.rows)
    return tuple(x.index_select(0, side) for x, side in zip(inputs, sides))


def _coefficient(run: SlabRun) -> torch.Tensor | float:
    """Of a run's rows: [G, 1, R, 1], or a number that holds for all."""
    return run.coefficient if isinstance(run.coefficient, float) else run.coefficient[:, None]


def _write_lse(lse: torch.Tensor, natural_lse: torch.Tensor, indices: Indices, slab: Slab) -> None:
    """``natural_lse`` [G, X, R] to its slots of ``lse`` (X, n_slots)."""
    values = natural_lse + indices.tensor(slab.offset).to(lse)[:, None, None]
    slots = indices.tensor(slab.slot.reshape(-1))
    lse.index_copy_(1, slots, values.transpose(0, 1).reshape(lse.shape[0], -1) / math.log(2))


# -- flash: the whole slab in one call ---------------------------------------------------------------------------------


def _view(x: torch.Tensor, slab: Slab, start: int, move: int, length: int) -> torch.Tensor:
    """``length`` rows of each cell in ``x`` (n, X, D): a view [G, X, length, D]."""
    by_position, by_head = x.stride(0), x.stride(1)
    return x.as_strided(
        (slab.cells, x.shape[1], length, x.shape[2]),
        (move * by_position, by_head, by_position, 1),
        x.storage_offset() + start * by_position,
    )


def _views(x: torch.Tensor, slab: Slab, ranges) -> list[torch.Tensor]:
    return [_view(x, slab, first, move, length) for first, length, move in ranges]


def _gather(x: torch.Tensor, slab: Slab, ranges) -> torch.Tensor:
    """The rows of ``ranges`` in ``x`` (n, X, D): [G, X, length, D], a view where there is one range."""
    if len(ranges) > 1 and slab.cells == 1 and x.stride(0) > x.stride(1):
        # position by position, as it lies in memory: a fifth of the time of head by head
        pieces = [x[first : first + length] for first, length, _ in ranges]
        return torch.cat(pieces).transpose(0, 1)[None]
    views = _views(x, slab, ranges)
    return views[0] if len(views) == 1 else torch.cat(views, 2)


def _rows(x: torch.Tensor, slab: Slab) -> torch.Tensor:
    return _gather(x, slab, slab.row_ranges)


def _keys(x: torch.Tensor, slab: Slab) -> torch.Tensor:
    return _gather(x, slab, slab.key_ranges)


def _add(view: torch.Tensor, x: torch.Tensor, coefficient: torch.Tensor | float, fresh: bool) -> None:
    """view ← coefficient · x, added unless ``fresh``."""
    if fresh:
        torch.mul(x, coefficient, out=view)
    elif isinstance(coefficient, float):
        view.add_(x, alpha=coefficient)
    else:
        view.addcmul_(x, coefficient)


def _add_ranges(total, slab: Slab, ranges, x, coefficient: torch.Tensor | float, fresh: bool) -> None:
    """Like :func:`_add`, x [G, X, length, D] into the rows of ``ranges`` in ``total`` (n, X, D)."""
    begin = 0
    for view, (_, length, move) in zip(_views(total, slab, ranges), ranges):
        part, factor = x, coefficient
        if len(ranges) > 1:
            part = x[:, :, begin : begin + length]
            if not isinstance(coefficient, float):
                factor = coefficient[:, :, begin : begin + length]
        begin += length
        if slab.cells > 1 and move == 0:
            # every cell has the same rows
            _add(view[0], part.sum(0), factor, False)
        else:
            _add(view, part, factor, fresh)


def _forward_flash(run: SlabRun, indices: Indices, inputs, scale, saved, lse, total, fresh) -> None:
    slab = run.slab
    q, k, v = _rows(inputs[0], slab), _keys(inputs[1], slab), _keys(inputs[2], slab)
    out, natural_lse = flash_forward(q, k, v, scale, _mask(run, q, k))
    if saved is not None:
        # as the flash kernel lays them out: [G, R, X, D] and [G, R, X]
        saved[0].view(slab.cells, slab.rows, -1, out.shape[3]).copy_(out.transpose(1, 2))
        saved[1].view(slab.cells, slab.rows, -1).copy_(natural_lse.transpose(1, 2))
    if lse is not None:
        _write_lse(lse, natural_lse, indices, slab)
    _add_ranges(total, slab, slab.row_ranges, out, _coefficient(run), fresh)


def _backward_flash(run: SlabRun, inputs, scale, saved, totals, need_delta, fresh):
    slab, (q, k, v, grad_out) = run.slab, inputs
    heads, dim = q.shape[1:]
    out = saved[0].view(slab.cells, slab.rows, heads, dim).transpose(1, 2)
    natural_lse = saved[1].view(slab.cells, slab.rows, heads).transpose(1, 2)
    upstream = scaled = _rows(grad_out, slab)
    coefficient = _coefficient(run)
    if not isinstance(coefficient, float):
        scaled, coefficient = upstream * coefficient, 1.0
    q, k, v = _rows(q, slab), _keys(k, slab), _keys(v, slab)
    dq, dk, dv = flash_backward(scaled, q, k, v, out, natural_lse, scale, _mask(run, q, k))
    _add_ranges(totals[0], slab, slab.row_ranges, dq, coefficient, fresh[0])
    _add_ranges(totals[1], slab, slab.key_ranges, dk, coefficient, fresh[1])
    _add_ranges(totals[2], slab, slab.key_ranges, dv, coefficient, fresh[1])
    return (upstream * out).sum((1, 3)) if need_delta else None


# -- products: batched matrix products ---------------------------------------------------------------------------------
# Cells and heads make the one batch dimension of a product, Y of them, where that is a view; otherwise the slab is
# walked in lanes, one for each cell or one for each head, whichever are fewer. Thin cells are copied instead, all into
# one lane. Up to a thousand positions or so a tenth of the time goes by between products: what can be known of a slab
# and a layout in memory is worked out once.


def _lane_count(slab: Slab, heads: int) -> int:
    return 1 if slab.thin else min(slab.cells, heads)


def _lanes(x: torch.Tensor, slab: Slab, ranges) -> list[tuple[torch.Tensor, ...]]:
    """Range by range, the lanes of ``x`` (n, X, D): views [Y, length, D], or one [G, X, length, D] of thin cells."""
    key = ranges, x.shape, x.stride()
    places = slab.places.get(key)
    if places is None:
        if len(slab.places) >= MAX_PLACES:
            slab.places.clear()
        places = slab.places[key] = [_place(x, slab, *each) for each in ranges]
    begin, found = x.storage_offset(), []
    for size, strides, first, several in places:
        view = x.as_strided(size, strides, begin + first)
        found.append(view.unbind() if several else (view,))
    return found


def _place(x: torch.Tensor, slab: Slab, start: int, length: int, move: int):
    """Size and strides of a range in tensors laid out as ``x``, [lanes, Y, length, D] where lanes are ``several``, and
    where it begins: (size, strides, first, several)."""
    heads, dim = x.shape[1:]
    by_position, by_head, _ = x.stride()
    cells, lanes = (slab.cells, move * by_position), (heads, by_head)
    if slab.cells <= heads or slab.thin:
        cells, lanes = lanes, cells
    several = _lane_count(slab, heads) > 1
    outer = (lanes, cells) if several or lanes[0] > 1 else (cells,)
    size, strides = zip(*outer, (length, by_position), (dim, 1))
    return size, strides, start * by_position, several


def _inputs(x: torch.Tensor, slab: Slab, ranges) -> Sequence[torch.Tensor]:
    """The rows of ``ranges`` in ``x`` (n, X, D), lane by lane: [Y, length, D]."""
    if len(ranges) > 1:
        return _apart(_gather(x, slab, ranges), slab)
    lanes = _lanes(x, slab, ranges)[0]
    return lanes if lanes[0].dim() == 3 else [lane.reshape(-1, *lane.shape[2:]) for lane in lanes]


def _apart(x: torch.Tensor, slab: Slab) -> Sequence[torch.Tensor]:
    """[G, X, …] as lanes [Y, …]."""
    cells, heads = x.shape[:2]
    if _lane_count(slab, heads) == 1:
        return [x.reshape(-1, *x.shape[2:])]
    return x.unbind(0 if cells <= heads else 1)


def _together(lanes: list[torch.Tensor], slab: Slab, heads: int) -> torch.Tensor:
    """The inverse of :func:`_apart`."""
    if len(lanes) == 1:
        return lanes[0].view(slab.cells, heads, *lanes[0].shape[1:])
    return torch.stack(lanes, 0 if slab.cells <= heads else 1)


def _pair_lanes(flat: torch.Tensor, slab: Slab, heads: int) -> Sequence[torch.Tensor]:
    """``flat`` as a lane after another: [Y, keys, R] where keys come first, [Y, R, keys] otherwise."""
    shape = (slab.keys, slab.rows) if slab.keys_first else (slab.rows, slab.keys)
    count = _lane_count(slab, heads)
    return (flat.view(-1, *shape),) if count == 1 else flat.view(count, -1, *shape).unbind()


def _add_product(lane, slab: Slab, heads: int, ranges, left, right, coefficient, fresh: bool) -> None:
    """Rows of ``ranges`` in one lane ← coefficient · left right, added unless ``fresh``.

    ``lane``: of each range a view as :func:`_lanes` gives it. ``left`` [Y, lengths, …]; coefficient [Y, lengths, 1], or
    a number.
    """
    constant, begin = isinstance(coefficient, float), 0
    for view, (_, length, move) in zip(lane, ranges):
        part, factor = left, coefficient
        if len(ranges) > 1:
            part = left[:, begin : begin + length]
            factor = coefficient if constant else coefficient[:, begin : begin + length]
            begin += length
        _, terms, dim = right.shape
        if move == 0 and slab.cells > 1 and (slab.thin or slab.cells > heads):
            # every cell has the same rows, and cells are among the batch
            _add(view[0], torch.bmm(part, right).view(view.shape).sum(0), factor, False)
        elif constant and length * dim >= DIRECT_ELEMENTS and terms >= DIRECT_TERMS and view.dim() == 3:
            view.baddbmm_(part, right, beta=0 if fresh else 1, alpha=factor)
        elif view.dim() == 3:
            _add(view, torch.bmm(part, right), factor, fresh)
        else:
            factor = factor if constant else factor.view(*view.shape[:3], 1)
            _add(view, torch.bmm(part, right).view(view.shape), factor, fresh)


def _coefficient_lanes(run: SlabRun, heads: int) -> Sequence[torch.Tensor | float]:
    """Lane by lane, [Y, R, 1] or a number."""
    coefficient = _coefficient(run)
    if isinstance(coefficient, float):
        return (coefficient,) * _lane_count(run.slab, heads)
    return _apart(coefficient.expand(-1, heads, -1, -1), run.slab)


def _forward_products(run: SlabRun, indices: Indices, inputs, scale, saved, lse, total, fresh) -> None:
    slab, bias = run.slab, run.bias
    q, k, v = inputs
    heads, keys_first, rows = q.shape[1], slab.keys_first, slab.row_ranges
    bias_lanes = None if bias is None else _apart(bias.expand(-1, heads, -1, -1), slab)
    lanes = zip(
        _pair_lanes(q.new_empty(heads * slab.pairs) if saved is None else saved[0], slab, heads),
        _inputs(q, slab, rows),
        _inputs(k, slab, slab.key_ranges),
        _inputs(v, slab, slab.key_ranges),
        zip(*_lanes(total, slab, rows)),
        _coefficient_lanes(run, heads),
    )
    lse_lanes = []
    for lane, (pairs, queries, keys, values, out, coefficient) in enumerate(lanes):
        if bias_lanes is not None:
            pairs.copy_(bias_lanes[lane].mT if keys_first else bias_lanes[lane])
        left, right = (keys, queries) if keys_first else (queries, keys)
        pairs.baddbmm_(left, right.mT, beta=0 if bias is None else 1, alpha=scale)
        if lse is not None:
            lse_lanes.append(torch.logsumexp(pairs, 1 if keys_first else 2))
        _softmax_out(pairs, 1 if keys_first else 2, out=pairs)
        _add_product(out, slab, heads, rows, pairs.mT if keys_first else pairs, values, coefficient, fresh)
    if lse is not None:
        _write_lse(lse, _together(lse_lanes, slab, heads), indices, slab)


def _backward_products(run: SlabRun, inputs, scale, saved, totals, need_delta, fresh):
    slab = run.slab
    heads, keys_first = inputs[0].shape[1], slab.keys_first
    rows, keys = slab.row_ranges, slab.key_ranges
    lanes = zip(
        _pair_lanes(saved[0], slab, heads),
        *[_inputs(x, slab, ranges) for x, ranges in zip(inputs, (rows, keys, keys, rows))],
        *[zip(*_lanes(total, slab, ranges)) for total, ranges in zip(totals, (rows, keys, keys))],
        _coefficient_lanes(run, heads),
    )
    delta = []
    for pairs, q, k, v, upstream, dq, dk, dv, alpha in lanes:
        p, p_t = (pairs.mT, pairs) if keys_first else (pairs, pairs.mT)
        if need_delta:
            delta.append((upstream * torch.bmm(p, v)).sum(2))
        if not isinstance(alpha, float):
            upstream, alpha = upstream * alpha, 1.0
        ds = torch.bmm(v, upstream.mT) if keys_first else torch.bmm(upstream, v.mT)
        _softmax_backward_out(ds, pairs, 1 if keys_first else 2, pairs.dtype, grad_input=ds)
        # only now, with the probabilities in cache: 6 % of the whole
        _add_product(dv, slab, heads, keys, p_t, upstream, alpha, fresh[1])
        ds, ds_t = (ds.mT, ds) if keys_first else (ds, ds.mT)
        _add_product(dq, slab, heads, rows, ds, k, scale * alpha, fresh[0])
        _add_product(dk, slab, heads, keys, ds_t, q, scale * alpha, fresh[1])
    return _together(delta, slab, heads).sum(1) if need_delta else None


def _mask(run: SlabRun, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    return None if run.bias is None else run.bias.expand(q.shape[0], 1, q.shape[2], k.shape[2])
