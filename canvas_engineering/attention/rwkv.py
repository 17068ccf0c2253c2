"""rwkv: averages of values along the keys with a learned decay per channel."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..checked import checked_sizes
from .base import MemoryAttention
from .scan import decayed_sums

# exp(−exp(8)) is 0 even in float64, and its powers stay finite.
FASTEST = 8.0


class RWKVAttention(MemoryAttention):
    """The WKV average of RWKV-4 (Peng et al., 2023) along the keys: query i gets row i, or the last row if there are
    fewer, times a sigmoid gate.

        a_t = exp(clamp(k_t, ±10));  S, Z ← S · w + a_t v_t, Z · w + a_t with w = exp(−exp(decay))
        y_t = (S_{t−1} + e^bonus a_t v_t) / (Z_{t−1} + e^bonus a_t + 1e-6)
        out_i = out_proj(σ(r_proj x_q) · y_min(i, m − 1))

    Time and memory are O((n + m) · d_model).

    Args:
        d_model: width of the canvas; n_heads must divide it.
        n_heads: number of heads; decay and bonus are per channel, (n_heads, d_model / n_heads).
        dropout: unused, kept for a common signature: there are no attention probabilities.

    >>> module = RWKVAttention(8, n_heads=2)
    >>> module(torch.randn(1, 3, 8), torch.randn(1, 5, 8), torch.randn(1, 5, 8)).shape
    torch.Size([1, 3, 8])
    """

    causal = True

    def __init__(self, d_model: int, n_heads: int = 4, dropout: float = 0.0):
        super().__init__()
        d_model, n_heads, _ = checked_sizes(d_model, n_heads, dropout)
        self.r_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(d_model, d_model) for _ in range(4))
        # as in RWKV-4: decay from slow to fast over the channels, bonus around ln 0.3
        channel = torch.arange(d_model)
        decay = -5 + 8 * (channel / max(d_model - 1, 1)) ** 0.7
        bonus = math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1)
        self.decay = nn.Parameter(decay.view(n_heads, -1))
        self.bonus = nn.Parameter(bonus.view(n_heads, -1))

    def key_features(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Returns k and v of each position, (…, 2 · d_model)."""
        return torch.cat([self.k_proj(keys), self.v_proj(values)], -1)

    def summarise(self, features: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        """Averages features (B, m, 2 · d_model) to y (B, m, d_model)."""
        k, v = features.chunk(2, dim=-1)
        wide = torch.promote_types(v.dtype, torch.float32)  # sums of e^10 overflow float16
        a, bonus = k.to(wide).clamp(-10, 10).exp(), self.bonus.flatten().to(wide)
        own = torch.stack([a * v.to(wide), a])  # [2, B, m, d]: the terms of S and of Z
        log_keep = -self.decay.flatten().to(wide).clamp(max=FASTEST).exp()
        past = decayed_sums(own.flatten(0, 1), log_keep, backend).unflatten(0, (2, -1))
        # numerator and denominator divided by e^bonus where that is large, to avoid overflow
        fade = torch.exp(-bonus.clamp_min(0))
        top, bottom = past * fade + own * torch.exp(bonus.clamp(max=0))
        return (top / (bottom + 1e-6 * fade)).to(v.dtype)

    def query_features(self, queries: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.r_proj(queries))

    def attend_to_memory(self, features: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        n, m = features.shape[1], memory.shape[1]
        y = memory[:, :n]
        if n > m:
            y = torch.cat([y, memory[:, -1:].expand(-1, n - m, -1)], 1)
        return features * y
