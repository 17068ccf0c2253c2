"""compile_attention: the plan is the declaration exactly, cheap, cached, and says what it costs."""

from __future__ import annotations

import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from canvas_engineering.canvas import CanvasLayout, RegionSpec
from canvas_engineering.connectivity import CanvasTopology, Connection, TemporalFill
from canvas_engineering.dispatch import AttentionDispatcher
from canvas_engineering.masks import MaskSpec
from canvas_engineering.plan import compile_attention
from tests import oracle
from tests.strategies import canvases


@settings(max_examples=150)
@given(canvases())
def test_dense_form_is_the_oracle(canvas):
    layout, topology = canvas
    expected = oracle.joint_matrix(layout, topology).numpy()
    for normalize in ("edge", "joint"):
        plan = compile_attention(layout, topology, normalize=normalize)
        np.testing.assert_allclose(plan.to_dense(), expected, rtol=1e-6)
        assert (plan.rows_with_keys() == (expected > 0).any(1)).all()


@settings(max_examples=150)
@given(canvases())
def test_segments_are_the_reads(canvas):
    """Per connection: the same multiset of (query, keys) with the same total weight, equal reads merged."""
    layout, topology = canvas
    expected: dict[tuple, float] = {}
    for read in oracle.reads(layout, topology):
        for query, keys in read.keys.items():
            row = (read.connection, query, tuple(sorted(keys)))
            expected[row] = expected.get(row, 0.0) + read.weight
    plan = compile_attention(layout, topology)
    table, found = plan.table, {}
    ranges = table.query_ranges()
    for c in range(len(ranges.segment)):
        rectangles = ranges.rectangle[ranges.ptr[c] : ranges.ptr[c + 1]]
        places = np.concatenate([np.arange(table.k_start[r], table.k_stop[r]) for r in rectangles])
        keys = tuple(sorted(plan.order[places].tolist()))
        for place in range(ranges.q_start[c], ranges.q_stop[c]):
            row = (int(table.edge[rectangles[0]]), int(plan.order[place]), keys)
            found[row] = found.get(row, 0.0) + float(table.weight[rectangles[0]])
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[row] for row in expected], list(expected.values()), rtol=1e-6)


@settings(max_examples=50)
@given(canvases())
def test_packing_keeps_every_used_position_once(canvas):
    layout, topology = canvas
    plan = compile_attention(layout, topology)
    matrix = oracle.joint_matrix(layout, topology).numpy()
    used = (matrix > 0).any(0) | (matrix > 0).any(1)
    assert sorted(plan.order.tolist()) == used.nonzero()[0].tolist()
    x = torch.randn(2, plan.n_positions, 3)
    back = plan.unpack(plan.pack(x))
    assert torch.equal(back, x * torch.from_numpy(used)[:, None])


def multi_rate():
    layout = CanvasLayout(
        T=16,
        H=12,
        W=8,
        d_model=8,
        regions={"fast": (0, 16, 0, 8, 0, 8), "slow": RegionSpec((0, 4, 8, 12, 0, 8), period=4)},
    )
    interpolate = Connection("fast", "slow", t_src=0, t_dst=0, temporal_fill=TemporalFill.INTERPOLATE)
    hold = Connection("slow", "fast", t_src=0, t_dst=0, temporal_fill=TemporalFill.HOLD)
    return layout, CanvasTopology(
        [Connection("fast", "fast", t_src=0, t_dst=0), interpolate, Connection("slow", "slow"), hold]
    )


def test_reads_of_the_multi_rate_canvas():
    # fast frame t at real time t lies between slow frames t // 4 and t // 4 + 1; the last three frames have only a past
    layout, topology = multi_rate()
    plan = compile_attention(layout, topology)
    weights = [plan.attention_sets.weight[plan.attention_sets.connection == c].tolist() for c in range(4)]
    assert weights[0] == [1.0] * 16 and weights[2] == [1.0] and weights[3] == [1.0] * 4
    assert weights[1] == [1.0, 0.75, 0.25, 0.5, 0.5, 0.25, 0.75] * 3 + [1.0] * 4
    # every frame of either region is one interval of the packed order, and no position is unused
    assert len(plan.table.weight) == sum(len(w) for w in weights)
    assert plan.n_packed == 16 * 64 + 4 * 32


def test_equal_reads_of_several_reference_frames_are_merged():
    layout = CanvasLayout(
        T=8, H=1, W=2, d_model=8, regions={"a": (0, 8, 0, 1, 0, 1), "b": RegionSpec((0, 1, 0, 1, 1, 2), period=8)}
    )
    plan = compile_attention(layout, CanvasTopology([Connection("a", "b", t_src=None, t_dst=0, weight=0.5)]))
    assert len(plan.attention_sets.weight) == 8 and plan.table.weight.tolist() == [4.0]
    assert plan.to_dense().max() == 0.5


