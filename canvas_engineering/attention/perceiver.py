"""perceiver: keys compressed through learned latents, which the queries attend to."""

from __future__ import annotations

import torch
from torch import nn

from canvas_kernels.torch_ops.dense import dense_attention

from ..checked import checked_int, checked_sizes
from .base import MemoryAttention
from .softmax import CrossAttention


class PerceiverAttention(MemoryAttention):
    """``n_latents`` learned rows attend to the keys (``compress``), and the queries to the results (``readout``), as in
    Perceiver IO (Jaegle et al., 2021): z = cross(latents → x_k), out = cross(x_q → z).

    Time and memory are O((n + m) · n_latents).

    Args:
        d_model: width of the canvas; n_heads must divide it.
        n_heads: heads of both attentions.
        dropout: probability of dropping an attention weight of either, in training.
        n_latents: rows of the bottleneck.

    >>> module = PerceiverAttention(8, n_heads=2)
    >>> module(torch.randn(1, 3, 8), torch.randn(1, 5, 8), torch.randn(1, 5, 8)).shape
    torch.Size([1, 3, 8])
    """

    def __init__(self, d_model: int, n_heads: int = 4, dropout: float = 0.0, n_latents: int = 8):
        super().__init__()
        d_model, self.n_heads, self.dropout = checked_sizes(d_model, n_heads, dropout)
        n_latents = checked_int(n_latents, "n_latents", 1)
        # random rows of norm about one: equal latents would stay equal
        self.latents = nn.Parameter(torch.randn(1, n_latents, d_model) * d_model**-0.5)
        self.compress = CrossAttention(d_model, n_heads, dropout)
        self.readout = CrossAttention(d_model, n_heads, dropout)

    @property
    def out_projection(self) -> nn.Linear:
        return self.readout.out_proj

    def key_features(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Returns the keys and values for the latents, (…, 2 · d_model)."""
        return torch.cat([self.compress.k_proj(keys), self.compress.v_proj(values)], -1)

    def summarise(self, features: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        """Runs the latents over features (B, m, 2 · d_model) to keys and values (B, n_latents, 2 · d_model)."""
        latents = self.compress.q_proj(self.latents).expand(features.shape[0], -1, -1)
        z = self.compress.out_proj(self._attention(latents, features))
        return torch.cat([self.readout.k_proj(z), self.readout.v_proj(z)], -1)

    def query_features(self, queries: torch.Tensor) -> torch.Tensor:
        return self.readout.q_proj(queries)

    def attend_to_memory(self, features: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        return self._attention(features, memory)

    def _attention(self, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for t in (q, *kv.chunk(2, dim=-1)))
        out = dense_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return out.transpose(1, 2).flatten(2)
