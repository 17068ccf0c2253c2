"""Sigmoid attention in Triton: the passes of the operation without its normaliser.

With c_ri the factor of segment r at row i, and p_rij = σ(scale · q_i·k_j),

    out_i = Σ_rj c_ri p_rij v_j         dS_rij = c_ri p_rij (1 − p_rij) (dO_i·v_j)
    dq_i  = scale · Σ_rj dS_rij k_j     dk_j = scale · Σ_ri dS_rij q_i     dv_j = Σ_ri c_ri p_rij dO_i

Nothing couples the keys of a row, so c enters with each pair, one accumulator does for all segments, and no pass waits
for another. ``factor_ptr`` holds c for every slot, the same for all heads.
"""

import triton
import triton.language as tl

from .primitives import (
    closes_segment,
    covered_rows,
    load_rows,
    load_run,
    load_slot,
    load_tile,
    row_base,
    store_rows,
    tile_offsets,
)


@triton.jit
def sigmoid(logits_log2):
    """σ of logits that were multiplied by log2 e; 0 at −inf, and no power overflows on the way."""
    power = tl.exp2(-tl.abs(logits_log2))
    return tl.where(logits_log2 >= 0, 1.0, power) / (1.0 + power)


@triton.jit(do_not_specialize=["n_tiles", "n_rows", "n_heads", "n_positions"])
def sigmoid_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    factor_ptr,
    tiles_ptr,
    rows_ptr,
    n_tiles,
    n_rows,
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
    batch_head, batch, head, tile_start, tile_rows, row, n_blocks = load_tile(tiles_ptr, n_tiles, n_heads)
    rows = tl.arange(0, BLOCK_M)
    in_tile = rows < tile_rows
    q_base = row_base(q_ptr + batch * q_stride_b + head * q_stride_h, tile_start, q_stride_n)
    k_base = k_ptr + batch * k_stride_b + head * k_stride_h
    v_base = v_ptr + batch * v_stride_b + head * v_stride_h
    k_offsets = tile_offsets(k_stride_n, BLOCK_N, BLOCK_D)
    v_offsets = tile_offsets(v_stride_n, BLOCK_N, BLOCK_D)
    # [BLOCK_M, BLOCK_D]
    q = load_rows(q_base, tile_offsets(q_stride_n, BLOCK_M, BLOCK_D), in_tile, HEAD_DIM, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    start, remaining, flags = load_run(rows_ptr, row, n_rows)
    slot = load_slot(rows_ptr, row, n_rows)
    next_start, next_length, next_flags = load_run(rows_ptr, row + 1, n_rows)
    next_slot = load_slot(rows_ptr, row + 1, n_rows)
    for _ in range(n_blocks):
        in_run = tl.arange(0, BLOCK_N) < remaining
        # [BLOCK_N, BLOCK_D]
        k = load_rows(row_base(k_base, start, k_stride_n), k_offsets, in_run, HEAD_DIM, BLOCK_D)
        v = load_rows(row_base(v_base, start, v_stride_n), v_offsets, in_run, HEAD_DIM, BLOCK_D)
        # [BLOCK_M]: 0 outside the run's rows
        factor = tl.load(factor_ptr + slot + rows, mask=covered_rows(flags, BLOCK_M), other=0.0)
        bias = tl.where(in_run, 0.0, float("-inf"))
        # [BLOCK_M, BLOCK_N]
        p = sigmoid(tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 + bias[None, :])
        acc = tl.dot((p * factor[:, None]).to(v.dtype), v, acc, input_precision="ieee")

        finished = remaining <= BLOCK_N
        start = tl.where(finished, next_start, start + BLOCK_N)
        remaining = tl.where(finished, next_length, remaining - BLOCK_N)
        flags = tl.where(finished, next_flags, flags)
        slot = tl.where(finished, next_slot, slot)
        row += finished.to(tl.int32)
        next_start, next_length, next_flags = load_run(rows_ptr, row + 1, n_rows)
        next_slot = load_slot(rows_ptr, row + 1, n_rows)

    out_base = row_base(out_ptr + batch_head * n_positions * HEAD_DIM, tile_start, HEAD_DIM)
    store_rows(out_base, tile_offsets(HEAD_DIM, BLOCK_M, BLOCK_D), acc, in_tile, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["n_tiles", "n_rows", "n_heads", "n_positions", "n_slots"])
def sigmoid_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    factor_ptr,
    delta_ptr,
    dq_ptr,
    tiles_ptr,
    rows_ptr,
    n_tiles,
    n_rows,
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
    batch_head, batch, head, tile_start, tile_rows, row, n_blocks = load_tile(tiles_ptr, n_tiles, n_heads)
    rows = tl.arange(0, BLOCK_M)
    in_tile = rows < tile_rows
    q_base = row_base(q_ptr + batch * q_stride_b + head * q_stride_h, tile_start, q_stride_n)
    do_base = row_base(do_ptr + batch * do_stride_b + head * do_stride_h, tile_start, do_stride_n)
    k_base = k_ptr + batch * k_stride_b + head * k_stride_h
    v_base = v_ptr + batch * v_stride_b + head * v_stride_h
    slot_base = batch_head * n_slots
    k_offsets = tile_offsets(k_stride_n, BLOCK_N, BLOCK_D)
    v_offsets = tile_offsets(v_stride_n, BLOCK_N, BLOCK_D)
    # [BLOCK_M, BLOCK_D]
    q = load_rows(q_base, tile_offsets(q_stride_n, BLOCK_M, BLOCK_D), in_tile, HEAD_DIM, BLOCK_D)
    do = load_rows(do_base, tile_offsets(do_stride_n, BLOCK_M, BLOCK_D), in_tile, HEAD_DIM, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if GAINS:
        segment_delta = tl.zeros([BLOCK_M], tl.float32)
        in_segment = tl.zeros([BLOCK_M], tl.int32)

    start, remaining, flags = load_run(rows_ptr, row, n_rows)
    slot = load_slot(rows_ptr, row, n_rows)
    next_start, next_length, next_flags = load_run(rows_ptr, row + 1, n_rows)
    next_slot = load_slot(rows_ptr, row + 1, n_rows)
    for _ in range(n_blocks):
        in_run = tl.arange(0, BLOCK_N) < remaining
        covered = covered_rows(flags, BLOCK_M)
        # [BLOCK_N, BLOCK_D]
        k = load_rows(row_base(k_base, start, k_stride_n), k_offsets, in_run, HEAD_DIM, BLOCK_D)
        v = load_rows(row_base(v_base, start, v_stride_n), v_offsets, in_run, HEAD_DIM, BLOCK_D)
        # [BLOCK_M]: 0 outside the run's rows
        factor = tl.load(factor_ptr + slot + rows, mask=covered, other=0.0)
        bias = tl.where(in_run, 0.0, float("-inf"))
        # [BLOCK_M, BLOCK_N]
        p = sigmoid(tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 + bias[None, :])
        dp = p * tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = dp * (1.0 - p) * factor[:, None]
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
        if GAINS:
            segment_delta += tl.where(covered, tl.sum(dp, 1), 0.0)
            in_segment = tl.where(covered, 1, in_segment)
            if closes_segment(flags, remaining, BLOCK_N):
                tl.store(delta_ptr + slot_base + slot + rows, segment_delta, mask=in_segment > 0)
                segment_delta = tl.zeros([BLOCK_M], tl.float32)
                in_segment = tl.zeros([BLOCK_M], tl.int32)

        finished = remaining <= BLOCK_N
        start = tl.where(finished, next_start, start + BLOCK_N)
        remaining = tl.where(finished, next_length, remaining - BLOCK_N)
        flags = tl.where(finished, next_flags, flags)
        slot = tl.where(finished, next_slot, slot)
        row += finished.to(tl.int32)
        next_start, next_length, next_flags = load_run(rows_ptr, row + 1, n_rows)
        next_slot = load_slot(rows_ptr, row + 1, n_rows)

    dq_base = row_base(dq_ptr + batch_head * n_positions * HEAD_DIM, tile_start, HEAD_DIM)
    store_rows(dq_base, tile_offsets(HEAD_DIM, BLOCK_M, BLOCK_D), acc * scale, in_tile, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["n_tiles", "n_rows", "n_heads", "n_positions"])
def sigmoid_dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    factor_ptr,
    dk_ptr,
    dv_ptr,
    tiles_ptr,
    rows_ptr,
    n_tiles,
    n_rows,
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
    batch_head, batch, head, tile_start, tile_rows, row, n_blocks = load_tile(tiles_ptr, n_tiles, n_heads)
    in_tile = tl.arange(0, BLOCK_M) < tile_rows
    queries = tl.arange(0, BLOCK_N)
    k_base = row_base(k_ptr + batch * k_stride_b + head * k_stride_h, tile_start, k_stride_n)
    v_base = row_base(v_ptr + batch * v_stride_b + head * v_stride_h, tile_start, v_stride_n)
    q_base = q_ptr + batch * q_stride_b + head * q_stride_h
    do_base = do_ptr + batch * do_stride_b + head * do_stride_h
    q_offsets = tile_offsets(q_stride_n, BLOCK_N, BLOCK_D)
    do_offsets = tile_offsets(do_stride_n, BLOCK_N, BLOCK_D)
    # [BLOCK_M, BLOCK_D]
    k = load_rows(k_base, tile_offsets(k_stride_n, BLOCK_M, BLOCK_D), in_tile, HEAD_DIM, BLOCK_D)
    v = load_rows(v_base, tile_offsets(v_stride_n, BLOCK_M, BLOCK_D), in_tile, HEAD_DIM, BLOCK_D)
    dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    start, remaining, flags = load_run(rows_ptr, row, n_rows)
    slot = load_slot(rows_ptr, row, n_rows)
    next_start, next_length, next_flags = load_run(rows_ptr, row + 1, n_rows)
    next_slot = load_slot(rows_ptr, row + 1, n_rows)
    for _ in range(n_blocks):
        in_run = queries < remaining
        # [BLOCK_N, BLOCK_D]
        q = load_rows(row_base(q_base, start, q_stride_n), q_offsets, in_run, HEAD_DIM, BLOCK_D)
        do = load_rows(row_base(do_base, start, do_stride_n), do_offsets, in_run, HEAD_DIM, BLOCK_D)
        # [BLOCK_N]: 0 past the run's end
        factor = tl.load(factor_ptr + slot + queries, mask=in_run, other=0.0)
        # [BLOCK_M]
        bias = tl.where(covered_rows(flags, BLOCK_M), 0.0, float("-inf"))
        # [BLOCK_M, BLOCK_N]
        p = sigmoid(tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2 + bias[:, None])
        weighted = p * factor[None, :]
        dv = tl.dot(weighted.to(do.dtype), do, dv, input_precision="ieee")
        ds = weighted * (1.0 - p) * tl.dot(v, tl.trans(do), input_precision="ieee")
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")

        finished = remaining <= BLOCK_N
        start = tl.where(finished, next_start, start + BLOCK_N)
        slot = tl.where(finished, next_slot, slot + BLOCK_N)
        remaining = tl.where(finished, next_length, remaining - BLOCK_N)
        flags = tl.where(finished, next_flags, flags)
        row += finished.to(tl.int32)
        next_start, next_length, next_flags = load_run(rows_ptr, row + 1, n_rows)
        next_slot = load_slot(rows_ptr, row + 1, n_rows)

    out_offsets = tile_offsets(HEAD_DIM, BLOCK_M, BLOCK_D)
    head_base = batch_head * n_positions * HEAD_DIM
    store_rows(row_base(dk_ptr + head_base, tile_start, HEAD_DIM), out_offsets, dk * scale, in_tile, HEAD_DIM, BLOCK_D)
    store_rows(row_base(dv_ptr + head_base, tile_start, HEAD_DIM), out_offsets, dv, in_tile, HEAD_DIM, BLOCK_D)
