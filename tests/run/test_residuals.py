"""Residual accumulators against the running average written out; and that nothing waits for the device."""

from __future__ import annotations

import math

import pytest
import torch

from canvas_engineering.residuals import ResidualAccumulator, ResidualSpec

REDUCTIONS = {
    "mean": lambda e: [sum(e) / len(e)],
    "max": lambda e: [max(e)],
    "l2": lambda e: [math.sqrt(sum(x * x for x in e))],
}


@pytest.mark.parametrize("kinds", [("a",), ("a", "b"), ("a", "b", "c")])
@pytest.mark.parametrize("reduce", ["max_mean", "mean", "max", "l2"])
def test_values_are_running_averages(reduce, kinds):
    torch.manual_seed(0)
    accumulator = ResidualAccumulator(["y", "x"], ResidualSpec(kinds, reduce, decay=0.75))
    expected = [0.0] * len(kinds)
    for _ in range(4):
        error = torch.randn(2, 3, 4)
        accumulator.update("x", error)
        sizes = [abs(value) for value in error.double().flatten().tolist()]
        if reduce == "max_mean":
            both = [max(sizes), sum(sizes) / len(sizes)]
            new = [both[1]] if len(kinds) == 1 else [both[i % 2] for i in range(len(kinds))]
        else:
            new = REDUCTIONS[reduce](sizes) * len(kinds)
        expected = [0.75 * old + 0.25 * value for old, value in zip(expected, new)]
    found = accumulator.summaries()
    assert list(found) == ["x", "y"] == accumulator.region_names and list(found["x"]) == list(kinds)
    torch.testing.assert_close(torch.tensor(list(found["x"].values())), torch.tensor(expected))
    assert set(found["y"].values()) == {0.0}
    assert torch.equal(accumulator.summary_tensor(), torch.tensor([list(row.values()) for row in found.values()]))
    accumulator.reset()
    assert not accumulator.summary_tensor().any()


def test_an_inactive_update_changes_nothing():
    accumulator = ResidualAccumulator(["x"], ResidualSpec(decay=0.5))
    accumulator.update("x", torch.full((3,), 4.0), active=torch.tensor(1.0))
    accumulator.update("x", torch.full((3,), 100.0), active=torch.tensor(0.0))
    assert accumulator.summaries() == {"x": {"prediction": 2.0}}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_one_bad_error_does_not_spoil_the_averages(bad):
    accumulator = ResidualAccumulator(["a", "b"], ResidualSpec(("largest", "mean"), decay=0.5))
    accumulator.update("a", torch.tensor([1.0, 3.0]))
    accumulator.update("a", torch.tensor([bad, bad, bad, bad]))
    # of 3e38 the largest is a number, and the mean overflows
    largest = 1.5 if bad != 3e38 else 0.75 + 0.5 * torch.tensor(3e38).item()
    assert accumulator.summaries() == {"a": {"largest": pytest.approx(largest), "mean": 1.0},
                                       "b": {"largest": 0.0, "mean": 0.0}}  # fmt: skip
    accumulator.update("a", torch.tensor([1.0]), torch.tensor(0.0))
    accumulator.update("b", torch.tensor([1.0]))
    assert accumulator.summaries()["b"] == {"largest": 0.5, "mean": 0.5}


def test_it_is_buffers_only_and_saved():
    accumulator = ResidualAccumulator(["x"])
    assert not list(accumulator.parameters()) and set(accumulator.state_dict()) == {"values"}
    accumulator.update("x", torch.ones(2, requires_grad=True))
    assert not accumulator.summary_tensor().requires_grad
    copy = ResidualAccumulator(["x"])
    copy.load_state_dict(accumulator.state_dict())
    assert copy.summaries() == accumulator.summaries() and accumulator.summaries()["x"]["prediction"] > 0
    before = accumulator.summary_tensor()
    accumulator.update("x", torch.ones(2))
    assert not torch.equal(before, accumulator.summary_tensor()), "a summary tensor is a copy of its moment"


def test_mistakes_are_named():
    accumulator = ResidualAccumulator(["x"])
    with pytest.raises(KeyError, match=r"no residuals are kept for region 'z', only for \['x'\]"):
        accumulator.update("z", torch.ones(1))
    with pytest.raises(ValueError, match=r"the error of region 'x' is empty: \(0, 3\)"):
        accumulator.update("x", torch.zeros(0, 3))
    with pytest.raises(ValueError, match="unknown reduce 'median': choose one of max_mean, mean, max, l2"):
        ResidualSpec(reduce="median")
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\], got 1.5"):
        ResidualSpec(decay=1.5)
    with pytest.raises(ValueError, match="kinds must be distinct names"):
        ResidualSpec(kinds=("a", "a"))
    with pytest.raises(ValueError, match="kinds may have no dot"):
        ResidualSpec(kinds=("a.b",))
    with pytest.raises(ValueError, match="has a name twice"):
        ResidualAccumulator(["x", "x"])
