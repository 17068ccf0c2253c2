"""Windows and fixed draws: which keys each query sees, on every backend, and queries that see none."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from canvas_engineering import (
    ATTENTION_REGISTRY,
    AttentionDispatcher,
    CanvasLayout,
    CanvasProgram,
    CanvasSchema,
    CanvasTopology,
    Connection,
    IdentitySpec,
    LocalAttention,
    RandomFixedAttention,
    RegionProgram,
    RegionSpec,
    compile_attention,
    create_attention,
)
from canvas_engineering.attention.local import BlockGroup
from canvas_engineering.attention.random_fixed import draw_keys
from canvas_engineering.plan.index_sets import SetShape
from tests import dispatchers, family_oracle, oracle
from tests.dispatchers import oracle_step
from tests.strategies import canvases

D_MODEL, HEADS = 8, 2
randomised = functools.partial(dispatchers.randomised, d_model=D_MODEL)


class Narrow(LocalAttention):
    """With windows so small that queries miss every key."""

    def __init__(self, d_model, n_heads=4, dropout=0.0, window_size=2):
        super().__init__(d_model, n_heads, dropout, window_size)


@pytest.fixture(scope="module", autouse=True)
def narrow():
    """Registers "narrow", local attention with a window of 2."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ATTENTION_REGISTRY, "narrow", Narrow)
        patch.setitem(family_oracle.FUNCTIONS, "narrow", functools.partial(family_oracle.local, window_size=2))
        yield


def line(n, m, fn, backend="auto", t=1):
    """A region of n positions that reads one of m, in ``t`` frames."""
    regions = {"a": (0, t, 0, 1, 0, n), "b": (0, t, 1, 2, 0, m)}
    layout = CanvasLayout(T=t, H=2, W=max(n, m), d_model=D_MODEL, regions=regions)
    return randomised(layout, CanvasTopology([Connection("a", "b", fn=fn)]), backend=backend)


# -- windows -----------------------------------------------------------------------------------------------------------


def pairs_of_blocks(blocks, n, m):
    """int64 (n, m): how often the blocks compute each pair of a query that counts."""
    found = torch.zeros(n, m, dtype=torch.int64)
    group = BlockGroup.of(1, blocks, 0, 0)
    seen = (group.bias(torch.ones(1, 1)) == 0).numpy()
    for queries, keys, pairs, counts in zip(blocks.query, blocks.key, seen, blocks.valid):
        for i, row, counted in zip(queries, pairs, counts):
            assert row.any()  # a softmax of nothing is no number
            if counted:
                found[i].index_add_(0, torch.from_numpy(keys[row]), torch.ones(int(row.sum()), dtype=torch.int64))
    return found


@settings(max_examples=60)
@given(n=st.integers(1, 60), m=st.integers(1, 60), window_size=st.integers(0, 40))
def test_windows_are_the_definition_in_tables_and_in_blocks(n, m, window_size):
    module = LocalAttention(4, n_heads=1, window_size=window_size)
    expected = family_oracle.window(n, m, window_size)
    query, key = (torch.from_numpy(a) for a in module.pairs(n, m))
    seen = torch.zeros(n, m, dtype=torch.int64).index_put_((query, key), torch.ones_like(key), accumulate=True)
    assert torch.equal(seen, expected.long())
    assert torch.equal(pairs_of_blocks(module.blocks(SetShape((1, n), (1, m))), n, m), expected.long())


@st.composite
def grids(draw):
    """Extents of two boxes, frames first, a window for each axis, and which keys there are (None for all)."""
    dims = draw(st.integers(2, 4))
    most = {2: 40, 3: 14, 4: 6}[dims]
    queries, keys = (tuple(draw(st.integers(1, most if axis else 3)) for axis in range(dims)) for _ in range(2))
    if draw(st.booleans()):
        keys = queries
    places = None
    if draw(st.integers(0, 3)) == 0:
        count = draw(st.integers(1, math.prod(keys)))
        places = np.sort(np.random.default_rng(count).permutation(math.prod(keys))[:count])
    window = draw(st.tuples(*[st.integers(0, 9)] * dims))
    return SetShape(queries, keys, places), draw(st.sampled_from([window, None]) if dims > 2 else st.just(window))


