"""ProgramCompiler: what deploy makes of a program: what freezes, becomes constant, is exported, or is dropped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import nn

from canvas_engineering.canvas.layout import CanvasLayout
from canvas_engineering.checked import checked_bool, checked_kind, checked_path, parsed_json
from canvas_engineering.connectivity import CanvasTopology, Connection
from canvas_engineering.files import alone_in, replace_file
from canvas_engineering.notices import join_truncated, warn
from canvas_engineering.program import CanvasProgram, RegionProgram
from canvas_engineering.program.checks import check_program
from canvas_engineering.program.connections import apply_program
from canvas_engineering.region_parameters import RegionParameters, parameters_by_region
from canvas_engineering.schema import CanvasSchema

__all__ = ["CompiledProgram", "ProgramCompiler", "load_exported"]

_GONE = ("constant", "export")
_ACTING = ("freeze", *_GONE)


@dataclass
class CompiledProgram:
    """A program after deploy.

    Attributes:
        schema: what is left of the program's: without constant and exported regions (constant ones stay in it with
            ``keep_constant``), and with ``active_connections`` only. The grid and all positions stay.
        active_regions: the regions of ``schema``.
        frozen_regions, constant_regions, exported_memories, distill_regions: regions by their compile mode; those to be
            distilled run on, as nothing distils them yet.
        active_connections: the connections that still run, in declaration order.
        all_regions: every region of the program's layout.
        constant_buffers: name to the buffer that replaces the parameter.
        exported_paths: region to its file of tensors, for `load_exported`. Its name carries its checksum: exporting
            the region again makes another file and removes this one.
        program: the program on ``schema``: what a dispatcher is to be built of. The whole model's dispatchers and
            canvases go into it through ``canvas_engineering.dispatch.surviving_state``; schedulers and accumulators of
            fewer regions start anew.
        gates: of all connections of the whole program that write by "gate", in declaration order, whether they survive.
        dropped_connections: the connections that no longer run. Their src regions lose these keys.
        untouched_regions: regions to freeze, to make constant or to export to which nothing of the module belongs
            alone.
        shared_tensors: name of each tensor of the module that such a region shares with others, to all of these,
            sorted; it is left as it is.

    >>> layout = CanvasLayout(T=1, spatial_shape=(2,), d_model=8, regions={"eye": (0, 1, 0, 1), "map": (0, 1, 1, 2)})
    >>> program = CanvasProgram(CanvasSchema(layout), {"map": RegionProgram(compile_mode="constant")})
    >>> compiled = ProgramCompiler(program).compile()
    >>> compiled.active_regions, compiled.n_eliminated
    ({'eye'}, 1)
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
    dropped_connections: list[Connection] = field(default_factory=list)
    untouched_regions: set[str] = field(default_factory=set)
    shared_tensors: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def n_eliminated(self) -> int:
        """Number of regions that are no longer part of the schema."""
        return len(self.all_regions - self.active_regions)

    def summary(self) -> str:
        """Returns the regions by what happens to them, one line each."""
        n_running, n_dropped = len(self.active_connections), len(self.dropped_connections)
        lines = [
            f"CompiledProgram: {len(self.active_regions)} of {len(self.all_regions)} regions and "
            f"{n_running} of {n_running + n_dropped} connections active"
        ]
        readable = self.constant_regions & {connection.dst for connection in self.active_connections}
        modes = {
            **dict.fromkeys(self.frozen_regions, "freeze"),
            **dict.fromkeys(self.constant_regions, "constant"),
            **dict.fromkeys(self.exported_memories, "export"),
        }
        losing = {c.src for c in self.dropped_connections if c.dst in self.all_regions - self.active_regions}
        for title, names in (
            ("frozen", self.frozen_regions - self.untouched_regions),
            ("constant", self.constant_regions - readable),
            ("constant, and still keys", readable),
            ("exported", self.exported_memories),
            ("to be distilled, which does nothing yet: they run as before", self.distill_regions),
            ("fewer keys, as regions left", losing & self.active_regions - self.constant_regions),
            ("nothing in the module belongs to them alone", [f"{r} ({modes[r]})" for r in self.untouched_regions]),
            ("shared with other regions, and left as they are", self._shared()),
        ):
            if names:
                lines.append(f"  {title}: {', '.join(sorted(names))}")
        return "\n".join(lines)

    def _shared(self) -> list[str]:
        return [f"{name} ({', '.join(regions)})" for name, regions in self.shared_tensors.items()]


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
      fewer keys, as regions left: eye
    """

    def __init__(self, program: CanvasProgram):
        check_program(program)
        self.program = program

    def compile(
        self,
        module: nn.Module | None = None,
        export_dir: str | Path | None = None,
        family_defaults: bool = False,
        keep_constant: bool = False,
    ) -> CompiledProgram:
        """Decides what becomes of every region, and does it to the module's tensors.

        A region's mode is its own unless "runtime", then its learning's, then, with ``family_defaults``, its family's.
        "freeze" stops gradients; "constant" replaces each parameter by a buffer of the same name and value (an
        optimizer made before still holds the parameter); "export" writes the region's parameters and buffers, then
        freezes the parameters; "runtime" changes nothing, and neither does "distill" yet.

        What belongs to a region: its slot bank; its modality embedding; modules and parameters of its name, with ``.``
        as ``__`` and brackets as ``_`` (``heads.arm__joints``) or nested as types are (``arm.joints``, which is then
        not part of ``arm``); and what ``region_parameters(region)`` of a module in ``module`` lists, as Parameters, or
        by dotted name. Gates of connections that a region queries, and rows of embedding tables, belong to it too. A
        tensor that several regions share, as gates and tables are, is left as it is and stays trainable, whatever
        their modes, with a warning that names it. Attention functions belong to no region. A region to which nothing
        belongs alone gets a warning.

        Constant and exported regions leave the schema: their positions pass through, and regions that attend to them
        lose these connections. Their steps are the whole program's on the surviving regions only where none did.

        Args:
            module: whose tensors are treated; None decides only.
            export_dir: where exports go; it is made. Without it, regions that only their family's default would export
                are kept as they are, with a warning.
            family_defaults: whether regions without a mode and a learning of their own take their family's.
            keep_constant: whether constant regions stay in the schema, as keys of others: their positions pass
                through, and their slot banks and embeddings keep the values of the buffers. They query nothing.

        Raises:
            ValueError: a region to export and no ``export_dir``; the module is then as it was.
            ImportError: an export without safetensors.
        """
        checked_kind(module, "module", nn.Module, optional=True)
        export_dir = None if export_dir is None else checked_path(export_dir, "export_dir")
        family_defaults = checked_bool(family_defaults, "family_defaults")
        keep_constant = checked_bool(keep_constant, "keep_constant")
        modes = self._modes(family_defaults, keep_exported=export_dir is None)
        compiled = self._decide(modes, keep_constant)
        if compiled.distill_regions:
            warn(f"compile_mode 'distill' does nothing yet: {_names(compiled.distill_regions)} run as before")
        if module is not None:
            self._treat(module, modes, export_dir, compiled)
        return compiled

    def _modes(self, family_defaults: bool, keep_exported: bool) -> dict[str, str]:
        """Returns a dict from region to its compile mode."""
        modes, names = dict.fromkeys(self.program.schema.layout.regions, "runtime"), []
        for name, region in self.program.regions.items():
            if name in modes:
                modes[name] = region.effective_compile_mode(family_defaults)
                if keep_exported and modes[name] == "export" and region.effective_compile_mode() != "export":
                    names.append(name)
        if names:
            warn(f"{_names(names)} would be exported, by the default of their family: without export_dir they are kept")
        return {**modes, **dict.fromkeys(names, "runtime")}

    def _decide(self, modes: dict[str, str], keep_constant: bool) -> CompiledProgram:
        program, schema = self.program, self.program.schema
        running = {region for region, mode in modes.items() if mode not in _GONE}
        by_mode = {mode: {region for region in modes if modes[region] == mode} for mode in set(modes.values())}
        left = running | (by_mode.get("constant", set()) if keep_constant else set())
        topology = CanvasTopology() if schema.topology is None else schema.topology
        runs = [c.src in running and c.dst in left for c in topology.connections]
        connections = [c for c, on in zip(topology.connections, runs) if on]
        resolved, _ = apply_program(topology, schema.layout, program)
        restricted = _restricted(program, left, connections)
        frozen, constant, exported = (by_mode.get(mode, set()) for mode in _ACTING)
        return CompiledProgram(
            restricted.schema,
            left,
            frozen,
            constant,
            exported,
            connections,
            set(modes),
            by_mode.get("distill", set()),
            program=restricted,
            gates=tuple(on for c, on in zip(resolved.connections, runs) if c.write_mode == "gate"),
            dropped_connections=[c for c, on in zip(topology.connections, runs) if not on],
        )

    def _treat(
        self, module: nn.Module, modes: dict[str, str], export_dir: Path | None, compiled: CompiledProgram
    ) -> None:
        """Does to the module's tensors what the modes say, and notes in ``compiled`` what it did."""
        owned, shared = parameters_by_region(module, modes)
        acting = [region for region, mode in modes.items() if mode in _ACTING]
        compiled.untouched_regions = {
            region
            for region in acting
            if not owned[region].parameters and not (modes[region] in _GONE and owned[region].buffers)
        }
        compiled.shared_tensors = {name: by for name, by in shared.items() if not set(by).isdisjoint(acting)}
        exported = [region for region in acting if modes[region] == "export"]
        if exported and export_dir is None:
            raise ValueError(f"regions {sorted(exported)} are to be exported: export_dir must say where to")
        if compiled.untouched_regions:
            untouched = (f"{region!r} ({modes[region]})" for region in sorted(compiled.untouched_regions))
            warn(
                f"nothing in the module belongs to these regions alone, and their compile modes change none of its "
                f"tensors: {join_truncated(untouched)}. Attention functions are shared by all regions; a submodule "
                "belongs to a region under its name, as in self.camera, and by region_parameters(region) of its owner"
            )
        if compiled.shared_tensors:
            warn(f"tensors that several regions share are left as they are: {join_truncated(compiled._shared())}")
        for region in exported:
            assert export_dir is not None
            tensors, submodules = _state_of(module, owned[region]), owned[region].submodules
            compiled.exported_paths[region] = _export(export_dir, region, tensors, submodules, self.program.version)
        for region in acting:
            if modes[region] == "constant":
                compiled.constant_buffers.update(_to_buffers(module, owned[region].parameters))
                continue
            for parameter in owned[region].parameters.values():
                parameter.requires_grad_(False)


