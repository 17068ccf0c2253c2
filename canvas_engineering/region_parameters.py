"""Which parameters and buffers of a module belong to which region of a canvas."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from canvas_engineering.canvas.tensor import parameter_key

_PACKAGE = __name__.partition(".")[0]
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass
class RegionParameters:
    """The parts of a module that belong to one region and to no other.

    Attributes:
        parameters: by dotted name; a parameter that the module holds twice may be there twice.
        buffers: dotted names of buffers that a state dict holds.
        submodules: paths of the modules that hold all of these.
    """

    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    buffers: list[str] = field(default_factory=list)
    submodules: list[str] = field(default_factory=list)


def parameters_by_region(
    module: nn.Module, regions: Iterable[str]
) -> tuple[dict[str, RegionParameters], dict[str, tuple[str, ...]]]:
    """Sorts a module's tensors by region.

    A tensor belongs to a region if consecutive components of its dotted name spell the region's name, as
    ``arm.joints``, ``arm__joints`` or ``vehicles.3.plan``, or if ``region_parameters(region)`` of a module above it
    lists it. For a region inside another, such as ``arm.joints`` in ``arm``, the inner one owns it.

    Args:
        module: any module.
        regions: names of the regions to sort by.

    Returns:
        The parts of each region; and, by name, the regions of each tensor that several regions share.

    Raises:
        ValueError: ``region_parameters`` lists what its module does not have.
    """
    modules = dict(module.named_modules(remove_duplicate=False))
    names = tuple(regions)
    spelled = _Spellings(names)
    listed = _listed(modules, names)
    parameters, saved = dict(module.named_parameters(remove_duplicate=False)), module.state_dict(keep_vars=True)
    owners: dict[str, dict[str, str]] = {}  # name of a tensor: region to the submodule in which it has the tensor
    for name, tensor in (*parameters.items(), *module.named_buffers(remove_duplicate=False)):
        owners_of = spelled.owners(name, modules)
        for key in (id(tensor), name, *_above(name)):
            owners_of.update(listed.get(key, {}))
        owners[name] = owners_of
    # a tensor under several names belongs to the regions of all of them
    of_tensor: dict[int, dict[str, None]] = {}
    for name, tensor in parameters.items():
        of_tensor.setdefault(id(tensor), {}).update(dict.fromkeys(owners[name]))
    own, shared = {region: RegionParameters() for region in names}, {}
    for name, owners_of in owners.items():
        sharing = of_tensor[id(parameters[name])] if name in parameters else owners_of
        if len(sharing) > 1:
            shared[name] = tuple(sorted(sharing))
            continue
        for region in filter(own.__contains__, sharing):
            submodule = owners_of.get(region, name.rpartition(".")[0])
            if submodule not in own[region].submodules:
                own[region].submodules.append(submodule)
            if name in parameters:
                own[region].parameters[name] = parameters[name]
            elif name in saved:
                own[region].buffers.append(name)
    return own, shared


def _above(name: str) -> Iterator[str]:
    """Paths of the modules that hold a tensor, from the innermost out."""
    while name := name.rpartition(".")[0]:
        yield name


class _Spellings:
    """Region names as dotted names of modules spell them."""

    def __init__(self, regions: Iterable[str]) -> None:
        self.by_key: dict[str, list[str]] = {}
        self.by_parts: dict[tuple[str, ...], list[str]] = {}
        for region in regions:
            self.by_key.setdefault(parameter_key(region), []).append(region)
            self.by_parts.setdefault(_parts(region), []).append(region)

    def owners(self, name: str, modules: Mapping[str, nn.Module]) -> dict[str, str]:
        """Regions that the name of a tensor spells, each with the path of the module that spells it."""
        components = name.split(".")
        counts = _may_spell(components, modules)
        spans: dict[str, tuple[int, int]] = {}
        for start, stop in itertools.combinations(range(len(components) + 1), 2):
            if all(counts[start:stop]):
                run = components[start:stop]
                by_key = self.by_key.get("__".join(run), ())
                for region in (*by_key, *self.by_parts.get(_parts(".".join(run)), ())):
                    spans.setdefault(region, (start, stop))
        # a dict of parameters holds single ones: its path is what a state dict goes into
        return {
            region: ".".join(components[: min(stop, len(components) - 1)])
            for region, (start, stop) in spans.items()
            if not any(_inside(other, region, spans) for other in spans)
        }


def _parts(name: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[^.\[\]]+", name))


def _inside(inner: str, outer: str, spans: Mapping[str, tuple[int, int]]) -> bool:
    """Whether the tensor is the inner region's rather than the outer one's."""
    (start, stop), (low, high) = spans[inner], spans[outer]
    return inner.startswith((f"{outer}.", f"{outer}[")) or (start <= low and high <= stop and stop - start > high - low)


def _may_spell(components: list[str], modules: Mapping[str, nn.Module]) -> list[bool]:
    """Returns for each component of a tensor's name whether it may name a region: only names that a user chose may.

    Names inside our own modules or torch's (``weight``, ``layers``) may not; names of a user's module inside ours may,
    except in modules that all regions share, such as a dispatcher, where ``region_parameters`` decides.
    """
    holders = [modules[".".join(components[:number])] for number in range(len(components))]
    if any(map(_is_shared, holders)):
        return [False] * len(components)
    ours, flags = False, []
    for holder in holders:
        package = type(holder).__module__.partition(".")[0]
        if package != "torch":  # containers go by who holds them
            ours = package == _PACKAGE
        flags.append(not ours and (package != "torch" or isinstance(holder, _CONTAINERS)))
    return flags


def _is_shared(module: nn.Module) -> bool:
    """Whether it is one of our modules that know what of them is a region's, or derived from one."""
    return any(
        "region_parameters" in vars(cls) and cls.__module__.startswith(f"{_PACKAGE}.") for cls in type(module).__mro__
    )


def _listed(modules: Mapping[str, nn.Module], regions: Iterable[str]) -> dict[int | str, dict[str, str]]:
    """Collects ``region_parameters`` of modules: id of a parameter, or name of one or of a submodule, to regions, each
    with the path of its module, for the given regions and for all that the modules know."""
    owners_of: dict[int | str, dict[str, str]] = {}
    for path, module in modules.items():
        # of the class: wrappers, such as compiled modules, forward attributes
        if not hasattr(type(module), "region_parameters"):
            continue
        holder: Any = module
        prefix = f"{path}." if path else ""
        # an earlier compilation may have made parameters constant buffers
        held = (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
        names = {name for tensors in held for name, _ in tensors}
        others = (getattr(module, "region_names", ()), getattr(getattr(module, "layout", None), "regions", ()))
        for region in dict.fromkeys([*regions, *others[0], *others[1]]):
            listed = list(holder.region_parameters(region) or ())
            unknown = [name for name in listed if isinstance(name, str) and f"{prefix}{name}" not in modules]
            unknown = [name for name in unknown if name not in names]
            if unknown:
                raise ValueError(
                    f"region_parameters({region!r}) lists {sorted(unknown)}, which the module does not have"
                )
            for item in listed:
                if isinstance(item, torch.Tensor):
                    owners_of.setdefault(id(item), {})[region] = path
                else:
                    whole = f"{prefix}{item}"
                    owners_of.setdefault(whole, {})[region] = whole if whole in modules else whole.rpartition(".")[0]
    return owners_of
