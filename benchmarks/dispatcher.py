"""The dispatcher against what users have without it: ``python -m benchmarks.dispatcher``, or ``make bench``.

Forward and backward in float32 on one thread, d_model 256, 4 heads, batch 1. Two forms, contestants compared within
one: edge form, the dispatcher against the per-edge loop; joint form (one softmax over all that a position reads), which
is what a dense mask computes, ``canvas_attention`` between the same projections against that. Before a case is timed,
outputs and all gradients of all contestants must agree with their form in float64, to 1e-5 of the largest; a case that
does not agree is not timed. Contestants take turns in one process, so ratios mean something on a noisy machine. The run
exits with 1 where a case does not agree, or a ratio misses its target; with ``--misses-pass`` the latter is only told.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.cases import DISPATCH, Case
from benchmarks.naive import DenseMask, PerEdgeLoop, Projections
from canvas_engineering.attention import canvas_attention
from canvas_engineering.canvas import CanvasLayout
from canvas_engineering.connectivity import CanvasTopology
from canvas_engineering.dispatch import AttentionDispatcher
from canvas_engineering.plan import compile_attention

D_MODEL, HEADS = 256, 4
TOLERANCE = 1e-5
FORMS = {"edge": ("ours", "per_edge_loop"), "joint": ("ours_joint", "dense_mask")}
"""Who is compared with whom, ours first; the other in float64 is the form's oracle."""


class Disagreement(Exception):
    """A contestant does not compute its form's numbers: there is nothing to time."""


