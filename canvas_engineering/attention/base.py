"""Reads of equal shape in one call: how any module of forward(queries, keys, values) runs in a dispatcher."""

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

# what plain torch modules run under; "triton" is asked of functions that have kernels
PLAIN_BACKENDS = ("auto", "torch", "reference")


@dataclass(frozen=True, eq=False)
class ReadGroup:
    """G reads with n queries and m keys each.

    Their rows stand one read after another in the places ``[q_start, q_start + G·n)`` of the query map and
    ``[k_start, k_start + G·m)`` of the key map.
    """

    reads: int
    n: int
    m: int
    q_start: int
    k_start: int


@dataclass(frozen=True, eq=False)
class QueryPlaces:
    """Where queries of reads stand: maps to S query places.

    Attributes:
        scale: takes entries of the flattened row_scale (2 · n), times the weight of each place's read.
        connections: takes connections.
        reads: takes reads.
        partial: whether some places weigh nothing.
    """

    scale: IndexMap
    connections: IndexMap
    reads: IndexMap
    partial: bool


def query_places(
    plan: AttentionPlan, sets, read: np.ndarray, row: np.ndarray, number: np.ndarray, weight: np.ndarray | None = None
) -> QueryPlaces:
    """Returns the places of ``read`` (numbers in ``sets``) at packed ``row``; reads are numbered anew by ``number``,
    and weigh what ``sets`` says unless ``weight`` is given."""
    connection = sets.connection[read]
    entry = plan.replace[connection] * plan.n_packed + row
    weight = sets.weight[read] if weight is None else weight
    return QueryPlaces(
        IndexMap.sums(entry, np.arange(len(entry) + 1), 2 * plan.n_packed, weight),
        IndexMap.gather(connection, plan.n_connections),
        IndexMap.gather(number, int(number.max()) + 1 if len(number) else 0),
        bool((weight == 0).any()),
    )


class Coefficients(NamedTuple):
    """``factor`` (S, 1) of every query place; ``live`` bool (S, 1), those that count, and ``live_reads`` bool (reads,
    1), those of which some place does; None where all do."""

    factor: torch.Tensor
    live: torch.Tensor | None
    live_reads: torch.Tensor | None

    def weigh(self, results: torch.Tensor) -> torch.Tensor:
        """``results`` (S, …) times their factors; 0 where they do not count, whatever they are."""
        return only(results * self.factor, self.live)


def only(x: torch.Tensor, live: torch.Tensor | None) -> torch.Tensor:
    """x (S, …) where it is ``live`` (S, 1), else 0: what is not finite there reaches neither results nor gradients."""
    return x if live is None else torch.where(live, x, x.new_zeros(()))


