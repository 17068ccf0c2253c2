"""What the matrix runs: modules of one tensor on one small canvas, each with its oracle in float64.

Every subject is built as ``build(tag, dropout, backend)``; declarations with different tags share no plan. Its module
takes x (batch, …) and, where ``takes_active``, names of the regions that are active.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable

import torch
from torch import nn

from canvas_engineering import (
    ATTENTION_REGISTRY,
    AttentionDispatcher,
    CanvasLayout,
    CanvasProgram,
    CanvasSchema,
    CanvasTopology,
    Connection,
    ConnectionProgram,
    IdentitySpec,
    RegionProgram,
    ResidualAccumulator,
    ResidualSpec,
    canvas_attention,
    compile_attention,
    graft_looped_blocks,
)
from tests import family_oracle, oracle, program_oracle

D_MODEL, HEADS, LOOPS = 8, 2, 2
DECAY = 0.5


@dataclasses.dataclass(frozen=True)
class Subject:
    """A row of the matrix.

    Args:
        name: in the table.
        make: (tag, dropout, backend) → module, its parameters not yet drawn.
        oracle: (module in float64, x in float64) → what its forward gives, by plain loops.
        shape: of x after the batch.
        drops: whether ``dropout`` drops anything.
        takes_active: whether the module's second argument names active regions.
        backend: of every module that it builds.
    """

    name: str
    make: Callable[[str, float, str], nn.Module]
    oracle: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    shape: tuple[int, ...]
    drops: bool = False
    takes_active: bool = True
    backend: str = "torch"

    def build(self, tag: str, dropout: float = 0.0, drawn: bool = True) -> nn.Module:
        """The module; all builds of a subject have the same parameters, if ``drawn``."""
        torch.manual_seed(0)
        module = self.make(tag, dropout, self.backend)
        if drawn:
            torch.manual_seed(1)
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(0.3 * torch.randn(parameter.shape))
        return module

    def inputs(self, batch: int = 2) -> torch.Tensor:
        """x (batch, …) in float32: the first entries of one fixed draw."""
        return torch.randn(4, *self.shape, generator=torch.Generator().manual_seed(2))[:batch]


def declaration(tag: str, fn: str | None = None) -> tuple[CanvasLayout, CanvasTopology]:
    """Three regions and unused positions between them, in three frames; c attends to itself alone.

    A fourth region, which no connection names, bears the tag.
    """
    regions = {"a": (0, 3, 0, 4), "b": (0, 3, 5, 7), "c": (0, 1, 8, 10), f"unused {tag}": (0, 3, 4, 5)}
    connections = [
        Connection("a", "a", t_src=0, t_dst=0, fn=fn),
        Connection("a", "a", t_src=0, t_dst=-1, weight=0.5, fn=fn),
        Connection("a", "b", t_dst=0, weight=0.25, fn=fn),
        Connection("b", "a", weight=2.0, fn=fn),
        Connection("c", "c", fn=fn),
    ]
    layout = CanvasLayout(T=3, d_model=D_MODEL, spatial_shape=(10,), regions=regions)
    return layout, CanvasTopology(connections)


N_POSITIONS = declaration("")[0].num_positions


def rows_of(*names: str) -> list[int]:
    """Positions of regions of the declaration."""
    layout, _ = declaration("")
    return [position for name in names for position in layout.region_index(name).tolist()]


# -- attention functions ----------------------------------------------------------------------------------------------


def _dispatcher(fn, tag, dropout, backend) -> nn.Module:
    layout, topology = declaration(tag, fn)
    return AttentionDispatcher(topology, layout, D_MODEL, n_heads=HEADS, dropout=dropout, backend=backend)


def _dispatched(module, x) -> torch.Tensor:
    fns = [connection.fn for connection in module.topology.connections]
    states = {fn: dict([*m.named_parameters(), *m.named_buffers()]) for fn, m in module.fn_modules.items()}
    return family_oracle.step(module.topology, oracle.reads(module.layout, module.topology), fns, states, x, HEADS)


# -- canvas_attention -------------------------------------------------------------------------------------------------


class CanvasAttention(nn.Module):
    """canvas_attention of x (batch, 3, heads, positions, head_dim), which holds q, k and v; gains in edge form."""

    def __init__(self, form: str, tag: str, dropout: float, backend: str):
        super().__init__()
        self.layout, self.topology = declaration(tag)
        self.dropout, self.backend = dropout, backend
        self.plan = compile_attention(self.layout, self.topology, normalize=form)
        with torch.inference_mode(False):
            ones = torch.ones(len(self.topology.connections))
            self.gain = nn.Parameter(ones) if form == "edge" else None

    def forward(self, x: torch.Tensor, active_regions: Iterable[str] | None = None) -> torch.Tensor:
        active = None
        if active_regions is not None:
            active = torch.tensor([float(c.src in active_regions) for c in self.topology.connections])
        dropout_p = self.dropout if self.training else 0.0
        options = {"gain": self.gain, "active": active, "dropout_p": dropout_p, "backend": self.backend}
        return canvas_attention(*x.unbind(1), self.plan, **options)


def _edge_form(module, x) -> torch.Tensor:
    found = oracle.reads(module.layout, module.topology)
    return oracle.edge_attention(*x.unbind(1), found, x.shape[-1] ** -0.5, gain=module.gain)


def _joint_form(module, x) -> torch.Tensor:
    matrix = oracle.joint_matrix(module.layout, module.topology)
    return oracle.joint_attention(*x.unbind(1), matrix, x.shape[-1] ** -0.5)


# -- a program --------------------------------------------------------------------------------------------------------


class Program(nn.Module):
    """Two steps of a dispatcher under a program; the second sees the residuals of the first in its triggers.

    Averages are reset before the first, so that equal inputs give equal outputs.
    """

    def __init__(self, tag: str, dropout: float, backend: str):
        super().__init__()
        layout, topology = declaration(tag)
        regions = {
            "a": RegionProgram(identity=IdentitySpec(slot_capacity=3, birth_death=True)),
            "b": RegionProgram(carrier="residual"),
            "c": RegionProgram(identity=IdentitySpec(slot_capacity=2)),
        }
        connections = {
            ("a", "b"): ConnectionProgram("attend", write_mode="gate"),
            ("b", "a"): ConnectionProgram("attend", trigger="b.prediction > 0.01", write_mode="replace"),
            ("c", "c"): ConnectionProgram("attend", trigger="b.prediction < 0.01"),
        }
        self.program = CanvasProgram(CanvasSchema(layout, topology), regions, connections)
        self.accumulator = ResidualAccumulator(["b"], ResidualSpec(decay=DECAY))
        options = {"residual_accumulator": self.accumulator, "program": self.program, "backend": backend}
        self.dispatcher = AttentionDispatcher(topology, layout, D_MODEL, n_heads=HEADS, dropout=dropout, **options)

    def forward(self, x: torch.Tensor, active_regions: Iterable[str] | None = None) -> torch.Tensor:
        self.accumulator.reset()
        return self.dispatcher(self.dispatcher(x, active_regions), active_regions)


def _programmed(module, x) -> torch.Tensor:
    schema = module.program.schema
    kinds, summaries = ("prediction",), {name: {"prediction": 0.0} for name in module.accumulator.region_names}
    for _ in range(2):
        x, errors = program_oracle.step(
            module.dispatcher, x, HEADS, schema.layout, schema.topology, module.program, summaries=summaries
        )
        summaries = program_oracle.accumulated(summaries, kinds, DECAY, errors)
    return x


# -- a graft ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A pre-norm block of one dispatcher."""

    def __init__(self, tag: str, dropout: float, backend: str):
        super().__init__()
        # without parameters of its own, which would take gradients from rows that nobody attends to
        self.norm = nn.LayerNorm(D_MODEL, elementwise_affine=False)
        self.attention = _dispatcher("cross_attention", tag, dropout, backend)

    def forward(self, x: torch.Tensor, active_regions: Iterable[str] | None = None) -> torch.Tensor:
        return self.attention(self.norm(x), active_regions, add_to=x)


