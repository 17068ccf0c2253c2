"""Program declarations of regions and connections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from canvas_engineering.checked import (
    checked_choice,
    checked_int,
    checked_kind,
    checked_number,
    checked_string,
    checked_strings,
    shown,
)
from canvas_engineering.clock_ir import TIME_DOMAINS, ClockExpr, OnEvent, Periodic
from canvas_engineering.identity import IdentitySpec
from canvas_engineering.learning import LearningSpec, default_learning
from canvas_engineering.masks import MaskSpec

__all__ = [
    "CARRIERS",
    "COMPILE_MODES",
    "OPERATORS",
    "REGION_FAMILIES",
    "WRITE_MODES",
    "ClockSpec",
    "ConnectionProgram",
    "ConstraintSpec",
    "RegionProgram",
]

REGION_FAMILIES = {"observation", "state", "memory", "residual", "action"}
CARRIERS = {"deterministic", "diffusive", "filter", "memory", "residual"}
OPERATORS = {
    *("attend", "observe", "predict", "correct", "bind", "retrieve", "write", "act", "compress", "integrate"),
    *("intervene", "emit_residual"),
}
WRITE_MODES = {"add", "replace", "gate"}
COMPILE_MODES = {"runtime", "freeze", "constant", "export"}

CLOCK_MODES = ("periodic", "on_event", "boundary")
CLOCK_DOMAINS = ("external", "internal", "boundary")
CONSTRAINT_VALUES = {
    "equivariance": ("translation", "rotation", "permutation"),
    "conservation": ("capacity", "energy"),
    "causal_direction": ("acyclic", "forward_only"),
    "monotonicity": ("non_decreasing", "non_increasing"),
}


def _check_strings(spec: Any, *names: str) -> None:
    for name in names:
        checked_string(getattr(spec, name), f"{type(spec).__name__} {name}")


def _check_kinds(spec: Any, **kinds: type) -> None:
    for name, kind in kinds.items():
        checked_kind(getattr(spec, name), f"{type(spec).__name__} {name}", kind, optional=True)


def resolved_carrier(family: str | None, carrier: str | None) -> str:
    """Returns the carrier of a region: "residual" for the family of that name where the default is left, else as it
    is."""
    if carrier not in (None, "deterministic"):
        return carrier
    return "residual" if family == "residual" else "deterministic"


@dataclass(frozen=True)
class ClockSpec:
    """When a region updates.

    Args:
        domain: the time in which the mode or the expression is evaluated: "external" for every step of the environment,
            "boundary" for steps with a lifecycle event only, of which "periodic" then counts; "internal" is external
            time for a region that also runs inner steps.
        mode: "periodic" fires at every ``period``-th step, "on_event" while a residual summary exceeds a threshold,
            "boundary" at a named event.
        period: in steps.
        event_source: for "on_event" the summary, ``"region.kind"``; for "boundary" the event's name.
        event_threshold: for "on_event".
        cooldown: after firing, silent for this many steps, in every domain.
        max_silence: fires anyway after this many steps without, in every domain; None for never.
        max_inner_steps: inner steps that follow each external one, in the domain "internal" only; None for none.
        expr: a clock expression in place of mode, period, event_source and event_threshold.

    Raises:
        ValueError: a number that is not an int, or too small, or a field of the wrong kind. Unknown modes and domains
            are refused where the program is put to use.

    >>> ClockSpec(period=4, max_silence=10).mode
    'periodic'
    """

    domain: str = "external"
    mode: str = "periodic"
    period: int = 1
    event_source: str | None = None
    event_threshold: float = 0.0
    cooldown: int = 0
    max_silence: int | None = None
    max_inner_steps: int | None = None
    expr: ClockExpr | None = None

    def __post_init__(self) -> None:
        _check_strings(self, "domain", "mode")
        _check_kinds(self, event_source=str, expr=ClockExpr)
        for name, least in (("period", 1), ("cooldown", 0), ("max_silence", 1), ("max_inner_steps", 1)):
            value = getattr(self, name)
            if value is not None or name in ("period", "cooldown"):
                # plain ints, whatever kind was given: JSON has no others
                object.__setattr__(self, name, checked_int(value, f"ClockSpec {name}", least))
        threshold = checked_number(self.event_threshold, "ClockSpec event_threshold")
        object.__setattr__(self, "event_threshold", threshold)

    def check(self) -> None:
        """ValueError: an unknown mode or domain, with the choices, or a source that is missing or of no such form."""
        checked_choice(self.domain, "clock domain", CLOCK_DOMAINS)
        checked_choice(self.mode, "clock mode", CLOCK_MODES)
        for node in () if self.expr is None else self.expr.nodes():
            if isinstance(node, (Periodic, OnEvent)):
                checked_choice(node.domain, f"clock domain of {shown(node)}", TIME_DOMAINS)
        if self.expr is not None or self.mode == "periodic":
            return
        form = "'region.kind'" if self.mode == "on_event" else "the name of an event"
        source = self.event_source
        if not source or (self.mode == "on_event" and not all(source.rpartition(".")[::2])):
            raise ValueError(f"a clock of mode {self.mode!r} needs event_source, {form}, got {source!r}")


@dataclass(frozen=True)
class ConstraintSpec:
    """A constraint on a region's dynamics; `validate_constraints` reports violations.

    Args:
        equivariance: "translation", "rotation", "permutation", or None.
        conservation: "capacity", "energy", or None.
        causal_direction: "acyclic" (no cycle is reachable over the region's connections; attending to itself is
            one, at whatever offset in time), "forward_only" (it attends only to regions that start at its own time or
            later), or None.
        monotonicity: "non_decreasing", "non_increasing", or None.

    Raises:
        ValueError: a field of the wrong kind. Unknown values are reported by `validate_constraints`.

    >>> ConstraintSpec(causal_direction="acyclic").equivariance is None
    True
    """

    equivariance: str | None = None
    conservation: str | None = None
    causal_direction: str | None = None
    monotonicity: str | None = None

    def __post_init__(self) -> None:
        _check_kinds(self, equivariance=str, conservation=str, causal_direction=str, monotonicity=str)


@dataclass(frozen=True)
class RegionProgram:
    """The program of a region.

    Args:
        family: the kind of state: "observation", "state", "memory", "residual", "action", or another name.
        tags: sub-tags within the family.
        carrier: the dynamics: "deterministic", "diffusive", "filter", "memory", "residual", or another name. Regions of
            the family "residual" are never deterministic: at the default they have the carrier "residual".
        clock: when it updates; None for always.
        learning: how it learns; None for the family's default.
        compile_mode: what deploy makes of it: "runtime", "freeze", "constant", "export", or "distill", which is
            recorded and does nothing yet.
        constraints: on its dynamics.
        identity: a slot bank stands for its keys.

    Raises:
        ValueError: a field of the wrong kind.

    >>> RegionProgram("residual").carrier, RegionProgram("state", clock=ClockSpec(period=2)).carrier
    ('residual', 'deterministic')
    """

    family: str = "state"
    tags: tuple[str, ...] = ()
    carrier: str = "deterministic"
    clock: ClockSpec | None = None
    learning: LearningSpec | None = None
    compile_mode: str = "runtime"
    constraints: ConstraintSpec | None = None
    identity: IdentitySpec | None = None

    def __post_init__(self) -> None:
        _check_strings(self, "family", "carrier", "compile_mode")
        _check_kinds(self, clock=ClockSpec, learning=LearningSpec, constraints=ConstraintSpec, identity=IdentitySpec)
        object.__setattr__(self, "tags", checked_strings(self.tags, "RegionProgram tags"))
        object.__setattr__(self, "carrier", resolved_carrier(self.family, self.carrier))

    def effective_learning(self) -> LearningSpec:
        """Returns ``learning``, else the family's default, else a plain LearningSpec.

        >>> RegionProgram(family="memory").effective_learning().mode
        'retrieval'
        """
        return default_learning(self.family) if self.learning is None else self.learning

    def effective_compile_mode(self, family_defaults: bool = False) -> str:
        """Returns the region's own mode unless "runtime", else its learning's, else (if requested) its family's."""
        if self.compile_mode != "runtime":
            return self.compile_mode
        if self.learning is not None:
            return self.learning.compile_mode
        return self.effective_learning().compile_mode if family_defaults else "runtime"


@dataclass(frozen=True)
class ConnectionProgram:
    """The program of the connections of one (src, dst) pair.

    Args:
        operator: the intent; brings defaults of its own (`OPERATOR_DEFAULTS`). Any string.
        trigger: the connection runs only while this holds: ``"region.kind < number"`` clauses, joined by ``&&``.
        write_mode: "add" is averaged by weight, "replace" replaces what others add, "gate" is added behind a
            learned gate.
        mask_spec: which pairs are computed, instead of the connection's own mask.

    Raises:
        ValueError: a field of the wrong kind. Unknown write modes and triggers of another form are refused where the
            program is put to use.

    >>> ConnectionProgram("correct", trigger="error.prediction > 0.4", write_mode="gate").operator
    'correct'
    """

    operator: str = "attend"
    trigger: str | None = None
    write_mode: str = "add"
    mask_spec: MaskSpec | None = None

    def __post_init__(self) -> None:
        _check_strings(self, "operator", "write_mode")
        _check_kinds(self, trigger=str, mask_spec=MaskSpec)
