"""The forward pass: the output and the log-sum-exp of every (segment, row), and the sum of a row's segments."""

import triton
import triton.language as tl

from .primitives import (
    covered_rows,
    finite,
    head_base,
    load_full,
    load_full_rows,
    load_mask,
    load_partial,
    load_result,
    load_rows,
    load_segment,
    load_tile,
    load_weight,
    partial_width,
    result_rows,
    row_base,
    row_scales,
    store_rows,
    taint,
    tile_offsets,
)

SIZES = ["n_tiles", "n_heads", "n_positions", "n_slots"]
STRIDES = [f"{x}_stride_{d}" for x in ("q", "k", "v") for d in "bhn"]


@triton.jit(do_not_specialize=SIZES + STRIDES)
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    row_scale_ptr,
    gain_ptr,
    active_ptr,
    tiles_ptr,
    segments_ptr,
    weight_ptr,
    full_ptr,
    partial_ptr,
    masks_ptr,
    n_tiles,
    n_heads,
    n_positions,
    n_slots,
    scale_log2,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    JOINT: tl.constexpr,
    IN_PLACE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """f_r(i) = softmax_j(scale · q_i·k_j) v_j of the segments r of row i, and lse_ri = log2 Σ_j 2^(scale_log2 · q_i·k_j).

    IN_PLACE: ``out`` has rows and gets Σ_r c_ri f_r(i). Else tiles have one segment, and ``out`` has slots; in joint
    form slots are rows, and the logits carry log2 w.
    """
    batch_head, batch, head, tile_start, tile_rows, first, count = load_tile(tiles_ptr, n_tiles, n_heads)
    rows = tl.arange(0, BLOCK_M)
    BLOCK_P: tl.constexpr = partial_width(BLOCK_N)
    columns = tl.arange(0, BLOCK_P)
    in_tile = rows < tile_rows
    q_base = row_base(head_base(q_ptr, batch, head, q_stride_b, q_stride_h), tile_start, q_stride_n)
    k_base = head_base(k_ptr, batch, head, k_stride_b, k_stride_h)
    v_base = head_base(v_ptr, batch, head, v_stride_b, v_stride_h)
    k_offsets = tile_offsets(k_stride_n, BLOCK_N, BLOCK_D)
    v_offsets = tile_offsets(v_stride_n, BLOCK_N, BLOCK_D)
    # [BLOCK_M, BLOCK_D]
    q = load_rows(q_base, tile_offsets(q_stride_n, BLOCK_M, BLOCK_D), in_tile, HEAD_DIM, BLOCK_D)
    if IN_PLACE:
        total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    else:
        count = 1
    for segment in range(first, first + count):
        first_full, n_full, first_partial, n_partial, slot = load_segment(segments_ptr, active_ptr, segment, JOINT)
        running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        running_sum = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

        start, bias = load_full(full_ptr, first_full, JOINT)
        for block in range(first_full, first_full + n_full):
            # [BLOCK_N, BLOCK_D]
            k = load_full_rows(row_base(k_base, start, k_stride_n), k_offsets, HEAD_DIM, BLOCK_D)
            # [BLOCK_M, BLOCK_N]: scale and log2 w enter with the exponent's multiply-add
            logits = tl.dot(q, tl.trans(k), input_precision="ieee")
            new_max = tl.maximum(running_max, tl.max(logits, 1) * scale_log2 + bias)
            p = tl.exp2(logits * scale_log2 - (new_max - bias)[:, None])
            correction = tl.exp2(running_max - new_max)
            running_max = new_max
            running_sum = running_sum * correction + tl.sum(p, 1)
            # [BLOCK_N, BLOCK_D]
            v = load_full_rows(row_base(v_base, start, v_stride_n), v_offsets, HEAD_DIM, BLOCK_D)
            acc = tl.dot(p.to(v.dtype), v, acc * correction[:, None], input_precision="ieee")
            start, bias = load_full(full_ptr, block + 1, JOINT)

        partial_k = tile_offsets(k_stride_n, BLOCK_P, BLOCK_D)
        partial_v = tile_offsets(v_stride_n, BLOCK_P, BLOCK_D)
        start, length, mask, bias = load_partial(partial_ptr, first_partial, JOINT)
        for block in range(first_partial, first_partial + n_partial):
            keep = load_mask(masks_ptr, mask, BLOCK_M, BLOCK_P)
            # [BLOCK_P, BLOCK_D]
            k = load_rows(row_base(k_base, start, k_stride_n), partial_k, columns < length, HEAD_DIM, BLOCK_D)
            v = load_rows(row_base(v_base, start, v_stride_n), partial_v, columns < length, HEAD_DIM, BLOCK_D)
            # [BLOCK_M, BLOCK_P]
            logits = tl.dot(q, tl.trans(k), input_precision="ieee")
            logits = tl.where(keep, logits * scale_log2 + (taint(v) + bias)[None, :], float("-inf"))
            new_max = tl.maximum(running_max, tl.max(logits, 1))
            # rows that have met no key yet keep their state
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            p = tl.exp2(logits - shift[:, None])
            correction = tl.exp2(running_max - shift)
            running_max = new_max
            running_sum = running_sum * correction + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), finite(v), acc * correction[:, None], input_precision="ieee")
            start, length, mask, bias = load_partial(partial_ptr, block + 1, JOINT)

        # true of NaN too
        seen = running_sum != 0
        safe_sum = tl.where(seen, running_sum, 1.0)
        covered = covered_rows(segments_ptr, segment, BLOCK_M)
        lse = tl.where(seen, running_max + tl.log2(safe_sum), float("inf"))
        slot_base = batch_head * n_slots + slot + tile_start
        tl.store(lse_ptr + slot_base + rows, lse, mask=covered)
        acc *= (1.0 / safe_sum)[:, None]
        if IN_PLACE:
            weight = load_weight(segments_ptr, weight_ptr, gain_ptr, segment)
            scales = row_scales(segments_ptr, row_scale_ptr, segment, n_positions) + tile_start
            factor = tl.load(scales + rows, mask=covered, other=0.0)
            # where other segments replace this one, what it attends to does not count
            total += tl.where(factor[:, None] == 0, 0.0, acc * (weight * factor)[:, None])
        else:
            out_ptrs = result_rows(out_ptr, slot_base, HEAD_DIM, BLOCK_M, BLOCK_D)
            store_rows(out_ptrs, acc, in_tile, HEAD_DIM, BLOCK_D)
    if IN_PLACE:
        out_ptrs = result_rows(out_ptr, batch_head * n_positions + tile_start, HEAD_DIM, BLOCK_M, BLOCK_D)
        store_rows(out_ptrs, total, in_tile, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def gather_kernel(
    f_ptr,
    out_ptr,
    row_scale_ptr,
    gain_ptr,
    active_ptr,
    tiles_ptr,
    segments_ptr,
    weight_ptr,
    n_tiles,
    n_heads,
    n_positions,
    n_slots,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """out_i = Σ_r c_ri f_r(i), from the outputs of every (segment, row) in slots."""
    batch_head, _, _, tile_start, tile_rows, first, count = load_tile(tiles_ptr, n_tiles, n_heads)
    rows = tl.arange(0, BLOCK_M)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for segment in range(first, first + count):
        segment_ptr = segments_ptr + segment * 8
        alive = tl.load(active_ptr + tl.load(segment_ptr + 6)) != 0
        covered = covered_rows(segments_ptr, segment, BLOCK_M) & alive
        scales = row_scales(segments_ptr, row_scale_ptr, segment, n_positions) + tile_start
        factor = tl.load(scales + rows, mask=covered, other=0.0)
        slot_base = batch_head * n_slots + tl.load(segment_ptr + 4) + tile_start
        f_ptrs = result_rows(f_ptr, slot_base, HEAD_DIM, BLOCK_M, BLOCK_D)
        f = load_result(f_ptrs, factor != 0, HEAD_DIM, BLOCK_D)
        total += f * (factor * load_weight(segments_ptr, weight_ptr, gain_ptr, segment))[:, None]
    out_ptrs = result_rows(out_ptr, batch_head * n_positions + tile_start, HEAD_DIM, BLOCK_M, BLOCK_D)
    store_rows(out_ptrs, total, rows < tile_rows, HEAD_DIM, BLOCK_D)
