"""The Triton executor, seen from torch: allocates, picks configurations, launches.

Imports triton; ``ops.py`` imports it when it first needs it. Nothing here waits for the device, reads a value back or
has a shape that depends on one, so every call can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
import math

import torch
import triton

from . import configs
from .backward import dkv_kernel, dq_kernel, edge_delta_kernel, joint_delta_kernel
from .configs import Config
from .forward import forward_kernel
from .sigmoid_kernels import sigmoid_dkv_kernel, sigmoid_dq_kernel, sigmoid_forward_kernel
from .table import BlockTable
from .tiling import Tiling

LOG2E = math.log2(math.e)


def forward(q, k, v, table: BlockTable, *, scale: float, gain=None, active=None, row_scale=None):
    """``(out, lse)`` of segmented block-sparse attention (``kernels/README.md``).

    ``q``, ``k``, ``v`` (B, H, n, D) with any strides (copied unless the last one is 1). Edge form: ``row_scale`` (2, n)
    always, ``gain`` and ``active`` (n_edges,) or None. ``out`` (B, H, n, D) is contiguous in q's dtype, ``lse``
    (B, H, n_slots) float32. Raises ValueError for devices, dtypes and head dimensions without configurations.
    """
    q, k, v, row_scale = _unit_stride(q), _unit_stride(k), _unit_stride(v), _plain(row_scale)
    batch, heads, n, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    # rows without keys keep +inf; the kernel writes the others
    lse = torch.full((batch, heads, table.n_slots), math.inf, dtype=torch.float32, device=q.device)
    joint = table.form == "joint"
    for config, walk in _walks(table, q, "forward", gain, active):
        forward_kernel[(walk.n_tiles * batch * heads,)](
            q,
            k,
            v,
            out,
            lse,
            lse if joint else row_scale,
            walk.tiles,
            walk.rows,
            walk.weight,
            walk.n_tiles,
            walk.n_rows,
            heads,
            n,
            table.n_slots,
            scale * LOG2E,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            JOINT=joint,
            **_constants(config, head_dim),
        )
    return out, lse


def backward(
    grad_out,
    q,
    k,
    v,
    out,
    lse,
    table: BlockTable,
    *,
    scale: float,
    gain=None,
    active=None,
    row_scale=None,
    need_gain: bool = False,
):
    """``(gradients, dgain)``, those of :func:`forward`.

    ``gradients`` are dq, dk, dv (B, H, n, D), contiguous, in the inputs' dtype; dgain is (n_edges,) float32, None
    unless ``need_gain``.
    """
    q, k, v, grad_out = _unit_stride(q), _unit_stride(k), _unit_stride(v), _unit_stride(grad_out)
    row_scale = _plain(row_scale)
    batch, heads, n, head_dim = q.shape
    batch_heads = batch * heads
    joint = table.form == "joint"
    signed = not joint and gain is not None
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3])
    if joint:
        lse2, delta = lse, _joint_delta(grad_out, out.contiguous())
    else:
        lse2 = torch.empty_like(lse)
        # slots of inactive edges are written by no one and read by the sum over slots only
        delta = torch.zeros_like(lse) if need_gain else torch.empty_like(lse)
        for config, walk in _walks(table, q, "delta", gain, active):
            edge_delta_kernel[(walk.n_tiles * batch_heads,)](
                q,
                k,
                v,
                grad_out,
                lse,
                delta,
                lse2,
                row_scale,
                walk.tiles,
                walk.rows,
                walk.weight,
                walk.n_tiles,
                walk.n_rows,
                heads,
                n,
                table.n_slots,
                scale * LOG2E,
                *strides,
                **_constants(config, head_dim),
            )
    gradients = dq, dk, dv = tuple(torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    for config, walk in _walks(table, q, "dq", gain, active):
        dq_kernel[(walk.n_tiles * batch_heads,)](
            q,
            k,
            v,
            grad_out,
            lse2,
            delta,
            dq,
            walk.tiles,
            walk.rows,
            walk.weight,
            walk.n_tiles,
            walk.n_rows,
            heads,
            n,
            table.n_slots,
            scale,
            scale * LOG2E,
            *strides,
            JOINT=joint,
            SIGNED=signed,
            **_constants(config, head_dim),
        )
    for config, walk in _walks(table, q, "dkv", gain, active):
        dkv_kernel[(walk.n_tiles * batch_heads,)](
            q,
            k,
            v,
            grad_out,
            lse2,
            delta,
            dk,
            dv,
            walk.tiles,
            walk.rows,
            walk.weight,
            walk.n_tiles,
            walk.n_rows,
            heads,
            n,
            table.n_slots,
            scale,
            scale * LOG2E,
            *strides,
            JOINT=joint,
            SIGNED=signed,
            **_constants(config, head_dim),
        )
    return gradients, _gain_gradient(delta, table, active, row_scale) if need_gain else None


# -- sigmoid -----------------------------------------------------------------------------------------------------------


def sigmoid_forward(q, k, v, table: BlockTable, *, scale: float, gain=None, active=None, row_scale=None):
    """``out`` (B, H, n, D), contiguous in q's dtype, of attention without a normaliser; edge form. Tensors as for
    :func:`forward`; ``row_scale`` None stands for the table's own."""
    q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
    batch, heads, n, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    factor = _slot_factors(table, gain, active, row_scale, q.device)
    for config, walk in _walks(table, q, "forward", None, active, "sigmoid"):
        sigmoid_forward_kernel[(walk.n_tiles * batch * heads,)](
            q,
            k,
            v,
            out,
            factor,
            walk.tiles,
            walk.rows,
            walk.n_tiles,
            walk.n_rows,
            heads,
            n,
            scale * LOG2E,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            **_constants(config, head_dim),
        )
    return out