def test_spatial_tiles_read_over_all_frames_stay_few_rectangles():
    layout = CanvasLayout(T=8, H=8, W=8, d_model=8, regions={"video": (0, 8, 0, 8, 0, 8)})
    tiled = CanvasTopology([Connection("video", "video", mask=MaskSpec("tile", tile_h=4, tile_w=4))])
    plan = compile_attention(layout, tiled)
    assert len(plan.table.weight) == 4, "a tile over all frames is one interval of the packed order"
    framed = CanvasTopology([Connection("video", "video", t_src=0, t_dst=0)])
    assert compile_attention(layout, framed).in_canvas_order


def test_equal_declarations_share_a_plan_and_a_change_makes_another():
    (layout, topology), (other_layout, other_topology) = multi_rate(), multi_rate()
    plan = compile_attention(layout, topology)
    assert compile_attention(other_layout, other_topology) is plan
    assert compile_attention(layout, topology, normalize="joint") is not plan
    other_topology.connections[0] = Connection("fast", "fast", t_src=0, t_dst=-1)
    changed = compile_attention(other_layout, other_topology)
    assert changed is not plan and not np.array_equal(changed.to_dense(), plan.to_dense())
    other_layout.regions["slow"] = RegionSpec((0, 4, 8, 12, 0, 8), period=2)
    assert compile_attention(other_layout, other_topology) is not changed


def test_dense_in_time_ignores_offsets():
    layout, topology = multi_rate()
    timeless = CanvasTopology([Connection(c.src, c.dst) for c in topology.connections])
    dense = compile_attention(layout, topology, dense_in_time=True)
    assert (dense.to_dense() == compile_attention(layout, timeless).to_dense()).all()


def test_plans_by_function_split_the_reads():
    layout = CanvasLayout(T=1, H=1, W=4, d_model=8, regions={"a": (0, 1, 0, 1, 0, 2), "b": (0, 1, 0, 1, 2, 4)})
    topology = CanvasTopology(
        [Connection("a", "b"), Connection("b", "a", fn="cogvideox"), Connection("a", "a", fn="none")]
    )
    plan = compile_attention(layout, topology)
    assert plan.fns == ("cross_attention", "cogvideox", "none")
    cross, other = plan.for_fn("cross_attention"), plan.for_fn("cogvideox")
    assert cross.table.pairs == other.table.pairs == 4 and plan.table.pairs == 8
    assert (cross.order == plan.order).all() and other.table.edge.tolist() == [1]
    with pytest.raises(KeyError, match="no connection resolves to 'gated'"):
        plan.for_fn("gated")
    with pytest.raises(ValueError, match="joint form has one softmax"):
        compile_attention(layout, topology, normalize="joint").for_fn("cross_attention")


def test_a_missing_region_is_skipped_with_one_warning():
    layout = CanvasLayout(T=1, H=1, W=2, d_model=8, regions={"a": (0, 1, 0, 1, 0, 2)})
    topology = CanvasTopology([Connection("a", "a"), Connection("a", "ghost"), Connection("spook", "a")])
    message = r"skipping 2 of 3 connections .* \('ghost', 'spook'\): 'a' -> 'ghost', 'spook' -> 'a'"
    with pytest.warns(UserWarning, match=message) as caught:
        plan = compile_attention(layout, topology)
    assert len(caught) == 1 and len(plan.attention_sets.weight) == 1
    with pytest.warns(UserWarning, match=message) as caught:
        assert compile_attention(layout, topology) is plan
    assert len(caught) == 1


def test_a_pattern_that_does_not_fit_names_its_connection():
    layout = CanvasLayout(T=1, H=1, W=2, d_model=8, regions={"a": (0, 1, 0, 1, 0, 2)})
    topology = CanvasTopology([Connection("a", "a", mask=MaskSpec("sparse", pattern=[[True] * 3]))])
    with pytest.raises(ValueError, match=r"connection 0, 'a' attends to 'a': mask pattern of shape \(1, 3\)"):
        compile_attention(layout, topology)


def test_bad_arguments_are_named():
    layout, topology = multi_rate()
    with pytest.raises(ValueError, match="a CanvasLayout and then a CanvasTopology, got CanvasTopology, CanvasLayout"):
        compile_attention(CanvasTopology.dense(["a"]), CanvasLayout(T=1, H=1, W=1, d_model=8, regions={}))
    with pytest.raises(ValueError, match=r"normalize must be one of .* got 'rows'"):
        compile_attention(layout, topology, normalize="rows")
    plan = compile_attention(layout, topology)
    with pytest.raises(ValueError, match=r"dimension 1 of \(2, 5, 3\) must hold the canvas's 1536 positions"):
        plan.pack(torch.zeros(2, 5, 3), 1)
    with pytest.raises(ValueError, match=r"must hold the plan's 1152 packed positions"):
        plan.unpack(torch.zeros(2, 5, 3), 1)


