"""Clocks as tensors: the truth of all their leaves at once, then of what joins them, a level of the trees at a time."""

from __future__ import annotations

import numpy as np
import torch

from canvas_engineering import clock_ir
from canvas_engineering.derived_buffers import CanvasModule
from canvas_engineering.program import ClockSpec
from canvas_engineering.residuals import ResidualAccumulator

# kinds of leaves, in the order in which `ClockFormulas.forward` computes them
_LEAVES = ("always", "step", "event_count", "above", "below", "event", "any_event", "cools", "silent")
# truth of (not a and not b, not a and b, a and not b, a and b)
_AND, _OR, _AND_NOT = (False, False, False, True), (False, True, True, True), (False, False, True, False)


class ClockFormulas(CanvasModule):
    """Whether clocks fire, each by the rules of `RegionScheduler`, on the device that their summaries are on.

    Args:
        clocks: of every region, in their order; None for one that always fires.
        accumulator: the source of summaries; missing ones are 0.
    """

    kind: torch.Tensor
    region: torch.Tensor
    number: torch.Tensor
    divisor: torch.Tensor
    threshold: torch.Tensor
    column: torch.Tensor
    root: torch.Tensor

    def __init__(self, clocks: list[ClockSpec | None], accumulator: ResidualAccumulator | None):
        super().__init__()
        kinds = () if accumulator is None else accumulator.spec.kinds
        names = () if accumulator is None else accumulator.region_names
        columns = {f"{name}.{kind}": i for i, (name, kind) in enumerate((n, k) for n in names for k in kinds)}
        self._n_columns, self._events = len(columns), {}
        builder = _Builder(columns, self._events)
        roots = [builder.clock(region, clock) for region, clock in enumerate(clocks)]
        leaves, joins = builder.leaves, sorted(builder.joins.items(), key=lambda item: item[1][0])
        # order: leaves, then joins by level
        place = {key: i for i, key in enumerate([*leaves, *(key for key, _ in joins)])}
        kind, region, number, threshold, column = zip(*leaves) if leaves else ((),) * 5
        index = {
            "kind": [_LEAVES.index(name) for name in kind],
            "region": region,
            "number": number,
            "divisor": [max(1, n) for n in number],
            "column": column,
            "root": [place[key] for key in roots],
        }
        for name, values in index.items():
            self.register_table(name, np.array(values, np.int64))
        self.register_table("threshold", np.array(threshold, np.float64))
        self._n_levels = joins[-1][1][0] if joins else 0
        for level in range(1, self._n_levels + 1):
            members = [(place[a], place[b], table) for _, (own, table, a, b) in joins if own == level]
            self.register_table(f"sides_{level}", np.array([member[:2] for member in members], np.int64).T)
            self.register_table(f"tables_{level}", np.array([member[2] for member in members], bool))

    def forward(
        self,
        external_t: int | torch.Tensor,
        boundary: str | None,
        last_fired: torch.Tensor,
        boundary_t: torch.Tensor,
        summaries: torch.Tensor | None,
    ) -> torch.Tensor:
        """Returns bool (regions,). ``last_fired`` (regions,), ``boundary_t`` (): int64; ``summaries`` (regions,
        kinds)."""
        last = last_fired[self.region]
        never, since = last < 0, external_t - last
        always = torch.ones_like(never)
        known = last.new_zeros(0) if summaries is None else summaries.reshape(-1)
        # one more column, for what nothing keeps
        value = torch.cat([known.double(), known.new_zeros(1).double()])[self.column]
        counted = boundary_t % self.divisor == 0
        truths = (
            always,
            (last * 0 + external_t) % self.divisor == 0,
            counted if boundary is not None else ~always,
            value > self.threshold,
            value < self.threshold,
            self.number == self._events.get(boundary, -1),
            always if boundary is not None else ~always,
            ~never & (since <= self.number),
            never | (since >= self.number),
        )
        truth = torch.stack(truths).gather(0, self.kind[None])[0]
        for level in range(1, self._n_levels + 1):
            a, b = truth[getattr(self, f"sides_{level}")]
            of_pair = (2 * a.long() + b.long())[:, None]
            truth = torch.cat([truth, getattr(self, f"tables_{level}").gather(1, of_pair)[:, 0]])
        return truth[self.root]


