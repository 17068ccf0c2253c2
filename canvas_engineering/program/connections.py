"""Connections under a program: operator defaults, triggers, write modes and masks."""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from canvas_engineering.canvas import CanvasLayout
from canvas_engineering.checked import checked_choice, checked_kind, checked_string
from canvas_engineering.connectivity import CanvasTopology, Connection
from canvas_engineering.cortex import CortexRegistry
from canvas_engineering.notices import join_truncated, warn
from canvas_engineering.program.specs import WRITE_MODES, ConnectionProgram

if TYPE_CHECKING:
    from canvas_engineering.program.document import CanvasProgram

__all__ = ["OPERATOR_DEFAULTS", "evaluate_trigger", "resolve_operator_defaults"]

_PLAIN = ("cross_attention", "add", None)
# operator: (attention function, write mode, trigger)
OPERATOR_DEFAULTS: dict[str, tuple[str | None, str, str | None]] = {
    "attend": _PLAIN,
    "observe": _PLAIN,
    "predict": _PLAIN,
    "correct": _PLAIN,
    "bind": _PLAIN,
    "retrieve": ("cross_attention", "add", None),
    "write": ("cross_attention", "replace", None),
    "act": ("cross_attention", "replace", None),
    "compress": ("pooling_attention", "add", None),
    "integrate": _PLAIN,
    "intervene": _PLAIN,
    "emit_residual": _PLAIN,
}

