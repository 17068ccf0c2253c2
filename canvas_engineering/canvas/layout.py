"""Layouts: regions of a canvas."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from canvas_engineering.checked import (
    LARGEST_INT,
    checked_bool,
    checked_int,
    checked_ints,
    checked_kind,
    checked_number,
    checked_string,
    shown,
)

__all__ = ["ATTENTION_TYPES", "CanvasLayout", "RegionSpec", "transfer_distance"]

ATTENTION_TYPES: dict[str, str] = {
    "cross_attention": "softmax of scaled dot products: general-purpose, content-based selection, O(NM)",
    "linear_attention": "kernelised dot products: low-dimensional or high-frequency streams, O(N+M)",
    "cosine_attention": "softmax of cosine similarities with a learned temperature, O(NM)",
    "sigmoid_attention": "independent sigmoids over keys: non-exclusive attention, O(NM)",
    "gated": "cross-attention behind a learned gate: optional conditioning, O(NM)",
    "perceiver": "keys compressed through learned latents, O((N+M)K)",
    "pooling": "projected mean of the keys: scalar conditioning signals, O(N+M)",
    "copy": "direct transfer of latents, O(N)",
    "mamba": "selective state space along the keys, and a softmax over its rows: ordered streams, O(NM)",
    "rwkv": "linear recurrence with learned decay, O(N)",
    "hyena": "implicit long convolution by FFT, O(N log N + M)",
    "sparse_attention": "softmax over each query's top-k keys, O(NM)",
    "local_attention": "softmax over a window of neighbouring keys, O((N+M)W)",
    "none": "declared but disabled, O(0)",
    "random_fixed": "softmax over a fixed random choice of keys: a baseline, O(NK + M)",
    "mixture": "a router over experts that attend to chunks of the keys, O(NM)",
    "cogvideox": "cross-attention as a CogVideoX block does it, O(NM)",
}
"""Purpose of each attention function, and its operations for one attention set of N queries and M keys: W keys lie in a
window, and K are latents or drawn keys."""


class HashedOnce(tuple):
    """A tuple that hashes its (many) members once."""

    def __hash__(self) -> int:
        try:
            return self._hash
        except AttributeError:
            self._hash = super().__hash__()
            return self._hash


@dataclass(frozen=True)
class RegionSpec:
    """The declaration of one region of a canvas.

    Args:
        bounds: ``(t0, t1, s0_lo, s0_hi, ...)``, half-open, in canvas frames and grid coordinates.
        period: real-time steps per canvas frame: the region's frame ``t`` lies at real time ``t * period``.
        is_output: whether the region's positions take part in the loss.
        loss_weight: relative weight of its positions in the loss.
        semantic_type: what the region holds, in words.
        semantic_embedding: embedding of the semantic type; any sequence of numbers, stored as a tuple of floats.
        embedding_model: the model that made the embedding.
        default_attn: attention function of the connections that the region queries, where they name none.
        carrier: the dynamics that govern the region.

    Raises:
        ValueError: bounds that are reversed, empty, negative or not ints in pairs; a period below 1; a number that is
            not finite; a field of the wrong kind.

    >>> RegionSpec((0, 4, 28, 32, 0, 8), period=4).bounds
    (0, 4, 28, 32, 0, 8)
    """

    bounds: tuple[int, ...]
    period: int = 1
    is_output: bool = True
    loss_weight: float = 1.0
    semantic_type: str | None = None
    semantic_embedding: tuple[float, ...] | None = None
    embedding_model: str = "openai/text-embedding-3-small"
    default_attn: str = "cross_attention"
    carrier: str = "deterministic"

    def __post_init__(self) -> None:
        # Layouts of some 100,000 regions exist; nearly all pass here and need none of the coercions below.
        bounds = self.bounds
        if (
            type(bounds) is tuple
            and len(bounds) >= 4
            and len(bounds) % 2 == 0
            and set(map(type, bounds)) == {int}
            and min(bounds[::2]) >= 0
            and max(bounds) <= LARGEST_INT
            and all(map(operator.lt, bounds[::2], bounds[1::2]))
            and type(self.period) is int
            and 1 <= self.period <= LARGEST_INT
            and type(self.is_output) is bool
            and type(self.loss_weight) is float
            and math.isfinite(self.loss_weight)
            and self.semantic_embedding is None
            and type(self.embedding_model) is type(self.default_attn) is type(self.carrier) is str
            and (self.semantic_type is None or type(self.semantic_type) is str)
        ):
            return
        self._check()

    def _check(self) -> None:
        bounds = checked_ints(self.bounds, "region bounds")
        if len(bounds) < 4 or len(bounds) % 2:
            raise ValueError(f"region bounds must be (t0, t1, s0_lo, s0_hi, ...), got {bounds}")
        for low, high in zip(bounds[::2], bounds[1::2]):
            if low < 0 or low >= high:
                raise ValueError(f"region bounds {bounds}: the range ({low}, {high}) is negative, reversed or empty")
        put = object.__setattr__
        put(self, "bounds", bounds)
        put(self, "period", checked_int(self.period, f"period of the region at {bounds}", 1))
        put(self, "loss_weight", checked_number(self.loss_weight, f"loss_weight of the region at {bounds}"))
        put(self, "is_output", checked_bool(self.is_output, f"is_output of the region at {bounds}"))
        for name in ("embedding_model", "default_attn", "carrier"):
            checked_string(getattr(self, name), f"{name} of the region at {bounds}")
        if self.semantic_type is not None:
            checked_string(self.semantic_type, f"semantic_type of the region at {bounds}")
        if self.semantic_embedding is not None:
            try:
                values = torch.as_tensor(self.semantic_embedding, dtype=torch.float64).tolist()
            except (TypeError, ValueError, RuntimeError, OverflowError, RecursionError) as error:
                raise ValueError(f"semantic_embedding of the region at {bounds} must hold numbers: {error}") from None
            if not isinstance(values, list) or not all(isinstance(v, float) and math.isfinite(v) for v in values):
                raise ValueError(f"semantic_embedding of the region at {bounds} must be a vector of finite numbers")
            put(self, "semantic_embedding", tuple(values))


def cosine_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns 1 − cosine similarity of every row of ``a`` with every row of ``b``; 1 for zero rows."""
    unit_a, unit_b = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300) for rows in (a, b))
    return np.clip(1.0 - unit_a @ unit_b.T, 0.0, 2.0)


