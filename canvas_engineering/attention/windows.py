"""Softmax over a window that slides along the keys of a read.

The torch path cuts the queries of a read into blocks, gathers the keys that a block sees and masks inside it, so that
pairs outside of the band are hardly ever computed. Triton and the reference run the same windows as a block table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from canvas_kernels.index_map import IndexMap, gather_rows, scatter_rows
from canvas_kernels.tiling import expand_ranges

from ..checked import checked_int, checked_read
from ..plan import AttentionPlan
from .chosen import KEPT_TABLES, ChosenKeys
from .grouped import Coefficients, QueryPlaces, coefficients, only, query_places
from .softmax import CrossAttention

# Queries of one block of a window of at most as many keys, and at most.
LEAST_BLOCK, LARGEST_BLOCK = 16, 128


@dataclass(frozen=True, eq=False)
class Blocks:
    """How one shape of read is cut: Q blocks of C query places and K key places, counted inside the read.

    ``query`` int64 [Q, C] and ``key`` int64 [Q, K], any place where a block has fewer; ``seen`` bool [Q, C, K], which
    pairs count; ``counts`` bool [Q, C]: whether the place is a query that has keys. One that has none sees everything,
    for a softmax of nothing is no number.
    """

    query: np.ndarray
    key: np.ndarray
    seen: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True, eq=False)
class BlockGroup:
    """``reads`` reads cut alike into ``blocks`` blocks of ``rows`` × ``keys``, from those places on. ``bias`` is
    the constant (blocks · rows · keys), 0 where a pair counts and −inf where it does not."""

    reads: int
    blocks: int
    rows: int
    keys: int
    q_start: int
    k_start: int
    bias: IndexMap

    @classmethod
    def of(cls, reads: int, blocks: Blocks, q_start: int, k_start: int) -> BlockGroup:
        """``reads`` reads cut into ``blocks``."""
        shape = (len(blocks.query), blocks.query.shape[1], blocks.key.shape[1])
        return cls(reads, *shape, q_start, k_start, IndexMap.constant(np.where(blocks.seen, 0.0, -np.inf)))


@dataclass(frozen=True, eq=False)
class BlockedReads:
    """All reads of a plan, cut: maps from packed rows to the query and key places, from reads to key places, and the
    places of the queries, with weight 0 where they do not count."""

    groups: tuple[BlockGroup, ...]
    queries: IndexMap
    keys: IndexMap
    key_reads: IndexMap
    places: QueryPlaces


def block_reads(plan: AttentionPlan, cut) -> BlockedReads:
    """Cuts every read of ``plan``; ``cut(n, m)`` gives the :class:`Blocks` of those of n queries and m keys."""
    sets = plan.sets()
    n, m = sets.lengths(sets.queries), sets.lengths(sets.keys)
    shapes, shape = np.unique(np.stack([n, m], 1), axis=0, return_inverse=True)
    groups, parts, q_start, k_start = [], [], 0, 0
    for number, (rows, keys) in enumerate(shapes.tolist()):
        blocks = cut(rows, keys)
        reads = (shape.reshape(-1) == number).nonzero()[0]
        q_rows, k_rows = (
            sets.rows[sets.ptr[side[reads]][:, None] + place.reshape(-1)].reshape(-1)
            for side, place in ((sets.queries, blocks.query), (sets.keys, blocks.key))
        )
        owners = (np.repeat(reads, side.size) for side in (blocks.query, blocks.key))
        parts.append((q_rows, k_rows, *owners, np.tile(blocks.counts.reshape(-1), len(reads))))
        groups.append(BlockGroup.of(len(reads), blocks, q_start, k_start))
        q_start += len(q_rows)
        k_start += len(k_rows)
    q_rows, k_rows, owner, key_owner, counts = (np.concatenate(column) for column in zip(*parts))
    places = query_places(plan, sets, owner, q_rows, owner, sets.weight[owner] * counts)
    maps = (IndexMap.gather(rows, plan.n_packed) for rows in (q_rows, k_rows))
    return BlockedReads(tuple(groups), *maps, IndexMap.gather(key_owner, int(owner.max()) + 1), places)


def attend_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    found: BlockedReads,
    weights: Coefficients,
    scale: float,
    dropout_p: float,
) -> torch.Tensor:
    """Σ over reads of factor · softmax over the pairs that count: q (B, heads, n, D), k and v (B, heads, m, D) → (n, B,
    heads, D)."""
    batch, heads, _, dim = q.shape
    # places, B, heads, D
    q = only(gather_rows(_by_row(q), found.queries), weights.live).unflatten(1, (batch, heads, dim))
    live = None
    if weights.live_reads is not None:
        live = gather_rows(weights.live_reads.to(k.dtype), found.key_reads) > 0
    k, v = (only(gather_rows(_by_row(x), found.keys), live).unflatten(1, (batch, heads, dim)) for x in (k, v))
    # a block holds keys outside of a row's window: what is not finite is taken out, and put back into rows that attend
    # to it
    broken = ~(k.detach().isfinite() & v.detach().isfinite()).all(-1, keepdim=True)
    k, v = (torch.where(broken, x.new_zeros(()), x) for x in (k, v))
    one, pieces = q.new_ones(1, 1), []
    for g in found.groups:
        units = g.reads * g.blocks
        queries = _blocks(q, g.q_start, units, g.rows)
        keys, values = (_blocks(x, g.k_start, units, g.keys) for x in (k, v))
        bias = gather_rows(one, g.bias).view(g.blocks, 1, 1, g.rows, g.keys)
        # [units, B, heads, rows, keys]
        logits = scale * (queries @ keys.transpose(-1, -2))
        logits = (logits.unflatten(0, (g.reads, g.blocks)) + bias).flatten(0, 1)
        wide = torch.promote_types(logits.dtype, torch.float32)
        p = F.dropout(torch.softmax(logits, -1, dtype=wide).to(values.dtype), dropout_p, training=dropout_p > 0)
        lost = _blocks(broken.to(bias.dtype), g.k_start, units, g.keys).unflatten(0, (g.reads, g.blocks))
        lost = (((bias == 0).to(bias.dtype) @ lost) > 0).flatten(0, 1)
        out = torch.where(lost, p.new_full((), math.nan), p @ values)
        pieces.append(out.permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1))
    results = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
    return scatter_rows(weights.weigh(results), found.queries).unflatten(1, (batch, heads, dim))


def _by_row(x: torch.Tensor) -> torch.Tensor:
    return x.permute(2, 0, 1, 3).flatten(1)


def _blocks(x: torch.Tensor, start: int, units: int, length: int) -> torch.Tensor:
    """[units, B, heads, length, D] of gathered places (S, B, heads, D)."""
    return x[start : start + units * length].unflatten(0, (units, length)).permute(0, 2, 3, 1, 4)


class LocalAttention(ChosenKeys):
    """Softmax over a window: query i of n sees the keys j of m with |i − floor(j·n/m)| ≤ window_size // 2, both counted
    inside the read in canvas order.

    A query whose window holds no key (there may be some where n > m) has no read there: nothing is added, and the
    connection's weight does not count for it.

    >>> module = LocalAttention(8, n_heads=2, window_size=2)
    >>> [keys.tolist() for keys in module.pairs(3, 3)]
    [[0, 0, 1, 1, 1, 2, 2], [0, 1, 0, 1, 2, 1, 2]]
    """

    def __init__(self, d_model: int, n_heads: int = 4, dropout: float = 0.0, window_size: int = 8):
        super().__init__(d_model, n_heads, dropout)
        self.window_size = checked_int(window_size, "window_size", 0)
        self._blocked: dict[tuple, BlockedReads] = {}

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """One read: queries (B, n, d_model) over keys and values (B, m, d_model) → (B, n, d_model); 0 for queries that
        see no key."""
        checked_read(queries, keys, values)
        low, high = self._bounds(queries.shape[1], keys.shape[1])
        sees = torch.from_numpy(high > low).to(queries.device)[:, None]
        out = super().forward(queries, keys, values)
        return torch.where(sees, out, torch.zeros_like(out))

    def _one_read(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float) -> torch.Tensor:
        found = self._single(q.shape[2], k.shape[2])
        dtype = torch.promote_types(q.dtype, torch.float32)
        factor = gather_rows(q.new_ones(1, 1, dtype=dtype), found.places.scale)
        weights = Coefficients(factor, factor != 0, None)
        out = attend_blocks(q, k, v, found, weights, q.shape[-1] ** -0.5, dropout_p)
        return out.permute(1, 2, 0, 3).to(v.dtype)

    def _single(self, n: int, m: int) -> BlockedReads:
        """One read of n queries and m keys; the last few are kept."""
        key = (n, m, *self.choice_key())
        if key not in self._blocked:
            if len(self._blocked) >= KEPT_TABLES:
                self._blocked.pop(next(iter(self._blocked)))
            blocks = self.cut(n, m)
            maps = (IndexMap.gather(place.reshape(-1), rows) for place, rows in ((blocks.query, n), (blocks.key, m)))
            one = IndexMap.gather(np.zeros(blocks.query.size, np.int64), 1)
            places = QueryPlaces(IndexMap.constant(blocks.counts.astype(np.float64)), one, one, True)
            key_reads = IndexMap.gather(np.zeros(blocks.key.size, np.int64), 1)
            self._blocked[key] = BlockedReads((BlockGroup.of(1, blocks, 0, 0),), *maps, key_reads, places)
        return self._blocked[key]

    def choice_key(self) -> tuple:
        return ("window", self.window_size // 2)

    def refine(self, plan: AttentionPlan) -> AttentionPlan:
        """The plan whose weights count: without the reads of queries that see no key."""
        return self.chosen(plan)

    # beside this class's own forward: see grouped.is_fused
    attend = CrossAttention.attend

    def blocked(self, plan: AttentionPlan) -> BlockedReads:
        """``plan`` cut into blocks, made once per plan."""
        key = ("blocked", *self.choice_key())
        if key not in plan.index_sets:
            plan.index_sets[key] = block_reads(plan, self.cut)
        return plan.index_sets[key]

    def prepare(self, plan: AttentionPlan) -> None:
        """Makes the table and the index sets of ``plan``."""
        super().prepare(plan)
        self.blocked(self.chosen(plan))

    def weighted_values(
        self,
        x: torch.Tensor,
        plan: AttentionPlan,
        *,
        gain: torch.Tensor | None = None,
        active: torch.Tensor | None = None,
        row_scale: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> torch.Tensor:
        """As :meth:`CrossAttention.weighted_values`; "auto" is the torch path on every device."""
        if backend not in ("auto", "torch"):
            return super().weighted_values(x, plan, gain=gain, active=active, row_scale=row_scale, backend=backend)
        chosen = self.chosen(plan)
        found = self.blocked(chosen)
        q, k, v = self._project(x)
        weights = coefficients(found.places, chosen, q, gain, active, row_scale)
        dropout_p = self.dropout if self.training else 0.0
        out = attend_blocks(q, k, v, found, weights, q.shape[-1] ** -0.5, dropout_p)
        # (n, B, heads, D) → (B, heads, n, D)
        return out.permute(1, 2, 0, 3).to(v.dtype)

    def _bounds(self, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 [n]: the keys [low, high) of each query."""
        i, reach = np.arange(n), self.window_size // 2
        # floor(j·n/m) ≥ a exactly where j ≥ ceil(a·m/n)
        low, high = (np.clip(-(-edge * m // n), 0, m) for edge in (i - reach, i + reach + 1))
        return low, high

    def pairs(self, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
        low, high = self._bounds(n, m)
        return expand_ranges(low, high - low)

    def cut(self, n: int, m: int) -> Blocks:
        """The same pairs as blocks of neighbouring queries."""
        low, high = self._bounds(n, m)
        size = 1 << self.window_size.bit_length()
        size = min(n, max(LEAST_BLOCK, min(LARGEST_BLOCK, size)))
        query = np.arange(0, n, size)[:, None] + np.arange(size)
        inside = query < n
        query = np.minimum(query, n - 1)
        # windows move one way: a block sees from its first row's low to its last row's high
        first = low[query[:, 0]]
        width = max(1, int((high[query[:, -1]] - first).max()))
        key = first[:, None] + np.arange(width)
        seen = (key[:, None] >= low[query][:, :, None]) & (key[:, None] < high[query][:, :, None])
        counts = inside & seen.any(2)
        seen |= ~counts[:, :, None]
        return Blocks(query, np.minimum(key, m - 1), seen, counts)
