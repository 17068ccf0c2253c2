"""Clock expressions: when a region updates, as a small tree that JSON keeps exactly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field, dataclass, fields
from typing import Any, ClassVar

from canvas_engineering.checked import (
    DEEPEST,
    checked_depth,
    checked_int,
    checked_kind,
    checked_number,
    checked_string,
    shown,
)

__all__ = [
    "And",
    "BoundaryExpr",
    "ClockContext",
    "ClockExpr",
    "Cooldown",
    "MaxSilence",
    "Not",
    "OnEvent",
    "Or",
    "Periodic",
    "boundary",
    "on",
    "periodic",
]

TIME_DOMAINS = ("external", "boundary")
MOST_NODES = 10_000

Summaries = dict[str, dict[str, float]]


@dataclass
class ClockContext:
    """The inputs of a clock at one step.

    Args:
        external_t: the step.
        summaries: region to kind to value, as they stand when the step begins.
        boundary: name of the lifecycle event of this step, if any.
        last_fired: the step at which the region fired last; −1 before it ever did.
        cooldown_until: Cooldown nodes are silent before this step.
        boundary_t: how many earlier steps had a lifecycle event.

    >>> ClockContext(3, summaries={"error": {"prediction": 0.5}}).summary("error.prediction")
    0.5
    """

    external_t: int = 0
    summaries: Summaries | None = None
    boundary: str | None = None
    last_fired: int = -1
    cooldown_until: int = 0
    boundary_t: int = 0

    def time(self, domain: str) -> int | None:
        """Returns the time of a domain: ``external_t``, or, at steps with a lifecycle event, how many there were
        before.

        Raises:
            ValueError: another domain than "external" and "boundary".
        """
        if domain == "external":
            return self.external_t
        if domain != "boundary":
            raise ValueError(f"unknown clock domain {domain!r}: choose one of {', '.join(TIME_DOMAINS)}")
        return None if self.boundary is None else self.boundary_t

    def cools(self, steps: int) -> bool:
        """Whether a Cooldown of so many steps is silent now."""
        return self.external_t < self.cooldown_until

    def silent(self, steps: int) -> bool:
        """Whether the region never fired, or not for so many steps."""
        return self.last_fired < 0 or self.external_t - self.last_fired >= steps

    def summary(self, source: str) -> float:
        """Returns the summary ``region.kind``, split at the last dot; 0 where there is none."""
        region, _, kind = source.rpartition(".")
        return float((self.summaries or {}).get(region, {}).get(kind, 0.0))


class ClockExpr:
    """A node of a clock expression. Nodes are frozen and compare by value.

    >>> clock = Or(periodic(8), Cooldown(on("error.prediction", gt=0.5), steps=2))
    >>> clock.evaluate(ClockContext(external_t=3, summaries={"error": {"prediction": 0.7}}))
    True
    >>> ClockExpr.from_dict(clock.to_dict()) == clock
    True
    """

    # every node is a dataclass
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    # of the tree from here on down, a node that is held twice counted twice
    _depth, _n_nodes = 1, 1

    def evaluate(self, ctx: ClockContext) -> bool:
        """Whether the clock fires in this context."""
        raise NotImplementedError(f"{type(self).__name__} is no node of its own: use one of {', '.join(_NODES)}")

    def to_dict(self) -> dict[str, Any]:
        """Returns the node in JSON types, with its ``type`` and the fields that are not None."""
        form: dict[str, Any] = {"type": _TYPE_OF[type(self)]}
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None:
                form[f.name] = value.to_dict() if isinstance(value, ClockExpr) else value
        return form

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> ClockExpr:
        """Returns the node of a dict as `to_dict` gives it.

        Raises:
            ValueError: an unknown type, listing those there are; a field that is missing, unknown or wrong.
        """
        checked_depth(d, "a clock expression")
        kind_name = d.get("type") if isinstance(d, dict) else d
        if not isinstance(kind_name, str) or not isinstance(d, dict) or kind_name not in _NODES:
            raise ValueError(f"unknown clock expression type {shown(kind_name)}: choose one of {', '.join(_NODES)}")
        kind = _NODES[kind_name]
        given = {name: value for name, value in d.items() if name != "type"}
        known = [f.name for f in fields(kind)]
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ValueError(f"clock expression {kind_name!r} has unknown fields {shown(unknown)}; known are {known}")
        for name in ("left", "right", "child"):
            if name in given:
                given[name] = ClockExpr.from_dict(given[name])
        try:
            return kind(**given)
        except TypeError as error:
            raise ValueError(f"clock expression {shown(d)} is incomplete: {error}") from None

    def nodes(self) -> Iterator[ClockExpr]:
        """Returns the node and everything below it."""
        yield self
        for f in fields(self):
            if isinstance(getattr(self, f.name), ClockExpr):
                yield from getattr(self, f.name).nodes()


def _check_children(node: ClockExpr, *names: str) -> None:
    children = [checked_kind(getattr(node, name), f"{type(node).__name__} {name}", ClockExpr) for name in names]
    depth, n_nodes = 1 + max(child._depth for child in children), 1 + sum(child._n_nodes for child in children)
    if depth > DEEPEST or n_nodes > MOST_NODES:
        raise ValueError(
            f"a clock expression of {depth} levels and {n_nodes} nodes: it may have {DEEPEST} and {MOST_NODES}; join "
            "many clocks in pairs, and the pairs in pairs"
        )
    object.__setattr__(node, "_depth", depth)
    object.__setattr__(node, "_n_nodes", n_nodes)


@dataclass(frozen=True)
class Periodic(ClockExpr):
    """Fires at every step that ``period`` divides; in the domain "boundary", at every so many lifecycle events, the
    first of them included.

    >>> [t for t in range(6) if Periodic(2).evaluate(ClockContext(t))]
    [0, 2, 4]
    """

    period: int = 1
    domain: str = "external"

    def __post_init__(self) -> None:
        object.__setattr__(self, "period", checked_int(self.period, "Periodic period", 1))
        checked_string(self.domain, "Periodic domain")

    def evaluate(self, ctx: ClockContext) -> bool:
        t = ctx.time(self.domain)
        return t is not None and t % self.period == 0


@dataclass(frozen=True)
class OnEvent(ClockExpr):
    """Fires while a residual summary lies above ``gt`` and below ``lt``; both together are a band.

    ``source`` is ``"region.kind"``, split at its last dot; a missing summary counts as 0. In the domain
    "boundary" it only fires at steps with a lifecycle event.

    Raises:
        ValueError: neither bound, a bound that is not a finite number, bounds with nothing between them, or a source
            without a dot.

    >>> OnEvent("error.prediction", gt=0.4).evaluate(ClockContext(0, summaries={"error": {"prediction": 0.5}}))
    True
    """

    source: str
    gt: float | None = None
    lt: float | None = None
    domain: str = "external"

    def __post_init__(self) -> None:
        if not isinstance(self.source, str) or not all(self.source.rpartition(".")[::2]):
            raise ValueError(f"OnEvent source must be 'region.kind', got {shown(self.source)}")
        if self.gt is None and self.lt is None:
            raise ValueError(f"OnEvent of {self.source!r} needs gt or lt: without a bound it would always fire")
        for name in ("gt", "lt"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, checked_number(getattr(self, name), f"OnEvent {name}"))
        if self.gt is not None and self.lt is not None and self.gt >= self.lt:
            raise ValueError(f"OnEvent of {self.source!r}: no value lies above gt={self.gt} and below lt={self.lt}")
        checked_string(self.domain, "OnEvent domain")

    def evaluate(self, ctx: ClockContext) -> bool:
        if ctx.time(self.domain) is None:
            return False
        value = ctx.summary(self.source)
        return (self.gt is None or value > self.gt) and (self.lt is None or value < self.lt)


@dataclass(frozen=True)
class BoundaryExpr(ClockExpr):
    """Fires at the lifecycle event of this name.

    >>> BoundaryExpr("episode_start").evaluate(ClockContext(0, boundary="episode_start"))
    True
    """

    name: str

    def __post_init__(self) -> None:
        checked_string(self.name, "BoundaryExpr name")

    def evaluate(self, ctx: ClockContext) -> bool:
        return ctx.boundary is not None and ctx.boundary == self.name


@dataclass(frozen=True)
class And(ClockExpr):
    """Fires when both do.

    >>> [t for t in range(13) if And(Periodic(2), Periodic(3)).evaluate(ClockContext(t))]
    [0, 6, 12]
    """

    left: ClockExpr
    right: ClockExpr

    def __post_init__(self) -> None:
        _check_children(self, "left", "right")

    def evaluate(self, ctx: ClockContext) -> bool:
        return self.left.evaluate(ctx) and self.right.evaluate(ctx)


@dataclass(frozen=True)
class Or(ClockExpr):
    """Fires when either does.

    >>> [t for t in range(7) if Or(Periodic(2), Periodic(3)).evaluate(ClockContext(t))]
    [0, 2, 3, 4, 6]
    """

    left: ClockExpr
    right: ClockExpr

    def __post_init__(self) -> None:
        _check_children(self, "left", "right")

    def evaluate(self, ctx: ClockContext) -> bool:
        return self.left.evaluate(ctx) or self.right.evaluate(ctx)


@dataclass(frozen=True)
class Not(ClockExpr):
    """Fires when its child does not.

    >>> [t for t in range(5) if Not(Periodic(2)).evaluate(ClockContext(t))]
    [1, 3]
    """

    child: ClockExpr

    def __post_init__(self) -> None:
        _check_children(self, "child")

    def evaluate(self, ctx: ClockContext) -> bool:
        return not self.child.evaluate(ctx)


@dataclass(frozen=True)
class Cooldown(ClockExpr):
    """Fires with its child, but not within ``steps`` steps after the region has fired.

    A bare context silences it while ``external_t < cooldown_until``; a scheduler keeps one such time for each node.

    >>> Cooldown(Periodic(1), steps=2).evaluate(ClockContext(3, cooldown_until=4))
    False
    """

    child: ClockExpr
    steps: int = 1

    def __post_init__(self) -> None:
        _check_children(self, "child")
        object.__setattr__(self, "steps", checked_int(self.steps, "Cooldown steps", 0))

    def evaluate(self, ctx: ClockContext) -> bool:
        return not ctx.cools(self.steps) and self.child.evaluate(ctx)


@dataclass(frozen=True)
class MaxSilence(ClockExpr):
    """Fires with its child, at the region's first step, or ``steps`` steps since the region fired last.

    >>> MaxSilence(Not(Periodic(1)), steps=5).evaluate(ClockContext(9, last_fired=4))
    True
    """

    child: ClockExpr
    steps: int = 10

    def __post_init__(self) -> None:
        _check_children(self, "child")
        object.__setattr__(self, "steps", checked_int(self.steps, "MaxSilence steps", 1))

    def evaluate(self, ctx: ClockContext) -> bool:
        return ctx.silent(self.steps) or self.child.evaluate(ctx)


_NODES: dict[str, type[ClockExpr]] = {
    "periodic": Periodic,
    "on_event": OnEvent,
    "boundary_expr": BoundaryExpr,
    "and": And,
    "or": Or,
    "not": Not,
    "cooldown": Cooldown,
    "max_silence": MaxSilence,
}
_TYPE_OF = {node: name for name, node in _NODES.items()}


def periodic(n: int = 1, domain: str = "external") -> ClockExpr:
    """Every n-th step.

    >>> periodic(8)
    Periodic(period=8, domain='external')
    """
    return Periodic(n, domain)


def on(source: str, gt: float | None = None, lt: float | None = None, domain: str = "external") -> ClockExpr:
    """While the summary ``"region.kind"`` is above ``gt`` and below ``lt``.

    >>> on("error.prediction", gt=0.4).source
    'error.prediction'
    """
    return OnEvent(source, gt, lt, domain)


def boundary(name: str) -> ClockExpr:
    """At the lifecycle event of this name.

    >>> boundary("episode_start")
    BoundaryExpr(name='episode_start')
    """
    return BoundaryExpr(name)
