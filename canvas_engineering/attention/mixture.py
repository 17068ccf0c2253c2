"""mixture: a router sends each query to a few experts, each of which sees a chunk of the keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from canvas_kernels.derived import is_plain
from canvas_kernels.torch_ops.dense import dense_attention

from ..checked import checked_int, checked_read, checked_sizes
from ..derived_buffers import CanvasModule
from .softmax import CrossAttention


class MixtureAttention(CanvasModule):
    """Experts are cross attentions over consecutive chunks of the keys; a query takes the ``top_k_experts`` of largest
    router logit, mixed by the softmax of those logits.

    The m keys are cut into chunks of max(1, m // n_experts), the last expert taking the rest. An expert whose chunk is
    empty is never routed to; among equal logits the earlier expert goes first.

    Args:
        d_model: width of the canvas; n_heads must divide it.
        n_heads: heads of each expert.
        dropout: probability of dropping an expert's attention weight, in training.
        n_experts: number of experts.
        top_k_experts: experts per query.

    All experts run in one batched call. On a CPU each sees the queries that are routed to it (as many as the busiest
    expert has); elsewhere every expert sees every query, since who goes where would have to be brought to the host.

    >>> module = MixtureAttention(8, n_heads=2)
    >>> module(torch.randn(1, 3, 8), torch.randn(1, 5, 8), torch.randn(1, 5, 8)).shape
    torch.Size([1, 3, 8])
    """

    def __init__(
        self, d_model: int, n_heads: int = 4, dropout: float = 0.0, n_experts: int = 4, top_k_experts: int = 2
    ):
        super().__init__()
        d_model, self.n_heads, self.dropout = checked_sizes(d_model, n_heads, dropout)
        n_experts = checked_int(n_experts, "n_experts", 1)
        self.top_k_experts = top_k_experts = checked_int(top_k_experts, "top_k_experts", 1)
        if top_k_experts > n_experts:
            raise ValueError(f"top_k_experts must lie in [1, n_experts = {n_experts}], got {top_k_experts}")
        self.experts = nn.ModuleList(CrossAttention(d_model, n_heads, dropout) for _ in range(n_experts))
        self.router = nn.Linear(d_model, n_experts)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """One read: queries (B, n, d_model) over keys and values (B, m, d_model) → (B, n, d_model)."""
        checked_read(queries, keys, values)
        n, m = queries.shape[1], keys.shape[1]
        filled = min(len(self.experts), m)  # m < n_experts: one key each for the first m
        logits = self.router(queries)[..., :filled]
        chosen = logits.sort(dim=-1, descending=True, stable=True).indices[..., : self.top_k_experts]
        shares = logits.gather(-1, chosen).softmax(-1)  # [B, n, k]
        taken = torch.zeros_like(logits, dtype=torch.int64).scatter_(-1, chosen, 1)  # [B, n, E]
        place = taken.cumsum(1) - taken  # among the queries of one expert
        room = n
        if taken.numel() and queries.is_cpu and is_plain(taken):
            room = int(taken.sum(1).max())
        if room == n:
            out = self._experts(queries[:, None].expand(-1, filled, -1, -1), keys, values, filled)  # [B, E, n, d]
            weight = torch.zeros_like(logits).scatter(-1, chosen, shares)
            return (weight[..., None, :] @ out.transpose(1, 2))[..., 0, :]
        # [B, E, room]: the queries of each expert; the place past the last takes those that go elsewhere
        rows = torch.arange(n, device=queries.device)[:, None].expand_as(place)
        sent = torch.where(taken.bool(), place, room).transpose(1, 2)
        sent = taken.new_zeros(len(queries), filled, room + 1).scatter_(2, sent, rows.transpose(1, 2))[..., :room]
        out = self._experts(_take(queries, sent), keys, values, filled)  # [B, E, room, d]
        back = chosen * room + place.gather(-1, chosen)  # [B, n, k]
        out = _take(out.flatten(1, 2), back)  # [B, n, k, d]
        return (shares[..., None, :] @ out)[..., 0, :]

    def _experts(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, filled: int) -> torch.Tensor:
        """(B, E, room, d_model) over each expert's chunk of keys and values (B, m, d_model) → (B, E, room, d_model)."""
        m = keys.shape[1]
        size = max(1, m // len(self.experts))
        longest = m - size * (filled - 1)
        q = self._project("q_proj", queries, filled)
        k = self._project("k_proj", _chunks(keys, size, filled), filled)
        v = self._project("v_proj", _chunks(values, size, filled), filled)
        seen = None
        if longest > size:
            seen = torch.arange(longest, device=keys.device) < size  # all but the last expert's keys end here
            seen = torch.cat([seen.expand(filled - 1, -1), seen.new_ones(1, longest)])
            seen = seen[:, None, None].expand(-1, self.n_heads, 1, -1).flatten(0, 1)  # [E · heads, 1, longest]
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)).transpose(2, 3).flatten(1, 2) for t in (q, k, v))
        out = dense_attention(q, k, v, seen, dropout_p=self.dropout if self.training else 0.0)
        out = out.unflatten(1, (filled, self.n_heads)).transpose(2, 3).flatten(3)
        return self._project("out_proj", out, filled)

    def _project(self, name: str, x: torch.Tensor, filled: int) -> torch.Tensor:
        """(B, E, rows, d_model) through each expert's own projection."""
        layers = [getattr(expert, name) for expert in self.experts[:filled]]
        weight, bias = torch.stack([f.weight for f in layers]), torch.stack([f.bias for f in layers])
        batch, _, n, _ = x.shape
        rows = x.transpose(0, 1).flatten(1, 2)  # [E, B · rows, d]
        out = torch.baddbmm(bias[:, None], rows, weight.transpose(1, 2))
        return out.unflatten(1, (batch, n)).transpose(0, 1)


def _take(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """x (B, R, d), rows (B, …) → (B, …, d)."""
    flat = rows.flatten(1)[..., None].expand(-1, -1, x.shape[-1])
    return x.gather(1, flat).unflatten(1, rows.shape[1:])


def _chunks(x: torch.Tensor, size: int, filled: int) -> torch.Tensor:
    """(B, m, d) → (B, E, longest, d): chunks of ``size`` rows, the last with the rest, padded with zeros."""
    head, tail = x.split([size * (filled - 1), x.shape[1] - size * (filled - 1)], 1)
    head = F.pad(head.unflatten(1, (filled - 1, size)), (0, 0, 0, tail.shape[1] - size))
    return torch.cat([head, tail[:, None]], 1)
