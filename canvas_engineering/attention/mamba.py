"""mamba: a selective state space model along the keys, which queries attend to by softmax."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from canvas_kernels.torch_ops.dense import dense_attention

from ..checked import checked_int, checked_sizes
from .base import MemoryAttention
from .scan import selective_scan


class MambaAttention(MemoryAttention):
    """A selective scan along the keys (Gu and Dao, 2023) gives one memory row y_t per key; queries attend to the rows
    by softmax(norm(x_q) yᵀ / √d) y, and ``out_proj``.

        u, z = in_proj(x_k);  dt, B, C = x_proj(u);  dt = softplus(dt_proj(dt))
        h_t = exp(−exp(A_log) · dt_t) h_{t−1} + dt_t B_t u_t;  y_t = (C_t · h_t + D u_t) · silu(z_t)

    The scan runs from the first key of an attention set to the last in canvas order (frames, then rows, then columns):
    y_t depends on the keys up to t. Queries are not part of it: each attends to the rows of all keys, later frames
    included; for causality leave these out of the attention set, as by a ``t_dst``.

    The scan takes O(m · d · states) time, the softmax O(n · m · d) time and O(n + m) memory.

    Args:
        d_model: width of the canvas.
        n_heads: unused, kept for a common signature: the softmax has one head.
        dropout: probability of dropping a weight of the softmax, in training.
        state_size: states per channel.
        dt_rank: width of dt before ``dt_proj``; 0 gives max(1, d_model // 16).

    ``A_log`` (d_model, state_size) = ln(1 … state_size) is a buffer.

    >>> module = MambaAttention(8)
    >>> module(torch.randn(1, 3, 8), torch.randn(1, 5, 8), torch.randn(1, 5, 8)).shape
    torch.Size([1, 3, 8])
    """

    A_log: torch.Tensor

    def __init__(self, d_model: int, n_heads: int = 4, dropout: float = 0.0, state_size: int = 16, dt_rank: int = 0):
        super().__init__()
        d_model, _, self.dropout = checked_sizes(d_model, n_heads, dropout, divides=False)
        self.state_size = state_size = checked_int(state_size, "state_size", 1)
        self.dt_rank = checked_int(dt_rank, "dt_rank", 0) or max(1, d_model // 16)
        self.in_proj = nn.Linear(d_model, 2 * d_model)
        self.x_proj = nn.Linear(d_model, self.dt_rank + 2 * state_size)
        self.dt_proj = nn.Linear(self.dt_rank, d_model)
        self.register_buffer("A_log", torch.arange(1.0, state_size + 1).log().repeat(d_model, 1))
        self.D = nn.Parameter(torch.ones(d_model))
        self.norm = nn.LayerNorm(d_model)
        self.out_proj = nn.Linear(d_model, d_model)
        self._spread_steps()

    @torch.no_grad()
    def _spread_steps(self) -> None:
        """Initialises dt log-uniform in [0.001, 0.1], as in the paper: time constants of 10 to 1,000 positions."""
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        dt = torch.exp(torch.empty_like(self.dt_proj.bias).uniform_(math.log(1e-3), math.log(1e-1)))
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of this is dt

    def key_features(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Returns u, z and the inputs of dt, B and C, (…, 2 · d_model + dt_rank + 2 · state_size)."""
        both = self.in_proj(keys)
        return torch.cat([both, self.x_proj(both.chunk(2, dim=-1)[0])], -1)

    def summarise(self, features: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        """Scans features (B, m, …) to the memory y (B, m, d_model)."""
        d = len(self.D)
        u, z, dt, b, c = features.split([d, d, self.dt_rank, self.state_size, self.state_size], dim=-1)
        wide = torch.promote_types(u.dtype, torch.float32)  # a 16-bit state is noise after 4,096 steps
        dt = F.softplus(self.dt_proj(dt).to(wide))
        u, b, c = (t.to(wide) for t in (u, b, c))
        y = selective_scan(dt, dt * u, b, c, -torch.exp(self.A_log.to(wide)), backend)
        return (y + self.D * u).to(z.dtype) * F.silu(z)

    def query_features(self, queries: torch.Tensor) -> torch.Tensor:
        return self.norm(queries)

    def attend_to_memory(self, features: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        q, y = features[:, None].to(memory.dtype), memory[:, None]
        return dense_attention(q, y, y, dropout_p=self.dropout if self.training else 0.0)[:, 0]
