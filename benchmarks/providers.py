"""Who computes attention on q, k and v: functions of a problem, each within one form, built before they are timed.

Joint form (one softmax per query): "ours"; "sdpa_mask", scaled_dot_product_attention under a dense mask of all tokens;
"sdpa_mask_used", of those that attend or are attended to; "flex" and "flex_packed", compiled FlexAttention in canvas
and in packed order; on GPUs "flex_flash", by FlashAttention-4. Edge form (one softmax per attention set, averaged by
weight): "ours"; "per_edge_loop", which gathers, attends and scatters set by set; "grouped", sets of equal shape in one
batched call by hand, on views where they lie at equal distances; on GPUs "varlen", all sets as one batch through
FlashAttention.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import measure
from benchmarks.cases import Case
from benchmarks.measure import Contest, Provider, Run, Settings, Unavailable
from benchmarks.problem import RESULTS, Problem
from canvas_engineering.attention import canvas_attention
from canvas_engineering.connectivity import resolve_frames
from canvas_engineering.plan import compile_attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Build = Callable[[Problem, str, torch.dtype], Attend]
MASK_BYTES = {"cpu": 4 << 30, "cuda": 16 << 30}
"""What a provider may hold for its mask."""
FLEX_BLOCK, FLEX_KINDS = 128, 64
"""FlexAttention's table of kinds is padded to a multiple of this, so that one compilation serves many patterns."""
BLOCK_BYTES = 40
"""What a pair of FlexAttention's blocks takes: four int32 tables, and as much again and more while they are sorted."""
MAX_RUNS = 4
"""Of sets of one shape by hand: more runs of evenly spaced ranges than this are gathered together."""
REFERENCE_TOKENS = {"cpu": 1024, "cuda": 16384}
EAGER_ERRORS = 2.0
"""In 16 bits errors may be this many times those of plain dense attention in the same dtype, and a correct rounding of
the result is always let through."""
GATED_HEADS = 4


def of(backend: str = "auto") -> list[tuple[str, str, Build]]:
    """(form, name, build) of everyone, "ours" first in each form. ``build`` raises Unavailable where it cannot run."""
    joint, edge = (sdpa_mask, sdpa_mask_used, flex, flex_packed, flex_flash), (per_edge_loop, grouped, varlen)
    everyone = []
    for form, builds in (("joint", joint), ("edge", edge)):
        everyone += [(form, "ours", partial(ours, form, backend)), *((form, one.__name__, one) for one in builds)]
    return everyone


def ours(form: str, backend: str, problem: Problem, device: str, dtype: torch.dtype) -> Attend:
    plan = problem.plan(form).to(device)
    return lambda q, k, v: canvas_attention(q, k, v, plan, backend=backend)


def attention(case: Case, settings: Settings) -> Contest:
    """A case's providers on q, k and v, and unmasked scaled_dot_product_attention as the device's reference line.

    The gate computes exact results of some query rows of some heads, of the first and the last entry of the batch. The
    upstream gradient is zero except in the rows that are compared, so that every key's gradient is exact as well.
    """
    problem, device, dtype = Problem(case), settings.device, settings.dtype
    compile_attention.cache_clear()  # the plan's time is that of a first use
    resolve_frames.cache_clear()
    inputs, rows = problem.inputs(device, dtype), problem.sample()
    at = torch.from_numpy(rows).to(device)
    heads = torch.linspace(0, case.heads - 1, min(case.heads, GATED_HEADS)).long().to(device)
    entries = sorted({0, case.batch - 1})
    upstream = torch.zeros_like(inputs[3]).index_copy_(2, at, inputs[3][:, :, at])
    compared = [x[entries][:, heads] for x in (*inputs[:3], upstream)]

    def build_run(name: str, build: Build) -> Run:
        attend = build(problem, device, dtype)
        order = (attend.pack, attend.unpack) if isinstance(attend, Packed) else ()
        *own, grad = map(order[0], inputs) if order else inputs
        backward = not (device == "cpu" and name.startswith("flex"))
        own = [x.detach().requires_grad_(backward) for x in own]
        return Run(attend, own, dict(zip(RESULTS[1:], own)) if backward else {}, grad, *order)

    def select(name: str, x: Tensor) -> Tensor:
        x = x[entries][:, heads]
        return x[:, :, at] if name in ("out", "dq") else x

    def budgets(form: str, exact: dict[str, Tensor]) -> dict[str, float]:
        if dtype == torch.float32:
            return dict.fromkeys(exact, measure.BUDGET)
        eager, rounding = problem.exact(form, compared, rows, dtype), torch.finfo(dtype).eps / 2
        return {name: max(EAGER_ERRORS * measure.error(eager[name], exact[name]), rounding) for name in exact}

    def of_form(form: str) -> dict:
        pairs = problem.plan(form).table.pairs
        return {"pairs": pairs, "density": pairs / problem.tokens**2}

    facts = {name: getattr(case, name) for name in ("batch", "heads", "head_dim")} | {"tokens": problem.tokens}
    facts |= {"connections": len(problem.topology.connections), "attention_sets": len(problem.sets)}
    tokens = case.options.get("reference_tokens") or settings.reference_tokens or REFERENCE_TOKENS[device]
    return Contest(
        [Provider(form, name, partial(build_run, name, build)) for form, name, build in of(settings.backend)],
        lambda form: problem.exact(form, compared, rows),
        facts | {"reference_tokens": tokens},
        of_form,
        select,
        budgets,
        upstream,
        _unmasked(case, settings, tokens),
    )


