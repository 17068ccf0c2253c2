"""A rank that raises, exits or stays away is an error on the others within the timeout, never a hang."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.device_mesh import init_device_mesh

from canvas_engineering import canvas_attention
from tests.parallel.cases import frames_plan

# Seconds: of the process group, and for which a rank stays away, so that only the timeout ends the others sooner.
WORLD, TIMEOUT, AWAY = 3, 10, 40
FAILURES = ("raises", "exits", "stays away")


def fail(rank: int, failure: str, folder: str) -> None:
    """Writes what this rank ended by, the last one as ``failure`` says."""
    torch.set_num_threads(1)
    options = {"rank": rank, "world_size": WORLD, "timeout": timedelta(seconds=TIMEOUT)}
    dist.init_process_group("gloo", f"file://{folder}/meeting", **options)
    mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("rows",))
    placed = frames_plan("joint").shard(rows=WORLD, width=4).on(mesh)
    q = torch.randn(1, 2, len(placed.positions), 4, requires_grad=True)
    outcome = "nothing"
    start = time.monotonic()
    try:
        out = canvas_attention(q, q, q, placed)
        if rank == WORLD - 1:
            if failure == "raises":
                raise ValueError("a fault of this rank alone")
            if failure == "exits":
                os._exit(3)
            time.sleep(AWAY)
        out.sum().backward()
    except Exception as error:
        outcome = type(error).__name__
    with open(f"{folder}/{rank}", "w") as file:
        file.write(f"{outcome} {time.monotonic() - start < AWAY}")
    os._exit(0)  # without waiting for the others


@pytest.mark.parametrize("failure", FAILURES)
def test_a_rank_that_fails_is_an_error_on_all(failure, tmp_path):
    processes = torch.multiprocessing.start_processes(
        fail, (failure, str(tmp_path)), WORLD, join=False, start_method="spawn"
    )
    try:
        for process in processes.processes:
            process.join(10 * AWAY)
            assert not process.is_alive()
    finally:
        for process in processes.processes:
            process.kill()
    outcomes = [(tmp_path / str(rank)).read_text().split() for rank in range(WORLD - 1)]
    # ranks that wait for the one that failed cannot get its rows
    assert [outcome for outcome, _ in outcomes] == ["RuntimeError"] * (WORLD - 1)
    assert all(in_time == "True" for _, in_time in outcomes)
