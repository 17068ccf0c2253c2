"""From rows to what people look at: a Markdown report and figures."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from benchmarks import measure
from benchmarks.cases import TOO_LONG
from benchmarks.problem import SAMPLED_ROWS
from benchmarks.suite import GATED_HEADS

FIGURES = ("speedup", "roofline", "scaling")
LABELS = {
    "ours": "ours",
    "ours_torch": "ours, torch backend",
    "sdpa_mask": "SDPA, dense mask",
    "sdpa_mask_used": "SDPA, mask of used tokens",
    "flex": "FlexAttention",
    "flex_packed": "FlexAttention, packed order",
    "xformers": "xformers",
    "flashinfer": "FlashInfer",
    "flashinfer_packed": "FlashInfer, packed order",
    "per_edge_loop": "loop over edges",
    "grouped": "grouped by hand",
    "varlen": "FlashAttention, varlen",
    "sdpa_unmasked": "SDPA without a mask",
}
FLEX = {"flex", "flex_packed"}
FLEX_MEMORY = (
    "FlexAttention's MiB are those of forward alone, ours and others' those of forward + backward; where it had to "
    "compile for a shape, they hold the compiler's memory too."
)
SAMPLED = (
    f"Query rows are sampled, up to {SAMPLED_ROWS[1]} of them ({SAMPLED_ROWS[0]} of the longest canvas) of up to "
    f"{GATED_HEADS} heads; all keys take part."
)
"""What the gate compares."""
MEDIAN_ROUNDS = 3
"""Fewer rounds give no median, no quartiles and no noise of a case by itself."""
CASE = ("case", "tokens", "batch", "heads", "head_dim", "dtype")
ON_A_GPU = "driver"
"""What only rows of a GPU have."""


def is_aot(rows: list[dict]) -> bool:
    """Whether the rows are those of ``benchmarks.aot``."""
    return bool(rows) and "arch" in rows[0]


def part_of(row: dict) -> str:
    """What a row is judged by: forward + backward, or forward where there is no backward."""
    return "step" if "step_seconds" in row else "forward"


def timed(rows: Iterable[dict], **wanted) -> Iterator[dict]:
    """The rows that were timed and whose values are those."""
    for row in rows:
        if "forward_seconds" in row and all(row.get(key) == value for key, value in wanted.items()):
            yield row


def one(rows: Iterable[dict], **wanted) -> dict | None:
    """The first of :func:`timed`."""
    return next(timed(rows, **wanted), None)


def identity(row: dict) -> dict[str, object]:
    """What has to be the same of two rows to hold one against the other: the case, its shape, and the machine. The host
    and its threads do not matter to a GPU's."""
    machine = ("device",) if ON_A_GPU in row else ("device", "processor", "threads")
    return {name: row.get(name) for name in (*CASE, *machine)}


def case_of(row: dict) -> tuple:
    """The case of :func:`identity`, and its shape."""
    found = identity(row)
    return tuple(found[name] for name in CASE)


def merged(rows: list[dict], long: list[dict]) -> list[dict]:
    """Rows, with those of a long run of the same machine and torch where contestants are left out for the time that
    they take, or were timed in fewer rounds. Ours and the reference stay."""
    taken = {place: alike[-1] for place, alike, _ in _places(rows, long) if alike}
    return [taken.get(place, row) for place, row in enumerate(rows)]


def not_merged(rows: list[dict], long: list[dict]) -> list[str]:
    """A line on the rows of a long run that :func:`merged` would take, were they of the same machine and shape."""
    count, names = 0, {}
    for place, _, others in _places(rows, long):
        count += len(others)
        here = _exactly(rows[place])
        for there in map(_exactly, others):
            apart = (name for name in here | there if here.get(name) != there.get(name))
            names |= {f"{name}: {there.get(name)}, here {here.get(name)}": None for name in apart}
    if not count:
        return []
    what = "1 row of a long run is" if count == 1 else f"{count} rows of a long run are"
    return [f"{what} of another machine or shape, and left out: {'; '.join(names)}"]


def _places(rows: list[dict], long: list[dict]) -> Iterator[tuple[int, list[dict], list[dict]]]:
    """Where rows want one of a long run: which of those are alike, and which of another machine or shape."""
    found: dict[tuple, list[dict]] = {}
    for row in long:
        found.setdefault(_who(row), []).append(row)
    for place, row in enumerate(rows):
        if row["contestant"] != "ours" and row["form"] != "reference":
            wanted = [other for other in found.get(_who(row), ()) if _gives_way(row, other)]
            alike = [_exactly(other) == _exactly(row) for other in wanted]
            yield place, *([x for x, same in zip(wanted, alike) if same is which] for which in (True, False))


