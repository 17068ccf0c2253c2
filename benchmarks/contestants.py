"""Who is compared: functions of (q, k, v) for a problem, each within one form. What they need is built before timing.

Joint form (one softmax per query): "ours", "sdpa_mask" (scaled_dot_product_attention under a dense additive mask),
"flex" and "flex_packed" (compiled FlexAttention with a BlockMask, tokens in canvas order or in our packed order), and
where installed "xformers" and "flashinfer". Edge form (one softmax per read, averaged by weight): "ours",
"per_edge_loop" (gather, attend, scatter, read by read), "grouped" (reads of equal shape in one batched call, by hand),
and on GPUs "varlen" (all reads as one batch of variable lengths through FlashAttention).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.problem import Problem
from canvas_engineering.attention import canvas_attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
MOST_BYTES = {"cpu": 2 << 30, "cuda": 16 << 30}
"""What a contestant may hold for its mask."""
KINDS = 64
"""FlexAttention's table of kinds is padded to a multiple of this, so that one compilation serves many patterns."""


class Contestant(NamedTuple):
    """``build`` gives the call; ``forward_only``: it has no backward (FlexAttention on a CPU, FlashInfer)."""

    form: str
    name: str
    build: Callable[[Problem, str, torch.dtype], Attend]
    forward_only: bool = False


class Unavailable(Exception):
    """The contestant cannot run this case here; the text says why."""


def of(problem: Problem, device: str, backend: str = "auto") -> list[Contestant]:
    """Everyone who may run on ``device`` ("cpu" or "cuda"), ours first in each form."""

    def ours(form: str):
        def build(problem, device, dtype):
            plan = problem.plan(form).to(device)
            return lambda q, k, v: canvas_attention(q, k, v, plan, backend=backend)

        return Contestant(form, "ours", build)

    on_cpu = device == "cpu"
    found = [
        ours("joint"),
        Contestant("joint", "sdpa_mask", sdpa_mask),
        Contestant("joint", "flex", flex, on_cpu),
        Contestant("joint", "flex_packed", flex_packed, on_cpu),
        Contestant("joint", "xformers", xformers),
        Contestant("joint", "flashinfer", flashinfer, True),
        ours("edge"),
        Contestant("edge", "per_edge_loop", per_edge_loop),
        Contestant("edge", "grouped", grouped),
        Contestant("edge", "varlen", varlen),
    ]
    if on_cpu:
        gone = {"xformers", "flashinfer", "varlen"}
    else:
        gone = {name for name in ("xformers", "flashinfer") if importlib.util.find_spec(name) is None}
    return [contestant for contestant in found if contestant.name not in gone]


def _fits(problem: Problem, device: str, bytes_per_pair: int) -> None:
    needed = problem.tokens**2 * bytes_per_pair
    if needed > MOST_BYTES[device]:
        raise Unavailable(f"a mask of {needed / 2**30:.0f} GiB")


# -- joint form --------------------------------------------------------------------------------------------------------


def additive_mask(problem: Problem, device: str, dtype: torch.dtype) -> Tensor:
    """(n, n): ln of the joint weights, −inf where a query does not read a key."""
    mask = torch.empty(problem.tokens, problem.tokens, dtype=dtype, device=device)
    for low in range(0, problem.tokens, 1024):
        rows = np.arange(low, min(low + 1024, problem.tokens))
        mask[low : low + len(rows)] = problem.weights(rows, device).log().to(dtype)
    return mask


def sdpa_mask(problem: Problem, device: str, dtype: torch.dtype) -> Attend:
    _fits(problem, device, dtype.itemsize)
    mask = additive_mask(problem, device, dtype)
    empty = mask.isneginf().all(1, keepdim=True)
    if not empty.any():
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # a softmax over no key is NaN: such rows read themselves and are then cleared
    mask.diagonal()[empty[:, 0]] = 0
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask).masked_fill(empty, 0)


