"""What notebooks show: static, small, and of the declaration."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET

import pytest

from canvas_engineering import CanvasLayout, CanvasTopology, Connection, RegionSpec, compile_attention
from canvas_engineering.notebook import MAX_BOXES, MAX_RECTANGLES, MAX_ROWS
from scripts import notebook


def shown(of) -> ET.Element:
    """The HTML of an object, which is XML too."""
    return ET.fromstring(of._repr_html_())


def rows(tree: ET.Element) -> list[list[str]]:
    return [["".join(cell.itertext()) for cell in row.findall("td")] for row in tree.iter("tr")][1:]


def drawn(tree: ET.Element, tag: str) -> list[ET.Element]:
    return list(tree.iter("{http://www.w3.org/2000/svg}" + tag))


@pytest.fixture
def layout():
    regions = {"<cam>": (0, 4, 0, 3, 0, 4), "plan": RegionSpec((0, 2, 3, 4, 0, 4), period=2)}
    return CanvasLayout(T=4, d_model=8, spatial_shape=(4, 4), regions=regions)


@pytest.fixture
def topology():
    return CanvasTopology([Connection("<cam>", "<cam>"), Connection("<cam>", "plan", t_src=0, t_dst=-1, weight=0.5)])


def test_a_layout_is_its_regions(layout):
    tree = shown(layout)
    assert rows(tree) == [["<cam>", "0:4 × 0:3 × 0:4", "48", "1"], ["plan", "0:2 × 3:4 × 0:4", "8", "2"]]
    assert len(drawn(tree, "polygon")) == 2 * 3


@pytest.mark.parametrize("spatial", [(5,), (2, 3, 4)])
def test_a_layout_of_other_dimensions_is_drawn(spatial):
    bounds = (0, 2, *(end for size in spatial for end in (0, size)))
    tree = shown(CanvasLayout(T=2, d_model=8, spatial_shape=spatial, regions={"a": bounds}))
    x, y = zip(*(map(float, c.split(",")) for p in drawn(tree, "polygon") for c in p.get("points").split()))
    _, _, width, height = map(float, drawn(tree, "svg")[0].get("viewBox").split())
    assert min(x) >= 0 and max(x) <= width and min(y) >= 0 and max(y) <= height


def test_a_topology_is_its_connections(topology):
    assert rows(shown(topology)) == [
        ["<cam>", "<cam>", "all → all", "", "1", "default"],
        ["<cam>", "plan", "t → t-1", "hold", "0.5", "default"],
    ]


def test_a_plan_is_its_rectangles(layout, topology):
    plan = compile_attention(layout, topology)
    tree = shown(plan)
    assert len(drawn(tree, "rect")) == 1 + len(plan.table.weight)
    assert [row[-1] for row in rows(tree)] == ["1", "3"]
    assert shown(compile_attention(layout, topology, normalize="joint")) is not None


def test_large_ones_stay_small():
    names = [f"r{i}" for i in range(3000)]
    regions = {name: (0, 1, i, i + 1, 0, 1) for i, name in enumerate(names)}
    layout = CanvasLayout(T=1, d_model=8, spatial_shape=(3000, 1), regions=regions)
    topology = CanvasTopology([Connection(name, other) for name in names for other in names[:2]])
    plan = compile_attention(layout, topology)
    assert len(drawn(shown(layout), "polygon")) == 3 * MAX_BOXES and len(rows(shown(layout))) == MAX_ROWS
    assert len(drawn(shown(plan), "rect")) == 1 + MAX_RECTANGLES and len(rows(shown(topology))) == MAX_ROWS
    assert f"the first {MAX_ROWS} of 6,000" in topology._repr_html_()
    assert max(len(of._repr_html_()) for of in (layout, topology, plan)) < 250_000


def test_the_tutorial_notebook_is_that_of_the_page():
    assert notebook.NOTEBOOK.read_text() == notebook.notebook(), "run `make notebook`"
    content = json.loads(notebook.notebook())
    code = ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]
    page = re.findall(r"```python\n(.*?)```", notebook.SOURCE.read_text(), re.DOTALL)
    assert [source for source in code if source != notebook.SHOW] == [block.strip() for block in page]
    ids = [cell["id"] for cell in content["cells"]]
    assert len(set(ids)) == len(ids)
