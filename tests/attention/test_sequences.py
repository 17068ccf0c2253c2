"""perceiver, sparse_attention, mixture, mamba, rwkv and hyena: values and gradients against the oracle, and edges."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from canvas_engineering import AttentionDispatcher, CanvasLayout, CanvasTopology, Connection, MaskSpec, create_attention
from canvas_engineering.attention import scan, top_k
from canvas_engineering.attention.hyena import average_to
from canvas_engineering.attention.scan import decayed_sums, selective_scan
from tests import dispatchers, family_oracle, oracle
from tests.strategies import canvases

D_MODEL, HEADS = 8, 2
FNS = ("perceiver", "sparse_attention", "mixture", "mamba", "rwkv", "hyena")
# constructor arguments that small sizes need, and those among them that the oracle cannot tell from a shape
OPTIONS = {
    "perceiver": {"n_latents": 3},
    "sparse_attention": {"top_k": 3},
    "mixture": {"n_experts": 3},
    "mamba": {"state_size": 3},
    "rwkv": {},
    "hyena": {"max_len": 12},
}
CONTEXT = {"sparse_attention": {"top_k": 3}}


def randomised(fn, d_model=D_MODEL, seed=0, std=0.5, **options):
    torch.manual_seed(seed)
    module = create_attention(fn, d_model, HEADS, **{**OPTIONS[fn], **options})
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module.double()


def tensors(module):
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def gradients(out, leaves, upstream):
    found = torch.autograd.grad(out, leaves, upstream, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves)]


def agrees(fn, n, m, batch=2, seed=0, module=None, **context):
    """One read against the oracle: the output, and the gradients of queries, keys and parameters."""
    module = randomised(fn, seed=seed) if module is None else module
    x_q = torch.randn(batch, n, D_MODEL, dtype=torch.float64, requires_grad=True)
    x_k = torch.randn(batch, m, D_MODEL, dtype=torch.float64, requires_grad=True)
    out = module(x_q, x_k, x_k)
    expected = family_oracle.oracle(fn, tensors(module), x_q, x_k, HEADS, **(context or CONTEXT.get(fn, {})))
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-10)
    leaves, upstream = [x_q, x_k, *module.parameters()], torch.randn_like(out)
    for a, b in zip(gradients(out, leaves, upstream), gradients(expected, leaves, upstream)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@settings(max_examples=25)
@given(n=st.integers(1, 40), m=st.integers(1, 40), batch=st.integers(1, 3), seed=st.integers(0, 2**16))
@pytest.mark.parametrize("fn", FNS)
def test_a_read_is_the_oracle(fn, n, m, batch, seed):
    agrees(fn, n, m, batch, seed)


@pytest.mark.parametrize("fn", FNS)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (5, 1), (1, 70), (70, 200), (130, 64)])
def test_odd_and_long_reads_are_the_oracle(fn, n, m):
    agrees(fn, n, m)


@pytest.mark.parametrize("fn", FNS)
def test_float32_is_within_its_rounding(fn):
    torch.manual_seed(0)
    module = create_attention(fn, D_MODEL, HEADS, **OPTIONS[fn]).double()
    x_q, x_k = (torch.randn(1, size, D_MODEL, dtype=torch.float64, requires_grad=True) for size in (300, 600))
    expected = family_oracle.oracle(fn, tensors(module), x_q, x_k, HEADS, **CONTEXT.get(fn, {}))
    upstream = torch.randn_like(expected)
    names = ["queries", "keys", *dict(module.named_parameters())]
    wanted = dict(zip(names, gradients(expected, [x_q, x_k, *module.parameters()], upstream)), out=expected.detach())
    module.float()
    x_q, x_k = (x.detach().float().requires_grad_() for x in (x_q, x_k))
    out = module(x_q, x_k, x_k)
    leaves = [x_q, x_k, *module.parameters()]
    found = dict(zip(names, gradients(out, leaves, upstream.float())), out=out.detach())
    # Where rows of a memory are nearly alike, gradients through their choice cancel to nothing, and are held to what
    # they are made of. A key bias shifts every score of a row alike: it is held to its weight's gradient.
    least = 1e-3 * max(value.abs().max() for value in wanted.values())
    for name, value in wanted.items():
        scale = wanted[name.replace("k_proj.bias", "k_proj.weight")].abs().max().clamp_min(least)
        assert (found[name].double() - value).abs().max() <= 1e-5 * scale, name


# -- names ------------------------------------------------------------------------------------------------------------


def _linears(*names):
    return {f"{name}.{part}" for name in names for part in ("weight", "bias")}


QKVO = ("q_proj", "k_proj", "v_proj", "out_proj")


def test_state_dicts_have_the_published_names_and_shapes():
    names = {
        "perceiver": {"latents"} | _linears(*(f"{part}.{p}" for part in ("compress", "readout") for p in QKVO)),
        "sparse_attention": _linears(*QKVO),
        "mixture": _linears("router", *(f"experts.{e}.{p}" for e in range(4) for p in QKVO)),
        "mamba": {"A_log", "D"} | _linears("in_proj", "x_proj", "dt_proj", "norm", "out_proj"),
        "rwkv": {"decay", "bonus"} | _linears("r_proj", "k_proj", "v_proj", "out_proj"),
        "hyena": {"filter_params.0", "filter_params.1"} | _linears("in_proj", "gates.0", "gates.1", "out_proj"),
    }
    states = {fn: create_attention(fn, 32, 4).state_dict() for fn in FNS}
    assert {fn: set(state) for fn, state in states.items()} == names
    shapes = {
        ("perceiver", "latents"): (1, 8, 32),
        ("mixture", "router.weight"): (4, 32),
        ("mamba", "A_log"): (32, 16),
        ("mamba", "D"): (32,),
        ("mamba", "x_proj.weight"): (2 + 32, 32),
        ("mamba", "dt_proj.weight"): (32, 2),
        ("rwkv", "decay"): (4, 8),
        ("rwkv", "bonus"): (4, 8),
        ("hyena", "filter_params.1"): (32, 2049, 2),
        ("hyena", "in_proj.weight"): (96, 32),
    }
    assert {key: tuple(states[key[0]][key[1]].shape) for key in shapes} == shapes
    module = create_attention("mamba", 32)
    assert "A_log" in dict(module.named_buffers()) and torch.equal(module.D, torch.ones(32))
    torch.testing.assert_close(module.A_log, torch.arange(1.0, 17).log().expand(32, -1))


def test_constructor_arguments_are_the_published_ones():
    assert create_attention("perceiver", 8, 2, n_latents=5).latents.shape == (1, 5, 8)
    assert len(create_attention("mixture", 8, 2, n_experts=3, top_k_experts=1).experts) == 3
    module = create_attention("mamba", 8, state_size=5, dt_rank=3)
    assert module.A_log.shape == (8, 5) and module.dt_proj.weight.shape == (8, 3)
    module = create_attention("hyena", 8, order=3, max_len=10)
    assert [tuple(f.shape) for f in module.filter_params] == [(8, 6, 2)] * 3 and len(module.gates) == 3


@pytest.mark.parametrize(
    ("fn", "options", "message"),
    [
        ("perceiver", {"n_latents": 0}, "n_latents must be at least 1, got 0"),
        ("sparse_attention", {"top_k": 0}, "top_k must be at least 1, got 0"),
        ("mixture", {"top_k_experts": 5}, r"top_k_experts must lie in \[1, n_experts = 4\], got 5"),
        ("mamba", {"state_size": 0}, "state_size must be at least 1, got 0"),
        ("rwkv", {"n_heads": 3}, "n_heads 3 must divide d_model 8"),
        ("hyena", {"order": 0}, "order must be at least 1, got 0"),
        ("mamba", {"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ("hyena", {"dropout": -0.5}, r"dropout must lie in \[0, 1\), got -0.5"),
    ],
)
def test_what_cannot_be_built_is_named(fn, options, message):
    with pytest.raises(ValueError, match=message):
        create_attention(fn, 8, **options)


# -- sparse_attention -------------------------------------------------------------------------------------------------


def test_ties_at_the_threshold_stay():
    module = create_attention("sparse_attention", 4, 1, top_k=2)
    for proj in (module.q_proj, module.k_proj, module.v_proj, module.out_proj):
        nn.init.eye_(proj.weight)
        nn.init.zeros_(proj.bias)
    keys = torch.tensor([[[2.0, 1, 0, 0], [1.0, 0, 1, 0], [1.0, 0, 0, 1], [0.0, 0, 0, 9]]])
    out = module(torch.tensor([[[2.0, 0, 0, 0]]]), keys, keys)
    weights = torch.tensor([2.0, 1.0, 1.0]).softmax(0)  # logits 2, 1, 1 | 0: the third ties with the second
    torch.testing.assert_close(out[0, 0], (weights[:, None] * keys[0, :3]).sum(0))


@pytest.mark.parametrize("m", [20, 100, 300])
def test_many_queries_go_in_parts_and_give_the_same(m, monkeypatch):
    monkeypatch.setattr(top_k, "MAX_LOGITS", 100)
    agrees("sparse_attention", 30, m)


@pytest.mark.parametrize("copies", [2, 4, 30])
def test_a_few_ties_and_many_among_long_keys(copies, monkeypatch):
    module = randomised("sparse_attention")
    x_q = torch.randn(1, 6, D_MODEL, dtype=torch.float64, requires_grad=True)
    x_k = torch.randn(1, 10, D_MODEL, dtype=torch.float64).repeat(1, copies, 1).requires_grad_()
    gathered = []
    whole = top_k.gathered_attention
    monkeypatch.setattr(top_k, "gathered_attention", lambda *a: gathered.append(a[3].shape[-1]) or whole(*a))
    out = module(x_q, x_k, x_k)
    assert gathered == ([4] if copies == 4 else [])  # 20 keys are masked, 40 gathered with a tie, 300 tie too often
    expected = family_oracle.oracle("sparse_attention", tensors(module), x_q, x_k, HEADS, top_k=3)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-10)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), (x_q, x_k)) for y in (out, expected))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@settings(max_examples=40)
@given(m=st.integers(1, 700), count=st.integers(1, 4), whole=st.booleans())
def test_the_largest_values_are_topks(m, count, whole):
    x = torch.randint(0, 50, (3, m)).double() if whole else torch.randn(3, m)
    values, place = top_k.largest(x, min(count, m))
    assert torch.equal(values, x.topk(min(count, m)).values) and torch.equal(x.gather(-1, place), values)
    assert all(len(set(row)) == len(row) for row in place.tolist())


# -- mixture ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 7, 8, 11])
def test_chunks_of_every_length_are_the_oracles(m):
    agrees("mixture", 9, m, module=randomised("mixture", n_experts=4))


def test_equal_router_logits_take_the_earlier_experts():
    module = randomised("mixture", n_experts=4)
    nn.init.zeros_(module.router.weight)
    nn.init.zeros_(module.router.bias)
    agrees("mixture", 5, 8, module=module)
    x = torch.randn(1, 8, D_MODEL, dtype=torch.float64)
    first, second = (module.experts[e](x, x[:, 2 * e : 2 * e + 2], x[:, 2 * e : 2 * e + 2]) for e in (0, 1))
    torch.testing.assert_close(module(x, x, x), (first + second) / 2)


def test_queries_that_all_want_one_expert_are_the_oracles():
    module = randomised("mixture", n_experts=4, top_k_experts=1)
    module.router.bias.data.copy_(torch.tensor([0.0, 0.0, 100.0, 0.0]))
    agrees("mixture", 6, 10, module=module, top_k_experts=1)


def test_only_routed_experts_get_gradients():
    module = randomised("mixture", n_experts=4)
    nn.init.zeros_(module.router.weight)
    module.router.bias.data.copy_(torch.tensor([0.0, 3.0, -1.0, 2.0]))
    x = torch.randn(1, 12, D_MODEL, dtype=torch.float64)
    module(x, x, x).sum().backward()
    assert [bool(e.q_proj.weight.grad.any()) for e in module.experts] == [False, True, False, True]


# -- along the keys ---------------------------------------------------------------------------------------------------


def test_the_scan_keeps_states_at_chunk_starts_only():
    length, width, states = 1024, 4, 8
    dt, x = (torch.rand(1, length, width, requires_grad=True) for _ in range(2))
    b, c = (torch.randn(1, length, states, requires_grad=True) for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        selective_scan(dt, x, b, c, -torch.ones(width, states))
    given, rate, chunk = 2 * length * (width + states), width * states, 64
    assert given <= sum(t.numel() for t in kept) <= given + rate + length * width * states // chunk


def test_the_scan_is_a_proper_operator():
    dt, x = (torch.rand(2, 9, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    b, c = (torch.randn(2, 9, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    rate = -torch.rand(3, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *t: selective_scan(*t, rate), (dt, x, b, c))
    checks = torch.library.opcheck(torch.ops.canvas_engineering.selective_scan.default, (dt, x, b, c, rate, True))
    assert set(checks.values()) == {"SUCCESS"}
    with pytest.raises(ValueError, match=r"rate \(width, states\); got .*x \(2, 8, 3\) torch.float64"):
        selective_scan(dt, x[:, :8], b, c, rate)
    with pytest.raises(ValueError, match=r"one dtype.*b \(2, 9, 2\) torch.float32"):
        selective_scan(dt, x, b.float(), c, rate)
    with pytest.raises(ValueError, match="rate is a constant"):
        selective_scan(dt, x, b, c, rate.requires_grad_())


@pytest.mark.parametrize("fn", ["mamba", "rwkv"])
def test_short_wide_sequences_go_in_one_chunk(fn, monkeypatch):
    monkeypatch.setattr(scan, "WIDE", 1)
    assert [scan.chunk_length(length, 1) for length in (1, 10, 64, 65)] == [1, 10, 64, 16]
    for m in (1, 10, 64):
        agrees(fn, 12, m)


def test_autocast_leaves_the_scans_alone():
    dt, x = (torch.rand(1, 40, 3, requires_grad=True) for _ in range(2))
    b, c = (torch.randn(1, 40, 2, requires_grad=True) for _ in range(2))
    rate, log_keep = -torch.rand(3, 2), -torch.rand(3, requires_grad=True)

    def run():
        y, sums = selective_scan(dt, x, b, c, rate), decayed_sums(x, log_keep)
        return [y, sums, *torch.autograd.grad(y.square().sum() + sums.square().sum(), (dt, x, b, c, log_keep))]

    expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(run(), expected))


def test_extreme_decays_stay_finite_and_right():
    length = 3000
    x = torch.randn(1, length, D_MODEL) * 30
    for fn, extreme in (("mamba", {"dt_proj.bias": 80.0}), ("mamba", {"dt_proj.bias": -80.0})):
        module = create_attention(fn, D_MODEL)
        for name, value in extreme.items():
            nn.init.constant_(module.get_parameter(name), value)
        finite(module, x / 30)
    for decay, bonus in ((90.0, 90.0), (-90.0, -90.0), (90.0, -90.0), (-90.0, 90.0)):
        module = create_attention("rwkv", D_MODEL)
        nn.init.constant_(module.decay, decay)
        nn.init.constant_(module.bonus, bonus)
        finite(module, x)
    # nothing is forgotten: plain averages of the values so far, the bonus as good as none
    module = create_attention("rwkv", D_MODEL)
    nn.init.constant_(module.decay, -90.0)
    nn.init.zeros_(module.bonus)
    nn.init.zeros_(module.k_proj.weight)
    nn.init.zeros_(module.k_proj.bias)
    y = module.summarise(module.key_features(x, x))
    expected = module.v_proj(x).double().cumsum(1) / (torch.arange(1, length + 1)[:, None] + 1e-6)
    assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()


def finite(module, x):
    x = x.clone().requires_grad_()
    out = module(x[:, :64], x, x)
    out.mean().backward()
    for tensor in (out, x.grad, *(p.grad for p in module.parameters())):
        assert torch.isfinite(tensor).all()


@settings(max_examples=20)
@given(length=st.integers(1, 2200), keep=st.floats(0.0, 1.0))
def test_decayed_sums_are_the_recurrence(length, keep):
    x = torch.randn(1, length, 2, dtype=torch.float64)
    expected, total = torch.empty_like(x), torch.zeros(2, dtype=torch.float64)
    for t in range(length):
        expected[0, t] = total
        total = total * keep + x[0, t]
    log_keep = torch.full((2,), math.log(keep) if keep else -1e9, dtype=torch.float64)
    torch.testing.assert_close(decayed_sums(x, log_keep), expected, rtol=1e-9, atol=1e-9)


def test_a_slow_decay_is_not_rounded_away():
    x, log_keep = torch.randn(1, 8192, 4), torch.tensor([-1e-3, -1e-4, -1e-5, -1e-6])
    expected = decayed_sums(x.double(), log_keep.double())
    # 7e-5 where each step multiplies by exp(log_keep) in float32
    assert (decayed_sums(x, log_keep) - expected).abs().max() <= 3e-6 * expected.abs().max()


@pytest.mark.parametrize("max_len", [2, 3, 7, 8, 12, 16])
@pytest.mark.parametrize("n", [1, 2, 9, 17, 40])
def test_spectra_beyond_max_len_are_interpolated(max_len, n):
    agrees("hyena", n, n, module=randomised("hyena", max_len=max_len))


def test_hyena_runs_beyond_4096():
    # published: a crash
    module = create_attention("hyena", 4, 1).eval()
    x = torch.randn(1, 4500, 4, requires_grad=True)
    out = module(x, x, x)
    out.sum().backward()
    assert out.shape == x.shape and torch.isfinite(out).all() and torch.isfinite(x.grad).all()
    assert all(bool(f.grad.any()) for f in module.filter_params)


@settings(max_examples=40)
@given(m=st.integers(1, 30), n=st.integers(1, 30))
def test_averages_are_means_of_their_windows(m, n):
    x = torch.randn(2, m, 3, dtype=torch.float64)
    expected = torch.stack([x[:, i * m // n : -(-(i + 1) * m // n)].mean(1) for i in range(n)], 1)
    torch.testing.assert_close(average_to(x, n), expected, rtol=1e-12, atol=1e-12)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: average_to(x, n), x, fast_mode=True)


def test_queries_beyond_the_keys_take_the_last_row():
    module = randomised("rwkv")
    x = torch.randn(1, 9, D_MODEL, dtype=torch.float64)
    same = x[:, :1].expand(-1, 9, -1)
    out = module(same, x[:, :4], x[:, :4])
    assert torch.equal(out[:, 4:], out[:, 3:4].expand(-1, 5, -1)) and not torch.allclose(out[:, 2], out[:, 3])


# -- training, dispatchers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fn", ["perceiver", "sparse_attention", "mixture", "mamba"])
def test_dropout_acts_in_training_only(fn):
    module, plain = randomised(fn, dropout=0.5), randomised(fn)
    x = torch.randn(1, 20, D_MODEL, dtype=torch.float64)
    assert not torch.equal(module(x, x, x), module(x, x, x))
    assert torch.equal(module.eval()(x, x, x), plain(x, x, x))


def mixed(fns=FNS):
    regions = {"a": (0, 3, 0, 2, 0, 2), "b": (0, 3, 2, 3, 0, 3), "c": (1, 2, 0, 1, 3, 4)}
    layout = CanvasLayout(T=3, H=3, W=4, d_model=D_MODEL, regions=regions)
    edges = CanvasTopology.causal_temporal(list(regions)).connections
    edges = [dataclasses.replace(c, fn=fns[i % len(fns)]) for i, c in enumerate(edges)]
    return layout, CanvasTopology([*edges, *(Connection("b", "a", fn=fn, write_mode="gate") for fn in fns)])


@settings(max_examples=40)
@given(
    canvas=canvases(60, pairs=False, write_modes=("add", "replace", "gate"), fns=(*FNS, *FNS, None)),
    choose=st.booleans(),
    batch=st.integers(1, 2),
)
def test_every_function_runs_with_all_modes_fills_and_masks(canvas, choose, batch):
    layout, topology = canvas
    dispatcher = dispatchers.randomised(layout, topology)
    x = torch.randn(batch, layout.num_positions, D_MODEL, dtype=torch.float64, requires_grad=True)
    names = sorted(layout.regions)[:1] if choose else None
    active = None if names is None else [c.src in names for c in topology.connections]
    expected = family_oracle.step(
        topology,
        oracle.reads(layout, topology),
        dispatcher.plan.fns,
        {fn: tensors(module) for fn, module in dispatcher.fn_modules.items()},
        x,
        HEADS,
        gates=dispatcher.edge_gates,
        active=active,
    )
    out = dispatcher(x, names)
    # weights and row scales are float32
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    leaves, upstream = [x, *dispatcher.parameters()], torch.randn_like(x)
    found = gradients(out, leaves, upstream) if out.requires_grad else [torch.zeros_like(leaf) for leaf in leaves]
    for a, b in zip(found, gradients(expected, leaves, upstream)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@settings(max_examples=30)
@given(canvas=canvases(60, write_modes=("add", "replace", "gate"), fns=("sparse_attention", None)))
def test_top_k_takes_masks_of_pairs(canvas):
    layout, topology = canvas
    dispatcher = dispatchers.randomised(layout, topology)
    x = torch.randn(1, layout.num_positions, D_MODEL, dtype=torch.float64, requires_grad=True)
    # it serves each query by itself: a read of many is as many reads of one
    reads = [
        oracle.Read(read.connection, read.weight, {query: keys})
        for read in oracle.reads(layout, topology)
        for query, keys in read.keys.items()
    ]
    states = {fn: tensors(module) for fn, module in dispatcher.fn_modules.items()}
    gates = dispatcher.edge_gates
    expected = family_oracle.step(topology, reads, dispatcher.plan.fns, states, x, HEADS, gates=gates)
    out, upstream = dispatcher(x), torch.randn_like(x)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    if out.requires_grad:
        for a, b in zip(gradients(out, [x], upstream), gradients(expected, [x], upstream)):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fn", ["perceiver", "mixture", "mamba", "rwkv", "hyena"])
def test_masks_of_pairs_are_refused_where_a_read_is_one_thing(fn):
    layout = CanvasLayout(T=1, H=1, W=4, d_model=D_MODEL, regions={"a": (0, 1, 0, 1, 0, 2), "b": (0, 1, 0, 1, 2, 4)})
    mask = MaskSpec("sparse", pattern=((True, False), (False, True)))
    with pytest.raises(ValueError, match=f"connection 0, 'a' attends to 'b' by '{fn}'.*pairs.*such as cross_attention"):
        dispatchers.randomised(layout, CanvasTopology([Connection("a", "b", fn=fn, mask=mask)]))


@pytest.mark.parametrize("fn", FNS)
def test_kernels_that_there_are_not_are_asked_for_in_vain(fn):
    layout = CanvasLayout(T=1, H=1, W=4, d_model=D_MODEL, regions={"a": (0, 1, 0, 1, 0, 4)})
    topology = CanvasTopology([Connection("a", "a", fn=fn)])
    with pytest.raises(ValueError, match=f"backend 'triton' does not run '{fn}': use auto, torch, reference"):
        AttentionDispatcher(topology, layout, D_MODEL, n_heads=HEADS, backend="triton")


@pytest.mark.parametrize("fn", ["perceiver", "sparse_attention", "mamba", "rwkv"])
def test_memories_are_made_once_for_each_set_of_keys(fn, monkeypatch):
    spokes = {f"s{i}": (0, 1, 0, 1, i, i + 1) for i in range(6)}
    regions = {**spokes, "pair": (0, 1, 0, 1, 6, 8), "hub": (0, 1, 0, 1, 8, 16)}
    layout = CanvasLayout(T=1, H=1, W=16, d_model=D_MODEL, regions=regions)
    dispatcher = dispatchers.randomised(
        layout, CanvasTopology([Connection(name, "hub", fn=fn) for name in regions if name != "hub"])
    )
    (module,) = dispatcher.fn_modules.values()
    summarise, shapes = type(module).summarise, []
    noting = lambda self, f, *rest: shapes.append(tuple(f.shape[:2])) or summarise(self, f, *rest)  # noqa: E731
    monkeypatch.setattr(type(module), "summarise", noting)
    x = torch.randn(3, 16, D_MODEL, dtype=torch.float64)
    out = dispatcher(x)
    # the average that the last of two queries takes needs two keys
    assert shapes == [(3, 2 if fn == "rwkv" else 8)]
    hub = x[:, 8:]
    torch.testing.assert_close(out[:, 6:8], module(x[:, 6:8], hub, hub), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out[:, 3:4], module(x[:, 3:4], hub, hub), rtol=1e-6, atol=1e-6)
    assert torch.equal(out[:, 8:], hub)


def test_a_mixed_step_compiles_whole_and_gives_the_same_numbers():
    layout, topology = mixed()
    dispatcher = dispatchers.randomised(layout, CanvasTopology(topology.connections[-len(FNS) :]))
    assert set(dispatcher.fn_modules) == set(FNS)
    x = torch.randn(2, layout.num_positions, D_MODEL, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(dispatcher, fullgraph=True, backend="aot_eager")
    out, expected = compiled(x), dispatcher(x)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    leaves, upstream = [x, *dispatcher.parameters()], torch.randn_like(x)
    for a, b in zip(gradients(out, leaves, upstream), gradients(expected, leaves, upstream)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_backward_gives_the_same_bits_and_autocast_stays_close():
    layout, topology = mixed()
    dispatcher = dispatchers.randomised(layout, topology).float()
    x = torch.randn(2, layout.num_positions, D_MODEL, requires_grad=True)
    leaves, upstream = [x, *dispatcher.parameters()], torch.randn_like(x)
    once, again = (gradients(dispatcher(x), leaves, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = dispatcher(x)
        found = gradients(low, leaves, upstream)
    assert low.dtype == torch.float32 and all(torch.isfinite(g).all() for g in found)
    error = (low - dispatcher(x)).abs().max() / dispatcher(x).abs().max()
    assert 0 < error < 0.1


def test_a_dispatcher_saves_and_loads_what_the_functions_hold():
    layout, topology = mixed()
    saved = dispatchers.randomised(layout, topology, 1)
    assert {"fn_modules.mamba.A_log", "fn_modules.mixture.experts.3.q_proj.weight"} <= set(saved.state_dict())
    loaded = dispatchers.randomised(layout, topology, 2)
    x = torch.randn(1, layout.num_positions, D_MODEL, dtype=torch.float64)
    assert not torch.equal(loaded(x), saved(x))
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(loaded(x), saved(x))


@pytest.mark.parametrize("length", [1, 7, 30, 500])
@pytest.mark.parametrize("steps", [0.1, 3.0, 60.0])
def test_gradients_of_the_scan_are_right_in_float32_whatever_its_steps(length, steps):
    """Where states decay at once, gradients of dt are differences of much larger numbers, unless states are kept."""
    generator = torch.Generator().manual_seed(length)

    def draw(*shape):
        return torch.randn(2, length, *shape, generator=generator, dtype=torch.float64)

    inputs, upstream = [steps * draw(5).abs(), draw(5), draw(4), draw(4)], draw(5)
    rate = -torch.arange(1.0, 5.0, dtype=torch.float64).expand(5, 4).contiguous()

    def loop(dt, x, b, c, rate):
        state, out = dt.new_zeros(2, 5, 4), []
        for t in range(length):
            state = torch.exp(rate * dt[:, t, :, None]) * state + x[:, t, :, None] * b[:, t, None]
            out.append((state * c[:, t, None]).sum(-1))
        return torch.stack(out, 1)

    def gradients(function, dtype):
        own = [x.to(dtype).requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*own, rate.to(dtype)), own, upstream.to(dtype))

    expected = gradients(loop, torch.float64)
    for dtype, budget in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        for found, wanted in zip(gradients(selective_scan, dtype), expected):
            assert (found.double() - wanted).abs().max() <= budget * wanted.abs().max()


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("length", [6, 300])
def test_decayed_sums_keep_what_is_small_beside_what_decays(length, backwards):
    """A large entry that decays at once leaves those after it as they are, to float32's last digits."""
    log_keep = torch.tensor([-20.0, -3.0, -0.8, -0.6, -1e-4])
    x = torch.randn(2, length, 5, generator=torch.Generator().manual_seed(0))
    x[:, ::7] *= 1e6
    given = x.flip(1) if backwards else x
    found = scan.chunked_sums(given, log_keep, backwards, False)
    found = found.flip(1) if backwards else found
    keep, total = log_keep.double().exp(), torch.zeros(2, 5, dtype=torch.float64)
    largest = total.clone()
    for t in range(length):
        # relative to what takes part in each sum
        assert ((found[:, t].double() - total).abs() <= 3e-6 * largest).all()
        total = keep * total + x[:, t]
        largest = keep * largest + x[:, t].abs()
