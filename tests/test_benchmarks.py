"""The contestants compute what they say, the gate sees a wrong result, and the cases are those that are promised."""

from __future__ import annotations

import json
import os
import re
import subprocess

import numpy as np
import pytest
import torch

pytest.importorskip("rich", reason="benchmarks print their tables with rich")

from benchmarks import cases, dispatcher, measure, plan_cost, program, readme, report
from benchmarks.naive import DenseMask, PerEdgeLoop
from canvas_engineering import (
    AttentionDispatcher,
    CanvasLayout,
    CanvasTopology,
    Connection,
    MaskSpec,
    RegionSpec,
    TemporalFill,
)
from tests import oracle

D, HEADS = 16, 2
SPARSE = MaskSpec("sparse", pattern=(((True,) * 3,) * 2,) * 6)


def small_multi_rate():
    """Overlapping regions, a slow one, weights, every fill, and positions that read nothing."""
    regions = {
        "fast": (0, 6, 0, 2, 0, 3),
        "over": (1, 4, 1, 3, 1, 3),
        "slow": RegionSpec((0, 2, 3, 4, 0, 3), period=3),
        "mute": (0, 2, 3, 4, 3, 4),
    }
    connections = [
        Connection("fast", "fast", t_src=0, t_dst=0, weight=2.0),
        Connection("fast", "fast", t_src=0, t_dst=-1),
        Connection("fast", "slow", t_src=0, t_dst=0, temporal_fill=TemporalFill.INTERPOLATE),
        Connection("over", "slow", t_src=0, t_dst=0, temporal_fill=TemporalFill.HOLD, weight=0.5),
        Connection("slow", "fast", t_src=0, t_dst=0, temporal_fill=TemporalFill.DROP),
        Connection("slow", "slow"),
        Connection("over", "fast", weight=0.0),
    ]
    return CanvasLayout(T=6, d_model=D, spatial_shape=(4, 4), regions=regions), CanvasTopology(connections)


def projected(module, x):
    """q, k, v (B, heads, N, head_dim) of a contestant's cross attention, and its output projection."""
    p = module.fn_modules["cross_attention"]
    return (*(p.split(f(x)) for f in (p.q_proj, p.k_proj, p.v_proj)), p.out_proj)


