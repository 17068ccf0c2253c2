"""Validation of programs: unknown values raise errors, violated constraints are reported."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator

from canvas_engineering.checked import checked_choice, checked_kind
from canvas_engineering.clock_ir import OnEvent
from canvas_engineering.connectivity import Connection, resolve_connections
from canvas_engineering.notices import join_truncated, warn
from canvas_engineering.program.connections import apply_program, parse_trigger
from canvas_engineering.program.document import CanvasProgram
from canvas_engineering.program.specs import (
    COMPILE_MODES,
    CONSTRAINT_VALUES,
    WRITE_MODES,
    ClockSpec,
    ConstraintSpec,
    RegionProgram,
)

__all__ = ["validate_constraints"]

DEPLOY_MODES = (*sorted(COMPILE_MODES), "distill")
# what a key means depends on where it stands in the list, as for the chunks of a mixture
_ORDERED = ("mamba", "rwkv", "copy", "random_fixed", "mixture")
# equivariance: attention functions that break it
_BREAKING: dict[str | None, tuple[str, ...]] = {
    "permutation": ("local_attention", "hyena", *_ORDERED),
    "rotation": ("local_attention", "hyena", *_ORDERED),
    "translation": _ORDERED,
}


def check_program(program: CanvasProgram, on_layout: bool = True) -> None:
    """Refuses a program that cannot be run as it stands, and warns of what in it has no effect: programs of regions
    that the layout lacks, and inner steps outside of the domain "internal".

    Args:
        program: the program.
        on_layout: whether it runs on its layout; clocks alone run without.

    Raises:
        ValueError: an unknown clock mode or domain, compile mode, write mode or identity mode, with the choices; a
            trigger or an event source of another form. The message names the region or the connection.
    """
    checked_kind(program, "program", CanvasProgram)
    _warn_of_idle_declarations(program, on_layout)
    for name, region in program.regions.items():
        try:
            checked_choice(region.compile_mode, "compile_mode", DEPLOY_MODES)
            if region.learning is not None:
                checked_choice(region.learning.compile_mode, "compile_mode", DEPLOY_MODES)
            if region.clock is not None:
                region.clock.check()
            if region.identity is not None:
                region.identity.check()
        except ValueError as error:
            raise ValueError(f"program of region {name!r}: {error}") from None
    for (src, dst), connection in program.connections.items():
        try:
            checked_choice(connection.write_mode, "write_mode", WRITE_MODES)
            parse_trigger(connection.trigger)
        except ValueError as error:
            raise ValueError(f"program of connection {src!r} -> {dst!r}: {error}") from None


def _warn_of_idle_declarations(program: CanvasProgram, on_layout: bool) -> None:
    missing = [name for name in program.regions if on_layout and name not in program.schema.layout.regions]
    clocks = ((name, region.clock) for name, region in program.regions.items() if region.clock is not None)
    idle = [name for name, clock in clocks if clock.max_inner_steps is not None and clock.domain != "internal"]
    for names, what in (
        (missing, "are for regions that the layout does not have, and are ignored"),
        (idle, "have clocks with max_inner_steps in another domain than 'internal', which runs none"),
    ):
        if names:
            warn(f"{len(names)} of {len(program.regions)} region programs {what}: {join_truncated(map(repr, names))}")


def validate_constraints(program: CanvasProgram) -> list[str]:
    """Returns descriptions of violated constraints; empty if none.

    Checked are, for each region with constraints: that their values exist; ``equivariance`` against the attention
    functions of the region's connections; ``conservation`` against replacing writes of its connections;
    ``causal_direction`` "acyclic" against cycles of connections (attending to oneself is one) and "forward_only"
    against connections to regions that start earlier; ``monotonicity`` against the carriers "diffusive" and "filter".
    Connections of weight 0 or of the function "none" do not run, and do not count.

    Returns:
        strings that start with the region's name. Unknown values are reported, never raised.

    >>> from canvas_engineering import CanvasLayout, CanvasSchema, CanvasTopology
    >>> layout = CanvasLayout(T=1, spatial_shape=(2,), d_model=8, regions={"a": (0, 1, 0, 1), "b": (0, 1, 1, 2)})
    >>> schema = CanvasSchema(layout, CanvasTopology([Connection("a", "b"), Connection("b", "a")]))
    >>> acyclic = RegionProgram(constraints=ConstraintSpec(causal_direction="acyclic"))
    >>> validate_constraints(CanvasProgram(schema, {"a": acyclic}))
    ["a: causal_direction 'acyclic' does not hold: a -> b -> a is a cycle"]
    """
    checked_kind(program, "program", CanvasProgram)
    if all(region.constraints is None for region in program.regions.values()):
        return []
    edges = _running(program)
    keys_of: dict[str, list[str]] = {}
    for connection, _ in edges:
        keys_of.setdefault(connection.src, []).append(connection.dst)
    results = []
    for name, region in program.regions.items():
        if region.constraints is not None:
            problems = _problems(name, region, region.constraints, program, edges, keys_of)
            results += [f"{name}: {problem}" for problem in problems]
    return results


def clock_problems(program: CanvasProgram) -> list[str]:
    """Returns the summaries that clocks of a program's regions name and no region of the layout can have, in words."""
    results = []
    for name, region in program.regions.items():
        for source in () if region.clock is None else dict.fromkeys(_sources(region.clock)):
            if source.rpartition(".")[0] not in program.schema.layout.regions:
                results.append(f"{name}: its clock waits for {source!r}, of a region that the layout does not have")
    return results


