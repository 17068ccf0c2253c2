"""benchmarks/compare.py: kernels that become worse, are gone or have new faults are seen."""

from __future__ import annotations

import pytest

from benchmarks import compare, measure


def test_a_kernel_that_spills_or_loses_wgmma_is_seen():
    row = {"arch": "sm_90", "stage": "dq", "form": "edge", "signed": False, "head_dim": 64, "dtype": "bf16"}
    row |= {"tile": "64x64", "registers": 168, "spilled": 0, "shared": 1024, "wgmma": 3, "resident": 3}
    assert compare.compare_compiled([row], [row]) == (
        ["1 configurations, 0 changed, 0 of the earlier ones gone"],
        False,
    )
    assert compare.compare_compiled([row], [row | {"registers": 160}])[1] is False
    committed = measure.read_rows(measure.RESULTS / "aot.json")
    same = f"{len(committed)} configurations, 0 changed, 0 of the earlier ones gone"
    lines, failed = compare.compare_compiled(committed, committed)
    assert len(committed) > 1200 and not failed and len(lines) == 1 and lines[0].startswith(same)
    row |= {"waste": 1.0, "serialised": 0, "local": 0, "predicted": 400.0}
    assert compare.compare_compiled([row], [row | {"predicted": 388.1, "instructions": 400}])[1] is False
    changes = ({"waste": 1.01}, {"serialised": 1}, {"local": 2}, {"predicted": 387.9})
    for change in ({"spilled": 8}, {"wgmma": 2}, {"resident": 2, "registers": 255}, *changes):
        lines, worse = compare.compare_compiled([row], [row | change])
        assert worse and "WORSE" in lines[0] and "sm_90 dq edge" in lines[0]


@pytest.mark.parametrize(
    ("change", "worse"),
    [({"registers": 255, "shared": 999}, False), ({"copies": 1}, True), ({"resident": 1}, True), ({"wgmma": 4}, False)],
)
def test_a_kernel_may_need_more_while_as_many_programs_fit(change, worse):
    rows = (row for row in measure.read_rows(measure.RESULTS / "aot.json") if row["arch"] == "gfx942")
    row = next(row for row in rows if row["resident"] > 1) | {"wgmma": 3, "copies": 2}
    lines, failed = compare.compare_compiled([row], [row | change])
    assert failed is worse and ("WORSE" in lines[0]) is worse and ("--commit" in lines[1]) is worse
    lines, failed = compare.compare_compiled([row], [row | change | {"triton": "9.9"}])
    assert not failed and lines[0].startswith(f"Triton {row['triton']} before, 9.9 now: what has become worse is shown")
    assert ("WORSE" in lines[1]) is worse and len(lines) == 2 + worse


@pytest.mark.parametrize("triton", ["3.9.0", "9.9"])
def test_a_configuration_that_is_gone_fails(triton):
    committed = measure.read_rows(measure.RESULTS / "aot.json")
    lines, failed = compare.compare_compiled(committed, [row | {"triton": triton} for row in committed[1:]])
    assert failed and lines[-3].endswith(f"{committed[0]['tile']}: GONE") and "1 of the earlier ones gone" in lines[-1]
    assert "--commit" in lines[-2]
    assert compare.compare_compiled(committed[1:], committed)[1] is False


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
