"""benchmarks/suite.py and what it stands on: reads and exact results are the oracle's, the gate sees wrong results,
cases are the promised ones, reports say what the rows say."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("rich", reason="benchmarks print their tables with rich")

from benchmarks import bench, cases, contestants, measure, report, suite
from benchmarks.problem import Problem
from canvas_engineering import CanvasLayout, CanvasTopology, Connection, MaskSpec, RegionSpec, TemporalFill
from tests import oracle

HEADS, DIM = 2, 8


def tangled():
    """Weights, fills, tiles, overlaps, a slow region, positions that read nothing; 72 positions."""
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


SMALL = cases.Case("tangled", tangled, heads=HEADS, head_dim=DIM, batch=2)
PLAIN = frozenset({"sdpa_mask", "per_edge_loop", "grouped"})
QUICK = suite.Settings(seconds=0.0, rounds=(1, 1), reference_tokens=16, only=PLAIN)


@pytest.fixture(scope="module")
def rows():
    return next(suite.run([SMALL], copy.copy(QUICK)))


@pytest.mark.parametrize("known", [cases.CPU, cases.GPU], ids=["processors", "accelerators"])
def test_every_case_says_what_it_is_and_no_two_the_same(known):
    assert len({case.about for case in known}) == len(known)
    for case in known:
        if case.name.startswith(("video_", "frames_", "long_video_")):
            layout, _ = case.declare()
            frame = " × ".join(f"{size:,}" for size in layout.spatial_shape)
            assert f"{layout.T:,} frames of {frame}" in case.about, case.name
        if case.name.startswith("video_"):
            assert case.name == f"video_{layout.num_positions}"
            assert case.about.endswith(f": {layout.num_positions:,} positions")


def expected(form: str, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Output and gradients (B, H, N, D) by the tests' oracle and autograd."""
    layout, topology = tangled()
    q, k, v, upstream = (x.detach().double() for x in tensors)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    if form == "edge":
        out = oracle.edge_attention(*leaves, oracle.reads(layout, topology), DIM**-0.5)
    else:
        matrix = torch.as_tensor(oracle.joint_matrix(layout, topology))
        out = oracle.joint_attention(*leaves, matrix, DIM**-0.5)
    gradients = torch.autograd.grad(out, leaves, upstream)
    return {name: x.detach() for name, x in zip(("out", "dq", "dk", "dv"), (out, *gradients))}


# -- problems ----------------------------------------------------------------------------------------------------------


def test_the_joint_weights_are_the_oracles():
    problem = Problem(SMALL)
    found = problem.weights(np.arange(problem.tokens)).numpy()
    np.testing.assert_allclose(found, oracle.joint_matrix(*tangled()), rtol=1e-6, atol=0)
    assert problem.weighted and 1 < problem.weight_of_kinds.shape[0] < problem.tokens


@pytest.mark.parametrize("form", ["joint", "edge"])
def test_exact_results_are_the_oracles(form):
    problem = Problem(SMALL)
    tensors = problem.inputs("cpu", torch.float32)
    rows = np.arange(0, problem.tokens, 2)
    upstream = torch.zeros_like(tensors[3])
    upstream[:, :, rows] = tensors[3][:, :, rows]
    tensors[3] = upstream
    found = problem.exact(form, tensors, rows)
    for name, wanted in expected(form, tensors).items():
        wanted = wanted[:, :, rows] if name in ("out", "dq") else wanted
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=1e-12, msg=name)


def test_tokens_follow_the_regions_of_the_sequence():
    layout = CanvasLayout(T=2, d_model=8, spatial_shape=(3,), regions={"a": (0, 2, 0, 2), "b": (0, 1, 2, 3)})
    problem = Problem(cases.Case("two", lambda: (layout, CanvasTopology.dense(["a", "b"])), sequence=("b", "a")))
    assert problem.place.tolist() == [2, 0, 1, 3, 4] and problem.tokens == 5
    assert (problem.plan("joint").to_dense() == 1).all() and problem.plan("edge").density == 1
    with pytest.raises(ValueError, match="position 2 is read or reads, but is not one of the 4 given"):
        Problem(cases.Case("one", lambda: (layout, CanvasTopology.dense(["a", "b"])), sequence=("a",))).plan("joint")


