"""canvas_attention and the attention modules: every backend and form against the float64 oracle, outputs and
gradients."""

from __future__ import annotations

import dataclasses
import functools
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from canvas_engineering.attention import (
    ATTENTION_REGISTRY,
    CogVideoXAttention,
    CrossAttention,
    canvas_attention,
    create_attention,
    register_attention,
)
from canvas_engineering.canvas import CanvasLayout
from canvas_engineering.connectivity import CanvasTopology, Connection
from canvas_engineering.plan import compile_attention
from canvas_kernels.derived import Store
from canvas_kernels.torch_ops import grouping
from tests import oracle
from tests.strategies import canvases, videos

HEADS, HEAD_DIM = 2, 8
# (backend, dtype, largest error relative to the largest oracle value): semantics, section 7; weights are float32 in
# tables, which is what float64 inputs see of them
EXACT = [("reference", torch.float64, 2e-7), ("torch", torch.float64, 2e-7), ("torch", torch.float32, 1e-5)]


def tensors(layout, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, HEADS, layout.num_positions, HEAD_DIM)
    # a mean of 2 in the values shows what a missing centring or a wrong denominator would hide
    q, k, v, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4))
    inputs = [x.to(dtype).requires_grad_() for x in (q, k, v + 2)]
    return inputs, grad.to(dtype)


def relative_error(got, expected) -> float:
    assert torch.isfinite(got).all()
    return ((got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def gradients(out, leaves, grad):
    found = torch.autograd.grad(out, leaves, grad, allow_unused=True) if out.requires_grad else [None] * len(leaves)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found)]


def compare(got, expected, inputs, grad, tolerance):
    """Output and gradients of `got` against those of `expected`, both functions of the same leaves."""
    leaves = [x for x in inputs if x is not None and x.requires_grad]
    copies = {x: x.detach().double().requires_grad_() for x in leaves}
    reference = expected(*(copies.get(x, x) for x in inputs))
    out = got(*inputs)
    found = gradients(out, leaves, grad)
    wanted = gradients(reference, list(copies.values()), grad.double())
    assert relative_error(out, reference.detach()) <= tolerance
    # A gradient that is zero in exact arithmetic is the rounding of products of these two, which cancel.
    rounding = torch.finfo(grad.dtype).eps * grad.abs().max().item() * inputs[2].abs().max().item()
    for name, a, b in zip("qkvg", found, wanted):
        allowed = max(3 * tolerance * max(b.abs().max().item(), 1e-3), rounding)
        assert torch.isfinite(a).all() and (a.double() - b).abs().max().item() <= allowed, name


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), EXACT)
@settings(max_examples=40)
@given(canvas=canvases(write_modes=("add", "replace", "gate")), seed=st.integers(0, 2**16), extras=st.booleans())
def test_edge_form_is_the_oracle(backend, dtype, tolerance, canvas, seed, extras):
    layout, topology = canvas
    (q, k, v), grad = tensors(layout, dtype, seed)
    plan, reads = compile_attention(layout, topology), oracle.reads(layout, topology)
    classes = [c.write_mode == "replace" for c in topology.connections]
    gain = active = None
    if extras:
        generator = torch.Generator().manual_seed(seed)
        gain = torch.randn(len(classes), generator=generator, dtype=torch.float64).to(dtype)
        gain[torch.rand(len(classes), generator=generator) < 0.2] = 0
        gain.requires_grad_()
        active = (torch.rand(len(classes), generator=generator) < 0.7).to(torch.float32)
    compare(
        lambda q, k, v, g: canvas_attention(q, k, v, plan, gain=g, active=active, backend=backend),
        lambda q, k, v, g: oracle.edge_attention(q, k, v, reads, HEAD_DIM**-0.5, g, active, classes),
        (q, k, v, gain),
        grad,
        tolerance,
    )


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), EXACT)
@settings(max_examples=40)
@given(canvas=canvases(), seed=st.integers(0, 2**16))
def test_joint_form_is_the_oracle(backend, dtype, tolerance, canvas, seed):
    layout, topology = canvas
    inputs, grad = tensors(layout, dtype, seed)
    plan, matrix = compile_attention(layout, topology, normalize="joint"), oracle.joint_matrix(layout, topology)
    compare(
        lambda q, k, v: canvas_attention(q, k, v, plan, scale=0.7, backend=backend),
        lambda q, k, v: oracle.joint_attention(q, k, v, matrix, 0.7),
        inputs,
        grad,
        tolerance,
    )


