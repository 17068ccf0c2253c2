"""perceiver: keys compressed through learned latents, which the queries read."""

from __future__ import annotations

import torch
from torch import nn

from .softmax import CrossAttention


class PerceiverAttention(nn.Module):
    """``n_latents`` learned rows attend over the keys (``compress``), and the queries over what these found
    (``readout``), as in Perceiver IO (Jaegle et al., 2021): z = cross(latents → x_k), out = cross(x_q → z).

    Time and memory are O((n + m) · n_latents): no query meets a key.

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
        if n_latents < 1:
            raise ValueError(f"n_latents must be at least 1, got {n_latents}")
        # rows of norm about one, and different: equal latents would stay equal
        self.latents = nn.Parameter(torch.randn(1, n_latents, d_model) * d_model**-0.5)
        self.compress = CrossAttention(d_model, n_heads, dropout)
        self.readout = CrossAttention(d_model, n_heads, dropout)

    def summarise(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """(B, m, d_model) → what the latents find there, (B, n_latents, d_model)."""
        return self.compress(self.latents.expand(len(keys), -1, -1), keys, values)

    def respond(self, queries: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """(B, n, d_model) reading a memory of :meth:`summarise` → (B, n, d_model)."""
        return self.readout(queries, memory, memory)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """One read: queries (B, n, d_model) over keys and values (B, m, d_model) → (B, n, d_model)."""
        return self.respond(queries, self.summarise(keys, values))
