"""Benchmarks: cases declare, providers compute the oracle's numbers, the gate sees wrong ones, rows are right."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import subprocess
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import bench, cases, measure, providers
from benchmarks.measure import Run, Settings
from benchmarks.problem import Problem
from canvas_engineering import (
    AttentionDispatcher,
    CanvasLayout,
    CanvasTopology,
    Connection,
    MaskSpec,
    RegionSpec,
    TemporalFill,
    compile_attention,
)
from examples.plain_attention import DenseMask, PerEdgeLoop
from tests import oracle

HEADS, DIM = 2, 8
RESULTS = ("out", "dq", "dk", "dv")


def tangled():
    """Weights, fills, tiles, overlaps, a slow region, positions without keys; 72 positions."""
    regions = {
        "fast": (0, 6, 0, 2, 0, 3),
        "over": (1, 4, 1, 3, 1, 3),
        "slow": RegionSpec((0, 2, 2, 3, 0, 3), period=3),
        "mute": (0, 2, 3, 4, 2, 3),
    }
    connections = [
        Connection("fast", "fast", t_src=0, t_dst=0, weight=2.0),
        Connection("fast", "fast", t_src=0, t_dst=-1, mask=MaskSpec("tile", tile_h=1, tile_w=2)),
        Connection("fast", "slow", t_src=0, t_dst=0, temporal_fill=TemporalFill.INTERPOLATE),
        Connection("over", "slow", t_src=0, t_dst=0, temporal_fill=TemporalFill.HOLD, weight=0.5),
        Connection("slow", "over", mask=MaskSpec("tile", tile_shape=(2, 2))),
        Connection("slow", "slow"),
        Connection("over", "fast", weight=0.0),
    ]
    return CanvasLayout(T=6, d_model=16, spatial_shape=(4, 3), regions=regions), CanvasTopology(connections)


def ragged():
    """37 positions, several without keys; equal weights; "b" is no range in packed order."""
    regions = {"a": (0, 1, 0, 18), "b": (0, 1, 18, 30), "c": (0, 1, 24, 33)}
    connections = [Connection(src, dst) for src, dst in ("aa", "ac", "ba", "bc")]
    return CanvasLayout(T=1, d_model=8, spatial_shape=(37,), regions=regions), CanvasTopology(connections)


def striped():
    """Two regions beside each other: their rows alternate in canvas order, and are ranges in packed order."""
    regions = {"left": (0, 2, 0, 5, 0, 3), "right": (0, 2, 0, 5, 3, 7)}
    connections = [Connection("left", "right"), Connection("left", "left", t_src=0, t_dst=0)]
    return CanvasLayout(T=2, d_model=8, spatial_shape=(5, 7), regions=regions), CanvasTopology(connections)


SMALL = cases.Case("tangled", tangled, heads=HEADS, head_dim=DIM, batch=2)
PROBLEMS = [Problem(dataclasses.replace(SMALL, declare=declare)) for declare in (tangled, ragged, striped)]
QUICK = Settings(seconds=0.0, rounds=(1, 1), reference_tokens=16, only=("sdpa_mask", "per_edge_loop", "grouped"))


def quick(**changes) -> Settings:
    return dataclasses.replace(QUICK, environment={"commit": "abc"}, **changes)


def test_every_case_has_its_name_and_its_kind():
    for known in (cases.CPU, cases.GPU):
        assert len({case.name for case in known}) == len(known)
        for case in known:
            assert case.kind in bench.KINDS and case.about
            assert {*case.slow, *case.never} <= {*bench.PROVIDERS}


@pytest.mark.parametrize("case", [c for c in cases.CPU if c.kind == "attention"], ids=lambda case: case.name)
def test_every_canvas_declares_and_plans(case):
    layout, topology = case.declare()
    densities = [compile_attention(layout, topology, normalize=form).density for form in ("joint", "edge")]
    assert all(0 < density <= 1 for density in densities)
    assert case.group != "density" or math.isclose(densities[1], 1 / int(case.name.split("_")[1]))
    assert case.group != "length" or case.name == f"video_{layout.num_positions}"


def expected(form: str, declare, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Output and gradients (B, H, N, D) by the tests' oracle and autograd."""
    layout, topology = declare()
    q, k, v, upstream = (x.detach().double() for x in tensors)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    if form == "edge":
        out = oracle.edge_attention(*leaves, oracle.reads(layout, topology), DIM**-0.5)
    else:
        out = oracle.joint_attention(*leaves, torch.as_tensor(oracle.joint_matrix(layout, topology)), DIM**-0.5)
    return dict(zip(RESULTS, (out.detach(), *torch.autograd.grad(out, leaves, upstream))))