def coefficients(
    places: QueryPlaces,
    plan: AttentionPlan,
    x: torch.Tensor,
    gain: torch.Tensor | None,
    active: torch.Tensor | None,
    row_scale: torch.Tensor | None,
) -> Coefficients:
    """Returns w_r · gain · active · row_scale at every query place, in float32 or, for such ``x``, float64.

    ``active`` (connections,) and ``row_scale`` (2, n) as for :func:`canvas_attention`, and with its defaults; the
    result is differentiable in ``gain`` (connections,).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    everything = active is None and row_scale is None and not (plan.replaces or places.partial)
    if row_scale is None:
        row_scale = plan.row_scale(active, dtype, x.device)
    factor = gather_rows(row_scale.detach().to(dtype).reshape(-1, 1), places.scale)
    if active is not None:
        factor = factor * gather_rows((active.detach() != 0).to(dtype)[:, None], places.connections)
    live = live_reads = None
    if not everything:
        live = factor != 0
        live_reads = scatter_rows(live.to(dtype), places.reads) > 0
    if gain is not None:
        factor = factor * gather_rows(gain.to(dtype)[:, None], places.connections)
    return Coefficients(factor, live, live_reads)


@dataclass(frozen=True, eq=False)
class ReadGroups:
    """The reads of a plan in groups of equal shape.

    Attributes:
        groups: by (n, m).
        queries, keys: maps to S query places and K key places from the plan's packed rows, group after group.
        places: of the queries.
        key_reads: takes the reads that the key places belong to.
    """

    groups: tuple[ReadGroup, ...]
    queries: IndexMap
    keys: IndexMap
    places: QueryPlaces
    key_reads: IndexMap


def read_groups(plan: AttentionPlan) -> ReadGroups:
    """Returns the groups of a plan's reads, made once per plan.

    Raises:
        ValueError: a read whose queries attend to different keys.
    """
    if "read groups" not in plan.index_sets:
        sets = plan.sets()
        n, m = sets.lengths(sets.queries), sets.lengths(sets.keys)
        order = np.lexsort((np.arange(len(n)), m, n))
        n, m = n[order], m[order]
        fresh = np.ones(len(n), bool)
        fresh[1:] = (n[1:] != n[:-1]) | (m[1:] != m[:-1])
        first = fresh.nonzero()[0]
        stop = np.append(first[1:], len(n))
        q_start, k_start = np.cumsum(n) - n, np.cumsum(m) - m
        shapes = (stop - first, n[first], m[first], q_start[first], k_start[first])
        groups = tuple(ReadGroup(*numbers) for numbers in zip(*(a.tolist() for a in shapes)))
        place, q_rows = sets.rows_of(sets.queries[order])
        key_place, k_rows = sets.rows_of(sets.keys[order])
        plan.index_sets["read groups"] = ReadGroups(
            groups,
            IndexMap.gather(q_rows, plan.n_packed),
            IndexMap.gather(k_rows, plan.n_packed),
            query_places(plan, sets, order[place], q_rows, place),
            IndexMap.gather(key_place, len(order)),
        )
    return plan.index_sets["read groups"]


def attend_grouped(
    module: nn.Module,
    x: torch.Tensor,
    plan: AttentionPlan,
    *,
    gain: torch.Tensor | None = None,
    active: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Every read of ``plan`` through ``module(queries, keys, values)``, one call for all reads of a shape.

    Args:
        module: gets queries (G·B, n, d_model) and, as keys and as values, (G·B, m, d_model), rows in canvas order; must
            give (G·B, n, d_model), each batch entry by itself.
        x: (B, rows, d_model), the canvas in the plan's packed order.
        gain, active, row_scale: as for :func:`canvas_attention`.

    Returns:
        (B, rows, d_model): the weighted sums of the reads' outputs; 0 where nothing is read.

    Raises:
        ValueError: an output of another shape, with the shapes; a read whose queries see different keys.
    """
    batch, _, width = x.shape
    found = read_groups(plan)
    flat, weights = rows_of(x), coefficients(found.places, plan, x, gain, active, row_scale)
    q_all, k_all = only(gather_rows(flat, found.queries), weights.live), gather_rows(flat, found.keys)
    if weights.live_reads is not None:
        k_all = only(k_all, gather_rows(weights.live_reads.to(x.dtype), found.key_reads) > 0)
    pieces = []
    for group in found.groups:
        queries = to_reads(q_all[group.q_start : group.q_start + group.reads * group.n], group.reads, batch, width)
        keys = to_reads(k_all[group.k_start : group.k_start + group.reads * group.m], group.reads, batch, width)
        out = module(queries, keys, keys)
        if not isinstance(out, torch.Tensor) or out.shape != queries.shape:
            given = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise ValueError(
                f"{type(module).__name__} gave {given} for queries {tuple(queries.shape)} and keys "
                f"{tuple(keys.shape)}: an attention function gives one row for each query"
            )
        pieces.append(from_reads(out, group.reads, batch))
    results = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
    return canvas_of(scatter_rows(weights.weigh(results), found.queries), batch, width)


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """x (B, n, d) as rows (n, B·d): a view for one canvas."""
    return x.transpose(0, 1).flatten(1)


