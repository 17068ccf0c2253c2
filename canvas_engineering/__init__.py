"""Declare regions of latent space and who reads whom; train through the block-sparse attention that follows."""

from canvas_engineering.attention import (
    ATTENTION_REGISTRY,
    CogVideoXAttention,
    CopyAttention,
    CosineAttention,
    CrossAttention,
    GatedAttention,
    LinearAttention,
    LocalAttention,
    NoneAttention,
    PoolingAttention,
    RandomFixedAttention,
    SigmoidAttention,
    canvas_attention,
    create_attention,
    register_attention,
)
from canvas_engineering.canvas import (
    ATTENTION_TYPES,
    CanvasLayout,
    FamilyCarrierEmbedding,
    PeriodEmbedding,
    RegionSpec,
    SinusoidalPositionalEncoding3D,
    SinusoidalPositionalEncodingND,
    SpatiotemporalCanvas,
    transfer_distance,
)
from canvas_engineering.connectivity import CanvasTopology, Connection, TemporalFill
from canvas_engineering.dispatch import AttentionDispatcher
from canvas_engineering.masks import MaskSpec, Rect, mask_to_index_pairs, rect_cover
from canvas_engineering.plan import AttentionPlan, compile_attention
from canvas_engineering.schema import CanvasSchema
from canvas_engineering.semantic import (
    SemanticConditioner,
    auto_semantic_type,
    compute_semantic_embeddings,
    program_distance,
)
from canvas_engineering.types import (
    BoundField,
    BoundSchema,
    ConnectivityPolicy,
    Field,
    LayoutStrategy,
    compile_schema,
)

__all__ = [
    # declare
    "ATTENTION_TYPES",
    "CanvasLayout",
    "FamilyCarrierEmbedding",
    "PeriodEmbedding",
    "RegionSpec",
    "SinusoidalPositionalEncoding3D",
    "SinusoidalPositionalEncodingND",
    "SpatiotemporalCanvas",
    "transfer_distance",
    "CanvasTopology",
    "Connection",
    "TemporalFill",
    "MaskSpec",
    "Rect",
    "mask_to_index_pairs",
    "rect_cover",
    "CanvasSchema",
    "BoundField",
    "BoundSchema",
    "ConnectivityPolicy",
    "Field",
    "LayoutStrategy",
    "compile_schema",
    "SemanticConditioner",
    "auto_semantic_type",
    "compute_semantic_embeddings",
    "program_distance",
    # plan
    "AttentionPlan",
    "compile_attention",
    # run
    "ATTENTION_REGISTRY",
    "CogVideoXAttention",
    "CopyAttention",
    "CosineAttention",
    "CrossAttention",
    "GatedAttention",
    "LinearAttention",
    "LocalAttention",
    "NoneAttention",
    "PoolingAttention",
    "RandomFixedAttention",
    "SigmoidAttention",
    "canvas_attention",
    "create_attention",
    "register_attention",
    "AttentionDispatcher",
]
