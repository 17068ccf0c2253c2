"""Attention functions by name."""

from __future__ import annotations

from torch import nn

from ..checked import checked_name
from .hyena import HyenaAttention
from .linear import LinearAttention
from .local import LocalAttention
from .mamba import MambaAttention
from .mixture import MixtureAttention
from .perceiver import PerceiverAttention
from .pooling import CopyAttention, NoneAttention, PoolingAttention
from .random_fixed import RandomFixedAttention
from .rwkv import RWKVAttention
from .softmax import CogVideoXAttention, CosineAttention, CrossAttention, GatedAttention, SigmoidAttention
from .top_k import SparseAttention

ATTENTION_REGISTRY: dict[str, type[nn.Module]] = {
    "cross_attention": CrossAttention,
    "self_attention": CrossAttention,
    "cogvideox": CogVideoXAttention,
    "perceiver": PerceiverAttention,
    "sparse_attention": SparseAttention,
    "mixture": MixtureAttention,
    "mamba": MambaAttention,
    "rwkv": RWKVAttention,
    "hyena": HyenaAttention,
    "cosine_attention": CosineAttention,
    "sigmoid_attention": SigmoidAttention,
    "gated": GatedAttention,
    "linear_attention": LinearAttention,
    "pooling": PoolingAttention,
    "pooling_attention": PoolingAttention,
    "copy": CopyAttention,
    "local_attention": LocalAttention,
    "random_fixed": RandomFixedAttention,
    "none": NoneAttention,
}


def create_attention(fn_name: str, d_model: int, n_heads: int = 4, dropout: float = 0.0, **kwargs) -> nn.Module:
    """Returns a new module of a registered attention function; ``kwargs`` go to its constructor.

    Raises:
        ValueError: a name that is not registered; the message lists the registered ones.

    >>> type(create_attention("self_attention", 16)).__name__
    'CrossAttention'
    """
    if not isinstance(fn_name, str) or fn_name not in ATTENTION_REGISTRY:
        known = ", ".join(sorted(ATTENTION_REGISTRY))
        raise ValueError(f"attention function {fn_name!r} is not registered; known: {known}")
    return ATTENTION_REGISTRY[fn_name](d_model, n_heads=n_heads, dropout=dropout, **kwargs)


def register_attention(name: str, cls: type[nn.Module]) -> None:
    """Registers ``cls`` as the module of connections with ``fn=name``, in this process.

    ``cls(d_model, n_heads=…, dropout=…)`` must be a Module with ``forward(queries, keys, values)``, for one attention
    set: (B, n, d_model) over (B, m, d_model), keys and values being one tensor, to (B, n, d_model), each batch entry by
    itself. The dispatcher calls it once for all sets of one shape (:func:`.base.attend_grouped`), whatever their write
    modes, gates and fills. A class with an ``attend`` like that of :class:`CrossAttention` is called with the whole
    plan instead, once for all of its connections.

    >>> import torch
    >>> class Doubled(nn.Module):
    ...     def __init__(self, d_model, n_heads=4, dropout=0.0):
    ...         super().__init__()
    ...
    ...     def forward(self, queries, keys, values):
    ...         return 2 * queries
    >>> register_attention("doubled", Doubled)
    >>> create_attention("doubled", 4)(torch.ones(1, 2, 4), torch.ones(1, 3, 4), torch.ones(1, 3, 4)).unique().item()
    2.0
    >>> _ = ATTENTION_REGISTRY.pop("doubled")

    Raises:
        ValueError: ``cls`` is not such a class, or ``name`` is "none", which is reserved.
    """
    if checked_name(name, "the name of an attention function") == "none":
        raise ValueError(f"{name!r} cannot be registered: 'none' declares a connection that does not run")
    if "." in name or hasattr(nn.ModuleDict, name):
        raise ValueError(f"{name!r} cannot be registered: no module can be stored under that name")
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ValueError(f"{name!r}: {cls!r} is not a subclass of torch.nn.Module")
    if cls.forward is nn.Module.forward and not callable(getattr(cls, "attend", None)):
        raise ValueError(f"{name!r}: {cls.__name__} has no forward(queries, keys, values), which the dispatcher calls")
    ATTENTION_REGISTRY[name] = cls
