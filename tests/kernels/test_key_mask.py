"""Masks of keys, one for each sample, over one table: every backend against dense attention in float64."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from canvas_kernels.block_table import BlockTable
from canvas_kernels.ops import block_attention
from canvas_kernels.packing import IndexMap

N, DIM = 12, 8
BACKENDS = ["torch", "reference"] + (
    ["triton"] if importlib.util.find_spec("triton") and not torch.cuda.is_available() else []
)


def joint_table():
    """Rows 0–7 attend to 0–9 by two weights, rows 8–10 to 6–11, row 11 to nothing."""
    rectangles = {
        "q_start": [0, 0, 8],
        "q_stop": [8, 8, 11],
        "k_start": [0, 4, 6],
        "k_stop": [4, 10, 12],
        "weight": [1.0, 0.5, 1.0],
    }
    return BlockTable.from_rectangles("joint", N, 0, **rectangles)


def inputs(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, N, DIM, generator=g).to(dtype).requires_grad_() for _ in range(3))
    mask = torch.rand(2, N, generator=g) < 0.6
    mask[1, 6:] = False  # rows 8–10 of the second sample lose every key
    return q, k, v, mask


def dense(q, k, v, mask, table, scale):
    M = torch.from_numpy(table.to_dense()).double()
    logits = scale * (q @ k.transpose(-1, -2)) + M.log()
    logits = logits.masked_fill(~mask[:, None, None, :], -torch.inf)
    keyless = (logits == -torch.inf).all(-1, keepdim=True)
    return torch.softmax(logits.masked_fill(keyless, 0.0), -1).masked_fill(keyless, 0.0) @ v


def sdpa(q, k, v, mask, table, scale):
    bias = torch.from_numpy(table.to_dense()).log().to(q.dtype).expand(2, 1, N, N)
    bias = bias.masked_fill(~mask[:, None, None, :], -torch.inf)
    return torch.nan_to_num(torch.nn.functional.scaled_dot_product_attention(q, k, v, bias, scale=scale))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [DIM**-0.5, 3.0])
def test_outputs_and_gradients_are_those_of_dense_attention(backend, scale):
    table, (*tensors, mask) = joint_table(), inputs()
    exact = [x.detach().double().requires_grad_() for x in tensors]
    weights = torch.randn(2, 3, N, DIM, generator=torch.Generator().manual_seed(1))
    out = block_attention(*tensors, table, scale=scale, backend=backend, key_mask=mask)
    expected = dense(*exact, mask, table, scale)
    gradients = torch.autograd.grad((out * weights).sum(), tensors)
    expected_gradients = torch.autograd.grad((expected * weights.double()).sum(), exact)
    assert (out[1, :, 8:] == 0).all() and (out[:, :, 11] == 0).all() and out.shape == tensors[0].shape
    for actual, right in zip((out, *gradients), (expected, *expected_gradients)):
        assert (actual.detach().double() - right.detach()).abs().max() <= 2e-5 * right.detach().abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_masked_keys_hold_is_not_attended_to(backend):
    table, (q, k, v, mask) = joint_table(), inputs()
    expected = block_attention(q, k, v, table, backend=backend, key_mask=mask)
    keep = mask[:, None, :, None]
    k, v = (torch.where(keep, x, torch.nan).detach().requires_grad_() for x in (k, v))
    out = block_attention(q, k, v, table, backend=backend, key_mask=mask)
    assert torch.equal(out, expected)
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_as_good_as_dense_ones(dtype):
    table, (*tensors, mask) = joint_table(), inputs(dtype)
    exact = dense(*(x.detach().double() for x in tensors), mask, table, 0.5)
    naive = sdpa(*tensors, mask, table, 0.5)
    out = block_attention(*tensors, table, scale=0.5, backend="torch", key_mask=mask)
    assert (out.double() - exact).abs().max() <= 2 * (naive.double() - exact).abs().max()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.float().sum(), tensors))


def test_one_graph_serves_every_mask_and_order():
    torch._dynamo.reset()
    table, (q, k, v, mask) = joint_table(), inputs()
    rows = IndexMap.gather(torch.arange(N - 1, -1, -1).numpy(), N)
    backward = [x.flip(2) for x in (q, k, v)]
    run = torch.compile(lambda *x: block_attention(*x[:3], table, rows=rows, key_mask=x[3]), backend="aot_eager",
                        fullgraph=True)  # fmt: skip
    for given in (mask, ~mask):
        expected = block_attention(q, k, v, table, key_mask=given).flip(2)
        torch.testing.assert_close(run(*backward, given.flip(1)), expected)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, N), r"key_mask must be bool \(2, 12\).*got torch.float32"),
        (torch.ones(1, N, dtype=torch.bool), r"got torch.bool \(1, 12\)"),
        ([True], r"key_mask must be a bool tensor \(2, 12\), got \[True\]"),
    ],
)
def test_wrong_masks_are_refused(mask, message):
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match=message):
        block_attention(q, k, v, joint_table(), key_mask=mask)


def test_edge_form_and_lse_are_refused():
    q, k, v, mask = inputs()
    rectangles = {"q_start": [0], "q_stop": [N], "k_start": [0], "k_stop": [N], "weight": [1.0], "edge": [0]}
    table = BlockTable.from_rectangles("edge", N, 1, **rectangles, segment=[0])
    with pytest.raises(ValueError, match="key_mask belongs to the joint form"):
        block_attention(q, k, v, table, key_mask=mask)
    with pytest.raises(ValueError, match="key_mask and return_lse exclude each other"):
        block_attention(q, k, v, joint_table(), key_mask=mask, return_lse=True)
