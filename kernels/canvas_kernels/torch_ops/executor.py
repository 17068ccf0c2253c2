"""The fast torch executor, the CPU default: a table's cells as slabs and batches (:mod:`.grouping`).

The number of torch calls grows with the number of distinct shapes and distances, never with cells or connections.
Everything is computed in float32, or float64 for float64 inputs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..block_table import BlockTable
from ..derived import derived
from ..packing import empty_in
from .frames import APART_KEYS
from .gathered import backward_stage, forward_stage
from .grouping import all_take_flash, group, kept_pairs, takes_flash
from .groups import Grouping
from .indices import Step, indices_of
from .strided import backward_slab, forward_slab, saved_parts

# Orders of (B, H, n, D) in memory, the outermost first: positions before heads, as a linear layer leaves them, or not.
POSITIONS, BATCH = (2, 0, 1, 3), (0, 1, 2, 3)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: BlockTable,
    *,
    scale: float,
    gain: torch.Tensor | None = None,
    active: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    need_lse: bool = False,
    need_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(out, lse, saved)``: out (B, H, n, D) in q's dtype, laid out by :func:`empty_like`; lse (B, H, n_slots), base
    2, without slots unless ``need_lse``; saved, what :func:`backward` wants, is empty unless ``need_grad``.

    ``row_scale`` has to be given where ``active`` is, in edge form.
    """
    grouping = group(table)
    batch, heads, _, dim = q.shape
    chosen = choices(table, dim)
    flash = chosen.flash
    inputs = tuple(_rows(x, chosen.apart) for x in (q, k, v))
    rows = inputs[0]
    saved = rows.new_empty(saved_size(table, batch * heads, dim) if need_grad else 0)
    lse = rows.new_full((batch * heads, table.n_slots if need_lse else 0), math.inf)
    if q.numel() == 0 or not (grouping.stages or grouping.slabs):
        return empty_like(q).zero_(), lse.view(batch, heads, lse.shape[1]), saved
    step = Step(indices_of(table, rows.shape[1], rows.dtype, rows.device), gain, active, row_scale)
    kept, slab_parts = _saved_parts(saved, table, batch * heads, dim) if need_grad else (None, None)
    # what is left out is not written, so nothing may count on its writing first
    writes, out = step.everything, empty_like(q, rows.dtype)
    total = _rows(out)
    _clear(total, grouping, grouping.stale_rows if writes else None)
    for number, slab in enumerate(grouping.slabs):
        part = None if slab_parts is None else slab_parts[number]
        forward_slab(number, step, inputs, scale, flash[number], part, lse, total, writes and slab.fresh_rows)
    for number in range(len(grouping.stages)):
        forward_stage(number, step, inputs, scale, None if kept is None else kept[number], lse, total)
    return out.to(q.dtype), lse.view(batch, heads, lse.shape[1]), saved


def backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    saved: torch.Tensor,
    table: BlockTable,
    *,
    scale: float,
    gain: torch.Tensor | None = None,
    active: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    need_gain: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """``(dq, dk, dv, dgain)`` from :func:`forward`'s inputs and ``saved``: the first three in q's dtype, laid out by
    :func:`empty_like`; dgain (n_edges,) in the dtype computed in, None unless ``need_gain``."""
    grouping = group(table)
    batch, heads, _, dim = q.shape
    chosen = choices(table, dim)
    flash = chosen.flash
    inputs = (*(_rows(x, chosen.apart) for x in (q, k, v)), _rows(grad_out))
    rows = inputs[0]
    if q.numel() == 0 or not (grouping.stages or grouping.slabs):
        return *(empty_like(q).zero_() for _ in range(3)), rows.new_zeros(table.n_edges) if need_gain else None
    indices = indices_of(table, rows.shape[1], rows.dtype, rows.device)
    step = Step(indices, gain, active, row_scale)
    per_segment = rows.new_zeros(len(grouping.weight)) if need_gain else None
    kept, slab_parts = _saved_parts(saved, table, batch * heads, dim)
    writes = step.everything
    gradients = [empty_like(q, rows.dtype) for _ in range(3)]
    totals = [_rows(part) for part in gradients]
    for total, stale in zip(totals, (grouping.stale_rows, grouping.stale_keys, grouping.stale_keys)):
        _clear(total, grouping, stale if writes else None)
    for number, slab in enumerate(grouping.slabs):
        fresh = (writes and slab.fresh_rows, writes and slab.fresh_keys)
        backward_slab(number, step, inputs, scale, flash[number], slab_parts[number], totals, per_segment, fresh)
    for number in range(len(grouping.stages)):
        part = None if kept is None else kept[number]
        backward_stage(number, step, inputs, scale, part, totals, per_segment)
    dgain = None
    if need_gain:
        weight, _ = indices.segments()
        dgain = torch.segment_reduce(
            weight * per_segment, "sum", lengths=indices.per_edge(), axis=0, initial=0.0, unsafe=True
        )
        if active is not None:
            dgain = dgain.masked_fill(active == 0, 0.0)
    return *(x.to(q.dtype) for x in gradients), dgain


