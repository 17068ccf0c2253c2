"""The tutorial as a notebook: examples/tutorial.ipynb from docs/tutorial.md, run from top to bottom into out/.

``python -m scripts.notebook`` writes the one without outputs and runs it; the other has every cell's output.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from canvas_engineering.files import replace_file

ROOT = Path(__file__).resolve().parent.parent
SOURCE, NOTEBOOK, EXECUTED = ROOT / "docs/tutorial.md", ROOT / "examples/tutorial.ipynb", ROOT / "out/tutorial.ipynb"
LINK = re.compile(r"\]\((?!http)(\w+)\.md")
SHOW = "layout"
"""The cell after the declaration: a notebook draws the layout, which a page cannot."""


def cells(text: str) -> list[dict]:
    """A page's cells in the notebook format: text as it is, blocks of Python as code."""
    page = LINK.sub(r"](../docs/\1.md", text)
    parts = re.split(r"```python\n(.*?)```\n", page, flags=re.DOTALL)
    built = []
    for number, part in enumerate(parts):
        if part.strip():
            built.append(_cell("code" if number % 2 else "markdown", part.strip(), len(built)))
        if number == 1:
            built.append(_cell("code", SHOW, len(built)))
    return built


def _cell(kind: str, source: str, number: int) -> dict:
    cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": source.splitlines(keepends=True)}
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def notebook() -> str:
    """The notebook's file, without outputs."""
    metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    content = {"cells": cells(SOURCE.read_text()), "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Writes the notebook and runs it in a folder of its own; an error in a cell is an error here."""
    import tempfile

    import nbformat
    from nbclient import NotebookClient

    replace_file(NOTEBOOK, notebook().encode())
    content = nbformat.reads(notebook(), as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(content, timeout=300, resources={"metadata": {"path": folder}}).execute()
    EXECUTED.parent.mkdir(exist_ok=True)
    replace_file(EXECUTED, nbformat.writes(content).encode())
    print(f"{EXECUTED.relative_to(ROOT)}: {sum(cell.cell_type == 'code' for cell in content.cells)} cells ran")


if __name__ == "__main__":
    main()
