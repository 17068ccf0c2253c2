"""What Triton compiles from the shipped configurations, for a GPU that need not be there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import aot, measure, static_model
from canvas_kernels.triton_ops import configs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    """sm_90, head_dim 64 and 128, bf16: every pass and form. Compiled in a process that does not interpret kernels."""
    pytest.importorskip("triton")
    file = tmp_path_factory.mktemp("aot") / "rows.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    command = [sys.executable, "-m", "benchmarks.aot", "--arch", "sm_90", "--head-dim", "64,128", "--dtype", "bf16"]
    command += ["--save", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    # of all that are committed, those that were asked for
    assert " worse, 0 gone" in done.stdout
    return measure.read_rows(file)


def test_every_pass_in_every_form_compiles_without_a_fault(compiled):
    dense = [row for row in compiled if row["form"] == "dense"]
    assert [(row["stage"], row["head_dim"]) for row in dense] == [("forward", 128), ("forward", 64)]
    compiled = [row for row in compiled if row["form"] != "dense"]
    passes = {(row["stage"], row["form"], row["signed"]) for row in compiled}
    wanted = {(stage, form, False) for stage in ("forward", "dq", "dkv") for form in ("edge", "joint", "sigmoid")}
    wanted |= {(stage, "in_place", False) for stage in ("forward", "delta", "dq")}
    assert passes == wanted | {("dq", "sigmoid", True)}
    assert len(compiled) == 2 * 2 * len(passes)


def test_dots_of_large_tiles_are_warp_group_products_and_walked_tensors_copied_asynchronously(compiled):
    large = [row for row in compiled if row["tile"] != "16x16"]
    assert all(row["wgmma"] == row["dots"] >= static_model.DOTS[row["stage"]] and "waste" in row for row in large)
    assert all(row["copies"] >= 2 for row in compiled if row["form"] != "dense")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"wgmma": 3}, "3 of 4 dots are wgmma"),
        ({"copies": 1}, "1 of 2 walked tensors"),
        ({"wgmma": 3, "waste": None}, "3 of 4 dots are wgmma; no loop of matrix products"),
        ({"shared": 240000}, "240000 bytes of shared memory"),
        ({"spilled": 24}, "spills 24 bytes"),
        ({"waste": 1.01}, "waste 1.01"),
        ({"serialised": 2}, "2 wgmmas are serialised"),
        ({"local": 4}, "4 local accesses in loops"),
    ],
)
def test_faults_are_seen(change, complaint):
    launch = configs.Launch("sm_90", "dkv", "edge", False, 64, torch.bfloat16, configs.Config(64, 64, 4, 3))
    sound = {"spilled": 16, "wgmma": 4, "dots": 4, "copies": 2, "shared": 66560}
    sound |= {"waste": 1.0, "serialised": 0, "local": 0}
    assert aot.faults(launch, sound) == []
    changed = {key: value for key, value in (sound | change).items() if value is not None}
    assert complaint in "; ".join(aot.faults(launch, changed))
    small = launch._replace(config=configs.Config(16, 16, 1, 2))
    assert "spills 8 bytes" in aot.faults(small, sound | {"spilled": 8})


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "num_warps", "programs"),
    [
        ("sm_90", 168, 0, 4, 3),
        ("sm_90", 169, 0, 4, 2),
        ("sm_90", 184, 0, 1, 8),  # two warps in each of four partitions, though 65,536 registers would do for eleven
        ("sm_90", 32, 227 * 1024, 4, 1),
        ("sm_90", 32, 113 * 1024, 4, 2),
        ("sm_80", 32, 49 * 1024, 4, 2),
        ("gfx942", 128, 0, 4, 4),
        ("gfx942", 129, 0, 4, 3),
        ("gfx942", 20, 0, 4, 8),
        ("gfx942", 20, 32 * 1024, 4, 2),
        ("gfx942", 400, 0, 8, 0),
    ],
)
def test_programs_that_fit_a_multiprocessor(arch, registers, shared, num_warps, programs):
    assert aot.resident(arch, registers, shared, num_warps) == programs


def test_the_committed_rows_hold_what_fits():
    for row in measure.read_rows(measure.RESULTS / "aot.json"):
        resources = (row[name] for name in ("arch", "registers", "shared", "num_warps"))
        assert row["resident"] == aot.resident(*resources) >= 1, row


@pytest.mark.parametrize(
    ("arch", "dtype", "shape"),
    [("sm_90", "bf16", (16, 16, 1, 2)), ("sm_90", "fp32", (64, 32, 8, 2)), ("sm_80", "fp16", (64, 64, 4, 2))],
)
def test_small_tiles_float32_and_other_architectures_need_no_wgmma(arch, dtype, shape):
    launch = configs.Launch(arch, "dq", "joint", False, 64, aot.DTYPES[dtype], configs.Config(*shape))
    assert aot.faults(launch, {"spilled": 0, "wgmma": 0, "copies": 2, "shared": 1024}) == []


def test_every_shipped_launch_is_compiled():
    dense = {launch for launch in aot.launches() if launch.form == "dense"}
    assert set(aot.launches()) - dense == set(configs.shipped()) and len(dense) == 2
    assert {launch.dtype for launch in aot.launches(["sm_80"])} == {torch.bfloat16, torch.float16, torch.float32}


KNOWN_FAULTS = {"aot.json": 63, "aot-3.6.0.json": 22}
"""Kernels with faults that are committed: these may only become fewer."""
RATES = {
    "aot.json": {
        ("joint", 64): (406, 343),
        ("edge", 64): (375, 344),
        ("joint", 128): (531, 386),
        ("edge", 128): (481, 368),
    },
    "aot-3.6.0.json": {
        ("joint", 64): (406, 350),
        ("edge", 64): (375, 344),
        ("joint", 128): (542, 400),
        ("edge", 128): (490, 392),
    },
}
"""Of each form and head_dim in bfloat16, the forward and backward TFLOP/s that are predicted at least."""


@pytest.mark.parametrize("name", KNOWN_FAULTS)
def test_known_faults_become_fewer_and_predicted_rates_no_lower(name):
    rows = measure.read_rows(measure.RESULTS / name)
    assert sum(bool(row["faults"]) for row in rows) <= KNOWN_FAULTS[name]
    assert len({row["triton"] for row in rows}) == 1
    found = {(row["form"], row["head_dim"]): row for row in static_model.pass_rates(rows) if row["dtype"] == "bf16"}
    for key, (forward, backward) in RATES[name].items():
        assert found[key]["forward"] >= forward and found[key]["backward"] >= backward, found[key]
    assert found["dense", 64]["forward"] > 400 and found["dense", 128]["forward"] > 480


@pytest.mark.parametrize("name", KNOWN_FAULTS)
def test_the_committed_rows_are_of_what_is_shipped(name):
    assert aot.committed("3.6.0").name == "aot-3.6.0.json" and aot.committed("9.9").name == "aot.json"
    rows = measure.read_rows(measure.RESULTS / name)
    shipped = [aot.describe(launch) for launch in aot.launches(sorted({row["arch"] for row in rows}))]
    described = [{key: row[key] for key in shipped[0]} for row in rows]
    assert sorted(map(str, described)) == sorted(map(str, shipped))


ROW = {"arch": "sm_90", "stage": "dq", "form": "edge", "signed": False, "head_dim": 64, "dtype": "bf16"}
ROW |= {"tile": "64x64", "registers": 168, "spilled": 0, "shared": 1024, "wgmma": 3, "copies": 2, "resident": 3}
ROW |= {"waste": 1.5, "serialised": 0, "local": 0, "predicted": 400.0, "faults": ["waste 1.5"], "triton": "3.9.0"}


@pytest.mark.parametrize(
    ("change", "worse"),
    [
        ({}, False),
        ({"registers": 255, "shared": 999, "wgmma": 4, "predicted": 388.1, "instructions": 400}, False),
        *(({name: ROW[name] + 1}, True) for name in ("spilled", "waste", "serialised", "local")),
        *(({name: ROW[name] - 1}, True) for name in ("wgmma", "copies", "resident")),
        ({"predicted": 387.9}, True),
    ],
)
def test_a_kernel_that_is_worse_fails_unless_another_triton_made_it(change, worse):
    lines, failed = aot.compare([ROW], [ROW | change])
    assert failed is worse and (" → " in lines[0]) is worse and ("--commit" in lines[-2:][0]) is worse
    lines, failed = aot.compare([ROW], [ROW | change | {"triton": "9.9"}])
    assert not failed and "Triton 3.9.0 before, 9.9 now" in lines[0] and (" → " in lines[1]) is worse


@pytest.mark.parametrize("triton", ["3.9.0", "9.9"])
def test_a_configuration_that_is_gone_fails(triton):
    rows = measure.read_rows(measure.RESULTS / "aot.json")
    known = sum(bool(row["faults"]) for row in rows)
    same = f"{len(rows)} configurations: 0 worse, 0 gone, {known} with faults, 0 of them new"
    assert aot.compare(rows, rows) == ([same], False)
    lines, failed = aot.compare(rows, [row | {"triton": triton} for row in rows[1:]])
    assert failed and lines[-3].endswith(f"{rows[0]['tile']}: GONE") and "1 gone" in lines[-1]
    assert "--commit" in lines[-2] and aot.compare(rows[1:], rows)[1] is bool(rows[0]["faults"])


def test_only_known_faults_are_let_through():
    sound = ROW | {"waste": 1.0, "faults": []}
    assert not aot.compare([ROW], [ROW])[1] and not aot.compare([ROW], [sound])[1] and not aot.compare([], [sound])[1]
    assert aot.compare([ROW], [ROW | {"faults": ["waste 1.5", "spills 8 bytes"]}])[1]
    # with nothing to compare with, and with another Triton's, every new fault fails
    for earlier in ([], [sound], [sound | {"triton": "9.9"}]):
        assert aot.compare(earlier, [ROW])[1]
