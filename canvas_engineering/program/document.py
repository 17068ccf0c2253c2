"""CanvasProgram: a schema with the behaviour of its regions and connections, which JSON keeps exactly."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from canvas_engineering.checked import checked_kind, read_json, shown
from canvas_engineering.clock_ir import ClockExpr
from canvas_engineering.files import replace_file
from canvas_engineering.identity import IdentitySpec
from canvas_engineering.learning import LearningSpec
from canvas_engineering.masks import MaskSpec
from canvas_engineering.program.specs import ClockSpec, ConnectionProgram, ConstraintSpec, RegionProgram
from canvas_engineering.schema import PROGRAM_ENTRIES, CanvasSchema, built, dumped

__all__ = ["CanvasProgram"]

_PARTS = {
    "clock": ClockSpec,
    "learning": LearningSpec,
    "constraints": ConstraintSpec,
    "identity": IdentitySpec,
    "mask_spec": MaskSpec,
}


@dataclass
class CanvasProgram:
    """The schema of a canvas and its programs.

    Args:
        schema: layout and topology.
        regions: region name to RegionProgram; a region that is not listed always runs.
        connections: (src, dst) to ConnectionProgram, which speaks for every connection of that pair.
        version: of the JSON form: "2.x.y", whose entries these are.

    Raises:
        ValueError: a part of the wrong kind, or a version of another form.

    >>> from canvas_engineering import CanvasLayout, CanvasSchema
    >>> schema = CanvasSchema(CanvasLayout(T=1, spatial_shape=(4,), d_model=8, regions={"eye": (0, 1, 0, 3)}))
    >>> program = CanvasProgram(schema, {"eye": RegionProgram("observation", clock=ClockSpec(period=2))})
    >>> program.to_dict()["region_programs"]
    {'eye': {'family': 'observation', 'clock': {'period': 2}}}
    >>> CanvasProgram.from_dict(program.to_dict()) == program
    True
    """

    schema: CanvasSchema
    regions: dict[str, RegionProgram] = field(default_factory=dict)
    connections: dict[tuple[str, str], ConnectionProgram] = field(default_factory=dict)
    version: str = "2.0.0"

    def __post_init__(self) -> None:
        checked_kind(self.schema, "CanvasProgram schema", CanvasSchema)
        for name in ("regions", "connections"):
            checked_kind(getattr(self, name), f"CanvasProgram {name}", dict)
        if not isinstance(self.version, str) or not re.fullmatch(r"2\.\d+\.\d+", self.version):
            raise ValueError(f"CanvasProgram program_version must be '2.x.y', got {shown(self.version)}")
        for name, region in self.regions.items():
            if not isinstance(name, str) or not isinstance(region, RegionProgram):
                raise ValueError(
                    f"CanvasProgram regions map names to RegionPrograms, got {shown(name)}: {shown(region)}"
                )
        for pair, connection in self.connections.items():
            named = isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(name, str) for name in pair)
            if not named or not isinstance(connection, ConnectionProgram):
                raise ValueError(
                    f"CanvasProgram connections map (src, dst) to ConnectionPrograms, got {shown(pair)}: "
                    f"{shown(connection)}"
                )

    def to_dict(self) -> dict[str, Any]:
        """Returns the schema's dict, with the fields of region and connection programs that differ from their defaults.

        A program that says nothing has the schema's dict.
        """
        form = self.schema.to_dict()
        if not self.regions and not self.connections:
            return form if self.version == type(self).version else {**form, "program_version": self.version}
        return {
            **form,
            "program_version": self.version,
            "region_programs": {name: _declared(region) for name, region in self.regions.items()},
            "connection_programs": {
                "|".join(map(_escaped, pair)): _declared(connection) for pair, connection in self.connections.items()
            },
        }

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> CanvasProgram:
        """Returns the program of a dict as `to_dict` gives it; a plain schema's is a program that says nothing.

        Raises:
            ValueError: something is missing, unknown or wrong; the message names the entry.
        """
        own = {name: value for name, value in d.items() if name not in PROGRAM_ENTRIES} if isinstance(d, dict) else d
        schema = CanvasSchema.from_dict(own)
        given = {name: d.get(name, {}) for name in ("region_programs", "connection_programs")}
        for name, entries in given.items():
            if not isinstance(entries, dict):
                raise ValueError(f"{name} must be a dict, got {shown(entries)}")
        regions = {
            name: _built(RegionProgram, entry, f"program of region {name!r}")
            for name, entry in given["region_programs"].items()
        }
        connections = {
            _pair(key, schema.layout.regions): _built(ConnectionProgram, entry, f"program of connection {key!r}")
            for key, entry in given["connection_programs"].items()
        }
        return cls(schema, regions, connections, d.get("program_version", cls.version))

    def to_json(self, path: str | Path) -> None:
        """Writes the program to a file, which is replaced in one step.

        Raises:
            ValueError: metadata that JSON has no exact form for; the file stays as it was.
        """
        replace_file(path, dumped(self.to_dict(), self.schema.metadata))

    @classmethod
    def from_json(cls, path: str | Path) -> CanvasProgram:
        """Loads a program from a file.

        Raises:
            OSError: the file cannot be read.
            ValueError: it holds no JSON, or no program; the message names the file.
        """
        return read_json(path, cls.from_dict)

    def summary(self) -> str:
        """Returns the number of programmed regions and connections, and their programs, as text."""
        lines = [f"CanvasProgram (v{self.version}, {len(self.regions)} regions programmed):"]
        regions = self.regions.values()
        for title, values in (
            ("families", [region.family for region in regions]),
            ("carriers", [region.carrier for region in regions if region.carrier != "deterministic"]),
            ("clocks", [_clock_name(region.clock) for region in regions if region.clock is not None]),
            ("compile modes", [mode for mode in map(_compile_mode, regions) if mode != "runtime"]),
            ("operators", [connection.operator for connection in self.connections.values()]),
        ):
            if values:
                counted = sorted(Counter(values).items())
                lines.append(f"  {title}: {', '.join(f'{name}={count}' for name, count in counted)}")
        return "\n".join(lines)


def _compile_mode(region: RegionProgram) -> str:
    return region.effective_compile_mode()


def _clock_name(clock: ClockSpec) -> str:
    return clock.mode if clock.expr is None else "expr"


def _declared(spec: Any) -> Any:
    """Returns a spec's fields that differ from their defaults, in JSON types; other values as JSON has them."""
    if isinstance(spec, ClockExpr):
        return spec.to_dict()
    if isinstance(spec, tuple):
        return [_declared(item) for item in spec]
    if not hasattr(spec, "__dataclass_fields__"):
        return spec
    values = ((f, getattr(spec, f.name)) for f in fields(spec))
    return {f.name: _declared(value) for f, value in values if value != f.default}