def _unmasked(case: Case, settings: Settings, tokens: int) -> Run:
    """Attention without a mask: the rate that the device gives. Torch chooses the kernel, as for anyone."""
    shape, generator = (1, tokens, case.heads, case.head_dim), torch.Generator(settings.device).manual_seed(1)
    tensors = (torch.randn(shape, generator=generator, device=settings.device) for _ in range(4))
    *leaves, upstream = (x.to(settings.dtype).transpose(1, 2).requires_grad_() for x in tensors)
    run = Run(F.scaled_dot_product_attention, leaves, dict(zip("qkv", leaves)), upstream.detach())
    run.results()
    return run


def _fits(needed: int, device: str, what: str = "a mask") -> None:
    """Raise Unavailable for more bytes than a provider may hold."""
    if needed > MASK_BYTES[device]:
        most = f"{MASK_BYTES[device] / 2**30:,.1f} GiB that are allowed"
        raise Unavailable(f"{what} of {needed / 2**30:,.1f} GiB, more than the {most}")


def package_on_gpu(name: str, device: str) -> ModuleType:
    """A package that runs on GPUs only; raises Unavailable without it or without one."""
    if device == "cpu":
        raise Unavailable("it needs a GPU")
    try:
        return importlib.import_module(name)
    except ImportError as cause:
        raise Unavailable(f"cannot import {name}: {cause}") from cause


class Packed(NamedTuple):
    """A provider whose tokens lie in another order. They are packed before timing: a user may stay in that order."""

    attend: Attend
    order: Tensor

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(q, k, v)

    def pack(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)[:, self.order].transpose(1, 2)

    def unpack(self, x: Tensor) -> Tensor:
        return torch.empty_like(x).index_copy_(2, self.order, x)


