"""validate_constraints: every clause, with what meets it and what does not."""

from __future__ import annotations

import itertools

import pytest

from canvas_engineering import (
    CanvasLayout,
    CanvasProgram,
    CanvasSchema,
    CanvasTopology,
    Connection,
    ConnectionProgram,
    ConstraintSpec,
    RegionProgram,
    RegionSpec,
    validate_constraints,
)

EVERY_FN = ("cross_attention", "linear_attention", "cosine_attention", "sigmoid_attention", "gated", "perceiver",
            "pooling", "copy", "mamba", "rwkv", "hyena", "sparse_attention", "local_attention", "random_fixed",
            "mixture", "cogvideox")  # fmt: skip
BREAKS = {
    "translation": {"mamba", "rwkv", "copy", "random_fixed", "mixture"},
    "rotation": {"local_attention", "mamba", "rwkv", "hyena", "copy", "random_fixed", "mixture"},
    "permutation": {"local_attention", "mamba", "rwkv", "hyena", "copy", "random_fixed", "mixture"},
}


def violations(pairs, constraints, starts=(), attn="cross_attention", carrier="deterministic", programs=None):
    starts = dict(starts)
    regions = {
        name: RegionSpec((starts.get(name, 0), 4, i, i + 1), default_attn=attn if name == "a" else "cross_attention")
        for i, name in enumerate("abcd")
    }
    layout = CanvasLayout(T=4, spatial_shape=(4,), d_model=8, regions=regions)
    connections = [pair if isinstance(pair, Connection) else Connection(*pair) for pair in pairs]
    program = CanvasProgram(
        CanvasSchema(layout, CanvasTopology(connections)),
        {"a": RegionProgram(constraints=constraints, carrier=carrier)},
        programs or {},
    )
    return validate_constraints(program)


@pytest.mark.parametrize(
    ("field", "bad", "known"),
    [
        ("equivariance", "scale", "translation, rotation, permutation"),
        ("conservation", "momentum", "capacity, energy"),
        ("causal_direction", "sideways", "acyclic, forward_only"),
        ("monotonicity", "wavy", "non_decreasing, non_increasing"),
    ],
)
def test_unknown_values_are_reported(field, bad, known):
    assert violations([], ConstraintSpec(**{field: bad})) == [f"a: unknown {field} {bad!r}: choose one of {known}"]
    for value in known.split(", "):
        assert violations([], ConstraintSpec(**{field: value})) == []


@pytest.mark.parametrize("symmetry", sorted(BREAKS))
@pytest.mark.parametrize("fn", EVERY_FN)
def test_equivariance_goes_by_the_function_of_outgoing_connections(symmetry, fn):
    found = violations([Connection("a", "b", fn=fn), ("c", "a")], ConstraintSpec(equivariance=symmetry))
    if fn in BREAKS[symmetry]:
        assert len(found) == 1 and found[0].startswith(f"a: equivariance {symmetry!r}") and repr(fn) in found[0]
    else:
        assert found == []
    # incoming ones do not count
    assert violations([Connection("b", "a", fn=fn)], ConstraintSpec(equivariance=symmetry)) == []


def test_equivariance_sees_default_functions():
    assert len(violations([("a", "b")], ConstraintSpec(equivariance="translation"), attn="mamba")) == 1


def test_conservation_forbids_replacing_writes_whoever_declares_them():
    energy = ConstraintSpec(conservation="energy")
    assert violations([("a", "b"), Connection("a", "c", write_mode="gate")], energy) == []
    for replacing in (Connection("a", "b", write_mode="replace"), Connection("b", "a", write_mode="replace")):
        (found,) = violations([replacing], energy)
        assert found.startswith("a: conservation 'energy'") and f"{replacing.src} -> {replacing.dst}" in found
    assert len(violations([("a", "b")], energy, programs={("a", "b"): ConnectionProgram("write")})) == 1
    assert len(violations([("a", "b")], energy, programs={("a", "b"): ConnectionProgram(write_mode="replace")})) == 1
    elsewhere = Connection("b", "c", write_mode="replace")
    assert violations([("a", "b"), elsewhere], energy) == []
    # a trigger elsewhere that cannot be read hides nothing
    spoken = {("a", "b"): ConnectionProgram("write"), ("b", "c"): ConnectionProgram(trigger="nonsense")}
    assert len(violations([("a", "b"), ("b", "c")], energy, programs=spoken)) == 1


def test_acyclic_follows_reads_from_the_region():
    acyclic = ConstraintSpec(causal_direction="acyclic")
    assert violations([("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")], acyclic) == []
    assert violations([("a", "b"), ("b", "c"), ("c", "b")], acyclic) == [
        "a: causal_direction 'acyclic' does not hold: b -> c -> b is a cycle"
    ]
    assert "a -> a is a cycle" in violations([("a", "a")], acyclic)[0]
    # a cycle that a cannot reach, and one of edges that do not run
    assert violations([("b", "c"), ("c", "b"), ("b", "a")], acyclic) == []
    assert violations([("a", "b"), Connection("b", "a", fn="none"), Connection("b", "a", weight=0)], acyclic) == []


def test_acyclic_walks_long_chains_without_recursion():
    names = [f"r{i}" for i in range(3000)]
    layout = CanvasLayout(
        T=1, spatial_shape=(3000,), d_model=8, regions={n: (0, 1, i, i + 1) for i, n in enumerate(names)}
    )
    chain = [Connection(a, b) for a, b in itertools.pairwise(names)]
    constrained = {"r0": RegionProgram(constraints=ConstraintSpec(causal_direction="acyclic"))}
    assert validate_constraints(CanvasProgram(CanvasSchema(layout, CanvasTopology(chain)), constrained)) == []
    chain.append(Connection("r2999", "r2998"))
    (found,) = validate_constraints(CanvasProgram(CanvasSchema(layout, CanvasTopology(chain)), constrained))
    assert found.endswith("r2998 -> r2999 -> r2998 is a cycle")


def test_forward_only_compares_the_first_frames():
    forward = ConstraintSpec(causal_direction="forward_only")
    assert violations([("a", "b"), ("a", "c"), ("d", "a")], forward, {"a": 1, "b": 1, "c": 2}) == []
    assert violations([("a", "b"), ("a", "c")], forward, {"a": 1, "b": 1, "c": 0}) == [
        "a: causal_direction 'forward_only' does not hold: 'c' starts at frame 0, before 1"
    ]


@pytest.mark.parametrize("carrier", ["diffusive", "filter", "deterministic", "memory", "residual"])
def test_monotonicity_goes_by_the_carrier(carrier):
    found = violations([], ConstraintSpec(monotonicity="non_decreasing"), carrier=carrier)
    assert len(found) == (carrier in ("diffusive", "filter"))
    assert all(text.startswith("a: monotonicity") and repr(carrier) in text for text in found)


def test_everything_is_reported_at_once_and_nothing_without_constraints():
    every = ConstraintSpec("permutation", "capacity", "acyclic", "non_increasing")
    edge = Connection("a", "a", fn="mamba", write_mode="replace")
    assert len(violations([edge], every, carrier="filter")) == 4
    assert violations([edge], None, carrier="filter") == []
    # values that only running the program refuses do not stop the report
    unknown = {("a", "a"): ConnectionProgram(write_mode="x", trigger="?")}
    assert len(violations([edge], every, carrier="filter", programs=unknown)) == 4
