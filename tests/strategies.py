"""Random canvases for hypothesis: small, odd-shaped, overlapping, at several rates, with every kind of connection."""

from __future__ import annotations

import dataclasses
import math

from hypothesis import strategies as st

from canvas_engineering import (
    CanvasLayout,
    CanvasProgram,
    CanvasSchema,
    CanvasTopology,
    Connection,
    ConnectionProgram,
    CortexRegistry,
    CortexSpec,
    IdentitySpec,
    MaskSpec,
    RegionProgram,
    RegionSpec,
    TemporalFill,
)

MAX_POSITIONS = 120


@st.composite
def _ranges(draw, size):
    low = draw(st.integers(0, size - 1))
    return low, draw(st.integers(low + 1, size))


@st.composite
def region_specs(draw, grid, none=True):
    bounds = [bound for size in grid for bound in draw(_ranges(size))]
    attn = draw(st.sampled_from(["cross_attention"] * 9 + ["none"])) if none else "cross_attention"
    return RegionSpec(tuple(bounds), period=draw(st.integers(1, 4)), default_attn=attn)


@st.composite
def layouts(draw, max_positions=MAX_POSITIONS, none=True):
    """Layouts of 1 to 3 spatial dimensions and up to 5 frames, with up to 4 regions that may overlap."""
    grid = [draw(st.integers(1, 5))]
    for _ in range(draw(st.integers(1, 3))):
        grid.append(draw(st.integers(1, max(1, min(6, max_positions // math.prod(grid))))))
    regions = {f"r{i}": draw(region_specs(grid, none)) for i in range(draw(st.integers(1, 4)))}
    return CanvasLayout(T=grid[0], spatial_shape=tuple(grid[1:]), d_model=8, regions=regions)


def _bools(draw, shape):
    if not shape:
        return draw(st.booleans())
    return tuple(_bools(draw, shape[1:]) for _ in range(shape[0]))


@st.composite
def masks(draw, layout, src, dst, pairs=True):
    """None, a full mask, tiles, or a pattern over dst's box or, if ``pairs``, over pairs (small regions only)."""
    kinds = ["none", "none", "full", "tile", "tile"]
    src_shape, dst_shape = layout.region_size(src), layout.region_size(dst)
    if math.prod(dst_shape) <= 24:
        kinds.append("box")
    if pairs and math.prod(src_shape) * math.prod(dst_shape) <= 64:
        kinds.append("pairs")
    kind = draw(st.sampled_from(kinds))
    if kind == "none":
        return None
    if kind == "full":
        return MaskSpec()
    if kind == "tile":
        return MaskSpec("tile", tile_shape=tuple(draw(st.integers(1, 4)) for _ in layout.spatial_shape))
    shape = dst_shape if kind == "box" else (math.prod(src_shape), math.prod(dst_shape))
    return MaskSpec("sparse", pattern=_bools(draw, shape))


@st.composite
def topologies(draw, layout, pairs=True, write_modes=("add",)):
    """Up to 6 connections with all offsets, fills, orders, weights (0 too), masks and repetitions."""
    names = list(layout.regions)
    offsets = st.one_of(st.none(), st.integers(-3, 3))
    connections = []
    for _ in range(draw(st.integers(1, 6))):
        if connections and draw(st.integers(0, 5)) == 0:
            connections.append(draw(st.sampled_from(connections)))
            continue
        src, dst = draw(st.sampled_from(names)), draw(st.sampled_from(names))
        connections.append(
            Connection(
                src,
                dst,
                weight=draw(st.sampled_from([1.0, 0.5, 0.25, 2.0, 3.7, 0.0])),
                t_src=draw(offsets),
                t_dst=draw(offsets),
                fn=draw(st.sampled_from([None, None, None, None, "cross_attention", "none"])),
                write_mode=draw(st.sampled_from(write_modes)),
                temporal_fill=draw(st.sampled_from(TemporalFill)),
                interpolation_order=draw(st.integers(0, 4)),
                mask=draw(masks(layout, src, dst, pairs)),
            )
        )
    return CanvasTopology(connections)


@st.composite
def canvases(draw, max_positions=MAX_POSITIONS, pairs=True, write_modes=("add",)):
    """(layout, topology)."""
    layout = draw(layouts(max_positions))
    return layout, draw(topologies(layout, pairs, write_modes))


KINDS = ("prediction", "novelty")


@st.composite
def _triggers(draw, names):
    clauses = []
    for _ in range(draw(st.integers(1, 2))):
        region = draw(st.sampled_from([*names, *names, *names, "nowhere"]))
        op = draw(st.sampled_from(["<", ">", "<=", ">=", "==", "!="]))
        # summaries are drawn from the same few numbers: every comparison has its turn
        clauses.append(f"{region}.{draw(st.sampled_from([*KINDS, *KINDS, 'other']))} {op} {draw(levels)}")
    return " && ".join(clauses)


levels = st.sampled_from([0.0, 0.25, 0.5, 1.0])


@st.composite
def programs(draw, layout, topology, pairs=True):
    """Programs with operators, triggers, write modes, masks, banks and residual carriers, and summaries for them."""
    names = list(layout.regions)
    regions, connections = {}, {}
    for name in names:
        identity = None
        if draw(st.integers(0, 3)) == 0:
            identity = IdentitySpec(slot_capacity=draw(st.integers(1, 4)), birth_death=draw(st.booleans()))
        carrier = draw(st.sampled_from(["deterministic", "residual"]))
        if identity is not None or carrier != "deterministic":
            regions[name] = RegionProgram(carrier=carrier, identity=identity)
    for src, dst in sorted({(c.src, c.dst) for c in topology.connections}):
        if draw(st.booleans()):
            connections[src, dst] = ConnectionProgram(
                draw(st.sampled_from(["attend", "write", "act", "retrieve", "observe", "unheard of"])),
                draw(st.none() | _triggers(names)),
                draw(st.sampled_from(["add", "add", "replace", "gate"])),
                draw(st.none() | masks(layout, src, dst, pairs)),
            )
    cortex = CortexRegistry()
    if draw(st.booleans()):
        cortex.register(CortexSpec("home", local_backend="self_attention"))
        for name in draw(st.lists(st.sampled_from(names), unique=True, min_size=1)):
            cortex.assign(name, "home")
    summaries = {name: {kind: draw(levels) for kind in KINDS} for name in names if draw(st.integers(0, 3))}
    program = CanvasProgram(CanvasSchema(layout, topology), regions, connections)
    return program, cortex, summaries


@st.composite
def programmed_canvases(draw, max_positions=40, pairs=True):
    """(layout, topology, program, cortex, summaries, active region names or None)."""
    layout = draw(layouts(max_positions))
    topology = draw(topologies(layout, pairs, ("add", "add", "replace", "gate")))
    renamed = [
        dataclasses.replace(c, fn="cogvideox") if c.fn is None and draw(st.integers(0, 4)) == 0 else c
        for c in topology.connections
    ]
    topology = CanvasTopology(renamed)
    active = draw(st.none() | st.sets(st.sampled_from(list(layout.regions))))
    return layout, topology, *draw(programs(layout, topology, pairs)), active
