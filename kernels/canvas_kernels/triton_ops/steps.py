# pyright: basic, reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
"""Kernels beside the passes of a step: they move rows, scale them by activity, and sum gradients of gains."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from ..block_table import BlockTable
from ..derived import derived, to_device
from ..packing import IndexMap
from .configs import block_d

MOVED_ROWS, SCALED_ROWS, PART_ROWS = 32, 64, 256
"""Rows that one program moves, scales, adds up."""
VECTOR = 8
"""Elements that a row's start and length in memory are multiples of."""
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


# -- rows --------------------------------------------------------------------------------------------------------------


def move_rows(*sources: torch.Tensor, rows: IndexMap, back: bool = False) -> tuple[torch.Tensor, ...]:
    """(B, H, n_out, D) tensors of the rows that a distinct gather takes, padded to multiples of 8 elements as passes
    want them; or with ``back`` of where it took them from, contiguous, 0 elsewhere. All move in one launch: they share
    shape, dtype and device."""
    x = sources[0]
    batch, heads, n_in, head_dim = x.shape
    index, n_out = (rows.places(x.device), rows.n_in) if back else (rows.rows(x.device), rows.n_out)
    width = head_dim if back else -(-head_dim // VECTOR) * VECTOR
    moved = tuple([torch.empty((batch, heads, n_out, width), dtype=x.dtype, device=x.device) for _ in sources])
    n_blocks = -(-n_out // MOVED_ROWS)
    if moved[0].numel():
        strides = sum([source.stride() for source in sources], ())
        sizes = {"HEAD_DIM": head_dim, "BLOCK_D": block_d(head_dim), "BLOCK": MOVED_ROWS}
        move_rows_kernel[(n_blocks * batch * heads,)](
            sources, moved, strides, index, n_blocks, n_out, n_in, heads, width, **sizes, **OPTIONS
        )
    return moved if width == head_dim else tuple([x[..., :head_dim] for x in moved])


@triton.jit(do_not_specialize=["n_blocks", "n_out", "n_in", "n_heads"])
def move_rows_kernel(
    sources,
    targets,
    strides,
    index_ptr,
    n_blocks,
    n_out,
    n_in,
    n_heads,
    width,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """target_i = source_index[i], or 0 where the index is no row; ``strides`` holds four of each source."""
    rows = tl.program_id(0) % n_blocks * BLOCK + tl.arange(0, BLOCK)
    batch_head = (tl.program_id(0) // n_blocks).to(tl.int64)
    batch, head = batch_head // n_heads, batch_head % n_heads
    dims = tl.arange(0, BLOCK_D)
    index = tl.load(index_ptr + rows, mask=rows < n_out, other=n_in).to(tl.int64)
    # [BLOCK, BLOCK_D]
    readable = (index < n_in)[:, None] & (dims < HEAD_DIM)[None, :]
    written = (rows < n_out)[:, None] & (dims < HEAD_DIM)[None, :]
    at = (batch_head * n_out + rows)[:, None] * width + dims[None, :]
    for i in tl.static_range(len(sources)):
        base = sources[i] + batch * strides[4 * i] + head * strides[4 * i + 1]
        source_ptrs = base + index[:, None] * strides[4 * i + 2] + dims[None, :] * strides[4 * i + 3]
        tl.store(targets[i] + at, tl.load(source_ptrs, mask=readable, other=0), mask=written)


# -- row scales --------------------------------------------------------------------------------------------------------


@derived(limit=4)
def scale_chunks(table: BlockTable, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(chunks, entries, weight): int32 [C, 4] first row, end of rows, first and end of entries, of rows in the same
    segments; int32 [E, 2] edge and class of these segments; float32 [E] their weights."""
    marks, lead, run = table._runs()
    ptr, segment = np.searchsorted(run, np.arange(len(marks))), table.segment[lead]
    # runs that differ in keys only are one, as the rows of a band are
    size = np.diff(ptr)
    as_before = (run > 0) & (size[run] == size[run - 1])
    as_before &= segment == segment[np.maximum(np.arange(len(run)) - size[run], 0)]
    first = np.bincount(run, as_before, len(size)) != size
    first |= np.append(True, size[1:] != size[:-1])[: len(size)]
    marks, ptr, stop_ptr = np.append(marks[:-1][first], marks[-1]), ptr[:-1][first], ptr[1:][first]
    count = -(-np.diff(marks) // SCALED_ROWS)
    owner = np.repeat(np.arange(len(count)), count)
    row = marks[owner] + SCALED_ROWS * (np.arange(len(owner)) - (np.cumsum(count) - count)[owner])
    stop = np.minimum(row + SCALED_ROWS, marks[owner + 1])
    chunks = np.stack([row, stop, ptr[owner], stop_ptr[owner]], 1)
    entries = np.stack([table.edge[lead], table.replace[lead]], 1)
    arrays = (chunks.astype(np.int32), entries.astype(np.int32), table.weight[lead])
    ranges, owners, weights = (to_device(array, device) for array in arrays)
    return ranges, owners, weights


def row_scale(active: torch.Tensor, table: BlockTable) -> torch.Tensor:
    """(2, n) float32: :func:`..block_table.row_scale` of an activity, in one launch."""
    chunks, entries, weight = scale_chunks(table, active.device)
    n = table.n_positions
    scale = torch.empty((2, n), dtype=torch.float32, device=active.device)
    if n:
        row_scale_kernel[(chunks.shape[0],)](active, chunks, entries, weight, scale, n, BLOCK=SCALED_ROWS, **OPTIONS)
    return scale


@triton.jit(do_not_specialize=["n_positions"])
def row_scale_kernel(active_ptr, chunks_ptr, entries_ptr, weight_ptr, scale_ptr, n_positions, BLOCK: tl.constexpr):
    """1 / Σ w of the class in force at the rows of a chunk, 0 for the other class and where nothing is in force."""
    chunk_ptr = chunks_ptr + tl.program_id(0) * 4
    rows, stop = tl.load(chunk_ptr) + tl.arange(0, BLOCK), tl.load(chunk_ptr + 3)
    adding = tl.zeros([BLOCK], tl.float32)
    replacing = tl.zeros([BLOCK], tl.float32)
    for entry in range(tl.load(chunk_ptr + 2), stop, BLOCK):
        entries = entry + tl.arange(0, BLOCK)
        edge = tl.load(entries_ptr + entries * 2, mask=entries < stop, other=0)
        replace = tl.load(entries_ptr + entries * 2 + 1, mask=entries < stop, other=0) != 0
        live = tl.load(active_ptr + edge, mask=entries < stop, other=0) != 0
        weight = tl.load(weight_ptr + entries, mask=live, other=0.0)
        adding += tl.where(replace, 0.0, weight)
        replacing += tl.where(replace, weight, 0.0)
    add_sum, replace_sum = tl.sum(adding, 0), tl.sum(replacing, 0)
    # replacing segments, where there are any, are in force alone
    adds = (replace_sum <= 0) & (add_sum > 0)
    add_scale = tl.where(adds, 1.0 / tl.where(adds, add_sum, 1.0), 0.0)
    replace_scale = tl.where(replace_sum > 0, 1.0 / tl.where(replace_sum > 0, replace_sum, 1.0), 0.0)
    in_chunk = rows < tl.load(chunk_ptr + 1)
    tl.store(scale_ptr + rows, tl.zeros([BLOCK], tl.float32) + add_scale, mask=in_chunk)
    tl.store(scale_ptr + n_positions + rows, tl.zeros([BLOCK], tl.float32) + replace_scale, mask=in_chunk)


# -- gains -------------------------------------------------------------------------------------------------------------


@derived(limit=4)
def _parts(table: BlockTable, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(parts, weight, first): int32 [P, 4] first slot, end of slots, first row and class, of slots whose rows follow
    each other; float32 [P] the weight of each; int32 [n_edges + 1] the first part of each edge."""
    layout = table.slot_layout(torch.device("cpu"))
    position, weight, replace, per_edge = (
        x.numpy() for x in (layout.position, layout.weight, layout.replace, layout.per_edge)
    )
    edge = np.repeat(np.arange(table.n_edges), per_edge)
    same = (np.diff(position) == 1) & (np.diff(edge) == 0) & (np.diff(replace) == 0) & (np.diff(weight) == 0)
    start = np.append(0, np.flatnonzero(~same) + 1)[: len(edge)]
    length = np.diff(np.append(start, len(edge)))
    count = -(-length // PART_ROWS)
    owner = np.repeat(np.arange(len(start)), count)
    first = start[owner] + PART_ROWS * (np.arange(len(owner)) - (np.cumsum(count) - count)[owner])
    stop = np.minimum(first + PART_ROWS, (start + length)[owner])
    parts = np.stack([first, stop, position[first], replace[first]], 1)
    of_edge = np.searchsorted(edge[first], np.arange(table.n_edges + 1))
    arrays = (parts.astype(np.int32), weight[first], of_edge.astype(np.int32))
    ranges, weights, owners = (to_device(array, device) for array in arrays)
    return ranges, weights, owners


def gain_gradient(delta: torch.Tensor, table: BlockTable, row_scale: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """dgain_e = Σ_{r of e} Σ_i w_r · row_scale[class_r, i] · δ_ri, like gain, in a fixed order; ``delta`` (B, H,
    n_slots) is 0 for inactive edges."""
    parts, weight, first = _parts(table, delta.device)
    sums = torch.empty(parts.shape[0], dtype=torch.float32, device=delta.device)
    dgain = torch.empty_like(gain, memory_format=torch.contiguous_format)
    if parts.shape[0]:
        sizes = (table.n_positions, table.n_slots, delta.shape[0] * delta.shape[1])
        gain_parts_kernel[(parts.shape[0],)](delta, row_scale, parts, weight, sums, *sizes, BLOCK=PART_ROWS, **OPTIONS)
    if table.n_edges:
        gain_sums_kernel[(table.n_edges,)](sums, first, dgain, BLOCK=PART_ROWS, **OPTIONS)
    return dgain


@triton.jit(do_not_specialize=["n_positions", "n_slots", "batch_heads"])
def gain_parts_kernel(
    delta_ptr, row_scale_ptr, parts_ptr, weight_ptr, sums_ptr, n_positions, n_slots, batch_heads, BLOCK: tl.constexpr
):
    """The sum over batch, heads and rows of a part of w · row_scale · δ."""
    part_ptr = parts_ptr + tl.program_id(0) * 4
    start, stop = tl.load(part_ptr), tl.load(part_ptr + 1)
    slots, heads = start + tl.arange(0, BLOCK), tl.arange(0, 8)
    # [8, BLOCK]
    total = tl.zeros([8, BLOCK], tl.float32)
    for first in range(0, batch_heads, 8):
        mask = (first + heads < batch_heads)[:, None] & (slots < stop)[None, :]
        total += tl.load(
            delta_ptr + (first + heads).to(tl.int64)[:, None] * n_slots + slots[None, :], mask=mask, other=0.0
        )
    scale_ptrs = row_scale_ptr + tl.load(part_ptr + 3) * n_positions + tl.load(part_ptr + 2) + tl.arange(0, BLOCK)
    scale = tl.load(scale_ptrs, mask=slots < stop, other=0.0).to(tl.float32)
    # what is scaled by 0 does not count, whatever it attends to
    share = tl.where(scale == 0, 0.0, tl.sum(total, 0) * scale)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(share, 0) * tl.load(weight_ptr + tl.program_id(0)))


@triton.jit
def gain_sums_kernel(sums_ptr, first_ptr, dgain_ptr, BLOCK: tl.constexpr):
    """dgain_e = Σ of the parts of edge e."""
    edge = tl.program_id(0)
    stop = tl.load(first_ptr + edge + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(tl.load(first_ptr + edge), stop, BLOCK):
        parts = part + tl.arange(0, BLOCK)
        total += tl.load(sums_ptr + parts, mask=parts < stop, other=0.0)
    tl.store(dgain_ptr + edge, tl.sum(total, 0).to(dgain_ptr.dtype.element_ty))
