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
from .base import QueryIndex, Scales, coefficients, mask_rows, query_index, to_canvas, to_rows


class PoolingAttention(CanvasModule):
    """proj(mean of the keys), the same for every query of an attention set. ``n_heads`` and ``dropout`` are unused.

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
        """Builds the index sets of ``plan``."""
        pooled_keys(plan)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Returns the projected mean of ``values`` (B, m, d_model) for each of the queries (B, n, d_model)."""
        checked_read(queries, keys, values)
        return self.proj(values.mean(1, keepdim=True)).expand(-1, queries.shape[1], -1)

    def attend(
        self, x: torch.Tensor, plan: AttentionPlan, scales: Scales, bias_weight: torch.Tensor | None, backend: str
    ) -> torch.Tensor:
        """Runs every attention set of ``plan``; arguments and result are those of :meth:`CrossAttention.attend`.

        The projection runs once for each distinct set of keys; ``bias_weight`` is unused, since its bias is weighted
        with the rest.
        """
        index = pooled_keys(plan)
        (batch, _, width), weights = x.shape, coefficients(index.query_index, plan, x, scales)
        means = gather_rows(to_rows(x), index.means)
        # [sets, B, d]
        pooled = self.proj(means.unflatten(1, (batch, width)))
        by_set = mask_rows(gather_rows(pooled.flatten(1), index.key_set_of), weights.live_sets)
        results = weights.weigh(gather_rows(by_set, index.query_index.sets))
        return to_canvas(scatter_rows(results, index.queries), batch, width)


@dataclass(frozen=True, eq=False)
class PooledKeys:
    """Maps from packed rows to the mean of each distinct key set, from these to attention sets, and to the queries."""

    means: IndexMap
    key_set_of: IndexMap
    queries: IndexMap
    query_index: QueryIndex


def pooled_keys(plan: AttentionPlan) -> PooledKeys:
    """Returns the pooled keys of a plan, cached on it.

    Raises:
        ValueError: the queries of a set attend to different keys.
    """
    if "pooled keys" not in plan.index_sets:
        sets = plan.row_sets()
        used, key_set = np.unique(sets.keys, return_inverse=True)
        owner, k_rows = sets.rows_of(used)
        length = sets.lengths(used)
        offset = np.concatenate([[0], np.cumsum(length)])
        number, q_rows = sets.rows_of(sets.queries)
        plan.index_sets["pooled keys"] = PooledKeys(
            IndexMap.sums(k_rows, offset, plan.n_packed, 1.0 / length[owner]),
            IndexMap.gather(key_set.reshape(-1), len(used)),
            IndexMap.gather(q_rows, plan.n_packed),
            query_index(plan, sets, number, q_rows, number),
        )
    return plan.index_sets["pooled keys"]


class CopyAttention(CanvasModule):
    """Query i returns key i, both numbered in canvas order within an attention set. No parameters.

    With n queries and m keys, keys beyond n are ignored and queries beyond m get zeros. The connection's weight counts
    for these too, so they do not keep their input, and outputs of other connections are averaged with zeros.

    >>> CopyAttention(1)(torch.zeros(1, 3, 1), *[torch.tensor([[[1.0], [2.0]]])] * 2).flatten().tolist()
    [1.0, 2.0, 0.0]
    """

    def __init__(self, d_model: int, n_heads: int = 4, dropout: float = 0.0):
        super().__init__()
        checked_sizes(d_model, n_heads, dropout, divides=False)

    def prepare(self, plan: AttentionPlan) -> None:
        """Builds the index sets of ``plan``."""
        copies(plan)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Returns the first n rows of ``values`` (B, m, d_model), with zeros beyond m: (B, n, d_model)."""
        checked_read(queries, keys, values)
        n = queries.shape[1]
        return F.pad(values[:, :n], (0, 0, 0, max(0, n - values.shape[1])))

    def attend(
        self, x: torch.Tensor, plan: AttentionPlan, scales: Scales, bias_weight: torch.Tensor | None, backend: str
    ) -> torch.Tensor:
        """Runs every attention set of ``plan``; arguments and result are those of :meth:`CrossAttention.attend`."""
        index = copies(plan)
        weights = coefficients(index.query_index, plan, x, scales)
        results = weights.weigh(gather_rows(to_rows(x), index.sources))
        return to_canvas(scatter_rows(results, index.targets), x.shape[0], x.shape[2])


@dataclass(frozen=True, eq=False)
class Copies:
    """Maps from packed rows to the C keys that are copied, and to the C queries that get them."""

    sources: IndexMap
    targets: IndexMap
    query_index: QueryIndex


def copies(plan: AttentionPlan) -> Copies:
    """Returns the copies of a plan, cached on it.

    Raises:
        ValueError: the queries of a set attend to different keys.
    """
    if "copies" not in plan.index_sets:
        sets = plan.row_sets()
        count = np.minimum(sets.lengths(sets.queries), sets.lengths(sets.keys))
        number = np.repeat(np.arange(len(count)), count)
        nth = np.arange(len(number)) - (np.cumsum(count) - count)[number]
        targets, sources = (sets.rows[sets.ptr[side[number]] + nth] for side in (sets.queries, sets.keys))
        source_map, target_map = (IndexMap.gather(rows, plan.n_packed) for rows in (sources, targets))
        plan.index_sets["copies"] = Copies(source_map, target_map, query_index(plan, sets, number, targets, number))
    return plan.index_sets["copies"]


class NoneAttention(CanvasModule):
    """The function "none", of connections that do not run. Returns zeros; a dispatcher does not call it.

    >>> NoneAttention(2)(torch.ones(1, 1, 2), *[torch.ones(1, 3, 2)] * 2).tolist()
    [[[0.0, 0.0]]]
    """

    def __init__(self, d_model: int, n_heads: int = 4, dropout: float = 0.0):
        super().__init__()
        checked_sizes(d_model, n_heads, dropout, divides=False)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Returns zeros like the queries (B, n, d_model)."""
        checked_read(queries, keys, values)
        return torch.zeros_like(queries)
