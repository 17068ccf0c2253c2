"""Moving rows between two orders, on GPUs without the scatter that autograd's own rules would make of it."""

from __future__ import annotations

import contextlib

import torch

from .transforms import Function


def _plain(x: torch.Tensor) -> bool:
    """Whether autograd's own rules for rows, which add them to zeros, are the faster ones: on processors they are, 0.9
    of the time of a step and fewer calls; compilers make an atomic scatter of them."""
    return x.is_cpu and not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


class _TakeRows(Function):
    @staticmethod
    def forward(x, index, dim):
        return x.index_select(dim, index)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, index, ctx.dim = inputs
        ctx.save_for_backward(index)
        ctx.size = x.shape[ctx.dim]

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        return _PutRows.call(grad, index, ctx.dim, ctx.size), None, None


class _PutRows(Function):
    @staticmethod
    def forward(y, index, dim, size):
        return _put_rows(y, index, dim, size, _plain(y))

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, index, ctx.dim, _ = inputs
        ctx.save_for_backward(index)

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        return _TakeRows.call(grad, index, ctx.dim), None, None, None


def _put_rows(y: torch.Tensor, index: torch.Tensor, dim: int, size: int, plain: bool) -> torch.Tensor:
    shape = (*y.shape[:dim], size, *y.shape[dim + 1 :])
    if plain and dim and y.stride(dim) > y.stride(dim - 1) > 0:
        # as it lies in memory: 0.95 of the time, and whoever reads positions whole needs no copy
        strides, step = [1] * y.dim(), 1
        for each in sorted(range(y.dim()), key=y.stride):
            strides[each], step = step, step * shape[each]
        zeros = y.new_empty_strided(shape, strides).zero_()
    else:
        zeros = y.new_zeros(shape)
    # rows do not repeat: both are a copy. Adding takes 0.9 of the time on processors, and atomics on GPUs
    return zeros.index_add_(dim, index, y) if plain else zeros.index_copy_(dim, index, y)


class _SplitRows(Function):
    @staticmethod
    def forward(x, index, dim):
        return x.index_select(dim, index), x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, index, ctx.dim = inputs
        ctx.save_for_backward(index)
        ctx.size = x.shape[ctx.dim]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, rows, rest):
        (index,) = ctx.saved_tensors
        if rest is None:
            return None if rows is None else _PutRows.call(rows, index, ctx.dim, ctx.size), None, None
        if rows is None:
            return rest.index_fill(ctx.dim, index, 0), None, None
        return rest.index_copy(ctx.dim, index, rows), None, None


class _JoinRows(Function):
    @staticmethod
    def forward(rest, index, rows, dim):
        return rest.index_copy(dim, index, rows)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, index, _, ctx.dim = inputs
        ctx.save_for_backward(index)

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        return grad, None, _TakeRows.call(grad, index, ctx.dim), None


def split_rows(x: torch.Tensor, index: torch.Tensor, dim: int = -2) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows ``index`` of x along ``dim``, the rest), for :func:`join_rows` with the same index: rows that do not repeat
    are worked on and come back. The rest has all of x's rows, but those at ``index`` have no gradient there, which
    saves clearing and adding a canvas in backward; nothing but :func:`join_rows` may use it.

    >>> rows, rest = split_rows(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([2, 0]))
    >>> join_rows(rest, torch.tensor([2, 0]), 10 * rows).tolist()
    [[10.0], [2.0], [30.0]]
    """
    return _SplitRows.call(x, index, dim % x.dim())


def join_rows(rest: torch.Tensor, index: torch.Tensor, rows: torch.Tensor, dim: int = -2) -> torch.Tensor:
    """``rest`` of :func:`split_rows` with ``rows`` in the places that were split off, a new tensor."""
    return _JoinRows.call(rest, index, rows, dim % rest.dim())


def take_rows(x: torch.Tensor, index: torch.Tensor, dim: int = -2) -> torch.Tensor:
    """Rows ``index`` of x along ``dim``; ``index`` (int64 [m]) must not repeat a row, which makes the gradient a plain
    copy.

    >>> take_rows(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([2, 0])).tolist()
    [[3.0], [1.0]]
    """
    return x.index_select(dim, index) if _plain(x) else _TakeRows.call(x, index, dim % x.dim())


def put_rows(y: torch.Tensor, index: torch.Tensor, size: int, dim: int = -2) -> torch.Tensor:
    """The adjoint of :func:`take_rows`: zeros with ``size`` rows along ``dim``, row ``index[i]`` being row i of y.

    >>> put_rows(torch.tensor([[1.0], [2.0]]), torch.tensor([2, 0]), 3).tolist()
    [[2.0], [0.0], [1.0]]
    """
    dim %= y.dim()
    return _put_rows(y, index, dim, size, True) if _plain(y) else _PutRows.call(y, index, dim, size)


def lasting() -> contextlib.AbstractContextManager:
    """Where cached tensors are made: what is made under ``torch.inference_mode`` could not be saved for a later
    backward.

    >>> with torch.inference_mode(), lasting():
    ...     torch.zeros(1).is_inference()
    False
    """
    # a compiler knows no inference mode
    return contextlib.nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False)
