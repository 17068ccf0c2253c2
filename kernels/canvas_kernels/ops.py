"""The registered operation: ``canvas_kernels::attention`` and its backward.

A table enters the operators as its content digest (:attr:`BlockTable.key`), an index map likewise: strings are
constants to a compiler, and equal digests mean equal content in every process, so compiled graphs may be cached. Their
autograd is that of :mod:`.autograd`, and their fakes give the real strides.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import math
import os
import pkgutil

import numpy as np
import torch

from . import reference
from .autograd import (
    COMPILED_FUNCTIONS,
    DEVICES,
    OPERATIONS,
    TAGS,
    Operation,
    operate,
    own_products,
    under_autograd,
)
from .block_table import BlockTable
from .block_table import row_scale as table_row_scale
from .key_mask import check_key_mask, clear_keys, mask_keys
from .packing import IndexMap, empty_in, gather_rows, put_rows, scatter_rows, take_rows
from .torch_ops import composition, frames, sigmoid
from .torch_ops import executor as grouped
from .torch_ops.frames import frame_rows, use_frames
from .triton_ops import configs

ACTIVATIONS = ("softmax", "sigmoid")
BACKENDS = ("auto", "triton", "torch", "reference")
MAX_TRITON_HEAD_DIM = 256
# Sizes and strides of an executor's saved tensors are part of compiled graphs, which compilers cache on disk. Its name
# holds a digest of its sources, so that other versions do not share graphs.
_SOURCES = [f"{name}.py" for name in ("ops", "block_table", "ranges", "packing")]
_SOURCES += [
    f"torch_ops/{name}.py"
    for name in ("executor", "frames", "gathered", "grouping", "groups", "indices", "sigmoid", "strided")
]


def _executor_name(name: str) -> str:
    code = b"".join(pkgutil.get_data(__package__ or "", source) or b"" for source in _SOURCES)
    return f"{name} {hashlib.sha1(code, usedforsecurity=False).hexdigest()[:12]}"


TRITON, TORCH, FRAMES = map(_executor_name, ("triton", "torch", "frames"))

_LIBRARY = torch.library.Library("canvas_kernels", "DEF")
_LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? gain, Tensor? active, Tensor? row_scale, str table, str rows, "
    "float scale, str executor, str activation, bool need_lse, bool keep) -> "
    "(Tensor out, Tensor lse, Tensor saved, Tensor[] packed)",
    tags=TAGS,
)
_LIBRARY.define("row_scale(Tensor active, str table) -> Tensor", tags=TAGS)
_LIBRARY.define(
    "attention_backward(Tensor grad_out, Tensor? out, Tensor lse, Tensor saved, Tensor[] packed, Tensor q, Tensor k, "
    "Tensor v, Tensor? gain, Tensor? active, Tensor? row_scale, str table, str rows, float scale, str executor, "
    "str activation, bool need_gain) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dgain)",
    tags=TAGS,
)


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
    rows: IndexMap | None = None,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Segmented block-sparse attention; ``kernels/README.md`` has the formulas.

    Gradients flow to q, k, v and gain, of any order, in forward and reverse mode, eager, compiled, exported and under
    transforms of torch.func; first derivatives run in kernels, higher ones compose plain torch, which materialises the
    probabilities of every pair. Under autocast float32 inputs are cast as ``scaled_dot_product_attention`` casts them.

    Args:
        q, k, v: (batch, heads, n, head_dim), one floating dtype and device, rows in the table's packed order.
        table: the block table.
        scale: factor of q·k, by default head_dim^−½.
        gain: (n_edges,), trainable factors of connections. Edge form only, as the next two.
        active: (n_edges,); a connection at 0 is as if it were not declared.
        row_scale: (2, n), factors of adding and of replacing segments at each row, by default 1 / (sum of the weights
            in force). A constant, without gradient.
        backend: "triton", "torch" (grouped rectangles on a CPU, a composition elsewhere), "reference" (for tests; not
            under torch.compile) or "auto": Triton for tensors on a CUDA or ROCm device without dropout,
            torch otherwise. A named backend never falls back.
        dropout_p: probability of dropping an attention weight; not with "triton".
        return_lse: whether to return ``lse`` (batch, heads, n_slots) too, base 2 and without gradient; +inf where
            the slot's row has no keys or is scaled by 0, as adding segments are where replacing ones are in force.
        activation: "softmax", or in edge form "sigmoid": σ(scale · q·k) without normalisation and lse.
        rows: a distinct gather from n_canvas positions; q, k, v and the result then hold those instead of n, and
            positions that are not gathered get 0.
        key_mask: bool (batch, positions of k), False for keys that nothing attends to in that sample; the table stays
            one for all samples. Joint form only. Rows whose keys are all masked are 0.

    Returns:
        ``out`` like q, or ``(out, lse)``. Rows without keys are 0.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit, naming them.

    >>> table = BlockTable.from_rectangles("joint", 2, 0, q_start=[0], q_stop=[2], k_start=[1], k_stop=[2], weight=[1])
    >>> x = torch.tensor([[[[1.0], [3.0]]]])
    >>> block_attention(x, x, x, table).flatten().tolist()
    [3.0, 3.0]
    """
    scale = _check_inputs(q, k, v, table, rows, scale, dropout_p)
    if gain is not None or active is not None or row_scale is not None:
        _check_edge_inputs(q, table, gain, active, row_scale)
    if activation != "softmax":
        _check_activation(activation, table, return_lse)
    if key_mask is not None:
        check_key_mask(key_mask, q, table, return_lse)
        if _check_backend(backend, q, dropout_p) == "triton":
            k, v = clear_keys(k, v, key_mask)
            constants = (table.key, "" if rows is None or rows.is_identity else rows.key, scale)
            return operate(
                "attention", *autocast(q, k, v), None, None, key_mask, *constants, TRITON, activation, False
            )[0]
        masked = mask_keys(q, k, v, key_mask, autocast_dtype(q))
        options = {"scale": scale, "backend": backend, "dropout_p": dropout_p, "rows": rows}
        return block_attention(*masked, table, **options)[..., : q.shape[3]]  # pyright: ignore[reportCallIssue, reportArgumentType] no lse
    backend = _check_backend(backend, q, dropout_p)
    q, k, v = autocast(q, k, v)
    if active is not None:
        # a copy: it may be changed in place before backward runs
        active = active.detach().clone()
        if row_scale is None:
            if backend == "triton" and not torch._C._are_functorch_transforms_active():
                row_scale = torch.ops.canvas_kernels.row_scale.default(active, table.key)
            else:
                row_scale = table_row_scale(table, active, torch.promote_types(q.dtype, torch.float32))
    tensors = (q, k, v, gain, active, row_scale)
    if backend == "reference":
        options = {"scale": scale, "gain": gain, "active": active, "row_scale": row_scale}
        if rows is not None:
            q, k, v = (gather_rows(x, rows, 2) for x in (q, k, v))
        with torch.autocast(q.device.type, enabled=False):
            out, lse = reference.attention(q, k, v, table, **options, dropout_p=dropout_p, activation=activation)
        out = out if rows is None else scatter_rows(out, rows, 2)
    else:
        constants = (table.key, "" if rows is None or rows.is_identity else rows.key, scale)
        if dropout_p or (backend == "torch" and not q.is_cpu):
            # no autocast inside: 16-bit inputs are computed in float32
            with torch.autocast(q.device.type, enabled=False):
                out, lse = compose(*tensors, *constants, activation, dropout_p)
        else:
            executor = _executor(backend, tensors, table, constants[1], return_lse, activation)
            out, lse, *_ = operate("attention", *tensors, *constants, executor, activation, return_lse)
    return (out, lse) if return_lse else out


