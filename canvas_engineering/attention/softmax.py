"""Softmax attention and its variants: cosine, sigmoid, gated, and softmax over a fixed sparsity pattern."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from canvas_kernels.block_table import BlockTable
from canvas_kernels.ops import block_attention

from ..checked import checked_read, checked_sizes
from ..derived_buffers import CanvasModule
from ..plan import AttentionPlan
from ..plan.index_sets import SetShape
from ..plan.pairs import pair_rectangles, select_pairs
from .base import Scales, output_projection
from .functional import BACKENDS, canvas_attention

# Tables of single attention sets that a module caches.
MAX_TABLES = 16


class CrossAttention(CanvasModule):
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

    backends = BACKENDS
    supports_pair_masks = True
    # factor of q·k; None for head_dim^−½
    _scale: float | None = None
    _activation = "softmax"

    def __init__(self, d_model: int, n_heads: int = 4, dropout: float = 0.0):
        super().__init__()
        d_model, self.n_heads, self.dropout = checked_sizes(d_model, n_heads, dropout)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(d_model, d_model) for _ in range(4))

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Runs one attention set: queries (B, n, d_model) over keys and values (B, m, d_model) → (B, n, d_model)."""
        checked_read(queries, keys, values)
        q, k, v = (
            self._heads(proj(x)) for proj, x in ((self.q_proj, queries), (self.k_proj, keys), (self.v_proj, values))
        )
        q, k = self.logit_factors(q, k)
        dropout = self.dropout if self.training else 0.0
        out = self._single_set(q, k, v, dropout)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def attend(
        self, x: torch.Tensor, plan: AttentionPlan, scales: Scales, bias_weight: torch.Tensor | None, backend: str
    ) -> torch.Tensor:
        """Runs every attention set of ``plan`` in one fused call.

        Args:
            x: (B, n, d_model), the canvas in the plan's packed order; projected once.
            plan: the plan of this module's connections.
            scales, backend: as for :func:`canvas_attention`.
            bias_weight: (n,), the fraction of out_proj's bias that each row gets, Σ a_r / Σ w_r over this module's sets
                there; None for all of it.

        Returns:
            (B, n, d_model): the weighted sum over attention sets, projected; unspecified for rows without keys.
        """
        out = self.weighted_values(x, plan, scales, backend)
        return output_projection(self.out_proj, out, bias_weight)

    def weighted_values(self, x: torch.Tensor, plan: AttentionPlan, scales: Scales, backend: str) -> torch.Tensor:
        """Returns the input of ``out_proj`` in :meth:`attend`: (B, heads, n, head_dim)."""
        q, k, v = self._project(x)
        return canvas_attention(
            q,
            k,
            v,
            plan,
            scale=self._scale,
            gain=scales.gain,
            active=scales.active,
            row_scale=scales.row_scale,
            dropout_p=self.dropout if self.training else 0.0,
            backend=backend,
            packed=True,
            activation=self._activation,
        )

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Projects x (B, n, d_model) to q, k, v (B, heads, n, head_dim) by one product."""
        weight = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])
        bias = torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias])
        # (B, n, 3 · heads · head_dim) as three views (B, heads, n, head_dim)
        projected = F.linear(x, weight, bias).unflatten(2, (3, self.n_heads, -1))
        q, k, v = projected.permute(2, 0, 3, 1, 4).unbind()
        return self.logit_factors(q, k) + (v,)

    def _single_set(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float) -> torch.Tensor:
        """Runs one attention set: (B, heads, n, head_dim) over (B, heads, m, head_dim)."""
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=self._scale)

    def logit_factors(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Transforms q and k (B, heads, rows, head_dim) before their products are scaled by ``_scale``."""
        return q, k

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)


class CogVideoXAttention(CrossAttention):
    """The function "cogvideox": cross attention, in a separate module.

    >>> CogVideoXAttention(8, n_heads=2)(*torch.randn(3, 1, 5, 8)).shape
    torch.Size([1, 5, 8])
    """