def _who(row: dict) -> tuple[str, str, str]:
    return row["case"], row["form"], row["contestant"]


def _exactly(row: dict) -> dict[str, object]:
    return identity(row) | {"torch": row.get("torch")}


def _gives_way(row: dict, other: dict) -> bool:
    return row.get("skipped") in TOO_LONG.values() or row.get("rounds", math.inf) < other.get("rounds", 0)


def noise_of(rows: Iterable[dict]) -> float:
    """What two calls of the same thing within one round differ by in nine of ten cases, there in nine of ten rounds;
    a difference of logarithms."""
    return float(np.quantile([row["noise"] for row in rows if "noise" in row], 0.9))


def own_noise(rows: Iterable[dict]) -> dict[tuple, float]:
    """What two calls of the same thing differ by in nine of ten rounds of each case, keyed as by :func:`case_of`. Where
    it is larger than other measures of noise, it takes their place."""
    return {case_of(row): row["noise"] for row in rows if "noise" in row}


def noise_in(rows: Iterable[dict]) -> Callable[[dict], float]:
    """The noise that a row is judged by: of all cases, or its own case's where that is larger."""
    rows = list(rows)
    every, own = noise_of(rows), own_noise(rows)
    return lambda row: max(every, own.get(case_of(row), 0.0))


def is_tie(ratio: dict[str, float], noise: float) -> bool:
    """Whether quantiles of a ratio tell nobody ahead: the median is within noise of 1, or the quartiles enclose 1."""
    return abs(math.log(ratio["p50"])) <= noise or ratio["p25"] <= 1 <= ratio["p75"]


def short(value: float) -> str:
    """Three digits."""
    return f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"


def percent(share: float) -> str:
    """One decimal, below 1 % two digits."""
    return f"{100 * share:.1f} %" if share >= 0.00995 else f"{100 * share:.2g} %"


def once(rounds: int) -> str:
    """What is said of a median that is none, of too few rounds; "" of others."""
    return "" if rounds >= MEDIAN_ROUNDS else "one round" if rounds == 1 else f"{rounds} rounds"


def ratio_of(row: dict, noise: float) -> str:
    """A row's time over ours as a cell: the median, "=" before it in a tie, and behind it if it is none."""
    ratio, few = row[f"{part_of(row)}_ratio"], once(row["rounds"])
    return "= " * is_tie(ratio, noise) + short(ratio["p50"]) + (f" ({few})" if few else "")


# -- the report --------------------------------------------------------------------------------------------------------


def write(rows: list[dict], folder: Path) -> Path:
    """Writes ``report.md`` and its figures to ``folder``; the report's path. ValueError: no row was timed."""
    if not one(rows):
        raise ValueError("no rows were timed: there is nothing to report")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name in FIGURES:
        figure = globals()[f"{name}_figure"](rows)
        if figure is not None:
            unfinished = folder / f"{name}.partial.png"
            figure.savefig(unfinished, dpi=120, bbox_inches="tight")
            os.replace(unfinished, folder / f"{name}.png")
            drawn.append(name)
    text = markdown(rows, drawn)
    unfinished = folder / "report.md.partial"
    unfinished.write_text(text)
    os.replace(unfinished, folder / "report.md")
    return folder / "report.md"


def commits(rows: list[dict]) -> str:
    """Of what code the rows are, most of them first."""
    found = [row["commit"] for row in rows]
    names = sorted(dict.fromkeys(found), key=found.count, reverse=True)
    changed = " (+: files were changed that were not committed yet)" if any("+" in name for name in names) else ""
    return f"commit{'s' * (len(names) > 1)} {', '.join(names)}{changed}"


