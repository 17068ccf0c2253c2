"""Semantic embeddings of regions, distances between them, and conditioning of a canvas on them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from canvas_engineering.canvas.layout import CanvasLayout, RegionSpec, transfer_distance
from canvas_engineering.checked import (
    checked_bool,
    checked_int,
    checked_kind,
    checked_names,
    checked_string,
    checked_tensor,
    shown,
)
from canvas_engineering.derived_buffers import CanvasModule

__all__ = ["SemanticConditioner", "auto_semantic_type", "compute_semantic_embeddings", "program_distance"]

_OTHER_FAMILY, _OTHER_CARRIER = 0.3, 0.2


def auto_semantic_type(path: str) -> str:
    """Returns the semantic type of a field that declares none: its path, in words.

    >>> auto_semantic_type("vehicles[3].front_camera")
    'vehicles 3 / front camera'
    """
    return re.sub(r"\[(\d+)\]", r" \1", checked_string(path, "path")).replace(".", " / ").replace("_", " ")


def program_distance(a_spec: RegionSpec, a_program: Any, b_spec: RegionSpec, b_program: Any) -> float:
    """Returns the distance of two regions including their programs: `transfer_distance`, + 0.3 if the programs'
    ``family`` differ, + 0.2 if their ``carrier`` differ.

    Raises:
        ValueError: embeddings that are missing or cannot be compared.

    >>> from canvas_engineering import RegionProgram, RegionSpec
    >>> spec = RegionSpec((0, 1, 0, 1), semantic_embedding=(1.0, 0.0), embedding_model="m")
    >>> program_distance(spec, RegionProgram("state"), spec, RegionProgram("observation"))
    0.3
    """
    for program in (a_program, b_program):
        if not hasattr(program, "family") or not hasattr(program, "carrier"):
            raise ValueError(f"a program must have a family and a carrier, got {shown(program)}")
    distance = transfer_distance(a_spec, b_spec)
    distance += _OTHER_FAMILY if a_program.family != b_program.family else 0.0
    return distance + (_OTHER_CARRIER if a_program.carrier != b_program.carrier else 0.0)


def compute_semantic_embeddings(
    field_paths: Sequence[str],
    embed_fn: Callable[[list[str]], Sequence[Sequence[float]]],
    semantic_types: Mapping[str, str] | None = None,
) -> dict[str, tuple[float, ...]]:
    """Returns a dict from path to the embedding of its semantic type.

    Args:
        field_paths: which fields.
        embed_fn: strings to vectors of one length; called once. Lists, arrays and tensors will do.
        semantic_types: path to semantic type; `auto_semantic_type` of the path where it has none.

    Raises:
        ValueError: another number of vectors than of strings, or vectors that are not of one length and finite.

    >>> compute_semantic_embeddings(["arm.grip"], lambda texts: [[len(text), 1.0] for text in texts])
    {'arm.grip': (10.0, 1.0)}
    """
    field_paths = checked_names(field_paths, "field_paths")
    semantic_types = {} if semantic_types is None else checked_kind(semantic_types, "semantic_types", Mapping)
    if not callable(embed_fn):
        raise ValueError(f"embed_fn must be a function from strings to vectors, got {shown(embed_fn)}")
    if not field_paths:
        return {}
    texts = [semantic_types.get(path) or auto_semantic_type(path) for path in field_paths]
    vectors = embed_fn(texts)
    if len(vectors) != len(texts):
        raise ValueError(f"embed_fn was given {len(texts)} strings and gave {len(vectors)} vectors")
    embeddings = {}
    length = None
    for path, text, vector in zip(field_paths, texts, vectors):
        values = _vector(vector, f"the embedding of {path!r} ({text!r})").tolist()
        length = len(values) if length is None else length
        if len(values) != length:
            raise ValueError(f"the embedding of {path!r} ({text!r}) has {len(values)} entries, others have {length}")
        embeddings[path] = tuple(values)
    return embeddings


def _vector(values: Any, what: str) -> np.ndarray:
    # in numpy, so that it can be checked whatever mode torch is in
    try:
        vector = values.detach().cpu().double().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
        if vector.dtype.kind not in "biuf":
            raise TypeError(f"got {shown(values)}")
        vector = vector.astype(np.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{what} must be a vector of numbers: {error}") from None
    if vector.ndim != 1 or not len(vector):
        raise ValueError(f"{what} must be a vector, got shape {tuple(vector.shape)}")
    if not np.isfinite(vector).all():
        raise ValueError(f"{what} must be finite")
    return vector


class SemanticConditioner(CanvasModule):
    """Vectors that tell a canvas what each region means: projected semantic embeddings, and learned residuals.

    The conditioning of region r is ``projector(embedding_r) + residual_r``.

    Args:
        d_model: length of the conditioning vectors.
        embed_dim: length of the embeddings.
        region_embeddings: region to embedding: any sequence of numbers, or a tensor.
        freeze_embeddings: whether the embeddings are a buffer, rather than a parameter.
        learn_residuals: whether there are residuals; they start at zero.
        projector_bias: whether the projector has a bias.

    Attributes:
        _embeddings: ``[regions, embed_dim]``, rows by sorted region name; a buffer or a parameter, named so in
            checkpoints.
        projector: Linear(embed_dim, d_model).
        residuals: ``[regions, d_model]``, or None.

    Raises:
        ValueError: no regions, or an embedding of another length than ``embed_dim``, or one that is not finite.

    >>> conditioner = SemanticConditioner(8, 3, {"arm": [1.0, 0.0, 0.0], "eye": [0.0, 1.0, 0.0]})
    >>> conditioner.get_conditioning("arm").shape
    torch.Size([8])
    """

    _embeddings: torch.Tensor
    residuals: nn.Parameter | None

    def __init__(
        self,
        d_model: int,
        embed_dim: int,
        region_embeddings: Mapping[str, Sequence[float] | torch.Tensor],
        freeze_embeddings: bool = True,
        learn_residuals: bool = True,
        projector_bias: bool = False,
    ) -> None:
        super().__init__()
        self.d_model = d_model = checked_int(d_model, "d_model", 1)
        self.embed_dim = embed_dim = checked_int(embed_dim, "embed_dim", 1)
        if not isinstance(region_embeddings, Mapping):
            raise ValueError(f"region_embeddings must map regions to embeddings, got {shown(region_embeddings)}")
        if not region_embeddings:
            raise ValueError("a SemanticConditioner needs the embedding of at least one region")
        self._names = sorted(checked_names(region_embeddings, "region_embeddings"))
        freeze_embeddings = checked_bool(freeze_embeddings, "freeze_embeddings")
        learn_residuals = checked_bool(learn_residuals, "learn_residuals")
        projector_bias = checked_bool(projector_bias, "projector_bias")
        self._row = {name: row for row, name in enumerate(self._names)}
        rows = []
        for name in self._names:
            vector = _vector(region_embeddings[name], f"the embedding of region {name!r}")
            if len(vector) != embed_dim:
                raise ValueError(f"the embedding of region {name!r} has {len(vector)} entries, not {embed_dim}")
            rows.append(vector)
        embeddings = torch.tensor(np.stack(rows), dtype=torch.get_default_dtype())
        if freeze_embeddings:
            self.register_buffer("_embeddings", embeddings)
        else:
            self._embeddings = nn.Parameter(embeddings)
        self.projector = nn.Linear(embed_dim, d_model, bias=projector_bias)
        residuals = nn.Parameter(torch.zeros(len(rows), d_model)) if learn_residuals else None
        self.register_parameter("residuals", residuals)
        self._places: tuple[Any, ...] = (None, None, None)  # a layout's key, its positions, and each one's row here

    @property
    def n_regions(self) -> int:
        """Number of regions."""
        return len(self._names)

    @property
    def region_names(self) -> list[str]:
        """Names of the regions, sorted: the order of the rows."""
        return list(self._names)

    def region_parameters(self, region: str) -> list[str]:
        """Returns the parts that belong to a region: its rows of the embeddings and the residuals, each of which is
        one tensor for all regions. For `ProgramCompiler`."""
        held = dict(self.named_parameters(recurse=False)) if region in self._row else {}
        return [name for name in ("_embeddings", "residuals") if name in held]

    def get_conditioning(self, region_name: str) -> torch.Tensor:
        """Returns the region's vector, ``(d_model,)``.

        Raises:
            KeyError: no such region.
        """
        if not isinstance(region_name, str) or region_name not in self._row:
            known = ", ".join(map(repr, self._names[:12])) + (", ..." if len(self._names) > 12 else "")
            raise KeyError(f"no semantic embedding for region {shown(region_name)}; there are {known}")
        row = self._row[region_name]
        vector = self.projector(self._embeddings[row])
        return vector if self.residuals is None else vector + self.residuals[row]

    def get_all_conditioning(self) -> torch.Tensor:
        """Returns all vectors, ``(n_regions, d_model)``, in the order of `region_names`."""
        vectors = self.projector(self._embeddings)
        return vectors if self.residuals is None else vectors + self.residuals

    def condition_canvas(self, canvas: torch.Tensor, layout: CanvasLayout) -> torch.Tensor:
        """Returns a copy of the canvas with each region's vector added at its positions.

        Regions of the layout that the conditioner does not know stay as they are; where regions overlap, their vectors
        add up.

        Args:
            canvas: ``(batch, num_positions, d_model)``.
            layout: where the regions lie.

        Raises:
            ValueError: a canvas of another shape.
        """
        checked_kind(layout, "layout", CanvasLayout)
        checked_tensor(canvas, "canvas")
        if canvas.ndim != 3 or tuple(canvas.shape[1:]) != (layout.num_positions, self.d_model):
            raise ValueError(
                f"a canvas must have shape (batch, {layout.num_positions}, {self.d_model}), got {tuple(canvas.shape)}"
            )
        key, positions, rows = self._places
        if key is not layout.key() or positions.device != canvas.device:
            # what is made in inference mode could not be saved for a later backward; a compiler knows no such mode
            compiling = torch.compiler.is_compiling()
            with contextlib.nullcontext() if compiling else torch.inference_mode(False):
                named = [name for name in layout.regions if name in self._row]
                index = [layout.region_index(name) for name in named]
                counts = torch.tensor([len(part) for part in index], dtype=torch.int64)
                row = torch.tensor([self._row[name] for name in named], dtype=torch.int64)
                positions = torch.cat([torch.zeros(0, dtype=torch.int64), *index]).to(canvas.device)
                rows = row.repeat_interleave(counts).to(canvas.device)
            if not compiling and type(rows) is torch.Tensor:  # neither traced nor fake
                self._places = (layout.key(), positions, rows)
        added = self.get_all_conditioning().to(canvas.dtype)[rows]
        return canvas.index_add(1, positions, added.expand(canvas.shape[0], -1, -1))
