"""ProgramCompiler: what deploy makes of a program: what freezes, becomes constant, is exported, or is dropped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import nn

from canvas_engineering.canvas.layout import CanvasLayout
from canvas_engineering.canvas.tensor import parameter_key
from canvas_engineering.checked import checked_bool, checked_kind, checked_path, parsed_json
from canvas_engineering.connectivity import CanvasTopology, Connection
from canvas_engineering.files import alone_in, replace_file
from canvas_engineering.program import CanvasProgram
from canvas_engineering.program.checks import check_program
from canvas_engineering.program.edges import resolve_edges
from canvas_engineering.schema import CanvasSchema

__all__ = ["CompiledProgram", "ProgramCompiler", "load_exported"]

_GONE = ("constant", "export")


@dataclass
class CompiledProgram:
    """A program after deploy.

    Attributes:
        schema: the program's, as it was.
        active_regions: regions that still run: all but constant and exported ones.
        frozen_regions, constant_regions, exported_memories, distill_regions: regions by what becomes of them; those to
            be distilled run on.
        active_connections: connections between active regions, in declaration order.
        all_regions: every region of the layout.
        constant_buffers: name to the buffer that took the parameter's place.
        exported_paths: region to its file of tensors, for `load_exported`. Its name carries its checksum: exporting
            the region again makes another file and removes this one.
        program: the active regions and connections, on the same canvas: what a dispatcher is to be built of. A
            checkpoint of the whole model goes into it through ``canvas_engineering.dispatch.surviving_state``.
        gates: of all connections of the whole program that write by "gate", in declaration order, whether they survive.
    """

    schema: CanvasSchema
    active_regions: set[str] = field(default_factory=set)
    frozen_regions: set[str] = field(default_factory=set)
    constant_regions: set[str] = field(default_factory=set)
    exported_memories: set[str] = field(default_factory=set)
    active_connections: list[Connection] = field(default_factory=list)
    all_regions: set[str] = field(default_factory=set)
    distill_regions: set[str] = field(default_factory=set)
    constant_buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    exported_paths: dict[str, str] = field(default_factory=dict)
    program: CanvasProgram | None = None
    gates: tuple[bool, ...] = ()

    @property
    def n_eliminated(self) -> int:
        """Number of regions that no longer run."""
        return len(self.all_regions - self.active_regions)

    def summary(self) -> str:
        """What becomes of the regions, a line for each fate that some have."""
        declared = 0 if self.schema.topology is None else len(self.schema.topology.connections)
        lines = [
            f"CompiledProgram: {len(self.active_regions)} of {len(self.all_regions)} regions and "
            f"{len(self.active_connections)} of {declared} connections active"
        ]
        for title, names in (
            ("frozen", self.frozen_regions),
            ("constant", self.constant_regions),
            ("exported", self.exported_memories),
            ("to be distilled", self.distill_regions),
        ):
            if names:
                lines.append(f"  {title}: {', '.join(sorted(names))}")
        return "\n".join(lines)


class ProgramCompiler:
    """Takes a program to deploy.

    Raises:
        ValueError: a program that cannot be run, such as one with an unknown compile mode.

    >>> from canvas_engineering import CanvasTopology, RegionProgram
    >>> layout = CanvasLayout(T=1, spatial_shape=(2,), d_model=8, regions={"eye": (0, 1, 0, 1), "map": (0, 1, 1, 2)})
    >>> schema = CanvasSchema(layout, CanvasTopology.dense(["eye", "map"]))
    >>> compiled = ProgramCompiler(CanvasProgram(schema, {"map": RegionProgram(compile_mode="constant")})).compile()
    >>> print(compiled.summary())
    CompiledProgram: 1 of 2 regions and 1 of 4 connections active
      constant: map
    """

    def __init__(self, program: CanvasProgram):
        check_program(program)
        self.program = program

    def compile(
        self, module: nn.Module | None = None, export_dir: str | Path | None = None, family_defaults: bool = False
    ) -> CompiledProgram:
        """Decides what becomes of every region, and does it to the module's parameters.

        A region's mode is its own unless "runtime", then its learning's, then, with ``family_defaults``, its family's.
        "freeze" stops gradients; "constant" puts a buffer of the same name and value in each parameter's place (an
        optimizer made before still holds the parameter); "export" writes the region's parameters and buffers, then
        freezes the parameters; "runtime" and "distill" change nothing.

        Constant and exported regions leave the canvas's steps: their positions pass through, and surviving regions that
        read them lose those edges. Their steps are the whole program's on the surviving regions only where none did.

        Args:
            module: a parameter of it belongs to a region if the region's name, with ``.`` as ``__`` and brackets as
                ``_``, is one component of the parameter's dotted name, or if ``module.region_parameters(region)`` lists
                it, as a Parameter or by its dotted name. None decides only.
            export_dir: where exports go; it is made.
            family_defaults: whether regions without a mode of their own take their family's.

        Raises:
            ValueError: a region to export and no ``export_dir``, or a parameter that belongs to regions of different
                modes; the module is then as it was.
            ImportError: an export without safetensors.
        """
        checked_kind(module, "module", nn.Module, optional=True)
        export_dir = None if export_dir is None else checked_path(export_dir, "export_dir")
        modes = self._modes(checked_bool(family_defaults, "family_defaults"))
        compiled = self._decide(modes)
        if module is None:
            return compiled
        owned = {region: dict(_parameters_of(module, region)) for region in modes}
        _check_owners(owned, modes)
        exported = [region for region, mode in modes.items() if mode == "export"]
        if exported:
            if export_dir is None:
                raise ValueError(f"regions {sorted(exported)} are to be exported: export_dir must say where to")
            for region in exported:
                tensors = _state_of(module, region, owned[region])
                compiled.exported_paths[region] = _export(export_dir, region, tensors, self.program.version)
        for region, mode in modes.items():
            if mode in ("freeze", "export"):
                for parameter in owned[region].values():
                    parameter.requires_grad_(False)
            elif mode == "constant":
                compiled.constant_buffers.update(_to_buffers(module, owned[region]))
        return compiled

    def _modes(self, family_defaults: bool) -> dict[str, str]:
        programs = {name: self.program.regions.get(name) for name in self.program.schema.layout.regions}
        return {
            name: "runtime" if region is None else region.effective_compile_mode(family_defaults)
            for name, region in programs.items()
        }

    def _decide(self, modes: dict[str, str]) -> CompiledProgram:
        program, schema = self.program, self.program.schema
        active = {region for region, mode in modes.items() if mode not in _GONE}
        topology = CanvasTopology() if schema.topology is None else schema.topology
        kept = [c for c in topology.connections if c.src in active and c.dst in active]
        resolved, _ = resolve_edges(topology, schema.layout, program)
        gates = tuple(c.src in active and c.dst in active for c in resolved.connections if c.write_mode == "gate")
        return CompiledProgram(
            schema,
            active,
            *({region for region, mode in modes.items() if mode == fate} for fate in ("freeze", *_GONE)),
            kept,
            set(modes),
            {region for region, mode in modes.items() if mode == "distill"},
            program=_restricted(program, active, kept),
            gates=gates,
        )


def load_exported(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of an exported region, by name.

    Args:
        path: of `CompiledProgram.exported_paths`, or of the manifest, ``<region>.json``, beside it. Either way the
            manifest says which file holds the region now.

    Raises:
        OSError: the manifest, or the file that it names, cannot be read.
        ValueError: the manifest is none, or the file is not the one that it describes.
        ImportError: safetensors is not installed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = checked_path(path, "path")
    manifest_path = path if path.suffix == ".json" else path.with_name(f"{path.name.rpartition('@')[0]}.json")
    while True:
        manifest = _read_manifest(manifest_path)
        path = path.with_name(manifest["file"])
        try:
            content = path.read_bytes()
            break
        except FileNotFoundError:
            if _read_manifest(manifest_path) == manifest:
                raise
            # else another export took its place between the two, and what it names is there
    found = hashlib.sha256(content).hexdigest()
    if found != manifest["sha256"]:
        raise ValueError(f"{path} has the checksum {found}, its manifest says {manifest['sha256']}")
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise ValueError(f"{path} holds no tensors: {error}") from error
    if _forms(tensors) != manifest["tensors"]:
        raise ValueError(f"{path} holds {_forms(tensors)}, its manifest says {manifest['tensors']}")
    return tensors


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = parsed_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no manifest of an exported region: {error}") from error
    kinds = {"region": str, "file": str, "sha256": str, "tensors": dict}
    entries = manifest if isinstance(manifest, dict) else {}
    wrong = [name for name, kind in kinds.items() if not isinstance(entries.get(name), kind)]
    if wrong or Path(manifest["file"]).name != manifest["file"]:
        raise ValueError(f"{path} is no manifest of an exported region: wrong are {wrong or ['file']}")
    return manifest


def _forms(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    return {
        name: {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        for name, tensor in tensors.items()
    }


def _export(folder: Path, region: str, tensors: dict[str, torch.Tensor], version: str) -> str:
    """Writes the tensors, then the manifest that names their file, and removes what no manifest names any more: a
    crash at any point leaves a manifest whose file is whole, and so do several processes that export at once."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    # names may hold what a file name may not, and so never an @
    stem = quote(region, safe="[]")
    content = save(tensors)
    checksum = hashlib.sha256(content).hexdigest()
    path = folder / f"{stem}@{checksum[:16]}.safetensors"
    manifest = {
        "region": region,
        "program_version": version,
        "file": path.name,
        "sha256": checksum,
        "tensors": _forms(tensors),
    }
    with alone_in(folder) as alone:
        replace_file(path, content)
        replace_file(folder / f"{stem}.json", f"{json.dumps(manifest, indent=2)}\n".encode())
        for other in folder.iterdir() if alone else ():
            if other.name.startswith(f"{stem}@") and other.suffix == ".safetensors" and other != path:
                other.unlink()
    return str(path)


