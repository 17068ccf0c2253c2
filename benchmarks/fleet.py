"""Fleets of typed vehicles: what compiling them costs, and one step against the per-edge loop.

``python -m benchmarks.fleet`` compiles fleets of 1,250 to 10,000 vehicles (each with its coarse field), twice as many
each time, and then times forward + backward of 50 vehicles (T=4, d_model 256, 4 heads, batch 1, one thread, float32)
against the loop over their 1,351 connections. The loop scatters a full-canvas gradient per connection and takes minutes
for one step; a fleet of three vehicles is held against it in float64 first.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import measure
from benchmarks.dispatcher import Disagreement, gate
from benchmarks.naive import PerEdgeLoop
from canvas_engineering import AttentionDispatcher, compile_attention
from canvas_engineering.connectivity import resolve_frames
from examples.fleet import declare

SERIES = (1_250, 2_500, 5_000, 10_000)
MOST_SECONDS = 5.0
"""What compiling the schema of the largest fleet may take, and its plan again."""
AT_LEAST = 40.0
"""The least ratio of the per-edge loop's time to ours."""
FRAMES, D_MODEL, HEADS, VEHICLES = 4, 256, 4, 50


def compile_fleet(n_vehicles: int) -> dict[str, int | float]:
    """Sizes, and wall and CPU seconds, of a fleet's schema and of its plan, with nothing cached."""
    compile_attention.cache_clear()
    resolve_frames.cache_clear()
    row: dict[str, int | float] = {"vehicles": n_vehicles}
    clocks = time.perf_counter(), time.process_time()
    bound = declare(n_vehicles)
    row["schema_seconds"], row["schema_cpu_seconds"] = time.perf_counter() - clocks[0], time.process_time() - clocks[1]
    clocks = time.perf_counter(), time.process_time()
    plan = compile_attention(bound.layout, bound.topology)
    row["plan_seconds"], row["plan_cpu_seconds"] = time.perf_counter() - clocks[0], time.process_time() - clocks[1]
    row["fields"], row["connections"] = len(bound.field_names), len(bound.topology.connections)
    row["positions"], row["rectangles"] = bound.layout.num_positions, len(plan.table.weight)
    return row


def contestants(n_vehicles: int) -> tuple[dict[str, torch.nn.Module], torch.Tensor]:
    """The dispatcher and the loop with the same parameters, and an input (1, N, 256)."""
    bound = declare(n_vehicles, T=FRAMES, d_model=D_MODEL)
    torch.manual_seed(0)
    ours = AttentionDispatcher(bound.topology, bound.layout, D_MODEL, HEADS)
    loop = PerEdgeLoop(bound.topology, bound.layout, D_MODEL, HEADS)
    loop.load_state_dict(ours.state_dict())
    return {"ours": ours, "per_edge_loop": loop}, torch.randn(1, bound.layout.num_positions, D_MODEL)


def step_times(n_vehicles: int, rounds: int) -> list[dict]:
    """Gate on three vehicles, then interleaved rounds of forward + backward, our first one to warm up."""
    worst = gate(*contestants(3))
    modules, x = contestants(n_vehicles)
    upstream = torch.randn(x.shape)
    x.requires_grad_()

    steps = {name: measure.step(module, x, upstream=upstream) for name, module in modules.items()}
    steps["ours"]()
    # The loop's minutes need no warm-up of their own.
    times = measure.interleave(steps, rounds, warm_up=0)
    return [
        {
            "case": f"fleet of {n_vehicles}",
            "contestant": name,
            "positions": x.shape[1],
            "seconds": measure.quantiles(seconds),
            "ratio_of_medians": float(np.median(seconds) / np.median(times["ours"])),
            "at_least": AT_LEAST if name == "per_edge_loop" else None,
            "rounds": rounds,
            "worst_error": worst[name],
            **measure.environment(),
        }
        for name, seconds in times.items()
    ]


def compile_table(rows: list[dict]) -> Table:
    """Seconds, and microseconds per field: the same down the table where the cost is linear."""
    result = Table(title="compiling a fleet, CPU seconds")
    for column in ("vehicles", "fields", "connections", "schema s", "plan s", "µs per field"):
        result.add_column(column, justify="right")
    for row in rows:
        counts = (f"{row[key]:,}" for key in ("vehicles", "fields", "connections"))
        seconds = row["schema_cpu_seconds"], row["plan_cpu_seconds"]
        result.add_row(*counts, *(f"{s:.2f}" for s in seconds), f"{sum(seconds) / row['fields'] * 1e6:.0f}")
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fleet", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1, help="steps of each contestant; 0 leaves the steps out")
    parser.add_argument("--vehicles", type=int, default=VEHICLES, help="of the fleet whose step is timed")
    parser.add_argument("--series", type=int, nargs="*", default=SERIES, help="sizes of the fleets that are compiled")
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "fleet.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    console, missed = Console(), False
    compile_fleet(10)  # the first compile of a process also pays for lazy imports
    rows = [{**compile_fleet(n), "at_most": MOST_SECONDS, **measure.environment()} for n in options.series]
    if rows:
        console.print(compile_table(rows))
        missed = max(rows[-1]["schema_cpu_seconds"], rows[-1]["plan_cpu_seconds"]) > MOST_SECONDS
    if options.rounds:
        try:
            steps = step_times(options.vehicles, options.rounds)
        except Disagreement as cause:
            console.print(f"[red]{cause}")
            return 1
        for row in steps:
            console.print(f"{row['case']}, {row['contestant']}: {row['seconds']['p50']:.2f} s a step")
        ratio = steps[-1]["ratio_of_medians"]
        console.print(f"the loop takes {ratio:.0f} times as long; at least {AT_LEAST:g} is asked for")
        missed |= options.vehicles == VEHICLES and ratio < AT_LEAST
        rows += steps
    measure.write_rows(rows, options.out)
    console.print(f"rows: {options.out}")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
