"""benchmarks/contestants.py: those that need a GPU compute what they say, by stand-ins that check what the packages'
documentation asks for and compute it plainly; and ours, masks and block tables are what they should be."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks import cases, contestants, measure
from benchmarks.problem import Problem
from canvas_engineering import CanvasLayout, CanvasTopology, Connection

RESULTS = ("out", "dq", "dk", "dv")


def ragged(weight: float):
    """37 positions, several of which read nothing; "b" is no run in canvas order."""

    def declare():
        regions = {"a": (0, 1, 0, 18), "b": (0, 1, 18, 30), "c": (0, 1, 24, 33)}
        connections = [
            Connection("a", "a"),
            Connection("a", "c", weight=weight),
            Connection("b", "a"),
            Connection("b", "c"),
        ]
        return CanvasLayout(T=1, d_model=8, spatial_shape=(37,), regions=regions), CanvasTopology(connections)

    return declare


def striped():
    """Two regions beside each other: their rows alternate in canvas order, and are runs in packed order."""
    regions = {"left": (0, 2, 0, 5, 0, 3), "right": (0, 2, 0, 5, 3, 7)}
    connections = [Connection("left", "right"), Connection("left", "left", t_src=0, t_dst=0)]
    return CanvasLayout(T=2, d_model=8, spatial_shape=(5, 7), regions=regions), CanvasTopology(connections)


WEIGHTED = Problem(cases.Case("weighted", ragged(0.5), heads=2, head_dim=8, batch=2))
EQUAL = Problem(cases.Case("equal", ragged(1.0), heads=2, head_dim=8, batch=2))
STRIPED = Problem(cases.Case("striped", striped, heads=2, head_dim=8, batch=2))


def agrees(problem: Problem, form: str, attend, trains: bool = True) -> None:
    """Output and gradients of all entries and heads are the exact ones."""
    tensors = problem.inputs("cpu", torch.float32)
    exact = problem.exact(form, tensors, np.arange(problem.tokens))
    packed = isinstance(attend, contestants.Packed)
    own = [attend.pack(x) for x in tensors] if packed else tensors
    leaves = [x.detach().requires_grad_() for x in own[:3]]
    found = [attend(*leaves)]
    assert found[0].shape == tensors[0].shape
    if trains:
        found += torch.autograd.grad(found[0], leaves, own[3])
    for name, value in zip(RESULTS, found):
        value = attend.unpack(value.detach()) if packed else value.detach()
        torch.testing.assert_close(value.double(), exact[name], rtol=0, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def installed(monkeypatch, name: str, **functions) -> None:
    """A stand-in for a package."""
    module = types.ModuleType(name)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)


# -- ours --------------------------------------------------------------------------------------------------------------


def test_on_gpus_the_torch_backend_is_a_contestant_of_its_own(monkeypatch):
    backends = []

    def attention(q, k, v, plan, backend):
        backends.append((plan.normalize, backend))
        return q

    monkeypatch.setattr(contestants, "canvas_attention", attention)
    own = [c for c in contestants.of("cuda") if c.name.startswith("ours")]
    assert [(c.form, c.name) for c in own] == [
        ("joint", "ours"),
        ("joint", "ours_torch"),
        ("edge", "ours"),
        ("edge", "ours_torch"),
    ]
    for contestant in own:
        contestant.build(EQUAL, "cpu", torch.float32)(*EQUAL.inputs("cpu", torch.float32)[:3])
    assert backends == [("joint", "auto"), ("joint", "torch"), ("edge", "auto"), ("edge", "torch")]
    for device, backend, same in (("cpu", "auto", True), ("cpu", "triton", False), ("cuda", "torch", True)):
        ours_torch = next(c for c in contestants.of(device, backend) if c.name == "ours_torch")
        if same:
            with pytest.raises(contestants.Unavailable, match="ours runs the torch backend here"):
                ours_torch.build(EQUAL, "cpu", torch.float32)
        else:
            assert ours_torch.build(EQUAL, "cpu", torch.float32)


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("flex_flash", "flash_attn.cute"),
        ("xformers", "xformers"),
        ("flashinfer", "flashinfer"),
        ("flashinfer_packed", "flashinfer"),
        ("varlen", "torch.nn.attention.varlen"),
    ],
)
def test_a_package_that_is_missing_is_a_reason(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    found = next(c for c in contestants.of("cuda") if c.name == name)
    with pytest.raises(contestants.Unavailable, match=f"cannot import {package}"):
        found.build(STRIPED, "cpu", torch.float32)


# -- dense masks -------------------------------------------------------------------------------------------------------


@pytest.fixture
def masks(monkeypatch) -> list[torch.Tensor | None]:
    """The mask of each call of dense attention, as it is made."""
    found, real = [], F.scaled_dot_product_attention

    def attention(q, k, v, attn_mask):
        found.append(attn_mask)
        return real(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    return found


def test_a_dense_mask_has_aligned_rows_and_clears_those_that_read_nothing(masks):
    agrees(WEIGHTED, "joint", contestants.sdpa_mask(WEIGHTED, "cpu", torch.float32))
    assert masks[0].shape == (37, 37) and masks[0].stride() == (40, 1)


def test_a_mask_of_used_tokens_gathers_them(masks):
    used = np.unique(np.concatenate([tokens for read in WEIGHTED.reads for tokens in read[:2]]))
    assert 0 < len(used) < WEIGHTED.tokens
    agrees(WEIGHTED, "joint", contestants.sdpa_mask_used(WEIGHTED, "cpu", torch.float32))
    assert masks[0].shape == (len(used), len(used))
    # three regions that read each other, beside empty positions: no mask is left
    robot = Problem(cases.Case("robot", cases.robot))
    agrees(robot, "joint", contestants.sdpa_mask_used(robot, "cpu", torch.float32))
    assert masks[-1] is None
    with pytest.raises(contestants.Unavailable, match="every token reads or is read"):
        contestants.sdpa_mask_used(STRIPED, "cpu", torch.float32)


def test_xformers_gets_a_bias_that_it_takes(monkeypatch):
    """As documented: (B, n, H, D), a bias (B, H, n, n) whose strides are multiples of eight, but for the last, 1."""

    def memory_efficient_attention(q, k, v, attn_bias):
        (batch, n, heads, _), strides = q.shape, attn_bias.stride()
        assert attn_bias.shape == (batch, heads, n, n) and strides[3] == 1
        assert all(stride % 8 == 0 for stride in strides[:3])
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + attn_bias
        return (scores.softmax(-1) @ v).transpose(1, 2)

    installed(monkeypatch, "xformers.ops", memory_efficient_attention=memory_efficient_attention)
    agrees(WEIGHTED, "joint", contestants.xformers(WEIGHTED, "cpu", torch.float32))


def test_a_mask_may_take_three_quarters_of_what_is_free(monkeypatch):
    for free, fits in ((4 << 30, True), ((4 << 30) - 4, False)):
        monkeypatch.setattr(measure, "free_bytes", lambda free=free: free)
        if fits:
            contestants._fits(3 << 30, "cpu")
        else:
            why = "a mask of 3.0 GiB, more than the 3.0 GiB that are three quarters of what is free here"
            with pytest.raises(contestants.Unavailable, match=f"^{why}$"):
                contestants._fits(3 << 30, "cpu")
    contestants._fits(16 << 30, "cuda")
    with pytest.raises(contestants.Unavailable, match=r"^block tables of 17.0 GiB, more than the 16.0 GiB that are al"):
        contestants._fits(17 << 30, "cuda", "block tables")


# -- FlexAttention -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "kinds"), [(512, 1), (1000, 7), (1024, 300), (100, 3)])
def test_block_tables_are_create_block_mask_s(n, kinds):
    from torch.nn.attention.flex_attention import create_block_mask

    generator = torch.Generator().manual_seed(n)
    of = torch.randint(kinds, (n,), generator=generator, dtype=torch.int32).sort().values
    allowed = torch.rand(kinds, kinds, generator=generator) < (1 if kinds == 1 else 0.6)
    wanted = create_block_mask(lambda b, h, q, k: allowed[of[q], of[k]], None, None, n, n, device="cpu")
    found = contestants.block_mask(of, allowed)
    assert found.seq_lengths == wanted.seq_lengths == (n, n) and found.BLOCK_SIZE == wanted.BLOCK_SIZE
    for side in ("kv", "full_kv", "q", "full_q"):
        for name in (f"{side}_num_blocks", f"{side}_indices"):
            assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    assert found.mask_mod(0, 0, torch.tensor(5), torch.tensor(9)) == allowed[of[5], of[9]]


def test_flex_attention_holds_tables_of_blocks_and_no_n_squared_pairs(monkeypatch):
    asked = []

    def fits(needed, device, what):
        asked.append((needed, what))
        raise contestants.Unavailable

    monkeypatch.setattr(contestants, "_fits", fits)
    for device in ("cpu", "cuda"):
        with pytest.raises(contestants.Unavailable):
            contestants.flex(Problem(cases.Case("long", cases.multi_rate)), device, torch.float32)
    assert asked == [(40 * 12**2, "block tables")] * 2
    assert contestants.GPU_BYTES > 40 * (2**20 // 128) ** 2  # a million tokens run


def test_flex_attention_is_compiled_once_for_all_cases_of_a_gpu(monkeypatch):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter, usual = CompileCounterWithBackend("eager"), contestants.compiled_flex
    # a GPU's calls, on this device
    monkeypatch.setattr(contestants, "compiled_flex", lambda dynamic: usual(True, counter))
    for case in (cases.DISPATCH[0], cases.DISPATCH[1]):
        problem = Problem(case)
        *inputs, _ = problem.inputs("cpu", torch.float32)
        with torch.no_grad():
            contestants.flex(problem, "cpu", torch.float32)(*inputs)
    assert problem.weighted is False and counter.frame_count == 1


# -- FlashInfer --------------------------------------------------------------------------------------------------------


class BlockSparse:
    """As documented: a map of blocks per key head, tensors (heads, n, head_dim)."""

    blocks = 0

    def __init__(self, floats):
        assert floats.dtype == torch.uint8

    def reset_workspace_buffer(self, floats, integers):
        assert floats.dtype == integers.dtype == torch.uint8 and integers.numel() == 64 << 20

    def plan(self, block_mask_map, block_row_sz, block_col_sz, num_qo_heads, num_kv_heads, head_dim, q_data_type):
        heads, rows, columns = block_mask_map.shape
        assert heads == num_kv_heads == num_qo_heads and block_mask_map.dtype == torch.bool
        assert block_row_sz.shape == (heads, rows) and block_col_sz.shape == (heads, columns)
        assert block_row_sz.dtype == block_col_sz.dtype == torch.int32
        type(self).blocks = rows
        self.mask = torch.stack(
            [
                blocks.repeat_interleave(row.long(), 0).repeat_interleave(column.long(), 1)
                for blocks, row, column in zip(block_mask_map, block_row_sz, block_col_sz)
            ]
        )

    def run(self, q, k, v):
        assert q.shape[:2] == self.mask.shape[:2] and all(x.is_contiguous() for x in (q, k, v))
        scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~self.mask, -torch.inf)
        return scores.softmax(-1).nan_to_num(0.0) @ v


def test_flashinfer_gets_a_batch_as_heads_in_both_orders(monkeypatch):
    installed(monkeypatch, "flashinfer.sparse", VariableBlockSparseAttentionWrapper=BlockSparse)
    for problem in (EQUAL, STRIPED):
        attend = contestants.flashinfer(problem, "cpu", torch.float32)
        agrees(problem, "joint", attend, trains=False)
    assert all(attend.pack(x).is_contiguous() for x in STRIPED.inputs("cpu", torch.float32))  # no call copies them
    in_canvas_order = BlockSparse.blocks
    agrees(STRIPED, "joint", contestants.flashinfer_packed(STRIPED, "cpu", torch.float32), trains=False)
    assert BlockSparse.blocks == 3 < in_canvas_order == 20
    with pytest.raises(contestants.Unavailable, match="take no weights"):
        contestants.flashinfer(WEIGHTED, "cpu", torch.float32)
    monkeypatch.setattr(measure, "free_bytes", lambda: 5000)
    with pytest.raises(contestants.Unavailable, match=r"an index of keys of .* GiB, more than"):
        contestants.flashinfer(EQUAL, "cpu", torch.float32)


# -- variable lengths --------------------------------------------------------------------------------------------------


def test_all_of_a_batch_is_one_call_of_variable_lengths(monkeypatch):
    calls = []

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k):
        calls.append(len(cu_seq_q) - 1)
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and cu_seq_q[0] == cu_seq_k[0] == 0
        assert query.shape == (cu_seq_q[-1], 2, 8) and key.shape == value.shape == (cu_seq_k[-1], 2, 8)
        assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
        parts = [x.split(at.diff().tolist()) for x, at in ((query, cu_seq_q), (key, cu_seq_k), (value, cu_seq_k))]
        out = [
            F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in rows)).transpose(0, 1) for rows in zip(*parts)
        ]
        return torch.cat(out)

    installed(monkeypatch, "torch.nn.attention.varlen", varlen_attn=varlen_attn)
    agrees(WEIGHTED, "edge", contestants.varlen(WEIGHTED, "cpu", torch.float32))
    assert calls == [2 * len(WEIGHTED.reads)]


# -- reads grouped by hand ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "length", "step"),
    [
        ([0, 3, 6], 3, 3),
        ([1, 6], 4, 5),
        ([0, 2, 4], 5, 2),
        ([4, 4], 3, 0),
        ([2], 3, 3),
        ([6, 3], 2, None),
        ([0, 2, 5], 2, None),
    ],
)
def test_ranges_at_equal_distances_are_views(first, length, step):
    places = contestants.Places.of([torch.arange(a, a + length) for a in first])
    assert places.step == step
    x = torch.randn(2, 3, 12, 4, generator=torch.Generator().manual_seed(0))
    taken = places.take(x).unflatten(0, (2, -1))
    for number, a in enumerate(first):
        assert torch.equal(taken[:, number], x[:, :, a : a + length])
    if step is not None:
        one = places.take(x[:1])
        assert one.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    part = torch.randn(2, 3, len(first) * length, 4, generator=torch.Generator().manual_seed(1))
    expected = torch.zeros_like(x)
    for number, a in enumerate(first):
        expected[:, :, a : a + length] += part[:, :, number * length : (number + 1) * length]
    assert torch.allclose(places.put(None, part, x), expected, atol=1e-6)


def test_scattered_places_are_gathered():
    places = contestants.Places.of([torch.tensor([0, 2]), torch.tensor([1, 3])])
    x = torch.arange(4.0).view(1, 1, 4, 1)
    assert places.step is None and places.take(x).flatten().tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize("problem", [EQUAL, WEIGHTED, STRIPED], ids=lambda problem: problem.case.name)
def test_reads_by_hand_are_exact(problem):
    try:
        agrees(problem, "edge", contestants.grouped(problem, "cpu", torch.float32))
    except contestants.Unavailable as why:
        assert "no two reads" in str(why) and problem is not STRIPED


def test_a_video_by_hand_is_two_calls_on_views(monkeypatch):
    problem = Problem(next(case for case in cases.CPU if case.name == "video_1024"))
    calls = []

    def spied(q, k, v):
        calls.append((tuple(q.shape), q._is_view()))
        return F.scaled_dot_product_attention(q, k, v)

    attend = contestants.grouped(problem, "cpu", torch.float32)
    monkeypatch.setattr(contestants, "F", types.SimpleNamespace(scaled_dot_product_attention=spied))
    attend(*problem.inputs("cpu", torch.float32)[:3])
    assert calls == [((4, 1, 256, 64), True), ((3, 1, 256, 64), True)]
