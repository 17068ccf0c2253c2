"""python -m canvas_engineering: what it prints and draws, and what it says of a file that it cannot read."""

from __future__ import annotations

import json
import sys

import pytest

pytest.importorskip("typer", reason="the command line is built with typer")
pytest.importorskip("rich", reason="the command line prints with rich")

from typer.testing import CliRunner

from canvas_engineering import (
    CanvasLayout,
    CanvasProgram,
    CanvasSchema,
    CanvasTopology,
    Connection,
    ConnectionProgram,
    RegionProgram,
    RegionSpec,
    draw,
)
from canvas_engineering.__main__ import KEY, MAX_ROWS, build_app, connection_table, load_schema, main, region_table
from canvas_engineering.plan import compile_attention


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


def connections_of(schema):
    return connection_table(schema.layout, schema.topology, compile_attention(schema.layout, schema.topology))


def rows(table) -> list[tuple[str, ...]]:
    return list(zip(*(list(column.cells) for column in table.columns)))


def test_tables_hold_the_declaration(schema):
    assert rows(region_table(schema.layout)) == [
        ("cam", "0:4 × 0:3 × 0:4", "48", "1", "1", "cross_attention"),
        ("plan", "0:2 × 3:4 × 0:4", "8", "2", "no", "cross_attention"),
    ]
    # at times -1 … 2 the plan, whose frames stand for times 0 and 2, is held from time 0 on
    assert rows(connections_of(schema)) == [
        ("cam", "cam", "all → all", "", "1", "cross_attention", "1"),
        ("cam", "plan", "t → t-1", "hold", "0.5", "cross_attention", "3"),
    ]


def test_tables_say_what_they_leave_out(schema):
    many = CanvasTopology([Connection("cam", "cam", weight=1.0 + i) for i in range(MAX_ROWS + 5)])
    table = connections_of(CanvasSchema(schema.layout, many))
    assert len(rows(table)) == MAX_ROWS
    assert table.caption == f"the first {MAX_ROWS} of {MAX_ROWS + 5}"


def test_connections_to_missing_regions_are_marked(schema):
    lost = CanvasTopology([Connection("cam", "nowhere"), Connection("plan", "cam", t_src=0, t_dst=9)])
    with pytest.warns(UserWarning, match="nowhere|have no keys"):
        found = rows(connections_of(CanvasSchema(schema.layout, lost)))
    assert found == [
        ("cam", "nowhere", "all → all", "", "1", "skipped: no such region", "0"),
        ("plan", "cam", "t → t+9", "hold", "1", "cross_attention", "2"),
    ]


def test_inspect_prints_regions_connections_and_the_plan(path):
    done = run("inspect", path)
    assert done.exit_code == 0, done.output
    for words in ("2 regions", "64 positions", "2 connections", "AttentionPlan", "density", KEY):
        assert words in done.output


def test_inspect_prints_what_ranks_would_exchange(path):
    printed = run("inspect", path, "--ranks", "4", "--node", "2", "--heads", "4").output
    lines = [line.strip() for line in printed.splitlines()]
    for start in ("4 × 1", "2 × 2", "1 × 4", "all-gather", "ring"):
        assert sum(line.startswith(start) for line in lines) == 1, start
    assert "4 ranks" not in run("inspect", path).output


def test_inspect_prints_flops_bytes_and_fill_of_what_it_is_asked_for(path):
    plan = compile_attention(load_schema(path).layout, load_schema(path).topology)
    call = {"--batch": 2, "--heads": 48, "--head-dim": 32, "--dtype": "bfloat16"}
    printed = run("inspect", path, *(text for option in call.items() for text in option)).output
    pairs = plan.table.pairs
    assert f"batch 2, 48 heads of 32, bfloat16: {pairs * 2 * 48 * 32 * 4 / 1e9:.3g} GFLOP forward, " in printed
    assert f"{pairs * 2 * 48 * 32 * 10 / 1e9:.3g} backward; q, k, v and the output take 1.5 MiB" in printed
    assert all(f"{fill:.0%} of {tile} tiles" in printed for tile, fill in plan.fill_by_tile.items())
    assert "batch 1, 1 head of 64, float32: " in run("inspect", path).output
    assert "multiprocessors that work, predicted: forward " in printed
    assert "predicted" not in run("inspect", path, "--head-dim", "512").output, "no kernel is built for it"
    for wrong in (("--dtype", "int8"), ("--heads", "0")):
        assert run("inspect", path, *wrong).exit_code == 2


def test_the_key_explains_what_is_printed(schema):
    columns = [column.header for column in connections_of(schema).columns]
    explained = {line.split(":")[0] for line in KEY.replace("; ", "\n").splitlines()}
    assert {"src", "dst", "frames", "fill", "attention set"} == explained & {*columns, "attention set"}
    printed = compile_attention(schema.layout, schema.topology).summary()
    for word in ("attention set", "rectangle", "density", "tile fill", "log-sum-exp rows"):
        assert word in explained and word in printed