def compose(*args) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs :func:`.torch_ops.composition.attention`; compilers do not trace it."""
    return composition.attention(*args)


COMPILED_FUNCTIONS.append(compose)


def _executor(backend: str, tensors, table: BlockTable, rows: str, need_lse: bool, activation: str) -> str:
    """Returns the executor of this call, for forward and backward, from the current layout of q."""
    q, _, _, *edge_inputs = tensors
    if backend == "triton":
        return TRITON
    if activation != "softmax" or need_lse or any(x is not None for x in edge_inputs):
        return TORCH
    length = frame_rows(table.key) if q.dtype in (torch.float32, torch.float64) and q.numel() else 0
    if not length:
        return TORCH
    # packed rows have the layout of q
    heads_first = _order(q) is HEADS_FIRST
    use = frames.is_profitable(length, table.n_positions, q.shape[3], heads_first) if rows else use_frames(q, length)
    return FRAMES if use else TORCH


# -- checks: shapes and flags only, never values on a device -----------------------------------------------------------


def _check_inputs(q, k, v, table, rows, scale, dropout_p) -> float:
    if not isinstance(table, BlockTable):
        raise ValueError(f"table must be a BlockTable, got {type(table).__name__}")
    if not all(isinstance(x, torch.Tensor) for x in (q, k, v)):
        raise ValueError(f"q, k and v must be tensors, got {', '.join(type(x).__name__ for x in (q, k, v))}")
    shape = q.shape
    if len(shape) != 4 or k.shape != shape or v.shape != shape:
        raise ValueError(
            "q, k and v must share one shape (batch, heads, positions, head_dim): "
            f"q {tuple(shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if rows is not None and (rows.n_out != table.n_positions or not (rows.is_gather and rows.is_distinct)):
        raise ValueError(f"rows must gather the table's {table.n_positions} positions, none of them twice")
    wanted = table.n_positions if rows is None else rows.n_in
    if shape[2] != wanted:
        raise ValueError(f"q, k, v {tuple(shape)} hold {shape[2]} positions, the table {wanted}")
    device = q.device
    if k.device != device or v.device != device:
        raise ValueError(f"q, k and v must be on one device: q {q.device}, k {k.device}, v {v.device}")
    dtype = q.dtype
    if not dtype == k.dtype == v.dtype and len({autocast_dtype(x) for x in (q, k, v)}) > 1:
        raise ValueError(f"q, k and v must have one dtype: q {q.dtype}, k {k.dtype}, v {v.dtype}")
    if not dtype.is_floating_point:
        raise ValueError(f"q, k and v must be floating-point tensors, got {q.dtype}")
    if not _is_number(dropout_p) or not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p!r}")
    if scale is None:
        return shape[3] ** -0.5 if shape[3] else 1.0
    if isinstance(scale, torch.Tensor):
        raise ValueError(
            "scale must be a number, not a tensor: using it would synchronise the device; fold learned scales into q"
        )
    if not _is_number(scale) or not 0.0 <= scale < math.inf:
        raise ValueError(f"scale must be finite and not negative, got {scale!r}")
    return float(scale)


def _is_number(value) -> bool:
    """Whether ``value`` is a real number, numpy's included, but no bool."""
    return type(value) is not bool and isinstance(value, (int, float, np.number, torch.SymInt, torch.SymFloat))


