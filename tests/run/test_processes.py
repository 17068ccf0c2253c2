"""Models on two processes: programs whose clocks and triggers go by each rank's own averages, named regions, grafts."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from canvas_engineering import (
    AttentionDispatcher,
    CanvasLayout,
    CanvasProgram,
    CanvasSchema,
    CanvasTopology,
    ClockSpec,
    Connection,
    ConnectionProgram,
    DeviceScheduler,
    IdentitySpec,
    RegionProgram,
    ResidualAccumulator,
    ResidualSpec,
    graft_looped_blocks,
)
from tests.conformance.processes import Task, ddp, fsdp2, run

D_MODEL, STEPS = 16, 3


def declaration() -> tuple[CanvasLayout, CanvasTopology]:
    """Three regions in two frames, and positions in none."""
    regions = {"a": (0, 2, 0, 3), "b": (0, 2, 4, 6), "c": (0, 2, 6, 7)}
    connections = [
        Connection("a", "a", t_src=0, t_dst=0),
        Connection("a", "b", t_src=0, t_dst=-1, weight=0.5),
        Connection("b", "a", fn="linear_attention"),
        Connection("c", "c"),
        Connection("c", "b"),
    ]
    return CanvasLayout(T=2, d_model=D_MODEL, spatial_shape=(8,), regions=regions), CanvasTopology(connections)


def drawn(module: nn.Module) -> nn.Module:
    """In float64; every parameter moves, for gates and embeddings start at zero."""
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, dtype=parameter.dtype, device=parameter.device))
    return module


def canvases(layout: CanvasLayout, *further) -> list[list[tuple]]:
    """Of each rank, of each step; those of rank 1 are ten times as large."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, STEPS, 2, layout.num_positions, D_MODEL, dtype=torch.float64, generator=generator)
    return [[(size * canvas,) for canvas in canvases] for size, canvases in zip((1.0, 10.0), x)]


class Programmed(nn.Module):
    """A canvas through a dispatcher of banks, gates, triggers and clocks, all of which go by averages of errors."""

    def __init__(self):
        super().__init__()
        layout, topology = declaration()
        # it fires once at most, and so tells whose firings it goes by
        clock = ClockSpec(mode="on_event", event_source="b.prediction", event_threshold=2.0, cooldown=5)
        regions = {
            "a": RegionProgram(identity=IdentitySpec(slot_capacity=3, birth_death=True)),
            "b": RegionProgram(carrier="residual"),
            "c": RegionProgram(clock=clock),
        }
        connections = {
            ("a", "b"): ConnectionProgram("attend", write_mode="gate", trigger="b.prediction < 2.0"),
            ("b", "a"): ConnectionProgram("attend", trigger="b.prediction > 2.0", write_mode="replace"),
        }
        program = CanvasProgram(CanvasSchema(layout, topology), regions, connections)
        errors = ResidualAccumulator(["b"], ResidualSpec(decay=0.5))
        self.dispatcher = AttentionDispatcher(
            topology, layout, D_MODEL, n_heads=2, residual_accumulator=errors, program=program, backend="torch"
        )
        self.scheduler = DeviceScheduler(program, errors)
        self.head = nn.Linear(D_MODEL, 4)
        self.t = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        active = self.scheduler.step(self.t)
        self.t += 1
        return self.head(self.dispatcher(x, active))


def programmed():
    torch.manual_seed(0)
    return drawn(Programmed()), canvases(declaration()[0])


def named(*of_ranks: list):
    """The same regions by name in every step of a rank."""
    torch.manual_seed(0)
    layout, topology = declaration()
    dispatcher = AttentionDispatcher(topology, layout, D_MODEL, n_heads=2, backend="torch")
    given = canvases(layout)
    return drawn(dispatcher), [[(x, names) for (x,) in steps] for names, steps in zip(of_ranks, given)]


class Block(nn.Module):
    """Attention on a canvas, normalised before."""

    def __init__(self):
        super().__init__()
        layout, topology = declaration()
        self.norm = nn.LayerNorm(D_MODEL)
        self.attention = AttentionDispatcher(topology, layout, D_MODEL, n_heads=2, backend="torch")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(self.norm(x), add_to=x)


class Backbone(nn.Module):
    """Blocks that were grafted with loops."""

    def __init__(self, freeze: str):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        graft_looped_blocks(self, max_loops=2, loops=2, block_attr="blocks", inner_dim=D_MODEL, freeze=freeze)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def grafted(freeze: str):
    torch.manual_seed(0)
    return drawn(Backbone(freeze)), canvases(declaration()[0])




TASKS = [
    Task("tests.run.test_processes:programmed", budget=1e-10),
    # no region that is named on the second rank attends to anything
    Task("tests.run.test_processes:named", (["a", "b", "c"], []), budget=1e-10),
    Task("tests.run.test_processes:grafted", ("none",), ("blocks.0", "blocks.1"), 1e-10),
    Task("tests.run.test_processes:grafted", ("full",), budget=1e-10),
]


@pytest.mark.parametrize("under", [ddp, fsdp2])
def test_two_processes_are_one(under, tmp_path):
    assert under(*TASKS, folder=tmp_path) == [0, 0]


def test_ranks_go_by_averages_of_their_own():
    # what the first task is there for: one rank's errors are large, and fire what the other's do not
    model, (small, large) = programmed()
    means = []
    for steps in (small, large):
        model.dispatcher.residual_accumulator.reset()
        model.scheduler.reset()
        for step in steps:
            model(*step)
        means.append(model.dispatcher.summaries["b"]["prediction"])
    assert means[0] < 2.0 < means[1]


def averaged(rank: int) -> None:
    """A step on each rank, one of them without an error, then the mean over ranks; again, as a running average."""
    accumulator = ResidualAccumulator(["a", "b"], ResidualSpec(decay=0.5))
    for sizes, expected in (((1.0, 3.0), 1.0), ((2.0, 4.0), 2.0)):
        accumulator.update("b", torch.full((3,), sizes[rank]))
        accumulator.update("a", torch.ones(3), torch.tensor(float(rank)))
        accumulator.average_over_ranks()
        assert accumulator.summaries()["b"]["prediction"] == expected
    # of a the other rank kept what it had
    assert accumulator.summaries()["a"]["prediction"] == 0.4375


@pytest.mark.slow
def test_averages_over_ranks(tmp_path):
    assert run(averaged, folder=tmp_path) == [0, 0]


def waits(rank: int) -> None:
    if rank:
        time.sleep(60)


@pytest.mark.slow
def test_a_process_that_waits_for_ever_is_a_failure(tmp_path):
    with pytest.raises(AssertionError, match="did not finish within 15 s"):
        run(waits, folder=tmp_path, seconds=15)
