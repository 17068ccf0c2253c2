"""The canvases that are measured, as data: what each declares, how it is attended over, what it must reach."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

from canvas_engineering.canvas import CanvasLayout, RegionSpec
from canvas_engineering.cogvideox import cogvideox_layout, dense_topology, tile_topology, window_topology
from canvas_engineering.connectivity import CanvasTopology, Connection, TemporalFill
from canvas_engineering.masks import MaskSpec

Declaration = tuple[CanvasLayout, CanvasTopology]


@dataclass(frozen=True)
class Case:
    """One canvas and the attention over it.

    Attributes:
        declare: gives layout and topology.
        at_least: a contestant's name to the least ratio of its time to ours, of the dispatcher's benchmark.
        group: "canvas", "cogvideox", "density", "length": which figure it belongs to.
        sequence: regions whose positions are the tokens, one region after the other; every position of the canvas
            where there are none.
        batch, heads, head_dim: of q, k and v.
        without: a contestant's name to the reason why it is left out; of all but long runs, if that is ``TOO_LONG``.
        about: one line; by default the first that ``declare`` says of itself, or the name.
    """

    name: str
    declare: Callable[[], Declaration]
    at_least: dict[str, float] = field(default_factory=dict)
    group: str = "canvas"
    sequence: tuple[str, ...] = ()
    batch: int = 1
    heads: int = 4
    head_dim: int = 64
    without: dict[str, str] = field(default_factory=dict)
    about: str = ""

    @property
    def long(self) -> set[str]:
        """Contestants that long runs time."""
        return {name for name, why in self.without.items() if why != NEVER}

    def __post_init__(self) -> None:
        if not self.about:
            object.__setattr__(self, "about", (self.declare.__doc__ or self.name).splitlines()[0])


def robot() -> Declaration:
    """A camera, an action and a reward, all reading each other: nine small reads, no time."""
    regions = {"visual": (0, 5, 0, 6, 0, 6), "action": (0, 5, 6, 7, 0, 1), "reward": (2, 3, 7, 8, 0, 1)}
    return CanvasLayout(T=5, d_model=256, spatial_shape=(8, 8), regions=regions), CanvasTopology.dense(list(regions))


def causal_video() -> Declaration:
    """Frames that read themselves and the frame before, beside an action strip."""
    regions = {"video": (0, 8, 0, 16, 0, 16), "act": (0, 8, 16, 17, 0, 8)}
    layout = CanvasLayout(T=8, d_model=256, spatial_shape=(24, 24), regions=regions)
    return layout, CanvasTopology.causal_temporal(list(regions))


def multi_rate() -> Declaration:
    """A fast region that interpolates a slow one, which holds the latest fast frame."""
    regions = {"fast": (0, 16, 0, 8, 0, 8), "slow": RegionSpec((0, 4, 8, 12, 0, 8), period=4)}
    connections = [
        Connection("fast", "fast", t_src=0, t_dst=0),
        Connection("fast", "slow", t_src=0, t_dst=0, temporal_fill=TemporalFill.INTERPOLATE),
        Connection("slow", "slow"),
        Connection("slow", "fast", t_src=0, t_dst=0, temporal_fill=TemporalFill.HOLD),
    ]
    return CanvasLayout(T=16, d_model=256, spatial_shape=(12, 8), regions=regions), CanvasTopology(connections)


def computer_use() -> Declaration:
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


def long_video(frames: int, side: int = 64) -> Declaration:
    """A causal video that fills its canvas, in frames of ``side`` × ``side`` positions."""
    regions = {"video": (0, frames, 0, side, 0, side)}
    layout = CanvasLayout(T=frames, d_model=256, spatial_shape=(side, side), regions=regions)
    return layout, CanvasTopology.causal_temporal(["video"])


def surgical_robot() -> Declaration:
    """Sensors, two arms and a safety monitor, typed: many small regions (examples/surgical_robot.py)."""
    from examples import surgical_robot as example

    bound = example.declare()
    return bound.layout, bound.topology


def fleet(vehicles: int = 50, frames: int = 4) -> Declaration:
    """Vehicles that dispatch reads through their summaries: 1,351 connections for fifty (examples/fleet.py)."""
    from examples import fleet as example

    bound = example.declare(vehicles, T=frames, d_model=256)
    return bound.layout, bound.topology


def separate_frames(frames: int, positions: int) -> Declaration:
    """Frames that read themselves only: 1 / ``frames`` of all pairs."""
    side = positions // frames
    layout = CanvasLayout(T=frames, d_model=64, spatial_shape=(side,), regions={"video": (0, frames, 0, side)})
    return layout, CanvasTopology([Connection("video", "video", t_src=0, t_dst=0)])


def cogvideox(topology: CanvasTopology, heads: int = 2, text: int = 226, pixels: tuple[int, int] = (480, 720)):
    """CogVideoX's token grid at 49 frames: 13 × 30 × 45 tokens of video, and the text."""
    config = {
        "num_attention_heads": heads,
        "attention_head_dim": 64,
        "patch_size": 2,
        "patch_size_t": None,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": text,
    }
    return cogvideox_layout(config, *pixels, 49), topology


