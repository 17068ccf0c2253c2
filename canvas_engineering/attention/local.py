"""Softmax over a window that slides over the keys of an attention set, in 1-D order or on its grid.

The torch path (:func:`attend_blocks`) splits the queries of a set into blocks, gathers the keys of each block and masks
inside it, so that few pairs outside of the windows are computed; its backward is autograd's. Triton and the reference
run the same windows as a block table.
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
from ..plan.index_sets import SetShape
from .base import Coefficients, QueryIndex, Scales, coefficients, mask_rows, query_index
from .softmax import MAX_TABLES, CrossAttention, FixedPatternAttention

# Default window along one spatial dimension.
DEFAULT_WINDOW = 8
# (min, max) queries per block along each windowed axis, by the number of such axes.
BLOCK_SIZES = {0: (1, 1), 1: (16, 128), 2: (4, 16), 3: (2, 4)}


class Axis(NamedTuple):
    """One axis of an attention set: query i of n attends to the keys [low[i], high[i]) of m; int64 [n], both ascending.
    ``size`` is the number of queries per block."""

    m: int
    low: np.ndarray
    high: np.ndarray
    size: int

    @classmethod
    def in_order(cls, n: int, m: int, window: int) -> Axis:
        """Returns the axis with |i − floor(j·n/m)| ≤ window // 2 for query i and key j."""
        i, reach = np.arange(n), window // 2
        # floor(j·n/m) ≥ a exactly where j ≥ ceil(a·m/n)
        low, high = (np.clip(-(-bound * m // n), 0, m) for bound in (i - reach, i + reach + 1))
        return cls(m, low, high, _block_size(1 << window.bit_length(), 1))

    @classmethod
    def on_grid(cls, n: int, m: int, window: int, axes: int) -> Axis:
        """Returns the axis with |j − floor(i·m/n)| ≤ window // 2, one of ``axes`` windowed axes."""
        middle, reach = np.arange(n) * m // n, window // 2
        size = _block_size(1 << max(window - 1, 0).bit_length(), axes) if reach else 1
        return cls(m, np.maximum(middle - reach, 0), np.minimum(middle + reach + 1, m), size)

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns (query, key) of every pair, sorted."""
        return expand_ranges(self.low, self.high - self.low)

    def blocks(self) -> Blocks:
        """Returns the pairs as blocks of neighbouring queries."""
        n = len(self.low)
        size = min(n, self.size)
        query = np.arange(0, n, size)[:, None] + np.arange(size)
        inside = query < n
        query = np.minimum(query, n - 1)
        # windows are monotonic: a block needs the keys from its first query's low to its last query's high
        first = self.low[query[:, 0]]
        width = max(1, int((self.high[query[:, -1]] - first).max()))
        key = first[:, None] + np.arange(width)
        mask = (key[:, None] >= self.low[query][:, :, None]) & (key[:, None] < self.high[query][:, :, None])
        valid = inside & mask.any(2)
        mask |= ~valid[:, :, None]
        return Blocks(query, np.minimum(key, self.m - 1), valid, (mask,))


def _block_size(size: int, axes: int) -> int:
    least, most = BLOCK_SIZES[min(axes, max(BLOCK_SIZES))]
    return max(least, min(most, size))


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of an attention set of one shape: Q blocks of C queries and K keys, numbered within the set.

    Attributes:
        query: int64 [Q, C], padded with any query.
        key: int64 [Q, K], padded with any key.
        valid: bool [Q, C], entries that are queries with keys.
        mask: bool [Q_a, C_a, K_a] per axis; a pair counts if all axes allow it. The products of the sizes over axes are
            Q, C and K. Queries without keys attend to all, since a softmax over nothing is NaN.
    """

    query: np.ndarray
    key: np.ndarray
    valid: np.ndarray
    mask: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, axes: Sequence[Axis], key_index: np.ndarray | None = None) -> Blocks:
        """Returns blocks for windows along every axis, over all keys or over those at ``key_index`` of the grid."""
        first, *others = (axis.blocks() for axis in axes)
        query, key, valid, mask = first.query, first.key, first.valid, [first.mask[0]]
        for axis, other in zip(axes[1:], others):
            query = _product(query * len(axis.low), other.query, np.add)
            key = _product(key * axis.m, other.key, np.add)
            valid = _product(valid, other.valid, np.logical_and)
            mask.append(other.mask[0])
        if key_index is not None:
            number = np.full(math.prod(axis.m for axis in axes), -1)
            number[key_index] = np.arange(len(key_index))
            pairs = mask[0]
            for other in mask[1:]:
                pairs = _product(pairs, other, np.logical_and)
            pairs, key = pairs & (number[key] >= 0)[:, None], np.maximum(number[key], 0)
            valid = valid & pairs.any(2)
            mask = [pairs | ~valid[:, :, None]]
        return cls(query, key, valid, tuple(mask))


def _product(a: np.ndarray, b: np.ndarray, join) -> np.ndarray:
    """Returns ``join(a, b)`` of all pairs of entries: [A_0 · B_0, A_1 · B_1, …], ``a`` varying slowest."""
    shape = [size for pair in zip(a.shape, b.shape) for size in pair]
    left, right = ([size if i % 2 == side else 1 for i, size in enumerate(shape)] for side in (0, 1))
    return join(a.reshape(left), b.reshape(right)).reshape([x * y for x, y in zip(a.shape, b.shape)])


@dataclass(frozen=True, eq=False)
class BlockGroup:
    """``sets`` attention sets split alike into ``blocks`` blocks of ``rows`` × ``keys``.

    Attributes:
        q_start, k_start: their first entries in the query and the key map.
        mask: for each axis that masks pairs, its sizes (axes before it, its own, axes after it) in blocks, rows and
            keys, and a constant map of its addends, 0 or −inf.
    """

    sets: int
    blocks: int
    rows: int
    keys: int
    q_start: int
    k_start: int
    mask: tuple[tuple[tuple[int, ...], IndexMap], ...]

    @classmethod
    def of(cls, sets: int, blocks: Blocks, q_start: int, k_start: int) -> BlockGroup:
        """Returns the group of ``sets`` attention sets with these blocks."""
        shapes, axes = [mask.shape for mask in blocks.mask], []
        for number, mask in enumerate(blocks.mask):
            if not mask.all():
                before, after = (np.prod(part, 0) for part in (shapes[:number], shapes[number + 1 :]))
                sizes = (np.broadcast_to(part, 3).astype(int) for part in (before, mask.shape, after))
                view = tuple(np.stack(list(sizes), 1).reshape(-1).tolist())
                axes.append((view, IndexMap.constant(np.where(mask, 0.0, -np.inf))))
        shape = (len(blocks.query), blocks.query.shape[1], blocks.key.shape[1])
        return cls(sets, *shape, q_start, k_start, tuple(axes))

    def bias(self, one: torch.Tensor) -> torch.Tensor:
        """Returns (blocks, rows, keys): 0 where a pair counts, else −inf; ``one`` is a (1, 1) tensor of 1."""
        shape = (self.blocks, self.rows, self.keys)
        if not self.mask:
            return one.new_zeros(1, 1, 1).expand(shape)
        parts = []
        for view, constant in self.mask:
            own = gather_rows(one, constant).view([size if axis % 3 == 1 else 1 for axis, size in enumerate(view)])
            parts.append(own.expand(view).reshape(shape))
        return functools.reduce(torch.add, parts)


@dataclass(frozen=True, eq=False)
class BlockedSets:
    """All attention sets of a plan as blocks.

    Attributes:
        groups: blocks of sets of equal shape.
        queries, keys: maps from packed rows to the queries and keys of all blocks.
        set_of_key: map from sets to the keys of all blocks.
        query_index: index of the queries, with weight 0 for padding.
    """

    groups: tuple[BlockGroup, ...]
    queries: IndexMap
    keys: IndexMap
    set_of_key: IndexMap
    query_index: QueryIndex


def block_sets(plan: AttentionPlan, blocks_of) -> BlockedSets:
    """Splits every attention set of ``plan`` into blocks; ``blocks_of(shape)`` returns the :class:`Blocks` of a
    :class:`SetShape`."""
    sets = plan.row_sets()
    groups, parts, q_start, k_start = [], [], 0, 0
    for shape, numbers in sets.shapes():
        blocks = blocks_of(shape)
        q_rows, k_rows = (
            sets.rows[sets.ptr[side[numbers]][:, None] + index.reshape(-1)].reshape(-1)
            for side, index in ((sets.queries, blocks.query), (sets.keys, blocks.key))
        )
        owners = (np.repeat(numbers, side.size) for side in (blocks.query, blocks.key))
        parts.append((q_rows, k_rows, *owners, np.tile(blocks.valid.reshape(-1), len(numbers))))
        groups.append(BlockGroup.of(len(numbers), blocks, q_start, k_start))
        q_start += len(q_rows)
        k_start += len(k_rows)
    q_rows, k_rows, owner, key_owner, valid = (np.concatenate(column) for column in zip(*parts))
    index = query_index(plan, sets, owner, q_rows, owner, sets.weight[owner] * valid)
    queries, keys = (IndexMap.gather(rows, plan.n_packed) for rows in (q_rows, k_rows))
    return BlockedSets(tuple(groups), queries, keys, IndexMap.gather(key_owner, int(owner.max()) + 1), index)


def attend_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    index: BlockedSets,
    weights: Coefficients,
    scale: float,
    dropout_p: float,
) -> torch.Tensor:
    """Computes Σ over sets of factor · softmax over the pairs that count.

    q (B, heads, n, D), k and v (B, heads, m, D) → (n, B, heads, D).
    """
    batch, heads, _, dim = q.shape
    # [queries, B, heads, D]
    q = mask_rows(gather_rows(_by_row(q), index.queries), weights.live).unflatten(1, (batch, heads, dim))
    live = None
    if weights.live_sets is not None:
        live = gather_rows(weights.live_sets.to(k.dtype), index.set_of_key) > 0
    k, v = (mask_rows(gather_rows(_by_row(x), index.keys), live).unflatten(1, (batch, heads, dim)) for x in (k, v))
    # blocks hold keys outside of a row's window: NaN and inf are removed, and put back into rows that attend to them
    nonfinite = ~(k.detach().isfinite() & v.detach().isfinite()).all(-1, keepdim=True)
    k, v = (torch.where(nonfinite, x.new_zeros(()), x) for x in (k, v))
    one, results = q.new_ones(1, 1), []
    for g in index.groups:
        n_blocks = g.sets * g.blocks
        queries = _blocks(q, g.q_start, n_blocks, g.rows)
        keys, values = (_blocks(x, g.k_start, n_blocks, g.keys) for x in (k, v))
        bias = g.bias(one)[:, None, None]
        # [n_blocks, B, heads, rows, keys]
        logits = scale * (queries @ keys.transpose(-1, -2))
        logits = (logits.unflatten(0, (g.sets, g.blocks)) + bias).flatten(0, 1)
        wide = torch.promote_types(logits.dtype, torch.float32)
        p = F.dropout(torch.softmax(logits, -1, dtype=wide).to(values.dtype), dropout_p, training=dropout_p > 0)
        tainted = _blocks(nonfinite.to(bias.dtype), g.k_start, n_blocks, g.keys).unflatten(0, (g.sets, g.blocks))
        tainted = (((bias == 0).to(bias.dtype) @ tainted) > 0).flatten(0, 1)
        out = torch.where(tainted, p.new_full((), math.nan), p @ values)
        results.append(out.permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1))
    result = torch.cat(results) if len(results) > 1 else results[0]
    return scatter_rows(weights.weigh(result), index.queries).unflatten(1, (batch, heads, dim))


