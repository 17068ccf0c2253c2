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


@dataclass(frozen=True, eq=False)
class BagMap:
    """S bags of rows, of ``size`` rows in all: bag s holds ``row[row_offset[s] : row_offset[s + 1]]``, and row r lies
    in the bags ``bag[bag_offset[r] : bag_offset[r + 1]]``. int64 all; make it with :meth:`of`."""

    row: torch.Tensor
    row_offset: torch.Tensor
    bag: torch.Tensor
    bag_offset: torch.Tensor

    @classmethod
    def of(cls, rows: np.ndarray, ptr: np.ndarray, size: int, device: torch.device | str = "cpu") -> BagMap:
        """From the rows of all bags, int, each in [0, size), and where each bag's begin, [S + 1]."""
        bag = np.repeat(np.arange(len(ptr) - 1), np.diff(ptr))
        count = np.bincount(rows, minlength=size)
        assert len(count) == size, "a bag holds a row past the last one"
        arrays = (rows, ptr, bag[np.argsort(rows, kind="stable")], np.concatenate([[0], np.cumsum(count)]))
        return cls(*(torch.from_numpy(np.ascontiguousarray(a, dtype=np.int64)).to(device) for a in arrays))


def _sum(x: torch.Tensor, index: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    if x.shape[0] == 0 or x.shape[1] == 0 or index.shape[0] == 0:
        return x.new_zeros(offset.shape[0] - 1, x.shape[1])
    # 16-bit sums would round at every term
    wide = x.contiguous() if x.dtype in (torch.float32, torch.float64) else x.float()
    return _sum_bags(wide, index, offset, False, 0, False, None, True)[0].to(x.dtype)


class _SumBags(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, row, row_offset, bag, bag_offset):
        ctx.save_for_backward(bag, bag_offset, row, row_offset)
        return _sum(x, row, row_offset)

    @staticmethod
    def backward(ctx, grad):
        return _SumBags.apply(grad, *ctx.saved_tensors), None, None, None, None


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
        return _sum(y, order, offset)

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


def sum_bags(x: torch.Tensor, bags: BagMap) -> torch.Tensor:
    """x (size, D), floating → (S, D): the sum of each bag's rows, in their order, nothing of which is gathered first.

    >>> bags = BagMap.of(np.array([0, 2, 2]), np.array([0, 2, 3]), 3)
    >>> sum_bags(torch.tensor([[1.0], [2.0], [4.0]]), bags).flatten().tolist()
    [5.0, 4.0]
    """
    _check(x, bags.bag_offset.shape[0] - 1, "rows")
    return _SumBags.apply(x, bags.row, bags.row_offset, bags.bag, bags.bag_offset)


def _check(x: torch.Tensor, length: int, what: str) -> None:
    if x.dim() != 2 or x.shape[0] != length:
        raise ValueError(f"the map has {length} {what}: wanted ({length}, D), got {tuple(x.shape)}")
