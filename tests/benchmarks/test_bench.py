"""The benchmarks' command: what it refuses, writes and compares; and what tables, ties and targets say of rows."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import torch

from benchmarks import base, bench, cases, measure, plot, worker
from tests.benchmarks.test_benchmarks import SMALL, git, quick, tangled

README = str(measure.ROOT / "README.md")


@pytest.fixture
def small(monkeypatch):
    """The command knows one case, and a small reference."""
    monkeypatch.setattr(cases, "CPU", (SMALL,))
    monkeypatch.setattr(bench.providers, "REFERENCE_TOKENS", {"cpu": 16})


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--provider", "sdpa"], "invalid choice: 'sdpa'"),
        (["--case", "robots"], "no case is called 'robots'; there are robot, causal_video,"),
        (["--long", "--case", "robot"], "no long case is called 'robot'; there are fleet, video_65536,"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--device", "cuda"], "--device cuda: torch finds no GPU here"),
        (["--seconds", "nan"], "--seconds at least 0"),
        (["--save", f"{README}/new/rows.json"], README),
        (["--save", str(measure.RESULTS)], f"{measure.RESULTS} is a folder"),
        (["--base", "no-such-ref", "--case", "robot"], "--base no-such-ref: "),
        (["--base", "HEAD", "--case", "plan_robot"], "--base: what plans cost has no forward"),
    ],
)
def test_the_command_refuses_what_it_does_not_know(arguments, complaint, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench, "run", lambda *args: pytest.fail("this is not to be measured"))
    with pytest.raises(SystemExit) as ended:
        bench.main(["--device", "cpu", "--save", str(tmp_path / "rows.json"), *arguments])
    assert ended.value.code == 2 and complaint in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_the_command_measures_prints_and_saves(small, tmp_path, capsys):
    arguments = ["--device", "cpu", "--seconds", "0", "--provider", "grouped", "--form", "edge", "--case", "tang*"]
    assert bench.main([*arguments, "--save", str(tmp_path / "new/rows.json")]) == 0
    rows = measure.read_rows(tmp_path / "new/rows.json")
    assert [row["provider"] for row in rows] == ["ours", "grouped", "sdpa_unmasked"]
    assert "grouped" in capsys.readouterr().out


def test_what_failed_or_was_not_timed_is_an_error(tmp_path, capsys, monkeypatch):
    def fails():
        raise MemoryError("too large")

    save = ["--device", "cpu", "--save", str(tmp_path / "rows.json")]
    monkeypatch.setattr(cases, "CPU", (cases.Case("huge", fails),))
    assert bench.main(save) == 1
    assert "huge, joint form: the whole case: MemoryError: too large" in capsys.readouterr().out
    monkeypatch.setattr(bench, "run", lambda *args: iter([]))
    assert bench.main(save) == 1 and "nothing was timed" in capsys.readouterr().out


def test_the_list_names_ordinary_cases_and_long_ones(capsys):
    named = []
    for options in ([], ["--long"]):
        assert bench.main(["--device", "cpu", "--list", *options]) == 0
        named.append({line.split(":")[0] for line in capsys.readouterr().out.splitlines()})
    assert {"robot", "layer_robot", "plan_robot", "fleet"} <= named[0] and "robot" not in named[1]
    grids = {f"cogvideox_{name}" for name in ("dense", "three_frames", "tiles")}
    assert named[0] & named[1] == {"fleet", "video_65536", "video_1048576"} | grids


def test_documents_have_the_tables_of_the_committed_rows(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="figures are drawn with matplotlib")
    originals, copies = plot.DOCUMENTS, [tmp_path / path.name for path in plot.DOCUMENTS]
    for path, original in zip(copies, originals):
        path.write_text(original.read_text())
    monkeypatch.setattr(plot, "DOCUMENTS", copies)
    assert bench.main(["--documents"]) == 0 and (tmp_path / "speedup.png").exists()
    for path, original in zip(copies, originals):
        assert path.read_text() == original.read_text(), "`python -m benchmarks.bench --documents` writes it anew"


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of two commits with a clock of its own: a step of "slow" is ten of "fast"."""
    clock = (
        "from speed import SECONDS\n"
        "def step_seconds(case, form, device, dtype, threads, steps):\n"
        "    assert case != 'broken', 'it is broken'\n"
        "    return SECONDS * steps\n"
    )
    root = tmp_path / "repository"
    (root / "benchmarks").mkdir(parents=True)
    (root / "benchmarks/base.py").write_text(clock)
    (root / "benchmarks/__init__.py").touch()
    shutil.copy(measure.ROOT / "benchmarks/worker.py", root / "benchmarks/worker.py")
    git(tmp_path, "init", str(root))
    for name, seconds in (("slow", 1.0), ("fast", 0.1)):
        (root / "speed.py").write_text(f"SECONDS = {seconds}\n")
        for arguments in (["add", "."], ["commit", "-m", name], ["tag", name]):
            git(root, *arguments)
    monkeypatch.setattr(base, "ROOT", root)
    return root


