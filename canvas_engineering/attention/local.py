"""Softmax over a window that slides over the keys of a read, in order or on its grid.

The torch path cuts the queries of a read into blocks, gathers the keys that a block sees and masks inside it, so that
pairs outside of the windows are hardly ever computed. Triton and the reference run the same windows as a block table.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from canvas_kernels.packing import IndexMap, gather_rows, scatter_rows
from canvas_kernels.ranges import expand_ranges

from ..checked import checked_int, checked_ints, checked_read
from ..plan import AttentionPlan
from ..plan.index_sets import ReadShape
from .base import Coefficients, QueryPlaces, coefficients, only, query_places
from .softmax import KEPT_TABLES, ChosenKeys, CrossAttention

# The window of one spatial dimension, and of rows and of columns.
DEFAULT_WINDOW = 8
# Queries of one block, at least and at most, along each axis that has a window: by the number of such axes.
BLOCKS = {0: (1, 1), 1: (16, 128), 2: (4, 16), 3: (2, 4)}


class Axis(NamedTuple):
    """One axis of a read: its m keys, and int64 [n] which of them, [low, high), each of its n queries sees; both
    ascend. ``size`` queries are to be in one block."""

    m: int
    low: np.ndarray
    high: np.ndarray
    size: int

    @classmethod
    def in_order(cls, n: int, m: int, window: int) -> Axis:
        """|i − floor(j·n/m)| ≤ window // 2."""
        i, reach = np.arange(n), window // 2
        # floor(j·n/m) ≥ a exactly where j ≥ ceil(a·m/n)
        low, high = (np.clip(-(-edge * m // n), 0, m) for edge in (i - reach, i + reach + 1))
        return cls(m, low, high, _block_size(1 << window.bit_length(), 1))

    @classmethod
    def on_grid(cls, n: int, m: int, window: int, axes: int) -> Axis:
        """|j − floor(i·m/n)| ≤ window // 2, one of ``axes`` that have a window."""
        middle, reach = np.arange(n) * m // n, window // 2
        size = _block_size(1 << max(window - 1, 0).bit_length(), axes) if reach else 1
        return cls(m, np.maximum(middle - reach, 0), np.minimum(middle + reach + 1, m), size)

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """(query, key) of every pair, sorted."""
        return expand_ranges(self.low, self.high - self.low)

    def cut(self) -> Blocks:
        """The pairs as blocks of neighbouring queries."""
        n = len(self.low)
        size = min(n, self.size)
        query = np.arange(0, n, size)[:, None] + np.arange(size)
        inside = query < n
        query = np.minimum(query, n - 1)
        # windows move one way: a block sees from its first row's low to its last row's high
        first = self.low[query[:, 0]]
        width = max(1, int((self.high[query[:, -1]] - first).max()))
        key = first[:, None] + np.arange(width)
        seen = (key[:, None] >= self.low[query][:, :, None]) & (key[:, None] < self.high[query][:, :, None])
        counts = inside & seen.any(2)
        seen |= ~counts[:, :, None]
        return Blocks(query, np.minimum(key, self.m - 1), counts, (seen,))


def _block_size(wanted: int, axes: int) -> int:
    least, most = BLOCKS[min(axes, max(BLOCKS))]
    return max(least, min(most, wanted))


@dataclass(frozen=True, eq=False)
class Blocks:
    """How one shape of read is cut: Q blocks of C query places and K key places, counted inside the read.

    ``query`` int64 [Q, C] and ``key`` int64 [Q, K], any place where a block has fewer; ``counts`` bool [Q, C]: whether
    the place is a query that has keys. ``seen``: which pairs count, those that do in each of these, bool [Q_a, C_a,
    K_a], over axes whose products are Q, C and K. A query that has no keys sees everything, for a softmax of nothing is
    no number.
    """

    query: np.ndarray
    key: np.ndarray
    counts: np.ndarray
    seen: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, axes: Sequence[Axis], places: np.ndarray | None = None) -> Blocks:
        """Blocks of a read whose windows are those of every axis, of all keys or of those at ``places`` alone."""
        first, *others = (axis.cut() for axis in axes)
        query, key, counts, seen = first.query, first.key, first.counts, [first.seen[0]]
        for axis, other in zip(axes[1:], others):
            query = _product(query * len(axis.low), other.query, np.add)
            key = _product(key * axis.m, other.key, np.add)
            counts = _product(counts, other.counts, np.logical_and)
            seen.append(other.seen[0])
        if places is not None:
            number = np.full(math.prod(axis.m for axis in axes), -1)
            number[places] = np.arange(len(places))
            pairs = seen[0]
            for other in seen[1:]:
                pairs = _product(pairs, other, np.logical_and)
            pairs, key = pairs & (number[key] >= 0)[:, None], np.maximum(number[key], 0)
            counts = counts & pairs.any(2)
            seen = [pairs | ~counts[:, :, None]]
        return cls(query, key, counts, tuple(seen))


def _product(a: np.ndarray, b: np.ndarray, join) -> np.ndarray:
    """[A_0 · B_0, A_1 · B_1, …] of ``join(a, b)`` for every pair of entries, axis by axis, those of ``a`` first."""
    shape = [size for pair in zip(a.shape, b.shape) for size in pair]
    left, right = ([size if i % 2 == side else 1 for i, size in enumerate(shape)] for side in (0, 1))
    return join(a.reshape(left), b.reshape(right)).reshape([x * y for x, y in zip(a.shape, b.shape)])


@dataclass(frozen=True, eq=False)
class BlockGroup:
    """``reads`` reads cut alike into ``blocks`` blocks of ``rows`` × ``keys``, from those places on. ``seen``: for each
    axis on which some pair does not count, its sizes (axes before it, its own, axes after it) in blocks, rows and keys,
    and the constant of its own, 0 where a pair counts and −inf where it does not."""

    reads: int
    blocks: int
    rows: int
    keys: int
    q_start: int
    k_start: int
    seen: tuple[tuple[tuple[int, ...], IndexMap], ...]

    @classmethod
    def of(cls, reads: int, blocks: Blocks, q_start: int, k_start: int) -> BlockGroup:
        """``reads`` reads cut into ``blocks``."""
        shapes, axes = [seen.shape for seen in blocks.seen], []
        for number, seen in enumerate(blocks.seen):
            if not seen.all():
                before, after = (np.prod(part, 0) for part in (shapes[:number], shapes[number + 1 :]))
                sizes = (np.broadcast_to(part, 3).astype(int) for part in (before, seen.shape, after))
                view = tuple(np.stack(list(sizes), 1).reshape(-1).tolist())
                axes.append((view, IndexMap.constant(np.where(seen, 0.0, -np.inf))))
        shape = (len(blocks.query), blocks.query.shape[1], blocks.key.shape[1])
        return cls(reads, *shape, q_start, k_start, tuple(axes))

    def bias(self, one: torch.Tensor) -> torch.Tensor:
        """(blocks, rows, keys): 0 where a pair counts and −inf where it does not; ``one`` is a (1, 1) of 1."""
        shape = (self.blocks, self.rows, self.keys)
        if not self.seen:
            return one.new_zeros(1, 1, 1).expand(shape)
        parts = []
        for view, constant in self.seen:
            own = gather_rows(one, constant).view([size if place % 3 == 1 else 1 for place, size in enumerate(view)])
            parts.append(own.expand(view).reshape(shape))
        return functools.reduce(torch.add, parts)


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
    """Cuts every read of ``plan``; ``cut(shape)`` gives the :class:`Blocks` of those of a :class:`ReadShape`."""
    sets = plan.sets()
    groups, parts, q_start, k_start = [], [], 0, 0
    for shape, reads in sets.shapes():
        blocks = cut(shape)
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
    queries, keys = (IndexMap.gather(rows, plan.n_packed) for rows in (q_rows, k_rows))
    return BlockedReads(tuple(groups), queries, keys, IndexMap.gather(key_owner, int(owner.max()) + 1), places)


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
        bias = g.bias(one)[:, None, None]
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
    """Softmax over a window of neighbouring keys, on the grid of the region that is attended to.

    Between regions of two or more spatial dimensions a query at place i of n along an axis attends to the keys j of m
    there with |j − floor(i·m/n)| ≤ w // 2, on every axis (frames, rows, columns, …) at once; nothing wraps over the end
    of a row. Both are counted in the smallest boxes that hold the queries and the keys of one attention set: a
    connection to the frame before is windowed around the same place in that frame.

    With one spatial dimension, for an int, for slots of an identity region and in :meth:`forward`, which knows no
    grid, places are counted in canvas order, and query i of n attends to the keys j of m with |i − floor(j·n/m)| ≤ w //
    2. A query whose window holds no key (there may be some where n > m) has no read there: nothing is added, and the
    connection's weight does not count for it.

    Args:
        d_model: width of the canvas; n_heads must divide it.
        n_heads: number of heads.
        dropout: probability of dropping an attention weight, in training.
        window_size: w. None: 8 places in one spatial dimension; in more, the same frame and 8 on every other axis,
            which is the place itself and 4 on each side. An int: that many places in canvas order. A tuple: w for each
            axis, frames first.

    Raises:
        ValueError: a window that is none of these; on :meth:`refine` a tuple for another number of axes.

    >>> module = LocalAttention(8, n_heads=2, window_size=2)
    >>> [keys.tolist() for keys in module.pairs(3, 3)]
    [[0, 0, 1, 1, 1, 2, 2], [0, 1, 0, 1, 2, 1, 2]]
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int = 4,
        dropout: float = 0.0,
        window_size: int | tuple[int, ...] | None = None,
    ):
        super().__init__(d_model, n_heads, dropout)
        if isinstance(window_size, (tuple, list)):
            window_size = checked_ints(window_size, "window_size", 0)
            if len(window_size) < 2:
                raise ValueError(f"window_size must have a number for frames and each spatial axis, got {window_size}")
        elif window_size is not None:
            window_size = checked_int(window_size, "window_size", 0)
        self.window_size = window_size
        self._blocked: dict[tuple, BlockedReads] = {}

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """One read: queries (B, n, d_model) over keys and values (B, m, d_model) → (B, n, d_model); 0 for queries that
        see no key."""
        checked_read(queries, keys, values)
        axis = self._in_order(queries.shape[1], keys.shape[1])
        sees = torch.from_numpy(axis.high > axis.low).to(queries.device)[:, None]
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
            blocks = Blocks.of([self._in_order(n, m)])
            queries, keys = (
                IndexMap.gather(place.reshape(-1), rows) for place, rows in ((blocks.query, n), (blocks.key, m))
            )
            one = IndexMap.gather(np.zeros(blocks.query.size, np.int64), 1)
            places = QueryPlaces(IndexMap.constant(blocks.counts.astype(np.float64)), one, one, True)
            key_reads = IndexMap.gather(np.zeros(blocks.key.size, np.int64), 1)
            self._blocked[key] = BlockedReads((BlockGroup.of(1, blocks, 0, 0),), queries, keys, key_reads, places)
        return self._blocked[key]

    def choice_key(self) -> tuple:
        return ("window", self.window_size)

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

    def _in_order(self, n: int, m: int) -> Axis:
        window = self.window_size
        if isinstance(window, tuple):
            window = window[-1]
        return Axis.in_order(n, m, DEFAULT_WINDOW if window is None else window)

    def _axes(self, shape: ReadShape) -> list[Axis]:
        """One axis for places in canvas order; else one for frames and for each spatial dimension."""
        window, dims = self.window_size, len(shape.queries)
        if window is None and dims > 2:
            window = (1, *[DEFAULT_WINDOW] * (dims - 1))
        # slots have no grid
        if not isinstance(window, tuple) or dims == 1:
            return [self._in_order(shape.n, shape.m)]
        if len(window) != dims:
            raise ValueError(
                f"window_size {window} has {len(window)} numbers; this canvas has {dims} axes, frames and "
                f"{dims - 1} spatial: give one for each"
            )
        windowed = sum(size > 1 for size in window)
        return [Axis.on_grid(n, m, size, windowed) for n, m, size in zip(shape.queries, shape.keys, window)]

    def pairs(self, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
        return self._in_order(n, m).pairs()

    def pairs_of(self, shape: ReadShape) -> tuple[np.ndarray, np.ndarray]:
        first, *others = axes = self._axes(shape)
        query, key = first.pairs()
        for axis in others:
            own_query, own_key = axis.pairs()
            query = (query[:, None] * len(axis.low) + own_query).reshape(-1)
            key = (key[:, None] * axis.m + own_key).reshape(-1)
        if shape.places is None or not others:
            return query, key
        number = np.full(math.prod(axis.m for axis in axes), -1)
        number[shape.places] = np.arange(shape.m)
        kept = number[key] >= 0
        return query[kept], number[key[kept]]

    def cut(self, shape: ReadShape) -> Blocks:
        """The same pairs as blocks of neighbouring queries."""
        axes = self._axes(shape)
        return Blocks.of(axes, None if len(axes) == 1 else shape.places)
