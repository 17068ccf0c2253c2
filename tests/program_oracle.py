"""A step of a canvas under a program, in plain float64 and plain loops, from the semantics' sections 4 and 5.

Of the library it reads declarations' fields and modules' parameters; reads are those of `tests.oracle`, attention
functions those of `tests.family_oracle`.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping

import torch

from tests import family_oracle, oracle

REPLACING = ("write", "act")
COMPARE = {"<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge, "==": operator.eq,
           "!=": operator.ne}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Edge:
    """A connection as it runs."""

    connection: object
    trigger: str | None


def edges(layout, topology, program=None, cortex=None) -> list[Edge]:
    """Every connection with its function, write mode, mask and trigger resolved."""
    return [_edge(c, layout, program, cortex) for c in topology.connections]


def _edge(c, layout, program, cortex) -> Edge:
    cp = None if program is None else program.connections.get((c.src, c.dst))
    raw = layout.regions.get(c.src)
    default_attn = getattr(raw, "default_attn", "cross_attention")
    home = None if cortex is None else cortex.cortex_for(c.src)
    inside = home is not None and cortex.cortex_for(c.dst) == home
    if c.fn is not None:
        fn = c.fn
    elif inside:
        fn = home.local_backend
    elif default_attn != "cross_attention":
        fn = default_attn
    elif cp is not None and cp.operator == "compress":
        fn = "pooling_attention"
    else:
        fn = "cross_attention"
    if cp is not None and cp.write_mode != "add":
        write_mode = cp.write_mode
    elif c.write_mode != "add":
        write_mode = c.write_mode
    else:
        write_mode = "replace" if cp is not None and cp.operator in REPLACING else "add"
    mask = c.mask if cp is None or cp.mask_spec is None else cp.mask_spec
    trigger = None if cp is None else cp.trigger
    return Edge(dataclasses.replace(c, fn=fn, write_mode=write_mode, mask=mask), trigger)


def holds(trigger: str | None, summaries: Mapping[str, Mapping[str, float]]) -> bool:
    """Whether all clauses hold; one of a summary that is missing does not."""
    for clause in [] if trigger is None else trigger.split("&&"):
        (op,) = (op for op in ("<=", ">=", "==", "!=", "<", ">") if op in clause and (op + "=") not in clause)
        left, number = clause.split(op)
        region, _, kind = left.strip().rpartition(".")
        if kind not in summaries.get(region, {}) or not COMPARE[op](summaries[region][kind], float(number)):
            return False
    return True


def bound_slots(parameters, heads, observations):
    """LayerNorm(binding(slots → observations) + slots) (B, slots, d), times the life gate; and that gate, or ones."""
    slots = parameters["slots"].expand(observations.shape[0], -1, -1)
    binding = {name.removeprefix("binding_attn."): value for name, value in parameters.items()}
    bound = family_oracle.oracle("cross_attention", binding, slots, observations, heads) + slots
    centred = bound - bound.mean(-1, keepdim=True)
    bound = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
    bound = bound * parameters["layer_norm.weight"] + parameters["layer_norm.bias"]
    if "life_gate.0.weight" not in parameters:
        return bound, torch.ones(bound.shape[:2], dtype=bound.dtype)
    hidden = bound @ parameters["life_gate.0.weight"].T + parameters["life_gate.0.bias"]
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    gate = torch.sigmoid(hidden @ parameters["life_gate.2.weight"].T + parameters["life_gate.2.bias"])
    return bound * gate, gate[..., 0]


@dataclasses.dataclass(frozen=True)
class Run:
    """A step's connections, resolved; the reads that run; and by region the rows of its slots."""

    edges: list[Edge]
    reads: list[oracle.Read]
    banks: dict[str, tuple[int, ...]]

    def silenced(self) -> set[tuple[int, int]]:
        """(number in ``reads``, query) where a replacing read silences the read."""
        replaces = [self.edges[read.connection].connection.write_mode == "replace" for read in self.reads]
        replaced = {query for read, own in zip(self.reads, replaces) if own for query in read.keys}
        return {
            (number, query)
            for number, (read, own) in enumerate(zip(self.reads, replaces))
            if not own
            for query in read.keys
            if query in replaced
        }

    def attention_sets(self, with_silenced=False) -> dict[int, set[int]]:
        """Query to all rows that it attends to, in every read that counts there, or in every read that runs."""
        silenced, sets = set() if with_silenced else self.silenced(), {}
        for number, read in enumerate(self.reads):
            for query, keys in read.keys.items():
                if (number, query) not in silenced:
                    sets.setdefault(query, set()).update(keys)
        return sets


def banks_of(layout, program=None) -> dict[str, tuple[int, ...]]:
    """Region to the rows of its slots, which stand after the canvas in declared order."""
    first, banks = layout.T * math.prod(layout.spatial_shape), {}
    for name, region in ({} if program is None else program.regions).items():
        if region.identity is not None and name in layout.regions:
            banks[name] = tuple(range(first, first + region.identity.slot_capacity))
            first += region.identity.slot_capacity
    return banks