@pytest.mark.parametrize("form", ["joint", "edge"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.case.declare.__name__)
def test_exact_results_are_the_oracles(problem, form):
    tensors = problem.inputs("cpu", torch.float32)
    rows = np.arange(0, problem.tokens, 2)
    tensors[3] = torch.zeros_like(tensors[3]).index_copy(2, torch.from_numpy(rows), tensors[3][:, :, rows])
    exact = problem.exact(form, tensors, rows)
    for name, wanted in expected(form, problem.case.declare, tensors).items():
        wanted = wanted[:, :, rows] if name in ("out", "dq") else wanted
        torch.testing.assert_close(exact[name], wanted, rtol=0, atol=1e-12, msg=name)


def test_tokens_follow_the_regions_of_the_sequence():
    layout = CanvasLayout(T=2, d_model=8, spatial_shape=(3,), regions={"a": (0, 2, 0, 2), "b": (0, 1, 2, 3)})
    problem = Problem(cases.Case("two", lambda: (layout, CanvasTopology.dense(["a", "b"])), sequence=("b", "a")))
    assert problem.place.tolist() == [2, 0, 1, 3, 4] and problem.tokens == 5
    assert (problem.plan("joint").to_dense() == 1).all() and problem.plan("edge").density == 1


def test_a_long_sequence_is_sampled_with_every_kind_in_it():
    problem = Problem(cases.Case("video", lambda: cases.long_video(40, 24)))
    rows = problem.sample()
    assert len(rows) == 2**23 // problem.tokens == 364 and (np.diff(rows) > 0).all()
    assert set(problem.kinds[rows]) == set(problem.kinds)


@pytest.mark.parametrize("kind", [PerEdgeLoop, DenseMask])
def test_plain_modules_are_the_oracle(kind):
    layout, topology = tangled()
    torch.manual_seed(0)
    module = kind(topology, layout, 16, HEADS).double()
    x = torch.randn(2, layout.num_positions, 16, dtype=torch.float64)
    p = module.fn_modules["cross_attention"]
    q, k, v = (p.split(project(x)) for project in (p.q_proj, p.k_proj, p.v_proj))
    matrix = torch.as_tensor(oracle.joint_matrix(layout, topology))
    if kind is PerEdgeLoop:
        out = oracle.edge_attention(q, k, v, oracle.reads(layout, topology), DIM**-0.5)
    else:
        out = oracle.joint_attention(q, k, v, matrix, DIM**-0.5)
    covered = (matrix > 0).any(1)
    wanted = torch.where(covered[:, None], p.out_proj(out.transpose(1, 2).flatten(2)), x)
    torch.testing.assert_close(module(x), wanted, rtol=0, atol=1e-6)  # ln of the weights is kept in float32
    assert torch.equal(module(x)[:, ~covered], x[:, ~covered]) and 0 < covered.sum() < len(covered)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(module.float()(x.float()).double(), wanted, rtol=0, atol=0.05)


SPARSE = MaskSpec("sparse", pattern=(((True,) * 3,) * 2,) * 6)


@pytest.mark.parametrize(
    ("connection", "message"),
    [
        (Connection("fast", "slow", write_mode="replace"), "fast → slow: 'replace' writes are not done"),
        (Connection("fast", "fast", mask=SPARSE), "fast → fast: 'sparse' masks are not resolved here"),
    ],
)
def test_what_the_loop_cannot_do_is_named(connection, message):
    with pytest.raises(ValueError, match=message):
        PerEdgeLoop(CanvasTopology([connection]), tangled()[0], 16, HEADS)


def agrees(problem: Problem, form: str, attend) -> None:
    """Output and gradients of all entries and heads are the exact ones."""
    tensors = problem.inputs("cpu", torch.float32)
    exact = problem.exact(form, tensors, np.arange(problem.tokens))
    packed = isinstance(attend, providers.Packed)
    own = [attend.pack(x) for x in tensors] if packed else tensors
    leaves = [x.detach().requires_grad_() for x in own[:3]]
    results = [attend(*leaves)]
    results += torch.autograd.grad(results[0], leaves, own[3])
    for name, value in zip(RESULTS, results):
        value = attend.unpack(value.detach()) if packed else value.detach()
        torch.testing.assert_close(value.double(), exact[name], rtol=0, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("form", "name"), [who[:2] for who in providers.of() if not who[1].startswith(("fl", "varlen"))]
)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.case.declare.__name__)
def test_providers_on_a_cpu_are_exact(problem, form, name):
    (build,) = (build for *who, build in providers.of() if who == [form, name])
    try:
        attend = build(problem, "cpu", torch.float32)
    except measure.Unavailable as why:
        assert name in ("sdpa_mask_used", "grouped"), why
    else:
        agrees(problem, form, attend)


