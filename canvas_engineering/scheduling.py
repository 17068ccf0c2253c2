"""Which regions update at a step: by their declared clocks, by a learned scorer, or by both."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import nn

from canvas_engineering.checked import (
    checked_int,
    checked_kind,
    checked_names,
    checked_number,
    checked_string,
    checked_tensor,
)
from canvas_engineering.clock_formulas import ClockFormulas
from canvas_engineering.clock_ir import ClockContext, Not, Summaries, periodic
from canvas_engineering.derived_buffers import CanvasModule, outside_inference
from canvas_engineering.program import CanvasProgram, ClockSpec
from canvas_engineering.program.checks import check_program
from canvas_engineering.residuals import ResidualAccumulator

__all__ = ["DeviceScheduler", "HybridScheduler", "LearnedScheduler", "RegionScheduler"]


_NEVER = ClockSpec(expr=Not(periodic()))


@dataclass
class _NodeCooldowns(ClockContext):
    """A context in which every Cooldown node counts its own steps from the region's last firing."""

    def cools(self, steps: int) -> bool:
        return self.last_fired >= 0 and self.external_t <= self.last_fired + steps


class RegionScheduler:
    """Fires regions by the clocks of a program.

    Scheduled are the regions of the program, whether its layout has them or not, and those of the layout; a program
    without any region fires none. A region without a clock fires at every step. Otherwise, in order: within
    ``cooldown`` steps after it fired it does not; with ``max_silence``, it does if it never fired, or not for that
    long; then its expression decides, or its mode, in the clock's domain.

    Args:
        program: whose clocks are followed.

    Raises:
        ValueError: an unknown clock mode or domain, or what else cannot be run.

    >>> from canvas_engineering import CanvasLayout, CanvasSchema, RegionProgram
    >>> layout = CanvasLayout(T=1, spatial_shape=(2,), d_model=8, regions={"eye": (0, 1, 0, 1), "map": (0, 1, 1, 2)})
    >>> program = CanvasProgram(CanvasSchema(layout), {"map": RegionProgram(clock=ClockSpec(period=2))})
    >>> scheduler = RegionScheduler(program)
    >>> [sorted(scheduler.step(t)) for t in range(3)]
    [['eye', 'map'], ['eye'], ['eye', 'map']]
    """

    def __init__(self, program: CanvasProgram):
        check_program(program, on_layout=False)
        self.program = program
        self._clocks: dict[str, ClockSpec | None] = {}
        if program.regions:
            self._clocks = dict.fromkeys(program.schema.layout.regions)
            self._clocks.update((name, region.clock) for name, region in program.regions.items())
        self._last_fired: dict[str, int] = {}
        self._boundary_t = 0

    def step(self, external_t: int, summaries: Summaries | None = None, boundary: str | None = None) -> set[str]:
        """Names of the regions that update at this step.

        Args:
            external_t: the step.
            summaries: region to kind to value, as they stand when the step begins.
            boundary: the lifecycle event of this step, if any.
        """
        external_t = checked_int(external_t, "external_t", most=2**63 - 1)
        checked_string(boundary, "boundary", optional=True)
        checked_kind(summaries, "summaries", Mapping, optional=True)
        fired = set()
        for name, clock in self._clocks.items():
            last_fired = self._last_fired.get(name, -1)
            context = _NodeCooldowns(external_t, summaries, boundary, last_fired, boundary_t=self._boundary_t)
            if clock is None or self._fires(clock, context):
                self._last_fired[name] = external_t
                fired.add(name)
        self._boundary_t += boundary is not None
        return fired

    def step_plan(
        self, external_t: int, summaries: Summaries | None = None, boundary: str | None = None
    ) -> list[set[str]]:
        """`step`'s set, then one set per inner step: those fired regions of domain "internal" that still have some."""
        fired = self.step(external_t, summaries, boundary)
        inner = {}
        for name in fired:
            clock = self._clocks[name]
            if clock is not None and clock.domain == "internal" and clock.max_inner_steps:
                inner[name] = clock.max_inner_steps
        steps = range(max(inner.values(), default=0))
        return [fired, *({name for name, count in inner.items() if count > step} for step in steps)]

    def reset(self) -> None:
        """Forgets what has fired, and how many lifecycle events there were."""
        self._last_fired.clear()
        self._boundary_t = 0

    @staticmethod
    def _fires(clock: ClockSpec, context: _NodeCooldowns) -> bool:
        if clock.cooldown and context.cools(clock.cooldown):
            return False
        if clock.max_silence is not None and context.silent(clock.max_silence):
            return True
        now = context.time("boundary" if clock.domain == "boundary" else "external")
        if now is None:
            return False
        if clock.expr is not None:
            return clock.expr.evaluate(context)
        if clock.mode == "periodic":
            return now % clock.period == 0
        if clock.mode == "on_event":
            assert clock.event_source is not None  # ClockSpec.check
            return context.summary(clock.event_source) > clock.event_threshold
        assert clock.mode == "boundary", clock.mode
        return context.boundary is not None and context.boundary == clock.event_source


