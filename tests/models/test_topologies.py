"""Topologies of token layouts against their definitions, pair by pair, and what they cost at full size."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from canvas_engineering import CanvasSchema
from canvas_engineering.models import topologies, video_layout
from canvas_engineering.models.tokens import token_plan

WAN = {
    "_class_name": "WanTransformer3DModel", "patch_size": (1, 2, 2), "in_channels": 16, "num_attention_heads": 2,
    "attention_head_dim": 12,
}  # fmt: skip
HUNYUAN = {
    "_class_name": "HunyuanVideoTransformer3DModel", "patch_size": 2, "patch_size_t": 1, "num_attention_heads": 2,
    "attention_head_dim": 12,
}  # fmt: skip
GRID, TEXT = (7, 5, 6), 3


def layout_of(config, text=None):
    return video_layout(config, 16 * GRID[1], 16 * GRID[2], 4 * (GRID[0] - 1) + 1, text_tokens=text)


def slid(x, size, side, around):
    """The tokens of an axis that token x attends to under sliding tiles."""
    tiles, own = -(-size // side), x // side
    count = min(2 * around + 1, tiles)
    first = min(max(own - around, 0), tiles - count)
    return range(first * side, min((first + count) * side, size))


def shrunk(x, size, side, distance):
    """The tokens of an axis that token x attends to in a frame at ``distance`` under radial attention."""
    tiles = -(-size // side)
    count = tiles if distance < 2 else -(-tiles // 2 ** int(math.log2(distance)))
    first = min(max(x // side - count // 2, 0), tiles - count)
    return range(first * side, min((first + count) * side, size))


CASES = {
    "dense": (lambda layout: topologies.dense(layout), lambda q, k: True),
    "window": (lambda layout: topologies.window(layout, 2, 1), lambda q, k: -2 <= k[0] - q[0] <= 1),
    "previous_frame": (topologies.previous_frame, lambda q, k: -1 <= k[0] - q[0] <= 0),
    "spatial_tiles": (
        lambda layout: topologies.spatial_tiles(layout, 2, 4),
        lambda q, k: (q[1] // 2, q[2] // 4) == (k[1] // 2, k[2] // 4),
    ),
    "sliding_tiles": (
        lambda layout: topologies.sliding_tiles(layout, (2, 2, 2), (1, 0, 1)),
        lambda q, k: all(b in slid(a, size, 2, around) for a, b, size, around in zip(q, k, GRID, (1, 0, 1))),
    ),
    "radial": (
        lambda layout: topologies.radial(layout, 2, 2),
        lambda q, k: all(b in shrunk(a, size, 2, abs(q[0] - k[0])) for a, b, size in zip(q[1:], k[1:], GRID[1:])),
    ),
    "first_frame_and_text_global": (
        topologies.first_frame_and_text_global,
        lambda q, k: q[0] == 0 or k[0] == 0 or -1 <= k[0] - q[0] <= 0,
    ),
    "block_causal": (lambda layout: topologies.block_causal(layout, 3), lambda q, k: k[0] // 3 <= q[0] // 3),
}


def test_every_topology_has_a_case():
    published = {name for name in topologies.__all__ if not name.endswith("_topology")}
    assert published == set(CASES)


@pytest.mark.parametrize("text", [None, TEXT])
@pytest.mark.parametrize("name", CASES)
def test_pairs_are_those_of_the_definition(name, text):
    declare, attends = CASES[name]
    layout, topology = declare(layout_of(WAN if text is None else HUNYUAN, text))
    schema = CanvasSchema.from_dict(CanvasSchema(layout, topology).to_dict())  # plain data
    streams = ("video",) if text is None else ("video", "text")
    plan = token_plan(schema.layout, schema.topology, streams)
    tokens = list(itertools.product(*map(range, GRID)))
    expected = torch.tensor([[attends(q, k) for k in tokens] for q in tokens])
    if text is not None:
        whole = torch.ones(len(tokens) + text, len(tokens) + text, dtype=torch.bool)
        whole[: len(tokens), : len(tokens)] = expected
        if name == "block_causal":  # or later frames would reach earlier ones through the text
            whole[len(tokens) :, : len(tokens)] = False
        expected = whole
    assert torch.equal(torch.from_numpy(plan.to_dense() > 0), expected)
    assert set(plan.to_dense().reshape(-1)) <= {0.0, 1.0}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda layout: topologies.window(layout, -1), "at least 0, got -1 and 0"),
        (lambda layout: topologies.spatial_tiles(layout, 0, 2), "the side of a tile"),
        (lambda layout: topologies.sliding_tiles(layout, (1, 0, 2)), "tile must be three sizes of at least 1"),
        (lambda layout: topologies.radial(layout, 2, -1), "the side of a tile"),
        (lambda layout: topologies.block_causal(layout, 0), "frames"),
        (lambda layout: topologies.block_causal(topologies.block_causal(layout)[0]), "has a region 'frames 0' already"),
        (lambda layout: topologies.window("layout"), "layout"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(layout_of(WAN))


def test_full_size_topologies_compile_to_small_tables():
    # Wan 2.1, 81 frames of 480 × 832: 32,760 tokens
    layout = video_layout({**WAN, "num_attention_heads": 12, "attention_head_dim": 128}, 480, 832, 81)
    densities = {}
    for name, declared in (
        ("sliding_tiles", topologies.sliding_tiles(layout, (3, 6, 8), (1, 1, 1))),
        ("radial", topologies.radial(layout, 10, 13)),
    ):
        plan = token_plan(*declared, ("video",))
        densities[name] = plan.density
        assert plan.n_positions == 32_760 and len(plan.table.weight) < 20_000
    assert 0.05 < densities["sliding_tiles"] < 0.2 and 0.1 < densities["radial"] < 0.5
