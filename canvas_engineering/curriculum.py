"""More loops as training goes on."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from .checked import checked_int, checked_number
from .looped_block import set_loops

__all__ = ["CurriculumScheduler"]


class CurriculumScheduler:
    """One loop at first, ``max_loops`` in the end, in phases of equal length.

    Args:
        max_loops: loops of the last phase.
        total_steps: training steps that the phases share; later steps stay in the last phase.
        warmup_fraction: share of total_steps at the beginning, before the phases, that runs one loop.

    Raises:
        ValueError: max_loops or total_steps below 1, or warmup_fraction outside [0, 1).

    >>> curriculum = CurriculumScheduler(max_loops=3, total_steps=90)
    >>> [curriculum.get_loops(step) for step in (0, 29, 30, 60, 1000)]
    [1, 1, 2, 3, 3]
    """

    def __init__(self, max_loops: int = 3, total_steps: int = 5000, warmup_fraction: float = 0.0):
        self.max_loops = checked_int(max_loops, "max_loops", 1)
        self.total_steps = checked_int(total_steps, "total_steps", 1, most=2**63 - 1)
        self.warmup_fraction = checked_number(warmup_fraction, "warmup_fraction", "a number in [0, 1)")
        if not 0.0 <= self.warmup_fraction < 1.0:
            raise ValueError(f"warmup_fraction must lie in [0, 1), got {warmup_fraction}")

    def get_loops(self, step: int) -> int:
        """Returns the number of loops at training step ``step`` (from 0)."""
        step = checked_int(step, "step", 0, most=2**63 - 1)
        warmup = int(self.warmup_fraction * self.total_steps)
        phase = (step - warmup) * self.max_loops // (self.total_steps - warmup)
        return max(1, min(self.max_loops, phase + 1))

    def step(self, looped_blocks: Iterable[nn.Module], step: int) -> int:
        """Sets the loops of every block for training step ``step``, and returns their number."""
        loops = self.get_loops(step)
        set_loops(looped_blocks, loops)
        return loops