def test_flex_attention_agrees_in_both_orders():
    """Compiled, with weights and packed order: some seconds of a C++ compiler."""
    for row in next(bench.run([SMALL], quick(only=("flex", "flex_packed"))))[1:3]:
        if "failed" in row:
            pytest.skip(f"no compiled FlexAttention here: {row['failed'][:200]}")
        assert row["errors"].keys() == {"out"} and row["errors"]["out"] < 1e-5 and "step_seconds" not in row


def test_flex_attention_is_compiled_once_for_all_cases_of_a_gpu(monkeypatch):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter, usual = CompileCounterWithBackend("eager"), providers.compiled_flex
    monkeypatch.setattr(providers, "compiled_flex", lambda dynamic: usual(True, counter))  # a GPU's, on this device
    for problem in map(Problem, cases.DISPATCH[:2]):
        with torch.no_grad():
            providers.flex(problem, "cpu", torch.float32)(*problem.inputs("cpu", torch.float32)[:3])
    assert counter.frame_count == 1


@pytest.mark.parametrize(("n", "kinds"), [(512, 1), (1000, 7), (1024, 300), (100, 3)])
def test_block_tables_are_create_block_mask_s(n, kinds):
    from torch.nn.attention.flex_attention import create_block_mask

    generator = torch.Generator().manual_seed(n)
    of = torch.randint(kinds, (n,), generator=generator, dtype=torch.int32).sort().values
    allowed = torch.rand(kinds, kinds, generator=generator) < (1 if kinds == 1 else 0.6)
    wanted = create_block_mask(lambda b, h, q, k: allowed[of[q], of[k]], None, None, n, n, device="cpu")
    mask = providers.block_mask(of, allowed)
    for name in itertools.product(("kv", "full_kv", "q", "full_q"), ("num_blocks", "indices")):
        assert torch.equal(getattr(mask, "_".join(name)), getattr(wanted, "_".join(name))), name
    assert mask.seq_lengths == (n, n) and mask.mask_mod(0, 0, torch.tensor(5), torch.tensor(9)) == allowed[of[5], of[9]]


def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k):
    """As torch documents it: (tokens, heads, head_dim), and where each sequence starts."""
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    parts = [x.split(at.diff().tolist()) for x, at in ((query, cu_seq_q), (key, cu_seq_k), (value, cu_seq_k))]
    attend = torch.nn.functional.scaled_dot_product_attention
    return torch.cat([attend(*(x.transpose(0, 1) for x in rows)).transpose(0, 1) for rows in zip(*parts)])


def test_variable_lengths_are_exact_with_a_stand_in(monkeypatch):
    monkeypatch.setattr(providers, "package_on_gpu", lambda *_: SimpleNamespace(varlen_attn=varlen_attn))
    for problem in PROBLEMS:
        agrees(problem, "edge", providers.varlen(problem, "cpu", torch.float32))


def test_who_cannot_run_says_why(monkeypatch):
    rows = bench.run_case(SMALL, quick(only=("flex_flash", "varlen")))
    reasons = {(row["form"], row["provider"]): row["skipped"] for row in rows if "skipped" in row}
    assert reasons["joint", "flex_flash"] == reasons["edge", "varlen"] == "it needs a GPU"
    monkeypatch.setitem(providers.MASK_BYTES, "cpu", 100)
    with pytest.raises(measure.Unavailable, match=r"a mask of .* GiB, more than the .* GiB"):
        providers.sdpa_mask(PROBLEMS[0], "cpu", torch.float32)
    with pytest.raises(measure.Unavailable, match="no_such_package"):
        providers.package_on_gpu("no_such_package", "cuda")


