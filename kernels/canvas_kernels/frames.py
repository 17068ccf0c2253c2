"""Tables that are nothing but equal frames, one after the other, which read themselves: dense attention over views.

Nothing is gathered or weighed there, so that on a CPU ``scaled_dot_product_attention`` on views of the canvas is all
there is to do, without a copy. Its kernel takes 32, 64 or 256 rows at once and reads rows of all heads as they lie;
batched products (:mod:`.slabs`, :mod:`.batches`) are faster for frames in between.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from .grouping import group
from .groups import Grouping
from .table import BlockTable

# Keys of different heads are copied apart for the kernel where it reads at least so many, again for each block of rows:
# 0.94 of its time for 17,776 keys, forward and backward with the copies, 1.0 for 2,100 and 1.1 for 420.
APART_KEYS = 4096
# Frames of at least so many rows, and of at most so many elements, are left to the kernel: where positions lie before
# heads, and where heads do. Its time over that of products, forward and backward, 4,096 positions and 4 heads of 64:
# positions first 16 rows 0.7, 32 0.8, 64 0.95, 84 1.02, 160 1.05, 192 0.91, 420 0.88; heads first 16 rows 0.86, 32
# 1.04, 64 1.4, 192 1.07, 256 1.01, 420 0.93. Heads of 32 as those of 64 with twice the rows, of 128 with half.
LARGE_ROWS, SMALL_ELEMENTS = (192, 256), (4096, 1536)


@torch.compiler.assume_constant_result
def frame_rows(key: str) -> int:
    """Rows of each frame, where equal frames that read themselves are all there is in the table of this key; 0
    otherwise."""
    table = BlockTable.lookup(key)
    if "frames" not in table.cache:
        table.cache["frames"] = _frame_rows(group(table), table.n_positions)
    return table.cache["frames"]


def _frame_rows(grouping: Grouping, n: int) -> int:
    if len(grouping.slabs) == 1 and not grouping.stages:
        (slab,) = grouping.slabs
        sides = slab.positions(slab.row_ranges), slab.positions(slab.key_ranges)
        plain = slab.bias is None
    elif grouping.stages and not grouping.slabs and len({batch.shape[1:] for batch in grouping.batches}) == 1:
        batches = grouping.batches
        sides = np.concatenate([batch.rows for batch in batches]), np.concatenate([batch.keys for batch in batches])
        plain = all(batch.bias is None and batch.row_valid.all() for batch in batches)
        sides = sides[0], sides[1].reshape(len(sides[1]), -1)
    else:
        return 0
    whole = plain and all(np.array_equal(side.ravel(), np.arange(n)) for side in sides)
    return sides[0].shape[1] if whole and sides[0].shape == sides[1].shape else 0


def takes_frames(q: torch.Tensor, rows: int) -> bool:
    """Whether frames of ``rows`` rows in q (B, H, n, D) are faster by the kernel, and views of it are what it takes."""
    by_batch, by_head, by_position, by_element = q.stride()
    batch, heads, n, dim = q.shape
    views = by_element == 1 and (batch == 1 or by_batch == n * by_position)
    return views and pays(rows, dim, heads == 1 or by_head > by_position)


def pays(rows: int, head_dim: int, heads_first: bool) -> bool:
    """Whether frames of ``rows`` rows are faster by the kernel; ``heads_first``: as they lie in memory, or one head."""
    return rows >= LARGE_ROWS[heads_first] or rows * head_dim <= SMALL_ELEMENTS[heads_first]


def frames_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: int, scale: float) -> torch.Tensor:
    """Attention of (B, H, n, D) where each run of ``rows`` positions reads itself: (B, H, n, D), positions before heads
    in memory."""
    batch, _, n, _ = q.shape
    # (B · frames, H, rows, D)
    frames = (x.transpose(1, 2).unflatten(1, (n // rows, rows)).flatten(0, 1).transpose(1, 2) for x in (q, k, v))
    if rows >= APART_KEYS:
        frames = (x.contiguous() for x in frames)
    out = F.scaled_dot_product_attention(*frames, scale=scale)
    return out.transpose(1, 2).reshape(batch, n, *out.shape[1:2], out.shape[3]).transpose(1, 2)
