"""sparse_attention: each query's softmax over its top-k keys."""

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

# Logits of one pass: 2^22 are 16 MB in float32.
MOST_LOGITS = 1 << 22
# Keys per kept key from which on it pays to gather the kept ones, on a CPU.
SPARSE_FROM = 8
# Ties that are gathered with them. By chance one row in 10^5 has one.
MOST_TIES = 8


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
        d_model, self.n_heads, self.dropout = checked_sizes(d_model, n_heads, dropout)
        self.top_k = checked_int(top_k, "top_k", 1)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(d_model, d_model) for _ in range(4))

    def key_features(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """k and v of each position, (…, 2 · d_model)."""
        return torch.cat([self.k_proj(keys), self.v_proj(values)], -1)

    def summarise(self, features: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        """The keys themselves are what queries choose from."""
        return features

    def query_features(self, queries: torch.Tensor) -> torch.Tensor:
        return self.q_proj(queries)

    def respond(self, features: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
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
    """softmax of the ``top_k`` largest logits of each query, with all that equal the smallest of them, times v.

    q (B, heads, n, head_dim); k and v (B, heads, m, head_dim), m > top_k. On a CPU the kept keys
    are gathered and backward touches nothing else; elsewhere, and where many tie, backward masks all logits again, in
    parts.
    """
    # traced code may not choose by a batch that is not known yet
    batch = k.shape[0] if is_plain(q) else 1
    rows = max(1, MOST_LOGITS // (max(batch, 1) * k.shape[1] * k.shape[2]))
    if q.is_cpu and is_plain(q) and k.shape[2] >= SPARSE_FROM * top_k + MOST_TIES:
        kept = _kept(q, k, top_k, rows)
        if kept is not None:
            return _gathered(q, k, v, *kept, dropout)
    parts = q.split(rows, 2)
    if len(parts) == 1:
        return _masked(q, k, v, top_k, dropout)
    return torch.cat([checkpoint(_masked, part, k, v, top_k, dropout, use_reentrant=False) for part in parts], 2)


def _logits(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)


def _masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, top_k: int, dropout: float) -> torch.Tensor:
    logits = _logits(q, k)
    # which keys count is a choice, not a function to differentiate
    threshold = largest(logits.detach(), top_k)[0][..., -1:]
    weights = logits.masked_fill(logits < threshold, -math.inf).softmax(-1)
    return F.dropout(weights, dropout) @ v


@torch.no_grad()
def _kept(q: torch.Tensor, k: torch.Tensor, top_k: int, rows: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The keys of the ``top_k`` largest logits and those that tie with the last of them: which, (B, heads, n, width),
    and whether that counts. None where more than :data:`MOST_TIES` tie."""
    found = []
    for part in q.split(rows, 2):
        values, index = largest(_logits(part, k), top_k + MOST_TIES)
        found.append((values >= values[..., top_k - 1 : top_k], index))
    counts, index = (torch.cat(parts, 2) for parts in zip(*found))
    width = int(counts.sum(-1).max()) if counts.numel() else top_k
    return None if width == top_k + MOST_TIES else (index[..., :width], counts[..., :width])


def _gathered(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chosen: torch.Tensor, counts: torch.Tensor, dropout: float
) -> torch.Tensor:
    batch, heads, m, _ = k.shape
    first = torch.arange(batch * heads, device=k.device).view(batch, heads, 1, 1) * m
    rows = (chosen + first).flatten()
    k, v = (x.flatten(0, 2).index_select(0, rows).unflatten(0, chosen.shape) for x in (k, v))  # [B, h, n, width, D]
    logits = (k @ (q / math.sqrt(q.shape[-1]))[..., None])[..., 0].masked_fill(~counts, -math.inf)
    return (F.dropout(logits.softmax(-1), dropout)[..., None, :] @ v)[..., 0, :]


def largest(x: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` largest values along the last dim and where they stand, descending: as topk, in less time.

    The largest values lie in the columns with the largest maxima, so that few of a long row have to be ranked.

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
    values, place = x.gather(-1, candidates).topk(count)
    return values, candidates.gather(-1, place)
