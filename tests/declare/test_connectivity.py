"""Connections, topologies, temporal reads and masks; and the oracle's own attention, on cases done by hand."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from canvas_engineering import CanvasLayout, CanvasTopology, Connection, MaskSpec, RegionSpec, TemporalFill
from canvas_engineering.connectivity import resolve_connections, resolve_frames
from tests import oracle


def line(T=1, d_model=4, size=8, **regions):
    return CanvasLayout(T=T, spatial_shape=(size,), d_model=d_model, regions=regions)


# --- connections


def test_defaults_and_coercions():
    c = Connection("a", "b")
    assert dataclasses.astuple(c) == ("a", "b", 1.0, None, None, None, "attend", "add", TemporalFill.HOLD, 1, None)
    given_otherwise = Connection("a", "b", weight=np.float32(1), t_src=np.int64(0), temporal_fill="hold")
    assert given_otherwise == Connection("a", "b", t_src=0)
    assert hash(given_otherwise) == hash(Connection("a", "b", t_src=0))
    assert type(given_otherwise.t_src) is int
    assert type(Connection("a", "b", weight=2).weight) is float
    assert Connection("a", "b", operator="anything at all").operator == "anything at all"
    assert pickle.loads(pickle.dumps(c)) == c
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.weight = 2.0


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"weight": -0.5}, "weight must be 0, or a number from 1e-18 to 1e.18, got -0.5"),
        ({"weight": math.nan}, "weight.*got nan"),
        ({"weight": math.inf}, "weight.*got inf"),
        ({"weight": 1e39}, "weight.*got 1e.39"),
        ({"weight": 1e-40}, "weight.*got 1e-40"),
        ({"weight": True}, "weight.*got True"),
        ({"weight": "1"}, "weight.*got '1'"),
        ({"weight": None}, "weight.*got None"),
        ({"t_src": 0.5}, "t_src must be an int.*got 0.5"),
        ({"t_dst": True}, "t_dst must be an int.*got True"),
        ({"t_dst": 2**31}, r"t_dst must be an int below 2\*\*31"),
        ({"fn": ""}, "fn must be the name of an attention function.*got ''"),
        ({"fn": 3}, "fn must be.*got 3"),
        ({"write_mode": "append"}, "unknown write_mode 'append': choose one of add, replace, gate"),
        ({"temporal_fill": "guess"}, "unknown temporal_fill 'guess': choose one of drop, hold, interpolate"),
        ({"interpolation_order": -1}, "interpolation_order must be an int of at least 0, got -1"),
        ({"interpolation_order": 1.0}, "interpolation_order.*got 1.0"),
        ({"interpolation_order": True}, "interpolation_order.*got True"),
        ({"mask": "tile"}, "mask must be a MaskSpec, or None, got 'tile'"),
        ({"operator": None}, "operator must be a string.*got None"),
    ],
)
def test_bad_connections_name_their_ends(fields, message):
    with pytest.raises(ValueError, match=f"connection 'action' -> 'obs': {message}"):
        Connection("action", "obs", **fields)


@pytest.mark.parametrize("ends", [("", "b"), ("a", None), (3, "b")])
def test_ends_must_be_names(ends):
    with pytest.raises(ValueError, match=r"(src|dst) must be a string"):
        Connection(*ends)


# --- topologies


def edges(topology):
    return [(c.src, c.dst, c.t_src, c.t_dst) for c in topology.connections]


def dense_edges(*pairs):
    return [(pair[0], pair[1], None, None) for pair in pairs]


def test_constructors():
    assert edges(CanvasTopology.dense(["a", "b"])) == dense_edges("aa", "ab", "ba", "bb")
    assert edges(CanvasTopology.isolated(["a", "b"])) == dense_edges("aa", "bb")
    assert edges(CanvasTopology.causal_chain(["a", "b", "c"])) == dense_edges("aa", "bb", "cc", "ba", "cb")
    both = ["hh", "aa", "bb", "ha", "ah", "hb", "bh"]
    assert edges(CanvasTopology.hub_spoke("h", ["a", "b"])) == dense_edges(*both)
    assert edges(CanvasTopology.hub_spoke("h", ["a", "b"], bidirectional=False)) == dense_edges(
        "hh", "aa", "bb", "ha", "hb"
    )
    temporal = CanvasTopology.causal_temporal(["a", "b"], temporal_fill=TemporalFill.DROP)
    assert edges(temporal) == [
        ("a", "a", 0, 0), ("a", "a", 0, -1), ("a", "b", 0, -1),
        ("b", "b", 0, 0), ("b", "b", 0, -1), ("b", "a", 0, -1),
    ]  # fmt: skip
    assert {c.temporal_fill for c in temporal.connections} == {TemporalFill.DROP}
    assert CanvasTopology.causal_temporal(["a"]).connections[0].temporal_fill is TemporalFill.HOLD


def test_causal_temporal_checks_names_against_a_layout():
    layout = line(a=(0, 1, 0, 1))
    assert len(CanvasTopology.causal_temporal(["a"], layout).connections) == 2
    with pytest.raises(KeyError, match="no region 'b'"):
        CanvasTopology.causal_temporal(["a", "b"], layout)


def test_queries_about_a_topology():
    topology = CanvasTopology.causal_temporal(["b", "a"])
    topology.connections.append(Connection("c", "b", weight=0.5))
    topology.connections.append(Connection("c", "b", weight=0.75))
    assert topology.regions == ["b", "a", "c"]
    assert topology.neighbors_of("b") == ["b", "a"]
    assert topology.attended_by("b") == ["b", "a", "c"]
    assert topology.neighbors_of("nobody") == []
    assert topology.to_block_adjacency() == {
        ("b", "b"): 1.0, ("b", "a"): 1.0, ("a", "a"): 1.0, ("a", "b"): 1.0, ("c", "b"): 0.75,
    }  # fmt: skip
    assert topology.has_temporal_constraints
    assert not CanvasTopology.dense(["a"]).has_temporal_constraints
    assert CanvasTopology([Connection("a", "a", t_dst=0)]).has_temporal_constraints
    summary = topology.summary()
    assert "8 connections among 3 regions" in summary
    assert "a -> b, weight 1, fn default, t (0, -1) hold" in summary
    assert "c -> b, weight 0.75, fn default" in summary


def test_readme_attention_functions():
    layout = CanvasLayout(
        T=8,
        H=16,
        W=16,
        d_model=512,
        regions={
            "visual": RegionSpec(bounds=(0, 8, 0, 12, 0, 12), default_attn="cross_attention"),
            "proprio": RegionSpec(bounds=(0, 8, 12, 13, 0, 2), default_attn="linear_attention"),
            "thought": RegionSpec(bounds=(0, 4, 13, 15, 0, 4), default_attn="mamba"),
            "goal": RegionSpec(bounds=(0, 1, 15, 16, 0, 4), default_attn="cross_attention", is_output=False),
        },
    )
    topology = CanvasTopology(
        connections=[
            Connection(src="visual", dst="visual"),
            Connection(src="proprio", dst="proprio"),
            Connection(src="thought", dst="thought"),
            Connection(src="goal", dst="goal"),
            Connection(src="visual", dst="goal", fn="gated"),
            Connection(src="thought", dst="visual", fn="perceiver"),
            Connection(src="proprio", dst="visual", fn="pooling"),
            Connection(src="thought", dst="thought", fn="copy", t_src=0, t_dst=-1),
        ]
    )
    assert layout.region_numel("visual") == 8 * 144
    assert topology.attention_ops(layout)[:3] == [
        ("visual", "visual", 1.0, "cross_attention"),
        ("proprio", "proprio", 1.0, "linear_attention"),
        ("thought", "thought", 1.0, "mamba"),
    ]
    assert [fn for *_, fn in topology.attention_ops(layout)[4:]] == ["gated", "perceiver", "pooling", "copy"]
    assert [fn for *_, fn in topology.attention_ops()[:3]] == ["cross_attention"] * 3
    assert topology.resolve_fn(Connection("nowhere", "goal"), layout) == "cross_attention"


def test_attention_ops_list_the_declaration_as_it_stands():
    topology = CanvasTopology([Connection("a", "x"), Connection("a", "a", weight=0.0), Connection("a", "a", fn="none")])
    expected = [("a", "x", 1.0, "cross_attention"), ("a", "a", 0.0, "cross_attention"), ("a", "a", 1.0, "none")]
    assert topology.attention_ops(line(a=(0, 1, 0, 1))) == expected


def test_keys_follow_the_connections():
    one, two = CanvasTopology.dense(["a", "b"]), CanvasTopology.dense(["a", "b"])
    assert one == two
    assert one.key() is one.key()
    assert one.key() == two.key()
    assert hash(one.key()) == hash(two.key())
    before = one.key()
    one.connections[0] = Connection("a", "a", mask=MaskSpec("tile", tile_h=2))
    assert one.key() != before
    assert hash(before) == hash(two.key())
    assert len({before: 1, two.key(): 2, one.key(): 3}) == 2
    for twin in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert twin == one
        assert twin.key() == one.key()
    with pytest.raises(TypeError, match="unhashable"):
        hash(one)


def test_topologies_hold_connections_only():
    with pytest.raises(ValueError, match=r"connections\[1\] must be a Connection, got \('a', 'b'\)"):
        CanvasTopology([Connection("a", "b"), ("a", "b")])
    assert CanvasTopology((Connection("a", "b"),)).connections == [Connection("a", "b")]


# --- temporal reads


@settings(max_examples=400)
@given(
    st.integers(1, 12),
    st.tuples(st.integers(0, 11), st.integers(0, 11)),
    st.tuples(st.integers(0, 11), st.integers(0, 11)),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.tuples(*[st.one_of(st.none(), st.integers(-6, 6))] * 2),
    st.sampled_from(TemporalFill),
    st.integers(0, 5),
)
def test_frames_equal_the_oracle(T, src, dst, periods, offsets, fill, order):
    src, dst = ((min(pair) % T, min(max(pair), T - 1) + 1) for pair in (src, dst))
    arguments = (T, src, dst, *periods, *offsets)
    found = resolve_frames(*arguments, fill, order)
    expected = list(oracle.frame_reads(*arguments, fill.value, order))
    assert found.q_start.tolist() == [queries[0] for queries, _, _ in expected]
    assert found.q_stop.tolist() == [queries[-1] + 1 for queries, _, _ in expected]
    assert found.k_start.tolist() == [keys[0] for _, keys, _ in expected]
    assert found.k_stop.tolist() == [keys[-1] + 1 for _, keys, _ in expected]
    np.testing.assert_allclose(found.fraction, [float(share) for _, _, share in expected], rtol=1e-14)
    assert len(found) == len(expected)


def frames(T, src, dst, periods, fill, order=1, offsets=(0, 0)):
    reads = resolve_frames(T, src, dst, *periods, *offsets, TemporalFill(fill), order)
    columns = (reads.q_start.tolist(), reads.k_start.tolist(), reads.fraction.tolist())
    return [(q, k, pytest.approx(share)) for q, k, share in zip(*columns)]


def test_readme_fill_of_a_slow_region():
    # A slow region of period 4 with two frames lies at real times 0 and 4; the fast one asks at 0, 1, ... 5.
    fast, slow = (0, 6), (0, 2)
    assert frames(6, fast, slow, (1, 4), "drop") == [(0, 0, 1), (4, 1, 1)]
    assert frames(6, fast, slow, (1, 4), "hold") == [(0, 0, 1), (1, 0, 1), (2, 0, 1), (3, 0, 1), (4, 1, 1), (5, 1, 1)]
    linear = [(0, 0, 1), (1, 0, 3 / 4), (1, 1, 1 / 4), (2, 0, 1 / 2), (2, 1, 1 / 2), (3, 0, 1 / 4), (3, 1, 3 / 4)]
    assert frames(6, fast, slow, (1, 4), "interpolate") == [*linear, (4, 1, 1), (5, 1, 1)]


def test_inverse_distance_weights():
    # Real times 0, 4, 8; asked at 3: distances 3, 1, 5; order 2 takes all three.
    weights = [1 / 9, 1, 1 / 25]
    total = sum(weights)
    expected = [(3, 1, weights[1] / total), (3, 0, weights[0] / total), (3, 2, weights[2] / total)]
    found = [row for row in frames(4, (0, 4), (0, 3), (1, 4), "interpolate", 2) if row[0] == 3]
    assert found == expected
    # At equal distance the earlier one comes first: asked at 2, both are 2 away.
    assert [row[1] for row in frames(3, (2, 3), (0, 3), (1, 4), "interpolate", 2)] == [0, 1, 2]
    # A very high order leaves the nearest only, without a NaN.
    assert frames(4, (3, 4), (0, 3), (1, 4), "interpolate", 5000) == [(3, 1, 1)]


def test_fill_counts_absolute_frames():
    # dst starts at canvas frame 2, so at real time 4: nothing to hold before.
    assert frames(6, (0, 6), (2, 4), (1, 2), "hold") == [(4, 2, 1), (5, 2, 1)]
    assert frames(6, (0, 3), (2, 4), (1, 2), "interpolate") == [(0, 2, 1), (1, 2, 1), (2, 2, 1)]


def test_the_asking_regions_period_counts_only_where_it_has_an_offset():
    assert frames(2, (0, 2), (0, 6), (3, 1), "drop") == [(0, 0, 1), (1, 3, 1)]
    all_frames = resolve_frames(2, (0, 2), (0, 6), 3, 1, None, 0, TemporalFill.DROP, 1)
    assert all_frames.k_start.tolist() == [0, 1]
    assert all_frames.q_stop.tolist() == [2, 2]


def test_frame_reads_are_shared_and_read_only():
    arguments = (4, (0, 4), (0, 4), 1, 1, 0, -1, TemporalFill.HOLD, 1)
    reads = resolve_frames(*arguments)
    assert reads is resolve_frames(*arguments)
    with pytest.raises(ValueError, match="read-only"):
        reads.fraction[0] = 2
    assert reads.fraction.dtype == np.float64
    assert {a.dtype for a in (reads.q_start, reads.q_stop, reads.k_start, reads.k_stop)} == {np.dtype(np.int64)}


def test_many_frames_cost_no_square():
    reads = resolve_frames(100_000, (0, 100_000), (0, 25_000), 1, 4, 0, 0, TemporalFill.INTERPOLATE, 3)
    exact, between = (99_996 // 4) + 1, 100_000 - 25_000
    assert len(reads) == exact + 4 * between
    assert reads.fraction.sum() == pytest.approx(100_000)


# --- masks


def test_temporal_table_of_the_readme():
    layout = line(T=3, size=2, a=(0, 3, 0, 1), b=(0, 3, 1, 2))
    t, N = torch.arange(6) // 2, 6
    a, b = torch.arange(6) % 2 == 0, torch.arange(6) % 2 == 1
    pairs = a[:, None] & b
    for offsets, expected in {
        (None, None): pairs,
        (0, 0): pairs & (t[:, None] == t),
        (0, -1): pairs & (t[:, None] - 1 == t),
        (None, 0): pairs,
        (1, 0): pairs & (t[:, None] - 1 == t),
        (0, None): pairs,
    }.items():
        topology = CanvasTopology([Connection("a", "b", t_src=offsets[0], t_dst=offsets[1], temporal_fill="drop")])
        assert torch.equal(topology.to_attention_mask(layout), expected.float()), offsets
    assert pairs.shape == (N, N)


def test_the_largest_read_wins():
    layout = line(a=(0, 1, 0, 2), b=(0, 1, 1, 3))
    weights = [Connection("a", "b", weight=0.25), Connection("a", "b", weight=0.75), Connection("a", "a", weight=0.5)]
    for connections in (weights, weights[::-1]):
        mask = CanvasTopology(connections).to_attention_mask(layout)
        assert mask[:3, :3].tolist() == [[0.5, 0.75, 0.75], [0.5, 0.75, 0.75], [0, 0, 0]]
        assert mask.sum() == 4


def test_disabled_edges_are_as_if_they_were_not_there():
    layout = line(a=(0, 1, 0, 2), off=RegionSpec((0, 1, 2, 4), default_attn="none"))
    disabled = [Connection("a", "off", fn="none"), Connection("off", "a"), Connection("a", "off", weight=0)]
    assert CanvasTopology(disabled).to_attention_mask(layout).sum() == 0
    assert list(resolve_connections(CanvasTopology(disabled), layout)) == []
    enabled = Connection("off", "a", fn="gated")
    assert list(resolve_connections(CanvasTopology([*disabled, enabled]), layout)) == [(3, enabled, "gated")]


def test_additive_masks():
    layout = line(T=3, size=3, fast=(0, 3, 0, 1), slow=RegionSpec((0, 2, 1, 2), period=2))
    topology = CanvasTopology([Connection("fast", "slow", 0.5, t_src=0, t_dst=0, temporal_fill="interpolate")])
    additive = topology.to_additive_mask(layout)
    weighted = topology.to_additive_mask(layout, weighted=True)
    assert additive.dtype == weighted.dtype == torch.float32
    expected = torch.full((9, 9), -torch.inf).fill_diagonal_(0)
    expected[[0, 3, 6], [0, 3, 6]] = -torch.inf
    values = {(0, 1): 0.5, (3, 1): 0.25, (3, 4): 0.25, (6, 4): 0.5}
    for pair in values:
        expected[pair] = 0
    assert torch.equal(additive, expected)
    for pair, weight in values.items():
        expected[pair] = math.log(weight)
    torch.testing.assert_close(weighted, expected)
    assert not torch.zeros(9, 9).add(additive).softmax(-1).isnan().any()


def test_missing_regions_are_skipped_with_one_warning():
    layout = line(a=(0, 1, 0, 2))
    topology = CanvasTopology([Connection("a", "a"), Connection("a", "ghost"), Connection("ghost", "spectre")])
    calls = (
        topology.to_attention_mask,
        topology.to_additive_mask,
        lambda layout: resolve_connections(topology, layout),
    )
    for call in calls:
        with pytest.warns(UserWarning, match=r"skipping 2 of 3 .*'ghost', 'spectre'.*'a' -> 'ghost'") as caught:
            call(layout)
        assert len(caught) == 1 and caught[0].filename == __file__
    with pytest.warns(UserWarning, match="skipping"):
        mask = topology.to_attention_mask(layout)
    assert torch.equal(mask.nonzero(), torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(topology.attention_ops(layout)) == 3


def test_connection_masks_are_honoured():
    layout = line(T=2, size=6, a=(0, 2, 0, 4), b=(0, 2, 2, 6))
    pattern = ((True, False, False, True), (False, False, True, False))
    topology = CanvasTopology(
        [
            Connection("a", "b", 2.0, mask=MaskSpec("tile", tile_shape=(2,)), t_src=0, t_dst=0),
            Connection("b", "b", 3.0, mask=MaskSpec("sparse", pattern=pattern), t_src=0, t_dst=0),
        ]
    )
    mask = topology.to_attention_mask(layout).reshape(2, 6, 2, 6)
    assert mask[0, :, 1].sum() == mask[1, :, 0].sum() == 0
    first, second = mask[0, :, 0], mask[1, :, 1]
    # Tile (0, 2) of a holds nothing of b, so it reads all of b; tile (2, 4) reads its own two positions.
    assert first[:2].tolist() == second[:2].tolist() == [[0, 0, 2, 2, 2, 2]] * 2
    assert first[2:].tolist() == [[0, 0, 3, 2, 0, 3], [0, 0, 3, 2, 0, 3], [0, 0, 3, 0, 0, 3], [0, 0, 3, 0, 0, 3]]
    assert second[2:].tolist() == [[0, 0, 2, 2, 3, 0], [0, 0, 2, 2, 3, 0], [0, 0, 0, 0, 3, 0], [0, 0, 0, 0, 3, 0]]


def test_pair_patterns_follow_the_frames():
    layout = line(T=2, size=4, a=(0, 2, 0, 2), b=(0, 2, 2, 4))
    pattern = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 1], [1, 1, 0, 0], [1, 0, 1, 0]], dtype=torch.bool)
    topology = CanvasTopology([Connection("a", "b", mask=MaskSpec("sparse", pattern=pattern), t_src=0, t_dst=0)])
    mask = topology.to_attention_mask(layout)[layout.region_index("a")][:, layout.region_index("b")]
    assert mask.tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]]


@pytest.mark.parametrize(
    "mask, message",
    [
        (MaskSpec("tile", tile_shape=(2, 2)), r"connection 1, 'a' -> 'b': tile_shape \(2, 2\)"),
        (MaskSpec("sparse", pattern=((True, False),)), r"connection 1, 'a' -> 'b': mask pattern of shape \(1, 2\)"),
    ],
)
def test_masks_that_do_not_fit_name_the_connection(mask, message):
    layout = line(a=(0, 1, 0, 2), b=(0, 1, 2, 5))
    topology = CanvasTopology([Connection("a", "a"), Connection("a", "b", mask=mask)])
    with pytest.raises(ValueError, match=message):
        topology.to_attention_mask(layout)


def test_a_mask_of_many_positions():
    # At the published cost of 12 µs per entry this one took more than half a minute.
    layout = CanvasLayout(T=8, H=16, W=16, d_model=4, regions={"video": (0, 8, 0, 16, 0, 16)})
    mask = CanvasTopology.causal_temporal(["video"]).to_attention_mask(layout).reshape(8, 256, 8, 256)
    frames = mask.amax((1, 3))
    assert torch.equal(frames, torch.eye(8) + torch.eye(8).diag()[:-1].diag(-1))
    assert torch.equal(mask.amin((1, 3)), frames)


# --- the oracle, on cases done by hand


def _qkv(N, heads=2, dim=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(2, heads, N, dim, generator=generator, dtype=torch.float64) for _ in range(3))


def test_oracle_of_one_dense_read_is_plain_attention():
    layout = line(size=5, all=(0, 1, 0, 5))
    topology = CanvasTopology([Connection("all", "all", weight=0.3)])
    q, k, v = _qkv(5)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    reads = oracle.reads(layout, topology)
    torch.testing.assert_close(oracle.edge_attention(q, k, v, reads, 3**-0.5), expected)
    M = oracle.joint_matrix(layout, topology)
    torch.testing.assert_close(oracle.joint_attention(q, k, v, M, 3**-0.5), expected)
    gain = torch.tensor([0.25])
    torch.testing.assert_close(oracle.edge_attention(q, k, v, reads, 3**-0.5, gain=gain), expected * 0.25)


def test_oracle_of_empty_rows_is_zero_with_finite_gradients():
    layout = line(size=4, a=(0, 1, 0, 2), b=(0, 1, 1, 3))
    topology = CanvasTopology([Connection("a", "b")])
    q, k, v = (x.requires_grad_() for x in _qkv(4))
    reads, M = oracle.reads(layout, topology), oracle.joint_matrix(layout, topology)
    assert oracle.covered(reads, 4).tolist() == [True, True, False, False]
    for out in (oracle.edge_attention(q, k, v, reads, 1.0), oracle.joint_attention(q, k, v, M, 1.0)):
        assert out[:, :, 2:].eq(0).all()
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (q, k, v)))


def test_oracle_weighs_reads_and_replaces():
    layout = line(size=3, a=(0, 1, 0, 1), b=(0, 1, 1, 2), c=(0, 1, 2, 3))
    topology = CanvasTopology([Connection("a", "b", 3.0), Connection("a", "c", 1.0), Connection("a", "c", 1.0)])
    q, k, v = _qkv(3)
    b, c = v[:, :, 1], v[:, :, 2]  # a read of a single key returns its value
    reads = oracle.reads(layout, topology)

    def first(**options):
        return oracle.edge_attention(q, k, v, reads, 1.0, **options)[:, :, 0]

    torch.testing.assert_close(first(), (3 * b + 2 * c) / 5)
    torch.testing.assert_close(first(active=torch.tensor([True, True, False])), (3 * b + c) / 4)
    torch.testing.assert_close(first(gain=torch.tensor([1.0, 0.5, 0.0])), (3 * b + 0.5 * c) / 5)
    torch.testing.assert_close(first(classes=torch.tensor([0, 1, 0])), c)
    torch.testing.assert_close(
        first(classes=torch.tensor([0, 1, 0]), active=torch.tensor([True, False, True])), (3 * b + c) / 4
    )
    torch.testing.assert_close(first(classes=torch.tensor([0, 1, 0]), gain=torch.tensor([1.0, 0.5, 1.0])), 0.5 * c)
