"""Linear attention: sums over the keys of an attention set, shared by all of its queries, in O(n + m)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from canvas_kernels.packing import gather_rows, scatter_rows

from ..checked import checked_read, checked_sizes
from ..derived_buffers import CanvasModule
from ..plan import AttentionPlan
from .base import coefficients, mask_rows, output_projection, shared_keys, to_canvas, to_rows

LINEAR_EPSILON = 1e-6


class LinearAttention(CanvasModule):
    """φ(q)·Σ_j φ(k_j) v_jᵀ / (φ(q)·Σ_j φ(k_j) + 1e-6) with φ = elu + 1, and biased projections as
    :class:`CrossAttention` has.

    The sums are computed once for each distinct set of keys. ``dropout`` is unused: there are no probabilities.

    >>> module = LinearAttention(8, n_heads=2)
    >>> module(torch.randn(1, 3, 8), torch.randn(1, 5, 8), torch.randn(1, 5, 8)).shape
    torch.Size([1, 3, 8])
    """

    def __init__(self, d_model: int, n_heads: int = 4, dropout: float = 0.0):
        super().__init__()
        d_model, self.n_heads, self.dropout = checked_sizes(d_model, n_heads, dropout)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(d_model, d_model) for _ in range(4))

    def prepare(self, plan: AttentionPlan) -> None:
        """Builds the index sets of ``plan``."""
        shared_keys(plan)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Runs one attention set: queries (B, n, d_model) over keys and values (B, m, d_model) → (B, n, d_model)."""
        checked_read(queries, keys, values)
        q, k, v = (
            proj(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for proj, x in ((self.q_proj, queries), (self.k_proj, keys), (self.v_proj, values))
        )
        with torch.autocast(q.device.type, enabled=False):
            sums = _feature(k).transpose(-1, -2) @ F.pad(_wide(v), (0, 1), value=1.0)
            out = _normalised(_feature(q), sums)
        return self.out_proj(out.to(q.dtype).transpose(1, 2).flatten(2))

    def attend(
        self,
        x: torch.Tensor,
        plan: AttentionPlan,
        *,
        gain: torch.Tensor | None = None,
        active: torch.Tensor | None = None,
        row_scale: torch.Tensor | None = None,
        bias_weight: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> torch.Tensor:
        """Runs every attention set of ``plan``; arguments and result are those of :meth:`CrossAttention.attend`."""
        index = shared_keys(plan)
        weights = coefficients(index.query_index, plan, x, gain, active, row_scale)
        weight = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])
        bias = torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias])
        projected = F.linear(x, weight, bias)
        (batch, _, width), dtype = x.shape, projected.dtype
        dim = width // self.n_heads
        with torch.autocast(x.device.type, enabled=False):
            # 16-bit inputs are summed in float32
            q, k, v = _wide(projected).chunk(3, dim=-1)
            q, k, v = to_rows(_feature(q)), to_rows(_feature(k)), to_rows(self._with_ones(v))
            k, v = gather_rows(k, index.keys), gather_rows(v, index.keys)
            # [sets, B, heads, head_dim, head_dim + 1]
            sums = [
                self._split(span.of(k), batch, dim).transpose(-1, -2) @ self._split(span.of(v), batch, dim + 1)
                for span in index.key_sets
            ]
            sums = torch.cat(sums) if len(sums) > 1 else sums[0]
            by_set = mask_rows(gather_rows(sums.flatten(1), index.key_set_of), weights.live_sets)
            sums = by_set.unflatten(1, sums.shape[1:])
            q, results, first = mask_rows(gather_rows(q, index.queries), weights.live), [], 0
            for span in index.sets:
                own = sums[first : first + span.count]
                first += span.count
                # [sets, B, heads, n, head_dim] → [sets · n, B · d]
                out = _normalised(self._split(span.of(q), batch, dim), own)
                results.append(out.permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1))
            result = torch.cat(results) if len(results) > 1 else results[0]
            out = to_canvas(scatter_rows(weights.weigh(result), index.queries), batch, width)
        return output_projection(self.out_proj, out.to(dtype), bias_weight)

    def _with_ones(self, v: torch.Tensor) -> torch.Tensor:
        """Appends a 1 to each head of v (B, n, d): its sum over keys is the normaliser."""
        return F.pad(v.unflatten(2, (self.n_heads, -1)), (0, 1), value=1.0).flatten(2)

    def _split(self, rows: torch.Tensor, batch: int, dim: int) -> torch.Tensor:
        """Reshapes [sets, m, B · heads · D] to [sets, B, heads, m, D], D being ``dim``."""
        return rows.unflatten(2, (batch, self.n_heads, dim)).permute(0, 2, 3, 1, 4)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _feature(x: torch.Tensor) -> torch.Tensor:
    return F.elu(_wide(x)) + 1


def _normalised(q: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """Divides φ(q) Σ φ(k_j) v_jᵀ by φ(q) Σ φ(k_j): q […, n, D], sums […, D, D + 1] with Σ φ(k_j) last → […, n, D]."""
    out = q @ sums
    return out[..., :-1] / (out[..., -1:] + LINEAR_EPSILON)
