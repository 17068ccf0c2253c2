"""What compiling a plan costs: ``python -m benchmarks.plan_cost``, or ``make bench``.

Cold times of ``compile_attention`` (fresh declaration, empty caches) and, in a run of their own because tracing slows
Python down, the peak of memory held: far below N bytes squared, whatever the canvas.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from rich.table import Table

from benchmarks import measure
from benchmarks.cases import causal_video, computer_use, long_video, multi_rate, robot
from canvas_engineering.connectivity import resolve_frames
from canvas_engineering.plan import compile_attention

CASES: dict[str, tuple[Callable, float | None]] = {
    "robot": (robot, None),
    "causal_video": (causal_video, None),
    "multi_rate": (multi_rate, None),
    "computer_use": (computer_use, 0.050),
    **{f"video of {frames} frames": (partial(long_video, frames), None) for frames in (16, 32, 64, 128)},
    "video of 256 frames": (partial(long_video, 256), 1.0),
}
"""Name to (declaration, most seconds that a cold compile may take)."""


def compile_cold(declare: Callable) -> tuple[object, float]:
    """A plan and the seconds it took with nothing cached."""
    layout, topology = declare()
    compile_attention.cache_clear()
    resolve_frames.cache_clear()
    gc.collect()
    start = time.perf_counter()
    plan = compile_attention(layout, topology)
    return plan, time.perf_counter() - start


def run_case(name: str, declare: Callable, at_most: float | None, rounds: int) -> dict:
    """Times over ``rounds``, then one traced compile for the peak."""
    seconds = np.array([compile_cold(declare)[1] for _ in range(rounds)])
    tracemalloc.start()
    plan, _ = compile_cold(declare)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    layout, topology = declare()
    start = time.perf_counter()
    assert compile_attention(layout, topology) is plan
    cached = time.perf_counter() - start
    return {
        "case": name,
        "positions": layout.num_positions,
        "rectangles": len(plan.table.weight),
        "seconds": measure.quantiles(seconds),
        "cached_seconds": cached,
        "at_most": at_most,
        "peak_bytes": int(peak),
        "rounds": rounds,
        **measure.environment(),
    }


def table(rows: list[dict]) -> Table:
    """Cold and cached times, peak memory, and the limit."""
    result = Table(title="compile_attention, cold")
    for column in ("case", "positions", "rectangles", "median ms", "p90 ms", "cached ms", "peak MB", "at most ms"):
        result.add_column(column, justify="left" if column == "case" else "right")
    for row in rows:
        median, limit = row["seconds"]["p50"], row["at_most"]
        met = "" if limit is None else f"{limit * 1e3:g} {'kept' if median <= limit else 'MISSED'}"
        times = (f"{seconds * 1e3:.2f}" for seconds in (median, row["seconds"]["p90"], row["cached_seconds"]))
        counts = (f"{row[key]:,}" for key in ("positions", "rectangles"))
        result.add_row(row["case"], *counts, *times, f"{row['peak_bytes'] / 1e6:.2f}", met)
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_cost", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "plan_cost.json")
    options = parser.parse_args(argv)
    compile_cold(robot)  # the first call of a process also pays for lazy imports
    rows = [run_case(name, declare, at_most, options.rounds) for name, (declare, at_most) in CASES.items()]
    console = measure.console()
    console.print(table(rows))
    measure.write_rows(rows, options.out)
    console.print(f"rows: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
