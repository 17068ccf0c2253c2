"""The report's figures hold the rows' numbers, and no legend or name hides a point."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib", reason="figures are drawn with matplotlib")

from benchmarks import cases, measure, report

OURS, MASK, FLEX = (report.LABELS[name] for name in ("ours", "sdpa_mask", "flex"))
CANVASES = {case.name for case in cases.CPU if case.group == "canvas"}


@pytest.fixture(scope="module")
def rows():
    return measure.read_rows(measure.RESULTS / "suite.json")


def words(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def density_line(axes):
    (line,) = (line for line in axes.lines if line.get_label().startswith("1 / density"))
    return line


@pytest.mark.parametrize("name", report.FIGURES)
def test_legends_lie_beside_the_panels(rows, name):
    figure = getattr(report, f"{name}_figure")(rows)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    for axes in figure.axes:
        assert axes.get_legend() is None
        assert not legend.get_window_extent().overlaps(axes.get_tightbbox())
    assert len(words(figure)) == len({*words(figure)})


def test_speedup_tells_parts_apart_and_names_canvases(rows):
    figure = report.speedup_figure(rows)
    axes = figure.axes[0]
    points = {scatter.get_label(): scatter for scatter in axes.collections}
    mask, flex = f"{MASK}, forward + backward (filled)", f"{FLEX}, forward alone (open)"
    assert {mask, flex} <= points.keys() and {*points} <= {*words(figure)}
    for name, label, part in (("sdpa_mask", mask, "step"), ("flex", flex, "forward")):
        own = report.timed(rows, form="joint", contestant=name)
        expected = [[row["density"], row[f"{part}_ratio"]["p50"]] for row in own]
        assert points[label].get_offsets().tolist() == expected
        assert bool(len(points[label].get_facecolors())) is (part == "step")
    densities = [x for scatter in points.values() for x, _ in scatter.get_offsets().tolist()]
    line = density_line(axes)
    assert line.get_xdata().tolist() == [min(densities), max(densities)]
    assert line.get_ydata().tolist() == [1 / min(densities), 1 / max(densities)]
    top = axes.child_axes[0]
    named = dict(zip((text.get_text() for text in top.get_xticklabels()), top.get_xticks().tolist()))
    assert named == {row["case"]: row["density"] for row in rows if row["case"] in CANVASES and "density" in row}


def test_a_gpu_s_flex_attention_is_filled(rows):
    trained = [row | {"contestant": "flex"} for row in report.timed(rows, form="joint", contestant="sdpa_mask")]
    figure = report.speedup_figure(trained)
    assert words(figure)[0] == f"{FLEX}, forward + backward (filled)"
    assert len(figure.axes[0].collections[0].get_facecolors()) == 1
    sparse = [row for row in trained if row["density"] < 0.2]
    end = density_line(report.speedup_figure(sparse).axes[0]).get_xdata()[1]
    assert end == max(row["density"] for row in sparse), "no longer than the points' range"


def test_roofline_is_drawn_against_keys_of_a_query(rows):
    axes = report.roofline_figure(rows).axes[0]
    points = {scatter.get_label(): scatter.get_offsets().tolist() for scatter in axes.collections}
    ours = list(report.timed(rows, form="edge", contestant="ours"))
    expected = [[row["pairs"] / row["tokens"], row["step_roofline"]["p50"]] for row in ours]
    assert points[f"{OURS}, edge form"] == expected


def test_scaling_has_a_panel_each_and_compares_like_with_like(rows):
    figure = report.scaling_figure(rows)
    seconds, memory = figure.axes
    assert (seconds.get_ylabel(), memory.get_ylabel()) == ("seconds", "MiB held at most")
    lines = [{line.get_label(): line.get_xydata().tolist() for line in axes.lines} for axes in (seconds, memory)]
    video = [row for row in rows if row.get("group") == "length"]
    ours = list(report.timed(video, form="joint", contestant="ours"))
    flex = list(report.timed(video, form="joint", contestant="flex"))
    for label, found, part in (
        (f"{OURS}, joint form, forward + backward", ours, "step"),
        (f"{OURS}, joint form, forward alone", ours, "forward"),
        (f"{FLEX}, joint form, forward alone", flex, "forward"),
    ):
        assert lines[0][label] == [[row["tokens"], row[f"{part}_seconds"]["p50"]] for row in found]
    assert lines[1][f"{FLEX}, joint form, forward alone"] == [
        [row["tokens"], row["peak_bytes"] / 2**20] for row in flex
    ]
    assert lines[0].keys() - lines[1].keys() == {f"{OURS}, joint form, forward alone"}, "its memory is not known"
    without = [row for row in video if row["contestant"] != "flex"]
    assert not any("forward alone" in label for label in words(report.scaling_figure(without)))
    silent = [row | {"peak_bytes": None} for row in without]
    assert all(not len(line.get_xydata()) for line in report.scaling_figure(silent).axes[1].lines)
