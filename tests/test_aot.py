"""What Triton compiles from the shipped configurations, for a GPU that need not be there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import aot, measure, static_model, yardstick
from canvas_kernels.triton_ops import configs

ROOT = Path(__file__).resolve().parent.parent


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
    assert " changed, 0 of the earlier ones gone" in done.stdout
    return measure.read_rows(file)


def test_every_pass_in_every_form_compiles_without_a_fault(compiled):
    dense = [row for row in compiled if row["form"] == "dense"]
    assert [(row["stage"], row["head_dim"]) for row in dense] == [(s, d) for d in (128, 64) for s in yardstick.KERNELS]
    compiled = [row for row in compiled if row["form"] != "dense"]
    passes = {(row["stage"], row["form"], row["signed"]) for row in compiled}
    wanted = {(stage, form, False) for stage in ("forward", "dq", "dkv") for form in ("edge", "joint", "sigmoid")}
    wanted |= {(stage, "in_place", False) for stage in ("forward", "delta", "dq")}
    assert passes == wanted | {("dq", "sigmoid", True)}
    assert len(compiled) == 2 * 2 * len(passes)


def test_dots_of_large_tiles_are_warp_group_products(compiled):
    large = [row for row in compiled if row["tile"] != "16x16"]
    assert all(row["wgmma"] == row["dots"] >= static_model.DOTS[row["stage"]] for row in large)
    assert [row for row in large if "waste" not in row] == []


def test_walked_tensors_are_copied_asynchronously(compiled):
    assert all(row["copies"] >= 2 for row in compiled if row["form"] != "dense")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"wgmma": 3}, "3 of 4 dots are wgmma"),
        ({"copies": 1}, "1 of 2 walked tensors"),
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
    assert complaint in " ".join(aot.faults(launch, sound | change))
    assert aot.faults(launch, {key: value for key, value in sound.items() if key != "waste"})
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


def test_small_tiles_float32_and_other_architectures_need_no_wgmma():
    row = {"spilled": 0, "wgmma": 0, "copies": 2, "shared": 1024}
    for launch in (
        configs.Launch("sm_90", "dq", "joint", False, 64, torch.bfloat16, configs.Config(16, 16, 1, 2)),
        configs.Launch("sm_90", "dq", "joint", False, 64, torch.float32, configs.Config(64, 32, 8, 2)),
        configs.Launch("sm_80", "dq", "joint", False, 64, torch.float16, configs.Config(64, 64, 4, 2)),
    ):
        assert aot.faults(launch, row) == []


def test_every_shipped_launch_is_compiled():
    dense = {launch for launch in aot.launches() if launch.form == "dense"}
    assert set(aot.launches()) - dense == set(configs.shipped()) and len(dense) == 6
    assert {launch.dtype for launch in aot.launches(["sm_80"])} == {torch.bfloat16, torch.float16, torch.float32}


KNOWN_FAULTS = {"aot.json": 68, "aot-3.6.0.json": 22}
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
    assert found["dense", 64]["forward"] > 400 and found["dense", 128]["backward"] > 400


def test_each_triton_has_its_own_rows():
    assert aot.committed("3.6.0").name == "aot-3.6.0.json" and aot.committed("9.9").name == "aot.json"


@pytest.mark.parametrize("name", KNOWN_FAULTS)
def test_the_committed_rows_are_of_what_is_shipped(name):
    rows = measure.read_rows(measure.RESULTS / name)
    shipped = [aot.describe(launch) for launch in aot.launches(sorted({row["arch"] for row in rows}))]
    described = [{key: row[key] for key in shipped[0]} for row in rows]
    assert sorted(map(str, described)) == sorted(map(str, shipped))
