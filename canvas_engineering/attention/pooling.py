"""Functions without logits: the mean of the keys (pooling), the keys themselves (copy), and zeros (none)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from canvas_kernels.packing import IndexMap, gather_rows, scatter_rows

from ..checked import checked_read, checked_sizes
from ..derived_buffers import CanvasModule
from ..plan import AttentionPlan
from .base import QueryPlaces, canvas_of, coefficients, only, query_places, rows_of, shared_keys


class PoolingAttention(CanvasModule):
    """proj(mean of the keys), the same for every query of a read. ``n_heads`` and ``dropout`` have nothing to act on.

    >>> module = PoolingAttention(2)
    >>> _ = nn.init.eye_(module.proj.weight), nn.init.zeros_(module.proj.bias)
    >>> keys = torch.tensor([[[1.0, 2.0], [3.0, 6.0]]])
    >>> module(torch.zeros(1, 1, 2), keys, keys).tolist()
    [[[2.0, 4.0]]]
    """

    def __init__(self, d_model: int, n_heads: int = 4, dropout: float = 0.0):
        super().__init__()
        d_model, _, _ = checked_sizes(d_model, n_heads, dropout, divides=False)
        self.proj = nn.Linear(d_model, d_model)

    def prepare(self, plan: AttentionPlan) -> None:
        """Makes the index sets of ``plan``."""
        shared_keys(plan)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """One read: the projected mean of ``values`` (B, m, d_model) for each of the queries (B, n, d_model)."""
        checked_read(queries, keys, values)
        return self.proj(values.mean(1, keepdim=True)).expand(-1, queries.shape[1], -1)

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
        """Every read of ``plan``; arguments and result as for :meth:`CrossAttention.attend`. One projection for each
        distinct set of keys, whose bias needs no share: it is weighed with the rest."""
        found = shared_keys(plan)
        (batch, _, width), weights = x.shape, coefficients(found.places, plan, x, gain, active, row_scale)
        means = gather_rows(rows_of(x), found.means)
        # [sets, B, d]
        pooled = self.proj(means.unflatten(1, (batch, width)))
        by_read = only(gather_rows(pooled.flatten(1), found.read_set), weights.live_reads)
        results = weights.weigh(gather_rows(by_read, found.places.reads))
        return canvas_of(scatter_rows(results, found.queries), batch, width)


class CopyAttention(CanvasModule):
    """Query i takes key i as it is, both counted in canvas order within a read, in every sample alike. No parameters.

    Where a read has n queries and m keys, keys beyond n are not read, and queries beyond m get zeros: the connection's
    weight counts for them as for the others, so they do not keep their input, and what other connections give them is
    averaged with zeros.

    >>> CopyAttention(1)(torch.zeros(1, 3, 1), *[torch.tensor([[[1.0], [2.0]]])] * 2).flatten().tolist()
    [1.0, 2.0, 0.0]
    """

    def __init__(self, d_model: int, n_heads: int = 4, dropout: float = 0.0):
        super().__init__()
        checked_sizes(d_model, n_heads, dropout, divides=False)

    def prepare(self, plan: AttentionPlan) -> None:
        """Makes the index sets of ``plan``."""
        copies(plan)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """One read: the first n rows of ``values`` (B, m, d_model), zeros beyond → (B, n, d_model)."""
        checked_read(queries, keys, values)
        n = queries.shape[1]
        return F.pad(values[:, :n], (0, 0, 0, max(0, n - values.shape[1])))

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
        """Every read of ``plan``; arguments and result as for :meth:`CrossAttention.attend`. There is no bias."""
        found = copies(plan)
        weights = coefficients(found.places, plan, x, gain, active, row_scale)
        results = weights.weigh(gather_rows(rows_of(x), found.sources))
        return canvas_of(scatter_rows(results, found.targets), x.shape[0], x.shape[2])


@dataclass(frozen=True, eq=False)
class Copies:
    """Rows that queries take: maps from packed rows to C places, of the keys and of the queries."""

    sources: IndexMap
    targets: IndexMap
    places: QueryPlaces


def copies(plan: AttentionPlan) -> Copies:
    """Made once per plan.

    Raises:
        ValueError: the queries of a read attend to different keys.
    """
    if "copies" not in plan.index_sets:
        sets = plan.sets()
        taken = np.minimum(sets.lengths(sets.queries), sets.lengths(sets.keys))
        read = np.repeat(np.arange(len(taken)), taken)
        nth = np.arange(len(read)) - (np.cumsum(taken) - taken)[read]
        targets, sources = (sets.rows[sets.ptr[side[read]] + nth] for side in (sets.queries, sets.keys))
        taken_from, given_to = (IndexMap.gather(rows, plan.n_packed) for rows in (sources, targets))
        plan.index_sets["copies"] = Copies(taken_from, given_to, query_places(plan, sets, read, targets, read))
    return plan.index_sets["copies"]


class NoneAttention(CanvasModule):
    """What "none" declares: an edge that does not run. Zeros for every query; a dispatcher makes no read of it at all.

    >>> NoneAttention(2)(torch.ones(1, 1, 2), *[torch.ones(1, 3, 2)] * 2).tolist()
    [[[0.0, 0.0]]]
    """

    def __init__(self, d_model: int, n_heads: int = 4, dropout: float = 0.0):
        super().__init__()
        checked_sizes(d_model, n_heads, dropout, divides=False)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Zeros like the queries (B, n, d_model)."""
        checked_read(queries, keys, values)
        return torch.zeros_like(queries)
