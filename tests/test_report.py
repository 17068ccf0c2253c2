"""benchmarks/report.py and bench.py: cells say rounds, spread and ties; the command shows progress and refuses what it
does not know."""

from __future__ import annotations

import copy
import dataclasses
import io
import os

import numpy as np
import pytest
import torch

pytest.importorskip("rich", reason="benchmarks print their tables with rich")

from rich.console import Console

from benchmarks import bench, cases, contestants, measure, readme, report, suite
from tests.test_suite import QUICK, SMALL


@pytest.fixture(scope="module")
def rows():
    return next(suite.run([SMALL], copy.copy(QUICK)))


README, DISPATCHER = str(readme.README), str(measure.RESULTS / "dispatcher.json")
AOT, SUITE, LONG = (str(measure.RESULTS / f"{name}.json") for name in ("aot", "suite", "long"))


def quantiles(low: float, middle: float, high: float) -> dict[str, float]:
    return {"p25": low, "p50": middle, "p75": high}


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
    assert report.is_tie(quantiles(low, middle, high), noise=0.1) is tie


def test_the_report_says_rounds_spread_ties_and_the_gate_s_noise(rows):
    rows = copy.deepcopy(rows)
    rows += [{**rows[-1], "case": "other", "noise": noise} for noise in (0.02, 0.3)]
    rows[-3]["noise"] = 0.04
    pooled = report.noise_of(rows)
    assert pooled == pytest.approx(np.quantile([0.02, 0.04, 0.3], 0.9))
    rows[1] |= {"rounds": 3, "step_ratio": quantiles(1.1, 1.2, 1.3), "forward_ratio": quantiles(9, 9.96, 12)}
    rows[3] |= {"rounds": 1, "step_ratio": quantiles(1.5, 1.5, 1.5), "peak_bytes": 123 << 20}
    rows[4] |= {"rounds": 2, "step_ratio": quantiles(1.2, 1.2, 1.2)}
    rows[0] |= {"rounds": 5, "step_roofline": quantiles(0.4, 0.5, 0.6), "forward_seconds": {"p50": 0.25}}
    text = report.markdown(rows, [])
    assert f"differ here by up to {100 * pooled:.0f} %" in " ".join(text.split())
    assert "| tangled | = 1.20 (1.10 to 1.30) |" in text and "| tangled | 10.0 (9.00 to 12.0) |" in text
    assert "| tangled | 1.50 (one round) | = 1.20 (2 rounds) |" in text
    assert "| 250.00 |" in text and "| 0.50 (0.40 to 0.60) |" in text and "| 123 |" in text
    assert [report.ratio_of(rows[i], pooled) for i in (1, 3, 4)] == ["= 1.20", "1.50 (one round)", "= 1.20 (2 rounds)"]


MEASURED = ("rounds", "errors", "setup_seconds", "first_seconds", "peak_bytes")


def skipping(rows: list[dict], name: str, why: str) -> list[dict]:
    """Rows where a contestant did not run."""
    gone = [key for row in rows for key in row if key in MEASURED or key.startswith(("step_", "forward_", "backward_"))]
    skipped = {"skipped": why}
    return [
        {key: value for key, value in row.items() if key not in gone} | skipped if row["contestant"] == name else row
        for row in rows
    ]


@pytest.mark.parametrize("why", cases.TOO_LONG.values())
def test_rows_of_a_long_run_stand_where_others_leave_out(rows, why):
    left_out = skipping(rows, "sdpa_mask", why)
    assert f"SDPA, dense mask, joint form: {why} (tangled)" in report.markdown(left_out, [])
    once = [{**row, "rounds": 1, "long": True} for row in rows]
    found = report.merged(left_out, once)
    assert [row.get("long", False) for row in found] == [row["contestant"] == "sdpa_mask" for row in rows]
    assert "Nothing." in report.markdown(found, []) and report.not_merged(left_out, once) == []
    for other in ({"case": "other"}, {"form": "edge"}, {"contestant": "flex"}):
        assert report.merged(left_out, [row | other for row in once]) == left_out
        assert report.not_merged(left_out, [row | other for row in once]) == []
    # a long run that cannot run it either says why
    too_large = skipping(rows, "sdpa_mask", "a mask of 11 GiB")
    assert report.merged(left_out, too_large) == too_large
    assert report.merged(left_out, []) == left_out and report.not_merged(left_out, []) == []