def test_a_long_sequence_is_sampled_with_every_kind_in_it():
    problem = Problem(cases.Case("video", lambda: cases.long_video(40, 24)))
    rows = problem.sample()
    assert len(rows) == 2**23 // problem.tokens == 364 and (np.diff(rows) > 0).all()
    assert set(problem.kinds[rows]) == set(problem.kinds)


# -- the gate and the rounds -------------------------------------------------------------------------------------------


def test_rows_hold_what_was_measured(rows):
    names = [(row["form"], row["contestant"]) for row in rows]
    assert names == [
        ("joint", "ours"),
        ("joint", "sdpa_mask"),
        ("edge", "ours"),
        ("edge", "per_edge_loop"),
        ("edge", "grouped"),
        ("reference", "sdpa_unmasked"),
    ]
    joint = float((oracle.joint_matrix(*tangled()) > 0).double().mean())
    for row in rows[:-1]:
        assert max(row["errors"].values()) < 1e-5 and set(row["errors"]) == {"out", "dq", "dk", "dv"}
        assert row["rounds"] == 1 and row["tokens"] == 72 and row["commit"]
        assert row["seconds_per_case"] == 0.0 and "long" not in row
        total = row["forward_seconds"]["p50"] + row["backward_seconds"]["p50"]
        assert math.isclose(row["step_seconds"]["p50"], total)
        assert math.isclose(row["step_tflops"], row["pairs"] * 14 * DIM * HEADS * 2 / total / 1e12)
    assert math.isclose(rows[0]["density"], joint)
    assert math.isclose(rows[1]["step_ratio"]["p50"], rows[1]["step_seconds"]["p50"] / rows[0]["step_seconds"]["p50"])
    reference = rows[-1]
    assert reference["reference_tokens"] == 16 and reference["noise"] >= 0
    # the output and three gradients (2, 2, 72, 8) in float32 at least, and in ours only
    assert [row["contestant"] for row in rows if "tensor_bytes" in row] == ["ours", "ours"]
    assert all(4 * 4 * 2304 <= row["tensor_bytes"] < 100 * 4 * 2304 for row in rows if "tensor_bytes" in row)


