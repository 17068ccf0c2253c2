"""benchmarks/gpu_rates.py: rates that made rows are found again in them, and rows that tell nothing are refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("rich", reason="benchmarks print their tables with rich")

from benchmarks import cases, gpu_rates, measure, rates
from canvas_kernels import costs, launch
from canvas_kernels.work import GpuWork

NAMES = ("cogvideox_5b_sparse_tiles", "frames_2_d64", "frames_10_d64", "frames_100_d64", "robot", "multi_rate", "fleet")
NAMES += ("surgical_robot", "frames_2_d128", "frames_10_d128", "frames_50_d128", "long_video_d128", "causal_video")
GPU = {"device": "toy GPU", "architecture": "sm_90", "multiprocessors": 132}
# a product of 16 × 16 waits longer: what configs estimates, off by a quarter
SMALL = 3.2 * 1.25


@pytest.fixture(scope="module")
def true() -> dict:
    """An entry: 350 TFLOP/s forward in joint form at best, less elsewhere."""
    entry = {"arch": "sm_90", "multiprocessors": 132, "bandwidth": 3.6e12, "launch": 3e-6, "blocks": {}}
    for key, block in gpu_rates.blocks_of("sm_90").items():
        forward, form, head_dim, itemsize, small = block.group
        slower = (1.0 if forward else 1.3) * (1.2 if form == "edge" else 1.0) * (SMALL if small else 1.0)
        if itemsize == 2:
            # multiply-adds of a product's element, over a multiprocessor's share of the rate
            entry["blocks"][key] = [slower * 2 * head_dim / (350e12 / 132) * block.units, block.resident]
    return entry


@pytest.fixture(scope="module")
def rows(true) -> list[dict]:
    """What `make gpu` would write, with 2 % of noise."""
    generator, each, found = np.random.default_rng(0), costs.gpu_seconds(true), []
    for case in (case for case in cases.GPU if case.name in NAMES):
        for form in ("joint", "edge"):
            plan = rates.plan_of(case, form)
            outside = None if plan.in_canvas_order else plan.n_positions
            work = GpuWork(plan.table, case.batch * case.heads, case.head_dim, outside)
            row = {"case": case.name, "form": form, "contestant": "ours", "tokens": plan.n_positions, "torch": "2.11"}
            row |= {"batch": case.batch, "heads": case.heads, "head_dim": case.head_dim, "dtype": "bfloat16"}
            for backward, part in enumerate(("forward", "backward")):
                bounds = (launch.bounds for launch in work.launches(true, {"blocks": {}}, bool(backward)))
                taken = sum(max(costs.seconds(bound, each) for bound in several) for several in bounds)
                row[f"{part}_seconds"] = {"p50": taken * np.exp(generator.normal(0, 0.02))}
            found.append(row | GPU | {"commit": "abc"})
    return found


def test_the_rates_that_made_the_rows_are_found(rows, true):
    device, found, told = gpu_rates.entry(rows)
    assert device == "toy GPU" and (found["arch"], found["multiprocessors"]) == ("sm_90", 132)
    assert found["bandwidth"] == pytest.approx(true["bandwidth"], rel=0.05)
    assert found["launch"] == pytest.approx(true["launch"], rel=0.1)
    for stage in ("forward", "dq", "dkv"):
        for form, head_dim in (("joint", 64), ("edge", 64), ("joint", 128), ("edge", 128)):
            keys = [key for key in true["blocks"] if key.startswith(f"{stage} {form} {head_dim} 16 ")]
            assert len(keys) == 2 and all(found["blocks"][key][1] == true["blocks"][key][1] for key in keys)
            large, small = keys if keys[1].endswith(" 16 16") else keys[::-1]
            assert found["blocks"][large][0] == pytest.approx(true["blocks"][large][0], rel=0.05), large
            # one that no row tells of is estimated, by a quarter less than it is
            bound = 0.1 if head_dim == 64 and stage != "forward" else 0.3
            assert found["blocks"][small][0] == pytest.approx(true["blocks"][small][0], rel=bound), small
    assert {row["case"] for row in told} == set(NAMES) and len(told) == 4 * len(NAMES)
    errors = [[abs(row[name] / row["seconds"] - 1) for row in told] for name in ("predicted", "left_out")]
    assert np.quantile(errors[0], 0.9) < 0.05 and np.quantile(errors[1], 0.9) < 0.08
    assert errors[0] != errors[1]
    # nothing is made up for what was not measured
    assert not any(" 256 " in key or " 32 32 " in key for key in found["blocks"])


def test_the_command_writes_the_devices_entry(rows, monkeypatch, tmp_path, capsys):
    few = [row for row in rows if row["head_dim"] == 64 and row["case"] not in ("fleet", "surgical_robot")]
    measure.write_rows(few, tmp_path / "timings.jsonl")
    target = tmp_path / "rates.json"
    target.write_text('{"abacus": {}}')
    monkeypatch.setattr(costs, "RATES", target)
    monkeypatch.setattr("sys.argv", ["rates", "--rows", str(tmp_path / "timings.jsonl")])
    rates.main()
    entries = json.loads(target.read_text())
    assert list(entries) == ["abacus", "toy GPU"]
    out = capsys.readouterr().out
    assert "cogvideox_5b_sparse" in out and "without the case" in out and "toy GPU: written to" in out
    monkeypatch.setattr("canvas_engineering.plan.estimate.all_rates", lambda: entries)
    for row in (row for row in few if row["case"] == "frames_10_d64"):
        case = next(case for case in cases.GPU if case.name == row["case"])
        plan = rates.plan_of(case, row["form"])
        found = plan.estimate("toy GPU", dtype="bfloat16", **rates.shape_of(case))
        assert found.forward_seconds == pytest.approx(row["forward_seconds"]["p50"], rel=0.1)
        assert found.backward_seconds == pytest.approx(row["backward_seconds"]["p50"], rel=0.1)
        with pytest.raises(ValueError, match="not every block time was measured of forward"):
            plan.estimate("toy GPU", dtype="bfloat16", head_dim=128)


def test_rows_of_a_gpu_tell_what_an_entry_needs(monkeypatch):
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "toy GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    launch.arch_of.cache_clear()
    try:
        assert GPU.items() <= measure.environment("cuda").items()
    finally:
        launch.arch_of.cache_clear()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"device": "another GPU"}, "rows of one device make an entry, these are of .*another GPU.*toy GPU"),
        ({"case": "no such case"}, "there is no case 'no such case'"),
        ({"tokens": 7}, "has 320 tokens here and 7 in the rows"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows, change, complaint):
    robot = [row for row in rows if row["case"] == "robot"]
    with pytest.raises(ValueError, match=complaint):
        gpu_rates.entry([robot[0], robot[1] | change])


def test_rows_of_a_processor_or_without_ours_are_refused(rows, monkeypatch, capsys):
    path = measure.RESULTS / "suite.json"
    monkeypatch.setattr("sys.argv", ["rates", "--rows", str(path)])
    with pytest.raises(SystemExit):
        rates.main()
    assert "do not tell a GPU's architecture and multiprocessors" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no row of ours that was timed"):
        gpu_rates.entry([row | {"contestant": "flex"} for row in rows])
    with pytest.raises(ValueError, match="frames_2_d64 is the only case"):
        gpu_rates.entry([row for row in rows if row["case"] == "frames_2_d64"])
    with pytest.raises(ValueError, match="no row of toy GPU depends on its memory"):
        gpu_rates.entry([row for row in rows if row["case"] in ("frames_2_d64", "frames_2_d128")])