class JointAttention(nn.Module):
    """Ours in joint form: the dense mask's projections around :func:`canvas_attention`."""

    def __init__(self, topology: CanvasTopology, layout: CanvasLayout, d_model: int, n_heads: int = 4):
        super().__init__()
        self.fn_modules = nn.ModuleDict({"cross_attention": Projections(d_model, n_heads)})
        self.plan = compile_attention(layout, topology, normalize="joint")
        covered = torch.from_numpy(self.plan.rows_with_keys())
        self.register_buffer("covered", covered[:, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, d_model) → (B, N, d_model); positions without reads keep their input."""
        p = self.fn_modules["cross_attention"]
        q, k, v = (p.split(project(x)) for project in (p.q_proj, p.k_proj, p.v_proj))
        out = p.out_proj(canvas_attention(q, k, v, self.plan).transpose(1, 2).flatten(2))
        return torch.where(self.covered, out, x)


def build(case: Case) -> tuple[dict[str, nn.Module], Tensor]:
    """Contestants with the same parameters, and an input (1, N, 256)."""
    layout, topology = case.declare()
    torch.manual_seed(0)
    ours = AttentionDispatcher(topology, layout, D_MODEL, HEADS)
    contestants: dict[str, nn.Module] = {"ours": ours}
    others = {"per_edge_loop": PerEdgeLoop, "ours_joint": JointAttention, "dense_mask": DenseMask}
    for name, contestant in others.items():
        contestants[name] = contestant(topology, layout, D_MODEL, HEADS)
        contestants[name].load_state_dict(ours.state_dict())
    return contestants, torch.randn(1, layout.num_positions, D_MODEL)


def outputs_and_gradients(module: nn.Module, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """What the gate compares: the output, the input's gradient, every parameter's gradient."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad(set_to_none=True)
    out = module(x)
    out.backward(upstream)
    return {"output": out.detach(), "x": x.grad, **{name: p.grad.clone() for name, p in module.named_parameters()}}


def exact_joint(loop: PerEdgeLoop, dense: DenseMask) -> DenseMask:
    """The dense mask in float64, painted anew from the loop's reads: a mistake in compiling masks cannot hide in it."""
    exact = copy.deepcopy(dense).double()
    weight = torch.zeros_like(exact.mask)
    for index, (_, w) in enumerate(loop.reads):
        box = getattr(loop, f"queries_{index}")[:, None], getattr(loop, f"keys_{index}")
        weight[box] = weight[box].clamp(min=w)
    exact.covered = (weight > 0).any(1, keepdim=True)
    weight.diagonal()[~exact.covered[:, 0]] = 1.0  # a softmax over no key is NaN
    exact.mask = weight.log()
    return exact


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """By name, the largest difference of :func:`outputs_and_gradients` over the largest exact value."""
    result = {}
    for name, value in exact.items():
        # A key bias shifts every score of a row alike: its gradient is zero, and its weight's gives the scale.
        scale = exact[name.replace("k_proj.bias", "k_proj.weight")].abs().max()
        result[name] = float((found[name].double() - value).abs().max() / scale)
    return result


def gate(contestants: dict[str, nn.Module], x: Tensor) -> dict[str, float]:
    """The worst of each contestant's errors against its form in float64. Raises :class:`Disagreement` over 1e-5.

    ``contestants`` need "per_edge_loop" in any case, and "dense_mask" where joint form is among them.
    """
    upstream, worst = torch.randn(x.shape), {}
    for form, names in FORMS.items():
        if names[0] not in contestants:
            continue
        loop = contestants["per_edge_loop"]
        oracle = copy.deepcopy(loop).double() if form == "edge" else exact_joint(loop, contestants[names[1]])
        exact = outputs_and_gradients(oracle, x.double(), upstream.double())
        for name in names:
            found = errors(outputs_and_gradients(contestants[name], x, upstream), exact)
            wrong = {what: error for what, error in found.items() if not error <= TOLERANCE}
            if wrong:
                raise Disagreement(f"{name} differs from the {form} form in float64: {wrong}")
            worst[name] = max(found.values())
    return worst


def run_case(case: Case, rounds: int) -> list[dict]:
    """Rows of one case: gate, then interleaved times. A row's ratio is to ours of its form."""
    contestants, x = build(case)
    worst = gate(contestants, x)
    upstream = torch.randn(x.shape)
    x.requires_grad_()

    steps = {name: measure.step(module, x, upstream=upstream) for name, module in contestants.items()}
    times = measure.interleave(steps, rounds)
    return [
        {
            "case": case.name,
            "form": form,
            "contestant": name,
            "positions": x.shape[1],
            "seconds": measure.quantiles(times[name]),
            "ratio": measure.quantiles(times[name] / times[names[0]]),
            "at_least": case.at_least.get(name),
            "rounds": rounds,
            "worst_error": worst[name],
            **measure.environment(),
        }
        for form, names in FORMS.items()
        for name in names
    ]


def is_missed(row: dict) -> bool:
    """Whether a ratio is below what it must reach."""
    return row["at_least"] is not None and row["ratio"]["p50"] < row["at_least"]


def table(rows: list[dict]) -> Table:
    """Medians, ratios to ours of the form with their 10 % and 90 % quantiles, and what each ratio must reach."""
    result = Table(title="forward + backward, float32, one thread, d_model 256, 4 heads, batch 1")
    for column in ("case", "contestant", "median ms", "time / ours", "p10 to p90", "must reach"):
        result.add_column(column, justify="left" if column in ("case", "contestant") else "right")
    for row in rows:
        # paired, round by round: a ratio of two medians mixes slow moments of the machine with fast ones
        ratio, target = row["ratio"]["p50"], row["at_least"]
        met = "" if target is None else f"{target:g} {'MISSED' if is_missed(row) else 'reached'}"
        spread = f"{row['ratio']['p10']:.2f} to {row['ratio']['p90']:.2f}"
        cells = row["case"], row["contestant"], f"{row['seconds']['p50'] * 1e3:.2f}", f"{ratio:.2f}", spread, met
        result.add_row(*cells, end_section=row["contestant"] == "dense_mask")
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dispatcher", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--case", action="append", choices=[case.name for case in DISPATCH], help="default: all")
    parser.add_argument("--misses-pass", action="store_true", help="exit with 0 where only targets are missed")
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
    missed = any(is_missed(row) for row in rows)
    return int(failed or (missed and not options.misses_pass))


if __name__ == "__main__":
    sys.exit(main())
