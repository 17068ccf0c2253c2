"""Linear recurrences along a sequence, as operators, by chunks that advance in parallel.

A scan takes about 2·√length steps, each over all chunks of the whole batch: first every chunk starts from zero; then,
with the carried states of the previous chunks, from its true start.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from canvas_kernels.autograd import DEVICES, OPERATIONS, TAGS, Operation, operate, under_autograd

# Up to 64 steps of 2^16 numbers are faster in one chunk than in several, which are computed twice.
SHORT, WIDE = 64, 1 << 16


def selective_scan(
    dt: torch.Tensor,
    x: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    rate: torch.Tensor,
    backend: str = "auto",
) -> torch.Tensor:
    """y_t = Σ_s c_ts h_ts with h_t = exp(rate · dt_t) h_{t−1} + x_t b_tᵀ and h_0 = 0, each batch entry by itself.

    The recurrence of Mamba (Gu and Dao, 2023), discretised. Backward recomputes the
    states from those at the chunks' starts: O(batch · length · width · states / chunk) numbers are saved.

    Args:
        dt: (batch, length, width), ≥ 0.
        x: (batch, length, width), the inputs of the states.
        b, c: (batch, length, states).
        rate: (width, states), ≤ 0; a constant, without a gradient.
        backend: "auto" runs flash-linear-attention for float32 on a GPU where it is installed; other names run torch.

    Returns:
        (batch, length, width). All tensors share one dtype, float32 or float64.

    Raises:
        ValueError: shapes that do not match, 16-bit tensors, or a rate that requires a gradient.

    >>> ones = torch.ones(1, 3, 1)
    >>> selective_scan(ones, ones, ones, ones, torch.tensor([[-1e9]])).flatten().tolist()  # forgets at once
    [1.0, 1.0, 1.0]
    >>> selective_scan(ones, ones, ones, ones, torch.zeros(1, 1)).flatten().tolist()  # never forgets
    [1.0, 2.0, 3.0]
    """
    batch, length, width = dt.shape
    states = rate.shape[-1]
    if x.shape != dt.shape or b.shape != (batch, length, states) or c.shape != b.shape or rate.shape != (width, states):
        wanted = "dt and x (batch, length, width), b and c (batch, length, states), rate (width, states)"
        raise ValueError(f"expected {wanted}; got {_described(dt, x, b, c, rate)}")
    if {t.dtype for t in (x, b, c, rate)} != {dt.dtype} or dt.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"one dtype, float32 or float64, for all: {_described(dt, x, b, c, rate)}")
    if rate.requires_grad:
        raise ValueError("rate is a constant of the scan: it has no gradient")
    if not dt.numel():
        # an empty batch: of every input, so that each has a gradient
        return dt * x + (b * c).sum(-1, keepdim=True)
    return operate("selective_scan", dt, x, b, c, rate, backend == "auto")[0]


def _described(*tensors: torch.Tensor) -> str:
    return ", ".join(f"{n} {tuple(t.shape)} {t.dtype}" for n, t in zip(("dt", "x", "b", "c", "rate"), tensors))


def chunk_length(length: int, channels: int) -> int:
    """Returns the steps per chunk for ``length`` positions of ``channels`` numbers: all of a short, wide sequence, else
    a power of two between √length and 4·√length."""
    if length <= SHORT and channels >= WIDE:
        return length
    return max(1, min(1 << ((length.bit_length() + 2) // 2), length))


def _rows(steps: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Returns (batch · chunks, 1, D) for every step."""
    return steps[:, :, None].unbind(1)


