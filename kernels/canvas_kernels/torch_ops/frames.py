"""Tables that are nothing but equal frames, one after the other, each attending to itself: dense attention over views.

There the flash kernel runs on views of the canvas, without a copy. It processes 32, 64 or 256 rows at a time; batched
products (:mod:`.strided`) are faster for frames in between.
"""

from __future__ import annotations

import numpy as np
import torch

from ..autograd import CONSTANT_FUNCTIONS
from ..block_table import BlockTable
from ..derived import derived
from .flash import flash_backward, flash_forward
from .grouping import group_table

# With at least so many keys, heads are copied to be contiguous: the kernel loads keys again for each block of rows.
SPLIT_HEADS_KEYS = 4096
# Frames of at least so many rows, or at most so many elements, run by the kernel: (positions before heads in memory,
# heads first).
MIN_ROWS, MAX_ELEMENTS = (192, 256), (4096, 1536)


def frame_rows(key: str) -> int:
    """Returns the number of rows per frame if the table with this key consists of equal frames that attend to
    themselves; 0 otherwise."""
    return _frame_rows(BlockTable.lookup(key))


# compilers evaluate it once
CONSTANT_FUNCTIONS.append(frame_rows)


@derived(limit=1)
def _frame_rows(table: BlockTable) -> int:
    grouping, n = group_table(table), table.n_positions
    if len(grouping.strided) != 1 or grouping.bundles or grouping.strided[0].bias is not None:
        return 0
    (group,) = grouping.strided
    rows, keys = (group.positions(ranges) for ranges in (group.row_ranges, group.key_ranges))
    whole = rows.shape == keys.shape and all(np.array_equal(side.ravel(), np.arange(n)) for side in (rows, keys))
    return rows.shape[1] if whole else 0


def use_frames(q: torch.Tensor, rows: int) -> bool:
    """Whether frames of ``rows`` rows in q (B, H, n, D) are views that the kernel supports, and faster by it."""
    batch, heads, n, dim = q.shape
    if n == rows:
        return rows > 1
    by_batch, by_head, by_position, by_element = q.stride()
    views = by_element == 1 and (batch == 1 or by_batch == n * by_position)
    return views and is_profitable(rows, n, dim, heads == 1 or by_head > by_position)


def is_profitable(rows: int, n: int, head_dim: int, heads_first: bool) -> bool:
    """Whether frames of ``rows`` of n rows are faster by the kernel; one frame always is."""
    side = 1 if heads_first else 0
    return rows == n or rows >= MIN_ROWS[side] or rows * head_dim <= MAX_ELEMENTS[side]


def forward(q, k, v, rows: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns attention of (B, H, n, D) within each frame of ``rows`` positions: (out, natural log-sum-exp (B, H, n)),
    both with positions before heads in memory."""
    queries, keys, values = (_split_heads(_frames(x, rows)) for x in (q, k, v))
    out, lse = flash_forward(queries, keys, values, scale)
    return _canvas(out, q), _canvas(lse, q)


def backward(grad_out, q, k, v, out, lse, rows: int, scale: float) -> tuple[torch.Tensor, ...]:
    """Returns the gradients of q, k and v from the results of :func:`forward`; positions before heads in memory."""
    grad, queries, keys, values = (_split_heads(_frames(x, rows)) for x in (grad_out, q, k, v))
    out, lse = _frames(out, rows), _frames(lse, rows)
    return tuple(_canvas(x, q) for x in flash_backward(grad, queries, keys, values, out, lse, scale))


def _frames(x: torch.Tensor, rows: int) -> torch.Tensor:
    """Views (B, H, n, …) as (B · frames, H, rows, …)."""
    n = x.shape[2]
    if rows < n:
        x = x.transpose(1, 2).unflatten(1, (n // rows, rows)).flatten(0, 1).transpose(1, 2)
    return x


def _split_heads(x: torch.Tensor) -> torch.Tensor:
    """Copies large frames (…, rows, D) so that heads are contiguous."""
    return x.contiguous() if x.shape[2] >= SPLIT_HEADS_KEYS else x


def _canvas(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Reshapes (B · frames, H, rows, …) to (B, H, n, …), positions before heads in memory."""
    batch, heads, n, _ = q.shape
    return x.transpose(1, 2).contiguous().view(batch, n, heads, *x.shape[3:]).transpose(1, 2)
