"""Attention composed of plain torch, group by group: whatever can be differentiated, traced or transformed.

It is how dropout runs, the torch backend on devices without an executor of their own, and every derivative beyond the
first. Probabilities of every pair are held in memory, as in plain attention. All that is derived from the table comes
in through index maps, constants included (maps of a single 1), so that nothing of it appears in a traced graph.
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
from .grouping import group
from .groups import Batch, Slab


class Part(NamedTuple):
    """G cells of R rows that attend to S segments of W keys, as maps to G · R rows, G · S · W keys, G · R · S entries.

    ``rows`` and ``keys`` take positions. ``edge`` takes a connection's value times the segment's weight, ``scale`` an
    entry of the flattened row_scale and ``slot`` a slot; the three have nothing for padding. ``offset`` (G) and
    ``bias`` (G · S · W, or None) are constants, addends of lse and of the logits.
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) as :func:`canvas_kernels.reference.attention` gives them, in few calls; arguments as for the operator
    :func:`..ops.attention`. Random numbers of dropout come from torch's generator."""
    found = BlockTable.lookup(table)
    dtype = torch.promote_types(q.dtype, torch.float32)
    inputs = tuple(x.to(dtype) for x in (q, k, v))
    if rows:
        inputs = tuple(apply_map(x, rows, False, 2) for x in inputs)
    lse = inputs[0].new_zeros(*q.shape[:2], found.n_slots)
    out = torch.zeros_like(inputs[0], memory_format=torch.contiguous_format)
    one, slots = q.new_ones(1, 1, dtype=dtype), q.new_zeros(found.n_slots, 1, dtype=dtype)
    edges = _edges(found, gain, active, dtype, one)
    if row_scale is None and found.form == "edge":
        row_scale = table_row_scale(found, None, dtype, q.device)
    scales = None if row_scale is None else row_scale.detach().to(dtype).reshape(-1, 1)
    for part in parts_of(found):
        piece, part_lse, used = _attend(part, inputs, edges, scales, one, scale, activation, dropout_p)
        out = out + scatter_rows(piece, part.rows, 2)
        lse = lse + scatter_rows(part_lse, part.slot, 2)
        slots = slots + scatter_rows(used, part.slot)
    lse = torch.where(slots[:, 0] > 0, lse, math.inf)
    if rows:
        out = apply_map(out, rows, True, 2)
    return out.to(q.dtype), lse


def _edges(table: BlockTable, gain, active, dtype, one) -> tuple[torch.Tensor, torch.Tensor]:
    """(factor, 1 where active), (n_edges, 1) both; one connection in joint form."""
    flags = one.expand(max(table.n_edges, 1), 1)
    if active is not None:
        flags = (active.detach() != 0).to(dtype)[:, None]
    return flags if gain is None else flags * gain.to(dtype)[:, None], flags


def _attend(part: Part, inputs, edges, scales, one, scale: float, activation: str, dropout_p: float):
    """(weighted values (B, H, G · R, D), lse (B, H, G · R · S), 1 where an entry is live (G · R · S, 1)).

    Entries that are not live (padding, inactive or scaled by 0) and what only they touch are replaced by zeros on the
    way in and out: times 0, what is not finite would stay, in outputs or in gradients.
    """
    units, n_rows, segments, width = part.shape
    entries = (units, n_rows, segments)
    factor, live = (gather_rows(x, part.edge).view(entries) for x in edges)
    if scales is None:
        factor = (factor != 0).to(factor.dtype)
    else:
        row_scale = gather_rows(scales, part.scale).view(entries)
        factor, live = factor * row_scale, live * row_scale
    live = live != 0
    row_live, key_live = live.any(2, keepdim=True), live.any(1)[..., None]
    zero = one.new_zeros(())
    queries = gather_rows(inputs[0], part.rows, 2).unflatten(2, (units, n_rows))
    queries = torch.where(row_live, queries, zero)
    keys, values = (
        torch.where(key_live[..., None], gather_rows(x, part.keys, 2).unflatten(2, (units, segments, width)), zero)
        for x in inputs[1:]
    )
    logits = scale * (queries @ keys.flatten(3, 4).transpose(-1, -2))
    if part.bias is not None:
        logits = logits + gather_rows(one, part.bias).view(units, 1, segments * width)
    # [B, H, G, R, S, W]
    logits = torch.where(live[..., None], logits.unflatten(-1, (segments, width)), zero)
    lse = torch.logsumexp(logits.detach(), -1) / math.log(2)
    lse = torch.where(live, lse + gather_rows(one, part.offset).view(units, 1, 1), zero)
    p = torch.sigmoid(logits) if activation == "sigmoid" else torch.softmax(logits, -1)
    p = F.dropout(p, dropout_p) if dropout_p else p
    p = torch.where(live[..., None], p * factor[..., None], zero)
    piece = torch.where(row_live, p.flatten(-2) @ values.flatten(3, 4), zero)
    return piece.flatten(2, 3), lse.flatten(2), live.to(one.dtype).reshape(-1, 1)


@derived(limit=1)
def parts_of(table: BlockTable) -> list[Part]:
    """Returns every group of a table as maps."""
    return [_part(table, *part) for part in group_arrays(table)]


def group_arrays(table: BlockTable) -> list[tuple]:
    """Returns (rows [G, R], keys [G, S, W], segment [G, R, S], slot [G, R, S], offset [G], bias [G, S · W] or None) of
    every group of a table; segment and slot are −1 at padding."""
    grouping = group(table)
    return [_slab_arrays(slab) for slab in grouping.slabs] + [_batch_arrays(batch) for batch in grouping.batches]


def _slab_arrays(slab: Slab):
    rows, keys = slab.positions(slab.row_ranges), slab.positions(slab.key_ranges)
    return rows, keys[:, None], slab.segment[..., None], slab.slot[..., None], slab.offset, slab.bias


def _batch_arrays(batch: Batch):
    real = batch.row_valid[..., None] & (batch.segment >= 0)[:, None]
    segment = np.where(real, batch.segment[:, None], -1)
    slot = np.where(real, batch.slot[:, None] + np.arange(batch.rows.shape[1])[:, None], -1)
    return batch.rows, batch.keys, segment, slot, batch.offset, batch.bias


def _part(table: BlockTable, rows, keys, segment, slot, offset, bias) -> Part:
    grouping, n = group(table), table.n_positions
    real = (segment >= 0).reshape(-1)
    ptr = np.concatenate([[0], np.cumsum(real)])
    own = segment.reshape(-1)[real]
    entry = (grouping.replace[segment] * n + rows[..., None]).reshape(-1)[real]
    return Part(
        (*rows.shape, *keys.shape[1:]),
        IndexMap.gather(rows.reshape(-1), n),
        IndexMap.gather(keys.reshape(-1), n),
        IndexMap.sums(grouping.edge[own], ptr, max(table.n_edges, 1), grouping.weight[own]),
        IndexMap.sums(entry, ptr, 2 * n),
        IndexMap.sums(slot.reshape(-1)[real], ptr, table.n_slots),
        IndexMap.constant(offset / math.log(2)),
        None if bias is None else IndexMap.constant(bias),
    )
