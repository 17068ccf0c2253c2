"""Base classes of attention modules, and the index structures of a plan's attention sets that they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from canvas_kernels.autograd import mark_for_compilers
from canvas_kernels.derived import is_plain
from canvas_kernels.packing import IndexMap, gather_rows, scatter_rows

from ..canvas import CanvasLayout
from ..checked import checked_read
from ..derived_buffers import CanvasModule
from ..masks import pattern_cover
from ..plan import AttentionPlan
from ..plan.index_sets import RowSets

# backends of modules without kernels of their own
PLAIN_BACKENDS = ("auto", "torch", "reference")


@dataclass(frozen=True, eq=False)
class SetGroup:
    """G attention sets with n queries and m keys each.

    Their rows follow one another in the entries ``[q_start, q_start + G·n)`` of the query map and
    ``[k_start, k_start + G·m)`` of the key map.
    """

    sets: int
    n: int
    m: int
    q_start: int
    k_start: int


@dataclass(frozen=True, eq=False)
class QueryIndex:
    """Index maps to the S queries of all attention sets, one set after another.

    Attributes:
        scale: from entries of the flattened row_scale (2 · n), times the weight of each query's set.
        connections: from connections.
        sets: from attention sets.
        partial: whether some queries have weight 0.
    """

    scale: IndexMap
    connections: IndexMap
    sets: IndexMap
    partial: bool


def query_index(
    plan: AttentionPlan,
    sets: RowSets,
    number: np.ndarray,
    row: np.ndarray,
    output: np.ndarray,
    weight: np.ndarray | None = None,
) -> QueryIndex:
    """Returns the index of the queries of sets ``number`` (in ``sets``) at packed ``row``.

    Args:
        plan: the plan of the sets.
        sets: its attention sets as rows.
        number: int64 [S], the number in ``sets`` of each query's set.
        row: int64 [S], the packed row of each query.
        output: int64 [S], the set's number in the order of execution.
        weight: float64 [S]; by default the weights of the sets.
    """
    connection = sets.connection[number]
    entry = plan.replace[connection] * plan.n_packed + row
    weight = sets.weight[number] if weight is None else weight
    return QueryIndex(
        IndexMap.sums(entry, np.arange(len(entry) + 1), 2 * plan.n_packed, weight),
        IndexMap.gather(connection, plan.n_connections),
        IndexMap.gather(output, int(output.max()) + 1 if len(output) else 0),
        bool((weight == 0).any()),
    )


class Scales(NamedTuple):
    """The factors of one step, arguments of :func:`canvas_attention`."""

    gain: torch.Tensor | None = None
    active: torch.Tensor | None = None
    row_scale: torch.Tensor | None = None


class Coefficients(NamedTuple):
    """Factors of queries and sets.

    Attributes:
        factor: (S, 1), of every query.
        live: bool (S, 1), queries whose factor is not 0; None where all are.
        live_sets: bool (sets, 1), sets with a live query; None where all have one.
    """

    factor: torch.Tensor
    live: torch.Tensor | None
    live_sets: torch.Tensor | None

    def weigh(self, results: torch.Tensor) -> torch.Tensor:
        """Returns ``results`` (S, …) times their factors; 0 where these are 0, whatever the results are."""
        return mask_rows(results * self.factor, self.live)


def mask_rows(x: torch.Tensor, live: torch.Tensor | None) -> torch.Tensor:
    """Returns x (S, …) where ``live`` (S, 1) is true, else 0: NaN and inf elsewhere reach no result and no gradient."""
    return x if live is None else torch.where(live, x, x.new_zeros(()))


def coefficients(index: QueryIndex, plan: AttentionPlan, x: torch.Tensor, scales: Scales) -> Coefficients:
    """Returns w_r · gain · active · row_scale at every query, in float32, or float64 for such ``x``.

    The result is differentiable in ``gain``.
    """
    gain, active, row_scale = scales
    dtype = torch.promote_types(x.dtype, torch.float32)
    everything = active is None and row_scale is None and not (plan.replaces or index.partial)
    if row_scale is None:
        row_scale = plan.row_scale(active, dtype, x.device)
    factor = gather_rows(row_scale.detach().to(dtype).reshape(-1, 1), index.scale)
    if active is not None:
        factor = factor * gather_rows((active.detach() != 0).to(dtype)[:, None], index.connections)
    live = live_sets = None
    if not everything:
        live = factor != 0
        live_sets = scatter_rows(live.to(dtype), index.sets) > 0
    if gain is not None:
        factor = factor * gather_rows(gain.to(dtype)[:, None], index.connections)
    return Coefficients(factor, live, live_sets)


@dataclass(frozen=True, eq=False)
class SetGroups:
    """The attention sets of a plan in groups of equal shape.

    Attributes:
        groups: sorted by (n, m).
        queries, keys: maps from packed rows to the S queries and the K keys, group after group.
        query_index: index of the queries.
        set_of_key: map from sets to the K keys.
    """

    groups: tuple[SetGroup, ...]
    queries: IndexMap
    keys: IndexMap
    query_index: QueryIndex
    set_of_key: IndexMap


def set_groups(plan: AttentionPlan) -> SetGroups:
    """Returns the groups of a plan's attention sets, cached on the plan.

    Raises:
        ValueError: the queries of a set attend to different keys.
    """
    if "set groups" not in plan.index_sets:
        sets = plan.row_sets()
        n, m = sets.lengths(sets.queries), sets.lengths(sets.keys)
        order = np.lexsort((np.arange(len(n)), m, n))
        n, m = n[order], m[order]
        fresh = np.ones(len(n), bool)
        fresh[1:] = (n[1:] != n[:-1]) | (m[1:] != m[:-1])
        first = fresh.nonzero()[0]
        stop = np.append(first[1:], len(n))
        q_start, k_start = np.cumsum(n) - n, np.cumsum(m) - m
        shapes = (stop - first, n[first], m[first], q_start[first], k_start[first])
        groups = tuple(SetGroup(*numbers) for numbers in zip(*(a.tolist() for a in shapes)))
        number, q_rows = sets.rows_of(sets.queries[order])
        key_number, k_rows = sets.rows_of(sets.keys[order])
        plan.index_sets["set groups"] = SetGroups(
            groups,
            IndexMap.gather(q_rows, plan.n_packed),
            IndexMap.gather(k_rows, plan.n_packed),
            query_index(plan, sets, order[number], q_rows, number),
            IndexMap.gather(key_number, len(order)),
        )
    return plan.index_sets["set groups"]


def attend_grouped(module: nn.Module, x: torch.Tensor, plan: AttentionPlan, scales: Scales) -> torch.Tensor:
    """Runs every attention set of ``plan`` through ``module(queries, keys, values)``, one call for all sets of a shape.

    Args:
        module: is called with queries (G·B, n, d_model) and, as keys and as values, (G·B, m, d_model), rows in canvas
            order; it must return (G·B, n, d_model), each batch entry by itself.
        x: (B, rows, d_model), the canvas in the plan's packed order.
        plan: the plan of the module's connections.
        scales: the factors of the step.

    Returns:
        (B, rows, d_model): the weighted sums of the sets' outputs; 0 for rows without keys.

    Raises:
        ValueError: an output of another shape, or queries of one set that attend to different keys.
    """
    batch, _, width = x.shape
    index = set_groups(plan)
    flat, weights = to_rows(x), coefficients(index.query_index, plan, x, scales)
    q_all, k_all = mask_rows(gather_rows(flat, index.queries), weights.live), gather_rows(flat, index.keys)
    if weights.live_sets is not None:
        k_all = mask_rows(k_all, gather_rows(weights.live_sets.to(x.dtype), index.set_of_key) > 0)
    results = []
    for group in index.groups:
        queries = to_sets(q_all[group.q_start : group.q_start + group.sets * group.n], group.sets, batch, width)
        keys = to_sets(k_all[group.k_start : group.k_start + group.sets * group.m], group.sets, batch, width)
        out = module(queries, keys, keys)
        if not isinstance(out, torch.Tensor) or out.shape != queries.shape:
            given = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise ValueError(
                f"{type(module).__name__} returned {given} for queries {tuple(queries.shape)} and keys "
                f"{tuple(keys.shape)}: an attention function returns one row for each query"
            )
        results.append(from_sets(out, group.sets, batch))
    result = torch.cat(results) if len(results) > 1 else results[0]
    return to_canvas(scatter_rows(weights.weigh(result), index.queries), batch, width)


def to_rows(x: torch.Tensor) -> torch.Tensor:
    """Returns x (B, n, d) as rows (n, B·d): a view if B is 1."""
    return x.transpose(0, 1).flatten(1)


def to_canvas(rows: torch.Tensor, batch: int, width: int) -> torch.Tensor:
    """Returns rows (n, B·d) as (B, n, d), d being ``width``: the inverse of :func:`to_rows`."""
    return rows.unflatten(1, (batch, width)).transpose(0, 1)


def to_sets(rows: torch.Tensor, sets: int, batch: int, width: int) -> torch.Tensor:
    """Returns gathered rows (G·n, B·d) as (G·B, n, d), d being ``width``: a view if B is 1."""
    out = rows.unflatten(1, (batch, width)).unflatten(0, (sets, -1)).transpose(1, 2).flatten(0, 1)
    # exported graphs would specialise on the view's strides
    return out if is_plain(out) else out.clone(memory_format=torch.contiguous_format)


def from_sets(out: torch.Tensor, sets: int, batch: int) -> torch.Tensor:
    """Returns (G·B, n, d) as rows (G·n, B·d): the inverse of :func:`to_sets`."""
    return out.unflatten(0, (sets, batch)).transpose(1, 2).flatten(0, 1).flatten(1)


def output_projection(
    out_proj: nn.Linear, out: torch.Tensor, bias_weight: torch.Tensor | None, factor: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns ``factor`` times ``out_proj`` of the weighted sum over attention sets.

    Args:
        out_proj: the projection.
        out: (B, n, d) or (B, heads, n, head_dim).
        bias_weight: (n,), the fraction of the bias that each row gets; None for all of it.
        factor: a scalar tensor; None for 1.
    """
    weight, bias = out_proj.weight, out_proj.bias
    if factor is not None:
        # scales d² weights rather than all rows
        weight, bias = factor * weight, factor * bias
    if out.dim() == 4:
        out = out.transpose(1, 2).flatten(2)
    if bias_weight is None:
        return F.linear(out, weight, bias)
    out = F.linear(out, weight)
    return out + bias_weight[:, None].to(out.dtype) * bias


