# pyright: basic, reportArgumentType=false, reportAssignmentType=false
"""The forward pass: the output and the log-sum-exp of every (segment, row), and the sum of a row's segments."""

import triton
import triton.language as tl

from . import common as kit


@triton.jit(do_not_specialize=["strides", "n_tiles", "n_heads", "n_positions", "n_slots"])
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    tables,
    factors,
    strides,
    n_tiles,
    n_heads,
    n_positions,
    n_slots,
    scale_log2,
    JOINT: tl.constexpr,
    SIGMOID: tl.constexpr,
    IN_PLACE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr = False,
):
    """f_r(i) = softmax_j(scale · q_i·k_j) v_j of the segments r of row i; lse_ri = log2 Σ_j 2^(scale_log2 · q_i·k_j).

    IN_PLACE: ``out`` has rows and gets Σ_r c_ri f_r(i). Else tiles have one segment, and ``out`` has slots; in joint
    form slots are rows, and the logits carry log2 w. SIGMOID: out_i = Σ_rj c_ri σ(scale · q_i·k_j) v_j; nothing couples
    the keys of a row, so c enters with each pair and one accumulator does for all segments. MASKED, in joint form: keys
    that a sample's mask leaves out have the logit −inf.
    """
    batch_head, batch, head, tile_start, tile_rows, first, count = kit.load_tile(tables, n_tiles, n_heads)
    BLOCK_P: tl.constexpr = kit.partial_width(BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    in_tile = rows < tile_rows
    q_base, q_stride = kit.head_base(q_ptr, batch, head, strides, kit.Q)
    k_base, k_stride = kit.head_base(k_ptr, batch, head, strides, kit.K)
    v_base, _ = kit.head_base(v_ptr, batch, head, strides, kit.V)
    k_offsets = kit.tile_offsets(k_stride, BLOCK_N, BLOCK_D)
    # [BLOCK_M, BLOCK_D]
    q_offsets = kit.tile_offsets(q_stride, BLOCK_M, BLOCK_D)
    q = kit.load_rows(kit.row_base(q_base, tile_start, q_stride), q_offsets, in_tile, HEAD_DIM, BLOCK_D)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if not IN_PLACE:
        count = 1
    # a count of 1 leaves no loop
    for index in range(count):
        segment = first + index
        first_full, n_full, first_partial, n_partial, slot = kit.load_segment(tables, factors, segment, JOINT)
        running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        running_sum = tl.zeros([BLOCK_M], tl.float32)
        acc = total if SIGMOID else tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        if SIGMOID:
            factor = kit.load_factor(tables, factors, segment, n_positions, tile_start, BLOCK_M)

        start, bias = kit.load_full(tables, first_full, JOINT)
        for block in range(first_full, first_full + n_full):
            # [BLOCK_N, BLOCK_D]
            k = kit.load_full_rows(kit.row_base(k_base, start, k_stride), k_offsets, HEAD_DIM, BLOCK_D)
            # [BLOCK_M, BLOCK_N]: scale and log2 w enter with the exponent's multiply-add
            logits = tl.dot(q, tl.trans(k), input_precision="ieee")
            if SIGMOID:
                p = kit.sigmoid(logits * scale_log2) * factor[:, None]
            else:
                if MASKED:
                    own = kit.load_kept(factors, batch, n_positions, start, tl.arange(0, BLOCK_N) < BLOCK_N, BLOCK_N)
                    logits = tl.where(own, logits, float("-inf"))
                new_max = tl.maximum(running_max, tl.max(logits, 1) * scale_log2 + bias)
                shift = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max
                p = tl.exp2(logits * scale_log2 - (shift - bias)[:, None])
                correction = tl.exp2(running_max - shift)
                running_max = new_max
                running_sum = running_sum * correction + tl.sum(p, 1)
                acc *= correction[:, None]
            # [BLOCK_N, BLOCK_D]
            v = kit.load_full_rows(kit.row_base(v_base, start, k_stride), k_offsets, HEAD_DIM, BLOCK_D)
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
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
            # [BLOCK_M, BLOCK_P]
            logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 + (kit.taint(v) + bias)[None, :]
            if SIGMOID:
                p = tl.where(keep, kit.sigmoid(logits) * factor[:, None], 0.0)
            else:
                logits = tl.where(keep, logits, float("-inf"))
                new_max = tl.maximum(running_max, tl.max(logits, 1))
                # rows that have met no key yet keep their state
                shift = tl.where(new_max == float("-inf"), 0.0, new_max)
                p = tl.exp2(logits - shift[:, None])
                correction = tl.exp2(running_max - shift)
                running_max = new_max
                running_sum = running_sum * correction + tl.sum(p, 1)
                acc *= correction[:, None]
            acc = tl.dot(p.to(v.dtype), kit.finite(v), acc, input_precision="ieee")
            start, length, mask, bias = kit.load_partial(tables, block + 1, JOINT)

        if SIGMOID:
            total = acc
        else:
            # true of NaN too
            has_keys = running_sum != 0
            safe_sum = tl.where(has_keys, running_sum, 1.0)
            if not IN_PLACE:
                # loaded again, as below: what waits for the end takes registers all along
                batch_head, _, _, tile_start, tile_rows, segment, _ = kit.load_tile(tables, n_tiles, n_heads, True)
                in_tile = rows < tile_rows
                slot = kit.load_slot(tables, segment)
            covered = kit.covered_rows(tables, segment, BLOCK_M)
            lse = tl.where(has_keys, running_max + tl.log2(safe_sum), float("inf"))
            slot_base = batch_head * n_slots + slot + tile_start
            tl.store(lse_ptr + slot_base + rows, lse, mask=covered)
            acc *= (1.0 / safe_sum)[:, None]
            if IN_PLACE:
                factor = kit.load_factor(tables, factors, segment, n_positions, tile_start, BLOCK_M)
                # where other segments replace this one, what it attends to does not count
                total += tl.where(factor[:, None] == 0, 0.0, acc * factor[:, None])
            else:
                kit.store_rows(out_ptr, slot_base, acc, in_tile, HEAD_DIM, BLOCK_D)
    if IN_PLACE:
        batch_head, _, _, tile_start, tile_rows, _, _ = kit.load_tile(tables, n_tiles, n_heads, True)
        in_tile = rows < tile_rows
        kit.store_rows(out_ptr, batch_head * n_positions + tile_start, total, in_tile, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["n_tiles", "n_heads", "n_positions", "n_slots"])
def gather_kernel(
    f_ptr,
    out_ptr,
    tables,
    factors,
    n_tiles,
    n_heads,
    n_positions,
    n_slots,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """out_i = Σ_r c_ri f_r(i), from the outputs of every (segment, row) in slots."""
    batch_head, _, _, tile_start, tile_rows, first, count = kit.load_tile(tables, n_tiles, n_heads)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for segment in range(first, first + count):
        factor = kit.load_factor(tables, factors, segment, n_positions, tile_start, BLOCK_M)
        factor = tl.where(kit.is_active(tables, factors, segment), factor, 0.0)
        slot_base = batch_head * n_slots + tl.load(tables[kit.SEGMENTS] + segment * 8 + 4) + tile_start
        total += kit.load_result(f_ptr, slot_base, factor != 0, HEAD_DIM, BLOCK_M, BLOCK_D) * factor[:, None]
    in_tile = tl.arange(0, BLOCK_M) < tile_rows
    kit.store_rows(out_ptr, batch_head * n_positions + tile_start, total, in_tile, HEAD_DIM, BLOCK_D)
