"""Who is compared: functions of (q, k, v) for a problem, each within one form. What they need is built before timing.

Joint form (one softmax per query): "ours" and on GPUs "ours_torch" (the torch backend, which is ours on a CPU),
"sdpa_mask" (scaled_dot_product_attention under a dense additive mask of all tokens), "sdpa_mask_used" (of those that
read or are read, gathered and put back), "flex" and "flex_packed" (compiled FlexAttention with a BlockMask, tokens in
canvas order or in our packed order), and on GPUs where installed "flex_flash" (FlexAttention by FlashAttention-4's
kernels), "xformers", "flashinfer" and "flashinfer_packed". Edge form (one softmax per read, averaged by weight):
"ours", "ours_torch", "per_edge_loop" (gather, attend, scatter, read by read), "grouped" (reads of equal shape in one
batched call, by hand: on views where they lie at equal distances), and on GPUs "varlen" (all reads of all entries of
the batch as one batch of variable lengths through FlashAttention).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import measure
from benchmarks.problem import Problem
from canvas_engineering.attention import canvas_attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
GPU_BYTES = 16 << 30
"""What a contestant may hold on a GPU for its mask."""
FLEX_BLOCK = 128
CELL_BYTES = 40
"""What a pair of FlexAttention's blocks takes: four int32 tables, and as much again and more while they are sorted."""
INDEX_BYTES = 32
"""What a key of a block row takes in FlashInfer's plan: an int32, and several int64 while it is made."""
MOST_RUNS = 4
"""Of reads of one shape by hand: more pieces than this are gathered together."""
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


def of(device: str, backend: str = "auto") -> list[Contestant]:
    """Everyone, ours first in each form. Who cannot run on ``device`` ("cpu" or "cuda") says so when it is built."""
    on_cpu = device == "cpu"
    ours_is_torch = backend == "torch" or (backend == "auto" and on_cpu)

    def ours(form: str, backend: str = backend, name: str = "ours"):
        def build(problem, device, dtype):
            if name != "ours" and ours_is_torch:
                raise Unavailable("ours runs the torch backend here")
            plan = problem.plan(form).to(device)
            return lambda q, k, v: canvas_attention(q, k, v, plan, backend=backend)

        return Contestant(form, name, build)

    def on_gpus(build):
        def refuse(problem, device, dtype):
            raise Unavailable("it needs a GPU")

        return refuse if on_cpu else build

    return [
        ours("joint"),
        ours("joint", "torch", "ours_torch"),
        Contestant("joint", "sdpa_mask", sdpa_mask),
        Contestant("joint", "sdpa_mask_used", sdpa_mask_used),
        Contestant("joint", "flex", flex, on_cpu),
        Contestant("joint", "flex_packed", flex_packed, on_cpu),
        *(() if on_cpu else (Contestant("joint", "flex_flash", flex_flash),)),
        Contestant("joint", "xformers", on_gpus(xformers)),
        Contestant("joint", "flashinfer", on_gpus(flashinfer), True),
        Contestant("joint", "flashinfer_packed", on_gpus(flashinfer_packed), True),
        ours("edge"),
        ours("edge", "torch", "ours_torch"),
        Contestant("edge", "per_edge_loop", per_edge_loop),
        Contestant("edge", "grouped", grouped),
        Contestant("edge", "varlen", on_gpus(varlen)),
    ]


def _fits(needed: int, device: str, what: str = "a mask") -> None:
    """:class:`Unavailable` for more bytes than a contestant may hold: on a CPU three quarters of what is free."""
    if device == "cuda":
        most, why = GPU_BYTES, "that are allowed"
    else:
        most, why = 3 * measure.free_bytes() // 4, "that are three quarters of what is free here"
    if needed > most:
        raise Unavailable(f"{what} of {needed / 2**30:,.1f} GiB, more than the {most / 2**30:,.1f} GiB {why}")


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as cause:
        raise Unavailable(f"cannot import {name}: {cause}") from cause


class Packed:
    """A contestant whose tokens lie in another order: :meth:`pack` its inputs, :meth:`unpack` its results.

    Tokens are packed before timing: a user may stay in that order from layer to layer. Packed tensors are laid out as
    before, one token's heads beside each other; with ``heads_first`` one head's tokens.
    """

    def __init__(self, attend: Attend, order: np.ndarray, device: str, heads_first: bool = False):
        self.attend, self.order, self.heads_first = attend, torch.from_numpy(order).to(device), heads_first

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(q, k, v)

    def pack(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)[:, self.order].transpose(1, 2)
        return x.contiguous() if self.heads_first else x

    def unpack(self, x: Tensor) -> Tensor:
        return torch.empty_like(x).index_copy_(2, self.order, x)