@pytest.mark.parametrize("name", ["out", "dq", "dk", "dv"])
def test_the_gate_sees_a_wrong_scale(name, monkeypatch):
    """A factor of 1.0001 on any one result, of ours and of a contestant."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, out, q, k, v):
            return out * (1.0001 if name == "out" else 1)

        @staticmethod
        def backward(ctx, grad):
            return grad, None, None, None

    def wrong(attend):
        def call(q, k, v):
            leaves = [q, k, v]
            if name != "out":
                at = ("dq", "dk", "dv").index(name)
                x = leaves[at]
                leaves[at] = x + 0.0001 * (x - x.detach())
            return Wrong.apply(attend(*leaves), q, k, v)

        return call

    chosen = [c for c in contestants.of("cpu") if c.name in ("ours", "sdpa_mask")]
    built = [c._replace(build=lambda *args, c=c: wrong(c.build(*args))) for c in chosen]
    monkeypatch.setattr(contestants, "of", lambda *args: built)
    found = next(suite.run([SMALL], copy.copy(QUICK)))
    assert [row["contestant"] for row in found if "failed" in row] == ["ours", "sdpa_mask", "ours"]
    assert all("Wrong" in row["failed"] and f"'{name}'" in row["failed"] for row in found[:-1])
    assert len(suite.faults(found)) == 2 and "tangled, joint form" in suite.faults(found)[0]


def test_who_fails_or_is_left_out_is_a_row(monkeypatch):
    def fails(problem, device, dtype):
        raise RuntimeError("out of memory")

    ours, _, mask = contestants.of("cpu")[:3]
    monkeypatch.setattr(contestants, "of", lambda *args: [ours, mask._replace(build=fails)])
    found = next(suite.run([SMALL], copy.copy(QUICK)))
    assert found[1]["failed"] == "RuntimeError: out of memory" and "step_seconds" in found[0]
    without = dataclasses.replace(SMALL, without={"sdpa_mask": "no reason"})
    assert next(suite.run([without], copy.copy(QUICK)))[1]["skipped"] == "no reason"
    monkeypatch.setattr(measure, "free_bytes", lambda: 100)
    with pytest.raises(contestants.Unavailable, match=r"a mask of .* GiB, more than the .* GiB"):
        contestants.sdpa_mask(Problem(SMALL), "cpu", torch.float32)


def test_a_long_run_times_what_others_leave_out():
    long = dataclasses.replace(QUICK, long=True)
    reasons = {"flex": cases.TOO_LONG["cpu"], "sdpa_mask": cases.TOO_LONG["cpu"], "per_edge_loop": cases.NEVER}
    without = dataclasses.replace(SMALL, without=reasons)
    rows = suite.run_case(without, long)
    assert [row["contestant"] for row in rows] == ["ours", "sdpa_mask", "ours", "sdpa_unmasked"]
    assert all(row["long"] is True for row in rows)
    assert rows[1]["errors"].keys() == {"out", "dq", "dk", "dv"} and rows[1]["step_ratio"]["p50"] > 0
    nobody = dataclasses.replace(long, only=frozenset({"grouped"}))
    rows = suite.run_case(without, nobody)
    assert [row["contestant"] for row in rows] == ["ours", "ours", "sdpa_unmasked"]


def test_a_case_that_cannot_be_made_is_a_row_and_the_next_one_runs():
    def fails():
        raise MemoryError("too large")

    found = list(suite.run([cases.Case("huge", fails), SMALL], copy.copy(QUICK)))
    assert suite.faults(found[0]) == ["huge, joint form: the whole case: MemoryError: too large"]
    assert suite.faults(found[1]) == [] and "step_seconds" in found[1][0]


def test_after_the_deadline_only_ours_runs_and_no_case_begins():
    settings = copy.copy(QUICK)
    settings.deadline = -math.inf
    ((*begun, reference),) = [suite.run_case(SMALL, settings)]
    assert ["skipped" in row for row in begun] == [False, True, False, True, True] and "noise" in reference
    found = list(suite.run([SMALL, SMALL], settings))
    assert [[row["skipped"] for row in rows] for rows in found] == [["no time was left"] * 5] * 2
    names = [(row["case"], row["form"], row["contestant"]) for row in found[0]]
    assert names == [(row["case"], row["form"], row["contestant"]) for row in begun]
    assert all(row["commit"] for row in found[1]) and suite.faults(found[0]) == []


def test_who_cannot_run_here_is_a_row():
    settings = copy.copy(QUICK)
    settings.only = frozenset({"ours_torch", "xformers", "flashinfer", "flashinfer_packed", "varlen"})
    rows = suite.run_case(SMALL, settings)
    torch_too, gpus_only = "ours runs the torch backend here", "it needs a GPU"
    assert [(row["contestant"], row.get("skipped")) for row in rows[:-1]] == [
        ("ours", None),
        ("ours_torch", torch_too),
        ("xformers", gpus_only),
        ("flashinfer", gpus_only),
        ("flashinfer_packed", gpus_only),
        ("ours", None),
        ("ours_torch", torch_too),
        ("varlen", gpus_only),
    ]
    assert all(row["contestant"] in report.LABELS for row in rows)


def eager(form: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Dense attention of ``tangled`` in the dtype of q, k and v."""
    layout, topology = tangled()
    if form == "joint":
        weight = oracle.joint_matrix(layout, topology)
        filled = (weight > 0).any(1)[:, None]
        scores = DIM**-0.5 * (q @ k.transpose(-1, -2))
        out = (scores + torch.where(filled, weight, 1.0).log().to(q.dtype)).softmax(-1) @ v
        return out.masked_fill(~filled, 0)
    reads, total = oracle.reads(layout, topology), torch.zeros(q.shape[2], dtype=torch.float64)
    for read in reads:
        total[list(read.keys)] += read.weight
    out = torch.zeros_like(q)
    for read in reads:
        rows, columns = list(read.keys), list(next(iter(read.keys.values())))
        scores = DIM**-0.5 * (q[:, :, rows] @ k[:, :, columns].transpose(-1, -2))
        found = scores.softmax(-1) @ v[:, :, columns]
        share = (read.weight / total[rows]).to(q.dtype)[:, None]
        out = out.index_add(2, torch.tensor(rows), found * share)
    return out


