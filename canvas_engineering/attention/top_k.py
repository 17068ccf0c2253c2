"""sparse_attention: softmax over the top-k keys of each query."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from canvas_kernels.derived import is_plain
from canvas_kernels.torch_ops.dense import dense_attention

from ..checked import checked_int, checked_sizes
from .base import MemoryAttention

# Logits of one chunk of queries: 16 MB in float32.
MAX_LOGITS = 1 << 22
# On a CPU, m / top_k from which on gathering the top keys is faster than masking.
MIN_GATHER_RATIO = 8
# Ties that are gathered too. One row in 10^5 has one by chance.
MAX_TIES = 8


class SparseAttention(MemoryAttention):
    """Softmax attention over the ``top_k`` keys of largest logit, per head and query; keys that tie with the
    k-th logit are kept too.

    Every logit is computed and ranked: time is O(n · m · d_model), memory O((n + m) · d_model) plus a bounded number of
    logits at a time (:data:`MAX_LOGITS`), which backward recomputes.

    Args:
        d_model: width of the canvas; n_heads must divide it.
        n_heads: number of heads.
        dropout: probability of dropping an attention weight, in training.
        top_k: keys per query and head.

    >>> module = SparseAttention(8, n_heads=2, top_k=2)
    >>> module(torch.randn(1, 3, 8), torch.randn(1, 5, 8), torch.randn(1, 5, 8)).shape
    torch.Size([1, 3, 8])
    """

    supports_pair_masks = True

    def __init__(self, d_model: int, n_heads: int = 4, dropout: float = 0.0, top_k: int = 8):
        super().__init__()
        d_model, self.n_heads, self.dropout = checked_sizes(d_model, n_heads, dropout)
        self.top_k = checked_int(top_k, "top_k", 1)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(d_model, d_model) for _ in range(4))

    def key_features(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Returns k and v of each position, (…, 2 · d_model)."""
        return torch.cat([self.k_proj(keys), self.v_proj(values)], -1)

    def summarise(self, features: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        """Returns the features: the memory is the keys and values themselves."""
        return features

    def query_features(self, queries: torch.Tensor) -> torch.Tensor:
        return self.q_proj(queries)

    def attend_to_memory(self, features: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for t in (features, *memory.chunk(2, dim=-1)))
        dropout = self.dropout if self.training else 0.0
        if k.shape[2] <= self.top_k:
            out = dense_attention(q, k, v, dropout_p=dropout)
        else:
            out = top_k_attention(q, k, v, self.top_k, dropout)
        return out.transpose(1, 2).flatten(2)


def top_k_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, top_k: int, dropout: float = 0.0
) -> torch.Tensor:
    """Returns softmax over the ``top_k`` largest logits of each query, and all that tie with the smallest, times v.

    q (B, heads, n, head_dim); k and v (B, heads, m, head_dim), m > top_k. On a CPU the top keys are gathered, and
    backward touches nothing else; elsewhere, and where many tie, backward masks all logits again, in chunks.
    """
    # traced code may not branch on a symbolic batch size
    batch = k.shape[0] if is_plain(q) else 1
    rows = max(1, MAX_LOGITS // (max(batch, 1) * k.shape[1] * k.shape[2]))
    if q.is_cpu and is_plain(q) and k.shape[2] >= MIN_GATHER_RATIO * top_k + MAX_TIES:
        keys = _top_keys(q, k, top_k, rows)
        if keys is not None:
            return gathered_attention(q, k, v, *keys, dropout)
    chunks = q.split(rows, 2)
    if len(chunks) == 1:
        return _masked_attention(q, k, v, top_k, dropout)
    outs = (checkpoint(_masked_attention, chunk, k, v, top_k, dropout, use_reentrant=False) for chunk in chunks)
    return torch.cat(list(outs), 2)


def _logits(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)


def _masked_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, top_k: int, dropout: float) -> torch.Tensor:
    logits = _logits(q, k)
    # the selection of keys is not differentiated
    threshold = largest(logits.detach(), top_k)[0][..., -1:]
    weights = logits.masked_fill(logits < threshold, -math.inf).softmax(-1)
    return F.dropout(weights, dropout) @ v


@torch.no_grad()
def _top_keys(q: torch.Tensor, k: torch.Tensor, top_k: int, rows: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Returns the indices of the ``top_k`` largest logits and their ties (B, heads, n, width), and whether each counts;
    None where more than :data:`MAX_TIES` tie."""
    parts = []
    for part in q.split(rows, 2):
        values, index = largest(_logits(part, k), top_k + MAX_TIES)
        parts.append((values >= values[..., top_k - 1 : top_k], index))
    counts, index = (torch.cat(part, 2) for part in zip(*parts))
    width = int(counts.sum(-1).max()) if counts.numel() else top_k
    return None if width == top_k + MAX_TIES else (index[..., :width], counts[..., :width])


def gathered_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: torch.Tensor, counts: torch.Tensor, dropout: float
) -> torch.Tensor:
    """Attends from each query to keys of its own.

    Args:
        q: (batch, heads, n, head_dim).
        k, v: (batch, heads, m, head_dim).
        index: int64 (batch, heads, n, width), the keys of each query.
        counts: bool (batch, heads, n, width), which of them count.
        dropout: the share of the probabilities that is dropped.

    Returns:
        (batch, heads, n, head_dim).
    """
    batch, heads, m, _ = k.shape
    first = torch.arange(batch * heads, device=k.device).view(batch, heads, 1, 1) * m
    rows = (index + first).flatten()
    k, v = (x.flatten(0, 2).index_select(0, rows).unflatten(0, index.shape) for x in (k, v))  # [B, h, n, width, D]
    logits = (k @ (q / math.sqrt(q.shape[-1]))[..., None])[..., 0].masked_fill(~counts, -math.inf)
    return (F.dropout(logits.softmax(-1), dropout)[..., None, :] @ v)[..., 0, :]


def largest(x: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the ``count`` largest values along the last dim and their indices, descending: topk for long rows.

    The largest values lie in the columns with the largest maxima, so that few values of a long row are ranked.

    >>> largest(torch.tensor([3.0, 1.0, 2.0]), 2)[1].tolist()
    [0, 2]
    """
    m = x.shape[-1]
    width = math.isqrt(m * count) if m >= 64 * count else 0  # columns of m / width values
    if not width:
        return x.topk(count)
    deep = m // width
    block = x[..., : deep * width].unflatten(-1, (deep, width))
    columns = block.amax(-2).topk(count, sorted=False).indices  # [..., count]
    candidates = columns[..., None] + width * torch.arange(deep, device=x.device)
    rest = torch.arange(deep * width, m, device=x.device).expand(*x.shape[:-1], -1)
    candidates = torch.cat([candidates.flatten(-2), rest], -1)
    values, index = x.gather(-1, candidates).topk(count)
    return values, candidates.gather(-1, index)
