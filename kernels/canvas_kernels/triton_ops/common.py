# pyright: basic, reportArgumentType=false, reportGeneralTypeIssues=false
"""Loads of tables and of tiles of rows, which all the Triton passes share.

A program owns one tile of rows of one head and walks its segments one after the other: first the blocks that all of its
rows attend to, without any mask, then the others. Blocks stand in lists that are indexed by the loop's counter. A
block's entry is read one iteration early: read where it is used, it would put scalars into the pipeline in place of K
and V.

In blocks that are not full, rows are loaded that some of the other side's rows have nothing to do with. ``keep``
selects pairs before a sum, and where such a row is a factor of the sum itself, what is not finite in it is cleared:
0 · NaN is NaN. Pairs that are kept become NaN again, by a taint that enters their logits.
"""

import triton
import triton.language as tl

# rows and heads begin at multiples of as many elements: what a lane loads at once in 16 bits
VECTOR = tl.constexpr(8)


# what a launch brings in tuples: the tensors of a Tiling; row scales, gains and activity; three strides of each operand
TILES, SEGMENTS, WEIGHT, FULL, PARTIAL, MASKS = (tl.constexpr(i) for i in range(6))
ROW_SCALE, GAIN, ACTIVE = (tl.constexpr(i) for i in range(3))
Q, K, V, DO = (tl.constexpr(i) for i in range(4))


@triton.constexpr_function
def partial_width(block_n):
    """Rows of a partial block, as :func:`.tiling.partial_width`."""
    return min(block_n, 32)


