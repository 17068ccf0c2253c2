"""benchmarks/gpu.py: what it times is what it says, and its whole path runs without a GPU at toy size."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import gpu_cases, gpu_checks
from canvas_kernels import reference

ROOT = Path(__file__).resolve().parent.parent
TOY = gpu_cases.TOY[0]


def test_the_pattern_is_one_thing_in_all_its_spellings():
    """text (5) reads and is read by all; three groups read themselves and the one before."""
    group = np.repeat([-1, 0, 1, 2], [5, 9, 14, 11])
    lag = group[:, None] - group[None, :]
    text = (group[:, None] < 0) | (group[None, :] < 0)
    wanted = text | (lag == 0) | (lag == 1)
    assert TOY.positions == 39 and (TOY.group("cpu").numpy() == group).all()
    assert ((TOY.table("joint").to_dense() > 0) == wanted).all()
    assert ((TOY.table("edge").to_dense() > 0) == wanted).all()
    assert TOY.table("joint").pairs == TOY.table("edge").pairs == wanted.sum()
    selects, index = gpu_cases.selector(TOY, "cpu"), torch.arange(39)
    assert (selects(0, 0, index[:, None], index[None, :]).numpy() == wanted).all()


def test_a_tenth_of_cogvideox_5b_is_timed():
    pattern = next(p for p in gpu_cases.PATTERNS if p.name == "half_frames_cogvideox_d64")
    assert (pattern.batch, pattern.heads, pattern.head_dim, pattern.positions) == (1, 48, 64, 17_776)
    pairs = 226 * 17_776 + 17_550 * 226 + (26 + 24) * 675**2
    assert pattern.table("joint").pairs == pairs and 0.09 < pairs / 17_776**2 <= 0.1


@pytest.mark.parametrize(("name", "form"), [("sdpa_mask", "joint"), ("per_edge", "edge")])
def test_contestants_compute_what_ours_computes(name, form):
    q, k, v = torch.randn(3, 1, 2, TOY.positions, 16, generator=torch.Generator().manual_seed(0)).double()
    wanted = reference.attention(q, k, v, TOY.table(form), scale=0.25)[0]
    assert (gpu_cases.contestant(name, TOY, q, k, v)() - wanted).abs().max() < 1e-6


def test_an_unknown_contestant_is_named():
    with pytest.raises(KeyError, match="fastest"):
        gpu_cases.contestant("fastest", TOY, None, None, None)


@pytest.mark.parametrize("form", ["edge", "joint", "sigmoid"])
def test_the_plain_implementation_that_sets_budgets_is_right(form):
    table = gpu_checks.mixed_table(form, 100)
    q, k, v = torch.randn(3, 1, 1, 100, 8, generator=torch.Generator().manual_seed(0)).double()
    options = dict(scale=0.3, gain=None, active=None, row_scale=None)
    options["activation"] = "sigmoid" if form == "sigmoid" else "softmax"
    if form != "joint":
        options |= dict(gain=torch.tensor([1.2, -0.7, 0.0, 0.9]).double(), active=torch.tensor([1, 0, 1, 1]))
        options["row_scale"] = table.row_scale(options["active"].float(), "cpu")
    wanted = reference.attention(q, k, v, table, **options)[0]
    assert (gpu_checks._dense(q, k, v, table, options) - wanted).abs().max() < 1e-6


def test_a_wrong_result_is_a_fault(monkeypatch):
    assert gpu_checks.run_task(gpu_checks.Task(16, torch.float32, "sigmoid", True, 30), "cpu")["faults"] == []
    task = gpu_checks.Task(16, torch.float32, "joint", False, 30)
    sound = gpu_checks.run_task(task, "cpu")
    assert sound["faults"] == []
    right = gpu_checks.launch.forward

    def wrong(*args, **kwargs):
        out, lse = right(*args, **kwargs)
        return out * (1 + 1e-4), lse

    monkeypatch.setattr(gpu_checks.launch, "forward", wrong)
    faults = gpu_checks.run_task(task, "cpu")["faults"]
    assert any(fault.startswith("out: error") for fault in faults)
    monkeypatch.setattr(gpu_checks.launch, "forward", lambda *a, **k: (right(*a, **k)[0] * math.nan, right(*a, **k)[1]))
    assert any(fault.startswith("out: error inf") for fault in gpu_checks.run_task(task, "cpu")["faults"])


def test_every_configuration_of_every_architecture_is_run_by_the_checks(monkeypatch):
    from canvas_kernels import configs

    for arch in configs.ARCHITECTURES:
        monkeypatch.setattr(gpu_checks.launch, "arch_of", lambda device, arch=arch: arch)
        for task in gpu_checks.tasks(1600, dtypes=(torch.bfloat16, torch.float32)):
            assert gpu_checks._unused(gpu_checks.mixed_table(task.form, task.positions), task, "cpu") == []


def test_the_command_runs_at_toy_size(tmp_path):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path), "--interpret"]
    command += ["--phases", "timings,profile,dispatcher"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "timings.jsonl").read_text().splitlines()]
    assert [(row["contestant"], row["form"]) for row in rows] == [
        ("ours", "joint"),
        ("ours", "edge"),
        ("sdpa_mask", "joint"),
        ("per_edge", "edge"),
    ]
    assert all(row["commit"] and row["triton"] and row["forward_seconds"]["p50"] > 0 for row in rows)
    assert all(row["error"] < 1e-5 for row in rows[:2])
    assert "canvas_kernels::attention" in (tmp_path / "profile.txt").read_text()
    assert len((tmp_path / "dispatcher.jsonl").read_text().splitlines()) == 2


def test_a_phase_that_does_not_exist_is_refused(tmp_path):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path), "--interpret", "--phases", "timing"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no phase timing" in done.stderr