class _Builder:
    """Clocks taken apart: ``leaves``, (kind, region, number, threshold, column) each, and ``joins``, by a key of their
    own (level, truth table, one, other). Equal parts are one."""

    def __init__(self, columns: dict[str, int], events: dict[str, int]):
        self.columns, self.events = columns, events
        self.leaves: dict[tuple, None] = {}
        self.joins: dict[tuple, tuple] = {}

    def clock(self, region: int, clock: ClockSpec | None) -> tuple:
        if clock is None:
            return self._leaf("always", region)
        if clock.expr is not None:
            fires = self._node(region, clock.expr)
        elif clock.mode == "periodic":
            fires = self._periodic(region, clock.period, clock.domain)
        else:
            assert clock.event_source is not None  # ClockSpec.check
            if clock.mode == "on_event":
                fires = self._compared("above", region, clock.event_source, clock.event_threshold)
            else:
                assert clock.mode == "boundary", clock.mode
                fires = self._event(region, clock.event_source)
        if clock.domain == "boundary":
            fires = self._join(_AND, fires, self._leaf("any_event", region))
        if clock.max_silence is not None:
            fires = self._join(_OR, fires, self._leaf("silent", region, clock.max_silence))
        if clock.cooldown:
            fires = self._join(_AND_NOT, fires, self._leaf("cools", region, clock.cooldown))
        return fires

    def _node(self, region: int, node: clock_ir.ClockExpr) -> tuple:
        match node:
            case clock_ir.Periodic():
                return self._periodic(region, node.period, node.domain)
            case clock_ir.OnEvent():
                fires = self._leaf("any_event" if node.domain == "boundary" else "always", region)
                for kind, bound in (("above", node.gt), ("below", node.lt)):
                    if bound is not None:
                        fires = self._join(_AND, fires, self._compared(kind, region, node.source, bound))
                return fires
            case clock_ir.BoundaryExpr():
                return self._event(region, node.name)
            case clock_ir.And() | clock_ir.Or():
                sides = (self._node(region, side) for side in (node.left, node.right))
                return self._join(_AND if isinstance(node, clock_ir.And) else _OR, *sides)
            case clock_ir.Not():
                return self._join(_AND_NOT, self._leaf("always", region), self._node(region, node.child))
            case clock_ir.Cooldown():
                return self._join(_AND_NOT, self._node(region, node.child), self._leaf("cools", region, node.steps))
            case clock_ir.MaxSilence():
                return self._join(_OR, self._node(region, node.child), self._leaf("silent", region, node.steps))
        raise ValueError(f"unknown clock expression {node!r}")

    def _periodic(self, region: int, period: int, domain: str) -> tuple:
        return self._leaf("event_count" if domain == "boundary" else "step", region, period)

    def _compared(self, kind: str, region: int, source: str, bound: float) -> tuple:
        return self._leaf(kind, region, 0, bound, self.columns.get(source, len(self.columns)))

    def _event(self, region: int, name: str) -> tuple:
        return self._leaf("event", region, self.events.setdefault(name, len(self.events)))

    def _leaf(self, kind: str, region: int, number: int = 0, threshold: float = 0.0, column: int = 0) -> tuple:
        leaf = (kind, region, number, threshold, column)
        self.leaves[leaf] = None
        return leaf

    def _join(self, table: tuple, a: tuple, b: tuple) -> tuple:
        key = (table, a, b)
        level = 1 + max(self.joins[side][0] if side in self.joins else 0 for side in (a, b))
        self.joins.setdefault(key, (level, table, a, b))
        return key
