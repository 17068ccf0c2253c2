"""The fast torch executor: numbers against the dense oracle in every mode, structure, determinism, 16-bit budgets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from canvas_kernels import BlockTable, block_attention
from canvas_kernels.torch_ops import executor, grouping, groups, strided
from tests.kernels.tables import error
from tests.kernels.test_reference import check, dense_oracle, random_case, random_table

ENDLESS = 1 << 60


def frames(rows_per_frame: list[int], n_frames: int, reads, weight=None) -> BlockTable:
    """Regions of ``rows_per_frame`` rows over ``n_frames`` frames, packed region after region. ``reads``: (src, dst,
    frame offset) triples, an edge each, a segment per frame whose partner exists."""
    base = np.concatenate([[0], np.cumsum(np.array(rows_per_frame) * n_frames)])
    rows, segment = [], 0
    for edge, (src, dst, offset) in enumerate(reads):
        for t in range(n_frames):
            if 0 <= t + offset < n_frames:
                q0, k0 = base[src] + t * rows_per_frame[src], base[dst] + (t + offset) * rows_per_frame[dst]
                w = 1.0 if weight is None else weight(edge, t)
                rows.append((q0, q0 + rows_per_frame[src], k0, k0 + rows_per_frame[dst], segment, w, edge))
                segment += 1
    q0, q1, k0, k1, segments, w, edges = zip(*rows)
    return BlockTable.from_rectangles(
        "edge", int(base[-1]), len(reads), q_start=q0, q_stop=q1, k_start=k0, k_stop=k1, segment=segments, weight=w,
        edge=edges,
    )  # fmt: skip


def inputs_for(table, dtype=torch.float64, batch=1, heads=2, head_dim=8, gain=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, table.n_positions, heads, head_dim)
    inputs = {}
    for name in "qkv":
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        inputs[name] = x.transpose(1, 2).requires_grad_()
    if gain:
        inputs["gain"] = torch.randn(table.n_edges, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return inputs


@pytest.fixture(
    params=[
        "strided products",
        "strided products in slices",
        "strided flash",
        "gathered",
        "gathered, recomputed",
        "gathered, many bundles",
    ]
)
def mode(request, monkeypatch):
    """Each way of executing, forced."""
    if "strided" in request.param:
        monkeypatch.setattr(grouping, "MAX_STRIDED", ENDLESS)
    else:
        monkeypatch.setattr(grouping, "STRIDED_RANGES", 0)
        monkeypatch.setattr(grouping, "STRIDED_PAIRS", ENDLESS)
    if request.param == "strided products in slices":
        monkeypatch.setattr(groups, "THIN_SIDE", 1)
    if request.param == "strided flash":
        monkeypatch.setattr(grouping, "FLASH_SIDE", 1)
        monkeypatch.setattr(grouping, "FLASH_PAIRS", 1)
    if request.param == "gathered, recomputed":
        monkeypatch.setattr(grouping, "SAVED_PROBS_RATIO", 0)
    if request.param == "gathered, many bundles":
        monkeypatch.setattr(grouping, "BUNDLE_ROWS", 8)
    return request.param


def test_modes_execute_what_they_say(mode):
    table = frames([6, 3], 5, [(0, 0, 0), (0, 1, 0), (1, 0, -1)])
    built = grouping.group_table(table)
    assert bool(built.strided) == ("strided" in mode) and bool(built.gathered) == ("strided" not in mode)
    assert (len(built.bundles) > 1) == (mode == "gathered, many bundles")
    plan = executor.execution_plan(table, 8)
    assert all(plan.flash) == (mode == "strided flash" or "strided" not in mode)
    assert plan.saves_probs == (mode != "gathered, recomputed")


@pytest.mark.parametrize("form", ["edge", "joint"])
def test_random_tables_meet_the_oracle_in_float64(form, mode):
    for seed in range(14):
        check(*random_case(form, seed, batch=1 + seed % 2), 1e-12)


@pytest.mark.parametrize("form", ["edge", "joint"])
def test_random_tables_meet_the_oracle_in_float32(form, mode):
    for seed in range(20, 26):
        check(*random_case(form, seed, torch.float32, batch=1 + seed % 2), 1e-5)


@pytest.mark.parametrize("heads", [1, 9])
def test_frames_at_equal_distances_meet_the_oracle(mode, heads):
    # more heads than members, and fewer: the slices of products run along the other dimension
    reads = [(0, 0, 0), (0, 0, -1), (0, 1, 0), (1, 0, -1), (1, 1, 0), (1, 1, 1)]
    table = frames([6, 3], 5, reads, weight=lambda edge, t: 1.0 + 0.25 * ((edge + t) % 3))
    check(table, inputs_for(table, heads=heads), {}, 1e-12)
    active = torch.tensor([1, 0, 1, 1, 0, 1])
    check(table, inputs_for(table, batch=2, heads=heads, gain=True), {"active": active}, 1e-12)


def test_rows_in_pieces_that_read_the_same_keys(mode):
    # four pieces of rows, two connections, an overlap that forbids joining, and another class
    table = BlockTable.from_rectangles(
        "edge", 60, 3, q_start=[0, 8, 20, 31, 31, 50], q_stop=[6, 15, 29, 45, 45, 60], k_start=[30] * 6,
        k_stop=[47] * 6, segment=range(6), weight=[1, 2, 0.5, 1, 3, 1], edge=[0, 0, 1, 1, 2, 2],
        replace=[0, 0, 0, 0, 0, 1],
    )  # fmt: skip
    for heads in (1, 3):
        check(table, inputs_for(table, heads=heads, batch=2, gain=True), {}, 1e-12)
        check(table, inputs_for(table, heads=heads), {"active": torch.tensor([1, 1, 0])}, 1e-12)


def test_query_ranges_that_all_attend_to_the_same_keys(mode):
    # five query ranges, rows apart so that they cannot be merged, under fewer heads, as many, more
    rows = np.arange(0, 40, 8)
    table = BlockTable.from_rectangles(
        "edge", 44, 2, q_start=rows, q_stop=rows + 5, k_start=[40] * 5, k_stop=[43] * 5, segment=range(5),
        weight=[1, 2, 1, 2, 1], edge=[0, 0, 0, 1, 1],
    )  # fmt: skip
    for heads in (2, 5, 7):
        check(table, inputs_for(table, heads=heads, gain=True), {}, 1e-12)


def test_wide_joint_query_ranges_with_weights_and_several_ranges(mode):
    q0, q1 = [0, 0, 20, 20, 0], [20, 20, 40, 40, 40]
    k0, k1 = [0, 25, 10, 30, 41], [20, 40, 30, 41, 45]
    weight = [1.0, 0.5, 1.0, 0.5, 2.0]
    table = BlockTable.from_rectangles("joint", 50, 0, q_start=q0, q_stop=q1, k_start=k0, k_stop=k1, weight=weight)
    check(table, inputs_for(table, batch=2), {}, 1e-12)


def test_key_ranges_that_move_onto_each_other(mode):
    # a causal video in joint form: each frame reads itself and the one before, with a gap between the two
    now = 8 * np.arange(1, 5)
    table = BlockTable.from_rectangles(
        "joint", 40, 0, q_start=[*now, *now], q_stop=[*(now + 6), *(now + 6)], k_start=[*now, *(now - 8)],
        k_stop=[*(now + 6), *(now - 2)], weight=np.ones(8),
    )  # fmt: skip
    if "strided" in mode:
        (group,) = grouping.group_table(table).strided
        assert group.members == 4 and group.key_ranges == ((0, 6, 8), (8, 6, 8)) and not group.overwrites_keys
    check(table, inputs_for(table, batch=2), {}, 1e-12)


def members(ranges, g: int) -> list[int]:
    """Positions of member ``g``."""
    return [first + g * step + j for first, length, step in ranges for j in range(length)]


def pairs_of(table) -> dict:
    """{(segment, row): keys} from the rectangles."""
    found: dict = {}
    for i in range(len(table.weight)):
        for row in range(table.q_start[i], table.q_stop[i]):
            keys = found.setdefault((int(table.segment[i]), row), [])
            keys += range(table.k_start[i], table.k_stop[i])
    return {key: sorted(keys) for key, keys in found.items()}


@pytest.mark.parametrize("form", ["edge", "joint"])
def test_grouping_holds_every_pair_once(form, mode):
    tables = [random_table(form, seed) for seed in range(20)]
    if form == "edge":
        tables.append(frames([6, 3], 9, [(0, 0, 0), (0, 0, -1), (0, 1, 0), (1, 0, -1)]))
    for table in tables:
        built, found = grouping.group_table(table), {}
        for group in built.strided:
            for g in range(group.members):
                keys, rows = members(group.key_ranges, g), members(group.row_ranges, g)
                assert (len(keys), len(rows)) == (group.keys, group.rows)
                for r, row in enumerate(rows):
                    key = (int(group.segment[g, r]), row)
                    assert key not in found
                    found[key] = keys
        for batch in built.gathered:
            for g, s in np.argwhere(batch.segment >= 0):
                keys = batch.keys[g, s][batch.key_valid[g, s]].tolist()
                for row in batch.rows[g][batch.row_valid[g]].tolist():
                    assert (int(batch.segment[g, s]), row) not in found
                    found[int(batch.segment[g, s]), row] = keys
        assert found == pairs_of(table)


def test_calls_grow_with_shapes_not_with_edges():
    def parts(n_vehicles: int) -> int:
        # every vehicle: a coarse field of 4 rows, fields of 16, 1 and 8; each reads each, the coarse ones a hub and
        # back
        rows, at, edge = [], 16, 0
        for _ in range(n_vehicles):
            fields = []
            for size in (4, 16, 1, 8):
                fields.append((at, at + size))
                at += size
            pairs = [(a, b) for a in fields for b in fields] + [((0, 16), fields[0]), (fields[0], (0, 16))]
            for a, b in pairs:
                rows.append((*a, *b, edge))
                edge += 1
        q0, q1, k0, k1, edges = zip(*rows)
        table = BlockTable.from_rectangles(
            "edge",
            at,
            edge,
            q_start=q0,
            q_stop=q1,
            k_start=k0,
            k_stop=k1,
            segment=edges,
            weight=[1.0] * edge,
            edge=edges,
        )
        built = grouping.group_table(table)
        return len(built.strided) + len(built.gathered)

    assert parts(200) <= parts(25) <= grouping.MAX_STRIDED


def test_every_row_and_key_that_is_written_first_is_written_once():
    table = frames([6, 3], 9, [(0, 0, 0), (0, 0, -1), (0, 1, 0), (1, 1, 0), (1, 0, 0)])
    built = grouping.group_table(table)
    for name, stale in (("row", built.rows_to_zero), ("key", built.keys_to_zero)):
        seen: set = set()
        written: set = set()
        for group in built.strided:
            touched = [p for g in range(group.members) for p in members(getattr(group, f"{name}_ranges"), g)]
            if getattr(group, f"overwrites_{name}s"):
                assert len(set(touched)) == len(touched) and not seen & set(touched)
                written |= set(touched)
            seen |= set(touched)
        cleared = {p for start, stop in stale for p in range(start, stop)}
        assert cleared >= set(range(table.n_positions)) - written and not cleared & written


@pytest.mark.parametrize("batch", [1, 3])
def test_the_same_bits_every_time(mode, batch):
    table = frames([40, 8], 4, [(0, 0, 0), (0, 0, -1), (0, 1, 0), (1, 0, -1), (1, 1, 0)])
    inputs = inputs_for(table, torch.float32, batch=batch, gain=True)
    upstream = torch.randn_like(inputs["q"])

    def run():
        out = block_attention(**inputs, table=table, active=torch.tensor([1, 1, 0, 1, 1]))
        return out, *torch.autograd.grad(out, list(inputs.values()), upstream)

    for first, second in zip(run(), run()):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_cost_at_most_twice_what_dense_attention_does(dtype, mode):
    table = frames([24, 8], 4, [(0, 0, 0), (0, 0, -1), (0, 1, 0), (1, 0, 0)])
    inputs = inputs_for(table, dtype, head_dim=16)
    upstream = torch.randn(inputs["q"].shape, dtype=torch.float64)
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    expected, _ = dense_oracle(**exact, table=table, scale=0.25)
    expected = [expected, *torch.autograd.grad(expected, list(exact.values()), upstream)]

    plain = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    dense = torch.zeros_like(plain["q"])
    row_scale = table.row_scale(torch.device("cpu"), dtype)
    for segment in np.unique(table.segment):
        i = int(np.flatnonzero(table.segment == segment)[0])
        rows, keys = slice(table.q_start[i], table.q_stop[i]), slice(table.k_start[i], table.k_stop[i])
        p = torch.softmax(0.25 * (plain["q"][:, :, rows] @ plain["k"][:, :, keys].transpose(-1, -2)), -1)
        piece = torch.zeros_like(dense)
        piece[:, :, rows] = row_scale[0, rows, None] * (p @ plain["v"][:, :, keys])
        dense = dense + piece
    dense = [dense, *torch.autograd.grad(dense, list(plain.values()), upstream.to(dtype))]

    out = block_attention(**inputs, table=table, scale=0.25)
    ours = [out, *torch.autograd.grad(out, list(inputs.values()), upstream.to(dtype))]
    for mine, theirs, want in zip(ours, dense, expected):
        assert mine.dtype == dtype
        assert error(mine.detach(), want.detach()) <= 2 * error(theirs.detach(), want.detach())


@pytest.mark.parametrize(
    "layout", ["packed projection", "heads first", "rows not apart by head_dim", "expanded gradient"]
)
def test_memory_layouts(layout, mode):
    table = frames([6, 3], 4, [(0, 0, 0), (0, 1, 0), (1, 0, -1)])
    n, heads, dim = table.n_positions, 2, 8
    reference = inputs_for(table, heads=heads, head_dim=dim)
    q, k, v = (x.detach() for x in reference.values())
    if layout == "packed projection":
        packed = torch.cat([x.transpose(1, 2).reshape(1, n, heads * dim) for x in (q, k, v)], -1)
        q, k, v = (x.unflatten(-1, (heads, dim)).transpose(1, 2) for x in packed.chunk(3, -1))
    elif layout == "heads first":
        q, k, v = (x.contiguous() for x in (q, k, v))
    elif layout == "rows not apart by head_dim":
        q, k, v = (torch.cat([x, x[..., :3]], -1)[..., :dim] for x in (q, k, v))
    if layout == "expanded gradient":
        out = block_attention(**reference, table=table, scale=0.7)
        expected, _ = dense_oracle(**reference, table=table, scale=0.7)
        found = torch.autograd.grad(out.sum(), list(reference.values()))
        for mine, want in zip(found, torch.autograd.grad(expected.sum(), list(reference.values()))):
            assert error(mine, want) <= 1e-12
        return
    check(table, {"q": q.requires_grad_(), "k": k.requires_grad_(), "v": v.requires_grad_()}, {}, 1e-12)


def test_large_logits_give_no_nan(mode):
    table = frames([6, 3], 4, [(0, 0, 0), (0, 1, 0), (1, 0, -1)])
    inputs = inputs_for(table, torch.float32, gain=True)
    inputs = {name: (x.detach() * (1e4 if name in "qk" else 1)).requires_grad_() for name, x in inputs.items()}
    out = block_attention(**inputs, table=table)
    results = [out, *torch.autograd.grad(out.square().sum(), list(inputs.values()))]
    assert all(bool(torch.isfinite(x).all()) for x in results)


def test_everything_inactive_gives_zeros(mode):
    table = frames([6, 3], 4, [(0, 0, 0), (0, 1, 0)])
    inputs = inputs_for(table, torch.float32, gain=True)
    out, lse = block_attention(**inputs, table=table, active=torch.zeros(2), return_lse=True)
    results = [out, *torch.autograd.grad(out.sum(), list(inputs.values()))]
    assert not any(x.any() for x in results) and bool((lse == torch.inf).all())


def test_one_position():
    table = BlockTable.from_rectangles(
        "edge", 1, 1, q_start=[0], q_stop=[1], k_start=[0], k_stop=[1], segment=[0], weight=[0.3], edge=[0]
    )
    check(table, inputs_for(table), {}, 1e-12)


def test_no_positions_and_no_batch():
    empty = np.zeros(0)
    table = BlockTable.from_rectangles(
        "joint", 0, 0, q_start=empty, q_stop=empty, k_start=empty, k_stop=empty, weight=empty
    )
    out = block_attention(*(torch.zeros(2, 3, 0, 4) for _ in range(3)), table)
    assert out.shape == (2, 3, 0, 4)
    table = frames([6, 3], 2, [(0, 0, 0)])
    x = torch.zeros(0, 2, table.n_positions, 4, requires_grad=True)
    out = block_attention(x, x, x, table)
    out.sum().backward()
    assert x.grad.shape == x.shape


def laid_out(x: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """``x`` with its dimensions in ``order`` in memory, the outermost first."""
    back = [order.index(dim) for dim in range(4)]
    return x.permute(order).contiguous().permute(back)


def test_where_lanes_lie_is_kept_for_each_layout():
    """One table, called with rows that lie another way each time, also inside of larger tensors."""
    table = frames([40, 32], 3, [(0, 0, 0), (0, 1, 0), (1, 0, 0)])
    shape, generator = (1, 2, table.n_positions, 8), torch.Generator().manual_seed(0)
    for _ in range(2):
        for order in ((0, 1, 2, 3), (2, 0, 1, 3)):
            for before in (0, 5):
                whole = torch.randn(4, 1, 2, before + table.n_positions, 8, generator=generator, dtype=torch.float64)
                parts = [laid_out(x, order)[:, :, before:].requires_grad_() for x in whole[:3]]
                upstream = laid_out(whole[3], order)[:, :, before:]
                assert parts[0].shape == shape and (parts[0].storage_offset() > 0) == (before > 0)
                out, expected = (block_attention(*parts, table, backend=name) for name in ("torch", "reference"))
                torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
                found, wanted = (torch.autograd.grad(result, parts, upstream) for result in (out, expected))
                torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    strided = grouping.group_table(table).strided
    assert strided and all(len({key[2] for key in group.layout_cache}) >= 3 for group in strided)


def test_what_is_kept_does_not_grow_with_the_square_of_the_canvas():
    sizes = []
    for n_frames in (8, 64):
        table = frames([16], n_frames, [(0, 0, 0), (0, 0, -1)])
        sizes.append(executor.saved_size(table, 1, 8) / table.n_positions)
    assert sizes[1] <= 1.3 * sizes[0]
    dense = BlockTable.from_rectangles(
        "joint", 4096, 0, q_start=[0], q_stop=[4096], k_start=[0], k_stop=[4096], weight=[1.0]
    )
    assert executor.saved_size(dense, 1, 64) == 4096 * 65


def test_inactive_rows_of_a_joined_slab_are_not_computed(monkeypatch):
    # two connections attend to the same keys, so that their rows are in one group
    table = BlockTable.from_rectangles(
        "edge", 96, 2,
        q_start=[0, 40], q_stop=[40, 64], k_start=[64, 64], k_stop=[96, 96], segment=[0, 1],
        weight=[1.0, 2.0], edge=[0, 1],
    )  # fmt: skip
    assert len(grouping.group_table(table).strided) == 1
    seen, softmax = [], strided.softmax_out
    monkeypatch.setattr(strided, "softmax_out", lambda x, *a, **k: seen.append(x.numel()) or softmax(x, *a, **k))
    q, k, v = (torch.randn(1, 2, 96, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    for active, rows in (([1.0, 1.0], 64), ([1.0, 0.0], 40), ([0.0, 1.0], 24), ([0.0, 0.0], 0)):
        seen.clear()
        gain, flags = torch.tensor([0.5, 3.0], dtype=torch.float64, requires_grad=True), torch.tensor(active)
        options = {"gain": gain, "active": flags}
        out, expected = (block_attention(q, k, v, table, backend=b, **options) for b in ("torch", "reference"))
        assert sum(seen) == 2 * rows * 32
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
        if rows:
            grad = torch.randn_like(out)
            found, wanted = (torch.autograd.grad(o, [q, k, v, gain], grad) for o in (out, expected))
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("batch", [1, 2])
def test_any_layout_in_memory_gives_the_same_numbers(mode, batch):
    table = frames([6, 4], 3, [(0, 0, 0), (0, 0, -1), (0, 1, 0), (1, 0, 0)], weight=lambda edge, t: 1.0 + edge)
    gain = torch.rand(table.n_edges, dtype=torch.float64)
    torch.manual_seed(0)
    shape = (batch, 3, table.n_positions, 8)
    q, k, v, upstream = (torch.randn(shape, dtype=torch.float64) for _ in range(4))

    plain, positions, heads = (0, 1, 2, 3), (2, 0, 1, 3), (1, 0, 2, 3)

    def results(orders):
        inputs = [laid_out(x, order).requires_grad_() for x, order in zip((q, k, v), orders)]
        weights = gain.clone().requires_grad_()
        out, lse = block_attention(*inputs, table, gain=weights, backend="torch", return_lse=True)
        found = torch.autograd.grad(out, [*inputs, weights], laid_out(upstream, orders[-1]))
        # heads outermost come back as batches of heads
        assert out.permute(plain if orders[0] == heads else orders[0]).is_contiguous()
        return [out.detach(), lse, *found]

    expected = results([plain] * 4)
    for orders in ([positions] * 4, [heads] * 4, (heads, plain, positions, plain), (positions, heads, plain, heads)):
        for mine, want in zip(results(orders), expected):
            assert torch.allclose(mine, want, rtol=1e-12, atol=1e-12)


def scattered(sizes, keys=3, seed=0) -> BlockTable:
    """Query ranges of ``sizes`` rows at uneven distances, a connection each, that attend to ``keys`` keys somewhere."""
    rng, at, rows = np.random.default_rng(seed), 0, []
    for size in sizes:
        at += int(rng.integers(1, 9))
        rows.append((at, at + size))
        at += size
    first = rng.integers(0, at - keys, len(sizes))
    q0, q1 = zip(*rows)
    number = range(len(sizes))
    return BlockTable.from_rectangles(
        "edge", at, len(sizes), q_start=q0, q_stop=q1, k_start=first, k_stop=first + keys, segment=number,
        weight=rng.uniform(0.5, 2, len(sizes)), edge=number,
    )  # fmt: skip


def test_three_constants_choose_the_grouping():
    few = grouping.group_table(frames([6, 3], 5, [(0, 0, 0), (0, 1, 0), (1, 0, -1)]))
    assert few.strided and not few.gathered
    rng = np.random.default_rng(1)
    many = scattered(rng.integers(1, 40, 300))
    built = grouping.group_table(many)
    # more strided groups than are allowed: those of few pairs are gathered, and shapes rounded up to a ladder
    assert all(group.pairs >= grouping.STRIDED_PAIRS for group in built.strided) and built.gathered
    assert len({batch.shape[1:] for batch in built.gathered}) <= 12
    check(many, inputs_for(many, gain=True), {}, 1e-12)
    large = grouping.group_table(frames([512], 3, [(0, 0, 0)]))
    assert [(g.members, g.rows, g.keys) for g in large.strided] == [(3, 512, 512)] and not large.gathered


def test_grouping_is_a_function_of_the_table_alone(monkeypatch):
    built = [grouping.group_table(scattered([5] * 100 + [9] * 50)) for _ in range(2)]
    shapes = [([s.row_ranges for s in g.strided], [b.shape for b in g.gathered]) for g in built]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("seed", range(6))
def test_what_is_inactive_may_hold_anything(seed, mode):
    """NaN that only inactive connections touch: outputs and gradients are those of zeros there, all kinds of groups."""
    table = frames([6, 3], 5, [(0, 0, 0), (0, 1, 0), (1, 0, -1), (1, 1, 0)], weight=lambda edge, t: 1.0 + edge)
    rng = np.random.default_rng(seed)
    active = torch.from_numpy(rng.integers(0, 2, table.n_edges).astype(np.float64))
    on = active.numpy()[table.edge] > 0
    touched = np.zeros(table.n_positions, bool)
    for start, stop in ((table.q_start, table.q_stop), (table.k_start, table.k_stop)):
        for low, high in zip(start[on], stop[on]):
            touched[low:high] = True
    results = []
    for filling in (0.0, float("nan"), float("inf")):
        inputs = inputs_for(table, gain=True, seed=seed)
        with torch.no_grad():
            for name in "qkv":
                inputs[name][:, :, ~touched] = filling
        out = block_attention(**inputs, table=table, active=active, backend="torch")
        upstream = torch.ones_like(out)
        upstream[:, :, ~touched] = filling
        results.append([out.detach(), *torch.autograd.grad(out, list(inputs.values()), upstream)])
    for other in results[1:]:
        for want, found in zip(results[0], other):
            assert torch.equal(want, found)
