"""BlockTable and Tiling: every walk, query range and slot of a random table is exactly its rectangles, row by row."""

from __future__ import annotations

import copy
import gc
import pickle

import numpy as np
import pytest
import torch

from canvas_engineering.attention.local import LocalAttention
from canvas_engineering.canvas import CanvasLayout
from canvas_engineering.connectivity import CanvasTopology, Connection
from canvas_engineering.plan import compile_attention
from canvas_kernels.block_table import BlockTable, normalise_row_sums, row_scale, row_sums
from canvas_kernels.triton_ops import configs
from canvas_kernels.triton_ops.tiling import TileClass, build_tilings, cut_tiles
from tests.kernels.tables import membership


def random_table(seed: int) -> BlockTable:
    """Edge-form table: up to 11 segments, each of one or two rectangles with disjoint keys and unrelated query
    ranges."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 100))
    columns = {name: [] for name in ("q_start", "q_stop", "k_start", "k_stop", "segment", "weight", "edge", "replace")}
    for segment in range(int(rng.integers(0, 12))):
        shared = {
            "segment": segment,
            "weight": rng.uniform(0.1, 2),
            "edge": rng.integers(4),
            "replace": rng.integers(2),
        }
        cuts = np.sort(rng.choice(n + 1, size=min(n + 1, 4), replace=False))
        for k_start, k_stop in zip(cuts[:-1:2], cuts[1::2], strict=False):
            q_start, q_stop = np.sort(rng.choice(n + 1, 2, replace=False))
            row = shared | {"q_start": q_start, "q_stop": q_stop, "k_start": k_start, "k_stop": k_stop}
            for name, value in row.items():
                columns[name].append(value)
    return BlockTable.from_rectangles("edge", n, 4, **columns)


def slot_owners(table: BlockTable) -> list[tuple[int, int]]:
    """(segment, query row) of every slot, from the rectangles alone."""
    owners = [None] * table.n_slots
    for s, q0, q1, slot in zip(table.segment, table.q_start, table.q_stop, table.slot, strict=True):
        for row in range(q0, q1):
            owner = owners[slot + row - q0]
            assert owner in (None, (s, row)), "two pairs share a slot"
            owners[slot + row - q0] = (int(s), row)
    return owners


@pytest.mark.parametrize("seed", range(40))
def test_query_ranges_and_slots_are_the_rectangles(seed):
    table = random_table(seed)
    expected, owners = membership(table), slot_owners(table)
    assert None not in owners, "a slot belongs to no row"
    ranges, seen = table.query_ranges(), np.zeros_like(expected)
    for c in range(len(ranges.segment)):
        rows = slice(ranges.q_start[c], ranges.q_stop[c])
        for r in ranges.rectangle[ranges.ptr[c] : ranges.ptr[c + 1]]:
            assert not seen[ranges.segment[c], rows, table.k_start[r] : table.k_stop[r]].any(), (
                "a pair is in two query ranges"
            )
            seen[ranges.segment[c], rows, table.k_start[r] : table.k_stop[r]] = True
        for offset, row in enumerate(range(ranges.q_start[c], ranges.q_stop[c])):
            assert owners[ranges.slot[c] + offset] == (ranges.segment[c], row)
    assert (seen == expected).all()
    layout = table.slot_layout(torch.device("cpu"))
    assert layout.position.tolist() == [row for _, row in owners]
    edge_of = dict(zip(table.segment.tolist(), table.edge.tolist(), strict=True))
    assert layout.per_edge.tolist() == [sum(edge_of[s] == e for s, _ in owners) for e in range(4)]
    assert (table.has_keys() == expected.any(axis=(0, 2))).all()


def walked_pairs(tiling, rows):
    """(tile, segment row, tile rows, walked rows) of every block, rows as the pairs that it computes; ``rows`` are the
    table's."""
    masks = tiling.masks.numpy().view(np.uint32)
    for tile, (_start, length, first, count) in enumerate(tiling.tiles[:-1].tolist()):
        assert 0 < length <= tiling.block_m
        blocks = 0
        for s in range(first, first + count):
            full, n_full, partial, n_partial = tiling.segments[s, :4].tolist()
            blocks += n_full + n_partial * min(tiling.block_n, 32) / tiling.block_n
            for at in (tiling.full[full : full + n_full] & 0xFFFFFFFF).tolist():
                assert at + tiling.block_n <= rows
                tile_rows, walked = np.mgrid[0:length, 0 : tiling.block_n]
                yield tile, s, tile_rows.ravel(), at + walked.ravel()
            for at, used, mask, _ in tiling.partial[partial : partial + n_partial].tolist():
                bits = masks[mask][:, None] >> np.arange(32, dtype=np.uint32) & 1
                tile_rows, walked = bits.nonzero()
                assert walked.max() == used - 1 and at + used <= rows and tile_rows.max() < length
                yield tile, s, tile_rows, at + walked
        assert blocks == tiling.blocks[tile]


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("kind", ["queries", "transposed", "by_slot"])
@pytest.mark.parametrize("classes", [((64, 64, 8.0), (16, 16, 1.0)), ((16, 16, 1.0),), ((32, 16, 1.0),), ((16, 128),)])
def test_walks_give_every_pair_once(seed, kind, classes):
    table = random_table(seed)
    expected, owners = membership(table), slot_owners(table)
    walked, rows_of = np.zeros(expected.shape, int), np.zeros(max(table.n_positions, table.n_slots), int)
    chosen = {} if kind == "queries" else {kind: True}
    for tiling in build_tilings(table, tuple(TileClass(*c) for c in classes), **chosen):
        assert (np.diff(tiling.blocks) <= 0).all(), "longest walks come first"
        pairs = 0
        for tile, s, tile_rows, others in walked_pairs(tiling, table.n_positions):
            start = tiling.tiles[tile, 0].item()
            queries, keys = (others, start + tile_rows) if kind == "transposed" else (start + tile_rows, others)
            _, _, _, _, slot, span, edge, replace = tiling.segments[s].tolist()
            found = [owners[slot + query] for query in queries]
            assert [query for _, query in found] == queries.tolist()
            (segment,) = {segment for segment, _ in found}
            np.add.at(walked, (segment, queries, keys), 1)
            assert (tile_rows >= (span & 0xFFFF)).all() and (tile_rows < span >> 16).all()
            lead = np.flatnonzero(table.segment == segment)[0]
            assert (edge, replace) == (table.edge[lead], table.replace[lead])
            assert tiling.weight[s].item() == table.weight[lead]
            pairs += len(queries)
        assert pairs == tiling.pairs <= tiling.walked
        for start, length, first, count in tiling.tiles[:-1].tolist():
            if kind == "by_slot":
                assert count == 1
                start += tiling.segments[first, 4].item()
            rows_of[start : start + length] += 1
    assert (walked == expected).all()
    assert (rows_of[: table.n_slots if kind == "by_slot" else table.n_positions] == 1).all()


