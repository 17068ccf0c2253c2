"""Attention of one rank of a sharded plan: heads and rows are exchanged before it, and results behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from canvas_kernels.ops import block_attention
from canvas_kernels.packing import gather_rows
from canvas_kernels.parts import attention_part

from ..parallel import PlacedPlan
from ..parallel.exchange import exchange_rows, join_heads, split_evenly, split_heads
from ..parallel.rank import Exchange, Travel


def sharded_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, placed: PlacedPlan, **options) -> torch.Tensor:
    """Returns the rows of :func:`canvas_attention` that this rank holds, (B, heads, own rows, head_dim).

    Gradients of gains are those of this rank's share: their sum over ranks is the whole.

    Raises:
        ValueError: another number of rows than the rank holds, dropout, or under torch.compile a rank without rows.
    """
    rows = placed.n_rows
    if q.shape[2] != rows[placed.head]:
        raise ValueError(
            f"q {tuple(q.shape)} holds {q.shape[2]} positions; this rank of the sharded plan holds "
            f"{rows[placed.head]}: x[:, placed.positions]"
        )
    if options["dropout_p"]:
        raise ValueError("a sharded plan has no dropout: its ranks would not draw what one process draws")
    if torch.compiler.is_compiling() and not placed.may_compile:
        raise ValueError(
            "some rank of the sharded plan holds no position, and compilers leave out an exchange of which a rank gets "
            "nothing: cut the plan so that each rank holds one, or run it eagerly"
        )

    def attend(q, k, v):
        return _attend_shard(q, k, v, placed, options)

    if len(rows) == 1:
        return attend(q, k, v)
    return attend_by_heads(attend, q, k, v, rows, placed.head, placed.heads_group)


def _attend_shard(q, k, v, placed: PlacedPlan, options: dict) -> torch.Tensor:
    """Returns attention for the rows of this shard, (B, heads, rows of the shard, head_dim)."""
    plan, held = placed.rank_plan, q.shape[2]
    options = dict(options)
    if options["row_scale"] is not None:
        options["row_scale"] = gather_rows(options["row_scale"], plan.packed, 1)

    def attend(q, k, v) -> torch.Tensor:
        return block_attention(q, k, v, plan.table, rows=plan.inputs, **options)  # pyright: ignore[reportReturnType] no lse is returned

    if plan.pull is None:
        return attend(q, k, v)
    # keys and values of other shards come in one exchange
    pulled = exchanged(torch.stack((k, v)), plan.pull, placed.rows_group)
    keys, values = (append_rows(x, y) for x, y in zip((k, v), pulled))
    queries = append_rows(q, torch.zeros_like(pulled[0]))
    out = attend(queries, keys, values)[:, :, :held]
    return out if plan.travel is None else _attend_travelling(q, k, v, out, plan.travel, placed.rows_group, options)


def _attend_travelling(q, k, v, out, travel: Travel, group: str, options: dict) -> torch.Tensor:
    """Returns ``out`` with the rows of queries that travel: computed where their keys are, and merged here."""
    guests = exchanged(q, travel.there, group)
    nothing = torch.zeros_like(guests)
    inputs = (append_rows(q, guests), append_rows(k, nothing), append_rows(v, nothing))
    queries, keys, values = (gather_rows(x, travel.inputs, 2) for x in inputs)
    part = attention_part(queries, keys, values, travel.table, scale=options["scale"], backend=options["backend"])
    part = F.pad(part, (0, 0, 0, 1))
    returned = gather_rows(part, travel.back, 2).permute(2, 0, 1, 3)
    returned = exchange_rows(returned, travel.there.receive, travel.there.send, group).permute(1, 2, 0, 3)
    # of nothing: a log-sum-exp of −inf
    none = F.pad(torch.zeros_like(part[:, :, :1, :-1]), (0, 1), value=-torch.inf)
    results = torch.cat((gather_rows(part, travel.own, 2), returned, none), 2)
    results = gather_rows(results, travel.merge, 2).unflatten(2, (travel.results, -1))
    share = torch.softmax(results[..., -1:], 2)
    merged = (share * results[..., :-1]).sum(2).to(out.dtype)
    return gather_rows(append_rows(out, merged), travel.targets, 2)


def with_pulled_rows(x: torch.Tensor, placed: PlacedPlan) -> torch.Tensor:
    """Returns x (B, rows held, d) with the rows behind it that this rank's queries attend to on other ranks."""
    if placed.rank_plan.pull is None:
        return x
    return torch.cat((x, exchanged(x, placed.rank_plan.pull, placed.rows_group)), 1)


def exchanged(x: torch.Tensor, exchange: Exchange, group: str) -> torch.Tensor:
    """Returns the rows (…, rows, head_dim) that this rank gets for those of ``x`` that it sends."""
    sent = gather_rows(x, exchange.rows, -2).movedim(-2, 0)
    return exchange_rows(sent, exchange.send, exchange.receive, group).movedim(0, -2)


def append_rows(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Returns the rows of ``x`` and ``y`` (B, heads, rows, head_dim), in the memory order of ``x``."""
    if x.stride(1) < x.stride(2):
        return torch.cat((x.transpose(1, 2), y.transpose(1, 2)), 1).transpose(1, 2)
    return torch.cat((x, y), 2)


def attend_by_heads(
    attend: Callable[..., torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: Sequence[int],
    rank: int,
    group: str,
) -> torch.Tensor:
    """Runs ``attend`` on all rows of this rank's heads, between two exchanges.

    Args:
        attend: q, k and v (B, own heads, all rows, D), rows in order of ranks → the result, like q.
        q, k, v: (B, heads, own rows, D).
        rows: the number of rows of each rank.
        rank: this rank's number.
        group: name of the process group.

    Returns:
        (B, heads, own rows, D).
    """
    n_heads, ranks = q.shape[1], len(rows)
    if n_heads < ranks:
        # compilers leave out an exchange of which a rank gets nothing: ranks without a head run one of zeros
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, ranks - n_heads)) for x in (q, k, v))
    heads = split_evenly(q.shape[1], ranks)
    out = attend(*split_heads((q, k, v), rows, heads, rank, group))
    return join_heads(out, rows, heads, rank, group)[:, :n_heads]
