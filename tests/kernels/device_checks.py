"""What the kernels compute on a device, held against float64: part of ``python -m benchmarks.gpu``.

A task is one head dimension, dtype, form and layout; its table is laid out so that every configuration of the device
runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from benchmarks import measure
from canvas_kernels import reference
from canvas_kernels.block_table import BlockTable, row_scale
from canvas_kernels.triton_ops import configs, launch

FLOAT32_BUDGET, EAGER_ERRORS = 2e-5, 2.0
"""In 16 bits errors may be so many times those of the reference under autocast."""
HEAD_DIMS = (16, 32, 40, 64, 72, 80, 88, 96, 120, 128, 160, 256)
DEFAULT_HEAD_DIMS = (64, 128)
POSITIONS = 1600
"""Enough for tiles of every size to be full, ragged and empty."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FORMS = (("joint", False), ("edge", False), ("edge", True), ("sigmoid", False), ("sigmoid", True))
RESULTS = ("out", "dq", "dk", "dv", "dgain")


class Candidate(NamedTuple):
    """Another configuration of one pass."""

    stage: str
    config: configs.Config


class Task(NamedTuple):
    """One check. ``form`` "sigmoid" is the edge form without a normaliser. ``gained`` (not in joint form) adds gains of
    every sign and an inactive connection. ``layout``, of (batch, heads, positions, head_dim): "contiguous", "rows"
    (heads beside each other, as a projection leaves them) or "fused" (views of one tensor with q, k and v beside each
    other)."""

    head_dim: int
    dtype: torch.dtype
    form: str
    gained: bool
    positions: int = POSITIONS
    layout: str = "contiguous"
    candidate: Candidate | None = None

    @property
    def name(self) -> str:
        gains = " with gains" if self.gained else ""
        layout = f" {self.layout}" if self.layout != "contiguous" else ""
        return f"D {self.head_dim} {str(self.dtype).removeprefix('torch.')} {self.form}{gains}{layout}"


def tasks(toy: bool = False) -> tuple[list[Task], list[Task]]:
    """Those of the default configurations, bfloat16 at the usual head dimensions, and all others. ``toy``: for Triton's
    interpreter, one of each form, and of each layout."""
    if toy:
        plain = [Task(16, torch.float32, form, gained, 40) for form, gained in FORMS]
        return plain, [Task(8, torch.float32, "joint", False, 40, layout) for layout in ("rows", "fused")]
    every = [Task(d, dtype, form, gained) for form, gained in FORMS for d in HEAD_DIMS for dtype in DTYPES]
    every += [
        Task(head_dim, torch.bfloat16, form, False, layout=layout)
        for head_dim in (64, 72, 128)
        for layout in ("rows", "fused")
        for form in ("joint", "edge")
    ]
    every.sort(key=lambda task: (task.dtype != torch.bfloat16, task.head_dim not in DEFAULT_HEAD_DIMS))
    defaults = len(FORMS) * len(DEFAULT_HEAD_DIMS)
    return every[:defaults], every[defaults:]