@pytest.mark.parametrize(
    ("first", "length", "step"), [([0, 3, 6], 3, 3), ([4, 4], 3, 0), ([2], 3, 3), ([6, 3], 2, None)]
)
def test_ranges_at_equal_distances_are_views(first, length, step):
    ranges = providers.Ranges.of([torch.arange(a, a + length) for a in first])
    x = torch.randn(2, 3, 12, 4, generator=torch.Generator().manual_seed(0))
    rows = ranges.take(x).unflatten(0, (2, -1))
    assert ranges.step == step and all(torch.equal(rows[:, i], x[:, :, a : a + length]) for i, a in enumerate(first))
    assert step is None or ranges.take(x[:1]).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@pytest.fixture(scope="module")
def rows():
    return next(bench.run([SMALL], quick()))


def test_rows_hold_what_was_measured(rows):
    names = [(row["form"], row["provider"]) for row in rows]
    others = [("edge", "per_edge_loop"), ("edge", "grouped"), ("reference", "sdpa_unmasked")]
    assert names == [("joint", "ours"), ("joint", "sdpa_mask"), ("edge", "ours"), *others]
    for row in rows[:-1]:
        assert max(row["errors"].values()) < 1e-5 and row["errors"].keys() == {*RESULTS}
        assert row["rounds"] == 1 and row["tokens"] == 72 and row["commit"] == "abc"
        total = row["forward_seconds"]["p50"] + row["backward_seconds"]["p50"]
        assert math.isclose(row["step_seconds"]["p50"], total)
        assert math.isclose(row["step_tflops"], row["pairs"] * 14 * DIM * HEADS * 2 / total / 1e12)
        assert row["peak_bytes"] >= 4 * 4 * 2304  # the output and three gradients
    assert math.isclose(rows[0]["density"], float((oracle.joint_matrix(*tangled()) > 0).double().mean()))
    assert math.isclose(rows[1]["step_ratio"]["p50"], rows[1]["step_seconds"]["p50"] / rows[0]["step_seconds"]["p50"])
    assert rows[-1]["reference_tokens"] == 16 and rows[-1]["noise"] >= 0


def spoiled(monkeypatch, names: tuple[str, ...], change, **settings) -> list[dict]:
    """Rows of SMALL where ``change`` replaces the call of some providers."""
    everyone = providers.of()

    def build(original, problem, device, dtype):
        attend = original(problem, device, dtype)
        return lambda q, k, v: change(attend, q, k, v)

    chosen = [(form, name, lambda *a, b=b: build(b, *a)) for form, name, b in everyone if name in names]
    monkeypatch.setattr(providers, "of", lambda *args: chosen)
    return next(bench.run([SMALL], quick(**settings)))


@pytest.mark.parametrize("name", RESULTS)
def test_the_gate_sees_a_factor_of_one_result(name, monkeypatch):
    def change(attend, q, k, v):
        inputs = [x + 1e-4 * (x - x.detach()) if f"d{which}" == name else x for which, x in zip("qkv", (q, k, v))]
        out = attend(*inputs)
        return out + 1e-4 * out.detach() if name == "out" else out

    rows = spoiled(monkeypatch, ("ours", "sdpa_mask"), change)
    assert [row["provider"] for row in rows if "failed" in row] == ["ours", "sdpa_mask", "ours"]
    assert all("Wrong" in row["failed"] and f" {name}: error" in row["failed"] for row in rows[:-1])


def test_the_gate_sees_the_last_of_the_batch(monkeypatch):
    change = lambda attend, *qkv: torch.cat([attend(*qkv)[:-1], attend(*qkv)[-1:].roll(1, 2)])  # noqa: E731
    rows = spoiled(monkeypatch, ("ours",), change)
    assert ["Wrong" in row.get("failed", "") for row in rows[:-1]] == [True, True]


@pytest.mark.parametrize(("factor", "right"), [(1.0, True), (1.02, False)])
def test_the_gate_in_16_bits_sees_two_percent(factor, right, monkeypatch):
    change = lambda attend, *qkv: attend(*qkv) * factor  # noqa: E731
    *rows, _ = spoiled(monkeypatch, ("ours", "sdpa_mask", "grouped"), change, dtype=torch.bfloat16)
    assert ["failed" not in row for row in rows] == [right] * 4
    assert not right or all(2**-8 <= budget < 0.02 for row in rows for budget in row["budgets"].values())


