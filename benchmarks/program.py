"""What a program costs a plain topology's step: ``python -m benchmarks.program``.

The same parameters and the same topology, without a program and with one that declares families, clocks and operators
for every region and connection, but nothing that would compute anything else. Outputs and gradients must be the same
bits; then forward and backward take turns, in float32 on one thread, d_model 256, 4 heads, batch 1. The median of the
paired ratios may be at most 1.03, or the run exits with 1.

And what a program saves: the attention of a step of ``examples.belief_world`` in which everything updates, and of one
in which memory and belief rest. Skipping half of their updates must cut the time of attention by 40 %, or the run exits
with 1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from torch import nn

from benchmarks import measure
from benchmarks.cases import DISPATCH, Case
from benchmarks.dispatcher import D_MODEL, HEADS, Disagreement, outputs_and_gradients
from canvas_engineering import (
    AttentionDispatcher,
    CanvasProgram,
    CanvasSchema,
    ClockSpec,
    ConnectionProgram,
    RegionProgram,
    ResidualAccumulator,
)

AT_MOST = 1.03
CUT_AT_LEAST = 0.40


def build(case: Case) -> tuple[dict[str, nn.Module], torch.Tensor]:
    """The dispatcher without and with a program, and an input (1, N, 256)."""
    layout, topology = case.declare()
    program = CanvasProgram(
        CanvasSchema(layout, topology),
        {name: RegionProgram("observation", clock=ClockSpec(period=2)) for name in layout.regions},
        {(c.src, c.dst): ConnectionProgram("observe") for c in topology.connections},
    )
    torch.manual_seed(0)
    plain = AttentionDispatcher(topology, layout, D_MODEL, HEADS)
    accumulator = ResidualAccumulator(list(layout.regions))
    programmed = AttentionDispatcher(
        topology, layout, D_MODEL, HEADS, residual_accumulator=accumulator, program=program
    )
    programmed.load_state_dict({**programmed.state_dict(), **plain.state_dict()})
    return {"plain": plain, "program": programmed}, torch.randn(1, layout.num_positions, D_MODEL)


def run_case(case: Case, rounds: int) -> dict:
    """One row: equal bits, then the quantiles of the paired ratios. Raises Disagreement."""
    contestants, x = build(case)
    upstream = torch.randn(x.shape)
    plain, programmed = (outputs_and_gradients(module, x, upstream) for module in contestants.values())
    differing = [name for name, value in plain.items() if not torch.equal(value, programmed[name])]
    if differing:
        raise Disagreement(f"a program that says nothing changes {differing}")
    x.requires_grad_()

    steps = {name: measure.step(module, x, upstream=upstream) for name, module in contestants.items()}
    times = measure.interleave(steps, rounds)
    return {
        "case": case.name,
        "rounds": rounds,
        "plain_ms": 1e3 * float(np.median(times["plain"])),
        "program_ms": 1e3 * float(np.median(times["program"])),
        **{f"ratio_{name}": value for name, value in measure.quantiles(times["program"] / times["plain"]).items()},
        **measure.environment(),
    }


def skipping(rounds: int, window: int | None = None, times: int | None = None) -> dict:
    """One row: attention of a step in which everything updates against one in which memory and belief rest, forward,
    by names, as the example runs it. Raises Disagreement unless resting regions pass through and others do as ever."""
    from examples import belief_world  # wants gymnasium

    tokens = belief_world.TOKENS * (times or belief_world.TIMES)
    bound, program = belief_world.declare(window or belief_world.WINDOW, tokens)
    torch.manual_seed(0)
    blocks = belief_world.Thinker(bound, program, window or belief_world.WINDOW).eval().blocks
    names = set(bound.field_names)
    active = {"everything": names, "resting": names - set(belief_world.THOUGHT)}
    x = torch.randn(1, bound.layout.num_positions, belief_world.D_MODEL)

    def step(regions: set[str]):
        def run() -> list[torch.Tensor]:
            return [block(x, regions) for block in blocks]

        return run

    with torch.no_grad():
        for everything, resting in zip(step(active["everything"])(), step(active["resting"])()):
            for name in names:
                rows = bound.layout.region_index(name)
                expected = (everything if name in active["resting"] else x)[:, rows]
                if not torch.allclose(resting[:, rows], expected, rtol=1e-5, atol=1e-6):
                    raise Disagreement(f"resting changes {name}")
        contestants = {name: step(regions) for name, regions in active.items()}
        found = measure.interleave(contestants, rounds)
    ratios = measure.quantiles(found["resting"] / found["everything"])
    return {
        "case": "skipping",
        "rounds": rounds,
        "positions": bound.layout.num_positions,
        "everything_ms": 1e3 * float(np.median(found["everything"])),
        "resting_ms": 1e3 * float(np.median(found["resting"])),
        **{f"ratio_{name}": value for name, value in ratios.items()},
        "cut_by_skipping_half": 0.5 * (1 - ratios["p50"]),
        **measure.environment(),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.program", description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--case", action="append", help="names of cases; all without")
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "program.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = [run_case(case, options.rounds) for case in DISPATCH if options.case is None or case.name in options.case]
    saved = [skipping(options.rounds)] if options.case is None or "skipping" in options.case else []
    measure.write_rows(rows + saved, options.out)
    table = Table("case", "plain, ms", "with a program, ms", "paired ratio", title="what a program costs")
    for row in rows:
        table.add_row(row["case"], f"{row['plain_ms']:.2f}", f"{row['program_ms']:.2f}", f"{row['ratio_p50']:.3f}")
    measure.console().print(table)
    for row in saved:
        print(
            f"attention of a step: {row['everything_ms']:.1f} ms, {row['resting_ms']:.1f} ms while memory and belief "
            f"rest; skipping half of their updates cuts it by {row['cut_by_skipping_half']:.0%}"
        )
    too_slow = any(row["ratio_p50"] > AT_MOST for row in rows)
    return int(too_slow or any(row["cut_by_skipping_half"] < CUT_AT_LEAST for row in saved))


if __name__ == "__main__":
    sys.exit(main())
