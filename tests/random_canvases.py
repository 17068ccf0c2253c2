"""A canvas, a program and inputs for every seed, and what the oracles say of them.

The same seed gives the same sample for ever. In some samples rows that nothing which counts attends from or to hold NaN
or inf: the library sees those, the oracles see zeros there.
"""

from __future__ import annotations

import dataclasses
import math
from random import Random

import numpy as np
import torch

from canvas_engineering import (
    AttentionDispatcher,
    CanvasLayout,
    CanvasProgram,
    CanvasTopology,
    ConnectionProgram,
    CortexRegistry,
    ResidualAccumulator,
    ResidualSpec,
    canvas_attention,
    compile_attention,
)
from tests import oracle, program_oracle
from tests.strategies import KINDS, programmed, random_layout, random_topology, scattered_canvas

# functions that weigh each pair by itself, for masks of pairs, and all that are drawn
BY_PAIRS = ("cross_attention", "cogvideox", "sigmoid_attention", "gated")
FUNCTIONS = (*BY_PAIRS, "pooling", "linear_attention", "perceiver", "copy")
MODES = ("add", "add", "add", "replace", "gate")
DECAY = 0.5
# Positions of a sample, but of some that are scattered over more; with fewer asked for, there are none of these.
SCATTERED = 56
# Largest error, relative to the largest value of the oracle, where no number that tables keep in float32 was rounded,
# and where some was; three times as much for gradients. Of summaries, which are float32.
EXACT, ROUNDED, SUMMARIES = 1e-9, 2e-6, 1e-5


@dataclasses.dataclass(frozen=True)
class Sample:
    """What a seed draws: a declaration, which regions are active, and the shapes of inputs."""

    seed: int
    layout: CanvasLayout
    topology: CanvasTopology
    program: CanvasProgram | None
    cortex: CortexRegistry | None
    summaries: dict[str, dict[str, float]]
    active: frozenset[str] | None
    batch: int
    heads: int
    head_dim: int
    poisoned: str | None  # None; "unread": rows that no read which runs uses; "silenced": nor one that counts
    off: str | None  # a region whose connections, to it and from it, do not run

    def __str__(self) -> str:
        """Everything that is needed to declare it again."""
        layout = self.layout
        lines = [f"seed {self.seed}: T={layout.T}, spatial_shape={layout.spatial_shape}"]
        for name in layout.regions:
            spec = layout.region_spec(name)
            lines.append(f"{name}: {spec.bounds}, period {spec.period}, default_attn {spec.default_attn!r}")
        lines += map(repr, self.topology.connections)
        if self.program is not None:
            lines += [repr(self.program.regions), repr(self.program.connections)]
            homes = [name for name in self.layout.regions if self.cortex.cortex_for(name) is not None]
            lines.append(f"in {self.cortex.specs!r}: {homes}")
        lines.append(f"summaries {self.summaries}, active {None if self.active is None else sorted(self.active)}")
        lines.append(f"batch {self.batch}, heads {self.heads}, head_dim {self.head_dim}")
        lines.append(f"poisoned {self.poisoned}, off {self.off}")
        return "\n  ".join(lines)

    def random(self, purpose: str) -> Random:
        """A generator of its own for each purpose, so that what one draws changes no other."""
        return Random(f"{self.seed} {purpose}")

    def run(self) -> program_oracle.Run:
        """What runs in a step of a dispatcher."""
        return program_oracle.running(
            self.layout, self.topology, self.program, self.cortex, self.active, self.summaries
        )


def sample(seed: int, max_positions: int = SCATTERED) -> Sample:
    """The sample of ``seed``: of three draws the first in which something runs, or the last."""
    rng = Random(seed)
    for _ in range(3):
        drawn = _sample(rng, seed, max_positions)
        if drawn.run().reads:
            break
    return drawn


