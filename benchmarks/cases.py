"""The cases that are measured, as data: what each declares, who computes it, and what it is to reach."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from canvas_engineering import ATTENTION_REGISTRY, ATTENTION_TYPES
from canvas_engineering.canvas import CanvasLayout, RegionSpec
from canvas_engineering.cogvideox import cogvideox_layout, dense_topology, tile_topology, window_topology
from canvas_engineering.connectivity import CanvasTopology, Connection, TemporalFill
from canvas_engineering.masks import MaskSpec

Declaration = tuple[CanvasLayout, CanvasTopology]


@dataclass(frozen=True)
class Case:
    """One declaration and what is timed on it."""

    name: str
    declare: Callable[[], Declaration] | None  # None where the case has no canvas of its own
    kind: str = "attention"  # of q, k and v, by benchmarks.providers; or a function of benchmarks.layers
    group: str = "canvas"  # the table and the figure that it belongs to
    sequence: tuple[str, ...] = ()  # regions whose positions are the tokens, in turn; () for all of the canvas
    batch: int = 1
    heads: int = 4
    head_dim: int = 64
    slow: tuple[str, ...] = ()  # providers that only long runs time
    never: tuple[str, ...] = ()  # and those that none does
    long: bool = False  # only long runs, and runs that name it, time it
    options: dict = field(default_factory=dict)  # what else its kind needs
    about: str = ""  # one line; by default the first that ``declare`` says of itself, or the name

    def __post_init__(self) -> None:
        if not self.about:
            about = getattr(getattr(self.declare, "func", self.declare), "__doc__", None)
            object.__setattr__(self, "about", (about or self.name).splitlines()[0])


def robot() -> Declaration:
    """A camera, an action and a reward that all attend to each other: nine small connections, no time."""
    regions = {"visual": (0, 5, 0, 6, 0, 6), "action": (0, 5, 6, 7, 0, 1), "reward": (2, 3, 7, 8, 0, 1)}
    return CanvasLayout(T=5, d_model=256, spatial_shape=(8, 8), regions=regions), CanvasTopology.dense(list(regions))


def causal_video() -> Declaration:
    """Frames that attend to themselves and the frame before, beside an action strip."""
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
    """A screen with causal frames, and mouse, keyboard and language model that all attend to all: 16,384 positions."""
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
    """Vehicles that dispatch attends to through their summaries: 1,351 connections for fifty (examples/fleet.py)."""
    from examples import fleet as example

    bound = example.declare(vehicles, T=frames, d_model=256)
    return bound.layout, bound.topology


def separate_frames(frames: int, positions: int) -> Declaration:
    """Frames that attend to themselves only: 1 / ``frames`` of all pairs."""
    side = positions // frames
    layout = CanvasLayout(T=frames, d_model=64, spatial_shape=(side,), regions={"video": (0, frames, 0, side)})
    return layout, CanvasTopology([Connection("video", "video", t_src=0, t_dst=0)])


def cogvideox(topology: CanvasTopology, heads: int = 2, text: int = 226, pixels: tuple[int, int] = (480, 720)):
    """CogVideoX's token grid at 49 frames: 13 × 30 × 45 tokens of video, and the text."""
    config = {"num_attention_heads": heads, "attention_head_dim": 64, "patch_size": 2, "patch_size_t": None}
    config |= {"temporal_compression_ratio": 4, "max_text_seq_length": text}
    return cogvideox_layout(config, *pixels, 49), topology


TOPOLOGIES = {
    "dense": (dense_topology(), "everything attends to everything"),
    "previous_frame": (window_topology(past=1), "each frame attends to itself and the one before"),
    "three_frames": (window_topology(past=1, future=1), "each frame attends to itself and its two neighbours"),
    "tiles": (tile_topology(10, 15), "tiles of 10 × 15 attend to themselves in all frames, and to the first frame"),
}
"""On CogVideoX's grid; text and video attend to each other in all of them."""
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


def _cogvideox(model: str, heads: int, slow: dict[str, tuple[str, ...]] | None = None, **more) -> tuple[Case, ...]:
    """``slow``: a topology's providers that only long runs time; ``more``: topologies besides TOPOLOGIES."""
    grid = {"group": "cogvideox", "sequence": ("text", "video"), "heads": heads}
    return tuple(
        Case(
            f"{model}_{name}", partial(cogvideox, topology, heads), about=about, slow=(slow or {}).get(name, ()), **grid
        )
        for name, (topology, about) in (more | TOPOLOGIES).items()
    )


