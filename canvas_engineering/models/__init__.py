"""Canvas attention and looping on diffusers' video models, one adapter for each.

``LoopedWanTransformer3DModel`` and its like are defined here on first access; they need diffusers.
"""

from __future__ import annotations

from . import topologies
from .adapter import ModelAdapter
from .attach import remove_canvas_attention, set_canvas_attention
from .block import LoopedBlock, LoopedTwoStreamBlock
from .layout import PixelBox, video_layout
from .measure import TopologyMeasure, measure_topology
from .model import looped_class_named
from .processor import CanvasAttnProcessor
from .registry import ADAPTERS, adapter_of

__all__ = [
    "ADAPTERS",
    "CanvasAttnProcessor",
    "LoopedBlock",
    "LoopedTwoStreamBlock",
    "ModelAdapter",
    "PixelBox",
    "TopologyMeasure",
    "adapter_of",
    "measure_topology",
    "remove_canvas_attention",
    "set_canvas_attention",
    "topologies",
    "video_layout",
]


def __getattr__(name: str):
    return looped_class_named(name, __name__)
