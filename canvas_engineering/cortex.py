"""Cortices: named groups of regions whose edges among themselves run one attention function."""

from __future__ import annotations

from dataclasses import dataclass

from canvas_engineering.canvas.layout import checked_int

__all__ = ["CortexRegistry", "CortexSpec"]


@dataclass(frozen=True)
class CortexSpec:
    """A group of regions.

    Args:
        name: of the cortex.
        bounds: the box of the canvas that it is meant to cover, (t0, t1, s0_lo, s0_hi, …).
        tile: tile size of its spatial grid, per dimension.
        local_backend: attention function of the edges inside the cortex that name none themselves.
        shared_cache: whether its regions may share cached keys and values.

    Raises:
        ValueError: an empty name, bounds that are not half-open ranges, or a tile size below 1.
    """

    name: str
    bounds: tuple[int, ...] = (0, 1, 0, 1, 0, 1)
    tile: tuple[int, ...] = (4, 4)
    local_backend: str = "local_attention"
    shared_cache: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"CortexSpec name must be a string of at least one character, got {self.name!r}")
        if not isinstance(self.local_backend, str) or not self.local_backend:
            raise ValueError(
                f"cortex {self.name!r}: local_backend must name an attention function, got {self.local_backend!r}"
            )
        bounds = tuple(checked_int(bound, f"cortex {self.name!r}: every bound", 0) for bound in self.bounds)
        if len(bounds) < 2 or len(bounds) % 2 or any(low >= high for low, high in zip(bounds[::2], bounds[1::2])):
            raise ValueError(f"cortex {self.name!r}: bounds must be pairs (low, high) with low < high, got {bounds}")
        object.__setattr__(self, "bounds", bounds)
        tile = tuple(checked_int(size, f"cortex {self.name!r}: every tile size", 1) for size in self.tile)
        object.__setattr__(self, "tile", tile)


class CortexRegistry:
    """Which cortices there are, and which region belongs to which.

    >>> registry = CortexRegistry()
    >>> registry.register(CortexSpec("visual", local_backend="cosine_attention"))
    >>> registry.assign("camera", "visual")
    >>> registry.cortex_for("camera").local_backend, registry.same_cortex("camera", "joints")
    ('cosine_attention', False)
    """

    def __init__(self) -> None:
        self._cortices: dict[str, CortexSpec] = {}
        self._assigned: dict[str, str] = {}

    def register(self, spec: CortexSpec) -> None:
        """Adds a cortex.

        Raises:
            ValueError: there is one of this name.
        """
        if not isinstance(spec, CortexSpec):
            raise ValueError(f"register takes a CortexSpec, got {spec!r}")
        if spec.name in self._cortices:
            raise ValueError(f"cortex {spec.name!r} is registered already: {self._cortices[spec.name]}")
        self._cortices[spec.name] = spec

    def unregister(self, name: str) -> None:
        """Removes a cortex and all of its assignments.

        Raises:
            KeyError: there is none of this name.
        """
        self._check(name)
        del self._cortices[name]
        self._assigned = {region: cortex for region, cortex in self._assigned.items() if cortex != name}

    def assign(self, region: str, cortex_name: str) -> None:
        """Puts a region into a cortex.

        Raises:
            KeyError: no such cortex.
            ValueError: the region is in another one.
        """
        self._check(cortex_name)
        current = self._assigned.get(region, cortex_name)
        if current != cortex_name:
            raise ValueError(
                f"region {region!r} is in cortex {current!r}: unassign it before it goes to {cortex_name!r}"
            )
        self._assigned[region] = cortex_name

    def unassign(self, region: str) -> None:
        """Takes a region out of its cortex.

        Raises:
            KeyError: it is in none.
        """
        if region not in self._assigned:
            raise KeyError(f"region {region!r} is in no cortex; assigned are {sorted(self._assigned)}")
        del self._assigned[region]

    def cortex_for(self, region: str) -> CortexSpec | None:
        """The cortex of a region; None where it is in none."""
        name = self._assigned.get(region)
        return None if name is None else self._cortices[name]

    def regions_in(self, cortex_name: str) -> list[str]:
        """Names of a cortex's regions, sorted.

        Raises:
            KeyError: no such cortex.
        """
        self._check(cortex_name)
        return sorted(region for region, cortex in self._assigned.items() if cortex == cortex_name)

    def same_cortex(self, a: str, b: str) -> bool:
        """Whether both regions are in one cortex."""
        return a in self._assigned and self._assigned[a] == self._assigned.get(b)

    @property
    def cortex_names(self) -> list[str]:
        """Names of all cortices, sorted."""
        return sorted(self._cortices)

    @property
    def specs(self) -> list[CortexSpec]:
        """All cortices, by name."""
        return [self._cortices[name] for name in self.cortex_names]

    @property
    def n_cortices(self) -> int:
        return len(self._cortices)

    @property
    def n_assigned(self) -> int:
        """Number of regions that are in a cortex."""
        return len(self._assigned)

    def summary(self) -> str:
        """The cortices, one a line."""
        lines = [f"CortexRegistry: {self.n_cortices} cortices, {self.n_assigned} regions assigned"]
        for name in self.cortex_names:
            spec, regions = self._cortices[name], self.regions_in(name)
            lines.append(f"  {name}: {spec.local_backend}, {', '.join(regions) or 'no regions'}")
        return "\n".join(lines)

    def _check(self, name: str) -> None:
        if name not in self._cortices:
            raise KeyError(f"no cortex {name!r}; registered are {self.cortex_names}")