def _by_row(x: torch.Tensor) -> torch.Tensor:
    return x.permute(2, 0, 1, 3).flatten(1)


def _blocks(x: torch.Tensor, start: int, n_blocks: int, length: int) -> torch.Tensor:
    """Returns entries of gathered rows (S, B, heads, D) as [n_blocks, B, heads, length, D]."""
    return x[start : start + n_blocks * length].unflatten(0, (n_blocks, length)).permute(0, 2, 3, 1, 4)


class LocalAttention(FixedPatternAttention):
    """Softmax over a window of neighbouring keys, on the grid of the region that is attended to.

    Between regions of two or more spatial dimensions query i of n along an axis attends to the keys j of m there with
    |j − floor(i·m/n)| ≤ w // 2, on every axis (frames, rows, columns, …) at once; windows do not wrap around. Both are
    numbered in the smallest boxes that hold the queries and the keys of one attention set: in a connection to the
    previous frame the window is centred on the same coordinates of that frame.

    With one spatial dimension, for an int, for slot banks and in :meth:`forward`, which has no grid, queries and keys
    are numbered in canvas order, and query i of n attends to the keys j of m with |i − floor(j·n/m)| ≤ w // 2. A query
    whose window holds no key (possible where n > m) leaves the set: nothing is added, and the connection's weight does
    not count for it.

    Args:
        d_model: width of the canvas; n_heads must divide it.
        n_heads: number of heads.
        dropout: probability of dropping an attention weight, in training.
        window_size: w. None: 8 in one spatial dimension; in more, the same frame and 8 on every other axis, which is
            the position itself and 4 on each side. An int: a window in canvas order. A tuple: w for each axis, frames
            first.

    Raises:
        ValueError: an invalid window; in :meth:`refine`, a tuple for another number of axes.

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
        self._blocked: dict[tuple, BlockedSets] = {}

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Runs one attention set: queries (B, n, d_model) over keys and values (B, m, d_model) → (B, n, d_model).

        Queries without a key in their window get 0.
        """
        checked_read(queries, keys, values)
        axis = self._in_order(queries.shape[1], keys.shape[1])
        has_keys = torch.from_numpy(axis.high > axis.low).to(queries.device)[:, None]
        out = super().forward(queries, keys, values)
        return torch.where(has_keys, out, torch.zeros_like(out))

    def _single_set(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float) -> torch.Tensor:
        index = self._single(q.shape[2], k.shape[2])
        dtype = torch.promote_types(q.dtype, torch.float32)
        factor = gather_rows(q.new_ones(1, 1, dtype=dtype), index.query_index.scale)
        weights = Coefficients(factor, factor != 0, None)
        out = attend_blocks(q, k, v, index, weights, q.shape[-1] ** -0.5, dropout_p)
        return out.permute(1, 2, 0, 3).to(v.dtype)

    def _single(self, n: int, m: int) -> BlockedSets:
        """Returns the blocks of one attention set of n queries and m keys; the last few are cached."""
        key = (n, m, *self.pattern_key())
        if key not in self._blocked:
            if len(self._blocked) >= MAX_TABLES:
                self._blocked.pop(next(iter(self._blocked)))
            blocks = Blocks.of([self._in_order(n, m)])
            queries, keys = (
                IndexMap.gather(index.reshape(-1), rows) for index, rows in ((blocks.query, n), (blocks.key, m))
            )
            one = IndexMap.gather(np.zeros(blocks.query.size, np.int64), 1)
            index = QueryIndex(IndexMap.constant(blocks.valid.astype(np.float64)), one, one, True)
            set_of_key = IndexMap.gather(np.zeros(blocks.key.size, np.int64), 1)
            self._blocked[key] = BlockedSets((BlockGroup.of(1, blocks, 0, 0),), queries, keys, set_of_key, index)
        return self._blocked[key]

    def pattern_key(self) -> tuple:
        return ("window", self.window_size)

    def refine(self, plan: AttentionPlan) -> AttentionPlan:
        """Returns the plan without queries that have no key in their windows."""
        return self.with_pattern(plan)

    # beside this class's own forward: see base.is_fused
    attend = CrossAttention.attend

    def blocked(self, plan: AttentionPlan) -> BlockedSets:
        """Returns ``plan`` as blocks, cached on it."""
        key = ("blocked", *self.pattern_key())
        if key not in plan.index_sets:
            plan.index_sets[key] = block_sets(plan, self.blocks)
        return plan.index_sets[key]

    def prepare(self, plan: AttentionPlan) -> None:
        """Builds the table and the index sets of ``plan``."""
        super().prepare(plan)
        self.blocked(self.with_pattern(plan))

    def weighted_values(self, x: torch.Tensor, plan: AttentionPlan, scales: Scales, backend: str) -> torch.Tensor:
        """Returns :meth:`CrossAttention.weighted_values`; "auto" is the torch path on every device."""
        if backend not in ("auto", "torch"):
            return super().weighted_values(x, plan, scales, backend)
        selected = self.with_pattern(plan)
        index = self.blocked(selected)
        q, k, v = self._project(x)
        weights = coefficients(index.query_index, selected, q, scales)
        dropout_p = self.dropout if self.training else 0.0
        out = attend_blocks(q, k, v, index, weights, q.shape[-1] ** -0.5, dropout_p)
        # (n, B, heads, D) → (B, heads, n, D)
        return out.permute(1, 2, 0, 3).to(v.dtype)

    def _in_order(self, n: int, m: int) -> Axis:
        window = self.window_size
        if isinstance(window, tuple):
            window = window[-1]
        return Axis.in_order(n, m, DEFAULT_WINDOW if window is None else window)

    def _axes(self, shape: SetShape) -> list[Axis]:
        """Returns one axis in canvas order, or one for frames and one for each spatial dimension."""
        window, dims = self.window_size, len(shape.queries)
        if window is None and dims > 2:
            window = (1, *[DEFAULT_WINDOW] * (dims - 1))
        # slots have no grid
        if not isinstance(window, tuple) or dims == 1:
            return [self._in_order(shape.n, shape.m)]
        if len(window) != dims:
            raise ValueError(
                f"window_size {window} has {len(window)} numbers; this canvas has {dims} axes, frames and "
                f"{dims - 1} spatial: pass one for each"
            )
        windowed = sum(size > 1 for size in window)
        return [Axis.on_grid(n, m, size, windowed) for n, m, size in zip(shape.queries, shape.keys, window)]

    def pairs(self, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
        return self._in_order(n, m).pairs()

    def pairs_of_shape(self, shape: SetShape) -> tuple[np.ndarray, np.ndarray]:
        first, *others = axes = self._axes(shape)
        query, key = first.pairs()
        for axis in others:
            own_query, own_key = axis.pairs()
            query = (query[:, None] * len(axis.low) + own_query).reshape(-1)
            key = (key[:, None] * axis.m + own_key).reshape(-1)
        if shape.key_index is None or not others:
            return query, key
        number = np.full(math.prod(axis.m for axis in axes), -1)
        number[shape.key_index] = np.arange(shape.m)
        keep = number[key] >= 0
        return query[keep], number[key[keep]]

    def blocks(self, shape: SetShape) -> Blocks:
        """Returns the same pairs as blocks of neighbouring queries."""
        axes = self._axes(shape)
        return Blocks.of(axes, None if len(axes) == 1 else shape.key_index)