@triton.jit
def load_tile(tables, n_tiles, n_heads, AGAIN: tl.constexpr = False):
    """This program's batch · head, batch and head (int64); its tile's start, rows, first segment row, segment rows.

    The longest tiles, as many as the row behind them says, come first, each of all heads, so that none starts when all
    else ends; the others head by head, whose keys and values stay in L2. AGAIN loads anew what was loaded before.
    """
    program = tl.program_id(0)
    batch_heads = tl.num_programs(0) // n_tiles
    n_long = tl.load(tables[TILES] + n_tiles * 4, volatile=AGAIN)
    n_rest = tl.maximum(n_tiles - n_long, 1)
    rest = program - n_long * batch_heads
    tile = tl.where(rest < 0, program // batch_heads, n_long + rest % n_rest)
    batch_head = tl.where(rest < 0, program % batch_heads, rest // n_rest).to(tl.int64)
    tile_ptr = tables[TILES] + tile * 4
    return (
        batch_head,
        batch_head // n_heads,
        batch_head % n_heads,
        tl.load(tile_ptr, volatile=AGAIN),
        tl.load(tile_ptr + 1, volatile=AGAIN),
        tl.load(tile_ptr + 2, volatile=AGAIN),
        tl.load(tile_ptr + 3),
    )


@triton.jit
def load_segment(tables, factors, segment, JOINT: tl.constexpr):
    """First full block, full blocks, first partial block, partial blocks, slot of row 0; inactive ones have none."""
    segment_ptr = tables[SEGMENTS] + segment * 8
    n_full = tl.load(segment_ptr + 1)
    n_partial = tl.load(segment_ptr + 3)
    if not JOINT:
        alive = is_active(tables, factors, segment)
        n_full = tl.where(alive, n_full, 0)
        n_partial = tl.where(alive, n_partial, 0)
    return tl.load(segment_ptr), n_full, tl.load(segment_ptr + 2), n_partial, load_slot(tables, segment)


@triton.jit
def load_slot(tables, segment):
    """Slot of row 0 of a segment."""
    return tl.load(tables[SEGMENTS] + segment * 8 + 4)


@triton.jit
def is_active(tables, factors, segment):
    """Whether a segment's connection is active."""
    return tl.load(factors[ACTIVE] + tl.load(tables[SEGMENTS] + segment * 8 + 6)) != 0


@triton.jit
def covered_rows(tables, segment, BLOCK_M: tl.constexpr):
    """[BLOCK_M] bool: the tile's rows that have slots in the segment."""
    rows = tl.arange(0, BLOCK_M)
    span = tl.load(tables[SEGMENTS] + segment * 8 + 5)
    return (rows >= (span & 0xFFFF)) & (rows < (span >> 16))


@triton.jit
def load_weight(tables, factors, segment):
    """w · gain of a segment."""
    gain = tl.load(factors[GAIN] + tl.load(tables[SEGMENTS] + segment * 8 + 6))
    return tl.load(tables[WEIGHT] + segment) * gain.to(tl.float32)


@triton.jit
def row_scales(tables, factors, segment, n_positions):
    """Address of row 0's row_scale in the segment's class."""
    return factors[ROW_SCALE] + tl.load(tables[SEGMENTS] + segment * 8 + 7) * n_positions


@triton.jit
def count_planes(factors):
    """Planes of lse2 that dK and dV walk: both if the least row scale, all they have of row scales, is negative."""
    return tl.where(tl.load(factors[ROW_SCALE]) < 0, 2, 1)


@triton.jit
def negative_plane(n_tiles, n_slots):
    """Slots of all heads: how far the plane of lse2 is where c is negative."""
    return (tl.num_programs(0) // n_tiles).to(tl.int64) * n_slots


@triton.jit
def load_factor(tables, factors, segment, n_positions, tile_start, BLOCK_M: tl.constexpr):
    """[BLOCK_M] f32: c = w · gain · row_scale of a segment at the tile's rows, 0 where it has none."""
    scale_ptrs = row_scales(tables, factors, segment, n_positions) + tile_start + tl.arange(0, BLOCK_M)
    row_scale = tl.load(scale_ptrs, mask=covered_rows(tables, segment, BLOCK_M), other=0.0)
    return row_scale * load_weight(tables, factors, segment)


@triton.jit
def load_full(tables, block, JOINT: tl.constexpr):
    """Start and log2 w (joint form) of a full block; past a list's end some other block's."""
    entry = tl.load(tables[FULL] + block)
    bias = 0.0
    if JOINT:
        bias = (entry >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return entry.to(tl.int32), bias


@triton.jit
def load_partial(tables, block, JOINT: tl.constexpr):
    """Start, rows, mask and log2 w (joint form) of a partial block."""
    block_ptr = tables[PARTIAL] + block * 4
    bias = 0.0
    if JOINT:
        bias = tl.load(block_ptr + 3).to(tl.float32, bitcast=True)
    return tl.load(block_ptr), tl.load(block_ptr + 1), tl.load(block_ptr + 2), bias


@triton.jit
def load_kept(factors, batch, n_positions, start, in_block, BLOCK: tl.constexpr):
    """[1, BLOCK] bool: the keys from ``start`` on that this sample attends to; the mask stands where edge form has its
    row scales."""
    kept_ptrs = factors[ROW_SCALE] + batch * n_positions + start + tl.arange(0, BLOCK)
    return (tl.load(kept_ptrs, mask=in_block, other=0) != 0)[None, :]


@triton.jit
def load_mask(tables, mask, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr):
    """[BLOCK_M, BLOCK_P] bool: the pairs of a partial block."""
    word = tl.load(tables[MASKS] + mask * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    # tensor cores give a lane columns that differ by constants: only what they have in common is not known beforehand
    common = tl.arange(0, BLOCK_P)[None, :] & 6
    return ((word >> common) & (1 << (tl.arange(0, BLOCK_P)[None, :] - common))) != 0


@triton.jit
def head_base(base_ptr, batch, head, strides, OPERAND: tl.constexpr):
    """Address of a head's row 0, and its stride of rows in vectors."""
    offset = batch * strides[3 * OPERAND] + head * strides[3 * OPERAND + 1]
    return base_ptr + offset * VECTOR, strides[3 * OPERAND + 2]


@triton.jit
def row_base(base_ptr, start, stride_n):
    """Address of row ``start``, in int64: the rows of a million positions span more than 2^31 elements."""
    return base_ptr + start.to(tl.int64) * stride_n * VECTOR


@triton.jit
def tile_offsets(stride_n, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D] offsets of a tile from its first row, which ``row_base`` finds in int64.

    Without a sign each takes one register until it is added to an address, with one it takes two.
    """
    return (tl.arange(0, BLOCK)[:, None] * (stride_n * VECTOR) + tl.arange(0, BLOCK_D)[None, :]).to(tl.uint32)


@triton.jit
def load_full_rows(tile_ptr, offsets, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D] tile of rows that all exist, 0 in padding dimensions."""
    if HEAD_DIM == BLOCK_D:
        tile = tl.load(tile_ptr + offsets)
    else:
        tile = tl.load(tile_ptr + offsets, mask=(tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :], other=0.0)
    return tile


@triton.jit
def load_rows(tile_ptr, offsets, in_range, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D] tile, 0 in rows out of range and padding dimensions."""
    if HEAD_DIM == BLOCK_D:
        tile = tl.load(tile_ptr + offsets, mask=in_range[:, None], other=0.0)
    else:
        in_head = tl.arange(0, BLOCK_D) < HEAD_DIM
        tile = tl.load(tile_ptr + offsets, mask=in_range[:, None] & in_head[None, :], other=0.0)
    return tile


@triton.jit
def finite(tile):
    """The tile with 0 in place of what is not finite."""
    return tl.where(tl.abs(tile) < float("inf"), tile, 0.0).to(tile.dtype)


@triton.jit
def taint(tile):
    """[BLOCK] f32: NaN for rows that hold something that is not finite, else 0."""
    return tl.sum(tile.to(tl.float32) * 0.0, 1)


@triton.jit
def sigmoid(logits_log2):
    """σ of logits that were multiplied by log2 e; no power overflows on the way."""
    power = tl.exp2(-tl.abs(logits_log2))
    return tl.where(logits_log2 >= 0, 1.0, power) / (1.0 + power)


@triton.jit
def result_ptrs(base_ptr, row, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D] addresses in a contiguous tensor of rows, from int64 ``row`` on."""
    return base_ptr + row * HEAD_DIM + tl.arange(0, BLOCK)[:, None] * HEAD_DIM + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def load_result(base_ptr, row, in_range, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D] float32 tile of what ``store_rows`` wrote; 0 out of range."""
    mask = in_range[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    return tl.load(result_ptrs(base_ptr, row, HEAD_DIM, BLOCK, BLOCK_D), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rows(base_ptr, row, tile, in_range, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes a [BLOCK, BLOCK_D] float32 tile in the output's dtype, to a contiguous tensor from ``row`` on."""
    out_ptrs = result_ptrs(base_ptr, row, HEAD_DIM, tile.shape[0], BLOCK_D)
    mask = in_range[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    tl.store(out_ptrs, tile.to(base_ptr.dtype.element_ty), mask=mask)


@triton.jit
def row_products(a_ptr, a_stride, b_ptr, in_range, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK] f32: a_i · b_i of rows, 32 dimensions at a time: whole tiles would take all registers."""
    rows = tl.arange(0, BLOCK)[:, None]
    products = tl.zeros([BLOCK], tl.float32)
    for begin in tl.static_range(0, HEAD_DIM, 32):
        columns = begin + tl.arange(0, 32)[None, :]
        mask = in_range[:, None] & (columns < HEAD_DIM)
        a = tl.load(a_ptr + rows * (a_stride * VECTOR) + columns, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + rows * HEAD_DIM + columns, mask=mask, other=0.0).to(tl.float32)
        products += tl.sum(a * b, 1)
    return products
