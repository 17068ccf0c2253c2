"""Programs: specs, JSON, operators, triggers, what compiling one from types gives, what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from canvas_engineering import (
    DEFAULT_WIRING,
    FAMILY_DEFAULTS,
    CanvasLayout,
    CanvasSchema,
    CanvasTopology,
    ClockSpec,
    Connection,
    ConnectionProgram,
    ConstraintSpec,
    Field,
    IdentitySpec,
    LearningSpec,
    MaskSpec,
    RegionProgram,
    RegionSpec,
    compile_program,
    compile_schema,
    default_learning,
)
from canvas_engineering.clock_ir import BoundaryExpr, Cooldown, OnEvent, Or, Periodic
from canvas_engineering.cortex import CortexRegistry, CortexSpec
from canvas_engineering.program import (
    CARRIERS,
    COMPILE_MODES,
    OPERATOR_DEFAULTS,
    OPERATORS,
    REGION_FAMILIES,
    WRITE_MODES,
    CanvasProgram,
    evaluate_trigger,
    resolve_operator_defaults,
)
from canvas_engineering.program.checks import check_program
from canvas_engineering.program.connections import apply_program
from tests.declare.test_clock_ir import expressions

LAYOUT = CanvasLayout(
    T=2, spatial_shape=(6,), d_model=8, regions={name: (0, 2, i, i + 1) for i, name in enumerate("abcd")}
)


def schema(*connections, layout=LAYOUT):
    return CanvasSchema(layout, CanvasTopology(list(connections)))


def optional(strategy):
    return st.none() | strategy


names = st.text(st.sampled_from("ab|\\.[0]"), min_size=1, max_size=5)
clocks = st.builds(
    ClockSpec,
    st.sampled_from(["external", "internal", "boundary"]),
    st.sampled_from(["periodic", "on_event", "boundary"]),
    st.integers(1, 5),
    optional(st.just("a.k")),
    st.floats(-5, 5),
    st.integers(0, 3),
    optional(st.integers(1, 9)),
    optional(st.integers(1, 3)),
    optional(expressions),
)
masks = st.sampled_from(
    [
        MaskSpec(),
        MaskSpec("tile", tile_h=2, tile_w=3),
        MaskSpec("tile", tile_shape=(4,)),
        MaskSpec("sparse", pattern=((True, False), (False, True))),
    ]
)
regions = st.builds(
    RegionProgram,
    st.sampled_from([*REGION_FAMILIES, "mood"]),
    st.lists(st.text(max_size=3), max_size=2).map(tuple),
    st.sampled_from([*CARRIERS, "wave"]),
    optional(clocks),
    optional(st.builds(LearningSpec, st.just("none"), st.just(("l1", "l2")), st.sampled_from(["freeze", "distill"]))),
    st.sampled_from([*COMPILE_MODES, "distill"]),
    optional(st.builds(ConstraintSpec, optional(st.just("rotation")), st.none(), optional(st.just("acyclic")))),
    optional(st.builds(IdentitySpec, st.just("persistent"), st.integers(1, 9), birth_death=st.booleans())),
)
edges = st.builds(
    ConnectionProgram,
    st.sampled_from([*OPERATORS, "haunt"]),
    optional(st.just("a.k > 1")),
    st.sampled_from(sorted(WRITE_MODES)),
    optional(masks),
)


@given(st.dictionaries(names, regions, max_size=3), st.dictionaries(st.tuples(names, names), edges, max_size=3))
def test_json_keeps_every_field(region_programs, connection_programs):
    program = CanvasProgram(schema(Connection("a", "b")), region_programs, connection_programs)
    loaded = CanvasProgram.from_dict(json.loads(json.dumps(program.to_dict())))
    assert loaded == program and loaded.to_dict() == program.to_dict()


def test_the_json_form_is_the_published_one(tmp_path):
    clock = ClockSpec(mode="on_event", event_source="b.prediction", event_threshold=0.5)
    program = CanvasProgram(
        schema(Connection("a", "b")),
        {"a": RegionProgram("observation", ("eye",), clock=clock), "b": RegionProgram()},
        {("a", "b"): ConnectionProgram("correct", "b.prediction > 0.1", mask_spec=MaskSpec("tile", tile_w=2))},
    )
    form = program.to_dict()
    assert form["program_version"] == "2.0.0" and form["schema_version"] == "0.2.0" and "layout" in form
    assert form["region_programs"] == {
        "a": {
            "family": "observation",
            "tags": ["eye"],
            "clock": {"mode": "on_event", "event_source": "b.prediction", "event_threshold": 0.5},
        },
        "b": {},
    }
    assert form["connection_programs"] == {
        "a|b": {"operator": "correct", "trigger": "b.prediction > 0.1", "mask_spec": {"kind": "tile", "tile_w": 2}}
    }
    program.to_json(tmp_path / "program.json")
    assert CanvasProgram.from_json(tmp_path / "program.json") == program
    assert [path.name for path in tmp_path.iterdir()] == ["program.json"]
    with pytest.raises(ValueError, match=r"no region_programs, connection_programs: .*CanvasProgram"):
        CanvasSchema.from_json(tmp_path / "program.json")
    assert CanvasProgram.from_dict(program.schema.to_dict()) == CanvasProgram(program.schema)


def test_numbers_of_other_kinds_become_plain_ones():
    clock = ClockSpec(period=np.int64(3), max_silence=np.int32(4), expr=Cooldown(Periodic(np.int64(2)), np.int64(1)))
    region = RegionProgram(clock=clock, identity=IdentitySpec(slot_capacity=np.int64(5)))
    program = CanvasProgram(schema(), {"a": region})
    assert CanvasProgram.from_dict(json.loads(json.dumps(program.to_dict()))) == program


def test_bad_json_is_named(tmp_path):
    form = CanvasProgram(schema()).to_dict()
    for entry, message in (
        ({"region_programs": {"a": {"mood": 1}}}, r"program of region 'a' has unknown fields \['mood'\]"),
        ({"region_programs": {"a": {"clock": {"period": 0}}}}, "program of region 'a', clock: ClockSpec period"),
        ({"region_programs": {"a": {"clock": {"expr": {"type": "cron"}}}}}, "'a', clock: unknown clock expression"),
        ({"connection_programs": {"ab": {}}}, "'ab' for a key, which is not 'src|dst'"),
        ({"connection_programs": {"a|b": {"mask_spec": {"kind": "odd"}}}}, "mask_spec: unknown mask kind 'odd'"),
        ({"connection_programs": []}, r"connection_programs must be a dict, got \[\]"),
    ):
        with pytest.raises(ValueError, match=message):
            CanvasProgram.from_dict({**form, **entry})
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json: a schema must be a dict"):
        CanvasProgram.from_json(tmp_path / "bad.json")
    with pytest.raises(ValueError, match=r"map \(src, dst\) to ConnectionPrograms, got 'a'"):
        CanvasProgram(schema(), connections={"a": ConnectionProgram()})
    with pytest.raises(ValueError, match="RegionProgram clock must be a ClockSpec, or None, got 3"):
        RegionProgram(clock=3)


def paths_of(form, path=()):
    """Paths of everything in a JSON form."""
    items = form.items() if isinstance(form, dict) else enumerate(form) if isinstance(form, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from paths_of(item, (*path, key))


@pytest.mark.filterwarnings("ignore:a mask of kind 'sparse' without a pattern:UserWarning")
def test_wrong_json_is_refused_with_its_place_and_nothing_else_is_raised():
    """Every entry in turn replaced by every kind of JSON value: a program, or a ValueError."""
    clock = ClockSpec(
        "internal", "on_event", 2, "a.k", 0.5, 1, 3, 2, Cooldown(Or(OnEvent("a.k", 0.1, 2.0), BoundaryExpr("end")), 4)
    )
    region = RegionProgram(
        "memory", ("x",), "filter", clock, LearningSpec("ssl", ("l1",), "freeze"), "export",
        ConstraintSpec("rotation", "energy", "acyclic", "non_decreasing"), IdentitySpec("persistent", 3, "x", True),
    )  # fmt: skip
    cp = ConnectionProgram("write", "a.k > 1", "gate", MaskSpec("sparse", pattern=((True, False), (False, True))))
    form = CanvasProgram(schema(AB), {"a": region}, {("a", "b"): cp}).to_dict()
    parts = {name: form[name] for name in ("program_version", "region_programs", "connection_programs")}
    paths, refused = list(paths_of(parts)), 0
    for path in paths:
        for junk in (None, True, 3, -1, 1.5, 10**400, float("nan"), "", "x", [], [3], [[]], {}, {"type": []}, {"x": 1}):
            broken = copy.deepcopy(form)
            place = broken
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = junk
            try:
                CanvasProgram.from_dict(broken)
            except ValueError as error:
                refused += 1
                where = "program_version" if path == ("program_version",) else "program"
                assert where in str(error), (path, junk, error)
    assert len(paths) > 40 and refused > 8 * len(paths)


def test_versions_and_numbers_and_names_are_checked():
    for version in (3, None, "3.0.0", "2", "x"):
        with pytest.raises(ValueError, match=r"program_version must be '2\.x\.y'"):
            CanvasProgram(schema(), version=version)
    assert CanvasProgram.from_dict({**schema().to_dict(), "program_version": "2.7.1"}).version == "2.7.1"
    threshold = ClockSpec(event_threshold=np.float32(0.5)).event_threshold
    assert type(threshold) is float and threshold == 0.5
    on = OnEvent("a.k", gt=np.float32(0.5), lt=np.float64(0.75))
    assert json.dumps(on.to_dict()) and type(on.gt) is float
    for wrong, message in (
        (lambda: BoundaryExpr(3), "BoundaryExpr name must be a string, got 3"),
        (lambda: LearningSpec(mode=3), "LearningSpec mode must be a string, got 3"),
        (lambda: LearningSpec(compile_mode=None), "LearningSpec compile_mode must be a string, got None"),
        (lambda: LearningSpec(losses=3), "LearningSpec losses must be a tuple of strings, got 3"),
        (lambda: LearningSpec(losses="task"), "LearningSpec losses must be a tuple of strings, got 'task'"),
        (lambda: RegionProgram(tags=3), "RegionProgram tags must be a tuple of strings, got 3"),
        (lambda: Field(tags=3), "Field tags must be a tuple of strings, got 3"),
        (lambda: ConstraintSpec(equivariance=[]), r"ConstraintSpec equivariance must be a str, or None, got \[\]"),
        (lambda: IdentitySpec(mode=[]), r"IdentitySpec mode must be a string, got \[\]"),
        (lambda: ClockSpec(event_threshold="1"), "ClockSpec event_threshold must be a finite number, got '1'"),
        (lambda: Periodic(domain=3), "Periodic domain must be a string, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


def test_the_sets_and_the_families_are_the_published_ones():
    assert {"observation", "state", "memory", "residual", "action"} == REGION_FAMILIES
    assert {"deterministic", "diffusive", "filter", "memory", "residual"} == CARRIERS
    assert {"add", "replace", "gate"} == WRITE_MODES and {"runtime", "freeze", "constant", "export"} == COMPILE_MODES
    assert len(OPERATORS) == 12 and set(OPERATOR_DEFAULTS) == OPERATORS
    assert {f: (s.mode, s.losses, s.compile_mode) for f, s in FAMILY_DEFAULTS.items()} == {
        "observation": ("ssl_prediction", ("next_step", "masked_prediction"), "freeze"),
        "state": ("posterior_match", ("predictive_consistency", "calibration"), "runtime"),
        "memory": ("retrieval", ("retrieval_accuracy", "write_utility"), "export"),
        "residual": ("calibration", ("calibration", "sparsity"), "freeze"),
        "action": ("supervised", ("task",), "freeze"),
    }


def test_the_carrier_of_the_family_residual_is_the_same_in_layout_program_and_json():
    tree = SimpleNamespace(
        left=Field(family="residual"), said=Field(family="residual", carrier="deterministic"),
        other=Field(family="residual", carrier="memory"), state=Field(family="state"),
    )  # fmt: skip
    bound, program = compile_program(tree)
    wanted = {"left": "residual", "said": "residual", "other": "memory", "state": "deterministic"}
    assert {name: bound.layout.region_spec(name).carrier for name in bound.field_names} == wanted
    assert {name: region.carrier for name, region in program.regions.items()} == wanted
    again = CanvasProgram.from_dict(program.to_dict())
    assert again == program and again.regions["left"].carrier == "residual"
    # a program that was saved with its family alone
    saved = {**program.to_dict(), "region_programs": {"left": {"family": "residual"}}}
    assert CanvasProgram.from_dict(saved).regions["left"].carrier == "residual"


def test_learning_falls_back_to_the_family_and_compile_mode_does_not():
    assert RegionProgram("memory").effective_learning() == FAMILY_DEFAULTS["memory"] == default_learning("memory")
    assert RegionProgram("mood").effective_learning() == LearningSpec() == default_learning("mood")
    own = LearningSpec("none", compile_mode="constant")
    assert RegionProgram("memory", learning=own).effective_learning() is own
    assert RegionProgram("memory").effective_compile_mode() == "runtime"
    assert RegionProgram("memory").effective_compile_mode(family_defaults=True) == "export"
    assert RegionProgram("memory", learning=own).effective_compile_mode(True) == "constant"
    assert RegionProgram("memory", learning=own, compile_mode="freeze").effective_compile_mode() == "freeze"


# -- operators and triggers


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_every_operator_has_its_row(name):
    expected = {
        "write": ("cross_attention", "replace", None),
        "act": ("cross_attention", "replace", None),
        "compress": ("pooling_attention", "add", None),
    }.get(name, ("cross_attention", "add", None))
    assert resolve_operator_defaults(ConnectionProgram(name), "cross_attention") == expected
    assert resolve_operator_defaults(ConnectionProgram(name), "gated")[0] == "gated"


def test_explicit_fields_win_over_the_operator():
    assert resolve_operator_defaults(None, "gated") == ("gated", "add", None)
    assert resolve_operator_defaults(ConnectionProgram("haunt"), "cross_attention") == ("cross_attention", "add", None)
    explicit = ConnectionProgram("write", "a.k > 1", "gate")
    assert resolve_operator_defaults(explicit, "cross_attention") == ("cross_attention", "gate", "a.k > 1")


@pytest.mark.parametrize(
    ("trigger", "expected"),
    [
        (None, True),
        ("a.k < 2", True), ("a.k < 1", False),
        ("a.k > 0.5", True), ("a.k > 1", False),
        ("a.k <= 1", True), ("a.k <= 0.9", False),
        ("a.k >= 1", True), ("a.k >= 1.1", False),
        ("a.k == 1", True), ("a.k == 2", False),
        ("a.k != 2", True), ("a.k != 1", False),
        ("a.k > 0 && b.c[0].k < -1e-3", True), ("a.k > 0 && b.c[0].k > 0", False),
        ("a.other < 5", False), ("z.k < 5", False), ("a.k > 0 && z.k != 3", False),
        ("  a.k>0.5  ", True),
    ],
)  # fmt: skip
def test_triggers(trigger, expected):
    summaries = {"a": {"k": 1.0}, "b.c[0]": {"k": -2.0}}
    assert evaluate_trigger(trigger, summaries) is expected
    assert evaluate_trigger(trigger, None) is (trigger is None)


@pytest.mark.parametrize("bad", ["", "a.k", "k > 1", "a.k > b", "a.k >> 1", "a.k > 1 || a.k < 0", "a.k > 1 &&",
                                 "a.k = 1", "a.k > nan", "0 < a.k < 1"])  # fmt: skip
def test_triggers_of_another_form_are_refused(bad):
    with pytest.raises(ValueError, match=r"is not '<region>\.<kind> <op> <number>'"):
        evaluate_trigger(bad, {"a": {"k": 1.0}})
    program = CanvasProgram(schema(Connection("a", "b")), {}, {("a", "b"): ConnectionProgram(trigger=bad)})
    with pytest.raises(ValueError, match="program of connection 'a' -> 'b': trigger"):
        check_program(program)


# -- connections as they run


def run(connection, cp=None, default_attn="cross_attention", backend=None):
    layout = CanvasLayout(
        T=1, spatial_shape=(4,), d_model=8,
        regions={"a": RegionSpec((0, 1, 0, 1), default_attn=default_attn), "b": (0, 1, 1, 2)},
    )  # fmt: skip
    cortex = CortexRegistry()
    if backend:
        cortex.register(CortexSpec("c", local_backend=backend))
        cortex.assign("a", "c")
        cortex.assign("b", "c")
    topology = CanvasTopology([connection])
    program = CanvasProgram(CanvasSchema(layout, topology), {}, {} if cp is None else {("a", "b"): cp})
    resolved, triggers = apply_program(topology, layout, program, cortex)
    (found,) = resolved.connections
    return resolved.resolve_fn(found, layout), found.write_mode, triggers.get(0), found.mask


AB = Connection("a", "b")


@pytest.mark.parametrize(
    ("connection", "cp", "default_attn", "backend", "fn"),
    [
        (AB, None, "cross_attention", None, "cross_attention"),
        (AB, None, "gated", None, "gated"),
        (AB, ConnectionProgram("compress"), "cross_attention", None, "pooling_attention"),
        (AB, ConnectionProgram("compress"), "gated", None, "gated"),
        (AB, ConnectionProgram("compress"), "gated", "mamba", "mamba"),
        (AB, None, "gated", "mamba", "mamba"),
        (AB, ConnectionProgram("compress"), "gated", "cross_attention", "cross_attention"),
        (dataclasses.replace(AB, fn="copy"), ConnectionProgram("compress"), "gated", "mamba", "copy"),
        (dataclasses.replace(AB, fn="cross_attention"), ConnectionProgram("compress"), "cross_attention", None,
         "cross_attention"),
        # metadata alone changes nothing
        (dataclasses.replace(AB, operator="compress"), None, "cross_attention", None, "cross_attention"),
    ],
)  # fmt: skip
def test_the_function_goes_by_connection_cortex_region_operator(connection, cp, default_attn, backend, fn):
    assert run(connection, cp, default_attn, backend)[0] == fn


@pytest.mark.parametrize(
    ("own", "cp", "expected"),
    [
        ("add", None, "add"), ("gate", None, "gate"),
        ("add", ConnectionProgram("write"), "replace"), ("add", ConnectionProgram("act"), "replace"),
        ("gate", ConnectionProgram("write"), "gate"),
        ("gate", ConnectionProgram("write", write_mode="replace"), "replace"),
        ("replace", ConnectionProgram(write_mode="gate"), "gate"),
        ("add", ConnectionProgram("haunt", write_mode="gate"), "gate"),
        ("replace", ConnectionProgram("attend"), "replace"),
    ],
)  # fmt: skip
def test_the_write_mode_goes_by_program_connection_operator(own, cp, expected):
    assert run(dataclasses.replace(AB, write_mode=own), cp)[1] == expected


def test_the_programs_mask_wins_and_its_trigger_is_found():
    own, given = MaskSpec("tile", tile_shape=(1,)), MaskSpec("tile", tile_shape=(2,))
    masked = dataclasses.replace(AB, mask=own)
    assert run(masked, ConnectionProgram(trigger="b.k > 1"))[2:] == ("b.k > 1", own)
    assert run(masked, ConnectionProgram(mask_spec=given))[2:] == (None, given)


def test_programs_of_pairs_without_a_connection_are_told_of():
    program = CanvasProgram(schema(AB), {}, {("b", "a"): ConnectionProgram(), ("a", "b"): ConnectionProgram()})
    with pytest.warns(UserWarning, match=r"1 of 2 connection programs are for pairs .* 'b' -> 'a'"):
        apply_program(program.schema.topology, LAYOUT, program)


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (RegionProgram(compile_mode="melt"), "unknown compile_mode 'melt': choose one of constant, export, freeze, "),
        (RegionProgram(learning=LearningSpec(compile_mode="melt")), "unknown compile_mode 'melt'"),
        (RegionProgram(clock=ClockSpec(mode="cron")), "unknown clock mode 'cron': choose one of periodic, on_event, b"),
        (RegionProgram(clock=ClockSpec("lunar")), "unknown clock domain 'lunar': choose one of external, internal, b"),
        (RegionProgram(clock=ClockSpec(mode="on_event")), "'on_event' needs event_source, 'region.kind', got None"),
        (RegionProgram(clock=ClockSpec(mode="boundary")), "'boundary' needs event_source, the name of an event"),
        (RegionProgram(identity=IdentitySpec("fleeting")), "unknown identity mode 'fleeting'"),
    ],
)
def test_unknown_values_are_refused_with_their_choices(region, message):
    with pytest.raises(ValueError, match=rf"program of region 'a': .*{message}"):
        check_program(CanvasProgram(schema(), {"a": region}))


def test_unknown_write_modes_are_refused_and_free_strings_are_not():
    with pytest.raises(ValueError, match="connection 'a' -> 'b': unknown write_mode 'x': choose one of add, gate, rep"):
        check_program(CanvasProgram(schema(AB), {}, {("a", "b"): ConnectionProgram(write_mode="x")}))
    free = RegionProgram("mood", ("x",), "wave", learning=LearningSpec("osmosis", ("luck",)), compile_mode="distill")
    check_program(CanvasProgram(schema(AB), {"a": free}, {("a", "b"): ConnectionProgram("haunt")}))
    with pytest.raises(ValueError, match="program must be a CanvasProgram, got None"):
        check_program(None)


# -- compile_program


FAMILIES = ("observation", "state", "memory", "residual", "action")
WIRED = {
    ("observation", "state"): "observe", ("state", "observation"): "predict", ("state", "state"): "integrate",
    ("state", "memory"): "write", ("memory", "state"): "retrieve", ("state", "action"): "act",
    ("action", "state"): "intervene", ("state", "residual"): "emit_residual",
    ("observation", "residual"): "emit_residual",
}  # fmt: skip


@pytest.mark.parametrize("src", FAMILIES)
@pytest.mark.parametrize("dst", FAMILIES)
def test_every_pair_of_families_has_its_operator(src, dst):
    root = SimpleNamespace(one=Field(family=src), two=Field(family=dst))
    bound, program = compile_program(root, T=2, d_model=8)
    operators = {(c.src, c.dst): c.operator for c in bound.topology.connections}
    assert operators["one", "two"] == WIRED.get((src, dst), "attend")
    assert DEFAULT_WIRING.get((src, dst), "attend") == WIRED.get((src, dst), "attend")
    assert program.schema is bound.schema and bound.topology is program.schema.topology and not program.connections


def test_default_wiring_names_the_attending_pairs_too():
    attending = {pair for pair, operator in DEFAULT_WIRING.items() if operator == "attend"}
    assert attending == {(f, f) for f in ("observation", "action", "memory", "residual")} and len(DEFAULT_WIRING) == 13


def test_fields_become_region_programs():
    root = SimpleNamespace(
        eye=Field(2, 2, family="observation", tags=("left",)),
        error=Field(family="residual"),
        sample=Field(carrier="diffusive"),
        plain=Field(3, 3),
    )
    bound, program = compile_program(root, T=2, d_model=8)
    assert program.regions == {
        "eye": RegionProgram("observation", ("left",)),
        "error": RegionProgram("residual", carrier="residual"),
        "sample": RegionProgram("state", carrier="diffusive"),
        "plain": RegionProgram(),
    }
    plain = compile_schema(root, T=2, d_model=8)
    assert bound.layout == plain.layout
    # a family that is not declared rewires nothing
    operators = {(c.src, c.dst): c.operator for c in bound.topology.connections}
    assert operators["eye", "plain"] == operators["sample", "sample"] == "attend"
    assert [dataclasses.replace(c, operator="attend") for c in bound.topology.connections] == plain.topology.connections
    assert CanvasProgram.from_dict(program.to_dict()) == program
    assert compile_program(root, T=2, d_model=8, H=4, W=8)[0].layout.spatial_shape == (4, 8)
    _, nested = compile_program(SimpleNamespace(arm=root, goal=Field(attn="gated")), T=2, d_model=8)
    assert nested.regions["arm"] == nested.regions["goal"] == RegionProgram() and len(nested.regions) == 6


def test_summaries_count():
    _, program = compile_program(SimpleNamespace(a=Field(family="memory"), b=Field(family="action")), d_model=8)
    program.regions["a"] = dataclasses.replace(program.regions["a"], clock=ClockSpec(), compile_mode="export")
    program.connections["a", "b"] = ConnectionProgram("write")
    assert program.summary().splitlines() == [
        "CanvasProgram (v2.0.0, 2 regions programmed):",
        "  families: action=1, memory=1",
        "  clocks: periodic=1",
        "  compile modes: export=1",
        "  operators: write=1",
    ]
