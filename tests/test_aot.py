"""What Triton compiles from the shipped configurations, for a GPU that need not be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import aot
from canvas_kernels import configs

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    """sm_90, head_dim 64 and 128, bf16: every pass and form. Compiled in a process that does not interpret kernels."""
    pytest.importorskip("triton")
    file = tmp_path_factory.mktemp("aot") / "rows.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    command = [sys.executable, "-m", "benchmarks.aot", "--arch", "sm_90", "--head-dim", "64,128", "--dtype", "bf16"]
    command += ["--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return json.loads(file.read_text())["rows"]


def test_every_pass_in_every_form_compiles_without_a_fault(compiled):
    passes = {(row["stage"], row["form"], row["signed"]) for row in compiled}
    both = {(stage, form, False) for stage in ("forward", "dq", "dkv") for form in ("edge", "joint")}
    sigmoid = {("forward", "sigmoid", False), ("dq", "sigmoid", False), ("dq", "sigmoid", True)}
    sigmoid.add(("dkv", "sigmoid", False))
    assert passes == both | sigmoid | {("delta", "edge", False), ("dq", "edge", True), ("dkv", "edge", True)}
    assert len(compiled) == 2 * 2 * len(passes)
    assert [row for row in compiled if row["faults"] or row["spilled"]] == []


def test_dots_of_large_tiles_are_warp_group_products(compiled):
    dots = {"forward": 2, "delta": 2, "dq": 3, "dkv": 4}
    large = [row for row in compiled if row["tile"] != "16x16"]
    assert len(large) == len(compiled) // 2
    assert [row["wgmma"] for row in large] == [dots[row["stage"]] for row in large]


def test_walked_tensors_are_copied_asynchronously(compiled):
    assert all(row["copies"] == 2 for row in compiled)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"spilled": 8}, "spills 8 bytes"),
        ({"wgmma": 3}, "3 of 4 dots are wgmma"),
        ({"copies": 1}, "1 of 2 walked tensors"),
        ({"shared": 240000}, "240000 bytes of shared memory"),
    ],
)
def test_faults_are_seen(change, complaint):
    launch = configs.Launch("sm_90", "dkv", "edge", False, 64, torch.bfloat16, configs.Config(64, 64, 4, 3))
    sound = {"spilled": 0, "wgmma": 4, "copies": 2, "shared": 66560}
    assert aot.faults(launch, sound) == []
    assert complaint in " ".join(aot.faults(launch, sound | change))


def test_small_tiles_float32_and_other_architectures_need_no_wgmma():
    row = {"spilled": 0, "wgmma": 0, "copies": 2, "shared": 1024}
    for launch in (
        configs.Launch("sm_90", "dq", "joint", False, 64, torch.bfloat16, configs.Config(16, 16, 1, 2)),
        configs.Launch("sm_90", "dq", "joint", False, 64, torch.float32, configs.Config(64, 32, 8, 2)),
        configs.Launch("sm_80", "dq", "joint", False, 64, torch.float16, configs.Config(64, 64, 4, 2)),
    ):
        assert aot.faults(launch, row) == []


def test_every_shipped_launch_is_compiled():
    assert set(aot.launches()) == set(configs.shipped())
    assert {launch.dtype for launch in aot.launches(["sm_80"])} == {torch.bfloat16, torch.float16, torch.float32}
