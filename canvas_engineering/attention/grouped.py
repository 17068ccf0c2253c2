"""Reads of equal shape in one call: how any module of forward(queries, keys, values) runs in a dispatcher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from canvas_kernels.derived import is_plain
from canvas_kernels.packing import IndexMap, gather_rows, scatter_rows

from ..canvas import CanvasLayout
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