# -- properties of modules ---------------------------------------------------------------------------------------------


def is_fused(cls: type) -> bool:
    """Whether the class runs a whole plan by its own ``attend``. A subclass that overrides only ``forward`` does not:
    the ``attend`` that it inherits would ignore its ``forward``."""
    for base in cls.__mro__:
        if "attend" in vars(base):
            return True
        if "forward" in vars(base):
            return False
    return False


def bind_plan(fn: str, module: nn.Module, plan: AttentionPlan, layout: CanvasLayout, backend: str) -> AttentionPlan:
    """Checks that ``module``, the function ``fn`` of a dispatcher, can run ``plan``, and prepares it.

    A fused class lists its ``backends``, and says by ``supports_pair_masks`` whether the queries of one attention set
    may attend to different keys. Its ``refine(plan)`` may drop queries of sets, whose weights then do not count.

    Returns:
        The plan that the module runs.

    Raises:
        ValueError: an unsupported backend, or a mask of (query, key) pairs on a function that needs the same keys for
            all queries of a set.
    """
    fused = is_fused(type(module))
    backends = getattr(module, "backends", PLAIN_BACKENDS) if fused else PLAIN_BACKENDS
    if backend not in backends:
        raise ValueError(
            f"backend {backend!r} does not run {fn!r}: use {', '.join(backends)}; 'auto' is Triton for the "
            "functions that have kernels"
        )
    if not (fused and getattr(module, "supports_pair_masks", False)):
        for number in np.unique(plan.attention_sets.connection).tolist():
            connection = plan.connections[number]
            if connection.mask is None or connection.mask.effective_kind != "sparse":
                continue
            shapes = (layout.region_size(name) for name in (connection.src, connection.dst))
            if pattern_cover(connection.mask, *shapes).pair:
                raise ValueError(
                    f"connection {number}, {connection.src!r} attends to {connection.dst!r} by {fn!r}, which has "
                    "the same keys for all queries of an attention set: a mask of (query, key) pairs needs a function "
                    "of single pairs, such as cross_attention"
                )
    refine = getattr(module, "refine", None)
    if fused and refine is not None:
        plan = refine(plan)
    prepare(module, plan)
    return plan


