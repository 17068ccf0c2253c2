"""Random canvases for hypothesis: small, odd-shaped, overlapping, at several rates, with every kind of connection."""

from __future__ import annotations

import dataclasses
import math
import random

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
FNS = (None, None, None, None, "cross_attention", "none")


@st.composite
def ranges(draw, size):
    low = draw(st.integers(0, size - 1))
    return low, draw(st.integers(low + 1, size))


@st.composite
def region_specs(draw, grid, none=True):
    bounds = [bound for size in grid for bound in draw(ranges(size))]
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
def topologies(draw, layout, pairs=True, write_modes=("add",), fns=FNS):
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
                fn=draw(st.sampled_from(fns)),
                write_mode=draw(st.sampled_from(write_modes)),
                temporal_fill=draw(st.sampled_from(TemporalFill)),
                interpolation_order=draw(st.integers(0, 4)),
                mask=draw(masks(layout, src, dst, pairs)),
            )
        )
    return CanvasTopology(connections)


@st.composite
def canvases(draw, max_positions=MAX_POSITIONS, pairs=True, write_modes=("add",), fns=FNS):
    """(layout, topology); connections draw their function from ``fns``."""
    layout = draw(layouts(max_positions))
    return layout, draw(topologies(layout, pairs, write_modes, fns))


@st.composite
def videos(draw):
    """(layout, topology) of one or two regions that fill several frames and read each other at some frame offsets:
    equal cells at equal distances, as most canvases are."""
    frames = draw(st.integers(3, 6))
    sizes = draw(st.lists(st.integers(1, 7), min_size=1, max_size=2))
    regions, start = {}, 0
    for name, size in zip("ab", sizes):
        regions[name] = (0, frames, start, start + size)
        start += size
    offsets = st.sampled_from([None, -2, -1, 0, 0, 1])
    pairs = st.tuples(st.sampled_from(sorted(regions)), st.sampled_from(sorted(regions)), offsets)
    connections = [
        Connection(src, dst) if offset is None else Connection(src, dst, t_src=0, t_dst=offset)
        for src, dst, offset in draw(st.lists(pairs, min_size=1, max_size=5, unique=True))
    ]
    topology = draw(st.sampled_from([CanvasTopology(connections), CanvasTopology.causal_temporal(sorted(regions))]))
    return CanvasLayout(T=frames, d_model=8, spatial_shape=(start,), regions=regions), topology


KINDS = ("prediction", "novelty")
LEVELS = (0.0, 0.25, 0.5, 1.0)


def _trigger(rng, names):
    clauses = []
    for _ in range(rng.choice([1, 1, 2])):
        region = rng.choice([*names, *names, *names, "nowhere"])
        # summaries are drawn from the same few numbers: every comparison has its turn
        kind, op = rng.choice([*KINDS, *KINDS, *KINDS, "other"]), rng.choice(["<", ">", "<=", ">=", "==", "!="])
        clauses.append(f"{region}.{kind} {op} {rng.choice(LEVELS)}")
    return " && ".join(clauses)


def _nested_bools(rng, shape):
    if not shape:
        return rng.random() < 0.5
    return tuple(_nested_bools(rng, shape[1:]) for _ in range(shape[0]))


def _mask(rng, layout, src, dst, pairs):
    src_shape, dst_shape = layout.region_size(src), layout.region_size(dst)
    kinds = ["tile", *(["box"] if math.prod(dst_shape) <= 24 else [])]
    if pairs and math.prod(src_shape) * math.prod(dst_shape) <= 64:
        kinds.append("pairs")
    kind = rng.choice(kinds)
    if kind == "tile":
        return MaskSpec("tile", tile_shape=tuple(rng.randint(1, 4) for _ in layout.spatial_shape))
    shape = dst_shape if kind == "box" else (math.prod(src_shape), math.prod(dst_shape))
    return MaskSpec("sparse", pattern=_nested_bools(rng, shape))


SOFTMAX = ("cogvideox",)
FAMILIES = ("cogvideox", "local_attention", "pooling", "linear_attention", "gated", "sigmoid_attention", "perceiver")


def programmed(rng, layout, topology, pairs=True, fns=SOFTMAX):
    """(topology, program, cortex, summaries, active region names or None), all of it likely to matter.

    Drawn from a seeded generator: hypothesis would spend its examples on programs that say next to nothing.
    """
    names = list(layout.regions)
    connections = [
        dataclasses.replace(c, fn=rng.choice([None, None, None, rng.choice(fns)]) if c.fn != "none" else "none")
        for c in topology.connections
    ]
    # a full read of a random pair, so that something is read in most canvases
    connections.append(Connection(rng.choice(names), rng.choice(names), t_src=rng.choice([None, 0]), t_dst=None))
    topology = CanvasTopology(connections)
    operators = ["attend", "write", "act", "retrieve", "unheard of", *([] if fns is SOFTMAX else ["compress"])]
    regions, programs = {}, {}
    for name in names:
        identity = None
        if rng.random() < 0.3:
            identity = IdentitySpec(slot_capacity=rng.randint(1, 4), birth_death=rng.random() < 0.5)
        carrier = rng.choice(["deterministic", "residual"])
        if identity is not None or carrier != "deterministic":
            regions[name] = RegionProgram(carrier=carrier, identity=identity)
    for src, dst in sorted({(c.src, c.dst) for c in connections}):
        if rng.random() < 0.7:
            programs[src, dst] = ConnectionProgram(
                rng.choice(operators),
                _trigger(rng, names) if rng.random() < 0.6 else None,
                rng.choice(["add", "add", "add", "replace", "gate"]),
                _mask(rng, layout, src, dst, pairs) if rng.random() < 0.4 else None,
            )
    cortex = CortexRegistry()
    cortex.register(CortexSpec("home", local_backend=rng.choice(["self_attention", *fns])))
    for name in names:
        if rng.random() < 0.3:
            cortex.assign(name, "home")
    summaries = {name: {kind: rng.choice(LEVELS) for kind in KINDS} for name in names if rng.random() < 0.8}
    active = None if rng.random() < 0.4 else {name for name in names if rng.random() < 0.7}
    return topology, CanvasProgram(CanvasSchema(layout, topology), regions, programs), cortex, summaries, active


@st.composite
def programmed_canvases(draw, max_positions=40, pairs=True, fns=SOFTMAX):
    """(layout, topology, program, cortex, summaries, active region names or None)."""
    layout = draw(layouts(max_positions, none=False))
    topology = draw(topologies(layout, pairs, ("add", "add", "replace", "gate")))
    return layout, *programmed(random.Random(draw(st.integers(0, 2**32))), layout, topology, pairs, fns)
