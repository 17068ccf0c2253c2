"""The published path of :class:`canvas_engineering.models.block.LoopedCogVideoXBlock`."""

from ..models.block import LoopedCogVideoXBlock

__all__ = ["LoopedCogVideoXBlock"]
