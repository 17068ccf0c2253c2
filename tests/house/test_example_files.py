"""Examples as files: each runs by its name from any folder, and those of the documents do what they say."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import canvas_kernels
from canvas_engineering import CanvasSchema, compile_attention
from examples import define_canvas

EXAMPLES = Path(define_canvas.__file__).parent
FILES = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "__init__.py")
OURS = ("benchmarks", "examples", "canvas_engineering", "canvas_kernels")


@pytest.mark.parametrize("name", FILES)
def test_examples_run_as_files(name, tmp_path):
    # as if both packages were installed, and nothing else of the project
    site = tmp_path / "site"
    site.mkdir()
    for package in (EXAMPLES.parent / "canvas_engineering", Path(canvas_kernels.__file__).parent):
        (site / package.name).symlink_to(package)
    command = [sys.executable, str(EXAMPLES / name), "--help"]
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    missing = re.search(r"No module named '(\w+)", done.stderr)
    if missing and missing[1] not in OURS and importlib.util.find_spec(missing[1]) is None:
        pytest.skip(f"{name} needs {missing[1]}")
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == [site]


def test_the_index_links_every_example():
    links = re.findall(r"\]\((\w+\.(?:py|ipynb))\)", (EXAMPLES / "README.md").read_text())
    assert sorted({*links}) == sorted([*FILES, "tutorial.ipynb"])


def test_the_documents_examples_are_there():
    assert {"quickstart.py", "graft_cogvideox.py", "define_canvas.py"} <= set(FILES)


def test_the_quickstart_learns():
    pytest.importorskip("diffusers", reason="the quickstart grafts onto a model of diffusers")
    from examples import quickstart

    losses = quickstart.train(9)
    assert len(losses) == 9 and losses[-1] < losses[0]


def test_canvases_are_saved_and_sparse(tmp_path, capsys):
    define_canvas.main(["--out", str(tmp_path)])
    assert set(capsys.readouterr().out.split()) >= {"320", "16,384", "768"}
    for name, declare in define_canvas.APPLICATIONS.items():
        schema = declare()
        assert CanvasSchema.from_json(tmp_path / f"{name}.json") == schema
        assert 0 < compile_attention(schema.layout, schema.topology).density < 0.4
        used = sum(map(schema.layout.region_numel, schema.layout.regions))
        assert used <= schema.layout.num_positions
