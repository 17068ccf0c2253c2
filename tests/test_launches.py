"""What a call on Triton launches beside attention's passes, and where: kernels are stubs that note their launch."""

from __future__ import annotations

import contextlib
from collections import Counter

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import cases
from canvas_engineering.attention import canvas_attention
from canvas_engineering.plan import compile_attention
from canvas_kernels import index_map, launch, ops, steps, table
from canvas_kernels.tiling import Tiling

PASSES = {"forward_kernel", "gather_kernel", "dq_kernel", "dkv_kernel"}
ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
OPERATORS = {
    "attention": ops._attention,
    "attention_backward": ops._attention_backward,
    "row_scale": ops._row_scale_now,
    "apply_map": index_map._apply,
    "replace_rows": index_map._replace,
}


class Launches(TorchDispatchMode):
    """Counts torch's operators that launch something, also those inside of the project's own."""

    def __init__(self, counts: Counter) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "canvas_kernels":
            with self:
                return OPERATORS[func.overloadpacket.__name__](*args)
        name = func.overloadpacket.__name__
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not view and name not in ALLOCATIONS and name != "promote_types":
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def counts(monkeypatch) -> Counter:
    """Launches by name; no Triton kernel runs."""
    monkeypatch.setattr(launch, "arch_of", lambda device: "sm_90")
    found = Counter()

    class Stub:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            def call(*args, **options):
                found[self.name] += 1

            return call

    stub_kernels(monkeypatch, Stub)
    return found


def stub_kernels(monkeypatch, stub):
    for module in (launch, steps):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, stub(name))


def inputs(plan, edge: bool, packed: bool):
    """q, k, v, gain and the options of a call, and the gradient of its result."""
    n = plan.n_packed if packed else plan.n_positions
    q, k, v, grad = torch.randn(4, 2, 2, n, 64)
    leaves, options = [q, k, v], {"backend": "triton", "packed": packed}
    if edge:
        leaves.append(torch.ones(plan.n_connections))
        options["active"] = torch.ones(plan.n_connections)
    return [x.requires_grad_() for x in leaves], options, grad


def attend(leaves, options, plan):
    q, k, v, *gain = leaves
    return canvas_attention(q, k, v, plan, gain=gain[0] if gain else None, **options)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", ["joint", "edge", "sigmoid"])
def test_a_call_launches_four_small_kernels_forward_and_six_backward(counts, form, packed):
    layout, topology = cases.robot()
    plan = compile_attention(layout, topology, normalize="joint" if form == "joint" else "edge")
    leaves, options, grad = inputs(plan, form != "joint", packed)
    if form == "sigmoid":
        options["activation"] = "sigmoid"
    attend(leaves, options, plan)  # makes the tables
    counts.clear()
    with Launches(counts):
        out = attend(leaves, options, plan)
    forward = Counter(counts)
    counts.clear()
    with Launches(counts):
        torch.autograd.grad(out, leaves, grad)
    assert PASSES & forward.keys() and PASSES & counts.keys()
    for found, most in ((forward, 4), (counts, 6)):
        beside = {name: count for name, count in found.items() if name not in PASSES}
        assert sum(beside.values()) <= most, beside


def test_kernels_are_launched_on_the_device_of_their_tensors(counts, monkeypatch):
    current, seen = [0], set()

    class Device:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            self.before, current[0] = current[0], self.index

        def __exit__(self, *error):
            current[0] = self.before

    class Recorder:
        def __init__(self, name):
            pass

        def __getitem__(self, grid):
            return lambda *args, **options: seen.add(current[0])

    monkeypatch.setattr(torch.cuda, "device", Device)
    stub_kernels(monkeypatch, Recorder)
    # a fake tensor has no address to be aligned
    monkeypatch.setattr(launch, "_vectors", lambda x: x)
    # tables stay where they are: there is no second device to copy them to
    monkeypatch.setattr(Tiling, "to", lambda self, device: self)
    for module in (steps, index_map, table):
        monkeypatch.setattr(module, "to_device", lambda array, device: torch.from_numpy(array.copy()))
    layout, topology = cases.robot()
    plan = compile_attention(layout, topology)
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v, grad = (torch.empty(2, 2, plan.n_positions, 64, device="cuda:1") for _ in range(4))
        gain, active = (torch.empty(plan.n_connections, device="cuda:1") for _ in range(2))
        row_scale = launch.row_scale_of(active, plan.table)
        moved = launch.move_rows(q, k, v, grad, rows=plan.order_map)
        assert seen == {1}, "rows and scales"
        options = {"scale": 0.1, "gain": gain, "active": active, "row_scale": row_scale}
        _, lse, kept = launch.forward(*moved[:3], plan.table, **options)
        launch.backward(moved[3], *moved[:3], kept, lse, plan.table, **options, need_gain=True)
        _, lse, kept = launch.forward(*moved[:3], plan.table, sigmoid=True, **options)
        launch.backward(moved[3], *moved[:3], kept, lse, plan.table, sigmoid=True, **options, need_gain=True)
    assert seen == {1} and current == [0]


@pytest.mark.parametrize(
    ("triton_version", "numpy_version", "refused"),
    [("3.6.0", "2.4.0", True), ("3.6.0", "2.3.5", False), ("3.9.0", "2.5.1", False)],
)
def test_an_interpreter_that_numpy_breaks_says_what_to_install(
    counts, monkeypatch, triton_version, numpy_version, refused
):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(pytest.importorskip("triton"), "__version__", triton_version)
    monkeypatch.setattr(np, "__version__", numpy_version)
    layout, topology = cases.robot()
    plan = compile_attention(layout, topology)
    x = torch.zeros(1, 1, plan.n_positions, 16)
    with pytest.raises(ValueError, match="numpy<2") if refused else contextlib.nullcontext():
        canvas_attention(x, x, x, plan, backend="triton")