def running(layout, topology, program=None, cortex=None, active_regions=None, summaries=None) -> Run:
    """What runs in a step."""
    resolved, banks = edges(layout, topology, program, cortex), banks_of(layout, program)
    runs = [
        (active_regions is None or edge.connection.src in active_regions) and holds(edge.trigger, summaries or {})
        for edge in resolved
    ]
    found = oracle.reads(layout, type(topology)([edge.connection for edge in resolved]), banks)
    return Run(resolved, [read for read in found if runs[read.connection]], banks)


def observed(layout, region) -> list[int]:
    """The positions of a region, in canvas order: what its slots bind to."""
    return [oracle.flat(layout, position) for position in oracle.positions(_bounds(layout, region))]


def step(
    dispatcher, x, heads, layout, topology, program=None, cortex=None, active_regions=None, summaries=None, add_to=None
):
    """(out, errors): the step's output, and (region, attended − queries) of every residual connection that ran.

    ``dispatcher`` gives parameters only; x and add_to (B, N, d) and they are float64.
    """
    run = running(layout, topology, program, cortex, active_regions, summaries)
    rows = x
    for name in run.banks:
        module = dispatcher.slot_modules[name.replace(".", "__").replace("[", "_").replace("]", "_")]
        slots, _ = bound_slots(dict(module.named_parameters()), heads, x[:, observed(layout, name)])
        rows = torch.cat([rows, slots], 1)
    modes = [edge.connection.write_mode for edge in run.edges]
    gated = [number for number, mode in enumerate(modes) if mode == "gate"]
    gates = {number: torch.sigmoid(dispatcher.edge_gates[place]) for place, number in enumerate(gated)}
    # (connection, weight, queries, their results) of every read that runs, by their keys
    results, known = [], {}
    for read in run.reads:
        fn = run.edges[read.connection].connection.fn
        by_keys: dict[tuple[int, ...], list[int]] = {}
        for query, keys in read.keys.items():
            by_keys.setdefault(keys, []).append(query)
        for keys, queries in by_keys.items():
            # many reads attend from the same queries over the same keys
            if (fn, tuple(queries), keys) not in known:
                module = dispatcher.fn_modules[fn]
                state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
                seen = family_oracle.seen_pairs(fn, queries, keys, read.shape)
                context = {} if seen is None else {"seen": seen}
                out = family_oracle.oracle(fn, state, rows[:, queries], rows[:, list(keys)], heads, **context)
                some = [place for place in range(len(queries)) if seen is None or seen[place].any()]
                known[fn, tuple(queries), keys] = [queries[place] for place in some], out[:, some]
            results.append((read.connection, read.weight, *known[fn, tuple(queries), keys]))
    replaced = {query for number, _, queries, _ in results if modes[number] == "replace" for query in queries}
    total, weight = torch.zeros_like(x), torch.zeros(x.shape[1], dtype=torch.float64)
    for number, share, queries, result in results:
        kept = [place for place, query in enumerate(queries) if modes[number] == "replace" or query not in replaced]
        at = torch.tensor([queries[place] for place in kept], dtype=torch.int64)
        total = total.index_add(1, at, share * gates.get(number, 1.0) * result[:, kept])
        weight[at] += share
    attended = total / weight.clamp_min(1e-300)[:, None]
    if add_to is not None:
        attended = attended + add_to
    out = torch.where(weight[:, None] > 0, attended, x if add_to is None else add_to)
    return out, _errors(run, results, x, layout, {} if program is None else program.regions)


def _errors(run, results, x, layout, programs):
    errors = []
    for number in sorted({number for number, *_ in results}):
        region = run.edges[number].connection.dst
        carrier = programs[region].carrier if region in programs else None
        if "residual" not in (carrier, getattr(layout.regions[region], "carrier", None)):
            continue
        total, weight = torch.zeros_like(x), torch.zeros(x.shape[1], dtype=torch.float64)
        for other, share, queries, result in results:
            if other == number:
                total = total.index_add(1, torch.tensor(queries, dtype=torch.int64), share * result)
                weight[queries] += share
        own = weight > 0
        if own.any():
            errors.append((region, (total[:, own] / weight[own, None] - x[:, own]).detach()))
    return errors


def _bounds(layout, name):
    raw = layout.regions[name]
    return raw if isinstance(raw, tuple) else raw.bounds


def accumulated(values, kinds, decay, errors):
    """Summaries after ``errors``, with the reduction "max_mean": region to kind to float."""
    values = {region: dict(found) for region, found in values.items()}
    for region, error in errors:
        if region not in values:
            continue
        mean, largest = error.abs().mean().item(), error.abs().max().item()
        new = [mean] if len(kinds) == 1 else [(largest, mean)[i % 2] for i in range(len(kinds))]
        for kind, value in zip(kinds, new):
            values[region][kind] = decay * values[region][kind] + (1 - decay) * value
    return values
