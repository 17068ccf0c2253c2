"""Sharper attention from loop to loop."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .checked import checked_choice, checked_int, checked_number

__all__ = ["SharpeningSchedule"]

_SHAPES = {
    "linear": lambda low, high, share: low + (high - low) * share,
    "exponential": lambda low, high, share: low * (high / low) ** share,
    "cosine": lambda low, high, share: low + (high - low) * (1 - math.cos(math.pi * share)) / 2,
}


@dataclass(frozen=True)
class SharpeningSchedule:
    """The factor β_l by which loop l multiplies the attention scale, from ``beta_min`` in the first loop to
    ``beta_max`` in the last.

    With s = l / (max_loops − 1), "linear" is min + (max − min)·s, "exponential" min·(max / min)^s, and "cosine"
    min + (max − min)·(1 − cos πs) / 2. A single loop runs at ``beta_min``.

    Raises:
        ValueError: an unknown schedule, a β that is not positive and finite, or max_loops below 1.

    >>> schedule = SharpeningSchedule(max_loops=3, beta_min=1.0, beta_max=4.0)
    >>> [schedule(loop) for loop in range(3)]
    [1.0, 2.5, 4.0]
    """

    max_loops: int = 4
    beta_min: float = 1.0
    beta_max: float = 4.0
    schedule: str = "linear"

    def __post_init__(self) -> None:
        checked_choice(self.schedule, "schedule", tuple(_SHAPES))
        object.__setattr__(self, "max_loops", checked_int(self.max_loops, "max_loops", 1))
        for name in ("beta_min", "beta_max"):
            beta = checked_number(getattr(self, name), name, "positive and finite")
            if beta <= 0:
                raise ValueError(f"{name} must be positive and finite, got {beta!r}")
            object.__setattr__(self, name, beta)

    def __call__(self, loop_idx: int) -> float:
        """β of loop ``loop_idx``, 0 … max_loops − 1; ValueError outside."""
        if not 0 <= checked_int(loop_idx, "loop_idx") < self.max_loops:
            raise ValueError(f"loop_idx must lie in 0 … {self.max_loops - 1}, got {loop_idx}")
        share = loop_idx / (self.max_loops - 1) if self.max_loops > 1 else 0.0
        return _SHAPES[self.schedule](self.beta_min, self.beta_max, share)
