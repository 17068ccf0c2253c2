"""A plain dense attention forward, whose machine code ours is compared with: no table, no mask, no ragged end. Not a
provider: it is compiled ahead of time only (``aot.py``), and a test holds it against torch."""

import triton
import triton.language as tl

from canvas_kernels.triton_ops.configs import Config

CONFIG = Config(128, 128, 8, 2)
"""The best tile that was found at head_dim 64 and 128."""


@triton.jit
def _rows(ptr, start, stride_n, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """[BLOCK, HEAD_DIM] pointers from row ``start``."""
    offsets = tl.arange(0, BLOCK)[:, None] * stride_n + tl.arange(0, HEAD_DIM)[None, :]
    return ptr + start.to(tl.int64) * stride_n + offsets


@triton.jit
def dense_forward_kernel(
    tensors, n, scale_log2, stride_n, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """out = softmax(scale · q kᵀ) v and its log-sum-exp, base 2. All of one stride, heads one after the other."""
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr = tensors
    tile, head = tl.program_id(0) * BLOCK_M, tl.program_id(1).to(tl.int64) * n
    q = tl.load(_rows(q_ptr, head + tile, stride_n, BLOCK_M, HEAD_DIM))
    k_rows = _rows(k_ptr, head, stride_n, BLOCK_N, HEAD_DIM)
    v_rows = _rows(v_ptr, head, stride_n, BLOCK_N, HEAD_DIM)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for _ in range(0, n, BLOCK_N):
        k, v = tl.load(k_rows), tl.load(v_rows)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")
        shift = tl.maximum(largest, tl.max(logits, 1) * scale_log2)
        p = tl.exp2(logits * scale_log2 - shift[:, None])
        correction = tl.exp2(largest - shift)
        largest, total = shift, total * correction + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * correction[:, None], input_precision="ieee")
        k_rows += BLOCK_N * stride_n
        v_rows += BLOCK_N * stride_n
    tl.store(lse_ptr + head + tile + tl.arange(0, BLOCK_M), largest + tl.log2(total))
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(_rows(out_ptr, head + tile, HEAD_DIM, BLOCK_M, HEAD_DIM), out)
