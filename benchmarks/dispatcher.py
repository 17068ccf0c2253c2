"""The dispatcher against what users have without it: ``python -m benchmarks.dispatcher``, or ``make bench``.

Forward and backward in float32 on one thread, d_model 256, 4 heads, batch 1. Before a case is timed, its outputs and
all gradients must agree with the per-edge loop run in float64, to 1e-5 of the largest; a case that does not agree is
not timed and the run exits with 1. Contestants take turns in one process, so ratios mean something on a noisy machine.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.table import Table
from torch import nn

from benchmarks import measure
from benchmarks.cases import DISPATCH, Case
from benchmarks.naive import DenseMask, PerEdgeLoop
from canvas_engineering.dispatch import AttentionDispatcher

D_MODEL, HEADS = 256, 4
TOLERANCE = 1e-5


class Disagreement(Exception):
    """Ours and a contestant do not compute the same numbers: there is nothing to time."""


def build(case: Case) -> tuple[dict[str, nn.Module], torch.Tensor]:
    """Contestants with the same parameters, and an input (1, N, 256)."""
    layout, topology = case.declare()
    torch.manual_seed(0)
    ours = AttentionDispatcher(topology, layout, D_MODEL, HEADS)
    contestants: dict[str, nn.Module] = {"ours": ours}
    for name, contestant in (("per_edge_loop", PerEdgeLoop), ("dense_mask", DenseMask)):
        contestants[name] = contestant(topology, layout, D_MODEL, HEADS)
        contestants[name].load_state_dict(ours.state_dict())
    return contestants, torch.randn(1, layout.num_positions, D_MODEL)


def outputs_and_gradients(module: nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the gate compares: the output, the input's gradient, every parameter's gradient."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad(set_to_none=True)
    out = module(x)
    out.backward(upstream)
    return {"output": out.detach(), "x": x.grad, **{name: p.grad.clone() for name, p in module.named_parameters()}}


def gate(contestants: dict[str, nn.Module], x: torch.Tensor) -> dict[str, float]:
    """Errors of our results against the per-edge loop in float64, by name. Raises :class:`Disagreement` over 1e-5."""
    upstream = torch.randn(x.shape)
    loop = contestants["per_edge_loop"].double()
    expected = outputs_and_gradients(loop, x.double(), upstream.double())
    loop.float()
    found = outputs_and_gradients(contestants["ours"], x, upstream)
    errors = {}
    for name, value in expected.items():
        # A key bias shifts every score of a row alike: its gradient is zero, and its weight's gives the scale.
        scale = expected[name.replace("k_proj.bias", "k_proj.weight")].abs().max()
        errors[name] = float((found[name].double() - value).abs().max() / scale)
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE}
    if wrong:
        raise Disagreement(f"differs from the per-edge loop in float64: {wrong}")
    return errors


def run_case(case: Case, rounds: int) -> list[dict]:
    """Rows of one case: gate, then interleaved times."""
    contestants, x = build(case)
    errors = gate(contestants, x)
    upstream = torch.randn(x.shape)
    x.requires_grad_()

    steps = {name: measure.step(module, x, upstream=upstream) for name, module in contestants.items()}
    times = measure.interleave(steps, rounds)
    ours = times["ours"]
    return [
        {
            "case": case.name,
            "contestant": name,
            "positions": x.shape[1],
            "seconds": measure.quantiles(seconds),
            "ratio": measure.quantiles(seconds / ours),
            "at_least": case.at_least.get(name),
            "rounds": rounds,
            "worst_error": max(errors.values()),
            **measure.environment(),
        }
        for name, seconds in times.items()
    ]


def table(rows: list[dict]) -> Table:
    """Medians, ratios with their 10 % and 90 % quantiles, and what each ratio must reach."""
    result = Table(title="forward + backward, float32, one thread, d_model 256, 4 heads, batch 1")
    for column in ("case", "contestant", "median ms", "time / ours", "p10 to p90", "must reach"):
        result.add_column(column, justify="left" if column in ("case", "contestant") else "right")
    for row in rows:
        # paired, round by round: a ratio of two medians mixes slow moments of the machine with fast ones
        ratio, target = row["ratio"]["p50"], row["at_least"]
        met = "" if target is None else f"{target:g} {'reached' if ratio >= target else 'MISSED'}"
        spread = f"{row['ratio']['p10']:.2f} to {row['ratio']['p90']:.2f}"
        cells = row["case"], row["contestant"], f"{row['seconds']['p50'] * 1e3:.2f}", f"{ratio:.2f}", spread, met
        result.add_row(*cells, end_section=row["contestant"] == "dense_mask")
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dispatcher", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--case", action="append", choices=[case.name for case in DISPATCH], help="default: all")
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "dispatcher.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    console, rows, failed = measure.console(), [], False
    for case in DISPATCH:
        if options.case and case.name not in options.case:
            continue
        console.print(f"{case.name}: gate, then {options.rounds} rounds")
        try:
            rows += run_case(case, options.rounds)
        except Disagreement as cause:
            console.print(f"[red]{case.name}: {cause}")
            failed = True
    if rows:
        console.print(table(rows))
        measure.write_rows(rows, options.out)
        console.print(f"rows: {options.out}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