class DeviceScheduler(CanvasModule):
    """The clocks of a program as tensors: fires the layout's regions as `RegionScheduler` does, without waiting.

    Summaries stay on the accumulator's device, and firing regions are a tensor that `AttentionDispatcher` accepts as
    it is: a loop of both runs ahead of its device, and compiles as a whole. When regions fired last is saved with the
    module, and each process's own, as the averages are.

    Args:
        program: every region of its layout is scheduled; programs of others are ignored, with a UserWarning.
        accumulator: the source of summaries for event clocks; missing ones are 0.

    Raises:
        ValueError: as for `RegionScheduler`.

    >>> from canvas_engineering import CanvasLayout, CanvasSchema, RegionProgram
    >>> layout = CanvasLayout(T=1, spatial_shape=(2,), d_model=8, regions={"eye": (0, 1, 0, 1), "map": (0, 1, 1, 2)})
    >>> program = CanvasProgram(CanvasSchema(layout), {"map": RegionProgram(clock=ClockSpec(period=2))})
    >>> scheduler = DeviceScheduler(program)
    >>> [scheduler.step(t).tolist() for t in range(3)]
    [[1.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    """

    last_fired: torch.Tensor
    boundary_t: torch.Tensor
    _inner: torch.Tensor

    def __init__(self, program: CanvasProgram, accumulator: ResidualAccumulator | None = None):
        super().__init__()
        check_program(program)
        checked_kind(accumulator, "accumulator", ResidualAccumulator, optional=True)
        self.program, self.accumulator = program, accumulator
        regions = program.schema.layout.regions
        clocks = {name: program.regions[name].clock for name in regions if name in program.regions}
        if not program.regions:
            clocks = dict.fromkeys(regions, _NEVER)
        self.formulas = ClockFormulas([clocks.get(name) for name in regions], accumulator)
        inner = [0 if c is None or c.domain != "internal" else c.max_inner_steps or 0 for c in map(clocks.get, regions)]
        self._n_inner = max(inner, default=0)
        self.register_table("_inner", np.array(inner, np.int64))
        self.register_state("last_fired", torch.full((len(regions),), -1))
        self.register_state("boundary_t", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def step(self, external_t: int | torch.Tensor, boundary: str | None = None) -> torch.Tensor:
        """Returns which regions update at this step: (regions,) float32 of 0 and 1 in the layout's order.

        Args:
            external_t: the step; under ``torch.compile`` an int64 tensor on the device, so that one graph serves all.
            boundary: the lifecycle event of this step, if any.
        """
        if not isinstance(external_t, torch.Tensor):
            external_t = checked_int(external_t, "external_t", most=2**63 - 1)
        checked_string(boundary, "boundary", optional=True)
        values = None if self.accumulator is None else self.accumulator.values
        fired = self.formulas(external_t, boundary, self.last_fired, self.boundary_t, values)
        self.last_fired.copy_(torch.where(fired, external_t, self.last_fired))
        if boundary is not None:
            self.boundary_t.add_(1)
        return fired.float()

    def step_plan(self, external_t: int | torch.Tensor, boundary: str | None = None) -> list[torch.Tensor]:
        """`step`'s tensor, then one for each inner step that any region may have, 0 where none is left."""
        fired = self.step(external_t, boundary)
        return [fired, *(fired * (self._inner > step) for step in range(self._n_inner))]

    def reset(self) -> None:
        """Forgets what has fired, and how many lifecycle events there were."""
        self.last_fired.fill_(-1)
        self.boundary_t.zero_()


class _LazyLinear(nn.LazyLinear):
    """One whose parameters can be trained although the first call was an evaluation."""

    @outside_inference
    def initialize_parameters(self, *args, **kwargs) -> None:
        super().initialize_parameters(*args, **kwargs)


class LearnedScheduler(CanvasModule):
    """Scores regions from summaries and takes the best: Linear → GELU → Linear, with Gumbel noise in training.

    Args:
        n_regions: number of regions.
        summary_dim: number of summaries; None takes it from the first call.
        max_active: how many regions are taken.
        temperature: of the scores, and so of the noise against them.

    Raises:
        ValueError: a size below 1, or a temperature that is not above 0.

    >>> active, scores = LearnedScheduler(n_regions=4, summary_dim=2, max_active=1).eval()(torch.randn(2))
    >>> scores.shape
    torch.Size([4])
    """

    def __init__(self, n_regions: int, summary_dim: int | None, max_active: int, temperature: float = 1.0):
        super().__init__()
        n_regions, max_active = checked_int(n_regions, "n_regions", 1), checked_int(max_active, "max_active", 1)
        if checked_number(temperature, "temperature", "a number above 0") <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature!r}")
        self.n_regions, self.max_active, self.temperature = n_regions, min(max_active, n_regions), temperature
        if summary_dim is None:
            with warnings.catch_warnings():
                # torch warns of every lazy module that its interface may change
                warnings.simplefilter("ignore", UserWarning)
                first = _LazyLinear(2 * n_regions)
        else:
            first = nn.Linear(checked_int(summary_dim, "summary_dim", 1), 2 * n_regions)
        self.scorer = nn.Sequential(first, nn.GELU(), nn.Linear(2 * n_regions, n_regions))

    @property
    def _layers(self) -> tuple[nn.Linear, nn.GELU, nn.Linear]:
        return cast("tuple[nn.Linear, nn.GELU, nn.Linear]", tuple(self.scorer))  # torch does not say what it holds

    @property
    def summary_dim(self) -> int | None:
        """Number of summaries; None before the first call, where that decides."""
        first, _, _ = self._layers
        return None if isinstance(first, nn.LazyLinear) else first.in_features

    def __repr__(self) -> str:
        return (
            f"LearnedScheduler(n_regions={self.n_regions}, summary_dim={self.summary_dim}, "
            f"max_active={self.max_active}, temperature={self.temperature:g})"
        )

    def forward(self, summaries: torch.Tensor) -> tuple[set[int], torch.Tensor]:
        """Chooses regions.

        Args:
            summaries: (summary_dim,), or (batch, summary_dim), whose first row is used. An empty one, before there is
                any evidence, counts as a hidden layer of zeros.

        Returns:
            the numbers of the regions taken, and log-softmax scores (n_regions,), with gradients. Making the set waits
            for the device.
        """
        if checked_tensor(summaries, "summaries").dim() not in (1, 2):
            raise ValueError(f"summaries must be (summary_dim,) or (batch, summary_dim), got {tuple(summaries.shape)}")
        row = summaries if summaries.dim() == 1 else summaries[0]
        first, gelu, last = self._layers
        expected = self.summary_dim
        if row.shape[-1] not in (0, row.shape[-1] if expected is None else expected):
            raise ValueError(f"the scheduler scores {expected} summaries, got {tuple(summaries.shape)}")
        hidden = last.weight.new_zeros(2 * self.n_regions) if not row.shape[-1] else gelu(first(row))
        scores = last(hidden) / self.temperature
        noisy = scores
        if self.training:
            noise = torch.rand_like(scores).clamp_min(torch.finfo(scores.dtype).tiny)
            noisy = scores - torch.log(-torch.log(noise))
        selection = noisy.detach().topk(self.max_active).indices.tolist()
        return set(selection), torch.log_softmax(scores, dim=-1)