def mixed_table(form: str, n: int) -> BlockTable:
    """Large ragged rectangles over the first third of ``n`` positions, and a fleet of regions of five in the rest.

    Some rows have no keys, some several segments; the second segment has two rectangles, the last large one replaces.
    """
    large = n // 3
    third = large // 3
    # connection, weight, rows, keys; no two rectangles overlap, so the same pattern is a joint one
    rows = [
        (0, 1.0, 0, third, 0, large - 3),
        (1, 0.5, third // 2, large - 5, large - 3, large),
        (1, 0.5, third + 3, 2 * third, large // 2, large // 2 + 1),
        (3, 1.5, 2 * third, 2 * third + 11, 5, large - 3),
    ]
    starts = range(large, n - 5, 29)
    rows += [(2, 0.75, start, start + 5, start, start + 5) for start in starts]
    edge, weight, *ranges = (np.array(column) for column in zip(*rows))
    names = dict(zip(("q_start", "q_stop", "k_start", "k_stop"), ranges), weight=weight)
    if form == "joint":
        return BlockTable.from_rectangles("joint", n, 0, **names)
    segment = [0, 1, 1, 2, *range(3, 3 + len(starts))]
    return BlockTable.from_rectangles("edge", n, 4, segment=segment, edge=edge, replace=edge == 3, **names)


def by_kernels(table: BlockTable, inputs: list[torch.Tensor], gain=None, **options) -> dict[str, torch.Tensor]:
    """The Triton passes' results by name, and "lse", of q, k, v and the gradient of the output."""
    q, k, v, grad_out = inputs
    out, lse, kept = launch.forward(q, k, v, table, gain=gain, **options)
    needs = {"gain": gain, "need_gain": gain is not None}
    gradients, dgain = launch.backward(grad_out, q, k, v, kept, lse, table, **needs, **options)
    results = dict(zip(RESULTS, (out, *gradients, dgain)))
    return {name: x for name, x in results.items() if x is not None} | {"lse": lse}


def by_reference(
    table: BlockTable, inputs: list[torch.Tensor], dtype=torch.float64, gain=None, sigmoid=False, **options
) -> dict[str, torch.Tensor]:
    """The same from the reference: exact in float64, in 16 bits what it makes of the inputs under autocast."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (*inputs[:3], gain) if x is not None]
    options |= {"gain": leaves[3] if gain is not None else None, "activation": "sigmoid" if sigmoid else "softmax"}
    with torch.autocast(inputs[0].device.type, dtype, enabled=dtype.itemsize == 2):
        out, lse = reference.attention(*leaves[:3], table, **options)
    gradients = torch.autograd.grad(out, leaves, inputs[3].to(out.dtype), allow_unused=True)
    return dict(zip(RESULTS, (out.detach(), *gradients))) | {"lse": lse}


def run_task(task: Task, device: str) -> list[dict]:
    """A task's row: its results against float64, twice the same bits, and every launch of its configurations made."""
    table, sigmoid = mixed_table(task.form, task.positions), task.form == "sigmoid"
    inputs = _inputs(task, device)
    gain = torch.tensor([1.2, -0.7, 0.0, 0.9], device=device) if task.gained else None
    active = torch.tensor([1.0, 1.0, 1.0, 0.0], device=device) if task.gained else None
    scales = None if task.form == "joint" else row_scale(table, active, torch.float32, torch.device(device))
    options = {"scale": task.head_dim**-0.5, "gain": gain, "active": active, "row_scale": scales, "sigmoid": sigmoid}

    with replaced(task.candidate), poisoned():
        results, again = (by_kernels(table, inputs, **options) for _ in range(2))
    faults = [f"{name}: two runs differ" for name, x in results.items() if not torch.equal(x, again[name])]
    faults += unused(table, task, device) if device == "cuda" and task.candidate is None else []
    exact = by_reference(table, inputs, torch.float64, **options)
    exact.pop("lse")
    budgets = dict.fromkeys(exact, FLOAT32_BUDGET)
    if task.dtype != torch.float32:
        plain = by_reference(table, inputs, task.dtype, **options)
        budgets = {name: EAGER_ERRORS * measure.error(plain[name], exact[name]) for name in exact}
        # a handful of gains can agree by luck: one unit in the last place is granted
        budgets |= {"dgain": max(budgets["dgain"], torch.finfo(task.dtype).eps)} if task.gained else {}
    checked = measure.compare(results, exact, budgets)
    row = {name: value for name, value in task._asdict().items() if name != "candidate"}
    row["dtype"] = str(task.dtype).removeprefix("torch.")
    return [row | checked | {"faults": faults + checked["faults"]}]


@contextlib.contextmanager
def replaced(candidate: Candidate | None) -> Iterator[None]:
    """Launches take the candidate for its pass meanwhile."""
    usual = configs.lookup

    def lookup(arch, head_dim, dtype, stage, form):
        chosen = candidate is not None and stage == candidate.stage
        return (candidate.config,) if chosen else usual(arch, head_dim, dtype, stage, form)

    configs.lookup = lookup
    try:
        yield
    finally:
        configs.lookup = usual


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """What is allocated meanwhile is NaN until it is written."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])


def _inputs(task: Task, device: str) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output, (2, 2, positions, head_dim) in the task's layout."""
    generator = torch.Generator(device).manual_seed(task.head_dim)
    # (q, k, v and the gradient, batch, heads, positions, head_dim) of values that no layout changes
    values = torch.randn(4, 2, 2, task.positions, task.head_dim, generator=generator, device=device).to(task.dtype)
    if task.layout == "rows":
        values = values.transpose(2, 3).contiguous().transpose(2, 3)
    elif task.layout == "fused":
        # in memory (batch, positions, of four, heads, head_dim)
        values = values.permute(1, 3, 0, 2, 4).contiguous().permute(2, 0, 3, 1, 4)
    return list(values)


def unused(table: BlockTable, task: Task, device: str) -> list[str]:
    """Configurations that the table gives no tile: they would pass unseen."""
    missing, form = [], configs.form_of(table, task.form == "sigmoid")
    for stage in ("forward", "delta", "dq", "dkv") if form == "in_place" else ("forward", "dq", "dkv"):
        known = configs.lookup(launch.arch_of(torch.device(device)), task.head_dim, task.dtype, stage, form)
        by_slot = (stage, form) == ("forward", "edge")
        tilings = table.device_tilings(device, configs.classes(known), stage == "dkv", by_slot)
        used = {(tiling.block_m, tiling.block_n) for tiling in tilings}
        missing += [f"{stage}: {c.block_m} × {c.block_n} not run" for c in known if (c.block_m, c.block_n) not in used]
    return missing