def _packed_order(problem: Problem) -> np.ndarray:
    order = problem.plan("joint").order
    order = np.concatenate([order, np.setdiff1d(np.arange(problem.tokens), order)])
    if (order == np.arange(problem.tokens)).all():
        raise Unavailable("packed order is canvas order")
    return order


# -- joint form --------------------------------------------------------------------------------------------------------


def additive_mask(
    problem: Problem, device: str, dtype: torch.dtype, tokens: np.ndarray | None = None
) -> tuple[Tensor, Tensor | None]:
    """(n, n): ln of the joint weights, −inf where a query does not read a key; (n, 1): the rows that read nothing, None
    where all read. A softmax over no key is NaN: such rows read themselves here, and are to be cleared. ``tokens``: of
    those alone."""
    # Rows start at multiples of eight elements. Otherwise torch copies all of the mask into such rows at each call of
    # the memory-efficient kernel, and xformers refuses it.
    kinds = problem.kinds if tokens is None else problem.kinds[tokens]
    n, wide = len(kinds), -(-len(kinds) // 8) * 8
    _fits(n * wide * dtype.itemsize, device)
    mask = torch.empty(n, wide, dtype=dtype, device=device)[:, :n]
    empty = torch.empty(n, 1, dtype=torch.bool, device=device)
    kinds = torch.from_numpy(kinds).to(device)
    logs = torch.from_numpy(problem.weight_of_kinds).log().to(device, dtype)
    for rows in torch.arange(n, device=device).split(1024):
        part = logs[kinds[rows]].index_select(1, kinds)
        piece = slice(int(rows[0]), int(rows[-1]) + 1)
        mask[piece], empty[piece] = part, part.isneginf().all(1, keepdim=True)
    if not empty.any():
        return mask, None
    mask.diagonal()[empty[:, 0]] = 0
    return mask, empty


def sdpa_mask(problem: Problem, device: str, dtype: torch.dtype) -> Attend:
    mask, empty = additive_mask(problem, device, dtype)
    return _cleared(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask), empty)


def sdpa_mask_used(problem: Problem, device: str, dtype: torch.dtype) -> Attend:
    """A dense mask over the tokens that read or are read, which are gathered before and put back behind."""
    reads = [np.concatenate([read[side] for read in problem.reads]) for side in (0, 1)]
    used = np.unique(np.concatenate(reads))
    if len(used) == problem.tokens:
        raise Unavailable("every token reads or is read")
    mask, empty = additive_mask(problem, device, dtype, used)
    plain = empty is None and not mask.any()
    at = torch.from_numpy(used).to(device)

    def attend(q, k, v):
        parts = (x.index_select(2, at) for x in (q, k, v))
        out = F.scaled_dot_product_attention(*parts, attn_mask=None if plain else mask)
        out = out if empty is None else out.masked_fill(empty, 0)
        return torch.zeros_like(q).index_copy(2, at, out)

    return attend


def xformers(problem: Problem, device: str, dtype: torch.dtype) -> Attend:
    """https://facebookresearch.github.io/xformers/components/ops.html: (B, n, H, D), and a bias (B, H, n, n)."""
    ops = _package("xformers.ops")
    mask, empty = additive_mask(problem, device, dtype)

    def attend(q, k, v):
        bias = mask.expand(*q.shape[:2], -1, -1)
        out = ops.memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_bias=bias)
        return out.transpose(1, 2)

    return _cleared(attend, empty)


def _cleared(attend: Attend, empty: Tensor | None) -> Attend:
    return attend if empty is None else lambda q, k, v: attend(q, k, v).masked_fill(empty, 0)


def _selector(kinds: Tensor, allowed: Tensor) -> Callable:
    return lambda batch, head, query, key: allowed[kinds[query], kinds[key]]


def _log_weights(kinds: Tensor, log_weight: Tensor) -> Callable:
    return lambda score, batch, head, query, key: score + log_weight[kinds[query], kinds[key]]


