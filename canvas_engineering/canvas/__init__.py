"""Canvases: layouts of regions (`layout`) and tensors on them (`tensor`)."""

from canvas_engineering.canvas.layout import ATTENTION_TYPES, CanvasLayout, RegionSpec, transfer_distance
from canvas_engineering.canvas.tensor import (
    FamilyCarrierEmbedding,
    PeriodEmbedding,
    SinusoidalPositionalEncoding3D,
    SinusoidalPositionalEncodingND,
    SpatiotemporalCanvas,
)

__all__ = [
    "ATTENTION_TYPES",
    "CanvasLayout",
    "FamilyCarrierEmbedding",
    "PeriodEmbedding",
    "RegionSpec",
    "SinusoidalPositionalEncoding3D",
    "SinusoidalPositionalEncodingND",
    "SpatiotemporalCanvas",
    "transfer_distance",
]