def canvas_of(rows: torch.Tensor, batch: int, width: int) -> torch.Tensor:
    """Rows (n, B·d) as (B, n, d), d being ``width``: the inverse of :func:`rows_of`."""
    return rows.unflatten(1, (batch, width)).transpose(0, 1)


def to_reads(rows: torch.Tensor, reads: int, batch: int, width: int) -> torch.Tensor:
    """Gathered rows (G·n, B·d) as (G·B, n, d), d being ``width``: a view for one canvas."""
    found = rows.unflatten(1, (batch, width)).unflatten(0, (reads, -1)).transpose(1, 2).flatten(0, 1)
    # exported graphs would hold to a relation of batch sizes and flattened strides
    return found if is_plain(found) else found.clone(memory_format=torch.contiguous_format)


def from_reads(out: torch.Tensor, reads: int, batch: int) -> torch.Tensor:
    """(G·B, n, d) as rows (G·n, B·d): the inverse of :func:`to_reads`."""
    return out.unflatten(0, (reads, batch)).transpose(1, 2).flatten(0, 1).flatten(1)


def project_out(
    out_proj: nn.Linear, out: torch.Tensor, bias_share: torch.Tensor | None, factor: torch.Tensor | None = None
) -> torch.Tensor:
    """``factor`` (a scalar tensor, or None for 1) times ``out_proj`` after the weighted sum over reads: ``out`` (B, n,
    d) or (B, heads, n, head_dim), with ``bias_share`` (n,) of its bias for each row, or all of it for None."""
    weight, bias = out_proj.weight, out_proj.bias
    if factor is not None:
        # on d² numbers rather than on all rows
        weight, bias = factor * weight, factor * bias
    if out.dim() == 4:
        out = out.transpose(1, 2).flatten(2)
    if bias_share is None:
        return F.linear(out, weight, bias)
    out = F.linear(out, weight)
    return out + bias_share[:, None].to(out.dtype) * bias


# -- what a module says of itself --------------------------------------------------------------------------------------


def is_fused(cls: type) -> bool:
    """Whether the class runs a whole plan by its own ``attend``. A subclass that overrides ``forward`` alone does not:
    its ``forward`` is what was asked for, not the ``attend`` that it inherits."""
    for base in cls.__mro__:
        if "attend" in vars(base):
            return True
        if "forward" in vars(base):
            return False
    return False


def fit(fn: str, module: nn.Module, plan: AttentionPlan, layout: CanvasLayout, backend: str) -> AttentionPlan:
    """Checks that ``module``, the function ``fn`` of a dispatcher, can run the reads of ``plan``, prepares it, and
    gives the plan that it runs.

    A fused class says by ``backends`` under which it runs, and by ``takes_pairs`` that the queries of one read may see
    different keys. With ``refine(plan)`` it leaves out queries of reads, whose weights then do not count.

    Raises:
        ValueError: a backend that does not run it, or a mask of (query, key) pairs on a function that wants equal keys
            for all queries of a read; both with what would do.
    """
    fused = is_fused(type(module))
    backends = getattr(module, "backends", PLAIN_BACKENDS) if fused else PLAIN_BACKENDS
    if backend not in backends:
        raise ValueError(
            f"backend {backend!r} does not run {fn!r}: {', '.join(backends)} do, and 'auto' takes Triton for the "
            "functions that have kernels"
        )
    if not (fused and getattr(module, "takes_pairs", False)):
        for number in np.unique(plan.reads.connection).tolist():
            connection = plan.connections[number]
            if connection.mask is None or connection.mask.effective_kind != "sparse":
                continue
            shapes = (layout.region_size(name) for name in (connection.src, connection.dst))
            if pattern_cover(connection.mask, *shapes).pair:
                raise ValueError(
                    f"connection {number}, {connection.src!r} reads {connection.dst!r} by {fn!r}, which gives all "
                    "queries of a read the same keys: a mask of (query, key) pairs needs a function that weighs each "
                    "pair by itself, such as cross_attention"
                )
    refine = getattr(module, "refine", None)
    if fused and refine is not None:
        plan = refine(plan)
    prepare(module, plan)
    return plan


