"""benchmarks/gpu.py: what it times is what it says, and its whole path runs without a GPU at toy size."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_checks, measure
from canvas_kernels import reference

ROOT = Path(__file__).resolve().parent.parent


def test_time_without_a_kernel_is_counted_once():
    assert gpu.idle_share([(7, 10), (0, 4), (2, 5), (3, 4)]) == 0.2
    assert math.isnan(gpu.idle_share([]))


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


def misbehave(task: gpu_checks.Task, device: str) -> dict:
    if task.form == "raise":
        raise RuntimeError("an illegal memory access")
    if task.form == "die":
        os._exit(3)
    if task.form == "hang":
        time.sleep(600)
    return {"form": task.form, "process": os.getpid(), "faults": []}


def test_a_task_that_raises_dies_or_hangs_takes_no_other_with_it():
    def apart(forms: list[str], seconds: float) -> list[dict]:
        chosen = [gpu_checks.Task(16, torch.bfloat16, form, False, 30) for form in forms]
        return gpu_checks.run_apart(chosen, "cpu", 1, time.perf_counter() + seconds, misbehave)

    rows = apart(["one", "two", "raise", "three", "die", "four"], 600)
    faults = [row["faults"] for row in rows]
    assert faults == [[], [], ["RuntimeError: an illegal memory access"], [], ["its process died"], []]
    processes = [row["process"] for row in rows if "process" in row]
    assert processes[0] == processes[1] and len(set(processes)) == 3
    assert rows[2]["dtype"] == "bfloat16" and rows[2]["errors"] == rows[2]["budgets"] == {}
    rows = apart(["hang", "late"], 2)
    assert [row["faults"] for row in rows] == [["no result after 2 s"], ["not checked: no time was left"]]


def test_every_configuration_of_every_architecture_is_run_by_the_checks(monkeypatch):
    from canvas_kernels import configs

    for arch in configs.ARCHITECTURES:
        monkeypatch.setattr(gpu_checks.launch, "arch_of", lambda device, arch=arch: arch)
        for task in gpu_checks.tasks(1600, dtypes=(torch.bfloat16, torch.float32)):
            assert gpu_checks._unused(gpu_checks.mixed_table(task.form, task.positions), task, "cpu") == []


def test_the_command_runs_at_toy_size(tmp_path):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path), "--interpret"]
    command += ["--phases", "correctness,timings,profile,dispatcher,sweep"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "timings.jsonl").read_text().splitlines()]
    assert [(row["contestant"], row["form"]) for row in rows] == [
        ("ours", "joint"),
        ("ours_torch", "joint"),
        ("sdpa_mask", "joint"),
        ("ours", "edge"),
        ("ours_torch", "edge"),
        ("per_edge_loop", "edge"),
        ("grouped", "edge"),
        ("sdpa_unmasked", "reference"),
    ]
    assert all(row["commit"] and row["triton"] and row["forward_seconds"]["p50"] > 0 for row in rows)
    for row in rows[:7]:
        assert set(row["errors"]) == {"out", "dq", "dk", "dv"} and max(row["errors"].values()) < 1e-5
    assert "canvas_kernels::attention" in (tmp_path / "profile.txt").read_text()
    for name, count in (("correctness", 5), ("sweep", 7)):
        found = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert len(found) == count and not any(row.get("faults") or row.get("failed") for row in found)
    assert len((tmp_path / "dispatcher.jsonl").read_text().splitlines()) == 2


def test_phases_after_a_device_fault_run_in_a_new_process(tmp_path, monkeypatch):
    ran, commands = [], []
    monkeypatch.setattr(gpu, "correctness", lambda session: ran.append("correctness"))
    monkeypatch.setattr(gpu, "timings", lambda session: 1 / 0)
    monkeypatch.setattr(gpu, "profile", lambda session: ran.append("profile"))
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    monkeypatch.setattr(measure, "environment", lambda device: {})
    arguments = ["--out", str(tmp_path), "--interpret", "--phases", "correctness,timings,profile"]
    assert gpu.main(arguments) == 1 and ran == ["correctness", "profile"] and commands == []
    monkeypatch.setattr(gpu.Session, "usable", lambda session: False)
    assert gpu.main(arguments) == 1 and ran == ["correctness", "profile", "correctness"]
    assert [command[1:] for command in commands] == [
        ["-m", "benchmarks.gpu", "--out", str(tmp_path), "--phases", "profile"]
    ]

    def fault():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.undo()
    session = gpu.Session(tmp_path, interpret=True)
    assert session.usable()
    session.device = "cuda"
    monkeypatch.setattr(torch.cuda, "synchronize", fault)
    assert not session.usable()


def test_the_profile_knows_nothing_of_earlier_runs(tmp_path, capsys):
    stale = {"case": "gone", "form": "joint", "contestant": "ours", "step_seconds": {"p50": 9.0}}
    (tmp_path / "timings.jsonl").write_text(json.dumps(stale))
    session = gpu.Session(tmp_path, interpret=True)
    gpu.profile(session)
    assert "profile of toy, edge form" in capsys.readouterr().out
    session.write("timings", [stale | {"case": "toy"}])
    gpu.profile(session)
    assert "profile of toy, joint form" in capsys.readouterr().out


def test_a_phase_that_does_not_exist_is_refused(tmp_path):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path), "--interpret", "--phases", "timing"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no phase timing" in done.stderr
