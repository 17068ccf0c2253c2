"""The committed rows of CPU benchmarks: complete, and what was promised stands in them."""

from __future__ import annotations

import pytest

from benchmarks import cases, contestants, dispatcher, fleet, measure, report


def committed(name: str) -> list[dict]:
    return measure.read_rows(measure.RESULTS / f"{name}.json")


@pytest.fixture(scope="module")
def suite_rows() -> list[dict]:
    """Those of `make bench`, and of the long run in `make costs` what that leaves out."""
    return report.merged(committed("suite"), committed("long"))


def test_every_case_of_a_cpu_was_measured_in_both_forms(suite_rows):
    ours = {(row["case"], row["form"]) for row in report.timed(suite_rows, contestant="ours")}
    assert ours == {(case.name, form) for case in cases.CPU for form in ("joint", "edge")}
    assert not [row for row in suite_rows if "failed" in row]
    assert {row["threads"] for row in suite_rows} == {1} and {row["dtype"] for row in suite_rows} == {"float32"}


LEFT_OUT = {
    ("joint", "ours_torch"): "ours runs the torch backend here",
    ("edge", "ours_torch"): "ours runs the torch backend here",
    ("joint", "sdpa_mask_used"): "every token reads or is read",
    ("joint", "flex_packed"): "packed order is canvas order",
    ("joint", "xformers"): "it needs a GPU",
    ("joint", "flashinfer"): "it needs a GPU",
    ("joint", "flashinfer_packed"): "it needs a GPU",
    ("edge", "grouped"): "no two reads are of one shape: this is the loop",
    ("edge", "varlen"): "it needs a GPU",
}
"""Why a contestant may be left out of any case."""
TOO_LARGE = {
    ("video_1048576", "joint", "sdpa_mask"): "a mask of ",
    ("video_1048576", "edge", "per_edge_loop"): cases.NEVER,
}
"""How the reason begins why one may be left out of a case: (2^20)² floats are 4 TiB."""


def not_measured(rows: list[dict]) -> list[tuple]:
    """Who was neither timed nor left out for a reason that is allowed, and what the rows say of it."""
    found = {(row["case"], row["form"], row["contestant"]): row for row in rows}
    missing = []
    for case in cases.CPU:
        for contestant in contestants.of("cpu"):
            who = case.name, contestant.form, contestant.name
            row = found.get(who, {})
            if row.get("forward_seconds"):
                continue
            why = row.get("skipped") or row.get("failed") or "no row"
            is_allowed = why == LEFT_OUT.get(who[1:]) or (who in TOO_LARGE and why.startswith(TOO_LARGE[who]))
            if "skipped" not in row or not is_allowed:
                missing.append((*who, why))
    return missing


def test_everyone_was_measured_in_every_case(suite_rows):
    assert not_measured(suite_rows) == []


def test_who_was_not_measured_is_seen():
    everyone = [
        {"case": case.name, "form": contestant.form, "contestant": contestant.name, "forward_seconds": {"p50": 1.0}}
        for case in cases.CPU
        for contestant in contestants.of("cpu")
    ]
    assert not_measured(everyone) == []

    def but(name: str, **told: str) -> list[dict]:
        return [row if row["contestant"] != name else {**row, "forward_seconds": None, **told} for row in everyone]

    for contestant in contestants.of("cpu"):
        who, many = contestant.name, len(cases.CPU) * (1 + (contestant.name in ("ours", "ours_torch")))
        assert len(not_measured([row for row in everyone if row["contestant"] != who])) == many
        assert len(not_measured(but(who, failed="it needs a GPU"))) == many
        assert len(not_measured(but(who, skipped=cases.TOO_LONG["cpu"]))) == many
        allowed = [why for (_, name), why in LEFT_OUT.items() if name == who]
        assert not allowed or not_measured(but(who, skipped=allowed[0])) == []
    too_large = not_measured(but("sdpa_mask", skipped="a mask of 16.0 GiB, more than the 2.0 GiB"))
    assert {case for case, *_ in too_large} == {case.name for case in cases.CPU} - {"video_1048576"}


def test_what_is_close_to_ours_was_timed_more_than_once(suite_rows):
    close = [row for row in report.timed(suite_rows) if 0 < row.get("step_ratio", {"p50": 9.0})["p50"] < 1.12]
    assert len(close) > 10 and not [row for row in close if row["rounds"] < report.MEDIAN_ROUNDS]


def test_each_dispatcher_contestant_agreed_with_its_form():
    rows = committed("dispatcher")
    wanted = {
        (case.name, form, who) for case in cases.DISPATCH for form, names in dispatcher.FORMS.items() for who in names
    }
    assert {(row["case"], row["form"], row["contestant"]) for row in rows} == wanted
    assert all(0 < row["worst_error"] <= dispatcher.TOLERANCE == 1e-5 for row in rows)


def test_a_fleet_is_forty_times_faster_than_its_loop():
    (row,) = (row for row in committed("fleet") if row.get("contestant") == "per_edge_loop")
    assert row["case"] == "fleet of 50" and row["ratio_of_medians"] >= fleet.AT_LEAST == 40
