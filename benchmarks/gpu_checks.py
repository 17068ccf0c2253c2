"""What the kernels compute on a device, held against float64: part of ``python -m benchmarks.gpu``.

A task is one head dimension, dtype, form and layout; its table is laid out so that every configuration of the device
runs.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from benchmarks.naive import PerEdgeLoop
from canvas_kernels import reference
from canvas_kernels.block_table import BlockTable, row_scale
from canvas_kernels.triton_ops import configs, launch

FLOAT32_BUDGET = 2e-5
HEAD_DIMS = (16, 32, 40, 64, 72, 80, 88, 96, 120, 128, 160, 256)
DEFAULT_HEAD_DIMS = (64, 128)
POSITIONS = 1600
"""Enough for tiles of every size to be full, ragged and empty."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
RESULTS = ("out", "dq", "dk", "dv", "dgain")


class Candidate(NamedTuple):
    """Another configuration of one pass."""

    stage: str
    config: configs.Config


class Task(NamedTuple):
    """One check. ``form`` "sigmoid" is the edge form without a normaliser. ``gained`` (not in joint form) adds gains of
    every sign and an inactive edge. ``layout``, of (batch, heads, positions, head_dim): "contiguous", "rows" (heads
    beside each other, as a projection leaves them) or "fused" (views of one tensor with q, k and v beside each other).
    """

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


FORMS = (("joint", False), ("edge", False), ("edge", True), ("sigmoid", False), ("sigmoid", True))


def tasks() -> tuple[list[Task], list[Task]]:
    """Those of the default configurations, bfloat16 at the usual head dimensions, and all others."""
    found = [Task(d, dtype, form, gained) for form, gained in FORMS for d in HEAD_DIMS for dtype in DTYPES]
    for head_dim in (64, 72, 128):
        for layout in ("rows", "fused"):
            found += [Task(head_dim, torch.bfloat16, form, False, layout=layout) for form in ("joint", "edge")]
    found.sort(key=lambda task: (task.dtype != torch.bfloat16, task.head_dim not in DEFAULT_HEAD_DIMS))
    defaults = len(FORMS) * len(DEFAULT_HEAD_DIMS)
    return found[:defaults], found[defaults:]


def toy_tasks() -> tuple[list[Task], list[Task]]:
    """For Triton's interpreter: one of each form, and of each layout."""
    plain = [Task(16, torch.float32, form, gained, 40) for form, gained in FORMS]
    return plain, [Task(8, torch.float32, "joint", False, 40, layout) for layout in ("rows", "fused")]


def mixed_table(form: str, n: int) -> BlockTable:
    """Large ragged rectangles over the first third of ``n`` positions, and a fleet of regions of five in the rest.

    Some rows see nothing, some several segments; the second segment has two rectangles, the last large read replaces.
    """
    large = n // 3
    third = large // 3
    # edge, weight, rows, keys; no two rectangles overlap, so the same pattern is a joint one
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


def run_task(task: Task, device: str) -> dict:
    """Errors, budgets and faults of one task as plain values. Every launch of the task's configurations is made."""
    table = mixed_table(task.form, task.positions)
    q, k, v, grad_out = _inputs(task, device)
    gain = torch.tensor([1.2, -0.7, 0.0, 0.9], device=device) if task.gained else None
    active = torch.tensor([1.0, 1.0, 1.0, 0.0], device=device) if task.gained else None
    scales = None if task.form == "joint" else row_scale(table, active, torch.float32, torch.device(device))
    options = dict(scale=task.head_dim**-0.5, gain=gain, active=active, row_scale=scales)

    def compute():
        sigmoid = task.form == "sigmoid"
        out, lse, kept = launch.forward(q, k, v, table, sigmoid=sigmoid, **options)
        gradients, dgain = launch.backward(
            grad_out, q, k, v, kept, lse, table, sigmoid=sigmoid, **options, need_gain=task.gained
        )
        return dict(zip(RESULTS, (out, *gradients, dgain)))

    with replaced(task.candidate):
        found, again = compute(), compute()
    faults = [f"{name}: two runs differ" for name in RESULTS if not _same(found[name], again[name])]
    faults += _unused(table, task, device) if device == "cuda" and task.candidate is None else []
    options["activation"] = "sigmoid" if task.form == "sigmoid" else "softmax"
    exact = _with_gradients(_reference, torch.float64, q, k, v, grad_out, table, options)
    plain = None
    if task.dtype != torch.float32:
        plain = _with_gradients(_dense, task.dtype, q, k, v, grad_out, table, options)
    errors, budgets = {}, {}
    for name, wanted in exact.items():
        errors[name] = _error(found[name], wanted)
        # a handful of gains can agree by luck: one unit in the last place is granted
        floor = torch.finfo(task.dtype).eps if name == "dgain" else 0.0
        budgets[name] = FLOAT32_BUDGET if plain is None else max(2 * _error(plain[name], wanted), floor)
    return _described(task) | {"errors": errors, "budgets": budgets, "faults": faults + over_budget(errors, budgets)}


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


