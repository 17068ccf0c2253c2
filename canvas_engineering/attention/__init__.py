"""Attention on canvases: the functional door, and the modules that connections name."""

from .chosen import RandomFixedAttention
from .functional import BACKENDS, canvas_attention
from .registry import ATTENTION_REGISTRY, create_attention, register_attention
from .softmax import CogVideoXAttention, CosineAttention, CrossAttention, GatedAttention, SigmoidAttention
from .sums import CopyAttention, LinearAttention, NoneAttention, PoolingAttention
from .windows import LocalAttention

__all__ = [
    "ATTENTION_REGISTRY",
    "BACKENDS",
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
]
