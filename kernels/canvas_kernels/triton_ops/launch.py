# pyright: basic, reportArgumentType=false
"""The Triton executor, seen from torch: allocates, picks configurations, launches.

Imports triton; ``ops.py`` imports it when it first needs it. Nothing here waits for the device, reads a value back or
has a shape that depends on one, so every call can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
import triton

from ..block_table import BlockTable
from . import configs, steps
from .backward import dkv_kernel, dq_kernel
from .configs import Config
from .forward import forward_kernel, gather_kernel
from .steps import VECTOR

LOG2E = math.log2(math.e)


def on_device(function):
    """Decorates what launches kernels: Triton takes the current device and its stream, whatever the tensors' is."""

    @functools.wraps(function)
    def call(x, *args, **options):
        if not x.is_cuda:
            return function(x, *args, **options)
        with torch.cuda.device(x.device):
            return function(x, *args, **options)

    return call


move_rows, row_scale_of = on_device(steps.move_rows), on_device(steps.row_scale)


@on_device
def forward(q, k, v, table: BlockTable, *, scale: float, gain=None, active=None, row_scale=None, sigmoid=False):
    """Segmented block-sparse attention (``kernels/README.md``).

    Args:
        q, k, v: (B, H, n, D) with any strides: copied once where rows are not whole or do not begin at multiples of 8
            elements, as those of an odd head_dim, or where those of k and v are different strides apart.
        row_scale: (2, n), and ``gain`` and ``active`` (n_edges,), or None: of edge form. In joint form ``row_scale`` is
            None, or bool (B, n), False for keys that a sample does not attend to.

    Returns:
        ``out`` (B, H, n, D), contiguous in q's dtype; ``lse`` (B, H, n_slots) float32, without slots if ``sigmoid``;
        and what :func:`backward` wants besides: ``out`` itself in joint form, the outputs of all segments
        (B, H, n_slots, D) where :func:`.configs.stores_segments` says so, and else nothing.

    Raises:
        ValueError: a device, dtype or head dimension has no configuration.
    """
    q, (k, v) = aligned_rows(q), _keys(k, v)
    batch, heads, n, head_dim = q.shape
    form = configs.form_of(table, sigmoid)
    out, lse = _empty(q, n, head_dim), _empty(q, 0 if sigmoid else table.n_slots)
    f = _empty(q, table.n_slots, head_dim) if form == "edge" else out
    factors = _factors(table, q.device, gain, active, row_scale)
    for config, tiling, tables in _launches(table, q, "forward", form):
        forward_kernel[(tiling.n_tiles * batch * heads,)](
            q,
            k,
            v,
            f,
            lse,
            tables,
            factors,
            _strides(q, k, v),
            tiling.n_tiles,
            heads,
            n,
            table.n_slots,
            scale * LOG2E,
            JOINT=form == "joint",
            SIGMOID=sigmoid,
            IN_PLACE=form in ("in_place", "sigmoid"),
            MASKED=form == "joint" and row_scale is not None,
            **_constants(config, head_dim),
        )
    for config, tiling, tables in _launches(table, q, "dq", form) if form == "edge" else ():
        constants = _constants(config, head_dim, walks=False)
        sizes = (tiling.n_tiles, heads, n, table.n_slots)
        gather_kernel[(tiling.n_tiles * batch * heads,)](f, out, tables, factors, *sizes, **constants)
    return out, lse, f if form in ("joint", "edge") else q.new_empty(0)


@on_device
def backward(
    grad_out,
    q,
    k,
    v,
    kept,
    lse,
    table: BlockTable,
    *,
    scale: float,
    gain=None,
    active=None,
    row_scale=None,
    need_gain: bool = False,
    sigmoid: bool = False,
):
    """The gradients of :func:`forward`, whose ``kept`` and ``lse`` these are.

    Returns:
        (dq, dk, dv), each (B, H, n, D), contiguous, in the inputs' dtype; and dgain (n_edges,) in gain's, None unless
        ``need_gain``.
    """
    q, (k, v), grad_out = aligned_rows(q), _keys(k, v), aligned_rows(grad_out)
    batch, heads, n, head_dim = q.shape
    form = configs.form_of(table, sigmoid)
    stored = form in ("joint", "edge")
    segment_out = kept.contiguous() if stored else lse
    factors = _factors(table, q.device, gain, active, row_scale)
    delta = _empty(q, table.n_slots if need_gain or not sigmoid else 0)
    lse2 = lse.new_empty((2, *lse.shape)) if form in ("edge", "in_place") else lse
    dq, dk, dv = (_empty(q, n, head_dim) for _ in range(3))
    common = (heads, n, table.n_slots, scale, scale * LOG2E)
    strides = _strides(q, k, v, grad_out)
    flags = {"JOINT": form == "joint", "SIGMOID": sigmoid}
    for stage in ("delta", "dq") if form == "in_place" else ("dq",):
        walk_delta = stage == "delta" or (sigmoid and need_gain)
        for config, tiling, tables in _launches(table, q, stage, form):
            dq_kernel[(tiling.n_tiles * batch * heads,)](
                q,
                k,
                v,
                grad_out,
                segment_out,
                lse,
                lse2,
                delta,
                dq,
                tables,
                factors,
                strides,
                tiling.n_tiles,
                *common,
                STORED=stored,
                WALK_DELTA=walk_delta,
                WRITE_DQ=stage == "dq",
                MASKED=form == "joint" and row_scale is not None,
                **flags,
                **_constants(config, head_dim),
            )
    factors_of_keys = factors
    if row_scale is not None and form in ("edge", "in_place") and row_scale.numel():
        # their signs are all that dK and dV want; a table's own are positive, whichever is looked at
        factors_of_keys = (factors[0].amin(), *factors[1:])
    for config, tiling, tables in _launches(table, q, "dkv", form):
        dkv_kernel[(tiling.n_tiles * batch * heads,)](
            q,
            k,
            v,
            grad_out,
            lse2,
            delta,
            dk,
            dv,
            tables,
            factors_of_keys,
            strides,
            tiling.n_tiles,
            *common,
            **flags,
            **_constants(config, head_dim),
        )
    return (dq, dk, dv), steps.gain_gradient(delta, table, factors[0], gain) if need_gain else None


