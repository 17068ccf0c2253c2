"""The published path of :class:`canvas_engineering.models.processor.CanvasAttnProcessor`."""

from ..models.processor import CanvasAttnProcessor

__all__ = ["CanvasAttnProcessor"]
