"""The backward passes: δ, then dQ over query tiles, then dK and dV over key tiles.

No atomics: every sum has one owner and a fixed order.

With c_ri the factor of segment r at row i (1 in joint form) and p_rij its softmax,

    δ_ri  = dO_i · f_r(i) = Σ_j p_rij (dO_i·v_j)        dS_rij = c_ri p_rij (dO_i·v_j − δ_ri)
    dq_i  = scale · Σ_rj dS_rij k_j     dk_j = scale · Σ_ri dS_rij q_i     dv_j = Σ_ri c_ri p_rij dO_i

|c| is kept inside ``lse2 = lse − log2 |c|``: then |c| p = 2^(logit − lse2) costs nothing, and only a sign is left to
apply where gains exist.
"""

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


@triton.jit(do_not_specialize=["n_tiles", "n_heads", "n_positions"])
def joint_delta_kernel(
    out_ptr,
    do_ptr,
    delta_ptr,
    n_tiles,
    n_heads,
    n_positions,
    do_stride_b,
    do_stride_h,
    do_stride_n,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """δ_i = dO_i · out_i, the joint form's δ: out is the one segment's own output there."""
    program = tl.program_id(0)
    batch_head = (program // n_tiles).to(tl.int64)
    tile_start = (program % n_tiles) * BLOCK_M
    in_tile = tl.arange(0, BLOCK_M) < n_positions - tile_start
    do_base = do_ptr + (batch_head // n_heads) * do_stride_b + (batch_head % n_heads) * do_stride_h
    out_base = row_base(out_ptr + batch_head * n_positions * HEAD_DIM, tile_start, HEAD_DIM)
    # [BLOCK_M, BLOCK_D]
    out = load_rows(out_base, tile_offsets(HEAD_DIM, BLOCK_M, BLOCK_D), in_tile, HEAD_DIM, BLOCK_D)
    do_offsets = tile_offsets(do_stride_n, BLOCK_M, BLOCK_D)
    do = load_rows(row_base(do_base, tile_start, do_stride_n), do_offsets, in_tile, HEAD_DIM, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + batch_head * n_positions + tile_start + tl.arange(0, BLOCK_M), delta, mask=in_tile)


@triton.jit(do_not_specialize=["n_tiles", "n_rows", "n_heads", "n_positions", "n_slots"])
def edge_delta_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    lse2_ptr,
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
    do_stride_b,
    do_stride_h,
    do_stride_n,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """δ_ri = Σ_j p_rij (dO_i·v_j) and lse2_ri = lse_ri − log2 |c_ri| for every (segment, row).

    The walk is repeated because f_r(i) is not stored: it would take n_slots · D numbers, and ``out`` does not tell it.
    """
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

    segment_delta = tl.zeros([BLOCK_M], tl.float32)
    segment_lse = tl.full([BLOCK_M], float("inf"), tl.float32)

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
        # [BLOCK_M]: +inf outside the run's rows, where p becomes 0
        lse = tl.load(lse_ptr + slot_base + slot + rows, mask=covered, other=float("inf"))
        bias = tl.where(in_run, 0.0, float("-inf"))
        # [BLOCK_M, BLOCK_N]
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 + bias[None, :]
        p = tl.exp2(logits - lse[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        segment_delta += tl.sum(p * dp, 1)
        segment_lse = tl.where(covered, lse, segment_lse)

        if closes_segment(flags, remaining, BLOCK_N):
            seen = segment_lse < float("inf")
            factor = load_weight(weight_ptr, row, n_rows)
            factor *= load_row_scale(row_scale_ptr, n_positions, tile_start, flags, seen, BLOCK_M)
            tl.store(delta_ptr + slot_base + slot + rows, segment_delta, mask=seen)
            log2_factor = tl.log2(tl.where(factor == 0, 1.0, tl.abs(factor)))
            lse2 = tl.where(factor == 0, float("inf"), segment_lse - log2_factor)
            tl.store(lse2_ptr + slot_base + slot + rows, lse2, mask=seen)
            segment_delta = tl.zeros([BLOCK_M], tl.float32)
            segment_lse = tl.full([BLOCK_M], float("inf"), tl.float32)

        finished = remaining <= BLOCK_N
        start = tl.where(finished, next_start, start + BLOCK_N)
        remaining = tl.where(finished, next_length, remaining - BLOCK_N)
        flags = tl.where(finished, next_flags, flags)
        slot = tl.where(finished, next_slot, slot)
        row += finished.to(tl.int32)
        next_start, next_length, next_flags = load_run(rows_ptr, row + 1, n_rows)
        next_slot = load_slot(rows_ptr, row + 1, n_rows)


@triton.jit(do_not_specialize=["n_tiles", "n_rows", "n_heads", "n_positions", "n_slots"])
def dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse2_ptr,
    delta_ptr,
    dq_ptr,
    tiles_ptr,
    rows_ptr,
    weight_ptr,
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
    JOINT: tl.constexpr,
    SIGNED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq_i = scale · Σ_rj dS_rij k_j with dS_rij = sign(c_ri) · 2^(logit_ij − lse2_ri) · (dO_i·v_j − δ_ri)."""
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
    if JOINT:
        # [BLOCK_M]: one segment, whose slot is the row
        row_lse2 = tl.load(lse2_ptr + slot_base + tile_start + rows, mask=in_tile, other=float("inf"))
        delta = tl.load(delta_ptr + slot_base + tile_start + rows, mask=in_tile, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    start, remaining, flags = load_run(rows_ptr, row, n_rows)
    next_start, next_length, next_flags = load_run(rows_ptr, row + 1, n_rows)
    if not JOINT:
        slot = load_slot(rows_ptr, row, n_rows)
        next_slot = load_slot(rows_ptr, row + 1, n_rows)
    if JOINT or SIGNED:
        weight = load_weight(weight_ptr, row, n_rows)
        next_weight = load_weight(weight_ptr, row + 1, n_rows)
    for _ in range(n_blocks):
        in_run = tl.arange(0, BLOCK_N) < remaining
        covered = covered_rows(flags, BLOCK_M)
        # [BLOCK_N, BLOCK_D]
        k = load_rows(row_base(k_base, start, k_stride_n), k_offsets, in_run, HEAD_DIM, BLOCK_D)
        v = load_rows(row_base(v_base, start, v_stride_n), v_offsets, in_run, HEAD_DIM, BLOCK_D)
        # [BLOCK_M]: +inf outside the run's rows, where p becomes 0
        if JOINT:
            lse2 = tl.where(covered, row_lse2, float("inf"))
        else:
            lse2 = tl.load(lse2_ptr + slot_base + slot + rows, mask=covered, other=float("inf"))
            delta = tl.load(delta_ptr + slot_base + slot + rows, mask=covered, other=0.0)
        bias = tl.where(in_run, weight if JOINT else 0.0, float("-inf"))
        # [BLOCK_M, BLOCK_N]
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 + bias[None, :]
        p = tl.exp2(logits - lse2[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        if SIGNED:
            ds = tl.where(weight < 0, -ds, ds)
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")

        finished = remaining <= BLOCK_N
        start = tl.where(finished, next_start, start + BLOCK_N)
        remaining = tl.where(finished, next_length, remaining - BLOCK_N)
        flags = tl.where(finished, next_flags, flags)
        row += finished.to(tl.int32)
        next_start, next_length, next_flags = load_run(rows_ptr, row + 1, n_rows)
        if not JOINT:
            slot = tl.where(finished, next_slot, slot)
            next_slot = load_slot(rows_ptr, row + 1, n_rows)
        if JOINT or SIGNED:
            weight = tl.where(finished, next_weight, weight)
            next_weight = load_weight(weight_ptr, row + 1, n_rows)

    dq_base = row_base(dq_ptr + batch_head * n_positions * HEAD_DIM, tile_start, HEAD_DIM)
    store_rows(dq_base, tile_offsets(HEAD_DIM, BLOCK_M, BLOCK_D), acc * scale, in_tile, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["n_tiles", "n_rows", "n_heads", "n_positions", "n_slots"])
def dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse2_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    tiles_ptr,
    rows_ptr,
    weight_ptr,
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
    JOINT: tl.constexpr,
    SIGNED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk_j = scale · Σ_ri dS_rij q_i and dv_j = Σ_ri c_ri p_rij dO_i: BLOCK_M keys walk blocks of BLOCK_N queries.

    Everything is computed transposed, keys along the rows, so that P and dS enter their second dot from registers.
    """
    batch_head, batch, head, tile_start, tile_rows, row, n_blocks = load_tile(tiles_ptr, n_tiles, n_heads)
    in_tile = tl.arange(0, BLOCK_M) < tile_rows
    queries = tl.arange(0, BLOCK_N)
    k_base = row_base(k_ptr + batch * k_stride_b + head * k_stride_h, tile_start, k_stride_n)
    v_base = row_base(v_ptr + batch * v_stride_b + head * v_stride_h, tile_start, v_stride_n)
    q_base = q_ptr + batch * q_stride_b + head * q_stride_h
    do_base = do_ptr + batch * do_stride_b + head * do_stride_h
    slot_base = batch_head * n_slots
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
    if JOINT or SIGNED:
        weight = load_weight(weight_ptr, row, n_rows)
        next_weight = load_weight(weight_ptr, row + 1, n_rows)
    for _ in range(n_blocks):
        in_run = queries < remaining
        # [BLOCK_N, BLOCK_D]
        q = load_rows(row_base(q_base, start, q_stride_n), q_offsets, in_run, HEAD_DIM, BLOCK_D)
        do = load_rows(row_base(do_base, start, do_stride_n), do_offsets, in_run, HEAD_DIM, BLOCK_D)
        # [BLOCK_N]: +inf past the run's end, where p becomes 0
        lse2 = tl.load(lse2_ptr + slot_base + slot + queries, mask=in_run, other=float("inf"))
        delta = tl.load(delta_ptr + slot_base + slot + queries, mask=in_run, other=0.0)
        # [BLOCK_M]
        bias = tl.where(covered_rows(flags, BLOCK_M), weight if JOINT else 0.0, float("-inf"))
        # [BLOCK_M, BLOCK_N]
        logits = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2 + bias[:, None]
        p = tl.exp2(logits - lse2[None, :])
        if SIGNED:
            p = tl.where(weight < 0, -p, p)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")

        finished = remaining <= BLOCK_N
        start = tl.where(finished, next_start, start + BLOCK_N)
        slot = tl.where(finished, next_slot, slot + BLOCK_N)
        remaining = tl.where(finished, next_length, remaining - BLOCK_N)
        flags = tl.where(finished, next_flags, flags)
        row += finished.to(tl.int32)
        next_start, next_length, next_flags = load_run(rows_ptr, row + 1, n_rows)
        next_slot = load_slot(rows_ptr, row + 1, n_rows)
        if JOINT or SIGNED:
            weight = tl.where(finished, next_weight, weight)
            next_weight = load_weight(weight_ptr, row + 1, n_rows)

    out_offsets = tile_offsets(HEAD_DIM, BLOCK_M, BLOCK_D)
    head_base = batch_head * n_positions * HEAD_DIM
    store_rows(row_base(dk_ptr + head_base, tile_start, HEAD_DIM), out_offsets, dk * scale, in_tile, HEAD_DIM, BLOCK_D)
    store_rows(row_base(dv_ptr + head_base, tile_start, HEAD_DIM), out_offsets, dv, in_tile, HEAD_DIM, BLOCK_D)
