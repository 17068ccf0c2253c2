"""canvas_attention: attention on a canvas from a compiled plan, the single entry point to canvas_kernels."""

from __future__ import annotations

import torch

from canvas_kernels.ops import BACKENDS, block_attention

from ..checked import checked_bool, checked_tensor
from ..parallel import PlacedPlan
from ..plan import AttentionPlan
from .sharded import sharded_attention

__all__ = ["BACKENDS", "canvas_attention"]


def canvas_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: AttentionPlan | PlacedPlan,
    *,
    scale: float | None = None,
    gain: torch.Tensor | None = None,
    active: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
    packed: bool = False,
    activation: str = "softmax",
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes every attention set of a plan in one call (docs/semantics.md, sections 3 and 4).

    Every connection is softmax attention here, or sigmoid by ``activation``; :class:`AttentionDispatcher` runs the
    functions that connections name.

    Args:
        q, k, v: (B, heads, N, head_dim), positions in canvas order; with ``packed``, (B, heads, n, head_dim) in the
            plan's packed order (``plan.pack``), which saves copies.
        plan: from :func:`canvas_engineering.plan.compile_attention`; its form, "edge" or "joint", is what is computed.
            Over several ranks ``plan.shard(…).on(mesh)``: q, k and v then hold this rank's own positions.
        scale: factor of q·k, by default head_dim^−½.
        gain: (connections,), trainable factors of connections. Edge form only, as the next two.
        active: (connections,), 0 or 1; a connection at 0 is as if it were not declared.
        row_scale: (2, n) float32, factors of adding and of replacing attention sets at each packed row; by default
            1 / (sum of the weights in force).
        dropout_p: probability of dropping an attention weight (torch and reference backends).
        backend: "triton", "torch" (grouped rectangles), "reference" (slow, any dtype), or "auto": Triton for tensors
            on a GPU, torch elsewhere. A named backend never falls back.
        activation: "softmax", or in edge form "sigmoid": σ(scale · q·k) for each pair, without normalisation.
        key_mask: bool (B, positions), in the order of k: False for keys, as padding of a text, that nothing attends to
            in that sample. Joint form only.

    Returns:
        A tensor like q; rows without keys are 0. Derivatives of any order, forward and reverse mode, and transforms of
        ``torch.func`` are supported; vmap runs slice by slice.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit the plan or the backend.

    >>> from canvas_engineering import CanvasLayout, CanvasTopology
    >>> from canvas_engineering.plan import compile_attention
    >>> layout = CanvasLayout(T=1, H=1, W=4, d_model=8, regions={"a": (0, 1, 0, 1, 0, 2), "b": (0, 1, 0, 1, 2, 4)})
    >>> plan = compile_attention(layout, CanvasTopology.isolated(["b"]))
    >>> x = torch.tensor([1.0, 2.0, 3.0, 5.0]).reshape(1, 1, 4, 1)
    >>> canvas_attention(0 * x, x, x, plan).flatten().tolist()
    [0.0, 0.0, 4.0, 4.0]
    """
    if not isinstance(plan, (AttentionPlan, PlacedPlan)):
        raise ValueError(f"plan must be an AttentionPlan (from compile_attention), got {type(plan).__name__}")
    for name, value in (("q", q), ("k", k), ("v", v)):
        checked_tensor(value, name)
    packed = checked_bool(packed, "packed")
    shape = q.shape
    if len(shape) != 4 or k.shape != shape or v.shape != shape:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in (("q", q), ("k", k), ("v", v)))
        raise ValueError(f"q, k and v must share one shape (B, heads, positions, head_dim); got {shapes}")
    options = {
        "scale": scale,
        "gain": gain,
        "active": active,
        "row_scale": row_scale,
        "dropout_p": dropout_p,
        "backend": backend,
        "activation": activation,
    }
    if isinstance(plan, PlacedPlan):
        if packed:
            raise ValueError("a sharded plan says itself in which order its rank holds positions: leave out packed=")
        return sharded_attention(q, k, v, plan, **options)
    positions = plan.n_packed if packed else plan.n_positions
    if shape[2] != positions:
        order = "packed" if packed else "canvas"
        raise ValueError(f"q {tuple(shape)} holds {shape[2]} positions; the plan has {positions} in {order} order")
    return block_attention(q, k, v, plan.table, key_mask=key_mask, rows=None if packed else plan.order_map, **options)  # pyright: ignore[reportReturnType] no lse is returned
