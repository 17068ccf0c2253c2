# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportIndexIssue=false
"""The backward passes: dQ over query tiles, which makes δ, then dK and dV over key tiles.

No atomics: every sum has one owner and a fixed order.

With c_ri the factor of segment r at row i (1 in joint form) and p_rij its softmax,

    δ_ri  = dO_i · f_r(i) = Σ_j p_rij (dO_i·v_j)        dS_rij = c_ri p_rij (dO_i·v_j − δ_ri)
    dq_i  = scale · Σ_rj dS_rij k_j     dk_j = scale · Σ_ri dS_rij q_i     dv_j = Σ_ri c_ri p_rij dO_i

For dK and dV, |c| is kept inside ``lse2 = lse − log2 |c|``: then |c| p = 2^(logit − lse2) costs nothing. Neither do
signs: ``lse2`` has a plane for rows where c is positive and one for those where it is negative, +inf at the others. A
segment walks one of them, or both where row scales may have any sign, and the sums change sign in between.

SIGMOID, without the normaliser: p_rij = σ(scale · q_i·k_j), δ_ri = Σ_j p_rij (dO_i·v_j) is for gains alone, and
dS_rij = c_ri p_rij (1 − p_rij) (dO_i·v_j).
"""

import triton
import triton.language as tl

from . import common as kit

SIZES = ["strides", "n_tiles", "n_heads", "n_positions", "n_slots"]


