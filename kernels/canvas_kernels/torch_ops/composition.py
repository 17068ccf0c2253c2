"""Attention composed of plain torch, group by group: it can be differentiated, traced and transformed.

It runs dropout, the torch backend on devices without an executor, and every derivative beyond the first. Probabilities
of every pair are materialised, as in plain attention. Everything derived from the table comes from index maps,
constants included (maps of a single 1), so that no traced graph holds it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from ..autograd import apply_map
from ..block_table import BlockTable
from ..block_table import row_scale as table_row_scale
from ..derived import derived
from ..packing import IndexMap, gather_rows, scatter_rows
from .grouping import group_table
from .groups import GatheredGroup, StridedGroup


class GroupMaps(NamedTuple):
    """A group of shape (G, R, S, W) as maps to G · R rows, G · S · W keys and G · R · S (row, segment) entries.

    Attributes:
        rows, keys: from positions.
        edge: from connections, times the segment's weight; nothing for padding, like the next two.
        scale: from entries of the flattened row_scale.
        slot: from slots.
        offset, bias: constants (G) and (G · S · W) or None, added to lse and to the logits.
    """

    shape: tuple[int, int, int, int]
    rows: IndexMap
    keys: IndexMap
    edge: IndexMap
    scale: IndexMap
    slot: IndexMap
    offset: IndexMap
    bias: IndexMap | None


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gain: torch.Tensor | None,
    active: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    table: str,
    rows: str,
    scale: float,
    activation: str = "softmax",
    dropout_p: float = 0.0,
    differentiable_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (out, lse) like :func:`canvas_kernels.reference.attention`, in few calls.

    Arguments are those of the operator :func:`..ops.attention`. Dropout uses torch's generator. The gradient of
    lse is dropped unless ``differentiable_lse``.
    """
    block_table = BlockTable.lookup(table)
    dtype = torch.promote_types(q.dtype, torch.float32)
    inputs = tuple(x.to(dtype) for x in (q, k, v))
    if rows:
        inputs = tuple(apply_map(x, rows, False, 2) for x in inputs)
    lse = inputs[0].new_zeros(*q.shape[:2], block_table.n_slots)
    out = torch.zeros_like(inputs[0], memory_format=torch.contiguous_format)
    one, slots = q.new_ones(1, 1, dtype=dtype), q.new_zeros(block_table.n_slots, 1, dtype=dtype)
    edges = _edges(block_table, gain, active, dtype, one)
    if row_scale is None and block_table.form == "edge":
        row_scale = table_row_scale(block_table, None, dtype, q.device)
    scales = None if row_scale is None else row_scale.detach().to(dtype).reshape(-1, 1)
    for maps in maps_of_groups(block_table):
        values, own_lse, used = _attend(maps, inputs, edges, scales, one, scale, activation, dropout_p)
        own_lse = own_lse if differentiable_lse else own_lse.detach()
        out = out + scatter_rows(values, maps.rows, 2)
        lse = lse + scatter_rows(own_lse, maps.slot, 2)
        slots = slots + scatter_rows(used, maps.slot)
    lse = torch.where(slots[:, 0] > 0, lse, math.inf)
    if rows:
        out = apply_map(out, rows, True, 2)
    return out.to(q.dtype), lse


