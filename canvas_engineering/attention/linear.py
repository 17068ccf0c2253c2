"""Linear attention: sums over the keys of an attention set, shared by all of its queries, in O(n + m)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..checked import checked_sizes
from .base import MemoryAttention

LINEAR_EPSILON = 1e-6


class LinearAttention(MemoryAttention):
    """φ(q)·Σ_j φ(k_j) v_jᵀ / (φ(q)·Σ_j φ(k_j) + 1e-6) with φ = elu + 1, and biased projections as
    :class:`CrossAttention` has.

    The sums are computed once for each distinct set of keys. ``dropout`` is unused: there are no probabilities.

    >>> module = LinearAttention(8, n_heads=2)
    >>> module(torch.randn(1, 3, 8), torch.randn(1, 5, 8), torch.randn(1, 5, 8)).shape
    torch.Size([1, 3, 8])
    """

    def __init__(self, d_model: int, n_heads: int = 4, dropout: float = 0.0):
        super().__init__()
        d_model, self.n_heads, self.dropout = checked_sizes(d_model, n_heads, dropout)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(d_model, d_model) for _ in range(4))

    def key_features(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Returns φ(k) and v of each position, (…, 2 · d_model), in float32 at least."""
        return torch.cat([_feature(self.k_proj(keys)), _wide(self.v_proj(values))], -1)

    def summarise(self, features: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        """Sums features (B, m, 2 · d_model) to Σ φ(k_j) v_jᵀ, with Σ φ(k_j) last: (B, heads, D · (D + 1))."""
        k, v = (x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for x in features.chunk(2, dim=-1))
        with torch.autocast(k.device.type, enabled=False):
            return (k.transpose(-1, -2) @ F.pad(v, (0, 1), value=1.0)).flatten(2)

    def query_features(self, queries: torch.Tensor) -> torch.Tensor:
        return _feature(self.q_proj(queries))

    def attend_to_memory(self, features: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        q = features.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        with torch.autocast(q.device.type, enabled=False):
            out = q @ memory.unflatten(2, (q.shape[-1], -1))
            out = out[..., :-1] / (out[..., -1:] + LINEAR_EPSILON)
        return out.to(self.q_proj.weight.dtype).transpose(1, 2).flatten(2)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _feature(x: torch.Tensor) -> torch.Tensor:
    return F.elu(_wide(x)) + 1
