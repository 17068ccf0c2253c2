"""Cortices: named groups of regions whose connections run one attention function, shared or their own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from canvas_engineering.canvas.layout import CanvasLayout
from canvas_engineering.checked import checked_bool, checked_ints, checked_kind, checked_name, shown
from canvas_engineering.masks import MaskSpec

__all__ = ["CortexRegistry", "CortexSpec"]

_ANYWHERE = (0, 1, 0, 1, 0, 1)


@dataclass(frozen=True)
class CortexSpec:
    """A group of regions.

    What a cortex has of its own is which function runs inside it. The module of that function, its parameters and the
    projected keys and values, is shared with every other connection of the canvas that runs the same function, in
    another cortex or in none, unless the cortex is ``isolated``.

    Args:
        name: of the cortex.
        bounds: the box of the canvas, (t0, t1, s0_lo, s0_hi, …), that holds its regions; at the default, anywhere.
        tile: tile size of its spatial grid, per dimension: of ``mask``.
        local_backend: attention function of connections inside the cortex that name none.
        shared_cache: True: its regions share keys and values, which are projected once for each module of a function.
            There is nothing else; False is refused where the cortex is put to use.
        isolated: whether connections inside the cortex, including those that name a function, run separate modules.

    Raises:
        ValueError: an empty name, bounds that are not half-open ranges, or a tile size below 1.

    >>> CortexSpec("vision", bounds=(0, 4, 0, 8, 0, 8), isolated=True).local_backend
    'local_attention'
    """

    name: str
    bounds: tuple[int, ...] = _ANYWHERE
    tile: tuple[int, ...] = (4, 4)
    local_backend: str = "local_attention"
    shared_cache: bool = True
    isolated: bool = False

    def __post_init__(self) -> None:
        checked_name(self.name, "CortexSpec name")
        checked_name(self.local_backend, f"cortex {self.name!r}: local_backend", "name an attention function")
        bounds = checked_ints(self.bounds, f"cortex {self.name!r}: bounds", 0)
        if len(bounds) < 2 or len(bounds) % 2 or any(low >= high for low, high in zip(bounds[::2], bounds[1::2])):
            raise ValueError(f"cortex {self.name!r}: bounds must be pairs (low, high) with low < high, got {bounds}")
        object.__setattr__(self, "bounds", bounds)
        tile = checked_ints(self.tile, f"cortex {self.name!r}: tile", 1, each=f"cortex {self.name!r}: every tile size")
        object.__setattr__(self, "tile", tile)
        shared = checked_bool(self.shared_cache, f"cortex {self.name!r}: shared_cache")
        object.__setattr__(self, "shared_cache", shared)
        isolated = checked_bool(self.isolated, f"cortex {self.name!r}: isolated")
        object.__setattr__(self, "isolated", isolated)

    @property
    def mask(self) -> MaskSpec:
        """Returns the cortex's tiles as a ``mask_spec`` for connections; it is not applied automatically."""
        return MaskSpec("tile", tile_shape=self.tile)


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
        checked_kind(spec, "spec", CortexSpec)
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
        checked_name(region, "region")
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
        if not isinstance(region, str) or region not in self._assigned:
            raise KeyError(f"region {shown(region)} is in no cortex; assigned are {sorted(self._assigned)}")
        del self._assigned[region]

    def cortex_for(self, region: str) -> CortexSpec | None:
        """Returns the cortex of a region; None where it is in none."""
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

    def check(self, layout: CanvasLayout) -> None:
        """ValueError: a region outside of its cortex's bounds, bounds of other dimensions than the layout's, or a
        cortex without shared keys and values."""
        checked_kind(layout, "layout", CanvasLayout)
        for spec in self.specs:
            if not spec.shared_cache:
                raise ValueError(
                    f"cortex {spec.name!r}: shared_cache=False is not offered: keys and values are projected once for "
                    "each attention function"
                )
            if spec.bounds == _ANYWHERE:
                continue
            box = np.array(spec.bounds).reshape(-1, 2)
            if len(box) != 1 + layout.n_spatial_dims:
                raise ValueError(
                    f"cortex {spec.name!r}: bounds {spec.bounds} must be pairs for time and the "
                    f"{layout.n_spatial_dims} dimensions of the layout"
                )
            for region in filter(layout.regions.__contains__, self.regions_in(spec.name)):
                low, high = layout.region_box(region).T
                if (low < box[:, 0]).any() or (high > box[:, 1]).any():
                    raise ValueError(
                        f"region {region!r} at {layout.region_spec(region).bounds} lies outside of its cortex "
                        f"{spec.name!r} at {spec.bounds}"
                    )

    def summary(self) -> str:
        """Returns the cortices, one a line."""
        lines = [f"CortexRegistry: {self.n_cortices} cortices, {self.n_assigned} regions assigned"]
        for name in self.cortex_names:
            spec, regions = self._cortices[name], self.regions_in(name)
            own = ", isolated" if spec.isolated else ""
            lines.append(f"  {name}: {spec.local_backend}{own}, {', '.join(regions) or 'no regions'}")
        return "\n".join(lines)

    def _check(self, name: str) -> None:
        if not isinstance(name, str) or name not in self._cortices:
            raise KeyError(f"no cortex {shown(name)}; registered are {self.cortex_names}")
