"""Simulated costs of a plan over many ranks: bytes, load and local pairs of every choice of rows × heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .needs import local_pairs, pairs_of_rows
from .shards import ShardedPlan

if TYPE_CHECKING:
    from ..plan.plan import AttentionPlan

# Ranks whose numbers of heads differ by more than this share of the mean are no choice.
MAX_UNEVEN_HEADS = 0.07


@dataclass(frozen=True)
class Model:
    """The sizes of one attention layer.

    Attributes:
        heads, head_dim: of q, k and v; their product is the model's width.
        itemsize: bytes of an element.
        batch: batch entries.
    """

    heads: int
    head_dim: int
    itemsize: int
    batch: int = 1

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


@dataclass(frozen=True)
class RankCosts:
    """The costs of a sharded plan in one layer's forward; its backward moves as many bytes.

    Attributes:
        rows, heads: ranks along either dimension.
        pulled, travelled, exchanged: bytes that each rank gets, float64 [ranks]: keys and values, travelling queries
            and their results, rows for heads.
        remote: float64 [ranks], those of them that come from other nodes.
        rows_balance, pairs_balance, load: largest over mean of rows, of pairs, and of 24 · width² operations a row
            with 4 · width a pair.
        local: share of the pairs whose query and key have one owner.
    """

    rows: int
    heads: int
    pulled: np.ndarray
    travelled: np.ndarray
    exchanged: np.ndarray
    remote: np.ndarray
    rows_balance: float
    pairs_balance: float
    load: float
    local: float

    @property
    def received(self) -> np.ndarray:
        """Bytes that each rank gets, float64 [ranks]."""
        return self.pulled + self.travelled + self.exchanged


def rank_costs(sharded: ShardedPlan, model: Model, node: int) -> RankCosts:
    """Returns the costs of a sharded plan, ranks being numbered row · heads + head, ``node`` of them on a node."""
    shards, heads, table = sharded.rows, sharded.heads, sharded.plan.table
    vector = model.batch * model.head_dim * model.itemsize
    own_heads = model.heads / heads
    foreign = 1 - np.eye(shards)
    pulled = sharded.pulls().counts(shards) * foreign * 2 * own_heads * vector
    visits = sharded.visits().counts(shards) * foreign
    # results travel with a log-sum-exp, and as float32 at least
    result = model.batch * (model.head_dim + 1) * max(model.itemsize, 4)
    travelled = (visits * vector + visits.T * result) * own_heads
    counts = np.array([[len(positions) for positions in own] for own in sharded.owned], float)
    others = counts[:, :, None] * (1 - np.eye(heads)) * vector
    # q, k and v of others' rows for own heads, results of own rows for others' heads: [row, to, from]
    exchanged = others.transpose(0, 2, 1) * 3 * own_heads + others * own_heads
    home = np.arange(shards * heads).reshape(shards, heads) // node
    far_rows = (home[:, None] != home[None]).astype(float)  # [row, other row, head]
    far_heads = (home[:, :, None] != home[:, None]).astype(float)
    remote = np.einsum("st,sth->sh", pulled + travelled, far_rows) + (exchanged * far_heads).sum(2)
    owners = sharded.owners()
    pairs = np.zeros(shards)
    by_row = np.append(0, np.cumsum(pairs_of_rows(table, sharded.travels)))
    np.add.at(pairs, owners.shard, by_row[owners.stop] - by_row[owners.start])
    rows = counts.sum(1)
    loads = (24 * model.width**2 * rows + 4 * model.width * pairs, rows, pairs)
    load, rows_balance, pairs_balance = (float(x.max() / max(x.mean(), 1e-30)) for x in loads)
    every = np.ones(heads)
    return RankCosts(
        shards,
        heads,
        np.outer(pulled.sum(1), every).ravel(),
        np.outer(travelled.sum(1), every).ravel(),
        exchanged.sum(2).ravel(),
        remote.ravel(),
        rows_balance,
        pairs_balance,
        load,
        local_pairs(table, owners) / max(table.pairs, 1),
    )


def choices(plan: AttentionPlan, ranks: int, model: Model) -> list[ShardedPlan]:
    """Returns the plan cut for every rows · heads = ``ranks`` whose heads are even within 7 %."""
    sizes = [heads for heads in range(1, min(ranks, model.heads) + 1) if ranks % heads == 0]
    sizes = [heads for heads in sizes if -(-model.heads // heads) <= (1 + MAX_UNEVEN_HEADS) * model.heads / heads]
    return [plan.shard(rows=ranks // heads, heads=heads, width=model.width) for heads in sizes]


def describe_ranks(plan: AttentionPlan, ranks: int, node: int, model: Model) -> str:
    """Describes the choices for a number of ranks beside all-gather and ring; nothing is timed."""
    lines = [
        f"{ranks} ranks, {node} on a node, simulated: MB that a rank gets in one layer's forward (backward: as many)",
        "  rows × heads   load  rows  pairs    MB mean / largest   pulled  travelled  heads  other nodes  local pairs",
    ]
    for sharded in choices(plan, ranks, model):
        cost = rank_costs(sharded, model, node)
        mean = [part.mean() / 1e6 for part in (cost.pulled, cost.travelled, cost.exchanged, cost.remote)]
        note = "   (Ulysses)" if cost.rows == 1 < cost.heads else ""
        lines.append(
            f"  {cost.rows:4} × {cost.heads:<5}   {cost.load:5.2f} {cost.rows_balance:5.2f}  {cost.pairs_balance:5.2f} "
            f" {cost.received.mean() / 1e6:9.1f} / {cost.received.max() / 1e6:<9.1f} {mean[0]:7.1f}  {mean[1]:9.1f}  "
            f"{mean[2]:5.1f}  {mean[3]:11.1f}  {cost.local:11.0%}{note}"
        )
    keys = 2 * plan.n_packed * model.width * model.itemsize * model.batch / 1e6
    whole, near = keys * (ranks - 1) / ranks, keys * (min(node, ranks) - 1) / ranks
    by_rows = np.array([len(x) for x in np.array_split(np.arange(plan.n_packed), ranks)])
    pairs = np.add.reduceat(
        np.append(pairs_of_rows(plan.table, np.zeros(plan.n_packed, bool)), 0), np.cumsum(by_rows) - by_rows
    )
    balance = float(pairs.max() / max(pairs.mean(), 1e-30))
    for name in ("all-gather", "ring"):
        lines.append(
            f"  {name:12}               {balance:5.2f}  {whole:9.1f}   of it {whole - near:.1f} from other nodes"
        )
    return "\n".join(lines)
