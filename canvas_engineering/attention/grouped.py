"""Reads of equal shape in one call: how any module of forward(queries, keys, values) runs in a dispatcher."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from canvas_kernels.gathers import RowMap, gather_rows, sum_rows

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
class ReadGroups:
    """The reads of a plan in groups of equal shape, as index tensors of one device.

    Attributes:
        groups: by (n, m).
        queries, keys: RowMaps of S query places and K key places over the plan's packed rows, group after group.
        weight: (S,) float32, the weight of each query place's read.
        scale_row: int64 (S,), where ``row_scale.view(-1)`` holds the place's factor.
        connections: RowMap of the S query places over connections.
    """

    groups: tuple[ReadGroup, ...]
    queries: RowMap
    keys: RowMap
    weight: torch.Tensor
    scale_row: torch.Tensor
    connections: RowMap


def read_groups(plan: AttentionPlan, device: torch.device | str = "cpu") -> ReadGroups:
    """The groups of a plan's reads, made once per plan and device.

    Raises:
        ValueError: a read whose queries see different keys.
    """
    key = ("read groups", str(device))
    if key not in plan.cache:
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
        _, k_rows = sets.rows_of(sets.keys[order])
        plan.cache[key] = ReadGroups(
            groups,
            RowMap.of(q_rows, plan.n_packed, device),
            RowMap.of(k_rows, plan.n_packed, device),
            *query_places(plan, sets, order[place], q_rows, device),
        )
    return plan.cache[key]


def query_places(plan: AttentionPlan, sets, read: np.ndarray, row: np.ndarray, device):
    """``(weight, scale_row, connections)`` as in :class:`ReadGroups`, of places of ``read`` at packed ``row``."""
    connection = sets.connection[read]
    weight = torch.from_numpy(sets.weight[read].astype(np.float32)).to(device)
    scale_row = torch.from_numpy(plan.replace[connection] * plan.n_packed + row).to(device)
    return weight, scale_row, RowMap.of(connection, plan.n_connections, device)


def coefficients(
    places, plan: AttentionPlan, gain: torch.Tensor | None, active: torch.Tensor | None, row_scale: torch.Tensor | None
) -> torch.Tensor:
    """(S, 1) float32: w_r · gain · active · row_scale at every query place; differentiable in ``gain`` (connections,).

    ``places`` has ``weight``, ``scale_row`` and ``connections`` as :class:`ReadGroups` has. ``active`` (connections,)
    and ``row_scale`` (2, n) as for :func:`canvas_attention`, and with its defaults.
    """
    if row_scale is None:
        row_scale = plan.table.row_scale(active, places.weight.device)
    factor = (places.weight * row_scale.reshape(-1).index_select(0, places.scale_row))[:, None]
    if active is not None:
        factor = factor * active.to(factor.dtype)[places.connections.index, None]
    if gain is not None:
        factor = factor * gather_rows(gain.to(factor.dtype)[:, None], places.connections)
    return factor


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
    found = read_groups(plan, x.device)
    flat = rows_of(x)
    q_all, k_all = gather_rows(flat, found.queries), gather_rows(flat, found.keys)
    pieces = []
    for group in found.groups:
        queries = to_reads(q_all[group.q_start : group.q_start + group.reads * group.n], group.reads, batch)
        keys = to_reads(k_all[group.k_start : group.k_start + group.reads * group.m], group.reads, batch)
        out = module(queries, keys, keys)
        if not isinstance(out, torch.Tensor) or out.shape != queries.shape:
            given = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise ValueError(
                f"{type(module).__name__} gave {given} for queries {tuple(queries.shape)} and keys "
                f"{tuple(keys.shape)}: an attention function gives one row for each query"
            )
        pieces.append(from_reads(out, group.reads, batch))
    results = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
    results = results * coefficients(found, plan, gain, active, row_scale)
    return sum_rows(results, found.queries).unflatten(1, (batch, width)).transpose(0, 1)


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """x (B, n, d) as rows (n, B·d): a view for one canvas."""
    return x.transpose(0, 1).flatten(1)


def to_reads(rows: torch.Tensor, reads: int, batch: int) -> torch.Tensor:
    """Gathered rows (G·n, B·d) as (G·B, n, d): a view for one canvas."""
    return rows.unflatten(1, (batch, -1)).unflatten(0, (reads, -1)).transpose(1, 2).flatten(0, 1)


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
            if connection.mask is None or connection.mask.kind != "sparse":
                continue
            shapes = (layout.region_size(name) for name in (connection.src, connection.dst))
            if pattern_cover(connection.mask, *shapes).pair:
                raise ValueError(
                    f"connection {number}, {connection.src!r} reads {connection.dst!r} by {fn!r}, which gives all "
                    "queries of a read the same keys: a mask of (query, key) pairs needs a function that weighs each "
                    "pair by itself, such as cross_attention"
                )
    if fused and hasattr(module, "refine"):
        plan = module.refine(plan)
    prepare(module, plan)
    return plan


def prepare(module: nn.Module, plan: AttentionPlan, device: torch.device | str = "cpu") -> None:
    """Makes what running ``plan`` needs on ``device`` ahead of the first step: a fused class by its own
    ``prepare(plan, device)``, where it has one."""
    if not is_fused(type(module)):
        read_groups(plan, device)
    elif hasattr(module, "prepare"):
        module.prepare(plan, device)
