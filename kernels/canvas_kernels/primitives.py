"""What all the Triton passes share: reading the tables, the cursor over a tile's runs, and tiles of rows.

A program owns one tile of positions of one head and walks the tile's runs block by block in ONE flat loop. The run that
follows is read one iteration before it is needed and carried through the loop: a table row read where it is used would
put its scalars into the pipeline in place of K and V, and an inner loop per run would drain the pipeline at every run.
"""

import triton
import triton.language as tl

LAST_BIT = tl.constexpr(16)
REPLACE_BIT = tl.constexpr(17)


@triton.jit
def load_tile(tiles_ptr, n_tiles, n_heads):
    """This program's batch · head, batch and head (int64); its tile's start, rows, first table row, blocks."""
    program = tl.program_id(0)
    batch_head = (program // n_tiles).to(tl.int64)
    tile_ptr = tiles_ptr + (program % n_tiles) * 4
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
def load_run(rows_ptr, row, n_rows):
    """Start, length and flags of table row ``row``; ``n_rows`` is the index of the sentinel, read past the end."""
    run_ptr = rows_ptr + tl.minimum(row, n_rows) * 4
    return tl.load(run_ptr), tl.load(run_ptr + 1), tl.load(run_ptr + 2)


@triton.jit
def load_slot(rows_ptr, row, n_rows):
    """Slot of table row ``row``."""
    return tl.load(rows_ptr + tl.minimum(row, n_rows) * 4 + 3)


@triton.jit
def load_weight(weight_ptr, row, n_rows):
    """Weight of table row ``row``."""
    return tl.load(weight_ptr + tl.minimum(row, n_rows))


@triton.jit
def covered_rows(flags, BLOCK_M: tl.constexpr):
    """[BLOCK_M] bool: the tile's rows that the run applies to."""
    rows = tl.arange(0, BLOCK_M)
    return (rows >= (flags & 255)) & (rows < ((flags >> 8) & 255))


@triton.jit
def closes_segment(flags, remaining, BLOCK_N: tl.constexpr):
    """Whether this block is the last one of its segment."""
    return ((flags >> LAST_BIT) & 1) * (remaining <= BLOCK_N).to(tl.int32) != 0


@triton.jit
def load_row_scale(row_scale_ptr, n_positions, tile_start, flags, seen, BLOCK_M: tl.constexpr):
    """[BLOCK_M] f32: row_scale of the run's class. Read where a segment closes: kept all along it costs registers."""
    row_ptrs = row_scale_ptr + ((flags >> REPLACE_BIT) & 1) * n_positions + tile_start + tl.arange(0, BLOCK_M)
    return tl.load(row_ptrs, mask=seen, other=0.0)


@triton.jit
def tile_offsets(stride_n, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D] int32 offsets of a tile from its first row, which ``row_base`` finds in int64."""
    return tl.arange(0, BLOCK)[:, None] * stride_n + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def row_base(base_ptr, start, stride_n):
    """Address of row ``start``, in int64: the rows of a million positions span more than 2^31 elements."""
    return base_ptr + start.to(tl.int64) * stride_n


@triton.jit
def load_rows(tile_ptr, offsets, in_range, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D] tile, 0 in rows out of range and padding dimensions: no 0 · NaN of another row enters a sum."""
    if HEAD_DIM == BLOCK_D:
        tile = tl.load(tile_ptr + offsets, mask=in_range[:, None], other=0.0)
    else:
        in_head = tl.arange(0, BLOCK_D) < HEAD_DIM
        tile = tl.load(tile_ptr + offsets, mask=in_range[:, None] & in_head[None, :], other=0.0)
    return tile


@triton.jit
def store_rows(tile_ptr, offsets, tile, in_range, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes a [BLOCK, BLOCK_D] float32 tile in the output's dtype."""
    mask = in_range[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    tl.store(tile_ptr + offsets, tile.to(tile_ptr.dtype.element_ty), mask=mask)