def empty_like(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An empty (B, H, n, D) tensor as this executor lays out its results: dense, and positions outermost where ``x``
    has them outside of heads, else innermost, so that what made q reads them as they lie."""
    return empty_in(order_of_results(x), x.shape, x, dtype)


def order_of_results(x: torch.Tensor) -> tuple[int, ...]:
    """Returns the dimensions of a result for ``x`` (B, H, n, D) as they lie in memory, the outermost first."""
    by_batch, by_head, by_position, _ = x.stride()
    return POSITIONS if by_position > (by_head if x.shape[1] > 1 else by_batch) else BATCH


class Choices(NamedTuple):
    """``flash`` per slab, whether its kernel wants heads ``apart``, whether the batches' probabilities are kept, and
    elements kept in all per batch · head."""

    flash: tuple[bool, ...]
    apart: bool
    keeps: bool
    size: int


@derived(limit=8)
def choices(table: BlockTable, head_dim: int) -> Choices:
    """Returns how a table runs for a head_dim."""
    grouping = group(table)
    whole = all_take_flash(grouping.slabs, table.n_positions, head_dim)
    flash = tuple(whole or bool(takes_flash(slab.rows, slab.keys)) for slab in grouping.slabs)
    keeps = sum(batch.pairs for batch in grouping.batches) <= kept_pairs(table.n_positions, head_dim)
    size = sum(batch.pairs for batch in grouping.batches) if keeps else 0
    size += sum(sum(saved_parts(*slab, 1, head_dim)) for slab in zip(grouping.slabs, flash))
    apart = any(chosen and slab.keys >= APART_KEYS for slab, chosen in zip(grouping.slabs, flash))
    return Choices(flash, apart, keeps, size)


def saved_size(table: BlockTable, heads: int, head_dim: int) -> int:
    """Returns how many elements forward keeps for backward, ``heads`` being batch · heads."""
    return heads * choices(table, head_dim).size


@derived(limit=8)
def _sizes(table: BlockTable, heads: int, dim: int) -> list[int]:
    grouping, chosen = group(table), choices(table, dim)
    sizes = [heads * batch.pairs for batch in grouping.batches] if chosen.keeps else []
    for slab, flash in zip(grouping.slabs, chosen.flash):
        sizes += saved_parts(slab, flash, heads, dim)
    return sizes


def _saved_parts(saved: torch.Tensor, table: BlockTable, heads: int, dim: int):
    """Flat pieces of ``saved``: probabilities per stage and batch, or None if they are not kept; those of each slab."""
    grouping, chosen = group(table), choices(table, dim)
    parts = iter(saved.split_with_sizes(_sizes(table, heads, dim)))
    kept = [[next(parts) for _ in stage] for stage in grouping.stages] if chosen.keeps else None
    return kept, [(next(parts), next(parts)) if flash else (next(parts),) for flash in chosen.flash]


def _clear(total: torch.Tensor, grouping: Grouping, stale: tuple[tuple[int, int], ...] | None) -> None:
    """Zeros in ``total`` (n, X, D) wherever something is added before anything is written: in the ranges ``stale``,
    everywhere for None. A stage that is alone writes everything."""
    if stale is None or (not grouping.slabs and len(grouping.stages) > 1):
        total.zero_()
    elif grouping.slabs:
        for start, stop in stale:
            total[start:stop].zero_()


def _rows(x: torch.Tensor, apart: bool = False) -> torch.Tensor:
    """x (B, H, n, D) as (n, X, D) in the dtype computed in, X being batch · heads; a copy only where lanes are not
    equally far apart or rows are not whole, or lanes should lie ``apart`` and do not."""
    if x.dtype not in (torch.float32, torch.float64):
        x = x.float()
    batch, heads, n, dim = x.shape
    by_batch, by_head, by_position, by_element = x.stride()
    by_lane = by_head if heads > 1 else by_batch
    even = batch == 1 or heads == 1 or by_batch == heads * by_head
    if even and by_element == 1 and dim and by_lane % dim == 0 and by_position % dim == 0:
        rows = x.as_strided((n, batch * heads, dim), (by_position, by_lane, 1))
        return rows.transpose(0, 1).contiguous().transpose(0, 1) if apart else rows
    return x.permute(2, 0, 1, 3).reshape(n, batch * heads, dim).contiguous()