def markdown(rows: list[dict], figures: list[str]) -> str:
    """The report as text. Every number in it is a row's."""
    first = rows[0]
    where = f"{first['device']}, {first['threads']} thread{'s' * (first['threads'] != 1)}"
    where = f"{first['device']}, driver {first['driver']}" if "driver" in first else where
    noise = noise_in(rows)
    lines = [
        "# Block-sparse attention against what users have without it",
        "",
        *paragraph(
            f"{where}, torch {first['torch']}, Python {first['python']}, {commits(rows)}, {first['dtype']}. Written by "
            "`python -m canvas_engineering bench` from its rows. Before anything was timed, each contestant's output "
            "and gradients agreed with float64, in float32 to 1e-5 of the largest; of FlexAttention on a CPU, its "
            f"output. {SAMPLED} Two calls of the same thing differ here by up to {100 * noise_of(rows):.0f} %, in nine "
            "of ten rounds of nine of ten cases."
        ),
        "",
        "*Joint* form has one softmax per query over all that it reads, *edge* form one per read. Contestants are",
        "compared within a form; FlexAttention has no backward on a CPU. Ratios and rates are medians over rounds,",
        "the quartiles behind them, or *one round* where a step takes too long for three. The rate is that of the",
        "selected pairs alone, over that of scaled_dot_product_attention without a mask in the same rounds. Columns",
        "of contestants give their time over ours; *=* marks ties: the median is within that noise of 1, or within the",
        "case's own where that is larger, or 1 lies between the quartiles. MiB are the most that was held at once,",
        "beyond what was there before, from building what a contestant needs to the end of its first call, masks and",
        "tables included" + ("." if "driver" in first else ": resident memory of the process."),
        "`AttentionPlan.estimate` predicts less: the tensors of one call, `tensor_bytes` in the rows of ours.",
        "",
    ]
    for form in ("joint", "edge"):
        lines += [f"## {form.capitalize()} form", "", *_form_table(rows, form), ""]
        for part, title in (("step", "forward + backward"), ("forward", "forward alone")):
            table = _by_contestant(rows, form, f"{part}_ratio", lambda row, part=part: _ratio(row, part, noise(row)))
            lines += [f"Time over ours, {title}:", "", *table, ""] if table else []
        table = _by_contestant(rows, form, "peak_bytes", lambda row: f"{row['peak_bytes'] / 2**20:.0f}")
        forward = {row["contestant"] for row in timed(rows, form=form) if part_of(row) == "forward"}
        told = ["", *paragraph(FLEX_MEMORY)] if forward & FLEX else []
        lines += ["MiB:", "", *table, *told, ""] if table else []
    lines += [f"![{name}]({name}.png)\n" for name in figures]
    lines += ["## What did not run", "", *_left_out(rows), ""]
    aot = measure.RESULTS / "aot.json"
    if aot.exists():
        lines += ["## The kernels, compiled ahead of time", "", *_aot_table(measure.read_rows(aot)), ""]
    return "\n".join(lines)


def paragraph(text: str) -> list[str]:
    """Its lines, of 120 characters at most."""
    return textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)


def _table(titles: list[str], cells: list[list[str]]) -> list[str]:
    lines = [" | ".join(titles), "---|" + "---:|" * (len(titles) - 1), *(" | ".join(row) for row in cells)]
    return [f"|{line}" if line.startswith("---") else f"| {line} |" for line in lines]


def _form_table(rows: list[dict], form: str) -> list[str]:
    times = ["forward, ms", "forward + backward, ms", "of SDPA's rate"]
    titles = ["case", "tokens", "density", *times, "plan, ms", "first call, s"]
    cells = [
        [
            row["case"],
            f"{row['tokens']:,}",
            percent(row["density"]),
            *(f"{1e3 * row[f'{part}_seconds']['p50']:.2f}" for part in ("forward", "step")),
            _spread(row["step_roofline"], row["rounds"]),
            f"{1e3 * row['setup_seconds']:.0f}",
            f"{row['first_seconds']:.2f}",
        ]
        for row in timed(rows, form=form, contestant="ours")
    ]
    return _table(titles, cells)


def _by_contestant(rows: list[dict], form: str, key: str, cell: Callable[[dict], str]) -> list[str]:
    """A line for each case and a column for each contestant whose rows have ``key``; [] without such."""
    found = {(row["case"], row["contestant"]): row for row in timed(rows, form=form) if row.get(key) is not None}
    names = [name for name in LABELS if any(name == other for _, other in found)]
    cells = [
        [case, *(cell(found[case, name]) if (case, name) in found else "" for name in names)]
        for case in dict.fromkeys(case for case, _ in found)
    ]
    return _table(["case", *(LABELS[name] for name in names)], cells) if names else []


def _spread(quantiles: dict[str, float], rounds: int) -> str:
    middle, low, high = (short(quantiles[q]) for q in ("p50", "p25", "p75"))
    return f"{middle} ({once(rounds) or f'{low} to {high}'})"


def _ratio(row: dict, part: str, noise: float) -> str:
    ratio = row[f"{part}_ratio"]
    return "= " * is_tie(ratio, noise) + _spread(ratio, row["rounds"])


