"""The softmax family: cross attention, under each of the names that it is declared by."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from canvas_kernels.rows import split_heads

from ..plan import AttentionPlan
from .functional import canvas_attention


class CrossAttention(nn.Module):
    """Multi-head attention, softmax(q kᵀ / √head_dim) v, with biased projections ``q_proj``, ``k_proj``, ``v_proj``,
    ``out_proj``.

    Args:
        d_model: width of the canvas; n_heads must divide it.
        n_heads: number of heads.
        dropout: probability of dropping an attention weight, in training.

    >>> module = CrossAttention(8, n_heads=2)
    >>> module(torch.randn(1, 3, 8), torch.randn(1, 5, 8), torch.randn(1, 5, 8)).shape
    torch.Size([1, 3, 8])
    """

    def __init__(self, d_model: int, n_heads: int = 4, dropout: float = 0.0):
        super().__init__()
        if n_heads < 1 or d_model % n_heads:
            raise ValueError(f"n_heads {n_heads} must divide d_model {d_model}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        self.n_heads = n_heads
        self.dropout = dropout
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(d_model, d_model) for _ in range(4))

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """One read: queries (B, n, d_model) over keys and values (B, m, d_model) → (B, n, d_model)."""
        q, k, v = (
            self._heads(proj(x)) for proj, x in ((self.q_proj, queries), (self.k_proj, keys), (self.v_proj, values))
        )
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def attend(
        self,
        x: torch.Tensor,
        plan: AttentionPlan,
        *,
        gain: torch.Tensor | None = None,
        active: torch.Tensor | None = None,
        row_scale: torch.Tensor | None = None,
        bias_share: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> torch.Tensor:
        """Every read of ``plan`` in one fused call.

        Args:
            x: (B, n, d_model), the canvas in the plan's packed order; projected once.
            plan: the reads of this module's connections.
            gain, active, row_scale, backend: as for :func:`canvas_attention`.
            bias_share: (n,), how much of out_proj's bias each row gets: Σ a_r / Σ w_r over this module's reads there;
            all
                of it when None.

        Returns:
            (B, n, d_model): the weighted sum of the reads, projected; what rows without reads hold is not specified.
        """
        weight = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])
        bias = torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias])
        q, k, v = split_heads(F.linear(x, weight, bias), 3, self.n_heads)
        out = canvas_attention(
            q,
            k,
            v,
            plan,
            gain=gain,
            active=active,
            row_scale=row_scale,
            dropout_p=self.dropout if self.training else 0.0,
            backend=backend,
            packed=True,
        )
        out = out.transpose(1, 2).flatten(2)
        if bias_share is None:
            return self.out_proj(out)
        return F.linear(out, self.out_proj.weight) + bias_share[:, None].to(out.dtype) * self.out_proj.bias

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)


class CogVideoXAttention(CrossAttention):
    """The function of edges declared as "cogvideox": cross attention, in a module of its own."""