DISPATCH = (
    Case("robot", robot, {"per_edge_loop": 2.0}),
    Case("causal_video", causal_video, {"per_edge_loop": 3.7, "dense_mask": 5.0}),
    Case("multi_rate", multi_rate, {"per_edge_loop": 4.0}),
)
"""Timed forward and backward. computer_use is left out: its dense mask alone is 1 GiB."""

TOPOLOGIES = {
    "dense": dense_topology(),
    "previous_frame": window_topology(past=1),
    "three_frames": window_topology(past=1, future=1),
    "tiles": tile_topology(10, 15),
}
ABOUT = {
    "dense": "everything reads everything",
    "previous_frame": "each frame reads itself and the one before",
    "three_frames": "each frame reads itself and its two neighbours",
    "tiles": "tiles of 10 × 15 read themselves in all frames, and the first frame",
    "sparse_tiles": "tiles of 5 × 15 read themselves in all frames",
}
"""What the topologies on CogVideoX's grid say; text and video read each other in all of them."""
SPARSE_TILES = CanvasTopology(
    [
        Connection("text", "text"),
        Connection("text", "video"),
        Connection("video", "text"),
        Connection("video", "video", mask=MaskSpec("tile", tile_h=5, tile_w=15)),
    ]
)
"""Smaller tiles of all frames, and the text: 8 % of the pairs of CogVideoX's grid. At 48 heads of 64 on an H200, joint
form is to take at most 0.96 ms forward and 3.24 ms backward."""
FRAMES = (2, 4, 10, 20, 50, 100)
"""Of :func:`separate_frames`: densities 50 %, 25 %, 10 %, 5 %, 2 %, 1 %."""
LENGTHS = (2**10, 2**12, 2**14, 2**16, 2**20)
SWEPT_TOKENS = 4200
TOO_LONG = {
    "cpu": "too long for a run of ten minutes: `bench --long` times it",
    "cuda": "too long for `make gpu`, whose time is short",
}
"""Why contestants are left out of a device's runs for the time that they take."""
NEVER = "three quarters of an hour a step: nothing times it"
"""For a loop over the million positions' 8,191 reads, each of which clears and adds gradients of the whole canvas."""
LONG_ON_COGVIDEOX = {
    "dense": ("sdpa_mask", "per_edge_loop"),
    "three_frames": ("sdpa_mask",),
    "tiles": ("sdpa_mask", "flex"),
}
LONG_ON_A_FLEET = ("per_edge_loop", "sdpa_mask", "sdpa_mask_used", "flex")


def _cogvideox(
    model: str,
    heads: int,
    topologies: dict[str, CanvasTopology] = TOPOLOGIES,
    without: dict[str, tuple[str, ...]] | None = None,
) -> tuple[Case, ...]:
    """``without``: contestants that a topology's ordinary runs leave out."""
    return tuple(
        Case(
            f"{model}_{name}",
            functools.partial(cogvideox, topology, heads),
            group="cogvideox",
            sequence=("text", "video"),
            heads=heads,
            without=dict.fromkeys((without or {}).get(name, ()), TOO_LONG["cpu"]),
            about=f"{ABOUT[name]}: 13 × 30 × 45 tokens of CogVideoX and its text, {heads} heads",
        )
        for name, topology in topologies.items()
    )


