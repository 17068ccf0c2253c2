"""benchmarks/gpu.py: what it times is what it says, and its whole path runs without a GPU at toy size."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import bench, cases, gpu, gpu_checks, measure
from benchmarks.naive import PerEdgeLoop
from canvas_engineering import AttentionDispatcher
from canvas_kernels import reference
from canvas_kernels.table import row_scale

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
        options["row_scale"] = row_scale(table, options["active"], torch.float32)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_dispatcher_is_not_timed(dtype, tmp_path, monkeypatch):
    layout, topology = cases.TOY[0].declare()
    ours, loop = AttentionDispatcher(topology, layout, 16, 2), PerEdgeLoop(topology, layout, 16, 2)
    loop.load_state_dict(ours.state_dict())
    x = torch.randn(2, layout.num_positions, 16, generator=torch.Generator().manual_seed(0))
    found = gpu_checks.check_module(ours, loop, x, dtype)
    assert found["faults"] == [] and set(found["errors"]) == {"out", "x", *dict(ours.named_parameters())}
    assert (max(found["budgets"].values()) == gpu_checks.FLOAT32_BUDGET) is (dtype == torch.float32)
    with torch.no_grad():
        ours.fn_modules["cross_attention"].v_proj.weight.mul_(1.001 if dtype == torch.float32 else 1.1)
    found = gpu_checks.check_module(ours, loop, x, dtype)
    assert {"out", "x"} <= {fault.split(":")[0] for fault in found["faults"]}
    session = gpu.Session(tmp_path, interpret=True)
    monkeypatch.setattr(gpu_checks, "check_module", lambda *_: found)
    monkeypatch.setattr(gpu.Session, "seconds", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(gpu.Wrong, match="toy: out: error"):
        gpu.dispatcher(session)
    (row,) = measure.read_rows(tmp_path / "dispatcher.jsonl")
    assert row["faults"] == found["faults"] and "seconds" not in row


@pytest.mark.parametrize("which", range(4))
def test_a_tile_candidate_with_other_results_is_not_timed(which, tmp_path, monkeypatch):
    session = gpu.Session(tmp_path, interpret=True)
    monkeypatch.setattr(gpu.Session, "seconds", lambda *_: {"p50": 1.0})
    leaves = [torch.randn(1, 1, 4, 8, requires_grad=True) for _ in range(3)]
    attending = lambda: torch.nn.functional.scaled_dot_product_attention(*leaves), leaves, torch.ones(1, 1, 4, 8)
    shipped = list(gpu.results(*attending))
    for dtype in (torch.float32, torch.bfloat16):
        wanted = [x.to(dtype) for x in shipped]
        assert gpu.time_candidate(attending, wanted, "dq", (16, 16, 1, 2), session)["seconds"] == 1.0
        wanted[which] = wanted[which] * (1.0001 if dtype == torch.float32 else 1.05)
        row = gpu.time_candidate(attending, wanted, "dq", (16, 16, 1, 2), session)
        assert "seconds" not in row and row["failed"].startswith(f"Wrong: {gpu_checks.RESULTS[which]}: error")


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
    assert [(row["provider"], row["form"]) for row in rows] == [
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
    ours, loop = measure.read_rows(tmp_path / "dispatcher.jsonl")
    assert ours["faults"] == [] and 0 < max(ours["errors"].values()) < 2e-5 and loop["provider"] == "per_edge"
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".jsonl") == ["profile.txt"]


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
    (command,) = commands
    assert command[1:-1] == ["-m", "benchmarks.gpu", "--out", str(tmp_path), "--phases", "profile", "--elapsed"]
    assert 0 <= float(command[-1]) < 60

    def fault():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.undo()
    session = gpu.Session(tmp_path, interpret=True)
    assert session.usable()
    session.device = "cuda"
    monkeypatch.setattr(torch.cuda, "synchronize", fault)
    assert not session.usable()


def test_cases_after_a_device_fault_are_timed_in_a_new_process(tmp_path, monkeypatch, capsys):
    first, second, third = (dataclasses.replace(cases.TOY[0], name=name) for name in ("first", "second", "third"))
    monkeypatch.setattr(cases, "TOY", (first, second, third))
    monkeypatch.setattr(measure, "environment", lambda device: {"device": "abacus"})
    commands, begun, answers = [], [], iter([True, False, False, True, True])
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: 1000.0)
    monkeypatch.setattr(gpu.Session, "usable", lambda session: next(answers))

    def run(found, settings):
        for case in found:
            begun.append((case.name, settings.deadline - time.perf_counter()))
            yield [{"case": case.name, "form": "joint", "provider": "ours", "skipped": "this is a test"}]

    monkeypatch.setattr(bench, "run", run)
    arguments = ["--out", str(tmp_path), "--interpret"]
    assert gpu.main([*arguments, "--phases", "timings,profile"]) == 1
    (command,) = commands
    assert command[3:7] == ["--out", str(tmp_path), "--phases", "timings,profile"]
    assert command[-2:] == ["--after", "second"]
    assert "after second the device answers no more" in capsys.readouterr().out
    assert gpu.main([*arguments, "--phases", "timings", "--elapsed", "100", *command[-2:]]) == 0
    assert [name for name, _ in begun] == ["first", "second", "third"]
    assert [left for _, left in begun] == [gpu.TIMINGS_UNTIL, gpu.TIMINGS_UNTIL, gpu.TIMINGS_UNTIL - 100]
    rows = measure.read_rows(tmp_path / "timings.jsonl")
    assert [(row["case"], row["device"]) for row in rows] == [(case.name, "abacus") for case in cases.TOY]
    # nothing is left to time after the last
    answers = iter([False, False])
    assert gpu.main([*arguments, "--phases", "timings", "--after", "second"]) == 1 and len(commands) == 1


def test_the_profile_knows_nothing_of_earlier_runs(tmp_path, capsys):
    stale = {"case": "gone", "form": "joint", "provider": "ours", "step_seconds": {"p50": 9.0}}
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