def _built(cls: type, given: Any, what: str) -> Any:
    if isinstance(given, dict):
        given = dict(given)
        for name, part in _PARTS.items():
            if given.get(name) is not None:
                given[name] = _built(part, given[name], f"{what}, {name}")
        if cls is ClockSpec and given.get("expr") is not None:
            try:
                given["expr"] = ClockExpr.from_dict(given["expr"])
            except ValueError as error:
                raise ValueError(f"{what}: {error}") from None
    return built(cls, given, what)


def _escaped(name: str) -> str:
    return name.replace("\\", "\\\\").replace("|", "\\|")


def _pair(key: str, regions: Container[str]) -> tuple[str, str]:
    """Returns (src, dst) of ``"src|dst"``; a backslash keeps a bar, or a backslash, as part of a name. Earlier releases
    wrote names as they are; the interpretation that names known regions wins."""
    plain = key.split("|")
    if len(plain) == 2 and all(name in regions for name in plain):
        escaped = _unescaped(key)
        if escaped is None or not all(name in regions for name in escaped):
            return plain[0], plain[1]
    pair = _unescaped(key)
    if pair is None:
        raise ValueError(f"connection_programs has {key!r} for a key, which is not 'src|dst'")
    return pair


def _unescaped(key: str) -> tuple[str, str] | None:
    parts = re.fullmatch(r"((?:[^\\|]|\\.)*)\|((?:[^\\|]|\\.)*)", key, re.DOTALL)
    if parts is None:
        return None
    src, dst = (re.sub(r"\\(.)", r"\1", part, flags=re.DOTALL) for part in parts.groups())
    return src, dst