def load_exported(path: str | Path, submodule: str | None = None) -> dict[str, torch.Tensor]:
    """Returns the tensors of an exported region, as a state dict.

    Where all of them came from one submodule, such as ``heads.memory``, names are those of its state dict: it is what
    they load into, with ``strict=False`` where it holds other regions' tensors too. Where they came from several,
    names are dotted ones of the whole module, which loads them with ``strict=False``, unless ``submodule`` chooses.

    Args:
        path: of `CompiledProgram.exported_paths`, or of the manifest, ``<region>.json``, beside it. Either way the
            manifest says which file holds the region now.
        submodule: dotted name of one of the submodules that the tensors came from, for its tensors alone; "" for all of
            them under the whole module's names.

    Raises:
        OSError: the manifest, or the file that it names, cannot be read.
        KeyError: no tensors came from the submodule.
        ValueError: the manifest is none, or the file is not the one that it describes.
        ImportError: safetensors is not installed.

    >>> import tempfile
    >>> layout = CanvasLayout(T=1, spatial_shape=(2,), d_model=8, regions={"map": (0, 1, 0, 2)})
    >>> program = CanvasProgram(CanvasSchema(layout), {"map": RegionProgram(compile_mode="export")})
    >>> model = nn.ModuleDict({"map": nn.Linear(3, 8)})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     paths = ProgramCompiler(program).compile(model, folder).exported_paths
    ...     sorted(load_exported(paths["map"]))
    ['bias', 'weight']
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
            # else another export replaced it in between, and the file that it names exists
    digest = hashlib.sha256(content).hexdigest()
    if digest != manifest["sha256"]:
        raise ValueError(f"{path} has the checksum {digest}, its manifest says {manifest['sha256']}")
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise ValueError(f"{path} holds no tensors: {error}") from error
    if _forms(tensors) != manifest["tensors"]:
        raise ValueError(f"{path} holds {_forms(tensors)}, its manifest says {manifest['tensors']}")
    return _state_dict_of(tensors, manifest, submodule)


def _state_dict_of(
    tensors: dict[str, torch.Tensor], manifest: dict[str, Any], submodule: str | None
) -> dict[str, torch.Tensor]:
    """Returns the tensors of a submodule by their names in it."""
    submodules = manifest.get("submodules", [])
    if submodule is None:
        submodule = submodules[0] if len(submodules) == 1 else ""
    if submodule and submodule not in submodules:
        raise KeyError(
            f"no tensors of region {manifest['region']!r} came from {submodule!r}; they came from {submodules}"
        )
    prefix = f"{submodule}." if submodule else ""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = parsed_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no manifest of an exported region: {error}") from error
    kinds = {"region": str, "file": str, "sha256": str, "tensors": dict}
    entries = manifest if isinstance(manifest, dict) else {}
    wrong = [name for name, kind in kinds.items() if not isinstance(entries.get(name), kind)]
    # earlier exports do not say; their tensors have the whole module's names
    if not isinstance(entries.get("submodules", []), list):
        wrong.append("submodules")
    if wrong or Path(manifest["file"]).name != manifest["file"]:
        raise ValueError(f"{path} is no manifest of an exported region: wrong are {wrong or ['file']}")
    return manifest


def _forms(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    return {
        name: {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        for name, tensor in tensors.items()
    }


def _export(folder: Path, region: str, tensors: dict[str, torch.Tensor], submodules: list[str], version: str) -> str:
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
        "submodules": submodules,
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
    """Returns the program with its active regions and connections; the canvas and its positions stay."""
    schema, layout = program.schema, program.schema.layout
    regions = {name: spec for name, spec in layout.regions.items() if name in active}
    pairs = {(c.src, c.dst) for c in connections}
    # names that the layout does not have keep their clocks
    programs = {name: own for name, own in program.regions.items() if name in active or name not in layout.regions}
    if program.regions and not programs.keys() & regions.keys():
        # without any, none would fire; those that were not named fire at every step
        programs |= {name: RegionProgram() for name in regions}
    return CanvasProgram(
        dataclasses.replace(
            schema,
            layout=CanvasLayout(layout.T, layout.d_model, layout.spatial_shape, regions, layout.t_current),
            topology=None if schema.topology is None else CanvasTopology(connections),
        ),
        programs,
        {pair: connection for pair, connection in program.connections.items() if pair in pairs},
        program.version,
    )


def _state_of(module: nn.Module, owned: RegionParameters) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a region by dotted name, as tensors of their own on the host."""
    wanted = {*owned.parameters, *owned.buffers}
    state = {name: value for name, value in module.state_dict().items() if name in wanted}
    return {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}


def _names(regions: Iterable[str]) -> str:
    return join_truncated(map(repr, sorted(regions)))


def _to_buffers(module: nn.Module, owned: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Replaces parameters by buffers wherever the module holds them; shared tensors stay shared."""
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
