"""Heads shared by ranks: the same bits as one process, over gloo."""

from __future__ import annotations

from functools import partial
from random import Random

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.exc import Unsupported
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from canvas_engineering import CanvasLayout, CanvasTopology, canvas_attention, compile_attention
from tests.conformance.processes import run
from tests.parallel.cases import call_of, check_own, frames_plan, owners, random_plan, run_own

SECONDS = 120
WORLDS = (2, 3, 4, pytest.param(8, marks=pytest.mark.slow))


def equal_to_one_process(rank: int, world: int, seeds: int) -> None:
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("heads",))
    for seed in range(seeds):
        rng = Random(f"heads {seed}")
        form = ("joint", "edge")[seed % 2]
        plan = frames_plan(form) if seed < 2 else random_plan(rng, form)
        call = call_of(plan, seed, (torch.float64, torch.float32)[seed // 2 % 2])
        cuts = {"by_rows": "by_rows", **owners(plan, world, rng)}
        for name, cut in cuts.items() if seed < 4 else rng.sample(sorted(cuts.items()), 2):
            placed = plan.shard(heads=world, cut=cut).on(mesh)
            check_own(call, placed, f"seed {seed}, {form}, {name}", heads=world)
    if world == 2:  # compiling takes as long as all of these cases
        modes(mesh, world)
    refusals(rank, mesh, world)


def modes(mesh, world: int) -> None:
    """Compiled, checkpointed, and again."""
    for heads in (1, world + 1):
        call = call_of(frames_plan("edge"), 5, heads=heads)
        modes_of(call, call.plan.shard(heads=world).on(mesh))


def modes_of(call, placed) -> None:
    expected = run_own(call, placed)

    def attend(call, tensors, placed, options):
        q, k, v, *gain = tensors
        return canvas_attention(q, k, v, placed, gain=gain[0] if gain else None, **call.options)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    checkpointed = partial(checkpoint, attend, use_reentrant=False)
    for name, function in {"again": attend, "compiled": compiled, "checkpointed": checkpointed}.items():
        for wanted, x in zip(expected, run_own(call, placed, function), strict=True):
            assert torch.equal(wanted, x), name


def refusals(rank: int, mesh, world: int) -> None:
    """What is wrong on one rank is an error on all of them, at once."""
    plan, other = frames_plan("joint"), frames_plan("joint", frames=5)
    q = torch.randn(1, 2, plan.n_positions, 4)
    for expected, attempt in {
        f"ranks 0 and {world - 1} differ in their declaration": lambda: (
            (plan, other)[rank == world - 1].shard(heads=world).on(mesh)
        ),
        "ranks 0 and 1 differ in their cut": lambda: plan.shard(
            heads=world, cut=[(rank == 1) * (world - 1)] * plan.n_positions
        ).on(mesh),
        f"cut for {world + 1} ranks along 'heads'": lambda: plan.shard(heads=world + 1).on(mesh),
        "some rank of the sharded plan holds no position": lambda: torch.compile(
            canvas_attention, backend="aot_eager", fullgraph=True
        )(*[q[:, :, : q.shape[2] * (rank == 1)]] * 3, plan.shard(heads=world, cut=[1] * plan.n_positions).on(mesh)),
        "holds .* positions; this rank": lambda: canvas_attention(q, q, q, plan.shard(heads=world).on(mesh)),
    }.items():
        with pytest.raises((ValueError, Unsupported), match=expected):
            attempt()
    dist.barrier()


@pytest.mark.parametrize("world", WORLDS)
def test_heads_give_the_bits_of_one_process(world, tmp_path):
    assert run(equal_to_one_process, world, 8, folder=tmp_path, seconds=SECONDS, world=world) == [0] * world


# -- without processes -------------------------------------------------------------------------------------------------


def plan_of_four():
    layout = CanvasLayout(T=2, d_model=8, spatial_shape=(2,), regions={"a": (0, 2, 0, 2)})
    return compile_attention(layout, CanvasTopology.dense(["a"]))


@pytest.mark.parametrize(
    ("cut", "why"),
    [
        ("by_size", "cut must be one of balanced, by_rows"),
        ([0, 0, 1], "an owner array of 4 ints"),
        ([0, 0, 1, 2], r"shards in \[0, 2\), got 0 … 2"),
        ([[0, 1], [1, 2]], "position 1 to 2 shards"),
        ([[0, 1], [2]], "position 3 to 0 shards"),
        ([[0, 1], [2, 4]], r"positions in \[0, 4\), got 0 … 4"),
    ],
)
def test_a_cut_gives_every_position_to_one_rank(cut, why):
    with pytest.raises(ValueError, match=why):
        plan_of_four().shard(heads=2, cut=cut)


def test_heads_are_a_number_of_ranks():
    with pytest.raises(ValueError, match="heads must be at least 1, got 0"):
        plan_of_four().shard(heads=0)


def test_a_mesh_is_needed():
    with pytest.raises(ValueError, match=r"device mesh with dimensions .*heads"):
        plan_of_four().shard(heads=2).on(None)
