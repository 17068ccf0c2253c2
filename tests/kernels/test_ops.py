"""The registered operations: torch.library's own checks, compilation, checkpointing, autocast, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from canvas_kernels import BlockTable, block_attention, ops
from canvas_kernels.block_table import row_scale as row_scale_of
from canvas_kernels.packing import IndexMap, gather_rows, scatter_rows
from tests.kernels.tables import error

OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture
def table():
    return BlockTable.from_rectangles(
        "edge", 12, 3, q_start=[0, 2, 0, 8], q_stop=[8, 8, 4, 12], k_start=[0, 8, 4, 0], k_stop=[8, 12, 8, 5],
        segment=[0, 0, 1, 2], weight=[1.0, 1.0, 0.5, 2.0], edge=[0, 0, 1, 2],
    )  # fmt: skip


@pytest.fixture
def joint():
    return BlockTable.from_rectangles(
        "joint", 12, 0, q_start=[0, 6], q_stop=[6, 12], k_start=[0, 2], k_stop=[4, 12], weight=[1.0, 0.5]
    )


def qkv(dtype=torch.float32, n=12, grad=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(2, 3, n, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad) for _ in "qkv"
    ]


# -- registration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("need_lse", [False, True])
def test_opcheck_edge(table, grad, need_lse):
    gain = torch.rand(3).requires_grad_(grad)
    options = (torch.tensor([1.0, 0.0, 1.0]), None, table.key, "", 0.3, ops.TORCH, "softmax", need_lse, False)
    result = torch.library.opcheck(torch.ops.canvas_kernels.attention.default, (*qkv(grad=grad), gain, *options))
    assert result == dict.fromkeys(OPCHECKS, "SUCCESS")


@pytest.mark.parametrize("order", [(2, 0, 1, 3), (1, 0, 2, 3)], ids=["positions first", "heads first"])
def test_opcheck_of_other_layouts(table, order):
    back = [order.index(dim) for dim in range(4)]
    inputs = [x.permute(order).contiguous().permute(back) for x in qkv(grad=False)]
    options = (None, None, None, table.key, "", 0.3, ops.TORCH, "softmax", True)
    attention = torch.ops.canvas_kernels.attention.default
    assert torch.library.opcheck(attention, (*inputs, *options, False)) == dict.fromkeys(OPCHECKS, "SUCCESS")
    _, *kept = attention(*inputs, *options, True)
    args = (torch.randn(2, 3, 12, 8), None, *kept, *inputs, *options[:-1], False)
    result = torch.library.opcheck(torch.ops.canvas_kernels.attention_backward.default, args)
    assert result == dict.fromkeys(OPCHECKS, "SUCCESS")


@pytest.mark.parametrize("executor", [ops.TORCH, ops.FRAMES])
@pytest.mark.parametrize("order", [(0, 2, 1, 3), (0, 1, 2, 3)], ids=["positions first", "heads first"])
def test_opcheck_of_packed_rows(executor, order):
    back = [order.index(dim) for dim in range(4)]
    inputs = [x.permute(order).contiguous().permute(back) for x in qkv(grad=False, n=15)]
    rows = IndexMap.gather(torch.randperm(15, generator=torch.Generator().manual_seed(0)).numpy()[:12], 15)
    every = {"q_start": [0], "q_stop": [12], "k_start": [0], "k_stop": [12], "weight": [1.0]}
    table = BlockTable.from_rectangles("joint", 12, 0, **every)
    options = (None, None, None, table.key, rows.key, 0.3, executor, "softmax", False)
    attention = torch.ops.canvas_kernels.attention.default
    assert torch.library.opcheck(attention, (*inputs, *options, True)) == dict.fromkeys(OPCHECKS, "SUCCESS")
    out, *kept = attention(*inputs, *options, True)
    args = (torch.randn(2, 3, 15, 8), out, *kept, *inputs, *options[:-1], False)
    result = torch.library.opcheck(torch.ops.canvas_kernels.attention_backward.default, args)
    assert result == dict.fromkeys(OPCHECKS, "SUCCESS")


@pytest.mark.parametrize("count", [12, 15], ids=["all rows", "packed rows"])
@pytest.mark.parametrize("order", [(0, 2, 1, 3), (0, 1, 2, 3)], ids=["positions first", "heads first"])
@pytest.mark.parametrize("dense", [True, False])
def test_dual_numbers_of_any_layout(dense, order, count, joint):
    """Results are no views of tensors made inside, which dual numbers refuse."""
    every = {"q_start": [0], "q_stop": [12], "k_start": [0], "k_stop": [12], "weight": [1.0]}
    table = BlockTable.from_rectangles("joint", 12, 0, **every) if dense else joint
    back = [order.index(dim) for dim in range(4)]
    q, k, v = (x.permute(order).contiguous().permute(back) for x in qkv(torch.float64, count, grad=False))
    rows = IndexMap.gather(np.arange(12)[::-1], count)
    along = torch.randn(q.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(1))
    with forward_ad.dual_level():
        dual = block_attention(forward_ad.make_dual(q, along), k, v, table, rows=rows)
        out, tangent = forward_ad.unpack_dual(dual)
    ends = [block_attention(q + step * along, k, v, table, rows=rows) for step in (1e-6, -1e-6)]
    assert error(tangent, (ends[0] - ends[1]) / 2e-6) < 1e-7
    assert error(out, block_attention(q, k, v, table, rows=rows, backend="reference")) < 1e-12


def test_opcheck_joint(joint):
    options = (None, None, None, joint.key, "", 0.3, ops.TORCH, "softmax", False, False)
    result = torch.library.opcheck(torch.ops.canvas_kernels.attention.default, (*qkv(torch.bfloat16), *options))
    assert result == dict.fromkeys(OPCHECKS, "SUCCESS")


def test_opcheck_backward(table):
    q, k, v = qkv(grad=False)
    gain, active, row_scale = torch.rand(3), torch.tensor([1, 0, 1]), torch.rand(2, 12)
    for given in (None, row_scale):
        given = row_scale_of(table, active, torch.float32) if given is None else given
        forward = (gain, active, given, table.key, "", 0.3, ops.TORCH, "softmax")
        _, *kept = torch.ops.canvas_kernels.attention.default(q, k, v, *forward, False, True)
        args = (torch.randn_like(q), None, *kept, q, k, v, *forward, True)
        result = torch.library.opcheck(torch.ops.canvas_kernels.attention_backward.default, args)
        assert result == dict.fromkeys(OPCHECKS, "SUCCESS")


# -- compilation, checkpointing, autocast ------------------------------------------------------------------------------


def run(table, q, k, v, gain=None, active=None):
    return block_attention(q, k, v, table, gain=gain, active=active)


# inductor imports what torch itself has deprecated
@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_to_one_graph(table, backend):
    torch._dynamo.reset()
    gain, active = torch.rand(3).requires_grad_(), torch.tensor([1.0, 0.0, 1.0])
    order = IndexMap.gather(torch.randperm(12).numpy(), 12)

    def step(q, k, v, gain, active):
        return scatter_rows(run(table, gather_rows(q, order, 2), k, v, gain, active), order, 2)

    inputs = [*qkv(), gain]
    upstream = torch.randn(2, 3, 12, 8)
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    out, expected = compiled(*inputs, active), step(*inputs, active)
    assert error(out.detach(), expected.detach().double()) <= 1e-6
    for mine, want in zip(torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)):
        assert error(mine, want.double()) <= 1e-6


@pytest.mark.parametrize("form", ["edge", "joint"])
def test_the_reference_backend_under_compile(request, form):
    given = request.getfixturevalue("table" if form == "edge" else "joint")
    active = torch.tensor([1.0, 0.0, 1.0]) if form == "edge" else None

    def step(q, k, v):
        return 2 * block_attention(q, k, v, given, active=active, backend="reference")

    inputs = qkv()
    torch._dynamo.reset()
    message = r"backend .reference. loops over its table in Python.*or compile without fullgraph"
    with pytest.raises(Exception, match=message):
        torch.compile(step, backend="aot_eager", fullgraph=True)(*inputs)
    torch._dynamo.reset()
    assert error(torch.compile(step, backend="aot_eager")(*inputs).detach(), step(*inputs).detach().double()) <= 1e-6


def test_a_compiled_function_follows_its_table(table):
    torch._dynamo.reset()
    other = BlockTable.from_rectangles(
        "edge", 12, 1, q_start=[0], q_stop=[12], k_start=[3], k_stop=[9], segment=[0], weight=[1.0], edge=[0]
    )
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    inputs = qkv(grad=False)
    for each in (table, other, table):
        assert error(compiled(each, *inputs), run(each, *inputs).double()) <= 1e-6


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_bits(table, reentrant):
    inputs = [*qkv(), torch.rand(3, requires_grad=True)]
    upstream = torch.randn(2, 3, 12, 8)
    plain = run(table, *inputs)
    again = checkpoint(run, table, *inputs, use_reentrant=reentrant)
    assert torch.equal(plain, again)
    expected = torch.autograd.grad(plain, inputs, upstream)
    again.backward(upstream)
    assert all(torch.equal(x.grad, want) for x, want in zip(inputs, expected))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast_casts_as_sdpa_does(table, backend):
    inputs = qkv()
    mixed = [inputs[0].detach().bfloat16(), *inputs[1:]]
    with torch.autocast("cpu", torch.bfloat16):
        out = block_attention(*inputs, table, backend=backend)
        sdpa = torch.nn.functional.scaled_dot_product_attention(*inputs)
        other = block_attention(*mixed, table, backend=backend)
        double = block_attention(*(x.double() for x in inputs), table, backend=backend)
    assert out.dtype == sdpa.dtype == torch.bfloat16 and double.dtype == torch.float64
    assert torch.equal(out, block_attention(*(x.bfloat16() for x in inputs), table, backend=backend))
    assert torch.equal(out, other)
    gradients = torch.autograd.grad(out.float().sum(), inputs)
    assert all(gradient.dtype == torch.float32 and gradient.any() for gradient in gradients[2:])
    assert gradients[2].abs().max() > 0.1


# -- autograd ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("packed", [False, True])
def test_derivatives_of_any_order_are_the_references(table, activation, packed):
    order = IndexMap.gather(np.array([14, 3, 1, 2, 0, 9, 8, 4, 5, 6, 7, 10]), 15) if packed else None
    inputs = [*qkv(torch.float64, n=15 if packed else 12), torch.rand(3, dtype=torch.float64, requires_grad=True)]
    active, tangents = torch.tensor([1, 0, 1]), [torch.randn_like(x) for x in inputs]
    plain, found = [x.detach() for x in inputs], {}
    for backend in ("torch", "reference"):

        def attend(q, k, v, gain, backend=backend):
            options = {"backend": backend, "activation": activation, "rows": order}
            return block_attention(q, k, v, table, gain=gain, active=active, **options)

        first = torch.autograd.grad(attend(*inputs).sin().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), inputs)
        results = [*first, *second]
        if backend == "torch":
            out, tangent = torch.func.jvp(attend, tuple(plain), tuple(tangents))
            with torch.no_grad(), torch.autograd.forward_ad.dual_level():
                duals = map(torch.autograd.forward_ad.make_dual, plain, tangents)
                dual = torch.autograd.forward_ad.unpack_dual(attend(*duals)).tangent
        else:
            # the cell-by-cell loop cannot be traced by duals under no_grad as well: plain differences, in float64
            step = [1e-6 * t for t in tangents]
            moved = (attend(*(x + sign * s for x, s in zip(plain, step))) for sign in (1, -1))
            out, tangent = attend(*plain), (next(moved) - next(moved)) / 2e-6
            dual = tangent
        found[backend] = [out, *results, tangent, dual]
    for i, (mine, want) in enumerate(zip(found["torch"], found["reference"])):
        assert error(mine.detach(), want.detach()) <= (1e-8 if i > 8 else 1e-12)


def test_tangents_of_constants_are_refused(table):
    q, k, v = (x.detach() for x in qkv())
    active = torch.ones(3)
    scales = row_scale_of(table, active, torch.float32)
    with pytest.raises(NotImplementedError, match=r"has constants .* detach it"):
        torch.func.jvp(lambda s: block_attention(q, k, v, table, row_scale=s), (scales,), (scales,))


def test_first_derivatives_under_create_graph(table):
    inputs = qkv()
    upstream = torch.randn(2, 3, 12, 8)
    graph = torch.autograd.grad(run(table, *inputs), inputs, upstream, create_graph=True)
    plain = torch.autograd.grad(run(table, *inputs), inputs, upstream)
    assert all(torch.equal(a, b) for a, b in zip(graph, plain))


def test_backward_keeps_the_activity_of_its_forward(table):
    inputs, active = qkv(), torch.tensor([1.0, 0.0, 1.0])
    expected = torch.autograd.grad(run(table, *inputs, active=active.clone()).sum(), inputs[2])
    out = run(table, *inputs, active=active)
    active.fill_(1.0)
    found = torch.autograd.grad(out.sum(), inputs[2])
    assert torch.equal(found[0], expected[0])


def test_backward_may_run_twice_and_out_may_be_overwritten(table):
    inputs = qkv()
    out = run(table, *inputs)
    loss = out.sum()
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    with torch.no_grad():
        out.zero_()
    second = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_only_wanted_gradients_are_given(table):
    q, k, v = qkv()
    gain = torch.rand(3, requires_grad=True)
    q, k = q.detach(), k.detach()
    run(table, q, k, v, gain).sum().backward()
    assert v.grad is not None and gain.grad is not None and q.grad is None
    lone = torch.rand(3, requires_grad=True)
    run(table, q, k, v.detach(), lone).sum().backward()
    assert torch.equal(lone.grad, torch.autograd.grad(run(table, q, k, v.detach(), lone).sum(), lone)[0])
    assert not run(table, q, k, v.detach()).requires_grad


def test_lse_carries_no_gradient(table):
    _, lse = block_attention(*qkv(), table, return_lse=True)
    assert not lse.requires_grad and lse.shape == (2, 3, table.n_slots)


def test_a_pending_backward_keeps_its_table():
    inputs = qkv()

    def build():
        return BlockTable.from_rectangles(
            "joint", 12, 0, q_start=[0], q_stop=[11], k_start=[1], k_stop=[12], weight=[1.0]
        )

    out = run(build(), *inputs)
    found = torch.autograd.grad(out.sum(), inputs[2])[0]
    assert torch.equal(found, torch.autograd.grad(run(build(), *inputs).sum(), inputs[2])[0])


# -- torch.func --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_grad_and_vjp_of_torch_func(table, backend):
    inputs = [*qkv(torch.float64), torch.rand(3, dtype=torch.float64, requires_grad=True)]

    def loss(q, k, v, gain):
        return block_attention(q, k, v, table, gain=gain, backend=backend).square().sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    plain = [x.detach() for x in inputs]
    found = torch.func.grad(loss, argnums=(0, 1, 2, 3))(*plain)
    pulled = torch.func.vjp(loss, *plain)[1](torch.ones((), dtype=torch.float64))
    assert all(error(mine, want) <= 1e-12 for mine, want in zip(found, expected))
    assert all(error(mine, want) <= 1e-12 for mine, want in zip(pulled, expected))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_vmap_and_gradients_of_each_sample(table, backend):
    order = IndexMap.gather(torch.randperm(12).numpy(), 12)

    def attend(q, k, v):
        out = block_attention(gather_rows(q, order, 2), k, v, table, backend=backend)
        return scatter_rows(out, order, 2)

    def loss(*each):
        return attend(*each).square().sum()

    q, k, v = (x.detach().double() for x in qkv())
    batch = torch.randn(2, 3, 4, 12, 8, dtype=torch.float64)  # samples at dimension 2
    stacked = torch.func.vmap(attend, in_dims=(2, None, None), out_dims=1)(batch, k, v)
    each = torch.func.vmap(torch.func.grad(loss, argnums=2), in_dims=(2, None, None))(batch, k, v)
    for i in range(4):
        assert error(stacked[:, i], attend(batch[:, :, i], k, v)) <= 1e-12
        leaf = v.clone().requires_grad_()
        assert error(each[i], torch.autograd.grad(loss(batch[:, :, i], k, leaf), leaf)[0]) <= 1e-12
    jacobian = torch.func.jacrev(lambda v: attend(q, k, v)[0, 0, :2, 0])(v)
    leaf = v.clone().requires_grad_()
    assert error(jacobian[1], torch.autograd.grad(attend(q, k, leaf)[0, 0, 1, 0], leaf)[0]) <= 1e-12


def test_second_derivatives_of_torch_func(table):
    q, k, v = (x.detach().double() for x in qkv())

    def slope(backend):
        first = torch.func.grad(lambda q: block_attention(q, k, v, table, backend=backend).square().sum())
        return lambda q: first(q).square().sum()

    second, expected = (torch.func.grad(slope(backend))(q) for backend in ("torch", "reference"))
    assert error(second, expected) <= 1e-12
    tangent = torch.randn_like(q)
    product = torch.func.jvp(slope("torch"), (q,), (tangent,))[1]
    assert float(product) == pytest.approx(float((expected * tangent).sum()), rel=1e-9)


# -- what is refused ---------------------------------------------------------------------------------------------------


def zeros(*shape, **options):
    return torch.zeros(*(shape or (2, 3, 12, 8)), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": "key"}, "table must be a BlockTable, got str"),
        ({"k": zeros(2, 3, 12, 4)}, r"share one shape.*k \(2, 3, 12, 4\)"),
        ({"v": zeros(2, 1, 12, 8)}, r"share one shape.*v \(2, 1, 12, 8\)"),
        (
            {"q": zeros(12, 8), "k": zeros(12, 8), "v": zeros(12, 8)},
            r"\(batch, heads, positions, head_dim\): q \(12, 8\)",
        ),
        ({name: zeros(2, 3, 9, 8) for name in "qkv"}, r"hold 9 positions, the table 12"),
        ({"v": zeros(device="meta")}, "one device: q cpu, k cpu, v meta"),
        ({"k": zeros(dtype=torch.float16)}, "one dtype: q torch.float32, k torch.float16"),
        ({name: zeros(dtype=torch.int64) for name in "qkv"}, "floating-point tensors, got torch.int64"),
        ({"scale": -1.0}, "scale must be finite and not negative, got -1.0"),
        ({"scale": float("nan")}, "scale must be finite and not negative, got nan"),
        ({"scale": float("inf")}, "scale must be finite and not negative, got inf"),
        ({"scale": torch.ones(())}, "scale must be a number, not a tensor"),
        ({"dropout_p": 1.0}, r"dropout_p must lie in \[0, 1\), got 1.0"),
        ({"dropout_p": -0.1}, r"dropout_p must lie in \[0, 1\), got -0.1"),
        ({"gain": torch.ones(2)}, r"gain must have the shape \(3,\) of the table, got \(2,\)"),
        ({"active": torch.ones(3, 1)}, r"active must have the shape \(3,\) of the table, got \(3, 1\)"),
        ({"row_scale": torch.ones(2, 11)}, r"row_scale must have the shape \(2, 12\) of the table, got \(2, 11\)"),
        ({"gain": torch.ones(3, device="meta")}, "gain is on meta, q on cpu"),
        ({"gain": torch.ones(3, dtype=torch.int64)}, "gain must be a floating-point tensor, got torch.int64"),
        (
            {"row_scale": torch.ones(2, 12, dtype=torch.int32)},
            "row_scale must be a floating-point tensor, got torch.int32",
        ),
        ({"backend": "cuda"}, "backend must be one of auto, triton, torch, reference; got 'cuda'"),
        ({"backend": "triton", "dropout_p": 0.1}, "'triton' has no dropout: use 'torch' or 'auto'"),
    ],
)
def test_refuses(table, change, message):
    arguments = {"q": zeros(), "k": zeros(), "v": zeros(), "table": table} | change
    with pytest.raises(ValueError, match=message):
        block_attention(**arguments)


@pytest.mark.parametrize("name", ["gain", "active", "row_scale"])
def test_joint_form_takes_no_edge_inputs(joint, name):
    with pytest.raises(ValueError, match=f"{name} belongs to the edge form: the table is joint"):
        block_attention(zeros(), zeros(), zeros(), joint, **{name: torch.ones(2, 12)})


def test_triton_refuses_what_it_cannot_do(table, monkeypatch):
    def message(**options):
        with pytest.raises(ValueError) as caught:
            block_attention(*(zeros(2, 3, 12, options.get("dim", 8), dtype=options.get("dtype")) for _ in "qkv"), table,
                            backend="triton")  # fmt: skip
        return str(caught.value)

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "needs tensors on a CUDA or ROCm device (or TRITON_INTERPRET=1), got cpu: use 'torch'" in message()
    assert "head_dim up to 256, got 264: use 'torch'" in message(dim=264)
    assert "float32, float16 and bfloat16, got torch.float64: use 'torch' or 'reference'" in message(
        dtype=torch.float64
    )
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "interpreter multiplies bfloat16 bit patterns" in message(dtype=torch.bfloat16)
    monkeypatch.setattr(ops, "has_triton", lambda: False)
    assert "needs the triton package, which is not installed: use 'torch'" in message()


def test_a_key_of_no_live_table_is_a_key_error():
    q, k, v = qkv(grad=False)
    with pytest.raises(KeyError, match="no live BlockTable has the key nothing"):
        args = (q, k, v, None, None, None, "nothing", "", 1.0, ops.TORCH, "softmax", False, False)
        torch.ops.canvas_kernels.attention(*args)


def test_importing_and_running_needs_no_triton():
    program = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import torch
from canvas_kernels import BlockTable, block_attention
table = BlockTable.from_rectangles("joint", 2, 0, q_start=[0], q_stop=[2], k_start=[0], k_stop=[1], weight=[1.0])
x = torch.tensor([[[[1.0], [3.0]]]], requires_grad=True)
block_attention(x, x, x, table).sum().backward()
print(x.grad.flatten().tolist(), "triton" in sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["[2.0,", "0.0]", "False"]


# -- the Triton branch, in the interpreter -----------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter stands in for a GPU")
@pytest.mark.parametrize("activity", [None, [1, 0, 1]])
def test_triton_and_torch_agree_through_the_operation(table, activity):
    pytest.importorskip("triton")
    active = None if activity is None else torch.tensor(activity)
    inputs = [*qkv(n=12), torch.tensor([0.5, -1.0, 0.0]).requires_grad_()]
    inputs = [inputs[0][:1, :1].detach(), inputs[1][:1, :1].detach(), inputs[2][:1, :1].detach(), inputs[3].detach()]
    inputs = [x.requires_grad_() for x in inputs]
    upstream = torch.randn(1, 1, 12, 8)
    results = []
    for backend in ("triton", "torch"):
        out, lse = block_attention(*inputs[:3], table, gain=inputs[3], active=active, backend=backend, return_lse=True)
        finite = torch.isfinite(lse)
        results.append([out, finite.float(), lse[finite], *torch.autograd.grad(out, inputs, upstream)])
    for mine, want in zip(*results):
        assert error(mine.detach(), want.detach().double()) <= 2e-5


def test_auto_takes_torch_on_the_cpu(table):
    inputs = qkv(grad=False)
    assert torch.equal(run(table, *inputs), block_attention(*inputs, table, backend="torch"))
    scale = block_attention(*inputs, table, scale=8**-0.5)
    assert torch.equal(run(table, *inputs), scale)
    assert np.isfinite(scale.numpy()).all()
