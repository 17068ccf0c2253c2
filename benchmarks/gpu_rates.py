"""A GPU's entry of the measured rates, from rows of the suite: ``python -m benchmarks.rates --rows ROWS``.

Rows time whole passes, so a pass's kernels share one rate for each form, head dimension and size of tile: seconds of a
multiprocessor per product and element of a block. How many programs share a multiprocessor is what the compiled kernels
leave room for, ``results/aot.json``. A launch is bound by its blocks, its longest tile or its memory, whichever takes
longest at the rates found so far, until that is what it was before.
"""

from __future__ import annotations

import datetime
from typing import NamedTuple

import numpy as np
import torch

from benchmarks import aot, cases, measure, rates, report
from canvas_kernels import configs, costs
from canvas_kernels.work import GpuWork, Launch

SMALL = 16 * 16
TOLD = 0.2
"""A rate is told by rows of which it makes at least this share; what hides behind more in all rows is not."""
PARTS = ("forward", "backward")


class Pass(NamedTuple):
    """A forward or backward that was timed, and its launches."""

    case: str
    form: str
    part: str
    seconds: float
    launches: tuple[Launch, ...]


class Block(NamedTuple):
    """Of a configuration: whom it shares a rate with, how many of the rate's units it takes, and programs that share a
    multiprocessor."""

    group: tuple
    units: float
    resident: int


def entry(rows: list[dict]) -> tuple[str, dict, list[dict]]:
    """The device's name, its entry, and a row for each pass: what is measured and predicted, also by a fit without the
    case.

    Raises:
        ValueError: rows of no GPU or of several, of cases that are not these, or that do not tell what is needed.
    """
    device, arch, multiprocessors = _gpu(rows)
    blocks = blocks_of(arch)
    gpu = {"arch": arch, "multiprocessors": multiprocessors}
    gpu["blocks"] = {key: [0.0, block.resident] for key, block in blocks.items()}
    # what chose the tiles when the rows were made: an earlier entry, or areas
    passes = timed_passes(rows, gpu, costs.all_rates().get(device, {"blocks": {}}))
    names = dict.fromkeys(found.case for found in passes)
    if len(names) == 1:
        raise ValueError(f"{names.popitem()[0]} is the only case: what is fitted to it cannot be checked with another")
    each = fit(passes, blocks)
    if not each["byte"]:
        raise ValueError(f"no row of {device} depends on its memory: its bandwidth cannot be told")
    without = {name: fit([found for found in passes if found.case != name], blocks, each) for name in names}
    told = []
    for found in passes:
        row = {"case": found.case, "form": found.form, "part": found.part, "seconds": found.seconds}
        told.append(row | {"predicted": seconds(found, each), "left_out": seconds(found, without[found.case])})
    measured = {key: [each[key], block.resident] for key, block in blocks.items() if each[key]}
    found = {"date": datetime.date.today().isoformat(), "torch": rows[0]["torch"], "driver": rows[0].get("driver", "")}
    found["how"] = f"python -m benchmarks.rates --rows: {len(passes)} passes of the suite, commit {rows[0]['commit']}"
    gpu |= {"bandwidth": float(f"{1 / each['byte']:.4g}"), "launch": each["launch"], "blocks": measured}
    return device, found | gpu, told


def _gpu(rows: list[dict]) -> tuple[str, str, int]:
    found = {tuple(row.get(key) for key in ("device", "architecture", "multiprocessors")) for row in rows}
    if len(found) != 1:
        raise ValueError(f"rows of one device make an entry, these are of {', '.join(sorted(map(str, found)))}")
    device, arch, multiprocessors = found.pop()
    if arch not in configs.ARCHITECTURES or not multiprocessors:
        raise ValueError(
            f"the rows of {device} do not tell a GPU's architecture and multiprocessors, as those of `make gpu` do; "
            "python -m benchmarks.rates without --rows measures a processor"
        )
    return device, arch, multiprocessors


def blocks_of(arch: str) -> dict[str, Block]:
    """Every configuration of an architecture, by the name of its block."""
    dtypes = {name: dtype for name, dtype in aot.DTYPES.items() if name != "fp16"}
    found: dict[str, Block] = {}
    for row in measure.read_rows(measure.RESULTS / "aot.json"):
        if row["arch"] != arch or row["form"] not in ("joint", "edge") or row["dtype"] not in dtypes:
            continue
        config = configs.Config(*map(int, row["tile"].split("x")), row["num_warps"], row["num_stages"])
        itemsize, area = dtypes[row["dtype"]].itemsize, config.block_m * config.block_n
        key = costs.block_key(row["stage"], row["form"], row["head_dim"], itemsize, config)
        resident = min(row["resident"], found[key].resident if key in found else row["resident"])
        units = aot.DOTS[row["stage"]] * area * resident
        group = (row["stage"] == "forward", row["form"], row["head_dim"], itemsize, area == SMALL)
        found[key] = Block(group, units, resident)
    return found