def _check_backend(backend: str, q: torch.Tensor, dropout_p: float) -> str:
    """Returns ``backend`` with "auto" resolved."""
    if backend == "auto":
        return "triton" if q.is_cuda and not dropout_p else "torch"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if backend == "triton":
        _check_triton(q, dropout_p)
    if backend == "reference" and torch.compiler.is_compiling():
        raise ValueError(
            "backend 'reference' loops over its table in Python and uses activity on the host, which torch.compile "
            "cannot trace: use 'torch' or 'triton' there, or compile without fullgraph"
        )
    return backend


def _check_edge_inputs(q, table, gain, active, row_scale) -> None:
    expected = (
        ("gain", gain, (table.n_edges,)),
        ("active", active, (table.n_edges,)),
        ("row_scale", row_scale, (2, table.n_positions)),
    )
    for name, value, shape in expected:
        if value is None:
            continue
        if table.form == "joint":
            raise ValueError(
                f"{name} belongs to the edge form: the table is joint, one softmax per row with constant weights"
            )
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{name} must be a tensor {shape}, got {value!r}")
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
    """Returns why Triton cannot run here; empty if it can."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"backend 'triton' computes in float32, float16 and bfloat16, got {dtype}: use 'torch' or 'reference'"
    if not has_triton():
        return "backend 'triton' needs the triton package, which is not installed: use 'torch'"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type != "cuda" and not interpreted:
        devices = "tensors on a CUDA or ROCm device (or TRITON_INTERPRET=1)"
        return f"backend 'triton' needs {devices}, got {device_type}: use 'torch'"
    if interpreted and dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 bit patterns: use float32 or float16 there, or backend 'torch'"
    from .triton_ops import launch

    return launch.interpreter_refusal() if interpreted else ""


@functools.cache
def has_triton() -> bool:
    """Returns whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