def test_the_loop_is_the_oracle():
    layout, topology = small_multi_rate()
    torch.manual_seed(0)
    loop = PerEdgeLoop(topology, layout, D, HEADS).double()
    x = torch.randn(2, layout.num_positions, D, dtype=torch.float64)
    q, k, v, out_proj = projected(loop, x)
    reads = oracle.reads(layout, topology)
    out = oracle.edge_attention(q, k, v, reads, (D // HEADS) ** -0.5)
    expected = out_proj(out.transpose(1, 2).flatten(2))
    found = loop(x)
    covered = loop.covered[:, 0]
    torch.testing.assert_close(found[:, covered], expected[:, covered], rtol=0, atol=1e-12)
    assert torch.equal(found[:, ~covered], x[:, ~covered])
    assert 0 < covered.sum() < layout.num_positions


def test_the_loop_runs_under_autocast():
    layout, topology = small_multi_rate()
    torch.manual_seed(0)
    loop = PerEdgeLoop(topology, layout, D, HEADS)
    x = torch.randn(1, layout.num_positions, D)
    with torch.autocast("cpu", torch.bfloat16):
        found = loop(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loop(x), rtol=0, atol=0.02)


def test_the_dense_mask_is_the_oracle():
    layout, topology = small_multi_rate()
    torch.manual_seed(0)
    dense = DenseMask(topology, layout, D, HEADS).double()
    x = torch.randn(2, layout.num_positions, D, dtype=torch.float64)
    q, k, v, out_proj = projected(dense, x)
    matrix = torch.as_tensor(oracle.joint_matrix(layout, topology))
    out = oracle.joint_attention(q, k, v, matrix, (D // HEADS) ** -0.5)
    covered = (matrix > 0).any(1)
    expected = torch.where(covered[:, None], out_proj(out.transpose(1, 2).flatten(2)), x)
    # ln of the weights is kept in float32.
    torch.testing.assert_close(dense(x), expected, rtol=0, atol=1e-6)


def small_contestants():
    """Those of ``small_multi_rate``, and an input."""
    return dispatcher.build(cases.Case("small", small_multi_rate))


@pytest.fixture
def small_width(monkeypatch):
    monkeypatch.setattr(dispatcher, "D_MODEL", D)
    monkeypatch.setattr(dispatcher, "HEADS", HEADS)


def test_every_contestant_gives_its_form_s_numbers_and_gradients(small_width):
    found, x = small_contestants()
    assert list(found) == ["ours", "per_edge_loop", "ours_joint", "dense_mask"]
    worst = dispatcher.gate(found, x)
    assert set(worst) == set(found) and min(worst.values()) > 0 and max(worst.values()) <= 1e-5
    results = {name: dispatcher.outputs_and_gradients(module, x, torch.ones_like(x)) for name, module in found.items()}
    compared = {"output", "x", *(name for name, _ in found["ours"].named_parameters())}
    assert set(dispatcher.errors(results["ours"], results["per_edge_loop"])) == compared
    # one softmax per read is not one over all that is read
    assert dispatcher.errors(results["dense_mask"], results["per_edge_loop"])["output"] > 0.01
    uncovered = ~found["ours_joint"].covered[:, 0]
    assert uncovered.any() and torch.equal(results["ours_joint"]["output"][:, uncovered], x[:, uncovered])


def test_the_gate_s_joint_form_is_the_oracle_s(small_width):
    found, _ = small_contestants()
    exact = dispatcher.exact_joint(found["per_edge_loop"], found["dense_mask"])
    matrix = torch.as_tensor(oracle.joint_matrix(*small_multi_rate()))
    reading = (matrix > 0).any(1)
    torch.testing.assert_close(exact.mask.exp()[reading], matrix[reading], rtol=1e-12, atol=0)
    assert torch.equal(exact.covered[:, 0], reading)


@pytest.mark.parametrize("name", ["ours", "per_edge_loop", "ours_joint", "dense_mask"])
def test_the_gate_sees_a_wrong_result_of_anyone(name, small_width, monkeypatch):
    found, x = small_contestants()
    forward = type(found[name]).forward
    wrong = found[name]
    monkeypatch.setattr(type(wrong), "forward", lambda self, x: forward(self, x) * (1 + 1e-4 * (self is wrong)))
    with pytest.raises(dispatcher.Disagreement, match=f"^{name} differs from the .* form in float64: .*'output'"):
        dispatcher.gate(found, x)


def test_the_gate_sees_a_wrong_mask(small_width):
    layout, topology = small_multi_rate()
    found, x = small_contestants()
    dense = DenseMask(CanvasTopology(topology.connections[:-3]), layout, D, HEADS)
    dense.load_state_dict(found["dense_mask"].state_dict())
    with pytest.raises(dispatcher.Disagreement, match="dense_mask differs from the joint form"):
        dispatcher.gate(found | {"dense_mask": dense}, x)


def test_the_gate_sees_a_wrong_result():
    layout, topology = small_multi_rate()
    torch.manual_seed(0)
    ours = AttentionDispatcher(CanvasTopology(topology.connections[:-3]), layout, D, HEADS)
    loop = PerEdgeLoop(topology, layout, D, HEADS)
    loop.load_state_dict(ours.state_dict())
    with pytest.raises(dispatcher.Disagreement, match="output"):
        dispatcher.gate({"ours": ours, "per_edge_loop": loop}, torch.randn(1, layout.num_positions, D))


@pytest.mark.parametrize(
    ("connection", "message"),
    [
        (Connection("fast", "slow", fn="linear_attention"), "fast → slow: the loop knows .*'linear_attention'"),
        (Connection("fast", "slow", write_mode="replace"), "fast → slow: the loop has no 'replace' writes"),
        (Connection("fast", "fast", mask=SPARSE), "fast → fast: 'sparse' masks are not resolved here"),
    ],
)
def test_what_the_loop_cannot_do_is_named(connection, message):
    layout, _ = small_multi_rate()
    with pytest.raises(ValueError, match=message):
        PerEdgeLoop(CanvasTopology([connection]), layout, D, HEADS)


def test_cases_are_the_promised_ones():
    promised = {
        "robot": (320, 9, {"per_edge_loop": 2.0}),
        "causal_video": (4608, 6, {"per_edge_loop": 3.7, "dense_mask": 5.0}),
        "multi_rate": (1536, 4, {"per_edge_loop": 4.0}),
    }
    for case in cases.DISPATCH:
        layout, topology = case.declare()
        assert (layout.num_positions, len(topology.connections), case.at_least) == promised[case.name]
        assert layout.d_model == dispatcher.D_MODEL
    assert [layout.num_positions for layout, _ in (cases.computer_use(), cases.long_video(256))] == [16_384, 1_048_576]
    assert len(cases.computer_use()[1].connections) == 17


def test_interleaving_takes_turns():
    turns = []
    times = measure.interleave({name: lambda name=name: turns.append(name) for name in "ab"}, rounds=8, warm_up=1)
    rounds = ["".join(turns[i : i + 2]) for i in range(0, 18, 2)]
    # who came before has filled the caches: each comes first now and then
    assert rounds[0] == "ab" and set(rounds[1:]) == {"ab", "ba"}
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 8, "b": 8}


def test_quantiles():
    assert measure.quantiles(np.arange(11.0)) == {"p10": 1.0, "p25": 2.5, "p50": 5.0, "p75": 7.5, "p90": 9.0}


def test_a_commit_says_whether_code_differed(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    assert measure.commit_of(tmp_path) == "unknown"
    written = ["benchmarks/results/rows.json", "docs/benchmarks/report.md", "README.md"]
    for name in (*written, "benchmarks/code.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "a")
    clean = measure.commit_of(tmp_path)
    assert len(clean) >= 7 and "+" not in clean
    for name in written:
        (tmp_path / name).write_text("2")
    assert measure.commit_of(tmp_path) == clean
    (tmp_path / "benchmarks/code.py").write_text("2")
    assert measure.commit_of(tmp_path) == clean + "+"


def test_versions_are_those_of_what_is_installed():
    assert measure.versions(["numpy", "no-such-package"]) == {"numpy": np.__version__}


def test_rows_say_what_ran_where(tmp_path, monkeypatch):
    monkeypatch.setattr(dispatcher, "D_MODEL", D)
    case = cases.Case("small", small_multi_rate, {"per_edge_loop": 1e9})
    rows = dispatcher.run_case(case, rounds=2)
    measure.write_rows(rows, tmp_path / "rows.json")
    read = [json.loads(line) for line in (tmp_path / "rows.json").read_text().splitlines()]
    names = [(row["form"], row["contestant"]) for row in read]
    assert names == [("edge", "ours"), ("edge", "per_edge_loop"), ("joint", "ours_joint"), ("joint", "dense_mask")]
    assert read[0]["ratio"]["p50"] == read[2]["ratio"]["p50"] == 1.0
    assert len({row["worst_error"] for row in read}) == 4
    assert {"device", "torch", "commit", "threads", "worst_error", "seconds"} <= set(read[1])
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]
    cells = [list(column.cells) for column in dispatcher.table(rows).columns]
    assert cells[-1][1].endswith("MISSED") and cells[-1][0] == ""


@pytest.mark.parametrize(
    ("ratio", "at_least", "options", "ended"),
    [
        (1.9, 2.0, [], 1),
        (1.9, 2.0, ["--misses-pass"], 0),
        (2.0, 2.0, [], 0),
        (1.0, None, [], 0),
        (None, None, ["--misses-pass"], 1),
    ],
)
def test_a_missed_target_is_a_failure_if_nobody_lets_it_pass(
    ratio, at_least, options, ended, monkeypatch, tmp_path, capsys
):
    def run_case(case, rounds):
        if ratio is None:
            raise dispatcher.Disagreement("ours differs")
        row = {"case": case.name, "contestant": "per_edge_loop", "at_least": at_least, "seconds": {"p50": 1.0}}
        return [row | {"ratio": dict.fromkeys(("p10", "p50", "p90"), ratio)}]

    monkeypatch.setattr(dispatcher, "run_case", run_case)
    assert dispatcher.main(["--case", "robot", "--out", str(tmp_path / "rows.json"), *options]) == ended
    assert ("MISSED" in capsys.readouterr().out) is (ratio == 1.9) and (tmp_path / "rows.json").exists() is bool(ratio)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"# Title\n", "line 1 is no row: Expecting value"),
        (b'{"a": 1}\n{"a":\n', "line 2 is no row: Expecting value"),
        (b'{"a": 1}\n\n', "line 2 is no row: Expecting value"),
        (b'[{"a": 1}]\n', r'line 1 is no row: \[{"a": 1}\]'),
    ],
)
def test_a_file_without_rows_is_named(text, complaint, tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}, {complaint}"):
        measure.read_rows(path)
    path.write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} holds no rows: .* can't decode byte 0x89"):
        measure.read_rows(path)


