"""The explorer's page: what it holds, and, in a headless Chromium, what a pointer finds on it."""

from __future__ import annotations

import io
import json
import re
from itertools import pairwise

import numpy as np
import pytest

from canvas_engineering import (
    CanvasLayout,
    CanvasProgram,
    CanvasSchema,
    CanvasTopology,
    ClockCooldown,
    ClockSpec,
    Connection,
    ConnectionProgram,
    IdentitySpec,
    MaskSpec,
    RegionProgram,
    RegionSpec,
    TemporalFill,
    clock_on,
    compile_attention,
)
from canvas_engineering.explore import MAX_RECTANGLES, explore_page
from tests.browser import CHROMIUM, browser

in_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt install chromium")


def robot() -> CanvasProgram:
    """A camera in front, a slow plan, actions under a tiled mask, and errors; fills, offsets, clocks, a trigger."""
    regions = {
        "cam": (0, 6, 0, 6, 0, 8),
        "plan": RegionSpec((0, 2, 6, 7, 0, 8), period=3, semantic_type="a slow plan"),
        "action": RegionSpec((0, 6, 7, 8, 0, 4), loss_weight=2.0),
        "error": RegionSpec((1, 6, 7, 8, 4, 8), carrier="residual"),
    }
    layout = CanvasLayout(T=6, d_model=8, spatial_shape=(8, 8), regions=regions)
    pattern = tuple(tuple((i + j) % 3 == 0 for j in range(24)) for i in range(16))
    topology = CanvasTopology(
        [
            Connection("cam", "cam", t_src=0, t_dst=-1),
            Connection("cam", "plan", t_src=0, t_dst=0, temporal_fill=TemporalFill.INTERPOLATE, weight=0.5),
            Connection("plan", "cam", t_dst=1),
            Connection("action", "cam", t_src=0, t_dst=0, mask=MaskSpec("tile", tile_h=4, tile_w=4)),
            Connection("plan", "action", mask=MaskSpec("sparse", pattern=pattern)),
            Connection("error", "action", t_src=0, t_dst=0, temporal_fill=TemporalFill.DROP),
            Connection("plan", "error"),
        ]
    )
    surprise = ClockCooldown(clock_on("error.prediction", gt=0.4), steps=2)
    programs = {
        "cam": RegionProgram("observation", compile_mode="freeze"),
        "plan": RegionProgram("state", clock=ClockSpec(expr=surprise)),
        "action": RegionProgram("action", clock=ClockSpec(period=2)),
    }
    correct = ConnectionProgram("correct", trigger="error.prediction > 0.4", write_mode="gate")
    return CanvasProgram(CanvasSchema(layout, topology), programs, {("plan", "error"): correct})


