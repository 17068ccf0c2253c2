"""The complete declaration of a canvas, layout and topology, as one object that JSON keeps exactly."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from canvas_engineering.canvas.layout import CanvasLayout, RegionSpec, cosine_distances
from canvas_engineering.checked import checked_depth, checked_kind, checked_number, checked_string, read_json, shown
from canvas_engineering.connectivity import CanvasTopology, Connection, TemporalFill
from canvas_engineering.files import replace_file
from canvas_engineering.masks import MaskSpec
from canvas_engineering.notices import join_truncated, warn
from canvas_engineering.version import WRITTEN_BY

__all__ = ["CanvasSchema"]

_GRID_FIELDS = ("T", "spatial_shape", "H", "W", "d_model", "t_current")
_SCHEMA_ENTRIES = ("schema_version", "layout", "regions", "topology", "metadata")
PROGRAM_ENTRIES = ("program_version", "region_programs", "connection_programs")
_ENTRIES = (*_SCHEMA_ENTRIES, *PROGRAM_ENTRIES)
_NAMED_ELSEWHERE = ("version", "written_by")


def _plain(value: Any) -> Any:
    if isinstance(value, TemporalFill):
        return value.value
    if isinstance(value, MaskSpec):
        return declared_fields(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def declared_fields(declaration: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass that have no default or another value than it, as JSON types."""
    values = ((f, getattr(declaration, f.name)) for f in fields(declaration))
    return {f.name: _plain(value) for f, value in values if f.default is MISSING or value != f.default}


def built(cls: type, given: Any, what: str) -> Any:
    """Returns the dataclass from its `declared_fields` form.

    Raises:
        ValueError: not a dict, or a field that is missing or unknown.
    """
    if not isinstance(given, dict):
        raise ValueError(f"{what} must be a dict of its fields, got {shown(given)}")
    _refuse_unknown(given, tuple(f.name for f in fields(cls)), what)
    missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in given]
    if missing:
        raise ValueError(f"{what} lacks {', '.join(missing)}: {shown(given)}")
    try:
        return cls(**given)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def _refuse_unknown(given: Iterable[str], known: tuple[str, ...], what: str) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(f"{what} has unknown fields {shown(unknown)}; known are {', '.join(known)}")


def _version(d: dict[str, Any]) -> Any:
    """Returns the form's version; files of earlier releases call it "version"."""
    given = [d[name] for name in ("schema_version", "version") if d.get(name) is not None]
    if given[1:] and given[0] != given[1]:
        raise ValueError(f"a schema has schema_version {shown(given[0])}, and version, its old name, {shown(given[1])}")
    return given[0] if given else CanvasSchema.version


def _near(name: str) -> str | None:
    """Returns the top-level field that a misspelt name probably means."""
    return next(iter(difflib.get_close_matches(name.lower(), (*_ENTRIES, *_NAMED_ELSEWHERE), 1, 0.8)), None)


def _metadata(d: dict[str, Any]) -> dict[str, Any]:
    """Returns the form's metadata, with the top-level fields that no release knows, of which a UserWarning tells.

    Raises:
        ValueError: a field that is nearly one of a program's, or that metadata has another value for.
    """
    metadata = dict(checked_kind({} if d.get("metadata") is None else d["metadata"], "metadata", dict))
    unknown = {name: value for name, value in d.items() if name not in (*_ENTRIES, *_NAMED_ELSEWHERE)}
    if not unknown:
        return metadata
    meant = {name: _near(name) for name in map(str, unknown)}
    # a program without its behaviour would run, and do something else
    misspelt = {name: near for name, near in meant.items() if near in PROGRAM_ENTRIES}
    if misspelt:
        names = join_truncated(f"{shown(name)} for {near}" for name, near in misspelt.items())
        raise ValueError(f"a schema has unknown fields, which look like a program's: {names}")
    clashes = [name for name, value in unknown.items() if metadata.get(name, value) != value]
    if clashes:
        raise ValueError(f"a schema has {shown(clashes)} at its top level, and others of that name in its metadata")
    names = (f"{shown(name)} (did you mean {near}?)" if near else shown(name) for name, near in meant.items())
    warn(f"a schema has unknown fields, which are kept in its metadata: {join_truncated(names)}")
    return {**metadata, **unknown}


