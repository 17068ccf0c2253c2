"""What the executors do for one table: its counts (:mod:`.costs`), blocks and bytes, and what they take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from . import configs, costs, frames, rectangles, slabs
from .grouping import group
from .groups import Slab
from .indices import indices_of
from .table import BlockTable


@dataclass(frozen=True)
class Work:
    """The torch executor's, of one call on (batch, heads, positions, head_dim), ``heads`` being batch · heads.

    ``outside``: positions of tensors that are put into the table's order and back, None where they come in it; they
    come as a projection leaves them, positions before heads. ``converted``: inputs are cast, or copied because there
    are several canvases; ``itemsize``: bytes of an element outside.
    """

    table: BlockTable
    heads: int
    head_dim: int
    outside: int | None = None
    converted: bool = False
    itemsize: int = 4

    def counts(self, backward: bool) -> dict[str, float]:
        """Counts of the forward or of the backward pass."""
        element = self.table.n_positions * self.heads * self.head_dim
        parts = [{"call": 1, "converted": element * self._copies(backward)}]
        if self.outside is not None:
            cleared = (3 if backward else 1) * self.outside * self.heads * self.head_dim
            parts += [{"order": 1, "moved": 4 * element, "cleared": cleared}]
        rows = self._frames()
        return costs.total([*parts, self._frame_counts(rows, backward) if rows else self._group_counts(backward)])

    def _group_counts(self, backward: bool) -> dict[str, float]:
        grouping, shape = group(self.table), {"heads": self.heads, "head_dim": self.head_dim}
        made = [*self._lasting(backward), *(size for sizes in self._passing(backward) for size in sizes)]
        if backward:
            # dropped before the next of a slab's three products is made: no part of the most that is held
            made += [self._product_bytes(slab, True, True) for slab, flash, _ in self._slabs() if not flash] * 2
        large = sum(size for size in made if size > costs.LARGE_BYTES)
        element = self.table.n_positions * self.heads * self.head_dim
        parts = [{"element": element, "fresh": large}]
        parts += [{"stage": len(grouping.stages), "batch": len(grouping.batches)}]
        for slab, flash, even in self._slabs():
            lies = {"thin": slab.thin, "flash": flash, "bias": slab.bias is not None}
            pieces = {"row_pieces": len(slab.row_ranges), "key_pieces": len(slab.key_ranges)}
            parts.append(costs.slab_counts(slab.cells, slab.rows, slab.keys, **lies, **pieces, **shape))
            rows, keys = (self.heads * self.head_dim * slab.cells * length for length in (slab.rows, slab.keys))
            added = rows * (not slab.fresh_rows) + 2 * backward * keys * (not slab.fresh_keys)
            parts.append({"added": added, "uneven": rows * (not even)})
        for batch in grouping.batches:
            again = backward and not rectangles.choices(self.table, self.head_dim).keeps
            parts.append(costs.batch_counts(*batch.shape, bias=batch.bias is not None, again=again, **shape))
        return costs.total(parts)

    def _frame_counts(self, rows: int, backward: bool) -> dict[str, float]:
        queries = self.heads * self.table.n_positions
        made = 1 + 2 * backward + self._copies(backward)
        fresh = self._inside() * made * (self._inside() > costs.LARGE_BYTES)
        masked = frames.frame_mask(self.table.key, torch.float32) is not None
        return costs.frame_counts(queries, rows, self.head_dim, masked=masked) | {"fresh": fresh}

    def seconds(self, rates: dict, backward: bool) -> dict[str, float]:
        """What each count of a pass takes at an entry of the rates."""
        own = rates["backward" if backward else "forward"]
        return {name: own[name] * count for name, count in self.counts(backward).items() if own[name] * count}

    def peak_bytes(self, backward: bool) -> int:
        """The most that a forward, and with ``backward`` a backward after it, hold beyond q, k, v and grad_out."""
        if rows := self._frames():
            return self._frames_peak(rows, backward)
        packed = self.outside is not None
        result, inside = self._outside(), self._inside() * self.itemsize // 4
        copies = [self._inside() * self._copies(is_backward) for is_backward in (False, True)]
        kept = self._kept() if backward else 0
        held = 3 * inside * packed + kept
        passing = max(map(sum, self._passing(False, backward)), default=0)
        forward = held + max(self._inside() + copies[0] + passing, inside + packed * result)
        if not backward:
            return forward
        passing = max(map(sum, self._passing(True)), default=0)
        inside_op = held + result + inside * packed + 3 * self._inside() + copies[1] + passing
        return max(forward, inside_op, result + 3 * inside + 3 * packed * result)

    # -- bytes ---------------------------------------------------------------------------------------------------------

    def _slabs(self) -> list[tuple[Slab, bool, bool]]:
        """Slabs; whether the flash kernel runs them; whether one coefficient serves all of their rows."""
        slabs, joint = group(self.table).slabs, self.table.form == "joint"
        indices = indices_of(self.table, torch.empty(0, self.heads, self.head_dim))
        even = (joint or isinstance(indices.own_slab_rows(number), float) for number in range(len(slabs)))
        return list(zip(slabs, rectangles.choices(self.table, self.head_dim).flash, even))

    def _apart(self) -> bool:
        """Whether heads lie apart: they do in packed rows."""
        return self.outside is not None or self.heads == 1

    def _copies(self, backward: bool) -> int:
        """How many inputs of a pass are copied: q, k and v also to lay heads apart."""
        if rows := self._frames():
            return 3 * (rows >= frames.APART_KEYS and not self._apart() and not backward)
        if self.converted:
            return 3 + backward
        return 3 * (not self._apart() and rectangles.choices(self.table, self.head_dim).apart)

    def _frames(self) -> int:
        """Rows of each frame where the flash kernel runs on views of the canvas; 0 where it does not."""
        rows, n = frames.frame_rows(self.table.key), self.table.n_positions
        return rows if rows and self.itemsize >= 4 and frames.pays(rows, n, self.head_dim, self._apart()) else 0

    def _frames_peak(self, rows: int, backward: bool) -> int:
        """:meth:`peak_bytes` of :func:`.frames.frames_attention`."""
        inside, packed = self._inside(), self.outside is not None
        held = inside + 4 * self.heads * self.table.n_positions + inside * (3 * packed + self._copies(False))
        forward = max(held + flash_block_bytes(rows, rows), held + packed * self._outside())
        if not backward:
            return forward
        return max(forward, held + packed * (self._outside() + inside) + 3 * inside + 2 * flash_block_bytes(rows, rows))

    def _inside(self) -> int:
        """Of one canvas tensor as it is computed with."""
        return 4 * self.heads * self.head_dim * self.table.n_positions

    def _outside(self) -> int:
        n = self.table.n_positions if self.outside is None else self.outside
        return self.itemsize * self.heads * self.head_dim * n

    def _kept(self) -> int:
        return 4 * rectangles.saved_size(self.table, self.heads, self.head_dim, False)

    def _lasting(self, backward: bool) -> list[int]:
        """Tensors that a pass makes and holds to its end."""
        results = 3 if backward else 1
        made = [self._inside() * results] + [self._inside()] * self._copies(backward)
        if self.converted and self.itemsize < 4:
            made += [self._inside() * results * self.itemsize // 4]
        if self.outside is not None:
            made += [self._inside() * self.itemsize // 4] * (1 if backward else 3) + [self._outside()] * results
        return made if backward else [*made, self._kept()]

    def _passing(self, backward: bool, kept: bool = True) -> list[list[int]]:
        """Tensors that each slab and stage makes and drops; ``kept``: a backward follows or runs."""
        choices, row = rectangles.choices(self.table, self.head_dim), 4 * self.heads * self.head_dim
        found = [self._slab_bytes(slab, flash, even, backward, kept) for slab, flash, even in self._slabs()]
        for stage in group(self.table).stages:
            queries, keys = sum(row * batch.rows.size for batch in stage), sum(row * batch.keys.size for batch in stage)
            pairs = [max(4 * self.heads * batch.pairs for batch in stage)] * (backward + (not (kept and choices.keeps)))
            found.append(pairs + ([queries] * 3 + [keys] * 4 if backward else [queries, keys] * 2))
        return found

    def _lanes(self, slab: Slab) -> int:
        return 1 if slab.thin else min(slab.cells, self.heads)

    def _product_bytes(self, slab: Slab, even: bool, backward: bool) -> int:
        """Of the result of a product that is not added in place. Uneven coefficients keep forward's from that; backward
        has them in the upstream gradient."""
        lanes, row = self._lanes(slab), 4 * self.heads * self.head_dim * slab.cells
        large = min(slab.rows, slab.keys) * self.head_dim >= slabs.DIRECT_ELEMENTS
        direct = large and (slab.cells == 1 or not slab.thin) and (even or backward)
        return 0 if direct else row * max(slab.rows, slab.keys * backward) // lanes

    def _slab_bytes(self, slab: Slab, flash: bool, even: bool, backward: bool, kept: bool) -> list[int]:
        row, pairs = 4 * self.heads * self.head_dim * slab.cells, 4 * self.heads * slab.pairs
        queries, keys = row * slab.rows, row * slab.keys
        copied = slab.thin and slab.cells > 1 and self.heads > 1 and not flash
        inputs = [queries] * ((1 + backward) * (copied or len(slab.row_ranges) > 1))
        inputs += [keys] * (2 * (copied or len(slab.key_ranges) > 1)) + [queries] * (backward and not even)
        if flash:
            blocks = flash_block_bytes(slab.rows, slab.keys) * (1 + backward)
            # the kernel copies a gradient whose heads lie apart
            copied = [queries] * (backward and self.outside is not None and self.heads > 1)
            return [*inputs, *copied, queries, blocks] + [keys, keys] * backward
        lanes, product = self._lanes(slab), self._product_bytes(slab, even, backward)
        if backward:
            # of two lanes, one after the other
            return [*inputs, product] + [pairs // lanes] * min(lanes, 2)
        return [*inputs, product] + [pairs] * (not kept)


def flash_block_bytes(rows: int, keys: int) -> int:
    """Of one block of logits in torch's flash kernel, which takes more rows at once where there are many."""
    return 4 * min(keys, 512) * (256 if rows >= 768 else 64 if rows >= 192 else 32)