@pytest.mark.parametrize("form", ["joint", "edge"])
def test_in_16_bits_a_result_may_be_twice_as_far_off_as_eagers(form):
    problem = Problem(SMALL)
    tensors = problem.inputs("cpu", torch.bfloat16)
    gate = suite.Gate(problem, tensors, suite.Settings(dtype=torch.bfloat16))
    gate.expect(form)
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    out = eager(form, *leaves)
    found = (out, *torch.autograd.grad(out, leaves, gate.upstream))
    ratios = []
    for name, value in zip(("out", "dq", "dk", "dv"), found):
        error, budget = suite.error(value.detach(), gate.exact[form][name]), gate.budgets[form][name]
        assert budget >= 2**-8
        if budget > 2**-8:
            ratios.append(budget / error)
    least, most = (1.9, 2.1) if form == "joint" else (1.0, 3.0)  # autograd sums over reads in another order
    assert ratios and all(least < ratio < most for ratio in ratios), ratios
    exact = suite.Gate(problem, tensors, suite.Settings())
    exact.expect(form)
    assert set(exact.budgets[form].values()) == {1e-5}


everyone = contestants.of


def changed(names, change):
    """What :func:`contestants.of` gives, with the results of those of ``names`` changed; only they are left."""

    def build(contestant, problem, device, dtype):
        attend = contestant.build(problem, device, dtype)
        return lambda q, k, v: change(attend(q, k, v))

    chosen = [c for c in everyone("cpu") if c.name in names]
    return lambda *args: [c._replace(build=lambda *a, c=c: build(c, *a)) for c in chosen]


@pytest.mark.parametrize(("factor", "right"), [(1.0, True), (1.02, False)])
def test_the_gate_in_16_bits_sees_two_percent(factor, right, monkeypatch):
    monkeypatch.setattr(contestants, "of", changed({"ours", "sdpa_mask", "grouped"}, lambda out: out * factor))
    settings = copy.copy(QUICK)
    settings.dtype = torch.bfloat16
    *rows, _ = suite.run_case(SMALL, settings)
    assert ["failed" not in row for row in rows] == [right] * 4
    for row in rows:
        assert all(2**-8 <= budget < 0.015 for budget in row["budgets"].values()) if right else "Wrong" in row["failed"]


def test_the_gate_sees_the_last_of_the_batch(monkeypatch):
    def change(out):
        return torch.cat([out[:-1], out[-1:].roll(1, 2)])

    monkeypatch.setattr(contestants, "of", changed({"ours"}, change))
    case = dataclasses.replace(SMALL, batch=3)
    *rows, _ = suite.run_case(case, copy.copy(QUICK))
    assert ["Wrong" in row["failed"] for row in rows] == [True, True]
    monkeypatch.setattr(contestants, "of", changed({"ours"}, lambda out: out))
    *rows, _ = suite.run_case(case, copy.copy(QUICK))
    assert not suite.faults(rows)
    assert suite.Gate(Problem(SMALL), Problem(SMALL).inputs("cpu", torch.float32), QUICK).entries == [0, 1]


def test_the_last_case_names_the_reference_s_kernels(monkeypatch):
    stages = []
    monkeypatch.setattr(suite, "run_case", lambda case, settings: stages.append("timed") or run_case(case, settings))
    monkeypatch.setattr(suite, "kernels", lambda *args: stages.append("named") or kernels(*args))
    wide = dataclasses.replace(SMALL, heads=4)
    first, second = suite.run([SMALL, wide], copy.copy(QUICK))
    assert stages == ["timed", "timed", "named", "named"]
    for row in (first[-1], second[-1]):
        # which of them takes the most time of so small a call is the machine's
        assert any(name.startswith("aten::") for name in row["kernels"]), row["kernels"]
    monkeypatch.setattr(suite, "kernels", lambda *args: 1 / 0)
    (rows,) = suite.run([SMALL], copy.copy(QUICK))
    assert rows[-1]["kernels"] == ["not known: ZeroDivisionError: division by zero"] and "noise" in rows[-1]


def test_kernels_are_those_that_take_the_time():
    large = torch.ones(600, 600)
    assert suite.kernels(lambda: large @ large, "cpu")[0] == "aten::mm"


run_case, kernels = suite.run_case, suite.kernels


def test_flex_attention_agrees_in_both_orders():
    """Compiled, with weights and packed order: some seconds of a C++ compiler."""
    settings = copy.copy(QUICK)
    settings.only = frozenset({"flex", "flex_packed"})
    found = next(suite.run([SMALL], settings))
    for row in found[1:3]:
        assert row["contestant"] in settings.only
        if "failed" in row:
            pytest.skip(f"no compiled FlexAttention here: {row['failed'][:200]}")
        assert row["errors"].keys() == {"out"} and row["errors"]["out"] < 1e-5 and "step_seconds" not in row


