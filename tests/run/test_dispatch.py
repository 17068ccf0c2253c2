"""AttentionDispatcher against the oracle, with its projections written out; activity, gates, write modes, engines."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from canvas_engineering.attention import ATTENTION_REGISTRY
from canvas_engineering.canvas import CanvasLayout, RegionSpec
from canvas_engineering.connectivity import CanvasTopology, Connection
from canvas_engineering.dispatch import AttentionDispatcher
from canvas_engineering.residuals import ResidualAccumulator, ResidualSpec
from tests import dispatchers, oracle
from tests.strategies import canvases

D_MODEL, HEADS = 12, 3
randomised = functools.partial(dispatchers.randomised, d_model=D_MODEL, n_heads=HEADS)


@settings(max_examples=40)
@given(
    canvas=canvases(max_positions=60, write_modes=("add", "replace", "gate")),
    seed=st.integers(0, 2**16),
    choose=st.booleans(),
)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_step_is_the_oracle(backend, canvas, seed, choose):
    layout, topology = canvas
    connections = [
        dataclasses.replace(c, fn="cogvideox") if i % 3 == 2 and c.fn is None else c
        for i, c in enumerate(topology.connections)
    ]
    dispatcher = randomised(layout, CanvasTopology(connections), seed, backend=backend)
    x = torch.randn(2, layout.num_positions, D_MODEL, dtype=torch.float64, requires_grad=True)
    names = sorted(layout.regions)[: 1 + seed % len(layout.regions)] if choose else None
    active = None if names is None else [c.src in names for c in connections]
    out, expected = dispatcher(x, names), dispatchers.oracle_step(dispatcher, x, active)
    # table weights are float32
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    leaves = [x, *dispatcher.parameters()]
    grad = torch.randn_like(x)
    found = torch.autograd.grad(out, leaves, grad, allow_unused=True) if out.requires_grad else []
    wanted = torch.autograd.grad(expected, leaves, grad, allow_unused=True)
    for a, b in zip(found, wanted):
        a = torch.zeros(()).double() if a is None else a
        b = torch.zeros_like(a) if b is None else b
        torch.testing.assert_close(a.expand_as(b), b, rtol=1e-5, atol=1e-5)


def small():
    layout = CanvasLayout(
        T=3,
        H=3,
        W=4,
        d_model=D_MODEL,
        regions={"a": (0, 3, 0, 2, 0, 2), "b": (0, 3, 2, 3, 0, 3), "c": (1, 2, 0, 1, 3, 4)},
    )
    return layout, CanvasTopology.causal_temporal(["a", "b", "c"])


def test_repeated_connections_with_other_offsets_are_each_computed():
    # published: the first of two connections with equal (src, dst, fn) was computed twice
    layout = CanvasLayout(T=2, H=1, W=2, d_model=D_MODEL, regions={"a": (0, 2, 0, 1, 0, 2)})
    topology = CanvasTopology([Connection("a", "a", t_src=0, t_dst=0), Connection("a", "a", t_src=0, t_dst=-1)])
    dispatcher = randomised(layout, topology, 0)
    x = torch.randn(1, 4, D_MODEL, dtype=torch.float64)
    (module,) = dispatcher.fn_modules.values()
    now, before = module(x[:, 2:], x[:, 2:], x[:, 2:]), module(x[:, 2:], x[:, :2], x[:, :2])
    torch.testing.assert_close(dispatcher(x)[:, 2:], (now + before) / 2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("active", [None, ["a"], ["b", "c"], [], "tensor"])
def test_results_are_added_where_something_is_read_and_only_there(active, everywhere):
    layout, topology = small()
    if everywhere:  # every position reads, in canvas order: the paths without rows that are put aside
        layout = CanvasLayout(
            T=3, H=1, W=4, d_model=D_MODEL, regions={n: (0, 3, 0, 1, i, i + 1) for i, n in enumerate("abcd")}
        )
        topology = CanvasTopology.dense(list("abcd"))
    topology = CanvasTopology([*topology.connections, Connection("a", "b", fn="cogvideox", write_mode="gate")])
    dispatcher = randomised(layout, topology, 0)
    shape = (2, layout.num_positions, D_MODEL)
    h, x = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    if active == "tensor":
        active = torch.tensor([name in "ac" for name in layout.regions]).float()
        names = [name for name, on in zip(layout.regions, active) if on]
    else:
        names = list(layout.regions) if active is None else active
    reading = torch.zeros(layout.num_positions, 1, dtype=torch.bool)
    for read in oracle.reads(layout, topology):
        if topology.connections[read.connection].src in names:
            reading[list(read.keys)] = True
    assert reading.all() == (everywhere and active is None)
    out = dispatcher(h, active, add_to=x)
    attended = dispatchers.oracle_step(dispatcher, h, [c.src in names for c in topology.connections])
    torch.testing.assert_close(out, torch.where(reading, x + attended, x), rtol=1e-6, atol=1e-6)
    assert torch.equal(out[:, ~reading[:, 0]], x[:, ~reading[:, 0]])
    grad = torch.randn_like(x)
    found = torch.autograd.grad(out, [h, x], grad, allow_unused=True)
    torch.testing.assert_close(found[1], grad)
    if names:
        torch.testing.assert_close(found[0], torch.autograd.grad(attended, h, grad * reading)[0], rtol=1e-5, atol=1e-5)


def test_a_residual_stream_keeps_its_dtype_and_its_shape():
    layout, _ = small()
    # one function, and a region that is only read: its rows are packed, and get the bias of out_proj
    dispatcher = randomised(layout, CanvasTopology([Connection("a", "b")]), 0).float()
    h = torch.randn(1, layout.num_positions, D_MODEL)
    reading = torch.from_numpy(dispatcher.plan.rows_with_keys())
    assert reading.sum() == layout.region_numel("a")
    for dtype in (torch.float64, torch.float16):
        x = torch.randn(1, layout.num_positions, D_MODEL).to(dtype) / 3
        out = dispatcher(h, add_to=x)
        assert out.dtype == dtype
        assert torch.equal(out[:, reading], (x + dispatcher(h).to(dtype))[:, reading])
        assert torch.equal(out[:, ~reading], x[:, ~reading])
    with pytest.raises(ValueError, match=r"add_to must be like x, \(1, 36, 12\), got \(36, 12\)"):
        dispatcher(h, add_to=x[0])


def test_none_is_as_if_it_were_not_there():
    # published: "none" alone zeroed its source, and beside others diluted them
    layout, topology = small()
    plain = randomised(layout, topology, 0)
    more = randomised(layout, CanvasTopology([*topology.connections, Connection("a", "b", fn="none", weight=5.0)]), 0)
    x = torch.randn(1, layout.num_positions, D_MODEL, dtype=torch.float64)
    assert torch.equal(plain(x), more(x))
    alone = AttentionDispatcher(CanvasTopology([Connection("a", "b", fn="none")]), layout, D_MODEL)
    assert len(alone.fn_modules) == 0 and torch.equal(alone(x), x)


def test_unread_positions_pass_through_bit_for_bit():
    layout, topology = small()
    dispatcher = randomised(layout, topology, 0).float()
    x = torch.randn(2, layout.num_positions, D_MODEL)
    x[0, 0, 0] = -0.0
    out = dispatcher(x)
    still = ~torch.from_numpy(dispatcher.plan.rows_with_keys())
    assert still.sum() == 14 and torch.equal(out[:, still], x[:, still])
    assert not torch.isclose(out[:, ~still], x[:, ~still]).all(-1).any()


def test_inactive_regions_pass_through_and_stay_readable():
    layout = CanvasLayout(T=1, H=1, W=4, d_model=D_MODEL, regions={"a": (0, 1, 0, 1, 0, 2), "b": (0, 1, 0, 1, 2, 4)})
    dispatcher = randomised(layout, CanvasTopology.dense(["a", "b"]), 0)
    x = torch.randn(1, 4, D_MODEL, dtype=torch.float64)
    out, everyone = dispatcher(x, {"a"}), dispatcher(x)
    assert torch.equal(out[:, 2:], x[:, 2:])
    torch.testing.assert_close(out[:, :2], everyone[:, :2], rtol=1e-12, atol=1e-12)
    assert torch.equal(dispatcher(x, set()), x)
    flags = torch.tensor([True, False])
    assert torch.equal(dispatcher(x, flags), out)
    with pytest.raises(KeyError, match=r"\['z'\], which the layout does not have; it has a, b"):
        dispatcher(x, ["a", "z"])
    with pytest.raises(ValueError, match=r"active_regions must be \(2,\).*got \(3,\)"):
        dispatcher(x, torch.ones(3))


def test_another_activity_rebuilds_nothing_and_leaves_a_pending_backward_alone():
    layout, topology = small()
    dispatcher = randomised(layout, topology, 0)
    x = torch.randn(1, layout.num_positions, D_MODEL, dtype=torch.float64, requires_grad=True)
    flags = torch.tensor([1.0, 0.0, 1.0])
    expected = torch.autograd.grad(dispatcher(x, flags.clone()).square().sum(), x)[0]
    held = {name: tensor.data_ptr() for name, tensor in dispatcher.named_buffers()}
    pending, plan = dispatcher(x, flags), dispatcher.plan
    flags.copy_(torch.tensor([0.0, 1.0, 0.0]))
    dispatcher(x, flags)
    dispatcher(x, {"b"})
    assert torch.equal(torch.autograd.grad(pending.square().sum(), x)[0], expected)
    assert dispatcher.plan is plan and {n: t.data_ptr() for n, t in dispatcher.named_buffers()} == held


def test_replace_silences_the_others_and_gates_start_half_open():
    layout = CanvasLayout(T=1, H=1, W=4, d_model=D_MODEL, regions={"a": (0, 1, 0, 1, 0, 2), "b": (0, 1, 0, 1, 2, 4)})
    x = torch.randn(1, 4, D_MODEL, dtype=torch.float64)
    replacing = randomised(
        layout, CanvasTopology([Connection("a", "a"), Connection("a", "b", write_mode="replace")]), 0
    )
    (module,) = replacing.fn_modules.values()
    torch.testing.assert_close(replacing(x)[:, :2], module(x[:, :2], x[:, 2:], x[:, 2:]), rtol=1e-12, atol=1e-12)
    gated = randomised(layout, CanvasTopology([Connection("a", "b", write_mode="gate", weight=3.0)]), 0)
    torch.nn.init.zeros_(gated.edge_gates)
    (module,) = gated.fn_modules.values()
    # 1/3 and the gate are float32
    torch.testing.assert_close(gated(x)[:, :2], 0.5 * module(x[:, :2], x[:, 2:], x[:, 2:]), rtol=1e-6, atol=1e-6)


def test_skip_temporal_reads_dense_in_time():
    layout, topology = small()
    timeless = CanvasTopology([Connection(c.src, c.dst) for c in topology.connections])
    x = torch.randn(1, layout.num_positions, D_MODEL, dtype=torch.float64)
    skipping, dense = randomised(layout, topology, 0, skip_temporal=True), randomised(layout, timeless, 0)
    torch.testing.assert_close(skipping(x), dense(x), rtol=1e-12, atol=1e-12)


def test_parameter_names_are_the_published_ones():
    layout = CanvasLayout(
        T=1,
        H=1,
        W=4,
        d_model=8,
        regions={"a": RegionSpec((0, 1, 0, 1, 0, 2), default_attn="cogvideox"), "b": (0, 1, 0, 1, 2, 4)},
    )
    dispatcher = AttentionDispatcher(CanvasTopology.dense(["a", "b"]), layout, 8)
    parts = [f"{p}_proj.{x}" for p in ("q", "k", "v", "out") for x in ("weight", "bias")]
    assert set(dispatcher.state_dict()) == {
        f"fn_modules.{fn}.{p}" for fn in ("cogvideox", "cross_attention") for p in parts
    }


def test_dropout_acts_in_training_only():
    layout, topology = small()
    dispatcher = randomised(layout, topology, 0, dropout=0.5)
    x = torch.randn(1, layout.num_positions, D_MODEL, dtype=torch.float64)
    assert not torch.equal(dispatcher(x), dispatcher(x))
    dispatcher.eval()
    without = copy.deepcopy(dispatcher)
    without.fn_modules["cross_attention"].dropout = 0.0
    assert torch.equal(dispatcher(x), without.train()(x))


def test_a_step_compiles_whole_and_gives_the_same_numbers():
    layout, topology = small()
    gated = CanvasTopology(
        [*topology.connections, Connection("a", "c", write_mode="gate"), Connection("b", "c", fn="cogvideox")]
    )
    for declared in (topology, gated):
        dispatcher = randomised(layout, declared, 0)
        x = torch.randn(2, layout.num_positions, D_MODEL, dtype=torch.float64, requires_grad=True)
        compiled = torch.compile(dispatcher, fullgraph=True, backend="aot_eager")
        for options in ({}, {"add_to": torch.randn_like(x)}):
            out, expected = compiled(x, **options), dispatcher(x, **options)
            torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
            for a, b in zip(
                torch.autograd.grad(out.square().sum(), [x, *dispatcher.parameters()]),
                torch.autograd.grad(expected.square().sum(), [x, *dispatcher.parameters()]),
            ):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_checkpointing_autocast_and_copies():
    layout, topology = small()
    dispatcher = randomised(layout, topology, 0)
    x = torch.randn(1, layout.num_positions, D_MODEL, dtype=torch.float64, requires_grad=True)
    grads = []
    for run in (
        dispatcher,
        lambda x: torch.utils.checkpoint.checkpoint(dispatcher, x, use_reentrant=False),
        copy.deepcopy(dispatcher),
    ):
        grads.append(torch.autograd.grad(run(x).square().sum(), x)[0])
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])
    single = dispatcher.float()
    x = x.detach().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = single(x)
    assert low.dtype == torch.float32 and torch.isfinite(low).all()
    error = (low - single(x)).abs().max() / single(x).abs().max()
    assert 0 < error < 0.05


def test_a_saved_model_runs_where_its_plan_was_never_compiled(tmp_path):
    layout, topology = small()
    dispatcher = randomised(layout, topology, 0).float()
    x = torch.randn(1, layout.num_positions, D_MODEL)
    torch.save({"model": dispatcher, "x": x, "expected": dispatcher(x)}, tmp_path / "model.pt")
    script = (
        "import sys, torch; saved = torch.load(sys.argv[1], weights_only=False); "
        "assert torch.equal(saved['model'](saved['x']), saved['expected'])"
    )
    subprocess.run(
        [sys.executable, "-c", script, tmp_path / "model.pt"], check=True, env={**os.environ, "PYTHONPATH": ".:kernels"}
    )
    assert copy.deepcopy(dispatcher).plan is dispatcher.plan


def test_bad_input_is_named(monkeypatch):
    layout, topology = small()
    dispatcher = AttentionDispatcher(topology, layout, D_MODEL, n_heads=HEADS)
    with pytest.raises(ValueError, match=r"x must be \(batch, 36, 12\), got \(1, 35, 12\)"):
        dispatcher(torch.zeros(1, 35, D_MODEL))
    with pytest.raises(ValueError, match="a CanvasTopology and then a CanvasLayout, got CanvasLayout, CanvasTopology"):
        AttentionDispatcher(layout, topology, D_MODEL)
    with pytest.raises(ValueError, match="n_heads 5 must divide d_model 12"):
        AttentionDispatcher(topology, layout, D_MODEL, n_heads=5)
    with pytest.raises(ValueError, match=r"backend must be one of .* got 'cuda'"):
        AttentionDispatcher(topology, layout, D_MODEL, backend="cuda")
    monkeypatch.delitem(ATTENTION_REGISTRY, "mamba")
    with pytest.raises(ValueError, match="connection 'a' attends to 'b': attention function 'mamba' is not registered"):
        AttentionDispatcher(CanvasTopology([Connection("a", "b", fn="mamba")]), layout, D_MODEL)
    with pytest.raises(ValueError, match=r"x must be a floating-point tensor, got torch\.int64"):
        dispatcher(torch.zeros(1, 36, D_MODEL, dtype=torch.int64))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        message = rf"x is {dtype} and the dispatcher's parameters are torch.float32.*x.to\(torch.float32\).*autocast"
        with pytest.raises(ValueError, match=message):
            dispatcher(torch.zeros(1, 36, D_MODEL, dtype=dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert dispatcher(torch.zeros(1, 36, D_MODEL, dtype=torch.bfloat16)).dtype == torch.bfloat16
        with pytest.raises(ValueError, match=r"x is torch.float64 and the dispatcher's parameters are torch.float32"):
            dispatcher(torch.zeros(1, 36, D_MODEL, dtype=torch.float64))  # autocast leaves float64 alone


def gated():
    layout, _ = small()
    return AttentionDispatcher(
        CanvasTopology([Connection("a", "b", write_mode="gate"), Connection("b", "a"), Connection("a", "a")]),
        layout,
        D_MODEL,
        n_heads=HEADS,
    )


def test_training_after_inference_uses_what_inference_made():
    dispatcher, x = gated(), torch.randn(1, 36, D_MODEL)
    with torch.inference_mode():
        expected = dispatcher(x, {"a"})
        plan = dispatcher.plan.for_connection(0)
        plan.unpack(plan.pack(x, 1), 1)
    out = dispatcher(x, {"a"})
    out.square().sum().backward()
    assert torch.equal(out, expected) and dispatcher.edge_gates.grad.abs().sum() > 0
    x.requires_grad_()
    plan.unpack(plan.pack(x, 1), 1).sum().backward()
    assert x.grad.sum() == plan.n_packed * D_MODEL


def test_activity_is_on_or_off_and_has_no_gradient():
    dispatcher, x = gated(), torch.randn(1, 36, D_MODEL)
    on = torch.tensor([0.25, 0.0, 0.0], requires_grad=True)
    out = dispatcher(x, on)
    assert torch.equal(out, dispatcher(x, {"a"}))
    out.sum().backward()
    assert on.grad is None


def test_defaults_of_the_process_change_nothing():
    expected = gated()
    x = torch.randn(1, 36, D_MODEL)
    torch.set_default_dtype(torch.float64)
    try:
        found = gated().float()
        found.load_state_dict(expected.state_dict())
        assert torch.equal(found(x, {"a"}), expected(x, {"a"}))
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert gated().plan is expected.plan


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_each_sample():
    layout, topology = small()
    dispatcher = randomised(layout, topology, 0)
    x = torch.randn(3, layout.num_positions, D_MODEL, dtype=torch.float64)
    parameters = {name: parameter.detach() for name, parameter in dispatcher.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(dispatcher, parameters, (x[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(3):
        wanted = torch.autograd.grad(dispatcher(x[i : i + 1]).square().sum(), list(dispatcher.parameters()))
        for (name, _), want in zip(dispatcher.named_parameters(), wanted):
            torch.testing.assert_close(found[name][i], want, rtol=1e-9, atol=1e-9)


def test_a_step_that_is_computed_again_updates_its_summaries_again():
    """As the dispatcher's docstring says: such steps belong outside of recomputed stretches."""
    regions = {"a": (0, 1, 0, 1, 0, 2), "e": RegionSpec((0, 1, 1, 2, 0, 2), carrier="residual")}
    layout = CanvasLayout(T=1, H=2, W=2, d_model=D_MODEL, regions=regions)
    errors = ResidualAccumulator(["e"], ResidualSpec(decay=0.5))
    topology = CanvasTopology([Connection("a", "e")])
    dispatcher = AttentionDispatcher(topology, layout, D_MODEL, n_heads=HEADS, residual_accumulator=errors)
    x = torch.randn(1, 4, D_MODEL, requires_grad=True)
    out = torch.utils.checkpoint.checkpoint(dispatcher, x, use_reentrant=False)
    once = errors.summary_tensor()
    out.sum().backward()
    assert float(once) > 0
    torch.testing.assert_close(errors.summary_tensor(), 1.5 * once)
