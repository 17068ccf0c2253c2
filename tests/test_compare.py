"""benchmarks/compare.py: slow-downs and growth beyond noise are seen, and nothing else; unlike runs are refused."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from benchmarks import compare, measure

MIB = 1 << 20


def run_of(shares: dict[str, float], noise: float = 0.02, rounds: int = 9, iqr: float = 0.02, **changes) -> list[dict]:
    """Rows of ours and of the reference line, a case each, with quartiles ``iqr`` apart, as a share of the median."""
    found = []
    machine = {"device": "a", "processor": "a, 1 thread", "threads": 1, "torch": "2.13.0"}
    for name, share in shares.items():
        case = {"case": name, "tokens": 64, "batch": 1, "heads": 2, "head_dim": 8, "dtype": "float32"} | machine
        quantiles = {"p25": (1 - iqr / 2) * share, "p50": share, "p75": (1 + iqr / 2) * share}
        ours = {"form": "edge", "contestant": "ours", "rounds": rounds, "setup_seconds": 0.002, "first_seconds": 0.01}
        ours |= {"peak_bytes": 8 * MIB, "forward_roofline": quantiles, "step_roofline": quantiles}
        reference = {"form": "reference", "contestant": "sdpa_unmasked", "noise": noise}
        found += [case | row | {"forward_seconds": {}} | changes for row in (ours, reference)]
    return found


def least_seen(rounds: int, iqr: float, noise: float = 0.0) -> float:
    """The smallest slow-down, of every part, that two runs like these show."""
    before = run_of({"a": 0.5}, noise, rounds, iqr)
    for factor in np.arange(1.0, 3.0, 0.005):
        if compare.compare(before, run_of({"a": 0.5 / float(factor)}, noise, rounds, iqr))[1]:
            return float(factor)
    raise AssertionError("no slow-down is seen")


# -- times -------------------------------------------------------------------------------------------------------------


def test_more_rounds_show_smaller_slow_downs():
    # e to the root of 0.1² + 2 · (1.57 · ln(1.1 / 0.9) / √rounds)²
    for rounds, expected in ((3, 1.318), (9, 1.196), (25, 1.144), (400, 1.108)):
        assert least_seen(rounds, iqr=0.2) == pytest.approx(expected, abs=0.006), rounds
    assert least_seen(25, iqr=0.0) == pytest.approx(math.exp(0.1), abs=0.006)


def test_a_case_is_judged_by_its_own_noise_where_that_is_larger():
    # e to the root of 0.1² + 2 · (0.6 / 3)²
    assert least_seen(9, iqr=0.02, noise=0.6) == pytest.approx(1.350, abs=0.006)
    noisy = {"quiet": 0.02, "noisy": 0.6}
    before = [row for name, noise in noisy.items() for row in run_of({name: 0.5}, noise)]
    for name, slower in (("quiet", True), ("noisy", False)):
        after = run_of({"quiet": 0.5, "noisy": 0.5} | {name: 0.5 / 1.2})
        lines, found = compare.compare(before, after)
        assert found is slower, "the larger noise of both runs"
        assert [line.split(":")[0] for line in lines[:-1] if "SLOWER" in line] == ["quiet/edge"] * slower
        assert lines[-1] == ("SLOWER: 1 of 2" if slower else "no slow-down and no growth in 2 of 2")


def test_single_rounds_are_judged_by_the_noise_of_all():
    others = run_of({str(number): 0.5 for number in range(9)}, noise=0.2)
    before = run_of({"few": 0.5}, 0.0, rounds=1, iqr=0.0) + others
    # e to the root of 0.1² + 2 · 0.2²
    for factor, slower in ((1.3, False), (1.4, True)):
        after = run_of({"few": 0.5 / factor}, 0.0, rounds=1, iqr=0.0) + others
        lines, found = compare.compare(before, after)
        assert found is slower and ("SLOWER" in lines[1]) is slower and "noise of all: 20 %" in lines[0]
    assert lines[-2] == "1 of 10 cannot show a slow-down of 1.33: give them more --seconds"


@pytest.mark.parametrize("part", ["forward", "step"])
def test_each_part_is_judged(part):
    before, after = run_of({"a": 0.5}), run_of({"a": 0.5})
    after[0][f"{part}_roofline"] = {"p25": 0.39, "p50": 0.4, "p75": 0.41}
    lines, slower = compare.compare(before, after)
    assert slower and f"{part} 0.500 → 0.400, 0.80 of at least 0.90 SLOWER" in lines[-2]
    assert lines[-2].count("SLOWER") == 1 and lines[-1] == "SLOWER: 1 of 1"
    assert compare.compare(after, before)[1] is False


def test_the_committed_rows_show_slow_downs_that_matter():
    rows = measure.read_rows(measure.RESULTS / "suite.json")
    assert compare.compare(rows, rows)[1] is False

    def slowed(factor: float) -> list[dict]:
        found = []
        for row in rows:
            ours = row["contestant"] == "ours" and "step_roofline" in row
            share = {q: value / factor for q, value in row["step_roofline"].items()} if ours else None
            found.append(row | {"step_roofline": share} if ours else row)
        return found

    lines, slower = compare.compare(rows, slowed(4.0))
    ours = sum(row["contestant"] == "ours" and "step_roofline" in row for row in rows)
    assert slower and sum("SLOWER" in line for line in lines[:-1]) == ours


# -- memory, and what is told ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "larger"),
    [
        # of tensors: by a tenth, whatever the process holds
        (({"tensor_bytes": 10 * MIB}, {"tensor_bytes": 11 * MIB, "peak_bytes": 99 * MIB}), False),
        (({"tensor_bytes": 10 * MIB}, {"tensor_bytes": 11 * MIB + 1}), True),
        # of the process: by a tenth and 16 MiB
        (({"peak_bytes": 100 * MIB}, {"peak_bytes": 126 * MIB}), False),
        (({"peak_bytes": 100 * MIB}, {"peak_bytes": 126 * MIB + 1}), True),
        (({"tensor_bytes": 10 * MIB, "peak_bytes": 100 * MIB}, {"peak_bytes": 127 * MIB}), True),
        # of a GPU's allocator: by a tenth
        (({"peak_bytes": 10 * MIB, "driver": "1"}, {"peak_bytes": 11 * MIB, "driver": "1"}), False),
        (({"peak_bytes": 10 * MIB, "driver": "1"}, {"peak_bytes": 11 * MIB + 1, "driver": "1"}), True),
        # /proc does not tell
        (({"peak_bytes": None}, {"peak_bytes": 99 * MIB}), False),
    ],
)
def test_memory_may_grow_by_a_tenth(changes, larger):
    before, after = (run_of({"a": 0.5}, **change) for change in changes)
    lines, failed = compare.compare(before, after)
    assert failed is larger and ("LARGER" in lines[-2]) is larger
    assert lines[-1] == ("LARGER: 1 of 1" if larger else "no slow-down and no growth in 1 of 1")


def test_what_a_plan_and_a_first_call_take_is_told():
    lines, failed = compare.compare(run_of({"a": 0.5}), run_of({"a": 0.5}, setup_seconds=9.0, first_seconds=8.0))
    assert not failed and lines[-2].endswith("plan 0.002 → 9 s, first call 0.01 → 8 s")


# -- unlike runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["device", "processor", "threads"])
def test_another_machine_or_thread_number_is_refused(name):
    before, after = run_of({"a": 0.5}), run_of({"a": 0.5}, **{name: "other"})
    why = f"these runs cannot be compared: {name}: {before[0][name]}, then other"
    assert compare.compare(before, after) == ([why], True)


def test_the_host_of_a_gpu_does_not_matter():
    gpu = {"driver": "1", "device": "H200"}
    before, after = run_of({"a": 0.5}, **gpu), run_of({"a": 0.5}, **gpu, threads=16, processor="b")
    assert compare.compare(before, after)[1] is False
    assert compare.compare(before, run_of({"a": 0.5}, **gpu | {"device": "B200"}))[1] is True
    assert compare.compare(before, run_of({"a": 0.5}))[1] is True


@pytest.mark.parametrize("name", ["torch", "triton", "driver"])
def test_another_version_is_told(name):
    gpu = {"driver": "1", "triton": "3"}
    lines, failed = compare.compare(run_of({"a": 0.5}, **gpu), run_of({"a": 0.5}, **gpu | {name: "9.9"}))
    assert not failed and lines[0].startswith(f"another {name}: ") and lines[0].endswith(", then 9.9")


def test_rows_that_do_not_name_their_processor_say_so():
    old = run_of({"a": 0.5})
    for row in old:
        del row["processor"]
    for pair in itertools.permutations((old, run_of({"a": 0.5}))):
        lines, failed = compare.compare(*pair)
        assert not failed and lines[0] == "not every row names its processor: it is not compared"


def test_what_only_one_run_has_is_named_and_nothing_in_common_fails():
    before = run_of({"robot": 0.5, "fleet": 0.5})
    lines, failed = compare.compare(before, run_of({"robot": 0.5, "video": 0.5}))
    assert not failed and lines[0] == "not in the later rows: fleet/edge"
    assert lines[1] == "not in the earlier rows: video/edge"
    for dtype, names in (("float32", "fleet/edge, video/edge"), ("float16", "fleet/edge/float16, video/edge/float16")):
        every = run_of({"robot": 0.5, "video": 0.5, "fleet": 0.5}, dtype=dtype)
        lines, _ = compare.compare(every, every[:2])
        assert lines[0] == f"not in the later rows: {names}" and lines[-1].endswith("in 1 of 1")
    others = (run_of({"video": 0.5}), run_of({"robot": 0.5}, dtype="bfloat16"), [], before[1::2])
    for after in others:
        for pair in ((before, after), (after, before)):
            lines, failed = compare.compare(*pair)
            assert failed and lines[0].startswith("nothing to compare")
    assert compare.compare([], [])[1] is True


# -- compiled kernels --------------------------------------------------------------------------------------------------


def test_a_kernel_that_spills_or_loses_wgmma_is_seen():
    row = {"arch": "sm_90", "stage": "dq", "form": "edge", "signed": False, "head_dim": 64, "dtype": "bf16"}
    row |= {"tile": "64x64", "registers": 168, "spilled": 0, "shared": 1024, "wgmma": 3, "resident": 3}
    assert compare.compare([row], [row]) == (["1 configurations, 0 changed, 0 of the earlier ones gone"], False)
    assert compare.compare([row], [row | {"registers": 160}])[1] is False
    committed = measure.read_rows(measure.RESULTS / "aot.json")
    same = f"{len(committed)} configurations, 0 changed, 0 of the earlier ones gone"
    lines, failed = compare.compare(committed, committed)
    assert len(committed) > 1200 and not failed and len(lines) == 1 and lines[0].startswith(same)
    row |= {"waste": 1.0, "serialised": 0, "local": 0, "predicted": 400.0}
    assert compare.compare([row], [row | {"predicted": 388.1, "instructions": 400}])[1] is False
    changes = ({"waste": 1.01}, {"serialised": 1}, {"local": 2}, {"predicted": 387.9})
    for change in ({"spilled": 8}, {"wgmma": 2}, {"resident": 2, "registers": 255}, *changes):
        lines, worse = compare.compare([row], [row | change])
        assert worse and "WORSE" in lines[0] and "sm_90 dq edge" in lines[0]


@pytest.mark.parametrize(
    ("change", "worse"),
    [({"registers": 255, "shared": 999}, False), ({"copies": 1}, True), ({"resident": 1}, True), ({"wgmma": 4}, False)],
)
def test_a_kernel_may_need_more_while_as_many_programs_fit(change, worse):
    rows = (row for row in measure.read_rows(measure.RESULTS / "aot.json") if row["arch"] == "gfx942")
    row = next(row for row in rows if row["resident"] > 1) | {"wgmma": 3, "copies": 2}
    lines, failed = compare.compare([row], [row | change])
    assert failed is worse and ("WORSE" in lines[0]) is worse and ("--commit" in lines[1]) is worse
    lines, failed = compare.compare([row], [row | change | {"triton": "9.9"}])
    assert not failed and lines[0].startswith(f"Triton {row['triton']} before, 9.9 now: what has become worse is shown")
    assert ("WORSE" in lines[1]) is worse and len(lines) == 2 + worse


@pytest.mark.parametrize("triton", ["3.9.0", "9.9"])
def test_a_configuration_that_is_gone_fails(triton):
    committed = measure.read_rows(measure.RESULTS / "aot.json")
    lines, failed = compare.compare(committed, [row | {"triton": triton} for row in committed[1:]])
    assert failed and lines[-3].endswith(f"{committed[0]['tile']}: GONE") and "1 of the earlier ones gone" in lines[-1]
    assert "--commit" in lines[-2]
    assert compare.compare(committed[1:], committed)[1] is False
    lines, failed = compare.compare([], committed)
    assert failed and lines == ["nothing to compare: one side has no rows"]


def test_only_known_faults_are_let_through():
    row = {"arch": "sm_90", "stage": "dq", "form": "edge", "signed": False, "head_dim": 64, "dtype": "bf16"}
    row |= {"tile": "64x64", "waste": 1.5, "faults": ["waste 1.5"], "triton": "3.9.0"}
    lines, failed = compare.compare_compiled([row], [row])
    assert not failed and lines[-1].endswith("0 with new faults, 1 with known ones")
    for worse in ({"faults": ["waste 1.5", "spills 8 bytes"]}, {"waste": 1.67, "faults": ["waste 1.67"]}):
        assert compare.compare_compiled([row], [row | worse])[1]
    better = row | {"waste": 1.0, "faults": []}
    assert not compare.compare_compiled([row], [better])[1] and compare.compare_compiled([better], [row])[1]
    # with nothing to compare with, and with another Triton's, every new fault fails
    assert compare.compare_compiled([], [row])[1] and not compare.compare_compiled([], [better])[1]
    assert compare.compare_compiled([better | {"triton": "9.9"}], [row])[1]