def _sample(rng: Random, seed: int, max_positions: int) -> Sample:
    scattered = max_positions >= SCATTERED and rng.random() < 0.03
    size = rng.choice([max_positions // 4, max_positions // 2, max_positions])
    layout = random_layout(rng, size, none=rng.random() < 0.2)
    pairs = scattered or rng.random() < 0.4
    fns = BY_PAIRS if pairs else FUNCTIONS
    # one function alone in most, as in most models
    own = (*[None] * 12, "none") if rng.random() < 0.5 else (None, None, *fns)
    topology = random_topology(rng, layout, pairs, MODES, own)
    if scattered:
        layout, topology = scattered_canvas(rng, MODES, own)
    program, cortex, summaries, active = None, None, {}, None
    if rng.random() < 0.6:
        chosen = fns if rng.random() < 0.6 else ("cross_attention",)
        topology, program, cortex, summaries, active = programmed(rng, layout, topology, pairs, chosen)
    elif rng.random() < 0.4:
        active = {name for name in layout.regions if rng.random() < 0.7}
    poisoned, off = rng.choice([None, None, None, "unread", "silenced"]), None
    if poisoned and rng.random() < 0.7:
        off = rng.choice(list(layout.regions))
        active = set(layout.regions if active is None else active) - {off}
        if program is not None:
            program = _never_attended(program, off)
    return Sample(
        seed, layout, topology, program, cortex, summaries, None if active is None else frozenset(active),
        batch=rng.randint(1, 3), heads=rng.randint(1, 2), head_dim=rng.choice([3, 4, 5, 8]), poisoned=poisoned, off=off,
    )  # fmt: skip


def _never_attended(program: CanvasProgram, off: str) -> CanvasProgram:
    """The program with a trigger that never holds on all connections to ``off``, as of a sensor that is off."""
    connections = dict(program.connections)
    for c in program.schema.topology.connections:
        if c.dst == off:
            own = connections.get((c.src, off), ConnectionProgram())
            connections[c.src, off] = dataclasses.replace(own, trigger=f"{off}.nothing > 0")
    return dataclasses.replace(program, connections=connections)


# -- comparing ---------------------------------------------------------------------------------------------------------


def relative_error(got, expected, least=1e-6) -> float:
    """max|got − expected| / max|expected|, the latter at least ``least``; inf where ``got`` is not finite."""
    if not expected.numel():
        return 0.0
    if not torch.isfinite(got).all():
        return math.inf
    return ((got.double() - expected).abs().max() / expected.abs().max().clamp_min(least)).item()


@dataclasses.dataclass(frozen=True)
class Expected:
    """An oracle's output, and its gradients by the names of leaves."""

    output: torch.Tensor
    gradients: dict[str, torch.Tensor]

    @classmethod
    def of(cls, output, grad, leaves: dict[str, torch.Tensor]) -> Expected:
        return cls(output.detach(), dict(zip(leaves, _gradients(output, leaves.values(), grad))))

    def errors(self, got, grad, leaves: dict[str, torch.Tensor], besides=()) -> dict[str, float]:
        """Relative errors of the output, rows ``besides`` left out (B, N, d), and of the gradient of each leaf, the
        latter over 3."""
        output = got.detach().cpu()
        if len(besides):
            output = output.index_copy(1, torch.tensor(besides), self.output[:, besides])
        found = {"output": relative_error(output, self.output)}
        # of gradients that are zero in exact arithmetic only rounding is left
        least = 1e-3 * max([1e-27, *(g.abs().max().item() for g in self.gradients.values() if g.numel())])
        for name, gradient in zip(leaves, _gradients(got, leaves.values(), grad)):
            found[f"gradient of {name}"] = relative_error(gradient.cpu(), self.gradients[name], least) / 3
        return found


def _gradients(out, leaves, grad):
    leaves = list(leaves)
    found = torch.autograd.grad(out, leaves, grad, allow_unused=True) if out.requires_grad else [None] * len(leaves)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found)]


def _is_float32(value: float) -> bool:
    return float(np.float32(value)) == value


def is_exact(reads, replaces) -> bool:
    """Whether float32 holds the weights of these reads, and one over the sums of those in force at every position.
    ``replaces``: of each read."""
    sums: dict[tuple[bool, int], float] = {}
    for read, own in zip(reads, replaces):
        for query in read.keys:
            sums[own, query] = sums.get((own, query), 0.0) + read.weight
    return all(_is_float32(read.weight) for read in reads) and all(_is_float32(1 / total) for total in sums.values())


