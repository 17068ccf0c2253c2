"""The registered operation: ``canvas_kernels::attention`` and its backward.

A table enters the operators as its content digest (:attr:`BlockTable.key`): strings are constants to a compiler, and
equal digests mean equal tables in every process, so compiled graphs may be cached. Each operator has one autograd
function at its Autograd key (transforms of torch.func want it called outside of the operator), fakes that give the real
strides, and the autocast rule of ``scaled_dot_product_attention``.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import math
import os
import pkgutil

import torch

from . import costs, dropout, rectangles, reference
from .frames import frame_mask, frame_rows, frames_attention, takes_frames
from .sigmoid import sigmoid_attention
from .table import BlockTable
from .transforms import Function, autocast, autocast_dtype, transformed

ACTIVATIONS = ("softmax", "sigmoid")
BACKENDS = ("auto", "triton", "torch", "reference")
MAX_TRITON_HEAD_DIM = 256
# How much the torch executor keeps for backward is a size in a compiled graph, and compilers keep graphs on disk. Its
# sources, and the rates by which it groups cells, are in its name: what others of them compiled is another graph.
_EXECUTOR = "rectangles grouping groups slabs batches indices frames tiling table costs"
_SOURCES = tuple(f"{name}.py" for name in _EXECUTOR.split())


def _executor_name(rates: dict[str, float]) -> str:
    code = b"".join(pkgutil.get_data(__package__, name) or b"" for name in _SOURCES)
    code += repr(sorted(rates.items())).encode()
    return f"torch {hashlib.sha1(code, usedforsecurity=False).hexdigest()[:12]}"


TORCH = _executor_name(costs.choosing())

_LIBRARY = torch.library.Library("canvas_kernels", "DEF")
_LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? gain, Tensor? active, Tensor? row_scale, str table, float scale, "
    "str backend, bool need_lse, bool need_grad) -> (Tensor out, Tensor lse, Tensor aux)",
    tags=torch.Tag.pt2_compliant_tag,
)
_LIBRARY.define(
    "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? out, Tensor lse, Tensor aux, "
    "Tensor? gain, Tensor? active, Tensor? row_scale, str table, float scale, str backend, bool need_gain) "
    "-> (Tensor gradients, Tensor dgain)",
    tags=torch.Tag.pt2_compliant_tag,
)

_attention = torch.ops.canvas_kernels.attention.default
_attention_backward = torch.ops.canvas_kernels.attention_backward.default


# -- the public functions ----------------------------------------------------------------------------------------------


def block_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: BlockTable,
    *,
    scale: float | None = None,
    gain: torch.Tensor | None = None,
    active: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    backend: str = "auto",
    dropout_p: float = 0.0,
    return_lse: bool = False,
    activation: str = "softmax",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Segmented block-sparse attention; ``kernels/README.md`` has the formulas.

    ``q``, ``k``, ``v`` (B, H, n, D): one floating dtype and device, rows in the table's packed order. ``scale``
    defaults to D^−½. Edge form only: ``gain`` (n_edges,), trainable factors; ``active`` (n_edges,), an edge whose entry
    is 0 is as if it were not there; ``row_scale`` (2, n), factors of adding and of replacing segments per row, by
    default 1 / (sum of the weights in force). Returns ``out`` (B, H, n, D) in q's dtype, or ``(out, lse)`` with ``lse``
    (B, H, n_slots), base 2 and without gradient.

    ``backend``: "triton", "torch" (grouped rectangles; plain frames as dense attention), "reference" (cell by cell, for
    tests; breaks a compiled graph) or "auto": Triton for tensors on a CUDA or ROCm device without dropout, torch
    otherwise. A backend that is named never falls back.
    ``activation`` "sigmoid": σ(scale · q·k) in place of the softmax, without a normaliser, in edge form; it has no lse.
    Gradients flow to q, k, v and gain; second derivatives need "reference". Of torch.func, grad, vjp, jacrev and vmap
    work, vmap slice by slice; sigmoids want "reference" there, and nothing has jvp. Under autocast float32 inputs are
    cast as ``scaled_dot_product_attention`` casts them.

    Raises ValueError for shapes, dtypes, devices or options that do not fit, naming them.

    >>> table = BlockTable.from_rectangles("joint", 2, 0, q_start=[0], q_stop=[2], k_start=[1], k_stop=[2], weight=[1])
    >>> x = torch.tensor([[[[1.0], [3.0]]]])
    >>> block_attention(x, x, x, table).flatten().tolist()
    [3.0, 3.0]
    """
    scale = _check_inputs(q, k, v, table, scale, dropout_p)
    if gain is not None or active is not None or row_scale is not None:
        _check_edge_inputs(q, table, gain, active, row_scale)
    if activation != "softmax":
        _check_activation(activation, table, return_lse)
    if backend == "auto":
        backend = "triton" if q.is_cuda and not dropout_p else "torch"
    elif backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if backend == "triton":
        _check_triton(q, dropout_p)
    if backend == "reference" and torch.compiler.is_compiling():
        raise ValueError(
            "backend 'reference' walks its table in Python and reads activity on the host, which torch.compile cannot "
            "trace: use 'torch' or 'triton' there, or compile without fullgraph"
        )
    if backend == "reference" or dropout_p:
        q, k, v = autocast(q, k, v)
        execute = reference.attention if backend == "reference" else dropout.attention
        # the products inside are the operation's own: it computes 16-bit inputs in float32
        with torch.autocast(q.device.type, enabled=False):
            out, lse = execute(
                q,
                k,
                v,
                table,
                scale=scale,
                gain=gain,
                active=active,
                row_scale=row_scale,
                dropout_p=dropout_p,
                activation=activation,
            )
    elif activation == "sigmoid":
        if transformed():
            raise ValueError("activation 'sigmoid' knows transforms of torch.func with backend 'reference' only")
        q, k, v = autocast(q, k, v)
        # activity may be changed in place before backward runs: this step keeps its own
        active = None if active is None else active.clone()
        return sigmoid_attention(q, k, v, gain, active, row_scale, table.key, scale, backend)
    elif (
        backend == "torch"
        and q.is_cpu
        and not return_lse
        and (gain is None and active is None and row_scale is None)
        and not transformed()
        and (dtype := autocast_dtype(q)) in (torch.float32, torch.float64)
        and (rows := frame_rows(table.key))
        and takes_frames(q, rows)
    ):
        return frames_attention(q, k, v, rows, scale, frame_mask(table.key, dtype))
    else:
        executor = TORCH if backend == "torch" else backend
        options = (gain, active, row_scale, table.key, scale, executor, return_lse)
        if transformed():
            out, lse, _ = _Attention.call(*autocast(q, k, v), *options)
        else:
            out, lse, _ = _attention(q, k, v, *options, False)
    return (out, lse) if return_lse else out


