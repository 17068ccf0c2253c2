"""The tables of one shard of rows, and which rows its ranks exchange."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from canvas_kernels.block_table import BlockTable
from canvas_kernels.packing import IndexMap

from ..plan.index_sets import uniform_row_sets
from .needs import Needs

if TYPE_CHECKING:
    from ..plan.plan import AttentionPlan


@dataclass(frozen=True, eq=False)
class Exchange:
    """Rows that a rank sends to the others and gets from them.

    A rank gets one of its own rows too, if it has any: compilers leave out an exchange of which a rank gets nothing.

    Attributes:
        rows: map from the rows that the rank holds to those that it sends, by rank.
        send, receive: numbers of rows to and from each rank.
        packed: int64, the packed row of each one that it gets; −1 for its own.
    """

    rows: IndexMap
    send: list[int]
    receive: list[int]
    packed: np.ndarray


@dataclass(frozen=True, eq=False)
class Travel:
    """The queries that travel to and from a shard.

    Attributes:
        there: queries to the owners of their keys.
        table: of the queries that are here, own and foreign, over own keys.
        inputs: map from the rows held and then those that came to the rows of ``table``.
        back: map from the rows of ``table`` and one of zeros to those that came, in their order.
        own: map from the same to own queries that travel.
        results: number of results of each of these, at most.
        merge: map from own results, returned ones and one of nothing to ``results`` for each of these queries.
        targets: map from the rows held and then these queries to the rows held.
    """

    there: Exchange
    table: BlockTable
    inputs: IndexMap
    back: IndexMap
    own: IndexMap
    results: int
    merge: IndexMap
    targets: IndexMap


@dataclass(frozen=True, eq=False)
class RankPlan:
    """The work of the ranks of one shard of rows.

    Attributes:
        queries: int64, the packed rows of own queries, those aside that travel, ascending.
        pull: keys and values from other shards; None for a single shard.
        table: of own queries, those aside that travel, over own and pulled rows.
        inputs: map from the rows held and then those pulled to the rows of ``table``.
        packed: map from the packed rows of the whole plan to those of ``table``.
        travel: the queries that travel; None if none does.
    """

    queries: np.ndarray
    pull: Exchange | None
    table: BlockTable
    inputs: IndexMap
    packed: IndexMap
    travel: Travel | None


def rank_plan(
    plan: AttentionPlan, shard: int, shards: int, positions: np.ndarray, pulls: Needs, visits: Needs
) -> RankPlan:
    """Returns the plan of one shard.

    Args:
        plan: the whole plan.
        shard: the number of this shard.
        shards: their number.
        positions: int64, the positions that its ranks hold, in order.
        pulls, visits: of all shards.
    """
    packed_of = np.full(plan.n_positions, -1, np.int64)
    packed_of[plan.order] = np.arange(plan.n_packed)
    held = packed_of[positions]
    own = np.sort(held[held >= 0])
    pull = _exchange(pulls, shard, shards, held) if shards > 1 else None
    rows = held if pull is None else np.concatenate([held, pull.packed])
    travelling = np.unique(visits.rows_of(np.ones(len(visits.start), bool)))
    queries = np.setdiff1d(own, travelling)
    used = np.unique(rows[rows >= 0])
    return RankPlan(
        queries,
        pull,
        plan.table.subtable(queries, used),
        IndexMap.gather(_index_of(rows, used), len(rows)),
        IndexMap.gather(used, plan.n_packed),
        _travel(plan, shard, shards, held, own, visits) if len(travelling) else None,
    )


def own_plan(plan: AttentionPlan, rank: RankPlan) -> AttentionPlan:
    """Returns a plan in edge form, of the whole canvas or of one of its functions, for the queries of one shard.

    Its positions are the rows held and then those pulled. Only its tables and its lists of rows may be used: its
    attention sets are those of the whole plan.
    """
    table = plan.table.subtable(rank.queries, rank.packed.index)
    packed = dataclasses.replace(plan.packed, order=rank.inputs.index)
    own = dataclasses.replace(plan, n_positions=rank.inputs.n_in, table=table, packed=packed, by_fn={}, pairs=None)
    # sets of single queries' own keys, as masks of pairs have them
    own.index_sets["row sets"] = own.index_sets["uniform row sets"] = uniform_row_sets(table)
    return own


def _index_of(rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Returns the first index in ``rows`` of each wanted row."""
    order = np.argsort(rows, kind="stable")
    return order[np.searchsorted(rows[order], wanted)]


def _exchange(moved: Needs, shard: int, shards: int, held: np.ndarray) -> Exchange:
    """Returns the exchange of a shard, whose ranks hold these packed rows."""
    foreign = moved.target != moved.source
    sent, got = ((side == shard) & foreign for side in (moved.source, moved.target))
    counts = np.zeros((shards, shards), np.int64)
    np.add.at(counts, (moved.target[foreign], moved.source[foreign]), (moved.stop - moved.start)[foreign])
    send, receive = counts[:, shard].copy(), counts[shard].copy()
    itself = min(len(held), 1)
    before, behind = int(send[:shard].sum()), int(receive[:shard].sum())
    send[shard] = receive[shard] = itself
    rows = np.insert(_index_of(held, moved.rows_of(sent)), [before] * itself, 0)
    packed = np.insert(moved.rows_of(got), [behind] * itself, -1)
    return Exchange(IndexMap.gather(rows, len(held)), send.tolist(), receive.tolist(), packed)


def _travel(plan: AttentionPlan, shard: int, shards: int, held, own: np.ndarray, visits: Needs) -> Travel:
    there = _exchange(visits, shard, shards, held)
    here = np.unique(visits.rows_of(visits.target == shard))
    used = np.union1d(here, own)
    rows = np.concatenate([held, there.packed])
    leaving = np.unique(visits.rows_of(visits.source == shard))
    # results of own queries: own ones, then those from each rank, in the order in which they left
    left = held[there.rows.index]
    own_row = slice(sum(there.send[:shard]), sum(there.send[: shard + 1]))
    left[own_row] = -1
    result_of = np.concatenate([leaving, left])
    order = np.argsort(result_of, kind="stable")
    order = order[result_of[order] >= 0]
    first = np.searchsorted(result_of[order], leaving)
    number = np.arange(len(order)) - np.repeat(first, np.diff(np.append(first, len(order))))
    results = int(number.max(initial=0)) + 1
    nothing = len(result_of)
    merge = np.full((results, len(leaving)), nothing)
    merge[number, np.searchsorted(leaving, result_of[order])] = order
    # the own row that came back, so that something depends on the exchange where nothing travels
    extra = np.full((results, own_row.stop - own_row.start), nothing)
    extra[:1] = len(leaving) + own_row.start
    merge = np.concatenate([merge, extra], 1)
    target = np.arange(len(held))
    target[_index_of(held, leaving)] = len(held) + np.arange(len(leaving))
    back = np.where(there.packed < 0, len(used), np.searchsorted(used, there.packed))
    return Travel(
        there,
        plan.table.subtable(here, own),
        IndexMap.gather(_index_of(rows, used), len(rows)),
        IndexMap.gather(back, len(used) + 1),
        IndexMap.gather(np.searchsorted(used, leaving), len(used) + 1),
        results,
        IndexMap.gather(merge.reshape(-1), nothing + 1),
        IndexMap.gather(target, len(held) + merge.shape[1]),
    )
