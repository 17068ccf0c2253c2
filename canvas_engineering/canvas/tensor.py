"""The tensor on a canvas: positional, period and family embeddings, and writing and reading regions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from canvas_engineering.canvas.layout import CanvasLayout, RegionSpec
from canvas_engineering.checked import checked_int, checked_ints, checked_kind, checked_tensor, shown
from canvas_engineering.derived_buffers import CanvasModule

__all__ = [
    "FamilyCarrierEmbedding",
    "PeriodEmbedding",
    "SinusoidalPositionalEncoding3D",
    "SinusoidalPositionalEncodingND",
    "SpatiotemporalCanvas",
]


class SinusoidalPositionalEncodingND(CanvasModule):
    """Fixed sinusoids of the frame and of each coordinate, concatenated along the channels.

    ``d_model`` is split evenly over time and each spatial dimension, the remainder going to the last. Channel ``c`` of
    a part of width ``w`` holds sin (c even) or cos (c odd) of ``position / 10000 ** (2 * (c // 2) / w)``
    (Vaswani et al. 2017, section 3.5, per axis).

    Args:
        d_model: channels.
        max_T, max_spatial: the largest grid that `forward` gives.

    Raises:
        ValueError: a size below 1.

    >>> SinusoidalPositionalEncodingND(12, max_T=4, max_spatial=(6, 8))(2, (3, 5)).shape
    torch.Size([2, 3, 5, 12])
    """

    pe: torch.Tensor

    def __init__(self, d_model: int, max_T: int = 32, max_spatial: tuple[int, ...] = (64, 64)) -> None:
        super().__init__()
        d_model = checked_int(d_model, "d_model", 1)
        sizes = [checked_int(max_T, "max_T", 1), *checked_ints(max_spatial, "max_spatial", 1)]
        share = d_model // len(sizes)
        pe = torch.empty(*sizes, d_model)
        for axis, size in enumerate(sizes):
            width = share if axis < len(sizes) - 1 else d_model - axis * share
            channel = torch.arange(width)
            rates = 10000.0 ** (-2.0 * (channel // 2).double() / width)
            angles = torch.arange(size, dtype=torch.float64)[:, None] * rates
            table = torch.where(channel % 2 == 0, angles.sin(), angles.cos()).float()
            shape = [1] * len(sizes) + [width]
            shape[axis] = size
            pe[..., axis * share : axis * share + width] = table.view(shape)
        self.register_buffer("pe", pe)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Checkpoints carry the table, but it is a function of its shape: one made for another grid has nothing to load.
        saved = state_dict.get(f"{prefix}pe")
        if saved is not None and saved.shape != self.pe.shape:
            state_dict[f"{prefix}pe"] = self.pe
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, T: int, spatial_shape: tuple[int, ...]) -> torch.Tensor:
        """Returns the encoding of a grid that starts at the origin, ``(T, *spatial_shape, d_model)``.

        Raises:
            ValueError: a grid of other dimensions, or larger than the encoding was made for.
        """
        sizes = (checked_int(T, "T"), *checked_ints(spatial_shape, "spatial_shape"))
        available = tuple(self.pe.shape[:-1])
        if len(sizes) != len(available) or not all(0 < size <= most for size, most in zip(sizes, available)):
            raise ValueError(f"a grid {sizes} does not fit an encoding for grids up to {available}")
        return self.pe[tuple(slice(size) for size in sizes)]


class SinusoidalPositionalEncoding3D(SinusoidalPositionalEncodingND):
    """`SinusoidalPositionalEncodingND` of a (T, H, W) grid.

    >>> SinusoidalPositionalEncoding3D(12)(2, 3, 5).shape
    torch.Size([2, 3, 5, 12])
    """

    def __init__(self, d_model: int, max_T: int = 32, max_H: int = 64, max_W: int = 64) -> None:
        super().__init__(d_model, max_T, (max_H, max_W))

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] a published signature
        self, T: int, H: int = 0, W: int = 0, spatial_shape: tuple[int, ...] | None = None
    ) -> torch.Tensor:
        """Returns the encoding of a grid of ``(T, H, W)``, or ``(T, *spatial_shape)`` where that is given."""
        return super().forward(T, (H, W) if spatial_shape is None else spatial_shape)


class PeriodEmbedding(CanvasModule):
    """A learned vector per logarithmic bucket of a region's period.

    Raises:
        ValueError: fewer than 2 buckets, or a max_period below 2.

    >>> PeriodEmbedding(8)(4).shape
    torch.Size([8])
    """

    def __init__(self, d_model: int, n_buckets: int = 16, max_period: int = 10000) -> None:
        super().__init__()
        self.n_buckets = checked_int(n_buckets, "n_buckets", 2)
        self.max_period = checked_int(max_period, "max_period", 2)
        self.embedding = nn.Embedding(self.n_buckets, checked_int(d_model, "d_model", 1))
        nn.init.normal_(self.embedding.weight, std=0.02)

    def bucket(self, period: int) -> int:
        """Returns the bucket: 0 up to a period of 1, then even in ln(period), the last one beyond max_period."""
        period = checked_int(period, "period")
        if period <= 1:
            return 0
        return min(int(math.log(period) / math.log(self.max_period) * (self.n_buckets - 1)) + 1, self.n_buckets - 1)

    def forward(self, period: int) -> torch.Tensor:
        """Returns the vector of the period's bucket, ``(d_model,)``."""
        return self.embedding.weight[self.bucket(period)]


class FamilyCarrierEmbedding(CanvasModule):
    """A learned vector per region family plus one per carrier; any other string shares the last row of its table.

    Attributes:
        d_model: width of the vectors.
        family_embedding, carrier_embedding: tables of one row for each of ``FAMILIES`` and ``CARRIERS``, and the last.

    >>> FamilyCarrierEmbedding(8)("observation", "deterministic").shape
    torch.Size([8])
    """

    FAMILIES = ("observation", "state", "memory", "residual", "action")
    CARRIERS = ("deterministic", "diffusive", "filter", "memory", "residual")

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model = checked_int(d_model, "d_model", 1)
        self.family_embedding = nn.Embedding(len(self.FAMILIES) + 1, d_model)
        self.carrier_embedding = nn.Embedding(len(self.CARRIERS) + 1, d_model)
        nn.init.normal_(self.family_embedding.weight, std=0.02)
        nn.init.normal_(self.carrier_embedding.weight, std=0.02)

    def family_idx(self, family: str) -> int:
        """Returns the row of the family's vector."""
        return self.FAMILIES.index(family) if family in self.FAMILIES else len(self.FAMILIES)

    def carrier_idx(self, carrier: str) -> int:
        """Returns the row of the carrier's vector."""
        return self.CARRIERS.index(carrier) if carrier in self.CARRIERS else len(self.CARRIERS)

    def forward(self, family: str, carrier: str) -> torch.Tensor:
        """Returns the sum of both vectors, ``(d_model,)``."""
        return (
            self.family_embedding.weight[self.family_idx(family)]
            + self.carrier_embedding.weight[self.carrier_idx(carrier)]
        )


def parameter_key(region: str) -> str:
    return region.replace(".", "__").replace("[", "_").replace("]", "_")


class SpatiotemporalCanvas(CanvasModule):
    """The tensor on a layout: makes empty canvases, writes regions into them and reads regions out of them.

    The canvas is laid out when the module is built: later changes of ``layout.regions`` do not reach it.

    Args:
        layout: where the regions lie.
        semantic_conditioner: has ``get_conditioning(name) -> (d_model,)``, as a SemanticConditioner has; its vectors
            then identify the regions, instead of learned modality embeddings.
        program: has ``regions``, a dict of names to objects with a ``family`` and a ``carrier``; both then get learned
            embeddings. A region that the program does not list is a "state" with the carrier of its RegionSpec.

    Raises:
        ValueError: two region names that give their modality embeddings the same parameter name, or one that is a
            method of the ParameterDict that holds them.

    >>> layout = CanvasLayout(T=2, d_model=8, spatial_shape=(4,), regions={"arm": (0, 2, 0, 3)})
    >>> canvas = SpatiotemporalCanvas(layout)
    >>> x = canvas.place(canvas.create_empty(1), torch.randn(1, 6, 8), "arm")
    >>> canvas.extract(x, "arm").shape
    torch.Size([1, 6, 8])
    """

    semantic_conditioner: Any
    program: Any
    _positions: torch.Tensor
    _region_of: torch.Tensor
    _period_rows: torch.Tensor
    _semantic_rows: torch.Tensor
    _program_rows: torch.Tensor

    def __init__(self, layout: CanvasLayout, semantic_conditioner: Any = None, program: Any = None) -> None:
        super().__init__()
        self.layout = checked_kind(layout, "layout", CanvasLayout)
        if program is not None and not isinstance(getattr(program, "regions", None), dict):
            raise ValueError(f"program must have regions, a dict of names to programs, got {shown(program)}")
        if semantic_conditioner is not None and not hasattr(semantic_conditioner, "get_conditioning"):
            raise ValueError(f"semantic_conditioner must have get_conditioning, got {shown(semantic_conditioner)}")
        self.program, self.semantic_conditioner = program, semantic_conditioner
        d_model = layout.d_model
        self.empty_token = nn.Parameter(torch.randn(d_model) * 0.02)
        self.pos_enc = SinusoidalPositionalEncodingND(d_model, layout.T, layout.spatial_shape)
        self.period_embedding = PeriodEmbedding(d_model)
        self.modality_embeddings = None if semantic_conditioner is not None else self._modality_embeddings()
        self.family_carrier_embedding = None if program is None else FamilyCarrierEmbedding(d_model)

        specs = {name: layout.region_spec(name) for name in layout.regions}
        counts = np.array([layout.region_numel(name) for name in specs], np.int64)
        stops = counts.cumsum()
        self._ranges = {name: (int(stop - count), int(stop)) for name, stop, count in zip(specs, stops, counts)}
        with_program = specs.items() if program is not None else ()
        self._programs = {name: self._family_and_carrier(name, spec) for name, spec in with_program}
        empty = np.zeros(0, np.int64)
        self.register_table("_positions", np.concatenate([empty, *map(layout.region_positions, specs)]))
        self.register_table("_region_of", np.repeat(np.arange(len(specs)), counts))
        buckets = [self.period_embedding.bucket(spec.period) for spec in specs.values()]
        self.register_table("_period_rows", np.array(buckets, np.int64))
        names: Sequence[str] = getattr(semantic_conditioner, "region_names", ())
        known = {name: row for row, name in enumerate(names)}
        every = hasattr(semantic_conditioner, "get_all_conditioning") and specs.keys() <= known.keys()
        self._knows_every_region = every
        self.register_table("_semantic_rows", np.array([known[name] for name in specs if every], np.int64))
        table = self.family_carrier_embedding
        if table is not None:
            rows = [
                (table.family_idx(family), table.carrier_idx(carrier)) for family, carrier in self._programs.values()
            ]
            self.register_table("_program_rows", np.array(rows, np.int64).reshape(-1, 2))

    def _modality_embeddings(self) -> nn.ParameterDict:
        embeddings, owners = nn.ParameterDict(), {}
        for name in self.layout.regions:
            key = parameter_key(name)
            if key in owners:
                raise ValueError(f"regions {owners[key]!r} and {name!r} would share the parameter name {key!r}")
            if hasattr(nn.ParameterDict, key) or hasattr(nn.ParameterDict(), key):
                raise ValueError(
                    f"region {name!r} cannot have a modality embedding: {key!r} is a name of ParameterDict"
                )
            owners[key] = name
            embeddings[key] = nn.Parameter(torch.randn(self.layout.d_model) * 0.02)
        return embeddings

    def _family_and_carrier(self, name: str, spec: RegionSpec) -> tuple[str, str]:
        if name not in self.program.regions:
            return "state", spec.carrier
        region = self.program.regions[name]
        return region.family, region.carrier

    def region_parameters(self, region: str) -> list[str]:
        """Returns the parts that belong to a region: its modality embedding, and its rows of the period, family and
        carrier tables, each of which is one tensor for all regions. For `ProgramCompiler`."""
        if region not in self._ranges:
            return []
        names = ["period_embedding"]
        if self.modality_embeddings is not None:
            names.append(f"modality_embeddings.{parameter_key(region)}")
        return [*names, *["family_carrier_embedding"] * (self.family_carrier_embedding is not None)]

    def _conditioning(self) -> torch.Tensor:
        """Returns each region's semantic conditioning, ``[regions, d_model]``; in one go where all can be had at
        once."""
        conditioner = self.semantic_conditioner
        if self._knows_every_region:
            return conditioner.get_all_conditioning()[self._semantic_rows]
        return torch.stack([conditioner.get_conditioning(name) for name in self._ranges])

    def _indices(self, region_name: str) -> torch.Tensor:
        if region_name not in self._ranges:
            self.layout.region_spec(region_name)  # says which regions there are
            raise KeyError(f"region {region_name!r} was added to the layout after this canvas was built")
        start, stop = self._ranges[region_name]
        return self._positions[start:stop]

    def _checked_canvas(self, canvas: torch.Tensor) -> None:
        expected = (self.layout.num_positions, self.layout.d_model)
        checked_tensor(canvas, "canvas")
        if canvas.ndim != 3 or tuple(canvas.shape[1:]) != expected:
            raise ValueError(
                f"a canvas must have shape (batch, {expected[0]}, {expected[1]}), got {tuple(canvas.shape)}"
            )

    def create_empty(self, batch_size: int) -> torch.Tensor:
        """Returns an empty canvas, ``(batch_size, num_positions, d_model)``.

        Every position is the empty token plus its positional encoding, plus, for each region that holds it, the
        region's period (and family and carrier) (and semantic) embedding.
        """
        batch_size = checked_int(batch_size, "batch_size", 0)
        layout = self.layout
        canvas = self.empty_token + self.pos_enc(layout.T, layout.spatial_shape).reshape(-1, layout.d_model)
        if self._ranges:
            regions = self.period_embedding.embedding(self._period_rows)  # [regions, d_model]
            if self.family_carrier_embedding is not None:
                regions = regions + self.family_carrier_embedding.family_embedding(self._program_rows[:, 0])
                regions = regions + self.family_carrier_embedding.carrier_embedding(self._program_rows[:, 1])
            if self.semantic_conditioner is not None:
                regions = regions + self._conditioning()
            canvas = canvas.index_add(0, self._positions, regions[self._region_of].to(canvas.dtype))
        return canvas.unsqueeze(0).repeat(batch_size, 1, 1)

    def place(
        self, canvas: torch.Tensor, embeddings: torch.Tensor, region_name: str, *, strict: bool = False
    ) -> torch.Tensor:
        """Returns a copy of the canvas with the region replaced by the embeddings and what identifies the region.

        Every position of the region becomes its embedding, plus the region's modality embedding (or semantic
        conditioning), plus its period (and family and carrier) embedding.

        Args:
            canvas: ``(batch, num_positions, d_model)``.
            embeddings: ``(batch, n, d_model)``, in the region's row-major order; where n is not the region's number
                of positions, zeros are appended or the rest is dropped.
            region_name: which region to write.
            strict: refuse embeddings of another number of positions instead.

        Raises:
            KeyError: no such region.
            ValueError: a canvas of another shape, embeddings of another batch or width, or, if strict, number.
        """
        self._checked_canvas(canvas)
        index = self._indices(region_name)
        n, expected = len(index), (canvas.shape[0], len(index), canvas.shape[2])
        shape = tuple(checked_tensor(embeddings, "embeddings").shape)
        fits = len(shape) == 3 and (shape[0], shape[2]) == (expected[0], expected[2])
        if not fits or (strict and shape[1] != n):
            raise ValueError(
                f"embeddings of shape {shape} do not fit region {region_name!r}, which takes {expected} on a canvas of "
                f"shape {tuple(canvas.shape)}"
            )
        if shape[1] < n:
            embeddings = nn.functional.pad(embeddings, (0, 0, 0, n - shape[1]))
        if self.semantic_conditioner is not None:
            identity = self.semantic_conditioner.get_conditioning(region_name)
        else:
            assert self.modality_embeddings is not None
            identity = self.modality_embeddings[parameter_key(region_name)]
        identity = identity + self.period_embedding(self.layout.region_spec(region_name).period)
        if self.family_carrier_embedding is not None:
            identity = identity + self.family_carrier_embedding(*self._programs[region_name])
        return canvas.index_copy(1, index, (embeddings[:, :n] + identity).to(canvas.dtype))

    def extract(self, canvas: torch.Tensor, region_name: str) -> torch.Tensor:
        """Returns the region's part of the canvas, ``(batch, region_numel, d_model)``, in its row-major order.

        Raises:
            KeyError: no such region.
            ValueError: a canvas of another shape.
        """
        self._checked_canvas(canvas)
        return canvas.index_select(1, self._indices(region_name))
