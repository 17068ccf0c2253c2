"""Activity is data: whatever changes between steps, nothing is rebuilt, compiled or waited for."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from canvas_engineering import (
    AttentionDispatcher,
    CanvasLayout,
    CanvasProgram,
    CanvasSchema,
    CanvasTopology,
    ClockSpec,
    Connection,
    ConnectionProgram,
    IdentitySpec,
    RegionProgram,
    RegionScheduler,
    ResidualAccumulator,
    ResidualSpec,
)
from canvas_engineering.clock_ir import Cooldown, MaxSilence, OnEvent, Or, periodic
from canvas_engineering.scheduling import DeviceScheduler
from tests.run.test_program_dispatch import D_MODEL, HEADS, program_of, randomised, three

# -- activity is data


def busy(**options):
    """A dispatcher with every kind of edge, and its program."""
    connections = (("a", "b"), ("a", "c"), Connection("b", "c", t_src=0, t_dst=-1), ("c", "b"))
    layout, topology = three(*connections, Connection("c", "a", fn="cogvideox"), T=2, carrier="residual")
    program = program_of(
        layout, topology, {"c": RegionProgram(identity=IdentitySpec(slot_capacity=2))},
        {
            ("a", "c"): ConnectionProgram("act", "b.prediction > 0.4"),
            ("c", "b"): ConnectionProgram(write_mode="gate"),
        },
    )  # fmt: skip
    accumulator = ResidualAccumulator(["b"], ResidualSpec(decay=0.9))
    return randomised(0, topology, layout, program=program, residual_accumulator=accumulator, **options)


def plan_tensors(plan):
    """Address of every tensor and array that hangs on a plan."""
    found, pending, seen = {}, [("plan", plan)], set()
    while pending:
        name, value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            found[name] = value.data_ptr()
        elif hasattr(value, "__array_interface__"):
            found[name] = value.__array_interface__["data"][0]
        elif isinstance(value, dict):
            pending += [(f"{name}.{key}", item) for key, item in value.items()]
        elif isinstance(value, (list, tuple)):
            pending += [(f"{name}.{i}", item) for i, item in enumerate(value)]
        elif dataclasses.is_dataclass(value):
            pending += [(f"{name}.{f.name}", getattr(value, f.name)) for f in dataclasses.fields(value)]
            pending += [(f"{name}.__dict__", getattr(value, "__dict__", {}))]
    return found


def launch_caches():
    """How often what a launch looks up had to be made."""
    launch = pytest.importorskip("canvas_kernels.triton_ops.launch")
    cached = [value for value in vars(launch).values() if hasattr(value, "cache_info")]
    assert len(cached) >= 2
    return [function.cache_info().misses for function in cached]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_hundred_changes_of_activity_rebuild_nothing(monkeypatch, backend):
    made = launch_caches() if backend == "triton" else None
    # the interpreter takes 10 ms for every row of a table and every head
    dispatcher = busy(backend=backend, n_heads=1 if backend == "triton" else HEADS)
    names = list(dispatcher.layout.regions)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, dispatcher.layout.num_positions, D_MODEL, requires_grad=True)
    start = dispatcher.residual_accumulator.values.fill_(0.5).clone()

    def step(active):
        return dispatcher(x, active).square().sum()

    first = torch.tensor([1.0, 0.0, 1.0])
    expected = torch.autograd.grad(step(first.clone()), x)[0]
    torch.autograd.grad(step(names), x)
    dispatcher.residual_accumulator.values.copy_(start)
    plans = [dispatcher.plan, *map(dispatcher.plan.for_fn, dispatcher.fn_modules)]
    plans += [connection.plan for connection in dispatcher.residual_connections]
    held = [plan_tensors(plan) for plan in plans]
    buffers = {name: tensor.data_ptr() for name, tensor in dispatcher.named_buffers()}
    assert sum(map(len, held)) > 50 and len(buffers) >= 6
    if backend == "triton":
        assert launch_caches() >= made
        made = launch_caches()

    def forbidden(*args, **kwargs):
        raise AssertionError("activity is data: nothing is compiled for it")

    for target in ("edge_table", "pack_positions", "resolve_attention_sets", "apply_program"):
        monkeypatch.setattr(f"canvas_engineering.plan.compile.{target}", forbidden)
    monkeypatch.setattr("canvas_kernels.torch_ops.grouping.choose_groups", forbidden)
    monkeypatch.setattr("canvas_kernels.packing.IndexMap.sums", forbidden)
    pending = step(first)
    first.copy_(torch.tensor([0.0, 1.0, 0.0]))
    outputs = set()
    for change in range(100):
        flags = torch.rand(3, generator=generator) > 0.5
        active = flags.float() if change % 2 else {name for name, on in zip(names, flags.tolist()) if on}
        outputs.add(step(active).item())
    assert len(outputs) >= 8
    assert torch.equal(torch.autograd.grad(pending, x)[0], expected)
    assert backend == "torch" or launch_caches() == made
    assert [plan_tensors(plan) for plan in plans] == held
    assert {name: tensor.data_ptr() for name, tensor in dispatcher.named_buffers()} == buffers


def test_a_hundred_changes_of_activity_compile_once():
    from torch._dynamo.testing import CompileCounterWithBackend

    dispatcher = busy()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(dispatcher, fullgraph=True, backend=counter)
    twin = copy.deepcopy(dispatcher)
    x = torch.randn(1, dispatcher.layout.num_positions, D_MODEL)
    for change in range(100):
        flags = (torch.rand(3, generator=torch.Generator().manual_seed(change)) > 0.5).float()
        torch.testing.assert_close(compiled(x, flags), twin(x, flags), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    torch.testing.assert_close(dispatcher.residual_accumulator.values, twin.residual_accumulator.values)


def clocked(seed=0):
    """A dispatcher of four clocked regions, all reading all, and its program: 16 active sets are possible."""
    names = "abcd"
    layout = CanvasLayout(
        T=1, spatial_shape=(8,), d_model=D_MODEL, regions={n: (0, 1, 2 * i, 2 * i + 2) for i, n in enumerate(names)}
    )
    event = OnEvent("b.prediction", gt=1.6)
    clocks = (periodic(2), event, Cooldown(Or(periodic(3), event), 1), MaxSilence(OnEvent("b.prediction", lt=1.5), 5))
    regions = {
        name: RegionProgram(clock=ClockSpec(expr=clock), carrier="residual" if name == "b" else "deterministic")
        for name, clock in zip(names, clocks)
    }
    topology = CanvasTopology.dense(list(names))
    program = program_of(layout, topology, regions)
    accumulator = ResidualAccumulator(["b"], ResidualSpec(decay=0.2))
    return randomised(seed, topology, layout, program=program, residual_accumulator=accumulator), program


def test_a_loop_with_clocks_on_the_device_compiles_once():
    from torch._dynamo.testing import CompileCounterWithBackend

    dispatcher, program = clocked()
    twin = copy.deepcopy(dispatcher)
    scheduler, plain = DeviceScheduler(program, dispatcher.residual_accumulator), RegionScheduler(program)
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def step(x, t):
        active = scheduler.step(t)
        return dispatcher(x, active), active

    generator, seen = torch.Generator().manual_seed(0), set()
    for t in range(48):
        x = 4 * torch.rand((), generator=generator) * torch.randn(1, 8, D_MODEL, generator=generator)
        names = plain.step(t, twin.summaries)
        out, active = step(x, torch.tensor(t))
        assert active.tolist() == [float(name in names) for name in "abcd"], t
        torch.testing.assert_close(out, twin(x, names), rtol=1e-5, atol=1e-5)
        seen.add(frozenset(names))
    assert len(seen) > 8 and counter.frame_count == 1


def compiled_kernels():
    """Kernels in Triton's JIT caches, over all that the package has."""
    from triton.runtime.jit import JITFunction

    from canvas_kernels.triton_ops import backward, forward

    kernels = [value for module in (forward, backward) for value in vars(module).values()]
    kernels = [kernel for kernel in kernels if isinstance(kernel, JITFunction)]
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