def _left_out(rows: list[dict]) -> list[str]:
    cases = {row["case"] for row in rows}
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        why = row.get("skipped") or row.get("failed")
        if why:
            reasons.setdefault((f"{LABELS[row['contestant']]}, {row['form']} form", why), []).append(row["case"])
    told = {key: "all cases" if len(found) == len(cases) > 1 else ", ".join(found) for key, found in reasons.items()}
    return [f"- {who}: {why} ({found})" for (who, why), found in told.items()] or ["Nothing."]


def _aot_table(rows: list[dict]) -> list[str]:
    lines = [
        f"{len(rows)} configurations by Triton {rows[0]['triton']}, the most that one of them takes:",
        "",
        "| | configurations | registers | bytes spilled, head_dim ≤ 128 | > 128 | shared memory, KiB | wgmma dots |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for arch in dict.fromkeys(row["arch"] for row in rows):
        own = [row for row in rows if row["arch"] == arch]
        spills = [0, 0]
        for row in own:
            large = row["head_dim"] > 128
            spills[large] = max(spills[large], row["spilled"])
        cells = (arch, len(own), max(r["registers"] for r in own), *spills, max(r["shared"] for r in own) // 1024)
        lines.append("| " + " | ".join(map(str, (*cells, sum(r["wgmma"] for r in own)))) + " |")
    return lines


# -- figures -----------------------------------------------------------------------------------------------------------


def _axes(title: str, x: str, y: str):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5))
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y, xscale="log", yscale="log")
    axes.grid(True, which="both", alpha=0.2)
    return figure, axes


def speedup_figure(rows: list[dict]):
    """How many times faster than a dense mask, against density; None without such rows."""
    others = [name for name in ("sdpa_mask", "flex", "flex_packed") if one(rows, form="joint", contestant=name)]
    if not others:
        return None
    figure, axes = _axes("joint form: time of the contestant over ours", "density of the pairs", "times faster")
    for name, marker in zip(others, "os^"):
        found = list(timed(rows, form="joint", contestant=name))
        density = [row["density"] for row in found]
        ratio = [row[f"{part_of(row)}_ratio"]["p50"] for row in found]
        what = "forward + backward" if part_of(found[0]) == "step" else "forward"
        axes.scatter(density, ratio, marker=marker, label=f"{LABELS[name]}, {what}", alpha=0.8)
    axes.axhline(1, color="grey", linewidth=1)
    density = np.geomspace(min(row["density"] for row in timed(rows, form="joint")), 1, 50)
    axes.plot(density, 1 / density, color="grey", linestyle=":", label="1 / density")
    axes.legend()
    return figure


def roofline_figure(rows: list[dict]):
    """Rate on the selected pairs as a share of unmasked attention's, against the length; None without rows."""
    if not one(rows, contestant="ours"):
        return None
    figure, axes = _axes("share of the rate of attention without a mask", "tokens", "share, forward + backward")
    kinds = (("ours", "joint", "o"), ("ours", "edge", "D"), ("sdpa_mask", "joint", "x"), ("per_edge_loop", "edge", "+"))
    for name, form, marker in kinds:
        found = list(timed(rows, form=form, contestant=name))
        if found:
            share = [row["step_roofline"]["p50"] for row in found]
            axes.scatter([row["tokens"] for row in found], share, marker=marker, label=f"{LABELS[name]}, {form} form")
    axes.axhline(1, color="grey", linewidth=1, label=LABELS["sdpa_unmasked"])
    axes.legend()
    return figure


def scaling_figure(rows: list[dict]):
    """Seconds and memory against length, of the cases of group "length"; None without such rows."""
    if not one(rows, group="length"):
        return None
    figure, axes = _axes("causal video, frames of 16 × 16", "tokens", "seconds, forward + backward")
    edge = ("ours", "per_edge_loop", "grouped")
    kinds = [("ours", "joint"), ("sdpa_mask", "joint"), *((name, "edge") for name in edge)]
    memory = axes.twinx()
    memory.set(yscale="log", ylabel="MiB (dotted)")
    for name, form in kinds:
        found = list(timed(rows, group="length", form=form, contestant=name))
        if not found:
            continue
        tokens = [row["tokens"] for row in found]
        (line,) = axes.plot(
            tokens, [r["step_seconds"]["p50"] for r in found], marker="o", label=f"{LABELS[name]}, {form} form"
        )
        if all(row["peak_bytes"] for row in found):
            memory.plot(tokens, [r["peak_bytes"] / 2**20 for r in found], linestyle=":", color=line.get_color())
    axes.legend(fontsize="small")
    return figure