def _restricted(program: CanvasProgram, active: set[str], connections: list[Connection]) -> CanvasProgram:
    """The program with its active regions and connections; the canvas and its positions stay."""
    schema, layout = program.schema, program.schema.layout
    regions = {name: spec for name, spec in layout.regions.items() if name in active}
    pairs = {(c.src, c.dst) for c in connections}
    return CanvasProgram(
        dataclasses.replace(
            schema,
            layout=CanvasLayout(layout.T, layout.d_model, layout.spatial_shape, regions, layout.t_current),
            topology=None if schema.topology is None else CanvasTopology(connections),
        ),
        {name: region for name, region in program.regions.items() if name in active},
        {pair: connection for pair, connection in program.connections.items() if pair in pairs},
        program.version,
    )


# -- parameters of regions


def _parameters_of(module: nn.Module, region: str) -> Iterator[tuple[str, nn.Parameter]]:
    listed = module.region_parameters(region) if hasattr(module, "region_parameters") else ()
    listed = list(listed or ())
    names, tensors = {item for item in listed if isinstance(item, str)}, {id(item) for item in listed}
    key = parameter_key(region)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if key in name.split(".") or name in names or id(parameter) in tensors:
            names.discard(name)
            yield name, parameter
    if names:
        raise ValueError(f"region_parameters({region!r}) lists {sorted(names)}, which the module does not have")


