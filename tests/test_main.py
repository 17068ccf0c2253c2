"""python -m canvas_engineering: what it prints and draws, and what it says of a file that it cannot read."""

from __future__ import annotations

import json
import sys

import pytest

pytest.importorskip("typer", reason="the command line is built with typer")
pytest.importorskip("rich", reason="the command line prints with rich")

from typer.testing import CliRunner

from canvas_engineering import CanvasLayout, CanvasSchema, CanvasTopology, Connection, RegionSpec
from canvas_engineering.__main__ import KEY, MAX_ROWS, build_app, connection_table, load_schema, main, region_table
from canvas_engineering.plan import compile_attention
from canvas_kernels import costs


@pytest.fixture
def schema():
    regions = {"cam": (0, 4, 0, 3, 0, 4), "plan": RegionSpec((0, 2, 3, 4, 0, 4), period=2, is_output=False)}
    layout = CanvasLayout(T=4, d_model=8, spatial_shape=(4, 4), regions=regions)
    topology = CanvasTopology([Connection("cam", "cam"), Connection("cam", "plan", t_src=0, t_dst=-1, weight=0.5)])
    return CanvasSchema(layout, topology)


@pytest.fixture
def path(schema, tmp_path):
    schema.to_json(tmp_path / "schema.json")
    return tmp_path / "schema.json"


def run(*arguments):
    return CliRunner().invoke(build_app(), [str(argument) for argument in arguments])


def rows(table) -> list[tuple[str, ...]]:
    return list(zip(*(list(column.cells) for column in table.columns)))


def test_tables_hold_the_declaration(schema):
    assert rows(region_table(schema.layout)) == [
        ("cam", "0:4 × 0:3 × 0:4", "48", "1", "1", "cross_attention"),
        ("plan", "0:2 × 3:4 × 0:4", "8", "2", "no", "cross_attention"),
    ]
    assert rows(connection_table(schema.layout, schema.topology)) == [
        ("cam", "cam", "all → all", "", "1", "cross_attention"),
        ("cam", "plan", "t → t-1", "hold", "0.5", "cross_attention"),
    ]


def test_tables_say_what_they_leave_out(schema):
    many = CanvasTopology([Connection("cam", "cam", weight=1.0 + i) for i in range(MAX_ROWS + 5)])
    table = connection_table(schema.layout, many)
    assert len(rows(table)) == MAX_ROWS
    assert table.caption == f"the first {MAX_ROWS} of {MAX_ROWS + 5}"


def test_connections_to_missing_regions_are_marked(schema):
    found = rows(connection_table(schema.layout, CanvasTopology([Connection("cam", "nowhere")])))
    assert found == [("cam", "nowhere", "all → all", "", "1", "skipped: no such region")]


def test_inspect_prints_regions_connections_and_the_plan(path):
    done = run("inspect", path)
    assert done.exit_code == 0, done.output
    for words in ("2 regions", "64 positions", "2 connections", "AttentionPlan", "density", KEY):
        assert words in done.output


def test_inspect_estimates_the_time_on_this_machine(path, monkeypatch):
    measured = next(name for name, entry in costs.all_rates().items() if "backward" in entry)
    for key, words in ((measured, f"MiB on {measured}"), ("abacus", "not known: no rates were measured on abacus")):
        monkeypatch.setattr("canvas_engineering.plan.estimate.processor_key", lambda threads, key=key: key)
        assert words in run("inspect", path).output


def test_the_key_explains_what_is_printed(schema):
    columns = [column.header for column in connection_table(schema.layout, schema.topology).columns]
    explained = {line.split(":")[0] for line in KEY.replace("; ", "\n").splitlines()}
    assert {"asks", "answers", "frames", "between frames"} == explained & set(columns)
    printed = compile_attention(schema.layout, schema.topology).summary()
    for word in ("read", "rectangle", "density", "tile fill", "log-sum-exp slots"):
        assert word in explained and word in printed


@pytest.mark.parametrize("module", ["matplotlib", "typer"])
def test_what_is_missing_is_named_with_the_extra_that_has_it(path, tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(sys, "argv", ["canvas", "draw", str(path), "--out", str(tmp_path / "p.png")])
    with pytest.raises(SystemExit, match=rf"{module}.*: install canvas-engineering\[dev\]"):
        main()


def test_inspect_without_a_topology(schema, tmp_path):
    CanvasSchema(schema.layout).to_json(tmp_path / "bare.json")
    done = run("inspect", tmp_path / "bare.json")
    assert done.exit_code == 0, done.output
    assert "nothing reads anything" in done.output


def test_draw_writes_three_pictures(path, tmp_path):
    pytest.importorskip("matplotlib")
    done = run("draw", path, "--out", tmp_path / "new" / "p.png")
    assert done.exit_code == 0, done.output
    names = sorted(picture.name for picture in (tmp_path / "new").iterdir())
    assert names == ["p-table.png", "p-topology.png", "p.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (tmp_path / "new").iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), ("{", "is no schema"), (json.dumps({"layout": {"T": 1}}), "is no schema")],
)
def test_a_file_that_is_no_schema_is_named(tmp_path, content, message):
    path = tmp_path / "broken.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=rf"broken\.json.*{message}"):
        load_schema(path)
    assert run("inspect", path).exit_code == 2


def test_bench_starts_the_suite_with_its_options(monkeypatch):
    asked = []
    monkeypatch.setattr("subprocess.call", lambda command: asked.append(command[1:]) or 3)
    assert run("bench", "--case", "robot", "--help").exit_code == 3
    assert asked == [["-m", "benchmarks.bench", "--case", "robot", "--help"]]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run("bench").exit_code == 2 and len(asked) == 1
