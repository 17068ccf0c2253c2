"""60 saved masks of the published package, and random canvases against the oracle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from canvas_engineering import CanvasLayout, CanvasTopology, Connection, RegionSpec
from tests import oracle
from tests.strategies import canvases

GOLDEN = json.loads((Path(__file__).parent / "golden_masks.json").read_text())


def _golden(case):
    regions = {name: RegionSpec(tuple(r["bounds"]), period=r["period"]) for name, r in case["regions"].items()}
    layout = CanvasLayout(T=case["T"], spatial_shape=tuple(case["spatial_shape"]), d_model=4, regions=regions)
    expected = torch.zeros(case["num_positions"], case["num_positions"], dtype=torch.float64)
    for query, row in case["mask"].items():
        for key, weight in row.items():
            expected[int(query), int(key)] = weight
    return layout, CanvasTopology([Connection(**c) for c in case["connections"]]), expected


def test_there_are_sixty_golden_masks():
    assert len(GOLDEN) == 60
    assert sum(bool(case["mask"]) for case in GOLDEN) > 50


@pytest.mark.parametrize("case", GOLDEN, ids=range(len(GOLDEN)))
def test_golden_mask(case):
    layout, topology, expected = _golden(case)
    # The file keeps seven digits.
    torch.testing.assert_close(topology.to_attention_mask(layout).double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(oracle.joint_matrix(layout, topology), expected, rtol=0, atol=1e-6)


@settings(max_examples=150)
@given(canvases())
def test_masks_equal_the_oracle(canvas):
    layout, topology = canvas
    expected = oracle.joint_matrix(layout, topology)
    mask = topology.to_attention_mask(layout)
    assert mask.dtype == torch.float32
    torch.testing.assert_close(mask, expected.float(), rtol=2e-7, atol=0)
    alone = torch.diag((expected == 0).all(1))
    binary = torch.where((expected > 0) | alone, 0.0, -torch.inf)
    assert torch.equal(topology.to_additive_mask(layout), binary.float())
    weighted = torch.where(alone, 0.0, expected.log())
    torch.testing.assert_close(topology.to_additive_mask(layout, weighted=True), weighted.float(), rtol=1e-6, atol=1e-7)
