"""Measures what :mod:`canvas_kernels.costs` counts on this machine's processor, and how well that predicts the cases.

    python -m benchmarks.rates                measures synthetic tables, fits, writes the entry of this processor
    python -m benchmarks.rates --check        predicts and measures the cases of ``cases.py``; rows to results/
    python -m benchmarks.rates --rows ROWS    writes the entry of the GPU that made the rows (:mod:`.gpu_rates`)

Times are the thread's own processor time, on one thread, and each is divided by that of a reference made around it,
relative to the reference's quiet moments: what is meant is this device, undisturbed. The fit sees no case.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import gc
import json
import operator
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import cases, measure
from canvas_engineering.attention import canvas_attention
from canvas_engineering.plan import AttentionPlan, compile_attention
from canvas_kernels import BlockTable, block_attention, costs, grouping, rectangles
from canvas_kernels.rows import put_rows, take_rows
from canvas_kernels.work import Work

SECONDS = 240.0
BOUND = 0.25
# quantile of the reference's times that counts as undisturbed
QUIET = 0.1
ROUNDS = 3
RUNS = 2
WAYS = ("batches", "slabs", "flash")
HEAD_DIM = 64
SHORT_SECONDS = 2e-2
RUN = 16
# elements whose bytes are as many as glibc lets its thresholds grow to
LARGE_TENSOR = 31 << 18
RESULTS = measure.RESULTS / "estimate.json"


class Timed(NamedTuple):
    """A call that is timed. ``step`` gives seconds of a forward and of a backward; ``work`` what they do."""

    step: Callable[[], tuple[float, float]]
    work: Work | None


# -- synthetic tables --------------------------------------------------------------------------------------------------


def beside(cells: int, rows: int, keys: int) -> BlockTable:
    """Cells in a row, each its rows and then its keys."""
    start = np.arange(cells) * (rows + keys)
    return _table(cells * (rows + keys), start, rows, start + rows, keys)


def frames(cells: int, size: int) -> BlockTable:
    """Frames that read themselves."""
    start = np.arange(cells) * size
    return _table(cells * size, start, size, start, size)


def different(cells: int, rows: int, keys: int) -> BlockTable:
    """Cells of slightly different shapes, so that each is its own slab."""
    number = np.arange(cells)
    rows, keys = rows + number % 3, keys + number
    start = np.cumsum(rows + keys) - rows - keys
    return _table(int((rows + keys).sum()), start, rows, start + rows, keys)


def crossed(cells: int, rows: int, keys: int) -> BlockTable:
    """Equal cells whose keys lie in the opposite order of their rows, so that each is its own slab."""
    number = np.arange(cells)
    return _table(cells * (rows + keys), number * rows, rows, cells * rows + number[::-1] * keys, keys)


def scattered(cells: int, rows: int, keys: int, n: int, shapes: int = 1) -> BlockTable:
    """Cells at no regular distance, which makes them a batch for each of their ``shapes``."""
    generator = np.random.default_rng(0)
    wide = 3 ** (shapes - 1) * max(rows, keys)
    grow = 3 ** (np.arange(cells) % shapes)
    places = [generator.choice(n // size, cells, replace=cells > n // size) * size for size in (rows, keys)]
    if shapes > 1:
        places = [generator.choice(n // wide, cells, replace=False) * wide for _ in range(2)]
    return _table(n, np.sort(places[0]), rows * grow, places[1], keys * grow)


def apart(pieces: int, rows: int, keys: int) -> BlockTable:
    """One read of scattered pieces of keys by scattered pieces of rows."""
    step = 2 * max(rows, keys)
    q_start, k_start = (x.reshape(-1) for x in np.meshgrid(*2 * [np.arange(pieces) * step], indexing="ij"))
    return _table(pieces * step, q_start, rows, k_start + rows, keys, np.zeros(pieces**2, np.int64))


def again(cells: int, rows: int, keys: int) -> BlockTable:
    """Reads of their own keys by the same rows, each after the first added to what is there."""
    return _table(rows + cells * keys, np.zeros(cells, np.int64), rows, rows + np.arange(cells) * keys, keys)


def sliding(cells: int, rows: int, keys: int) -> BlockTable:
    """Reads of ever more keys whose rows overlap by a quarter, so that those of one slab are in one read or in two."""
    number, step = np.arange(cells), 3 * rows // 4
    start = rows + cells * step + np.cumsum(keys + number) - keys - number
    return _table(int(start[-1] + keys + cells), number * step, rows, start, keys + number)


def weighted(cells: int, rows: int, keys: int) -> BlockTable:
    """Joint form, keys of two weights: addends to the logits."""
    start = np.repeat(np.arange(cells) * (rows + 2 * keys), 2)
    k_start = start + rows + np.tile([0, keys], cells)
    places = {"q_start": start, "q_stop": start + rows, "k_start": k_start, "k_stop": k_start + keys}
    weight = np.tile(np.array([1.0, 0.5], np.float32), cells)
    return BlockTable.from_rectangles("joint", cells * (rows + 2 * keys), 0, **places, weight=weight)


def one_way(table: BlockTable, way: str) -> BlockTable:
    """The same cells, all in "slabs", all in "batches" or all in slabs that take the "flash" kernel, whatever rates
    say: where cells are grouped by rates alone, the other way is never measured, and slabs, batches and calls come
    and go together."""
    places = {name: getattr(table, name) for name in ("q_start", "q_stop", "k_start", "k_stop", "segment", "edge")}
    # positions that nobody reads make it a table of its own
    n = table.n_positions + 1 + WAYS.index(way)
    found = BlockTable.from_rectangles(table.form, n, table.n_edges, weight=table.weight, **places)
    free = dict.fromkeys(("slab", "flash_slab"), 1e9 if way == "batches" else -1e9)
    with mock.patch.object(costs, "choosing", functools.partial(operator.or_, costs.choosing(), free)):
        grouping.group(found)
    if way == "flash":
        with mock.patch.object(grouping, "MOST_KEPT", 0):
            assert all(rectangles.choices(found, HEAD_DIM).flash)
    return found


def _table(n, q_start, rows, k_start, keys, segment=None) -> BlockTable:
    number = np.arange(len(q_start)) if segment is None else segment
    places = {"q_start": q_start, "q_stop": q_start + rows, "k_start": k_start, "k_stop": k_start + keys}
    weight, edge = np.ones(len(q_start), np.float32), np.zeros(len(q_start), np.int64)
    return BlockTable.from_rectangles("edge", n, 1, **places, weight=weight, edge=edge, segment=number)


def synthetic() -> list[Timed]:
    """Calls that differ in what they do."""
    tables = [beside(*shape) for shape in ((1, 8, 8), (1, 64, 64), (1, 256, 256), (1, 180, 30), (1, 30, 180))]
    tables += [beside(*shape) for shape in ((1, 8, 512), (1, 512, 8), (1, 1024, 1024), (2, 2048, 256), (4, 300, 700))]
    tables += [beside(*shape) for shape in ((16, 64, 64), (50, 16, 16), (200, 8, 8), (16, 8, 128), (16, 128, 8))]
    tables += [beside(*shape) for shape in ((8, 1, 64), (64, 4, 20), (16, 40, 200), (16, 200, 40))]
    tables += [frames(*shape) for shape in ((50, 84), (100, 42), (16, 256), (8, 512), (2, 1500))]
    tables += [frames(*shape) for shape in ((500, 8), (200, 20), (128, 32), (60, 64), (20, 200), (4, 700), (1, 2500))]
    tables += [different(*shape) for shape in ((4, 16, 16), (12, 40, 40), (8, 64, 64), (16, 100, 100), (16, 256, 512))]
    tables += [scattered(*shape) for shape in ((20, 8, 8, 400), (100, 8, 8, 2000), (400, 4, 4, 4000))]
    tables += [scattered(*shape) for shape in ((30, 32, 32, 2000), (50, 16, 64, 4000), (200, 2, 16, 4000))]
    tables += [scattered(*shape) for shape in ((60, 2, 8, 6000, 3), (30, 8, 4, 4000, 3), (100, 4, 4, 4000, 2))]
    tables += [apart(*shape) for shape in ((2, 40, 40), (3, 100, 60), (5, 64, 20), (2, 400, 400))]
    tables += [weighted(*shape) for shape in ((1, 60, 40), (16, 64, 64), (4, 400, 300), (2, 1000, 500))]
    large = [beside(*shape) for shape in ((1, 4096, 1024), (1, 226, 8192), (12, 384, 400), (64, 128, 256))]
    large += [frames(2, 4096), frames(64, 256), different(12, 320, 384), apart(3, 700, 500), weighted(8, 350, 400)]
    found = [timed(table, heads) for table in tables for heads in (1, 4)]
    found += [timed(table, 2) for table in large]
    # products and softmaxes are told apart by the width of a head
    found += [timed(table, 2, head_dim) for table in (*tables[1::3], *large[1::2]) for head_dim in (32, 128)]
    found += [timed(table, 4, outside=size * table.n_positions) for table in tables[1::4] for size in (1, 2)]
    small = [crossed(*shape) for shape in ((4, 8, 8), (24, 8, 8), (24, 40, 40), (12, 16, 64), (12, 64, 16))]
    small += [crossed(8, 96, 96), *(scattered(40, *shape) for shape in ((8, 8, 2000), (32, 32, 4000), (8, 40, 4000)))]
    found += [timed(one_way(table, way), heads) for table in small for way in WAYS[:2] for heads in (1, 4)]
    several = [again(*shape) for shape in ((16, 40, 16), (16, 120, 24), (8, 24, 120), (4, 256, 256))]
    several += [sliding(*shape) for shape in ((16, 20, 8), (16, 40, 16), (12, 120, 24), (8, 24, 120), (4, 256, 256))]
    found += [timed(one_way(table, "slabs"), heads) for table in several for heads in (1, 4)]
    found += [timed(one_way(again(4, 256, 384), "flash"), heads) for heads in (1, 4)]
    middle = [crossed(*shape) for shape in ((4, 192, 224), (24, 192, 224), (48, 256, 512), (8, 384, 384))]
    middle += [crossed(32, 256, 256), *(beside(24, *shape) for shape in ((192, 224), (256, 512)))]
    found += [timed(one_way(table, way), heads) for table in middle for way in WAYS[1:] for heads in (1, 2)]
    lengths = ((24, 64, 512), (24, 128, 320), (24, 448, 480), (12, 440, 960), (10, 700, 700), (16, 192, 640))
    found += [timed(one_way(beside(*shape), "flash"), heads) for shape in lengths for heads in (1, 4)]
    found += [timed(table, 4, dtype=torch.bfloat16) for table in tables[1::6]]
    # whatever else is done, large tensors wait for their memory
    found += [timed(frames(256, 256), 1), timed(frames(512, 128), 2), timed(frames(1000, 40), 4, outside=40_000)]
    return found + [timed(beside(40, 200, 300), 4, outside=50_000), timed(frames(700, 20), 8, outside=30_000)]


def timed(
    table: BlockTable, heads: int, head_dim: int = HEAD_DIM, outside: int | None = None, dtype=torch.float32
) -> Timed:
    """Attention over the table, on random inputs; ``outside``: on rows taken from so many positions and put back."""
    n = table.n_positions
    if outside:
        # packed order moves runs of rows, not single ones
        runs = torch.randperm(-(-outside // RUN), generator=torch.Generator().manual_seed(0))
        order = (runs[:, None] * RUN + torch.arange(RUN)).flatten()
        order = order[order < outside][:n]

    def call(q, k, v):
        if outside:
            q, k, v = (take_rows(x, order) for x in (q, k, v))
        out = block_attention(q, k, v, table, backend="torch")
        return put_rows(out, order, outside) if outside else out

    work = Work(table, heads, head_dim, outside, dtype != torch.float32, dtype.itemsize)
    return Timed(_step(call, outside or n, heads, head_dim, dtype), work)


def _step(call, n: int, heads: int, head_dim: int, dtype=torch.float32) -> Callable[[], tuple[float, float]]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, n, heads, head_dim)
    *leaves, upstream = (torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for _ in range(4))
    leaves = [x.requires_grad_() for x in leaves]

    def step() -> tuple[float, float]:
        start = time.thread_time()
        out = call(*leaves)
        middle = time.thread_time()
        torch.autograd.grad(out, leaves, upstream)
        return middle - start, time.thread_time() - middle

    return step


# -- measuring ---------------------------------------------------------------------------------------------------------


def measured(calls: list[Timed], seconds: float, what: str, quiet: float | None = None) -> tuple[np.ndarray, float]:
    """[calls, 2], median seconds of forward and backward in about ``seconds`` of rounds in which all take turns, and
    the seconds of the reference that they are relative to: ``quiet``, or what it takes in this run's quiet moments."""
    from rich.progress import Progress

    # malloc keeps more for the next tensor once a large one was freed: as in any process that has run for a while
    torch.empty(LARGE_TENSOR)
    reference, times = reference_call(), [[] for _ in calls]
    for call in calls:
        call.step()
    with Progress(console=measure.console()) as bar:
        task = bar.add_task(what, total=seconds)
        began = time.perf_counter()
        while (past := time.perf_counter() - began) < seconds or len(times[-1]) < ROUNDS:
            bar.update(task, completed=min(past, seconds))
            for call, own in zip(calls, times):
                before, several = reference(), []
                while not several or np.sum(several) < SHORT_SECONDS:
                    several.append(call.step())
                own.append([*np.median(several, 0), (before + reference()) / 2])
    quiet = quiet or float(np.quantile([row[2] for own in times for row in own], QUIET))
    return np.array([np.median(np.array(own)[:, :2] / np.array(own)[:, 2:] * quiet, 0) for own in times]), quiet