def _selector(kinds: Tensor, allowed: Tensor) -> Callable:
    return lambda batch, head, query, key: allowed[kinds[query], kinds[key]]


def _log_weights(kinds: Tensor, log_weight: Tensor) -> Callable:
    return lambda score, batch, head, query, key: score + log_weight[kinds[query], kinds[key]]


def flex(problem: Problem, device: str, dtype: torch.dtype, order: np.ndarray | None = None) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    _fits(problem, device, 1)
    n = problem.tokens
    kinds = torch.from_numpy(problem.kinds if order is None else problem.kinds[order]).to(device)
    count = -(-len(problem.weight_of_kinds) // KINDS) * KINDS
    weight = torch.zeros(count, count, device=device)
    known = torch.from_numpy(problem.weight_of_kinds)
    weight[: len(known), : len(known)] = known
    compiled = device == "cuda"
    mask = create_block_mask(_selector(kinds, weight > 0), None, None, n, n, device=device, _compile=compiled)
    score = _log_weights(kinds, weight.log()) if problem.weighted else None
    attend = torch.compile(flex_attention, dynamic=False, fullgraph=True)  # never uncompiled without a word
    return lambda q, k, v: attend(q, k, v, score_mod=score, block_mask=mask)


def flex_packed(problem: Problem, device: str, dtype: torch.dtype) -> Attend:
    """Tokens are packed once, before timing: a user may stay in that order from layer to layer."""
    plan = problem.plan("joint")
    rest = np.setdiff1d(np.arange(problem.tokens), plan.order)
    order = np.concatenate([plan.order, rest])
    if (order == np.arange(problem.tokens)).all():
        raise Unavailable("packed order is canvas order")
    return Packed(flex(problem, device, dtype, order), torch.from_numpy(order).to(device))


class Packed:
    """A contestant whose tokens lie in another order: :meth:`pack` its inputs, :meth:`unpack` its results."""

    def __init__(self, attend: Attend, order: Tensor):
        self.attend, self.order = attend, order

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(q, k, v)

    def pack(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)[:, self.order].transpose(1, 2)  # laid out as before: one compilation serves both

    def unpack(self, x: Tensor) -> Tensor:
        return torch.empty_like(x).index_copy_(2, self.order, x)


def xformers(problem: Problem, device: str, dtype: torch.dtype) -> Attend:
    from xformers.ops import memory_efficient_attention

    _fits(problem, device, dtype.itemsize)
    # rows of a bias must start at multiples of eight elements
    n, wide = problem.tokens, -(-problem.tokens // 8) * 8
    mask = torch.zeros(n, wide, dtype=dtype, device=device)
    mask[:, :n] = additive_mask(problem, device, dtype)

    def attend(q, k, v):
        bias = mask[None, None, :, :n].expand(q.shape[0], q.shape[1], n, n)
        return memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_bias=bias).transpose(1, 2)

    return attend


def flashinfer(problem: Problem, device: str, dtype: torch.dtype) -> Attend:
    """Blocks of variable size: stretches of tokens of one kind (https://docs.flashinfer.ai/api/sparse.html)."""
    from flashinfer.sparse import VariableBlockSparseAttentionWrapper

    if problem.weighted or problem.case.batch > 1:
        raise Unavailable("FlashInfer's variable blocks take neither weights nor a batch")
    kinds = problem.kinds
    first = np.flatnonzero(np.append(True, kinds[1:] != kinds[:-1]))
    sizes = torch.from_numpy(np.diff(np.append(first, len(kinds)))).to(torch.int32)
    allowed = torch.from_numpy(problem.weight_of_kinds[np.ix_(kinds[first], kinds[first])] > 0)
    heads, dim = problem.case.heads, problem.case.head_dim
    wrapper = VariableBlockSparseAttentionWrapper(torch.empty(512 << 20, dtype=torch.uint8, device=device))
    wrapper.plan(
        block_mask_map=allowed.expand(heads, -1, -1).contiguous().to(device),
        block_row_sz=sizes.expand(heads, -1).contiguous().to(device),
        block_col_sz=sizes.expand(heads, -1).contiguous().to(device),
        num_qo_heads=heads,
        num_kv_heads=heads,
        head_dim=dim,
        q_data_type=dtype,
    )
    return lambda q, k, v: wrapper.run(*(x[0].contiguous() for x in (q, k, v)))[None]


# -- edge form ---------------------------------------------------------------------------------------------------------


def _shares(problem: Problem, device: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [
        (
            torch.from_numpy(read.queries).to(device),
            torch.from_numpy(read.keys).to(device),
            torch.from_numpy(read.weight / problem.total_weight[read.queries]).to(device)[:, None],
        )
        for read in problem.reads
    ]


def per_edge_loop(problem: Problem, device: str, dtype: torch.dtype) -> Attend:
    reads = [(queries, keys, share.to(dtype)) for queries, keys, share in _shares(problem, device)]

    def attend(q, k, v):
        total = torch.zeros_like(q)
        for queries, keys, share in reads:
            parts = (x.index_select(2, at) for x, at in ((q, queries), (k, keys), (v, keys)))
            total.index_add_(2, queries, F.scaled_dot_product_attention(*parts) * share)
        return total

    return attend


def grouped(problem: Problem, device: str, dtype: torch.dtype) -> Attend:
    by_shape: dict[tuple[int, int], list] = {}
    for read in _shares(problem, device):
        by_shape.setdefault((len(read[0]), len(read[1])), []).append(read)
    if len(by_shape) == len(problem.reads):
        raise Unavailable("no two reads are of one shape: this is the loop")
    groups = [
        (torch.stack(queries), torch.stack(keys), torch.stack(share)[:, None].to(dtype))
        for queries, keys, share in (zip(*reads) for reads in by_shape.values())
    ]  # (G, queries), (G, keys), (G, 1, queries, 1)

    def attend(q, k, v):
        batch, heads, _, dim = q.shape
        total = torch.zeros_like(q)
        for queries, keys, share in groups:
            # (B, H, G, rows, D) → (B, G, H, rows, D): one batched call for all reads of a shape
            rows = ((q, queries), (k, keys), (v, keys))
            parts = (x.index_select(2, at.flatten()).unflatten(2, at.shape).transpose(1, 2) for x, at in rows)
            out = F.scaled_dot_product_attention(*(part.flatten(0, 1) for part in parts))
            out = (out.view(batch, len(queries), heads, -1, dim) * share).transpose(1, 2)
            total.index_add_(2, queries.flatten(), out.flatten(2, 3))
        return total

    return attend


def varlen(problem: Problem, device: str, dtype: torch.dtype) -> Attend:
    """https://docs.pytorch.org/docs/stable/nn.attention.varlen.html"""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as cause:
        raise Unavailable(f"torch {torch.__version__} has no varlen_attn") from cause

    reads = _shares(problem, device)
    queries, keys, share = (torch.cat(column) for column in zip(*reads))
    share = share[:, None].to(dtype)
    sizes = [torch.tensor([0, *(len(read[side]) for read in reads)]) for side in (0, 1)]
    starts = [size.cumsum(0).to(device, torch.int32) for size in sizes]
    longest = [int(size.max()) for size in sizes]

    def attend(q, k, v):
        total = []
        for parts in zip(q, k, v):
            rows = [x.transpose(0, 1).index_select(0, at) for x, at in zip(parts, (queries, keys, keys))]
            out = varlen_attn(*rows, *starts, *longest) * share
            empty = torch.zeros(q.shape[2], *out.shape[1:], dtype=q.dtype, device=q.device)
            total.append(empty.index_add(0, queries, out).transpose(0, 1))
        return torch.stack(total)

    return attend
