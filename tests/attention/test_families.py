"""Every fused attention function: one read against its equations, and mixed in a dispatcher against sums over reads."""

from __future__ import annotations

import functools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile

from canvas_engineering import (
    ATTENTION_REGISTRY,
    ATTENTION_TYPES,
    AttentionDispatcher,
    CanvasLayout,
    CanvasTopology,
    Connection,
    MaskSpec,
    RegionSpec,
    TemporalFill,
    create_attention,
)
from canvas_kernels.torch_ops import grouping
from tests import dispatchers, family_oracle, oracle
from tests.strategies import canvases

D_MODEL, HEADS = 12, 3
randomised = functools.partial(dispatchers.randomised, d_model=D_MODEL, n_heads=HEADS)
TABLES = ("cross_attention", "self_attention", "cogvideox", "cosine_attention", "sigmoid_attention", "gated")
CHOSEN = ("local_attention", "random_fixed")
SUMS = ("linear_attention", "pooling", "pooling_attention", "copy")
FNS = TABLES + SUMS + CHOSEN


def randomise(module):
    """Parameters of N(0, 0.5²), in float64; what starts elsewhere than around 0 stays around there."""
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, mean=3.0 if name.endswith("temperature") else 0.0, std=0.5)
    return module.double()


def state(module):
    """Tensors by name, differentiable."""
    return {**dict(module.named_buffers()), **dict(module.named_parameters())}


def same(got, expected, leaves, tolerance):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    grad = torch.randn_like(expected)
    found = torch.autograd.grad(got, leaves, grad, allow_unused=True) if got.requires_grad else [None] * len(leaves)
    wanted = [None] * len(leaves)
    if expected.requires_grad:
        wanted = torch.autograd.grad(expected, leaves, grad, allow_unused=True)
    for a, b in zip(found, wanted):
        a, b = (torch.zeros((), dtype=torch.float64) if g is None else g for g in (a, b))
        torch.testing.assert_close(*torch.broadcast_tensors(a, b), rtol=10 * tolerance, atol=10 * tolerance)


# -- one read ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 7), (7, 3), (1, 1), (9, 9), (40, 2)])
@pytest.mark.parametrize("fn", FNS)
def test_one_read_is_the_equation(fn, shape):
    torch.manual_seed(0)
    module = randomise(create_attention(fn, D_MODEL, HEADS))
    x_q, x_k = (torch.randn(2, rows, D_MODEL, dtype=torch.float64, requires_grad=True) for rows in shape)
    expected = family_oracle.oracle(fn, state(module), x_q, x_k, HEADS)
    same(module(x_q, x_k, x_k), expected, [x_q, x_k, *module.parameters()], 1e-11)


QKVO = {f"{name}_proj.{part}" for name in ("q", "k", "v", "out") for part in ("weight", "bias")}
NAMES = {
    "cross_attention": QKVO,
    "self_attention": QKVO,
    "cogvideox": QKVO,
    "cosine_attention": QKVO | {"temperature"},
    "gated": {f"cross_attn.{name}" for name in QKVO} | {"gate"},
    "linear_attention": QKVO,
    "sigmoid_attention": QKVO,
    "pooling": {"proj.weight", "proj.bias"},
    "pooling_attention": {"proj.weight", "proj.bias"},
    "copy": set(),
    "local_attention": QKVO,
    "random_fixed": QKVO | {"seed"},
    "none": set(),
}


@pytest.mark.parametrize("fn", NAMES)
def test_state_dicts_have_the_published_names(fn):
    module = create_attention(fn, 8, n_heads=2, dropout=0.1)
    assert set(module.state_dict()) == NAMES[fn]


def test_published_values_at_the_start():
    assert create_attention("cosine_attention", 8).temperature.item() == 10.0
    assert create_attention("cosine_attention", 8).temperature.shape == ()
    assert create_attention("gated", 8).gate.tolist() == [0.0]
    zeros = create_attention("none", 8)(torch.ones(2, 3, 8), torch.ones(2, 4, 8), torch.ones(2, 4, 8))
    assert torch.equal(zeros, torch.zeros(2, 3, 8))


