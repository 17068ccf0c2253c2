"""The figures of docs/performance.md, written from the committed rows: ``python -m benchmarks.readme``."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks import measure, report
from canvas_engineering.files import replace_file

README = Path(__file__).parent.parent / "docs/performance.md"
BEGIN, END = "<!-- measured: python -m benchmarks.readme -->\n", "<!-- end of measured -->\n"
WORDS = {
    "robot": "robot: camera, action, reward",
    "causal_video": "causal video",
    "multi_rate": "multi-rate: fast, and slow by interpolation",
    "surgical_robot": "surgical robot: sensors and two arms, typed",
    "fleet": "fleet of 50 vehicles",
    "computer_use": "computer use: screen, mouse, keyboard, language",
    "cogvideox_dense": "CogVideoX, dense",
    "cogvideox_previous_frame": "CogVideoX, same frame + previous frame",
    "cogvideox_three_frames": "CogVideoX, window of three frames",
    "cogvideox_tiles": "CogVideoX, spatial tiles",
}
ATTENTION = {
    "joint form: dense mask": ("joint", "sdpa_mask"),
    "mask of used positions": ("joint", "sdpa_mask_used"),
    "FlexAttention, forward": ("joint", "flex"),
    "in our packed order": ("joint", "flex_packed"),
    "edge form: loop over edges": ("edge", "per_edge_loop"),
    "grouped by hand": ("edge", "grouped"),
}
NAMES = ("dispatcher", "fleet", "suite", "long", "cogvideox", "plan_cost")


def measured(
    dispatcher: list[dict],
    fleet: list[dict],
    suite: list[dict],
    long: list[dict],
    cogvideox: list[dict],
    plan_cost: list[dict],
) -> str:
    """The Markdown between the marks, from the rows of the benchmarks of those names."""
    suite = report.merged(suite, long)
    held = {"per_edge_loop": "edge", "dense_mask": "joint"}
    forms = {(row["case"], row["contestant"], row.get("form", "edge")): row["ratio"] for row in dispatcher}
    seconds = {row["case"]: row["seconds"]["p50"] for row in plan_cost}
    block = report.one(suite, case="cogvideox_previous_frame", form="joint", contestant="ours")
    dense = report.one(suite, case="cogvideox_previous_frame", contestant="sdpa_unmasked")
    forward, backward = (_ratio(_inverse(block[f"{part}_roofline"]), 2) for part in ("forward", "backward"))
    steps = {row["contestant"]: row for row in fleet if "contestant" in row}
    first, loop, noise = dispatcher[0], steps["per_edge_loop"], report.noise_in(suite)
    lines = [
        *report.paragraph(
            f"A layer: the dispatcher, with its projections. {_where(dispatcher)}; medians of {first['rounds']} paired "
            "rounds, the 10 % and 90 % quantiles in brackets; the fleet in "
            f"{loop['rounds']}, {report.commits([loop])}. The loop takes one softmax per read, as the dispatcher does, "
            "and projects what each read takes, as code with an attention module for each connection; the loop of the "
            "second table has no projections. A dense mask takes one softmax over all that a position reads (the joint "
            "form), so it is timed against our attention of that form between the same projections. Before anything is "
            "timed, outputs and all gradients of each contestant agree with its form in float64 to 1e-5 of the largest "
            "(the fleet's with three vehicles)."
        ),
        "",
        "| canvas | positions | times faster than the loop | in joint form, than the dense mask |",
        "|---|---|---|---|",
    ]
    for row in dispatcher:
        if row["contestant"] == "ours":
            ratios = (forms.get((row["case"], *who)) for who in held.items())
            cells = ("–" if ratio is None else _ratio(ratio) for ratio in ratios)
            lines.append(f"| {WORDS[row['case']]} | {row['positions']:,} | {' | '.join(cells)} |")
    lines += [
        f"| {WORDS['fleet']} | {loop['positions']:,} | {loop['ratio_of_medians']:.0f} | – |",
        "",
        *report.paragraph(
            "Attention alone, on q, k and v: the time of others over ours, within one form; medians of at least "
            f"{report.MEDIAN_ROUNDS} paired rounds, or one round where that is said. {_where(suite)}. *=* marks "
            f"ties: two calls of the same thing differ here by up to {100 * report.noise_of(suite):.0f} %, in some "
            "cases by more, and the median is as close to 1, or the quartiles enclose 1. Each contestant's output and "
            "gradients, FlexAttention's output, agree with float64 to 1e-5 of the largest in the run that times it. "
            f"{report.SAMPLED} All cases, quartiles, rates, memory and figures are in [the report]"
            "(benchmarks/report.md). FlexAttention has no backward on a CPU: forward alone is compared, in "
            "canvas order and in the order that our plan packs tokens in. A mask of used positions leaves out those "
            "that neither read nor are read, which it gathers the others from. Density is that of joint form, where "
            "edge form computes other pairs of that as well. –: it cannot run here, or it is another column's call; "
            "the report says which."
        ),
        "",
        f"| canvas | tokens | density | {' | '.join(ATTENTION)} |",
        "|---" * (3 + len(ATTENTION)) + "|",
    ]
    for row in report.timed(suite, form="joint", contestant="ours"):
        if row["case"] in WORDS:
            named = ({"form": form, "contestant": name} for form, name in ATTENTION.values())
            others = (report.one(suite, case=row["case"], **who) for who in named)
            cells = ("–" if x is None else report.ratio_of(x, noise(x)) for x in others)
            edge = report.percent(report.one(suite, case=row["case"], form="edge", contestant="ours")["density"])
            density = report.percent(row["density"])
            density += f", edge {edge}" * (edge != density)
            first_cells = f"{WORDS[row['case']]} | {row['tokens']:,} | {density}"
            lines.append(f"| {first_cells} | {' | '.join(cells)} |")
    lines += [
        "",
        *report.paragraph(
            f"Compiling the plan, cold: {1e3 * seconds['computer_use']:.0f} ms for a computer-use canvas of 16,384 "
            f"positions, {seconds['video of 256 frames']:.2f} s for a causal video of 256 frames of 64 × 64: 1,048,576."
        ),
        "",
        *report.paragraph(
            f"Attention of a CogVideoX block ({block['tokens']:,} tokens; same frame + previous frame + text, "
            f"{100 * block['density']:.0f} % of all pairs; one softmax) takes {forward} times as long forward, and "
            f"{backward} times backward, as attention without a mask takes for as many pairs, of "
            f"{dense['reference_tokens']:,} tokens, in the same {block['rounds']} rounds. {_against_stock(cogvideox)}"
        ),
        "",
        *report.paragraph(_where_it_does_not_help(suite)),
    ]
    return "\n".join(lines) + "\n"


def _against_stock(rows: list[dict]) -> str:
    """How many times faster than stock attention over all of a model's tokens: what its users have today."""
    found = {row["case"].removeprefix("attention, "): row for row in rows if row["case"].startswith("attention")}
    gains = {
        part: _ratio(_inverse({name: share * row["density"] for name, share in row["ratio"].items()}))
        for part, row in found.items()
    }
    row = found["forward"]
    return (
        f"Stock attention over all {row['tokens']:,} tokens takes {gains['forward']} times as long as ours forward and "
        f"{gains['backward']} times backward, in {row['rounds']} paired rounds ({report.commits([row])})."
    )


