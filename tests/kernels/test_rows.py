"""Index maps: values, adjoints and derivatives of every order, and what is wrong about a map."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from canvas_kernels.block_table import BlockTable, row_sums
from canvas_kernels.ops import autocast_dtype
from canvas_kernels.packing import IndexMap, gather_rows, replace_rows, scatter_rows


def some_maps() -> dict[str, IndexMap]:
    rng = np.random.default_rng(0)
    return {
        "distinct": IndexMap.gather(np.array([3, 1, 4]), 5),
        "repeated": IndexMap.gather(np.array([3, 3, 0, 4, 3]), 5),
        "identity": IndexMap.gather(np.arange(5), 5),
        "sums": IndexMap.sums(np.array([4, 0, 0, 2]), np.array([0, 2, 2, 4]), 5),
        "weighted": IndexMap.sums(rng.integers(0, 5, 9), np.array([0, 4, 5, 9]), 5, rng.normal(size=9)),
        "empty": IndexMap.sums(np.zeros(0), np.zeros(4), 5),
    }


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("name", some_maps())
def test_maps_are_their_matrices_with_derivatives_of_any_order(name, dim):
    rows = some_maps()[name]
    matrix = torch.zeros(rows.n_out, 5, dtype=torch.float64)
    entries = np.repeat(np.arange(rows.n_out), np.diff(rows.offset))
    weight = np.ones(len(rows.index)) if rows.weight is None else rows.weight
    index = torch.from_numpy(rows.index.copy())
    matrix.index_put_((torch.from_numpy(entries), index), torch.from_numpy(weight.copy()), True)
    x = torch.randn(5, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def apply(m, x):
        return (m @ x.movedim(dim, -2)).movedim(-2, dim)

    torch.testing.assert_close(gather_rows(x, rows, dim), apply(matrix, x), rtol=1e-12, atol=1e-12)
    back = scatter_rows(gather_rows(x, rows, dim), rows, dim)
    torch.testing.assert_close(back, apply(matrix.T, apply(matrix, x)), rtol=1e-12, atol=1e-12)
    small = x.detach()[:, :, :2].transpose(0, dim % 3).contiguous() if dim == -1 else x.detach()[:, :, :2]
    small = (x.detach() if dim % 3 == 2 else small).requires_grad_()
    function = lambda x: scatter_rows(gather_rows(x, rows, dim).sin(), rows, dim)  # noqa: E731
    assert torch.autograd.gradcheck(function, small, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, small, fast_mode=True)


def test_rows_are_replaced_bit_for_bit_with_derivatives_of_any_order():
    rows = IndexMap.gather(np.array([3, 1]), 4)
    x, y = (torch.randn(2, n, 3, dtype=torch.float64).requires_grad_() for n in (4, 2))
    out = replace_rows(x, rows, y, 1)
    assert torch.equal(out[:, [3, 1]], y) and torch.equal(out[:, [0, 2]], x[:, [0, 2]])
    for function in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert function(lambda x, y: replace_rows(x.sin(), rows, y.cos(), 1), (x, y))
    forward = torch.autograd.gradcheck(lambda x, y: replace_rows(x, rows, y, 1), (x, y), check_forward_ad=True)
    batched = torch.func.vmap(lambda y: replace_rows(x, rows, y, 1))(torch.stack([y, 2 * y]))
    assert forward and torch.equal(batched[1], replace_rows(x, rows, 2 * y, 1))
    with pytest.raises(ValueError, match="without repeated rows"):
        replace_rows(x, IndexMap.gather(np.array([1, 1]), 4), y, 1)


def test_what_is_wrong_about_a_map_is_said():
    for index, offset, weight, text in (
        ([5], [0, 1], None, r"indices must lie in \[0, 5\), got 5"),
        ([1], [0, 2], None, "offsets must ascend from 0 to 1"),
        ([1, 2], [0, 2], [1.0], "2 entries need as many weights, got 1"),
    ):
        with pytest.raises(ValueError, match=text):
            IndexMap.sums(np.array(index), np.array(offset), 5, None if weight is None else np.array(weight))
    with pytest.raises(ValueError, match="has 5 rows along dimension 0"):
        gather_rows(torch.zeros(4, 1), some_maps()["sums"])
    with pytest.raises(KeyError, match="keep the plan alive"):
        torch.ops.canvas_kernels.apply_map(torch.zeros(1, 1), "gone", False, 0)


def test_sums_of_16_bits_round_once():
    rows = IndexMap.sums(np.zeros(1000), np.array([0, 1000]), 1)
    assert gather_rows(torch.full((1, 1), 1.001, dtype=torch.bfloat16), rows).item() == 1000.0


def test_row_sums_and_their_gradient():
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
    with pytest.raises(ValueError, match=r"factor must be \(3,\), one entry per connection; got \(2,\)"):
        row_sums(table, torch.ones(2))


def test_what_autocast_does_not_know_keeps_its_dtype():
    for dtype in (torch.float64, torch.int64):
        assert autocast_dtype(torch.empty(2, dtype=dtype, device="meta")) == dtype


def test_maps_keep_what_they_were_made_of():
    given = np.array([2, 0])
    rows = IndexMap.gather(given, 3)
    given[0] = 1
    again = IndexMap.gather(np.array([2, 0]), 3)
    assert again is rows and gather_rows(torch.arange(3.0)[:, None], again).flatten().tolist() == [2.0, 0.0]