def _edges(table: BlockTable, gain, active, dtype, one) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (factor, 1 where active), (n_edges, 1) both; one connection in joint form."""
    flags = one.expand(max(table.n_edges, 1), 1)
    if active is not None:
        flags = (active.detach() != 0).to(dtype)[:, None]
    return flags if gain is None else flags * gain.to(dtype)[:, None], flags


def _attend(maps: GroupMaps, inputs, edges, scales, one, scale: float, activation: str, dropout_p: float):
    """Returns (weighted values (B, H, G · R, D), lse (B, H, G · R · S), 1 where an entry is live (G · R · S, 1)).

    Entries that are not live (padding, inactive or scaled by 0) and rows that only they use are replaced by zeros on
    the way in and out: NaN and inf times 0 would remain, in outputs or gradients.
    """
    members, n_rows, segments, width = maps.shape
    entries = (members, n_rows, segments)
    factor, live = (gather_rows(x, maps.edge).view(entries) for x in edges)
    if scales is None:
        factor = (factor != 0).to(factor.dtype)
    else:
        row_scale = gather_rows(scales, maps.scale).view(entries)
        factor, live = factor * row_scale, live * row_scale
    live = live != 0
    row_live, key_live = live.any(2, keepdim=True), live.any(1)[..., None]
    zero = one.new_zeros(())
    queries = gather_rows(inputs[0], maps.rows, 2).unflatten(2, (members, n_rows))
    queries = torch.where(row_live, queries, zero)
    keys, values = (
        torch.where(key_live[..., None], gather_rows(x, maps.keys, 2).unflatten(2, (members, segments, width)), zero)
        for x in inputs[1:]
    )
    logits = scale * (queries @ keys.flatten(3, 4).transpose(-1, -2))
    if maps.bias is not None:
        logits = logits + gather_rows(one, maps.bias).view(members, 1, segments * width)
    # [B, H, G, R, S, W]
    logits = torch.where(live[..., None], logits.unflatten(-1, (segments, width)), zero)
    lse = torch.logsumexp(logits, -1) / math.log(2)
    lse = torch.where(live, lse + gather_rows(one, maps.offset).view(members, 1, 1), zero)
    p = torch.sigmoid(logits) if activation == "sigmoid" else torch.softmax(logits, -1)
    p = F.dropout(p, dropout_p) if dropout_p else p
    p = torch.where(live[..., None], p * factor[..., None], zero)
    values = torch.where(row_live, p.flatten(-2) @ values.flatten(3, 4), zero)
    return values.flatten(2, 3), lse.flatten(2), live.to(one.dtype).reshape(-1, 1)


@derived(limit=1)
def maps_of_groups(table: BlockTable) -> list[GroupMaps]:
    """Returns every group of a table as maps."""
    return [_group_maps(table, *arrays) for arrays in group_arrays(table)]


def group_arrays(table: BlockTable) -> list[tuple]:
    """Returns (rows [G, R], keys [G, S, W], segment [G, R, S], slot [G, R, S], offset [G], bias [G, S · W] or None) of
    every group of a table; segment and slot are −1 at padding."""
    grouping = group_table(table)
    return [*map(_strided_arrays, grouping.strided), *map(_gathered_arrays, grouping.gathered)]


def _strided_arrays(group: StridedGroup):
    rows, keys = group.positions(group.row_ranges), group.positions(group.key_ranges)
    return rows, keys[:, None], group.segment[..., None], group.slot[..., None], group.offset, group.bias


def _gathered_arrays(group: GatheredGroup):
    valid = group.row_valid[..., None] & (group.segment >= 0)[:, None]
    segment = np.where(valid, group.segment[:, None], -1)
    slot = np.where(valid, group.slot[:, None] + np.arange(group.rows.shape[1])[:, None], -1)
    return group.rows, group.keys, segment, slot, group.offset, group.bias


def _group_maps(table: BlockTable, rows, keys, segment, slot, offset, bias) -> GroupMaps:
    grouping, n = group_table(table), table.n_positions
    valid = (segment >= 0).reshape(-1)
    ptr = np.concatenate([[0], np.cumsum(valid)])
    own = segment.reshape(-1)[valid]
    entry = (grouping.replace[segment] * n + rows[..., None]).reshape(-1)[valid]
    return GroupMaps(
        (*rows.shape, *keys.shape[1:]),
        IndexMap.gather(rows.reshape(-1), n),
        IndexMap.gather(keys.reshape(-1), n),
        IndexMap.sums(grouping.edge[own], ptr, max(table.n_edges, 1), grouping.weight[own]),
        IndexMap.sums(entry, ptr, 2 * n),
        IndexMap.sums(slot.reshape(-1)[valid], ptr, table.n_slots),
        IndexMap.constant(offset / math.log(2)),
        None if bias is None else IndexMap.constant(bias),
    )
