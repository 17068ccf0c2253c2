"""Attention over some of the keys of a row, to be merged with results over the others.

Results o_t with natural log-sum-exps l_t merge as Σ_t exp(l_t − l) o_t, where l = ln Σ_t exp(l_t): both are
differentiable, so that autograd derives the merge.
"""

from __future__ import annotations

import math

import torch

from . import ops
from .autograd import OPERATIONS, Operation, operate
from .block_table import BlockTable
from .torch_ops import composition


def attention_part(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: BlockTable, *, scale: float | None, backend: str = "auto"
) -> torch.Tensor:
    """Computes attention and its log-sum-exp over a table in joint form.

    First derivatives run in kernels on Triton; on torch, and for higher ones, they compose plain torch, which
    materialises the probabilities of the table's pairs.

    Args:
        q, k, v: (batch, heads, n, head_dim), in the table's packed order.
        table: in joint form.
        scale, backend: as for :func:`.ops.block_attention`; "reference" runs as "torch".

    Returns:
        (batch, heads, n, head_dim + 1) in float32, or float64: the result, then the natural log-sum-exp of the logits,
        −inf for rows without keys.

    Raises:
        ValueError: a table in edge form, and as :func:`.ops.block_attention`.
    """
    if table.form != "joint":
        raise ValueError("parts of a softmax are merged in joint form; in edge form keys are pulled")
    scale = ops._check_inputs(q, k, v, table, None, scale, 0.0)
    backend = ops._check_backend("torch" if backend == "reference" else backend, q, 0.0)
    q, k, v = ops.autocast(q, k, v)
    args = (q, k, v, table.key, scale, ops.TRITON if backend == "triton" else ops.TORCH)
    if backend == "torch" and not q.is_cpu:
        with torch.autocast(q.device.type, enabled=False):
            return _compose(*args)
    return operate("attention_part", *args)[0]


def _run(keep, q, k, v, table, scale, executor):
    constants = (None, None, None, table, "", scale, executor, "softmax")
    out, lse, saved, _ = torch.ops.canvas_kernels.attention.default(q, k, v, *constants, True, keep)
    return _joined(out, lse), lse, saved


def _joined(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    natural = torch.where(lse == math.inf, -math.inf, lse * math.log(2))
    return torch.cat((out.to(lse.dtype), natural[..., None]), -1)


def _differentiate(grad, needs, saved_tensors, q, k, v, table, scale, executor):
    part, lse, saved = saved_tensors
    if executor != ops.TRITON:
        with torch._C._DisableAutocast():
            return torch.func.vjp(lambda q, k, v: _compose(q, k, v, table, scale, executor), q, k, v)[1](grad)
    # dS = P (dP − δ + dl), and kernels take δ from the product of dO and the result: a further dimension, 0 in v, with
    # dl in dO and −1 in the result, gives them δ − dl
    width = q.shape[-1]
    d_out, out = grad.to(q.dtype), torch.cat((part[..., :-1], torch.full_like(part[..., -1:], -1.0)), -1).to(q.dtype)
    wide = (torch.nn.functional.pad(x, (0, 1)) for x in (q, k, v))
    constants = (*wide, None, None, None, table, "", scale, executor, "softmax", False)
    grads = torch.ops.canvas_kernels.attention_backward.default(d_out, out, lse, saved, [], *constants)[:3]
    return tuple(x[..., :width] for x in grads)


def _compose(q, k, v, table, scale, executor):
    return _joined(*composition.attention(q, k, v, None, None, None, table, "", scale, differentiable_lse=True))


OPERATIONS["attention_part"] = Operation(
    forward=_run,
    backward=_differentiate,
    composition=_compose,
    n_tensors=3,
    differentiable=(0, 1, 2),
    keeps_result=lambda *args: args[5] == ops.TRITON,
    owners=lambda *args: BlockTable.lookup(args[3]),
)
