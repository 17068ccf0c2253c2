"""A declaration compiled for a model's token sequence: its streams one after the other, the video frame by frame."""

from __future__ import annotations

import numpy as np
import torch

from ..canvas import CanvasLayout, RegionSpec
from ..connectivity import CanvasTopology, Connection
from ..masks import MaskSpec, rect_cover
from ..plan import AttentionPlan, compile_attention
from .adapter import TEXT, VIDEO

_SOFTMAX = ("cross_attention", "self_attention", "cogvideox", "none")


def token_plan(
    layout: CanvasLayout, topology: CanvasTopology, streams: tuple[str, ...] = (TEXT, VIDEO)
) -> AttentionPlan:
    """Returns the joint-form plan (docs/semantics.md, section 3) over tokens: those of the regions ``streams``, in
    their order.

    Tokens without keys attend to themselves.

    Raises:
        ValueError: no such regions, regions of connections that hold other positions, or what joint form cannot do:
            attention functions other than softmax, write modes other than "add".
    """
    needed = " and ".join(repr(name) for name in sorted(streams))
    for name in streams:
        if name not in layout.regions:
            raise ValueError(f"a layout of tokens has the regions {needed}; this one has {[*layout.regions]}")
    positions = np.concatenate([layout.region_positions(name) for name in streams])
    token = np.full(layout.num_positions, -1, np.int64)
    token[positions] = np.arange(len(positions))
    if (token >= 0).sum() != len(positions):
        raise ValueError(f"the regions {needed} overlap: a token lies in one of them")
    for name in topology.regions:
        if name in layout.regions and (token[layout.region_positions(name)] < 0).any():
            bounds = layout.region_spec(name).bounds
            raise ValueError(
                f"region {name!r} at {bounds} holds positions that are neither {' nor '.join(sorted(streams))}"
            )
    for number, (c, fn) in enumerate(zip(topology.connections, topology.resolve_fns(layout))):
        if fn not in _SOFTMAX or c.write_mode != "add":
            raise ValueError(
                f"connection {number}, {c.src!r} attends to {c.dst!r}, has fn {fn!r} and write mode "
                f"{c.write_mode!r}: a token has one softmax over all of its keys, so only softmax attention with write "
                "mode 'add' is possible"
            )
    # The streams in order, then by name: the packed order keeps the text in front where it is, and a declaration that
    # went through JSON, which sorts names, gives the same one.
    names = [*streams, *sorted(layout.regions.keys() - set(streams))]
    layout = _with_regions(layout, {name: layout.regions[name] for name in names})
    plan = compile_attention(layout, topology, normalize="joint")
    alone = np.zeros(layout.num_positions, bool)
    alone[positions] = ~plan.rows_with_keys()[positions]
    if alone.any():
        plan = compile_attention(*_with_self_connections(layout, topology, alone), normalize="joint")
    plan = plan.reindex(positions)
    _ = plan.in_canvas_order  # computed eagerly: torch.compile cannot trace the numpy code
    return plan


def _with_self_connections(
    layout: CanvasLayout, topology: CanvasTopology, alone: np.ndarray
) -> tuple[CanvasLayout, CanvasTopology]:
    """Returns the declaration with a connection of every marked position to itself."""
    boxes = rect_cover(torch.from_numpy(alone.reshape(layout.T, *layout.spatial_shape)), min_area=1)
    point = MaskSpec("tile", tile_shape=(1,) * layout.n_spatial_dims)
    regions, connections = dict(layout.regions), list(topology.connections)
    for number, box in enumerate(boxes):
        name = f"alone {number}"
        while name in regions:
            name += "'"
        regions[name] = RegionSpec(tuple(bound for pair in box.ranges for bound in pair))
        connections.append(Connection(name, name, t_src=0, t_dst=0, mask=point))
    return _with_regions(layout, regions), CanvasTopology(connections)


def _with_regions(layout: CanvasLayout, regions: dict[str, tuple[int, ...] | RegionSpec]) -> CanvasLayout:
    return CanvasLayout(layout.T, layout.d_model, layout.spatial_shape, regions, layout.t_current)
