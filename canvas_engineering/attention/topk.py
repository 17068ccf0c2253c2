"""sparse_attention: each query's softmax over its top-k keys."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .memories import MemoryAttention, check_heads

# Logits of one pass: 2^22 are 16 MB in float32.
MOST_LOGITS = 1 << 22


class SparseAttention(MemoryAttention):
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

    takes_pairs = True

    def __init__(self, d_model: int, n_heads: int = 4, dropout: float = 0.0, top_k: int = 8):
        super().__init__()
        check_heads(d_model, n_heads, dropout)
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        self.n_heads, self.dropout, self.top_k = n_heads, dropout, top_k
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(d_model, d_model) for _ in range(4))

    def key_features(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """k and v of each position, (…, 2 · d_model)."""
        return torch.cat([self.k_proj(keys), self.v_proj(values)], -1)

    def summarise(self, features: torch.Tensor) -> torch.Tensor:
        """The keys themselves are what queries choose from."""
        return features

    def query_features(self, queries: torch.Tensor) -> torch.Tensor:
        return self.q_proj(queries)

    def respond(self, features: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for t in (features, *memory.chunk(2, dim=-1)))
        dropout = self.dropout if self.training else 0.0
        if k.shape[2] <= self.top_k:
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        else:
            rows = max(1, MOST_LOGITS // (k.shape[0] * k.shape[1] * k.shape[2]))
            parts, options = q.split(rows, 2), (self.top_k, dropout)
            if len(parts) == 1:
                out = _top_k_attention(q, k, v, *options)
            else:
                parts = [checkpoint(_top_k_attention, part, k, v, *options, use_reentrant=False) for part in parts]
                out = torch.cat(parts, 2)
        return out.transpose(1, 2).flatten(2)


def _top_k_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, top_k: int, dropout: float) -> torch.Tensor:
    """q (B, heads, n, head_dim) over k and v (B, heads, m, head_dim), m > top_k → like q."""
    logits = (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)
    # which keys count is a choice, not a function to differentiate
    threshold = logits.detach().topk(top_k, sorted=False).values.amin(-1, keepdim=True)
    weights = logits.masked_fill(logits < threshold, -math.inf).softmax(-1)
    return F.dropout(weights, dropout) @ v