def over_budget(errors: dict[str, float], budgets: dict[str, float]) -> list[str]:
    """The results whose errors are not within their budgets, in words."""
    wrong = (name for name, error in errors.items() if not error <= budgets[name])
    return [f"{name}: error {errors[name]:.2e} over {budgets[name]:.2e}" for name in wrong]


def check_module(ours: nn.Module, loop: PerEdgeLoop, x: torch.Tensor, dtype: torch.dtype) -> dict:
    """Errors, budgets and faults of the output and of all gradients of ``ours``, (B, N, d_model) to the same, against
    ``loop`` in float64, which has the same parameters. In 16 bits both run under autocast, and ours may be twice as far
    off as the loop is."""
    # positions that pass through are larger than those that are computed, and would hide their errors
    upstream = torch.randn_like(x) * loop.covered
    exact = _module_results(copy.deepcopy(loop).double(), x.double(), upstream, torch.float64)
    # a key bias shifts every score of a row alike: its gradient is zero, and its weight's gives the scale
    scales = {name: exact[name.replace("k_proj.bias", "k_proj.weight")] for name in exact}
    scales["out"] = exact["out"] * loop.covered

    def errors_in(module: nn.Module) -> dict[str, float]:
        found = _module_results(module, x, upstream, dtype)
        return {name: _error(found[name], wanted, scales[name]) for name, wanted in exact.items()}

    errors = errors_in(ours)
    budgets = dict.fromkeys(errors, FLOAT32_BUDGET)
    if dtype != torch.float32:
        # a correct rounding is let through
        budgets = {name: max(2 * error, torch.finfo(dtype).eps / 2) for name, error in errors_in(loop).items()}
    return {"errors": errors, "budgets": budgets, "faults": over_budget(errors, budgets)}


def _module_results(module: nn.Module, x: torch.Tensor, upstream: torch.Tensor, dtype) -> dict[str, torch.Tensor]:
    leaves = {"x": x.detach().clone().requires_grad_(), **dict(module.named_parameters())}
    with torch.autocast(x.device.type, dtype, enabled=dtype.itemsize == 2):
        out = module(leaves["x"])
    gradients = torch.autograd.grad(out, list(leaves.values()), upstream.to(out.dtype))
    return {"out": out.detach(), **dict(zip(leaves, gradients))}