# -- checks: shapes and flags only, never values on a device -----------------------------------------------------------


def _check_inputs(q, k, v, table, scale, dropout_p) -> float:
    if not isinstance(table, BlockTable):
        raise ValueError(f"table must be a BlockTable, got {type(table).__name__}")
    shape = q.shape
    if len(shape) != 4 or k.shape != shape or v.shape != shape:
        raise ValueError(
            "q, k and v must share one shape (batch, heads, positions, head_dim): "
            f"q {tuple(shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if shape[2] != table.n_positions:
        raise ValueError(f"q, k, v {tuple(shape)} hold {shape[2]} positions, the table {table.n_positions}")
    device = q.device
    if k.device != device or v.device != device:
        raise ValueError(f"q, k and v must be on one device: q {q.device}, k {k.device}, v {v.device}")
    dtype = q.dtype
    if not dtype == k.dtype == v.dtype and len({autocast_dtype(x) for x in (q, k, v)}) > 1:
        raise ValueError(f"q, k and v must have one dtype: q {q.dtype}, k {k.dtype}, v {v.dtype}")
    if not dtype.is_floating_point:
        raise ValueError(f"q, k and v must be floating-point tensors, got {q.dtype}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")
    if scale is None:
        return shape[3] ** -0.5 if shape[3] else 1.0
    if isinstance(scale, torch.Tensor):
        raise ValueError(
            "scale must be a number, not a tensor: reading it would wait for the device; fold a learned scale into q"
        )
    if not 0.0 <= scale < math.inf:
        raise ValueError(f"scale must be finite and not negative, got {scale}")
    return float(scale)


def _check_edge_inputs(q, table, gain, active, row_scale) -> None:
    wanted = (
        ("gain", gain, (table.n_edges,)),
        ("active", active, (table.n_edges,)),
        ("row_scale", row_scale, (2, table.n_positions)),
    )
    for name, value, shape in wanted:
        if value is None:
            continue
        if table.form == "joint":
            raise ValueError(
                f"{name} belongs to the edge form: the table is joint, one softmax per row with constant weights"
            )
        if tuple(value.shape) != shape:
            raise ValueError(f"{name} must have the shape {shape} of the table, got {tuple(value.shape)}")
        if value.device != q.device:
            raise ValueError(f"{name} is on {value.device}, q on {q.device}")
        if name != "active" and not value.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {value.dtype}")


def _check_activation(activation, table, return_lse) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    if table.form == "joint":
        raise ValueError(
            f"activation {activation!r} belongs to the edge form: a joint table is one softmax per row, whose weights "
            "are addends of the logits"
        )
    if return_lse:
        raise ValueError(f"activation {activation!r} has no log-sum-exp to return: nothing is normalised")


def _check_triton(q, dropout_p) -> None:
    if dropout_p:
        raise ValueError("backend 'triton' has no dropout: use 'torch' or 'auto'")
    if q.shape[3] > MAX_TRITON_HEAD_DIM:
        raise ValueError(f"backend 'triton' takes head_dim up to {MAX_TRITON_HEAD_DIM}, got {q.shape[3]}: use 'torch'")


def _triton_refusal(device_type: str, dtype: torch.dtype) -> str:
    """Why Triton cannot run here; empty if it can."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"backend 'triton' computes in float32, float16 and bfloat16, got {dtype}: use 'torch' or 'reference'"
    if not _has_triton():
        return "backend 'triton' needs the triton package, which is not installed: use 'torch'"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type != "cuda" and not interpreted:
        devices = "tensors on a CUDA or ROCm device (or TRITON_INTERPRET=1)"
        return f"backend 'triton' needs {devices}, got {device_type}: use 'torch'"
    if interpreted and dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 bit patterns: use float32 or float16 there, or backend 'torch'"
    return ""


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


# -- attention: kernels ------------------------------------------------------------------------------------------------


def _row_scale(table, active, row_scale, q) -> torch.Tensor | None:
    if row_scale is not None or table.form == "joint":
        return row_scale
    return table.row_scale(active, q.device)


def _attention_kernel(q, k, v, gain, active, row_scale, table, scale, backend, need_lse, need_grad):
    table = BlockTable.lookup(table)
    options = {"scale": scale, "gain": gain, "active": active}
    if backend != "triton":
        return rectangles.forward(
            q, k, v, table, row_scale=row_scale, need_lse=need_lse, need_grad=need_grad, **options
        )
    # here and not among the checks: what the machine has is nothing for a compiler to trace
    refusal = _triton_refusal(q.device.type, q.dtype)
    if refusal:
        raise ValueError(refusal)
    from . import launch

    keeps_row_scale = need_grad and active is not None and row_scale is None and table.form == "edge"
    row_scale = _row_scale(table, active, row_scale, q)
    out, lse = launch.forward(q, k, v, table, row_scale=row_scale, **options)
    return out, lse, row_scale if keeps_row_scale else lse.new_empty(0)


def _attention_fake(q, k, v, gain, active, row_scale, table, scale, backend, need_lse, need_grad):
    found = BlockTable.lookup(table)
    batch, heads = q.shape[:2]
    if backend != "triton":
        dtype = torch.promote_types(q.dtype, torch.float32)
        lse = q.new_empty((batch, heads, found.n_slots if need_lse else 0), dtype=dtype)
        own_activity = active is not None and row_scale is None
        # head_dim decides what is kept, so it may not stay symbolic
        size = rectangles.saved_size(found, batch * heads, int(q.shape[3]), own_activity) if need_grad else 0
        return _fake_like(q, backend), lse, q.new_empty(size, dtype=dtype)
    lse = q.new_empty((batch, heads, found.n_slots), dtype=torch.float32)
    keeps_row_scale = need_grad and active is not None and row_scale is None and found.form == "edge"
    return _fake_like(q, backend), lse, lse.new_empty((2, found.n_positions) if keeps_row_scale else (0,))


def _fake_like(x, backend):
    return x.new_empty(x.shape) if backend == "triton" else rectangles.empty_like(x)


def _attention_backward_kernel(
    grad_out, q, k, v, out, lse, aux, gain, active, row_scale, table, scale, backend, need_gain
):
    table = BlockTable.lookup(table)
    options = {"scale": scale, "gain": gain, "active": active, "need_gain": need_gain}
    if backend != "triton":
        gradients, dgain = rectangles.backward(grad_out, q, k, v, aux, table, row_scale=row_scale, **options)
    else:
        from . import launch

        if row_scale is None and aux.numel():
            row_scale = aux
        row_scale = _row_scale(table, active, row_scale, q)
        gradients, dgain = launch.backward(grad_out, q, k, v, out, lse, table, row_scale=row_scale, **options)
    dgain = q.new_empty(0) if dgain is None else dgain.to(gain.dtype)
    return gradients, dgain


def _attention_backward_fake(
    grad_out, q, k, v, out, lse, aux, gain, active, row_scale, table, scale, backend, need_gain
):
    dgain = gain.new_empty(gain.shape) if need_gain else q.new_empty(0)
    gradients = q.new_empty((3, *q.shape)) if backend == "triton" else rectangles.empty_gradients(q)
    return gradients, dgain


# -- attention: autograd -----------------------------------------------------------------------------------------------


class _Attention(Function):
    @staticmethod
    def forward(q, k, v, gain, active, row_scale, table, scale, backend, need_lse):
        with torch._C._AutoDispatchBelowAutograd():
            return _attention(q, k, v, gain, active, row_scale, table, scale, backend, need_lse, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, gain, active, row_scale, table, scale, backend, _ = inputs
        out, lse, aux = output
        # this call's graph keeps its table alive
        ctx.table = BlockTable.lookup(table)
        # the torch backend keeps what it needs in aux; not holding `out` lets callers write into it
        saved_out = out if backend == "triton" else None
        ctx.save_for_backward(q, k, v, saved_out, lse, aux, gain, active, row_scale)
        ctx.options = (table, scale, backend)
        ctx.mark_non_differentiable(lse, aux)
        # or autograd would make zeros the size of aux
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_out, _grad_lse, _grad_aux):
        if grad_out is None:
            return (None,) * 10
        q, k, v, out, lse, aux, gain, active, row_scale = ctx.saved_tensors
        need_gain = gain is not None and ctx.needs_input_grad[3]
        differentiate = _AttentionBackward.call if transformed() else _attention_backward
        gradients, dgain = differentiate(
            grad_out, q, k, v, out, lse, aux, gain, active, row_scale, *ctx.options, need_gain
        )
        return *gradients.unbind(), dgain if need_gain else None, None, None, None, None, None, None


class _AttentionBackward(Function):
    """First derivatives as constants: they may be computed under create_graph, but not differentiated."""

    @staticmethod
    def forward(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return _attention_backward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "canvas_kernels::attention has no second derivative (its backward was differentiated): "
            "use backend='reference' for double backward"
        )


def _needs_grad(*tensors) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _attention_autograd(q, k, v, gain, active, row_scale, table, scale, backend, need_lse, need_grad):
    if _needs_grad(q, k, v, gain):
        # activity may be changed in place before backward runs: this step keeps its own
        active = None if active is None else active.clone()
        return _Attention.call(q, k, v, gain, active, row_scale, table, scale, backend, need_lse)
    with torch._C._AutoDispatchBelowAutograd():
        return _attention(q, k, v, gain, active, row_scale, table, scale, backend, need_lse, need_grad)


def _attention_backward_autograd(*args):
    if _needs_grad(*args[:4], args[7]):
        return _AttentionBackward.call(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return _attention_backward(*args)


def _attention_autocast(device_type):
    key = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}[device_type]
    keys = torch._C.DispatchKeySet(key)

    def cast(q, k, v, *rest):
        q, k, v = autocast(q, k, v)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return _attention(q, k, v, *rest)

    return cast


# -- attention: vmap ---------------------------------------------------------------------------------------------------


def _by_slice(op):
    """A batching rule: one call for each slice. What a backend keeps for backward is its own for each."""

    def rule(info, in_dims, *args):
        slices = [
            tuple(x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims))
            for i in range(info.batch_size)
        ]
        results = [torch.stack(parts) for parts in zip(*(op(*each) for each in slices))]
        return tuple(results), (0,) * len(results)

    return rule


# -- registration ------------------------------------------------------------------------------------------------------

for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("attention", _attention_kernel, _key)
    _LIBRARY.impl("attention_backward", _attention_backward_kernel, _key)
    _LIBRARY.impl("attention", _attention_autocast(_key.lower()), f"Autocast{_key}")
_LIBRARY.impl("attention", _attention_autograd, "Autograd")
_LIBRARY.impl("attention_backward", _attention_backward_autograd, "Autograd")
torch.library.register_fake("canvas_kernels::attention", _attention_fake, lib=_LIBRARY)
torch.library.register_fake("canvas_kernels::attention_backward", _attention_backward_fake, lib=_LIBRARY)
for _op in (_attention, _attention_backward):
    torch.library.register_vmap(_op, _by_slice(_op), lib=_LIBRARY)