def test_rows_of_a_long_run_stand_where_they_have_more_rounds(rows):
    few = [row | {"rounds": 2} if "rounds" in row else row for row in rows]
    long = [row | {"long": True} | ({"rounds": 3} if "rounds" in row else {}) for row in rows]
    others = [row["contestant"] not in ("ours", "sdpa_unmasked") for row in rows]
    assert sum(others) == 3
    assert [row.get("long", False) for row in report.merged(few, long)] == others
    assert report.merged(long, few) == long and report.merged(few, few) == few
    failed = [{key: value for key, value in row.items() if key != "rounds"} | {"failed": "so"} for row in long]
    assert report.merged(few, failed) == few
    for why in ("it needs a GPU", "a mask of 11 GiB", "no time was left"):
        for_another_reason = skipping(rows, "sdpa_mask", why)
        assert report.merged(for_another_reason, rows) == for_another_reason


@pytest.mark.parametrize(
    "name", ["device", "processor", "threads", "torch", "dtype", "tokens", "batch", "heads", "head_dim"]
)
def test_rows_of_another_machine_s_long_run_are_left_out_and_told(rows, name):
    left_out = skipping(skipping(rows, "sdpa_mask", cases.TOO_LONG["cpu"]), "grouped", cases.TOO_LONG["cpu"])
    others = [row | {name: "another"} for row in rows]
    assert report.merged(left_out, others) == left_out
    told = f"of another machine or shape, and left out: {name}: another, here {rows[0][name]}"
    assert report.not_merged(left_out, others) == [f"2 rows of a long run are {told}"]
    assert report.not_merged(left_out, others[:2]) == [f"1 row of a long run is {told}"]
    # both machines' in one file
    assert report.merged(left_out, [*others, *rows]) == report.merged(left_out, [*rows, *others]) == rows


def test_the_host_of_a_gpu_s_long_run_does_not_matter(rows):
    rows = [row | {"driver": "1"} for row in rows]
    left_out = skipping(rows, "sdpa_mask", cases.TOO_LONG["cuda"])
    assert report.merged(left_out, [row | {"threads": 7, "processor": "abacus"} for row in rows]) != left_out
    assert report.merged(left_out, [row | {"device": "abacus"} for row in rows]) == left_out


def test_the_command_tells_of_rows_that_it_leaves_out(rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "FIGURES", ())
    measure.write_rows(skipping(rows, "sdpa_mask", cases.TOO_LONG["cpu"]), tmp_path / "rows.json")
    command = ["--rows", str(tmp_path / "rows.json"), "--out", str(tmp_path), "--beside", str(tmp_path / "long.json")]
    for torch_s, told in (("2.0", 1), (rows[0]["torch"], 0)):
        measure.write_rows([row | {"torch": torch_s} for row in rows], tmp_path / "long.json")
        assert bench.main(command) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert out.count("1 row of a long run is of another machine or shape, and left out: torch: 2.0, here") == told


def test_a_tie_is_judged_by_a_case_s_own_noise_where_that_is_larger(rows):
    others = [{**rows[-1], "case": str(number), "noise": 0.05} for number in range(20)]
    for own, expected in ((0.02, 0.05), (0.4, 0.4)):
        here = [*rows[:-1], {**rows[-1], "noise": own}, *others]
        here[1] = here[1] | {"rounds": 3, "step_ratio": quantiles(1.1, 1.2, 1.3)}
        noise = report.noise_in(here)
        assert noise(here[1]) == expected and noise(others[0]) == report.noise_of(here) == pytest.approx(0.05)
        assert f"| tangled | {'= ' * (own > 0.2)}1.20 (1.10 to 1.30) |" in report.markdown(here, [])


