"""A mask of keys for each sample, over one table for all: Triton's kernels read it; for other executors masked keys are
logits of a further dimension."""

from __future__ import annotations

from typing import Any

import torch

from .block_table import BlockTable


def check_key_mask(key_mask: Any, q: torch.Tensor, table: BlockTable, return_lse: bool) -> None:
    """Checks a call's ``key_mask``.

    Raises:
        ValueError: an edge-form table, a log-sum-exp to return, or a mask that is not bool (batch, positions).
    """
    if table.form != "joint":
        raise ValueError("key_mask belongs to the joint form: in edge form a connection at 0 in active= is left out")
    if return_lse:
        raise ValueError("key_mask and return_lse exclude each other: masked keys are logits of a further dimension")
    shape = (q.shape[0], q.shape[2])
    if not isinstance(key_mask, torch.Tensor):
        raise ValueError(f"key_mask must be a bool tensor {shape}, got {key_mask!r}")
    if key_mask.dtype != torch.bool or tuple(key_mask.shape) != shape or key_mask.device != q.device:
        given = f"{key_mask.dtype} {tuple(key_mask.shape)} on {key_mask.device}"
        raise ValueError(f"key_mask must be bool {shape} (batch, positions) on {q.device}, got {given}")


def clear_keys(k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns k and v (batch, heads, n, D) with 0 in masked rows, which then have no gradient either."""
    keep, zero = key_mask[:, None, :, None], k.new_zeros(())
    return torch.where(keep, k, zero), torch.where(keep, v, zero)


def mask_keys(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns q, k and v (batch, heads, n, D + 1), whose attention has 0 in its last dimension.

    In the further dimension q is 1 and a masked key so low that its probability is 0 in every executor. Masked keys
    and values are 0 besides: what they hold is not attended to, and rows that lose every key are 0.

    Args:
        q, k, v: (batch, heads, n, D).
        key_mask: bool (batch, n), False for masked keys.
        dtype: what executors compute from, which bounds the addend.
    """
    lowest = -min(torch.finfo(dtype).max / 4, 1e9)
    keep = key_mask[:, None, :, None]
    zero = k.new_zeros(())
    addend = torch.where(keep, zero, k.new_full((), lowest)).expand(*k.shape[:3], 1)
    q = torch.cat([q, q.new_ones(()).expand(*q.shape[:3], 1)], -1)
    k, v = clear_keys(k, v, key_mask)
    return q, torch.cat([k, addend], -1), torch.cat([v, zero.expand(*v.shape[:3], 1)], -1)
