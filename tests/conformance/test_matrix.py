"""Every subject in every mode: right against float64, or refused as declared."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from canvas_engineering import ATTENTION_REGISTRY
from tests.conformance import modes, table
from tests.conformance.outcomes import CELLS, REFUSALS, outcome
from tests.conformance.subjects import SUBJECTS

ROW, COLUMNS = "cross_attention", ("eager", "tensors of any strides", "NaN where nobody attends to")
# inductor itself makes a small batch a constant where few rows meet a matrix, so few of these batches are dynamic
INDUCTOR = [
    ("cross_attention", "torch.compile, dynamic batch"),
    ("cross_attention", "torch.compile of func.grad"),
    ("canvas_attention (edge)", "torch.compile under inference_mode"),
    ("canvas_attention (joint)", "torch.compile, dynamic batch"),
    ("linear_attention", "torch.compile of func.grad"),
    ("mamba", "torch.compile of func.grad"),
    ("a program", "torch.compile under inference_mode"),
]
TRITON = [
    (subject, mode)
    for subject in ("cross_attention", "sigmoid_attention", "canvas_attention (edge)", "canvas_attention (joint)")
    for mode in (
        "eager",
        "batch of 0",
        "tensors of any strides",
        "NaN where nobody attends to",
        "torch.compile, dynamic batch",
    )
]

# what torch says of itself, in some version
pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),
    pytest.mark.filterwarnings("ignore:Guards may run slower on Python"),
]


def is_fast(subject: str, mode: str) -> bool:
    return subject == ROW or mode in COLUMNS


def check_cell(subject: str, mode: str, **changes) -> None:
    """Runs a cell and holds it to its outcome."""
    refusal, this = outcome(subject, mode), dataclasses.replace(SUBJECTS[subject], **changes)
    if refusal is None:
        modes.MODES[mode](this)
        return
    with pytest.raises(Exception, match=refusal.message):
        modes.MODES[mode](this)
    # torch itself leaves these hooks off where torch.func meets them inside a compiled graph
    torch._C._autograd._saved_tensors_hooks_enable()
    # a refusal leaves everything else as it was
    modes.MODES["eager"](this)


@pytest.mark.parametrize(
    ("subject", "mode"), [pytest.param(*c, marks=() if is_fast(*c) else pytest.mark.slow) for c in CELLS]
)
def test_a_cell_is_right_or_refused(subject, mode):
    check_cell(subject, mode)


@pytest.mark.slow
@pytest.mark.parametrize(("subject", "mode"), INDUCTOR)
def test_a_cell_is_right_under_inductor(subject, mode, monkeypatch):
    monkeypatch.setattr(modes, "COMPILER", "inductor")
    check_cell(subject, mode)


# numpy, which computes for the interpreter, warns of every NaN
@pytest.mark.filterwarnings("ignore:invalid value|All-NaN slice:RuntimeWarning")
@pytest.mark.slow
@pytest.mark.parametrize(("subject", "mode"), TRITON)
def test_a_cell_is_right_in_triton(subject, mode):
    pytest.importorskip("triton", reason="triton is not installed")
    check_cell(subject, mode, backend="triton")


@pytest.mark.slow
@pytest.mark.parametrize("mode", [mode for mode in modes.MODES if mode != "batch of 0"])
def test_a_mode_sees_wrong_numbers(mode):
    wrong = dataclasses.replace(SUBJECTS["none"], name="half too much", oracle=lambda module, x: 1.5 * x)
    with pytest.raises(AssertionError, match=r"error .* of the largest"):
        modes.MODES[mode](wrong)


def test_every_cell_has_an_outcome():
    assert {SUBJECTS[s].name for s, _ in CELLS} == set(SUBJECTS) and len(CELLS) == len(SUBJECTS) * len(modes.MODES)
    assert REFUSALS.keys() <= set(CELLS), "a refusal of a cell that does not exist"
    assert {*INDUCTOR, *TRITON} <= set(CELLS)
    run = {ATTENTION_REGISTRY[name] for name in SUBJECTS if name in ATTENTION_REGISTRY}
    assert run >= {cls for cls in ATTENTION_REGISTRY.values() if cls.__module__.startswith("canvas_engineering.")}
    for refusal in REFUSALS.values():
        re.compile(refusal.message)
        assert refusal.message and refusal.note


def test_the_table_shows_every_mode_and_subject():
    page = table.document()
    assert (Path(__file__).parents[2] / table.PATH).read_text() == page, "python -m tests.conformance.table"
    assert all(f"| {mode} |" in page for mode in modes.MODES) and all(name in page for name in SUBJECTS)
