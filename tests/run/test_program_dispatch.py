"""A dispatcher under a program against the oracle, and what must not happen when activity changes."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from canvas_engineering import (
    AttentionDispatcher,
    CanvasLayout,
    CanvasProgram,
    CanvasSchema,
    CanvasTopology,
    ClockSpec,
    Connection,
    ConnectionProgram,
    ConstraintSpec,
    CortexRegistry,
    CortexSpec,
    IdentitySpec,
    MaskSpec,
    RegionProgram,
    RegionScheduler,
    RegionSpec,
    ResidualAccumulator,
    ResidualSpec,
    TemporalFill,
    compile_attention,
    validate_constraints,
)
from canvas_engineering.clock_ir import OnEvent, Or, periodic
from tests import program_oracle
from tests.strategies import FAMILIES, KINDS, programmed_canvases

D_MODEL, HEADS = 12, 3


def randomised(seed, topology, layout, **options):
    torch.manual_seed(seed)
    dispatcher = AttentionDispatcher(topology, layout, D_MODEL, **{"n_heads": HEADS, **options})
    for parameter in dispatcher.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return dispatcher


def accumulator_of(summaries, decay=0.5):
    made = ResidualAccumulator(list(summaries), ResidualSpec(KINDS, decay=decay))
    for row, name in enumerate(made.region_names):
        made.values[row] = torch.tensor([summaries[name][kind] for kind in KINDS])
    return made


def gradients(out, leaves, grad):
    if not out.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(out, leaves, grad, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found)]


def compare(canvas, seed, backend, dtype, tolerance):
    layout, topology, program, cortex, summaries, active = canvas
    accumulator = accumulator_of(summaries)
    dispatcher = randomised(
        seed, topology, layout,
        residual_accumulator=accumulator, program=program, cortex=cortex, backend=backend,
    )  # fmt: skip
    x = torch.randn(2, layout.num_positions, D_MODEL)
    grad = torch.randn_like(x)
    exact = copy.deepcopy(dispatcher).double()
    x64 = x.double().requires_grad_()
    expected, errors = program_oracle.step(exact, x64, HEADS, layout, topology, program, cortex, active, summaries)
    wanted = gradients(expected, [x64, *exact.parameters()], grad.double())
    dispatcher, x = dispatcher.to(dtype), x.to(dtype).requires_grad_()
    out = dispatcher(x, active)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    for (name, _), a, b in zip(
        [("x", x), *dispatcher.named_parameters()],
        gradients(out, [x, *dispatcher.parameters()], grad.to(dtype)),
        wanted,
    ):
        scale = max(1.0, b.abs().max().item() if b.numel() else 0.0)
        torch.testing.assert_close(
            a.double() / scale, b / scale, rtol=0, atol=3 * tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    after = program_oracle.accumulated(summaries, KINDS, 0.5, errors)
    flat = [[after[name][kind] for kind in KINDS] for name in accumulator.region_names]
    torch.testing.assert_close(accumulator.values, torch.tensor(flat).reshape(-1, 2), rtol=1e-5, atol=1e-5)


# random triggers name summaries that nothing keeps
unkept = pytest.mark.filterwarnings("ignore:triggers name summaries that no residual accumulator keeps")


@unkept
@settings(max_examples=120)
@given(programmed_canvases(), st.integers(0, 2**16))
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_step_is_the_oracle(backend, canvas, seed):
    compare(canvas, seed, backend, torch.float64, 2e-6)


@unkept
@settings(max_examples=80)
@given(programmed_canvases(max_positions=30, pairs=False, fns=FAMILIES), st.integers(0, 2**16))
def test_a_step_of_many_functions_is_the_oracle(canvas, seed):
    compare(canvas, seed, "torch", torch.float64, 2e-6)


@unkept
@settings(max_examples=4)
@given(programmed_canvases(max_positions=16), st.integers(0, 2**16))
def test_a_step_on_triton_is_the_oracle(canvas, seed):
    pytest.importorskip("triton")
    compare(canvas, seed, "triton", torch.float32, 4e-5)


# -- a row of the documents' tables each


def three(*connections, T=1, attn="cross_attention", carrier="deterministic"):
    """Regions a, b, c of two positions each, and the connections between them."""
    regions = {
        "a": RegionSpec((0, T, 0, 2), default_attn=attn),
        "b": RegionSpec((0, T, 2, 4), carrier=carrier),
        "c": RegionSpec((0, T, 4, 6)),
    }
    layout = CanvasLayout(T=T, spatial_shape=(6,), d_model=D_MODEL, regions=regions)
    return layout, CanvasTopology([Connection(*c) if isinstance(c, tuple) else c for c in connections])


def program_of(layout, topology, regions=None, connections=None):
    return CanvasProgram(CanvasSchema(layout, topology), regions or {}, connections or {})


def ran(layout, topology, regions=None, connections=None, x=None, **options):
    """(x, out, dispatcher) of a step in float64."""
    program = program_of(layout, topology, regions, connections)
    dispatcher = randomised(0, topology, layout, program=program, **options).double()
    x = torch.randn(1, layout.num_positions, D_MODEL, dtype=torch.float64) if x is None else x
    return x, dispatcher(x), dispatcher


def read(module, x, queries, keys):
    return module(x[:, queries], x[:, keys], x[:, keys])


A, B, C = slice(0, 2), slice(2, 4), slice(4, 6)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("operator", ["write", "act"])
def test_operators_that_replace_silence_the_others(operator):
    layout, topology = three(("a", "b"), ("a", "c"))
    x, out, dispatcher = ran(layout, topology, connections={("a", "c"): ConnectionProgram(operator)})
    close(out[:, A], read(dispatcher.fn_modules["cross_attention"], x, A, C))
    # metadata alone does not
    named = CanvasTopology([Connection("a", "b"), Connection("a", "c", operator=operator)])
    x, out, dispatcher = ran(layout, named)
    both = read(dispatcher.fn_modules["cross_attention"], x, A, B) + read(
        dispatcher.fn_modules["cross_attention"], x, A, C
    )
    close(out[:, A], both / 2)


@pytest.mark.parametrize("operator", ["attend", "observe", "retrieve", "unheard of"])
def test_operators_that_change_nothing(operator):
    layout, topology = three(("a", "b"), ("a", "c"))
    x, out, dispatcher = ran(layout, topology, connections={("a", "c"): ConnectionProgram(operator)})
    plain = AttentionDispatcher(topology, layout, D_MODEL, n_heads=HEADS).double()
    plain.load_state_dict(dispatcher.state_dict())
    assert torch.equal(plain(x), out) and plain.plan is dispatcher.plan


def test_compress_pools():
    layout, topology = three(("a", "b"))
    program = program_of(layout, topology, connections={("a", "b"): ConnectionProgram("compress")})
    assert compile_attention(layout, topology, program).fns == ("pooling_attention",)


def test_a_program_speaks_for_every_connection_of_its_pair():
    layout, topology = three(
        Connection("a", "b", t_src=0, t_dst=0), Connection("a", "b", t_src=0, t_dst=-1), ("a", "c"), T=3
    )
    program = program_of(layout, topology, connections={("a", "b"): ConnectionProgram("act", "c.prediction > 1")})
    plan = compile_attention(layout, topology, program)
    assert [c.write_mode for c in plan.connections] == ["replace", "replace", "add"]
    assert plan.triggers == {0: "c.prediction > 1", 1: "c.prediction > 1"}


def test_triggers_see_the_summaries_at_the_beginning_of_the_step():
    layout, topology = three(("a", "b"), ("a", "c"), carrier="residual")
    accumulator = ResidualAccumulator(["b"], ResidualSpec(decay=0.0))
    programs = {("a", "b"): ConnectionProgram(trigger="b.prediction < 0.001")}
    x, out, dispatcher = ran(layout, topology, connections=programs, residual_accumulator=accumulator)
    module = dispatcher.fn_modules["cross_attention"]
    to_b, to_c = read(module, x, A, B), read(module, x, A, C)
    # nothing is known yet: the edge runs, although its own error is large once it has
    close(out[:, A], (to_b + to_c) / 2)
    error = (to_b - x[:, A]).abs().mean().item()
    assert abs(dispatcher.summaries["b"]["prediction"] - error) < 1e-5 and error > 0.001
    # now it does not, and the summary stays
    close(dispatcher(x)[:, A], to_c)
    assert abs(dispatcher.summaries["b"]["prediction"] - error) < 1e-5
    accumulator.reset()
    close(dispatcher(x)[:, A], (to_b + to_c) / 2)


def test_triggers_without_summaries_never_fire():
    layout, topology = three(("a", "b"), ("c", "b"))
    programs = {("a", "b"): ConnectionProgram(trigger="b.prediction < 100")}
    with pytest.warns(UserWarning, match=r"so never hold: b\.prediction; there is none"):
        x, out, dispatcher = ran(layout, topology, connections=programs)
    assert torch.equal(out[:, :4], x[:, :4]) and not torch.equal(out[:, C], x[:, C]) and dispatcher.summaries is None
    for kept in (
        ResidualAccumulator(["c"]),
        ResidualAccumulator(["b"], ResidualSpec(("other",))),
        ResidualAccumulator([]),
    ):
        with pytest.warns(UserWarning, match=r"triggers name summaries that no residual .*: b\.prediction; it keeps"):
            x, out, _ = ran(layout, topology, connections=programs, residual_accumulator=kept, x=x)
        assert torch.equal(out[:, A], x[:, A])


@pytest.mark.parametrize("op", ["<", ">", "<=", ">=", "==", "!="])
@pytest.mark.parametrize("value", [0.2, 0.25, 0.3])
def test_every_comparison_on_the_device(op, value):
    layout, topology = three(("a", "b"))
    accumulator = ResidualAccumulator(["b"])
    accumulator.values.fill_(value)
    programs = {("a", "b"): ConnectionProgram(trigger=f"b.prediction {op} 0.25")}
    x, out, _ = ran(layout, topology, connections=programs, residual_accumulator=accumulator)
    expected = {"<": value < 0.25, ">": value > 0.25, "<=": value <= 0.25, ">=": value >= 0.25, "==": value == 0.25,
                "!=": value != 0.25}[op]  # fmt: skip
    assert torch.equal(out, x) is not expected


def test_thresholds_and_averages_survive_16_bits():
    layout, topology = three(("a", "b"))
    accumulator = ResidualAccumulator(["b"])
    accumulator.values.fill_(0.2501)
    programs = {("a", "b"): ConnectionProgram(trigger="b.prediction > 0.25005")}
    dispatcher = randomised(0, topology, layout, program=program_of(layout, topology, None, programs),
                            residual_accumulator=accumulator).bfloat16()  # fmt: skip
    x = torch.randn(1, 6, D_MODEL).bfloat16()
    assert not torch.equal(dispatcher(x), x) and accumulator.values.dtype == torch.float32


def test_masks_of_programs_replace_the_connections_own():
    own = MaskSpec("sparse", pattern=((True, False),))
    given = MaskSpec("sparse", pattern=((False, True),))
    layout, topology = three(Connection("a", "b", mask=own))
    x, out, dispatcher = ran(layout, topology, connections={("a", "b"): ConnectionProgram(mask_spec=given)})
    close(out[:, A], read(dispatcher.fn_modules["cross_attention"], x, A, slice(3, 4)))
    x, out, dispatcher = ran(layout, topology, connections={("a", "b"): ConnectionProgram()})
    close(out[:, A], read(dispatcher.fn_modules["cross_attention"], x, A, slice(2, 3)))


def test_gates_are_learned_per_connection_and_fade_out():
    layout, topology = three(("a", "b"), ("a", "c"))
    x, _, dispatcher = ran(layout, topology, connections={("a", "c"): ConnectionProgram(write_mode="gate")})
    module = dispatcher.fn_modules["cross_attention"]
    assert dispatcher.edge_gates.shape == (1,)
    torch.nn.init.constant_(dispatcher.edge_gates, -40.0)
    # the denominator is not gated
    close(dispatcher(x)[:, A], read(module, x, A, B) / 2)
    torch.nn.init.zeros_(dispatcher.edge_gates)
    close(dispatcher(x)[:, A], (read(module, x, A, B) + read(module, x, A, C) / 2) / 2)


def test_edges_inside_a_cortex_run_its_backend():
    layout, topology = three(("a", "b"), ("a", "c"), Connection("b", "a", fn="cross_attention"))
    cortex = CortexRegistry()
    cortex.register(CortexSpec("home", local_backend="cogvideox"))
    for name in ("a", "b"):
        cortex.assign(name, "home")
    dispatcher = randomised(0, topology, layout, cortex=cortex).double()
    assert dispatcher.plan.fns == ("cogvideox", "cross_attention", "cross_attention")
    x = torch.randn(1, 6, D_MODEL, dtype=torch.float64)
    modules = dispatcher.fn_modules
    close(dispatcher(x)[:, A], (read(modules["cogvideox"], x, A, B) + read(modules["cross_attention"], x, A, C)) / 2)


def test_cortices_keep_their_backends_to_themselves():
    layout, topology = three(("a", "a"), ("a", "b"), ("b", "b"), ("b", "c"), ("c", "c"))
    cortex = CortexRegistry()
    for name, backend, members in (("one", "cosine_attention", "a"), ("two", "linear_attention", "bc")):
        cortex.register(CortexSpec(name, local_backend=backend))
        for member in members:
            cortex.assign(member, name)
    found = compile_attention(layout, topology, cortex=cortex).fns
    assert found == ("cosine_attention", "cross_attention", *["linear_attention"] * 3)


def test_an_isolated_cortex_has_modules_of_its_own():
    pairs = [(src, dst) for src in "ab" for dst in "ab"]
    layout, topology = three(*pairs[:2], Connection("b", "a", fn="gated"), ("c", "c"), Connection("c", "b", fn="gated"))

    def built(isolated, name="visual.main"):
        cortex = CortexRegistry()
        cortex.register(CortexSpec(name, local_backend="cross_attention", isolated=isolated))
        for region in "ab":
            cortex.assign(region, name)
        return cortex, randomised(0, topology, layout, cortex=cortex).double()

    cortex, shared = built(False)
    assert set(shared.fn_modules) == {"cross_attention", "gated"}
    assert cortex.summary().splitlines()[1] == "  visual.main: cross_attention, a, b"
    cortex, own = built(True)
    inside = ["cross_attention__visual__main", "gated__visual__main"]
    assert own.plan.fns == (inside[0], inside[0], inside[1], "cross_attention", "gated")
    assert set(own.fn_modules) == set(own.plan.fns)
    assert cortex.summary().splitlines()[1] == "  visual.main: cross_attention, isolated, a, b"
    x = torch.randn(1, 6, D_MODEL, dtype=torch.float64)
    modules, out = own.fn_modules, own(x)
    close(out[:, A], (read(modules[inside[0]], x, A, A) + read(modules[inside[0]], x, A, B)) / 2)
    close(out[:, B], read(modules[inside[1]], x, B, A))
    close(out[:, C], (read(modules["cross_attention"], x, C, C) + read(modules["gated"], x, C, B)) / 2)
    # with the parameters of the shared modules, it computes what they do
    for name, module in modules.items():
        module.load_state_dict(shared.fn_modules[name.partition("__")[0]].state_dict())
    close(own(x), shared(x))
    out = own(x, torch.tensor([1.0, 0.0, 0.0]))
    assert torch.equal(out[:, B], x[:, B]) and not torch.equal(out[:, A], x[:, A])


def test_constraints_that_do_not_hold_are_warned_of_where_a_dispatcher_is_built():
    layout, topology = three(Connection("a", "b", fn="mixture"), ("b", "a"), ("c", "c"))
    regions = {
        "a": RegionProgram(constraints=ConstraintSpec("permutation", causal_direction="acyclic")),
        "b": RegionProgram(clock=ClockSpec(mode="on_event", event_source="c.prediction")),
        "c": RegionProgram(clock=ClockSpec(expr=Or(OnEvent("eror.prediction", gt=1.0), periodic(3)))),
    }
    with pytest.warns(UserWarning) as caught:
        AttentionDispatcher(topology, layout, D_MODEL, HEADS, program=program_of(layout, topology, regions))
    assert [re.sub(" is a cycle| does not hold.*", "", str(warning.message)) for warning in caught] == [
        "the program of region a: equivariance 'permutation'",
        "the program of region a: causal_direction 'acyclic'",
        "the program of region c: its clock waits for 'eror.prediction', of a region that the layout does not have",
    ]
    lost = {"b": RegionProgram(clock=ClockSpec(mode="on_event", event_source="lost.prediction"))}
    with pytest.warns(UserWarning, match="b: its clock waits for 'lost.prediction'"):
        AttentionDispatcher(topology, layout, D_MODEL, HEADS, program=program_of(layout, topology, lost))
    # what counts is what runs: here, the function of a cortex, and another topology than the program's
    cortex = CortexRegistry()
    cortex.register(CortexSpec("home", local_backend="mamba"))
    for name in "ab":
        cortex.assign(name, "home")
    regions = {"a": RegionProgram(constraints=ConstraintSpec("translation"))}
    layout, plain = three(("a", "b"))
    made = program_of(layout, plain, regions)
    assert validate_constraints(made) == []
    with pytest.warns(UserWarning, match="equivariance 'translation' does not hold: .* runs 'mamba'"):
        AttentionDispatcher(plain, layout, D_MODEL, HEADS, program=made, cortex=cortex)
    AttentionDispatcher(plain, layout, D_MODEL, HEADS, program=made)
    with pytest.warns(UserWarning, match="runs 'mixture'"):
        AttentionDispatcher(topology, layout, D_MODEL, HEADS, program=made)


def test_cortex_backends_that_do_not_exist_are_refused():
    layout, topology = three(("a", "b"))
    cortex = CortexRegistry()
    cortex.register(CortexSpec("home", local_backend="telepathy"))
    with pytest.raises(ValueError, match=r"cortex 'home': unknown local_backend 'telepathy': .*cogvideox"):
        AttentionDispatcher(topology, layout, D_MODEL, cortex=cortex)
    with pytest.raises(ValueError, match="cortex must be a CortexRegistry, or None, got 3"):
        AttentionDispatcher(topology, layout, D_MODEL, cortex=3)


def test_cortex_bounds_hold_their_regions_and_tiles_are_a_mask():
    layout, topology = three(("a", "b"), ("b", "c"))
    inside, outside = (0, 1, 0, 4), (0, 1, 0, 3)
    for spec, message in (
        (CortexSpec("home", outside), r"'b' at \(0, 1, 2, 4\) lies outside of its cortex 'home' at \(0, 1, 0, 3\)"),
        (CortexSpec("home", (0, 1, 0, 4, 0, 4)), "must be pairs for time and the 1 dimensions of the layout"),
        (CortexSpec("home", shared_cache=False), "cortex 'home': shared_cache=False is not offered"),
    ):
        cortex = CortexRegistry()
        cortex.register(spec)
        for name in ("a", "b", "elsewhere"):
            cortex.assign(name, "home")
        with pytest.raises(ValueError, match=message):
            compile_attention(layout, topology, cortex=cortex)
    cortex = CortexRegistry()
    cortex.register(CortexSpec("home", inside, tile=(3,), local_backend="cogvideox"))
    for name in ("a", "b"):
        cortex.assign(name, "home")
    plan = compile_attention(layout, topology, cortex=cortex)
    assert plan.fns == ("cogvideox", "cross_attention")
    # tiles of 3: a (0, 1) reads all of b, of which no position is in its tile but 2
    tiled = program_of(layout, topology, {}, {("a", "b"): ConnectionProgram(mask_spec=cortex.cortex_for("a").mask)})
    reads = compile_attention(layout, topology, tiled, cortex=cortex).to_dense()
    assert reads[:2].tolist() == [[0, 0, 1, 0, 0, 0]] * 2 and reads[2:4, 4:].all()


@pytest.mark.parametrize("birth_death", [False, True])
def test_regions_with_an_identity_are_read_through_their_slots(birth_death):
    layout, topology = three(
        ("a", "b"), ("b", "b"), Connection("c", "b", t_src=0, t_dst=-1, temporal_fill=TemporalFill.DROP), T=2
    )
    regions = {"b": RegionProgram(identity=IdentitySpec(slot_capacity=3, birth_death=birth_death))}
    x, out, dispatcher = ran(layout, topology, regions)
    (slots,) = dispatcher.slot_modules.values()
    bank = slots(x[:, [2, 3, 8, 9]])
    assert bank.shape == (1, 3, D_MODEL) and list(dispatcher.slot_modules) == ["b"]
    module = dispatcher.fn_modules["cross_attention"]
    close(out[:, [0, 1, 6, 7]], module(x[:, [0, 1, 6, 7]], bank, bank))
    close(out[:, [2, 3, 8, 9]], module(x[:, [2, 3, 8, 9]], bank, bank))
    # whatever frame the read names: the whole bank
    close(out[:, [10, 11]], module(x[:, [10, 11]], bank, bank))
    assert torch.equal(out[:, [4, 5]], x[:, [4, 5]])
    # afresh from x
    moved = x.clone()
    moved[:, 2] += 1
    assert not torch.equal(dispatcher(moved)[:, [0, 1]], out[:, [0, 1]])


def test_a_mask_of_pairs_says_who_reads_a_bank():
    layout = CanvasLayout(T=1, spatial_shape=(7,), d_model=D_MODEL, regions={"a": (0, 1, 0, 4), "b": (0, 1, 4, 7)})
    pattern = ((True, False, False), (True, True, False), (False, True, True), (False, False, False))
    topology = CanvasTopology([Connection("a", "b", mask=MaskSpec("sparse", pattern=pattern))])
    x, out, dispatcher = ran(layout, topology, {"b": RegionProgram(identity=IdentitySpec(slot_capacity=2))})
    bank = dispatcher.slot_modules["b"](x[:, 4:])
    close(out[:, :3], dispatcher.fn_modules["cross_attention"](x[:, :3], bank, bank))
    assert torch.equal(out[:, 3:], x[:, 3:])


def test_a_bank_that_nothing_reads_exists_and_is_not_run():
    layout, topology = three(("a", "b"))
    regions = {"a": RegionProgram(identity=IdentitySpec(slot_capacity=2))}
    x, out, dispatcher = ran(layout, topology, regions)
    close(out[:, A], read(dispatcher.fn_modules["cross_attention"], x, A, B))
    assert dispatcher.plan.n_packed == 4 and "a" in dispatcher.slot_modules


def test_residuals_follow_every_kind_of_edge():
    # published: never on temporal edges
    temporal = Connection("a", "b", t_src=0, t_dst=-1, write_mode="gate", weight=3.0)
    layout, topology = three(temporal, Connection("c", "b", write_mode="replace"), T=2, carrier="residual")
    accumulator = ResidualAccumulator(["b"], ResidualSpec(("largest", "mean"), decay=0.5))
    x, _, dispatcher = ran(layout, topology, residual_accumulator=accumulator)
    module = dispatcher.fn_modules["cross_attention"]
    first = (module(x[:, 6:8], x[:, 2:4], x[:, 2:4]) - x[:, 6:8]).abs()
    keys = x[:, [2, 3, 8, 9]]
    second = (module(x[:, [4, 5, 10, 11]], keys, keys) - x[:, [4, 5, 10, 11]]).abs()
    for kind, of in (("largest", torch.amax), ("mean", torch.mean)):
        expected = 0.5 * (0.5 * of(first).item()) + 0.5 * of(second).item()
        assert dispatcher.summaries["b"][kind] == pytest.approx(expected, rel=1e-5)


def test_residuals_go_by_either_carrier_and_by_what_is_kept():
    layout, topology = three(("a", "b"), ("a", "c"))
    accumulator = ResidualAccumulator(["b", "c"])
    regions = {"c": RegionProgram(carrier="residual")}
    _, _, dispatcher = ran(layout, topology, regions, residual_accumulator=accumulator)
    assert dispatcher.summaries["b"]["prediction"] == 0 < dispatcher.summaries["c"]["prediction"]
    kept = ResidualAccumulator(["b"])
    ran(layout, topology, regions, residual_accumulator=kept)
    assert kept.summaries() == {"b": {"prediction": 0.0}}


def test_regions_of_the_family_residual_have_the_carrier_residual():
    assert RegionProgram("residual").carrier == RegionProgram("residual", carrier="deterministic").carrier == "residual"
    assert [RegionProgram(f, carrier="filter").carrier for f in ("residual", "state")] == ["filter", "filter"]
    layout, topology = three(("a", "b"))
    _, _, dispatcher = ran(
        layout, topology, {"b": RegionProgram("residual")}, residual_accumulator=ResidualAccumulator(["b"])
    )
    assert dispatcher.summaries["b"]["prediction"] > 0
    # another carrier was asked for: nothing is kept, and that is said
    with pytest.warns(UserWarning, match="region 'b' is of the family 'residual', but of the carrier 'filter'"):
        _, _, dispatcher = ran(
            layout, topology, {"b": RegionProgram("residual", carrier="filter")},
            residual_accumulator=ResidualAccumulator(["b"]),
        )  # fmt: skip
    assert dispatcher.summaries["b"]["prediction"] == 0


def test_inactive_connections_leave_no_residual():
    layout, topology = three(("a", "b"), carrier="residual")
    accumulator = ResidualAccumulator(["b"])
    x, _, dispatcher = ran(layout, topology, residual_accumulator=accumulator)
    before = dispatcher.summaries
    for active in ({"c"}, torch.tensor([0, 1, 1])):
        assert torch.equal(dispatcher(x, active), x) and dispatcher.summaries == before


def test_a_step_of_which_nothing_runs_costs_nothing(monkeypatch):
    layout, topology = three(("a", "b"), Connection("c", "b", weight=0))
    x, out, dispatcher = ran(layout, topology)
    assert torch.equal(dispatcher(x, iter(["c", "a"])), out)
    for module in dispatcher.fn_modules.values():
        monkeypatch.setattr(module, "attend", None)
    with torch.no_grad():
        assert dispatcher(x, {"b", "c"}) is x and dispatcher(x, []) is x and dispatcher(x, "b") is x
    with pytest.raises(KeyError, match=r"active_regions names \['z'\]"):
        dispatcher(x, {"z"})


def test_a_step_of_which_nothing_runs_touches_every_parameter_in_training():
    # other processes wait for the gradients of each
    layout, topology = three(("a", "b"), Connection("b", "a", write_mode="gate"))
    x, _, dispatcher = ran(layout, topology)
    out = dispatcher(x, {"c"})
    assert torch.equal(out, x)
    out.sum().backward()
    for parameter in dispatcher.parameters():
        assert parameter.grad is not None and not parameter.grad.any()


def test_clocks_drive_the_active_set_and_inner_steps():
    layout, topology = three(("a", "b"), ("b", "c"), ("c", "a"))
    regions = {
        "a": RegionProgram(clock=ClockSpec("internal", max_inner_steps=2)),
        "b": RegionProgram(clock=ClockSpec(period=2)),
    }
    x, _, dispatcher = ran(layout, topology, regions)
    scheduler = RegionScheduler(program_of(layout, topology, regions))
    expected = x
    plan = scheduler.step_plan(1)
    assert plan == [{"a", "c"}, {"a"}, {"a"}]
    for active in plan:
        expected = dispatcher(expected, active)
    found = dispatcher.microsteps(x, plan)
    assert torch.equal(found, expected) and torch.equal(found[:, B], x[:, B]) and not torch.equal(found[:, A], x[:, A])


def test_joint_form_has_no_gates_and_no_triggers():
    layout, topology = three(("a", "b"))
    for cp, what in (
        (ConnectionProgram(write_mode="gate"), "a gate"),
        (ConnectionProgram(trigger="b.k > 1"), r"a trigger 'b\.k > 1'"),
    ):
        program = program_of(layout, topology, None, {("a", "b"): cp})
        with pytest.raises(
            ValueError, match=f"connection 0, 'a' attends to 'b' with {what}, which belongs to the edge form"
        ):
            compile_attention(layout, topology, program, normalize="joint")


def test_programs_that_cannot_be_run_are_refused():
    layout, topology = three(("a", "b"))
    bad = program_of(layout, topology, {"a": RegionProgram(clock=ClockSpec(mode="cron"))})
    for compiler in (
        lambda: AttentionDispatcher(topology, layout, D_MODEL, program=bad),
        lambda: compile_attention(layout, topology, bad),
    ):
        with pytest.raises(ValueError, match="program of region 'a': unknown clock mode 'cron'"):
            compiler()
    with pytest.raises(ValueError, match="program must be a CanvasProgram, or None"):
        AttentionDispatcher(topology, layout, D_MODEL, program={})
    clash = CanvasLayout(T=1, spatial_shape=(2,), d_model=12, regions={"keys": (0, 1, 0, 1)})
    program = program_of(clash, CanvasTopology(), {"keys": RegionProgram(identity=IdentitySpec())})
    with pytest.raises(ValueError, match="region 'keys' cannot have a slot bank: the module name 'keys'"):
        AttentionDispatcher(CanvasTopology(), clash, 12, program=program)
