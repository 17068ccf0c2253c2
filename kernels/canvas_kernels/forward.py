"""The forward pass: outputs and log-sum-exps of every (segment, row)."""

import triton
import triton.language as tl

from .primitives import (
    closes_segment,
    covered_rows,
    load_row_scale,
    load_rows,
    load_run,
    load_slot,
    load_tile,
    load_weight,
    row_base,
    store_rows,
    tile_offsets,
)


@triton.jit(do_not_specialize=["n_tiles", "n_rows", "n_heads", "n_positions", "n_slots"])
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    row_scale_ptr,
    tiles_ptr,
    rows_ptr,
    weight_ptr,
    n_tiles,
    n_rows,
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
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out_i = Σ_r c_ri · softmax_j(scale · q_i·k_j) v_j over the segments r of row i, and their log-sum-exps
    lse_ri = log2 Σ_j 2^(scale_log2 · q_i·k_j).

    Joint form: one segment with c = 1 whose logits carry log2 w. ``weight_ptr`` holds log2 w there, else w · gain.
    """
    batch_head, batch, head, tile_start, tile_rows, row, n_blocks = load_tile(tiles_ptr, n_tiles, n_heads)
    in_tile = tl.arange(0, BLOCK_M) < tile_rows
    q_base = row_base(q_ptr + batch * q_stride_b + head * q_stride_h, tile_start, q_stride_n)
    k_base = k_ptr + batch * k_stride_b + head * k_stride_h
    v_base = v_ptr + batch * v_stride_b + head * v_stride_h
    slot_base = batch_head * n_slots
    k_offsets = tile_offsets(k_stride_n, BLOCK_N, BLOCK_D)
    v_offsets = tile_offsets(v_stride_n, BLOCK_N, BLOCK_D)
    # [BLOCK_M, BLOCK_D]
    q = load_rows(q_base, tile_offsets(q_stride_n, BLOCK_M, BLOCK_D), in_tile, HEAD_DIM, BLOCK_D)
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    segment_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    start, remaining, flags = load_run(rows_ptr, row, n_rows)
    next_start, next_length, next_flags = load_run(rows_ptr, row + 1, n_rows)
    if JOINT:
        weight = load_weight(weight_ptr, row, n_rows)
        next_weight = load_weight(weight_ptr, row + 1, n_rows)
    for _ in range(n_blocks):
        in_run = tl.arange(0, BLOCK_N) < remaining
        # [BLOCK_N, BLOCK_D]
        k = load_rows(row_base(k_base, start, k_stride_n), k_offsets, in_run, HEAD_DIM, BLOCK_D)
        # [BLOCK_N]: the mask and log2 w in one addend, cheaper than a second path for full blocks
        bias = tl.where(in_run, weight if JOINT else 0.0, float("-inf"))
        # [BLOCK_M, BLOCK_N]
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 + bias[None, :]
        covered = covered_rows(flags, BLOCK_M)
        new_max = tl.maximum(running_max, tl.max(logits, 1))
        # a shift of +inf makes every p of an uncovered row 0, and its state stays as it is
        p = tl.exp2(logits - tl.where(covered, new_max, float("inf"))[:, None])
        correction = tl.where(covered, tl.exp2(running_max - new_max), 1.0)
        running_max = tl.where(covered, new_max, running_max)
        running_sum = running_sum * correction + tl.sum(p, 1)
        # [BLOCK_N, BLOCK_D]
        v = load_rows(row_base(v_base, start, v_stride_n), v_offsets, in_run, HEAD_DIM, BLOCK_D)
        segment_acc = tl.dot(p.to(v.dtype), v, segment_acc * correction[:, None], input_precision="ieee")

        if not JOINT:  # noqa: SIM102 — the outer condition is settled when the kernel is compiled
            if closes_segment(flags, remaining, BLOCK_N):
                # read here and not carried with the cursor: the registers are worth more than the latency
                slot = load_slot(rows_ptr, row, n_rows)
                weight = load_weight(weight_ptr, row, n_rows)
                seen = running_sum > 0
                safe_sum = tl.where(seen, running_sum, 1.0)
                factor = weight * load_row_scale(row_scale_ptr, n_positions, tile_start, flags, seen, BLOCK_M)
                acc += segment_acc * (factor / safe_sum)[:, None]
                tl.store(lse_ptr + slot_base + slot + tl.arange(0, BLOCK_M), running_max + tl.log2(safe_sum), mask=seen)
                running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
                running_sum = tl.zeros([BLOCK_M], tl.float32)
                segment_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

        finished = remaining <= BLOCK_N
        start = tl.where(finished, next_start, start + BLOCK_N)
        remaining = tl.where(finished, next_length, remaining - BLOCK_N)
        flags = tl.where(finished, next_flags, flags)
        row += finished.to(tl.int32)
        next_start, next_length, next_flags = load_run(rows_ptr, row + 1, n_rows)
        if JOINT:
            weight = tl.where(finished, next_weight, weight)
            next_weight = load_weight(weight_ptr, row + 1, n_rows)

    if JOINT:
        seen = running_sum > 0
        safe_sum = tl.where(seen, running_sum, 1.0)
        acc = segment_acc * (1.0 / safe_sum)[:, None]
        tl.store(lse_ptr + slot_base + tile_start + tl.arange(0, BLOCK_M), running_max + tl.log2(safe_sum), mask=seen)
    out_base = row_base(out_ptr + batch_head * n_positions * HEAD_DIM, tile_start, HEAD_DIM)
    store_rows(out_base, tile_offsets(HEAD_DIM, BLOCK_M, BLOCK_D), acc, in_tile, HEAD_DIM, BLOCK_D)
