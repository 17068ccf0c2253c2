"""The published readme's snippets on layouts, topologies, schemas and types, with the values that it states."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from canvas_engineering import (
    CanvasLayout,
    CanvasSchema,
    CanvasTopology,
    Connection,
    RegionSpec,
    SpatiotemporalCanvas,
    compile_schema,
    transfer_distance,
)
from examples import fleet, surgical_robot, world_model


def pairs_of(bound) -> set[tuple[str, str]]:
    return {(c.src, c.dst) for c in bound.topology.connections}


def each_reads_the_other(pairs, one, *others) -> bool:
    return all({(one, other), (other, one)} <= pairs for other in others)


# -- how the canvas works ---------------------------------------------------------------------------------------------


def test_robot_manipulation_canvas():
    layout = CanvasLayout(
        T=5, H=8, W=8, d_model=256,
        regions={
            "visual": (0, 5, 0, 6, 0, 6),
            "action": (0, 5, 6, 7, 0, 1),
            "reward": (2, 3, 7, 8, 0, 1),
        },
        t_current=2,
    )  # fmt: skip
    assert {name: layout.region_numel(name) for name in layout.regions} == {"visual": 180, "action": 5, "reward": 1}
    assert layout.output_mask() == list(range(2 * 64, 320))  # t >= 2 is future
    canvas = SpatiotemporalCanvas(layout)
    batch = canvas.create_empty(batch_size=4)
    assert batch.shape == (4, 320, 256)
    visual_embs = torch.randn(4, 180, 256)
    batch = canvas.place(batch, visual_embs, "visual")
    actions = canvas.extract(batch, "action")
    assert actions.shape == (4, 5, 256)
    identity = canvas.modality_embeddings["visual"] + canvas.period_embedding(1)
    torch.testing.assert_close(canvas.extract(batch, "visual"), visual_embs + identity)


def test_computer_use_agent():
    layout = CanvasLayout(
        T=16, H=32, W=32, d_model=768,
        regions={
            "screen": (0, 16, 0, 24, 0, 24),
            "mouse": (0, 16, 24, 26, 0, 4),
            "keyboard": (0, 16, 26, 28, 0, 4),
            "llm": (0, 16, 28, 32, 0, 8),
        },
    )  # fmt: skip
    assert layout.num_positions == 16_384
    assert [layout.region_numel(name) for name in layout.regions] == [9_216, 128, 128, 512]
    assert round(100 * layout.region_numel("screen") / layout.num_positions) == 56


# -- declarative region frequency -------------------------------------------------------------------------------------


def test_region_frequencies():
    layout = CanvasLayout(
        T=16, H=32, W=32, d_model=768,
        regions={
            "screen": (0, 16, 0, 24, 0, 24),
            "mouse": RegionSpec(bounds=(0, 16, 24, 26, 0, 4), period=1, loss_weight=2.0),
            "thought": RegionSpec(bounds=(0, 4, 28, 32, 0, 8), period=4, loss_weight=1.0),
            "task_prompt": RegionSpec(bounds=(0, 1, 26, 28, 0, 4), is_output=False),
        },
    )  # fmt: skip
    weights = layout.loss_weight_mask("cpu")
    assert weights.shape == (16_384,)
    assert weights[layout.region_indices("screen")].unique().tolist() == [1.0]
    assert weights[layout.region_indices("mouse")].unique().tolist() == [2.0]
    assert weights[layout.region_indices("task_prompt")].unique().tolist() == [0.0]
    assert weights.sum() == 9_216 + 2 * 128 + 4 * 32
    per_position_loss = torch.full((16_384,), 3.0)
    assert (per_position_loss * weights).sum() / weights.sum() == 3.0
    assert [layout.real_frame("thought", t) for t in range(4)] == [0, 4, 8, 12]
    assert layout.real_frame("thought", canvas_t=2) == 8
    assert layout.canvas_frame("thought", real_t=8) == 2
    assert layout.canvas_frame("thought", real_t=7) is None


def test_raw_tuples_wrap_with_the_defaults_of_the_table():
    layout = CanvasLayout(T=1, H=2, W=2, d_model=4, regions={"a": (0, 1, 0, 2, 0, 2)})
    spec = layout.region_spec("a")
    assert (spec.period, spec.is_output, spec.loss_weight, spec.default_attn) == (1, True, 1.0, "cross_attention")


# -- non-Euclidean connectivity ---------------------------------------------------------------------------------------


def test_two_robots_and_a_task():
    names = ["robot1_cam", "robot1_action", "robot2_cam", "robot2_action", "shared_task"]
    topology = CanvasTopology(connections=[
        *(Connection(src=name, dst=name) for name in names),
        Connection(src="robot1_action", dst="robot1_cam"),
        Connection(src="robot2_action", dst="robot2_cam"),
        Connection(src="robot1_cam", dst="robot2_cam", weight=0.5),
        Connection(src="robot2_cam", dst="robot1_cam", weight=0.5),
        Connection(src="shared_task", dst="robot1_cam"),
        Connection(src="shared_task", dst="robot2_cam"),
        Connection(src="robot1_action", dst="shared_task"),
        Connection(src="robot2_action", dst="shared_task"),
    ])  # fmt: skip
    layout = CanvasLayout(T=2, H=5, W=2, d_model=8, regions={n: (0, 2, i, i + 1, 0, 2) for i, n in enumerate(names)})
    mask = topology.to_attention_mask(layout)
    assert mask.shape == (20, 20)
    assert mask.is_floating_point()
    index = {name: layout.region_indices(name) for name in names}
    block = {(a, b): mask[index[a]][:, index[b]].unique().tolist() for a in names for b in names}
    assert block["robot1_cam", "robot2_cam"] == [0.5]
    assert block["robot1_action", "shared_task"] == [1.0]
    assert block["robot1_action", "robot2_cam"] == [0.0]
    assert block["shared_task", "robot1_action"] == [0.0]
    ops = topology.attention_ops()
    assert len(ops) == 13
    assert ops[7] == ("robot1_cam", "robot2_cam", 0.5, "cross_attention")


def edges(topology) -> list[tuple]:
    return sorted((c.src, c.dst, c.t_src, c.t_dst) for c in topology.connections)


def test_convenience_constructors():
    def plain(*pairs):
        return sorted((a, b, None, None) for a, b in pairs)

    assert edges(CanvasTopology.dense(["a", "b", "c"])) == plain(*((a, b) for a in "abc" for b in "abc"))
    assert edges(CanvasTopology.isolated(["a", "b", "c"])) == plain("aa", "bb", "cc")
    selves = [("task", "task"), ("r1", "r1"), ("r2", "r2")]
    spokes = [("task", "r1"), ("r1", "task"), ("task", "r2"), ("r2", "task")]
    assert edges(CanvasTopology.hub_spoke("task", ["r1", "r2"])) == plain(*selves, *spokes)
    chain = [("obs", "obs"), ("plan", "plan"), ("act", "act"), ("plan", "obs"), ("act", "plan")]
    assert edges(CanvasTopology.causal_chain(["obs", "plan", "act"])) == plain(*chain)
    assert edges(CanvasTopology.causal_temporal(["obs", "act"])) == sorted(
        [("obs", "obs", 0, 0), ("obs", "obs", 0, -1), ("obs", "act", 0, -1)]
        + [("act", "act", 0, 0), ("act", "act", 0, -1), ("act", "obs", 0, -1)]
    )


@pytest.mark.parametrize(
    "connection, reads",
    [
        (Connection(src="cam", dst="action"), lambda q, k: True),
        (Connection(src="cam", dst="action", t_src=0, t_dst=0), lambda q, k: q == k),
        (Connection(src="cam", dst="action", t_src=0, t_dst=-1), lambda q, k: k == q - 1),
        (Connection(src="cam", dst="action", t_src=None, t_dst=0), lambda q, k: True),
    ],
)
def test_temporal_connectivity(connection, reads):
    layout = CanvasLayout(T=4, H=1, W=2, d_model=4, regions={"cam": (0, 4, 0, 1, 0, 1), "action": (0, 4, 0, 1, 1, 2)})
    mask = CanvasTopology([connection]).to_attention_mask(layout)
    for q, i in enumerate(layout.region_indices("cam")):
        for k, j in enumerate(layout.region_indices("action")):
            assert mask[i, j] == float(reads(q, k)), (q, k)


# -- attention function types -----------------------------------------------------------------------------------------


def test_attention_functions_resolve():
    layout = CanvasLayout(
        T=8, H=16, W=16, d_model=512,
        regions={
            "visual": RegionSpec(bounds=(0, 8, 0, 12, 0, 12), default_attn="cross_attention"),
            "proprio": RegionSpec(bounds=(0, 8, 12, 13, 0, 2), default_attn="linear_attention"),
            "thought": RegionSpec(bounds=(0, 4, 13, 15, 0, 4), default_attn="mamba"),
            "goal": RegionSpec(bounds=(0, 1, 15, 16, 0, 4), default_attn="cross_attention", is_output=False),
        },
    )  # fmt: skip
    topology = CanvasTopology(connections=[
        *(Connection(src=name, dst=name) for name in layout.regions),
        Connection(src="visual", dst="goal", fn="gated"),
        Connection(src="thought", dst="visual", fn="perceiver"),
        Connection(src="proprio", dst="visual", fn="pooling"),
        Connection(src="thought", dst="thought", fn="copy", t_src=0, t_dst=-1),
    ])  # fmt: skip
    assert topology.attention_ops(layout) == [
        ("visual", "visual", 1.0, "cross_attention"),
        ("proprio", "proprio", 1.0, "linear_attention"),
        ("thought", "thought", 1.0, "mamba"),
        ("goal", "goal", 1.0, "cross_attention"),
        ("visual", "goal", 1.0, "gated"),
        ("thought", "visual", 1.0, "perceiver"),
        ("proprio", "visual", 1.0, "pooling"),
        ("thought", "thought", 1.0, "copy"),
    ]
    assert {fn for *_, fn in topology.attention_ops()} == {"cross_attention", "gated", "perceiver", "pooling", "copy"}


RECIPES = {
    "robot manipulation": (
        {"visual": "cross_attention", "proprio": "linear_attention", "action": "cross_attention"},
        [("action", "visual", "cross_attention"), ("action", "proprio", "pooling")],
    ),
    "embodied agent with memory": (
        {"perception": "cross_attention", "memory": "mamba", "policy": "cross_attention"},
        [("perception", "memory", "gated"), ("memory", "perception", "perceiver")],
    ),
    "multi-agent coordination": (
        {"agent_a.thought": "rwkv", "agent_b.thought": "rwkv", "shared_task": "cross_attention"},
        [
            ("shared_task", "agent_a.thought", "cross_attention"),
            ("agent_b.thought", "shared_task", "gated"),
            ("agent_b.thought", "agent_a.thought", "copy"),
        ],
    ),
    "vision transformer backbone": (
        {"cls_token": "cross_attention", "patches": "local_attention", "readout": "cross_attention"},
        [("cls_token", "patches", "cross_attention"), ("readout", "cls_token", "pooling")],
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_design_recipes_resolve(name):
    defaults, across = RECIPES[name]
    regions = {n: RegionSpec((0, 1, i, i + 1), default_attn=fn) for i, (n, fn) in enumerate(defaults.items())}
    layout = CanvasLayout(T=1, spatial_shape=(3,), d_model=8, regions=regions)
    connections = [*(Connection(n, n) for n in defaults), *(Connection(src, dst, fn=fn) for src, dst, fn in across)]
    resolved = CanvasTopology(connections).attention_ops(layout)
    assert [(src, fn) for src, dst, _, fn in resolved if src == dst] == list(defaults.items())
    assert [(src, dst, fn) for src, dst, _, fn in resolved if src != dst] == across


# -- semantic types and schemas ---------------------------------------------------------------------------------------


def at_distance(distance: float) -> tuple[float, float]:
    """A unit vector at this cosine distance from (1, 0)."""
    cosine = 1.0 - distance
    return cosine, (1.0 - cosine**2) ** 0.5


def test_transfer_distances():
    # The readme's distances are those of its embedding model; what is held here is what they are made of.
    embedded = {"RGB video": (2.0, 0.0), "Metric depth map": at_distance(0.15), "7-DOF joint angles": at_distance(0.65)}
    cam, depth, joints = (
        RegionSpec((0, 8, 0, 12, 0, 12), semantic_type=text, semantic_embedding=vector)
        for text, vector in embedded.items()
    )
    assert transfer_distance(cam, depth) == pytest.approx(0.15)
    assert transfer_distance(cam, joints) == pytest.approx(0.65)


def test_canvas_schema(tmp_path):
    schema = CanvasSchema(
        layout=CanvasLayout(
            T=8, H=16, W=16, d_model=256,
            regions={
                "visual": RegionSpec(
                    bounds=(0, 8, 0, 12, 0, 12),
                    semantic_type="RGB video 224x224",
                    semantic_embedding=(1.0, 0.0, 0.0, 0.0),
                ),
                "action": RegionSpec(
                    bounds=(0, 8, 12, 14, 0, 2),
                    loss_weight=2.0,
                    semantic_type="6-DOF end-effector + gripper",
                    semantic_embedding=(0.0, 0.0, 1.0, 0.0),
                ),
            },
        ),
        topology=CanvasTopology(connections=[
            Connection(src="visual", dst="visual"),
            Connection(src="action", dst="visual"),
            Connection(src="action", dst="action"),
        ]),
        metadata={"model": "CogVideoX-2B", "data": "bridge_v2"},
    )  # fmt: skip
    path = tmp_path / "robot_v1.json"
    schema.to_json(path)
    loaded = CanvasSchema.from_json(path)
    assert loaded == schema
    assert loaded.metadata == {"model": "CogVideoX-2B", "data": "bridge_v2"}
    other = CanvasLayout(
        T=4, H=4, W=4, d_model=64,
        regions={
            "gripper_cmd": RegionSpec((0, 4, 0, 1, 0, 1), semantic_embedding=(0.0, 0.0, *at_distance(0.12))),
            "camera": RegionSpec((0, 4, 1, 2, 0, 1), semantic_embedding=(*at_distance(0.04), 0.0, 0.0)),
            "language": RegionSpec((0, 4, 2, 3, 0, 1), semantic_embedding=(-1.0, 0.0, -1.0, 0.0)),
        },
    )  # fmt: skip
    found = schema.compatible_regions(CanvasSchema(other), threshold=0.3)
    assert [(a, b, round(distance, 6)) for a, b, distance in found] == [
        ("visual", "camera", 0.04),
        ("action", "gripper_cmd", 0.12),
    ]


# -- compositional types ----------------------------------------------------------------------------------------------


def test_surgical_robot():
    bound = compile_schema(surgical_robot.SurgicalRobot(), d_model=256)
    size = bound.layout.region_size
    assert (size("sensor"), size("left_arm"), size("right_arm")) == ((1, 2, 4), (1, 2, 4), (1, 1, 1))
    assert bound["safety"].spec.loss_weight == 5.0
    assert bound["left_arm.gripper"].spec.loss_weight == 2.0
    pairs = pairs_of(bound)
    assert each_reads_the_other(pairs, "sensor", "sensor.rgb", "sensor.depth", "sensor.lidar")
    for arm in ("left_arm", "right_arm"):
        assert each_reads_the_other(pairs, arm, f"{arm}.joints", f"{arm}.force_torque", f"{arm}.gripper")
    assert each_reads_the_other(pairs, "safety", "sensor", "left_arm", "right_arm")
    assert ("safety", "sensor.rgb") not in pairs
    assert not {(a, b) for a, b in pairs if a.startswith("left_arm") and b.startswith("right_arm")}
    # one field of its own; per child: the coarse field itself, two with safety, six with its fields, nine among them
    assert len(bound.topology.connections) == 1 + 3 * (1 + 2 + 6 + 9)


def test_fleet_of_fifty():
    bound = fleet.declare(50, d_model=256)
    assert len(bound.field_names) == 1 + 50 * 5
    assert len(bound.topology.connections) == 1_351
    pairs = pairs_of(bound)
    assert len(pairs) == 1_351
    for i in range(50):
        vehicle = f"vehicles[{i}]"
        assert bound[vehicle].num_positions == 16
        own = [f"{vehicle}.{name}" for name in ("camera", "lidar", "plan", "action")]
        assert each_reads_the_other(pairs, vehicle, "dispatch", *own)
    # each vehicle is seen by dispatch through its own 16 positions, and by no other vehicle
    assert {a.split(".")[0] for a, b in pairs if b.startswith("vehicles[1]")} == {"vehicles[1]", "dispatch"}
    assert ("vehicles[0]", "vehicles[1].camera") not in pairs
    seen = sum(bound[name].num_positions for name in dict.fromkeys(b for a, b in pairs if a == "dispatch"))
    assert seen == 16 + 50 * 16


def test_world_model():
    bound = world_model.declare()
    size = bound.layout.region_size
    assert (size("us"), size("us.macro"), size("cn"), size("cn.macro")) == ((1, 4, 4), (1, 2, 4)) * 2
    pairs = pairs_of(bound)
    path = ["us.macro.gdp", "us.macro", "us", "regime", "cn", "cn.macro", "cn.macro.inflation"]
    assert all(each_reads_the_other(pairs, here, following) for here, following in pairwise(path))
    assert ("us.macro.gdp", "cn.macro.inflation") not in pairs
    # countries see each other's summaries through the regime, not directly
    assert not {(a, b) for a, b in pairs if a.startswith("us") and b.startswith("cn")}
    assert len(bound.topology.connections) == len(pairs) == 1 + 2 * (1 + 2 + 4 + 4 + 1 + 6 + 6 + 9)