def _where_it_does_not_help(suite: list[dict]) -> str:
    """Who takes less time forward alone, or less memory."""
    forward, larger = {}, {}
    ours = {(row["case"], row["form"]): row for row in report.timed(suite, contestant="ours")}
    for row in report.timed(suite):
        own, who = ours.get((row["case"], row["form"])), row["contestant"]
        if own is None or who == "ours":
            continue
        forward.setdefault(who, []).append((row["forward_ratio"]["p50"], row["case"]))
        if own.get("peak_bytes") and row.get("peak_bytes"):
            larger.setdefault(who, []).append((own["peak_bytes"] / row["peak_bytes"], row["case"]))
    told = [
        f"{report.LABELS[who]} {report.short(min(found)[0])} of ours ({min(found)[1]})"
        for who, found in forward.items()
        if min(found)[0] < 1
    ]
    held = [
        f"{report.short(max(found)[0])} times {report.LABELS[who]} ({max(found)[1]})"
        for who, found in larger.items()
        if max(found)[0] > 1
    ]
    return (
        "Where it does not help: ours keeps for backward what others compute again. The least time that others take "
        f"forward alone: {'; '.join(told) or 'none'}. The most memory that ours takes, tables included: "
        f"{'; '.join(held) or 'no more than others'}. A model trained dense loses what a topology leaves out."
    )


def _where(rows: list[dict]) -> str:
    first = rows[0]
    return f"{first['device']}, {first['cores']} cores, torch {first['torch']}, {report.commits(rows)}"


def _inverse(quantiles: dict[str, float]) -> dict[str, float]:
    """Quantiles of 1 / x from those of x."""
    return {f"p{100 - int(name[1:])}": 1 / value for name, value in quantiles.items()}


def _ratio(quantiles: dict[str, float], digits: int = 1) -> str:
    middle, low, high = (f"{quantiles[q]:.{digits}f}" for q in ("p50", "p10", "p90"))
    return f"{middle} ({low} to {high})"


def section(text: str) -> tuple[str, str, str]:
    """README before, between and after the marks. ValueError: no marks."""
    if BEGIN not in text or END not in text:
        raise ValueError(f"{README.name} has no section between {BEGIN.strip()} and {END.strip()}")
    before, rest = text.split(BEGIN, 1)
    between, after = rest.split(END, 1)
    return before, between, after


def main() -> int:
    rows = (measure.read_rows(measure.RESULTS / f"{name}.json") for name in NAMES)
    before, _, after = section(README.read_text())
    replace_file(README, f"{before}{BEGIN}{measured(*rows)}{END}{after}".encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