def test_who_fails_is_left_out_or_comes_too_late_is_a_row(monkeypatch):
    def fails(*args):
        raise RuntimeError("out of memory")

    everyone = providers.of()
    monkeypatch.setattr(providers, "of", lambda *args: [everyone[0], ("joint", "sdpa_mask", fails)])
    rows = next(bench.run([SMALL], quick()))
    assert rows[1]["failed"] == "RuntimeError: out of memory" and "step_seconds" in rows[0]
    left_out = dataclasses.replace(SMALL, never=("sdpa_mask",))
    assert next(bench.run([left_out], quick()))[1]["skipped"] == bench.NEVER
    assert next(bench.run([dataclasses.replace(SMALL, declare=fails)], quick()))[0]["failed"].startswith(
        "the whole case"
    )
    late = bench.run_case(SMALL, quick(deadline=-math.inf))
    assert "skipped" not in late[0] and late[1]["skipped"] == "no time was left"
    assert next(bench.run([SMALL], quick(deadline=-math.inf)))[0]["skipped"] == "no time was left"


def test_a_long_run_times_what_others_leave_out():
    case = dataclasses.replace(SMALL, slow=("sdpa_mask",), never=("per_edge_loop",))
    *rows, _ = bench.run_case(case, quick(long=True, only=()))
    assert [row["provider"] for row in rows if "step_seconds" in row] == ["ours", "sdpa_mask", "ours"]
    rows = bench.run_case(case, quick(only=("sdpa_mask",)))
    assert rows[1]["skipped"] == bench.TOO_LONG


class Sleeper(Run):
    """A run whose steps take so long by the tests' own clock."""

    now, count = 0.0, itertools.count()

    def __init__(self, seconds: float, forward_only: bool = False):
        super().__init__(lambda: None, (), {} if forward_only else {"x": torch.ones(1)})
        self.each, self.turns = seconds, []

    def step(self, device: str = "cpu") -> None:
        Sleeper.now += self.each
        self.times.append([self.each] if not self.leaves else [self.each / 4, 3 * self.each / 4])
        self.turns.append(next(Sleeper.count))

    def results(self, *args, **kwargs) -> dict:
        return {}


@pytest.fixture
def rounds(monkeypatch):
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: Sleeper.now))

    def take(runs: dict[str, Sleeper], seconds: float, reference: Sleeper | None = None, **settings) -> list[int]:
        by_form = {("joint", name): run for name, run in runs.items()}
        measure.take_turns(by_form, reference, Settings(seconds=seconds, **settings))
        return [len(run.times) for run in runs.values()]

    return take


def test_what_is_close_to_ours_is_repeated_and_the_rest_taken_once(rounds):
    def everyone() -> dict[str, Sleeper]:
        forward = {"quick": Sleeper(0.009, True), "slow": Sleeper(0.012, True)}
        return {"ours": Sleeper(0.02), "close": Sleeper(0.03), "far": Sleeper(0.05)} | forward

    assert rounds(everyone(), 0.01) == [3, 3, 1, 3, 1]
    assert rounds(everyone(), 100.0) == [31] * 5
    assert rounds({"ours": Sleeper(3.5), "close": Sleeper(3.4)}, 1.0) == [1, 1]
    assert rounds({"ours": Sleeper(3.5), "close": Sleeper(3.4)}, 1.0, long=True) == [3, 3]


def test_nobody_follows_another_in_most_rounds(rounds):
    runs, reference = {name: Sleeper(1e-3) for name in "abcdef"}, Sleeper(0.0)
    rounds(runs, 9.0, reference)
    order = sorted((turn, name) for name, run in (*runs.items(), ("|", reference)) for turn in run.turns)
    names = "".join(name for _, name in order)
    assert names[6::8] == names[7::8] == "|" * 31, "the reference ends every round, twice"
    pairs = Counter(itertools.pairwise(names))
    assert max(pairs[a, b] for a in runs for b in runs if a != b) <= 12  # of 31 rounds, 5 for each on average


