"""Pages of the site that live elsewhere in the tree: README, CHANGELOG, kernels, examples (a hook of mkdocs)."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "kernels.md": "kernels/README.md",
    "examples.md": "examples/README.md",
    "contributing.md": "CONTRIBUTING.md",
}
# Links to files of the repository that are no pages, and badges, which another host draws.
FILES = r"examples|CITATION\.cff|LICENSE|\.\./|\w+\.(?:py|ipynb)\b"
OUTSIDE = re.compile(rf"\[([^\]]*)\]\(((?:{FILES})[^)]*)\)")
BADGES = re.compile(r"^\[?!\[[^\]]*\]\(https://img.shields.io.*\n", re.MULTILINE)


def on_files(files, config):
    """Adds the pages, their links turned to the site's."""
    for name, source in PAGES.items():
        text = (ROOT / source).read_text().replace("](docs/", "](").replace("](../docs/", "](")
        for page, path in PAGES.items():
            text = text.replace(f"]({path})", f"]({page})")
        text = OUTSIDE.sub(r"\1 (`\2`)", BADGES.sub("", text))
        files.append(File.generated(config, name, content=text))
    return files
