"""Residual summaries: how far a region's content is from what was expected, as running averages on the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from canvas_engineering.checked import (
    checked_choice,
    checked_kind,
    checked_names,
    checked_number,
    checked_tensor,
    shown,
)
from canvas_engineering.derived_buffers import CanvasModule
from canvas_engineering.notices import warn
from canvas_engineering.program.connections import parse_trigger

__all__ = ["ResidualAccumulator", "ResidualSpec"]

_REDUCTIONS = ("max_mean", "mean", "max", "l2")


@dataclass(frozen=True)
class ResidualSpec:
    """The summary statistics of an error.

    Args:
        kinds: names of the values that are kept for each region.
        reduce: of the magnitudes of an error's entries: "mean", "max" or "l2" (√Σe²) for every kind, or "max_mean",
            which gives their mean to one kind, their maximum and mean to two, and so on in turn.
        decay: of the running average, decay·old + (1 − decay)·new, which starts at zero.

    Raises:
        ValueError: no kinds, or one twice or with a dot, an unknown reduction, or a decay outside [0, 1].

    >>> ResidualSpec(kinds=("prediction", "peak"), decay=0.9).reduce
    'max_mean'
    """

    kinds: tuple[str, ...] = ("prediction",)
    reduce: str = "max_mean"
    decay: float = 0.95

    def __post_init__(self) -> None:
        kinds = checked_names((self.kinds,) if isinstance(self.kinds, str) else self.kinds, "ResidualSpec kinds")
        if not kinds or len(set(kinds)) < len(kinds):
            raise ValueError(f"ResidualSpec kinds must be distinct names, at least one, got {shown(self.kinds)}")
        if any("." in kind for kind in kinds):
            raise ValueError(f"ResidualSpec kinds may have no dot (triggers name 'region.kind'), got {shown(kinds)}")
        object.__setattr__(self, "kinds", kinds)
        checked_choice(self.reduce, "reduce", _REDUCTIONS)
        decay = checked_number(self.decay, "ResidualSpec decay", "a number in [0, 1]")
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"ResidualSpec decay must lie in [0, 1], got {decay!r}")
        object.__setattr__(self, "decay", decay)


class ResidualAccumulator(CanvasModule):
    """Running averages of errors by region and kind, in one tensor; it has no parameters and takes no gradient.

    With several processes each keeps its own averages: ``DistributedDataParallel`` does not replace them by those of
    rank 0, so clocks and triggers of ranks fire apart. Where they are to fire alike, call `average_over_ranks` after
    each step.

    Args:
        region_names: the regions whose errors are kept.
        spec: what is kept; by default the mean magnitude, as "prediction".

    Attributes:
        values: (regions, kinds) float32, the averages by sorted name of the region; saved with the module.

    Raises:
        ValueError: a region twice.

    >>> accumulator = ResidualAccumulator(["eye"], ResidualSpec(decay=0.5))
    >>> accumulator.update("eye", torch.tensor([1.0, -3.0]))
    >>> accumulator.summaries()
    {'eye': {'prediction': 1.0}}
    """

    values: torch.Tensor

    def __init__(self, region_names: list[str], spec: ResidualSpec | None = None):
        super().__init__()
        self.spec = checked_kind(ResidualSpec() if spec is None else spec, "spec", ResidualSpec)
        self._names = sorted(checked_names(region_names, "region_names"))
        if len(set(self._names)) < len(self._names):
            raise ValueError(f"region_names has a name twice: {self._names}")
        self._row = {name: row for row, name in enumerate(self._names)}
        self.register_state("values", torch.zeros(len(self._names), len(self.spec.kinds)))

    def extra_repr(self) -> str:
        spec = self.spec
        return f"regions={len(self._names)}, kinds={len(spec.kinds)}, reduce={spec.reduce!r}, decay={spec.decay:g}"

    @property
    def region_names(self) -> list[str]:
        """Names of the regions, sorted: the rows of `summary_tensor`."""
        return list(self._names)

    def row(self, region: str) -> int:
        """Returns the region's row. KeyError: its errors are not kept."""
        if region not in self._row:
            raise KeyError(f"no residuals are kept for region {region!r}, only for {self._names}")
        return self._row[region]

    @torch.no_grad()
    def update(self, region: str, error: torch.Tensor, active: torch.Tensor | None = None) -> None:
        """Takes an error into the region's averages. What would make an average infinite or NaN is left out, so that
        one bad step does not silence triggers for ever.

        Args:
            region: whose error.
            error: of any shape, not empty.
            active: a scalar, 0 or 1, on the error's device: at 0 the averages stay as they are, without a wait for it.

        Raises:
            KeyError: the region's errors are not kept. ValueError: an empty error.
        """
        row = self.row(region)
        if not checked_tensor(error, "error", floating=False).numel():
            raise ValueError(f"the error of region {region!r} is empty: {tuple(error.shape)}")
        size = error.detach().abs().to(torch.promote_types(error.dtype, torch.float32))
        if self.spec.reduce == "l2":
            values = [size.square().sum().sqrt()]
        elif self.spec.reduce == "max_mean":
            values = [size.amax(), size.mean()] if len(self.spec.kinds) > 1 else [size.mean()]
        else:
            values = [size.amax() if self.spec.reduce == "max" else size.mean()]
        new = torch.stack([values[i % len(values)] for i in range(len(self.spec.kinds))]).to(self.values)
        old = self.values[row]
        mixed = self.spec.decay * old + (1.0 - self.spec.decay) * new
        takes = mixed.isfinite() if active is None else mixed.isfinite() & (active.to(old.device) > 0)
        self.values[row] = torch.where(takes, mixed, old)

    @torch.no_grad()
    def average_over_ranks(self, group: dist.ProcessGroup | None = None) -> None:
        """Replaces each average by its mean over the ranks of a process group, without waiting for the device.

        Every rank of the group calls it, whether or not its regions ran. As averages are linear in what they are of,
        ranks that call it after each step keep the running average of the mean over ranks.

        Args:
            group: the process group; by default all processes.
        """
        dist.all_reduce(self.values, group=group)
        self.values.div_(dist.get_world_size(group))

    def summaries(self) -> dict[str, dict[str, float]]:
        """Returns a dict from region to kind to value, as plain floats: waits for the device."""
        kinds = self.spec.kinds
        return {name: dict(zip(kinds, row)) for name, row in zip(self._names, self.values.tolist())}

    def summary_tensor(self) -> torch.Tensor:
        """Returns a copy of the averages, (regions, kinds), by sorted name; on the device, without waiting."""
        return self.values.clone()

    def reset(self) -> None:
        """Back to zero."""
        self.values.zero_()