def test_a_ratio_is_of_the_same_rounds():
    own, other = Sleeper(1.0), Sleeper(3.0)
    own.times, other.times = [[1.0, 1.0], [2.0, 2.0], [9.0, 9.0]], [[3.0, 3.0], [4.0, 4.0]]
    row = measure.timings(other, own, None, {})
    assert row["rounds"] == 2 and row["step_ratio"]["p50"] == 2.5 and "step_roofline" not in row
    assert "step_ratio" not in measure.timings(own, own, None, {})


LAYER = cases.Case("small", tangled, "layer", "layer", heads=HEADS)


def test_layers_agree_with_float64():
    rows = bench.run_case(LAYER, quick(only=()))
    assert [(row["provider"], "step_ratio" in row) for row in rows] == [("ours", False), ("per_edge_loop", True)]
    assert all(0 < max(row["errors"].values()) <= 1e-5 and "x" in row["errors"] for row in rows)


@pytest.mark.parametrize("kind", [AttentionDispatcher, PerEdgeLoop])
def test_the_gate_of_layers_sees_a_wrong_module(kind, monkeypatch):
    forward, built = kind.forward, []

    def wrong(self, x):
        built.append(self)
        return forward(self, x) * (1 + 1e-4 * (x.dtype == torch.float32))

    monkeypatch.setattr(kind, "forward", wrong)
    failed = [row for row in bench.run_case(LAYER, quick(only=())) if "failed" in row]
    assert len(failed) == 1 and " out: error" in failed[0]["failed"]


@pytest.mark.parametrize("fn", cases.CLAIMS)
@pytest.mark.parametrize("queries", [0, 8])
def test_every_function_is_that_of_the_loop(fn, queries):
    declare = lambda: cases.one_function(fn, 24, queries)  # noqa: E731
    case = cases.Case("one", declare, "layer", "functions", options={"fn": fn, "keys": 24})
    rows = bench.run_case(case, quick(only=()))
    assert [(row["provider"], row["fn"]) for row in rows] == [("ours", fn), ("per_edge_loop", fn)]
    assert "failed" not in rows[0] and rows[0]["errors"].keys() >= {"out", "x"}


def test_plans_hold_nothing_quadratic():
    case = cases.Case("plan", lambda: cases.long_video(16), "plan", "plan", options={"rounds": 1})
    (row,) = bench.run_case(case, quick())
    assert (row["tokens"], row["rectangles"]) == (65_536, 31)
    assert row["peak_bytes"] < 300 * row["tokens"] and row["seconds"]["p50"] > 0


def test_tensors_of_a_call_are_counted_to_the_byte():
    def call():
        a = torch.ones(1000)  # 4,000 bytes, gone before c is made
        b = a + 1
        del a
        return torch.ones(3000), b

    assert measure.peak_bytes(call) == 4000 + 12_000 and measure.peak_bytes(lambda: None) == 0


def git(folder, *arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_a_commit_says_whether_code_differed(tmp_path):
    assert measure.commit_of(tmp_path) == "unknown"
    written = ["benchmarks/results/rows.json", "docs/benchmarks/report.md", "README.md"]
    for name in (*written, "benchmarks/code.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    for arguments in (["init"], ["add", "."], ["commit", "-m", "a"]):
        git(tmp_path, *arguments)
    clean = measure.commit_of(tmp_path)
    for name in written:
        (tmp_path / name).write_text("2")
    assert len(clean) >= 7 and "+" not in clean and measure.commit_of(tmp_path) == clean
    (tmp_path / "benchmarks/code.py").write_text("2")
    assert measure.commit_of(tmp_path) == clean + "+"


def test_rows_are_written_and_read_and_what_is_no_row_is_named(tmp_path):
    path = tmp_path / "new/rows.json"
    measure.write_rows([{"a": 1}, {"b": [2.5]}], path)
    assert measure.read_rows(path) == [{"a": 1}, {"b": [2.5]}] and json.loads(path.read_text().splitlines()[1]) == {
        "b": [2.5]
    }
    for text, number in ((b"# Title\n", 1), (b'{"a": 1}\n{"a":\n', 2), (b'{"a": 1}\n3\n', 2), (b"\x89PNG", 1)):
        path.write_bytes(text)
        with pytest.raises(ValueError, match=f"rows.json, line {number} is no row"):
            measure.read_rows(path)