def band(n: int, reach: int, form: str = "edge") -> BlockTable:
    """Every row attends to those at most ``reach`` away, a rectangle a row."""
    rows = np.arange(n)
    names = {"q_start": rows, "q_stop": rows + 1, "k_start": np.maximum(rows - reach, 0)}
    names |= {"k_stop": np.minimum(rows + reach + 1, n), "weight": np.ones(n)}
    if form == "edge":
        names |= {"segment": np.zeros(n, int), "edge": np.zeros(n, int)}
    return BlockTable.from_rectangles(form, n, 1, **names)


@pytest.mark.parametrize("kind", ["queries", "transposed", "by_slot"])
def test_a_band_walks_the_blocks_that_hold_it(kind):
    for reach in (4, 40, 300):
        table = band(2048, reach)
        (tiling,) = build_tilings(table, (TileClass(64, 64),), **({} if kind == "queries" else {kind: True}))
        pairs = membership(table)[0].reshape(32, 64, 32, 64).any((1, 3))
        assert tiling.blocks.sum() <= pairs.sum()
        # few masks, whatever the length: all but those at the ends are the same
        assert len(tiling.masks) <= 12


@pytest.mark.parametrize("seed", range(20))
def test_row_sums_count_each_read_once(seed):
    table, expected = random_table(seed), None
    active = torch.tensor(np.random.default_rng(seed + 1).integers(0, 2, 4), dtype=torch.float32)
    pairs = membership(table)
    for flags in (None, active):
        expected = np.zeros((2, table.n_positions))
        for s in range(len(pairs)):
            lead = np.flatnonzero(table.segment == s)[0]
            alive = 1.0 if flags is None else flags[table.edge[lead]].item()
            expected[int(table.replace[lead])] += pairs[s].any(1) * float(table.weight[lead]) * alive
        sums = row_sums(table, torch.ones(4) if flags is None else flags)
        np.testing.assert_allclose(sums.numpy(), expected, rtol=1e-6)
        adding, replacing = expected
        scale = row_scale(table, flags, torch.float32, torch.device("cpu")).numpy()
        with np.errstate(divide="ignore"):
            np.testing.assert_allclose(scale[1], np.where(replacing > 0, 1 / replacing, 0), rtol=1e-6)
            np.testing.assert_allclose(scale[0], np.where((replacing > 0) | (adding == 0), 0, 1 / adding), rtol=1e-6)
    assert torch.isfinite(normalise_row_sums(torch.zeros(2, 3))).all()


