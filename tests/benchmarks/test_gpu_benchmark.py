"""benchmarks/gpu.py: what it times is what it says, and its whole path runs without a GPU at toy size."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import cases, gpu, gpu_checks, measure
from benchmarks.naive import PerEdgeLoop
from canvas_engineering import AttentionDispatcher
from canvas_kernels.triton_ops import configs

ROOT = Path(__file__).resolve().parents[2]


class Here:
    """Makes the calls of a pool in this process."""

    def run(self, calls, until, on_rows, workers=1) -> list[str]:
        if time.time() >= until:
            return [*calls]
        for name, call in calls.items():
            on_rows(name, call())
        return []


@pytest.mark.parametrize("factor", [1 + 1e-4, math.nan])
def test_a_wrong_or_unwritten_result_is_a_fault(factor, monkeypatch):
    task = gpu_checks.Task(16, torch.float32, "joint", False, 60)
    right = gpu_checks.launch.forward

    def wrong(*args, **kwargs):
        out, *others = right(*args, **kwargs)
        return out * factor, *others

    monkeypatch.setattr(gpu_checks.launch, "forward", wrong)
    assert any(fault.startswith("out: error") for fault in gpu_checks.run_task(task, "cpu")[0]["faults"])


@pytest.mark.parametrize(
    ("head_dim", "dtype", "form", "gained", "layout"),
    [
        (16, torch.float32, "sigmoid", True, "contiguous"),
        (8, torch.float32, "edge", False, "rows"),
        (8, torch.float32, "edge", False, "fused"),
        (16, torch.float16, "edge", True, "contiguous"),
    ],
)
def test_right_results_are_within_their_budgets(head_dim, dtype, form, gained, layout):
    (row,) = gpu_checks.run_task(gpu_checks.Task(head_dim, dtype, form, gained, 60, layout), "cpu")
    assert row["faults"] == [] and set(row["errors"]) == set(gpu_checks.RESULTS[: 4 + gained])
    assert max(row["budgets"].values()) < (1e-4 if dtype == torch.float32 else 5e-3)


def test_what_is_allocated_under_the_checks_is_nan():
    with gpu_checks.poisoned():
        assert torch.empty(3).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_dispatcher_is_not_timed(dtype, tmp_path, monkeypatch):
    session, usual = gpu.Session(tmp_path, True), AttentionDispatcher.load_state_dict
    monkeypatch.setattr(gpu.Session, "dtype", dtype)
    monkeypatch.setattr(AttentionDispatcher, "__init__", torch_backend(AttentionDispatcher.__init__))
    gpu.dispatcher(session, "dispatcher", Here())
    (ours, loop) = session.rows("dispatcher")
    module = PerEdgeLoop(*reversed(cases.TOY[0].declare()), 32, 1)
    assert set(ours["errors"]) == {"out", "x", *dict(module.named_parameters())} and loop["provider"] == "per_edge_loop"
    assert (max(ours["budgets"].values()) == measure.BUDGET) is (dtype == torch.float32) and "step_seconds" in ours

    def load(self, state):
        usual(self, state)
        with torch.no_grad():
            self.fn_modules["cross_attention"].v_proj.weight.mul_(1.001 if dtype == torch.float32 else 1.1)

    monkeypatch.setattr(AttentionDispatcher, "load_state_dict", load)
    (tmp_path / "dispatcher.jsonl").unlink()
    gpu.dispatcher(session, "dispatcher", Here())
    ours = session.rows("dispatcher")[0]
    assert "step_seconds" not in ours and " out: error" in ours["failed"] and " x: error" in ours["failed"]
    (told,) = gpu.faults(session, ["dispatcher"])
    assert told.startswith("dispatcher, toy: Wrong: ")


def torch_backend(init):
    """The interpreter takes no bfloat16."""
    return lambda self, *args, backend="auto", **options: init(self, *args, **options)


@pytest.mark.parametrize("which", gpu_checks.RESULTS[:4])
@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1.0001), (torch.bfloat16, 1.05)])
def test_a_tile_candidate_with_other_results_is_not_timed(which, dtype, factor):
    leaves = {name: torch.randn(1, 1, 4, 8, requires_grad=True) for name in gpu_checks.RESULTS[1:4]}
    attend = torch.nn.functional.scaled_dot_product_attention
    run = measure.Run(attend, [*leaves.values()], leaves, torch.ones(1, 1, 4, 8))
    candidate = gpu_checks.Candidate("dq", configs.Config(16, 16, 1, 2))
    shipped = {name: x.to(dtype) for name, x in run.results().items()}
    assert gpu.time_candidate(run, shipped, candidate, "cpu")["seconds"] >= 0
    run.times.clear()
    with pytest.raises(measure.Wrong, match=f"{which}: error"):
        gpu.time_candidate(run, shipped | {which: shipped[which] * factor}, candidate, "cpu")
    assert run.times == []


def misbehave(how: str) -> list[dict]:
    if how == "raise":
        raise RuntimeError("out of memory")
    if how == "die":
        os._exit(3)
    if how == "hang":
        time.sleep(600)
    if how == "lose the device":
        torch.cuda.is_initialized, torch.cuda.synchronize = (lambda: True), misbehave_on_synchronize
    return [{"process": os.getpid()}]


def misbehave_on_synchronize():
    raise RuntimeError("an illegal memory access")


def calls_of(*hows: str) -> dict:
    return {how: functools.partial(misbehave, how) for how in hows}


def test_a_call_that_raises_dies_hangs_or_loses_the_device_takes_no_other_with_it(monkeypatch):
    pool, rows = gpu.Pool(), {}
    note = lambda name, new: rows.update({name: new[0]})  # noqa: E731
    hows = ("one", "raise", "two", "die", "three", "lose the device", "four")
    assert pool.run(calls_of(*hows), time.time() + 600, note) == []
    assert {how: row["failed"] for how, row in rows.items() if "failed" in row} == {
        "raise": "RuntimeError: out of memory",
        "die": "its process died",
    }
    one, two, three, lost, four = (rows[how]["process"] for how in hows if "process" in rows[how])
    assert one == two != three == lost != four
    monkeypatch.setattr(gpu, "GRACE", 0.0)
    assert pool.run(calls_of("hang", "late"), time.time() + 2, note) == ["hang", "late"]
    monkeypatch.setattr(gpu, "PATIENCE", 0.0)
    assert pool.run(calls_of("hang", "late"), time.time() + 2, note) == ["late"]
    assert rows["hang"] == {"failed": "it took too long"} and "late" not in rows


def test_every_configuration_of_every_architecture_is_run_by_the_checks(monkeypatch):
    for arch in configs.ARCHITECTURES:
        monkeypatch.setattr(gpu_checks.launch, "arch_of", lambda device, arch=arch: arch)
        for task in itertools.chain(*gpu_checks.tasks()):
            assert gpu_checks.unused(gpu_checks.mixed_table(task.form, task.positions), task, "cpu") == []


def test_what_most_users_meet_is_checked_first():
    first, others = gpu_checks.tasks()
    kinds = {(task.head_dim, task.form, task.gained) for task in first}
    assert kinds == {(head_dim, *form) for head_dim in (64, 128) for form in gpu_checks.FORMS}
    assert {(task.dtype, task.layout) for task in first} == {(torch.bfloat16, "contiguous")}
    assert {40, 72, 88, 120} <= {task.head_dim for task in others}
    assert {"rows", "fused"} == {task.layout for task in others} - {"contiguous"}
    names = [task.name for task in (*first, *others)]
    assert len(set(names)) == len(names)


def run_command(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"} | environment
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(folder), "--interpret", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_command_runs_at_toy_size_and_resumes(tmp_path):
    programs, out = tmp_path / "bin", tmp_path / "out"
    programs.mkdir()
    # tools that run what they are to watch
    for name, options in (("ncu", 4), ("compute-sanitizer", 4)):
        (programs / name).write_text(f'#!/bin/sh\necho "{name} $2"\nshift {options}\nexec "$@"\n')
        (programs / name).chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    done = run_command(out, PATH=path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    rows = {phase: measure.read_rows(out / f"{phase}.jsonl") for phase in gpu.PHASES}
    assert [(row["provider"], row["form"]) for row in rows["providers"]] == [
        ("ours", "joint"),
        ("ours_torch", "joint"),
        ("sdpa_mask", "joint"),
        ("ours", "edge"),
        ("ours_torch", "edge"),
        ("per_edge_loop", "edge"),
        ("grouped", "edge"),
        ("sdpa_unmasked", "reference"),
    ]
    assert [row["provider"] for row in rows["ours"]] == ["ours", "ours", "sdpa_unmasked"]
    for row in (*rows["ours"], *rows["providers"]):
        assert row["item"] == "toy" and row["commit"] and row["triton"] and row["forward_seconds"]["p50"] > 0
        assert row["form"] == "reference" or set(row["errors"]) == {"out", "dq", "dk", "dv"}
        assert max(row.get("errors", {"out": 0.0}).values()) < 1e-5
    assert "canvas_kernels::attention" in (out / "profile.txt").read_text()
    counts = {phase: len(rows[phase]) for phase in ("defaults", "correctness", "sweep", "tools")}
    assert counts == {"defaults": 5, "correctness": 2, "sweep": 6, "tools": 2}
    checked = [row for phase in counts for row in rows[phase]]
    assert not any(row.get("faults") or row.get("failed") for row in checked)
    ours, loop = rows["dispatcher"]
    assert "failed" not in ours and 0 < max(ours["errors"].values()) < 1e-5 and loop["provider"] == "per_edge_loop"
    assert (out / "compute-sanitizer.txt").read_text().startswith("compute-sanitizer memcheck")
    assert (out / "ncu.txt").read_text().startswith("ncu basic")
    # what is missing is done again, and nothing else
    (out / "profile.jsonl").unlink()
    (out / "correctness.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows["correctness"][1:]))
    done = run_command(out, "--resume", "--phases", "defaults,ours,correctness,profile", PATH=path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    later = {phase: measure.read_rows(out / f"{phase}.jsonl") for phase in gpu.PHASES}
    assert [row["item"] for row in later["correctness"]] == [rows["correctness"][i]["item"] for i in (1, 0)]
    same = set(gpu.PHASES) - {"correctness", "profile"}
    assert {phase for phase in same if later[phase] == rows[phase]} == same and len(later["profile"]) == 1


def test_what_is_known_is_not_done_again_and_nothing_is_begun_after_a_deadline(tmp_path, capsys):
    session = gpu.Session(tmp_path, True, environment={"commit": "abc"})
    session.run("ours", {"one": lambda: [{"found": 1}], "two": lambda: [{"failed": "no"}]}, Here())
    rows = session.rows("ours")
    assert [row["item"] for row in rows] == ["one", "two"] and rows[0]["found"] == 1 and rows[0]["commit"] == "abc"
    assert gpu.faults(session, ["ours"]) == ["ours, two: no"]
    session.write("ours", "two", [{"found": 2}, {"skipped": measure.NO_TIME}])
    again = {"one": lambda: pytest.fail("known"), "two": lambda: [{"found": 3}], "three": lambda: [{}]}
    session.run("ours", again, Here())
    rows = session.rows("ours")
    assert [(row["item"], row.get("found")) for row in rows] == [("one", 1), ("two", 3), ("three", None)]
    late = gpu.Session(tmp_path, True, began=time.time() - gpu.PHASES["ours"])
    late.run("ours", {"one": lambda: pytest.fail("known"), "four": lambda: pytest.fail("late")}, Here())
    assert "no time was left for 1: four" in capsys.readouterr().out and session.rows("ours") == rows


def test_the_slowest_of_ours_is_profiled(tmp_path):
    session = gpu.Session(tmp_path, interpret=True)
    assert session.slowest() == ("toy", "edge")
    timed = {"provider": "ours", "form": "joint", "case": "toy"}
    session.write("ours", "toy", [timed | {"step_seconds": {"p50": 9.0}}, timed | {"failed": "no"}])
    assert session.slowest() == ("toy", "joint")


def test_head_dim_128_and_long_cases_are_timed_early():
    ordered = sorted(cases.GPU, key=gpu.is_late)
    early = [case for case in ordered if not gpu.is_late(case)]
    assert ordered[: len(early)] == early and {128} < {case.head_dim for case in early}
    assert set(cases.EARLY_ON_A_GPU) <= {case.name for case in early}


def test_a_phase_that_does_not_exist_is_refused(tmp_path):
    done = run_command(tmp_path, "--phases", "timing")
    assert done.returncode == 2 and "no phase timing" in done.stderr


def test_a_run_takes_less_than_six_minutes_and_a_resumed_one_less_than_four():
    until = list(gpu.PHASES.values())
    assert until == sorted(until) and list(gpu.PHASES)[:4] == ["defaults", "ours", "correctness", "providers"]
    assert until[-1] + gpu.GRACE < 360 and gpu.RESUMED * until[-1] + gpu.GRACE < 240