# -- what is not finite ------------------------------------------------------------------------------------------------


def poison(rng: Random, x: torch.Tensor, rows, dim: int, values=(math.nan, math.inf, -math.inf)):
    """(x with NaN or inf in some of ``rows`` along ``dim``, x with zeros there, those rows)."""
    rows = sorted(row for row in rows if rng.random() < 0.7)
    zeros, poisoned = x.clone(), x.clone()
    for row in rows:
        zeros.select(dim, row).zero_()
        poisoned.select(dim, row).fill_(rng.choice(values))
    return poisoned, zeros, rows


def dead_rows(sets: dict[int, set[int]], n: int) -> tuple[set[int], set[int]]:
    """(rows that attend to nothing, rows that nothing attends to) of n, by the attention sets."""
    keys = set().union(*sets.values())
    return set(range(n)) - sets.keys(), set(range(n)) - keys


# -- canvas_attention --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of canvas_attention.

    ``plan``; ``inputs`` q, k and v as the library gets them and ``clean`` as the oracle does, float64; ``grad`` of the
    output; ``options`` for the library; ``sets`` by query.
    """

    plan: object
    inputs: list[torch.Tensor]
    clean: list[torch.Tensor]
    grad: torch.Tensor
    options: dict
    expected: Expected
    sets: dict[int, set[int]]
    tolerance: float


def edge_case(drawn: Sample) -> Case:
    """Edge form, with gains and activity in some samples."""
    rng = drawn.random("edge")
    plan = compile_attention(drawn.layout, drawn.topology, drawn.program, cortex=drawn.cortex)
    edges = program_oracle.edges(drawn.layout, drawn.topology, drawn.program, drawn.cortex)
    banks = program_oracle.banks_of(drawn.layout, drawn.program)
    connections = [edge.connection for edge in edges]
    reads = oracle.reads(drawn.layout, CanvasTopology(connections), banks)
    classes = [c.write_mode == "replace" for c in connections]
    gain = active = None
    if rng.random() < 0.4:
        gain = torch.tensor([rng.choice([0.0, 0.5, -1.0, rng.gauss(0, 1)]) for _ in classes], dtype=torch.float64)
    if drawn.off is not None:
        active = torch.tensor([float(drawn.off not in (c.src, c.dst)) for c in connections])
    elif rng.random() < 0.4:
        active = torch.tensor([float(rng.random() < 0.7) for _ in classes])
    live = [read for read in reads if active is None or active[read.connection]]
    sets = program_oracle.Run(edges, live, banks).attention_sets(drawn.poisoned != "silenced")
    scale = rng.choice([None, 0.7])
    factor = drawn.head_dim**-0.5 if scale is None else scale

    def run(q, k, v, gain=None):
        return oracle.edge_attention(q, k, v, live, factor, gain, None, classes)

    tolerance = EXACT if is_exact(live, [classes[read.connection] for read in live]) else ROUNDED
    return _case(drawn, plan, run, {"gain": gain, "active": active, "scale": scale}, sets, tolerance)


def joint_case(drawn: Sample) -> Case:
    """Joint form, of the same connections without gates and triggers, which it does not take."""
    topology = CanvasTopology([dataclasses.replace(c, write_mode="add") for c in drawn.topology.connections])
    program, banks = None, {}
    if drawn.program is not None:
        program = dataclasses.replace(drawn.program, connections={})
        banks = program_oracle.banks_of(drawn.layout, program)
    plan = compile_attention(drawn.layout, topology, program, normalize="joint")
    matrix = oracle.joint_matrix(drawn.layout, topology, banks)
    sets = {row: set(keys.nonzero().flatten().tolist()) for row, keys in enumerate(matrix) if (keys > 0).any()}
    tolerance = EXACT if all(map(_is_float32, matrix.unique().tolist())) else ROUNDED

    def run(q, k, v):
        return oracle.joint_attention(q, k, v, matrix, 0.7)

    return _case(drawn, plan, run, {"scale": 0.7}, sets, tolerance)


def _case(drawn: Sample, plan, run, options, sets, tolerance) -> Case:
    inputs, clean, grad = _inputs(drawn, plan.n_positions, sets)
    leaves = dict(zip("qkv", (x.clone().requires_grad_() for x in clean)))
    if options.get("gain") is not None:
        leaves["gain"] = options["gain"].clone().requires_grad_()
    expected = Expected.of(run(*leaves.values()), grad, leaves)
    return Case(plan, inputs, clean, grad, options, expected, sets, tolerance)


def _inputs(drawn: Sample, n: int, sets):
    generator = torch.Generator().manual_seed(drawn.seed)
    # as they lie in memory: heads before positions, or, as projections leave them, after
    shape = (drawn.batch, n, drawn.heads, drawn.head_dim)
    heads_first = drawn.random("memory").random() < 0.5
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).transpose(1, 2) for _ in range(4)]
    # a mean of 2 in the values shows what a missing centring or a wrong denominator would hide
    inputs, grad = [tensors[0], tensors[1], tensors[2] + 2], tensors[3]
    clean = inputs
    if drawn.poisoned:
        rng, (queries, keys) = drawn.random("poison"), dead_rows(sets, n)
        pairs = [poison(rng, x, rows, 2)[:2] for x, rows in zip(inputs, (queries, keys, keys))]
        inputs, clean = ([pair[i] for pair in pairs] for i in (0, 1))
    if heads_first:
        inputs = [x.contiguous() for x in inputs]
    return inputs, clean, grad


def attention_errors(case: Case, backend: str, dtype=torch.float64, device="cpu", packed=False) -> dict[str, float]:
    """Of one backend: of the output and of all gradients."""
    leaves = dict(zip("qkv", (x.detach().to(device, dtype).requires_grad_() for x in case.inputs)))
    options = dict(case.options)
    if options.get("gain") is not None:
        leaves["gain"] = options["gain"] = case.options["gain"].to(device, dtype).requires_grad_()
    if options.get("active") is not None:
        options["active"] = options["active"].to(device)
    q, k, v = (leaves[name] for name in "qkv")
    if packed:
        rows = (case.plan.pack(x) for x in (q, k, v))
        out = case.plan.unpack(canvas_attention(*rows, case.plan, backend=backend, packed=True, **options))
    else:
        out = canvas_attention(q, k, v, case.plan, backend=backend, **options)
    return case.expected.errors(out, case.grad.to(device, dtype), leaves)


def isolation_errors(case: Case, backend: str, rng: Random) -> dict[str, float]:
    """NaN in rows that are attended to: the outputs of rows that attend to none of them."""
    n = case.clean[0].shape[2]
    spoilt = {row for row in range(n) if rng.random() < 0.3}
    hit = {row for row, keys in case.sets.items() if row in spoilt or keys & spoilt}
    rows = sorted(set(range(n)) - hit)
    inputs = [poison(rng, x, spoilt, 2, [math.nan])[0] for x in case.clean]
    out = canvas_attention(*inputs, case.plan, backend=backend, **case.options)
    return {"isolated output": relative_error(out[:, :, rows], case.expected.output[:, :, rows], 1e-3)}


# -- dispatchers -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a dispatcher: ``x`` and ``add_to`` as the library gets them and as the oracle does, float64; rows
    whose x is not finite; what the oracle expects, its summaries too; ``state`` of the parameters."""

    x: torch.Tensor
    clean: torch.Tensor
    spoilt: list[int]
    add_to: torch.Tensor | None
    grad: torch.Tensor
    expected: Expected
    summaries: dict[str, dict[str, float]]
    state: dict[str, torch.Tensor]
    tolerance: float