@pytest.mark.gpu
def test_a_hundred_changes_of_activity_wait_for_nothing_on_a_gpu():
    dispatcher, program = clocked()
    dispatcher = dispatcher.cuda()
    scheduler = DeviceScheduler(program, dispatcher.residual_accumulator).cuda()
    generator = torch.Generator().manual_seed(0)
    flags = (torch.rand(100, 4, generator=generator) > 0.5).float()
    names = [{name for name, on in zip("abcd", row) if on} for row in flags.tolist()]
    x = torch.randn(1, 8, D_MODEL, device="cuda", requires_grad=True)
    flags, times = flags.cuda(), torch.arange(100, device="cuda")

    def step(active):
        return dispatcher(x, active).square().sum()

    # what a first step compiles: with names, with tensors, and the backward of both
    for active in (names[0], flags[0], scheduler.step(times[0])):
        step(active).backward()
    kernels = compiled_kernels()
    assert kernels > 0
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = step(flags[1])
        for change in range(100):
            kinds = (names[change], flags[change], scheduler.step(times[change]))
            step(kinds[change % 3]).backward()
        pending.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert compiled_kernels() == kernels


def test_one_call_a_function_whatever_the_mix(monkeypatch):
    dispatcher = busy()
    calls = []
    for fn, module in dispatcher.fn_modules.items():
        monkeypatch.setattr(
            module, "attend", lambda *a, own=module.attend, fn=fn, **k: calls.append((fn, a[1])) or own(*a, **k)
        )
    dispatcher(torch.randn(1, dispatcher.layout.num_positions, D_MODEL))
    # and one more for each connection into a residual region
    errors = [(errors.fn, errors.plan) for errors in dispatcher.residual_connections]
    assert calls == [*errors, *((fn, dispatcher.plan.for_fn(fn)) for fn in dispatcher.fn_modules)] and len(errors) == 2


