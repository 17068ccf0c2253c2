"""The matrix as a page of the docs: ``python -m tests.conformance.table`` writes docs/conformance.md."""

from __future__ import annotations

from pathlib import Path

from tests.conformance.modes import MODES
from tests.conformance.outcomes import outcome
from tests.conformance.subjects import SUBJECTS

PATH = "docs/conformance.md"
INTRODUCTION = """# Modes of torch

Every attention function, `canvas_attention` in both forms, a program (triggers, gates, slot banks, residuals) and a
grafted model run in every mode of torch below, on a canvas with unused positions, several frames, offsets and weights.
"yes": outputs and gradients are within 1e-5 of an oracle in float64 (16 roundings of the dtype under autocast). A
footnote: the mode is refused with an error that says what its footnote says. Subjects of equal outcomes share a column.

`make slow` runs every cell; `python -m tests.conformance.table` writes this page from the outcomes that the tests
hold the cells to.
"""


def document() -> str:
    """The page: a row for each mode, a column for subjects whose outcomes are equal in all modes, and footnotes."""
    columns: dict[tuple, list[str]] = {}
    for subject in SUBJECTS:
        columns.setdefault(tuple(outcome(subject, mode) for mode in MODES), []).append(subject)
    notes = list(dict.fromkeys(refusal.note for outcomes in columns for refusal in outcomes if refusal is not None))
    lines = [["mode", *(", ".join(subjects) for subjects in columns.values())], ["---"] + ["---"] * len(columns)]
    for mode, outcomes in zip(MODES, zip(*columns)):
        cells = ["yes" if refusal is None else f"refused [^{notes.index(refusal.note) + 1}]" for refusal in outcomes]
        lines.append([mode, *cells])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    footnotes = "".join(f"\n[^{number}]: {note}.\n" for number, note in enumerate(notes, 1))
    return f"{INTRODUCTION}\n{table}\n{footnotes}"


if __name__ == "__main__":
    (Path(__file__).parents[2] / PATH).write_text(document())