def test_memory_counts_what_is_held_at_once():
    with suite.allocations_mapped("cpu"):
        memory = suite.Memory("cpu")
        if memory.before is None:
            pytest.skip("/proc/self/clear_refs cannot be written here")
        for _ in range(3):
            torch.ones(4 << 20)  # 16 MiB, gone at once
        held = torch.ones(4 << 20)
        assert 15 << 20 < memory.peak() < 40 << 20 and held.numel()


def test_tensors_are_mapped_while_memory_is_measured_and_kept_while_times_are(monkeypatch):
    settings = []
    monkeypatch.setattr(suite, "_set_malloc", lambda mapped_from, kept: settings.append((mapped_from, kept)))
    suite.Memory("cpu").peak()
    assert settings == []
    measured, timed = (1 << 20, 1 << 17), (1 << 25, 1 << 26)
    calls = []
    monkeypatch.setattr(contestants, "of", changed({"ours"}, lambda out: calls.append(settings[-1]) or out))
    suite.run_case(SMALL, copy.copy(QUICK))
    assert settings == [measured, timed] * 2 and calls == [measured] * 2 + [timed] * 4
    with pytest.raises(ValueError), suite.allocations_mapped("cpu"):
        raise ValueError
    assert settings[-2:] == [measured, timed]
    with suite.allocations_mapped("cuda"):
        assert len(settings) == 6


# -- cases -------------------------------------------------------------------------------------------------------------


def test_cases_are_the_promised_ones():
    by_name = {case.name: case for case in cases.CPU}
    assert len(by_name) == len(cases.CPU) and len({case.name for case in cases.GPU}) == len(cases.GPU)
    assert {case.group for case in cases.CPU} == {"canvas", "cogvideox", "density", "length"}
    canvases = {"robot", "causal_video", "multi_rate", "surgical_robot", "fleet", "computer_use"}
    assert canvases <= by_name.keys() and canvases <= {case.name for case in cases.GPU}
    lengths = [case.declare()[0].num_positions for case in cases.CPU if case.group == "length"]
    assert lengths == [1024, 4096, 16384, 65536, 1048576]
    density = {"dense": 1, "previous_frame": 0.17, "three_frames": 0.24, "tiles": 0.26}
    for name, share in density.items():
        problem = Problem(by_name[f"cogvideox_{name}"])
        assert problem.tokens == 226 + 13 * 30 * 45 and problem.case.heads == 2
        assert math.isclose(problem.plan("joint").density, share, abs_tol=0.01), name
    for case, share in zip((case for case in cases.CPU if case.group == "density"), (0.5, 0.25, 0.1, 0.05, 0.02, 0.01)):
        assert math.isclose(Problem(case).plan("edge").density, share)
    too_long = {case.name: {*case.without} for case in cases.CPU if case.without}
    everyone = {"per_edge_loop", "sdpa_mask", "flex"}
    assert too_long == {
        "fleet": everyone | {"sdpa_mask_used"},
        "video_65536": everyone - {"flex"},
        "video_1048576": everyone | {"grouped"},
        "cogvideox_dense": {"sdpa_mask", "per_edge_loop"},
        "cogvideox_three_frames": {"sdpa_mask"},
        "cogvideox_tiles": {"sdpa_mask", "flex"},
    }
    for known, device in ((cases.CPU, "cpu"), (cases.GPU, "cuda")):
        reasons = {why for case in known for why in case.without.values()}
        assert reasons == {cases.TOO_LONG[device]} | ({cases.NEVER} if device == "cpu" else set())
    assert by_name["video_1048576"].long == {"sdpa_mask", "flex", "grouped"} and not by_name["robot"].long
    assert by_name["cogvideox_dense"].long == {"sdpa_mask", "per_edge_loop"}
    assert "--long" not in cases.TOO_LONG["cuda"], "make gpu never runs it"
    five = next(case for case in cases.GPU if case.name == "cogvideox_5b_sparse_tiles")
    assert Problem(five).plan("joint").density < 0.1 and five.heads == 48 and five.head_dim == 64
    heads = {case.name: (case.heads, case.head_dim) for case in cases.GPU if case.group == "cogvideox"}
    assert heads["cogvideox_2b_dense"] == (30, 64) and heads["cogvideox_5b_tiles"] == (48, 64)


