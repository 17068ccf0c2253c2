"""Rows gathered with repetition, and their sums back, without atomics: each is the other's gradient."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

_sum_bags = torch.ops.aten._embedding_bag_forward_only.default


@dataclass(frozen=True, eq=False)
class RowMap:
    """Which of ``size`` rows each of S places takes: ``index`` int64 [S].

    ``order`` int64 [S] lists the places by row, those of one row ascending; those of row r are
    ``order[offset[r] : offset[r + 1]]``, ``offset`` int64 [size + 1]. ``distinct``: no row is taken twice;
    ``identity``: every row, in order. Make it with :meth:`of`.
    """

    index: torch.Tensor
    order: torch.Tensor
    offset: torch.Tensor
    size: int
    distinct: bool
    identity: bool

    @classmethod
    def of(cls, index: np.ndarray, size: int, device: torch.device | str = "cpu") -> RowMap:
        """From places' rows, int [S], each in [0, size)."""
        index = np.ascontiguousarray(index, dtype=np.int64)
        count = np.bincount(index, minlength=size)
        assert len(count) == size, "a place takes a row past the last one"
        order = np.argsort(index, kind="stable")
        offset = np.concatenate([[0], np.cumsum(count)])
        distinct = bool((count <= 1).all())
        identity = len(index) == size and bool((index == np.arange(size)).all())
        tensors = (torch.from_numpy(a).to(device) for a in (index, order, offset))
        return cls(*tensors, int(size), distinct, identity)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index, order, offset, distinct):
        ctx.save_for_backward(index, order, offset)
        ctx.distinct = distinct
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        return _Sum.apply(grad, *ctx.saved_tensors, ctx.distinct), None, None, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, index, order, offset, distinct):
        ctx.save_for_backward(index, order, offset)
        ctx.distinct = distinct
        if distinct:
            return y.new_zeros(offset.shape[0] - 1, y.shape[1]).index_copy_(0, index, y)
        if y.shape[0] == 0 or y.shape[1] == 0:
            return y.new_zeros(offset.shape[0] - 1, y.shape[1])
        # 16-bit sums would round at every term
        wide = y.contiguous() if y.dtype in (torch.float32, torch.float64) else y.float()
        return _sum_bags(wide, order, offset, False, 0, False, None, True)[0].to(y.dtype)

    @staticmethod
    def backward(ctx, grad):
        return _Gather.apply(grad, *ctx.saved_tensors, ctx.distinct), None, None, None, None


def gather_rows(x: torch.Tensor, rows: RowMap) -> torch.Tensor:
    """x (size, D), floating → (S, D): the row that each place takes. Its gradient is :func:`sum_rows`.

    >>> gather_rows(torch.tensor([[1.0], [2.0]]), RowMap.of(np.array([1, 0, 1]), 2)).flatten().tolist()
    [2.0, 1.0, 2.0]
    """
    _check(x, rows.size, "rows")
    return x if rows.identity else _Gather.apply(x, rows.index, rows.order, rows.offset, rows.distinct)


def sum_rows(y: torch.Tensor, rows: RowMap) -> torch.Tensor:
    """y (S, D), floating → (size, D): for each row the sum over the places that take it, in the places' order; 0 where
    there are none. 16-bit values are summed in float32.

    >>> sum_rows(torch.tensor([[1.0], [2.0], [4.0]]), RowMap.of(np.array([2, 0, 2]), 3)).flatten().tolist()
    [2.0, 0.0, 5.0]
    """
    _check(y, rows.index.shape[0], "places")
    return y if rows.identity else _Sum.apply(y, rows.index, rows.order, rows.offset, rows.distinct)


def _check(x: torch.Tensor, length: int, what: str) -> None:
    if x.dim() != 2 or x.shape[0] != length:
        raise ValueError(f"the map has {length} {what}: wanted ({length}, D), got {tuple(x.shape)}")
