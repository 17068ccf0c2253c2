"""Rows cut over ranks: keys pulled to queries, and queries that travel to keys, over gloo."""

from __future__ import annotations

from functools import partial
from random import Random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from canvas_engineering import canvas_attention
from tests.conformance.processes import run
from tests.parallel.cases import call_of, check_own, frames_plan, owners, random_plan, run_own

SECONDS = 240
WORLDS = (2, 3, 4, pytest.param(8, marks=pytest.mark.slow))
pytestmark = pytest.mark.filterwarnings("ignore:.*have no keys on this layout:UserWarning")


class Sent(TorchDispatchMode):
    """Counts the elements that exchanges send to other ranks."""

    def __init__(self, rank: int):
        super().__init__()
        self.rank, self.elements = rank, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "all_to_all_single" in str(function):
            self.elements += sum(count for peer, count in enumerate(args[2]) if peer != self.rank)
        return function(*args, **(kwargs or {}))


def equal_to_one_process(rank: int, world: int, seeds: int) -> None:
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("rows",))
    both = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("rows", "heads")) if world % 2 == 0 else None
    for seed in range(seeds):
        rng = Random(f"rows {seed}")
        form = ("joint", "edge")[seed % 2]
        plan = frames_plan(form) if seed < 2 else random_plan(rng, form)
        call = call_of(plan, seed, (torch.float64, torch.float32)[seed // 2 % 4 == 3])
        cuts = {"by_rows": "by_rows", "balanced": "balanced", **owners(plan, world, rng)}
        for name, cut in cuts.items() if seed < 4 else rng.sample(sorted(cuts.items(), key=str), 2):
            placed = plan.shard(rows=world, cut=cut, width=4).on(mesh)
            check_own(call, placed, f"seed {seed}, {form}, {name}")
        if both is not None:
            check_own(call, plan.shard(rows=2, heads=world // 2, width=4).on(both), f"seed {seed}, {form}, both")
    counted(rank, mesh, world)
    if world == 2:
        modes(mesh, world)
    dist.barrier()


def counted(rank: int, mesh, world: int) -> None:
    """What is sent is what the plan says, forward and backward."""
    for form in ("joint", "edge"):
        call = call_of(frames_plan(form, frames=9), 3, heads=3)
        sharded = call.plan.shard(rows=world, width=4)
        placed = sharded.on(mesh)
        (batch, heads, _, dim), tensors = call.upstream.shape, call.tensors
        own = torch.from_numpy(placed.positions)
        q, k, v = (x[:, :, own].requires_grad_() for x in tensors[:3])
        with Sent(rank) as sent:
            out = canvas_attention(q, k, v, placed, **call.options)
        forward = sent.elements
        with Sent(rank) as sent:
            torch.autograd.grad(out, (q, k, v), call.upstream[:, :, own])
        pulls, visits = (
            need.counts(world) * (1 - np.eye(world, dtype=int)) for need in (sharded.pulls(), sharded.visits())
        )
        row = batch * heads
        there, back = pulls[:, rank].sum(), pulls[rank].sum()
        guests, guested = visits[:, rank].sum(), visits[rank].sum()
        assert forward == row * (there * 2 * dim + guests * dim + guested * (dim + 1)), (form, forward)
        assert sent.elements == row * (back * 2 * dim + guested * dim + guests * (dim + 1)), (form, sent.elements)


def modes(mesh, world: int) -> None:
    """Compiled, checkpointed, and again: the same bits."""
    for form in ("joint", "edge"):
        call = call_of(frames_plan(form), 5, heads=2)
        placed = call.plan.shard(rows=world, width=4).on(mesh)
        assert (placed.rank_plan.travel is not None) == (form == "joint")

        def attend(call, tensors, placed, options):
            q, k, v, *gain = tensors
            return canvas_attention(q, k, v, placed, gain=gain[0] if gain else None, **call.options)

        expected = run_own(call, placed)
        compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
        checkpointed = partial(checkpoint, attend, use_reentrant=False)
        for name, function in {"again": attend, "compiled": compiled, "checkpointed": checkpointed}.items():
            for wanted, x in zip(expected, run_own(call, placed, function), strict=True):
                assert torch.equal(wanted, x), f"{form}, {name}: off by {(wanted - x).abs().max()}"


@pytest.mark.parametrize("world", WORLDS)
def test_rows_equal_one_process(world, tmp_path):
    assert run(equal_to_one_process, world, 12, folder=tmp_path, seconds=SECONDS, world=world) == [0] * world