def test_small_tiles_are_chosen_by_fill():
    # one long dense read, then 64 rows of lone reads, each row seeing only itself
    q_start, q_stop = [0, *range(256, 320)], [256, *range(257, 321)]
    table = BlockTable.from_rectangles(
        "edge",
        320,
        1,
        q_start=q_start,
        q_stop=q_stop,
        k_start=q_start,
        k_stop=q_stop,
        segment=range(65),
        weight=[1.0] * 65,
        edge=[0] * 65,
    )
    large, small = build_tilings(table, (TileClass(64, 64, 8.0), TileClass(16, 16, 1.0)), False)
    assert large.tiles[:-1, 0].tolist() == [0, 64, 128, 192] and large.block_m == 64
    assert sorted(small.tiles[:-1, 0].tolist()) == [256, 272, 288, 304] and small.block_m == 16


def test_long_ranges_get_tiles_of_their_own():
    assert cut_tiles(200, np.array([0, 70]), np.array([70, 200]), 64).tolist() == [0, 64, 70, 134, 198]
    # stretches of short ranges are cut evenly, whatever their borders
    assert cut_tiles(100, np.arange(0, 100, 10), np.arange(10, 101, 10), 64).tolist() == [0, 64]


def test_a_dense_million_positions_needs_a_row_per_tile():
    n = 1 << 20
    table = BlockTable.from_rectangles("joint", n, 1, q_start=[0], q_stop=[n], k_start=[0], k_stop=[n], weight=[1.0])
    (tiling,) = build_tilings(table, (TileClass(64, 64),), False)
    assert tiling.n_tiles == n // 64 and len(tiling.full) == n // 64 + 1
    assert tiling.nbytes < 0.02 * 4 * n * 64 * 2