class CosineAttention(CrossAttention):
    """softmax(temperature · cos(q, k)) v: q and k of length 1 in each head.

    ``temperature`` is one learned scalar for all heads and connections, initially 10. It multiplies the cosines, so
    that logits lie in ± temperature and a larger one sharpens. It is not bounded; below 0 the least similar keys count
    most. It is folded into q, so that the kernels of :class:`CrossAttention` run and no device is synchronised.

    >>> CosineAttention(8, n_heads=2).temperature.item()
    10.0
    """

    _scale = 1.0

    def __init__(self, d_model: int, n_heads: int = 4, dropout: float = 0.0):
        super().__init__(d_model, n_heads, dropout)
        self.temperature = nn.Parameter(torch.tensor(10.0))

    def logit_factors(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # norms in float32 at least: squares of 16-bit values overflow or underflow
        wide_q, wide_k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
        wide_q = F.normalize(wide_q, dim=-1) * self.temperature
        return wide_q.to(q.dtype), F.normalize(wide_k, dim=-1).to(k.dtype)


class SigmoidAttention(CrossAttention):
    """Σ_j σ(q·k_j / √head_dim) v_j: no bias on the logits and no normalisation, so that outputs grow with the
    number of keys.

    >>> module = SigmoidAttention(4, n_heads=2)
    >>> module(torch.randn(1, 3, 4), torch.randn(1, 5, 4), torch.randn(1, 5, 4)).shape
    torch.Size([1, 3, 4])
    """

    _activation = "sigmoid"

    def _single_set(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float) -> torch.Tensor:
        p = torch.sigmoid(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5)
        return F.dropout(p, dropout_p, training=dropout_p > 0) @ v


class GatedAttention(CanvasModule):
    """σ(gate) · cross attention, in ``cross_attn``; ``gate`` (1,) is initially zero, so that the gate starts half open.

    >>> torch.sigmoid(GatedAttention(8, n_heads=2).gate).item()
    0.5
    """

    backends = BACKENDS
    supports_pair_masks = True

    def __init__(self, d_model: int, n_heads: int = 4, dropout: float = 0.0):
        super().__init__()
        self.cross_attn = CrossAttention(d_model, n_heads, dropout)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Runs one attention set: queries (B, n, d_model) over keys and values (B, m, d_model) → (B, n, d_model)."""
        return torch.sigmoid(self.gate) * self.cross_attn(queries, keys, values)

    def attend(
        self, x: torch.Tensor, plan: AttentionPlan, scales: Scales, bias_weight: torch.Tensor | None, backend: str
    ) -> torch.Tensor:
        """Runs every attention set of ``plan`` in one fused call; see :meth:`CrossAttention.attend`."""
        out = self.cross_attn.weighted_values(x, plan, scales, backend)
        return output_projection(self.cross_attn.out_proj, out, bias_weight, torch.sigmoid(self.gate))


class FixedPatternAttention(CrossAttention):
    """Cross attention over a fixed subset of the keys of each query's attention set.

    Subclasses define ``pairs``, and ``pattern_key`` to identify their pattern.
    """

    supports_pair_masks = False

    def __init__(self, d_model: int, n_heads: int = 4, dropout: float = 0.0):
        super().__init__(d_model, n_heads, dropout)
        self._tables: dict[tuple, BlockTable] = {}

    def pairs(self, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (query, key), int64: the pairs of the pattern for n queries and m keys, sorted, without repeats."""
        raise NotImplementedError

    def pairs_of_shape(self, shape: SetShape) -> tuple[np.ndarray, np.ndarray]:
        """Returns the pairs for an attention set of this shape, in any order; by default its grids are ignored."""
        return self.pairs(shape.n, shape.m)

    def pattern_key(self) -> tuple:
        """Returns a key that is equal for equal patterns."""
        raise NotImplementedError

    def with_pattern(self, plan: AttentionPlan) -> AttentionPlan:
        """Returns ``plan`` with only the pairs of the pattern, cached on it."""
        key = ("pattern", *self.pattern_key())
        if key not in plan.index_sets:
            plan.index_sets[key] = selected = select_pairs(plan, self.pairs_of_shape)
            selected.index_sets[key] = selected
        return plan.index_sets[key]

    def prepare(self, plan: AttentionPlan) -> None:
        """Builds the table of ``plan``."""
        self.with_pattern(plan)

    def _single_set(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float) -> torch.Tensor:
        n, m = q.shape[2], k.shape[2]
        # one canvas: the queries, then the keys
        q, k, v = (F.pad(x, pad) for x, pad in ((q, (0, 0, 0, m)), (k, (0, 0, n, 0)), (v, (0, 0, n, 0))))
        table = self._table(n, m)
        out: torch.Tensor = block_attention(q, k, v, table, dropout_p=dropout_p)  # pyright: ignore[reportAssignmentType] no lse is returned
        return out[:, :, :n]

    def _table(self, n: int, m: int) -> BlockTable:
        """Returns the table of one attention set, m keys after n queries; the last few are cached."""
        key = (n, m, *self.pattern_key())
        if key not in self._tables:
            query, k_row = self.pairs(n, m)
            segment, q0, q1, k0, k1 = pair_rectangles(np.zeros(len(query), np.int64), query, n + k_row)
            spans = {"q_start": q0, "q_stop": q1, "k_start": k0, "k_stop": k1}
            if len(self._tables) >= MAX_TABLES:
                self._tables.pop(next(iter(self._tables)))
            self._tables[key] = BlockTable.from_rectangles(
                "edge", n + m, 1, **spans, segment=segment, weight=np.ones(len(segment)), edge=segment
            )
        return self._tables[key]

    def weighted_values(self, x: torch.Tensor, plan: AttentionPlan, scales: Scales, backend: str) -> torch.Tensor:
        """Returns :meth:`CrossAttention.weighted_values` over the pairs of the pattern."""
        return super().weighted_values(x, self.with_pattern(plan), scales, backend)