# -- reports ----------------------------------------------------------------------------------------------------------


def test_the_report_shows_every_row(rows, tmp_path):
    pytest.importorskip("matplotlib", reason="figures are drawn with matplotlib")
    path = report.write(rows, tmp_path)
    text = path.read_text()
    assert text.count("| tangled | 72 |") == 2 and report.short(rows[1]["step_ratio"]["p50"]) in text
    assert f"{1e3 * rows[0]['step_seconds']['p50']:.2f}" in text and "Nothing." in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.md", "roofline.png", "speedup.png"]
    skipped = [*rows, {**rows[1], "skipped": "a mask of 11 GiB"}]
    assert "SDPA, dense mask, joint form: a mask of 11 GiB (tangled)" in report.markdown(skipped, [])


def test_the_command_measures_reports_and_compares(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="figures are drawn with matplotlib")
    monkeypatch.setattr(cases, "CPU", (SMALL,))
    monkeypatch.setattr(suite, "REFERENCE_TOKENS", {"cpu": 16})
    arguments = ["--device", "cpu", "--seconds", "0", "--contestant", "grouped", "--out", str(tmp_path)]
    assert bench.main([*arguments, "--case", "tang*"]) == 0
    found = measure.read_rows(tmp_path / "rows.json")
    assert [row["contestant"] for row in found] == ["ours", "ours", "grouped", "sdpa_unmasked"]
    assert (tmp_path / "report.md").exists()
    faster = [row | {"step_roofline": {"p25": 99.0, "p50": 99.0, "p75": 99.0}} for row in found]
    measure.write_rows(faster, tmp_path / "faster.json")
    rows = ["--rows", str(tmp_path / "rows.json"), "--out", str(tmp_path)]
    assert bench.main([*rows, "--compare", str(tmp_path / "rows.json")]) == 0
    assert bench.main([*rows, "--compare", str(tmp_path / "faster.json")]) == 1
    assert "SLOWER" in capsys.readouterr().out
    measure.write_rows([row | {"dtype": "bfloat16"} for row in found], tmp_path / "others.json")
    assert bench.main([*rows, "--compare", str(tmp_path / "others.json")]) == 1
    assert "nothing to compare" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench.main(["--case", "no such case"])


# -- rounds ------------------------------------------------------------------------------------------------------------


class Sleeper:
    """A runner whose steps take so long by the tests' own clock, and a reference that takes no time."""

    now, steps = 0.0, itertools.count()

    def __init__(self, seconds: float, name: str = "other", forward_only: bool = False):
        self.each, self.taken, self.turns, self.called = seconds, [], [], 0
        self.contestant = contestants.Contestant("joint", name, None, forward_only)

    def times(self, part: str) -> np.ndarray:
        return np.array(self.taken) * (0.25 if part == "forward" and not self.contestant.forward_only else 1.0)

    @property
    def seconds(self) -> float:
        return sum(self.taken)

    def call(self) -> None:
        self.called += 1

    def step(self, device: str = "cpu") -> None:
        Sleeper.now += self.each
        self.taken.append(self.each)
        self.turns.append(next(Sleeper.steps))


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(suite, "time", SimpleNamespace(perf_counter=lambda: Sleeper.now))


def test_what_takes_long_is_timed_once(clock, monkeypatch):
    monkeypatch.setattr(suite, "REPEATED_SECONDS", 0.05)
    quick, slow = Sleeper(0.01), Sleeper(0.1)
    suite._take_turns([quick, slow], Sleeper(0), suite.Settings(seconds=0.05))
    # who is left has the seconds for itself
    assert (len(quick.taken), len(slow.taken)) == (5, 1)
    # nothing is left out where all rounds fit
    quick, slow = Sleeper(0.01), Sleeper(0.1)
    suite._take_turns([quick, slow], Sleeper(0), suite.Settings(seconds=0.5))
    assert len(quick.taken) == len(slow.taken) >= 3


