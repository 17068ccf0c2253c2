"""From rows to what people look at: a Markdown report and figures."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from benchmarks import measure

FIGURES = ("speedup", "roofline", "scaling")
LABELS = {
    "ours": "ours",
    "ours_torch": "ours, torch backend",
    "sdpa_mask": "SDPA, dense mask",
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
ENOUGH_ROUNDS = 3
"""For quartiles, and for the noise of a case by itself."""
FEW_ROUNDS_MARGIN = 2
"""Noise is exceeded by one pair in ten; of forty cases that are judged by one pair each, none should be, by chance."""


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


# -- the report --------------------------------------------------------------------------------------------------------


def write(rows: list[dict], folder: Path) -> Path:
    """Writes ``report.md`` and its figures to ``folder``; the report's path."""
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


def markdown(rows: list[dict], figures: list[str]) -> str:
    """The report as text. Every number in it is a row's."""
    first = rows[0]
    where = f"{first['device']}, {first['threads']} thread{'s' * (first['threads'] != 1)}"
    where = f"{first['device']}, driver {first['driver']}" if "driver" in first else where
    noise = np.median([row["noise"] for row in rows if "noise" in row])
    lines = [
        "# Block-sparse attention against what users have without it",
        "",
        f"{where}, torch {first['torch']}, Python {first['python']}, commit {first['commit']}, {first['dtype']}.",
        "Written by `python -m canvas_engineering bench` from its rows. Before anything was timed, each contestant's",
        "output and gradients agreed with float64 (up to 768 query rows of four heads, all keys), in float32 to 1e-5",
        f"of the largest. Two calls of the same thing differ here by up to {100 * noise:.0f} % in nine of ten pairs.",
        "",
        "*Joint* form has one softmax per query over all that it reads, *edge* form one per read. Contestants are",
        "compared within a form, forward + backward; FlexAttention has no backward on a CPU and is compared forward",
        "only. Columns of contestants give their time over ours, the median over rounds. The rate is that of the",
        "selected pairs alone, over that of scaled_dot_product_attention without a mask in the same rounds.",
        "",
        "MiB are the most that is held while a contestant is built and called once, beyond what was there before: by",
        "the process on a CPU, by the allocator on a GPU, tables included. `AttentionPlan.estimate` predicts less, the",
        "tensors of one call (`tensor_bytes` in the rows of ours).",
        "",
    ]
    for form in ("joint", "edge"):
        lines += [f"## {form.capitalize()} form", "", *_form_table(rows, form), ""]
    lines += [f"![{name}]({name}.png)\n" for name in figures]
    lines += ["## What did not run", "", *_left_out(rows), ""]
    aot = measure.RESULTS / "aot.json"
    if aot.exists():
        lines += ["## The kernels, compiled ahead of time", "", *_aot_table(measure.read_rows(aot)), ""]
    return "\n".join(lines)


def _form_table(rows: list[dict], form: str) -> list[str]:
    own = list(timed(rows, form=form, contestant="ours"))
    others = [name for name in LABELS if name != "ours" and one(rows, form=form, contestant=name)]
    titles = ["case", "tokens", "density", "ours, ms", "of SDPA's rate", "MiB", "plan, ms", "first call, s"]
    lines = ["| " + " | ".join([*titles, *(LABELS[name] for name in others)]) + " |"]
    lines.append("|---|" + "---:|" * (len(titles) - 1 + len(others)))
    for row in own:
        ratios = (one(rows, form=form, contestant=name, case=row["case"]) for name in others)
        cells = [
            row["case"],
            f"{row['tokens']:,}",
            f"{100 * row['density']:.1f} %",
            f"{1e3 * row['step_seconds']['p50']:.2f}",
            f"{row['step_roofline']['p50']:.2f}",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}",
            f"{1e3 * row['setup_seconds']:.0f}",
            f"{row['first_seconds']:.2f}",
            *("" if other is None else f"{other[f'{part_of(other)}_ratio']['p50']:.2f}" for other in ratios),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _left_out(rows: list[dict]) -> list[str]:
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        why = row.get("skipped") or row.get("failed")
        if why:
            reasons.setdefault((f"{LABELS[row['contestant']]}, {row['form']} form", why), []).append(row["case"])
    return [f"- {who}: {why} ({', '.join(found)})" for (who, why), found in reasons.items()] or ["Nothing."]


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
