"""Pictures hold what they say: the right boxes, cells and rectangles, in the right places."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib", reason="pictures are drawn with matplotlib")

from canvas_engineering import (
    CanvasLayout,
    CanvasSchema,
    CanvasTopology,
    Connection,
    RegionSpec,
    compile_attention,
    draw,
)


@pytest.fixture
def layout():
    regions = {"cam": (0, 4, 0, 3, 0, 4), "plan": RegionSpec((0, 2, 3, 4, 0, 4), period=2)}
    return CanvasLayout(T=4, d_model=8, spatial_shape=(4, 4), regions=regions)


def boxes(axes) -> list[tuple]:
    return [(patch.get_x(), patch.get_y(), patch.get_width(), patch.get_height()) for patch in axes.patches]


def test_layout_has_a_panel_per_run_of_frames(layout):
    figure = draw.layout_figure(layout)
    both, cam_only, clocks = figure.get_axes()
    assert both.get_title() == "frames 0 to 1" and cam_only.get_title() == "frames 2 to 3"
    assert boxes(both) == [(0, 0, 4, 3), (0, 3, 4, 1)]
    assert boxes(cam_only) == [(0, 0, 4, 3)]
    assert [text.get_text() for text in both.texts] == ["cam", "plan\nevery 2"]
    assert [list(line.get_xdata()) for line in clocks.lines] == [[0, 1, 2, 3], [0, 2]]


def test_layout_without_and_with_many_spatial_dimensions():
    flat = CanvasLayout(T=3, d_model=8, spatial_shape=(5,), regions={"a": (1, 2, 1, 4)})
    empty, filled, after, _ = draw.layout_figure(flat).get_axes()
    assert [boxes(axes) for axes in (empty, filled, after)] == [[], [(1, 0, 3, 1)], []]
    assert filled.get_title() == "frame 1"
    deep = CanvasLayout(T=1, d_model=8, spatial_shape=(2, 3, 4), regions={"a": (0, 1, 0, 1, 1, 3, 0, 2)})
    assert boxes(draw.layout_figure(deep).get_axes()[0]) == [(0, 1, 2, 2)]


def test_layout_of_many_runs_says_what_it_leaves_out():
    regions = {f"r{t}": (t, t + 1, 0, 1, 0, 1) for t in range(12)}
    figure = draw.layout_figure(CanvasLayout(T=12, d_model=8, spatial_shape=(1, 1), regions=regions))
    assert len(figure.get_axes()) == draw.MAX_PANELS + 1
    assert f"the first {draw.MAX_PANELS} of 12" in figure.subfigs[0].get_suptitle()


def test_topology_is_the_matrix_of_weights():
    topology = CanvasTopology(
        [
            Connection("b", "a", weight=2.0),
            Connection("b", "a", weight=0.5, t_src=0, t_dst=-1),
            Connection("a", "a", t_src=None, t_dst=0),
        ]
    )
    axes = draw.topology_figure(topology).get_axes()[0]
    assert axes.images[0].get_array().filled(0.0).tolist() == [[1.0, 0.0], [2.5, 0.0]]
    texts = {text.get_position(): " ".join(text.get_text().split()) for text in axes.texts}
    assert texts == {(0, 1): "1 frame back, all frames", (0, 0): "all, 0"}
    assert axes.get_title() == "3 connections between 2 regions"


def test_a_topology_of_many_regions_has_no_words_in_its_cells_and_explains_none():
    axes = draw.topology_figure(CanvasTopology.dense([f"r{i}" for i in range(13)])).get_axes()[0]
    assert not axes.texts and axes.get_title() == "169 connections between 13 regions"


def test_plan_shows_every_rectangle_in_its_connections_colour(layout):
    topology = CanvasTopology([Connection("cam", "cam", t_src=0, t_dst=0), Connection("plan", "cam")])
    plan = compile_attention(layout, topology)
    figure = draw.plan_figure(plan)
    collection = figure.get_axes()[0].collections[0]
    spans = [tuple(path.get_extents().extents) for path in collection.get_paths()]
    table = plan.table
    assert spans == [*zip(table.k_start, table.q_start, table.k_stop, table.q_stop)]
    faces = {tuple(face) for face in collection.get_facecolors()}
    assert len(faces) == 2
    assert f"density {100 * plan.density:.2f} %" in figure.get_axes()[0].get_title()
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend == ["cam attends to cam: same frame", "plan attends to cam: all frames"]
    ticks = figure.axes[0].get_yticks().tolist(), [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert ticks == ([0, 48], ["cam", "plan"])


def test_a_pair_of_regions_has_one_colour_and_one_line(layout):
    several = [Connection("cam", "cam", t_src=0, t_dst=-k) for k in (0, 1, 2)]
    figure = draw.plan_figure(compile_attention(layout, CanvasTopology([*several, Connection("plan", "plan")])))
    (axes,) = figure.axes
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["cam attends to cam: same frame, 1 to 2 frames back", "plan attends to plan: all frames"]
    assert axes.get_legend().get_title().get_text() == "4 connections"
    assert len({tuple(face) for face in axes.collections[0].get_facecolors()}) == 2


def test_small_regions_are_seen_beside_large_ones():
    regions = {"video": (0, 1, 0, 100, 0, 90), "action": (0, 1, 100, 101, 0, 1)}
    layout = CanvasLayout(T=1, d_model=8, spatial_shape=(101, 90), regions=regions)
    (axes,) = draw.plan_figure(compile_attention(layout, CanvasTopology.dense(["video", "action"]))).axes
    start, middle, end = axes.transData.transform([(0, 0), (9_000, 9_000), (9_001, 9_001)])
    # 9,000 positions and 1: √9000 ≈ 94.9 to 1 on both axes
    for axis in (0, 1):
        part = (end - middle)[axis] / (end - start)[axis]
        assert part == pytest.approx(1 / (1 + 9_000**0.5), rel=1e-6)


def test_an_empty_table_is_drawn(layout, tmp_path):
    figure = draw.plan_figure(compile_attention(layout, CanvasTopology([])))
    figure.savefig(tmp_path / "empty.png")  # a warning is an error here
    assert figure.axes[0].get_title().startswith("0 rectangles")


def test_offsets_in_words():
    assert draw.offsets_in_words([(0, 0), (0, -1), (0, -2), (0, -8), (0, 1)]) == (
        "same frame, 1 to 2 and 8 frames back, 1 frame ahead"
    )
    assert draw.offsets_in_words([(None, None), (None, 2), (1, 0)]) == "1 frame back, all frames, all, +2"
    assert draw.offsets_in_words([(0, 1), (0, 3)]) == "1 and 3 frames ahead"


def test_joint_plan_has_no_legend(layout):
    plan = compile_attention(layout, CanvasTopology.dense(["cam", "plan"]), normalize="joint")
    figure = draw.plan_figure(plan)
    assert figure.axes[0].get_legend() is None
    assert "joint form" in figure.get_axes()[0].get_title()


def test_a_volume_has_a_box_for_each_region(layout, tmp_path):
    figure = draw.volume_figure(layout, azimuth=30.0)
    (axes,) = figure.axes
    assert len(axes.collections) == 2 and axes.azim == 30.0 and axes.get_xlim() == (0, 4)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["cam", "plan"]
    figure.savefig(tmp_path / "volume.png")
    flat = CanvasLayout(T=3, d_model=8, spatial_shape=(5,), regions={"a": (1, 2, 1, 4)})
    draw.volume_figure(flat).savefig(tmp_path / "flat.png")


@pytest.mark.parametrize(
    ("fill", "shares"),
    [
        ("drop", [[1, 0], [0, 0], [0, 1], [0, 0]]),
        ("hold", [[1, 0], [1, 0], [0, 1], [0, 1]]),
        ("interpolate", [[1, 0], [0.5, 0.5], [0, 1], [0, 1]]),
    ],
)
def test_frames_show_shares_of_the_weight(layout, fill, shares):
    figure = draw.frames_figure(layout, Connection("cam", "plan", t_src=0, t_dst=0, temporal_fill=fill))
    assert figure.axes[0].images[0].get_array().filled(0.0).tolist() == shares
    texts = {text.get_position()[::-1]: float(text.get_text()) for text in figure.axes[0].texts}
    assert texts == {(i, j): value for i, row in enumerate(shares) for j, value in enumerate(row) if value}


def embedded(**vectors):
    regions = {
        name: RegionSpec((0, 1, i, i + 1), semantic_embedding=vector, embedding_model="m")
        for i, (name, vector) in enumerate(vectors.items())
    }
    regions["plain"] = RegionSpec((0, 1, len(vectors), len(vectors) + 1))
    return CanvasLayout(T=1, d_model=8, spatial_shape=(len(vectors) + 1,), regions=regions)


def test_distances_and_alignments_are_those_of_the_embeddings(tmp_path):
    one = embedded(eye=(1.0, 0.0), arm=(0.0, 1.0))
    axes = draw.distance_figure(one).axes[0]
    assert axes.images[0].get_array().flatten().tolist() == pytest.approx([0.0, 1.0, 1.0, 0.0], abs=1e-6)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["eye", "arm"]
    with pytest.raises(ValueError, match=r"two regions with an embedding; this layout has \['eye'\]"):
        draw.distance_figure(embedded(eye=(1.0, 0.0)))
    figure = draw.alignment_figure(CanvasSchema(one), CanvasSchema(embedded(camera=(1.0, 0.0), grip=(1.0, 1.0))))
    lines = {
        (*line.get_xdata(), *line.get_ydata()): line for line in figure.axes[0].lines if len(line.get_xdata()) == 2
    }
    # eye and camera mean the same, eye or arm and grip lie 45 degrees apart
    assert set(lines) == {(0, 1, 0, 0), (0, 1, 0, -1), (0, 1, -1, -1)}
    assert lines[0, 1, 0, 0].get_linewidth() > lines[0, 1, 0, -1].get_linewidth()
    figure.savefig(tmp_path / "alignment.png")
