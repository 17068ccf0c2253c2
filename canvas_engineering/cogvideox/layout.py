"""The token grid of a CogVideoX model as a canvas, and the usual topologies on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..canvas import CanvasLayout, RegionSpec
from ..checked import checked_int, checked_ints, checked_kind
from ..connectivity import CanvasTopology, Connection, TemporalFill
from ..masks import MaskSpec

__all__ = ["PixelBox", "cogvideox_layout", "dense_topology", "tile_topology", "window_topology"]

TEXT, VIDEO, FIRST_FRAME = "text", "video", "first_frame"
_OWN = (TEXT, VIDEO, FIRST_FRAME)
_MAX_COUNT = 100_000  # frames of a window, each a connection, and tokens of a text, whose divisors are looked for


@dataclass(frozen=True)
class PixelBox:
    """A box of a video: half-open ranges of frames, pixel rows and pixel columns; None is the whole range.

    On a token grid it is every token that it touches.

    Raises:
        ValueError: a range that is not two ints.

    >>> PixelBox(rows=(0, 240)).columns is None
    True
    """

    frames: tuple[int, int] | None = None
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("frames", "rows", "columns"):
            if getattr(self, name) is not None:
                given = checked_ints(getattr(self, name), f"PixelBox {name}")
                if len(given) != 2:
                    raise ValueError(f"PixelBox {name} must be a range (low, high), got {given}")
                object.__setattr__(self, name, given)


def cogvideox_layout(
    config: Mapping[str, Any],
    height: int,
    width: int,
    num_frames: int,
    regions: Mapping[str, tuple[int, ...] | RegionSpec | PixelBox] | None = None,
    *,
    text_tokens: int | None = None,
    vae_scale: int = 8,
) -> CanvasLayout:
    """Returns the canvas of a model's tokens for videos of one size.

    The video is the box (0, T', 0, H', 0, W'), as region "video", and its first frame again as "first_frame". The text
    is region "text", a box of as many positions in frame 0, below the video; nothing else lies there.

    Latent frame 0 holds video frame 0, and latent frame t ≥ 1 the frames r·(t − 1) + 1 … r·t, with r the model's
    temporal compression. CogVideoX 1.5 joins ``patch_size_t`` latent frames in a token; where their number does not
    divide, its pipelines pad in front, and so does this grid.

    Args:
        config: of the transformer.
        height, width: of the video in pixels; multiples of a token's side, vae_scale · patch_size.
        num_frames: of the video.
        regions: further regions, as bounds (t0, t1, row0, row1, column0, column1) in tokens, as RegionSpec, or as
            :class:`PixelBox`.
        text_tokens: length of the text, by default the config's ``max_text_seq_length``.
        vae_scale: pixels per latent row and column.

    Raises:
        ValueError: a size that tokens do not divide, a region outside the video, or one named as the layout's own.

    >>> config = {"num_attention_heads": 30, "attention_head_dim": 64, "patch_size": 2, "patch_size_t": None,
    ...           "temporal_compression_ratio": 4, "max_text_seq_length": 226}
    >>> layout = cogvideox_layout(config, 480, 720, 49, {"hand": PixelBox(frames=(1, 9), rows=(240, 480))})
    >>> layout.region_size("video"), layout.region_numel("text"), layout.region_spec("hand").bounds
    ((13, 30, 45), 226, (1, 3, 15, 30, 0, 45))
    """
    needed = ("patch_size", "temporal_compression_ratio", "num_attention_heads", "attention_head_dim")
    missing = [name for name in needed if name not in checked_kind(config, "config", Mapping)]
    if missing:
        raise ValueError(f"config must be that of a CogVideoX transformer: it has no {', '.join(missing)}")
    checked_kind(regions, "regions", Mapping, optional=True)
    height, width = checked_int(height, "height"), checked_int(width, "width")
    num_frames = checked_int(num_frames, "num_frames", 1)
    side, ratio = checked_int(vae_scale, "vae_scale", 1) * config["patch_size"], config["temporal_compression_ratio"]
    for name, size in (("height", height), ("width", width)):
        if size < side or size % side:
            raise ValueError(f"{name} {size} must be a multiple of {side} pixels, the side of a token")
    joined = config.get("patch_size_t") or 1
    latent_frames = (num_frames - 1) // ratio + 1
    padding = -latent_frames % joined
    T, H, W = (latent_frames + padding) // joined, height // side, width // side
    n_text = config["max_text_seq_length"] if text_tokens is None else text_tokens
    n_text = checked_int(n_text, "text_tokens", 1, most=_MAX_COUNT)

    def tokens(name: str, box: PixelBox) -> tuple[int, ...]:
        bounds = []
        for axis, given, size in (
            ("frames", box.frames, num_frames),
            ("rows", box.rows, height),
            ("columns", box.columns, width),
        ):
            low, high = (0, size) if given is None else given
            if not 0 <= low < high <= size:
                raise ValueError(f"region {name!r}: {axis} {given} are empty or outside the video's 0 … {size}")
            if axis == "frames":
                bounds += [(-(-low // ratio) + padding) // joined, (-(-(high - 1) // ratio) + padding) // joined + 1]
            else:
                bounds += [low // side, -(-high // side)]
        return tuple(bounds)

    # The text as a box of rows × columns, of the shape that makes the canvas smallest.
    shapes = [(n_text // columns, columns) for columns in range(1, n_text + 1) if n_text % columns == 0]
    rows, columns = min(shapes, key=lambda shape: ((H + shape[0]) * max(W, shape[1]), shape))
    placed: dict[str, tuple[int, ...] | RegionSpec] = {
        TEXT: (0, 1, H, H + rows, 0, columns),
        VIDEO: (0, T, 0, H, 0, W),
        FIRST_FRAME: (0, 1, 0, H, 0, W),
    }
    for name, region in (regions or {}).items():
        if name in _OWN:
            raise ValueError(f"a region cannot be called {name!r}: the layout has its own {', '.join(_OWN)}")
        region = tokens(name, region) if isinstance(region, PixelBox) else region
        bounds = region.bounds if isinstance(region, RegionSpec) else checked_ints(region, f"region {name!r}")
        if len(bounds) != 6 or any(high > size for high, size in zip(bounds[1::2], (T, H, W))):
            raise ValueError(f"region {name!r}: bounds {bounds} do not lie in the video's tokens, {T} × {H} × {W}")
        placed[name] = region
    return CanvasLayout(
        T=T,
        d_model=config["num_attention_heads"] * config["attention_head_dim"],
        spatial_shape=(H + rows, max(W, columns)),
        regions=placed,
    )


def _text_connections() -> list[Connection]:
    return [Connection(TEXT, TEXT), Connection(TEXT, VIDEO), Connection(VIDEO, TEXT)]


def dense_topology() -> CanvasTopology:
    """Returns the topology of dense attention, with which the model was trained.

    >>> len(dense_topology().connections)
    4
    """
    return CanvasTopology([*_text_connections(), Connection(VIDEO, VIDEO)])


def window_topology(past: int = 1, future: int = 0) -> CanvasTopology:
    """Returns a topology with a temporal window: the video attends to its own frame, ``past`` previous and ``future``
    next frames, and the text; the text attends to everything. The default is same frame + previous frame + text.

    Raises:
        ValueError: a negative number of frames, or more than 100,000.

    >>> [c.t_dst for c in window_topology(past=2).connections if (c.src, c.dst) == ("video", "video")]
    [-2, -1, 0]
    """
    past, future = checked_int(past, "past", most=_MAX_COUNT), checked_int(future, "future", most=_MAX_COUNT)
    if past < 0 or future < 0:
        raise ValueError(f"past and future must be at least 0, got {past} and {future}")
    frames = [
        Connection(VIDEO, VIDEO, t_src=0, t_dst=offset, temporal_fill=TemporalFill.DROP)
        for offset in range(-past, future + 1)
    ]
    return CanvasTopology([*_text_connections(), *frames])


def tile_topology(rows: int, columns: int) -> CanvasTopology:
    """Returns a topology of spatial tiles: the video attends to the same tile (``rows`` × ``columns`` tokens) of all
    frames; text and first frame attend to everything, and everything attends to them.

    Raises:
        ValueError: a tile size below 1.

    >>> {(c.src, c.dst) for c in tile_topology(4, 4).connections} >= {("video", "video"), ("video", "text")}
    True
    """
    tile = MaskSpec("tile", tile_h=rows, tile_w=columns)
    return CanvasTopology(
        [
            *_text_connections(),
            Connection(VIDEO, FIRST_FRAME),
            Connection(FIRST_FRAME, VIDEO),
            Connection(VIDEO, VIDEO, mask=tile),
        ]
    )
