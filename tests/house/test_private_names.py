"""Tests come through public doors: none names what our packages, benchmarks, examples or oracles keep to themselves."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = ("canvas_engineering", "kernels", "benchmarks", "examples", "scripts", "tests")
# hooks of IPython, of named tuples, of torch.nn.Module and of diffusers, which everyone may call
HOOKS = {"_repr_html_", "_asdict", "_replace", "_fields", "_apply", "_parameters", "_buffers", "_modules"}
HOOKS |= {"_no_split_modules", "_attention_backend", "_parallel_config"}
DOTTED = re.compile(r"(canvas_engineering|canvas_kernels|benchmarks|examples|scripts|tests)(\.\w+)+")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in HOOKS


def private_names(source: str) -> Iterator[str]:
    """Private functions, classes, constants and attributes that a module defines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and is_private(node.name):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_private(node.attr):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and is_private(node.id):
            yield node.id


def reaches(source: str, private: set[str]) -> Iterator[str]:
    """Private names that a test reaches for: attributes of others, imports, and names that it replaces or asks for."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
            names = [node.attr] if not ast.unparse(node).startswith(("torch.", "np.", "os.")) else []
        elif isinstance(node, ast.ImportFrom) and DOTTED.match(f"{node.module}."):
            names = [*str(node.module).split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("setattr", "delattr", "getattr", "patch")):
            texts = [a.value for a in node.args[:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            names = [part for text in texts for part in text.split(".")]
        yield from (f"{node.lineno}: {name}" for name in names if is_private(name) and name in private)


def test_no_test_reaches_a_private_name():
    private = {n for folder in OURS for path in (ROOT / folder).rglob("*.py") for n in private_names(path.read_text())}
    tests = sorted((ROOT / "tests").rglob("*.py"))
    faults = [f"{path.relative_to(ROOT)}:{fault}" for path in tests for fault in reaches(path.read_text(), private)]
    assert not faults, "\n".join(faults)
    assert len(private) > 500 and len(tests) > 90


@pytest.mark.parametrize(
    "source",
    [
        "plan._secret",
        "from canvas_engineering.attention import _secret",
        "from canvas_kernels._secret import sums",
        "monkeypatch.setattr(module, '_secret', None)",
        "monkeypatch.setattr('canvas_kernels.ops._secret', None)",
    ],
)
def test_a_reach_is_seen(source):
    assert len([*reaches(source, {"_secret"})]) == 1


@pytest.mark.parametrize("source", ["self._secret = 1", "torch._secret(x)", "row._replace(a=1)", "_secret = 3"])
def test_what_is_ones_own_is_not_a_reach(source):
    assert not [*reaches(source, {"_secret", "_replace"})]