class HybridScheduler(CanvasModule):
    """Declared clocks for most regions, a learned scorer for some.

    Args:
        program: as for `RegionScheduler`.
        learned_regions: regions that the scorer decides on, whatever their clocks say.
        summary_dim: number of summaries; None takes it from the first step that has any.
        max_active: how many learned regions run at a step; by default half of them, at least one.
        temperature: as for `LearnedScheduler`.

    Attributes:
        declared: the RegionScheduler.
        learned: the LearnedScheduler over the learned regions in sorted order, fed all summaries in sorted order of
            region and kind.

    Raises:
        KeyError: a learned region that neither the program nor its layout has.
        ValueError: none, or what the program is refused for.

    >>> from canvas_engineering import CanvasLayout, CanvasProgram, CanvasSchema, RegionProgram
    >>> layout = CanvasLayout(T=1, d_model=8, spatial_shape=(2,), regions={"a": (0, 1, 0, 1), "b": (0, 1, 1, 2)})
    >>> program = CanvasProgram(CanvasSchema(layout), {"a": RegionProgram(), "b": RegionProgram()})
    >>> sorted(HybridScheduler(program, ["b"]).step(0, {"a": {"prediction": 0.5}}))
    ['a', 'b']
    """

    def __init__(
        self,
        program: CanvasProgram,
        learned_regions: Iterable[str],
        summary_dim: int | None = None,
        max_active: int | None = None,
        temperature: float = 1.0,
    ):
        super().__init__()
        self.declared = RegionScheduler(program)
        self.learned_regions = sorted(set(checked_names(learned_regions, "learned_regions")))
        if not self.learned_regions:
            raise ValueError("learned_regions names no region: use RegionScheduler for a program that is all declared")
        known = {*program.schema.layout.regions, *program.regions}
        unknown = [name for name in self.learned_regions if name not in known]
        if unknown:
            raise KeyError(f"learned_regions names {unknown}; the program has {sorted(known)}")
        n = len(self.learned_regions)
        self.learned = LearnedScheduler(
            n, summary_dim, max(1, n // 2) if max_active is None else max_active, temperature
        )

    def step(self, external_t: int, summaries: Summaries | None = None, boundary: str | None = None) -> set[str]:
        """Names of the regions that update at this step; arguments as for `RegionScheduler.step`.

        Raises:
            ValueError: another number of summaries than before.
        """
        fired = self.declared.step(external_t, summaries, boundary)
        values = summaries or {}
        flat = [values[region][kind] for region in sorted(values) for kind in sorted(values[region])]
        _, _, last = self.learned._layers
        weight = last.weight
        with torch.no_grad():
            selection, _ = self.learned(torch.tensor(flat, dtype=weight.dtype, device=weight.device))
        return fired.difference(self.learned_regions) | {self.learned_regions[number] for number in selection}

    def reset(self) -> None:
        """Forgets what has fired."""
        self.declared.reset()