def _sources(clock: ClockSpec) -> Iterator[str]:
    """Returns the summaries that a clock looks at."""
    if clock.expr is not None:
        yield from (node.source for node in clock.expr.nodes() if isinstance(node, OnEvent))
    elif clock.mode == "on_event" and clock.event_source is not None:
        yield clock.event_source


def _running(program: CanvasProgram) -> list[tuple[Connection, str]]:
    """Connections that run under the program, with the attention function of each."""
    schema = program.schema
    if schema.topology is None:
        return []
    with warnings.catch_warnings():
        # only reports constraints: compilers warn of what is skipped
        warnings.simplefilter("ignore", UserWarning)
        # triggers decide when a connection runs, not what it is: compilers refuse malformed ones
        untriggered = {pair: dataclasses.replace(spoken, trigger=None) for pair, spoken in program.connections.items()}
        try:
            topology, _ = apply_program(
                schema.topology, schema.layout, dataclasses.replace(program, connections=untriggered)
            )
        except ValueError:
            # so do they unknown write modes; constraints can still be checked
            topology = schema.topology
        return [(connection, fn) for _, connection, fn in resolve_connections(topology, schema.layout)]


def _problems(
    name: str,
    region: RegionProgram,
    constraints: ConstraintSpec,
    program: CanvasProgram,
    edges: list[tuple[Connection, str]],
    keys_of: dict[str, list[str]],
) -> Iterator[str]:
    for field, known in CONSTRAINT_VALUES.items():
        value = getattr(constraints, field)
        if value is not None and value not in known:
            yield f"unknown {field} {value!r}: choose one of {', '.join(known)}"
    breaking = _BREAKING.get(constraints.equivariance, ())
    for connection, fn in edges:
        if connection.src == name and fn in breaking:
            yield (
                f"equivariance {constraints.equivariance!r} does not hold: the connection to {connection.dst!r} runs "
                f"{fn!r}, which depends on the order of positions"
            )
    if constraints.conservation in CONSTRAINT_VALUES["conservation"]:
        for connection, _ in edges:
            if name in (connection.src, connection.dst) and connection.write_mode == "replace":
                yield (
                    f"conservation {constraints.conservation!r} does not hold: the connection "
                    f"{connection.src} -> {connection.dst} replaces what it writes to"
                )
    if constraints.causal_direction == "acyclic":
        cycle = _cycle(name, keys_of)
        if cycle:
            yield f"causal_direction 'acyclic' does not hold: {' -> '.join(cycle)} is a cycle"
    if constraints.causal_direction == "forward_only":
        layout = program.schema.layout
        for dst in dict.fromkeys(keys_of.get(name, ())):
            start, other = (layout.region_spec(region).bounds[0] for region in (name, dst))
            if other < start:
                yield f"causal_direction 'forward_only' does not hold: {dst!r} starts at frame {other}, before {start}"
    if constraints.monotonicity in CONSTRAINT_VALUES["monotonicity"] and region.carrier in ("diffusive", "filter"):
        yield f"monotonicity {constraints.monotonicity!r} does not hold for the carrier {region.carrier!r}"


def _cycle(root: str, keys_of: dict[str, list[str]]) -> list[str]:
    """Returns a cycle that can be reached from ``root``, its first region repeated at the end; empty if there is
    none."""
    done: set[str] = set()
    path: dict[str, None] = {root: None}
    pending = [iter(keys_of.get(root, ()))]
    while pending:
        following = next(pending[-1], None)
        if following is None:
            pending.pop()
            done.add(path.popitem()[0])
        elif following in path:
            names = list(path)
            return [*names[names.index(following) :], following]
        elif following not in done:
            path[following] = None
            pending.append(iter(keys_of.get(following, ())))
    return []
