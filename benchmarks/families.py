"""What each attention function costs: ``python -m benchmarks.families``, or ``make bench``.

One region of n positions reads another of n, on one thread: processor seconds (what others do on the machine counts
for little) and peak memory of forward + backward for n = 2⁶ … 2¹³, and the exponents of n that the longest sizes show,
beside the claimed complexity. And 200 connections of small regions over one connection of as much work. One read by the
dispatcher is held against the function's own module in float64 before anything is timed. Writes rows, and the table in
``docs/attention-costs.md``; what is there of functions that do not run stays.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks import measure
from canvas_engineering import ATTENTION_TYPES, AttentionDispatcher, CanvasLayout, CanvasTopology, Connection

SIZES = tuple(2**power for power in range(6, 14))
D_MODEL, HEADS = 256, 4
# Exponents are fitted over sizes from here on: below, the calls themselves are what is measured.
FIT_FROM = 1024
DOCUMENT = Path(__file__).parent.parent / "docs/attention-costs.md"
FUNCTIONS = tuple(fn for fn in ATTENTION_TYPES if fn != "none")


def declare(fn: str, n: int) -> tuple[CanvasLayout, CanvasTopology]:
    """Region a of n positions reads region b of n by ``fn``."""
    regions = {"a": (0, 1, 0, 1, 0, n), "b": (0, 1, 1, 2, 0, n)}
    layout = CanvasLayout(T=1, H=2, W=n, d_model=D_MODEL, regions=regions)
    return layout, CanvasTopology([Connection("a", "b", fn=fn)])


def complexity(fn: str) -> str:
    """As ATTENTION_TYPES states it."""
    return "O(" + ATTENTION_TYPES[fn].rpartition("O(")[2]


def gate(fn: str, n: int = 48) -> float:
    """Error of the dispatcher's read against the function's module, in float64; AssertionError above 1e-6."""
    torch.manual_seed(0)
    dispatcher = AttentionDispatcher(*reversed(declare(fn, n)), D_MODEL, HEADS).double()
    x = torch.randn(1, 2 * n, D_MODEL, dtype=torch.float64)
    with torch.no_grad():
        expected = dispatcher.fn_modules[fn](x[:, :n], x[:, n:], x[:, n:])
        error = ((dispatcher(x)[:, :n] - expected).abs().max() / expected.abs().max()).item()
    assert error < 1e-6, f"{fn}: the dispatcher is {error:.1e} off its module"
    return error


def run_size(fn: str, n: int, rounds: int) -> dict:
    """Seconds over ``rounds`` and peak bytes of one step, forward + backward, float32."""
    torch.manual_seed(0)
    dispatcher = AttentionDispatcher(*reversed(declare(fn, n)), D_MODEL, HEADS)
    x = torch.randn(1, 2 * n, D_MODEL, requires_grad=True)

    def step():
        dispatcher(x).square().mean().backward()

    step()
    seconds = np.empty(rounds)
    for turn in range(rounds):
        start = time.process_time()
        step()
        seconds[turn] = time.process_time() - start
    return {"n": n, "seconds": measure.quantiles(seconds), "least": float(seconds.min()), "peak_bytes": peak(step)}


def fleet_ratio(fn: str, rounds: int, count: int = 200, n: int = 16) -> float:
    """Time of ``count`` connections between regions of ``n`` over that of one connection of as much work: as many
    queries, and as many (query, key) pairs where the function looks at pairs, else as many keys."""
    regions = {f"r{i}": (0, 1, 0, 1, n * i, n * (i + 1)) for i in range(count)}
    layout = CanvasLayout(T=1, H=1, W=n * count, d_model=D_MODEL, regions=regions)
    many = CanvasTopology([Connection(f"r{i}", f"r{(i + 1) % count}", fn=fn) for i in range(count)])
    keys = n if complexity(fn) == "O(NM)" else n * count
    whole = {"a": (0, 1, 0, 1, 0, n * count), "b": (0, 1, 0, 1, 0, keys)}
    single = CanvasLayout(T=1, H=1, W=n * count, d_model=D_MODEL, regions=whole)
    x = torch.randn(1, n * count, D_MODEL, requires_grad=True)
    dispatchers = {
        "many": AttentionDispatcher(many, layout, D_MODEL, HEADS),
        "one": AttentionDispatcher(CanvasTopology([Connection("a", "b", fn=fn)]), single, D_MODEL, HEADS),
    }
    steps = {name: lambda run=run: run(x).square().mean().backward() for name, run in dispatchers.items()}
    times = measure.interleave(steps, rounds)
    return float(np.median(times["many"] / times["one"]))


def peak(step) -> int:
    """Bytes that ``step`` holds at most beyond what was held before. Linux only: it asks the kernel."""
    gc.collect()
    # what the allocator keeps for later would hide allocations
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    step()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def exponent(sizes: list[int], values: list[float]) -> float:
    """Of the power law that fits best: the slope of log value over log size."""
    return float(np.polyfit(np.log(sizes), np.log(np.maximum(values, 1e-12)), 1)[0])


def run_function(fn: str, sizes: tuple[int, ...], rounds: int) -> dict:
    """All sizes of one function, and its exponents."""
    error = gate(fn)
    rows = [run_size(fn, n, rounds if n < 4096 else max(2, rounds // 2)) for n in sizes]
    long = [row for row in rows if row["n"] >= FIT_FROM] or rows
    fit = {
        name: exponent([row["n"] for row in long], [row[key] for row in long])
        for name, key in (("time_exponent", "least"), ("memory_exponent", "peak_bytes"))
    }
    row = {"fn": fn, "claim": complexity(fn), **fit, "fleet_ratio": fleet_ratio(fn, rounds)}
    return row | {"error": error, "sizes": rows, "d_model": D_MODEL, "heads": HEADS, **measure.environment()}


def document(rows: list[dict]) -> str:
    """The table as a page."""
    sizes = [size["n"] for size in rows[0]["sizes"]]
    where = rows[0]
    lines = [
        "# What each attention function costs",
        "",
        f"Forward and backward of one region of n positions that reads another of n, d_model {where['d_model']}, "
        f"{where['heads']} heads, float32, batch 1, one thread ({where['device']}, torch {where['torch']}, commit "
        f"{where['commit']}); `python -m benchmarks.families` writes this page. Milliseconds of processor time, the "
        f"least of the rounds. Exponents of n are fitted over n ≥ {FIT_FROM}; MB is what one step holds at most beyond "
        f"what was held before, at n = {sizes[-1]}. The last column is the time of 200 connections between regions of "
        "16 positions over that of one connection with as many queries, and as many pairs or keys, in wall time.",
        "",
        "| function | claimed | time ~ n^ | memory ~ n^ | "
        + " | ".join(f"n = {n}" for n in sizes)
        + " | MB | 200 / 1 |",
        "|---|---|---" + "|---" * (len(sizes) + 3) + "|",
    ]
    for row in rows:
        times = (f"{1e3 * size['least']:.3g}" for size in row["sizes"])
        fits = f"{row['time_exponent']:.2f} | {row['memory_exponent']:.2f}"
        megabytes = row["sizes"][-1]["peak_bytes"] / 1e6
        lines.append(
            f"| {row['fn']} | {row['claim']} | {fits} | {' | '.join(times)} | {megabytes:.0f} | "
            f"{row['fleet_ratio']:.2f} |"
        )
    lines += [
        "",
        "mamba's readout is a softmax of every query over every key's output: that part is O(NM), whatever the scan.",
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description=__doc__.splitlines()[0])
    parser.add_argument("--functions", default=",".join(FUNCTIONS), help="comma-separated")
    parser.add_argument("--longest", type=int, default=SIZES[-1], help="leave longer regions out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "families.json")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    console = measure.console()
    known = options.out.read_text().splitlines() if options.out.exists() else []
    rows = {row["fn"]: row for row in map(json.loads, known)}
    for fn in options.functions.split(","):
        row = rows[fn] = run_function(fn, tuple(n for n in SIZES if n <= options.longest), options.rounds)
        fits = f"time ~ n^{row['time_exponent']:.2f}, memory ~ n^{row['memory_exponent']:.2f}"
        last = f"{1e3 * row['sizes'][-1]['least']:.0f} ms at n = {row['sizes'][-1]['n']}"
        # as each function is done: a run that is cut short loses one
        ordered = [rows[name] for name in FUNCTIONS if name in rows]
        measure.write_rows(ordered, options.out)
        unfinished = options.document.with_name(f"{options.document.name}.partial")
        unfinished.write_text(document(ordered))
        os.replace(unfinished, options.document)
        console.print(f"{fn:18} {row['claim']:12} {fits}; {last}; 200 edges / 1 {row['fleet_ratio']:.2f}")
    console.print(f"rows: {options.out}; table: {options.document}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