def test_regions_that_nothing_joins_are_told_of_once_and_at_the_callers_line():
    regions = {"video": (0, 8, 0, 1, 0, 4), "goal": (0, 1, 1, 2, 0, 4)}
    layout = CanvasLayout(T=8, H=2, W=4, d_model=8, regions=regions)
    topology = CanvasTopology(
        [
            # each region reads itself somehow; the frame before, of one that has one frame, is no mistake
            *CanvasTopology.causal_temporal(["video", "goal"]).connections[:1],
            Connection("goal", "goal"),
            Connection("goal", "goal", t_src=0, t_dst=-1),
            Connection("video", "goal", t_src=0, t_dst=-100),
            Connection("goal", "video", t_src=0, t_dst=-1, weight=0.0),
        ]
    )
    message = "^1 of 5 connections have no keys on this layout: 'video' → 'goal' at t_src=0, t_dst=-100$"
    with pytest.warns(UserWarning, match=message) as caught:
        plan = compile_attention(layout, topology)
    assert [warning.filename for warning in caught] == [__file__]
    assert plan.attention_sets.counts(5).tolist() == [8, 1, 0, 0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compile_attention(layout, topology) is plan
    with pytest.warns(UserWarning, match="have no keys") as caught:
        dispatcher = AttentionDispatcher(CanvasTopology([topology.connections[3]]), layout, 8)
    assert [warning.filename for warning in caught] == [__file__]
    x = torch.randn(1, layout.num_positions, 8)
    assert torch.equal(dispatcher(x), x)


def test_summary_and_picture_state_the_measured_quantities():
    layout, topology = multi_rate()
    plan = compile_attention(layout, topology)
    text = str(plan)
    assert f"density {100 * plan.table.pairs / 1536**2:.2f} %" in text
    assert (
        f"{plan.table.pairs * 4 * 64 / 1e6:.1f} MFLOP forward and {plan.table.pairs * 640 / 1e6:.1f} backward" in text
    )
    assert f"{plan.table_bytes / 1024:.1f} KiB" in text and 0 < plan.fill <= 1
    assert len(text.splitlines()) == 3 + 32


def test_fill_is_told_by_the_size_of_tiles():
    layout = CanvasLayout(T=1, H=1, W=108, d_model=8, regions={"a": (0, 1, 0, 1, 0, 100), "b": (0, 1, 0, 1, 100, 108)})
    plan = compile_attention(layout, CanvasTopology([Connection("a", "a"), Connection("b", "b")]))
    # two tiles of 64 rows walk two blocks of 64 keys each, a tile of 16 rows one of 16
    assert plan.fill_by_tile == {"64 × 64": 10_000 / (4 * 64 * 64), "16 × 16": 64 / 256}
    assert plan.fill == 10_064 / (4 * 64 * 64 + 256)


def test_an_empty_topology_has_an_empty_plan():
    layout = CanvasLayout(T=1, H=1, W=2, d_model=8, regions={"a": (0, 1, 0, 1, 0, 2)})
    for normalize in ("edge", "joint"):
        plan = compile_attention(layout, CanvasTopology([]), normalize=normalize)
        assert plan.n_packed == 0 and plan.fill_by_tile == {} and not plan.to_dense().any() and plan.density == 0
        assert "0 with keys" in str(plan)


def causal_video(frames: int, size: int = 64):
    layout = CanvasLayout(T=frames, H=size, W=size, d_model=8, regions={"video": (0, frames, 0, size, 0, size)})
    return layout, CanvasTopology.causal_temporal(["video"])


def test_memory_grows_with_positions_and_rectangles_not_with_their_square():
    peaks = []
    for frames in (16, 32, 64):
        layout, topology = causal_video(frames)
        tracemalloc.start()
        plan = compile_attention(layout, topology, normalize="joint")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(plan.table.weight) == frames
    n = 64 * 64 * 64
    # a handful of int64 per position; one row of bytes for each position would be 262,144 times as much
    assert peaks[-1] < 400 * n, peaks
    assert peaks[-1] < 2.6 * peaks[-2] < 2.6**2 * peaks[-3], peaks


def test_a_million_positions_compile():
    plan = compile_attention(*causal_video(64, 128))
    assert plan.n_positions == 1 << 20 and len(plan.table.weight) == 127


def test_the_cache_can_be_cleared():
    layout = CanvasLayout(T=1, H=2, W=3, d_model=8, regions={"a": (0, 1, 0, 2, 0, 3)})
    topology = CanvasTopology.dense(["a"])
    plan = compile_attention(layout, topology)
    assert compile_attention(layout, topology) is plan
    compile_attention.cache_clear()
    again = compile_attention(layout, topology)
    assert again is not plan
    np.testing.assert_array_equal(again.to_dense(), plan.to_dense())
