"""Scans by flash-linear-attention: with a stand-in written from its documentation, and with itself on a GPU."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch

from canvas_engineering import AttentionDispatcher, CanvasLayout, CanvasTopology, Connection, create_attention
from canvas_engineering.attention import scan
from canvas_engineering.attention.scan import decayed_sums, selective_scan

calls: list[tuple[int, ...]] = []


def fused_recurrent_hgrn(x, g, initial_state=None, output_final_state=False, cu_seqlens=None):
    """h_t = exp(g_t) h_{t−1} + x_t from h_0 (B, D), of inputs and log decays (B, T, D), in float32; the last h, or
    None."""
    assert x.dtype == g.dtype == torch.float32 and x.shape == g.shape and x.dim() == 3
    assert x.is_contiguous() and g.is_contiguous() and g.max() <= 0
    assert not torch.is_grad_enabled() or not (x.requires_grad or g.requires_grad)
    assert cu_seqlens is None
    calls.append(tuple(x.shape))
    h, rows = torch.zeros_like(x[:, 0]), []
    if initial_state is not None:
        assert initial_state.is_contiguous() and initial_state.dtype == torch.float32
        h = initial_state.reshape(h.shape)
    for x_t, g_t in zip(x.unbind(1), g.unbind(1)):
        h = g_t.exp() * h + x_t
        rows.append(h)
    return torch.stack(rows, 1), h if output_final_state else None


@pytest.fixture
def stand_in(monkeypatch):
    """A module ``fla`` whose kernel runs on CPUs too."""
    names = ("fla", "fla.ops", "fla.ops.hgrn")
    for name in names:
        module = ModuleType(name)
        module.__spec__, module.__path__ = ModuleSpec(name, None), []
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["fla.ops.hgrn"].fused_recurrent_hgrn = fused_recurrent_hgrn
    monkeypatch.setattr(scan, "is_supported", lambda x: x.dtype == torch.float32)
    scan.fla_kernel.cache_clear()
    calls.clear()
    yield
    scan.fla_kernel.cache_clear()


def scan_inputs(batch=2, length=37, width=5, states=3, device="cpu"):
    torch.manual_seed(0)
    dt, x = (torch.rand(batch, length, width, device=device).requires_grad_() for _ in range(2))
    b, c = (torch.randn(batch, length, states, device=device).requires_grad_() for _ in range(2))
    return dt, x, b, c, -torch.rand(width, states, device=device) * 4


def close(found, expected, tolerance=1e-5):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and (a - b).abs().max() <= tolerance * b.abs().max()


def results(function, leaves):
    out = function(*leaves)
    torch.manual_seed(1)
    return [out, *torch.autograd.grad(out, leaves, torch.randn(out.shape).to(out), allow_unused=True)]


@pytest.mark.parametrize("most", [1 << 24, 2 * 37 * 3 * 2, 1])
def test_the_scan_and_its_gradients(stand_in, monkeypatch, most):
    monkeypatch.setattr(scan, "MAX_STATES", most)
    *leaves, rate = scan_inputs()
    found = results(lambda *t: selective_scan(*t, rate), leaves)
    widths = {1 << 24: [5], 444: [2, 2, 1], 1: [1] * 5}[most]
    assert calls == [(2, 37, 3 * w) for w in widths] + [(2, 37, 3 * w) for w in widths for _ in range(2)]
    calls.clear()
    close(found, results(lambda *t: selective_scan(*t, rate, "torch"), leaves))
    assert not calls


def test_sums_and_their_gradients(stand_in):
    x = torch.randn(3, 41, 4, requires_grad=True)
    log_keep = torch.tensor([-1e-4, -0.1, -3.0, -2000.0], requires_grad=True)
    found = results(decayed_sums, [x, log_keep])
    assert calls == [(3, 41, 4)] * 2
    close(found, results(lambda *t: decayed_sums(*t, "torch"), [x, log_keep]))
    assert len(calls) == 2


@pytest.mark.parametrize("length", [128, 129, 512, 700])
def test_chunks_are_carried_on(stand_in, length):
    x = torch.randn(2, length, 3, requires_grad=True)
    log_keep = torch.tensor([-1e-6, -1e-2, -3.0], requires_grad=True)
    found = results(decayed_sums, [x, log_keep])
    chunks = -(-length // 128)
    assert calls == [(2 * chunks, 128, 3)] * (4 if chunks > 1 else 2)
    exact = [t.detach().double().requires_grad_() for t in (x, log_keep)]
    close(found, [t.float() for t in results(lambda *t: decayed_sums(*t, "torch"), exact)])
    *leaves, rate = scan_inputs(length=length)
    found = results(lambda *t: selective_scan(*t, rate), leaves)
    close(found, results(lambda *t: selective_scan(*t, rate, "torch"), leaves))


def dispatcher_of(fn, backend, size=12, width=8):
    layout = CanvasLayout(T=1, spatial_shape=(size,), d_model=width, regions={"a": (0, 1, 0, size)})
    torch.manual_seed(0)
    return AttentionDispatcher(CanvasTopology([Connection("a", "a", fn=fn)]), layout, width, 2, backend=backend)


@pytest.mark.parametrize("fn", ["mamba", "rwkv"])
def test_a_named_backend_is_what_runs(stand_in, fn):
    x = torch.randn(2, 12, 8)
    outs = {}
    for backend, count in (("auto", 1), ("torch", 0), ("reference", 0)):
        calls.clear()
        outs[backend] = dispatcher_of(fn, backend)(x)
        assert len(calls) == count, backend
    close([outs["auto"]], [outs["torch"]])
    assert torch.equal(outs["torch"], outs["reference"])
    # what the kernel would round
    calls.clear()
    dispatcher_of(fn, "auto").double()(x.double())
    assert not calls


@pytest.mark.parametrize("fn", ["mamba", "rwkv"])
def test_a_step_by_the_kernel_compiles_whole(stand_in, fn):
    torch._dynamo.reset()
    dispatcher, x = dispatcher_of(fn, "auto"), torch.randn(1, 12, 8, requires_grad=True)
    compiled = torch.compile(dispatcher, fullgraph=True, backend="aot_eager")
    close(results(lambda x: compiled(x), [x]), results(lambda x: dispatcher(x), [x]))
    assert calls


@pytest.mark.skipif(find_spec("fla") is not None, reason="flash-linear-attention is installed")
def test_without_the_extra_torch_runs():
    scan.fla_kernel.cache_clear()
    assert scan.fla_kernel() is None and scan.fla_recurrence(torch.ones(1)) is None


def test_an_installation_that_is_broken_is_not_passed_over(stand_in, monkeypatch):
    monkeypatch.delattr(sys.modules["fla.ops.hgrn"], "fused_recurrent_hgrn")
    with pytest.raises(ImportError, match="fused_recurrent_hgrn"):
        selective_scan(*scan_inputs())


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 100, 129, 4096])
def test_on_a_gpu_the_kernel_agrees_with_torch(length):
    pytest.importorskip("fla.ops.hgrn", reason="flash-linear-attention is not installed")
    *leaves, rate = scan_inputs(length=length, width=48, states=16, device="cuda")
    found = results(lambda *t: selective_scan(*t, rate), leaves)
    close(found, results(lambda *t: selective_scan(*t, rate, "torch"), leaves))
    assert all(torch.equal(a, b) for a, b in zip(found, results(lambda *t: selective_scan(*t, rate), leaves)))
    x = torch.randn(2, length, 33, device="cuda", requires_grad=True)
    log_keep = -torch.logspace(-5, 2, 33, device="cuda").requires_grad_()
    found = results(decayed_sums, [x, log_keep])
    exact = [t.detach().double().requires_grad_() for t in (x, log_keep)]
    close(found, [t.float() for t in results(lambda *t: decayed_sums(*t, "torch"), exact)])
    for fn in ("mamba", "rwkv"):
        module = create_attention(fn, 32).cuda()
        x = torch.randn(1, length, 32, device="cuda", requires_grad=True)
        close([module(x, x, x)], [module.double()(*[x.double()] * 3).float()])
