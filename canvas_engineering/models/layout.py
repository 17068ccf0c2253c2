"""The token grid of a video model as a canvas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..canvas import CanvasLayout, RegionSpec
from ..checked import checked_int, checked_ints, checked_kind
from .adapter import TEXT, VIDEO, ModelAdapter
from .registry import adapter_of

__all__ = ["PixelBox", "video_layout"]

FIRST_FRAME = "first_frame"
_OWN = (TEXT, VIDEO, FIRST_FRAME)
_MAX_COUNT = 100_000  # tokens of a text, whose divisors are looked for

Regions = Mapping[str, "tuple[int, ...] | RegionSpec | PixelBox"]


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


def video_layout(
    model_or_config: nn.Module | Mapping[str, Any],
    height: int,
    width: int,
    num_frames: int,
    regions: Regions | None = None,
    *,
    text_tokens: int | None = None,
    vae_scale: int | None = None,
    vae_frames: int | None = None,
) -> CanvasLayout:
    """Returns the canvas of a video model's tokens for videos of one size.

    The video is the box (0, T', 0, H', 0, W'), as region "video", and its first frame again as "first_frame". Where
    text is among the tokens that attend to each other (CogVideoX, HunyuanVideo, Mochi), it is region "text", a box of
    as many positions in frame 0, below the video; nothing else lies there. Wan and LTX-Video attend to the text
    elsewhere, and their canvas holds the video alone.

    Latent frame 0 holds video frame 0, and latent frame t ≥ 1 the frames r·(t − 1) + 1 … r·t, with r the temporal
    compression of the model's VAE.

    Args:
        model_or_config: one of diffusers' video transformers that :data:`ADAPTERS` has, or its config with
            ``_class_name``.
        height, width: of the video in pixels; multiples of a token's side.
        num_frames: of the video.
        regions: further regions, as bounds (t0, t1, row0, row1, column0, column1) in tokens, as RegionSpec, or as
            :class:`PixelBox`.
        text_tokens: length of the text; by default the model's usual one.
        vae_scale, vae_frames: pixels per latent row and column and video frames per latent frame, where the VAE is not
            the model's own.

    Raises:
        ValueError: a model that is not known, a size that tokens do not divide, a region outside the video or named as
            the layout's own, or ``text_tokens`` of a model that has none.

    >>> config = {"_class_name": "WanTransformer3DModel", "patch_size": (1, 2, 2), "in_channels": 16,
    ...           "num_attention_heads": 12, "attention_head_dim": 128}
    >>> video_layout(config, 480, 832, 81).region_size("video")
    (21, 30, 52)
    """
    adapter = adapter_of(model_or_config)
    config: Any = model_or_config.config if isinstance(model_or_config, nn.Module) else model_or_config
    return token_layout(adapter, config, height, width, num_frames, regions, text_tokens, vae_scale, vae_frames)


def token_layout(
    adapter: ModelAdapter,
    config: Mapping[str, Any],
    height: int,
    width: int,
    num_frames: int,
    regions: Regions | None,
    text_tokens: int | None,
    vae_scale: int | None,
    vae_frames: int | None = None,
) -> CanvasLayout:
    """:func:`video_layout` of a known model."""
    try:
        joined, *patch = adapter.patch(config)
        scale, ratio = adapter.compression(config)
        width_of_tokens = config["num_attention_heads"] * config["attention_head_dim"]
    except KeyError as missing:
        raise ValueError(f"config must be that of a {adapter.model_class}: it has no {missing}") from None
    checked_kind(regions, "regions", Mapping, optional=True)
    height, width = checked_int(height, "height"), checked_int(width, "width")
    num_frames = checked_int(num_frames, "num_frames", 1)
    scale = scale if vae_scale is None else checked_int(vae_scale, "vae_scale", 1)
    ratio = ratio if vae_frames is None else checked_int(vae_frames, "vae_frames", 1)
    sides = [scale * side for side in patch]
    for name, size, side in (("height", height, sides[0]), ("width", width, sides[1])):
        if size < side or size % side:
            raise ValueError(f"{name} {size} must be a multiple of {side} pixels, the side of a token")
    latent_frames = (num_frames - 1) // ratio + 1
    padding = -latent_frames % joined
    if padding and not adapter.pads_frames:
        raise ValueError(f"{num_frames} frames are {latent_frames} latent frames, of which a token holds {joined}")
    T, H, W = (latent_frames + padding) // joined, height // sides[0], width // sides[1]

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
                side = sides[0] if axis == "rows" else sides[1]
                bounds += [low // side, -(-high // side)]
        return tuple(bounds)

    placed: dict[str, tuple[int, ...] | RegionSpec] = {}
    shape = (H, W)
    if TEXT in adapter.streams:
        shape, placed[TEXT] = _place_text(adapter, config, text_tokens, H, W)
    elif text_tokens is not None:
        raise ValueError(f"{adapter.model_class} has no text among the tokens that attend to each other: text_tokens=")
    placed.update({VIDEO: (0, T, 0, H, 0, W), FIRST_FRAME: (0, 1, 0, H, 0, W)})
    for name, region in (regions or {}).items():
        if name in _OWN:
            raise ValueError(f"a region cannot be called {name!r}: the layout has its own {', '.join(_OWN)}")
        region = tokens(name, region) if isinstance(region, PixelBox) else region
        bounds = region.bounds if isinstance(region, RegionSpec) else checked_ints(region, f"region {name!r}")
        if len(bounds) != 6 or any(high > size for high, size in zip(bounds[1::2], (T, H, W))):
            raise ValueError(f"region {name!r}: bounds {bounds} do not lie in the video's tokens, {T} × {H} × {W}")
        placed[name] = region
    return CanvasLayout(T=T, d_model=width_of_tokens, spatial_shape=shape, regions=placed)


def _place_text(
    adapter: ModelAdapter, config: Mapping[str, Any], text_tokens: int | None, H: int, W: int
) -> tuple[tuple[int, int], tuple[int, ...]]:
    """Returns the canvas's rows and columns, and the bounds of the text below H × W: rows × columns of the shape that
    makes the canvas smallest."""
    n_text = adapter.text_tokens(config) if text_tokens is None else text_tokens
    n_text = checked_int(n_text, "text_tokens", 1, most=_MAX_COUNT)
    shapes = [(n_text // columns, columns) for columns in range(1, n_text + 1) if n_text % columns == 0]
    rows, columns = min(shapes, key=lambda shape: ((H + shape[0]) * max(W, shape[1]), shape))
    return (H + rows, max(W, columns)), (0, 1, H, H + rows, 0, columns)


def grid_of(layout: CanvasLayout) -> tuple[int, int, int]:
    """Returns the token grid (frames, rows, columns) of a layout's video."""
    frames, rows, columns = layout.region_size(VIDEO)
    return frames, rows, columns
