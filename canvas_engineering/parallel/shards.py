"""A plan cut over ranks: :class:`ShardedPlan`, and what one rank of a device mesh runs of it, :class:`PlacedPlan`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from canvas_kernels.packing import IndexMap

from ..checked import checked_int
from .cut import cut_positions
from .mesh import check_alike, digest_of, mesh_dimensions

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from ..plan.plan import AttentionPlan


@dataclass(frozen=True, eq=False)
class ShardedPlan:
    """A plan over ranks that share its heads; made by :meth:`AttentionPlan.shard`.

    Every rank holds some positions of the canvas. Ranks exchange them for a share of the heads before attention, and
    back behind it.

    Attributes:
        plan: the whole plan.
        heads: number of ranks that share the heads.
        owned: the positions of each rank, int64.

    >>> from canvas_engineering import CanvasLayout, CanvasTopology, compile_attention
    >>> layout = CanvasLayout(T=5, d_model=8, spatial_shape=(2,), regions={"a": (0, 5, 0, 2)})
    >>> sharded = compile_attention(layout, CanvasTopology.dense(["a"])).shard(heads=3)
    >>> [positions.tolist() for positions in sharded.owned]
    [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]
    """

    plan: AttentionPlan
    heads: int
    owned: tuple[np.ndarray, ...]

    @classmethod
    def cut(cls, plan: AttentionPlan, heads: int, cut: Any) -> ShardedPlan:
        """Cuts a plan; arguments and errors are those of :meth:`AttentionPlan.shard`."""
        heads = checked_int(heads, "heads", 1)
        return cls(plan, heads, cut_positions(plan, heads, cut))

    def on(self, mesh: DeviceMesh) -> PlacedPlan:
        """Returns what this rank of a mesh runs. Every rank of the mesh has to call it: they compare their plans.

        Args:
            mesh: with a dimension "heads" of as many ranks, or of that one dimension.

        Raises:
            ValueError: a mesh without that dimension or of another size, or another declaration, cut or version on some
                rank, on every rank.

        Further positional plans are compared by content, so each process may compile its own.
        """
        (heads,) = mesh_dimensions(mesh, {"heads": self.heads})
        check_alike(mesh, digest_of(self.plan), digest_of(self.owned))
        return PlacedPlan(self, heads.get_local_rank(), heads.get_group().group_name)


class PlacedPlan:
    """One rank's share of a :class:`ShardedPlan`, for :func:`canvas_attention`; made by :meth:`ShardedPlan.on`.

    Attributes:
        sharded: the plan of all ranks.
        rank: this rank's number among those that share the heads.
        positions: int64 (own rows,), the positions that this rank holds, in the order of its tensors.
    """

    def __init__(self, sharded: ShardedPlan, rank: int, group: str) -> None:
        self.sharded, self.rank, self.group = sharded, rank, group
        self.positions = sharded.owned[rank]
        # plain values, which compilers can trace
        self.n_rows = [len(positions) for positions in sharded.owned]
        self.table = sharded.plan.table
        self.order_map: IndexMap = sharded.plan.reindex(np.concatenate(sharded.owned)).order_map

    def __deepcopy__(self, memo) -> PlacedPlan:
        return self
