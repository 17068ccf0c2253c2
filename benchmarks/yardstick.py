"""A plain dense attention, forward and backward, whose machine code ours is compared with: no table, no mask, no ragged
end. Not a provider: it is compiled ahead of time only (``aot.py``), and a test holds it against torch."""

import triton
import triton.language as tl

from canvas_kernels.triton_ops.configs import Config

CONFIGS = {"forward": Config(128, 128, 8, 2), "dq": Config(128, 64, 8, 2), "dkv": Config(128, 64, 8, 2)}
"""The best tiles that were found at head_dim 64 and 128."""


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


@triton.jit
def dense_dq_kernel(
    tensors, n, scale, scale_log2, stride_n, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """dq = scale · dS k with dS = p · (dO vᵀ − δ)."""
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr = tensors
    tile, head = tl.program_id(0) * BLOCK_M, tl.program_id(1).to(tl.int64) * n
    q = tl.load(_rows(q_ptr, head + tile, stride_n, BLOCK_M, HEAD_DIM))
    do = tl.load(_rows(do_ptr, head + tile, stride_n, BLOCK_M, HEAD_DIM))
    lse = tl.load(lse_ptr + head + tile + tl.arange(0, BLOCK_M))
    delta = tl.load(delta_ptr + head + tile + tl.arange(0, BLOCK_M))
    k_rows = _rows(k_ptr, head, stride_n, BLOCK_N, HEAD_DIM)
    v_rows = _rows(v_ptr, head, stride_n, BLOCK_N, HEAD_DIM)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for _ in range(0, n, BLOCK_N):
        k, v = tl.load(k_rows), tl.load(v_rows)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 - lse[:, None])
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
        k_rows += BLOCK_N * stride_n
        v_rows += BLOCK_N * stride_n
    dq = (acc * scale).to(dq_ptr.dtype.element_ty)
    tl.store(_rows(dq_ptr, head + tile, HEAD_DIM, BLOCK_M, HEAD_DIM), dq)


@triton.jit
def dense_dkv_kernel(
    tensors, n, scale, scale_log2, stride_n, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """dk = scale · dSᵀ q and dv = pᵀ dO: a tile of BLOCK_M keys walks blocks of BLOCK_N queries, all transposed."""
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr = tensors
    tile, head = tl.program_id(0) * BLOCK_M, tl.program_id(1).to(tl.int64) * n
    k = tl.load(_rows(k_ptr, head + tile, stride_n, BLOCK_M, HEAD_DIM))
    v = tl.load(_rows(v_ptr, head + tile, stride_n, BLOCK_M, HEAD_DIM))
    q_rows = _rows(q_ptr, head, stride_n, BLOCK_N, HEAD_DIM)
    do_rows = _rows(do_ptr, head, stride_n, BLOCK_N, HEAD_DIM)
    lse_rows = lse_ptr + head + tl.arange(0, BLOCK_N)
    delta_rows = delta_ptr + head + tl.arange(0, BLOCK_N)
    dk = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    dv = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for _ in range(0, n, BLOCK_N):
        q, do = tl.load(q_rows), tl.load(do_rows)
        lse, delta = tl.load(lse_rows), tl.load(delta_rows)
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2 - lse[None, :])
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
        q_rows += BLOCK_N * stride_n
        do_rows += BLOCK_N * stride_n
        lse_rows += BLOCK_N
        delta_rows += BLOCK_N
    tl.store(_rows(dk_ptr, head + tile, HEAD_DIM, BLOCK_M, HEAD_DIM), (dk * scale).to(dk_ptr.dtype.element_ty))
    tl.store(_rows(dv_ptr, head + tile, HEAD_DIM, BLOCK_M, HEAD_DIM), dv.to(dv_ptr.dtype.element_ty))


KERNELS = {"forward": dense_forward_kernel, "dq": dense_dq_kernel, "dkv": dense_dkv_kernel}