def sdpa_mask(problem: Problem, device: str, dtype: torch.dtype, tokens: np.ndarray | None = None) -> Attend:
    """Under ln of the joint weights, −inf where a query does not attend to a key. ``tokens``: of those alone."""
    kinds = problem.kinds if tokens is None else problem.kinds[tokens]
    # rows start at multiples of eight elements: else torch copies the mask at each call of its memory-efficient kernel
    n, wide = len(kinds), -(-len(kinds) // 8) * 8
    _fits(n * wide * dtype.itemsize, device)
    mask = torch.empty(n, wide, dtype=dtype, device=device)[:, :n]
    kinds, logs = torch.from_numpy(kinds).to(device), torch.from_numpy(problem.weight_of_kinds).log().to(device, dtype)
    for low in range(0, n, 1024):
        mask[low : low + 1024] = logs[kinds[low : low + 1024]].index_select(1, kinds)
    empty = mask.isneginf().all(1, keepdim=True)
    # a softmax over no key is NaN: rows without keys attend to themselves, and are cleared
    mask.diagonal()[empty[:, 0]] = 0
    clears, mask = bool(empty.any()), mask if tokens is None or mask.any() else None

    def attend(q, k, v):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.masked_fill(empty, 0) if clears else out

    return attend


def sdpa_mask_used(problem: Problem, device: str, dtype: torch.dtype) -> Attend:
    """A dense mask over the tokens that attend or are attended to, which are gathered before and put back behind."""
    used = np.unique(np.concatenate([tokens for one in problem.sets for tokens in one[:2]]))
    if len(used) == problem.tokens:
        raise Unavailable("every token attends or is attended to")
    own, at = sdpa_mask(problem, device, dtype, used), torch.from_numpy(used).to(device)

    def attend(q, k, v):
        return torch.zeros_like(q).index_copy(2, at, own(*(x.index_select(2, at) for x in (q, k, v))))

    return attend


@cache
def compiled_flex(dynamic: bool, backend: str = "inductor") -> Callable:
    """FlexAttention compiled, never left uncompiled without a word. ``dynamic``: once for all cases, whose lengths,
    block tables and kinds are inputs; on a GPU compiling for each would take longer than all timings."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=dynamic, fullgraph=True, backend=backend)


def flex(
    problem: Problem, device: str, dtype: torch.dtype, order: np.ndarray | None = None, options: dict | None = None
) -> Attend:
    _fits(BLOCK_BYTES * (-(-problem.tokens // FLEX_BLOCK)) ** 2, device, "block tables")
    kinds = torch.from_numpy(problem.kinds if order is None else problem.kinds[order]).to(device)
    known = torch.from_numpy(problem.weight_of_kinds)
    padding = (0, -len(known) % FLEX_KINDS)
    weight = F.pad(known, padding * 2).float().to(device)
    mask, logs = block_mask(kinds, weight > 0), weight.log()
    score = (lambda score, b, h, query, key: score + logs[kinds[query], kinds[key]]) if problem.weighted else None
    attend = compiled_flex(dynamic=device == "cuda")
    return lambda q, k, v: attend(q, k, v, score_mod=score, block_mask=mask, kernel_options=options)


def block_mask(kinds: Tensor, allowed: Tensor):
    """What ``create_block_mask`` gives for tokens of these kinds, int (n,), bool (kinds, kinds), without its n² pairs
    or the minutes of compiling it (https://github.com/pytorch/pytorch/issues/182060)."""
    from torch.nn.attention.flex_attention import BlockMask

    n, count = len(kinds), -(-len(kinds) // FLEX_BLOCK)
    holds = torch.zeros(count, len(allowed), device=kinds.device)
    holds[torch.arange(n, device=kinds.device) // FLEX_BLOCK, kinds.long()] = 1
    some, not_all = (holds @ which.float() @ holds.T > 0 for which in (allowed, ~allowed))
    full = some & ~not_all
    if n % FLEX_BLOCK:
        full[-1] = full[:, -1] = False  # what is padded is not full
    tables = []
    for blocks in (some & ~full, full):
        blocks = blocks[None, None].int()
        tables += [blocks.sum(-1, dtype=torch.int32), blocks.argsort(dim=-1, descending=True, stable=True).int()]
    selected = lambda b, h, query, key: allowed[kinds[query], kinds[key]]  # noqa: E731
    return BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=FLEX_BLOCK, mask_mod=selected, seq_lengths=(n, n))


def flex_packed(problem: Problem, device: str, dtype: torch.dtype) -> Attend:
    order = problem.plan("joint").order
    order = np.concatenate([order, np.setdiff1d(np.arange(problem.tokens), order)])
    if (order == np.arange(problem.tokens)).all():
        raise Unavailable("packed order is canvas order")
    return Packed(flex(problem, device, dtype, order), torch.from_numpy(order).to(device))


def flex_flash(problem: Problem, device: str, dtype: torch.dtype) -> Attend:
    """FlashAttention-4's kernels, which torch takes where flash-attn-4 is installed."""
    package_on_gpu("flash_attn.cute", device)
    return flex(problem, device, dtype, options={"BACKEND": "FLASH"})


def _shares(problem: Problem, device: str, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys, and the share of the output (rows, 1), of each attention set."""
    sets = []
    for queries, keys, weight in problem.sets:
        share = torch.from_numpy(weight / problem.total_weight[queries][:, None]).to(device, dtype)
        sets.append((torch.from_numpy(queries).to(device), torch.from_numpy(keys).to(device), share))
    return sets


def per_edge_loop(problem: Problem, device: str, dtype: torch.dtype) -> Attend:
    sets = _shares(problem, device, dtype)

    def attend(q, k, v):
        total = torch.zeros_like(q)
        for queries, keys, share in sets:
            parts = (x.index_select(2, at) for x, at in ((q, queries), (k, keys), (v, keys)))
            total.index_add_(2, queries, F.scaled_dot_product_attention(*parts) * share)
        return total

    return attend


class Ranges(NamedTuple):
    """The queries, or the keys, of G sets of one length: ``index`` (G, length), int64. ``step``: the distance from one
    to the next where each is a range and all are equally far apart, else None."""

    index: Tensor
    step: int | None

    @classmethod
    def of(cls, sets: list[Tensor]) -> Ranges:
        index = torch.stack(sets)
        steps = index[:, 0].diff()
        even = bool((index.diff(dim=1) == 1).all() and (steps == steps[:1]).all() and (steps >= 0).all())
        return cls(index, (int(steps[0]) if len(steps) else index.shape[1]) if even else None)

    def take(self, x: Tensor) -> Tensor:
        """Of x (B, H, n, D): (B · G, H, length, D), a view where there is one."""
        count, length = self.index.shape
        if self.step is None:
            x = x.index_select(2, self.index.flatten()).unflatten(2, (count, length))
        else:
            x = x.narrow(2, int(self.index[0, 0]), self.step * (count - 1) + length)
            if self.step == 0:
                x = x.unsqueeze(2).expand(-1, -1, count, -1, -1)
            elif self.step == length:
                x = x.unflatten(2, (count, length))
            else:
                x = x.unfold(2, length, self.step).transpose(-1, -2)
        return x.transpose(1, 2).flatten(0, 1)

    def add(self, total: Tensor | None, x: Tensor, like: Tensor) -> Tensor:
        """``total`` (B, H, n, D) with x (B, H, G · length, D) added; None is nothing so far."""
        if total is None and self.covers(like.shape[2]):
            return x
        total = torch.zeros_like(like) if total is None else total
        if self.step != self.index.shape[1]:
            return total.index_add_(2, self.index.flatten(), x)
        total.narrow(2, int(self.index[0, 0]), x.shape[2]).add_(x)
        return total

    def covers(self, tokens: int) -> bool:
        """Whether these are all tokens, in order."""
        return self.step == self.index.shape[1] and self.index.numel() == tokens


def _runs(sets: list) -> list[list]:
    """Sets of one shape, cut where they are no longer ranges at equal distances; uncut where that makes many."""
    runs: list[list] = []
    for one in sets:
        grown = [*runs[-1][-2:], one] if runs else []
        if runs and all(Ranges.of([x[side] for x in grown]).step is not None for side in (0, 1)):
            runs[-1].append(one)
        else:
            runs.append([one])
    return runs if len(runs) <= MAX_RUNS else [sets]


def grouped(problem: Problem, device: str, dtype: torch.dtype) -> Attend:
    """All sets of a shape in one call: on views where they lie at equal distances, else gathered and added back."""
    by_shape: dict[tuple[int, int], list] = {}
    for one in _shares(problem, device, dtype):
        by_shape.setdefault((len(one[0]), len(one[1])), []).append(one)
    if len(by_shape) == len(problem.sets):
        raise Unavailable("no two sets are of one shape: this is the loop")
    groups = []
    for run in (run for sets in by_shape.values() for run in _runs(sets)):
        queries, keys, share = zip(*run)
        share = torch.cat(share)
        groups.append((Ranges.of(queries), Ranges.of(keys), None if (share == 1).all() else share))
    groups.sort(key=lambda group: not group[0].covers(problem.tokens))  # what writes every token leaves none to clear

    def attend(q, k, v):
        total = None
        for queries, keys, share in groups:
            out = F.scaled_dot_product_attention(queries.take(q), keys.take(k), keys.take(v))
            # (B · G, H, rows, D), tokens before heads in memory → (B, H, G · rows, D)
            out = out.transpose(1, 2).reshape(len(q), -1, *q.shape[1::2]).transpose(1, 2)
            total = queries.add(total, out if share is None else out * share, q)
        return total

    return attend


def varlen(problem: Problem, device: str, dtype: torch.dtype) -> Attend:
    """https://docs.pytorch.org/docs/stable/nn.attention.varlen.html: (tokens, H, D), where each sequence starts."""
    varlen_attn = package_on_gpu("torch.nn.attention.varlen", device).varlen_attn
    n, batch, sets = problem.tokens, problem.case.batch, _shares(problem, device, dtype)
    queries, keys, share = (torch.cat(column) for column in zip(*sets))
    queries, keys = ((at + n * torch.arange(batch, device=device)[:, None]).flatten() for at in (queries, keys))
    share = share.repeat(batch, 1)[:, None]
    sizes = [torch.tensor([0] + [len(one[side]) for one in sets] * batch) for side in (0, 1)]
    starts = [size.cumsum(0).to(device, torch.int32) for size in sizes]
    longest = [int(size.max()) for size in sizes]

    def attend(q, k, v):
        tokens = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B · n, H, D)
        rows = (x.index_select(0, at) for x, at in zip(tokens, (queries, keys, keys)))
        out = varlen_attn(*rows, *starts, *longest) * share
        total = torch.zeros(batch * n, *out.shape[1:], dtype=q.dtype, device=q.device)
        return total.index_add_(0, queries, out).unflatten(0, (batch, n)).transpose(1, 2)

    return attend
