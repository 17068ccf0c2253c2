"""scripts/setup.sh: what it calls ready, with a stand-in for Python that installs what a machine could; versions.sh."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "setup.sh"
# Every environment variable is the exit status of one thing that setup asks for.
STAND_IN = """#!/bin/sh
case "$*" in
    "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python && exit $VENV ;;
    *importlib.metadata*) echo 2.10.0 ;;
    *"import torch"*) exit $TORCH ;;
    *--no-deps*) exit $ALONE ;;
    *--no-index*) exit $OFFLINE ;;
    *"pip install"*) exit $ONLINE ;;
esac
"""


def set_up(folder: Path, *arguments: str, **fails: int) -> subprocess.CompletedProcess:
    (folder / "scripts").mkdir(exist_ok=True)
    shutil.copy(SCRIPT, folder / "scripts")
    python = folder / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    statuses = dict.fromkeys(("VENV", "TORCH", "ALONE", "OFFLINE", "ONLINE"), 0) | fails
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(python)} | {k: str(v) for k, v in statuses.items()}
    command = ["bash", str(folder / "scripts/setup.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("fails", "ready", "says"),
    [
        ({}, True, "installed canvas-engineering with its dev and data extras"),
        ({"ONLINE": 1}, True, "no package index answered.*which suffice"),
        ({"ONLINE": 1, "OFFLINE": 1}, False, "packages are missing; installed canvas-engineering alone"),
        ({"ONLINE": 1, "OFFLINE": 1, "ALONE": 1}, False, "nothing could be installed; running from this folder"),
        ({"VENV": 1}, False, "no virtual environment could be made"),
    ],
)
def test_ready_means_that_nothing_is_missing(tmp_path, fails, ready, says):
    done = set_up(tmp_path, **fails)
    assert done.returncode == 0, done.stderr
    assert re.search(says, done.stdout), done.stdout
    assert (tmp_path / ".venv/ready").exists() == ready


def test_a_machine_that_becomes_complete_is_ready_the_next_time(tmp_path):
    set_up(tmp_path, ONLINE=1, OFFLINE=1)
    set_up(tmp_path)
    assert (tmp_path / ".venv/ready").exists()


def test_no_torch_is_an_error(tmp_path):
    done = set_up(tmp_path, TORCH=1)
    assert done.returncode == 1
    assert "there is no torch" in done.stderr
    assert not (tmp_path / ".venv/ready").exists()


def test_extras_are_ready_when_they_are_installed(tmp_path):
    set_up(tmp_path)
    assert set_up(tmp_path, "export", ONLINE=1).returncode == 0
    assert not (tmp_path / ".venv/ready-export").exists()
    set_up(tmp_path, "export")
    assert (tmp_path / ".venv/ready-export").exists()


def try_versions(folder: Path, *names: str) -> subprocess.CompletedProcess:
    """versions.sh on a machine that has no Python at all."""
    (folder / "scripts").mkdir()
    shutil.copy(SCRIPT.with_name("versions.sh"), folder / "scripts")
    (folder / "bin").mkdir()
    for tool in ("bash", "cat", "dirname", "mkdir"):
        (folder / "bin" / tool).symlink_to(shutil.which(tool))
    environment = {"PATH": str(folder / "bin"), "PYENV_ROOT": str(folder)}
    command = [str(folder / "bin/bash"), str(folder / "scripts/versions.sh"), *names]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_python_that_is_missing_is_a_row_of_the_table(tmp_path):
    done = try_versions(tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == ["oldest", "reference", "newest"]
    assert all(row[1] == "skipped:" for row in rows)


def test_an_environment_that_there_is_not_is_named(tmp_path):
    done = try_versions(tmp_path, "old")
    assert done.returncode != 0
    assert "choose among oldest, reference and newest, not old" in done.stderr