def _columns(steps: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Returns (batch · chunks, D, 1) for every step."""
    return steps[..., None].unbind(1)


# Below, every operation of a step is one pass over (batch · chunks, states, width) in a reused buffer: with few chunks
# the working set stays in the cache of one core. Autocast ignores operations with `out`.


def _scan(
    dt: torch.Tensor, x: torch.Tensor, b: torch.Tensor, c: torch.Tensor, rate: torch.Tensor, kernels: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns y and the states at the chunks' starts, empty if ``kernels`` ran."""
    recur = fla_recurrence(dt) if kernels else None
    if recur is not None:
        return fla_scan(recur, dt, x, b, c, rate), dt.new_empty(0)
    batch, length, _ = dt.shape
    chunk = chunk_length(length, batch * rate.numel())
    rate = rate.t().contiguous()
    dts, xs, bs, cs = (to_chunks(t, chunk) for t in (dt, x, b, c))
    state = dt.new_zeros(len(dts), *rate.shape)
    decay, row, out = torch.empty_like(state), torch.empty_like(xs[:, :1]), torch.empty_like(xs)
    inputs = list(zip(_rows(dts), _rows(xs), _columns(bs)))
    if chunk < length:
        for dt_j, x_j, b_j in inputs:
            state.mul_(torch.mul(rate, dt_j, out=decay).exp_()).addcmul_(b_j, x_j)
        total_decay = torch.exp(rate * dts.sum(1, keepdim=True))
        state = (
            inter_chunk_scan(*(t.unflatten(0, (batch, -1)) for t in (state, total_decay))).flatten(0, 1).contiguous()
        )
    start = state.clone()
    for (dt_j, x_j, b_j), c_j, out_j in zip(inputs, _rows(cs), _rows(out)):
        state.mul_(torch.mul(rate, dt_j, out=decay).exp_()).addcmul_(b_j, x_j)
        out_j.copy_(torch.bmm(c_j, state, out=row))
    return from_chunks(out, batch, length), start


def _scan_fake(dt, x, b, c, rate, kernels):
    if kernels and fla_recurrence(dt) is not None:
        return _contiguous(dt), dt.new_empty(0)
    batch, length, width = dt.shape
    count = -(-length // chunk_length(length, batch * rate.numel()))
    return _contiguous(dt), dt.new_empty(batch * count, rate.shape[1], width)


def _scan_backward(
    grad: torch.Tensor,
    dt: torch.Tensor,
    x: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    rate: torch.Tensor,
    start: torch.Tensor,
    kernels: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of dt, x, b and c.

    With g_t = dL/dh_t, dL/d(dt_t) = Σ_s rate g_t exp(rate dt_t) h_{t−1} needs both states, which run forward, and their
    gradients, which run backward: √chunk states of each chunk are saved, those in between recomputed.
    """
    recur = fla_recurrence(dt) if kernels else None
    if recur is not None:
        return fla_scan_backward(recur, grad, dt, x, b, c, rate)
    batch, length, _ = dt.shape
    chunk = chunk_length(length, batch * rate.numel())
    rate = rate.t().contiguous()
    dts, xs, bs, cs, grads = (to_chunks(t, chunk) for t in (dt, x, b, c, grad))
    d_dt, d_x, d_b, d_c = (torch.empty_like(t) for t in (dts, xs, bs, cs))
    decay, scaled = torch.empty_like(start), torch.empty_like(start)
    row, column = torch.empty_like(xs[:, :1]), torch.empty_like(bs[:, :1])
    moves = list(zip(_rows(dts), _rows(xs), _rows(bs), _columns(bs)))
    pulls = list(zip(_rows(grads), _columns(cs)))
    interval = math.isqrt(chunk)
    state, saved_states = start.clone(), []
    for j, ((dt_j, x_j, _, b_j), (grad_j, _), d_c_j) in enumerate(zip(moves, pulls, _rows(d_c))):
        if j % interval == 0:
            saved_states.append(state.clone())
        state.mul_(torch.mul(rate, dt_j, out=decay).exp_()).addcmul_(b_j, x_j)
        d_c_j.copy_(torch.bmm(grad_j, state.transpose(1, 2), out=column))
    adjoint = torch.zeros_like(start)
    if chunk < length:
        for (dt_j, _, _, _), (grad_j, c_j) in zip(reversed(moves), reversed(pulls)):
            adjoint.addcmul_(c_j, grad_j).mul_(torch.mul(rate, dt_j, out=decay).exp_())
        total_decay = torch.exp(rate * dts.sum(1, keepdim=True))
        after = inter_chunk_scan(*(t.unflatten(0, (batch, -1)).flip(1) for t in (adjoint, total_decay)))
        adjoint = after.flip(1).flatten(0, 1).contiguous()
    results = list(zip(_rows(d_dt), _rows(d_x), _rows(d_b)))
    before, decays = ([torch.empty_like(start) for _ in range(interval)] for _ in range(2))
    for first in reversed(range(0, chunk, interval)):
        steps = list(enumerate(range(first, min(first + interval, chunk))))
        state = saved_states.pop()
        for i, j in steps:
            dt_j, x_j, _, b_j = moves[j]
            before[i].copy_(state)
            state.mul_(torch.mul(rate, dt_j, out=decays[i]).exp_()).addcmul_(b_j, x_j)
        for i, j in reversed(steps):
            (_, x_j, b_row, _), (grad_j, c_j), (d_dt_j, d_x_j, d_b_j) = moves[j], pulls[j], results[j]
            adjoint.addcmul_(c_j, grad_j)
            d_x_j.copy_(torch.bmm(b_row, adjoint, out=row))
            d_b_j.copy_(torch.bmm(x_j, adjoint.transpose(1, 2), out=column))
            adjoint.mul_(decays[i])
            torch.sum(torch.mul(adjoint, rate, out=scaled).mul_(before[i]), 1, keepdim=True, out=row)
            d_dt_j.copy_(row)
    d_dt, d_x, d_b, d_c = (from_chunks(t, batch, length) for t in (d_dt, d_x, d_b, d_c))
    return d_dt, d_x, d_b, d_c


def _scan_backward_fake(grad, dt, x, b, c, rate, start, kernels):
    return tuple(_contiguous(t) for t in (dt, x, b, c))


def _contiguous(x: torch.Tensor) -> torch.Tensor:
    """Returns an empty contiguous tensor like x."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _compose_scan(dt, x, b, c, rate, kernels):
    """Computes the scan by doubling, in differentiable torch."""
    added = x[:, :, None] * b[..., None]  # [batch, length, states, width]
    decay = torch.exp(rate.t() * dt[:, :, None])
    return ((inter_chunk_scan(added, decay) * decay + added) * c[..., None]).sum(2)


# -- constant decay ----------------------------------------------------------------------------------------------------


def decayed_sums(x: torch.Tensor, log_keep: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """S_t = Σ_{j<t} exp(log_keep)^(t−1−j) x_j along dim 1 of x (batch, length, width); log_keep (width,), ≤ 0.

    float32 or float64; only the result is saved for backward. ``backend`` as for :func:`selective_scan`.

    >>> decayed_sums(torch.ones(1, 4, 1), torch.tensor([0.5]).log()).flatten().tolist()
    [0.0, 1.0, 1.5, 1.75]
    """
    if x.dim() != 3 or log_keep.shape != x.shape[2:] or log_keep.dtype != x.dtype:
        given = f"x {tuple(x.shape)} {x.dtype} and log_keep {tuple(log_keep.shape)} {log_keep.dtype}"
        raise ValueError(f"expected x (batch, length, width) and log_keep (width,) of one dtype; got {given}")
    if not x.numel():
        return x * log_keep
    return operate("decayed_sums", x, log_keep, False, backend == "auto")[0]


def chunked_sums(x: torch.Tensor, log_keep: torch.Tensor, backwards: bool, kernels: bool) -> torch.Tensor:
    """Computes :func:`decayed_sums`, or S_t = Σ_{j>t} exp(log_keep)^(j−1−t) x_j if ``backwards``."""
    recur = fla_recurrence(x) if kernels else None
    if recur is not None:
        return fla_sums(recur, x, log_keep, backwards)
    batch, length, width = x.shape
    chunk = chunk_length(length, batch * width)
    # S + (x + S · (keep − 1)) for keep > 1/2, whose rounding would grow with its powers; x + S · keep otherwise, where
    # x would be rounded to S
    whole = (log_keep > math.log(0.5)).to(x.dtype)
    change_of = torch.where(whole > 0, torch.expm1(log_keep), torch.exp(log_keep))
    # padding comes after all positions
    steps = to_chunks(x.flip(1) if backwards else x, chunk)
    out = torch.empty_like(steps)
    inputs, outputs = _rows(steps), _rows(out)
    start, change = torch.zeros_like(steps[:, :1]), torch.empty_like(steps[:, :1])
    if chunk < length:
        for x_j in inputs:
            torch.addcmul(x_j, start, change_of, out=change)
            start.mul_(whole).add_(change)
        total_decay = torch.exp(log_keep * chunk).expand_as(start)
        start = inter_chunk_scan(*(t.unflatten(0, (batch, -1)) for t in (start, total_decay))).flatten(0, 1)
    outputs[0].copy_(start)
    for x_j, before, after in zip(inputs, outputs, outputs[1:]):
        torch.addcmul(x_j, before, change_of, out=after).addcmul_(before, whole)
    out = from_chunks(out, batch, length)
    return out.flip(1) if backwards else out


def _sums_fake(x, log_keep, backwards, kernels):
    return _contiguous(x)


def _sums_backward(grad, needs, saved, x, log_keep, backwards, kernels):
    (sums,) = saved
    # d_x is the reverse sum; S' = w S + x gives dL/dw = Σ S · d_x
    d_x = torch.ops.canvas_engineering.decayed_sums.default(grad.contiguous(), log_keep, not backwards, kernels)
    return d_x, (d_x * sums).sum((0, 1)) * torch.exp(log_keep)


def _compose_sums(x, log_keep, backwards, kernels):
    x = x.flip(1) if backwards else x
    out = inter_chunk_scan(x[:, :, None], torch.exp(log_keep).expand(*x.shape)[:, :, None])[:, :, 0]
    return out.flip(1) if backwards else out


def _as_operator(name: str, *args):
    results = operate(name, *args)
    return results[0] if len(results) == 1 else results


# -- chunks ------------------------------------------------------------------------------------------------------------


def to_chunks(x: torch.Tensor, chunk: int) -> torch.Tensor:
    """Reshapes (batch, length, D) to (batch · chunks, chunk, D), padded with zeros, which neither decay nor add."""
    missing = -x.shape[1] % chunk
    return (F.pad(x, (0, 0, 0, missing)) if missing else x.contiguous()).reshape(-1, chunk, x.shape[2])


def from_chunks(steps: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """Inverts :func:`to_chunks`."""
    return steps.reshape(batch, -1, steps.shape[2])[:, :length].contiguous()


def inter_chunk_scan(added: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """Returns states H_k = decay_{k−1} H_{k−1} + added_{k−1} before chunks k, (batch, chunks, states, width)."""
    shift, count = 1, added.shape[1]
    while shift < count:
        joined = torch.addcmul(added[:, shift:], decay[:, shift:], added[:, :-shift])
        added = torch.cat([added[:, :shift], joined], 1)
        decay = torch.cat([decay[:, :shift], decay[:, shift:] * decay[:, :-shift]], 1)
        shift *= 2
    return F.pad(added[:, :-1], (0, 0, 0, 0, 1, 0))


# -- flash-linear-attention --------------------------------------------------------------------------------------------
# ``fla.ops.hgrn.fused_recurrent_hgrn(x, g, initial_state, output_final_state)`` computes h_t = exp(g_t) · h_{t−1} + x_t
# for each channel, in float32. rwkv's sums have one channel for each of the canvas's, mamba's states one for each pair
# of channel and state. Tests compare its results with the torch scans, within 1e-5.

# (x, g), both (batch, length, channels) → h of the same shape
Recurrence = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# mamba's states are materialised for a slice of channels at a time, 64 MB.
MAX_STATES = 1 << 24
# Sequential steps per chunk; chunks run in parallel.
FLA_CHUNK = 128


def fla_recurrence(x: torch.Tensor) -> Recurrence | None:
    """Returns the kernel for tensors like ``x``; None on a CPU, in float64 or without fla."""
    return fla_kernel() if is_supported(x) else None


def is_supported(x: torch.Tensor) -> bool:
    """Returns whether flash-linear-attention's kernel takes tensors like ``x``."""
    return x.is_cuda and x.dtype == torch.float32  # the kernel rounds float64


@functools.cache
def fla_kernel() -> Recurrence | None:
    """Returns the recurrence of flash-linear-attention, None where that is not installed."""
    if find_spec("fla") is None:
        return None
    # a broken installation is an error, not a fallback
    from fla.ops.hgrn import fused_recurrent_hgrn  # pyright: ignore[reportMissingImports] of the extra `fla`

    return functools.partial(_fla_recurrence, fused_recurrent_hgrn)


def _fla_recurrence(kernel, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    batch, length, _ = x.shape
    if length <= FLA_CHUNK:
        return kernel(x.contiguous(), g.contiguous())[0]
    x, g = to_chunks(x, FLA_CHUNK), to_chunks(g, FLA_CHUNK)
    _, ends = kernel(x, g, output_final_state=True)
    # [batch, chunks, 1, channels]
    ends, decay = (t.unflatten(0, (batch, -1))[:, :, None] for t in (ends, g.sum(1).exp()))
    out, _ = kernel(x, g, initial_state=inter_chunk_scan(ends, decay).reshape(len(x), -1))
    return from_chunks(out, batch, length)


def fla_sums(recur: Recurrence, x: torch.Tensor, log_keep: torch.Tensor, backwards: bool) -> torch.Tensor:
    """Computes :func:`decayed_sums`, from the last position if ``backwards``."""
    if backwards:
        x = x.flip(1)
    out = recur(F.pad(x, (0, 0, 1, 0))[:, :-1], log_keep.expand_as(x))
    return out.flip(1) if backwards else out


def fla_scan(
    recur: Recurrence, dt: torch.Tensor, x: torch.Tensor, b: torch.Tensor, c: torch.Tensor, rate: torch.Tensor
) -> torch.Tensor:
    """Computes :func:`selective_scan`."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for channels in _channel_ranges(dt, rate):
        states, _ = _fla_states(recur, dt[..., channels], x[..., channels], b, rate[channels])
        out[..., channels] = (states * c[:, :, None]).sum(-1)
    return out


def fla_scan_backward(
    recur: Recurrence,
    grad: torch.Tensor,
    dt: torch.Tensor,
    x: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    rate: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of dt, x, b and c. Those of the states are the reverse recurrence
    G_t = grad_t c_t + exp(rate · dt_{t+1}) G_{t+1}."""
    d_dt, d_x = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (dt, x))
    d_b, d_c = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (b, c))
    for channels in _channel_ranges(dt, rate):
        states, decay = _fla_states(recur, dt[..., channels], x[..., channels], b, rate[channels])
        d_c += (states * grad[..., channels, None]).sum(2)
        pull = grad[..., channels, None] * c[:, :, None]
        adjoint = _by_channel(recur, pull.flip(1), _shift_right(decay.flip(1))).flip(1)
        d_x[..., channels] = (adjoint * b[:, :, None]).sum(-1)
        d_b += (adjoint * x[..., channels, None]).sum(2)
        # dh_t/d(dt_t)
        d_state = decay.exp_().mul_(_shift_right(states)).mul_(rate[channels])
        d_dt[..., channels] = (adjoint * d_state).sum(-1)
    return d_dt, d_x, d_b, d_c


def _channel_ranges(dt: torch.Tensor, rate: torch.Tensor) -> Iterator[slice]:
    size = max(1, MAX_STATES // max(1, dt.shape[0] * dt.shape[1] * rate.shape[1]))
    return (slice(first, first + size) for first in range(0, len(rate), size))


def _fla_states(recur, dt, x, b, rate) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns h and rate · dt, (batch, length, width, states)."""
    decay = dt[..., None] * rate
    return _by_channel(recur, x[..., None] * b[:, :, None], decay), decay


def _by_channel(recur: Recurrence, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return recur(x.flatten(2), g.flatten(2)).unflatten(2, x.shape[2:])


def _shift_right(x: torch.Tensor) -> torch.Tensor:
    """Shifts values to the next position, with zeros at the first."""
    return F.pad(x, (0, 0, 0, 0, 1, 0))[:, :-1]


# -- registration ------------------------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("canvas_engineering", "FRAGMENT")
_INPUTS = "Tensor dt, Tensor x, Tensor b, Tensor c, Tensor rate"
for _name, _signature, _kernel, _fake in (
    ("selective_scan", f"({_INPUTS}, bool kernels) -> (Tensor, Tensor)", _scan, _scan_fake),
    (
        "selective_scan_backward",
        f"(Tensor grad, {_INPUTS}, Tensor start, bool kernels) -> (Tensor, Tensor, Tensor, Tensor)",
        _scan_backward,
        _scan_backward_fake,
    ),
    ("decayed_sums", "(Tensor x, Tensor log_keep, bool backwards, bool kernels) -> Tensor", chunked_sums, _sums_fake),
):
    _LIBRARY.define(_name + _signature, tags=TAGS)
    for _key in DEVICES:
        _LIBRARY.impl(_name, _kernel, _key)
    torch.library.register_fake(f"canvas_engineering::{_name}", _fake, lib=_LIBRARY)

_OPS = torch.ops.canvas_engineering
OPERATIONS["selective_scan"] = Operation(
    forward=lambda keep, *args: _OPS.selective_scan.default(*args),
    backward=lambda grad, needs, saved, *args: (
        *_OPS.selective_scan_backward.default(grad.contiguous(), *args[:5], saved[1], args[5]),
        None,
    ),
    composition=_compose_scan,
    n_tensors=5,
    differentiable=(0, 1, 2, 3),
)
OPERATIONS["decayed_sums"] = Operation(
    forward=lambda keep, *args: (_OPS.decayed_sums.default(*args),),
    backward=_sums_backward,
    composition=_compose_sums,
    n_tensors=2,
    differentiable=(0, 1),
    keeps_result=lambda *args: True,
)
for _name in ("selective_scan", "decayed_sums"):
    _operator = getattr(_OPS, _name).default
    _LIBRARY.impl(_name, under_autograd(_operator, functools.partial(_as_operator, _name)), "Autograd")
