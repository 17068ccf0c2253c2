"""Moving rows: values, gradients that are copies, and what an index leaves out."""

from __future__ import annotations

import pytest
import torch

from canvas_kernels.row_sums import row_sums
from canvas_kernels.rows import put_rows, take_rows
from canvas_kernels.table import BlockTable
from canvas_kernels.transforms import autocast_dtype


@pytest.mark.parametrize("dim", [1, -2])
def test_taking_and_putting_are_each_others_gradient(dim):
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([3, 1, 4])
    taken = take_rows(x, index, dim)
    assert torch.equal(taken, x[:, index])
    upstream = torch.randn_like(taken)
    expected = torch.zeros_like(x).index_copy(1, index, upstream)
    assert torch.equal(torch.autograd.grad(taken, x, upstream)[0], expected)
    put = put_rows(upstream, index, 5, dim)
    assert torch.equal(put, expected)
    assert torch.autograd.gradcheck(lambda x: put_rows(take_rows(x, index, dim).sin(), index, 5, dim), x)
    assert torch.autograd.gradgradcheck(lambda x: put_rows(take_rows(x, index, dim).sin(), index, 5, dim), x)


def test_row_sums_is_a_proper_operator():
    table = BlockTable.from_rectangles(
        "edge",
        6,
        3,
        q_start=[0, 2, 1],
        q_stop=[4, 6, 3],
        k_start=[0, 0, 0],
        k_stop=[6, 6, 6],
        segment=[0, 1, 2],
        weight=[1.0, 0.5, 2.0],
        edge=[0, 1, 2],
        replace=[False, False, True],
    )
    factor = torch.tensor([1.0, 3.0, 0.5], requires_grad=True)
    sums = row_sums(table, factor)
    assert sums.tolist() == [[1.0, 1.0, 2.5, 2.5, 1.5, 1.5], [0.0, 1.0, 1.0, 0.0, 0.0, 0.0]]
    upstream = torch.arange(12.0).view(2, 6)
    found = torch.autograd.grad(sums, factor, upstream)[0]
    assert found.tolist() == [0 + 1 + 2 + 3, 0.5 * (2 + 3 + 4 + 5), 2 * (7 + 8)]
    checks = torch.library.opcheck(torch.ops.canvas_kernels.row_sums.default, (factor, table.key))
    assert set(checks.values()) == {"SUCCESS"}
    with pytest.raises(ValueError, match=r"factor must be \(3,\), one entry per edge; got \(2,\)"):
        row_sums(table, torch.ones(2))


FOUR = (2, 3, 5, 4)


@pytest.mark.parametrize(("shape", "order"), [(FOUR, (0, 2, 1, 3)), (FOUR, (2, 0, 1, 3)), (FOUR, (0, 1, 2, 3))])
def test_rows_are_put_as_they_lie(shape, order):
    """Positions before heads, before batches, or after both: the result lies in memory as its rows do."""
    generator = torch.Generator().manual_seed(0)
    back = [order.index(dim) for dim in range(len(shape))]
    y = torch.randn([shape[dim] for dim in order], generator=generator).permute(back).requires_grad_()
    assert y.shape == shape
    index, dim = torch.randperm(9, generator=generator)[: shape[-2]], len(shape) - 2
    found = put_rows(y, index, 9)
    expected = torch.zeros(*shape[:-2], 9, shape[-1]).index_copy(dim, index, y.detach())
    assert torch.equal(found, expected) and found.permute(order).is_contiguous() and not found._is_view()
    upstream = torch.randn(expected.shape, generator=generator)
    (gradient,) = torch.autograd.grad(found, y, upstream)
    assert torch.equal(gradient, upstream.index_select(dim, index))


def test_what_autocast_does_not_know_keeps_its_dtype():
    for dtype in (torch.float64, torch.int64):
        assert autocast_dtype(torch.empty(2, dtype=dtype, device="meta")) == dtype
