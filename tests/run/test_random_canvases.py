"""Random canvases by seed: canvas_attention in both forms and a dispatcher's step, on every backend, against the
oracles; and what these seeds are shown to reach."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from canvas_engineering import CanvasTopology, MaskSpec, TemporalFill, compile_attention
from canvas_kernels.torch_ops.grouping import group_table
from tests import oracle, program_oracle, random_canvases
from tests.random_canvases import Sample, sample

FAST, SLOW, CHUNK = range(120, 220), range(2200), 220
TRITON = range(5)

unkept = pytest.mark.filterwarnings("ignore:triggers name summaries that no residual accumulator keeps")


def failures(drawn: Sample, backends) -> list[str]:
    """What is wrong with a sample: a line for each call of a backend that is."""
    seed, found = drawn.seed, {}
    for form, case in (("edge", random_canvases.edge_case(drawn)), ("joint", random_canvases.joint_case(drawn))):
        for backend in backends:
            packed = drawn.random("packed").random() < 0.2
            errors = random_canvases.attention_errors(case, backend, packed=packed)
            errors |= random_canvases.isolation_errors(case, backend, drawn.random("isolation"))
            found[f"{form} form on {backend}"] = errors, case.tolerance
    step = random_canvases.step_of(drawn)
    for backend in backends:
        errors = random_canvases.step_errors(drawn, step, backend, as_flags=seed % 2 == 0)
        found[f"step on {backend}"] = errors, step.tolerance
    lines = []
    for what, (errors, tolerance) in found.items():
        wrong = [f"{name} {error:.2g}" for name, error in errors.items() if not error <= tolerance]
        if wrong:
            lines.append(f"{what}: {', '.join(wrong[:6])}")
    return lines


def check(seeds) -> None:
    """Raises AssertionError with every seed that fails, and the declarations of the first few."""
    wrong = {}
    for seed in seeds:
        drawn = sample(seed)
        # on a CPU "auto" is "torch": some seeds ask for it by that name
        lines = failures(drawn, ("auto" if seed % 4 == 0 else "torch", "reference"))
        if lines:
            wrong[seed] = "\n".join([str(drawn), *lines])
    shown = "\n\n".join(list(wrong.values())[:3])
    assert not wrong, f"{len(wrong)} of {len(seeds)} seeds fail, {list(wrong)}; the first of them:\n{shown}"


@unkept
def test_random_canvases_are_the_oracle():
    check(FAST)


@unkept
@pytest.mark.slow
@pytest.mark.parametrize("first", range(SLOW.start, SLOW.stop, CHUNK))
def test_many_random_canvases_are_the_oracle(first):
    check(range(first, first + CHUNK))


@unkept
@pytest.mark.parametrize("seed", TRITON)
def test_random_canvases_on_triton(seed):
    """Few and small: the interpreter takes some milliseconds for every table row, head and pass."""
    pytest.importorskip("triton")
    drawn = sample(seed, max_positions=16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for case in (random_canvases.edge_case(drawn), random_canvases.joint_case(drawn)):
        # the interpreter computes in numpy, which warns of what is not finite
        with np.errstate(all="ignore"):
            errors = random_canvases.attention_errors(case, "triton", torch.float32, device=device)
        assert all(error <= 2e-5 for error in errors.values()), f"{drawn}\n{errors}"


# -- what the seeds reach ----------------------------------------------------------------------------------------------


def reached(drawn: Sample) -> set[str]:
    """What of interest runs in a step of a sample, in words."""
    run, layout = drawn.run(), drawn.layout
    connections = [edge.connection for edge in run.edges]
    found = {f"batch {drawn.batch}", f"heads {drawn.heads}", f"{len(layout.spatial_shape)} spatial dimensions"}
    reads: dict[int, list[oracle.Read]] = {}
    for read in run.reads:
        reads.setdefault(read.connection, []).append(read)
    for number, own in reads.items():
        found |= _of_connection(connections[number], own, layout, run)
    live = [connections[number] for number in reads]
    found |= _of_banks(live, run) | _of_positions(drawn, run, live)
    fired = [edge.trigger is not None and number in reads for number, edge in enumerate(run.edges)]
    found |= {"a trigger that holds"} if any(fired) else set()
    if len({c.fn for c in live}) > 1:
        found.add("several functions")
    plan = compile_attention(layout, drawn.topology, drawn.program, cortex=drawn.cortex)
    grouping = group_table(plan.table)
    found |= {"strided groups"} if grouping.strided else set()
    found |= {"gathered groups"} if grouping.gathered else set()
    return found


def _of_connection(c, own, layout, run) -> set[str]:
    src, dst = (layout.region_spec(name) for name in (c.src, c.dst))
    given = ("None" if c.t_src is None else "int", "None" if c.t_dst is None else "int")
    found = {f"t_src {given[0]}, t_dst {given[1]}", c.write_mode, c.fn}
    keys = {read.keys[query] for read in own for query in read.keys}
    if c.dst in run.banks:
        found.add("a bank by frame" if given != ("None", "None") else "a bank as a whole")
    elif c.src == c.dst and c.mask is None and len(keys) > 1:
        found |= {"a softmax per frame of itself"} if given == ("None", "int") else set()
        found |= {"equal frames that attend to themselves"} if c.t_src == c.t_dst else set()
        if given == ("None", "int") and len(run.reads) == len(own):
            found.add("a softmax per frame of itself, alone")
    shares = {read.weight / c.weight for read in own}
    if c.t_dst is not None:
        found.add(f"fill {c.temporal_fill.value}")
    if c.temporal_fill is TemporalFill.INTERPOLATE and shares != {1.0}:
        found.add("a line between frames" if c.interpolation_order <= 1 else "interpolation of order 2 or more")
    if src.period != dst.period:
        found.add("two periods")
    if c.mask is not None and c.mask.kind != "full":
        found.add(_mask_kind(c.mask, layout.region_size(c.dst)))
    return found


def _mask_kind(mask: MaskSpec, dst_shape) -> str:
    if mask.kind == "tile":
        return "tiles"
    return f"a pattern of {'keys' if torch.tensor(mask.pattern).shape == tuple(dst_shape) else 'pairs'}"


def _of_banks(live, run) -> set[str]:
    found = set()
    for how, framed in (("by frame", True), ("as a whole", False)):
        regions = {c.dst for c in live if c.dst in run.banks and ((c.t_src, c.t_dst) != (None, None)) == framed}
        if len({len(run.banks[region]) for region in regions}) > 1:
            found.add(f"banks of two sizes {how}")
    return found


def _of_positions(drawn, run, live) -> set[str]:
    found, sets = set(), run.attention_sets()
    observed = {name: set(program_oracle.observed(drawn.layout, name)) for name in drawn.layout.regions}
    sources, used = {c.src for c in live}, {name for c in live for name in (c.src, c.dst)}
    if any(observed[name] - sets.keys() for name in sources):
        found.add("queries without a key")
    if any(len(observed[a] & observed[b]) for a in sources for b in sources if a < b):
        found.add("overlapping query regions")
    if any(observed[a] == observed[b] for a in used for b in used if a < b):
        found.add("equal regions")
    if len(set().union(*observed.values())) < drawn.layout.num_positions:
        found.add("positions in no region")
    if run.silenced():
        found.add("replace over add")
    everyone = program_oracle.running(drawn.layout, drawn.topology, drawn.program, drawn.cortex)
    topology = CanvasTopology([edge.connection for edge in everyone.edges])
    every_read = oracle.reads(drawn.layout, topology, everyone.banks)
    idle = [read for read in every_read if read.connection not in {other.connection for other in run.reads}]
    found |= {"connections that do not run"} if idle else set()
    spoilt = random_canvases.unused_positions(drawn, run) if drawn.poisoned else set()
    found |= {"not finite, and of no use"} if spoilt else set()
    if any(spoilt & {*read.keys, *(key for keys in read.keys.values() for key in keys)} for read in idle):
        found.add("not finite, behind connections that do not run")
    return found


REACHED = {
    *(f"t_src {src}, t_dst {dst}" for src in ("None", "int") for dst in ("None", "int")),
    *(f"fill {fill.value}" for fill in TemporalFill),
    *(f"batch {size}" for size in (1, 2, 3)), "heads 1", "heads 2",
    *(f"{count} spatial dimensions" for count in (1, 2, 3)),
    "add", "replace", "gate", *random_canvases.FUNCTIONS, "self_attention", "pooling_attention", "several functions",
    "a bank by frame", "a bank as a whole", "banks of two sizes by frame", "banks of two sizes as a whole",
    "a softmax per frame of itself", "a softmax per frame of itself, alone", "equal frames that attend to themselves",
    "a line between frames", "interpolation of order 2 or more", "two periods",
    "tiles", "a pattern of keys", "a pattern of pairs", "a trigger that holds", "connections that do not run",
    "queries without a key", "overlapping query regions", "equal regions", "positions in no region",
    "replace over add", "not finite, and of no use", "not finite, behind connections that do not run",
    "strided groups", "gathered groups",
}  # fmt: skip


def count_reached(seeds) -> Counter:
    """How many of the seeds reach what."""
    return Counter(what for seed in seeds for what in reached(sample(seed)))


def check_reach(seeds, least: int) -> None:
    counts = count_reached(seeds)
    few = {what: counts[what] for what in sorted(REACHED) if counts[what] < least}
    assert not few, f"of {len(seeds)} seeds too few reach {few}"


@unkept
def test_the_fast_seeds_reach_what_they_are_for():
    check_reach(FAST, 1)


@unkept
@pytest.mark.slow
def test_the_slow_seeds_reach_what_they_are_for():
    check_reach(SLOW, 10)
