"""Functions of sums over the keys of a read, which all of its queries share: linear attention, pooling; and copies.

None of them touches a (query, key) pair: the cost goes with queries plus keys.
"""

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
from .grouped import QueryPlaces, canvas_of, coefficients, only, query_places, rows_of
from .softmax import project_out

LINEAR_EPSILON = 1e-6


@dataclass(frozen=True, eq=False)
class Stretch:
    """``count`` sets of ``length`` rows each, one after another from place ``start``."""

    count: int
    length: int
    start: int

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """Its places among gathered ``rows`` (S, …): (count, length, …)."""
        return rows[self.start : self.start + self.count * self.length].unflatten(0, (self.count, self.length))


@dataclass(frozen=True, eq=False)
class SharedKeys:
    """A plan's reads, each distinct set of keys once.

    Attributes:
        key_sets: stretches of the K key places, of equal length each.
        keys: takes packed rows to the key places.
        means: the mean of each set's packed rows, sets in the same order.
        reads: stretches of the S query places.
        queries: takes packed rows to the query places.
        read_set: takes key sets to reads.
        places: of the queries.
    """

    key_sets: tuple[Stretch, ...]
    keys: IndexMap
    means: IndexMap
    reads: tuple[Stretch, ...]
    queries: IndexMap
    read_set: IndexMap
    places: QueryPlaces


def shared_keys(plan: AttentionPlan) -> SharedKeys:
    """Made once per plan.

    Raises:
        ValueError: the queries of a read attend to different keys.
    """
    if "shared keys" not in plan.index_sets:
        sets = plan.sets()
        used = np.unique(sets.keys)
        used = used[np.argsort(sets.lengths(used), kind="stable")]
        number = np.empty(len(sets.ptr) - 1, np.int64)
        number[used] = np.arange(len(used))
        _, k_rows = sets.rows_of(used)
        length = sets.lengths(used)
        order = np.argsort(sets.lengths(sets.queries), kind="stable")
        place, q_rows = sets.rows_of(sets.queries[order])
        offset = np.concatenate([[0], np.cumsum(length)])
        plan.index_sets["shared keys"] = SharedKeys(
            _stretches(length),
            IndexMap.gather(k_rows, plan.n_packed),
            IndexMap.sums(k_rows, offset, plan.n_packed, np.repeat(1.0 / length, length)),
            _stretches(sets.lengths(sets.queries[order])),
            IndexMap.gather(q_rows, plan.n_packed),
            IndexMap.gather(number[sets.keys[order]], len(used)),
            query_places(plan, sets, order[place], q_rows, place),
        )
    return plan.index_sets["shared keys"]


def _stretches(lengths: np.ndarray) -> tuple[Stretch, ...]:
    """Of ascending lengths."""
    values, counts = np.unique(lengths, return_counts=True)
    starts = np.cumsum(values * counts) - values * counts
    return tuple(Stretch(*numbers) for numbers in zip(counts.tolist(), values.tolist(), starts.tolist()))


class LinearAttention(CanvasModule):
    """φ(q)·Σ_j φ(k_j) v_jᵀ / (φ(q)·Σ_j φ(k_j) + 1e-6) with φ = elu + 1, and biased projections as
    :class:`CrossAttention` has.

    The sums are taken once for each distinct set of keys. ``dropout`` has no probabilities to act on here.

    >>> module = LinearAttention(8, n_heads=2)
    >>> module(torch.randn(1, 3, 8), torch.randn(1, 5, 8), torch.randn(1, 5, 8)).shape
    torch.Size([1, 3, 8])
    """

    def __init__(self, d_model: int, n_heads: int = 4, dropout: float = 0.0):
        super().__init__()
        d_model, self.n_heads, self.dropout = checked_sizes(d_model, n_heads, dropout)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(d_model, d_model) for _ in range(4))

    def prepare(self, plan: AttentionPlan) -> None:
        """Makes the index sets of ``plan``."""
        shared_keys(plan)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """One read: queries (B, n, d_model) over keys and values (B, m, d_model) → (B, n, d_model)."""
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
        bias_share: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> torch.Tensor:
        """Every read of ``plan``; arguments and result as for :meth:`CrossAttention.attend`."""
        found = shared_keys(plan)
        weights = coefficients(found.places, plan, x, gain, active, row_scale)
        weight = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])
        bias = torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias])
        projected = F.linear(x, weight, bias)
        (batch, _, width), dtype = x.shape, projected.dtype
        dim = width // self.n_heads
        with torch.autocast(x.device.type, enabled=False):
            # the sums of 16-bit inputs are taken in float32
            q, k, v = _wide(projected).chunk(3, dim=-1)
            q, k, v = rows_of(_feature(q)), rows_of(_feature(k)), rows_of(self._with_ones(v))
            k, v = gather_rows(k, found.keys), gather_rows(v, found.keys)
            # [sets, B, heads, head_dim, head_dim + 1]
            sums = [
                self._split(stretch.of(k), batch, dim).transpose(-1, -2) @ self._split(stretch.of(v), batch, dim + 1)
                for stretch in found.key_sets
            ]
            sums = torch.cat(sums) if len(sums) > 1 else sums[0]
            by_read = only(gather_rows(sums.flatten(1), found.read_set), weights.live_reads)
            sums = by_read.unflatten(1, sums.shape[1:])
            q, pieces, first = only(gather_rows(q, found.queries), weights.live), [], 0
            for stretch in found.reads:
                own = sums[first : first + stretch.count]
                first += stretch.count
                # [reads, B, heads, n, head_dim] → [reads · n, B · d]
                out = _normalised(self._split(stretch.of(q), batch, dim), own)
                pieces.append(out.permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1))
            results = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
            out = canvas_of(scatter_rows(weights.weigh(results), found.queries), batch, width)
        return project_out(self.out_proj, out.to(dtype), bias_share)

    def _with_ones(self, v: torch.Tensor) -> torch.Tensor:
        """v (B, n, d) with a 1 behind each head's elements: its sum over keys is the normaliser."""
        return F.pad(v.unflatten(2, (self.n_heads, -1)), (0, 1), value=1.0).flatten(2)

    def _split(self, rows: torch.Tensor, batch: int, dim: int) -> torch.Tensor:
        """[sets, m, B · heads · D] as [sets, B, heads, m, D], D being ``dim``."""
        return rows.unflatten(2, (batch, self.n_heads, dim)).permute(0, 2, 3, 1, 4)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _feature(x: torch.Tensor) -> torch.Tensor:
    return F.elu(_wide(x)) + 1


def _normalised(q: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """[…, n, D] φ(q) and […, D, D + 1], Σ φ(k_j) v_jᵀ with Σ φ(k_j) as the last column → […, n, D]."""
    out = q @ sums
    return out[..., :-1] / (out[..., -1:] + LINEAR_EPSILON)


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
