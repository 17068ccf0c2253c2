"""The gallery draws every picture from the lines that its page shows."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("matplotlib", reason="the gallery is drawn with matplotlib")

from scripts import gallery


@pytest.mark.filterwarnings("ignore:attention computes .* of all token pairs")
def test_the_page_shows_pictures_and_the_lines_that_drew_them(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "TURNING", ("robot", 3))
    gallery.main(tmp_path)
    page = (tmp_path / "gallery.md").read_text()
    shown = re.findall(r"\]\((gallery/[^)]+)\)", page)
    assert sorted(shown) == sorted(f"gallery/{path.name}" for path in (tmp_path / "gallery").iterdir())
    assert len(shown) == len(gallery.CASES) + 1
    for name in shown:
        content = (tmp_path / name).read_bytes()
        assert content.startswith(b"\x89PNG" if name.endswith("png") else b"GIF89a") and len(content) > 5_000
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert all("figure" in gallery.run(block) for block in blocks[:3])