def fleet(n: int) -> CanvasSchema:
    """n regions of 2 × 2 positions in rows of 50; each attends to itself and to the next, and all to the first."""
    bounds = [(0, 2, i // 50 * 2, i // 50 * 2 + 2, i % 50 * 2, i % 50 * 2 + 2) for i in range(n)]
    regions = {f"vehicle[{i // 5}].part{i % 5}": box for i, box in enumerate(bounds)}
    layout = CanvasLayout(T=2, d_model=8, spatial_shape=(n // 50 * 2, 100), regions=regions)
    names = list(regions)
    connections = [Connection(name, name, t_src=0, t_dst=0) for name in names]
    connections += [Connection(name, after) for name, after in pairwise(names)]
    return CanvasSchema(layout, CanvasTopology([*connections, *(Connection(name, names[0]) for name in names)]))


def held(page: str) -> dict:
    """The data of a page."""
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


# -- what the page holds ----------------------------------------------------------------------------------------------


def test_page_holds_the_declaration_as_it_runs():
    data = held(explore_page(robot(), title="robot"))
    assert data["grid"] == [6, 8, 8]
    assert data["regions"]["name"] == ["cam", "plan", "action", "error"]
    assert data["regions"]["period"] == [1, 3, 1, 1]
    assert ["clock", "error.prediction > 0.4, cooldown 2"] in data["regions"]["badges"][1]
    assert ["clock", "every 2"] in data["regions"]["badges"][2]
    notes = dict(data["connections"]["notes"]["6"])
    assert notes == {"operator": "correct", "write": "gate", "trigger": "error.prediction > 0.4"}
    program = robot()
    plan = compile_attention(program.schema.layout, program.schema.topology, program)
    assert data["table"]["total"] == len(data["table"]["rectangles"]) == len(plan.table.weight)
    assert sum(data["connections"]["pairs"]) == plan.table.pairs
    assert sum(data["connections"]["walked"]) == round(plan.table.pairs / plan.fill)


def test_page_takes_a_schema_without_a_topology_and_the_joint_form():
    bare = CanvasSchema(robot().schema.layout)
    assert held(explore_page(bare))["connections"] is None
    assert held(explore_page(robot().schema, normalize="joint"))["table"]["form"] == "joint"
    with pytest.raises(ValueError, match="joint"):
        explore_page(robot(), normalize="joint")  # a gate belongs to the edge form
    with pytest.raises(ValueError, match="joint form"):
        compile_attention(bare.layout, robot().schema.topology, normalize="joint").work_by_connection()
    with pytest.raises(ValueError, match="what is explored"):
        explore_page(bare.layout)


def test_page_grows_with_regions_and_connections_only():
    small, large = (len(explore_page(fleet(n))) - len(explore_page(fleet(50))) for n in (1000, 10_000))
    assert large < 11 * small
    data = held(explore_page(fleet(10_000)))
    assert len(data["table"]["rectangles"]) == MAX_RECTANGLES < data["table"]["total"]
    assert len(data["connections"]["patterns"]) == 2


def test_names_are_text():
    hostile = "</script><script>document.title = 'run'</script>"
    layout = CanvasLayout(T=1, d_model=8, spatial_shape=(2, 2), regions={hostile: (0, 1, 0, 2, 0, 2)})
    page = explore_page(CanvasSchema(layout, CanvasTopology.dense([hostile])), title="@DATA@ <b>")
    assert held(page)["regions"]["name"] == [hostile]
    assert page.count("</script>") == 2 and "<title>@DATA@ &lt;b&gt;</title>" in page


# -- what a pointer finds ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.fixture
def page(chromium, tmp_path):
    (tmp_path / "robot.html").write_text(explore_page(robot(), title="robot"))
    chromium.open(tmp_path / "robot.html")
    yield chromium
    faults = [event for event in chromium.events if event["method"] == "Runtime.exceptionThrown"]
    assert not faults, faults


def cells(page, heading: str) -> list[list[str]]:
    """The rows of the table under a heading of the details, cell by cell."""
    return page.value(
        f"[...[...document.querySelectorAll('#details h2')].find((h) => h.innerText.includes({json.dumps(heading)}))"
        ".nextElementSibling.querySelectorAll('tr.row')].map((row) => [...row.children].map((cell) => cell.innerText))"
    )


@in_chromium
def test_hovering_a_region_shows_both_sides_of_its_connections(page):
    page.hover(*page.middle("#scene"))
    assert page.text("#details h2") == "cam"
    assert [row[:4] for row in cells(page, "attends to")] == [
        ["cam", "t → t−1", "hold", "1"],
        ["plan", "t → t", "interpolate", "0.5"],
    ]
    assert [row[0] for row in cells(page, "attended to by")] == ["cam", "plan", "action"]
    assert "observation" in page.text("#details") and "what attends to it" in page.text("#legend")
    page.hover(5, 5)
    assert page.text("#details h2") == "Program"


@in_chromium
def test_hovering_a_position_shows_its_shares(page):
    page.click(*page.middle("#pick-position"))
    x, y = page.middle("#slider")
    page.click(x - 60, y)  # the plan ticks at 0 and 3
    assert page.text("#now") == "real time 2"
    page.hover(*page.middle("#scene"))
    title = page.text("#details h2")
    assert re.match(r"position \(\d, \d, \d\), number \d+, of cam", title), title
    assert [row[0] for row in cells(page, "attends to")] == ["cam", "plan"]
    assert [row[3] for row in cells(page, "attends to")] == ["1, 66.7 %", "0.5, 33.3 %"]


@in_chromium
def test_a_click_pins_and_escape_lets_go(page):
    page.click(*page.middle("#regions li:nth-child(2)"))
    page.hover(5, 5)
    assert page.text("#details h2") == "plan"
    assert "error.prediction > 0.4" in page.text("#details") and "period 3" in page.text("#details")
    page.value("document.querySelector('#scene').focus()")
    for kind in ("keyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key="Escape")
    page.settle()
    assert page.text("#details h2") == "Program"


@in_chromium
def test_the_slider_shows_real_time(page):
    assert page.text("#now") == "real time 0 to 5"
    page.click(*page.middle("#slider"))
    assert page.text("#now") in ("real time 2", "real time 3") and "held from an earlier tick" in page.text("#legend")
    assert page.value("document.querySelector('#all').checked") is False
    page.click(*page.middle("#all"))
    assert page.text("#now") == "real time 0 to 5"


@in_chromium
def test_search_finds_regions_by_name_and_by_what_they_are(page):
    page.click(*page.middle("#search"))
    page.type("residual")  # the carrier of the errors
    assert page.text("#count") == "1 of 4 regions" and page.text("#regions") == "error"


@in_chromium
def test_hovering_the_table_names_the_rectangle(page):
    assert "rectangles, edge form" in page.text("#block") and "tiles" in page.text("#block")
    box = page.value("(() => { const b = document.querySelector('#matrix').getBoundingClientRect();"
                     "return [b.left + frame.left, b.top + frame.top, frame.size]; })()")  # fmt: skip
    left, top, size = box
    found = set()
    for q in np.linspace(0.03, 0.97, 12):
        for k in np.linspace(0.03, 0.97, 12):
            page.mouse("Moved", left + k * size, top + q * size)
            found.add(page.text("#block").split(",")[0])
    assert {"cam attends to cam", "plan attends to cam"} <= found


@in_chromium
def test_the_page_reaches_for_nothing_and_is_not_empty(page):
    image = pytest.importorskip("matplotlib.image", reason="screenshots are read with matplotlib")
    asked = [
        event["params"]["request"]["url"] for event in page.events if event["method"] == "Network.requestWillBeSent"
    ]
    assert len(asked) == 1 and asked[0].endswith("robot.html")
    pixels = [image.imread(io.BytesIO(page.screenshot()))[..., :3]]
    x, y = page.middle("#scene")
    page.drag((x, y), (x + 120, y + 40))
    page.hover(5, 5)
    pixels.append(image.imread(io.BytesIO(page.screenshot()))[..., :3])
    scenes = [shot[50:700, 230:880] for shot in pixels]
    for scene in scenes:
        coloured = (scene.max(-1) - scene.min(-1)) > 0.15
        assert 0.1 < coloured.mean() < 0.9, coloured.mean()
    assert (np.abs(scenes[0] - scenes[1]).max(-1) > 0.1).mean() > 0.05, "a drag turns the boxes"
    matrix = pixels[0][480:780, 940:1360]
    assert ((matrix.max(-1) - matrix.min(-1)) > 0.15).mean() > 0.02


# [number, what it attends to, what attends to it] of every position of every region, from what the page draws
EVERY_POSITION = """(() => {
  const inside = (box) => {
    const all = [];
    for (let t = box[0]; t < box[1]; t++)
      for (let h = box[2]; h < box[3]; h++)
        for (let w = box[4]; w < box[5]; w++) all.push((t * ROWS + h) * COLUMNS + w);
    return all;
  };
  const of = (links) => [...new Set(links.flatMap((link) => link.boxes.flatMap(inside)))];
  return boxes.flatMap((box, r) => inside(box).map((at) => {
    const cell = [Math.floor(at / (ROWS * COLUMNS)), Math.floor(at / COLUMNS) % ROWS, at % COLUMNS];
    const { attends, attended } = focusOn(r, cell);
    return [at, of(attends), of(attended)];
  }));
})()"""


@in_chromium
@pytest.mark.parametrize("identity", [False, True])
def test_the_page_says_of_every_position_what_the_mask_says(chromium, tmp_path, identity):
    program = robot()
    if identity:  # read through slots, whatever frame a connection names: all of the region
        program.regions["action"] = RegionProgram("action", identity=IdentitySpec(slot_capacity=3))
    layout, topology = program.schema.layout, program.schema.topology
    (tmp_path / "page.html").write_text(explore_page(program))
    chromium.open(tmp_path / "page.html")
    found = chromium.value(EVERY_POSITION)
    mask = topology.to_attention_mask(layout).numpy() > 0
    if identity:
        action = layout.region_positions("action")
        mask[:, action] = mask[:, action].any(1, keepdims=True)
    assert len(found) == sum(map(layout.region_numel, layout.regions))
    for position, attends, attended in found:
        assert sorted(attends) == mask[position].nonzero()[0].tolist(), position
        assert sorted(attended) == mask[:, position].nonzero()[0].tolist(), position


@in_chromium
def test_ten_thousand_regions_can_be_hovered_and_searched(chromium, tmp_path):
    (tmp_path / "fleet.html").write_text(explore_page(fleet(10_000), title="fleet"))
    chromium.open(tmp_path / "fleet.html")
    assert chromium.text("#count") == "10,000 of 10,000 regions, the first 300 listed"
    chromium.hover(*chromium.middle("#scene"))
    assert chromium.text("#details h2").startswith("vehicle[")
    assert [row[0] for row in cells(chromium, "attends to")][-1] == "vehicle[0].part0"
    chromium.click(*chromium.middle("#search"))
    chromium.type("vehicle[1999]")
    assert chromium.text("#count") == "5 of 10,000 regions"
    chromium.click(*chromium.middle("#regions li"))
    assert chromium.text("#details h2") == "vehicle[1999].part0"
