"""Types at scale: ten thousand vehicles compile in seconds, and twice as many cost twice as much."""

from __future__ import annotations

import cProfile
import json
import pstats
import subprocess
import sys
from pathlib import Path

import pytest

from canvas_engineering import ConnectivityPolicy, compile_attention, compile_schema
from examples.fleet import Fleet, Vehicle

ROOT = Path(__file__).resolve().parents[2]

LARGE = """
import json
import re
import resource
from pathlib import Path

from canvas_engineering import compile_attention
from examples.fleet import declare

bound = declare(10_000)
plan = compile_attention(bound.layout, bound.topology)
row = {"fields": len(bound.field_names), "connections": len(bound.topology.connections)}
status = Path("/proc/self/status")
# a process's largest size as rusage has it may be its parent's, from before exec
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
peak = int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1]) if status.exists() else peak
row |= {"rectangles": len(plan.table.weight), "peak_bytes": peak * 1024}
print(json.dumps(row))
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