class Launch(NamedTuple):
    """Kernels of one stage. Each of ``bounds`` counts block times by name (:func:`.costs.block_key`), bytes that are
    moved ("byte") and launches ("launch"); the kernels take as long as the longest of them."""

    stage: str
    bounds: tuple[dict[str, float], ...]


@dataclass(frozen=True)
class GpuWork:
    """The Triton executor's, described as :class:`Work`. A launch takes as long as its blocks on all multiprocessors,
    as its longest tile, or as its tensors moved once, whichever is longest, and its launching."""

    table: BlockTable
    heads: int
    head_dim: int
    outside: int | None = None
    converted: bool = False
    itemsize: int = 2

    def seconds(self, rates: dict, backward: bool) -> dict[str, float]:
        """What each stage of a pass takes on the GPU of an entry of the rates."""
        each, found = costs.gpu_seconds(rates), {}
        for launch in self.launches(rates, rates, backward):
            taken = max(costs.seconds(bound, each) for bound in launch.bounds)
            found[launch.stage] = found.get(launch.stage, 0.0) + taken
        return found

    def launches(self, gpu: dict, tiled: dict, backward: bool) -> Iterator[Launch]:
        """The launches of a pass on the GPU of an entry, of which seconds are not read; ``tiled``: the entry whose
        block times choose the tiles."""
        joint, canvas = self.table.form == "joint", self._canvas()
        if self.outside is not None:
            # read, permuted, written
            yield Launch("moved", ({"byte": 4 * 2 * canvas, "launch": 4},))
        if backward and joint:
            yield Launch("delta", ({"byte": 2 * canvas, "launch": 1},))
        for stage, tensors in _STAGES[backward]:
            if stage != "delta" or not joint:
                yield from self._stage(gpu, tiled, stage, {"byte": tensors * canvas, "launch": 1})

    def _stage(self, gpu: dict, tiled: dict, stage: str, moving: dict[str, float]) -> Iterator[Launch]:
        dtype = torch.float32 if self.itemsize == 4 else torch.bfloat16
        block_d, form = configs.block_d(self.head_dim), self.table.form
        found = configs.lookup(gpu["arch"], self.head_dim, dtype, stage, form)
        key_of = {(c.block_m, c.block_n): costs.block_key(stage, form, block_d, self.itemsize, c) for c in found}
        if not set(key_of.values()) <= gpu["blocks"].keys():
            what = f"{stage} in {form} form, head_dim {self.head_dim}, {dtype}"
            raise ValueError(f"not every block time was measured of {what}")
        measured = costs.blocks(tiled, stage, form, block_d, self.itemsize, found)
        classes = configs.classes(found, measured and tuple(block.cost for block in measured))
        for tiling in self.table.device_tilings("cpu", classes, stage == "dkv"):
            key, blocks = key_of[tiling.block_m, tiling.block_n], tiling.tiles[:, 3]
            share = self.heads / (gpu["blocks"][key][1] * gpu["multiprocessors"])
            spread, longest = int(blocks.sum()) * share, int(blocks.max())
            yield Launch(stage, ({key: spread, "launch": 1}, {key: longest, "launch": 1}, moving))

    def peak_bytes(self, backward: bool) -> int:
        """The most that a forward, and with ``backward`` a backward after it, hold beyond q, k, v and grad_out."""
        moved, lse = self.outside is not None, 4 * self.heads * self.table.n_slots
        outside = self.itemsize * self.heads * self.head_dim * (self.outside or self.table.n_positions)
        forward = self._canvas() + lse + moved * (3 * self._canvas() + outside)
        if not backward:
            return forward
        # lse in another form, and δ: of slots, or in joint form of rows
        delta = 4 * self.heads * self.table.n_positions if self.table.form == "joint" else 2 * lse
        return forward + delta + 3 * self._canvas() + moved * (self._canvas() + 3 * outside)

    def _canvas(self) -> int:
        return self.itemsize * self.heads * self.head_dim * self.table.n_positions


# Stages of forward and backward, and canvas tensors that each reads or writes.
_STAGES = ((("forward", 4),), (("delta", 4), ("dq", 5), ("dkv", 6)))
