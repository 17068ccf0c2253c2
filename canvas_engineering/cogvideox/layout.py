"""The token grid of a CogVideoX model: :func:`canvas_engineering.models.video_layout` for its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..canvas import CanvasLayout, RegionSpec
from ..checked import checked_kind
from ..models.layout import PixelBox, token_layout
from ..models.registry import ADAPTERS
from ..models.topologies import dense_topology, tile_topology, window_topology

__all__ = ["PixelBox", "cogvideox_layout", "dense_topology", "tile_topology", "window_topology"]


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
    checked_kind(config, "config", Mapping)
    return token_layout(ADAPTERS["cogvideox"], config, height, width, num_frames, regions, text_tokens, vae_scale)
