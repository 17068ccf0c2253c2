"""Tilings: one pass's walk over a BlockTable, as the flat tables that kernels read (``kernels/README.md`` has the
format)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from .table import BlockTable

LAST = 1 << 16
REPLACE = 1 << 17


class TileClass(NamedTuple):
    """A tile size that kernels are built for: ``block_m`` tile rows × ``block_n`` walked rows, and the time of one
    such block relative to the other classes'."""

    block_m: int
    block_n: int
    cost: float = 1.0


@dataclass(frozen=True, eq=False)
class Tiling:
    """One launch: ``tiles`` int32 [T, 4], ``rows`` int32 [R + 1, 4], ``weight`` and ``log2_weight`` float32 [R + 1],
    ``edge`` int32 [R + 1]."""

    block_m: int
    block_n: int
    transposed: bool
    tiles: torch.Tensor
    rows: torch.Tensor
    weight: torch.Tensor
    log2_weight: torch.Tensor
    edge: torch.Tensor

    @property
    def n_tiles(self) -> int:
        return self.tiles.shape[0]

    @property
    def walked(self) -> int:
        """Pairs that the tiles walk, block by whole block."""
        return int(self.tiles[:, 3].sum()) * self.block_m * self.block_n

    @property
    def pairs(self) -> int:
        """Pairs of the table among them; pairs over walked is the fill."""
        length, flags = self.rows[:, 1].long(), self.rows[:, 2].long()
        return int(((flags >> 8 & 255) - (flags & 255)) @ length)

    @property
    def nbytes(self) -> int:
        tensors = (self.tiles, self.rows, self.weight, self.log2_weight, self.edge)
        return sum(t.numel() * t.element_size() for t in tensors)

    def to(self, device: torch.device | str) -> Tiling:
        tensors = (t.to(device) for t in (self.tiles, self.rows, self.weight, self.log2_weight, self.edge))
        return Tiling(self.block_m, self.block_n, self.transposed, *tensors)


