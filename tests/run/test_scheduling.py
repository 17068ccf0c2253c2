"""Schedulers: every rule of a clock, in its order; inner steps; the learned scorer; both together."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from canvas_engineering import (
    CanvasLayout,
    CanvasProgram,
    CanvasSchema,
    ClockSpec,
    RegionProgram,
)
from canvas_engineering.clock_ir import And, Cooldown, MaxSilence, Not, Or, boundary, on, periodic
from canvas_engineering.residuals import ResidualAccumulator, ResidualSpec
from canvas_engineering.scheduling import DeviceScheduler, HybridScheduler, LearnedScheduler, RegionScheduler

LAYOUT = CanvasLayout(
    T=1, spatial_shape=(4,), d_model=8, regions={name: (0, 1, i, i + 1) for i, name in enumerate("abcd")}
)


def program(**clocks):
    return CanvasProgram(CanvasSchema(LAYOUT), {name: RegionProgram(clock=clock) for name, clock in clocks.items()})


def fired(clock, steps, events=(), boundaries=()):
    """The steps at which a region of this clock fires; ``events`` and ``boundaries`` by step."""
    scheduler = RegionScheduler(program(a=clock))
    events, boundaries = dict(events), dict(boundaries)
    found = []
    for t in range(steps):
        names = scheduler.step(t, {"err.or": {"kind": events.get(t, 0.0)}}, boundaries.get(t))
        assert names >= {"b", "c", "d"}, "regions without a clock always run"
        found += [t] if "a" in names else []
    return found


EVENT = ClockSpec(mode="on_event", event_source="err.or.kind", event_threshold=0.5)


EVENTS = {1: "reset", 2: "end", 4: "reset", 5: "end", 6: "end"}


@pytest.mark.parametrize(
    ("clock", "expected"),
    [
        # the first event, and every second after it
        (ClockSpec("boundary", period=2), [1, 4, 6]),
        (ClockSpec("boundary", mode="on_event", event_source="err.or.kind", event_threshold=0.5), [2, 4]),
        (ClockSpec("boundary", mode="boundary", event_source="reset"), [1, 4]),
        (ClockSpec(mode="boundary", event_source="reset"), [1, 4]),
        # an expression is asked at events only; its own leaves count their own time
        (ClockSpec("boundary", expr=periodic(2)), [2, 4, 6]),
        (ClockSpec(expr=periodic(3, domain="boundary")), [1, 5]),
        (ClockSpec(expr=on("err.or.kind", gt=0.5, domain="boundary")), [2, 4]),
        # cooldowns and silences go by steps, whatever the domain
        (ClockSpec("boundary", cooldown=3), [1, 5]),
        (ClockSpec("boundary", mode="boundary", event_source="x", max_silence=3), [0, 3, 6]),
        # inner steps aside, "internal" is external time
        (ClockSpec("internal", period=3), [0, 3, 6]),
    ],
)
def test_domains_say_which_time_counts(clock, expected):
    assert fired(clock, 8, {2: 1.0, 3: 1.0, 4: 1.0}, EVENTS) == expected


@pytest.mark.parametrize(
    ("clock", "expected"),
    [
        (ClockSpec(), [0, 1, 2, 3, 4, 5, 6, 7]),
        (ClockSpec(period=3), [0, 3, 6]),
        (ClockSpec(cooldown=2), [0, 3, 6]),
        (ClockSpec(period=2, cooldown=2), [0, 4]),
        (ClockSpec(period=100, max_silence=3), [0, 3, 6]),
        # silence counts from the last firing, whatever made it fire
        (ClockSpec(period=5, max_silence=4), [0, 4, 5]),
        # a cooldown comes before a forced firing
        (ClockSpec(period=100, cooldown=4, max_silence=2), [0, 5]),
    ],
)
def test_periodic_clocks(clock, expected):
    assert fired(clock, 8) == expected


def test_event_clocks():
    events = {2: 0.5, 3: 0.6, 4: 0.7, 6: 9.0}
    assert fired(EVENT, 8, events) == [3, 4, 6]
    cooling = ClockSpec(mode="on_event", event_source="err.or.kind", event_threshold=0.5, cooldown=1)
    assert fired(cooling, 8, events) == [3, 6]
    patient = ClockSpec(mode="on_event", event_source="err.or.kind", event_threshold=0.5, max_silence=5)
    # never fired: at once; then 3, 4, 6 by events
    assert fired(patient, 8, events) == [0, 3, 4, 6]
    below = ClockSpec(mode="on_event", event_source="no.such.kind", event_threshold=-1.0)
    assert fired(below, 3) == [0, 1, 2], "a summary that is missing reads as 0"
    assert fired(ClockSpec(mode="on_event", event_source="no.such.kind"), 3) == []


def test_boundary_clocks():
    clock = ClockSpec("boundary", mode="boundary", event_source="reset")
    assert fired(clock, 6, boundaries={1: "reset", 2: "end", 4: "reset"}) == [1, 4]


@pytest.mark.parametrize(
    ("expr", "expected"),
    [
        (periodic(3), [0, 3, 6]),
        (Or(periodic(5), on("err.or.kind", gt=0.5)), [0, 3, 4, 5, 6]),
        (And(periodic(2), Not(boundary("reset"))), [0, 2, 6]),
        (Cooldown(on("err.or.kind", gt=0.5), 2), [3, 6]),
        (MaxSilence(on("err.or.kind", gt=0.5), 3), [0, 3, 4, 6]),
        # each Cooldown counts its own steps
        (Or(Cooldown(periodic(1), 4), Cooldown(on("err.or.kind", gt=0.5), 1)), [0, 3, 6]),
    ],
)
def test_expressions_take_the_place_of_modes(expr, expected):
    clock = ClockSpec(mode="on_event", event_source="z.z", expr=expr)
    assert fired(clock, 8, {3: 1.0, 4: 1.0, 6: 1.0}, {4: "reset"}) == expected


def test_flat_cooldown_and_silence_stand_before_an_expression():
    assert fired(ClockSpec(cooldown=1, expr=periodic(1)), 6) == [0, 2, 4]
    assert fired(ClockSpec(max_silence=4, expr=boundary("x")), 9) == [0, 4, 8]


def test_reset_forgets():
    scheduler = RegionScheduler(program(a=ClockSpec(cooldown=5)))
    assert ["a" in scheduler.step(t) for t in (0, 1)] == [True, False]
    scheduler.reset()
    assert "a" in scheduler.step(1)
    counting = RegionScheduler(program(a=ClockSpec("boundary", period=2)))
    assert ["a" in counting.step(t, boundary="end") for t in (0, 1)] == [True, False]
    counting.step(2, boundary="end")
    counting.reset()
    assert "a" in counting.step(3, boundary="end")


def test_regions_that_the_layout_lacks_have_clocks_too():
    # a scheduler may stand alone, without a canvas that has its regions
    declared = program(a=ClockSpec(period=2), y=ClockSpec(period=3), z=None)
    scheduler = RegionScheduler(declared)
    everywhere = {"b", "c", "d", "z"}
    assert [scheduler.step(t) - everywhere for t in range(4)] == [{"a", "y"}, set(), {"a"}, {"y"}]
    assert scheduler.step(5) == everywhere
    hybrid = HybridScheduler(declared, ["y", "z"]).eval()
    assert [len(hybrid.step(t) & {"y", "z"}) for t in range(3)] == [1, 1, 1]
    # what fires as a tensor goes by the layout
    with pytest.warns(UserWarning, match=r"2 of 3 region programs are for regions that the layout does not have.*'y'"):
        flags = DeviceScheduler(declared)
    assert [flags.step(t).tolist() for t in range(2)] == [[1, 1, 1, 1], [0, 1, 1, 1]]


def test_a_program_without_regions_fires_none():
    for step in range(3):
        assert RegionScheduler(program()).step_plan(step, boundary="end") == [set()]
        assert DeviceScheduler(program()).step(step).tolist() == [0, 0, 0, 0]
    assert len(HybridScheduler(program(), ["a", "b"]).step(0)) == 1


def test_inner_steps_follow_for_internal_regions_that_fired():
    declared = program(
        a=ClockSpec("internal", period=2, max_inner_steps=3),
        b=ClockSpec("internal", max_inner_steps=1),
        c=ClockSpec("external", max_inner_steps=7),
        d=ClockSpec("internal"),
    )
    with pytest.warns(UserWarning, match="1 of 4 region programs have clocks with max_inner_steps in another .*: 'c'"):
        scheduler = RegionScheduler(declared)
    assert scheduler.step_plan(0) == [{"a", "b", "c", "d"}, {"a", "b"}, {"a"}, {"a"}]
    assert scheduler.step_plan(1) == [{"b", "c", "d"}, {"b"}]


def test_unknown_clocks_are_refused():
    # published: an unknown mode fires always
    with pytest.raises(ValueError, match="program of region 'a': unknown clock mode 'cron': choose one of periodic"):
        RegionScheduler(program(a=ClockSpec(mode="cron")))
    with pytest.raises(ValueError, match="program of region 'a': unknown clock domain 'lunar'"):
        HybridScheduler(program(a=ClockSpec("lunar")), ["b"])
    with pytest.raises(ValueError, match=r"domain of Periodic\(.*'internal': choose one of external, boundary"):
        RegionScheduler(program(a=ClockSpec(expr=Not(periodic(2, domain="internal")))))


# -- learned


def scores_of(scheduler, summaries):
    first, _, last = scheduler.scorer
    hidden = torch.nn.functional.gelu(summaries.double() @ first.weight.double().T + first.bias.double())
    return (hidden @ last.weight.double().T + last.bias.double()) / scheduler.temperature


def test_the_learned_scheduler_takes_the_best():
    torch.manual_seed(0)
    scheduler = LearnedScheduler(6, 5, max_active=2, temperature=0.5).eval()
    assert [tuple(p.shape) for p in scheduler.parameters()] == [(12, 5), (12,), (6, 12), (6,)]
    summaries = torch.randn(3, 5)
    taken, scores = scheduler(summaries)
    expected = scores_of(scheduler, summaries[0])
    torch.testing.assert_close(scores.double(), expected.log_softmax(-1), rtol=1e-5, atol=1e-5)
    assert taken == set(expected.topk(2).indices.tolist()) and scheduler(summaries[0])[0] == taken
    scores[0].backward()
    assert scheduler.scorer[0].weight.grad.abs().sum() > 0


def test_noise_is_gumbels_and_only_in_training():
    torch.manual_seed(0)
    scheduler = LearnedScheduler(3, 2, max_active=1)
    summaries = torch.tensor([3.0, -2.0])
    scheduler.scorer[2].weight.data.mul_(3)
    counts = torch.zeros(3)
    for _ in range(2000):
        (index,) = scheduler(summaries)[0]
        counts[index] += 1
    # the largest of scores + Gumbel noise is a draw from their softmax
    expected = scores_of(scheduler, summaries).softmax(-1).float()
    assert (counts / 2000 - expected).abs().max() < 0.04 and expected.max() < 0.95
    scheduler.eval()
    assert len({tuple(scheduler(summaries)[0]) for _ in range(20)}) == 1


def test_more_active_than_there_are_is_all():
    assert LearnedScheduler(3, 1, max_active=9).eval()(torch.zeros(1))[0] == {0, 1, 2}


def test_mistakes_of_learned_schedulers_are_named():
    with pytest.raises(ValueError, match="max_active must be at least 1, got 0"):
        LearnedScheduler(3, 1, 0)
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        LearnedScheduler(3, 1, 1, temperature=0)
    with pytest.raises(ValueError, match=r"scores 2 summaries, got \(3,\)"):
        LearnedScheduler(3, 2, 1)(torch.zeros(3))


# -- both


def test_learned_regions_are_the_scorers_and_the_others_the_clocks():
    torch.manual_seed(0)
    hybrid = HybridScheduler(program(a=ClockSpec(period=2), c=ClockSpec(period=100)), ["c", "b", "c"]).eval()
    assert hybrid.learned_regions == ["b", "c"] and hybrid.learned.max_active == 1
    summaries = {"z": {"k": 0.3, "j": -1.0}, "a": {"k": 2.0}}
    fired = [hybrid.step(t, summaries) for t in range(4)]
    assert [("a" in names, "d" in names) for names in fired] == [
        (True, True),
        (False, True),
        (True, True),
        (False, True),
    ]
    # features: a.k, z.j, z.k
    best = scores_of(hybrid.learned, torch.tensor([2.0, -1.0, 0.3])).argmax().item()
    assert {name for names in fired for name in names & {"b", "c"}} == {"bc"[best]}
    assert hybrid.learned.scorer[0].in_features == 3
    with pytest.raises(ValueError, match=r"scores 3 summaries, got \(1,\)"):
        hybrid.step(4, {"a": {"k": 1.0}})


def test_a_hybrid_runs_before_there_is_evidence():
    hybrid = HybridScheduler(program(), ["a", "b", "c", "d"], max_active=3).eval()
    first = hybrid.step(0)
    assert len(first) == 3 and first == hybrid.step(1, {})
    assert len(hybrid.step(2, {"a": {"k": 1.0}})) == 3


def test_hybrids_reset_and_move_with_their_device_and_dtype():
    hybrid = HybridScheduler(program(a=ClockSpec(cooldown=9)), ["b"], summary_dim=1, temperature=2.0).double().eval()
    assert hybrid.learned.temperature == 2.0 and len(list(hybrid.parameters())) == 4
    assert ["a" in hybrid.step(t, {"a": {"k": 1.0}}) for t in (0, 1)] == [True, False]
    hybrid.reset()
    assert "a" in hybrid.step(1, {"a": {"k": 1.0}})


def test_mistakes_of_hybrids_are_named():
    with pytest.raises(KeyError, match=r"learned_regions names \['z'\]; the program has \['a', 'b', 'c', 'd'\]"):
        HybridScheduler(program(), ["a", "z"])
    with pytest.raises(ValueError, match="learned_regions names no region: use RegionScheduler"):
        HybridScheduler(program(), [])


# -- on the device


times = st.sampled_from(["external", "boundary"])
leaves = st.one_of(
    st.builds(periodic, st.integers(1, 4), times),
    st.builds(on, st.sampled_from(["a.x", "b.y.x", "b.y.z", "gone.x"]), st.sampled_from([0.0, 0.25, 0.5]),
              st.none() | st.just(0.75), times),
    st.builds(on, st.just("a.x"), st.none(), st.sampled_from([0.25, 0.5]), times),
    st.builds(boundary, st.sampled_from(["reset", "end"])),
)  # fmt: skip
trees = st.recursive(
    leaves,
    lambda node: st.one_of(
        st.builds(And, node, node), st.builds(Or, node, node), st.builds(Not, node),
        st.builds(Cooldown, node, st.integers(0, 3)), st.builds(MaxSilence, node, st.integers(1, 4)),
    ),
    max_leaves=6,
)  # fmt: skip
clocks = st.builds(
    ClockSpec,
    st.sampled_from(["external", "internal", "boundary"]),
    st.sampled_from(["periodic", "on_event", "boundary"]),
    st.integers(1, 4),
    st.just("b.y.x"),
    st.sampled_from([0.0, 0.25]),
    st.integers(0, 3),
    st.none() | st.integers(1, 4),
    st.none(),
    st.none() | trees,
)
values = st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.6, 0.75, 1.0]), min_size=4, max_size=4)
steps = st.lists(st.tuples(values, st.sampled_from([None, None, "reset", "end", "b.y.x", "other"])), min_size=1,
                 max_size=12)  # fmt: skip


@given(st.lists(st.none() | clocks, min_size=4, max_size=4), steps)
def test_clocks_on_the_device_fire_as_declared(declared, sequence):
    made = program(**{name: clock for name, clock in zip("abcd", declared) if clock is not None})
    accumulator = ResidualAccumulator(["b.y", "a"], ResidualSpec(("x", "z")))
    plain, tensors = RegionScheduler(made), DeviceScheduler(made, accumulator)
    for t, (found, event) in enumerate(sequence):
        accumulator.values.copy_(torch.tensor(found).view(2, 2))
        if t == 8:
            plain.reset()
            tensors.reset()
        expected = plain.step(t, accumulator.summaries(), event)
        step = torch.tensor(t) if t % 2 else t
        assert tensors.step(step, event).tolist() == [float(name in expected) for name in "abcd"], t


def test_clocks_on_the_device_save_where_they_are_and_keep_thresholds_in_16_bits():
    clock = ClockSpec(mode="on_event", event_source="a.prediction", event_threshold=0.1, cooldown=1)
    made = program(a=clock, b=ClockSpec("boundary", period=2))
    accumulator = ResidualAccumulator(["a"], ResidualSpec(decay=0.0))
    scheduler = DeviceScheduler(made, accumulator).half()
    # between 0.1 and the nearest half-precision number
    accumulator.update("a", torch.tensor([0.09999]))
    assert scheduler.step(0, "end").tolist() == [0.0, 1.0, 1.0, 1.0]
    accumulator.update("a", torch.tensor([0.10001]))
    assert scheduler.step(1).tolist() == [1.0, 0.0, 1.0, 1.0]
    twin = DeviceScheduler(made, copy.deepcopy(accumulator))
    twin.load_state_dict(scheduler.state_dict())
    assert set(scheduler.state_dict()) == {"last_fired", "boundary_t", "accumulator.values"}
    for both in (scheduler, twin):
        assert both.step(2, "end").tolist() == [0.0, 0.0, 1.0, 1.0]
        assert both.step(3, "end").tolist() == [1.0, 1.0, 1.0, 1.0]


def test_inner_steps_on_the_device():
    made = program(a=ClockSpec("internal", period=2, max_inner_steps=3), b=ClockSpec("internal", max_inner_steps=1))
    scheduler = DeviceScheduler(made)
    assert [x.tolist() for x in scheduler.step_plan(0)] == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]
    assert [x.tolist() for x in scheduler.step_plan(1)] == [[0, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    with pytest.raises(ValueError, match="program of region 'a': unknown clock mode 'cron'"):
        DeviceScheduler(program(a=ClockSpec(mode="cron")))