def dispatcher_of(drawn: Sample, backend: str, state=None) -> AttentionDispatcher:
    """A dispatcher in float64 with summaries as drawn; its parameters from ``state``, or random."""
    accumulator = None
    if drawn.program is not None:
        accumulator = ResidualAccumulator(list(drawn.summaries), ResidualSpec(KINDS, decay=DECAY))
        for row, name in enumerate(accumulator.region_names):
            accumulator.values[row] = torch.tensor([drawn.summaries[name][kind] for kind in KINDS])
    width = drawn.heads * drawn.head_dim
    made = AttentionDispatcher(
        drawn.topology, drawn.layout, width, drawn.heads,
        residual_accumulator=accumulator, program=drawn.program, cortex=drawn.cortex, backend=backend,
    ).double()  # fmt: skip
    if state is None:
        generator = torch.Generator().manual_seed(drawn.seed)
        for parameter in made.parameters():
            parameter.data.normal_(std=0.5, generator=generator)
    else:
        made.load_state_dict(state)
    return made


def step_of(drawn: Sample) -> Step:
    """What the oracle says of a step."""
    made, run = dispatcher_of(drawn, "reference"), drawn.run()
    generator, n = torch.Generator().manual_seed(drawn.seed + 1), drawn.layout.num_positions
    shape = (drawn.batch, n, drawn.heads * drawn.head_dim)
    x, grad, add_to = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    if drawn.random("add_to").random() < 0.7:
        add_to = None
    clean, spoilt = x, []
    if drawn.poisoned:
        x, clean, spoilt = poison(drawn.random("poison"), x, unused_positions(drawn, run), 1)
    state = {name: value.clone() for name, value in made.state_dict().items()}
    leaf = clean.clone().requires_grad_()
    expected, residuals = program_oracle.step(
        made, leaf, drawn.heads, drawn.layout, drawn.topology, drawn.program, drawn.cortex,
        drawn.active, drawn.summaries, add_to,
    )  # fmt: skip
    after = program_oracle.accumulated(drawn.summaries, KINDS, DECAY, residuals)
    modes = [run.edges[read.connection].connection.write_mode for read in run.reads]
    plain = is_exact(run.reads, [mode == "replace" for mode in modes]) and "gate" not in modes
    expected = Expected.of(expected, grad, {"x": leaf, **dict(made.named_parameters())})
    return Step(x, clean, spoilt, add_to, grad, expected, after, state, EXACT if plain else ROUNDED)


