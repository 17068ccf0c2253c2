"""A compiled type hierarchy: its regions by path, and a canvas to hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from canvas_engineering.canvas import CanvasLayout, RegionSpec, SpatiotemporalCanvas
from canvas_engineering.checked import checked_kind
from canvas_engineering.connectivity import CanvasTopology
from canvas_engineering.schema import CanvasSchema
from canvas_engineering.semantic import SemanticConditioner, compute_semantic_embeddings

__all__ = ["BoundField", "BoundSchema"]


class BoundField:
    """A field of a compiled schema: one region, and methods to write and extract it.

    Attributes:
        region_name: the field's path.
        spec: its RegionSpec.

    >>> from types import SimpleNamespace
    >>> from canvas_engineering import Field, compile_schema
    >>> bound = compile_schema(SimpleNamespace(arm=Field(1, 3)), T=2, d_model=8)
    >>> bound["arm"].region_name, bound["arm"].spec.bounds
    ('arm', (0, 2, 0, 1, 0, 3))
    """

    def __init__(self, region_name: str, spec: RegionSpec, bound_schema: BoundSchema) -> None:
        self.region_name, self.spec, self.bound_schema = region_name, spec, bound_schema

    @property
    def num_positions(self) -> int:
        """Positions of the region, over all of its frames."""
        return self.bound_schema.layout.region_numel(self.region_name)

    def indices(self) -> list[int]:
        """Returns flat canvas indices of the region, row-major."""
        return self.bound_schema.layout.region_indices(self.region_name)

    def place(
        self,
        batch: torch.Tensor,
        embeddings: torch.Tensor,
        canvas: SpatiotemporalCanvas | None = None,
        *,
        strict: bool = False,
    ) -> torch.Tensor:
        """Returns a copy of the batch with the region written; see `SpatiotemporalCanvas.place`.

        Args:
            batch: ``(batch, positions of the canvas, d_model)``.
            embeddings: ``(batch, n, d_model)``.
            canvas: writes in place of the schema's own canvas.
            strict: refuse another n than `num_positions`, instead of padding or truncating.

        Raises:
            RuntimeError: no canvas is given, and the schema has built none.
            ValueError: shapes that do not fit.
        """
        return self._canvas(canvas).place(batch, embeddings, self.region_name, strict=strict)

    def extract(self, batch: torch.Tensor, canvas: SpatiotemporalCanvas | None = None) -> torch.Tensor:
        """Returns the region's part of the batch, ``(batch, num_positions, d_model)``.

        Raises:
            RuntimeError: no canvas is given, and the schema has built none.
            ValueError: a batch of another shape.
        """
        return self._canvas(canvas).extract(batch, self.region_name)

    def _canvas(self, canvas: SpatiotemporalCanvas | None) -> SpatiotemporalCanvas:
        canvas = self.bound_schema.canvas if canvas is None else canvas
        if canvas is None:
            raise RuntimeError(
                f"No canvas: field {self.region_name!r} has no canvas to place into or extract from: "
                "call build_canvas() on its schema, or pass canvas="
            )
        return canvas

    def __repr__(self) -> str:
        return f"BoundField({self.region_name!r}, {self.spec})"


class _Fields(Mapping[str, BoundField]):
    """Lazy mapping from path to BoundField: schemas may have 100,000 fields."""

    def __init__(self, bound: BoundSchema) -> None:
        self._bound = bound

    def __getitem__(self, path: str) -> BoundField:
        return BoundField(path, self._bound.region_specs[path], self._bound)

    def __iter__(self) -> Iterator[str]:
        return iter(self._bound.region_specs)

    def __len__(self) -> int:
        return len(self._bound.region_specs)


class BoundSchema:
    """A CanvasSchema that was compiled from types, with its regions by path.

    Attributes:
        schema: the CanvasSchema.
        region_specs: path to RegionSpec, in flattened order.
        canvas: the canvas that `build_canvas` made; None before.

    >>> from types import SimpleNamespace
    >>> from canvas_engineering import Field, compile_schema
    >>> bound = compile_schema(SimpleNamespace(camera=Field(4, 4), action=Field(1, 2)), T=2, d_model=8)
    >>> batch = bound.create_batch(3)
    >>> batch = bound["camera"].place(batch, torch.zeros(3, 32, 8))
    >>> bound["action"].extract(batch).shape
    torch.Size([3, 4, 8])
    """

    def __init__(self, schema: CanvasSchema, region_specs: dict[str, RegionSpec]) -> None:
        self.schema = checked_kind(schema, "schema", CanvasSchema)
        self.region_specs = checked_kind(region_specs, "region_specs", dict)
        self.canvas: SpatiotemporalCanvas | None = None

    @property
    def layout(self) -> CanvasLayout:
        """The layout of the fields."""
        return self.schema.layout

    @property
    def topology(self) -> CanvasTopology:
        """The schema's topology."""
        return self.schema.topology  # pyright: ignore[reportReturnType] types are compiled with one

    @property
    def fields(self) -> Mapping[str, BoundField]:
        """All fields by path, coarse ones included, in flattened order."""
        return _Fields(self)

    @property
    def field_names(self) -> list[str]:
        """Paths of all fields, in flattened order."""
        return list(self.region_specs)

    def __getitem__(self, path: str) -> BoundField:
        """Returns the field at a path.

        Raises:
            KeyError: there is none.
        """
        if path not in self.region_specs:
            known = ", ".join(map(repr, list(self.region_specs)[:12]))
            more = f", ... ({len(self.region_specs)} in all)" if len(self.region_specs) > 12 else ""
            raise KeyError(f"the schema has no field {path!r}; its fields: {known}{more}")
        return self.fields[path]

    def __contains__(self, path: str) -> bool:
        return path in self.region_specs

    def build_canvas(self, semantic_conditioner: SemanticConditioner | None = None) -> SpatiotemporalCanvas:
        """Makes, keeps and returns the canvas of the schema.

        Args:
            semantic_conditioner: its vectors identify the regions, instead of learned modality embeddings.
        """
        self.canvas = SpatiotemporalCanvas(self.layout, semantic_conditioner)
        return self.canvas

    def create_batch(self, batch_size: int) -> torch.Tensor:
        """Returns empty canvases, ``(batch_size, positions, d_model)``; builds the canvas if there is none yet."""
        return (self.build_canvas() if self.canvas is None else self.canvas).create_empty(batch_size)

    def build_semantic_conditioner(
        self,
        embed_fn: Callable[[list[str]], Sequence[Sequence[float]]],
        embed_dim: int = 1536,
        freeze_embeddings: bool = True,
        learn_residuals: bool = True,
    ) -> SemanticConditioner:
        """Embeds the semantic types of all fields, for `build_canvas`.

        Args:
            embed_fn: strings to vectors; called once, with the semantic type of every field.
            embed_dim: length of its vectors.
            freeze_embeddings: keep the vectors as they are, rather than learning them.
            learn_residuals: learn a vector per field on top.

        Raises:
            ValueError: ``embed_fn`` gives another number of vectors, or vectors of another length.
        """
        types = {path: spec.semantic_type for path, spec in self.region_specs.items() if spec.semantic_type}
        embeddings = compute_semantic_embeddings(self.field_names, embed_fn, types)
        return SemanticConditioner(self.layout.d_model, embed_dim, embeddings, freeze_embeddings, learn_residuals)

    def summary(self) -> str:
        """Returns the compiled schema as text: one line, then one per field."""
        layout = self.layout
        used = sum(layout.region_numel(name) for name in self.region_specs)
        lines = [
            f"BoundSchema: {len(self.region_specs)} fields, {len(self.topology.connections)} connections, "
            f"canvas (T={layout.T}, {layout.spatial_shape}) of {layout.num_positions} positions, "
            f"{100 * used / layout.num_positions:.0f} % used, d_model={layout.d_model}"
        ]
        width = max(map(len, self.region_specs))
        for path, spec in self.region_specs.items():
            t, *size = layout.region_size(path)
            notes = [f"{t} frames of {' x '.join(map(str, size))}"]
            notes += [f"period {spec.period}"] if spec.period != 1 else []
            notes += [] if spec.is_output else ["input only"]
            notes += [f"loss x {spec.loss_weight:g}"] if spec.loss_weight != 1 else []
            notes += [spec.default_attn] if spec.default_attn != "cross_attention" else []
            lines.append(f"  {path:<{width}}  {', '.join(notes)}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<{self.summary().splitlines()[0]}>"