def expand_ranges(start: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(owner, value): every integer of the ranges ``[start_i, start_i + length_i)``, with the i it came from, both
    int64."""
    length = np.asarray(length, np.int64)
    owner = np.repeat(np.arange(len(length)), length)
    first = np.cumsum(length) - length
    return owner, np.arange(len(owner)) - first[owner] + np.asarray(start, np.int64)[owner]


def cut_tiles(n: int, start: np.ndarray, stop: np.ndarray, block: int) -> np.ndarray:
    """Tile starts for rows [0, n), ascending, int64: no tile is longer than ``block``.

    Ranges of at least ``block`` rows get tiles of their own (a tile across two of them would walk both); stretches of
    shorter ranges are cut evenly, tiles straddling them.
    """
    marks = np.unique(np.concatenate([[0, n], start, stop]))
    long = np.diff(marks) >= block
    keep = np.ones(len(marks), bool)
    keep[1:-1] = long[:-1] | long[1:]
    zones = marks[keep]
    owner, piece = expand_ranges(np.zeros(len(zones) - 1), -(-np.diff(zones) // block))
    return zones[owner] + piece * block


def build_tilings(table: BlockTable, classes: tuple[TileClass, ...], transposed: bool) -> tuple[Tiling, ...]:
    """Cut the table's positions into tiles, each of the class whose blocks cost the least.

    ``classes`` go from large to small, each ``block_m`` a multiple of the next. Cost: rectangles × tiles met,
    vectorised.
    """
    n = table.n_positions
    tile_side, walk_side = ((table.q_start, table.q_stop), (table.k_start, table.k_stop))
    if transposed:
        tile_side, walk_side = walk_side, tile_side
    if n == 0:
        return ()
    largest = cut_tiles(n, *tile_side, classes[0].block_m)
    candidates = []
    for tile_class in classes:
        length = np.diff(np.append(largest, n))
        parent, piece = expand_ranges(np.zeros(len(largest)), -(-length // tile_class.block_m))
        start = largest[parent] + piece * tile_class.block_m
        met = _tiles_met(start, n, tile_side, walk_side, tile_class.block_n)
        cost = np.bincount(parent, weights=met.blocks * tile_class.cost, minlength=len(largest))
        candidates.append((tile_class, parent, start, met, cost))
    choice = np.stack([cost for *_, cost in candidates]).argmin(0)
    tilings = []
    for i, (tile_class, parent, start, met, _) in enumerate(candidates):
        chosen = choice[parent] == i
        if chosen.any():
            tilings.append(_fill_tiling(table, tile_class, transposed, start, chosen, met, tile_side, walk_side))
    return tuple(tilings)


class _Met(NamedTuple):
    rectangle: np.ndarray  # one row per (rectangle, tile that it meets)
    tile: np.ndarray
    blocks: np.ndarray  # blocks to walk, per tile
    stop: np.ndarray  # end of each tile


def _tiles_met(start, n, tile_side, walk_side, block_n) -> _Met:
    low = np.searchsorted(start, tile_side[0], side="right") - 1
    high = np.searchsorted(start, tile_side[1], side="left")
    rectangle, tile = expand_ranges(low, high - low)
    blocks = -(-(walk_side[1] - walk_side[0]) // block_n)
    per_tile = np.bincount(tile, weights=blocks[rectangle], minlength=len(start)).astype(np.int64)
    return _Met(rectangle, tile, per_tile, np.append(start[1:], n))


def _fill_tiling(table, tile_class, transposed, start, chosen, met, tile_side, walk_side) -> Tiling:
    keep = chosen[met.tile]
    rectangle, tile = met.rectangle[keep], met.tile[keep]
    walk_start = walk_side[0][rectangle]
    # A kernel keeps one slot for the softmax that it accumulates. So in a query tile the separate query ranges of a
    # segment, whose slots are not consecutive, close one after the other; their rows are disjoint.
    piece = np.zeros(len(rectangle), np.int64) if transposed else table.slot[rectangle] - table.q_start[rectangle]
    order = np.lexsort((walk_start, piece, table.segment[rectangle], tile))
    rectangle, tile, walk_start, piece = rectangle[order], tile[order], walk_start[order], piece[order]
    low = np.maximum(tile_side[0][rectangle], start[tile]) - start[tile]
    high = np.minimum(tile_side[1][rectangle], met.stop[tile]) - start[tile]
    segment = table.segment[rectangle]
    last = np.ones(len(tile), bool)
    last[:-1] = (tile[1:] != tile[:-1]) | (segment[1:] != segment[:-1]) | (piece[1:] != piece[:-1])
    flags = low | (high << 8) | last * LAST | table.replace[rectangle] * REPLACE
    slot = table.slot[rectangle]
    if not transposed:
        slot = slot + start[tile] - table.q_start[rectangle]
    length = walk_side[1][rectangle] - walk_start
    rows = np.zeros((len(tile) + 1, 4), np.int32)
    rows[:-1] = np.stack([walk_start, length, flags, slot], axis=1) if len(tile) else rows[:-1]
    weight = np.ones(len(tile) + 1, np.float32)
    weight[:-1] = table.weight[rectangle]
    edge = np.zeros(len(tile) + 1, np.int32)
    edge[:-1] = table.edge[rectangle]
    members = chosen.nonzero()[0]
    first = np.searchsorted(tile, members)
    tiles = np.stack([start[members], (met.stop - start)[members], first, met.blocks[members]], axis=1).astype(np.int32)
    # longest walks first: the short ones fill the last wave
    tiles = tiles[np.argsort(-tiles[:, 3], kind="stable")]
    arrays = (tiles, rows, weight, np.log2(weight), edge)
    return Tiling(tile_class.block_m, tile_class.block_n, transposed, *(torch.from_numpy(a) for a in arrays))
