"""The canvases that are measured, as data: what each declares, and what it must reach against each contestant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from canvas_engineering.canvas import CanvasLayout, RegionSpec
from canvas_engineering.connectivity import CanvasTopology, Connection, TemporalFill


@dataclass(frozen=True)
class Case:
    """One canvas. ``at_least`` maps a contestant's name to the least ratio of its time to ours."""

    name: str
    declare: Callable[[], tuple[CanvasLayout, CanvasTopology]]
    at_least: dict[str, float] = field(default_factory=dict)


def robot() -> tuple[CanvasLayout, CanvasTopology]:
    """A camera, an action and a reward, all reading each other: nine small reads, no time."""
    regions = {"visual": (0, 5, 0, 6, 0, 6), "action": (0, 5, 6, 7, 0, 1), "reward": (2, 3, 7, 8, 0, 1)}
    return CanvasLayout(T=5, d_model=256, spatial_shape=(8, 8), regions=regions), CanvasTopology.dense(list(regions))


def causal_video() -> tuple[CanvasLayout, CanvasTopology]:
    """Frames that read themselves and the frame before, beside an action strip."""
    regions = {"video": (0, 8, 0, 16, 0, 16), "act": (0, 8, 16, 17, 0, 8)}
    layout = CanvasLayout(T=8, d_model=256, spatial_shape=(24, 24), regions=regions)
    return layout, CanvasTopology.causal_temporal(list(regions))


def multi_rate() -> tuple[CanvasLayout, CanvasTopology]:
    """A fast region that interpolates a slow one, which holds the latest fast frame."""
    regions = {"fast": (0, 16, 0, 8, 0, 8), "slow": RegionSpec((0, 4, 8, 12, 0, 8), period=4)}
    connections = [
        Connection("fast", "fast", t_src=0, t_dst=0),
        Connection("fast", "slow", t_src=0, t_dst=0, temporal_fill=TemporalFill.INTERPOLATE),
        Connection("slow", "slow"),
        Connection("slow", "fast", t_src=0, t_dst=0, temporal_fill=TemporalFill.HOLD),
    ]
    return CanvasLayout(T=16, d_model=256, spatial_shape=(12, 8), regions=regions), CanvasTopology(connections)


def computer_use() -> tuple[CanvasLayout, CanvasTopology]:
    """A screen with causal frames, and mouse, keyboard and language model that all read all: 16,384 positions."""
    regions = {
        "screen": (0, 16, 0, 24, 0, 24),
        "mouse": (0, 16, 24, 26, 0, 4),
        "keyboard": (0, 16, 26, 28, 0, 4),
        "llm": (0, 16, 28, 32, 0, 8),
    }
    connections = [
        Connection("screen", "screen", t_src=0, t_dst=0),
        Connection("screen", "screen", t_src=0, t_dst=-1),
        *(Connection(src, dst) for src in regions for dst in regions if (src, dst) != ("screen", "screen")),
    ]
    return CanvasLayout(T=16, d_model=256, spatial_shape=(32, 32), regions=regions), CanvasTopology(connections)


def long_video(frames: int, side: int = 64) -> tuple[CanvasLayout, CanvasTopology]:
    """A causal video that fills its canvas: 256 frames of 64 x 64 are 1,048,576 positions."""
    regions = {"video": (0, frames, 0, side, 0, side)}
    layout = CanvasLayout(T=frames, d_model=256, spatial_shape=(side, side), regions=regions)
    return layout, CanvasTopology.causal_temporal(["video"])


DISPATCH = (
    Case("robot", robot, {"per_edge_loop": 2.0}),
    Case("causal_video", causal_video, {"per_edge_loop": 3.7, "dense_mask": 5.0}),
    Case("multi_rate", multi_rate, {"per_edge_loop": 4.0}),
)
"""Timed forward and backward. computer_use is left out: its dense mask alone is 1 GiB."""
