"""Sequences as chunks that advance side by side, and what each chunk begins with."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def by_step(x: torch.Tensor, chunk: int) -> torch.Tensor:
    """(batch, length, D) → (batch · chunks, chunk, D), padded with zeros, which neither decay nor add."""
    missing = -x.shape[1] % chunk
    return (F.pad(x, (0, 0, 0, missing)) if missing else x.contiguous()).reshape(-1, chunk, x.shape[2])


def by_position(steps: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """The inverse of :func:`by_step`."""
    return steps.reshape(batch, -1, steps.shape[2])[:, :length].contiguous()


def carry(added: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """(batch, chunks, states, width): the state before each chunk, from what each adds and what share of its start each
    keeps: H_k = kept_{k−1} H_{k−1} + added_{k−1}, by doubling."""
    shift, count = 1, added.shape[1]
    while shift < count:
        joined = torch.addcmul(added[:, shift:], kept[:, shift:], added[:, :-shift])
        added = torch.cat([added[:, :shift], joined], 1)
        kept = torch.cat([kept[:, :shift], kept[:, shift:] * kept[:, :-shift]], 1)
        shift *= 2
    return F.pad(added[:, :-1], (0, 0, 0, 0, 1, 0))