@settings(max_examples=80)
@given(drawn=grids())
def test_windows_on_grids_are_the_definition_in_tables_and_in_blocks(drawn):
    shape, window = drawn
    module = LocalAttention(4, n_heads=1, window_size=window)
    sizes = window or (1, *[8] * (len(shape.queries) - 1))
    expected = _grid_pairs(shape, sizes)
    query, key = (torch.from_numpy(a) for a in module.pairs_of_shape(shape))
    seen = torch.zeros(shape.n, shape.m, dtype=torch.int64)
    seen.index_put_((query, key), torch.ones_like(key), accumulate=True)
    assert torch.equal(seen, expected.long())
    assert torch.equal(pairs_of_blocks(module.blocks(shape), shape.n, shape.m), expected.long())


def _grid_pairs(shape, sizes):
    """bool (n, m), entry by entry."""
    places = range(math.prod(shape.keys)) if shape.key_index is None else shape.key_index.tolist()
    i, j = (
        torch.tensor(np.stack(np.unravel_index(list(rows), extent), 1))
        for rows, extent in ((range(shape.n), shape.queries), (places, shape.keys))
    )
    n, m = torch.tensor(shape.queries), torch.tensor(shape.keys)
    return ((j[None] - (i * m // n)[:, None]).abs() <= torch.tensor(sizes) // 2).all(-1)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@settings(max_examples=20)
@given(canvas=canvases(60, pairs=False, write_modes=("add", "replace", "gate"), fns=("narrow", "copy", None)))
def test_queries_without_keys_have_no_read(backend, canvas):
    layout, topology = canvas
    dispatcher = randomised(layout, topology, backend=backend)
    check_against_the_oracle(dispatcher)


@pytest.mark.parametrize(("n", "m"), [(70, 70), (50, 7), (7, 50), (90, 31)])
@pytest.mark.parametrize("fn", ["local_attention", "random_fixed"])
def test_long_reads_on_every_backend(fn, n, m):
    x = torch.randn(2, 2 * 3 * max(n, m), D_MODEL, dtype=torch.float64)
    outs = []
    for backend in ("torch", "reference"):
        dispatcher = line(n, m, fn, backend, t=3)
        leaf = x.clone().requires_grad_()
        out = dispatcher(leaf)
        torch.testing.assert_close(out, oracle_step(dispatcher, leaf), rtol=1e-6, atol=1e-6)
        outs.append(torch.autograd.grad(out.square().sum(), [leaf, *dispatcher.parameters()]))
    for a, b in zip(*outs):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fn", ["local_attention", "random_fixed"])
def test_triton_runs_the_same_choice(fn):
    pytest.importorskip("triton")
    x = torch.randn(1, 2 * 24, D_MODEL)
    results = []
    for backend in ("triton", "torch"):
        dispatcher = line(24, 19, fn, backend).float()
        leaf = x.clone().requires_grad_()
        out = dispatcher(leaf)
        results.append([out, *torch.autograd.grad(out.square().sum(), [leaf, *dispatcher.parameters()])])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


def check_against_the_oracle(dispatcher, batch=2):
    """Results and every gradient, in float64."""
    x = torch.randn(batch, dispatcher.layout.num_positions, D_MODEL, dtype=torch.float64, requires_grad=True)
    out, expected = dispatcher(x), oracle_step(dispatcher, x)
    # weights are float32
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    leaves, grad = [x, *dispatcher.parameters()], torch.randn_like(x)
    found = torch.autograd.grad(out, leaves, grad, allow_unused=True) if out.requires_grad else []
    for a, b in zip(found, torch.autograd.grad(expected, leaves, grad, allow_unused=True)):
        a, b = (torch.zeros((), dtype=torch.float64) if g is None else g for g in (a, b))
        torch.testing.assert_close(*torch.broadcast_tensors(a, b), rtol=1e-5, atol=1e-5)


@contextlib.contextmanager
def registered(name, window_size):
    """Registers ``name``, local attention of that window, for dispatchers and for the oracle."""

    class Windowed(LocalAttention):
        def __init__(self, d_model, n_heads=4, dropout=0.0):
            super().__init__(d_model, n_heads, dropout, window_size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ATTENTION_REGISTRY, name, Windowed)
        windowed = functools.partial(family_oracle.local, window_size=window_size)
        patch.setitem(family_oracle.FUNCTIONS, name, windowed)
        yield


@pytest.mark.parametrize("backend", ["torch", "reference"])
@settings(max_examples=30)
@given(
    canvas=canvases(80, pairs=False, write_modes=("add", "replace", "gate"), fns=("close", "close", "local_attention")),
    sizes=st.tuples(*[st.integers(0, 5)] * 4),
)
def test_windows_on_random_canvases(backend, canvas, sizes):
    layout, topology = canvas
    with registered("close", sizes[: 1 + layout.n_spatial_dims]):
        check_against_the_oracle(randomised(layout, topology, backend=backend))


GRIDS = {
    "1-D": ((2, 40), {"a": (0, 2, 0, 23), "b": (0, 2, 23, 40)}),
    "equal": ((3, 22, 13), {"a": (0, 3, 0, 11, 0, 13), "b": (0, 3, 11, 22, 0, 13)}),
    "finer keys": ((3, 13, 24), {"a": (0, 3, 0, 5, 0, 7), "b": (1, 3, 0, 13, 7, 24)}),
    "coarser keys": ((3, 13, 24), {"a": (1, 3, 0, 13, 7, 24), "b": (0, 3, 0, 5, 0, 7)}),
    "3-D": ((1, 6, 10, 11), {"a": (0, 1, 0, 3, 0, 10, 0, 11), "b": (0, 1, 3, 6, 0, 7, 0, 11)}),
}
OFFSETS = {"all frames": (None, None), "own frame": (0, 0), "frame before": (0, -1), "by frame": (0, None)}


@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS)
@pytest.mark.parametrize("grid", GRIDS)
def test_the_default_window_is_four_rows_and_columns_each_way(grid, offsets):
    (T, *spatial), boxes = GRIDS[grid]
    regions = {"a": RegionSpec(boxes["a"], period=2), "b": RegionSpec(boxes["b"])}
    layout = CanvasLayout(T=T, spatial_shape=tuple(spatial), d_model=D_MODEL, regions=regions)
    edges = [Connection("a", dst, fn="local_attention", t_src=offsets[0], t_dst=offsets[1]) for dst in "ab"]
    for backend in ("torch", "reference"):
        check_against_the_oracle(randomised(layout, CanvasTopology(edges), backend=backend), batch=1)


@pytest.mark.parametrize("window_size", [None, 4, (3, 3, 1)])
def test_a_patch_sees_its_neighbours_in_its_own_frame_and_in_the_one_before(window_size):
    with registered("close", window_size):
        layout = CanvasLayout(T=3, H=12, W=13, d_model=D_MODEL, regions={"a": (0, 3, 0, 12, 0, 13)})
        pair = [Connection("a", "a", fn="close", t_src=0, t_dst=offset) for offset in (0, -1)]
        dense = AttentionDispatcher(CanvasTopology(pair), layout, D_MODEL, n_heads=HEADS).plan.to_dense()
    seen = dense.reshape(3, 12, 13, 3, 12, 13) > 0
    for t, row, column in ((1, 6, 6), (2, 0, 12), (0, 11, 0)):
        expected = np.zeros((3, 12, 13), bool)
        for frame in {t, max(t - 1, 0)}:
            if window_size == 4:
                place = row * 13 + column
                expected[frame].reshape(-1)[max(0, place - 2) : place + 3] = True
            else:
                up, side = (4, 4) if window_size is None else (1, 0)
                expected[frame, max(0, row - up) : row + up + 1, max(0, column - side) : column + side + 1] = True
        assert (seen[t, row, column] == expected).all()


def test_slots_are_counted_in_order_whatever_the_grid():
    layout = CanvasLayout(T=1, H=5, W=8, d_model=D_MODEL, regions={"a": (0, 1, 0, 5, 0, 4), "b": (0, 1, 0, 5, 4, 8)})
    topology = CanvasTopology([Connection("a", "b", fn="local_attention")])
    identity = {"b": RegionProgram(identity=IdentitySpec(slot_capacity=30))}
    program = CanvasProgram(CanvasSchema(layout, topology), identity)
    plan = AttentionDispatcher(topology, layout, D_MODEL, n_heads=HEADS, program=program).plan
    queries = layout.region_index("a").tolist()
    assert (plan.to_dense()[queries, 40:] > 0).tolist() == family_oracle.window(20, 30).tolist()


def test_a_window_for_other_axes_than_the_canvas_has_is_refused():
    layout = CanvasLayout(T=1, H=4, W=4, d_model=8, regions={"a": (0, 1, 0, 4, 0, 4)})
    message = r"\(1, 3\) has 2 numbers; this canvas has 3 axes"
    with registered("close", (1, 3)), pytest.raises(ValueError, match=message):
        AttentionDispatcher(CanvasTopology([Connection("a", "a", fn="close")]), layout, D_MODEL, n_heads=HEADS)


def test_cost_goes_with_the_window_and_not_with_the_square_of_the_grid():
    def plan_of(side):
        layout = CanvasLayout(T=1, H=side, W=side, d_model=D_MODEL, regions={"a": (0, 1, 0, side, 0, side)})
        topology = CanvasTopology([Connection("a", "a", fn="local_attention")])
        return AttentionDispatcher(topology, layout, D_MODEL, n_heads=HEADS)

    for side in (32, 64):
        dispatcher = plan_of(side)
        pairs = (9 * side - 2 * (1 + 2 + 3 + 4)) ** 2
        assert dispatcher.plan.table.pairs == pairs
        (group,) = dispatcher.fn_modules["local_attention"].blocked(dispatcher.plan).groups
        assert group.blocks * group.rows * group.keys <= 4 * pairs
        assert sum(constant.n_out for _, constant in group.mask) <= 32 * side


def test_a_window_that_misses_every_key_gives_no_nan():
    # published: non-finite
    torch.manual_seed(0)
    module = LocalAttention(8, n_heads=2, window_size=2)
    x_q, x_k = torch.randn(1, 9, 8, requires_grad=True), torch.randn(1, 1, 8)
    out = module(x_q, x_k, x_k)
    assert torch.isfinite(out).all() and torch.equal(out[:, 2:], torch.zeros(1, 7, 8)) and out[:, :2].abs().min() > 0
    out.sum().backward()
    assert torch.isfinite(x_q.grad).all()


def test_such_queries_pass_through_or_leave_the_place_to_others():
    alone = line(9, 1, "narrow")
    x = torch.randn(1, 18, D_MODEL, dtype=torch.float64)
    out = alone(x)
    assert torch.equal(out[:, 2:], x[:, 2:]) and not torch.isclose(out[:, :2], x[:, :2]).any()
    edges = [*alone.topology.connections, Connection("a", "b", fn="copy", weight=3.0)]
    both = randomised(alone.layout, CanvasTopology(edges))(x)
    # query 1 copies nothing beside its window; those behind it copy nothing at all
    assert torch.equal(both[:, 2:9], torch.zeros(1, 7, D_MODEL, dtype=torch.float64))
    torch.testing.assert_close(both[:, 1], out[:, 1] / 4, rtol=1e-6, atol=1e-6)


@settings(max_examples=40)
@given(canvas=canvases(50, pairs=False, fns=("narrow", "random_fixed", "random_fixed", "copy", None)))
def test_the_dense_form_of_a_plan_has_the_pairs_that_are_left(canvas):
    layout, topology = canvas
    dispatcher = randomised(layout, topology)
    plan = dispatcher.plan
    expected = torch.zeros(layout.num_positions, layout.num_positions, dtype=torch.float64)
    for read in oracle.reads(layout, topology):
        (keys,), queries = set(read.keys.values()), sorted(read.keys)
        keys, seen = sorted(keys), torch.ones(len(queries), len(keys), dtype=torch.bool)
        if plan.fns[read.connection] == "narrow":
            seen = family_oracle.window(len(queries), len(keys), 2)
        elif plan.fns[read.connection] == "random_fixed":
            seed = dispatcher.fn_modules["random_fixed"].seed.item()
            rows = [family_oracle.draws(seed, i, len(keys)) for i in range(len(queries))]
            seen = torch.tensor([[j in row for j in range(len(keys))] for row in rows])
        block = torch.where(seen, read.weight, 0.0)
        for query, row in zip(queries, block):
            expected[query, keys] = torch.maximum(expected[query, keys], row.double())
    torch.testing.assert_close(torch.from_numpy(plan.to_dense()), expected, rtol=1e-6, atol=0)
    for fn in dispatcher.fn_modules:
        own = plan.for_fn(fn)
        assert (own.to_dense() <= plan.to_dense()).all()
    assert (pickle.loads(pickle.dumps(plan)).to_dense() == plan.to_dense()).all()


def test_density_and_the_dense_form_agree_where_reads_do_not_overlap():
    plan = line(30, 20, "local_attention").plan
    assert plan.density == (plan.to_dense() > 0).mean() < 0.1


def test_blocks_outside_of_the_band_are_never_listed():
    wide = line(512, 512, "local_attention")
    assert wide.plan.table.pairs == 512 * 9 - 2 * (1 + 2 + 3 + 4)
    found = wide.fn_modules["local_attention"].blocked(wide.plan)
    (group,) = found.groups
    assert group.blocks * group.rows * group.keys <= 3 * wide.plan.table.pairs
    assert wide.plan.rows_with_keys().sum() == 512 and wide.plan.density < 0.01


# -- fixed draws -------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(seed=st.integers(-(2**63), 2**63 - 1), m=st.integers(1, 40), count=st.integers(1, 12))
def test_draws_are_the_published_generator(seed, m, count):
    keys = draw_keys(seed, 5, m, min(count, m))
    assert [set(row) for row in keys.tolist()] == [family_oracle.draws(seed, i, m, count) for i in range(5)]
    assert all(len(set(row)) == min(count, m) for row in keys.tolist())


def test_draws_are_even():
    keys = draw_keys(7, 20_000, 16, 4)
    counts = torch.bincount(torch.from_numpy(keys.reshape(-1)), minlength=16)
    # 5,000 each, standard deviation 61
    assert (counts - 5000).abs().max() < 300


def test_a_reload_draws_the_same_keys():
    # published: another pattern with every call, and nothing saved
    first, second = line(20, 30, "random_fixed"), line(20, 30, "random_fixed")
    assert "fn_modules.random_fixed.seed" in first.state_dict()
    second.fn_modules["random_fixed"].seed += 1
    x = torch.randn(1, 60, D_MODEL, dtype=torch.float64)
    out = first(x)
    assert torch.equal(first(x), out) and not torch.isclose(second(x), out).all()
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    second.load_state_dict(torch.load(saved, weights_only=True))
    assert torch.equal(second(x), out) and torch.equal(copy.deepcopy(first)(x), out)
    third = line(20, 30, "random_fixed")
    third.load_state_dict(second.state_dict())
    torch._dynamo.reset()
    compiled = torch.compile(third, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out, oracle_step(second, x), rtol=1e-6, atol=1e-6)


def test_a_checkpoint_without_a_seed_leaves_the_modules_own():
    module = RandomFixedAttention(8, n_heads=2, seed=5)
    published = {name: tensor for name, tensor in RandomFixedAttention(8, n_heads=2).state_dict().items()}
    del published["seed"]
    module.load_state_dict(published)
    assert module.seed.item() == 5 and torch.equal(module.q_proj.weight, published["q_proj.weight"])
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "q_proj.bias"'):
        module.load_state_dict({name: t for name, t in published.items() if name != "q_proj.bias"})


def test_the_seed_comes_from_torchs_generator_and_may_be_given():
    torch.manual_seed(3)
    first, second = RandomFixedAttention(8), RandomFixedAttention(8)
    torch.manual_seed(3)
    assert torch.equal(RandomFixedAttention(8).seed, first.seed) and not torch.equal(second.seed, first.seed)
    assert create_attention("random_fixed", 8, n_random=3, seed=-5).seed.item() == -5


def test_layers_with_other_seeds_share_a_plan_without_mixing():
    plan = compile_attention(
        CanvasLayout(T=1, H=1, W=30, d_model=8, regions={"a": (0, 1, 0, 1, 0, 30)}), CanvasTopology.dense(["a"])
    )
    one, other = (RandomFixedAttention(8, seed=seed) for seed in (1, 2))
    assert one.with_pattern(plan) is one.with_pattern(plan) and one.with_pattern(plan) is not other.with_pattern(plan)
    assert one.with_pattern(plan).table.key != other.with_pattern(plan).table.key


def test_constructor_arguments_are_checked():
    assert create_attention("local_attention", 8, window_size=4).window_size == 4
    assert create_attention("local_attention", 8).window_size is None
    assert create_attention("random_fixed", 8).n_random == 8
    assert LocalAttention(8, window_size=[1, np.int64(3), 5]).window_size == (1, 3, 5)
    for wrong in ((3,), (1, -1), (1, 2.5), ("a", "b"), True, "8", 2.0):
        with pytest.raises(ValueError, match="window_size"):
            LocalAttention(8, window_size=wrong)
    with pytest.raises(ValueError, match="window_size must be at least 0, got -1"):
        create_attention("local_attention", 8, window_size=-1)
    with pytest.raises(ValueError, match="n_random must be at least 1, got 0"):
        create_attention("random_fixed", 8, n_random=0)
    with pytest.raises(ValueError, match="n_heads 3 must divide d_model 8"):
        create_attention("linear_attention", 8, n_heads=3)
