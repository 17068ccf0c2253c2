"""Declarations of types: fields, how they are laid out, and which attend to which by default."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Any

from canvas_engineering.checked import (
    checked_bool,
    checked_choice,
    checked_int,
    checked_ints,
    checked_name,
    checked_number,
    checked_string,
    checked_strings,
)

__all__ = ["ConnectivityPolicy", "Field", "LayoutStrategy"]


class UndeclaredPeriod(int):
    """The period of a field that names none: 1, and for a coarse field the mean of those below it."""

    __slots__ = ()


@dataclass(frozen=True)
class Field:
    """A region of a canvas, declared as an attribute of a type.

    Args:
        h, w: rows and columns of positions per frame; (1, 1) is a scalar.
        period: real-time steps per canvas frame; a coarse field that names none takes the mean of those below it.
        is_output: whether the field takes part in the loss.
        loss_weight: relative weight of its positions in the loss.
        attn: attention function of the connections that the field queries.
        semantic_type: what the field holds, in words; None derives it from the field's path.
        temporal_extent: number of frames, from frame 0; None means all of the canvas.
        family: "observation", "state", "memory", "residual" or "action"; None leaves it open.
        tags: sub-tags within the family.
        carrier: the dynamics that govern the field; None means "deterministic". For the family "residual", both mean
            "residual".
        spatial_shape: positions per spatial dimension, for fields of any number of dimensions, instead of ``h`` and
            ``w``, which then mirror its first two entries; (h, w) where it is not given.

    Raises:
        ValueError: a size, period or extent below 1, ``h`` and ``w`` that contradict ``spatial_shape``, or an argument
            of the wrong kind.

    >>> Field(12, 12).num_positions, Field(spatial_shape=(2, 3, 4)).num_positions
    (144, 24)
    """

    h: int = 1
    w: int = 1
    period: int = UndeclaredPeriod(1)
    is_output: bool = True
    loss_weight: float = 1.0
    attn: str = "cross_attention"
    semantic_type: str | None = None
    temporal_extent: int | None = None
    family: str | None = None
    tags: tuple[str, ...] = ()
    carrier: str | None = None
    spatial_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        for name in ("h", "w", "period"):
            value = getattr(self, name)
            if not isinstance(value, UndeclaredPeriod):
                put(self, name, checked_int(value, f"Field {name}", 1))
        if self.temporal_extent is not None:
            put(self, "temporal_extent", checked_int(self.temporal_extent, "Field temporal_extent", 1))
        put(self, "is_output", checked_bool(self.is_output, "Field is_output"))
        put(self, "loss_weight", checked_number(self.loss_weight, "Field loss_weight"))
        checked_name(self.attn, "Field attn", "be the name of an attention function")
        for name in ("semantic_type", "family", "carrier"):
            checked_string(getattr(self, name), f"Field {name}", optional=True)
        put(self, "tags", checked_strings(self.tags, "Field tags"))
        if self.spatial_shape is None:
            put(self, "spatial_shape", (self.h, self.w))
        else:
            self._take_spatial_shape()

    def _take_spatial_shape(self) -> None:
        shape = checked_ints(self.spatial_shape, "Field spatial_shape", 1, each="every size of Field spatial_shape")
        if not shape:
            raise ValueError(f"Field spatial_shape must be a tuple of ints, at least one, got {self.spatial_shape!r}")
        mirrored = (shape[0], shape[1] if len(shape) > 1 else 1)
        if (self.h, self.w) not in ((1, 1), mirrored):
            raise ValueError(f"Field spatial_shape={shape} contradicts h={self.h}, w={self.w}: give one of them")
        for name, value in zip(("spatial_shape", "h", "w"), (shape, *mirrored)):
            object.__setattr__(self, name, value)

    @property
    def shape(self) -> tuple[int, ...]:
        """The same as ``spatial_shape``."""
        assert self.spatial_shape is not None  # __post_init__ made one of h and w
        return self.spatial_shape

    @property
    def num_positions(self) -> int:
        """Positions per frame."""
        return math.prod(self.shape)


class LayoutStrategy(enum.Enum):
    """In which order fields are packed: as they are declared, or those of equal local name together.

    >>> LayoutStrategy("interleaved") is LayoutStrategy.INTERLEAVED
    True
    """

    PACKED = "packed"
    INTERLEAVED = "interleaved"


def checked_strategy(value: Any) -> LayoutStrategy:
    if isinstance(value, LayoutStrategy):
        return value
    known = tuple(strategy.value for strategy in LayoutStrategy)
    return LayoutStrategy(checked_choice(value, "layout_strategy", known))


_POLICIES = {
    "intra": ("dense", "isolated", "causal_chain", "star"),
    "array_element": ("isolated", "dense", "matched_fields", "ring"),
    "temporal": ("dense", "causal", "same_frame"),
}


@dataclass(frozen=True)
class ConnectivityPolicy:
    """Which fields attend to which in a compiled schema.

    Under every policy a coarse field attends to itself, and it and its parent's fields, and it and its own type's
    fields, attend to each other. Coarse fields of one parent do not: they are connected through the parent's fields.

    Args:
        intra: a type's own fields: "dense" (each attends to all, itself included), "isolated" (itself only),
            "causal_chain" (itself and its predecessor), "star" (itself; the first field and all others attend to each
            other).
        array_element: elements of one list: "isolated", "dense" (each element's coarse field attends to all others'),
            "matched_fields" (fields of equal local name attend to each other), "ring" (coarse fields of neighbours
            attend to each other, the last and the first included).
        temporal: "dense" (all frames), "same_frame", "causal" (a field attends to itself at the same and at the
            previous frame, others at the previous).

    Raises:
        ValueError: an unknown policy; the message lists the choices.

    >>> ConnectivityPolicy(intra="causal_chain", temporal="causal").array_element
    'isolated'
    """

    intra: str = "dense"
    array_element: str = "isolated"
    temporal: str = "dense"

    def __post_init__(self) -> None:
        for name, choices in _POLICIES.items():
            checked_choice(getattr(self, name), f"{name} policy", choices)
