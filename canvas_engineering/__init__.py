"""Declare regions of latent space and who reads whom; train through the block-sparse attention that follows."""

from canvas_engineering.attention import (
    ATTENTION_REGISTRY,
    CogVideoXAttention,
    CrossAttention,
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
from canvas_engineering.clock_ir import (
    And,
    BoundaryExpr,
    ClockContext,
    ClockExpr,
    Not,
    OnEvent,
    Or,
    Periodic,
)
from canvas_engineering.clock_ir import Cooldown as ClockCooldown
from canvas_engineering.clock_ir import MaxSilence as ClockMaxSilence
from canvas_engineering.clock_ir import boundary as clock_boundary
from canvas_engineering.clock_ir import on as clock_on
from canvas_engineering.clock_ir import periodic as clock_periodic
from canvas_engineering.compiler import CompiledProgram, ProgramCompiler, load_exported
from canvas_engineering.connectivity import CanvasTopology, Connection, TemporalFill
from canvas_engineering.cortex import CortexRegistry, CortexSpec
from canvas_engineering.dispatch import AttentionDispatcher
from canvas_engineering.identity import IdentitySpec, SlotBindingModule
from canvas_engineering.learning import FAMILY_DEFAULTS, default_learning
from canvas_engineering.masks import MaskSpec, Rect, mask_to_index_pairs, rect_cover
from canvas_engineering.plan import AttentionPlan, compile_attention
from canvas_engineering.program import (
    CARRIERS,
    COMPILE_MODES,
    OPERATOR_DEFAULTS,
    OPERATORS,
    REGION_FAMILIES,
    WRITE_MODES,
    CanvasProgram,
    ClockSpec,
    ConnectionProgram,
    ConstraintSpec,
    LearningSpec,
    RegionProgram,
    evaluate_trigger,
    resolve_operator_defaults,
    validate_constraints,
)
from canvas_engineering.residuals import ResidualAccumulator, ResidualSpec
from canvas_engineering.scheduling import HybridScheduler, LearnedScheduler, RegionScheduler
from canvas_engineering.schema import CanvasSchema
from canvas_engineering.semantic import (
    SemanticConditioner,
    auto_semantic_type,
    compute_semantic_embeddings,
    program_distance,
)
from canvas_engineering.types import (
    DEFAULT_WIRING,
    BoundField,
    BoundSchema,
    ConnectivityPolicy,
    Field,
    LayoutStrategy,
    compile_program,
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
    "DEFAULT_WIRING",
    "compile_program",
    "CARRIERS",
    "COMPILE_MODES",
    "OPERATORS",
    "OPERATOR_DEFAULTS",
    "REGION_FAMILIES",
    "WRITE_MODES",
    "CanvasProgram",
    "ClockSpec",
    "ConnectionProgram",
    "ConstraintSpec",
    "LearningSpec",
    "RegionProgram",
    "evaluate_trigger",
    "resolve_operator_defaults",
    "validate_constraints",
    "FAMILY_DEFAULTS",
    "default_learning",
    "And",
    "BoundaryExpr",
    "ClockContext",
    "ClockCooldown",
    "ClockExpr",
    "ClockMaxSilence",
    "Not",
    "OnEvent",
    "Or",
    "Periodic",
    "clock_boundary",
    "clock_on",
    "clock_periodic",
    "CortexRegistry",
    "CortexSpec",
    "IdentitySpec",
    "SlotBindingModule",
    "SemanticConditioner",
    "auto_semantic_type",
    "compute_semantic_embeddings",
    "program_distance",
    # plan
    "AttentionPlan",
    "compile_attention",
    "CompiledProgram",
    "ProgramCompiler",
    "load_exported",
    # run
    "ATTENTION_REGISTRY",
    "CogVideoXAttention",
    "CrossAttention",
    "canvas_attention",
    "create_attention",
    "register_attention",
    "AttentionDispatcher",
    "HybridScheduler",
    "LearnedScheduler",
    "RegionScheduler",
    "ResidualAccumulator",
    "ResidualSpec",
]
