"""Canvases for three applications, and what attention on each costs: ``python examples/define_canvas.py``.

A robot that manipulates, an agent at a computer, and two robots with a task that they share. Each is a layout, where
its regions lie, and a topology, which regions attend to which. With ``--out`` each is saved as a schema.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from canvas_engineering import (
    CanvasLayout,
    CanvasSchema,
    CanvasTopology,
    Connection,
    RegionSpec,
    TemporalFill,
    compile_attention,
)


def robot() -> CanvasSchema:
    """Video, actions that follow from the frame before, and a reward for the clip."""
    regions = {
        "visual": (0, 5, 0, 6, 0, 6),
        "action": RegionSpec((0, 5, 6, 7, 0, 1), loss_weight=2.0),
        "reward": (2, 3, 7, 8, 0, 1),
    }
    connections = [
        Connection("visual", "visual"),
        Connection("action", "action", t_src=0, t_dst=0),
        Connection("action", "visual", t_src=0, t_dst=-1),
        Connection("reward", "visual", fn="pooling"),
        Connection("reward", "action"),
    ]
    layout = CanvasLayout(T=5, H=8, W=8, d_model=256, regions=regions, t_current=2)
    return CanvasSchema(layout, CanvasTopology(connections), metadata={"application": "manipulation"})


def computer() -> CanvasSchema:
    """A screen, a mouse and a keyboard, and a thought that runs at a quarter of their rate."""
    regions = {
        "screen": (0, 16, 0, 24, 0, 24),
        "mouse": RegionSpec((0, 16, 24, 26, 0, 4), loss_weight=2.0),
        "keyboard": (0, 16, 26, 28, 0, 4),
        "thought": RegionSpec((0, 4, 28, 32, 0, 8), period=4),
        "prompt": RegionSpec((0, 1, 28, 32, 8, 16), is_output=False),
    }
    connections = [Connection(name, name, t_src=0, t_dst=0) for name in ("screen", "mouse", "keyboard", "thought")]
    connections += [Connection("screen", "screen", t_src=0, t_dst=-1), Connection("thought", "prompt")]
    connections += [Connection("thought", "screen", t_src=0, t_dst=0)]
    for name in ("mouse", "keyboard"):
        connections += [
            Connection(name, "screen", t_src=0, t_dst=0),
            # the thought of the last multiple of four frames
            Connection(name, "thought", t_src=0, t_dst=0, temporal_fill=TemporalFill.HOLD),
        ]
    layout = CanvasLayout(T=16, H=32, W=32, d_model=768, regions=regions)
    return CanvasSchema(layout, CanvasTopology(connections), metadata={"application": "computer use"})


def team() -> CanvasSchema:
    """Two robots: each acts on its own camera and on a task, through which alone their plans meet."""
    regions = {"task": (0, 8, 0, 2, 0, 4)}
    connections = [Connection("task", "task")]
    for number, row in ((1, 2), (2, 9)):
        camera, action = f"robot{number}_cam", f"robot{number}_action"
        regions |= {camera: (0, 8, row, row + 6, 0, 6), action: (0, 8, row + 6, row + 7, 0, 4)}
        connections += [
            Connection(camera, camera, t_src=0, t_dst=0),
            Connection(camera, f"robot{3 - number}_cam", weight=0.5, t_src=0, t_dst=0),
            Connection(action, action, t_src=0, t_dst=0),
            Connection(action, camera, t_src=0, t_dst=0),
            Connection(action, "task"),
            Connection("task", camera),
        ]
    layout = CanvasLayout(T=8, H=16, W=6, d_model=128, regions=regions)
    return CanvasSchema(layout, CanvasTopology(connections), metadata={"application": "two robots"})


APPLICATIONS = {"robot": robot, "computer": computer, "team": team}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for NAME.json of each")
    options = parser.parse_args(argv)
    for name, declare in APPLICATIONS.items():
        schema = declare()
        layout, plan = schema.layout, compile_attention(schema.layout, schema.topology)
        print(f"{name}: {schema.metadata['application']}, {layout.num_positions:,} positions")
        for region in layout.regions:
            size = layout.region_numel(region)
            print(f"  {region:14} {size:6,} positions, {100 * size / layout.num_positions:4.1f} %")
        print(f"  {len(schema.topology.connections)} connections compute {100 * plan.density:.1f} % of all pairs")
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            schema.to_json(options.out / f"{name}.json")


if __name__ == "__main__":
    main()