def reference_call() -> Callable[[], float]:
    """Gives the seconds of something of everything that attention does: products, softmaxes, the flash kernel, copies
    and calls."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(shape, generator=generator) for shape in ((1, 4, 256, 64), (32, 64, 64)))
    pairs, rows, copy = torch.randn(32, 128, 128, generator=generator), torch.randn(1 << 20, generator=generator), None

    def call() -> float:
        nonlocal copy
        start = time.thread_time()
        F.scaled_dot_product_attention(q, q, q)
        torch.bmm(k, k)
        torch.softmax(pairs, -1)
        copy = rows.clone()
        for _ in range(100):
            k[0].add(1.0)
        return time.thread_time() - start

    return call


# -- fitting -----------------------------------------------------------------------------------------------------------


def fit(counts: list[dict], seconds: np.ndarray, names: Iterable = tuple(costs.COUNTS)) -> dict:
    """Seconds of each count, none negative, that give ``seconds`` with the least relative errors; large ones weigh
    less."""
    matrix = np.array([[float(row.get(name, 0)) for name in names] for row in counts]) / seconds[:, None]
    scale = np.where(matrix.any(0), matrix.max(0), 1.0)
    weight = np.ones(len(seconds))
    for _ in range(20):
        rates = non_negative(matrix / scale * weight[:, None], weight) / scale
        weight = 1 / np.sqrt(np.maximum(np.abs(matrix @ rates - 1), 0.05) / 0.05)
    return {name: float(f"{rate:.4g}") for name, rate in zip(names, rates)}


def non_negative(matrix: np.ndarray, target: np.ndarray, sweeps: int = 3000) -> np.ndarray:
    """x ≥ 0 with the least ‖matrix x − target‖, column by column until nothing changes."""
    gram, goal, x = matrix.T @ matrix, matrix.T @ target, np.zeros(matrix.shape[1])
    columns = np.flatnonzero(gram.diagonal())
    for _ in range(sweeps):
        before = x.copy()
        for j in columns:
            x[j] = max(0.0, x[j] + (goal[j] - gram[j] @ x) / gram[j, j])
        if np.abs(x - before).max() <= 1e-9 * x.max():
            break
    return x


def entry(seconds: float, runs: int) -> dict:
    """The rates of this processor."""
    calls, times, quiets = synthetic(), [], []
    for run in range(runs):
        own, quiet = measured(calls, seconds, f"synthetic tables, run {run + 1} of {runs}")
        times.append(own / quiet)
        quiets.append(quiet)
    quiet = min(quiets)
    times = np.concatenate(times) * quiet
    found = {"date": datetime.date.today().isoformat(), "torch": torch.__version__}
    found["how"] = f"python -m benchmarks.rates: {len(calls)} synthetic tables, {runs} runs, float32, one thread"
    found["reference_seconds"] = quiet
    for part, name in enumerate(("forward", "backward")):
        counts = [call.work.counts(bool(part)) for call in calls] * runs
        found[name] = fit(counts, times[:, part])
        error = np.abs(np.array([costs.seconds(row, found[name]) for row in counts]) / times[:, part] - 1)
        print(f"{name}: half of the fit is off by up to {np.median(error):.1%}, 90 % by {np.quantile(error, 0.9):.1%}")
    return found


# -- checking ----------------------------------------------------------------------------------------------------------


def check(seconds: float) -> list[dict]:
    """Rows of every case in both forms: what is predicted and what is measured."""
    key, rows = costs.processor_key(1), []
    rates = costs.all_rates()[key]
    for case in cases.CPU:
        plans = {form: plan_of(case, form) for form in ("joint", "edge")}
        calls = [_case_call(case, plan) for plan in plans.values()]
        times, _ = measured(calls, seconds / len(cases.CPU), case.name, rates["reference_seconds"])
        for (form, plan), measured_seconds in zip(plans.items(), times):
            predicted = plan.estimate("cpu", **shape_of(case))
            rows.append({"case": case.name, "form": form, "rates": key})
            found = [*measured_seconds, peak_bytes(case, plan)]
            for name, value in zip(("forward_seconds", "backward_seconds", "peak_bytes"), found):
                rows[-1][name] = float(f"{value:.4g}")
                rows[-1][f"predicted_{name}"] = float(f"{getattr(predicted, name):.4g}")
        gc.collect()
    return rows


def plan_of(case: cases.Case, form: str) -> AttentionPlan:
    """The case's plan over its tokens."""
    layout, topology = case.declare()
    plan = compile_attention(layout, topology, normalize=form)
    if not case.sequence:
        return plan
    return plan.over(np.concatenate([layout.region_index(region).numpy() for region in case.sequence]))


