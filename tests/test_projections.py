"""Linear layers into heads and out of them: values, every derivative, and that nothing is copied in between."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from canvas_kernels import BlockTable, block_attention, projections
from canvas_kernels.projections import linear_of_heads, project_heads

PARTS, HEADS, DIM, WIDTH = 3, 2, 5, 4


def inputs(batch: int = 2, dtype=torch.float64):
    torch.manual_seed(0)
    sizes = ((batch, 6, WIDTH), (PARTS * HEADS * DIM, WIDTH), (PARTS * HEADS * DIM,))
    return [torch.randn(size, dtype=dtype, requires_grad=True) for size in sizes]


def plain_project(x, weight, bias):
    return tuple(F.linear(x, weight, bias).unflatten(2, (PARTS, HEADS, DIM)).permute(2, 0, 3, 1, 4))


def out_inputs(batch: int = 2):
    sizes = ((batch, HEADS, 6, DIM), (WIDTH, HEADS * DIM), (WIDTH,))
    return [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]


def plain_linear(x, weight, bias=None):
    return F.linear(x.transpose(1, 2).flatten(2), weight, bias)


def assert_close(found, expected):
    for mine, want in zip(found, expected, strict=True):
        assert mine.shape == want.shape
        assert torch.allclose(mine, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 2])
def test_projections_are_the_linear_layer_s(batch):
    given = inputs(batch)
    parts, expected = project_heads(*given, PARTS, HEADS), plain_project(*given)
    assert_close(parts, expected)
    upstream = [torch.randn_like(part) for part in parts]
    assert_close(torch.autograd.grad(parts, given, upstream), torch.autograd.grad(expected, given, upstream))
    # of one part alone: the others' gradients are zeros
    assert_close(
        torch.autograd.grad(project_heads(*given, PARTS, HEADS)[1], given, upstream[1]),
        torch.autograd.grad(plain_project(*given)[1], given, upstream[1]),
    )
    for bias in (True, False):
        given = out_inputs(batch)[: 2 + bias]
        out, expected = linear_of_heads(*given), plain_linear(*given)
        assert_close([out], [expected])
        upstream = torch.randn_like(out)
        assert_close(torch.autograd.grad(out, given, upstream), torch.autograd.grad(expected, given, upstream))


def test_second_derivatives_and_transforms():
    def into(*given):
        return tuple(part.sin() for part in project_heads(*given, PARTS, HEADS))

    def out_of(*given):
        return linear_of_heads(*given).sin()

    for function, at in ((into, inputs()), (out_of, out_inputs())):
        assert torch.autograd.gradcheck(function, at)
        assert torch.autograd.gradgradcheck(function, at)
    given = [x.detach() for x in inputs()]
    by_transform = torch.func.grad(lambda *given: project_heads(*given, PARTS, HEADS)[0].sin().sum(), (0, 1, 2))
    expected = torch.func.grad(lambda *given: plain_project(*given)[0].sin().sum(), (0, 1, 2))
    assert_close(by_transform(*given), expected(*given))
    x, weight, bias = (t.detach() for t in out_inputs())
    found = torch.func.vmap(lambda row: linear_of_heads(row[None], weight, bias)[0])(x)
    assert_close([found], [plain_linear(x, weight, bias)])


def test_frozen_parameters_get_no_gradient():
    x, weight, bias = inputs()
    weight.requires_grad_(False)
    parts = project_heads(x, weight, bias, PARTS, HEADS)
    sum(part.sum() for part in parts).backward()
    assert weight.grad is None
    assert torch.allclose(bias.grad, torch.full_like(bias, 12.0))


def test_autocast_casts_as_for_a_linear_layer():
    given = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        parts = project_heads(*given, PARTS, HEADS)
        assert {part.dtype for part in parts} == {plain_project(*given)[0].dtype} == {torch.bfloat16}
        out = linear_of_heads(parts[0], torch.randn(WIDTH, HEADS * DIM), torch.randn(WIDTH))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert [x.grad.dtype for x in given] == [torch.float32] * 3


def test_a_compiler_takes_plain_linear_layers():
    torch._dynamo.reset()
    given = inputs(dtype=torch.float32)

    def step(*given):
        return linear_of_heads(project_heads(*given, PARTS, HEADS)[1], torch.ones(WIDTH, HEADS * DIM))

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    found, expected = compiled(*given), step(*given)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
def test_nothing_is_copied_between_a_projection_and_the_executor(monkeypatch, batch):
    table = BlockTable.from_rectangles(
        "edge", 6, 1, q_start=[0, 3], q_stop=[3, 6], k_start=[0, 2], k_stop=[3, 6], segment=[0, 1], weight=[1.0, 1.0],
        edge=[0, 0],
    )  # fmt: skip
    seen = []
    one_stack = projections._one_stack
    monkeypatch.setattr(projections, "_one_stack", lambda parts: seen.append(one_stack(parts)) or seen[-1])
    x, weight, bias = inputs(batch)
    q, k, v = project_heads(x, weight, bias, PARTS, HEADS)
    assert q.transpose(0, 1).is_contiguous()
    assert k.data_ptr() == q.data_ptr() + q.numel() * q.element_size()
    out = block_attention(q, k, v, table, backend="torch")
    assert out.transpose(0, 1).is_contiguous()
    linear_of_heads(out, torch.randn(WIDTH, HEADS * DIM, dtype=torch.float64)).sum().backward()
    assert len(seen) == 1
    assert seen[0] is not None, "the gradients of q, k and v were copied together"
    assert torch.isfinite(x.grad).all()
