"""Dispatchers over the ranks of a device mesh, in torch's own way: ``parallelize_module(model, mesh, {…})``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from .dispatch import AttentionDispatcher, check_rows
from .parallel import PlacedPlan
from .parallel.exchange import gather_shards

__all__ = ["CanvasParallel", "RankRows", "rank_rows"]


class CanvasParallel(ParallelStyle):
    """Cuts the positions of an :class:`AttentionDispatcher` over the ranks of a mesh.

    The dispatcher keeps its class, parameters and state dict. It takes (B, own positions, d_model), and gets the rows
    that its queries attend to on other ranks before each step. Gradients are those of one process where they are
    averaged over ranks, as DDP and FSDP2 do, and each rank's loss is the mean over its own positions times
    ``RankRows.share``. Every rank of the mesh applies it, to the same declaration.

    Args:
        cut: which rank holds which positions; see :meth:`AttentionPlan.shard`.

    >>> CanvasParallel(cut="by_rows").cut
    'by_rows'
    """

    def __init__(self, cut: Any = "balanced"):
        super().__init__()
        self.cut = cut

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, AttentionDispatcher):
            raise ValueError(f"CanvasParallel is for an AttentionDispatcher, got a {type(module).__name__}")
        names = device_mesh.mesh_dim_names or ("rows",)
        if device_mesh.ndim != 1 or names != ("rows",):
            raise ValueError(f"CanvasParallel takes the mesh's dimension 'rows', mesh['rows']; got {device_mesh}")
        check_rows(module)
        sharded = module.plan.shard(rows=device_mesh.size(), cut=self.cut, width=module.d_model)
        module.place(sharded.on(device_mesh))
        return module


class RankRows:
    """The positions that this rank holds.

    Attributes:
        positions: int64 (own positions,), a tensor.
        share: own positions · ranks / all positions: the weight of the mean over own positions in a mean over ranks.
    """

    def __init__(self, placed: PlacedPlan):
        self.positions, self.share = torch.from_numpy(placed.positions.copy()), placed.share
        self._rank, self._group = placed.row, placed.rows_group
        shards = [torch.from_numpy(own[0]) for own in placed.sharded.owned]
        self._counts = [len(own) for own in shards]
        self._order = torch.argsort(torch.cat(shards))

    def take(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Returns own positions of x, whose dimension ``dim`` is the canvas's."""
        return x.index_select(dim, self.positions.to(x.device))

    def gather(self, y: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Returns the whole canvas on every rank from own positions; inverts :meth:`take`. Every rank has to call it.

        Its gradient is summed over ranks, as where a loss on every rank counts once for each in a mean over ranks.
        """
        whole = gather_shards(y.movedim(dim, 0), self._counts, self._rank, self._group)
        return whole.index_select(0, self._order.to(y.device)).movedim(0, dim)


def rank_rows(module: nn.Module) -> RankRows:
    """Returns the positions that this rank holds of a dispatcher under :class:`CanvasParallel`.

    Raises:
        ValueError: a module that is none.
    """
    placed = getattr(module, "placed", None)
    if placed is None:
        raise ValueError(f"{type(module).__name__} is no dispatcher under CanvasParallel: parallelize_module first")
    return RankRows(placed)
