"""Sigmoid attention in Triton: the passes of the operation without its normaliser.

With c_ri the factor of segment r at row i, and p_rij = σ(scale · q_i·k_j),

    out_i = Σ_rj c_ri p_rij v_j         dS_rij = c_ri p_rij (1 − p_rij) (dO_i·v_j)
    dq_i  = scale · Σ_rj dS_rij k_j     dk_j = scale · Σ_ri dS_rij q_i     dv_j = Σ_ri c_ri p_rij dO_i

Nothing couples the keys of a row, so c enters with each pair, one accumulator does for all segments, and no pass waits
for another.
"""

import triton
import triton.language as tl

from .backward import SIZES, STRIDES
from .primitives import (
    covered_rows,
    finite,
    head_base,
    load_full,
    load_full_rows,
    load_mask,
    load_partial,
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


@triton.jit
def sigmoid(logits_log2):
    """σ of logits that were multiplied by log2 e; no power overflows on the way."""
    power = tl.exp2(-tl.abs(logits_log2))
    return tl.where(logits_log2 >= 0, 1.0, power) / (1.0 + power)


@triton.jit(do_not_specialize=SIZES + STRIDES)
def sigmoid_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
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
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out_i = Σ_rj c_ri σ(scale · q_i·k_j) v_j over the segments r of row i."""
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
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for segment in range(first, first + count):
        first_full, n_full, first_partial, n_partial, _ = load_segment(segments_ptr, active_ptr, segment, False)
        # [BLOCK_M]: 0 outside of the segment's rows
        scales = row_scales(segments_ptr, row_scale_ptr, segment, n_positions) + tile_start
        factor = tl.load(scales + rows, mask=covered_rows(segments_ptr, segment, BLOCK_M), other=0.0)
        counts = factor != 0
        factor *= load_weight(segments_ptr, weight_ptr, gain_ptr, segment)

        start, _ = load_full(full_ptr, first_full, False)
        for block in range(first_full, first_full + n_full):
            # [BLOCK_N, BLOCK_D]
            k = load_full_rows(row_base(k_base, start, k_stride_n), k_offsets, HEAD_DIM, BLOCK_D)
            v = load_full_rows(row_base(v_base, start, v_stride_n), v_offsets, HEAD_DIM, BLOCK_D)
            # [BLOCK_M, BLOCK_N]
            p = sigmoid(tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2)
            acc = tl.dot((p * factor[:, None]).to(v.dtype), v, acc, input_precision="ieee")
            start, _ = load_full(full_ptr, block + 1, False)

        partial_k = tile_offsets(k_stride_n, BLOCK_P, BLOCK_D)
        partial_v = tile_offsets(v_stride_n, BLOCK_P, BLOCK_D)
        start, length, mask, _ = load_partial(partial_ptr, first_partial, False)
        for block in range(first_partial, first_partial + n_partial):
            keep = load_mask(masks_ptr, mask, BLOCK_M, BLOCK_P) & counts[:, None]
            # [BLOCK_P, BLOCK_D]
            k = load_rows(row_base(k_base, start, k_stride_n), partial_k, columns < length, HEAD_DIM, BLOCK_D)
            v = load_rows(row_base(v_base, start, v_stride_n), partial_v, columns < length, HEAD_DIM, BLOCK_D)
            # [BLOCK_M, BLOCK_P]
            p = sigmoid(tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 + taint(v)[None, :])
            p = tl.where(keep, p * factor[:, None], 0.0)
            acc = tl.dot(p.to(v.dtype), finite(v), acc, input_precision="ieee")
            start, length, mask, _ = load_partial(partial_ptr, block + 1, False)

    out_ptrs = result_rows(out_ptr, batch_head * n_positions + tile_start, HEAD_DIM, BLOCK_M, BLOCK_D)
    store_rows(out_ptrs, acc, in_tile, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=SIZES + STRIDES)
def sigmoid_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    delta_ptr,
    dq_ptr,
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
    scale,
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
    do_stride_b,
    do_stride_h,
    do_stride_n,
    GAINS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq_i = scale · Σ_rj dS_rij k_j and, where gains are trained, δ_ri = Σ_j p_rij (dO_i·v_j)."""
    batch_head, batch, head, tile_start, tile_rows, first, count = load_tile(tiles_ptr, n_tiles, n_heads)
    rows = tl.arange(0, BLOCK_M)
    BLOCK_P: tl.constexpr = partial_width(BLOCK_N)
    columns = tl.arange(0, BLOCK_P)
    in_tile = rows < tile_rows
    q_base = row_base(head_base(q_ptr, batch, head, q_stride_b, q_stride_h), tile_start, q_stride_n)
    do_base = row_base(head_base(do_ptr, batch, head, do_stride_b, do_stride_h), tile_start, do_stride_n)
    k_base = head_base(k_ptr, batch, head, k_stride_b, k_stride_h)
    v_base = head_base(v_ptr, batch, head, v_stride_b, v_stride_h)
    k_offsets = tile_offsets(k_stride_n, BLOCK_N, BLOCK_D)
    v_offsets = tile_offsets(v_stride_n, BLOCK_N, BLOCK_D)
    # [BLOCK_M, BLOCK_D]
    q = load_rows(q_base, tile_offsets(q_stride_n, BLOCK_M, BLOCK_D), in_tile, HEAD_DIM, BLOCK_D)
    do = load_rows(do_base, tile_offsets(do_stride_n, BLOCK_M, BLOCK_D), in_tile, HEAD_DIM, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for segment in range(first, first + count):
        first_full, n_full, first_partial, n_partial, slot = load_segment(segments_ptr, active_ptr, segment, False)
        covered = covered_rows(segments_ptr, segment, BLOCK_M)
        # [BLOCK_M]: 0 outside of the segment's rows
        scales = row_scales(segments_ptr, row_scale_ptr, segment, n_positions) + tile_start
        factor = tl.load(scales + rows, mask=covered, other=0.0)
        counts = factor != 0
        factor *= load_weight(segments_ptr, weight_ptr, gain_ptr, segment)
        delta = tl.zeros([BLOCK_M], tl.float32)

        start, _ = load_full(full_ptr, first_full, False)
        for block in range(first_full, first_full + n_full):
            # [BLOCK_N, BLOCK_D]
            k = load_full_rows(row_base(k_base, start, k_stride_n), k_offsets, HEAD_DIM, BLOCK_D)
            v = load_full_rows(row_base(v_base, start, v_stride_n), v_offsets, HEAD_DIM, BLOCK_D)
            # [BLOCK_M, BLOCK_N]
            p = sigmoid(tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2)
            dp = p * tl.dot(do, tl.trans(v), input_precision="ieee")
            ds = dp * (1.0 - p) * factor[:, None]
            acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
            if GAINS:
                delta += tl.sum(dp, 1)
            start, _ = load_full(full_ptr, block + 1, False)

        partial_k = tile_offsets(k_stride_n, BLOCK_P, BLOCK_D)
        partial_v = tile_offsets(v_stride_n, BLOCK_P, BLOCK_D)
        start, length, mask, _ = load_partial(partial_ptr, first_partial, False)
        for block in range(first_partial, first_partial + n_partial):
            keep = load_mask(masks_ptr, mask, BLOCK_M, BLOCK_P) & counts[:, None]
            # [BLOCK_P, BLOCK_D]
            k = load_rows(row_base(k_base, start, k_stride_n), partial_k, columns < length, HEAD_DIM, BLOCK_D)
            v = load_rows(row_base(v_base, start, v_stride_n), partial_v, columns < length, HEAD_DIM, BLOCK_D)
            # [BLOCK_M, BLOCK_P]
            p = sigmoid(tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 + taint(k)[None, :])
            dp = tl.where(keep, p * tl.dot(do, tl.trans(v), input_precision="ieee"), 0.0)
            ds = tl.where(keep, dp * (1.0 - p) * factor[:, None], 0.0)
            acc = tl.dot(ds.to(k.dtype), finite(k), acc, input_precision="ieee")
            if GAINS:
                delta += tl.sum(dp, 1)
            start, length, mask, _ = load_partial(partial_ptr, block + 1, False)

        if GAINS:
            delta_ptrs = delta_ptr + batch_head * n_slots + slot + tile_start + rows
            tl.store(delta_ptrs, tl.where(counts, delta, 0.0), mask=covered)

    dq_ptrs = result_rows(dq_ptr, batch_head * n_positions + tile_start, HEAD_DIM, BLOCK_M, BLOCK_D)
    store_rows(dq_ptrs, acc * scale, in_tile, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=SIZES + STRIDES)
def sigmoid_dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    dk_ptr,
    dv_ptr,
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
    scale,
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
    do_stride_b,
    do_stride_h,
    do_stride_n,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk_j = scale · Σ_ri dS_rij q_i and dv_j = Σ_ri c_ri p_rij dO_i: BLOCK_M keys walk blocks of BLOCK_N queries, all
    transposed."""
    batch_head, batch, head, tile_start, tile_rows, first, count = load_tile(tiles_ptr, n_tiles, n_heads)
    in_tile = tl.arange(0, BLOCK_M) < tile_rows
    BLOCK_P: tl.constexpr = partial_width(BLOCK_N)
    queries = tl.arange(0, BLOCK_N)
    partial_queries = tl.arange(0, BLOCK_P)
    k_base = row_base(head_base(k_ptr, batch, head, k_stride_b, k_stride_h), tile_start, k_stride_n)
    v_base = row_base(head_base(v_ptr, batch, head, v_stride_b, v_stride_h), tile_start, v_stride_n)
    q_base = head_base(q_ptr, batch, head, q_stride_b, q_stride_h)
    do_base = head_base(do_ptr, batch, head, do_stride_b, do_stride_h)
    q_offsets = tile_offsets(q_stride_n, BLOCK_N, BLOCK_D)
    do_offsets = tile_offsets(do_stride_n, BLOCK_N, BLOCK_D)
    # [BLOCK_M, BLOCK_D]
    k = load_rows(k_base, tile_offsets(k_stride_n, BLOCK_M, BLOCK_D), in_tile, HEAD_DIM, BLOCK_D)
    v = load_rows(v_base, tile_offsets(v_stride_n, BLOCK_M, BLOCK_D), in_tile, HEAD_DIM, BLOCK_D)
    dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for segment in range(first, first + count):
        first_full, n_full, first_partial, n_partial, _ = load_segment(segments_ptr, active_ptr, segment, False)
        weight = load_weight(segments_ptr, weight_ptr, gain_ptr, segment)
        scales = row_scales(segments_ptr, row_scale_ptr, segment, n_positions)

        start, _ = load_full(full_ptr, first_full, False)
        for block in range(first_full, first_full + n_full):
            # [BLOCK_N, BLOCK_D]
            q = load_full_rows(row_base(q_base, start, q_stride_n), q_offsets, HEAD_DIM, BLOCK_D)
            do = load_full_rows(row_base(do_base, start, do_stride_n), do_offsets, HEAD_DIM, BLOCK_D)
            # [BLOCK_N]
            factor = tl.load(scales + start + queries) * weight
            # [BLOCK_M, BLOCK_N]
            p = sigmoid(tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2)
            weighted = p * factor[None, :]
            dv = tl.dot(weighted.to(do.dtype), do, dv, input_precision="ieee")
            ds = weighted * (1.0 - p) * tl.dot(v, tl.trans(do), input_precision="ieee")
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
            start, _ = load_full(full_ptr, block + 1, False)

        partial_q = tile_offsets(q_stride_n, BLOCK_P, BLOCK_D)
        partial_do = tile_offsets(do_stride_n, BLOCK_P, BLOCK_D)
        start, length, mask, _ = load_partial(partial_ptr, first_partial, False)
        for block in range(first_partial, first_partial + n_partial):
            in_block = partial_queries < length
            row_scale = tl.load(scales + start + partial_queries, mask=in_block, other=0.0)
            keep = load_mask(masks_ptr, mask, BLOCK_M, BLOCK_P) & (row_scale != 0)[None, :]
            # [BLOCK_P, BLOCK_D]
            q = load_rows(row_base(q_base, start, q_stride_n), partial_q, in_block, HEAD_DIM, BLOCK_D)
            do = load_rows(row_base(do_base, start, do_stride_n), partial_do, in_block, HEAD_DIM, BLOCK_D)
            tainted = taint(q) + taint(do)
            # [BLOCK_M, BLOCK_P]
            p = sigmoid(tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2 + tainted[None, :])
            weighted = tl.where(keep, p * (row_scale * weight)[None, :], 0.0)
            dv = tl.dot(weighted.to(do.dtype), finite(do), dv, input_precision="ieee")
            ds = weighted * (1.0 - p) * tl.dot(v, tl.trans(do), input_precision="ieee")
            ds = tl.where(keep, ds, 0.0)
            dk = tl.dot(ds.to(q.dtype), finite(q), dk, input_precision="ieee")
            start, length, mask, _ = load_partial(partial_ptr, block + 1, False)

    row = batch_head * n_positions + tile_start
    store_rows(result_rows(dk_ptr, row, HEAD_DIM, BLOCK_M, BLOCK_D), dk * scale, in_tile, HEAD_DIM, BLOCK_D)
    store_rows(result_rows(dv_ptr, row, HEAD_DIM, BLOCK_M, BLOCK_D), dv, in_tile, HEAD_DIM, BLOCK_D)
