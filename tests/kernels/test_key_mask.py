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


def joint_table(times=1):
    """Rows 0–7 attend to 0–9 by two weights, rows 8–10 to 6–11, row 11 to nothing; each row so many times."""
    ranges = {"q_start": [0, 0, 8], "q_stop": [8, 8, 11], "k_start": [0, 4, 6], "k_stop": [4, 10, 12]}
    ranges = {name: [times * row for row in rows] for name, rows in ranges.items()}
    return BlockTable.from_rectangles("joint", times * N, 0, **ranges, weight=[1.0, 0.5, 1.0])


def inputs(dtype=torch.float32, times=1):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, times * N, DIM, generator=g).to(dtype).requires_grad_() for _ in range(3))
    mask = torch.rand(2, times * N, generator=g) < 0.6
    mask[0, : times * 2] = False  # whole blocks of keys
    mask[1, times * 6 :] = False  # rows 8–10 of the second sample lose every key
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
@pytest.mark.parametrize(("scale", "times"), [(DIM**-0.5, 1), (3.0, 1), (DIM**-0.5, 8)])
def test_outputs_and_gradients_are_those_of_dense_attention(backend, scale, times):
    table, (*tensors, mask) = joint_table(times), inputs(times=times)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    weights = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1))
    out = block_attention(*tensors, table, scale=scale, backend=backend, key_mask=mask)
    expected = dense(*exact, mask, table, scale)
    gradients = torch.autograd.grad((out * weights).sum(), tensors)
    expected_gradients = torch.autograd.grad((expected * weights.double()).sum(), exact)
    assert (out[1, :, 8 * times :] == 0).all() and (out[:, :, 11 * times :] == 0).all()
    assert out.shape == tensors[0].shape
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


@pytest.mark.parametrize("backend", [each for each in BACKENDS if each != "reference"])
def test_second_derivatives_compose(backend):
    table, (q, k, v, mask) = joint_table(), inputs()

    def gradient(q, backend, dtype):
        given = [x.detach().to(dtype) for x in (k, v)]
        out = block_attention(q, *given, table, backend=backend, key_mask=mask)
        return torch.autograd.grad(out.square().sum(), q, create_graph=True)[0]

    found = torch.autograd.grad(gradient(q, backend, torch.float32).square().sum(), q)[0]
    exact = q.detach().double().requires_grad_()
    expected = torch.autograd.grad(gradient(exact, "reference", torch.float64).square().sum(), exact)[0]
    assert (found.double() - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("backend", [each for each in BACKENDS if each != "reference"])
def test_one_graph_serves_every_mask_and_order(backend):
    torch._dynamo.reset()
    table, (q, k, v, mask) = joint_table(), inputs()
    rows = IndexMap.gather(torch.arange(N - 1, -1, -1).numpy(), N)
    backward = [x.flip(2) for x in (q, k, v)]
    options = {"rows": rows, "backend": backend}
    run = torch.compile(lambda *x: block_attention(*x[:3], table, key_mask=x[3], **options), backend="aot_eager",
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
