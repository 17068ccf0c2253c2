"""The backward passes: dQ over query tiles, which makes δ, then dK and dV over key tiles.

No atomics: every sum has one owner and a fixed order.

With c_ri the factor of segment r at row i (1 in joint form) and p_rij its softmax,

    δ_ri  = dO_i · f_r(i) = Σ_j p_rij (dO_i·v_j)        dS_rij = c_ri p_rij (dO_i·v_j − δ_ri)
    dq_i  = scale · Σ_rj dS_rij k_j     dk_j = scale · Σ_ri dS_rij q_i     dv_j = Σ_ri c_ri p_rij dO_i

For dK and dV, |c| is kept inside ``lse2 = lse − log2 |c|``: then |c| p = 2^(logit − lse2) costs nothing, and only a sign
is left to apply where gains exist.
"""

import triton
import triton.language as tl

from .primitives import (
    VECTOR,
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
    row_products,
    row_scales,
    store_rows,
    tile_offsets,
)

SIZES = ["n_tiles", "n_heads", "n_positions", "n_slots"]
STRIDES = [f"{x}_stride_{d}" for x in ("q", "k", "v", "do") for d in "bhn"]


@triton.jit(do_not_specialize=SIZES + STRIDES)
def dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    f_ptr,
    lse_ptr,
    lse2_ptr,
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
    JOINT: tl.constexpr,
    STORED: tl.constexpr,
    ONLY_DELTA: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq_i = scale · Σ_rj dS_rij k_j with dS_rij = 2^(logit_ij − lse_ri) · (c_ri dO_i·v_j − c_ri δ_ri).

    δ and lse2 of every (segment, row) are written first where f is STORED: in slots, which in joint form are rows. Else
    a pass before this one writes them, ONLY_DELTA, with δ_ri = Σ_j p_rij (dO_i·v_j), and no dq.
    """
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
    if JOINT:
        count = 1
    for segment in range(first, first + count):
        first_full, n_full, first_partial, n_partial, slot = load_segment(segments_ptr, active_ptr, segment, JOINT)
        covered = covered_rows(segments_ptr, segment, BLOCK_M)
        slot_base = batch_head * n_slots + slot + tile_start
        # [BLOCK_M]: +inf outside of the segment's rows, where p becomes 0
        lse = tl.load(lse_ptr + slot_base + rows, mask=covered, other=float("inf"))
        delta = tl.zeros([BLOCK_M], tl.float32)
        if STORED:
            delta = row_products(do_base, do_stride_n * VECTOR, f_ptr + slot_base * HEAD_DIM, covered, HEAD_DIM, BLOCK_M)
        elif not ONLY_DELTA:
            delta = tl.load(delta_ptr + slot_base + rows, mask=covered, other=0.0)
        if not JOINT:
            scales = row_scales(segments_ptr, row_scale_ptr, segment, n_positions) + tile_start
            row_scale = tl.load(scales + rows, mask=covered, other=0.0)
            factor = row_scale * load_weight(segments_ptr, weight_ptr, gain_ptr, segment)
            delta = tl.where(row_scale == 0, 0.0, delta)
        if STORED:
            tl.store(delta_ptr + slot_base + rows, delta, mask=covered)
        if not JOINT:
            if STORED or ONLY_DELTA:
                lse2 = tl.where(factor == 0, float("inf"), lse - tl.log2(tl.where(factor == 0, 1.0, tl.abs(factor))))
                tl.store(lse2_ptr + slot_base + rows, lse2, mask=covered)
            factor_delta = factor * delta

        start, bias = load_full(full_ptr, first_full, JOINT)
        for block in range(first_full, first_full + n_full):
            # [BLOCK_N, BLOCK_D]
            k = load_full_rows(row_base(k_base, start, k_stride_n), k_offsets, HEAD_DIM, BLOCK_D)
            v = load_full_rows(row_base(v_base, start, v_stride_n), v_offsets, HEAD_DIM, BLOCK_D)
            # [BLOCK_M, BLOCK_N]
            logits = tl.dot(q, tl.trans(k), input_precision="ieee")
            p = tl.exp2(logits * scale_log2 - (lse - bias)[:, None])
            dp = tl.dot(do, tl.trans(v), input_precision="ieee")
            if ONLY_DELTA:
                delta += tl.sum(p * dp, 1)
            else:
                ds = p * (dp - delta[:, None]) if JOINT else p * (dp * factor[:, None] - factor_delta[:, None])
                acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
            start, bias = load_full(full_ptr, block + 1, JOINT)

        partial_k = tile_offsets(k_stride_n, BLOCK_P, BLOCK_D)
        partial_v = tile_offsets(v_stride_n, BLOCK_P, BLOCK_D)
        start, length, mask, bias = load_partial(partial_ptr, first_partial, JOINT)
        for block in range(first_partial, first_partial + n_partial):
            keep = load_mask(masks_ptr, mask, BLOCK_M, BLOCK_P)
            # [BLOCK_P, BLOCK_D]
            k = load_rows(row_base(k_base, start, k_stride_n), partial_k, columns < length, HEAD_DIM, BLOCK_D)
            v = load_rows(row_base(v_base, start, v_stride_n), partial_v, columns < length, HEAD_DIM, BLOCK_D)
            # a key that is not finite made the lse of all that attend to it NaN
            k = finite(k)
            # [BLOCK_M, BLOCK_P]
            logits = tl.dot(q, tl.trans(k), input_precision="ieee")
            p = tl.exp2(tl.where(keep, logits * scale_log2 - (lse - bias)[:, None], float("-inf")))
            dp = tl.dot(do, tl.trans(v), input_precision="ieee")
            if ONLY_DELTA:
                delta += tl.sum(tl.where(keep, p * dp, 0.0), 1)
            else:
                ds = p * (dp - delta[:, None]) if JOINT else p * (dp * factor[:, None] - factor_delta[:, None])
                ds = tl.where(keep, ds, 0.0)
                acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
            start, length, mask, bias = load_partial(partial_ptr, block + 1, JOINT)

        if ONLY_DELTA:
            tl.store(delta_ptr + slot_base + rows, delta, mask=covered)
    if not ONLY_DELTA:
        dq_ptrs = result_rows(dq_ptr, batch_head * n_positions + tile_start, HEAD_DIM, BLOCK_M, BLOCK_D)
        store_rows(dq_ptrs, acc * scale, in_tile, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=SIZES + STRIDES)
def dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse2_ptr,
    delta_ptr,
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
    if JOINT:
        count = 1
    for segment in range(first, first + count):
        first_full, n_full, first_partial, n_partial, slot = load_segment(segments_ptr, active_ptr, segment, JOINT)
        slot_base = batch_head * n_slots + slot
        if SIGNED:
            weight = load_weight(segments_ptr, weight_ptr, gain_ptr, segment)
            scales = row_scales(segments_ptr, row_scale_ptr, segment, n_positions)

        start, bias = load_full(full_ptr, first_full, JOINT)
        for block in range(first_full, first_full + n_full):
            # [BLOCK_N, BLOCK_D]
            q = load_full_rows(row_base(q_base, start, q_stride_n), q_offsets, HEAD_DIM, BLOCK_D)
            do = load_full_rows(row_base(do_base, start, do_stride_n), do_offsets, HEAD_DIM, BLOCK_D)
            # [BLOCK_N]
            lse2 = tl.load(lse2_ptr + slot_base + start + queries)
            delta = tl.load(delta_ptr + slot_base + start + queries)
            # [BLOCK_M, BLOCK_N]
            logits = tl.dot(k, tl.trans(q), input_precision="ieee")
            p = tl.exp2(logits * scale_log2 - (lse2 - bias)[None, :])
            if SIGNED:
                p *= tl.where(weight * tl.load(scales + start + queries) < 0, -1.0, 1.0)[None, :]
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
            start, bias = load_full(full_ptr, block + 1, JOINT)

        partial_q = tile_offsets(q_stride_n, BLOCK_P, BLOCK_D)
        partial_do = tile_offsets(do_stride_n, BLOCK_P, BLOCK_D)
        start, length, mask, bias = load_partial(partial_ptr, first_partial, JOINT)
        for block in range(first_partial, first_partial + n_partial):
            in_block = partial_queries < length
            keep = load_mask(masks_ptr, mask, BLOCK_M, BLOCK_P)
            # [BLOCK_P, BLOCK_D]
            q = load_rows(row_base(q_base, start, q_stride_n), partial_q, in_block, HEAD_DIM, BLOCK_D)
            do = load_rows(row_base(do_base, start, do_stride_n), partial_do, in_block, HEAD_DIM, BLOCK_D)
            # [BLOCK_P]
            lse2 = tl.load(lse2_ptr + slot_base + start + partial_queries, mask=in_block, other=float("inf"))
            delta = tl.load(delta_ptr + slot_base + start + partial_queries, mask=in_block, other=0.0)
            # a query that is not finite has an lse of NaN, a gradient that is not one a δ of NaN, which taints p
            q, do = finite(q), finite(do)
            lse2 += delta * 0.0
            delta = finite(delta)
            # [BLOCK_M, BLOCK_P]
            logits = tl.dot(k, tl.trans(q), input_precision="ieee")
            p = tl.exp2(tl.where(keep, logits * scale_log2 - (lse2 - bias)[None, :], float("-inf")))
            if SIGNED:
                row_scale = tl.load(scales + start + partial_queries, mask=in_block, other=0.0)
                p *= tl.where(weight * row_scale < 0, -1.0, 1.0)[None, :]
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
            start, length, mask, bias = load_partial(partial_ptr, block + 1, JOINT)

    row = batch_head * n_positions + tile_start
    store_rows(result_rows(dk_ptr, row, HEAD_DIM, BLOCK_M, BLOCK_D), dk * scale, in_tile, HEAD_DIM, BLOCK_D)
    store_rows(result_rows(dv_ptr, row, HEAD_DIM, BLOCK_M, BLOCK_D), dv, in_tile, HEAD_DIM, BLOCK_D)