@pytest.mark.parametrize(
    ("command", "module", "extra"),
    [("draw", "matplotlib", "draw"), ("draw", "typer", "cli"), ("explore", "rich", "cli"), ("inspect", "typer", "cli")],
)
def test_what_is_missing_is_named_with_the_extra_that_has_it(path, tmp_path, monkeypatch, command, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    for name in [name for name in sys.modules if name.startswith(f"{module}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    out = () if command == "inspect" else ("--out", str(tmp_path / "p.html"))
    monkeypatch.setattr(sys, "argv", ["canvas", command, str(path), *out])
    with pytest.raises(SystemExit) as said:
        main()
    (line,) = str(said.value).splitlines()
    assert module in line and line.endswith(f"pip install 'canvas-engineering[{extra}]'")


def test_another_missing_module_is_no_matter_of_extras(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "canvas_engineering.program", None)
    monkeypatch.setattr(sys, "argv", ["canvas", "inspect", str(path)])
    with pytest.raises(ModuleNotFoundError, match="program"):
        main()


def test_explore_writes_a_page(schema, path, tmp_path):
    done = run("explore", path, "--out", tmp_path / "new" / "page.html", "--normalize", "joint")
    assert done.exit_code == 0 and done.stdout.strip().endswith("page.html"), done.output
    page = (tmp_path / "new" / "page.html").read_text()
    assert page.startswith("<!doctype html>") and '"form":"joint"' in page and "<title>schema</title>" in page
    for wrong in (("--out", "page.png"), ("--out", "page.html", "--normalize", "both")):
        assert run("explore", path, *wrong).exit_code == 2
    gated = {("cam", "plan"): ConnectionProgram(write_mode="gate")}
    CanvasProgram(schema, connections=gated).to_json(tmp_path / "gated.json")
    assert run("explore", tmp_path / "gated.json", "--out", tmp_path / "gated.html").exit_code == 0
    refused = run("explore", tmp_path / "gated.json", "--out", tmp_path / "joint.html", "--normalize", "joint")
    assert refused.exit_code == 2 and "gate" in refused.stderr and not (tmp_path / "joint.html").exists()


def test_inspect_and_draw_take_the_form(path, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    titles = []

    def drawn(plan):
        titles.append(plan.normalize)
        return figure(plan)

    figure = draw.plan_figure
    monkeypatch.setattr(draw, "plan_figure", drawn)
    for form, options in (("edge", ()), ("edge", ("--normalize", "edge")), ("joint", ("--normalize", "joint"))):
        plan = compile_attention(load_schema(path).layout, load_schema(path).topology, normalize=form)
        assert f"{plan}\n" in run("inspect", path, *options).output
        assert run("draw", path, "--out", tmp_path / "p.png", *options).exit_code == 0
        assert titles.pop() == form
    for command in (("inspect", path), ("draw", path, "--out", tmp_path / "other.png")):
        done = run(*command, "--normalize", "both")
        assert done.exit_code == 2 and "'both' is none of edge, joint" in done.output
    assert not list(tmp_path.glob("other*"))


def test_inspect_without_a_topology(schema, tmp_path):
    CanvasSchema(schema.layout).to_json(tmp_path / "bare.json")
    done = run("inspect", tmp_path / "bare.json")
    assert done.exit_code == 0, done.output
    assert "no region attends to any" in done.output


def test_draw_writes_three_pictures(path, tmp_path):
    pytest.importorskip("matplotlib")
    done = run("draw", path, "--out", tmp_path / "new" / "p.png")
    assert done.exit_code == 0, done.output
    names = sorted(picture.name for picture in (tmp_path / "new").iterdir())
    assert names == ["p-table.png", "p-topology.png", "p.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (tmp_path / "new").iterdir())


@pytest.mark.parametrize("name", ["p.xyz", "p"])
def test_draw_says_which_pictures_there_are(path, tmp_path, name):
    pytest.importorskip("matplotlib")
    done = run("draw", path, "--out", tmp_path / name)
    assert done.exit_code == 2
    assert f"{name} has to end in one of" in done.output and ".png" in done.output and "Traceback" not in done.output
    assert not list(tmp_path.glob("p*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "is no schema: Expecting property name"),
        (json.dumps({"layout": {"T": 1}}), "is no schema: "),
    ],
)
def test_a_file_that_is_no_schema_is_named(tmp_path, content, message):
    path = tmp_path / "broken.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=rf"broken\.json.*{message}"):
        load_schema(path)
    done = run("inspect", path)
    assert done.exit_code == 2 and done.stderr.count("broken.json") == 1 and len(done.stderr.splitlines()) == 1


def test_a_program_is_shown_by_its_schema(schema, path, tmp_path):
    CanvasProgram(schema, {"cam": RegionProgram("observation")}).to_json(tmp_path / "program.json")
    shown, plain = (run("inspect", file) for file in (tmp_path / "program.json", path))
    assert shown.exit_code == 0 and shown.stdout.splitlines()[1:] == plain.stdout.splitlines()[1:]


def test_bench_starts_the_suite_with_its_options(monkeypatch):
    asked = []
    monkeypatch.setattr("subprocess.call", lambda command: asked.append(command[1:]) or 3)
    assert run("bench", "--case", "robot", "--help").exit_code == 3
    assert asked == [["-m", "benchmarks.bench", "--case", "robot", "--help"]]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run("bench").exit_code == 2 and len(asked) == 1