def shape_of(case: cases.Case) -> dict[str, int]:
    """What :meth:`AttentionPlan.estimate` wants to know of the tensors."""
    return {"batch": case.batch, "heads": case.heads, "head_dim": case.head_dim}


def _case_call(case: cases.Case, plan: AttentionPlan) -> Timed:
    def call(q, k, v):
        return canvas_attention(q, k, v, plan)

    return Timed(_step(call, plan.n_positions, case.heads, case.head_dim), None)


def peak_bytes(case: cases.Case, plan: AttentionPlan) -> int:
    """The most that tensors hold during a forward and backward, beyond the inputs."""
    step = _case_call(case, plan).step
    # what is made once for a table is no part of a call
    step()
    return measure.tensor_bytes(step)


def show(rows: list[dict]) -> None:
    """A table of the errors."""
    from rich.table import Table

    table = Table("case", "form")
    for what in ("forward, ms", "backward, ms", "peak, MiB"):
        for column in (what, "predicted", "error"):
            table.add_column(column, justify="right")
    for row in rows:
        cells = []
        for name, unit in (("forward_seconds", 1e-3), ("backward_seconds", 1e-3), ("peak_bytes", 2**20)):
            found, predicted = row[name], row[f"predicted_{name}"]
            cells += [f"{found / unit:.2f}", f"{predicted / unit:.2f}", f"{predicted / found - 1:+.0%}"]
        table.add_row(row["case"], row["form"], *cells)
    measure.console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of a run, and of the check")
    parser.add_argument("--runs", type=int, default=RUNS, help="of all tables: what surrounds the machine changes")
    parser.add_argument("--rows", type=Path, help="fit the GPU that made these rows: OUT/timings.jsonl of `make gpu`")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.check:
        rows = check(options.seconds)
        show(rows)
        measure.write_rows([row | measure.environment() for row in rows], RESULTS)
        return
    if options.rows:
        from benchmarks import gpu_rates

        try:
            name, found, told = gpu_rates.entry(measure.read_rows(options.rows))
        except (ValueError, OSError) as cause:
            parser.error(str(cause))
        gpu_rates.show(told)
    else:
        name, found = costs.processor_key(1), entry(options.seconds, options.runs)
    save(name, found)


def save(name: str, found: dict) -> None:
    """Writes a device's entry."""
    unfinished = costs.RATES.with_suffix(".partial")
    unfinished.write_text(json.dumps(json.loads(costs.RATES.read_text()) | {name: found}, indent=1) + "\n")
    os.replace(unfinished, costs.RATES)
    print(f"{name}: written to {costs.RATES}")


if __name__ == "__main__":
    main()
