"""Row sums of a table's weights as an operator: data flows through it, the table's index tensors stay out of traced
graphs."""

from __future__ import annotations

import torch

from .table import BlockTable


@torch.library.custom_op("canvas_kernels::row_sums", mutates_args=())
def _row_sums(factor: torch.Tensor, table: str) -> torch.Tensor:
    return BlockTable.lookup(table).row_sums(factor)


@_row_sums.register_fake
def _(factor, table):
    return factor.new_empty((2, BlockTable.lookup(table).n_positions), dtype=torch.float32)


@torch.library.custom_op("canvas_kernels::row_sums_backward", mutates_args=())
def _row_sums_backward(grad: torch.Tensor, table: str) -> torch.Tensor:
    slots = BlockTable.lookup(table).slot_layout(grad.device)
    shares = slots.weight * grad[slots.replace, slots.position]
    return torch.segment_reduce(shares, "sum", lengths=slots.per_edge, initial=0.0, unsafe=True)


@_row_sums_backward.register_fake
def _(grad, table):
    return grad.new_empty((BlockTable.lookup(table).n_edges,))


def _setup(ctx, inputs, output):
    factor, ctx.table = inputs
    ctx.dtype = factor.dtype


def _backward(ctx, grad):
    return _row_sums_backward(grad, ctx.table).to(ctx.dtype), None


_row_sums.register_autograd(_backward, setup_context=_setup)


def row_sums(table: BlockTable, factor: torch.Tensor) -> torch.Tensor:
    """(2, n) float32: Σ_r factor[e_r]·w_r over the reads of each row, adding reads first, replacing reads second.

    ``factor`` (n_edges,), floating, on the device of the result; differentiable. Sums run in a fixed order.

    >>> table = BlockTable.from_rectangles("edge", 2, 1, q_start=[0], q_stop=[2], k_start=[0], k_stop=[1],
    ...                                    segment=[0], weight=[3.0], edge=[0])
    >>> row_sums(table, torch.tensor([0.5])).tolist()
    [[1.5, 1.5], [0.0, 0.0]]
    """
    if factor.shape != (table.n_edges,):
        raise ValueError(f"factor must be ({table.n_edges},), one entry per edge; got {tuple(factor.shape)}")
    return _row_sums(factor, table.key)