@pytest.mark.parametrize("others", [0, 100])
def test_a_causal_million_positions_shares_its_lists(others):
    """Every frame attends to itself and all before, with and without some rows more."""
    n, frame = 1 << 20, 4096
    start = np.arange(0, n, frame)
    names = {"q_start": start, "q_stop": start + frame, "k_start": np.zeros_like(start), "k_stop": start + frame}
    if others:
        names["k_start"] = names["k_start"] + others
        more = {"q_start": start, "q_stop": start + frame, "k_start": 0 * start, "k_stop": 0 * start + others // 2}
        names = {name: np.append(names[name], more[name]) for name in names}
    table = BlockTable.from_rectangles("joint", n, 1, weight=np.ones(len(names["q_start"])), **names)
    for transposed in (False, True):
        (tiling,) = build_tilings(table, (TileClass(128, 64),), transposed)
        assert tiling.nbytes < 0.02 * 4 * n * 64 * 2


WINDOWS = [(1, (2048,), 128), (1, (48, 32), None), (3, (20, 25), (3, 8, 8))]


@pytest.mark.parametrize(("frames", "shape", "window"), WINDOWS)
def test_local_attention_walks_little_more_than_the_blocks_that_hold_its_band(frames, shape, window):
    box = (0, frames, *(bound for size in shape for bound in (0, size)))
    layout = CanvasLayout(T=frames, d_model=32, spatial_shape=shape, regions={"video": box})
    plan = compile_attention(layout, CanvasTopology([Connection("video", "video", fn="local_attention")]))
    table = LocalAttention(32, window_size=window).with_pattern(plan).table
    count = -(-table.n_positions // 64)
    holds = np.zeros((count, count), bool)
    for q0, q1, k0, k1 in zip(table.q_start, table.q_stop, table.k_start, table.k_stop):
        holds[q0 // 64 : (q1 - 1) // 64 + 1, k0 // 64 : (k1 - 1) // 64 + 1] = True
    for head_dim in (64, 128):
        for stage, form in (("forward", "edge"), *((stage, "in_place") for stage in ("forward", "delta", "dq", "dkv"))):
            classes = configs.classes(configs.lookup("sm_90", head_dim, torch.bfloat16, stage, form))
            tilings = build_tilings(table, classes, stage == "dkv", (stage, form) == ("forward", "edge"))
            assert sum(tiling.walked for tiling in tilings) <= 1.6 * 64 * 64 * holds.sum(), (head_dim, stage, form)


@pytest.mark.parametrize("lengths", [(1, 33), (33, 65), (64, 65), (65, 101)])
def test_short_segments_of_a_tile_walk_at_most_a_block_for_every_64_keys(lengths):
    length = np.random.default_rng(0).integers(*lengths, 200)
    start, number, rows = 128 + length.cumsum() - length, np.arange(200), np.full(200, 128)
    ranges = {"q_start": 0 * rows, "q_stop": rows, "k_start": start, "k_stop": start + length}
    n = int(start[-1] + length[-1])
    table = BlockTable.from_rectangles("edge", n, 200, segment=number, edge=number, weight=np.ones(200), **ranges)
    assert configs.form_of(table) == "in_place", "nothing is stored, and added up by another kernel"
    for head_dim in (64, 128):
        for stage in ("forward", "delta", "dq"):
            classes = configs.classes(configs.lookup("sm_90", head_dim, torch.bfloat16, stage, "in_place"))
            walked = sum(tiling.walked for tiling in build_tilings(table, classes))
            assert walked <= 128 * 64 * (-(-length // 64)).sum(), (head_dim, stage)


def test_equal_content_has_equal_key_and_is_found_while_alive():
    tables = [random_table(3) for _ in range(2)]
    assert tables[0].key == tables[1].key != random_table(4).key
    assert BlockTable.lookup(tables[0].key).key == tables[0].key
    assert tables[0] is tables[1], "equal content is one object"
    assert copy.deepcopy(tables[0]) is tables[0] and pickle.loads(pickle.dumps(tables[0])) is tables[0]
    data, key = pickle.dumps(tables[0]), tables[0].key
    del tables
    gc.collect()
    restored = pickle.loads(data)
    assert BlockTable.lookup(key) is restored and restored.key == key
    with pytest.raises(KeyError, match="no live BlockTable"):
        BlockTable.lookup("0" * 40)


def rectangles(**changes):
    return {"q_start": [0, 2], "q_stop": [2, 4], "k_start": [0, 0], "k_stop": [4, 4], "weight": [1.0, 1.0]} | changes


@pytest.mark.parametrize(
    ("form", "changes", "message"),
    [
        ("dense", {}, "form must be 'edge' or 'joint', got 'dense'"),
        ("joint", {"q_stop": [2, 5]}, r"rectangle 1: q range \[2, 5\) is empty or outside \[0, 4\)"),
        ("joint", {"k_start": [0, 4]}, r"rectangle 1: k range \[4, 4\) is empty"),
        ("joint", {"weight": [1.0, 0.0]}, "rectangle 1: weight 0.0 is not finite and positive"),
        ("joint", {"weight": [float("nan"), 1.0]}, "rectangle 0: weight nan"),
        ("joint", {"weight": [1.0]}, "differ in length: .*'weight': 1"),
        ("joint", {"edge": [0, 0]}, "joint form has one softmax per row"),
        ("edge", {}, "edge form needs the segment and the edge"),
        ("edge", {"segment": [0, 1], "edge": [0, 7]}, r"edge numbers must lie in \[0, 2\), got 0 … 7"),
        ("edge", {"segment": [0, 0], "edge": [0, 1]}, "a segment's rectangles must share one edge"),
        ("edge", {"segment": [0, 0], "edge": [0, 0], "weight": [1.0, 2.0]}, "share one weight and one class"),
    ],
)
def test_bad_rectangles_are_named(form, changes, message):
    with pytest.raises(ValueError, match=message):
        BlockTable.from_rectangles(form, 4, 2, **rectangles(**changes))


def test_text_picture_and_counts():
    table = BlockTable.from_rectangles(
        "joint", 8, 1, **rectangles(q_start=[0, 4], q_stop=[4, 8], k_start=[0, 4], k_stop=[4, 8])
    )
    assert table.draw(2) == "█ \n █"
    assert table.pairs == 32 and table.density == 0.5
    assert table.flops(16) == 4 * 16 * 32 and table.flops(16, 3, backward=True) == 10 * 16 * 32 * 3
    assert "density 0.5000" in str(table)