def _connection_from_dict(given: Any, index: int) -> Connection:
    what = f"topology[{index}]"
    if isinstance(given, dict) and given.get("mask") is not None:
        given = {**given, "mask": built(MaskSpec, given["mask"], f"{what} mask")}
    return built(Connection, given, what)


def dumped(form: dict[str, Any], metadata: dict[str, Any]) -> bytes:
    """Returns JSON text of a schema's dict, and which version of the package wrote it.

    Raises:
        ValueError: metadata that JSON has no exact form for.
    """
    checked_depth(metadata, "the schema's metadata")
    try:
        text = json.dumps({"written_by": WRITTEN_BY, **form}, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the schema's metadata cannot be written as JSON: {error}") from error
    if json.loads(text)["metadata"] != metadata:  # a tuple, say, which would come back as a list
        raise ValueError(f"the schema's metadata would come back from JSON changed: {shown(metadata)}")
    return f"{text}\n".encode()


@dataclass
class CanvasSchema:
    """A layout, a topology on it, and what else to remember: the type signature of a canvas-based model.

    Args:
        layout: the canvas.
        topology: which regions attend to which; None if undecided.
        version: of the JSON form.
        metadata: strings, or other values that JSON has.

    Raises:
        ValueError: a field of the wrong kind.

    >>> schema = CanvasSchema(CanvasLayout(T=2, spatial_shape=(4,), d_model=8, regions={"a": (0, 2, 0, 3)}))
    >>> schema.to_dict()["regions"]
    {'a': {'bounds': [0, 2, 0, 3]}}
    >>> CanvasSchema.from_dict(schema.to_dict()) == schema
    True
    """

    layout: CanvasLayout
    topology: CanvasTopology | None = None
    version: str = "0.2.0"
    metadata: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checked_kind(self.layout, "CanvasSchema layout", CanvasLayout)
        checked_kind(self.topology, "CanvasSchema topology", CanvasTopology, optional=True)
        checked_string(self.version, "CanvasSchema version")
        if not isinstance(self.metadata, dict) or not all(isinstance(name, str) for name in self.metadata):
            raise ValueError(f"CanvasSchema metadata must be a dict with string keys, got {shown(self.metadata)}")
        checked_depth(self.metadata, "CanvasSchema metadata")

    def to_dict(self) -> dict[str, Any]:
        """Returns the schema in JSON types: regions and connections with the fields that differ from their defaults.

        A schema without a topology has no "topology" entry; one with an empty topology has an empty one.
        """
        layout = self.layout
        form: dict[str, Any] = {
            "schema_version": self.version,
            "layout": {
                "T": layout.T,
                "spatial_shape": list(layout.spatial_shape),
                "d_model": layout.d_model,
                "t_current": layout.t_current,
            },
            "regions": {name: declared_fields(layout.region_spec(name)) for name in layout.regions},
        }
        if self.topology is not None:
            form["topology"] = [declared_fields(connection) for connection in self.topology.connections]
        form["metadata"] = dict(self.metadata)
        return form

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> CanvasSchema:
        """Returns the schema of a dict as `to_dict` gives it, or as earlier releases wrote it: with a layout of ``H``
        and ``W``, or with ``version`` instead of ``schema_version``.

        Fields at the top level that no release knows become metadata, with a UserWarning that names them, and the
        entry that was probably meant.

        Raises:
            ValueError: something is missing, unknown or wrong, or the dict is a program's; the message names the entry.
        """
        if not isinstance(d, dict) or not isinstance(d.get("layout"), dict):
            names = [name for name in d if name != "layout"] if isinstance(d, dict) else []
            near = [name for name in names if _near(str(name)) == "layout"]
            hint = f" (is {shown(near[0])} meant to be one?)" if near else ""
            raise ValueError(f"a schema must be a dict with a 'layout'{hint}, got {shown(d)}")
        grid = d["layout"]
        if "regions" in grid:
            raise ValueError(f"the regions of a schema stand beside its layout, not in it: {shown(grid)}")
        _refuse_unknown(grid, _GRID_FIELDS, "layout")
        if "spatial_shape" not in grid and "H" not in grid:
            raise ValueError(f"layout needs spatial_shape, or H and W, got {shown(grid)}")
        missing = [name for name in ("T", "d_model") if name not in grid]
        if missing:
            raise ValueError(f"layout lacks {', '.join(missing)}: {shown(grid)}")
        regions, connections = d.get("regions", {}), d.get("topology")
        if not isinstance(regions, dict):
            raise ValueError(f"regions must be a dict of names to fields, got {shown(regions)}")
        if connections is not None and not isinstance(connections, list):
            raise ValueError(f"topology must be a list of connections, [{{src, dst, …}}, …], got {shown(connections)}")
        specs = {
            name: tuple(given) if isinstance(given, list) else built(RegionSpec, given, f"region {name!r}")
            for name, given in regions.items()
        }
        topology = None
        if connections is not None:
            topology = CanvasTopology([_connection_from_dict(given, index) for index, given in enumerate(connections)])
        schema = cls(
            layout=CanvasLayout(**grid, regions=specs),
            topology=topology,
            version=_version(d),
            metadata=_metadata(d),
        )
        of_program = [name for name in PROGRAM_ENTRIES[1:] if d.get(name) not in (None, {})]
        if of_program:
            raise ValueError(f"a schema has no {join_truncated(of_program)}: this is a program: use CanvasProgram")
        return schema

    def to_json(self, path: str | Path) -> None:
        """Writes the schema to a file, atomically.

        Raises:
            ValueError: metadata that JSON has no exact form for; the file stays as it was.
        """
        replace_file(path, dumped(self.to_dict(), self.metadata))

    @classmethod
    def from_json(cls, path: str | Path) -> CanvasSchema:
        """Loads a schema from a file.

        Raises:
            OSError: the file cannot be read.
            ValueError: it holds no JSON, or no schema; the message names the file.
        """
        return read_json(path, cls.from_dict)

    def compatible_regions(self, other: CanvasSchema, threshold: float = 0.3) -> list[tuple[str, str, float]]:
        """Returns (own region, other's region, distance) of all pairs within a transfer distance, nearest first.

        Pairs that cannot be compared, for want of an embedding or with embeddings of different models or lengths, are
        left out.
        """
        checked_number(threshold, "threshold")
        own, others = (_embedded(checked_kind(schema, "a schema", CanvasSchema).layout) for schema in (self, other))
        pairs = []
        for space in own.keys() & others.keys():
            (names, vectors), (other_names, other_vectors) = own[space], others[space]
            distances = cosine_distances(np.array(vectors), np.array(other_vectors))
            for i, j in np.argwhere(distances <= threshold).tolist():
                pairs.append((names[i], other_names[j], float(distances[i, j])))
        return sorted(pairs, key=lambda pair: (pair[2], pair[0], pair[1]))


def _embedded(layout: CanvasLayout) -> dict[tuple[str, int], tuple[list[str], list[tuple[float, ...]]]]:
    """Names and vectors of the regions that have an embedding, by (model, length)."""
    spaces: dict[tuple[str, int], tuple[list[str], list[tuple[float, ...]]]] = {}
    for name in layout.regions:
        spec = layout.region_spec(name)
        if spec.semantic_embedding is not None:
            names, vectors = spaces.setdefault((spec.embedding_model, len(spec.semantic_embedding)), ([], []))
            names.append(name)
            vectors.append(spec.semantic_embedding)
    return spaces
