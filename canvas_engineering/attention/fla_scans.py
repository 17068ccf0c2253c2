"""The scans by a kernel of flash-linear-attention (the extra ``fla``), for float32 tensors on a GPU.

Of its operations, ``fla.ops.hgrn.fused_recurrent_hgrn(x, g, initial_state, output_final_state)`` is the one that
computes our recurrences as they are: h_t = exp(g_t) · h_{t−1} + x_t, every channel by itself, in float32. rwkv's sums
have one channel for each of the canvas's, mamba's states one for each pair of channel and state. Its results are held
to those of :mod:`.scan`, within 1e-5.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from .chunks import by_position, by_step, carry

# (x, g), both (batch, length, channels) → h of the same shape
Recurrence = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# mamba's states are written out, for as many channels at a time as make 64 MB of them.
MOST_STATES = 1 << 24
# Steps that follow each other: chunks run side by side, and no decay is rounded more often than this.
CHUNK = 128


def recurrence(x: torch.Tensor) -> Recurrence | None:
    """The kernel for tensors like ``x``, or None where :mod:`.scan` has to do: on a CPU, in float64, without fla."""
    return _kernel() if _suits(x) else None


def _suits(x: torch.Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.float32  # the kernel rounds float64


@functools.cache
def _kernel() -> Recurrence | None:
    if find_spec("fla") is None:
        return None
    # one that is installed and cannot be imported is an error, not a fallback
    from fla.ops.hgrn import fused_recurrent_hgrn  # pyright: ignore[reportMissingImports] of the extra `fla`

    return functools.partial(_recurrence, fused_recurrent_hgrn)


def _recurrence(kernel, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    batch, length, _ = x.shape
    if length <= CHUNK:
        return kernel(x.contiguous(), g.contiguous())[0]
    x, g = by_step(x, CHUNK), by_step(g, CHUNK)
    _, ends = kernel(x, g, output_final_state=True)
    # [batch, chunks, 1, channels]
    ends, kept = (t.unflatten(0, (batch, -1))[:, :, None] for t in (ends, g.sum(1).exp()))
    out, _ = kernel(x, g, initial_state=carry(ends, kept).reshape(len(x), -1))
    return by_position(out, batch, length)


def sums(recur: Recurrence, x: torch.Tensor, log_keep: torch.Tensor, backwards: bool) -> torch.Tensor:
    """As :func:`.scan.decayed_sums`; ``backwards`` from the last position."""
    if backwards:
        x = x.flip(1)
    out = recur(F.pad(x, (0, 0, 1, 0))[:, :-1], log_keep.expand_as(x))
    return out.flip(1) if backwards else out


def scan(
    recur: Recurrence, dt: torch.Tensor, x: torch.Tensor, b: torch.Tensor, c: torch.Tensor, rate: torch.Tensor
) -> torch.Tensor:
    """As :func:`.scan.selective_scan`."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for some in _slabs(dt, rate):
        states, _ = _states(recur, dt[..., some], x[..., some], b, rate[some])
        out[..., some] = (states * c[:, :, None]).sum(-1)
    return out


def scan_backward(
    recur: Recurrence,
    grad: torch.Tensor,
    dt: torch.Tensor,
    x: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    rate: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of dt, x, b and c. The states' own gradients are the same recurrence from the other end: G_t = grad_t
    c_t + exp(rate · dt_{t+1}) G_{t+1}."""
    d_dt, d_x = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (dt, x))
    d_b, d_c = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (b, c))
    for some in _slabs(dt, rate):
        states, decay = _states(recur, dt[..., some], x[..., some], b, rate[some])
        d_c += (states * grad[..., some, None]).sum(2)
        pull = grad[..., some, None] * c[:, :, None]
        adjoint = _by_channel(recur, pull.flip(1), _later(decay.flip(1))).flip(1)
        d_x[..., some] = (adjoint * b[:, :, None]).sum(-1)
        d_b += (adjoint * x[..., some, None]).sum(2)
        # what h_t is of h_{t−1}, by rate
        kept = decay.exp_().mul_(_later(states)).mul_(rate[some])
        d_dt[..., some] = (adjoint * kept).sum(-1)
    return d_dt, d_x, d_b, d_c


def _slabs(dt: torch.Tensor, rate: torch.Tensor) -> Iterator[slice]:
    size = max(1, MOST_STATES // max(1, dt.shape[0] * dt.shape[1] * rate.shape[1]))
    return (slice(first, first + size) for first in range(0, len(rate), size))


def _states(recur, dt, x, b, rate) -> tuple[torch.Tensor, torch.Tensor]:
    """h and rate · dt, (batch, length, width, states)."""
    decay = dt[..., None] * rate
    return _by_channel(recur, x[..., None] * b[:, :, None], decay), decay


def _by_channel(recur: Recurrence, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return recur(x.flatten(2), g.flatten(2)).unflatten(2, x.shape[2:])


def _later(x: torch.Tensor) -> torch.Tensor:
    """Every position's value at the next one, zeros at the first."""
    return F.pad(x, (0, 0, 0, 0, 1, 0))[:, :-1]