def timed_passes(rows: list[dict], gpu: dict, tiled: dict) -> list[Pass]:
    """What ours took, pass by pass."""
    known, found = {case.name: case for case in cases.GPU}, []
    for row in report.timed(rows, contestant="ours"):
        if row["case"] not in known:
            raise ValueError(f"there is no case {row['case']!r} here; the rows are of another version")
        plan = rates.plan_of(known[row["case"]], row["form"])
        if plan.n_positions != row["tokens"]:
            raise ValueError(f"{row['case']} has {plan.n_positions} tokens here and {row['tokens']} in the rows")
        outside = None if plan.in_canvas_order else plan.n_positions
        itemsize = getattr(torch, row["dtype"]).itemsize
        work = GpuWork(plan.table, row["batch"] * row["heads"], row["head_dim"], outside, itemsize=itemsize)
        for part in PARTS:
            launches = tuple(work.launches(gpu, tiled, part == "backward"))
            found.append(Pass(row["case"], row["form"], part, row[f"{part}_seconds"]["p50"], launches))
    if not found:
        raise ValueError("there is no row of ours that was timed")
    return found


def fit(passes: list[Pass], blocks: dict[str, Block], each: dict[str, float] | None = None) -> dict[str, float]:
    """Seconds of each block, byte and launch; 0 of a block that nothing tells of. ``each``: what to begin with."""
    names = (*dict.fromkeys(block.group for block in blocks.values()), "byte", "launch")
    taken = np.array([found.seconds for found in passes])
    chosen = [[_longest(launch, each) if each else launch.bounds[0] for launch in found.launches] for found in passes]
    tried: list[list[list[dict[str, float]]]] = []
    while chosen not in tried:
        tried.append(chosen)
        counts = [costs.total(_shared(bound, blocks) for bound in bounds) for bounds in chosen]
        found = rates.fit(counts, taken, names)
        for name in names[:-2]:
            if max(row.get(name, 0) * found[name] / whole for row, whole in zip(counts, taken)) < TOLD:
                found[name] = 0.0
        each = _each(found, blocks)
        chosen = [[_longest(launch, each) for launch in found.launches] for found in passes]
    return each


def seconds(found: Pass, each: dict[str, float]) -> float:
    """What a pass takes."""
    return sum(costs.seconds(_longest(launch, each), each) for launch in found.launches)


def _longest(launch: Launch, each: dict[str, float]) -> dict[str, float]:
    return max(launch.bounds, key=lambda bound: costs.seconds(bound, each))


def _shared(bound: dict[str, float], blocks: dict[str, Block]) -> dict:
    return {
        blocks[name].group if name in blocks else name: count * (blocks[name].units if name in blocks else 1)
        for name, count in bound.items()
    }


def _each(found: dict, blocks: dict[str, Block]) -> dict[str, float]:
    """Seconds of each name from the rates that are shared. A size of tile that rows tell nothing of is estimated from
    the other size of its passes, by the areas that choose tiles without an entry."""
    each = {name: found[name] for name in ("byte", "launch")}
    for key, block in blocks.items():
        *passes, small = block.group
        slower = configs.SMALL_TILE_COST / (SMALL / 4096)
        estimated = found.get((*passes, not small), 0.0) * (slower if small else 1 / slower)
        each[key] = float(f"{(found[block.group] or estimated) * block.units:.4g}")
    return each


def show(told: list[dict]) -> None:
    """A table of the errors."""
    from rich.table import Table

    table = Table("case", "form", "pass")
    for column in ("ms", "predicted", "error", "without the case"):
        table.add_column(column, justify="right")
    for row in told:
        errors = (f"{row[name] / row['seconds'] - 1:+.0%}" for name in ("predicted", "left_out"))
        cells = (f"{1e3 * row['seconds']:.3f}", f"{1e3 * row['predicted']:.3f}", *errors)
        table.add_row(row["case"], row["form"], row["part"], *cells)
    measure.console().print(table)
