"""The fast torch executor, the CPU default: a table as strided and gathered groups (:mod:`.grouping`).

The number of torch calls grows with the number of distinct shapes and distances, never with query ranges or
connections. Everything is computed in float32, or float64 for float64 inputs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..block_table import BlockTable
from ..derived import derived
from ..packing import empty_in
from .frames import SPLIT_HEADS_KEYS
from .gathered import backward_bundle, forward_bundle
from .grouping import group_table, max_saved_probs, use_flash, use_flash_everywhere
from .groups import Grouping
from .indices import Step, indices_of
from .strided import backward_strided, forward_strided, saved_sizes

# Orders of (B, H, n, D) in memory, outermost first: positions before heads, or batch first.
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
    """Returns ``(out, lse, saved)``.

    ``out`` is (B, H, n, D) in q's dtype, laid out by :func:`empty_like`; ``lse`` (B, H, n_slots), base 2, without slots
    unless ``need_lse``; ``saved``, for :func:`backward`, is empty unless ``need_grad``. In edge form ``active``
    requires ``row_scale``.
    """
    grouping = group_table(table)
    batch, heads, _, dim = q.shape
    plan = execution_plan(table, dim)
    flash = plan.flash
    inputs = _rows(q, plan.split_heads), _rows(k, plan.split_heads), _rows(v, plan.split_heads)
    rows = inputs[0]
    saved = rows.new_empty(saved_size(table, batch * heads, dim) if need_grad else 0)
    lse = rows.new_full((batch * heads, table.n_slots if need_lse else 0), math.inf)
    if q.numel() == 0 or not (grouping.bundles or grouping.strided):
        return empty_like(q).zero_(), lse.view(batch, heads, lse.shape[1]), saved
    step = Step(indices_of(table, rows.shape[1], rows.dtype, rows.device), gain, active, row_scale)
    saved_probs, strided_saved = _saved_parts(saved, table, batch * heads, dim) if need_grad else (None, None)
    # inactive rows are not written, so they must be zeroed
    writes, out = step.everything, empty_like(q, rows.dtype)
    total = _rows(out)
    _clear(total, grouping, grouping.rows_to_zero if writes else None)
    for number, group in enumerate(grouping.strided):
        saved_part = None if strided_saved is None else strided_saved[number]
        overwrite = writes and group.overwrites_rows
        forward_strided(number, step, inputs, scale, flash[number], saved_part, lse, total, overwrite)
    for number in range(len(grouping.bundles)):
        forward_bundle(number, step, inputs, scale, None if saved_probs is None else saved_probs[number], lse, total)
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
    """Returns ``(dq, dk, dv, dgain)`` from :func:`forward`'s inputs and ``saved``: the first three in q's dtype, laid
    out by :func:`empty_like`; dgain (n_edges,) in the computing dtype, None unless ``need_gain``."""
    grouping = group_table(table)
    batch, heads, _, dim = q.shape
    plan = execution_plan(table, dim)
    flash = plan.flash
    split = plan.split_heads
    inputs = _rows(q, split), _rows(k, split), _rows(v, split), _rows(grad_out)
    rows = inputs[0]
    if q.numel() == 0 or not (grouping.bundles or grouping.strided):
        dq, dk, dv = (empty_like(q).zero_() for _ in range(3))
        return dq, dk, dv, rows.new_zeros(table.n_edges) if need_gain else None
    indices = indices_of(table, rows.shape[1], rows.dtype, rows.device)
    step = Step(indices, gain, active, row_scale)
    per_segment = rows.new_zeros(len(grouping.weight)) if need_gain else None
    saved_probs, strided_saved = _saved_parts(saved, table, batch * heads, dim)
    writes = step.everything
    gradients = [empty_like(q, rows.dtype) for _ in range(3)]
    totals = [_rows(part) for part in gradients]
    for total, ranges in zip(totals, (grouping.rows_to_zero, grouping.keys_to_zero, grouping.keys_to_zero)):
        _clear(total, grouping, ranges if writes else None)
    for number, group in enumerate(grouping.strided):
        overwrite = (writes and group.overwrites_rows, writes and group.overwrites_keys)
        saved_part = strided_saved[number]
        backward_strided(number, step, inputs, scale, flash[number], saved_part, totals, per_segment, overwrite)
    for number in range(len(grouping.bundles)):
        part = None if saved_probs is None else saved_probs[number]
        backward_bundle(number, step, inputs, scale, part, totals, per_segment)
    dgain = None
    if per_segment is not None:
        weight, _ = indices.segments()
        dgain = torch.segment_reduce(
            weight * per_segment, "sum", lengths=indices.per_edge(), axis=0, initial=0.0, unsafe=True
        )
        if active is not None:
            dgain = dgain.masked_fill(active == 0, 0.0)
    dq, dk, dv = (x.to(q.dtype) for x in gradients)
    return dq, dk, dv, dgain


def empty_like(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Returns an empty dense (B, H, n, D) tensor for results: positions outermost if ``x`` has them before heads, so
    that they have the layout of q."""
    return empty_in(order_of_results(x), x.shape, x, dtype)