def test_shares_below_a_percent_have_two_digits():
    found = [report.percent(share) for share in (1, 0.338, 0.01, 0.0096, 0.004, 0.000488)]
    assert found == ["100.0 %", "33.8 %", "1.0 %", "0.96 %", "0.4 %", "0.049 %"]


def test_the_report_says_what_flex_attention_s_memory_is(rows):
    first = report.paragraph(report.FLEX_MEMORY)[0]
    assert first not in report.markdown(rows, [])
    forward = {key: value for key, value in rows[1].items() if not key.startswith(("step_", "backward_"))}
    for name in report.FLEX:
        text = report.markdown([*rows, forward | {"contestant": name}], [])
        assert text.count(first) == 1 and text.index("MiB:") < text.index(first)
        # on a GPU it trains
        assert first not in report.markdown([*rows, rows[1] | {"contestant": name}], [])


def test_what_runs_in_no_case_is_said_once(rows):
    gated = [row for row in rows if "errors" in row]
    nobody = [{**row, "case": name, "skipped": "it needs a GPU"} for name in ("tangled", "other") for row in gated]
    text = report.markdown([*rows, *nobody[:-1]], [])
    assert "- loop over edges, edge form: it needs a GPU (all cases)" in text
    assert "- grouped by hand, edge form: it needs a GPU (tangled)" in text