def _lengths(heads: int, device: str, longest: dict[str, int]) -> tuple[Case, ...]:
    """Causal videos with frames of 16 × 16: every position reads 512. ``longest``: tokens that a contestant takes at
    most in runs on ``device``."""
    return tuple(
        Case(
            f"video_{length}",
            functools.partial(long_video, length // 256, 16),
            group="length",
            heads=heads,
            without={
                name: NEVER if (name, length) == ("per_edge_loop", 2**20) and device == "cpu" else TOO_LONG[device]
                for name, most in longest.items()
                if length > most
            },
            about=f"a causal video, {length // 256:,} frames of 16 × 16: {length:,} positions",
        )
        for length in LENGTHS
    )


def _densities(tokens: int, heads: int, head_dim: int) -> tuple[Case, ...]:
    return tuple(
        Case(
            f"frames_{frames}_d{head_dim}",
            functools.partial(separate_frames, frames, tokens),
            group="density",
            heads=heads,
            head_dim=head_dim,
            about=f"{frames} frames of {tokens // frames:,}, each reads itself: {100 / frames:g} % of all pairs, "
            f"head_dim {head_dim}",
        )
        for frames in FRAMES
    )


_CANVASES = (
    *DISPATCH,
    Case("surgical_robot", surgical_robot),
    Case("fleet", fleet, without=dict.fromkeys(LONG_ON_A_FLEET, TOO_LONG["cpu"])),
    Case("computer_use", computer_use, heads=1),
)
CPU = (
    *_CANVASES,
    *_densities(SWEPT_TOKENS, 2, 64),
    *_lengths(1, "cpu", {"per_edge_loop": 2**14, "sdpa_mask": 2**14, "flex": 2**16, "grouped": 2**16}),
    *_cogvideox("cogvideox", 2, without=LONG_ON_COGVIDEOX),
)
"""What a CPU is measured on, in this order."""
GPU = (
    *_cogvideox("cogvideox_5b", 48, {"sparse_tiles": SPARSE_TILES} | TOPOLOGIES),
    *(case for dim, heads in ((64, 32), (128, 16)) for case in _densities(16_800, heads, dim)),
    *(
        Case(
            f"long_video_d{dim}",
            functools.partial(long_video, 16, 32),
            heads=heads,
            head_dim=dim,
            batch=2,
            about=f"a causal video, 16 frames of 32 × 32, head_dim {dim}",
        )
        for dim, heads in ((64, 16), (128, 8))
    ),
    *(dataclasses.replace(case, batch=4, heads=16, without={}) for case in _CANVASES),
    *_lengths(8, "cuda", dict.fromkeys(("per_edge_loop", "grouped"), 2**16)),
    *_cogvideox("cogvideox_2b", 30),
)
"""What a GPU is measured on, what matters most first: its time is short."""
EARLY_ON_A_GPU = ("cogvideox_5b_previous_frame", "video_65536")
"""What ``make gpu`` times after head_dim 128 and before the rest."""


def toy() -> Declaration:
    """Frames that read themselves and the one before, beside a caption that reads and is read by all."""
    regions = {"video": (0, 3, 0, 3, 0, 4), "caption": (0, 1, 3, 4, 0, 3)}
    layout = CanvasLayout(T=3, d_model=32, spatial_shape=(4, 4), regions=regions)
    connections = [
        Connection("video", "video", t_src=0, t_dst=0),
        Connection("video", "video", t_src=0, t_dst=-1, weight=0.5),
        Connection("video", "caption"),
        Connection("caption", "video"),
    ]
    return layout, CanvasTopology(connections)


TOY = (Case("toy", toy, sequence=("caption", "video"), heads=1, head_dim=16),)
"""For Triton's interpreter."""