# -- autocast ----------------------------------------------------------------------------------------------------------


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """Returns the dtype to which autocast casts ``x``: float64 and integers are unchanged."""
    dtype = x.dtype
    # device.type creates a string each time
    kind = "cpu" if x.is_cpu else x.device.type
    if dtype.is_floating_point and dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return dtype


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Returns tensors cast by autocast."""
    return tuple(x.to(autocast_dtype(x)) for x in tensors)


# -- kernels -----------------------------------------------------------------------------------------------------------


# Orders of (B, H, n, D) in memory, outermost first.
HEADS_FIRST, POSITIONS_FIRST = (0, 1, 2, 3), (0, 2, 1, 3)


def _packed(rows: str, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Packs (B, H, n_canvas, D) tensors by the map ``rows``, if not empty, in the memory order of the first."""
    if not rows:
        return list(tensors)
    index_map, order = IndexMap.lookup(rows), _order(tensors[0])
    return [take_rows(x, index_map, 2, order) for x in tensors]


def _order(x: torch.Tensor) -> tuple[int, ...]:
    return POSITIONS_FIRST if x.stride(1) < x.stride(2) else HEADS_FIRST


def _unpacked(rows: str, order: tuple[int, ...], *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Inverts :func:`_packed`, in memory order ``order``, with zeros at positions that are not packed."""
    if not rows:
        return list(tensors)
    index_map = IndexMap.lookup(rows)
    return [put_rows(x, index_map, 2, order) for x in tensors]


def _row_scale_now(active: torch.Tensor, table: str) -> torch.Tensor:
    _refuse_triton(active.device.type, torch.float32)
    from .triton_ops import launch

    return launch.row_scale_of(active, BlockTable.lookup(table))


def _refuse_triton(device_type: str, dtype: torch.dtype) -> None:
    # inside of operators: compilers need not trace the machine's properties
    refusal = _triton_refusal(device_type, dtype)
    if refusal:
        raise ValueError(refusal)


@own_products
def _attention(q, k, v, gain, active, row_scale, table, rows, scale, executor, activation, need_lse, keep):
    block_table, canvas = BlockTable.lookup(table), q
    options = {"scale": scale, "gain": gain, "active": active, "row_scale": row_scale}
    if executor == TRITON:
        return _triton(q, k, v, block_table, rows, activation, need_lse, keep, options)
    q, k, v = packed = _packed(rows, q, k, v)
    lse, saved = (q.new_empty(0, dtype=torch.promote_types(q.dtype, torch.float32)) for _ in range(2))
    if executor == FRAMES:
        out, lse = frames.forward(q, k, v, frame_rows(table), scale)
    elif activation == "sigmoid":
        out = sigmoid.forward(q, k, v, block_table, **options)
    else:
        out, lse, saved = grouped.forward(q, k, v, block_table, **options, need_lse=need_lse, need_grad=keep)
    if need_lse and block_table.form == "edge":
        lse.masked_fill_(_out_of_force(block_table, active, row_scale, q), math.inf)
    (out,) = _unpacked(rows, _order_of_results(canvas, executor, activation), out)
    return out, lse, saved, packed if rows and keep else []


def _triton(q, k, v, table, rows, activation, need_lse, keep, options):
    """Runs the operator on Triton. Backward packs rows again, which saves a copy in GPU memory. In joint form the
    argument for row scales is the mask of keys."""
    _refuse_triton(q.device.type, q.dtype)
    from .triton_ops import launch

    saved = q.new_empty(0)
    if rows:
        q, k, v = launch.move_rows(q, k, v, rows=IndexMap.lookup(rows))
    options["row_scale"] = _packed_mask(options["row_scale"], table, rows)
    sigmoid = activation == "sigmoid"
    out, lse, saved_tensors = launch.forward(q, k, v, table, sigmoid=sigmoid, **options)
    if sigmoid:
        lse = lse.view(0)
    elif keep and configs.stores_segments(table):
        saved = saved_tensors
    if need_lse and table.form == "edge":
        lse.masked_fill_(_out_of_force(table, options["active"], options["row_scale"], q), math.inf)
    if rows:
        (out,) = launch.move_rows(out, rows=IndexMap.lookup(rows), back=True)
    return out, lse, saved, []


def _triton_backward(grad_out, out, lse, saved, q, k, v, table, rows, activation, options):
    from .triton_ops import launch

    if rows:
        inputs = (grad_out, q, k, v) if table.form == "edge" else (grad_out, q, k, v, out)
        grad_out, q, k, v, *packed_out = launch.move_rows(*inputs, rows=IndexMap.lookup(rows))
    options["row_scale"] = _packed_mask(options["row_scale"], table, rows)
    # in joint form a segment's output is the result
    saved_tensors = saved if table.form == "edge" else packed_out[0] if rows else out
    options["sigmoid"] = activation == "sigmoid"
    gradients, dgain = launch.backward(grad_out, q, k, v, saved_tensors, lse, table, **options)
    if rows:
        gradients = launch.move_rows(*gradients, rows=IndexMap.lookup(rows), back=True)
    return *gradients, q.new_empty(0) if dgain is None else dgain


def _packed_mask(row_scale: torch.Tensor | None, table: BlockTable, rows: str) -> torch.Tensor | None:
    """Returns row scales as they are, and the mask of keys, which joint form has instead of them, packed."""
    if row_scale is None or table.form != "joint" or not rows:
        return row_scale
    return row_scale.index_select(1, IndexMap.lookup(rows).rows(row_scale.device))


def _out_of_force(table: BlockTable, active, row_scale, q: torch.Tensor) -> torch.Tensor:
    """Returns bool (n_slots,): slots of inactive connections, and of rows where the segment is scaled by 0."""
    layout = table.slot_layout(q.device)
    row_scale = table.row_scale(q.device, torch.float32) if row_scale is None else row_scale
    inactive = row_scale[layout.replace, layout.position] == 0
    if active is not None:
        inactive |= (active == 0).repeat_interleave(layout.per_edge, output_size=table.n_slots)
    return inactive


@own_products
def _attention_backward(
    grad_out,
    out,
    lse,
    saved,
    packed,
    q,
    k,
    v,
    gain,
    active,
    row_scale,
    table,
    rows,
    scale,
    executor,
    activation,
    need_gain,
):
    block_table, canvas = BlockTable.lookup(table), q
    options = {"scale": scale, "gain": gain, "active": active, "row_scale": row_scale, "need_gain": need_gain}
    if executor == TRITON:
        return _triton_backward(grad_out, out, lse, saved, q, k, v, block_table, rows, activation, options)
    (grad_out,) = _packed(rows, grad_out)
    q, k, v = packed or _packed(rows, q, k, v)
    dgain = None
    if executor == FRAMES:
        (out,) = _packed(rows, out)
        gradients = frames.backward(grad_out, q, k, v, out, lse, frame_rows(table), scale)
    elif activation == "sigmoid":
        gradients, dgain = sigmoid.backward(grad_out, q, k, v, block_table, **options)
    else:
        *gradients, dgain = grouped.backward(grad_out, q, k, v, saved, block_table, **options)
    dgain = q.new_empty(0) if dgain is None else dgain.to(gain.dtype)
    return *_unpacked(rows, _order_of_results(canvas, executor, activation), *gradients), dgain


def _order_of_results(q: torch.Tensor, executor: str, activation: str) -> tuple[int, ...]:
    """Returns the order in memory of an executor's results for q."""
    if executor == TRITON or activation == "sigmoid":
        return HEADS_FIRST
    return POSITIONS_FIRST if executor == FRAMES else grouped.order_of_results(q)


def _attention_fake(q, k, v, gain, active, row_scale, table, rows, scale, executor, activation, need_lse, keep):
    block_table = BlockTable.lookup(table)
    batch, heads = q.shape[:2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    lse, saved = (q.new_empty(0, dtype=dtype) for _ in range(2))
    if executor == TRITON:
        saved = q.new_empty(0)
        if activation != "sigmoid":
            lse = q.new_empty((batch, heads, block_table.n_slots), dtype=torch.float32)
            if keep and configs.stores_segments(block_table):
                saved = q.new_empty((batch, heads, block_table.n_slots, q.shape[3]))
    elif executor == FRAMES:
        lse = empty_in((0, 2, 1), (batch, heads, block_table.n_positions), q)
    elif activation != "sigmoid":
        lse = q.new_empty((batch, heads, block_table.n_slots if need_lse else 0), dtype=dtype)
        # head_dim determines the saved size, so it cannot be symbolic
        saved = q.new_empty(grouped.saved_size(block_table, batch * heads, int(q.shape[3])) if keep else 0, dtype=dtype)
    out = empty_in(_order_of_results(q, executor, activation), q.shape, q)
    if not (rows and keep) or executor == TRITON:
        return out, lse, saved, []
    shape = (batch, heads, block_table.n_positions, q.shape[3])
    return out, lse, saved, [empty_in(_order(q), shape, q) for _ in range(3)]


def _attention_backward_fake(*args):
    # the operator's arguments: q, k, v and gain are inputs 5 to 8, the last three are executor, activation and
    # need_gain
    q, gain, (executor, activation, need_gain) = args[5], args[8], args[-3:]
    order = _order_of_results(q, executor, activation)
    gradients = (empty_in(order, q.shape, q) for _ in range(3))
    return *gradients, gain.new_empty(gain.shape) if need_gain else q.new_empty(0)


def _row_scale_fake(active, table):
    return active.new_empty((2, BlockTable.lookup(table).n_positions), dtype=torch.float32)


for _key in DEVICES:
    _LIBRARY.impl("row_scale", _row_scale_now, _key)
    _LIBRARY.impl("attention", _attention, _key)
    _LIBRARY.impl("attention_backward", _attention_backward, _key)
torch.library.register_fake("canvas_kernels::row_scale", _row_scale_fake, lib=_LIBRARY)
torch.library.register_fake("canvas_kernels::attention", _attention_fake, lib=_LIBRARY)
torch.library.register_fake("canvas_kernels::attention_backward", _attention_backward_fake, lib=_LIBRARY)


# -- autograd ----------------------------------------------------------------------------------------------------------


def _run(keep, *args):
    out, lse, saved, packed = torch.ops.canvas_kernels.attention.default(*args, keep)
    return out, lse, saved, *packed


def _differentiate(grad, needs, saved_tensors, *args):
    *args, _need_lse = args
    need_gain = bool(needs >> 3 & 1)
    out, lse, saved, *packed = saved_tensors
    saved_tensors = (out, lse, saved, packed)
    *gradients, dgain = torch.ops.canvas_kernels.attention_backward.default(grad, *saved_tensors, *args, need_gain)
    return *gradients, dgain, None, None


def _compose(*args):
    # the last three are executor, activation and need_lse
    q, k, v, gain, active, row_scale, table = args[:7]
    if row_scale is None or BlockTable.lookup(table).form != "joint":
        return composition.attention(*args[:-3], activation=args[-2])[0]
    masked = mask_keys(q, k, v, row_scale, q.dtype)
    return composition.attention(*masked, gain, active, None, *args[6:-3], activation=args[-2])[0][..., : q.shape[3]]


OPERATIONS["attention"] = Operation(
    forward=_run,
    backward=_differentiate,
    composition=_compose,
    n_tensors=6,
    differentiable=(0, 1, 2, 3),
    keeps_result=lambda *args: args[9] in (TRITON, FRAMES),
    # the graph keeps its table alive
    owners=lambda *args: (BlockTable.lookup(args[6]), args[7] and IndexMap.lookup(args[7])),
)


def _operate(*args):
    out, lse, saved, *packed = operate("attention", *args[:-1])
    return out, lse, saved, packed


_LIBRARY.impl("attention", under_autograd(torch.ops.canvas_kernels.attention.default, _operate), "Autograd")