class TriggerFlags(CanvasModule):
    """Triggers as tensors: which connections may run, decided on the device.

    Args:
        triggers: connection number to trigger; connections without one always may.
        n_connections: how many there are.
        accumulator: whose summaries triggers name; a summary that it does not keep makes a trigger false, and so do all
            without it; of those there is one UserWarning.

    Raises:
        ValueError: a trigger of another form.
    """

    column: torch.Tensor
    known: torch.Tensor
    wants: torch.Tensor
    threshold: torch.Tensor
    of_trigger: torch.Tensor
    trigger_of: torch.Tensor

    _OPS = ("<", ">", "==", "!=")
    _WANTS = {"<=": ("<", "=="), ">=": (">", "==")}

    def __init__(self, triggers: dict[int, str], n_connections: int, accumulator: ResidualAccumulator | None):
        super().__init__()
        kinds = () if accumulator is None else accumulator.spec.kinds
        rows = {} if accumulator is None else {name: row for row, name in enumerate(accumulator.region_names)}
        parsed = [parse_trigger(trigger) for trigger in triggers.values()]
        clauses = [clause for trigger in parsed for clause in trigger]
        known = [clause.region in rows and clause.kind in kinds for clause in clauses]
        self._warn_of_unkept([clause for clause, is_known in zip(clauses, known) if not is_known], rows, kinds)
        column = [
            rows[clause.region] * len(kinds) + kinds.index(clause.kind) if is_known else 0
            for clause, is_known in zip(clauses, known)
        ]
        wants = [[op in self._WANTS.get(clause.op, (clause.op,)) for op in self._OPS] for clause in clauses]
        # index len(clauses) holds True, the padding of short triggers
        longest = max(map(len, parsed))
        numbers = iter(range(len(clauses)))
        of_trigger = [
            [next(numbers) for _ in trigger] + [len(clauses)] * (longest - len(trigger)) for trigger in parsed
        ]
        trigger_of = np.full(n_connections, len(parsed), np.int64)
        trigger_of[list(triggers)] = np.arange(len(parsed))
        self.register_table("column", np.array(column, np.int64))
        self.register_table("known", np.array(known, bool))
        self.register_table("wants", np.array(wants, bool).reshape(-1, len(self._OPS)))
        self.register_table("threshold", np.array([clause.number for clause in clauses], np.float64))
        self.register_table("of_trigger", np.array(of_trigger, np.int64))
        self.register_table("trigger_of", trigger_of)

    @staticmethod
    def _warn_of_unkept(clauses, rows, kinds) -> None:
        if clauses:
            names = list(dict.fromkeys(f"{clause.region}.{clause.kind}" for clause in clauses))
            keeps = f"it keeps {', '.join(kinds)} of {', '.join(rows) or 'no region'}" if kinds else "there is none"
            warn(
                f"triggers name summaries that no residual accumulator keeps, and so never hold: {', '.join(names)}; "
                f"{keeps}"
            )

    def forward(self, summaries: torch.Tensor | None) -> torch.Tensor:
        """Returns (connections,) float32, 1 where the connection has no trigger or one that holds.

        ``summaries``: (regions, kinds) of the accumulator, or None.
        """
        if summaries is None or not summaries.numel():
            held = torch.zeros_like(self.known)
        else:
            value = summaries.reshape(-1).double().index_select(0, self.column)[:, None]
            threshold = self.threshold[:, None]
            compared = (value < threshold, value > threshold, value == threshold, value != threshold)
            held = (torch.cat(compared, 1) & self.wants).any(1) & self.known
        always = torch.ones_like(held[:1])
        fires = torch.cat([held, always])[self.of_trigger].all(1)
        return torch.cat([fires, always])[self.trigger_of].float()
