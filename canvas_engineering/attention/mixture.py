"""mixture: a router sends each query to a few experts, each of which attends to a chunk of the keys."""

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
    """Experts are cross attentions over consecutive chunks of the keys; a query is routed to the ``top_k_experts`` with
    the largest router logits and mixes their outputs by the softmax of those logits.

    The m keys are split into chunks of max(1, m // n_experts), the last expert getting the rest. An expert with an
    empty chunk is never routed to; among equal logits the earlier expert wins.

    Args:
        d_model: width of the canvas; n_heads must divide it.
        n_heads: heads of each expert.
        dropout: probability of dropping an expert's attention weight, in training.
        n_experts: number of experts.
        top_k_experts: experts per query.

    All experts run in one batched call. On a CPU each computes the queries that are routed to it, padded to the busiest
    expert; elsewhere every expert computes every query, since routing on the host would synchronise the device.

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
        """Runs one attention set: queries (B, n, d_model) over keys and values (B, m, d_model) → (B, n, d_model)."""
        checked_read(queries, keys, values)
        n, m = queries.shape[1], keys.shape[1]
        n_experts = min(len(self.experts), m)  # m < n_experts: one key each for the first m
        logits = self.router(queries)[..., :n_experts]
        experts = logits.sort(dim=-1, descending=True, stable=True).indices[..., : self.top_k_experts]
        mix = logits.gather(-1, experts).softmax(-1)  # [B, n, k]
        routed = torch.zeros_like(logits, dtype=torch.int64).scatter_(-1, experts, 1)  # [B, n, E]
        slot = routed.cumsum(1) - routed  # among the queries of one expert
        capacity = n
        if routed.numel() and queries.is_cpu and is_plain(routed):
            capacity = int(routed.sum(1).max())
        if capacity == n:
            out = self._experts(queries[:, None].expand(-1, n_experts, -1, -1), keys, values, n_experts)  # [B, E, n, d]
            weight = torch.zeros_like(logits).scatter(-1, experts, mix)
            return (weight[..., None, :] @ out.transpose(1, 2))[..., 0, :]
        # [B, E, capacity]: the queries of each expert; the slot past the last is for other experts' queries
        rows = torch.arange(n, device=queries.device)[:, None].expand_as(slot)
        target = torch.where(routed.bool(), slot, capacity).transpose(1, 2)
        rows_of_expert = routed.new_zeros(len(queries), n_experts, capacity + 1)
        rows_of_expert = rows_of_expert.scatter_(2, target, rows.transpose(1, 2))[..., :capacity]
        out = self._experts(_gather(queries, rows_of_expert), keys, values, n_experts)  # [B, E, capacity, d]
        back = experts * capacity + slot.gather(-1, experts)  # [B, n, k]
        out = _gather(out.flatten(1, 2), back)  # [B, n, k, d]
        return (mix[..., None, :] @ out)[..., 0, :]

    def _experts(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, n_experts: int) -> torch.Tensor:
        """Runs queries (B, E, capacity, d_model) over each expert's chunk of keys and values (B, m, d_model)."""
        m = keys.shape[1]
        size = max(1, m // len(self.experts))
        longest = m - size * (n_experts - 1)
        q = self._project("q_proj", queries, n_experts)
        k = self._project("k_proj", _chunks(keys, size, n_experts), n_experts)
        v = self._project("v_proj", _chunks(values, size, n_experts), n_experts)
        mask = None
        if longest > size:
            mask = torch.arange(longest, device=keys.device) < size  # all but the last expert's keys end here
            mask = torch.cat([mask.expand(n_experts - 1, -1), mask.new_ones(1, longest)])
            mask = mask[:, None, None].expand(-1, self.n_heads, 1, -1).flatten(0, 1)  # [E · heads, 1, longest]
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)).transpose(2, 3).flatten(1, 2) for t in (q, k, v))
        out = dense_attention(q, k, v, mask, dropout_p=self.dropout if self.training else 0.0)
        out = out.unflatten(1, (n_experts, self.n_heads)).transpose(2, 3).flatten(3)
        return self._project("out_proj", out, n_experts)

    def _project(self, name: str, x: torch.Tensor, n_experts: int) -> torch.Tensor:
        """Projects (B, E, rows, d_model) by each expert's own layer."""
        layers = [getattr(expert, name) for expert in self.experts[:n_experts]]
        weight, bias = torch.stack([f.weight for f in layers]), torch.stack([f.bias for f in layers])
        batch, _, n, _ = x.shape
        rows = x.transpose(0, 1).flatten(1, 2)  # [E, B · rows, d]
        out = torch.baddbmm(bias[:, None], rows, weight.transpose(1, 2))
        return out.unflatten(1, (batch, n)).transpose(0, 1)


def _gather(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Gathers ``rows`` (B, …) of x (B, R, d): (B, …, d)."""
    flat = rows.flatten(1)[..., None].expand(-1, -1, x.shape[-1])
    return x.gather(1, flat).unflatten(1, rows.shape[1:])


def _chunks(x: torch.Tensor, size: int, n_experts: int) -> torch.Tensor:
    """Splits (B, m, d) into chunks of ``size`` rows, the last with the rest, padded with zeros: (B, E, longest, d)."""
    head, tail = x.split([size * (n_experts - 1), x.shape[1] - size * (n_experts - 1)], 1)
    head = F.pad(head.unflatten(1, (n_experts - 1, size)), (0, 0, 0, tail.shape[1] - size))
    return torch.cat([head, tail[:, None]], 1)