def sigmoid_backward(
    grad_out, q, k, v, table: BlockTable, *, scale: float, gain=None, active=None, row_scale=None, need_gain=False
):
    """``(gradients, dgain)`` of :func:`sigmoid_forward`, as :func:`backward` gives them."""
    q, k, v, grad_out = _unit_stride(q), _unit_stride(k), _unit_stride(v), _unit_stride(grad_out)
    if row_scale is None:
        row_scale = table.row_scale(q.device, torch.float32)
    row_scale = _plain(row_scale)
    batch, heads, n, head_dim = q.shape
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3])
    factor = _slot_factors(table, gain, active, row_scale, q.device)
    # slots of inactive edges are written by no one and read by the sum over slots
    delta = torch.zeros((batch, heads, table.n_slots if need_gain else 0), dtype=torch.float32, device=q.device)
    gradients = dq, dk, dv = tuple(torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    for config, walk in _walks(table, q, "dq", None, active, "sigmoid"):
        sigmoid_dq_kernel[(walk.n_tiles * batch * heads,)](
            q,
            k,
            v,
            grad_out,
            factor,
            delta,
            dq,
            walk.tiles,
            walk.rows,
            walk.n_tiles,
            walk.n_rows,
            heads,
            n,
            table.n_slots,
            scale,
            scale * LOG2E,
            *strides,
            GAINS=need_gain,
            **_constants(config, head_dim),
        )
    for config, walk in _walks(table, q, "dkv", None, active, "sigmoid"):
        sigmoid_dkv_kernel[(walk.n_tiles * batch * heads,)](
            q,
            k,
            v,
            grad_out,
            factor,
            dk,
            dv,
            walk.tiles,
            walk.rows,
            walk.n_tiles,
            walk.n_rows,
            heads,
            n,
            scale,
            scale * LOG2E,
            *strides,
            **_constants(config, head_dim),
        )
    return gradients, _gain_gradient(delta, table, active, row_scale) if need_gain else None


def _slot_factors(table, gain, active, row_scale, device) -> torch.Tensor:
    """(n_slots,) float32: c_ri = w_r · gain · active · row_scale of every (segment, row)."""
    layout = table.slot_layout(device)
    row_scale = table.row_scale(device, torch.float32) if row_scale is None else _plain(row_scale)
    factor = layout.weight * row_scale[layout.replace, layout.position]
    for by_edge in (gain, None if active is None else active != 0):
        if by_edge is not None:
            by_edge = by_edge.detach().to(torch.float32)
            # the size is known here: asking the device for it would wait
            factor = factor * by_edge.repeat_interleave(layout.per_edge, output_size=table.n_slots)
    return factor


def _gain_gradient(delta, table, active, row_scale) -> torch.Tensor:
    """dgain_e = Σ_{r of e} Σ_i w_r · active_e · row_scale[class_r, i] · δ_ri, (n_edges,) float32, in a fixed order."""
    layout = table.slot_layout(delta.device)
    share = layout.weight * row_scale[layout.replace, layout.position] * delta.sum((0, 1))
    dgain = torch.segment_reduce(share, "sum", lengths=layout.per_edge, initial=0.0, unsafe=True)
    return dgain if active is None else dgain.masked_fill(active == 0, 0.0)


def _joint_delta(grad_out, out) -> torch.Tensor:
    batch, heads, n, head_dim = out.shape
    delta = torch.empty((batch, heads, n), dtype=torch.float32, device=out.device)
    n_tiles = triton.cdiv(n, configs.JOINT_DELTA.block_m)
    if delta.numel():
        joint_delta_kernel[(n_tiles * batch * heads,)](
            out,
            grad_out,
            delta,
            n_tiles,
            heads,
            n,
            *grad_out.stride()[:3],
            HEAD_DIM=head_dim,
            BLOCK_D=configs.block_d(head_dim),
            BLOCK_M=configs.JOINT_DELTA.block_m,
            num_warps=configs.JOINT_DELTA.num_warps,
            enable_fp_fusion=True,
        )
    return delta


# -- walks: a tiling with this call's weights and activity -------------------------------------------------------------


class _Walk:
    """What a launch reads of a :class:`Tiling`, with gains and activity put in."""

    __slots__ = ("n_rows", "n_tiles", "rows", "tiles", "weight")

    def __init__(self, tiles, rows, weight, n_rows):
        self.tiles, self.rows, self.weight = tiles, rows, weight
        self.n_tiles, self.n_rows = tiles.shape[0], n_rows


def _walks(table, q, stage, gain, active, form=None):
    """(config, walk) of every launch of a pass, configured for the table's form unless another ``form`` is named."""
    if not q.numel():
        return []
    found = configs.lookup(arch_of(q.device), q.shape[3], q.dtype, stage, form or table.form)
    tilings = table.device_tilings(q.device, configs.classes(found), stage == "dkv")
    config_of = {(config.block_m, config.block_n): config for config in found}
    return [(config_of[tiling.block_m, tiling.block_n], walk(tiling, table, gain, active)) for tiling in tilings]


def walk(tiling: Tiling, table: BlockTable, gain=None, active=None) -> _Walk:
    """The walk of one launch. Tables are never written: what depends on this step is computed beside them."""
    if table.form == "joint":
        return _Walk(tiling.tiles, tiling.rows, tiling.log2_weight, tiling.rows.shape[0] - 1)
    weight = tiling.weight
    if gain is not None:
        weight = weight * gain.detach().to(torch.float32)[tiling.edge]
    if active is None:
        return _Walk(tiling.tiles, tiling.rows, weight, tiling.rows.shape[0] - 1)
    return compact(tiling, weight, active)


def compact(tiling: Tiling, weight: torch.Tensor, active: torch.Tensor) -> _Walk:
    """The walk without the runs of inactive edges: they cost nothing in the kernels.

    All shapes are the tiling's own, so neither the host nor a captured graph needs to know how many runs are left. A
    segment belongs to one edge: its runs stay or go together, and the ``last`` flags stay right.
    """
    rows, tiles = tiling.rows, tiling.tiles
    n_rows = rows.shape[0] - 1
    keep = active[tiling.edge[:n_rows]] != 0
    blocks = (rows[:n_rows, 1] + (tiling.block_n - 1)) // tiling.block_n
    # [n_rows + 1] numbers before each row: of rows kept, of blocks, of blocks kept
    counts = torch.stack([keep.to(torch.int64), blocks.to(torch.int64), blocks * keep])
    before = torch.nn.functional.pad(counts.cumsum(1), (1, 0))
    # dropped rows land behind the sentinel, where nothing reads
    target = torch.where(keep, before[0, :-1], n_rows + 1)
    kept_rows = rows.new_zeros((n_rows + 2, 4)).index_copy_(0, target, rows[:n_rows])
    kept_weight = weight.new_zeros(n_rows + 2).index_copy_(0, target, weight[:n_rows])
    first = tiles[:, 2].to(torch.int64)
    # a tile's rows end where its blocks do
    stop = torch.searchsorted(before[1], before[1, first] + tiles[:, 3])
    kept_tiles = tiles.clone()
    kept_tiles[:, 2] = before[0, first]
    kept_tiles[:, 3] = before[2, stop] - before[2, first]
    return _Walk(kept_tiles, kept_rows, kept_weight, n_rows)


# -- host-side look-ups -----------------------------------------------------------------------------------------------


def _unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _plain(row_scale: torch.Tensor | None) -> torch.Tensor | None:
    return None if row_scale is None else row_scale.detach().to(torch.float32).contiguous()


@functools.lru_cache(maxsize=64)
def arch_of(device: torch.device) -> str:
    """The architecture whose configurations a device runs, asked once per device."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return configs.arch_of_hip(torch.cuda.get_device_properties(device).gcnArchName)
    return configs.arch_of_cuda(torch.cuda.get_device_capability(device))


@functools.lru_cache(maxsize=1024)
def _constants(config: Config, head_dim: int) -> dict:
    constants = dict(HEAD_DIM=head_dim, BLOCK_D=configs.block_d(head_dim))
    constants |= dict(BLOCK_M=config.block_m, BLOCK_N=config.block_n)
    constants |= dict(num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True)
    if config.max_registers:
        constants["maxnreg"] = config.max_registers
    return constants