def test_lengths_of_16_bit_vectors_neither_overflow_nor_vanish():
    module = create_attention("cosine_attention", 8, n_heads=2).half()
    with torch.no_grad():
        for size in (3e-4, 1e3):
            q, k = module.logit_factors(*(torch.full((1, 2, 3, 4), size, dtype=torch.float16) for _ in range(2)))
            torch.testing.assert_close((q * k).sum(-1), torch.full((1, 2, 3), 10.0).half(), rtol=2e-3, atol=0)


# -- dispatchers -------------------------------------------------------------------------------------------------------


def check_step(canvas, choose, batch, **options):
    layout, topology = canvas
    dispatcher = randomised(layout, topology, **options)
    x = torch.randn(batch, layout.num_positions, D_MODEL, dtype=torch.float64, requires_grad=True)
    names = sorted(layout.regions)[:1] if choose else None
    active = None if names is None else [c.src in names for c in topology.connections]
    # weights and row scales are float32
    same(dispatcher(x, names), dispatchers.oracle_step(dispatcher, x, active), [x, *dispatcher.parameters()], 1e-6)


MODES = ("add", "replace", "gate")


@settings(max_examples=12)
@given(data=st.data(), choose=st.booleans(), batch=st.integers(1, 2))
@pytest.mark.parametrize("fn", [fn for fn in FNS if fn not in ("self_attention", "cogvideox", "pooling_attention")])
def test_reads_of_one_function_are_the_oracle(fn, data, choose, batch):
    check_step(data.draw(canvases(60, pairs=False, write_modes=MODES, fns=(fn,))), choose, batch)


@settings(max_examples=40)
@given(canvas=canvases(60, pairs=False, write_modes=MODES, fns=(*FNS, None, "none")), choose=st.booleans())
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_functions_mix_freely(backend, canvas, choose):
    check_step(canvas, choose, 1, backend=backend)


EVERY = (*ATTENTION_TYPES, "self_attention", "pooling_attention")


@settings(max_examples=40)
@given(canvas=canvases(48, pairs=False, write_modes=MODES, fns=EVERY), choose=st.booleans())
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_all_functions_mix_freely(backend, canvas, choose):
    check_step(canvas, choose, 1, backend=backend)


OFFSETS = [{}, {"t_src": 0, "t_dst": 0}, {"t_src": 0, "t_dst": -1}, {"t_src": 1}, {"t_dst": -1}]


def with_every_function(seed):
    """One edge of each function between three regions of other rates, with its own mode, offsets, fill and mask."""
    rng = random.Random(seed)
    regions = {
        "a": RegionSpec((0, 3, 0, 1, 0, 2)),
        "b": RegionSpec((0, 2, 1, 2, 0, 3), period=3),
        "c": RegionSpec((1, 3, 0, 2, 1, 3), period=2),  # shares positions with both
    }
    layout = CanvasLayout(T=3, spatial_shape=(2, 3), d_model=D_MODEL, regions=regions)
    fns = list(EVERY)
    rng.shuffle(fns)
    connections = []
    for fn in fns:
        src, fill, mask = rng.choice("abc"), rng.choice(list(TemporalFill)), None
        # frames that every fill finds, so that no function is left without a read
        dst = rng.choice({TemporalFill.DROP: "a", TemporalFill.HOLD: "ab", TemporalFill.INTERPOLATE: "abc"}[fill])
        if rng.random() < 0.3:
            mask = MaskSpec("tile", tile_shape=(1, rng.randint(1, 2)))
        connections.append(
            Connection(
                src, dst, fn=fn, weight=rng.choice([0.5, 1.0, 3.0]), mask=mask,
                **rng.choice(OFFSETS),
                temporal_fill=fill, interpolation_order=rng.randint(0, 3),
                write_mode=rng.choice(["add", "add", "gate", "replace"] if src == "c" else ["add", "gate"]),
            )
        )  # fmt: skip
    return layout, CanvasTopology(connections)


