"""Words of docs/glossary.md: retired ones must not come back to names, docstrings, errors or the command line."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("canvas_engineering", "kernels/canvas_kernels")

# phrase: what the glossary says
RETIRED = {
    r"\bslabs?\b": "strided group",
    r"\bbatch(es)? of cells\b": "gathered group",
    r"\bcontestants?\b": "provider",
    r"\blanes?\b": "slice, batch · heads",
    r"\bstretch(es)?\b": "range",
    r"\bstages?\b": "bundle, pass",
    r"\bpieces?\b": "part, range",
    r"\bcells?\b": "query range, position",
    r"\b(?!in )\w+ places\b|\b(each|every|its|their|the|packed|query|key) place\b(?! of)": "position, row, index",
    r"\bwho (asks|reads|answers|attends)\b|\breads? whom\b": "which regions attend to which",
    r"\b(an?|each|every|one|no|all|its|of) reads?\b|\breads? (of|nothing|everything|itself|themselves)\b": "set",
    r"\b(quer(y|ies)|positions?|regions?|tokens?|fields?|rows?) (that )?(reads?|sees?|asks?)\b": "attends to",
    r"\b(sees?|seen) (the |no |all |every |its |their )?(same )?(keys?|quer(y|ies)|positions?|rows?)\b": "attends to",
    r"\bask(s|ed|ing)?\b|\banswer(s|ed)?\b": "request",
    r"\bbanks? of slots\b": "slot bank",
    r"\bwhoever\b|\bwhatever it\b": "say which",
}
# in canvas_engineering alone: tables of canvas_kernels have edges
CONNECTION = {r"(?<![\"'`_])\bedges?\b(?! form|[\"'`_:])": "connection"}
FRAGMENT = re.compile(r"(Of|What|As|From|How|Who|Where|Than|Its) ")
PARTICIPLES = {"found", "taken", "made", "kept", "seen", "asked", "told"}
# published names, and what the Triton backend calls
NAMES = {"edge_gates", "edge_table", "edges_map", "place", "places"}


def names_of(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Public classes, functions, methods, arguments and constants of a module, as words."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            if not node.name.startswith("_") and node.name not in NAMES:
                yield node.lineno, re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", node.name).lower()
        elif isinstance(node, ast.Assign) and node in tree.body:
            names = (target.id for target in node.targets if isinstance(target, ast.Name))
            yield from ((node.lineno, name.replace("_", " ").lower()) for name in names if name not in NAMES)


def texts_of(tree: ast.Module, all_strings: bool) -> Iterator[tuple[int, str, bool]]:
    """Docstrings (marked), and strings in errors and warnings, or all strings with a space."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node):
            yield node.body[0].lineno, ast.get_docstring(node) or "", True
        is_message = isinstance(node, ast.Raise) or (isinstance(node, ast.Call) and ast.unparse(node.func) == "warn")
        for part in ast.walk(node) if is_message or (all_strings and node is tree) else ():
            if isinstance(part, ast.Constant) and isinstance(part.value, str) and " " in part.value:
                yield part.lineno, part.value, False


def faults_of(source: str, edges: bool = False, all_strings: bool = False) -> list[str]:
    """Retired words of a module's source; ``edges`` are allowed in canvas_kernels."""
    tree, faults = ast.parse(source), []
    retired = RETIRED if edges else {**RETIRED, **CONNECTION}
    texts = [*((line, name, False) for line, name in names_of(tree)), *texts_of(tree, all_strings)]
    for line, text, is_docstring in texts:
        prose = re.sub(r"^\s*(>>>|\.\.\.).*$", "", text, flags=re.MULTILINE)
        for phrase, word in retired.items():
            faults += [f"{line}: {m.group()!r}; say {word}" for m in re.finditer(phrase, prose, re.IGNORECASE)]
        if is_docstring and FRAGMENT.match(prose):
            faults.append(f"{line}: a fragment, {prose.splitlines()[0]!r}; write a sentence")
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in PARTICIPLES:
            faults.append(f"{node.lineno}: the variable {node.id!r}; name it by a noun")
    return faults


def test_retired_words_stay_away():
    faults, count = [], 0
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            own = faults_of(path.read_text(), "kernels" in package, path.name == "__main__.py")
            faults, count = faults + [f"{name}:{fault}" for fault in own], count + 1
    assert not faults, "\n".join(faults)
    assert count > 80


@pytest.mark.parametrize(
    "source",
    [
        'def f():\n    """Adds the slab to the total."""',
        '"""Declares who reads whom."""',
        'class A:\n    """Every read has one softmax."""',
        'def f():\n    """Returns keys. It sees the same keys as its neighbours."""',
        'def f():\n    """Of one table, the sizes."""',
        'def f():\n    """Returns the edges of a topology."""',
        'raise ValueError("the region that is asked has no frame")',
        'warn(f"{n} lanes are left out")',
        "class RowStretch:\n    pass",
        "def read_pieces():\n    pass",
        "MOST_CELLS = 1",
        "found = 1",
    ],
)
def test_a_retired_word_is_seen(source):
    assert len(faults_of(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        'raise OSError("the file cannot be read")',
        'def f():\n    """Computes the edge form, in place, with read-only arrays; see docs/semantics.md."""',
        'def place():\n    """Returns src\'s frames, which attend to all keys of dst."""',
    ],
)
def test_ordinary_english_is_allowed(source):
    assert faults_of(source) == []
