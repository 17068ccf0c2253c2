"""sparse_attention: each query's softmax over its top-k keys."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .softmax import CrossAttention

# Logits of one pass: 2^22 are 16 MB in float32.
MOST_LOGITS = 1 << 22


class SparseAttention(CrossAttention):
    """Softmax attention over the ``top_k`` keys of largest logit, per head and query; further keys of exactly the k-th
    logit stay in.

    Every logit is computed to be ranked: time is O(n · m · d_model), memory O((n + m) · d_model) beside a bounded
    number of logits at a time (:data:`MOST_LOGITS`), which backward computes again.

    Args:
        d_model: width of the canvas; n_heads must divide it.
        n_heads: number of heads.
        dropout: probability of dropping an attention weight, in training.
        top_k: keys per query and head.

    >>> module = SparseAttention(8, n_heads=2, top_k=2)
    >>> module(torch.randn(1, 3, 8), torch.randn(1, 5, 8), torch.randn(1, 5, 8)).shape
    torch.Size([1, 3, 8])
    """

    def __init__(self, d_model: int, n_heads: int = 4, dropout: float = 0.0, top_k: int = 8):
        super().__init__(d_model, n_heads, dropout)
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        self.top_k = top_k

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """One read: queries (B, n, d_model) over keys and values (B, m, d_model) → (B, n, d_model)."""
        q, k, v = (
            self._heads(proj(x)) for proj, x in ((self.q_proj, queries), (self.k_proj, keys), (self.v_proj, values))
        )
        dropout = self.dropout if self.training else 0.0
        if k.shape[2] <= self.top_k:
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        else:
            rows = max(1, MOST_LOGITS // (k.shape[0] * k.shape[1] * k.shape[2]))
            parts = q.split(rows, 2)
            options = (self.top_k, dropout)
            if len(parts) == 1:
                out = _top_k_attention(q, k, v, *options)
            else:
                parts = [checkpoint(_top_k_attention, part, k, v, *options, use_reentrant=False) for part in parts]
                out = torch.cat(parts, 2)
        return self.out_proj(out.transpose(1, 2).flatten(2))


def _top_k_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, top_k: int, dropout: float) -> torch.Tensor:
    """q (B, heads, n, head_dim) over k and v (B, heads, m, head_dim), m > top_k → like q."""
    logits = (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)
    # which keys count is a choice, not a function to differentiate
    threshold = logits.detach().topk(top_k, sorted=False).values.amin(-1, keepdim=True)
    weights = logits.masked_fill(logits < threshold, -math.inf).softmax(-1)
    return F.dropout(weights, dropout) @ v
