"""The example that torchrun starts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from examples import two_gpus

ROOT = Path(two_gpus.__file__).resolve().parents[1]


def test_torchrun_trains_what_one_process_trains():
    example = "examples/two_gpus.py"
    line = f"torchrun --standalone --nproc-per-node 2 {example}"
    assert line in (ROOT / "README.md").read_text()
    arguments = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", example, "--steps", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    printed = re.findall(r"process (\d): \d+ of 576 .*sends ([\d,]+) bytes.*loss ([\d.]+), alone ([\d.]+)", done.stdout)
    assert {process for process, *_ in printed} == {"0", "1"}
    assert all(loss == alone for *_, loss, alone in printed)


def test_one_process_runs_it_too(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert two_gpus.main(["--steps", "2"]) == 0
    assert "one process: loss" in capsys.readouterr().out
