"""The torch executor with dropout on the probabilities: the same slabs and batches, differentiated by autograd.

Probabilities of every pair are held in memory, as in plain attention with dropout.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from .grouping import group
from .groups import Batch, Slab
from .indices import Indices, indices_of
from .table import BlockTable


class Part(NamedTuple):
    """G units of R rows that read S segments of W keys, on the device. ``segment`` [G, R, S] is the number of segments
    and ``scale`` [G, R, S] is 2 n (an entry of the flattened row_scale) where there is only padding; ``slot`` −1
    there."""

    rows: torch.Tensor
    keys: torch.Tensor
    segment: torch.Tensor
    scale: torch.Tensor
    slot: torch.Tensor
    offset: torch.Tensor
    bias: torch.Tensor | None


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: BlockTable,
    *,
    scale: float,
    gain: torch.Tensor | None = None,
    active: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    activation: str = "softmax",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) as :func:`canvas_kernels.reference.attention`, in few calls; random numbers from torch's generator."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    queries, keys, values = q.to(dtype), k.to(dtype), v.to(dtype)
    batch, heads, n, _ = q.shape
    lse = queries.new_full((batch, heads, table.n_slots), math.inf)
    out = torch.zeros_like(queries, memory_format=torch.contiguous_format)
    if n == 0:
        return out.to(q.dtype), lse
    indices = indices_of(table, queries.new_empty(n, batch * heads, 0))
    coefficient = scales = None
    if table.form == "edge":
        weight, edge = indices.segments()
        if gain is not None:
            weight = weight * gain.to(dtype)[edge]
        if active is not None:
            weight = weight * (active.detach() != 0).to(dtype)[edge]
        row_scale = indices.row_scale(active) if row_scale is None else row_scale
        coefficient = F.pad(weight, (0, 1))
        scales = F.pad(row_scale.detach().to(dtype).reshape(-1), (0, 1))
    for part in parts_of(table, indices):
        units = len(part.rows)
        segments, width = part.keys.shape[1:]
        # [B, H, G, R or S·W, D]
        gathered = [
            x.index_select(2, index.reshape(-1)).unflatten(2, (units, -1))
            for x, index in ((queries, part.rows), (keys, part.keys), (values, part.keys))
        ]
        logits = scale * (gathered[0] @ gathered[1].transpose(-1, -2))
        if part.bias is not None:
            logits = logits + part.bias
        logits = logits.unflatten(-1, (segments, width))
        found = torch.logsumexp(logits.detach(), -1) / math.log(2) + part.offset[:, None, None]
        real = (part.slot >= 0).reshape(-1).nonzero().view(-1)
        lse.index_copy_(2, part.slot.reshape(-1)[real], found.flatten(2)[:, :, real])
        p = torch.sigmoid(logits) if activation == "sigmoid" else torch.softmax(logits, -1)
        p = F.dropout(p, dropout_p)
        # [G, R, S, 1]
        if coefficient is None:
            factor = (part.slot >= 0).to(dtype)[..., None]
        else:
            factor = (coefficient[part.segment] * scales[part.scale])[..., None]
        piece = (p * factor).flatten(-2) @ gathered[2]
        out = out.index_add(2, part.rows.reshape(-1), piece.flatten(2, 3))
    if active is not None:
        off = (active == 0).repeat_interleave(table.slot_layout(q.device).per_edge)
        lse = lse.masked_fill(off, math.inf)
    return out.to(q.dtype), lse


def parts_of(table: BlockTable, indices: Indices) -> list[Part]:
    """Every slab and batch of a table, made once per dtype and device."""
    key = ("dropout", indices.dtype, indices.device)
    if key not in table.cache:
        grouping = group(table)
        arrays = [_slab_arrays(slab) for slab in grouping.slabs] + [_batch_arrays(batch) for batch in grouping.batches]
        table.cache[key] = [_part(*part, table, indices) for part in arrays]
    return table.cache[key]


def _slab_arrays(slab: Slab):
    rows, keys = slab.positions(slab.row_ranges), slab.positions(slab.key_ranges)
    return rows, keys[:, None], slab.segment[..., None], slab.slot[..., None], slab.offset, slab.bias


def _batch_arrays(batch: Batch):
    real = batch.row_valid[..., None] & (batch.segment >= 0)[:, None]
    segment = np.where(real, batch.segment[:, None], -1)
    slot = np.where(real, batch.slot[:, None] + np.arange(batch.rows.shape[1])[:, None], -1)
    return batch.rows, batch.keys, segment, slot, batch.offset, batch.bias


def _part(rows, keys, segment, slot, offset, bias, table: BlockTable, indices: Indices) -> Part:
    grouping, n = indices.grouping, table.n_positions
    entry = np.where(segment < 0, 2 * n, grouping.replace[segment] * n + rows[..., None])
    segment = np.where(segment < 0, len(grouping.weight), segment)
    tensors = [indices.tensor(array) for array in (rows, keys, segment, entry, slot)]
    offset = indices.tensor(offset).to(indices.dtype) / math.log(2)
    bias = None if bias is None else indices.tensor(bias).to(indices.dtype)[:, None]
    return Part(*tensors, offset, bias)