class Backbone(nn.Module):
    """Two blocks that differ in their parameters, grafted with loops; ``recomputes`` them in backward, or not."""

    def __init__(self, recomputes: bool, tag: str, dropout: float, backend: str):
        super().__init__()
        self.blocks = nn.ModuleList(Block(tag, dropout, backend) for _ in range(2))
        graft_looped_blocks(self, max_loops=LOOPS, loops=LOOPS, block_attr="blocks", inner_dim=D_MODEL, freeze="none")
        for block in self.blocks:
            block.use_gradient_checkpointing = recomputes

    def forward(self, x: torch.Tensor, active_regions: Iterable[str] | None = None) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, active_regions)
        return x


def _looped(module, x) -> torch.Tensor:
    for block in module.blocks:
        attention = block.original.attention
        rows = oracle.covered(oracle.reads(attention.layout, attention.topology), N_POSITIONS)[:, None]
        for loop in range(LOOPS):
            shifted = x + block.loop_emb[loop]
            normed = nn.functional.layer_norm(shifted, (D_MODEL,))
            out = torch.where(rows, shifted + _dispatched(attention, normed), shifted)
            share = torch.tanh(block.loop_gate[loop]) + (loop == 0)
            x = x + share * (out - x)
    return x


# -- all of them ------------------------------------------------------------------------------------------------------

CANVAS, QKV = (N_POSITIONS, D_MODEL), (3, HEADS, N_POSITIONS, D_MODEL // HEADS)
# what drops attention weights; the others have none
DROPPING = {
    "cross_attention", "cogvideox", "perceiver", "sparse_attention", "mixture", "mamba", "cosine_attention",
    "sigmoid_attention", "gated", "local_attention", "random_fixed",
}  # fmt: skip


def _functions() -> list[Subject]:
    """A subject for each class of the registry, under its first name."""
    first: dict[type, str] = {}
    for name, cls in ATTENTION_REGISTRY.items():
        first.setdefault(cls, name)
    return [
        Subject(fn, functools.partial(_dispatcher, fn), _dispatched, CANVAS, fn in DROPPING) for fn in first.values()
    ]


SUBJECTS = {
    subject.name: subject
    for subject in (
        *_functions(),
        Subject("canvas_attention (edge)", functools.partial(CanvasAttention, "edge"), _edge_form, QKV, True),
        Subject("canvas_attention (joint)", functools.partial(CanvasAttention, "joint"), _joint_form, QKV, True, False),
        Subject("a program", Program, _programmed, CANVAS, True),
        Subject("a graft", functools.partial(Backbone, False), _looped, CANVAS, True),
        Subject("a graft (recomputed loops)", functools.partial(Backbone, True), _looped, CANVAS, True),
    )
}
