"""From rows to what people look at: a Markdown report and figures."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from benchmarks import measure
from benchmarks.cases import TOO_LONG
from benchmarks.problem import SAMPLED_ROWS
from benchmarks.static_model import FLOP_PER_PAIR, pass_rates
from benchmarks.suite import GATED_HEADS
from canvas_engineering.files import replace_file, replacing

FIGURES = ("speedup", "roofline", "scaling")
LABELS = {
    "ours": "ours",
    "ours_torch": "ours, torch backend",
    "sdpa_mask": "SDPA, dense mask",
    "sdpa_mask_used": "SDPA, mask of used tokens",
    "flex": "FlexAttention",
    "flex_packed": "FlexAttention, packed order",
    "flex_flash": "FlexAttention, FlashAttention-4",
    "xformers": "xformers",
    "flashinfer": "FlashInfer",
    "flashinfer_packed": "FlashInfer, packed order",
    "per_edge_loop": "loop over edges",
    "grouped": "grouped by hand",
    "varlen": "FlashAttention, varlen",
    "sdpa_unmasked": "SDPA without a mask",
}
FLEX = {"flex", "flex_packed", "flex_flash"}
FLEX_MEMORY = (
    "FlexAttention's MiB are those of forward alone, ours and others' those of forward + backward; where it had to "
    "compile for a shape, they hold the compiler's memory too."
)
PREDICTED = (
    "What the machine code of full tiles promises on an H200 (`benchmarks/static_model.py`), in TFLOP/s on selected "
    "pairs, each pass with its best tile, beside a plain dense kernel without a table. Predicted, not measured."
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
            with replacing(folder / f"{name}.png") as file:
                figure.savefig(file, format="png", dpi=120, bbox_inches="tight")
            drawn.append(name)
    replace_file(folder / "report.md", markdown(rows, drawn).encode())
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
        "`tensor_bytes` in the rows of ours is less: the tensors of one call.",
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
    compiled = [measure.read_rows(path) for path in sorted(measure.RESULTS.glob("aot*.json"), reverse=True)]
    if compiled:
        lines += ["## The kernels, compiled ahead of time", ""]
        shipped = [row for row in compiled[0] if row["form"] != "dense"]
        lines += [*_aot_table(shipped), "", *_rates_table(compiled), ""]
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


def _rates_table(compiled: list[list[dict]]) -> list[str]:
    """The predicted rates of passes by each Triton's rows, those of the plain dense kernel beside ours."""
    titles, cells = ["bfloat16, head_dim, form"], {}
    for number, rows in enumerate(compiled):
        titles += [f"{part}, Triton {rows[0]['triton']}" for part in FLOP_PER_PAIR]
        for row in pass_rates(rows):
            if row["dtype"] == "bf16":
                cell = cells.setdefault((row["head_dim"], row["form"]), [""] * 2 * len(compiled))
                cell[2 * number : 2 * number + 2] = [f"{row[part]:.0f}" for part in FLOP_PER_PAIR]
    names = {"dense": "a plain dense kernel"}
    rows = [[f"{head_dim}, {names.get(form, form)}", *cell] for (head_dim, form), cell in sorted(cells.items())]
    return [*paragraph(PREDICTED), "", *_table(titles, rows)]


# -- figures -----------------------------------------------------------------------------------------------------------

PARTS = {"step": "forward + backward", "forward": "forward alone"}


def _axes(title: str, *labels: tuple[str, str]):
    """A figure with a panel for each pair of x's and y's label, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(7.5, 5 * len(labels)), 5.5), layout="constrained")
    figure.suptitle(title, fontsize="large")
    panels = figure.subplots(1, len(labels), squeeze=False)[0]
    for axes, (x, y) in zip(panels, labels):
        axes.set(xlabel=x, ylabel=y, xscale="log", yscale="log")
        axes.grid(True, which="both", alpha=0.2)
    return figure, *panels


def _legend(figure, axes) -> None:
    """Below the panels, where no point is."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small")


