"""Attention of one rank of a sharded plan: heads exchanged for rows, attention, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from canvas_kernels.ops import block_attention

from ..parallel import PlacedPlan
from ..parallel.exchange import join_heads, split_evenly, split_heads


def sharded_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, placed: PlacedPlan, **options) -> torch.Tensor:
    """Returns the rows of :func:`canvas_attention` that this rank holds, (B, heads, own rows, head_dim).

    Gradients of gains are those of this rank's share: their sum over ranks is the whole.

    Raises:
        ValueError: another number of rows than the rank holds, or dropout.
    """
    rows, rank, group = placed.n_rows, placed.rank, placed.group
    if q.shape[2] != rows[rank]:
        raise ValueError(
            f"q {tuple(q.shape)} holds {q.shape[2]} positions; this rank of the sharded plan holds {rows[rank]}: "
            "x[:, placed.positions]"
        )
    if options["dropout_p"]:
        raise ValueError("a sharded plan has no dropout: its ranks would not draw what one process draws")

    def attend(q, k, v):
        return block_attention(q, k, v, placed.table, rows=placed.order_map, **options)

    return attend_by_heads(attend, q, k, v, rows, rank, group)


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

    Raises:
        ValueError: under torch.compile, a rank without rows.
    """
    if torch.compiler.is_compiling() and not all(rows):
        raise ValueError(
            f"rank {rows.index(0)} of the sharded plan holds no position, and compilers leave out an exchange of which "
            "a rank gets nothing: cut the plan so that each rank holds one, or run it eagerly"
        )
    n_heads, ranks = q.shape[1], len(rows)
    if n_heads < ranks:
        # ranks without a head run one of zeros, for the same reason
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, ranks - n_heads)) for x in (q, k, v))
    heads = split_evenly(q.shape[1], ranks)
    out = attend(*split_heads((q, k, v), rows, heads, rank, group))
    return join_heads(out, rows, heads, rank, group)[:, :n_heads]