def prepare(module: nn.Module, plan: AttentionPlan) -> None:
    """Builds the index sets that ``plan`` needs ahead of the first step, by the module's ``prepare(plan)`` if fused."""
    own_prepare = getattr(module, "prepare", None)
    if not is_fused(type(module)):
        set_groups(plan)
    elif own_prepare is not None:
        own_prepare(plan)


# -- memories ----------------------------------------------------------------------------------------------------------


class MemoryAttention(CanvasModule):
    """out_projection(attend_to_memory(query_features(x_q), summarise(key_features(x_k)))); subclasses define the four.

    Features depend on one position and are computed once per position, however many attention sets hold it;
    ``summarise`` runs once for each distinct set of keys; the output projection once per position, at the end.

    Class attributes:
        supports_pair_masks: each query is served by itself and the order of keys does not count, so that masks of
            (query, key) pairs may split a set into smaller ones.
        causal: query i attends to the first i + 1 rows of the memory at most, which depend on as many keys.
    """

    supports_pair_masks = False
    causal = False
    out_proj: nn.Linear

    def __init__(self) -> None:
        super().__init__()
        # for scans that run without a plan
        mark_for_compilers()

    def key_features(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Maps keys and values (…, d_model) to features (…, F), position by position."""
        raise NotImplementedError

    def summarise(self, features: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        """Maps the features of a set's keys (B, m, F) to its memory (B, rows, M). ``backend`` is as for
        :func:`canvas_attention`."""
        raise NotImplementedError

    def query_features(self, queries: torch.Tensor) -> torch.Tensor:
        """Maps queries (…, d_model) to features (…, Q), position by position."""
        raise NotImplementedError

    def attend_to_memory(self, features: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """Maps the features of a set's queries (B, n, Q) and its memory to (B, n, d_model)."""
        raise NotImplementedError

    @property
    def out_projection(self) -> nn.Linear:
        """The output projection."""
        return self.out_proj

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Runs one attention set: queries (B, n, d_model) over keys and values (B, m, d_model) → (B, n, d_model)."""
        checked_read(queries, keys, values)
        if self.causal:
            keys, values = keys[:, : queries.shape[1]], values[:, : queries.shape[1]]
        memory = self.summarise(self.key_features(keys, values))
        return self.out_projection(self.attend_to_memory(self.query_features(queries), memory))

    def prepare(self, plan: AttentionPlan) -> None:
        """Builds the index sets of ``plan``."""
        shared_memories(plan)

    def attend(
        self, x: torch.Tensor, plan: AttentionPlan, scales: Scales, bias_weight: torch.Tensor | None, backend: str
    ) -> torch.Tensor:
        """Runs every attention set of ``plan``, one call for all memories of a length and one for all sets of a shape.

        Arguments and result are those of :meth:`CrossAttention.attend`.
        """
        index = shared_memories(plan)
        weights = coefficients(index.query_index, plan, x, scales)
        (batch, _, width), rows = x.shape, to_rows(x)
        own = gather_rows(rows, index.key_rows).unflatten(1, (batch, width))
        key_features = self.key_features(own, own)
        keys = gather_rows(key_features.flatten(1), index.keys)
        own = gather_rows(rows, index.query_rows).unflatten(1, (batch, width))
        query_features = self.query_features(own)
        queries = mask_rows(gather_rows(query_features.flatten(1), index.queries), weights.live)
        results, first_set = [], 0
        for group in index.groups:
            features = keys[group.start : group.start + group.sets * group.m]
            features = to_sets(features, group.sets, batch, key_features.shape[2])
            memory = self.summarise(features[:, : group.longest] if self.causal else features, backend)
            shape = memory.shape[1:]
            memory = memory.unflatten(0, (group.sets, batch)).flatten(1)  # [sets, B · rows · M]
            for part in group.parts:
                memories = gather_rows(memory, part.memory)
                if weights.live_sets is not None:
                    memories = mask_rows(memories, weights.live_sets[first_set : first_set + part.sets])
                first_set += part.sets
                memories = memories.reshape(part.sets * batch, *shape)
                own_queries = queries[part.start : part.start + part.sets * part.n]
                own_queries = to_sets(own_queries, part.sets, batch, query_features.shape[2])
                results.append(from_sets(self.attend_to_memory(own_queries, memories), part.sets, batch))
        result = torch.cat(results) if len(results) > 1 else results[0]
        out = scatter_rows(weights.weigh(result), index.queries).to(result.dtype)
        out = to_canvas(out, batch, self.out_projection.in_features)
        if bias_weight is not None:
            bias_weight = gather_rows(bias_weight[:, None], index.query_rows)[:, 0]
        out = output_projection(self.out_projection, out, bias_weight)
        return to_canvas(scatter_rows(to_rows(out), index.query_rows), batch, width)


@dataclass(frozen=True, eq=False)
class QueryGroup:
    """``sets`` attention sets with n queries each, the first at entry ``start`` of the query map; ``memory`` maps key
    sets of the memory group to them."""

    sets: int
    n: int
    start: int
    memory: IndexMap


@dataclass(frozen=True, eq=False)
class MemoryGroup:
    """``sets`` key sets of m keys each, the first at entry ``start`` of the key map.

    Attributes:
        longest: the most queries that an attention set over one of them has, at most m.
        parts: the attention sets over them, grouped by number of queries.
    """

    sets: int
    m: int
    start: int
    longest: int
    parts: tuple[QueryGroup, ...]


@dataclass(frozen=True, eq=False)
class SharedMemories:
    """A plan's attention sets grouped by the length of their key sets.

    Attributes:
        groups: by m; their parts by n; attention sets are in that order.
        key_rows: map from packed rows to the distinct rows that are keys.
        keys: map from those to the K keys of all key sets.
        query_rows, queries: the same for the S queries.
        query_index: index of the queries.
    """

    groups: tuple[MemoryGroup, ...]
    key_rows: IndexMap
    keys: IndexMap
    query_rows: IndexMap
    queries: IndexMap
    query_index: QueryIndex


def shared_memories(plan: AttentionPlan) -> SharedMemories:
    """Returns the memories of a plan, cached on it. Sets whose queries attend to different keys are split."""
    if "shared memories" not in plan.index_sets:
        sets = plan.uniform_row_sets()
        n = sets.lengths(sets.queries)
        used = np.unique(sets.keys)
        used = used[np.argsort(sets.lengths(used), kind="stable")]
        rank = np.empty(len(sets.ptr) - 1, np.int64)
        rank[used] = np.arange(len(used))
        key_set_of = rank[sets.keys]
        order = np.lexsort((key_set_of, n, sets.lengths(sets.keys)))
        number, q_rows = sets.rows_of(sets.queries[order])
        _, k_rows = sets.rows_of(used)
        plan.index_sets["shared memories"] = SharedMemories(
            _groups(sets.lengths(used), n[order], key_set_of[order]),
            *_distinct(k_rows, plan.n_packed),
            *_distinct(q_rows, plan.n_packed),
            query_index(plan, sets, order[number], q_rows, number),
        )
    return plan.index_sets["shared memories"]


def _groups(m: np.ndarray, n: np.ndarray, key_set_of: np.ndarray) -> tuple[MemoryGroup, ...]:
    """Groups key sets of ascending lengths m, and sets of n queries over ``key_set_of`` in order of (m, n)."""
    k_start, q_start = np.cumsum(m) - m, np.cumsum(n) - n
    set_m = m[key_set_of]
    groups = []
    for length in np.unique(m):
        first, stop = np.searchsorted(m, [length, length + 1])
        low, high = np.searchsorted(set_m, [length, length + 1])
        parts = []
        for size in np.unique(n[low:high]):
            begin, end = low + np.searchsorted(n[low:high], [size, size + 1])
            memory = IndexMap.gather(key_set_of[begin:end] - first, int(stop - first))
            parts.append(QueryGroup(int(end - begin), int(size), int(q_start[begin]), memory))
        longest = min(int(length), parts[-1].n)
        groups.append(MemoryGroup(int(stop - first), int(length), int(k_start[first]), longest, tuple(parts)))
    return tuple(groups)


def _distinct(rows: np.ndarray, size: int) -> tuple[IndexMap, IndexMap]:
    """Returns maps from ``size`` rows to the distinct ones among ``rows``, and from these to ``rows``."""
    distinct, number = np.unique(rows, return_inverse=True)
    return IndexMap.gather(distinct, size), IndexMap.gather(number.reshape(-1), len(distinct))
