"""Linear layers into heads and out of them.

On a CPU the torch executor is fastest where each head's rows lie together, so there one batched product makes them that
way, and takes their gradients, without a copy. µs for 1,152 positions, 256 wide, 12 heads of 64, one thread, in place
of one product over all heads: forward 4,600 / 4,600, the weights' gradient 4,200 / 5,400, the inputs' 4,900 / 4,300.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .transforms import Function, autocast, transformed


def project_heads(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, parts: int, heads: int
) -> tuple[torch.Tensor, ...]:
    """``parts`` linear layers of x (B, n, width), their ``weight`` (parts · heads · D, width) and ``bias`` in one:
    (B, heads, n, D) each, heads before positions in memory on a CPU.

    >>> x, weight = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[1.0], [10.0]])
    >>> [part.flatten().tolist() for part in project_heads(x, weight, torch.zeros(2), 2, 1)]
    [[1.0, 2.0], [10.0, 20.0]]
    """
    if _by_head(x):
        return _ProjectHeads.call(*autocast(x, weight, bias), parts, heads)
    return split_heads(F.linear(x, weight, bias), parts, heads)


def linear_of_heads(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The linear layer of x (B, heads, n, D) with its heads side by side: (B, n, width), for ``weight`` (width, heads ·
    D) and ``bias`` (width,).

    >>> x = torch.tensor([[[[1.0]], [[2.0]]]])
    >>> linear_of_heads(x, torch.tensor([[1.0, 10.0]])).flatten().tolist()
    [21.0]
    """
    x = x.transpose(1, 2)
    if not _by_head(x):
        return F.linear(x.flatten(2), weight, bias)
    x, weight, bias = autocast(x, weight, bias)
    return _LinearOfHeads.call(x.contiguous(), weight, bias)


def split_heads(x: torch.Tensor, parts: int, heads: int) -> tuple[torch.Tensor, ...]:
    """x (B, n, parts · heads · D) as ``parts`` views (B, heads, n, D).

    >>> split_heads(torch.arange(8.0).view(1, 2, 4), 2, 2)[1].tolist()
    [[[[2.0], [6.0]], [[3.0], [7.0]]]]
    """
    return _SplitHeads.call(x, parts, heads)


def _by_head(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and x.numel() > 0


class _ProjectHeads(Function):
    @staticmethod
    def forward(x, weight, bias, parts, heads):
        batch, n, width = x.shape
        lanes = parts * heads
        out = torch.bmm(_lanes(x, lanes), weight.view(lanes, -1, width).transpose(1, 2))
        out += bias.view(lanes, 1, -1)
        return out.view(parts, heads, batch, n, -1).transpose(1, 2).unbind()

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, _, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, *grads):
        x, weight = ctx.saved_tensors
        d_x = d_weight = d_bias = None
        whole = _one_stack(grads)
        if whole is None:
            # (parts · heads, B · n, D)
            whole = torch.stack([grad.transpose(0, 1) for grad in grads]).flatten(2, 3).flatten(0, 1)
        if ctx.needs_input_grad[0]:
            d_x = (whole.transpose(0, 1).flatten(1) @ weight).view(x.shape)
        if ctx.needs_input_grad[1]:
            d_weight = torch.bmm(whole.transpose(1, 2), _lanes(x, len(whole))).view(weight.shape)
        if ctx.needs_input_grad[2]:
            d_bias = _column_sums(whole).flatten()
        return d_x, d_weight, d_bias, None, None


class _LinearOfHeads(Function):
    """Of x (B, n, heads, D), contiguous."""

    @staticmethod
    def forward(x, weight, bias):
        return F.linear(x.flatten(2), weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        batch, n, heads, dim = x.shape
        d_x = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_x = torch.bmm(_lanes(grad, heads), weight.unflatten(1, (heads, dim)).transpose(0, 1))
            d_x = d_x.view(heads, batch, n, dim).permute(1, 2, 0, 3)
        if ctx.needs_input_grad[1]:
            d_weight = grad.flatten(0, 1).t() @ x.flatten(0, 1).flatten(1)
        if ctx.needs_input_grad[2]:
            d_bias = _column_sums(grad.flatten(0, 1)[None]).flatten()
        return d_x, d_weight, d_bias


class _SplitHeads(Function):
    @staticmethod
    def forward(x, parts, heads):
        return x.unflatten(2, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        return torch.cat([grad.transpose(1, 2).flatten(2) for grad in grads], 2), None, None


def _lanes(x: torch.Tensor, count: int) -> torch.Tensor:
    """x (B, n, width) once for each of ``count`` products: (count, B · n, width)."""
    return x.reshape(1, -1, x.shape[2]).expand(count, -1, -1)


def _column_sums(x: torch.Tensor) -> torch.Tensor:
    """(L, m, D) → (L, 1, D). A product takes a third of a sum's time."""
    return torch.bmm(x.new_ones(1, 1, x.shape[1]).expand(len(x), -1, -1), x)


def _one_stack(parts: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
    """(parts · heads, B · n, D) if that is how ``parts``, each (B, heads, n, D), lie in memory."""
    first = parts[0]
    # a compiler or a transform sees no memory, and derivatives of derivatives do not go through it
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or transformed():
        return None
    batch, heads, n, dim = first.shape
    start, size, memory = first.storage_offset(), first.numel(), first.untyped_storage()._cdata
    for number, part in enumerate(parts):
        same = part.untyped_storage()._cdata == memory and part.storage_offset() == start + number * size
        if not same or not part.transpose(0, 1).is_contiguous():
            return None
    return first.as_strided((len(parts) * heads, batch * n, dim), (batch * n * dim, dim, 1), start)