@triton.jit(do_not_specialize=SIZES)
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
    tables,
    factors,
    strides,
    n_tiles,
    n_heads,
    n_positions,
    n_slots,
    scale,
    scale_log2,
    JOINT: tl.constexpr,
    SIGMOID: tl.constexpr,
    STORED: tl.constexpr,
    WALK_DELTA: tl.constexpr,
    WRITE_DQ: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr = False,
):
    """dq_i = scale · Σ_rj dS_rij k_j with dS_rij = 2^(logit_ij − lse_ri) · (c_ri dO_i·v_j − c_ri δ_ri).

    δ and lse2 of every (segment, row) are written first where f is STORED: in slots, which in joint form are rows. Else
    a pass before this one writes them, WALK_DELTA without WRITE_DQ. MASKED is that of the forward pass; dK and dV need
    no mask, for the gradients of masked keys are dropped.
    """
    batch_head, batch, head, tile_start, tile_rows, first, count = kit.load_tile(tables, n_tiles, n_heads)
    BLOCK_P: tl.constexpr = kit.partial_width(BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    in_tile = rows < tile_rows
    q_base, q_stride = kit.head_base(q_ptr, batch, head, strides, kit.Q)
    k_base, k_stride = kit.head_base(k_ptr, batch, head, strides, kit.K)
    v_base, _ = kit.head_base(v_ptr, batch, head, strides, kit.V)
    do_base, do_stride = kit.head_base(do_ptr, batch, head, strides, kit.DO)
    q_base, do_base = kit.row_base(q_base, tile_start, q_stride), kit.row_base(do_base, tile_start, do_stride)
    k_offsets = kit.tile_offsets(k_stride, BLOCK_N, BLOCK_D)
    # [BLOCK_M, BLOCK_D]
    q = kit.load_rows(q_base, kit.tile_offsets(q_stride, BLOCK_M, BLOCK_D), in_tile, HEAD_DIM, BLOCK_D)
    do = kit.load_rows(do_base, kit.tile_offsets(do_stride, BLOCK_M, BLOCK_D), in_tile, HEAD_DIM, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if JOINT:
        count = 1
    # a count of 1 leaves no loop
    for index in range(count):
        segment = first + index
        first_full, n_full, first_partial, n_partial, slot = kit.load_segment(tables, factors, segment, JOINT)
        covered = kit.covered_rows(tables, segment, BLOCK_M)
        slots = batch_head * n_slots + slot + tile_start + rows
        delta = tl.zeros([BLOCK_M], tl.float32)
        if not JOINT:
            # [BLOCK_M]: 0 outside of the segment's rows
            factor = kit.load_factor(tables, factors, segment, n_positions, tile_start, BLOCK_M)
        if not SIGMOID:
            # [BLOCK_M]: +inf outside of the segment's rows, where p becomes 0
            lse = tl.load(lse_ptr + slots, mask=covered, other=float("inf"))
        if STORED:
            f_base = f_ptr + (batch_head * n_slots + slot + tile_start) * HEAD_DIM
            delta = kit.row_products(do_base, do_stride, f_base, covered, HEAD_DIM, BLOCK_M)
            if not JOINT:
                delta = tl.where(kit.is_active(tables, factors, segment), delta, 0.0)
            tl.store(delta_ptr + slots, delta, mask=covered)
        elif WRITE_DQ and not SIGMOID:
            delta = tl.load(delta_ptr + slots, mask=covered, other=0.0)
        if not JOINT and not SIGMOID:
            if STORED or not WRITE_DQ:
                lse2 = lse - tl.log2(tl.where(factor == 0, 1.0, tl.abs(factor)))
                tl.store(lse2_ptr + slots, tl.where(factor <= 0, float("inf"), lse2), mask=covered)
                negative_ptr = lse2_ptr + kit.negative_plane(n_tiles, n_slots)
                tl.store(negative_ptr + slots, tl.where(factor >= 0, float("inf"), lse2), mask=covered)
            factor_delta = tl.where(factor == 0, 0.0, factor * delta)

        start, bias = kit.load_full(tables, first_full, JOINT)
        for block in range(first_full, first_full + n_full):
            # [BLOCK_N, BLOCK_D]
            k = kit.load_full_rows(kit.row_base(k_base, start, k_stride), k_offsets, HEAD_DIM, BLOCK_D)
            v = kit.load_full_rows(kit.row_base(v_base, start, k_stride), k_offsets, HEAD_DIM, BLOCK_D)
            # [BLOCK_M, BLOCK_N]
            logits = tl.dot(q, tl.trans(k), input_precision="ieee")
            dp = tl.dot(do, tl.trans(v), input_precision="ieee")
            if SIGMOID:
                p = kit.sigmoid(logits * scale_log2)
                ds = p * dp * (1.0 - p) * factor[:, None]
            else:
                if MASKED:
                    own = kit.load_kept(factors, batch, n_positions, start, tl.arange(0, BLOCK_N) < BLOCK_N, BLOCK_N)
                    logits = tl.where(own, logits, float("-inf"))
                p = tl.exp2(logits * scale_log2 - (lse - bias)[:, None])
                ds = p * (dp - delta[:, None]) if JOINT else p * (dp * factor[:, None] - factor_delta[:, None])
            if WALK_DELTA:
                delta += tl.sum(p * dp, 1)
            if WRITE_DQ:
                acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
            start, bias = kit.load_full(tables, block + 1, JOINT)

        partial_k = kit.tile_offsets(k_stride, BLOCK_P, BLOCK_D)
        start, length, mask, bias = kit.load_partial(tables, first_partial, JOINT)
        for block in range(first_partial, first_partial + n_partial):
            keep = kit.load_mask(tables, mask, BLOCK_M, BLOCK_P)
            # [BLOCK_P, BLOCK_D]
            in_block = tl.arange(0, BLOCK_P) < length
            if MASKED:
                keep = keep & kit.load_kept(factors, batch, n_positions, start, in_block, BLOCK_P)
            k = kit.load_rows(kit.row_base(k_base, start, k_stride), partial_k, in_block, HEAD_DIM, BLOCK_D)
            v = kit.load_rows(kit.row_base(v_base, start, k_stride), partial_k, in_block, HEAD_DIM, BLOCK_D)
            # a key that is not finite made the lse of all that attend to it NaN
            tainted = kit.taint(k) if SIGMOID else tl.zeros([BLOCK_P], tl.float32)
            k = kit.finite(k)
            # [BLOCK_M, BLOCK_P]
            logits = tl.dot(q, tl.trans(k), input_precision="ieee")
            dp = tl.dot(do, tl.trans(v), input_precision="ieee")
            if SIGMOID:
                p = kit.sigmoid(logits * scale_log2 + tainted[None, :])
                ds = p * dp * (1.0 - p) * factor[:, None]
            else:
                p = tl.exp2(tl.where(keep, logits * scale_log2 - (lse - bias)[:, None], float("-inf")))
                ds = p * (dp - delta[:, None]) if JOINT else p * (dp * factor[:, None] - factor_delta[:, None])
            if WALK_DELTA:
                delta += tl.sum(tl.where(keep, p * dp, 0.0), 1)
            if WRITE_DQ:
                ds = tl.where(keep, ds, 0.0)
                acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
            start, length, mask, bias = kit.load_partial(tables, block + 1, JOINT)

        if WALK_DELTA:
            tl.store(delta_ptr + slots, delta, mask=covered)
    if WRITE_DQ:
        # asked again: what waits for the end takes registers all along
        batch_head, _, _, tile_start, tile_rows, _, _ = kit.load_tile(tables, n_tiles, n_heads, True)
        in_tile = rows < tile_rows
        kit.store_rows(dq_ptr, batch_head * n_positions + tile_start, acc * scale, in_tile, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse2_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    tables,
    factors,
    strides,
    n_tiles,
    n_heads,
    n_positions,
    n_slots,
    scale,
    scale_log2,
    JOINT: tl.constexpr,
    SIGMOID: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk_j = scale · Σ_ri dS_rij q_i and dv_j = Σ_ri c_ri p_rij dO_i: BLOCK_M keys walk blocks of BLOCK_N queries.

    Everything is computed transposed, keys along the rows, so that P and dS enter their second dot from registers.
    """
    batch_head, batch, head, tile_start, tile_rows, first, count = kit.load_tile(tables, n_tiles, n_heads)
    BLOCK_P: tl.constexpr = kit.partial_width(BLOCK_N)
    in_tile = tl.arange(0, BLOCK_M) < tile_rows
    q_base, q_stride = kit.head_base(q_ptr, batch, head, strides, kit.Q)
    k_base, k_stride = kit.head_base(k_ptr, batch, head, strides, kit.K)
    v_base, v_stride = kit.head_base(v_ptr, batch, head, strides, kit.V)
    do_base, do_stride = kit.head_base(do_ptr, batch, head, strides, kit.DO)
    k_base, v_base = kit.row_base(k_base, tile_start, k_stride), kit.row_base(v_base, tile_start, v_stride)
    q_offsets = kit.tile_offsets(q_stride, BLOCK_N, BLOCK_D)
    do_offsets = kit.tile_offsets(do_stride, BLOCK_N, BLOCK_D)
    # [BLOCK_M, BLOCK_D]
    k = kit.load_rows(k_base, kit.tile_offsets(k_stride, BLOCK_M, BLOCK_D), in_tile, HEAD_DIM, BLOCK_D)
    v = kit.load_rows(v_base, kit.tile_offsets(v_stride, BLOCK_M, BLOCK_D), in_tile, HEAD_DIM, BLOCK_D)
    dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    sign, turns = 1.0, 1
    if JOINT:
        count = 1
    elif not SIGMOID:
        turns = kit.count_planes(factors)
    # a count of 1 leaves no loop
    for index in range(count * turns):
        segment = first + index // turns
        first_full, n_full, first_partial, n_partial, slot = kit.load_segment(tables, factors, segment, JOINT)
        delta_base = delta_ptr + batch_head * n_slots + slot
        lse2_base = lse2_ptr + batch_head * n_slots + slot
        if not JOINT:
            weight = kit.load_weight(tables, factors, segment)
        if SIGMOID:
            scale_ptr = kit.row_scales(tables, factors, segment, n_positions)
        elif not JOINT:
            negative = tl.where(turns == 2, index % 2 == 1, weight < 0)
            lse2_base += tl.where(negative, kit.negative_plane(n_tiles, n_slots), 0)
            turn = tl.where(negative, -sign, sign)
            sign *= turn
            dk *= turn
            dv *= turn

        start, bias = kit.load_full(tables, first_full, JOINT)
        for block in range(first_full, first_full + n_full):
            queries = start + tl.arange(0, BLOCK_N)
            # [BLOCK_N, BLOCK_D]
            q = kit.load_full_rows(kit.row_base(q_base, start, q_stride), q_offsets, HEAD_DIM, BLOCK_D)
            do = kit.load_full_rows(kit.row_base(do_base, start, do_stride), do_offsets, HEAD_DIM, BLOCK_D)
            # [BLOCK_M, BLOCK_N]
            logits = tl.dot(k, tl.trans(q), input_precision="ieee")
            if SIGMOID:
                sigma = kit.sigmoid(logits * scale_log2)
                p = sigma * (tl.load(scale_ptr + queries) * weight)[None, :]
            else:
                lse2 = tl.load(lse2_base + start + tl.arange(0, BLOCK_N))
                delta = tl.load(delta_base + start + tl.arange(0, BLOCK_N))
                p = tl.exp2(logits * scale_log2 - (lse2 - bias)[None, :])
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")
            ds = p * (1.0 - sigma) * dp if SIGMOID else p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
            start, bias = kit.load_full(tables, block + 1, JOINT)

        partial_q = kit.tile_offsets(q_stride, BLOCK_P, BLOCK_D)
        partial_do = kit.tile_offsets(do_stride, BLOCK_P, BLOCK_D)
        start, length, mask, bias = kit.load_partial(tables, first_partial, JOINT)
        for block in range(first_partial, first_partial + n_partial):
            keep = kit.load_mask(tables, mask, BLOCK_M, BLOCK_P)
            in_block = tl.arange(0, BLOCK_P) < length
            queries = start + tl.arange(0, BLOCK_P)
            # [BLOCK_P, BLOCK_D]
            q = kit.load_rows(kit.row_base(q_base, start, q_stride), partial_q, in_block, HEAD_DIM, BLOCK_D)
            do = kit.load_rows(kit.row_base(do_base, start, do_stride), partial_do, in_block, HEAD_DIM, BLOCK_D)
            tainted = kit.taint(q) + kit.taint(do) if SIGMOID else tl.zeros([BLOCK_P], tl.float32)
            q, do = kit.finite(q), kit.finite(do)
            # [BLOCK_M, BLOCK_P]
            logits = tl.dot(k, tl.trans(q), input_precision="ieee")
            if SIGMOID:
                sigma = kit.sigmoid(logits * scale_log2 + tainted[None, :])
                factor = tl.load(scale_ptr + queries, mask=in_block, other=0.0) * weight
                p = tl.where(keep, sigma * factor[None, :], 0.0)
            else:
                lse2 = tl.load(lse2_base + start + tl.arange(0, BLOCK_P), mask=in_block, other=0.0)
                delta = tl.load(delta_base + start + tl.arange(0, BLOCK_P), mask=in_block, other=0.0)
                # a query that is not finite has an lse of NaN, a gradient that is not one a δ of NaN, which taints p
                lse2 += delta * 0.0
                delta = kit.finite(delta)
                p = tl.exp2(tl.where(keep, logits * scale_log2 - (lse2 - bias)[None, :], float("-inf")))
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")
            # keys that nothing attends to may hold anything
            ds = tl.where(keep, p * (1.0 - sigma) * dp if SIGMOID else p * (dp - delta[None, :]), 0.0)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
            start, length, mask, bias = kit.load_partial(tables, block + 1, JOINT)

    # asked again: what waits for the end takes registers all along
    batch_head, _, _, tile_start, tile_rows, _, _ = kit.load_tile(tables, n_tiles, n_heads, True)
    in_tile = tl.arange(0, BLOCK_M) < tile_rows
    row = batch_head * n_positions + tile_start
    kit.store_rows(dk_ptr, row, dk * (sign * scale), in_tile, HEAD_DIM, BLOCK_D)
    kit.store_rows(dv_ptr, row, dv * sign, in_tile, HEAD_DIM, BLOCK_D)