def _check_owners(owned: dict[str, dict[str, nn.Parameter]], modes: dict[str, str]) -> None:
    owner: dict[int, str] = {}
    for region, parameters in owned.items():
        for name, parameter in parameters.items():
            other = owner.setdefault(id(parameter), region)
            if modes[other] != modes[region]:
                raise ValueError(
                    f"parameter {name!r} belongs to region {other!r}, which is to {modes[other]}, and to region "
                    f"{region!r}, which is to {modes[region]}"
                )


def _state_of(module: nn.Module, region: str, owned: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a region by dotted name, as tensors of their own on the host."""
    key = parameter_key(region)
    state = {name: value for name, value in module.state_dict().items() if name in owned or key in name.split(".")}
    return {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}


def _to_buffers(module: nn.Module, owned: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Puts buffers in the place of parameters, wherever the module holds them: what is shared stays shared."""
    constants = {id(parameter): parameter.detach().clone() for parameter in owned.values()}
    places = [
        (f"{path}.{name}" if path else name, owner, name, constants[id(parameter)])
        for path, owner in module.named_modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None and id(parameter) in constants
    ]
    for _, owner, name, constant in places:
        del owner._parameters[name]
        owner.register_buffer(name, constant)
    return {path: constant for path, _, _, constant in places}
