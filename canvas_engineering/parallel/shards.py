"""A plan cut over ranks: :class:`ShardedPlan`, and what one rank of a device mesh runs of it, :class:`PlacedPlan`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from canvas_kernels.derived import Store, derived

from ..checked import checked_int
from .cut import cut_positions, given_positions
from .mesh import check_alike, digest_of, mesh_dimensions
from .needs import Needs, Owners, pulls, visits
from .rank import RankPlan, rank_plan

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from ..plan.plan import AttentionPlan


@dataclass(frozen=True, eq=False)
class ShardedPlan:
    """A plan over ``rows`` × ``heads`` ranks; made by :meth:`AttentionPlan.shard`.

    Every rank holds some positions of the canvas. The ranks of one shard of rows exchange them for a share of the heads
    before attention, and back behind it. Between shards of rows, keys and values are pulled to the queries that attend
    to them; in joint form the queries with the most keys travel to their keys instead, and partial results come back.

    Attributes:
        plan: the whole plan.
        rows, heads: numbers of shards of rows, and of ranks that share the heads of each.
        owned: the positions of each rank, int64, ``owned[row][head]``.
        travels: bool [n], the packed rows whose queries travel.

    >>> from canvas_engineering import CanvasLayout, CanvasTopology, compile_attention
    >>> layout = CanvasLayout(T=5, d_model=8, spatial_shape=(2,), regions={"a": (0, 5, 0, 2)})
    >>> sharded = compile_attention(layout, CanvasTopology.dense(["a"])).shard(heads=3)
    >>> [positions.tolist() for positions in sharded.owned[0]]
    [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]
    """

    plan: AttentionPlan
    rows: int
    heads: int
    owned: tuple[tuple[np.ndarray, ...], ...]
    travels: np.ndarray = field(repr=False)
    store: Store = field(default_factory=Store, init=False, repr=False)

    @classmethod
    def cut(cls, plan: AttentionPlan, rows: int, heads: int, cut: Any, width: int) -> ShardedPlan:
        """Cuts a plan; arguments and errors are those of :meth:`AttentionPlan.shard`."""
        sizes = ((rows, "rows"), (heads, "heads"), (width, "width"))
        rows, heads, width = (checked_int(number, name, 1) for number, name in sizes)
        if heads == 1 or isinstance(cut, str):
            shards, travels = cut_positions(plan, rows, cut, width)
            return cls(plan, rows, heads, tuple(tuple(np.array_split(own, heads)) for own in shards), travels)
        given = given_positions(plan, rows * heads, cut)
        owned = tuple(given[row * heads : (row + 1) * heads] for row in range(rows))
        _, travels = cut_positions(plan, rows, [np.concatenate(own) for own in owned], width)
        return cls(plan, rows, heads, owned, travels)

    @derived(limit=1)
    def owners(self) -> Owners:
        """Returns the shard of every packed row."""
        owner = np.zeros(self.plan.n_positions, np.int64)
        for shard, own in enumerate(self.owned):
            owner[np.concatenate(own)] = shard
        return Owners.of(owner[self.plan.order])

    @derived(limit=1)
    def pulls(self) -> Needs:
        """Returns which rows of keys and values every shard of rows gets from which other."""
        return pulls(self.plan.table, self.travels, self.owners())

    @derived(limit=1)
    def visits(self) -> Needs:
        """Returns which travelling queries every shard of rows computes, its own included."""
        return visits(self.plan.table, self.travels, self.owners())

    @derived(limit=4)
    def rank(self, shard: int) -> RankPlan:
        """Returns what the ranks of one shard of rows run."""
        positions = np.concatenate(self.owned[shard])
        return rank_plan(self.plan, shard, self.rows, positions, self.pulls(), self.visits())

    def on(self, mesh: DeviceMesh, names: tuple[str, str] = ("rows", "heads")) -> PlacedPlan:
        """Returns what this rank of a mesh runs. Every rank of the mesh has to call it: they compare their plans.

        Args:
            mesh: with dimensions "rows" and "heads" of these sizes, or one dimension where the other is 1.
            names: of these dimensions in the mesh, where they are others.

        Raises:
            ValueError: a mesh without these dimensions or of other sizes; on every rank, another declaration, cut or
                version on some rank.
        """
        along = mesh_dimensions(mesh, dict(zip(names, (self.rows, self.heads))))
        check_alike(mesh, digest_of(self.plan), digest_of([own for shard in self.owned for own in shard]))
        ranks = {name: dimension.get_local_rank() for name, dimension in along.items()}
        groups = {name: str(dimension.get_group().group_name) for name, dimension in along.items()}
        of_rows, of_heads = names
        return PlacedPlan(
            self, (ranks.get(of_rows, 0), ranks.get(of_heads, 0)), (groups.get(of_rows, ""), groups.get(of_heads, ""))
        )


class PlacedPlan:
    """One rank's share of a :class:`ShardedPlan`, for :func:`canvas_attention`; made by :meth:`ShardedPlan.on`.

    Attributes:
        sharded: the plan of all ranks.
        positions: int64 (own rows,), the positions that this rank holds, in the order of its tensors.
        sent_rows: number of own rows that are sent to other shards for their queries to attend to.
        share: own rows · ranks / all rows: what the mean over own rows counts in a mean over ranks.
    """

    def __init__(self, sharded: ShardedPlan, ranks: tuple[int, int], groups: tuple[str, str]) -> None:
        self.sharded = sharded
        self.row, self.head = ranks
        own = sharded.owned[self.row]
        self.positions = own[self.head]
        # plain values, which compilers can trace
        self.n_rows = [len(positions) for positions in own]
        self.rows_group, self.heads_group = groups
        self.rank_plan = sharded.rank(self.row)
        self.may_compile = all(len(positions) for shard in sharded.owned for positions in shard)
        pull = self.rank_plan.pull
        self.sent_rows = 0 if pull is None else sum(pull.send) - pull.send[self.row]
        queries = sharded.owners().shard_of(np.flatnonzero(sharded.plan.table.has_keys()))
        self.queries_everywhere = len(np.unique(queries)) == sharded.rows
        ranks_in_all, n = sharded.rows * sharded.heads, sharded.plan.n_positions
        self.share = len(self.positions) * ranks_in_all / n if n else 1.0

    def __deepcopy__(self, memo) -> PlacedPlan:
        return self
