"""What all the Triton passes share: reading the tables, and tiles of rows.

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


@triton.constexpr_function
def partial_width(block_n):
    """Rows of a partial block, see :func:`.tiling.partial_width`."""
    return min(block_n, 32)


@triton.jit
def load_tile(tiles_ptr, n_tiles, n_heads):
    """This program's batch · head, batch and head (int64); its tile's start, rows, first segment row, segment rows.

    The longest tiles, as many as the row behind them says, come first, each of all heads, so that none starts when all
    else ends; the others head by head, whose keys and values stay in L2.
    """
    program = tl.program_id(0)
    batch_heads = tl.num_programs(0) // n_tiles
    n_long = tl.load(tiles_ptr + n_tiles * 4)
    n_rest = tl.maximum(n_tiles - n_long, 1)
    rest = program - n_long * batch_heads
    tile = tl.where(rest < 0, program // batch_heads, n_long + rest % n_rest)
    batch_head = tl.where(rest < 0, program % batch_heads, rest // n_rest).to(tl.int64)
    tile_ptr = tiles_ptr + tile * 4
    return (
        batch_head,
        batch_head // n_heads,
        batch_head % n_heads,
        tl.load(tile_ptr),
        tl.load(tile_ptr + 1),
        tl.load(tile_ptr + 2),
        tl.load(tile_ptr + 3),
    )


@triton.jit
def load_segment(segments_ptr, active_ptr, segment, JOINT: tl.constexpr):
    """First full block, full blocks, first partial block, partial blocks, slot of row 0; inactive ones have none."""
    segment_ptr = segments_ptr + segment * 8
    n_full = tl.load(segment_ptr + 1)
    n_partial = tl.load(segment_ptr + 3)
    if not JOINT:
        alive = tl.load(active_ptr + tl.load(segment_ptr + 6)) != 0
        n_full = tl.where(alive, n_full, 0)
        n_partial = tl.where(alive, n_partial, 0)
    return tl.load(segment_ptr), n_full, tl.load(segment_ptr + 2), n_partial, tl.load(segment_ptr + 4)


@triton.jit
def covered_rows(segments_ptr, segment, BLOCK_M: tl.constexpr):
    """[BLOCK_M] bool: the tile's rows that have slots in the segment."""
    rows = tl.arange(0, BLOCK_M)
    span = tl.load(segments_ptr + segment * 8 + 5)
    return (rows >= (span & 0xFFFF)) & (rows < (span >> 16))


@triton.jit
def load_weight(segments_ptr, weight_ptr, gain_ptr, segment):
    """w · gain of a segment."""
    return tl.load(weight_ptr + segment) * tl.load(gain_ptr + tl.load(segments_ptr + segment * 8 + 6))


@triton.jit
def row_scales(segments_ptr, row_scale_ptr, segment, n_positions):
    """Address of row 0's row_scale in the segment's class."""
    return row_scale_ptr + tl.load(segments_ptr + segment * 8 + 7) * n_positions


@triton.jit
def load_full(full_ptr, block, JOINT: tl.constexpr):
    """Start and log2 w (joint form) of a full block; past a list's end some other block's."""
    entry = tl.load(full_ptr + block)
    bias = 0.0
    if JOINT:
        bias = (entry >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return entry.to(tl.int32), bias


@triton.jit
def load_partial(partial_ptr, block, JOINT: tl.constexpr):
    """Start, rows, mask and log2 w (joint form) of a partial block."""
    block_ptr = partial_ptr + block * 4
    bias = 0.0
    if JOINT:
        bias = tl.load(block_ptr + 3).to(tl.float32, bitcast=True)
    return tl.load(block_ptr), tl.load(block_ptr + 1), tl.load(block_ptr + 2), bias


@triton.jit
def load_mask(masks_ptr, mask, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr):
    """[BLOCK_M, BLOCK_P] bool: the pairs of a partial block."""
    word = tl.load(masks_ptr + mask * BLOCK_M + tl.arange(0, BLOCK_M))
    return (word[:, None] & (1 << tl.arange(0, BLOCK_P))[None, :]) != 0


@triton.jit
def head_base(base_ptr, batch, head, stride_b, stride_h):
    """Address of a head's row 0."""
    return base_ptr + (batch * stride_b + head * stride_h) * VECTOR


@triton.jit
def row_base(base_ptr, start, stride_n):
    """Address of row ``start``, in int64: the rows of a million positions span more than 2^31 elements."""
    return base_ptr + start.to(tl.int64) * stride_n * VECTOR


@triton.jit
def tile_offsets(stride_n, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D] int32 offsets of a tile from its first row, which ``row_base`` finds in int64."""
    return tl.arange(0, BLOCK)[:, None] * (stride_n * VECTOR) + tl.arange(0, BLOCK_D)[None, :]


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
def result_rows(base_ptr, row, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D] addresses in a contiguous tensor of rows, from int64 ``row`` on."""
    return base_ptr + row * HEAD_DIM + tl.arange(0, BLOCK)[:, None] * HEAD_DIM + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def load_result(ptrs, in_range, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D] float32 tile of what ``store_rows`` wrote."""
    return tl.load(ptrs, mask=in_range[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :], other=0.0).to(tl.float32)


@triton.jit
def row_products(a_ptr, a_stride, b_ptr, in_range, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK] f32: a_i · b_i of rows, 32 dimensions at a time: whole tiles would take all registers."""
    rows = tl.arange(0, BLOCK)[:, None]
    products = tl.zeros([BLOCK], tl.float32)
    for begin in tl.static_range(0, HEAD_DIM, 32):
        columns = begin + tl.arange(0, 32)[None, :]
        mask = in_range[:, None] & (columns < HEAD_DIM)
        a = tl.load(a_ptr + rows * a_stride + columns, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + rows * HEAD_DIM + columns, mask=mask, other=0.0).to(tl.float32)
        products += tl.sum(a * b, 1)
    return products


@triton.jit
def store_rows(ptrs, tile, in_range, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes a [BLOCK, BLOCK_D] float32 tile in the output's dtype."""
    mask = in_range[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    tl.store(ptrs, tile.to(ptrs.dtype.element_ty), mask=mask)
