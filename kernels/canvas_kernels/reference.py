"""The operation in plain torch, by query range: the oracle for the fast executors, in any floating dtype.

It is not optimised. Every query range (rows with the same keys in one segment) is one matrix product, one softmax and
one matrix product, differentiated by autograd. 16-bit inputs are computed in float32, float64 inputs in float64.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from .block_table import BlockTable
from .block_table import row_scale as own_row_scale
from .ranges import expand_ranges


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
    """Computes segmented attention as defined in ``kernels/README.md``.

    ``q``, ``k``, ``v`` (B, H, n, D) in packed order; ``gain`` and ``active`` (n_edges,) and ``row_scale`` (2, n) in
    edge form only. ``dropout_p`` drops probabilities and scales the rest by 1 / (1 − p). With ``activation`` "sigmoid"
    the probabilities are σ(scale · q·k), without normalisation, and lse is +inf.

    Returns:
        ``out`` (B, H, n, D) in q's dtype and ``lse`` (B, H, n_slots), base 2, +inf for slots of inactive connections
        and rows without keys; ``lse`` has no gradient.

    >>> table = BlockTable.from_rectangles("joint", 2, 0, q_start=[0], q_stop=[1], k_start=[0], k_stop=[2], weight=[1])
    >>> x = torch.tensor([[[[1.0], [3.0]]]])
    >>> attention(torch.zeros_like(x), x, x, table, scale=1.0)[0].flatten().tolist()
    [2.0, 0.0]
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    queries, keys, values = q.to(dtype), k.to(dtype), v.to(dtype)
    ranges = table.query_ranges()
    lead = ranges.rectangle[ranges.ptr[:-1]]
    is_active = [True] * table.n_edges if active is None else (active.detach() != 0).tolist()
    if table.form == "edge":
        if row_scale is None:
            row_scale = table.row_scale(q.device, dtype) if active is None else own_row_scale(table, active, dtype)
        row_scale = row_scale.detach().to(dtype)

    lse = queries.new_full((*q.shape[:2], table.n_slots), math.inf)
    # an empty result of every input, so that a table without rectangles gives zero gradients, not None
    rows, results = [torch.arange(0, device=q.device)], [queries[:, :, :0] + keys[:, :, :0] + values[:, :, :0]]
    if gain is not None:
        results[0] = results[0] + gain[:0].sum().to(dtype)
    for c, (start, stop) in enumerate(zip(ranges.q_start.tolist(), ranges.q_stop.tolist())):
        edge = int(table.edge[lead[c]])
        if table.form == "edge" and not is_active[edge]:
            continue
        columns, weights = range_keys(table, c)
        index = torch.from_numpy(columns).to(q.device)
        own = torch.arange(start, stop, device=q.device)
        if row_scale is not None:
            # rows scaled by 0 are skipped: NaN and inf times 0 would remain
            own = own[row_scale[int(table.replace[lead[c]]), start:stop] != 0]
        # [B, H, rows, keys]
        logits = scale * (queries[:, :, own] @ keys.index_select(2, index).transpose(-1, -2))
        if table.form == "joint":
            logits = logits + torch.from_numpy(np.log(weights)).to(logits)
        if activation == "sigmoid":
            probabilities = torch.sigmoid(logits)
        else:
            slot = int(ranges.slot[c])
            lse[:, :, slot + own - start] = torch.logsumexp(logits.detach(), -1).to(dtype) / math.log(2)
            probabilities = torch.softmax(logits, -1)
        if dropout_p:
            probabilities = F.dropout(probabilities, dropout_p)
        result = probabilities @ values.index_select(2, index)
        if row_scale is not None:
            coefficient = float(table.weight[lead[c]]) * row_scale[int(table.replace[lead[c]]), own]
            if gain is not None:
                coefficient = coefficient * gain[edge].to(dtype)
            result = coefficient[:, None] * result
        rows.append(own)
        results.append(result)
    out = torch.zeros_like(queries, memory_format=torch.contiguous_format)
    return out.index_add(2, torch.cat(rows), torch.cat(results, 2)).to(q.dtype), lse


def range_keys(table: BlockTable, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the key rows of one query range, int64 [C], ascending, and their rectangles' weights, float64 [C]."""
    ranges = table.query_ranges()
    members = ranges.rectangle[ranges.ptr[number] : ranges.ptr[number + 1]]
    owner, columns = expand_ranges(table.k_start[members], table.k_stop[members] - table.k_start[members])
    return columns, table.weight[members[owner]].astype(np.float64)
