"""Residual summaries: how far a region's content is from what was expected, as running averages on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from canvas_engineering.program.specs import choices

__all__ = ["ResidualAccumulator", "ResidualSpec"]

_REDUCTIONS = ("max_mean", "mean", "max", "l2")


@dataclass(frozen=True)
class ResidualSpec:
    """What is kept of an error.

    Args:
        kinds: names of the values that are kept for each region.
        reduce: of the magnitudes of an error's entries: "mean", "max" or "l2" (√Σe²) for every kind, or "max_mean",
            which gives their mean to one kind, their maximum and mean to two, and so on in turn.
        decay: of the running average, decay·old + (1 − decay)·new, which starts at zero.

    Raises:
        ValueError: no kinds, or one twice or with a dot, an unknown reduction, or a decay outside [0, 1].
    """

    kinds: tuple[str, ...] = ("prediction",)
    reduce: str = "max_mean"
    decay: float = 0.95

    def __post_init__(self) -> None:
        kinds = (self.kinds,) if isinstance(self.kinds, str) else tuple(self.kinds)
        if not kinds or len(set(kinds)) < len(kinds) or not all(isinstance(kind, str) and kind for kind in kinds):
            raise ValueError(f"ResidualSpec kinds must be distinct names, at least one, got {self.kinds!r}")
        if any("." in kind for kind in kinds):
            raise ValueError(f"ResidualSpec kinds may have no dot (triggers name 'region.kind'), got {self.kinds!r}")
        object.__setattr__(self, "kinds", kinds)
        choices("reduce", self.reduce, _REDUCTIONS)
        if not 0.0 <= self.decay <= 1.0:
            raise ValueError(f"ResidualSpec decay must lie in [0, 1], got {self.decay!r}")


class ResidualAccumulator(nn.Module):
    """Running averages of errors by region and kind, in one buffer; it has no parameters and takes no gradient.

    Args:
        region_names: the regions whose errors are kept.
        spec: what is kept; by default the mean magnitude, as "prediction".

    Raises:
        ValueError: a region twice.

    >>> accumulator = ResidualAccumulator(["eye"], ResidualSpec(decay=0.5))
    >>> accumulator.update("eye", torch.tensor([1.0, -3.0]))
    >>> accumulator.summaries()
    {'eye': {'prediction': 1.0}}
    """

    def __init__(self, region_names: list[str], spec: ResidualSpec | None = None):
        super().__init__()
        self.spec = ResidualSpec() if spec is None else spec
        self._names = sorted(region_names)
        if len(set(self._names)) < len(self._names):
            raise ValueError(f"region_names has a name twice: {self._names}")
        self._row = {name: row for row, name in enumerate(self._names)}
        self.register_buffer("values", torch.zeros(len(self._names), len(self.spec.kinds)))

    @property
    def region_names(self) -> list[str]:
        """Names of the regions, sorted: the rows of `summary_tensor`."""
        return list(self._names)

    def row(self, region: str) -> int:
        """The region's row. KeyError: its errors are not kept."""
        if region not in self._row:
            raise KeyError(f"no residuals are kept for region {region!r}, only for {self._names}")
        return self._row[region]

    @torch.no_grad()
    def update(self, region: str, error: torch.Tensor, active: torch.Tensor | None = None) -> None:
        """Takes an error into the region's averages.

        Args:
            region: whose error.
            error: of any shape, not empty.
            active: a scalar, 0 or 1, on the error's device: at 0 the averages stay as they are, without a wait for it.

        Raises:
            KeyError: the region's errors are not kept. ValueError: an empty error.
        """
        row = self.row(region)
        if not error.numel():
            raise ValueError(f"the error of region {region!r} is empty: {tuple(error.shape)}")
        size = error.detach().abs().to(torch.promote_types(error.dtype, torch.float32))
        if self.spec.reduce == "l2":
            found = [size.square().sum().sqrt()]
        elif self.spec.reduce == "max_mean":
            found = [size.amax(), size.mean()] if len(self.spec.kinds) > 1 else [size.mean()]
        else:
            found = [size.amax() if self.spec.reduce == "max" else size.mean()]
        new = torch.stack([found[i % len(found)] for i in range(len(self.spec.kinds))]).to(self.values)
        old = self.values[row]
        mixed = self.spec.decay * old + (1.0 - self.spec.decay) * new
        self.values[row] = mixed if active is None else torch.where(active.to(old.device) > 0, mixed, old)

    def summaries(self) -> dict[str, dict[str, float]]:
        """Region to kind to value, as plain floats: waits for the device."""
        kinds = self.spec.kinds
        return {name: dict(zip(kinds, row)) for name, row in zip(self._names, self.values.tolist())}

    def summary_tensor(self) -> torch.Tensor:
        """A copy of the averages, (regions, kinds), by sorted name; on the device, without waiting."""
        return self.values.clone()

    def reset(self) -> None:
        """Back to zero."""
        self.values.zero_()