def same_results(found: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> dict:
    """Errors, budgets and faults of the output and the gradients of q, k and v by some tiles against those by others:
    of 16 bits they may be two units in the last place of the largest apart."""
    errors = {name: _error(a, b) for name, a, b in zip(RESULTS, found, wanted)}
    dtype = wanted[0].dtype
    budgets = dict.fromkeys(errors, FLOAT32_BUDGET if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)
    return {"errors": errors, "budgets": budgets, "faults": over_budget(errors, budgets)}


def _described(task: Task) -> dict:
    plain = {name: value for name, value in task._asdict().items() if name != "candidate"}
    return plain | {"dtype": str(task.dtype).removeprefix("torch.")}


def run_apart(
    chosen: list[Task],
    device: str,
    seconds: float,
    on_row: Callable[[Task, dict], None],
    run: Callable[[Task, str], dict] = run_task,
    workers: int | None = None,
) -> list[Task]:
    """Calls ``on_row`` with each task's row as it comes, from several processes: compiling takes most of the time.

    A process ends with a task that raises, for the device may be of no more use to it, dies, or has no result after
    ``seconds``. Such a task's row has that fault; the next one gets a new process.

    Returns:
        The tasks that were not begun in time; they have no row.
    """
    context, own, started = get_context("spawn"), threading.local(), []
    until, telling = time.perf_counter() + seconds, threading.Lock()

    def row_of(task: Task) -> bool:
        """Whether there was time for it."""
        left = until - time.perf_counter()
        if left <= 0:
            return False
        if getattr(own, "process", None) is None:
            own.pipe, other = context.Pipe()
            own.process = context.Process(target=_serve, args=(other, device, run), daemon=True)
            own.process.start()
            other.close()
            started.append(own.process)
        try:
            own.pipe.send(task)
            row = own.pipe.recv() if own.pipe.poll(left) else f"no result after {left:.0f} s"
        except (EOFError, OSError):
            row = "its process died"
        if isinstance(row, str):
            own.process.kill()
            own.process, row = None, _described(task) | {"errors": {}, "budgets": {}, "faults": [row]}
        with telling:
            on_row(task, row)
        return True

    with ThreadPoolExecutor(workers or min(14, os.cpu_count() or 1)) as threads:
        begun = list(threads.map(row_of, chosen))
    for process in started:
        process.kill()
    return [task for task, was_begun in zip(chosen, begun) if not was_begun]


def _serve(pipe: Connection, device: str, run: Callable[[Task, str], dict]) -> None:
    """Answers tasks with rows, and the first one that raises with what it raised."""
    while True:
        task = pipe.recv()
        try:
            pipe.send(run(task, device))
        except Exception as cause:
            pipe.send(f"{type(cause).__name__}: {str(cause)[:300]}")
            return


def _unused(table: BlockTable, task: Task, device: str) -> list[str]:
    """Configurations that the table gives no tile: they would pass unseen."""
    missing, form = [], configs.form_of(table, task.form == "sigmoid")
    stages = ("forward", "delta", "dq", "dkv") if form == "in_place" else ("forward", "dq", "dkv")
    for stage in stages:
        found = configs.lookup(launch.arch_of(torch.device(device)), task.head_dim, task.dtype, stage, form)
        by_slot = (stage, form) == ("forward", "edge")
        tilings = table.device_tilings(device, configs.classes(found), stage == "dkv", by_slot)
        used = {(tiling.block_m, tiling.block_n) for tiling in tilings}
        missing += [f"{stage}: {c.block_m} × {c.block_n} not run" for c in found if (c.block_m, c.block_n) not in used]
    return missing


def _with_gradients(attend, dtype, q, k, v, grad_out, table, options) -> dict[str, torch.Tensor]:
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    options = dict(options)
    if options["gain"] is not None:
        options["gain"] = options["gain"].to(dtype).requires_grad_()
        leaves.append(options["gain"])
    out = attend(*leaves[:3], table, options)
    return dict(zip(RESULTS, (out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(dtype)))))


def _reference(q, k, v, table, options):
    return reference.attention(q, k, v, table, **options)[0]


def _dense(q, k, v, table, options):
    """The plain implementation whose rounding sets the budget: dense, in the inputs' dtype, segment by segment."""
    out = torch.zeros_like(q)
    for segment in range(int(table.segment.max()) + 1):
        rectangles = np.flatnonzero(table.segment == segment)
        edge, kind = int(table.edge[rectangles[0]]), int(table.replace[rectangles[0]])
        if options["active"] is not None and not options["active"][edge]:
            continue
        first, last = int(table.q_start[rectangles].min()), int(table.q_stop[rectangles].max())
        weight = torch.zeros(last - first, table.n_positions, device=q.device)
        for r in rectangles:
            rows = slice(table.q_start[r] - first, table.q_stop[r] - first)
            weight[rows, table.k_start[r] : table.k_stop[r]] = float(table.weight[r])
        logits = options["scale"] * (q[:, :, first:last] @ k.transpose(-1, -2))
        logits = logits.masked_fill(weight == 0, torch.finfo(q.dtype).min)
        activate = torch.sigmoid if options["activation"] == "sigmoid" else functools.partial(torch.softmax, dim=-1)
        factor = (weight > 0).any(1).to(q.dtype)
        if table.form == "joint":
            logits = logits + torch.where(weight > 0, weight, 1.0).log().to(q.dtype)
        else:
            factor = factor * (table.weight[rectangles[0]] * options["row_scale"][kind, first:last]).to(q.dtype)
            factor = factor if options["gain"] is None else factor * options["gain"][edge]
        rows = torch.arange(first, last, device=q.device)
        out = out.index_add(2, rows, factor[:, None] * (activate(logits) @ v))
    return out


def _same(a, b) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def _error(found: torch.Tensor, wanted: torch.Tensor, scale: torch.Tensor | None = None) -> float:
    """max |difference| / max |scale|, which is ``wanted`` unless told otherwise; infinite where NaN."""
    error = ((found.double() - wanted).abs().max() / (wanted if scale is None else scale).abs().max()).item()
    return math.inf if math.isnan(error) else error
