"""The event-driven world model: it runs, rests when it is told to, and is the same function at any size of memory."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("gymnasium")
from examples import belief_world


def test_it_compares_with_and_without_skipping(capsys):
    sizes = ["--steps", "2", "--window", "4", "--times", "2", "--length", "24"]
    assert belief_world.main(sizes) == 0
    printed = capsys.readouterr().out
    assert "families: action=1, memory=1, observation=1, residual=1, state=1" in printed
    assert "always:    0 of 48 updates of memory and belief skipped" in printed
    # the first step fires, and then silence
    assert "once:   46 of 48 updates of memory and belief skipped" in printed
    assert "of the updates cuts the time of attention by" in printed


def test_resting_regions_keep_their_content_and_an_enlarged_memory_is_the_same_function():
    torch.manual_seed(0)
    bound, program = belief_world.declare(6)
    motion, _ = belief_world.Motion.of(40, 0, 6)
    model = belief_world.Thinker(bound, program, 6)
    large = belief_world.enlarged(model, 6, 3)
    t = torch.tensor([8, 20])
    given = motion.before(t), motion.states[t], motion.actions[t], torch.zeros(2, 4)
    canvas, found = model(model.empty(2), None, *given)
    _, same = large(large.empty(2), None, *given)
    torch.testing.assert_close(same, found, rtol=1e-4, atol=1e-5)
    rested, _ = model(canvas, {"error", "moment", "action"}, None, *given[1:])
    for name, still in (("memory", True), ("belief", True), ("moment", False)):
        rows = bound.layout.region_index(name)
        assert torch.equal(rested[:, rows], canvas[:, rows]) is still, name


def test_the_clock_fires_on_prediction_errors():
    _, program = belief_world.declare(4)
    scheduler = belief_world.RegionScheduler(belief_world.scheduled(program, 0.5))
    errors = [0.0, 0.4, 0.6, 0.2, *[0.0] * belief_world.SILENCE]
    fired = [t for t, e in enumerate(errors) if "belief" in scheduler.step(t, {"moment": {"prediction": e}})]
    assert fired == [0, 2, 2 + belief_world.SILENCE]