def _by_part(rows: Iterable[dict]) -> dict[str, list[dict]]:
    """Rows by what they are judged by."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(part_of(row), []).append(row)
    return found


def speedup_figure(rows: list[dict]):
    """How many times as long as ours a dense mask and FlexAttention take, against density; the canvases that have names
    are named. None without such rows."""
    others = ("sdpa_mask", "sdpa_mask_used", "flex", "flex_packed")
    found = [row for name in others for row in timed(rows, form="joint", contestant=name)]
    if not found:
        return None
    labels = "share of all pairs that is computed (density)", "time over ours"
    figure, axes = _axes("Joint form: how many times as long as ours others take", labels)
    for number, (name, marker) in enumerate(zip(others, "oDs^")):
        for part, own in _by_part(timed(rows, form="joint", contestant=name)).items():
            ratio, density = [row[f"{part}_ratio"]["p50"] for row in own], [row["density"] for row in own]
            colour, (fill, words) = f"C{number}", ("none", "open") if part == "forward" else (f"C{number}", "filled")
            label = f"{LABELS[name]}, {PARTS[part]} ({words})"
            axes.scatter(density, ratio, marker=marker, facecolors=fill, edgecolors=colour, label=label, zorder=3)
    axes.axhline(1, color="grey", linewidth=1, label="as long as ours")
    ends = np.array([min(row["density"] for row in found), max(row["density"] for row in found)])
    axes.plot(ends, 1 / ends, color="grey", linestyle=":", label="1 / density: if time went with pairs alone")
    _name_canvases(axes, found)
    _legend(figure, axes)
    return figure


def _name_canvases(axes, rows: list[dict]) -> None:
    """Names over the panel, and a thin line down to the points of each."""
    canvases = {row["case"]: row["density"] for row in rows if row.get("group") == "canvas"}
    for density in canvases.values():
        axes.axvline(density, color="grey", linewidth=0.6, alpha=0.5, zorder=1)
    if canvases:
        top = axes.secondary_xaxis("top")
        top.set_xticks([*canvases.values()], [*canvases], rotation=35, ha="left", rotation_mode="anchor", fontsize=8)
        top.minorticks_off()


def roofline_figure(rows: list[dict]):
    """Rate on the selected pairs as a share of unmasked attention's, against the keys that a query reads; None without
    rows."""
    if not one(rows, contestant="ours"):
        return None
    labels = "keys that a query reads, on average", "share of the speed, forward + backward"
    figure, axes = _axes("Speed on the pairs that are read, as a share of attention without a mask", labels)
    kinds = (("ours", "joint", "o"), ("ours", "edge", "D"), ("sdpa_mask", "joint", "x"), ("per_edge_loop", "edge", "+"))
    for name, form, marker in kinds:
        found = [row for row in timed(rows, form=form, contestant=name) if "step_roofline" in row]
        if found:
            share = [row["step_roofline"]["p50"] for row in found]
            keys = [row["pairs"] / row["tokens"] for row in found]
            axes.scatter(keys, share, marker=marker, label=f"{LABELS[name]}, {form} form", alpha=0.8, zorder=3)
    axes.axhline(1, color="grey", linewidth=1, label=LABELS["sdpa_unmasked"])
    _legend(figure, axes)
    return figure


def scaling_figure(rows: list[dict]):
    """Seconds and memory against length, of the cases of group "length"; None without such rows. Beside those who have
    no backward stands ours without it."""
    if not one(rows, group="length"):
        return None
    labels = [("tokens", y) for y in ("seconds", "MiB held at most")]
    figure, seconds, memory = _axes("Causal video, frames of 16 × 16: time and memory by length", *labels)
    joint, edge = ("ours", "sdpa_mask", "flex", "flex_packed"), ("ours", "per_edge_loop", "grouped")
    kinds = [*((name, "joint") for name in joint), *((name, "edge") for name in edge)]
    colours = {kind: f"C{number}" for number, kind in enumerate(kinds)}
    styles = {"step": {"marker": "o"}, "forward": {"marker": "o", "linestyle": "--", "fillstyle": "none"}}

    def draw(axes, name: str, form: str, part: str, rows: list[dict], value: Callable[[dict], float]) -> None:
        label, style = f"{LABELS[name]}, {form} form, {PARTS[part]}", styles[part]
        tokens = [row["tokens"] for row in rows]
        axes.plot(tokens, [value(row) for row in rows], label=label, color=colours[name, form], **style)

    shown = {kind: _by_part(timed(rows, group="length", contestant=kind[0], form=kind[1])) for kind in kinds}
    for kind, parts in shown.items():
        for part, own in parts.items():
            draw(seconds, *kind, part, own, lambda row, part=part: row[f"{part}_seconds"]["p50"])
            held = [row for row in own if row.get("peak_bytes")]
            draw(memory, *kind, part, held, lambda row: row["peak_bytes"] / 2**20)
    for form in ("joint", "edge"):
        ours = shown["ours", form].get("step", [])
        if ours and any("forward" in parts for (_, other), parts in shown.items() if other == form):
            draw(seconds, "ours", form, "forward", ours, lambda row: row["forward_seconds"]["p50"])
    _legend(figure, seconds)
    return figure