@pytest.mark.parametrize("active", [None, ["a", "c"]])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_all_functions_at_once(backend, seed, active):
    layout, topology = with_every_function(seed)
    dispatcher = randomised(layout, topology, backend=backend)
    assert set(dispatcher.fn_modules) == set(EVERY) - {"none"}
    x = torch.randn(2, layout.num_positions, D_MODEL, dtype=torch.float64, requires_grad=True)
    runs = None if active is None else [c.src in active for c in topology.connections]
    same(dispatcher(x, active), dispatchers.oracle_step(dispatcher, x, runs), [x, *dispatcher.parameters()], 1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_all_functions_at_once_with_kernels_where_there_are_any(monkeypatch, seed):
    """As on a GPU, where "auto" takes Triton for what has kernels; and for windows too."""
    pytest.importorskip("triton")
    layout, topology = with_every_function(seed)
    dispatcher = randomised(layout, topology)
    for parameter in dispatcher.fn_modules["mamba"].parameters():
        nn.init.normal_(parameter, std=0.2)  # of larger ones its states grow beyond what float32 tells apart
    x = torch.randn(1, layout.num_positions, D_MODEL, dtype=torch.float64, requires_grad=True)
    active = None if seed else [c.src != "b" for c in topology.connections]
    expected, grad = dispatchers.oracle_step(dispatcher, x, active), torch.randn_like(x)
    leaves = dict(dispatcher.named_parameters())
    wanted = torch.autograd.grad(expected, [x, *leaves.values()], grad, allow_unused=True, materialize_grads=True)
    by_kernels = []
    for fn, module in dispatcher.float().fn_modules.items():
        if "triton" in getattr(module, "backends", ()):
            by_kernels.append(fn)
            attend = functools.partial(type(module).attend, module)
            monkeypatch.setattr(
                module, "attend", lambda *a, attend=attend, **k: attend(*a, **{**k, "backend": "triton"})
            )
    assert set(by_kernels) == {*TABLES, *CHOSEN}
    low = x.detach().float().requires_grad_()
    out = dispatcher(low, None if seed else ["a", "c"])
    found = torch.autograd.grad(out, [low, *leaves.values()], grad.float(), allow_unused=True, materialize_grads=True)
    assert ((out - expected).abs().max() / expected.abs().max()).item() < 2e-5
    # Gradients that cancel to almost nothing are held to the scale of the others; a key bias, which shifts every score
    # of a row alike, to that of its weight.
    sizes = {name: b.abs().max().item() for name, b in zip(["x", *leaves], wanted)}
    least = 1e-2 * max(sizes.values())
    for name, a, b in zip(["x", *leaves], found, wanted):
        scale = max(sizes[name.replace("k_proj.bias", "k_proj.weight")], least)
        assert (a - b).abs().max().item() < 1e-4 * scale, name


def test_every_type_is_registered():
    assert set(EVERY) <= set(ATTENTION_REGISTRY) and set(EVERY) - {"none"} == set(family_oracle.FUNCTIONS)
    assert len(ATTENTION_TYPES) == 17


@settings(max_examples=15)
@given(canvas=canvases(40, pairs=True, write_modes=MODES, fns=TABLES))
def test_masks_of_pairs_suit_functions_that_weigh_pairs(canvas):
    layout, topology = canvas
    dispatcher = randomised(layout, topology)
    x = torch.randn(1, layout.num_positions, D_MODEL, dtype=torch.float64)
    total, weight = torch.zeros_like(x), torch.zeros(x.shape[1], dtype=torch.float64)
    reads = oracle.reads(layout, topology)
    modes = [c.write_mode for c in topology.connections]
    gated = [i for i, mode in enumerate(modes) if mode == "gate"]
    replaced = {q for read in reads if modes[read.connection] == "replace" for q in read.keys}
    for read in reads:
        fn = dispatcher.plan.fns[read.connection]
        share = read.weight
        if read.connection in gated:
            share = share * torch.sigmoid(dispatcher.edge_gates[gated.index(read.connection)])
        for query, keys in read.keys.items():
            if modes[read.connection] == "replace" or query not in replaced:
                one = family_oracle.oracle(fn, state(dispatcher.fn_modules[fn]), x[:, [query]], x[:, list(keys)], HEADS)
                total = total.index_add(1, torch.tensor([query]), share * one)
                weight[query] += read.weight
    expected = torch.where(weight[:, None] > 0, total / weight.clamp_min(1e-300)[:, None], x)
    torch.testing.assert_close(dispatcher(x), expected, rtol=1e-6, atol=1e-6)


def two_regions(*connections, width=4):
    regions = {"a": (0, 2, 0, 1, 0, width), "b": (0, 2, 1, 2, 0, width)}
    layout = CanvasLayout(T=2, H=2, W=width, d_model=D_MODEL, regions=regions)
    return layout, CanvasTopology(list(connections))


@pytest.mark.parametrize("fn", SUMS + CHOSEN)
def test_a_mask_of_pairs_is_refused_where_keys_are_summed(fn):
    pairs = MaskSpec("sparse", pattern=tuple(tuple(i == j for j in range(8)) for i in range(8)))
    with pytest.raises(ValueError, match=rf"connection 0, 'a' attends to 'b' by '{fn}'.*such as cross_attention"):
        randomised(*two_regions(Connection("a", "b", fn=fn, mask=pairs)))


@pytest.mark.parametrize("fn", SUMS)
def test_a_named_backend_without_kernels_is_refused(fn):
    with pytest.raises(ValueError, match=f"backend 'triton' does not run '{fn}': use auto, torch, reference"):
        randomised(*two_regions(Connection("a", "b", fn=fn)), backend="triton")


def test_a_step_compiles_whole_and_backward_repeats_its_bits():
    torch._dynamo.reset()
    distinct = [fn for fn in FNS if fn not in ("self_attention", "cogvideox", "pooling_attention")]
    edges = [Connection("a", "ab"[i % 2], fn=fn, t_src=0, t_dst=0, write_mode="gate") for i, fn in enumerate(distinct)]
    dispatcher = randomised(*two_regions(*edges))
    x = torch.randn(2, 16, D_MODEL, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(dispatcher, fullgraph=True, backend="aot_eager")
    leaves = [x, *dispatcher.parameters()]
    runs = [torch.autograd.grad(run(x).square().sum(), leaves) for run in (compiled, dispatcher, dispatcher)]
    for a, b, c in zip(*runs):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
        assert torch.equal(b, c)


@pytest.mark.parametrize("fn", FNS)
def test_float32_is_within_1e_5(fn):
    edges = [Connection("a", "b", fn=fn), Connection("a", "a", fn=fn, write_mode="gate", weight=0.5)]
    dispatcher = randomised(*two_regions(*edges, width=32))
    x = torch.randn(2, 128, D_MODEL, dtype=torch.float64, requires_grad=True)
    expected, grad = dispatchers.oracle_step(dispatcher, x), torch.randn_like(x)
    wanted = torch.autograd.grad(expected, [x, dispatcher.edge_gates], grad)
    low = x.detach().float().requires_grad_()
    out = dispatcher.float()(low)
    found = torch.autograd.grad(out, [low, dispatcher.edge_gates], grad.float())
    for a, b in zip((out, *found), (expected, *wanted)):
        assert ((a - b).abs().max() / b.abs().max()).item() < 1e-5


@pytest.mark.parametrize("fn", FNS)
def test_bfloat16_is_as_near_as_the_module_on_one_read(fn):
    dispatcher = randomised(*two_regions(Connection("a", "b", fn=fn), width=32))
    x = torch.randn(1, 128, D_MODEL, dtype=torch.float64)
    expected = dispatchers.oracle_step(dispatcher, x)
    dispatcher, low = dispatcher.bfloat16(), x.bfloat16()
    (module,) = dispatcher.fn_modules.values()
    out = dispatcher(low)
    assert out.dtype == torch.bfloat16
    queries = torch.cat([torch.arange(32), torch.arange(64, 96)])
    # a module knows no grid, and windows end with their frame
    reads = queries.chunk(2) if fn == "local_attention" else [queries]
    plain = torch.cat([module(low[:, rows], *[low[:, rows + 32]] * 2) for rows in reads], 1)
    scale = expected[:, queries].abs().max()
    errors = [((y.double() - expected[:, queries]).abs().max() / scale).item() for y in (out[:, queries], plain)]
    assert errors[0] <= 2 * errors[1] + 1e-9 and errors[1] < 0.05


@pytest.mark.parametrize("fn", (*TABLES, *CHOSEN))
def test_dropout_acts_on_probabilities_in_training_only(fn):
    layout, topology = two_regions(Connection("a", "b", fn=fn), width=16)
    x = torch.randn(1, 64, D_MODEL, dtype=torch.float64)
    for backend in ("torch", "reference"):
        dispatcher = randomised(layout, topology, dropout=0.5, backend=backend)
        (module,) = dispatcher.fn_modules.values()
        queries = x[:, :16]
        assert not torch.isclose(dispatcher(x), dispatcher(x)).all()
        assert not torch.isclose(module(queries, queries, queries), module(queries, queries, queries)).all()
        torch.testing.assert_close(dispatcher.eval()(x), dispatchers.oracle_step(dispatcher, x), rtol=1e-6, atol=1e-6)
        assert torch.equal(module(queries, queries, queries), module(queries, queries, queries))
    with pytest.raises(ValueError, match="backend 'triton' has no dropout: use 'torch' or 'auto'"):
        randomised(layout, topology, dropout=0.5, backend="triton").float()(x.float())


def test_functions_with_kernels_mix_on_triton():
    pytest.importorskip("triton")
    edges = [
        Connection("a", "ab"[i % 2], fn=fn, t_src=0, t_dst=-(i % 2), write_mode=("gate", "add")[i % 2])
        for i, fn in enumerate((*TABLES[2:], "local_attention"))
    ]
    edges += [Connection("b", "a", fn=fn, weight=0.5) for fn in ("local_attention", "gated")]
    edges.append(Connection("b", "a", fn="sigmoid_attention", t_src=1, t_dst=0, write_mode="replace"))
    dispatcher = randomised(*two_regions(*edges, width=3), backend="triton")
    x = torch.randn(1, 12, D_MODEL, dtype=torch.float64, requires_grad=True)
    flags = torch.tensor([1.0, 1.0])
    expected = dispatchers.oracle_step(dispatcher, x)
    names = [name for name, _ in dispatcher.named_parameters()]
    grad = torch.randn_like(x)
    wanted = torch.autograd.grad(expected, [x, *dispatcher.parameters()], grad)
    dispatcher, low = dispatcher.float(), x.detach().float().requires_grad_()
    out = dispatcher(low, flags)
    found = torch.autograd.grad(out, [low, *dispatcher.parameters()], grad.float())
    assert ((out - expected).abs().max() / expected.abs().max()).item() < 2e-5
    for name, a, b in zip(["x", *names], found, wanted):
        if not name.endswith("k_proj.bias") or "sigmoid" in name:  # a softmax does not see it: its gradient is rounding
            assert ((a - b).abs().max() / b.abs().max()).item() < 1e-4, name


# -- cost --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fn", sorted(set(EVERY) - {"none"}))
def test_the_number_of_calls_does_not_grow_with_edges(fn, monkeypatch):
    # whatever this machine's rates say of few and of many edges
    monkeypatch.setattr(grouping, "STRIDED_RANGES", 0)
    monkeypatch.setattr(grouping, "STRIDED_PAIRS", 1 << 60)
    counts = []
    for edges in (3, 40):
        regions = {f"r{i}": (0, 1, 4 * i, 4 * i + 4) for i in range(edges)}
        layout = CanvasLayout(T=1, spatial_shape=(4 * edges,), d_model=D_MODEL, regions=regions)
        connections = [Connection(a, b, fn=fn, write_mode="gate") for a, b in zip(regions, list(regions)[1:])]
        dispatcher = randomised(layout, CanvasTopology([*connections, Connection("r0", "r0", fn=fn)])).float()
        x = torch.randn(1, 4 * edges, D_MODEL, requires_grad=True)
        dispatcher(x).sum().backward()  # what is made once is made
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            dispatcher(x).sum().backward()
        # those inside of our own operators too
        counts.append({e.key: e.count for e in profiled.key_averages() if e.key.startswith("aten::")})
    assert counts[0] == counts[1]


def test_keys_that_many_reads_share_are_summed_once():
    from canvas_engineering.attention.base import shared_memories

    layout, topology = two_regions(Connection("a", "b", fn="linear_attention", t_src=0), Connection("b", "b"))
    dispatcher = randomised(layout, topology)
    memories = shared_memories(dispatcher.plan.for_fn("linear_attention"))
    (group,) = memories.groups
    assert (group.sets, group.m) == (1, 8) and [(part.sets, part.n) for part in group.parts] == [(2, 4)]


@pytest.mark.parametrize("batch", [1, 3])
def test_copies_between_regions_of_other_sizes(batch):
    regions = {"five": (0, 1, 0, 5), "three": (0, 1, 5, 8)}
    layout = CanvasLayout(T=1, spatial_shape=(8,), d_model=D_MODEL, regions=regions)
    x = torch.randn(batch, 8, D_MODEL)
    longer = AttentionDispatcher(CanvasTopology([Connection("five", "three", fn="copy")]), layout, D_MODEL)(x)
    assert torch.equal(longer[:, :3], x[:, 5:]) and torch.equal(longer[:, 5:], x[:, 5:])
    assert torch.equal(longer[:, 3:5], torch.zeros(batch, 2, D_MODEL))
    shorter = AttentionDispatcher(CanvasTopology([Connection("three", "five", fn="copy")]), layout, D_MODEL)(x)
    assert torch.equal(shorter, torch.cat([x[:, :5], x[:, :3]], 1))


def test_the_scan_of_mamba_runs_from_the_first_key_to_the_last():
    torch.manual_seed(0)
    module = ATTENTION_REGISTRY["mamba"](D_MODEL)
    keys = torch.randn(1, 6, D_MODEL)
    memory = module.summarise(module.key_features(keys, keys))
    for changed in range(6):
        other = keys.clone()
        other[:, changed] += 1.0
        moved = (module.summarise(module.key_features(other, other)) - memory).abs().amax((0, 2)) > 0
        assert moved.tolist() == [place >= changed for place in range(6)]


def test_the_temperature_of_cosines_is_one_number_that_sharpens():
    module = ATTENTION_REGISTRY["cosine_attention"](D_MODEL, n_heads=HEADS)
    nn.init.eye_(module.out_proj.weight), nn.init.zeros_(module.out_proj.bias)
    keys = torch.randn(1, 5, D_MODEL)
    assert module.temperature.shape == ()
    with torch.no_grad():
        module.temperature.zero_()
        even = module.v_proj(keys).mean(1, keepdim=True)
        torch.testing.assert_close(module(keys, keys, keys), even.expand_as(keys), rtol=1e-5, atol=1e-6)
        # keys that are their own queries are most similar to themselves
        nn.init.eye_(module.q_proj.weight), nn.init.zeros_(module.q_proj.bias)
        nn.init.eye_(module.k_proj.weight), nn.init.zeros_(module.k_proj.bias)
        own, errors = module.v_proj(keys), []
        for temperature in (10.0, 40.0, 1000.0):
            module.temperature.fill_(temperature)
            errors.append((module(keys, keys, keys) - own).abs().max().item())
        assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-3 * errors[0]


@pytest.mark.parametrize("fn", EVERY)
def test_a_function_alone_is_the_oracle(fn):
    """No other function of the dispatcher tells how many heads there are."""
    layout = CanvasLayout(T=2, spatial_shape=(3,), d_model=D_MODEL, regions={"a": (0, 2, 0, 3)})
    dispatcher = randomised(layout, CanvasTopology([Connection("a", "a", fn=fn)]))
    x = torch.randn(1, layout.num_positions, D_MODEL, dtype=torch.float64, requires_grad=True)
    same(dispatcher(x), dispatchers.oracle_step(dispatcher, x), [x, *dispatcher.parameters()], 1e-6)