def transfer_distance(a: RegionSpec, b: RegionSpec) -> float:
    """Returns the cosine distance, 1 − cos in [0, 2], of two regions' semantic embeddings.

    Raises:
        ValueError: an embedding is missing, or the two come from different models or differ in length.

    >>> transfer_distance(RegionSpec((0, 1, 0, 1), semantic_embedding=(1, 0)),
    ...                   RegionSpec((0, 1, 1, 2), semantic_embedding=(0, 2)))
    1.0
    """
    vectors = []
    for spec in (a, b):
        checked_kind(spec, "what is bridged", RegionSpec)
        if spec.semantic_embedding is None:
            raise ValueError(f"the region at {spec.bounds} ({spec.semantic_type!r}) has no semantic_embedding")
        vectors.append(spec.semantic_embedding)
    if a.embedding_model != b.embedding_model:
        raise ValueError(
            f"embeddings of different models cannot be compared: {a.embedding_model!r}, {b.embedding_model!r}"
        )
    of_a, of_b = vectors
    if len(of_a) != len(of_b):
        raise ValueError(f"embeddings differ in length: {len(of_a)} at {a.bounds}, {len(of_b)} at {b.bounds}")
    return float(cosine_distances(np.array([of_a]), np.array([of_b]))[0, 0])


_NO_REGIONS: dict = {}


