"""CogVideoX: looped blocks, canvas attention on its tokens, and layouts of its token grid.

``LoopedCogVideoXTransformer3DModel`` is defined here on first access; it needs diffusers.
"""

from __future__ import annotations

from torch import nn

from ..models.model import looped_class_named
from .block import LoopedCogVideoXBlock
from .layout import PixelBox, cogvideox_layout, dense_topology, tile_topology, window_topology
from .measure import TopologyMeasure, measure_topology
from .processor import CanvasAttnProcessor

__all__ = [
    "CanvasAttnProcessor",
    "LoopedCogVideoXBlock",
    "PixelBox",
    "TopologyMeasure",
    "cogvideox_layout",
    "dense_topology",
    "detect_inner_dim",
    "measure_topology",
    "tile_topology",
    "window_topology",
]


def __getattr__(name: str):
    return looped_class_named(name, __name__)


def detect_inner_dim(transformer: nn.Module) -> int:
    """Returns the width of a model's token streams.

    It is ``num_attention_heads · attention_head_dim``, ``hidden_size`` or ``d_model`` of its config, or, where there is
    no such config, the width of its first normalisation layer.

    Raises:
        ValueError: none of these is there.

    >>> detect_inner_dim(nn.TransformerEncoderLayer(32, 4))
    32
    """
    config = getattr(transformer, "config", {})

    def option(name: str):
        return config.get(name) if hasattr(config, "get") else getattr(config, name, None)

    heads, head_dim = option("num_attention_heads"), option("attention_head_dim")
    if isinstance(heads, int) and isinstance(head_dim, int):
        return heads * head_dim
    for name in ("hidden_size", "d_model"):
        width = option(name)
        if isinstance(width, int):
            return width
    for module in transformer.modules():
        shape = getattr(module, "normalized_shape", None)
        if shape is not None:
            return int(shape[-1])
    raise ValueError(
        f"the hidden size of {type(transformer).__name__} cannot be inferred from its config or layers: pass inner_dim="
    )