# -- what launches are made of -----------------------------------------------------------------------------------------


def _launches(table: BlockTable, q: torch.Tensor, stage: str, form: str):
    """(config, tiling, its tensors) of every launch of a pass."""
    if not q.numel():
        return
    known = configs.lookup(arch_of(q.device), q.shape[3], q.dtype, stage, form)
    by_slot = (stage, form) == ("forward", "edge")
    for tiling in table.device_tilings(q.device, configs.classes(known), stage == "dkv", by_slot):
        size = (tiling.block_m, tiling.block_n)
        yield next(config for config in known if config[:2] == size), tiling, tiling.tensors


def _factors(table: BlockTable, device, gain, active, row_scale) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """row_scale, gain and activity as kernels read them. A step's tables are those of all steps: what is inactive has
    no blocks when a program looks."""
    ones = table.ones(device)
    if table.form == "joint":
        return ones if row_scale is None else row_scale.contiguous().view(torch.uint8), ones, ones
    row_scale = table.row_scale(device, torch.float32) if row_scale is None else row_scale.to(torch.float32)
    # of any dtype: converting them would be a launch
    given = (row_scale, ones if gain is None else gain, ones if active is None else active)
    scales, gains, activity = (x.detach().contiguous() for x in given)
    return scales, gains, activity


def _empty(q: torch.Tensor, rows: int, *dim: int) -> torch.Tensor:
    """(B, H, rows, dim) of q's dtype, or (B, H, rows) float32."""
    return torch.empty((*q.shape[:2], rows, *dim), dtype=q.dtype if dim else torch.float32, device=q.device)


def aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` if threads can load 8 elements at once, else a copy with its rows padded to that: loads of single elements
    take more than twice the instructions, in every block that a row is part of."""
    *outer, unit = x.stride()
    whole = unit == 1 and x.data_ptr() % 16 == 0
    if whole and not any(stride % VECTOR and size > 1 for stride, size in zip(outer, x.shape)):
        return x
    return _padded(x)


def _keys(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`aligned_rows` of ``k`` and ``v``, of one stride between rows: copies unless they lie alike."""
    k, v = aligned_rows(k), aligned_rows(v)
    return (k, v) if k.stride(2) == v.stride(2) else (_padded(k), _padded(v))


def _padded(x: torch.Tensor) -> torch.Tensor:
    dim = x.shape[3]
    rows = torch.empty((*x.shape[:3], -(-dim // VECTOR) * VECTOR), dtype=x.dtype, device=x.device)
    return rows[..., :dim].copy_(x)


def _strides(*tensors: torch.Tensor) -> tuple[int, ...]:
    """Strides of batch, heads and rows, in vectors."""
    strides = [stride // VECTOR * (size > 1) for x in tensors for stride, size in zip(x.stride()[:3], x.shape)]
    return tuple(strides)


@functools.lru_cache(maxsize=64)
def arch_of(device: torch.device) -> str:
    """The architecture whose configurations a device runs, looked up once per device."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return configs.arch_of_hip(torch.cuda.get_device_properties(device).gcnArchName)
    return configs.arch_of_cuda(torch.cuda.get_device_capability(device))


@functools.lru_cache(maxsize=1024)
def _constants(config: Config, head_dim: int, walks: bool = True) -> dict:
    constants = dict(HEAD_DIM=head_dim, BLOCK_D=configs.block_d(head_dim), BLOCK_M=config.block_m)
    if walks:
        constants["BLOCK_N"] = config.block_n
    constants |= dict(num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True)
    if config.max_registers:
        constants["maxnreg"] = config.max_registers
    return constants


def interpreter_refusal() -> str:
    """Why this pair of Triton and numpy cannot interpret kernels; empty where it can."""
    versions = {"triton": triton.__version__, "numpy": np.__version__}
    minor = {name: tuple(map(int, version.split(".")[:2])) for name, version in versions.items()}
    if minor["triton"] >= (3, 7) or minor["numpy"] < (2, 4):
        return ""
    return (
        f"Triton {versions['triton']}'s interpreter cannot run loops with loaded bounds under numpy "
        f"{versions['numpy']}: install 'numpy<2.4' or 'triton>=3.7', or use backend 'torch'"
    )
