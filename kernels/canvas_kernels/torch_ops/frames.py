"""Tables that are nothing but equal frames, one after the other, each attending to itself: dense attention over views.

Nothing is gathered or weighed there, so on a CPU the flash kernel on views of the canvas is all there is to do, without
a copy. It takes 32, 64 or 256 rows at once and reads rows of all heads as they lie; batched products (:mod:`.strided`)
are faster for frames in between.
"""

from __future__ import annotations

import numpy as np
import torch

from ..autograd import CONSTANT_FUNCTIONS
from ..block_table import BlockTable
from ..derived import derived
from .flash import flash_backward, flash_forward
from .grouping import group

# Keys of different heads are copied apart for the kernel where it reads at least so many, again for each block of rows.
APART_KEYS = 4096
# Frames of at least so many rows, and of at most so many elements, are left to the kernel: where positions lie before
# heads, and where heads do.
LARGE_ROWS, SMALL_ELEMENTS = (192, 256), (4096, 1536)

def frame_rows(key: str) -> int:
    """Returns the rows of each frame of the table with this key where equal frames that attend to themselves, once, are
    all that is in it; 0 otherwise."""
    return _frame_rows(BlockTable.lookup(key))


# a compiler asks it once
CONSTANT_FUNCTIONS.append(frame_rows)


@derived(limit=1)
def _frame_rows(table: BlockTable) -> int:
    grouping, n = group(table), table.n_positions
    if len(grouping.slabs) != 1 or grouping.stages or grouping.slabs[0].bias is not None:
        return 0
    (slab,) = grouping.slabs
    rows, keys = (slab.positions(ranges) for ranges in (slab.row_ranges, slab.key_ranges))
    whole = rows.shape == keys.shape and all(np.array_equal(side.ravel(), np.arange(n)) for side in (rows, keys))
    return rows.shape[1] if whole else 0


def takes_frames(q: torch.Tensor, rows: int) -> bool:
    """Whether frames of ``rows`` rows in q (B, H, n, D) are faster by the kernel, and views of it are what it takes,
    or q itself."""
    batch, heads, n, dim = q.shape
    if n == rows:
        return rows > 1
    by_batch, by_head, by_position, by_element = q.stride()
    views = by_element == 1 and (batch == 1 or by_batch == n * by_position)
    return views and pays(rows, n, dim, heads == 1 or by_head > by_position)


def pays(rows: int, n: int, head_dim: int, heads_first: bool) -> bool:
    """Whether frames of ``rows`` of n rows are faster by the kernel; ``heads_first``: as they lie in memory, or one
    head. One frame always is."""
    side = 1 if heads_first else 0
    return rows == n or rows >= LARGE_ROWS[side] or rows * head_dim <= SMALL_ELEMENTS[side]


def forward(q, k, v, rows: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of (B, H, n, D) where each run of ``rows`` positions attends to itself: (out, natural log-sum-exp (B,
    H, n)), both with positions before heads in memory."""
    out, lse = flash_forward(*(_apart(_frames(x, rows)) for x in (q, k, v)), scale)
    return _canvas(out, q), _canvas(lse, q)


def backward(grad_out, q, k, v, out, lse, rows: int, scale: float) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k and v from what :func:`forward` gave; positions before heads in memory."""
    inputs = (_apart(_frames(x, rows)) for x in (grad_out, q, k, v))
    results = (_frames(x, rows) for x in (out, lse))
    return tuple(_canvas(x, q) for x in flash_backward(*inputs, *results, scale))


def _frames(x: torch.Tensor, rows: int) -> torch.Tensor:
    """(B, H, n, …) as (B · frames, H, rows, …), a view of what lies as the canvas does."""
    n = x.shape[2]
    if rows < n:
        x = x.transpose(1, 2).unflatten(1, (n // rows, rows)).flatten(0, 1).transpose(1, 2)
    return x


def _apart(x: torch.Tensor) -> torch.Tensor:
    """Frames (…, rows, D), copied head by head where they are large."""
    return x.contiguous() if x.shape[2] >= APART_KEYS else x


def _canvas(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """(B · frames, H, rows, …) as (B, H, n, …), positions before heads in memory."""
    batch, heads, n, _ = q.shape
    return x.transpose(1, 2).contiguous().view(batch, n, heads, *x.shape[3:]).transpose(1, 2)