def test_programmed_steps_save_checkpoint_and_copy(tmp_path):
    dispatcher = busy()
    x = torch.randn(1, dispatcher.layout.num_positions, D_MODEL)
    twin = busy()
    for parameter in twin.parameters():
        torch.nn.init.zeros_(parameter)
    twin.load_state_dict(dispatcher.state_dict())
    assert torch.equal(copy.deepcopy(dispatcher)(x), twin(x))
    assert {name.split(".")[0] for name in dispatcher.state_dict()} == {
        "fn_modules", "edge_gates", "slot_modules", "residual_accumulator"
    }  # fmt: skip


def test_schedulers_and_dispatchers_of_one_program_fit():
    layout = CanvasLayout(T=1, spatial_shape=(4,), d_model=8, regions={"a": (0, 1, 0, 2), "b": (0, 1, 2, 4)})
    schema = CanvasSchema(layout, CanvasTopology.dense(["a", "b"]))
    program = CanvasProgram(schema, {"a": RegionProgram(), "elsewhere": RegionProgram()})
    with pytest.warns(UserWarning, match="for regions that the layout does not have"):
        dispatcher = AttentionDispatcher(schema.topology, layout, 8, program=program)
    x, fired = torch.randn(1, 4, 8), RegionScheduler(program).step(0)
    assert "elsewhere" in fired and torch.equal(dispatcher(x, fired), dispatcher(x, {"a", "b"}))
    with pytest.raises(KeyError, match="nowhere"):
        dispatcher(x, {"a", "nowhere"})


def test_a_bank_that_only_replaced_reads_use_leaks_nothing():
    regions = {"a": (0, 1, 0, 1), "b": (0, 1, 1, 2), "c": (0, 1, 2, 3)}
    layout = CanvasLayout(T=1, spatial_shape=(4,), d_model=8, regions=regions)
    schema = CanvasSchema(layout, CanvasTopology([Connection("a", "b", write_mode="replace"), Connection("a", "c")]))
    program = CanvasProgram(schema, {"c": RegionProgram(identity=IdentitySpec(slot_capacity=3))})
    dispatcher = AttentionDispatcher(schema.topology, layout, 8, n_heads=2, program=program)
    for active in (None, {"a", "b", "c"}):
        x = torch.randn(1, 4, 8)
        x[:, 2] = float("nan")
        x.requires_grad_()
        dispatcher.zero_grad()
        dispatcher(x, active)[:, :2].sum().backward()
        gradients = [x.grad, *(p.grad for p in dispatcher.parameters() if p.grad is not None)]
        assert all(gradient.isfinite().all() for gradient in gradients)
