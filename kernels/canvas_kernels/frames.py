"""Tables that are nothing but equal frames, one after the other, which read themselves: dense attention over views.

Nothing is gathered or weighed there, so that on a CPU ``scaled_dot_product_attention`` on views of the canvas is all
there is to do, without a copy. Its kernel takes 32, 64 or 256 rows at once and reads rows of all heads as they lie;
batched products (:mod:`.slabs`, :mod:`.batches`) are faster for frames in between.

A small table in joint form is one frame under a mask where the rates say that this is faster: it has few calls, and
products over what is not read cost little there. As under any mask, a key that is not finite then reaches every row.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from . import costs
from .grouping import group, group_seconds
from .groups import Grouping
from .rows import lasting
from .table import BlockTable
from .tiling import expand_ranges

# Keys of different heads are copied apart for the kernel where it reads at least so many, again for each block of rows:
# 0.94 of its time for 17,776 keys, forward and backward with the copies, 1.0 for 2,100 and 1.1 for 420.
APART_KEYS = 4096
# Frames of at least so many rows, and of at most so many elements, are left to the kernel: where positions lie before
# heads, and where heads do. Its time over that of products, forward and backward, 4,096 positions and 4 heads of 64:
# positions first 16 rows 0.7, 32 0.8, 64 0.95, 84 1.02, 160 1.05, 192 0.91, 420 0.88; heads first 16 rows 0.86, 32
# 1.04, 64 1.4, 192 1.07, 256 1.01, 420 0.93. Heads of 32 as those of 64 with twice the rows, of 128 with half.
LARGE_ROWS, SMALL_ELEMENTS = (192, 256), (4096, 1536)
# Positions of a table that may run under a mask: 1 MiB of float32.
MASKED_ROWS = 512
# What a mask may be predicted to take of the time of cells: rates do not tell apart the calls of an operator, which it
# saves. Predicted / measured, forward and backward of forty random tables: 1.0 / 0.6 to 0.9, 1.2 / 0.8 to 0.9, 1.3 /
# 0.9, 1.4 / 1.0, 2.1 / 1.6.
MASKED_SHARE = 1.3


@torch.compiler.assume_constant_result
def frame_rows(key: str) -> int:
    """Rows of each frame, where equal frames that read themselves are all there is in the table of this key, or all of
    its rows where those had better run under a mask; 0 otherwise."""
    table = BlockTable.lookup(key)
    if "frames" not in table.cache:
        rows, n = _frame_rows(group(table), table.n_positions), table.n_positions
        mask = None if rows or table.form != "joint" or not 0 < n <= MASKED_ROWS else _addends(table)
        if mask is not None and _masked_seconds(n) <= MASKED_SHARE * group_seconds(group(table), n):
            rows, table.cache["mask"] = n, torch.from_numpy(mask)
        table.cache["frames"] = rows
    return table.cache["frames"]


@torch.compiler.assume_constant_result
def frame_mask(key: str, dtype: torch.dtype) -> torch.Tensor | None:
    """(n, n), addends of the logits of the table of this key where :func:`frame_rows` are those of a mask."""
    cache = BlockTable.lookup(key).cache
    if "mask" not in cache:
        return None
    if ("mask", dtype) not in cache:
        with lasting():
            cache["mask", dtype] = cache["mask"].to(dtype)
    return cache["mask", dtype]


def _addends(table: BlockTable) -> np.ndarray | None:
    """float64 (n, n): ln of the weight with which a row reads a key, −inf where it does not; None where rows read a key
    twice, or fewer than two: a gradient of q that is 0 there is rounded in the kernel."""
    rows, keys = ((stop - start).astype(np.int64) for start, stop in _sides(table))
    pairs = rows * keys
    rectangle, number = expand_ranges(np.zeros(len(pairs), np.int64), pairs)
    row, key = number // keys[rectangle], number % keys[rectangle]
    found = np.full((table.n_positions, table.n_positions), -np.inf)
    weight = table.weight[rectangle].astype(np.float64)
    found[table.q_start[rectangle] + row, table.k_start[rectangle] + key] = np.log(weight)
    read = found > -np.inf
    return found if (read.sum(1) > 1).all() and read.sum() == pairs.sum() else None


def _sides(table: BlockTable):
    return (table.q_start, table.q_stop), (table.k_start, table.k_stop)


def _masked_seconds(n: int) -> float:
    """Of a table of n positions under a mask, by which it is chosen."""
    heads, dim = costs.TYPICAL["heads"], costs.TYPICAL["head_dim"]
    return costs.seconds(costs.frame_counts(heads * n, n, dim, masked=True), costs.choosing())


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
    """Whether frames of ``rows`` rows in q (B, H, n, D) are faster by the kernel, and views of it are what it takes,
    or q itself."""
    batch, heads, n, dim = q.shape
    if n == rows > 1:
        return True
    by_batch, by_head, by_position, by_element = q.stride()
    views = by_element == 1 and (batch == 1 or by_batch == n * by_position)
    return views and pays(rows, n, dim, heads == 1 or by_head > by_position)


def pays(rows: int, n: int, head_dim: int, heads_first: bool) -> bool:
    """Whether frames of ``rows`` of n rows are faster by the kernel; ``heads_first``: as they lie in memory, or one
    head. One frame always is: 0.55 of the time of products for 32 rows, 0.8 for 96, 0.9 to 1.0 from 128 to 512, most of
    it for the calls that it saves."""
    return rows == n or rows >= LARGE_ROWS[heads_first] or rows * head_dim <= SMALL_ELEMENTS[heads_first]


def frames_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: int, scale: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention of (B, H, n, D) where each run of ``rows`` positions reads itself, under addends ``mask`` (rows, rows)
    of its logits: (B, H, n, D), positions before heads in memory."""
    batch, _, n, _ = q.shape
    if rows == n:
        if rows >= APART_KEYS:
            q, k, v = (x.contiguous() for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    # (B · frames, H, rows, D)
    frames = (x.transpose(1, 2).unflatten(1, (n // rows, rows)).flatten(0, 1).transpose(1, 2) for x in (q, k, v))
    if rows >= APART_KEYS:
        frames = (x.contiguous() for x in frames)
    out = F.scaled_dot_product_attention(*frames, scale=scale)
    return out.transpose(1, 2).reshape(batch, n, *out.shape[1:2], out.shape[3]).transpose(1, 2)
