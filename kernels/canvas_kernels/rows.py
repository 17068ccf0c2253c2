"""Moving rows between two orders without the scatter that autograd's own rules would make of it."""

from __future__ import annotations

import torch


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index, dim):
        ctx.save_for_backward(index)
        ctx.dim, ctx.size = dim, x.shape[dim]
        return x.index_select(dim, index)

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        return _PutRows.apply(grad, index, ctx.dim, ctx.size), None, None


class _PutRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, index, dim, size):
        ctx.save_for_backward(index)
        ctx.dim = dim
        shape = list(y.shape)
        shape[dim] = size
        return y.new_zeros(shape).index_copy_(dim, index, y)

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        return _TakeRows.apply(grad, index, ctx.dim), None, None, None


def take_rows(x: torch.Tensor, index: torch.Tensor, dim: int = -2) -> torch.Tensor:
    """Rows ``index`` of x along ``dim``; ``index`` (int64 [m]) must not repeat a row, which makes the gradient a plain
    copy.

    >>> take_rows(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([2, 0])).tolist()
    [[3.0], [1.0]]
    """
    return _TakeRows.apply(x, index, dim % x.dim())


def put_rows(y: torch.Tensor, index: torch.Tensor, size: int, dim: int = -2) -> torch.Tensor:
    """The adjoint of :func:`take_rows`: zeros with ``size`` rows along ``dim``, row ``index[i]`` being row i of y.

    >>> put_rows(torch.tensor([[1.0], [2.0]]), torch.tensor([2, 0]), 3).tolist()
    [[2.0], [0.0], [1.0]]
    """
    return _PutRows.apply(y, index, dim % y.dim(), size)
