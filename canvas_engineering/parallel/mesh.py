"""Ranks of a device mesh: its dimensions by name, and whether all of them declare the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from ..checked import shown
from ..version import __version__

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from ..plan.plan import AttentionPlan

COMPARED = ("declaration", "cut", "version")


def mesh_dimensions(mesh: DeviceMesh, sizes: Mapping[str, int]) -> dict[str, DeviceMesh]:
    """Returns the one-dimensional meshes of this rank along the named dimensions that it has.

    A mesh of one dimension need not name it where only one of ``sizes`` is above 1.

    Raises:
        ValueError: no mesh, one that lacks a dimension, or has another number of ranks along it.
    """
    names = getattr(mesh, "mesh_dim_names", None)
    wanted = {name: size for name, size in sizes.items() if size > 1 or (names and name in names)}
    wanted = wanted or {next(iter(sizes)): 1}
    shape = getattr(mesh, "shape", None)
    if shape is None or (not (names and set(wanted) <= set(names)) and not (len(wanted) == len(shape) == 1)):
        raise ValueError(
            f"the plan needs a device mesh with dimensions {wanted}: init_device_mesh(…, mesh_dim_names="
            f"{tuple(wanted)}); got {shown(mesh)}"
        )
    along = {name: mesh[name] if names and name in names else mesh for name in wanted}
    for name, size in wanted.items():
        if along[name].size() != size:
            raise ValueError(f"the plan is cut for {size} ranks along {name!r}, the mesh has {along[name].size()}")
    return along


def digest_of(content: AttentionPlan | Sequence[np.ndarray]) -> bytes:
    """Returns a digest of a plan, or of arrays, that is equal in every process."""
    digest = hashlib.sha256()
    if isinstance(content, Sequence):
        arrays = [np.ascontiguousarray(array) for array in content]
    else:
        digest.update(f"{content.normalize}/{content.n_positions}/{content.table.key}/{content.fns}".encode())
        arrays = [content.order]
    for array in arrays:
        digest.update(f"/{len(array)}/".encode())
        digest.update(array.tobytes())
    return digest.digest()


def check_alike(mesh: DeviceMesh, *digests: bytes) -> None:
    """Compares digests over all ranks of a mesh, which all call it.

    Raises:
        ValueError: on every rank, where two ranks differ, naming both and in what.
    """
    versions = hashlib.sha256(f"{__version__}/{torch.__version__}".encode()).digest()
    own = np.frombuffer(b"".join((*digests, versions)), np.uint8)
    table = torch.from_numpy(own.copy()).to(mesh.device_type)[None]
    ranks = torch.tensor([dist.get_rank()], device=mesh.device_type)
    # one dimension after the other: in the end every rank has the digests of all, and all raise together
    for dimension in range(mesh.ndim):
        table, ranks = (_gather(x, mesh.get_group(dimension)) for x in (table, ranks))
    first, width = table[0], len(versions)
    for rank, digest in zip(ranks.tolist(), table):
        if not torch.equal(digest, first):
            index = int((digest != first).nonzero()[0]) // width
            raise ValueError(
                f"ranks {ranks[0]} and {rank} differ in their {COMPARED[index - len(digests) - 1 + len(COMPARED)]}: "
                "every rank has to compile the same declaration, cut it alike and run the same versions"
            )


def _gather(x: torch.Tensor, group) -> torch.Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)
