"""Softmax attention of every query over every key, differentiable to any order."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..autograd import OPERATIONS, Operation, operate
from ..ops import autocast_dtype
from .flash import flash_backward, flash_forward


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, dropout_p: float = 0.0
) -> torch.Tensor:
    """Returns softmax(q kᵀ / √head_dim) v: q (batch, heads, n, head_dim), k and v (batch, heads, m, head_dim).

    It is ``scaled_dot_product_attention``, whose CPU kernel has neither second derivatives nor tangents: these are
    composed of plain torch. On GPUs wrap the step in ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`` for these.

    Args:
        q, k, v: queries, keys and values of one floating dtype.
        mask: bool or addends, broadcast to (batch, heads, n, m).
        dropout_p: probability of dropping an attention weight.
    """
    if not dropout_p and q.is_cpu and q.numel() and k.numel():
        if mask is not None:
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -math.inf)
            mask = mask.expand(*q.shape[:3], k.shape[2])
        return operate("dense_attention", *(x.to(autocast_dtype(x)) for x in (q, k, v)), mask, q.shape[-1] ** -0.5)[0]
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout_p)


def _compose(q, k, v, mask, scale):
    logits = scale * (q @ k.transpose(-1, -2))
    return torch.softmax(logits if mask is None else logits + mask, -1) @ v


def _forward(keep, q, k, v, mask, scale):
    return flash_forward(q, k, v, scale, mask)


def _backward(grad, needs, saved, q, k, v, mask, scale):
    out, lse = saved
    return *flash_backward(grad, q, k, v, out, lse, scale, mask), None


OPERATIONS["dense_attention"] = Operation(
    forward=_forward,
    backward=_backward,
    composition=_compose,
    n_tensors=4,
    differentiable=(0, 1, 2),
    keeps_result=lambda *args: True,
)
