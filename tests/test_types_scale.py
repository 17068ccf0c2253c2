"""Types at scale: ten thousand vehicles compile in seconds, and twice as many cost twice as much."""

from __future__ import annotations

import cProfile
import json
import pstats
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="benchmarks print their tables with rich")

from benchmarks import fleet
from canvas_engineering import ConnectivityPolicy, compile_attention, compile_schema
from examples.fleet import Fleet, Vehicle, declare

ROOT = Path(__file__).resolve().parent.parent

LARGE = """
import json
import resource

from benchmarks.fleet import compile_fleet

compile_fleet(10)
row = compile_fleet(10_000)
print(json.dumps({**row, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""


def test_ten_thousand_vehicles_in_two_gibibytes():
    # A process of its own: its peak is then the fleet's, and torch's.
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LARGE], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert (row["fields"], row["connections"], row["rectangles"]) == (50_001, 270_001, 270_001)
    assert row["peak_bytes"] < 2 * 2**30, row


def calls(action) -> int:
    """Function calls that an action makes: what it costs, without a clock."""
    profile = cProfile.Profile()
    profile.runcall(action)
    return pstats.Stats(profile).total_calls


@pytest.mark.parametrize("array_element", ["isolated", "ring"])
def test_calls_grow_with_the_number_of_vehicles(array_element):
    policy = ConnectivityPolicy(array_element=array_element)

    def compile_both(n):
        bound = compile_schema(Fleet(vehicles=[Vehicle() for _ in range(n)]), connectivity=policy)
        compile_attention(bound.layout, bound.topology)

    compile_both(7)
    small, middle, large = (calls(lambda n=n: compile_both(n)) for n in (100, 200, 400))
    # Twice the added vehicles, twice the added calls. Search loops of numpy and packing may take a step more.
    assert (large - middle) / (middle - small) == pytest.approx(2.0, rel=0.02)


def test_the_step_that_is_timed_is_the_right_one():
    bound = declare(fleet.VEHICLES, T=fleet.FRAMES, d_model=fleet.D_MODEL)
    assert len(bound.topology.connections) == 1_351
    assert (bound.layout.T, bound.layout.d_model, fleet.HEADS, fleet.AT_LEAST) == (4, 256, 4, 40.0)


def test_the_benchmark_runs_and_writes_rows(tmp_path, capsys):
    out = tmp_path / "rows.json"
    code = fleet.main(["--series", "20", "40", "--vehicles", "2", "--rounds", "1", "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert code == 0
    assert [row.get("connections") for row in rows[:2]] == [1 + 27 * 20, 1 + 27 * 40]
    assert [row["contestant"] for row in rows[2:]] == ["ours", "per_edge_loop"]
    assert rows[3]["ratio_of_medians"] > 0
    assert rows[3]["worst_error"] < 1e-5
    assert "times as long" in capsys.readouterr().out


def test_a_wrong_result_is_not_timed(monkeypatch, tmp_path):
    def broken(n_vehicles):
        modules, x = contestants(n_vehicles)
        modules["ours"].fn_modules["cross_attention"].v_proj.bias.data += 0.1
        return modules, x

    contestants = fleet.contestants
    monkeypatch.setattr(fleet, "contestants", broken)
    out = tmp_path / "rows.json"
    assert fleet.main(["--series", "--vehicles", "2", "--out", str(out)]) == 1
    assert not out.exists()