def test_a_terminal_shows_progress_and_the_last_cases_and_then_everything(tmp_path, monkeypatch):
    names = ["alpha", "beta", "gamma", "delta"]
    row = {"form": "edge", "contestant": "ours", "skipped": "no time was left"}
    rows = [row | {"case": name} for name in names for _ in range(4)]
    assert bench.recent(rows, 9) == rows[-8:] and bench.recent(rows, 8) == bench.recent(rows, 1) == rows[-4:]
    assert bench.recent(rows, 99) == rows and bench.recent([], 9) == []
    console = Console(file=io.StringIO(), force_terminal=True, width=110, height=bench.TABLE_LINES + 9, record=True)
    frames = []
    monkeypatch.setattr(measure, "console", lambda: console)
    monkeypatch.setattr(suite, "run", lambda *args: (rows[i : i + 4] for i in range(0, 16, 4)))
    monkeypatch.setattr(bench.Live, "update", lambda live, shown: frames.append(console.render_lines(shown)))
    found = bench.measured([dataclasses.replace(SMALL, name=name) for name in names], QUICK, tmp_path / "rows.json")
    texts = ["\n".join("".join(part.text for part in line) for line in lines) for lines in frames]
    assert found == rows and measure.read_rows(tmp_path / "rows.json") == rows
    for number, (lines, text) in enumerate(zip(frames, texts), 1):
        assert f"{number}/4" in text.splitlines()[0] and len(lines) <= console.height
        assert [name for name in names if f" {name} " in text.split("\n", 1)[1]] == names[max(0, number - 2) : number]
    whole = console.export_text().split("forward + backward;")[-1]
    assert [whole.count(f" {name} ") for name in names] == [4] * 4


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--contestant", "sdpa"], "no contestant is called 'sdpa'; there are ours, ours_torch, sdpa_mask,"),
        (["--case", "robots"], "no case is called 'robots'; there are robot, causal_video,"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--device", "cuda"], "--device cuda: torch finds no GPU here"),
        (["--seconds", "-1"], "--seconds must be at least 0, got -1"),
        (["--seconds", "nan"], "--seconds must be at least 0, got nan"),
        (["--out", README], f"nothing can be written into {README}: {README} is no folder"),
        (["--out", f"{README}/new/folder"], f"new/folder: {README} is no folder"),
        (["--rows", SUITE, "--out", f"{README}/new"], f"{README}/new: {README} is no folder"),
        (["--save", f"{README}/new/rows.json"], f"nothing can be written into {README}/new: {README} is no folder"),
        (["--save", str(measure.RESULTS)], f"{measure.RESULTS} is a folder: --save takes a file"),
        (["--rows", "no such file"], "No such file or directory: 'no such file'"),
        (["--rows", DISPATCHER], f"{DISPATCHER}, line 1 is no row of this suite: it has no batch and no heads"),
        (["--rows", DISPATCHER], "these rows are another benchmark's"),
        (["--rows", AOT], f"{AOT}, line 1 is no row of this suite: it has no case and no contestant"),
        (["--rows", AOT, "--compare", AOT, "--case", "robot"], "rows of compiled kernels have no cases"),
        (["--rows", SUITE, "--case", "robot", "--case", "robots"], f"{SUITE} has no case 'robots'; there are robot, "),
        (["--compare", SUITE, "--case", "long_video*", "--rows", SUITE], f"{SUITE} has no case 'long_video*'"),
        (["--compare", LONG, "--case", "robot"], f"nothing to compare: {LONG} has no case 'robot'"),
        (["--compare", AOT], f"{AOT}, line 1 is no row of this suite"),
        (["--beside", README], f"{README}, line 1 is no row: Expecting value"),
        (["--compare", README], f"{README}, line 1 is no row: Expecting value"),
        (["--beside", DISPATCHER], f"{DISPATCHER}, line 1 is no row of this suite: it has no batch and no heads"),
        (["--beside", AOT], f"{AOT}, line 1 is no row of this suite: it has no case and no contestant"),
        (["--compare", DISPATCHER], f"{DISPATCHER}, line 1 is no row of this suite"),
        (
            ["--long", "--case", "robot"],
            "robot leaves nobody out: there is nothing long to time; that is in fleet, video_65536, video_1048576",
        ),
        (["--long", "--case", "robots"], "no case is called 'robots'; there are fleet, video_65536, video_1048576"),
    ],
)
def test_the_command_refuses_what_it_does_not_know(arguments, complaint, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(suite, "run", lambda *args: pytest.fail("this is not to be measured"))
    with pytest.raises(SystemExit) as ended:
        bench.main(["--device", "cpu", "--out", str(tmp_path), *arguments])
    assert ended.value.code == 2 and complaint in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_may_not_be_written_into_is_told(tmp_path, monkeypatch):
    measure.check_folder(tmp_path / "new")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write everywhere
    with pytest.raises(ValueError, match=f"nothing can be written into {tmp_path}/new: {tmp_path} is not ours"):
        measure.check_folder(tmp_path / "new")


def test_the_command_reports_and_compares_the_cases_that_it_is_asked_for(tmp_path, capsys, monkeypatch):
    reported = []
    monkeypatch.setattr(report, "write", lambda rows, out: reported.append([row["case"] for row in rows]) or out)
    rows = ["--rows", SUITE, "--out", str(tmp_path)]
    two = ["--case", "robot", "--case", "fleet"]
    for options, names in ((["--case", "rob*"], {"robot"}), (two, {"robot", "fleet"})):
        assert bench.main([*rows, *options, "--compare", SUITE]) == 0
        assert {*reported.pop()} == names
        out = capsys.readouterr().out
        assert "not in the" not in out and "frames_2" not in out
        assert out.splitlines()[-1] == f"no slow-down and no growth in {2 * len(names)} of {2 * len(names)}"
    assert bench.main(rows) == 0 and len({*reported.pop()}) == len(cases.CPU)
    # a case of a GPU's rows need not be a processor's
    other = [row | {"case": "of_a_gpu"} for row in measure.read_rows(measure.RESULTS / "suite.json")]
    measure.write_rows(other, tmp_path / "other.json")
    rows = ["--device", "cpu", "--rows", str(tmp_path / "other.json"), "--out", str(tmp_path)]
    assert bench.main([*rows, "--case", "of_a_gpu"]) == 0 and {*reported.pop()} == {"of_a_gpu"}


def test_help_says_defaults_who_there_is_and_when_a_comparison_fails(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for contestant in contestants.of("cuda"):
        assert contestant.name in text
    assert text.count("may repeat (default: all)") == 2 and "(default: 4)" in text and "(default: out/bench)" in text
    for reason in ("slower or larger", "another machine's", "no case is in both", "worse or is gone"):
        assert reason in text.split("--compare ROWS exit with 1")[1].split("--list")[0]


def test_the_table_leaves_out_who_never_ran_and_says_why_below(tmp_path, monkeypatch):
    def row(case: str, name: str, **why) -> dict:
        return {"case": case, "form": "edge", "contestant": name} | (why or {"forward_seconds": {"p50": 0.5}})

    gpu, long = {"skipped": "it needs a GPU"}, {"skipped": "a mask of [so many] GiB, more than the memory that is free"}
    rows = []
    for case, mask in (("alpha", {}), ("beta", long)):
        rows += [row(case, "ours", **long), row(case, "varlen", **gpu), row(case, "sdpa_mask", **mask)]
        rows += [row(case, "xformers", **gpu), row(case, "flex", skipped=f"not in {case}")]
        rows += [row(case, "grouped", failed="RuntimeError: so")]
    assert bench.nowhere(rows) == {"it needs a GPU": ["varlen", "xformers"], "RuntimeError: so": ["grouped"]}
    assert bench.nowhere(rows[:6])["not in alpha"] == ["flex"]
    console = Console(file=io.StringIO(), width=160, record=True)
    monkeypatch.setattr(measure, "console", lambda: console)
    monkeypatch.setattr(suite, "run", lambda *args: iter([rows[:6], rows[6:]]))
    found = [dataclasses.replace(SMALL, name=name) for name in ("alpha", "beta")]
    assert bench.measured(found, QUICK, tmp_path / "rows.json") == rows
    assert measure.read_rows(tmp_path / "rows.json") == rows
    table, below = console.export_text().split("└")
    counts = {name: table.count(f" {name} ") for name in ("ours", "sdpa_mask", "flex", "varlen", "grouped")}
    assert counts == {"ours": 3, "sdpa_mask": 2, "flex": 2, "varlen": 0, "grouped": 0}  # one is in a title
    assert "a mask of [so many] GiB, more than the …" in table and "500.00" in table
    assert below.splitlines()[1:] == ["varlen, xformers: it needs a GPU", "grouped: RuntimeError: so"]


def test_rows_without_a_time_are_said_to_be_such(tmp_path, capsys, recwarn):
    def fails():
        raise MemoryError("too large")

    (failed,) = suite.run([cases.Case("huge", fails)], copy.copy(QUICK))
    for rows, told in (([], ""), (failed, "huge, joint form: the whole case: MemoryError: too large")):
        measure.write_rows(rows, tmp_path / "rows.json")
        assert bench.main(["--rows", str(tmp_path / "rows.json"), "--out", str(tmp_path)]) == 1
        out = capsys.readouterr().out
        assert "no rows were timed" in out and told in out and "nan" not in out
        assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]
        with pytest.raises(ValueError, match="no rows were timed"):
            report.write(rows, tmp_path)
    assert not recwarn.list


def test_rows_to_compare_with_are_not_written_over(tmp_path, capsys):
    rows = tmp_path / "rows.json"
    rows.write_text("{}\n")
    with pytest.raises(SystemExit):
        bench.main(["--case", "robot", "--out", str(tmp_path), "--compare", str(rows)])
    assert "would be written over, and is to be compared" in capsys.readouterr().err and rows.read_text() == "{}\n"
