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


def step(dispatcher, x, heads, layout, topology, program=None, cortex=None, active_regions=None, summaries=None):
    """(out, errors): the step's output, and (region, attended − queries) of every residual connection that ran.

    ``dispatcher`` gives parameters only; x (B, N, d) and they are float64.
    """
    run = edges(layout, topology, program, cortex)
    programs = {} if program is None else program.regions
    # the slots of a region's bank stand after the canvas
    rows, bank = x, {}
    for name, region in programs.items():
        if region.identity is not None and name in layout.regions:
            module = dispatcher.slot_modules[name.replace(".", "__").replace("[", "_").replace("]", "_")]
            observations = x[:, [oracle._flat(layout, p) for p in oracle._positions(_bounds(layout, name))]]
            slots, _ = bound_slots(dict(module.named_parameters()), heads, observations)
            bank[name] = tuple(range(rows.shape[1], rows.shape[1] + slots.shape[1]))
            rows = torch.cat([rows, slots], 1)
    # (connection, weight, query, f_r(query)) of every read that runs
    results = []
    for read in oracle.reads(layout, type(topology)([edge.connection for edge in run])):
        edge = run[read.connection]
        c = edge.connection
        if active_regions is not None and c.src not in active_regions:
            continue
        if not holds(edge.trigger, summaries or {}):
            continue
        by_keys: dict[tuple[int, ...], list[int]] = {}
        for query, keys in read.keys.items():
            by_keys.setdefault(bank.get(c.dst, keys), []).append(query)
        module = dispatcher.fn_modules[c.fn]
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        for keys, queries in by_keys.items():
            out = family_oracle.oracle(c.fn, state, rows[:, queries], rows[:, list(keys)], heads)
            some = family_oracle.sees(c.fn, len(queries), len(keys))
            results += [
                (read.connection, read.weight, query, out[:, place])
                for place, query in enumerate(queries)
                if some[place]
            ]
    modes = [edge.connection.write_mode for edge in run]
    gated = [number for number, mode in enumerate(modes) if mode == "gate"]
    gates = {number: torch.sigmoid(dispatcher.edge_gates[place]) for place, number in enumerate(gated)}
    replaced = {query for number, _, query, _ in results if modes[number] == "replace"}
    total, weight = [0.0] * x.shape[1], [0.0] * x.shape[1]
    own: dict[int, dict[int, list]] = {}
    for number, share, query, result in results:
        own.setdefault(number, {}).setdefault(query, []).append((share, result))
        if modes[number] == "replace" or query not in replaced:
            total[query] = total[query] + share * gates.get(number, 1.0) * result
            weight[query] += share
    out = torch.stack([total[i] / weight[i] if weight[i] else x[:, i] for i in range(x.shape[1])], 1)
    errors = []
    for number in sorted(own):
        region = run[number].connection.dst
        carrier = programs[region].carrier if region in programs else None
        if "residual" in (carrier, getattr(layout.regions[region], "carrier", None)):
            attended = {q: sum(w * r for w, r in found) / sum(w for w, _ in found) for q, found in own[number].items()}
            errors.append((region, torch.stack([result - x[:, q] for q, result in attended.items()], 1).detach()))
    return out, errors


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
