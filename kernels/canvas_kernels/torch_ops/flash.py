"""torch's flash kernel for CPUs, called by name for its log-sum-exp."""

from __future__ import annotations

import torch

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def flash_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns dense attention of q (batch, heads, n, D) over k and v (batch, heads, m, D): (out, natural log-sum-exp
    (batch, heads, n)), both with positions before heads in memory. ``mask``: addends (batch, heads or 1, n, m)."""
    q, k, v = map(_unit_stride, (q, k, v))
    return _forward(q, k, v, attn_mask=None if mask is None else _unit_stride(mask), scale=scale)


def flash_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of q, k and v from the results of :func:`flash_forward`."""
    grad, q, k, v = map(_unit_stride, (grad, q, k, v))
    mask = None if mask is None else _unit_stride(mask)
    return _backward(grad, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=scale)


def _unit_stride(x: torch.Tensor) -> torch.Tensor:
    # the kernel ignores the stride of elements
    return x if x.stride(-1) == 1 else x.contiguous()
