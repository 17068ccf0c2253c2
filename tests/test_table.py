"""BlockTable and Tiling: every walk, cell and slot of a random table is exactly its rectangles, row by row."""

from __future__ import annotations

import copy
import gc
import pickle

import numpy as np
import pytest
import torch

from canvas_kernels.table import BlockTable, normalise_row_sums, row_scale, row_sums
from canvas_kernels.tiling import LAST, REPLACE, TileClass, build_tilings, cut_tiles


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


def membership(table: BlockTable) -> np.ndarray:
    """bool [segments, n, n]: which pairs each segment holds."""
    pairs = np.zeros((int(table.segment.max(initial=-1)) + 1, table.n_positions, table.n_positions), bool)
    for s, q0, q1, k0, k1 in zip(table.segment, table.q_start, table.q_stop, table.k_start, table.k_stop, strict=True):
        pairs[s, q0:q1, k0:k1] = True
    return pairs


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
def test_cells_and_slots_are_the_rectangles(seed):
    table = random_table(seed)
    expected, owners = membership(table), slot_owners(table)
    assert None not in owners, "a slot belongs to no row"
    cells, seen = table.cells(), np.zeros_like(expected)
    for c in range(len(cells.segment)):
        rows = slice(cells.q_start[c], cells.q_stop[c])
        for r in cells.rectangle[cells.ptr[c] : cells.ptr[c + 1]]:
            assert not seen[cells.segment[c], rows, table.k_start[r] : table.k_stop[r]].any(), (
                "a pair stands in two cells"
            )
            seen[cells.segment[c], rows, table.k_start[r] : table.k_stop[r]] = True
        for offset, row in enumerate(range(cells.q_start[c], cells.q_stop[c])):
            assert owners[cells.slot[c] + offset] == (cells.segment[c], row)
    assert (seen == expected).all()
    layout = table.slot_layout(torch.device("cpu"))
    assert layout.position.tolist() == [row for _, row in owners]
    edge_of = dict(zip(table.segment.tolist(), table.edge.tolist(), strict=True))
    assert layout.per_edge.tolist() == [sum(edge_of[s] == e for s, _ in owners) for e in range(4)]
    assert (table.has_keys() == expected.any(axis=(0, 2))).all()


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("classes", [((64, 64, 8.0), (16, 16, 1.0)), ((16, 16, 1.0),), ((32, 16, 1.0),)])
def test_walks_give_every_pair_once(seed, transposed, classes):
    table = random_table(seed)
    expected, owners = membership(table), slot_owners(table)
    walked, tile_rows = np.zeros(expected.shape, int), np.zeros(table.n_positions, int)
    for tiling in build_tilings(table, tuple(TileClass(*c) for c in classes), transposed):
        rows = tiling.rows.numpy()
        assert (rows[-1] == 0).all(), "the sentinel row must be zero"
        assert (np.diff(tiling.tiles[:, 3].numpy()) <= 0).all(), "longest walks come first"
        for start, length, row, blocks in tiling.tiles.tolist():
            assert 0 < length <= tiling.block_m
            tile_rows[start : start + length] += 1
            while blocks > 0:
                run_start, run_length, flags, slot = rows[row].tolist()
                low, high = flags & 255, flags >> 8 & 255
                blocks -= -(-run_length // tiling.block_n)
                inner = range(run_start, run_start + run_length)
                for tile_row in range(low, high):
                    if transposed:
                        for offset, query in enumerate(inner):
                            segment, owner = owners[slot + offset]
                            assert owner == query
                            walked[segment, query, start + tile_row] += 1
                    else:
                        segment, owner = owners[slot + tile_row]
                        assert owner == start + tile_row
                        walked[segment, owner, run_start : run_start + run_length] += 1
                weight = tiling.weight[row].item()
                lead = np.flatnonzero(table.segment == segment)[0]
                assert weight == table.weight[lead] and bool(flags & REPLACE) == table.replace[lead]
                if not transposed:
                    ends = blocks == 0 or owners[rows[row + 1][3] + (rows[row + 1][2] & 255)][0] != segment
                    # another query range of the segment, with slots of its own
                    ends = ends or bool(rows[row + 1][3] != slot)
                    assert bool(flags & LAST) == ends
                row += 1
            assert blocks == 0
    assert (tile_rows == 1).all()
    assert (walked == expected).all()


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
    assert large.tiles[:, 0].tolist() == [0, 64, 128, 192] and large.block_m == 64
    assert sorted(small.tiles[:, 0].tolist()) == [256, 272, 288, 304] and small.block_m == 16


def test_long_ranges_get_tiles_of_their_own():
    assert cut_tiles(200, np.array([0, 70]), np.array([70, 200]), 64).tolist() == [0, 64, 70, 134, 198]
    # stretches of short ranges are cut evenly, whatever their borders
    assert cut_tiles(100, np.arange(0, 100, 10), np.arange(10, 101, 10), 64).tolist() == [0, 64]


def test_a_dense_million_positions_needs_a_row_per_tile():
    n = 1 << 20
    table = BlockTable.from_rectangles("joint", n, 1, q_start=[0], q_stop=[n], k_start=[0], k_stop=[n], weight=[1.0])
    (tiling,) = build_tilings(table, (TileClass(64, 64),), False)
    assert tiling.n_tiles == n // 64 and len(tiling.rows) == n // 64 + 1
    assert tiling.nbytes < 0.02 * 4 * n * 64 * 2


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
