"""What a call on Triton launches beside attention's passes, and where: kernels are stubs that note their launch."""

from __future__ import annotations

import contextlib
from collections import Counter

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import cases
from canvas_engineering.attention import canvas_attention
from canvas_engineering.plan import compile_attention
from canvas_kernels import block_table, packing
from canvas_kernels.triton_ops import launch, steps
from canvas_kernels.triton_ops.tiling import Tiling
from tests.kernels.launches import TorchLaunches, inputs, stub_kernels

PASSES = {"forward_kernel", "gather_kernel", "dq_kernel", "dkv_kernel"}


@pytest.fixture
def counts(monkeypatch) -> Counter:
    """Launches by name; no Triton kernel runs."""
    found = Counter()
    stub_kernels(lambda name: found.update((name,)), monkeypatch.setattr)
    return found


@pytest.mark.parametrize(("packed", "head_dim"), [(False, 64), (True, 64), (False, 20)])
@pytest.mark.parametrize("form", ["joint", "edge", "sigmoid"])
def test_a_call_launches_four_small_kernels_forward_and_six_backward(counts, form, packed, head_dim):
    layout, topology = cases.robot()
    plan = compile_attention(layout, topology, normalize="joint" if form == "joint" else "edge")
    leaves, options, grad = inputs(plan, form != "joint", packed, head_dim)
    if form == "sigmoid":
        options["activation"] = "sigmoid"
    canvas_attention(**leaves, plan=plan, **options)  # makes the tables
    counts.clear()
    with TorchLaunches(counts):
        out = canvas_attention(**leaves, plan=plan, **options)
    forward = Counter(counts)
    counts.clear()
    with TorchLaunches(counts):
        torch.autograd.grad(out, list(leaves.values()), grad)
    assert PASSES & forward.keys() and PASSES & counts.keys()
    for found, most in ((forward, 4), (counts, 6)):
        beside = {name: count for name, count in found.items() if name not in PASSES}
        assert sum(beside.values()) <= most, beside


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch):
    current, seen = [0], set()

    class Device:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            self.before, current[0] = current[0], self.index

        def __exit__(self, *error):
            current[0] = self.before

    monkeypatch.setattr(torch.cuda, "device", Device)
    stub_kernels(lambda name: seen.add(current[0]), monkeypatch.setattr)
    # a fake tensor has no address to be aligned
    monkeypatch.setattr(launch, "aligned_rows", lambda x: x)
    # tables stay where they are: there is no second device to copy them to
    monkeypatch.setattr(Tiling, "to", lambda self, device: self)
    for module in (steps, packing, block_table):
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
