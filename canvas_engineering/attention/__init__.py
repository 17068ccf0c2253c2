"""Attention on canvases: the functional door, and the modules that connections name."""

from .chosen import RandomFixedAttention
from .functional import BACKENDS, canvas_attention
from .hyena import HyenaAttention
from .mamba import MambaAttention
from .mixture import MixtureAttention
from .perceiver import PerceiverAttention
from .registry import ATTENTION_REGISTRY, create_attention, register_attention
from .rwkv import RWKVAttention
from .softmax import CogVideoXAttention, CosineAttention, CrossAttention, GatedAttention, SigmoidAttention
from .sums import CopyAttention, LinearAttention, NoneAttention, PoolingAttention
from .topk import SparseAttention
from .windows import LocalAttention

__all__ = [
    "ATTENTION_REGISTRY",
    "BACKENDS",
    "CogVideoXAttention",
    "CopyAttention",
    "CosineAttention",
    "CrossAttention",
    "GatedAttention",
    "HyenaAttention",
    "LinearAttention",
    "LocalAttention",
    "MambaAttention",
    "MixtureAttention",
    "NoneAttention",
    "PerceiverAttention",
    "PoolingAttention",
    "RWKVAttention",
    "RandomFixedAttention",
    "SigmoidAttention",
    "SparseAttention",
    "canvas_attention",
    "create_attention",
    "register_attention",
]