@pytest.mark.parametrize(
    ("ref", "here", "case", "status", "told"),
    [
        ("fast", "slow", "tangled", 1, "10.000 (10.000 to 10.000) of the time of base, SLOWER"),
        ("slow", "fast", "tangled", 0, "0.100 (0.100 to 0.100) of the time of base, faster"),
        ("fast", "fast", "tangled", 0, "1.000 (1.000 to 1.000) of the time of base, the same"),
        ("fast", "fast", "broken", 1, "broken, joint: here: AssertionError: it is broken"),
    ],
)
def test_a_commit_is_checked_out_and_compared(ref, here, case, status, told, repository, capsys):
    git(repository, "checkout", here)
    chosen = [cases.Case(case, tangled)]
    assert base.compare(ref, chosen, quick(seconds=1.0)) == status
    assert told in capsys.readouterr().out
    listed = subprocess.run(
        ["git", "-C", str(repository), "worktree", "list"], capture_output=True, text=True, check=True
    )
    assert len(listed.stdout.splitlines()) == 1, "the worktree is gone"


def test_a_worker_takes_cpu_seconds_and_says_why_it_cannot():
    one = worker.Worker()
    seconds = lambda *what: one.call(base.step_seconds, *what[:2], "cpu", torch.float32, 1, *what[2:])  # noqa: E731
    assert seconds("robot", "edge", 1) > 0 and seconds("robot", "edge", 2) > 0
    assert seconds("layer_fleet", "joint", 1) is None
    with pytest.raises(worker.Failed, match="KeyError: 'gone'"):
        seconds("gone", "joint", 1)
    assert one.is_sound
    one.process.kill()
    with pytest.raises(worker.Failed, match="its process died"):
        seconds("robot", "edge", 1)


def quantiles(low: float, middle: float, high: float) -> dict[str, float]:
    return {"p10": low, "p25": low, "p50": middle, "p75": high, "p90": high}


@pytest.mark.parametrize(
    ("low", "middle", "high", "tie"),
    [
        (1.05, 1.06, 1.08, True),
        (1.08, 1.12, 1.13, False),
        (0.92, 0.94, 0.95, True),
        (0.88, 0.9, 0.92, False),
        (0.99, 1.4, 1.6, True),
        (1.4, 1.4, 1.4, False),
    ],
)
def test_a_tie_is_within_noise_or_has_quartiles_on_both_sides(low, middle, high, tie):
    assert plot.is_tie(quantiles(low, middle, high), noise=0.1) is tie


def made(case: str, provider: str = "ours", form: str = "edge", **more) -> dict:
    row = {"case": case, "group": "canvas", "form": form, "provider": provider, "commit": "abc", "rounds": 9}
    return row | {"step_seconds": quantiles(1.0, 1.0, 1.0)} | more