@functools.cache
def compiled_flex(dynamic: bool, backend: str = "inductor") -> Callable:
    """FlexAttention compiled, never left uncompiled without a word. ``dynamic``: once for all cases, whose lengths,
    block tables and kinds are inputs; on a GPU compiling for each would take longer than all timings."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=dynamic, fullgraph=True, backend=backend)


def flex(
    problem: Problem, device: str, dtype: torch.dtype, order: np.ndarray | None = None, options: dict | None = None
) -> Attend:
    _fits(CELL_BYTES * (-(-problem.tokens // FLEX_BLOCK)) ** 2, device, "block tables")
    kinds = torch.from_numpy(problem.kinds if order is None else problem.kinds[order]).to(device)
    count = -(-len(problem.weight_of_kinds) // KINDS) * KINDS
    weight = torch.zeros(count, count, device=device)
    known = torch.from_numpy(problem.weight_of_kinds)
    weight[: len(known), : len(known)] = known
    mask = block_mask(kinds, weight > 0)
    score = _log_weights(kinds, weight.log()) if problem.weighted else None
    attend = compiled_flex(dynamic=device == "cuda")
    return lambda q, k, v: attend(q, k, v, score_mod=score, block_mask=mask, kernel_options=options)


def block_mask(kinds: Tensor, allowed: Tensor):
    """What ``create_block_mask`` gives for tokens of these kinds (int [n]; bool [kinds, kinds]), without its n² pairs.

    Compiled, it would hold none either, but compiling it takes minutes at some lengths
    (https://github.com/pytorch/pytorch/issues/182060).
    """
    from torch.nn.attention.flex_attention import BlockMask

    n, count = len(kinds), -(-len(kinds) // FLEX_BLOCK)
    holds = torch.zeros(count, len(allowed), device=kinds.device)
    holds[torch.arange(n, device=kinds.device) // FLEX_BLOCK, kinds.long()] = 1
    some, not_all = (holds @ which.float() @ holds.T > 0 for which in (allowed, ~allowed))
    full = some & ~not_all
    if n % FLEX_BLOCK:
        full[-1] = full[:, -1] = False  # what is padded is not full
    tables = []
    for cells in (some & ~full, full):
        cells = cells[None, None].int()
        tables += [cells.sum(-1, dtype=torch.int32), cells.argsort(dim=-1, descending=True, stable=True).int()]
    return BlockMask.from_kv_blocks(
        *tables, BLOCK_SIZE=FLEX_BLOCK, mask_mod=_selector(kinds, allowed), seq_lengths=(n, n)
    )


def flex_packed(problem: Problem, device: str, dtype: torch.dtype) -> Attend:
    order = _packed_order(problem)
    return Packed(flex(problem, device, dtype, order), order, device)


def flex_flash(problem: Problem, device: str, dtype: torch.dtype) -> Attend:
    """FlashAttention-4's kernels, which torch takes where flash-attn-4 is installed."""
    _package("flash_attn.cute")
    return flex(problem, device, dtype, options={"BACKEND": "FLASH"})


def flashinfer(problem: Problem, device: str, dtype: torch.dtype, order: np.ndarray | None = None) -> Attend:
    """Blocks of variable size: stretches of tokens of one kind, the same for all heads of all entries of the batch.

    https://docs.flashinfer.ai/api/sparse.html: a map of blocks per head, tensors (heads, n, D), which packing lays out.
    """
    sparse = _package("flashinfer.sparse")
    if problem.weighted:
        raise Unavailable("FlashInfer's variable blocks take no weights")
    order = np.arange(problem.tokens) if order is None else order
    kinds = problem.kinds[order]
    first = np.flatnonzero(np.append(True, kinds[1:] != kinds[:-1]))
    sizes = np.diff(np.append(first, len(kinds)))
    allowed = problem.weight_of_kinds[np.ix_(kinds[first], kinds[first])] > 0
    heads, dim = problem.case.batch * problem.case.heads, problem.case.head_dim
    indices = int((allowed @ sizes).sum())
    _fits(heads * (INDEX_BYTES * indices + allowed.size), device, "an index of keys")
    workspaces = (torch.empty(megabytes << 20, dtype=torch.uint8, device=device) for megabytes in (512, 64))
    floats, integers = workspaces
    wrapper = sparse.VariableBlockSparseAttentionWrapper(floats)
    wrapper.reset_workspace_buffer(floats, integers)  # its own integers are 8 MiB, too few for many blocks
    blocks, lengths = torch.from_numpy(allowed).to(device), torch.from_numpy(sizes).to(device, torch.int32)
    wrapper.plan(
        block_mask_map=blocks.expand(heads, -1, -1).contiguous(),
        block_row_sz=lengths.expand(heads, -1).contiguous(),
        block_col_sz=lengths.expand(heads, -1).contiguous(),
        num_qo_heads=heads,
        num_kv_heads=heads,
        head_dim=dim,
        q_data_type=dtype,
    )

    def attend(q, k, v):
        return wrapper.run(*(x.flatten(0, 1) for x in (q, k, v))).unflatten(0, q.shape[:2])

    return Packed(attend, order, device, heads_first=True)


def flashinfer_packed(problem: Problem, device: str, dtype: torch.dtype) -> Attend:
    return flashinfer(problem, device, dtype, _packed_order(problem))


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


class Places(NamedTuple):
    """Where each of G reads has its queries, or its keys: ``index`` (G, length). ``step``: the distance from one to the
    next where each is a range and all are equally far apart, else None."""

    index: Tensor
    step: int | None

    @classmethod
    def of(cls, places: list[Tensor]) -> Places:
        index = torch.stack(places)
        steps, ranges = index[:, 0].diff(), bool((index.diff(dim=1) == 1).all())
        even = ranges and bool((steps == steps[:1]).all()) and bool((steps >= 0).all())
        return cls(index, (int(steps[0]) if len(steps) else index.shape[1]) if even else None)

    def take(self, x: Tensor) -> Tensor:
        """Of x (B, H, n, D): (B · G, H, length, D), a view where there is one."""
        count, length = self.index.shape
        if self.step is None:
            parts = x.index_select(2, self.index.flatten()).unflatten(2, (count, length))
        else:
            first = int(self.index[0, 0])
            part = x[:, :, first : first + self.step * (count - 1) + length]
            if self.step == 0:
                parts = part.unsqueeze(2).expand(-1, -1, count, -1, -1)
            elif self.step == length:
                parts = part.unflatten(2, (count, length))
            else:
                parts = part.unfold(2, length, self.step).transpose(-1, -2)
        return parts.transpose(1, 2).flatten(0, 1)

    def put(self, total: Tensor | None, x: Tensor, like: Tensor) -> Tensor:
        """``total`` (B, H, n, D) with x (B, H, G · length, D) added; None is nothing so far."""
        count, length = self.index.shape
        first, whole = int(self.index[0, 0]), count * length == like.shape[2]
        if self.step == length and whole and total is None:
            return x
        total = torch.zeros_like(like) if total is None else total
        if self.step != length:
            return total.index_add_(2, self.index.flatten(), x)
        total[:, :, first : first + count * length] += x
        return total


def _runs(reads: list) -> list[list]:
    """Reads of one shape, cut where they are no longer ranges at equal distances; uncut where that makes many."""
    runs: list[list] = []
    for read in reads:
        grown = [*runs[-1], read] if runs else [read]
        if runs and all(Places.of([one[side] for one in grown[-3:]]).step is not None for side in (0, 1)):
            runs[-1].append(read)
        else:
            runs.append([read])
    return runs if len(runs) <= MOST_RUNS else [reads]


def grouped(problem: Problem, device: str, dtype: torch.dtype) -> Attend:
    """All reads of a shape in one call: of views where they lie at equal distances, else gathered and added back."""
    by_shape: dict[tuple[int, int], list] = {}
    for read in _shares(problem, device):
        by_shape.setdefault((len(read[0]), len(read[1])), []).append(read)
    if len(by_shape) == len(problem.reads):
        raise Unavailable("no two reads are of one shape: this is the loop")
    groups = []
    for reads in by_shape.values():
        for queries, keys, share in (zip(*run) for run in _runs(reads)):
            share = torch.cat(share).to(dtype)
            one = share.numel() == 0 or bool((share == share[0]).all())
            groups.append((Places.of(queries), Places.of(keys), float(share[0]) if one else share))
    # what writes every token first leaves nothing to clear
    groups.sort(key=lambda group: group[0].step != group[0].index.shape[1] or group[0].index.numel() < problem.tokens)

    def attend(q, k, v):
        total = None
        for queries, keys, share in groups:
            out = F.scaled_dot_product_attention(queries.take(q), keys.take(k), keys.take(v))
            # (B · G, H, rows, D), tokens before heads in memory → (B, H, G · rows, D)
            out = out.transpose(1, 2).reshape(len(q), -1, *q.shape[1::2]).transpose(1, 2)
            total = queries.put(total, out if isinstance(share, float) and share == 1 else out * share, q)
        return total

    return attend


def varlen(problem: Problem, device: str, dtype: torch.dtype) -> Attend:
    """https://docs.pytorch.org/docs/stable/nn.attention.varlen.html: (tokens, H, D), where each sequence starts."""
    varlen_attn = _package("torch.nn.attention.varlen").varlen_attn
    n, batch = problem.tokens, problem.case.batch
    reads = _shares(problem, device)
    queries, keys, share = (torch.cat(column) for column in zip(*reads))
    queries, keys = ((at + n * torch.arange(batch, device=device)[:, None]).flatten() for at in (queries, keys))
    share = share.to(dtype).repeat(batch, 1)[:, None]
    sizes = [torch.tensor([0] + [len(read[side]) for read in reads] * batch) for side in (0, 1)]
    starts = [size.cumsum(0).to(device, torch.int32) for size in sizes]
    longest = [int(size.max()) for size in sizes]

    def attend(q, k, v):
        tokens = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B · n, H, D)
        rows = (x.index_select(0, at) for x, at in zip(tokens, (queries, keys, keys)))
        out = varlen_attn(*rows, *starts, *longest) * share
        total = torch.zeros(batch * n, *out.shape[1:], dtype=q.dtype, device=q.device)
        return total.index_add_(0, queries, out).unflatten(0, (batch, n)).transpose(1, 2)

    return attend