def test_what_is_free_is_the_system_s_or_what_a_group_leaves(tmp_path):
    meminfo, group = tmp_path / "meminfo", tmp_path / "group"
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert measure.free_bytes(meminfo, group) == machine
    assert 0 < measure.free_bytes() <= machine
    meminfo.write_text("MemTotal:       9000 kB\nMemAvailable:   5000 kB\nHugePages_Total:   0\n")
    assert measure.free_bytes(meminfo, group) == 5000 * 1024
    group.mkdir()
    for limit, taken, inactive, free in (
        ("max", 7, 0, 5000 * 1024),
        ("4000000", 1_000_000, 0, 3_000_000),
        ("4000000", 4_000_000, 500_000, 500_000),  # files that nobody needs are given back
        ("4000000", 4_100_000, 0, 0),
        ("9000000", 1_000_000, 0, 5000 * 1024),
    ):
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{taken}\n")
        (group / "memory.stat").write_text(f"anon 12\ninactive_file {inactive}\n")
        assert measure.free_bytes(meminfo, group) == free
    (group / "memory.current").unlink()
    assert measure.free_bytes(meminfo, group) == 5000 * 1024


def test_tensors_of_a_call_are_counted_to_the_byte():
    def call():
        a = torch.ones(1000)  # 4,000 bytes, gone before c is made
        b = a + 1
        del a
        return torch.ones(3000), b

    assert measure.tensor_bytes(call) == 4000 + 12_000 and measure.tensor_bytes(lambda: None) == 0