def prepare(module: nn.Module, plan: AttentionPlan) -> None:
    """Makes the index sets that running ``plan`` needs ahead of the first step: a fused class by its own
    ``prepare(plan)``, where it has one."""
    own_prepare = getattr(module, "prepare", None)
    if not is_fused(type(module)):
        read_groups(plan)
    elif own_prepare is not None:
        own_prepare(plan)


# -- memories ----------------------------------------------------------------------------------------------------------


class MemoryAttention(CanvasModule):
    """out_projection(respond(query_features(x_q), summarise(key_features(x_k)))), the four of a subclass's own.

    What depends on one position alone (the features) is computed once per position, whatever number of reads hold it;
    ``summarise`` once for each distinct set of keys; the output projection once per position, after the weighted sum.

    Class attributes:
        takes_pairs: each query is served by itself and the order of keys does not count, so that masks of (query, key)
            pairs may split a read into smaller ones.
        causal: query i reads the first i + 1 rows of the memory at most, and these depend on as many keys.
    """

    takes_pairs = False
    causal = False
    out_proj: nn.Linear

    def __init__(self) -> None:
        super().__init__()
        # of scans that run without a plan
        mark_for_compilers()

    def key_features(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """(…, d_model), twice → (…, F), position by position."""
        raise NotImplementedError

    def summarise(self, features: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        """The features of a read's keys, (B, m, F) → its memory (B, rows, M). ``backend`` as for
        :func:`canvas_attention`."""
        raise NotImplementedError

    def query_features(self, queries: torch.Tensor) -> torch.Tensor:
        """(…, d_model) → (…, Q), position by position."""
        raise NotImplementedError

    def respond(self, features: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """The features of a read's queries, (B, n, Q), and its memory → (B, n, d_model)."""
        raise NotImplementedError

    @property
    def out_projection(self) -> nn.Linear:
        """The last layer."""
        return self.out_proj

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """One read: queries (B, n, d_model) over keys and values (B, m, d_model), in order → (B, n, d_model)."""
        checked_read(queries, keys, values)
        if self.causal:
            keys, values = keys[:, : queries.shape[1]], values[:, : queries.shape[1]]
        memory = self.summarise(self.key_features(keys, values))
        return self.out_projection(self.respond(self.query_features(queries), memory))

    def prepare(self, plan: AttentionPlan) -> None:
        """Makes the index sets of ``plan``."""
        shared_memories(plan)

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
        """Every read of ``plan``, one call for all memories of a length and one for all reads of a shape; arguments and
        result as for :meth:`CrossAttention.attend`."""
        found = shared_memories(plan)
        weights = coefficients(found.places, plan, x, gain, active, row_scale)
        (batch, _, width), rows = x.shape, rows_of(x)
        own = gather_rows(rows, found.key_rows).unflatten(1, (batch, width))
        key_features = self.key_features(own, own)
        keys = gather_rows(key_features.flatten(1), found.keys)
        own = gather_rows(rows, found.query_rows).unflatten(1, (batch, width))
        query_features = self.query_features(own)
        queries = only(gather_rows(query_features.flatten(1), found.queries), weights.live)
        pieces, first_read = [], 0
        for group in found.groups:
            features = keys[group.start : group.start + group.sets * group.m]
            features = to_reads(features, group.sets, batch, key_features.shape[2])
            memory = self.summarise(features[:, : group.longest] if self.causal else features, backend)
            shape = memory.shape[1:]
            memory = memory.unflatten(0, (group.sets, batch)).flatten(1)  # [sets, B · rows · M]
            for part in group.parts:
                taken = gather_rows(memory, part.of)
                if weights.live_reads is not None:
                    taken = only(taken, weights.live_reads[first_read : first_read + part.reads])
                first_read += part.reads
                taken = taken.reshape(part.reads * batch, *shape)
                asking = queries[part.start : part.start + part.reads * part.n]
                asking = to_reads(asking, part.reads, batch, query_features.shape[2])
                pieces.append(from_reads(self.respond(asking, taken), part.reads, batch))
        results = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        out = scatter_rows(weights.weigh(results), found.queries).to(results.dtype)
        out = canvas_of(out, batch, self.out_projection.in_features)
        if bias_share is not None:
            bias_share = gather_rows(bias_share[:, None], found.query_rows)[:, 0]
        out = project_out(self.out_projection, out, bias_share)
        return canvas_of(scatter_rows(rows_of(out), found.query_rows), batch, width)


@dataclass(frozen=True, eq=False)
class Part:
    """``reads`` reads with n queries each: their query places from ``start`` on, and ``of``, the key set of each within
    its group."""

    reads: int
    n: int
    start: int
    of: IndexMap


@dataclass(frozen=True, eq=False)
class MemoryGroup:
    """``sets`` key sets of m keys each: their key places from ``start`` on, the reads that want them, and the most
    queries that one of those has, or m if that is fewer."""

    sets: int
    m: int
    start: int
    longest: int
    parts: tuple[Part, ...]


@dataclass(frozen=True, eq=False)
class SharedMemories:
    """A plan's reads by the sets of their keys, and those by length.

    Attributes:
        groups: by m; their parts by n; reads stand in that order.
        key_rows: takes the distinct packed rows that are keys.
        keys: takes those to the K key places.
        query_rows, queries: the same of the S query places.
        places: of the queries.
    """

    groups: tuple[MemoryGroup, ...]
    key_rows: IndexMap
    keys: IndexMap
    query_rows: IndexMap
    queries: IndexMap
    places: QueryPlaces


def shared_memories(plan: AttentionPlan) -> SharedMemories:
    """Made once per plan. Reads whose queries attend to different keys are split into such as attend to the same."""
    if "shared memories" not in plan.index_sets:
        sets = plan.row_sets()
        n = sets.lengths(sets.queries)
        used = np.unique(sets.keys)
        used = used[np.argsort(sets.lengths(used), kind="stable")]
        number = np.empty(len(sets.ptr) - 1, np.int64)
        number[used] = np.arange(len(used))
        read_set = number[sets.keys]
        order = np.lexsort((read_set, n, sets.lengths(sets.keys)))
        place, q_rows = sets.rows_of(sets.queries[order])
        _, k_rows = sets.rows_of(used)
        plan.index_sets["shared memories"] = SharedMemories(
            _groups(sets.lengths(used), n[order], read_set[order]),
            *_distinct(k_rows, plan.n_packed),
            *_distinct(q_rows, plan.n_packed),
            query_places(plan, sets, order[place], q_rows, place),
        )
    return plan.index_sets["shared memories"]


def _groups(m: np.ndarray, n: np.ndarray, read_set: np.ndarray) -> tuple[MemoryGroup, ...]:
    """From the ascending lengths m of key sets, and of each read its length and its set, reads in order of (m, n)."""
    k_start, q_start = np.cumsum(m) - m, np.cumsum(n) - n
    read_m = m[read_set]
    groups = []
    for length in np.unique(m):
        first, stop = np.searchsorted(m, [length, length + 1])
        low, high = np.searchsorted(read_m, [length, length + 1])
        parts = []
        for size in np.unique(n[low:high]):
            begin, end = low + np.searchsorted(n[low:high], [size, size + 1])
            of = IndexMap.gather(read_set[begin:end] - first, int(stop - first))
            parts.append(Part(int(end - begin), int(size), int(q_start[begin]), of))
        longest = min(int(length), parts[-1].n)
        groups.append(MemoryGroup(int(stop - first), int(length), int(k_start[first]), longest, tuple(parts)))
    return tuple(groups)


def _distinct(rows: np.ndarray, size: int) -> tuple[IndexMap, IndexMap]:
    """The distinct rows among ``size``, and where each of ``rows`` stands among them."""
    found, place = np.unique(rows, return_inverse=True)
    return IndexMap.gather(found, size), IndexMap.gather(place.reshape(-1), len(found))


# -- shared sets of keys -----------------------------------------------------------------------------------------------


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