def order_of_results(x: torch.Tensor) -> tuple[int, ...]:
    """Returns the order of dimensions in memory of a result for ``x`` (B, H, n, D), outermost first."""
    by_batch, by_head, by_position, _ = x.stride()
    return POSITIONS if by_position > (by_head if x.shape[1] > 1 else by_batch) else BATCH


class ExecutionPlan(NamedTuple):
    """The execution of a table for a head_dim.

    Attributes:
        flash: for each strided group, whether it runs by the flash kernel.
        split_heads: whether that needs contiguous heads.
        saves_probs: whether gathered groups save probabilities.
        size: elements saved in all, per batch · head.
    """

    flash: tuple[bool, ...]
    split_heads: bool
    saves_probs: bool
    size: int


@derived(limit=8)
def execution_plan(table: BlockTable, head_dim: int) -> ExecutionPlan:
    """Returns the execution plan of a table for a head_dim."""
    grouping = group_table(table)
    everywhere = use_flash_everywhere(grouping.strided, table.n_positions, head_dim)
    flash = tuple(everywhere or bool(use_flash(group.rows, group.keys)) for group in grouping.strided)
    saves_probs = sum(group.pairs for group in grouping.gathered) <= max_saved_probs(table.n_positions, head_dim)
    size = sum(group.pairs for group in grouping.gathered) if saves_probs else 0
    size += sum(sum(saved_sizes(*group, 1, head_dim)) for group in zip(grouping.strided, flash))
    split_heads = any(use and group.keys >= SPLIT_HEADS_KEYS for group, use in zip(grouping.strided, flash))
    return ExecutionPlan(flash, split_heads, saves_probs, size)


def saved_size(table: BlockTable, heads: int, head_dim: int) -> int:
    """Returns how many elements forward saves for backward, ``heads`` being batch · heads."""
    return heads * execution_plan(table, head_dim).size


@derived(limit=8)
def _sizes(table: BlockTable, heads: int, dim: int) -> list[int]:
    grouping, plan = group_table(table), execution_plan(table, dim)
    sizes = [heads * group.pairs for group in grouping.gathered] if plan.saves_probs else []
    for group, flash in zip(grouping.strided, plan.flash):
        sizes += saved_sizes(group, flash, heads, dim)
    return sizes


def _saved_parts(saved: torch.Tensor, table: BlockTable, heads: int, dim: int):
    """Splits ``saved``: probabilities per bundle and gathered group, or None if they are not saved; those of each
    strided group."""
    grouping, plan = group_table(table), execution_plan(table, dim)
    parts = iter(saved.split_with_sizes(_sizes(table, heads, dim)))
    saved_probs = [[next(parts) for _ in bundle] for bundle in grouping.bundles] if plan.saves_probs else None
    return saved_probs, [(next(parts), next(parts)) if flash else (next(parts),) for flash in plan.flash]


def _clear(total: torch.Tensor, grouping: Grouping, ranges: tuple[tuple[int, int], ...] | None) -> None:
    """Zeros ``total`` (n, X, D) wherever groups add before any writes: in ``ranges``, everywhere for None. A single
    bundle writes everything."""
    if ranges is None or (not grouping.strided and len(grouping.bundles) > 1):
        total.zero_()
    elif grouping.strided:
        for start, stop in ranges:
            total[start:stop].zero_()


def _rows(x: torch.Tensor, split_heads: bool = False) -> torch.Tensor:
    """Views x (B, H, n, D) as (n, X, D) in the computing dtype, X being batch · heads; copies only if batch and heads
    do not merge to one stride, rows are not contiguous, or heads should be contiguous and are not."""
    if x.dtype not in (torch.float32, torch.float64):
        x = x.float()
    batch, heads, n, dim = x.shape
    by_batch, by_head, by_position, by_element = x.stride()
    stride = by_head if heads > 1 else by_batch
    even = batch == 1 or heads == 1 or by_batch == heads * by_head
    if even and by_element == 1 and dim and stride % dim == 0 and by_position % dim == 0:
        rows = x.as_strided((n, batch * heads, dim), (by_position, stride, 1))
        return rows.transpose(0, 1).contiguous().transpose(0, 1) if split_heads else rows
    return x.permute(2, 0, 1, 3).reshape(n, batch * heads, dim).contiguous()