COMPARISONS = {
    "<": operator.lt,
    ">": operator.gt,
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_CLAUSE = re.compile(r"(?P<region>[^<>=!]+)\.(?P<kind>[^.<>=!]+?)\s*(?P<op><=|>=|==|!=|<|>)\s*(?P<number>[^\s<>=!]+)")


@dataclass(frozen=True)
class Clause:
    """``region.kind op number``: one comparison of a trigger."""

    region: str
    kind: str
    op: str
    number: float


def parse_trigger(trigger: str | None) -> tuple[Clause, ...]:
    """Returns the clauses that must all hold; none for None.

    Raises:
        ValueError: a clause of another form than ``"<region>.<kind> <op> <number>"``.

    >>> parse_trigger("arm[0].error.prediction >= 0.25")
    (Clause(region='arm[0].error', kind='prediction', op='>=', number=0.25),)
    """
    trigger = checked_string(trigger, "a trigger", optional=True)
    if trigger is None:
        return ()
    clauses = []
    for text in trigger.split("&&"):
        match = _CLAUSE.fullmatch(text.strip())
        try:
            number = float(match["number"]) if match else math.nan
        except ValueError:
            number = math.nan
        if match is None or not math.isfinite(number):
            raise ValueError(
                f"trigger {trigger!r}: {text.strip()!r} is not '<region>.<kind> <op> <number>' with an op of "
                f"{' '.join(COMPARISONS)}; clauses are joined by &&"
            )
        clauses.append(Clause(match["region"].strip(), match["kind"], match["op"], number))
    return tuple(clauses)


def evaluate_trigger(trigger: str | None, summaries: dict[str, dict[str, float]] | None) -> bool:
    """Whether a trigger holds for these summaries. None always does; one that names a missing summary never does.

    Raises:
        ValueError: a trigger of another form.

    >>> evaluate_trigger("vision.error > 0.25 && vision.error < 1", {"vision": {"error": 0.5}})
    True
    """
    known = {} if summaries is None else checked_kind(summaries, "summaries", dict)
    return all(
        clause.kind in known.get(clause.region, ())
        and COMPARISONS[clause.op](float(known[clause.region][clause.kind]), clause.number)
        for clause in parse_trigger(trigger)
    )


def resolve_operator_defaults(cp: ConnectionProgram | None, base_fn: str) -> tuple[str, str, str | None]:
    """Returns (fn, write_mode, trigger) of a connection whose function would be ``base_fn`` without a program.

    The operator's function replaces "cross_attention" only; its write mode and trigger replace fields at
    their defaults. Operators that are not in OPERATOR_DEFAULTS, and no program at all, change nothing.

    >>> resolve_operator_defaults(ConnectionProgram("compress"), "cross_attention")
    ('pooling_attention', 'add', None)
    """
    checked_string(base_fn, "base_fn")
    cp = checked_kind(cp, "cp", ConnectionProgram, optional=True)
    if cp is None:
        return base_fn, "add", None
    fn, write_mode, trigger = OPERATOR_DEFAULTS.get(cp.operator, (None, "add", None))
    return (
        fn if fn is not None and base_fn == "cross_attention" else base_fn,
        cp.write_mode if cp.write_mode != "add" else write_mode,
        cp.trigger if cp.trigger is not None else trigger,
    )


def resolve_connection(
    connection: Connection,
    default_attn: str,
    cp: ConnectionProgram | None,
    local_backend: str | None,
) -> tuple[Connection, str | None]:
    """Returns the connection as it runs, and its trigger (docs/semantics.md, section 5).

    Args:
        connection: as declared.
        default_attn: of its src region.
        cp: the ConnectionProgram of its pair, if any.
        local_backend: of the cortex that holds both ends, if one does.
    """
    fn, write_mode, trigger = resolve_operator_defaults(cp, default_attn)
    if connection.write_mode != "add" and (cp is None or cp.write_mode == "add"):
        write_mode = connection.write_mode
    wanted = {
        "fn": connection.fn or local_backend or (None if fn == default_attn else fn),
        "write_mode": write_mode,
        "mask": connection.mask if cp is None or cp.mask_spec is None else cp.mask_spec,
    }
    # unchanged connections stay the same objects, and find the same plan
    changes = {name: value for name, value in wanted.items() if value != getattr(connection, name)}
    return dataclasses.replace(connection, **changes) if changes else connection, trigger


def apply_program(
    topology: CanvasTopology,
    layout: CanvasLayout,
    program: CanvasProgram | None = None,
    cortex: CortexRegistry | None = None,
) -> tuple[CanvasTopology, dict[int, str]]:
    """Returns the topology under a program, with functions, write modes and masks resolved, and the triggers.

    Args:
        topology, layout: the declaration.
        program: speaks for every connection of the pairs that it lists; a pair that no connection has gets a
            UserWarning.
        cortex: gives connections inside one cortex its ``local_backend``.

    Returns:
        the topology, its connections in the declared order, and trigger by connection number.

    Raises:
        ValueError: an unknown write mode, with the choices, or a trigger of another form.
    """
    programs = {} if program is None else program.connections
    if not programs and (cortex is None or not cortex.n_assigned):
        return topology, {}
    for (src, dst), cp in programs.items():
        try:
            checked_choice(cp.write_mode, "write_mode", WRITE_MODES)
            parse_trigger(cp.trigger)
        except ValueError as error:
            raise ValueError(f"program of connection {src!r} -> {dst!r}: {error}") from None
    _warn_of_pairs_without_connection(topology, programs)
    defaults = {name: layout.region_spec(name).default_attn for name in layout.regions}
    connections, triggers = [], {}
    for number, c in enumerate(topology.connections):
        cp = programs.get((c.src, c.dst))
        home = cortex.cortex_for(c.src) if cortex is not None and cortex.same_cortex(c.src, c.dst) else None
        local = None if home is None else home.local_backend
        if cp is not None or local is not None:
            c, trigger = resolve_connection(c, defaults.get(c.src, "cross_attention"), cp, local)
            if trigger is not None:
                triggers[number] = trigger
        connections.append(c)
    return CanvasTopology(connections), triggers


def _warn_of_pairs_without_connection(topology: CanvasTopology, programs) -> None:
    idle = programs.keys() - {(c.src, c.dst) for c in topology.connections}
    if idle:
        warn(
            f"{len(idle)} of {len(programs)} connection programs are for pairs that no connection of the topology has: "
            f"{join_truncated(f'{src!r} -> {dst!r}' for src, dst in sorted(idle))}"
        )
