"""Clock expressions: what each node does, and that JSON keeps every tree."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from canvas_engineering import ClockCooldown, ClockMaxSilence, clock_boundary, clock_on, clock_periodic
from canvas_engineering.clock_ir import (
    And,
    BoundaryExpr,
    ClockContext,
    ClockExpr,
    Cooldown,
    MaxSilence,
    Not,
    OnEvent,
    Or,
    Periodic,
    boundary,
    on,
    periodic,
)

bounds = st.floats(-10, 10)
leaves = st.one_of(
    st.builds(Periodic, st.integers(1, 9), st.sampled_from(["external", "internal"])),
    st.builds(OnEvent, st.just("a.b.kind"), bounds, st.none()),
    st.lists(bounds, min_size=2, max_size=2, unique=True).map(lambda two: OnEvent("a.b.kind", *sorted(two))),
    st.builds(OnEvent, st.just("a.kind"), st.none(), bounds),
    st.builds(BoundaryExpr, st.text(max_size=4)),
)
expressions = st.recursive(
    leaves,
    lambda node: st.one_of(
        st.builds(And, node, node),
        st.builds(Or, node, node),
        st.builds(Not, node),
        st.builds(Cooldown, node, st.integers(0, 5)),
        st.builds(MaxSilence, node, st.integers(1, 5)),
    ),
    max_leaves=8,
)


def fires(expr, **context):
    return expr.evaluate(ClockContext(**context))


@given(expressions)
def test_json_keeps_every_tree(expr):
    loaded = ClockExpr.from_dict(json.loads(json.dumps(expr.to_dict())))
    assert loaded == expr and loaded.to_dict() == expr.to_dict() and hash(loaded) == hash(expr)


def test_the_types_of_the_dicts_are_the_published_ones():
    tree = And(Or(Periodic(), OnEvent("a.k", gt=1.0)), Not(Cooldown(MaxSilence(BoundaryExpr("e")))))
    assert {node.to_dict()["type"] for node in tree.nodes()} == {
        *("periodic", "on_event", "boundary_expr", "and", "or", "not", "cooldown", "max_silence")
    }
    assert OnEvent("a.k", gt=1.0).to_dict() == {"type": "on_event", "source": "a.k", "gt": 1.0, "domain": "external"}


def test_periodic_fires_at_multiples():
    assert [t for t in range(10) if fires(Periodic(4), external_t=t)] == [0, 4, 8]


def test_events_compare_strictly_and_both_bounds_are_a_band():
    def at(expr, value):
        return fires(expr, summaries={"a.b": {"err": value}})

    assert [at(OnEvent("a.b.err", gt=0.5), v) for v in (0.4, 0.5, 0.6)] == [False, False, True]
    assert [at(OnEvent("a.b.err", lt=0.5), v) for v in (0.4, 0.5, 0.6)] == [True, False, False]
    assert [at(OnEvent("a.b.err", gt=0.1, lt=0.5), v) for v in (0.1, 0.3, 0.5)] == [False, True, False]
    # a summary that is missing reads as 0
    assert fires(OnEvent("a.other", lt=0.5)) and not fires(OnEvent("a.other", gt=0.0))


def test_boundaries_go_by_name():
    assert fires(BoundaryExpr("reset"), boundary="reset")
    assert not fires(BoundaryExpr("reset"), boundary="end") and not fires(BoundaryExpr("reset"))


def test_the_domain_boundary_counts_events():
    counted = Periodic(2, "boundary")
    assert [fires(counted, external_t=3, boundary="x", boundary_t=n) for n in range(4)] == [True, False, True, False]
    assert not fires(counted, external_t=4, boundary_t=2)
    warned = OnEvent("a.k", gt=0.5, domain="boundary")
    assert [fires(warned, summaries={"a": {"k": 1.0}}, boundary=b) for b in (None, "x")] == [False, True]
    with pytest.raises(ValueError, match="unknown clock domain 'internal': choose one of external, boundary"):
        fires(Periodic(1, "internal"))


def test_and_or_not():
    yes, no = Periodic(1), BoundaryExpr("never")
    table = {(a, b): (fires(And(a, b)), fires(Or(a, b))) for a in (yes, no) for b in (yes, no)}
    assert list(table.values()) == [(True, True), (False, True), (False, True), (False, False)]
    assert fires(Not(no)) and not fires(Not(yes))


def test_cooldown_is_silent_before_its_time():
    assert [fires(Cooldown(Periodic(1), 3), external_t=t, cooldown_until=5) for t in (3, 4, 5)] == [False, False, True]
    assert not fires(Cooldown(BoundaryExpr("x"), 3), external_t=9, cooldown_until=5)


def test_max_silence_fires_first_and_after_so_many_steps():
    silent = MaxSilence(BoundaryExpr("x"), 4)
    assert fires(silent, external_t=0, last_fired=-1)
    assert [fires(silent, external_t=t, last_fired=2) for t in (3, 5, 6, 7)] == [False, False, True, True]
    assert fires(silent, external_t=3, last_fired=2, boundary="x")


def test_helpers_and_their_names_at_the_root():
    assert (periodic(3), on("a.k", gt=1), boundary("e")) == (Periodic(3), OnEvent("a.k", gt=1), BoundaryExpr("e"))
    assert (clock_periodic, clock_on, clock_boundary) == (periodic, on, boundary)
    assert (ClockCooldown, ClockMaxSilence) == (Cooldown, MaxSilence)


def test_bad_nodes_are_named():
    with pytest.raises(ValueError, match=r"OnEvent of 'a\.k' needs gt or lt"):
        OnEvent("a.k")
    with pytest.raises(ValueError, match=r"source must be 'region\.kind', got 'k'"):
        OnEvent("k", gt=1)
    with pytest.raises(ValueError, match="gt must be a finite number, got nan"):
        OnEvent("a.k", gt=float("nan"))
    with pytest.raises(ValueError, match="Periodic period must be at least 1, got 0"):
        Periodic(0)
    with pytest.raises(ValueError, match="And right must be a ClockExpr, got 3"):
        And(Periodic(), 3)
    with pytest.raises(
        ValueError, match=r"unknown clock expression type 'cron': choose one of periodic, .*max_silence"
    ):
        ClockExpr.from_dict({"type": "cron"})
    with pytest.raises(ValueError, match=r"'not'.* incomplete.*child"):
        ClockExpr.from_dict({"type": "not"})
    with pytest.raises(ValueError, match=r"'periodic' has unknown fields \['every'\]"):
        ClockExpr.from_dict({"type": "periodic", "every": 3})
    with pytest.raises(NotImplementedError, match="use one of periodic"):
        ClockExpr().evaluate(ClockContext())
