"""The operation in plain torch, cell by cell: the oracle for the fast executors, in any floating dtype.

Nothing here is tuned. Every cell (query rows that see the same keys in one segment) is one matrix product, one softmax
and one matrix product, differentiated by autograd. 16-bit inputs are computed in float32, float64 inputs in float64.
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
    """Segmented attention as ``kernels/README.md`` defines it.

    ``q``, ``k``, ``v`` (B, H, n, D) in packed order; ``gain`` and ``active`` (n_edges,) and ``row_scale`` (2, n) in
    edge form only. ``dropout_p`` drops probabilities and scales the rest by 1 / (1 − p). With ``activation`` "sigmoid"
    the probabilities are σ(scale · q·k), without a normaliser, and lse means nothing: it stays +inf. Returns
    ``out`` (B, H, n, D) in q's dtype and ``lse`` (B, H, n_slots), base 2, +inf for slots of inactive edges and rows
    without keys; ``lse`` carries no gradient.

    >>> table = BlockTable.from_rectangles("joint", 2, 0, q_start=[0], q_stop=[1], k_start=[0], k_stop=[2], weight=[1])
    >>> x = torch.tensor([[[[1.0], [3.0]]]])
    >>> attention(torch.zeros_like(x), x, x, table, scale=1.0)[0].flatten().tolist()
    [2.0, 0.0]
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    queries, keys, values = q.to(dtype), k.to(dtype), v.to(dtype)
    cells = table.cells()
    lead = cells.rectangle[cells.ptr[:-1]]
    is_active = [True] * table.n_edges if active is None else (active.detach() != 0).tolist()
    if table.form == "edge":
        if row_scale is None:
            row_scale = table.row_scale(q.device, dtype) if active is None else own_row_scale(table, active, dtype)
        row_scale = row_scale.detach().to(dtype)

    lse = queries.new_full((*q.shape[:2], table.n_slots), math.inf)
    # an empty piece ties the result to every input, so that a table without rectangles gives zero gradients, not none
    rows, pieces = [torch.arange(0, device=q.device)], [queries[:, :, :0] + keys[:, :, :0] + values[:, :, :0]]
    if gain is not None:
        pieces[0] = pieces[0] + gain[:0].sum().to(dtype)
    for c, (start, stop) in enumerate(zip(cells.q_start.tolist(), cells.q_stop.tolist())):
        edge = int(table.edge[lead[c]])
        if table.form == "edge" and not is_active[edge]:
            continue
        columns, weights = cell_keys(table, c)
        index = torch.from_numpy(columns).to(q.device)
        own = slice(start, stop)
        if table.form == "edge":
            # rows that are scaled by 0 are left out: times 0, what is not finite would stay
            own = start + (row_scale[int(table.replace[lead[c]]), start:stop] != 0).nonzero()[:, 0]
        # [B, H, rows, keys]
        logits = scale * (queries[:, :, own] @ keys.index_select(2, index).transpose(-1, -2))
        if table.form == "joint":
            logits = logits + torch.from_numpy(np.log(weights)).to(logits)
        if activation == "sigmoid":
            probabilities = torch.sigmoid(logits)
        else:
            slot = int(cells.slot[c])
            slots = slice(slot, slot + stop - start) if table.form == "joint" else slot + own - start
            lse[:, :, slots] = torch.logsumexp(logits.detach(), -1).to(dtype) / math.log(2)
            probabilities = torch.softmax(logits, -1)
        if dropout_p:
            probabilities = F.dropout(probabilities, dropout_p)
        piece = probabilities @ values.index_select(2, index)
        if table.form == "edge":
            coefficient = float(table.weight[lead[c]]) * row_scale[int(table.replace[lead[c]]), own]
            if gain is not None:
                coefficient = coefficient * gain[edge].to(dtype)
            piece = coefficient[:, None] * piece
        rows.append(torch.arange(start, stop, device=q.device) if table.form == "joint" else own)
        pieces.append(piece)
    out = torch.zeros_like(queries, memory_format=torch.contiguous_format)
    return out.index_add(2, torch.cat(rows), torch.cat(pieces, 2)).to(q.dtype), lse


def cell_keys(table: BlockTable, cell: int) -> tuple[np.ndarray, np.ndarray]:
    """(columns int64 [C], weights float64 [C]): the key rows of one cell, ascending, and their rectangles' weights."""
    cells = table.cells()
    members = cells.rectangle[cells.ptr[cell] : cells.ptr[cell + 1]]
    owner, columns = expand_ranges(table.k_start[members], table.k_stop[members] - table.k_start[members])
    return columns, table.weight[members[owner]].astype(np.float64)
