"""More loops as training goes on."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

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
        if max_loops < 1 or total_steps < 1:
            raise ValueError(f"max_loops and total_steps must be at least 1, got {max_loops} and {total_steps}")
        if not 0.0 <= warmup_fraction < 1.0:
            raise ValueError(f"warmup_fraction must lie in [0, 1), got {warmup_fraction}")
        self.max_loops, self.total_steps, self.warmup_fraction = max_loops, total_steps, warmup_fraction

    def get_loops(self, step: int) -> int:
        """Number of loops at training step ``step`` (from 0)."""
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        warmup = int(self.warmup_fraction * self.total_steps)
        phase = (step - warmup) * self.max_loops // (self.total_steps - warmup)
        return max(1, min(self.max_loops, phase + 1))

    def step(self, looped_blocks: Iterable[nn.Module], step: int) -> int:
        """Sets the loops of every block for training step ``step``, and returns their number."""
        loops = self.get_loops(step)
        for block in looped_blocks:
            block.set_loops(loops)
        return loops