def test_rounds_repeat_what_is_close_to_ours(clock):
    ours, close, far = Sleeper(0.02, "ours"), Sleeper(0.03), Sleeper(0.05)
    quick_forward, slow_forward = Sleeper(0.009, forward_only=True), Sleeper(0.012, forward_only=True)
    everyone = [ours, close, far, quick_forward, slow_forward]
    suite._take_turns(everyone, Sleeper(0), suite.Settings(seconds=0.01))
    assert [len(runner.taken) for runner in everyone] == [3, 3, 1, 3, 1]


def test_who_is_near_ours_has_as_many_seconds_again(clock):
    def everyone() -> list[Sleeper]:
        ours, near, ahead, far = Sleeper(0.02, "ours"), Sleeper(0.024), Sleeper(0.017), Sleeper(0.026)
        return [ours, near, ahead, far, Sleeper(0.0061, forward_only=True), Sleeper(0.0064, forward_only=True)]

    found = everyone()
    suite._take_turns(found, Sleeper(0), suite.Settings(seconds=0.3))
    shared = len(found[3].taken)
    # of 0.1 s a round for all, and of 0.067 for those near
    assert shared == 3 and [len(runner.taken) for runner in found] == [3 + 4] * 3 + [3, 3 + 4, 3]
    found, reference = everyone(), Sleeper(0)
    suite._take_turns(found, reference, suite.Settings(seconds=0.3, rounds=(3, 5)))
    assert [len(runner.taken) for runner in (*found, reference)] == [5] * 3 + [3, 5, 3] + [5]
    assert reference.called == 2 * 4, "before each of those near, untimed"
    # those that take longer have rounds enough to tell
    found = [Sleeper(0.02, "ours"), Sleeper(0.024), Sleeper(0.026)]
    suite._take_turns(found, Sleeper(0), suite.Settings(seconds=0.01))
    assert [len(runner.taken) for runner in found] == [6, 6, 3]
    # nobody near
    found = [Sleeper(0.02, "ours"), Sleeper(0.026)]
    suite._take_turns(found, Sleeper(0), suite.Settings(seconds=0.2))
    assert len(found[0].taken) == len(found[1].taken) <= 4


def test_nobody_follows_another_in_most_rounds(clock):
    everyone = [Sleeper(0, name) for name in "abcdef"]
    reference = Sleeper(1e-3)
    suite._take_turns(everyone, reference, suite.Settings(seconds=1.0, rounds=(31, 31)))
    assert {len(runner.taken) for runner in (*everyone, reference)} == {31}
    order = sorted((turn, runner.contestant.name) for runner in (*everyone, reference) for turn in runner.turns)
    names = [name for _, name in order]
    assert names[6::7] == ["other"] * 31, "the reference ends every round"
    pairs = Counter(itertools.pairwise(names))
    # of 31 rounds, 5 for each on average
    assert max(count for pair, count in pairs.items()) <= 12
    assert min(pairs[a, b] for a in "abcdef" for b in "abcdef" if a != b) >= 1


def test_nobody_is_repeated_without_ours():
    ours, close, edge = Sleeper(3.5, "ours"), Sleeper(2.9), Sleeper(0.1, "ours")
    for runner in (ours, close, edge):
        runner.taken = [runner.each]
    assert not suite._worth_repeating(ours, ours, 3.0) and not suite._worth_repeating(close, ours, 3.0)
    assert suite._worth_repeating(close, None, 3.0) and not suite._worth_repeating(ours, None, 3.0)
    assert suite._worth_repeating(edge, edge, 3.0)
    assert suite._worth_repeating(ours, ours, 4.0) and suite._worth_repeating(close, ours, 4.0)


def test_a_single_round_is_compared_with_its_own(monkeypatch):
    long = property(lambda runner: 10.0 * (runner.contestant.name == "sdpa_mask"))
    monkeypatch.setattr(suite.Runner, "seconds", long)
    monkeypatch.setattr(suite, "CLOSE", 1e9)
    rows = suite.run_case(SMALL, dataclasses.replace(QUICK, rounds=(3, 3)))
    rounds = {(row["form"], row["contestant"]): row["rounds"] for row in rows if "rounds" in row}
    assert rounds.pop(("joint", "sdpa_mask")) == 1 and set(rounds.values()) == {3}
    (once,) = (row for row in rows if row["contestant"] == "sdpa_mask")
    assert once["step_ratio"]["p10"] == once["step_ratio"]["p90"] > 0
