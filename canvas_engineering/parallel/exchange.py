"""Rows and heads that change ranks: torch's all-to-all, eager and compiled, backward by the reverse exchange."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed._functional_collectives as collectives


def exchange_rows(x: torch.Tensor, send: Sequence[int], receive: Sequence[int], group: str) -> torch.Tensor:
    """Sends blocks of rows to the ranks of a group.

    Args:
        x: (rows, …), what rank 0 gets first, then what rank 1 gets, and so on.
        send: the number of rows for each rank.
        receive: the number of rows from each rank.
        group: name of the process group.

    Returns:
        (sum of ``receive``, …), in order of ranks. Its gradient goes back by the reverse exchange, which waits for all
        ranks: each of them has to run it.
    """
    width = 1
    for size in x.shape[1:]:
        width *= size
    incoming, outgoing = ([width * rows for rows in counts] for counts in (receive, send))
    flat = collectives.all_to_all_single_autograd(x.reshape(-1), incoming, outgoing, group)  # pyright: ignore[reportArgumentType] the group's name, a NewType of str
    # a plain tensor, which waits for the exchange
    return torch.cat([flat]).view(sum(receive), *x.shape[1:])


def split_heads(tensors: Sequence[torch.Tensor], rows: Sequence[int], heads: Sequence[int], rank: int, group: str):
    """Turns own rows of all heads into all rows of own heads, by one exchange.

    Args:
        tensors: (B, all heads, own rows, D) each, of one shape.
        rows: the number of rows of each rank of the group.
        heads: the number of heads of each rank.
        rank: this rank's number.
        group: name of the process group.

    Returns:
        The tensors as (B, own heads, all rows, D), rows in order of ranks, in the memory order of the first.
    """
    first, count = tensors[0], len(tensors)
    batch, _, _, dim = first.shape
    positions_first = first.stride(1) < first.stride(2)
    # (heads, tensors, own rows, B, D): the heads of each rank are contiguous
    outgoing = torch.stack([x.permute(1, 2, 0, 3) for x in tensors], 1).flatten(1)
    own, width = heads[rank], count * batch * dim
    send = [number * rows[rank] * width for number in heads]
    incoming = exchange_rows(outgoing.reshape(-1), send, [own * number * width for number in rows], group)
    parts = incoming.split([own * number * width for number in rows])
    parts = [part.view(own, count, number, batch, dim) for part, number in zip(parts, rows)]
    results = []
    for index in range(count):
        if positions_first:
            x = torch.cat([part[:, index].permute(2, 1, 0, 3) for part in parts], 1)
            results.append(x.contiguous().transpose(1, 2))
        else:
            results.append(torch.cat([part[:, index].permute(2, 0, 1, 3) for part in parts], 2).contiguous())
    return results


def join_heads(x: torch.Tensor, rows: Sequence[int], heads: Sequence[int], rank: int, group: str) -> torch.Tensor:
    """Inverts :func:`split_heads` for one tensor: (B, own heads, all rows, D) becomes (B, all heads, own rows, D).

    The gradient of ``x`` has rows before heads in memory, like that behind ``out.transpose(1, 2).flatten(2)``.
    """
    batch, _, _, dim = x.shape
    width = batch * dim
    # (B, rows of a rank, own heads, D) for each rank
    outgoing = torch.cat([part.reshape(-1) for part in x.transpose(1, 2).split(list(rows), 1)])
    send = [number * heads[rank] * width for number in rows]
    receive = [number * rows[rank] * width for number in heads]
    incoming = exchange_rows(outgoing, send, receive, group)
    parts = [p.view(batch, rows[rank], h, dim) for p, h in zip(incoming.split(receive), heads)]
    return torch.cat(parts, 2).transpose(1, 2)


def gather_shards(x: torch.Tensor, rows: Sequence[int], rank: int, group: str) -> torch.Tensor:
    """Returns the rows of all ranks, (sum of rows, …), from each rank's own (own rows, …), in order of ranks.

    Its gradient is summed over ranks: a loss that every rank computes from the result counts once for each of them, as
    where gradients are averaged over ranks.
    """
    size = len(rows)
    copies = x.expand(size, *x.shape).flatten(0, 1)
    return exchange_rows(copies, [rows[rank]] * size, rows, group)


def split_evenly(count: int, parts: int) -> list[int]:
    """Returns ``parts`` sizes that sum to ``count``, the larger ones first.

    >>> split_evenly(3, 2)
    [2, 1]
    """
    return [count // parts + (index < count % parts) for index in range(parts)]
