"""python -m canvas_engineering doctor: what it prints, that its numbers can be wrong, and that it needs no extra."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from email.message import Message
from pathlib import Path

import pytest
import torch

from canvas_engineering import doctor

ROOT = Path(__file__).resolve().parents[2]


def test_every_backend_that_is_here_is_right():
    checks = list(doctor.check_numbers())
    assert [check for check in checks if not check.is_right] == []
    backends = {(check.backend, check.form) for check in checks}
    wanted = {"reference", "torch", *["triton"] * (importlib.util.find_spec("triton") is not None)}
    assert backends == {(backend, form) for backend in wanted for form in ("edge", "joint")}
    assert all(check.error > 0 for check in checks), "float64 is not what was compared with"


@pytest.mark.parametrize("fault", ["value", "gradient", "nan", "raises"])
def test_wrong_numbers_are_seen(monkeypatch, capsys, fault):
    right = doctor.canvas_attention

    def wrong(q, k, v, plan, backend):
        if backend != "torch":
            return right(q, k, v, plan, backend=backend)
        if fault == "raises":
            raise RuntimeError("no such instruction")
        out = right(q, k, v, plan, backend=backend)
        if fault == "gradient":
            return out + 0.1 * (v - v.detach())
        return (
            torch.where(torch.arange(len(out.flatten())).view_as(out) == 7, torch.nan, out)
            if fault == "nan"
            else 1.1 * out
        )

    monkeypatch.setattr(doctor, "canvas_attention", wrong)
    assert doctor.doctor() == 1
    printed = capsys.readouterr().out
    # both forms, in float32 and in bfloat16 (and on each GPU)
    assert printed.count("WRONG") >= 4 and printed.endswith(" wrong\n")
    assert (printed.count("RuntimeError: no such instruction") >= 4) == (fault == "raises")


def test_extras_are_held_against_what_is_installed(monkeypatch, capsys):
    wanted = [
        "torch>=2.10",
        'typer>=0.16; extra == "cli"',
        "canvas-engineering[cli]; extra == 'dev'",
        'pytest[more]>=8; extra == "dev"',
        'elsewhere>=1; platform_system == "Plan9" and extra == "dev"',
        'old>=2.10.1; extra == "draw"',
    ]
    versions = {"typer": "0.16.0", "pytest": "9.0", "old": "2.9.7"}
    described = Message()
    for extra in ("cli", "dev", "draw"):
        described["Provides-Extra"] = extra
    requires = {"canvas-engineering": wanted, "pytest": ['missing>=3; extra == "more"']}
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: described)
    monkeypatch.setattr(importlib.metadata, "requires", requires.get)
    monkeypatch.setattr(doctor, "version_of", lambda name: versions.get(name, ""))
    monkeypatch.setattr(doctor, "check_numbers", lambda: iter(()))
    assert doctor.doctor() == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  "))
    assert lines["cli"] == "complete: typer 0.16.0"
    assert lines["dev"] == "lacks missing>=3: pip install 'canvas-engineering[dev]'"
    assert lines["draw"] == "lacks old>=2.10.1 (not 2.9.7): pip install 'canvas-engineering[draw]'"


def test_the_doctor_needs_no_extra():
    blocked = "import sys\nfor name in ('typer', 'rich', 'matplotlib'): sys.modules[name] = None\n"
    run = "import runpy\nsys.argv = ['canvas', 'doctor']\nrunpy.run_module('canvas_engineering', run_name='__main__')"
    path = f"{ROOT}:{ROOT / 'kernels'}"
    environment = {"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(Path.home())}
    done = subprocess.run(
        [sys.executable, "-c", blocked + run], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("canvas-engineering ", "torch ", "devices\n  cpu", "extras", "all right"):
        assert words in done.stdout