def _lengths(heads: int, most: dict[str, int], never: tuple[str, ...] = ()) -> tuple[Case, ...]:
    """Causal videos with frames of 16 × 16: every position attends to 512. ``most``: the longest that a provider takes
    outside of long runs; ``never``: who is left out of the longest."""
    cases = []
    for n in LENGTHS:
        slow, out = tuple(name for name, longest in most.items() if n > longest), never if n == LENGTHS[-1] else ()
        video = partial(long_video, n // 256, 16)
        cases.append(Case(f"video_{n}", video, group="length", heads=heads, slow=slow, never=out))
    return tuple(cases)


def _densities(tokens: int, heads: int, dim: int) -> tuple[Case, ...]:
    shape = {"group": "density", "heads": heads, "head_dim": dim}
    return tuple(Case(f"frames_{n}_d{dim}", partial(separate_frames, n, tokens), **shape) for n in FRAMES)


def one_function(fn: str, keys: int, queries: int = 0) -> Declaration:
    """One connection of an attention function: from so many queries, or with 0 from the keys themselves."""
    regions = {"keys": (0, 1, 0, keys)} | ({"queries": (0, 1, keys, keys + queries)} if queries else {})
    layout = CanvasLayout(T=1, d_model=64, spatial_shape=(keys + queries,), regions=regions)
    return layout, CanvasTopology([Connection("queries" if queries else "keys", "keys", fn=fn)])


DISPATCH = (Case("robot", robot), Case("causal_video", causal_video), Case("multi_rate", multi_rate))
"""Canvases small enough for a dense mask of all of them, in layers too."""
_CANVASES = (
    *DISPATCH,
    Case("surgical_robot", surgical_robot),
    Case("fleet", fleet, slow=("per_edge_loop", "sdpa_mask", "sdpa_mask_used", "flex")),
    Case("computer_use", computer_use, heads=1),
)
LAYERS = (
    *(Case(f"layer_{case.name}", case.declare, "layer", "layer") for case in DISPATCH),
    Case("layer_fleet", fleet, "layer", "layer", long=True),
)
_VIDEOS = {f"video_of_{frames}_frames": partial(long_video, frames) for frames in (16, 32, 64, 128, 256)}
_PLANS = {case.name: case.declare for case in DISPATCH} | {"computer_use": computer_use} | _VIDEOS
_FLEETS = {f"fleet_{vehicles}": partial(fleet, vehicles, 1) for vehicles in (1_250, 2_500, 5_000, 10_000)}
PLANS = tuple(
    Case(f"plan_{name}", declare, "plan", "plan", long=name in _FLEETS) for name, declare in (_PLANS | _FLEETS).items()
)
_SAME_AS = ("self_attention", "cogvideox", "pooling_attention", "none")
"""Other names of cross_attention and pooling, and none: what they cost is known."""
CLAIMS = {
    fn: "O(" + about.rpartition("O(")[2]
    for fn, about in ATTENTION_TYPES.items()
    if fn not in _SAME_AS and fn in ATTENTION_REGISTRY
}
"""Each attention function once, and the complexity that its description states."""
FUNCTIONS = tuple(
    Case(
        f"{fn}_of_{keys}" + f"_by_{queries}" * bool(queries),
        partial(one_function, fn, keys, queries),
        "layer",
        "queries" if queries else "functions",
        long=True,
        options={"fn": fn, "keys": keys},
    )
    for queries in (0, 64)
    for fn in CLAIMS
    for keys in (2**8, 2**10, 2**12)
)
CPU = (
    *_CANVASES,
    *_densities(4200, 2, 64),
    # of the million positions' 8,191 sets, each clears and adds gradients of the whole canvas: 45 minutes a step
    *_lengths(1, {"per_edge_loop": 2**14, "sdpa_mask": 2**14, "flex": 2**16, "grouped": 2**16}, ("per_edge_loop",)),
    *_cogvideox(
        "cogvideox",
        2,
        {"dense": ("sdpa_mask", "per_edge_loop"), "three_frames": ("sdpa_mask",), "tiles": ("sdpa_mask", "flex")},
    ),
    # against what its users have today: unmasked attention over all tokens is its reference line
    Case(
        "cogvideox_stock",
        partial(cogvideox, TOPOLOGIES["previous_frame"][0]),
        group="cogvideox",
        sequence=("text", "video"),
        heads=2,
        never=("sdpa_mask", "flex", "per_edge_loop", "grouped"),  # cogvideox_previous_frame times them
        long=True,
        options={"reference_tokens": 17776},
    ),
    *LAYERS,
    *PLANS,
    *FUNCTIONS,
)
"""What a CPU is measured on, in this order."""
GPU = (
    *_cogvideox("cogvideox_5b", 48, sparse_tiles=(SPARSE_TILES, "tiles of 5 × 15 attend to themselves in all frames")),
    *(case for dim, heads in ((64, 32), (128, 16)) for case in _densities(16_800, heads, dim)),
    Case("long_video_d64", partial(long_video, 16, 32), batch=2, heads=16),
    Case("long_video_d128", partial(long_video, 16, 32), batch=2, heads=8, head_dim=128),
    *(dataclasses.replace(case, batch=4, heads=16, slow=()) for case in _CANVASES),
    *_lengths(8, dict.fromkeys(("per_edge_loop", "grouped"), 2**16)),
    *_cogvideox("cogvideox_2b", 30),
    *(Case(f"layer_{case.name}", case.declare, "layer", "layer", batch=4) for case in (*DISPATCH, _CANVASES[-1])),
)
"""What a GPU is measured on, what matters most first: its time is short."""
EARLY_ON_A_GPU = ("cogvideox_5b_previous_frame", "video_65536")
"""What ``make gpu`` times after head_dim 128 and before the rest."""


def toy() -> Declaration:
    """Frames that attend to themselves and the one before, beside a caption: both attend to each other."""
    regions = {"video": (0, 3, 0, 3, 0, 4), "caption": (0, 1, 3, 4, 0, 3)}
    layout = CanvasLayout(T=3, d_model=32, spatial_shape=(4, 4), regions=regions)
    connections = [
        Connection("video", "video", t_src=0, t_dst=0),
        Connection("video", "video", t_src=0, t_dst=-1, weight=0.5),
        Connection("video", "caption"),
        Connection("caption", "video"),
    ]
    return layout, CanvasTopology(connections)


TOY = (
    Case("toy", toy, sequence=("caption", "video"), heads=1, head_dim=16),
    Case("layer_toy", toy, "layer", "layer", heads=1),
)
"""For Triton's interpreter."""
