"""Attention on canvases: the functional door, and the modules that connections name."""

from .functional import BACKENDS, canvas_attention
from .hyena import HyenaAttention
from .linear import LinearAttention
from .local import LocalAttention
from .mamba import MambaAttention
from .mixture import MixtureAttention
from .perceiver import PerceiverAttention
from .pooling import CopyAttention, NoneAttention, PoolingAttention
from .random_fixed import RandomFixedAttention
from .registry import ATTENTION_REGISTRY, create_attention, register_attention
from .rwkv import RWKVAttention
from .softmax import CogVideoXAttention, CosineAttention, CrossAttention, GatedAttention, SigmoidAttention
from .top_k import SparseAttention

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