X86 = "vendor_id : GenuineIntel\ncpu family : 6\nmodel : 167\nmodel name : Xeon\nstepping : 8\n\nmodel : 85\n"
ARM = "processor : 0\nCPU implementer : 0x41\nCPU variant : 0x1\nCPU part : 0xd40\n"


@pytest.mark.parametrize(
    ("info", "machine"),
    [
        (X86, "Xeon (GenuineIntel, family 6, model 167, stepping 8)"),
        (ARM, "arm (implementer 0x41, part 0xd40, variant 0x1)"),
        (None, "arm (arm64)"),
    ],
)
def test_rows_tell_processors_of_one_name_apart(info, machine, monkeypatch, tmp_path):
    monkeypatch.setattr(measure.platform, "processor", lambda: "arm")
    monkeypatch.setattr(measure.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(measure, "CPUINFO", tmp_path / "cpuinfo")
    if info is not None:
        (tmp_path / "cpuinfo").write_text(info)
    assert measure.processor_key(1) == f"{machine}, 1 thread" and measure.processor_key(3) == f"{machine}, 3 threads"


def test_ratios_are_within_one_form_and_readme_prints_no_other(small_width, monkeypatch):
    seconds = {"ours": 1.0, "per_edge_loop": 3.0, "ours_joint": 2.0, "dense_mask": 10.0}
    monkeypatch.setattr(measure, "interleave", lambda *args: {name: np.full(2, s) for name, s in seconds.items()})
    rows = dispatcher.run_case(cases.Case("robot", small_multi_rate), rounds=2)
    assert [row["ratio"]["p50"] for row in rows] == [1.0, 3.0, 1.0, 5.0]
    others = {name: measure.read_rows(measure.RESULTS / f"{name}.json") for name in readme.NAMES[1:]}
    assert "| 96 | 3.0 (3.0 to 3.0) | 5.0 (5.0 to 5.0) |" in readme.measured(rows, **others)
    # rows of before there were forms hold a dense mask against edge form
    rows = [{key: value for key, value in row.items() if key != "form"} for row in rows]
    assert "| 96 | 3.0 (3.0 to 3.0) | – |" in readme.measured(rows, **others)


def test_plan_cost_holds_nothing_quadratic():
    row = plan_cost.run_case("video of 16 frames", lambda: cases.long_video(16), None, rounds=1)
    assert row["positions"] == 65_536
    assert row["rectangles"] == 31  # 16 frames that read themselves, 15 that read the one before
    assert row["peak_bytes"] < 300 * row["positions"]
    assert row["cached_seconds"] > 0 and row["seconds"]["p50"] > 0


def test_a_step_is_a_forward_and_a_backward_with_fresh_gradients():
    module, x = torch.nn.Linear(3, 3, bias=False), torch.randn(2, 3, requires_grad=True)
    upstream = torch.randn(2, 3)
    run = measure.step(module, x, upstream=upstream)
    for _ in range(2):
        run()
    torch.testing.assert_close(x.grad, upstream @ module.weight)
    torch.testing.assert_close(module.weight.grad, upstream.T @ x.detach())
    measure.step(module, x)()
    assert not torch.equal(x.grad, upstream @ module.weight) and x.grad.abs().max() > 0


def test_readme_states_what_the_committed_rows_say():
    rows = {name: measure.read_rows(measure.RESULTS / f"{name}.json") for name in readme.NAMES}
    found = readme.section(readme.README.read_text())[1]
    assert found == readme.measured(**rows)
    for row in rows["dispatcher"]:
        if row["case"] == "causal_video" and row["contestant"] in ("per_edge_loop", "dense_mask"):
            row["ratio"]["p50"] += 1
    assert found != readme.measured(**rows)
    with pytest.raises(ValueError, match="has no section"):
        readme.section("no marks")


def test_the_report_states_what_the_committed_rows_say():
    suite, long = (measure.read_rows(measure.RESULTS / f"{name}.json") for name in ("suite", "long"))
    written = readme.README.parent / "benchmarks"
    figures = [name for name in report.FIGURES if (written / f"{name}.png").exists()]
    assert figures == list(report.FIGURES)
    found = (written / "report.md").read_text()
    assert found == report.markdown(report.merged(suite, long), figures)
    suite[0]["forward_seconds"]["p50"] += 1
    assert found != report.markdown(report.merged(suite, long), figures)


def test_a_program_that_says_nothing_costs_a_row_of_equal_bits(tmp_path, monkeypatch):
    case = cases.Case("small", small_multi_rate)
    monkeypatch.setattr(program, "DISPATCH", (case,))
    monkeypatch.setattr(program, "D_MODEL", D)
    monkeypatch.setattr(program, "HEADS", HEADS)
    monkeypatch.setattr(program, "AT_MOST", 1e9)
    assert program.main(["--rounds", "2", "--case", "small", "--out", str(tmp_path / "rows.jsonl")]) == 0
    (row,) = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert row["case"] == "small" and row["ratio_p10"] <= row["ratio_p50"] and row["plain_ms"] > 0
    contestants, x = program.build(case)
    assert contestants["plain"].plan is contestants["program"].plan
    monkeypatch.setattr(program, "AT_MOST", 0.0)
    assert program.main(["--rounds", "2", "--case", "small", "--out", str(tmp_path / "rows.jsonl")]) == 1
    with pytest.raises(dispatcher.Disagreement, match="a program that says nothing changes"):
        torch.nn.init.ones_(contestants["program"].fn_modules["cross_attention"].q_proj.weight)
        monkeypatch.setattr(program, "build", lambda case: (contestants, x))
        program.run_case(case, 1)


def test_what_resting_saves_is_a_row_and_the_committed_one_holds(tmp_path, monkeypatch):
    belief_world = pytest.importorskip("examples.belief_world")
    monkeypatch.setattr(belief_world, "WINDOW", 3)
    monkeypatch.setattr(belief_world, "TIMES", 2)
    out = tmp_path / "rows.jsonl"
    results = set()
    for bound in (0.0, 1.0):
        monkeypatch.setattr(program, "CUT_AT_LEAST", bound)
        times = {"everything": np.ones(3), "resting": np.full(3, 0.3)}
        monkeypatch.setattr(measure, "interleave", lambda runs, rounds, times=times: times)
        results.add((bound, program.main(["--rounds", "3", "--case", "skipping", "--out", str(out)])))
    (row,) = map(json.loads, out.read_text().splitlines())
    assert results == {(0.0, 0), (1.0, 1)} and row["cut_by_skipping_half"] == pytest.approx(0.35)
    monkeypatch.setattr(belief_world, "THOUGHT", ("memory",))
    real = belief_world.AttentionDispatcher.forward
    monkeypatch.setattr(belief_world.AttentionDispatcher, "forward", lambda self, x, active: real(self, x, None))
    with pytest.raises(dispatcher.Disagreement, match="resting changes memory"):
        program.skipping(1)
    committed = map(json.loads, (measure.RESULTS / "program.json").read_text().splitlines())
    (row,) = (row for row in committed if row["case"] == "skipping")
    assert row["cut_by_skipping_half"] == pytest.approx(0.5 * (1 - row["ratio_p50"])) and row["rounds"] >= 60
    assert row["cut_by_skipping_half"] >= 0.40 and row["positions"] == 3840