@pytest.mark.parametrize("form", ["edge", "joint"])
@settings(max_examples=60)
@given(canvas=st.one_of(canvases(write_modes=("add", "replace")), videos()), seed=st.integers(0, 2**16))
def test_everything_strided_is_the_oracle(form, canvas, seed):
    """Small canvases are gathered by default; here all query ranges at equal distances are strided."""
    layout, topology = canvas
    inputs, grad = tensors(layout, torch.float64, seed)
    plan = compile_attention(layout, topology, normalize=form)
    plan = dataclasses.replace(plan, table=dataclasses.replace(plan.table, store=Store()))
    with mock.patch.object(grouping, "MAX_STRIDED", 1 << 60):
        assert not grouping.group_table(plan.table).gathered
    if form == "edge":
        reads, classes = oracle.reads(layout, topology), [c.write_mode == "replace" for c in topology.connections]
        expected = functools.partial(oracle.edge_attention, reads=reads, scale=HEAD_DIM**-0.5, classes=classes)
    else:
        matrix = oracle.joint_matrix(layout, topology)
        expected = functools.partial(oracle.joint_attention, M=matrix, scale=HEAD_DIM**-0.5)
    compare(lambda q, k, v: canvas_attention(q, k, v, plan, backend="torch"), expected, inputs, grad, 2e-7)


@settings(max_examples=6)
@given(canvas=canvases(max_positions=40, write_modes=("add", "replace", "gate")), seed=st.integers(0, 2**16))
def test_triton_computes_both_forms(canvas, seed):
    # few and small: the interpreter takes some milliseconds for every table row, head and pass
    layout, topology = canvas
    device = "cuda" if torch.cuda.is_available() else "cpu"
    (q, k, v), grad = tensors(layout, torch.float32, seed)
    q, k, v = (x.detach()[:1, :1].to(device).requires_grad_() for x in (q, k, v))
    grad = grad[:1, :1].to(device)
    gain = torch.linspace(-1, 1, len(topology.connections), device=device).requires_grad_()
    reads, classes = oracle.reads(layout, topology), [c.write_mode == "replace" for c in topology.connections]
    plan = compile_attention(layout, topology)
    compare(
        lambda q, k, v, g: canvas_attention(q, k, v, plan, gain=g, backend="triton").cpu(),
        lambda q, k, v, g: oracle.edge_attention(
            q.cpu(), k.cpu(), v.cpu(), reads, HEAD_DIM**-0.5, g.cpu(), None, classes
        ),
        (q, k, v, gain),
        grad.cpu(),
        2e-5,
    )
    joint, matrix = compile_attention(layout, topology, normalize="joint"), oracle.joint_matrix(layout, topology)
    compare(
        lambda q, k, v: canvas_attention(q, k, v, joint, backend="triton").cpu(),
        lambda q, k, v: oracle.joint_attention(q.cpu(), k.cpu(), v.cpu(), matrix, HEAD_DIM**-0.5),
        (q, k, v),
        grad.cpu(),
        2e-5,
    )


def two_regions():
    layout = CanvasLayout(T=2, H=2, W=4, d_model=16, regions={"a": (0, 2, 0, 2, 0, 2), "b": (0, 2, 0, 2, 2, 3)})
    return layout, CanvasTopology.dense(["a", "b"])


def test_packed_tensors_give_the_packed_result():
    plan = compile_attention(*two_regions())
    q, k, v = torch.randn(3, 1, 2, 16, 4).unbind()
    packed = canvas_attention(plan.pack(q), plan.pack(k), plan.pack(v), plan, packed=True)
    assert torch.equal(plan.unpack(packed), canvas_attention(q, k, v, plan))