def unused_positions(drawn: Sample, run: program_oracle.Run) -> set[int]:
    """Positions on which no output depends but, where nothing is read, their own; and no summary."""
    sets = run.attention_sets(drawn.poisoned != "silenced")
    used = set().union(sets.keys(), *sets.values())
    for read in run.reads:
        program = (
            None if drawn.program is None else drawn.program.regions.get(run.edges[read.connection].connection.dst)
        )
        if program is not None and program.carrier == "residual":
            # what a replacing read silences still has an error
            used.update(read.keys, *read.keys.values())
    for name, slots in run.banks.items():
        if used.intersection(slots):
            used.update(program_oracle.observed(drawn.layout, name))
    return set(range(drawn.layout.num_positions)) - used


def step_errors(drawn: Sample, step: Step, backend: str, as_flags: bool = False) -> dict[str, float]:
    """Of one backend, of output, gradients and summaries; ``as_flags``: activity as a tensor."""
    made = dispatcher_of(drawn, backend, step.state)
    active = drawn.active
    if as_flags and active is not None:
        active = torch.tensor([float(name in active) for name in drawn.layout.regions])
    x = step.x.clone().requires_grad_()
    out = made(x, active, add_to=step.add_to)
    leaves = {"x": x, **dict(made.named_parameters())}
    # what is not finite passes through where nothing is read
    through = step.spoilt if step.add_to is None else []
    passes = torch.equal(out[:, through].nan_to_num(7.0), step.x[:, through].nan_to_num(7.0))
    found = step.expected.errors(out, step.grad, leaves, through)
    found["what passes through"] = 0.0 if passes else math.inf
    if made.residual_accumulator is not None and drawn.summaries:
        flat = [[step.summaries[name][kind] for kind in KINDS] for name in made.residual_accumulator.region_names]
        error = relative_error(made.residual_accumulator.values, torch.tensor(flat).double())
        found["summaries"] = error * step.tolerance / SUMMARIES
    return found