def test_noise_is_of_all_cases_or_of_its_own():
    rows = [made(str(n), form="reference", noise=0.05) for n in range(20)] + [made("loud", form="reference", noise=0.4)]
    rows.append(made("loud", form="reference", noise=0.1))
    noise = plot.noise_in(rows)
    assert noise(made("loud")) == 0.4 and noise(made("3")) == noise({}) == pytest.approx(0.05)
    assert plot.noise_in([])(made("a")) == 0.0


def test_cells_say_spread_rounds_and_ties():
    rows = [made("a", form="reference", provider="sdpa_unmasked", noise=0.1)]
    for name, ratio, count in (
        ("grouped", (1.1, 1.2, 1.3), 9),
        ("flex", (0.9, 1.05, 1.1), 9),
        ("varlen", (12.0, 12.34, 13.0), 1),
    ):
        rows.append(made("a", name, step_ratio=quantiles(*ratio), rounds=count))
    cells = [line.split(" | ")[-1].strip(" |") for line in plot.by_provider(rows, "canvas").splitlines()]
    assert cells[0] == "edge: varlen" and cells[2] == "12.3 (one round)"
    assert "| 1.20 (1.10 to 1.30) | = 1.05 (0.90 to 1.10) |" in plot.by_provider(rows, "canvas")
    assert "2.00 (2 rounds)" in plot.spread(quantiles(1, 2, 3), 2)


def test_rows_of_a_long_run_stand_where_others_left_out():
    left_out = {key: value for key, value in made("a", "flex", skipped="too long").items() if key != "step_seconds"}
    long = [made("a", step_seconds=quantiles(9, 9, 9)), made("a", "flex", step_ratio=quantiles(2, 2, 2))]
    rows = [made("a"), left_out, *long]
    assert [row["step_seconds"]["p50"] for row in plot.timed(rows)] == [1.0, 1.0]
    assert plot.left_out(rows) == "Nothing.\n"
    assert plot.left_out(rows[:2]) == "- flex, edge form: too long (a)\n"


def test_tables_have_no_empty_columns_and_every_row():
    rows = next(bench.run([SMALL], quick()))
    text = plot.TABLES["attention"](rows)
    assert text.count("\n| tangled |") == 6 and "exponent" not in text and "MiB" in text
    assert f"| {1e3 * rows[0]['step_seconds']['p50']:.4g} |" in text
    assert all("Nothing was timed" in plot.TABLES[name]([]) for name in ("attention", "canvases", "functions"))


def test_documents_are_filled_between_their_marks():
    text = "a\n<!-- table: left_out -->\nold\n<!-- end -->\nb <!-- table: left_out -->\n<!-- end -->"
    wanted = "a\n<!-- table: left_out -->\nNothing.\n<!-- end -->\nb <!-- table: left_out -->\nNothing.\n<!-- end -->"
    assert plot.filled(text, []) == wanted == plot.filled(wanted, [])
    with pytest.raises(KeyError, match="no_such"):
        plot.filled("<!-- table: no_such -->\n<!-- end -->", [])


def test_the_figure_holds_the_rows_numbers():
    pytest.importorskip("matplotlib", reason="figures are drawn with matplotlib")
    rows = plot.timed(measure.read_rows(measure.RESULTS / "bench.json"), "canvas", "density")
    (axes,) = plot.speedup(rows).axes
    points = {each.get_label(): sorted(map(tuple, each.get_offsets().tolist())) for each in axes.collections}
    own = [row for row in rows if (row["form"], row["provider"]) == ("joint", "sdpa_mask")]
    assert points[plot.NAMES["sdpa_mask"]] == sorted((row["density"], row["step_ratio"]["p50"]) for row in own)
    assert f"{plot.NAMES['flex']}, forward alone" in points and "per_edge_loop" not in points