@pytest.mark.parametrize("form", ["edge", "joint"])
@pytest.mark.parametrize("offsets", [(None, None), (0, 0), (0, -1)])
@pytest.mark.parametrize("frames", [1, 4])
def test_a_canvas_in_its_own_order_takes_tensors_of_any_strides(frames, offsets, form):
    # kernels of torch that are called by name do not check that the last dimension is dense
    layout = CanvasLayout(T=frames, d_model=8, spatial_shape=(64,), regions={"a": (0, frames, 0, 64)})
    t_src, t_dst = offsets
    connections = [Connection("a", "a", t_src=0, t_dst=0), Connection("a", "a", t_src=t_src, t_dst=t_dst)]
    topology = CanvasTopology(connections)
    plan = compile_attention(layout, topology, normalize=form)
    inputs, grad = tensors(layout, torch.float32, 0)
    *qkv, grad = (t.detach().mT.contiguous().mT for t in (*inputs, grad))
    qkv = [t.requires_grad_() for t in qkv]
    if form == "edge":
        expected = oracle.edge_attention(*qkv, oracle.reads(layout, topology), HEAD_DIM**-0.5)
    else:
        expected = oracle.joint_attention(*qkv, oracle.joint_matrix(layout, topology), HEAD_DIM**-0.5)
    found = canvas_attention(*qkv, plan)
    wanted = torch.autograd.grad(expected, qkv, grad.double())
    for a, b in zip([found, *torch.autograd.grad(found, qkv, grad)], [expected, *wanted]):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_uniform_weights_equal_masked_attention():
    layout, topology = two_regions()
    plan = compile_attention(layout, topology, normalize="joint")
    q, k, v = torch.randn(3, 1, 2, 16, 4, dtype=torch.float64).unbind()
    rows = torch.from_numpy(plan.rows_with_keys())
    mask = torch.from_numpy(plan.to_dense() > 0)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)[:, :, rows]
    assert relative_error(canvas_attention(q, k, v, plan)[:, :, rows], expected) < 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plan": None}, "plan must be an AttentionPlan .* got NoneType"),
        ({"k": torch.zeros(1, 2, 15, 4)}, r"q, k and v must share one shape .* k \(1, 2, 15, 4\)"),
        ({"q": torch.zeros(1, 16, 4)}, r"q \(1, 16, 4\)"),
        ({"packed": True}, r"holds 16 positions; the plan has 12 in packed order"),
        ({"v": torch.zeros(1, 2, 16, 4, dtype=torch.float64)}, "float64"),
        ({"v": torch.zeros(1, 2, 16, 4, device="meta")}, "meta"),
        ({"gain": torch.ones(3)}, r"gain.*\(3,\)"),
        ({"active": torch.ones(5)}, r"active.*\(5,\)"),
        ({"backend": "cuda"}, "backend must be one of .* got 'cuda'"),
        ({"scale": float("nan")}, "scale"),
        ({"dropout_p": 1.5}, "dropout"),
    ],
)
def test_bad_input_is_named(change, message):
    plan = compile_attention(*two_regions())
    arguments = {name: torch.zeros(1, 2, 16, 4) for name in "qkv"} | {"plan": plan} | change
    with pytest.raises(ValueError, match=message):
        canvas_attention(**arguments)


def test_gains_and_activity_are_refused_in_joint_form():
    plan = compile_attention(*two_regions(), normalize="joint")
    q = torch.zeros(1, 2, 16, 4)
    for name in ("gain", "active"):
        with pytest.raises(ValueError, match="joint"):
            canvas_attention(q, q, q, plan, **{name: torch.ones(4)})


# -- modules -----------------------------------------------------------------------------------------------------------


def test_cross_attention_is_multi_head_attention():
    torch.manual_seed(0)
    module = CrossAttention(16, n_heads=4).double()
    ours = module.state_dict()
    assert sorted(ours) == sorted(f"{p}_proj.{x}" for p in "qkv" for x in ("weight", "bias")) + [
        "out_proj.bias",
        "out_proj.weight",
    ] or (set(ours) == {f"{p}_proj.{x}" for p in ("q", "k", "v", "out") for x in ("weight", "bias")})
    theirs = torch.nn.MultiheadAttention(16, 4, batch_first=True).double()
    theirs.in_proj_weight.data = torch.cat([ours[f"{p}_proj.weight"] for p in "qkv"])
    theirs.in_proj_bias.data = torch.cat([ours[f"{p}_proj.bias"] for p in "qkv"])
    theirs.out_proj.load_state_dict({"weight": ours["out_proj.weight"], "bias": ours["out_proj.bias"]})
    queries, keys = torch.randn(2, 3, 16, dtype=torch.float64), torch.randn(2, 5, 16, dtype=torch.float64)
    assert relative_error(module(queries, keys, keys), theirs(queries, keys, keys)[0]) < 1e-12


def test_names_of_the_softmax_family():
    assert {type(create_attention(name, 8)) for name in ("cross_attention", "self_attention")} == {CrossAttention}
    assert type(create_attention("cogvideox", 8, n_heads=2)) is CogVideoXAttention
    with pytest.raises(ValueError, match=r"'spooky' is not registered; known: cogvideox, .*, cross_attention, "):
        create_attention("spooky", 8)
    with pytest.raises(ValueError, match="n_heads 3 must divide d_model 8"):
        create_attention("cross_attention", 8, n_heads=3)
    with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\), got 1.0"):
        create_attention("cross_attention", 8, dropout=1.0)


def test_registering_a_module(monkeypatch):
    monkeypatch.setattr("canvas_engineering.attention.registry.ATTENTION_REGISTRY", ATTENTION_REGISTRY)
    monkeypatch.setitem(ATTENTION_REGISTRY, "mine", CrossAttention)

    class Mine(CrossAttention):
        pass

    register_attention("mine", Mine)
    assert type(create_attention("mine", 8)) is Mine
    with pytest.raises(ValueError, match=r"Module has no forward\(queries, keys, values\)"):
        register_attention("mine", torch.nn.Module)
    with pytest.raises(ValueError, match=r"not a subclass of torch.nn.Module"):
        register_attention("mine", dict)
    with pytest.raises(ValueError, match="'none' cannot be registered"):
        register_attention("none", Mine)