@dataclass(frozen=True, eq=False, init=False)
class CanvasLayout:
    """A grid of ``T`` frames of ``spatial_shape`` positions, with named regions on it.

    Positions are numbered row-major in (t, s0, s1, ...). Regions are half-open boxes; they may overlap, and positions
    may lie in none. Layouts compare by value; a raw tuple of bounds equals the RegionSpec that it stands for.

    Args:
        T: number of canvas frames.
        d_model: channels per position.
        spatial_shape: positions per spatial dimension; this or ``H`` (and ``W``), never both.
        regions: name to bounds, or to a RegionSpec.
        t_current: positions of frames from here on are outputs.
        H, W: first and second spatial dimension; None where the canvas has no such dimension.

    Raises:
        ValueError: no grid or two, a size below 1, bounds of the wrong length or outside the grid; the message names
            the region, its bounds and the grid.

    >>> layout = CanvasLayout(T=5, H=8, W=8, d_model=256, regions={"action": (0, 5, 6, 7, 0, 1)}, t_current=2)
    >>> layout.num_positions, layout.region_indices("action")
    (320, [48, 112, 176, 240, 304])
    """

    T: int
    d_model: int
    spatial_shape: tuple[int, ...] = ()
    regions: dict[str, tuple[int, ...] | RegionSpec] = field(default_factory=dict)
    t_current: int = 0
    # no fields of __init__: dataclasses.replace would hand them on beside spatial_shape, as a second grid
    H: int | None = field(default=None, init=False)
    W: int | None = field(default=None, init=False)
    if TYPE_CHECKING:  # what `_forget` makes is no field of the dataclass
        _specs: dict[str, tuple[Any, RegionSpec, np.ndarray]] = field(init=False)
        _indices: dict[str, tuple[Any, np.ndarray]] = field(init=False)
        _key: tuple[Any, Any] = field(init=False)

    def __init__(
        self,
        T: int,
        d_model: int,
        spatial_shape: tuple[int, ...] = (),
        regions: Mapping[str, tuple[int, ...] | RegionSpec] = _NO_REGIONS,
        t_current: int = 0,
        H: int | None = None,
        W: int | None = None,
    ) -> None:
        put = object.__setattr__
        put(self, "T", checked_int(T, "CanvasLayout T", 1))
        put(self, "d_model", checked_int(d_model, "CanvasLayout d_model", 1))
        put(self, "t_current", checked_int(t_current, "CanvasLayout t_current", 0))
        shape = checked_ints(spatial_shape, "CanvasLayout spatial_shape")
        given = tuple(
            None if size is None else checked_int(size, f"CanvasLayout {name}", 1)
            for name, size in (("H", H), ("W", W))
        )
        if shape and given != (None, None):
            raise ValueError(f"Cannot specify both: give spatial_shape={shape} or H={given[0]}, W={given[1]}, not both")
        if not shape:
            if given[0] is None:
                raise ValueError(f"a CanvasLayout needs spatial_shape, or H and W; got H=None, W={given[1]}")
            shape = given if given[1] is not None else given[:1]
        shape = tuple(checked_int(size, "every size of CanvasLayout spatial_shape", 1) for size in shape)
        put(self, "spatial_shape", shape)
        if self.num_positions > LARGEST_INT:
            raise ValueError(
                f"a CanvasLayout of T={self.T} frames of {shape} has {self.num_positions} positions: it may have up to "
                "2**31 - 1"
            )
        put(self, "H", shape[0])
        put(self, "W", shape[1] if len(shape) > 1 else None)
        if not isinstance(regions, dict):
            raise ValueError(f"CanvasLayout regions must be a dict of names to bounds, got {type(regions).__name__}")
        put(self, "regions", {name: tuple(raw) if isinstance(raw, list) else raw for name, raw in regions.items()})
        self._forget()
        for name in self.regions:
            self.region_box(name)

    def _forget(self) -> None:
        object.__setattr__(self, "_specs", {})  # name -> (what `regions` holds, its RegionSpec, its box)
        object.__setattr__(self, "_indices", {})  # name -> (what `regions` holds, its flat indices)
        object.__setattr__(self, "_key", (None, None))  # what `regions` held, and the key made of it

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    # by value, so that there is no hash: `regions` is a dict that may grow, and key() is what caches go by
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CanvasLayout):
            return NotImplemented
        mine, theirs = (
            (x.T, x.d_model, x.spatial_shape, x.t_current, {name: x.region_spec(name) for name in x.regions})
            for x in (self, other)
        )
        return mine == theirs

    def _repr_html_(self) -> str:
        from canvas_engineering.notebook import layout_html

        return layout_html(self)

    @property
    def n_spatial_dims(self) -> int:
        """Number of spatial dimensions."""
        return len(self.spatial_shape)

    @property
    def spatial_volume(self) -> int:
        """Positions per frame."""
        return math.prod(self.spatial_shape)

    @property
    def num_positions(self) -> int:
        """Positions of the whole canvas."""
        return self.T * self.spatial_volume

    def key(self) -> tuple:
        """Returns everything about the layout that attention depends on, as one hashable tuple, for caches.

        That is the grid, and each region's name, bounds, period and default_attn. It follows changes of ``regions``;
        while there are none, the same object is returned.
        """
        snapshot, key = self._key
        if snapshot != self.regions:
            specs = ((name, self.region_spec(name)) for name in self.regions)
            regions = tuple((name, spec.bounds, spec.period, spec.default_attn) for name, spec in specs)
            key = HashedOnce((self.T, self.spatial_shape, regions))
            object.__setattr__(self, "_key", (dict(self.regions), key))
        return key

    def flat_index(self, t: int, *spatial_coords: int) -> int:
        """Returns the flat index of the position at frame ``t`` and the given coordinates.

        Raises:
            ValueError: the wrong number of coordinates, or one outside the grid.
        """
        shape = (self.T, *self.spatial_shape)
        coords = checked_ints((t, *spatial_coords), "coordinates")
        if len(coords) != len(shape) or not all(0 <= c < size for c, size in zip(coords, shape)):
            raise ValueError(f"position {coords} does not lie on the grid {shape}")
        index = 0
        for coord, size in zip(coords, shape):
            index = index * size + coord
        return index

    def _region(self, name: str) -> tuple[Any, RegionSpec, np.ndarray]:
        try:
            raw = self.regions[name]
        except (KeyError, TypeError):
            known = ", ".join(repr(known) for known in list(self.regions)[:12])
            more = f", ... ({len(self.regions)} in all)" if len(self.regions) > 12 else ""
            raise KeyError(f"the layout has no region {shown(name)}; its regions: {known}{more}") from None
        cached = self._specs.get(name)
        # Specs and tuples never change, so a region is new only where the dict holds another object.
        if cached is None or cached[0] is not raw:
            cached = self._specs[name] = (raw, *self._checked_region(name, raw))
        return cached

    def _checked_region(self, name: str, raw: Any) -> tuple[RegionSpec, np.ndarray]:
        shape = (self.T, *self.spatial_shape)
        if not isinstance(name, str) or not name:
            raise ValueError(f"region names must be strings of at least one character, got {shown(name)}")
        if not isinstance(raw, RegionSpec):
            try:
                raw = RegionSpec(bounds=raw)
            except ValueError as error:
                raise ValueError(f"region {name!r} on the grid {shape}: {error}") from None
        if len(raw.bounds) != 2 * len(shape):
            raise ValueError(
                f"region {name!r}: bounds {raw.bounds} have {len(raw.bounds)} entries, "
                f"the grid {shape} needs {2 * len(shape)}"
            )
        box = np.array(raw.bounds, dtype=np.int64).reshape(-1, 2)
        if any(map(operator.gt, raw.bounds[1::2], shape)):
            raise ValueError(f"region {name!r}: bounds {raw.bounds} reach outside the grid {shape}")
        box.setflags(write=False)
        return raw, box

    def region_spec(self, name: str) -> RegionSpec:
        """Returns the region's RegionSpec, also where it was given as raw bounds.

        Raises:
            KeyError: no such region.
        """
        return self._region(name)[1]

    def region_box(self, name: str) -> np.ndarray:
        """Returns the region's half-open ranges, read-only int64 ``[1 + n_spatial_dims, 2]``.

        Raises:
            KeyError: no such region.
        """
        return self._region(name)[2]

    def region_size(self, name: str) -> tuple[int, ...]:
        """Returns the region's extent along time and each spatial dimension."""
        box = self.region_box(name)
        return tuple((box[:, 1] - box[:, 0]).tolist())

    def region_numel(self, name: str) -> int:
        """Returns the number of positions of the region."""
        return math.prod(self.region_size(name))

    def _box_index(self, bounds: tuple[int, ...]) -> np.ndarray:
        index = np.zeros((), np.int64)
        for low, high, size in zip(bounds[::2], bounds[1::2], (self.T, *self.spatial_shape)):
            index = (index * size)[..., None] + np.arange(low, high)
        return index.reshape(-1)

    def region_index(self, name: str) -> torch.Tensor:
        """Returns the region's flat indices in row-major order, int64 ``[region_numel]``; not to be written to."""
        return torch.from_numpy(self.region_positions(name))

    def region_positions(self, name: str) -> np.ndarray:
        """Returns `region_index` on the host whatever mode torch is in; cached, so not to be written to."""
        raw, spec, _ = self._region(name)
        cached = self._indices.get(name)
        if cached is None or cached[0] is not raw:
            cached = self._indices[name] = (raw, self._box_index(spec.bounds))
        return cached[1]

    def region_indices(self, name: str) -> list[int]:
        """Returns `region_index` as a list."""
        return self.region_index(name).tolist()

    def region_indices_at_t(self, name: str, t_abs: int) -> list[int]:
        """Returns the region's flat indices at the absolute canvas frame ``t_abs``, if any."""
        bounds, t_abs = self.region_spec(name).bounds, checked_int(t_abs, "t_abs")
        if not bounds[0] <= t_abs < bounds[1]:
            return []
        return self._box_index((t_abs, t_abs + 1, *bounds[2:])).tolist()

    def region_timesteps(self, name: str) -> list[int]:
        """Returns the absolute canvas frames of the region."""
        bounds = self.region_spec(name).bounds
        return list(range(bounds[0], bounds[1]))

    def output_mask(self) -> list[int]:
        """Returns the flat indices of all positions at frames from ``t_current`` on."""
        return list(range(min(self.t_current, self.T) * self.spatial_volume, self.num_positions))

    def loss_weight_mask(self, device: str | torch.device = "cpu") -> torch.Tensor:
        """Loss weight per position, float32 ``[num_positions]``: the sum over the output regions that hold it."""
        weights = np.zeros((self.T, *self.spatial_shape), dtype=np.float32)
        for name in self.regions:
            _, spec, box = self._region(name)
            if spec.is_output:
                weights[tuple(slice(low, high) for low, high in box.tolist())] += spec.loss_weight
        return torch.from_numpy(weights.reshape(-1)).to(device)

    def real_frame(self, name: str, canvas_t: int) -> int:
        """Returns the real-time frame of the region's ``canvas_t``-th frame, both counted from the region's start."""
        return checked_int(canvas_t, "canvas_t") * self.region_spec(name).period

    def canvas_frame(self, name: str, real_t: int) -> int | None:
        """Returns the region's frame at ``real_t``, both counted from its start, or None."""
        spec = self.region_spec(name)
        frame, remainder = divmod(checked_int(real_t, "real_t", most=2**63 - 1), spec.period)
        return frame if remainder == 0 and 0 <= frame < spec.bounds[1] - spec.bounds[0] else None
