"""Windows and fixed draws: which keys each query sees, on every backend, and queries that see none."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from canvas_engineering import (
    ATTENTION_REGISTRY,
    AttentionDispatcher,
    CanvasLayout,
    CanvasTopology,
    Connection,
    LocalAttention,
    RandomFixedAttention,
    compile_attention,
    create_attention,
)
from canvas_engineering.attention.chosen import draw_keys
from tests import family_oracle, oracle
from tests.strategies import canvases

D_MODEL, HEADS = 8, 2


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


def randomised(layout, topology, **options):
    torch.manual_seed(1)
    dispatcher = AttentionDispatcher(topology, layout, D_MODEL, n_heads=HEADS, **options)
    for parameter in dispatcher.parameters():
        nn.init.normal_(parameter, std=0.5)
    return dispatcher.double()


def oracle_step(dispatcher, x, **options):
    return family_oracle.step(
        dispatcher.topology,
        oracle.reads(dispatcher.layout, dispatcher.topology),
        dispatcher.plan.fns,
        {fn: {**dict(m.named_buffers()), **dict(m.named_parameters())} for fn, m in dispatcher.fn_modules.items()},
        x,
        HEADS,
        gates=dispatcher.edge_gates,
        **options,
    )


def line(n, m, fn, backend="auto", t=1):
    """A region of n positions that reads one of m, in ``t`` frames."""
    regions = {"a": (0, t, 0, 1, 0, n), "b": (0, t, 1, 2, 0, m)}
    layout = CanvasLayout(T=t, H=2, W=max(n, m), d_model=D_MODEL, regions=regions)
    return randomised(layout, CanvasTopology([Connection("a", "b", fn=fn)]), backend=backend)


# -- windows -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(n=st.integers(1, 60), m=st.integers(1, 60), window_size=st.integers(0, 40))
def test_windows_are_the_definition_in_tables_and_in_blocks(n, m, window_size):
    module = LocalAttention(4, n_heads=1, window_size=window_size)
    expected = family_oracle.window(n, m, window_size)
    query, key = (torch.from_numpy(a) for a in module.pairs(n, m))
    seen = torch.zeros(n, m, dtype=torch.int64).index_put_((query, key), torch.ones_like(key), accumulate=True)
    assert torch.equal(seen, expected.long())
    blocks, seen = module.cut(n, m), torch.zeros(n, m, dtype=torch.int64)
    for queries, keys, pairs, counts in zip(blocks.query, blocks.key, blocks.seen, blocks.counts):
        for i, row, counted in zip(queries, pairs, counts):
            if counted:
                seen[i].index_add_(0, torch.from_numpy(keys[row]), torch.ones(int(row.sum()), dtype=torch.int64))
    assert torch.equal(seen, expected.long())


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@settings(max_examples=20)
@given(canvas=canvases(60, pairs=False, write_modes=("add", "replace", "gate"), fns=("narrow", "copy", None)))
def test_queries_without_keys_have_no_read(backend, canvas):
    layout, topology = canvas
    dispatcher = randomised(layout, topology, backend=backend)
    x = torch.randn(2, layout.num_positions, D_MODEL, dtype=torch.float64, requires_grad=True)
    out, expected = dispatcher(x), oracle_step(dispatcher, x)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    leaves, grad = [x, *dispatcher.parameters()], torch.randn_like(x)
    found = torch.autograd.grad(out, leaves, grad, allow_unused=True) if out.requires_grad else []
    for a, b in zip(found, torch.autograd.grad(expected, leaves, grad, allow_unused=True)):
        a, b = (torch.zeros((), dtype=torch.float64) if g is None else g for g in (a, b))
        torch.testing.assert_close(*torch.broadcast_tensors(a, b), rtol=1e-5, atol=1e-5)


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
        assert own is dispatcher._plans[fn] and (own.to_dense() <= plan.to_dense()).all()
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
    assert one.chosen(plan) is one.chosen(plan) and one.chosen(plan) is not other.chosen(plan)
    assert one.chosen(plan).table.key != other.chosen(plan).table.key


def test_constructor_arguments_are_checked():
    assert create_attention("local_attention", 8, window_size=4).window_size == 4
    assert create_attention("local_attention", 8).window_size == 8 and create_attention("random_fixed", 8).n_random == 8
    with pytest.raises(ValueError, match="window_size must be at least 0, got -1"):
        create_attention("local_attention", 8, window_size=-1)
    with pytest.raises(ValueError, match="n_random must be at least 1, got 0"):
        create_attention("random_fixed", 8, n_random=0)
    with pytest.raises(ValueError, match="n_heads 3 must divide d_model 8"):
        create_attention("linear_attention", 8, n_heads=3)
