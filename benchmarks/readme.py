"""README's measured figures, written from the committed rows: ``python -m benchmarks.readme``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from benchmarks import measure

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- measured: python -m benchmarks.readme -->\n", "<!-- end of measured -->\n"
WORDS = {
    "robot": "robot: camera, action, reward",
    "causal_video": "causal video",
    "multi_rate": "multi-rate: fast, and slow by interpolation",
}


def measured(dispatcher: list[dict], plan_cost: list[dict]) -> str:
    """The Markdown between README's marks, from the rows of ``benchmarks.dispatcher`` and ``benchmarks.plan_cost``."""
    ratio = {(row["case"], row["contestant"]): row["ratio"] for row in dispatcher}
    seconds = {row["case"]: row["seconds"]["p50"] for row in plan_cost}
    first = dispatcher[0]
    lines = [
        f"{first['device']}, {first['cores']} cores, torch {first['torch']}, commit {first['commit']}; medians of",
        f"{first['rounds']} paired rounds, the 10 % and 90 % quantiles in brackets.",
        "",
        "| canvas | positions | per-edge loop / ours | dense mask / ours |",
        "|---|---|---|---|",
    ]
    for row in dispatcher:
        if row["contestant"] == "ours":
            cells = (_ratio(ratio[row["case"], name]) for name in ("per_edge_loop", "dense_mask"))
            lines.append(f"| {WORDS[row['case']]} | {row['positions']:,} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Compiling the plan, cold: {1e3 * seconds['computer_use']:.0f} ms for a computer-use canvas of 16,384",
        f"positions, {seconds['video of 256 frames']:.2f} s for a causal video of 1,048,576.",
    ]
    return "\n".join(lines) + "\n"


def _ratio(quantiles: dict[str, float]) -> str:
    return f"{quantiles['p50']:.1f} ({quantiles['p10']:.1f} to {quantiles['p90']:.1f})"


def section(text: str) -> tuple[str, str, str]:
    """README before, between and after the marks. ValueError: no marks."""
    if BEGIN not in text or END not in text:
        raise ValueError(f"{README.name} has no section between {BEGIN.strip()} and {END.strip()}")
    before, rest = text.split(BEGIN, 1)
    between, after = rest.split(END, 1)
    return before, between, after


def main() -> int:
    rows = (measure.read_rows(measure.RESULTS / f"{name}.json") for name in ("dispatcher", "plan_cost"))
    before, _, after = section(README.read_text())
    unfinished = README.with_name("README.md.partial")
    unfinished.write_text(f"{before}{BEGIN}{measured(*rows)}{END}{after}")
    os.replace(unfinished, README)
    return 0


if __name__ == "__main__":
    sys.exit(main())
