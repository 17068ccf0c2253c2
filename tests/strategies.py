"""Random canvases: small, odd-shaped, overlapping or equal, at several rates, with every kind of connection.

All are drawn from a ``random.Random``: a seeded one gives the same canvas for ever, and hypothesis draws by one of its
own, which it shrinks.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from random import Random

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
OFFSETS = (None, None, None, None, -3, -2, -1, -1, 0, 0, 0, 0, 1, 1, 2, 3)
WEIGHTS = (1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 2.0, 2.0, 3.7, 3.7, 0.0)


def drawn(make):
    """``make(rng, …)`` as a hypothesis strategy ``(…)``."""

    @st.composite
    def strategy(draw, *args, **options):
        return make(draw(st.randoms(use_true_random=False)), *args, **options)

    return strategy


# -- layouts -----------------------------------------------------------------------------------------------------------


def random_layout(rng: Random, max_positions=MAX_POSITIONS, none=True):
    """1 to 3 spatial dimensions, up to 6 frames, and up to 4 regions: boxes that lie anywhere, or regions side by side
    in all frames. Some boxes are there twice."""
    grid = [rng.choice([1, 2, 3, 3, 4, 4, 5, 6])]
    for _ in range(rng.randint(1, 3)):
        grid.append(rng.randint(1, max(1, min(6, max_positions // math.prod(grid)))))
    if rng.random() < 0.4:
        boxes = _side_by_side(rng, grid)
    else:
        boxes = [_box(rng, grid) for _ in range(rng.choice([1, 2, 3, 3, 4]))]
    if len(boxes) < 4 and rng.random() < 0.25:
        boxes.append(rng.choice(boxes))
    period = rng.choice([None, None, rng.randint(1, 4)])
    regions = {}
    for number, box in enumerate(boxes):
        attn = "none" if none and rng.random() < 0.1 else "cross_attention"
        regions[f"r{number}"] = RegionSpec(box, period=period or rng.randint(1, 4), default_attn=attn)
    return CanvasLayout(T=grid[0], spatial_shape=tuple(grid[1:]), d_model=8, regions=regions)


def _box(rng, grid):
    bounds = []
    for size in grid:
        low = rng.randint(0, size - 1)
        bounds += [low, rng.randint(low + 1, size)]
    return tuple(bounds)


def _side_by_side(rng, grid):
    """Up to 3 boxes over all frames, cut along the first spatial axis; not always all of it."""
    cuts = sorted(rng.sample(range(grid[1] + 1), min(grid[1] + 1, rng.randint(2, 4))))
    if rng.random() < 0.5:
        cuts[0], cuts[-1] = 0, grid[1]
    rest = [bound for size in grid[2:] for bound in (0, size)]
    return [(0, grid[0], low, high, *rest) for low, high in itertools.pairwise(cuts)]


# -- topologies --------------------------------------------------------------------------------------------------------


def _nested_bools(rng, shape):
    if not shape:
        return rng.random() < 0.5
    return tuple(_nested_bools(rng, shape[1:]) for _ in range(shape[0]))


def random_mask(rng: Random, layout, src, dst, pairs=True):
    """Tiles, or a pattern over dst's box or, if ``pairs``, over pairs (small regions only)."""
    src_shape, dst_shape = layout.region_size(src), layout.region_size(dst)
    kinds = ["tile", *(["box"] if math.prod(dst_shape) <= 24 else [])]
    if pairs and math.prod(src_shape) * math.prod(dst_shape) <= 64:
        kinds.append("pairs")
    kind = rng.choice(kinds)
    if kind == "tile":
        return MaskSpec("tile", tile_shape=tuple(rng.randint(1, 4) for _ in layout.spatial_shape))
    shape = dst_shape if kind == "box" else (math.prod(src_shape), math.prod(dst_shape))
    return MaskSpec("sparse", pattern=_nested_bools(rng, shape))


def any_mask(rng: Random, layout, src, dst, pairs=True):
    """:func:`random_mask`, or None, or a full mask."""
    kind = rng.randint(0, 4)
    return None if kind < 2 else MaskSpec() if kind == 2 else random_mask(rng, layout, src, dst, pairs)


def random_topology(rng: Random, layout, pairs=True, write_modes=("add",), fns=FNS):
    """Up to 6 connections with all offsets, fills, orders, weights (0 too), masks and repetitions. In some topologies
    all connections share some of these; in some regions attend to themselves alone, or each once and all alike."""
    names = list(layout.regions)
    # reads of several regions are alike, then
    shared = {
        "weight": rng.choice(WEIGHTS[:-1]),
        "fn": rng.choice(fns),
        "t_src": rng.choice(OFFSETS),
        "t_dst": rng.choice(OFFSETS),
        "temporal_fill": rng.choice(list(TemporalFill)),
    }
    if rng.random() < 0.2:
        alike = rng.sample(names, rng.randint(1, len(names)))
        shared["t_src"], shared["t_dst"] = rng.choice([(None, 0), (0, 0), (None, -1), (0, -1)])
        return CanvasTopology([Connection(name, name, **shared) for name in alike])
    kept = {name: value for name, value in shared.items() if rng.random() < 0.5}
    plain, alone = rng.random() < 0.4, rng.random() < 0.25
    connections = []
    for _ in range(rng.choice([1, 2, 2, 3, 3, 4, 5, 6])):
        if connections and rng.randint(0, 5) == 0:
            connections.append(rng.choice(connections))
            continue
        src = rng.choice(names)
        dst = src if alone or rng.random() < 0.1 else rng.choice(names)
        own = {
            "weight": rng.choice(WEIGHTS),
            "fn": rng.choice(fns),
            "t_src": rng.choice(OFFSETS),
            "t_dst": rng.choice(OFFSETS),
            "temporal_fill": rng.choice(list(TemporalFill)),
            "interpolation_order": rng.randint(0, 4),
            "write_mode": rng.choice(write_modes),
            "mask": None if plain else any_mask(rng, layout, src, dst, pairs),
        }
        connections.append(Connection(src, dst, **{**own, **kept}))
    return CanvasTopology(connections)


def random_canvas(rng: Random, max_positions=MAX_POSITIONS, pairs=True, write_modes=("add",), fns=FNS):
    """(layout, topology); connections draw their function from ``fns``."""
    layout = random_layout(rng, max_positions)
    return layout, random_topology(rng, layout, pairs, write_modes, fns)


def scattered_canvas(rng: Random, write_modes=("add",), fns=(None,)):
    """(layout, topology) of one region that attends to another under a random pattern of many pairs, so that hardly two
    rows have equal keys, and some plain connections."""
    rows, keys = rng.randint(72, 90), rng.randint(7, 9)
    regions = {"r0": RegionSpec((0, 1, 0, rows)), "r1": RegionSpec((0, 1, rows, rows + keys))}
    layout = CanvasLayout(T=1, spatial_shape=(rows + keys + rng.randint(0, 2),), d_model=8, regions=regions)
    mask = MaskSpec("sparse", pattern=_nested_bools(rng, (rows, keys)))
    others = rng.sample([("r0", "r0"), ("r1", "r0"), ("r1", "r1")], rng.randint(0, 2))
    connections = [
        Connection(
            *pair,
            weight=rng.choice(WEIGHTS[:-1]),
            fn=rng.choice(fns),
            write_mode=rng.choice(write_modes),
            mask=mask if pair == ("r0", "r1") else None,
        )
        for pair in [("r0", "r1"), *others]
    ]
    return layout, CanvasTopology(connections)


layouts, masks, canvases = drawn(random_layout), drawn(any_mask), drawn(random_canvas)


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


# -- programs ----------------------------------------------------------------------------------------------------------

KINDS = ("prediction", "novelty")
LEVELS = (0.0, 0.25, 0.5, 1.0)
SOFTMAX = ("cogvideox",)
FAMILIES = ("cogvideox", "local_attention", "pooling", "linear_attention", "gated", "sigmoid_attention", "perceiver")


def _trigger(rng, names):
    clauses = []
    for _ in range(rng.choice([1, 1, 2])):
        region = rng.choice([*names, *names, *names, *names, "nowhere"])
        # summaries are drawn from the same few numbers: every comparison has its turn
        kind = rng.choice([*KINDS, *KINDS, *KINDS, *KINDS, "other"])
        op = rng.choice(["<", ">", "<=", ">=", "<=", ">=", "==", "!="])
        clauses.append(f"{region}.{kind} {op} {rng.choice(LEVELS)}")
    return " && ".join(clauses)


def programmed(rng: Random, layout, topology, pairs=True, fns=SOFTMAX):
    """(topology, program, cortex, summaries, active region names or None), all of it likely to matter."""
    names = list(layout.regions)
    connections = [
        dataclasses.replace(c, fn=rng.choice([None, None, None, rng.choice(fns)]) if c.fn != "none" else "none")
        for c in topology.connections
    ]
    # a full read of a random pair, so that something is read in most canvases
    connections.append(Connection(rng.choice(names), rng.choice(names), t_src=rng.choice([None, 0]), t_dst=None))
    topology = CanvasTopology(connections)
    operators = ["attend", "write", "act", "retrieve", "unheard of", *([] if pairs else ["compress"])]
    regions, programs, identities = {}, {}, rng.choice([0.3, 0.3, 0.9])
    for name in rng.sample(names, len(names)):
        identity = None
        if rng.random() < identities:
            identity = IdentitySpec(slot_capacity=rng.randint(1, 4), birth_death=rng.random() < 0.5)
        carrier = rng.choice(["deterministic", "residual"])
        if identity is not None or carrier != "deterministic":
            regions[name] = RegionProgram(carrier=carrier, identity=identity)
    for src, dst in sorted({(c.src, c.dst) for c in connections}):
        if rng.random() < 0.7:
            programs[src, dst] = ConnectionProgram(
                rng.choice(operators),
                _trigger(rng, names) if rng.random() < 0.4 else None,
                rng.choice(["add", "add", "add", "replace", "gate"]),
                random_mask(rng, layout, src, dst, pairs) if rng.random() < 0.4 else None,
            )
    cortex = CortexRegistry()
    cortex.register(CortexSpec("home", local_backend=rng.choice(["self_attention", *fns])))
    for name in names:
        if rng.random() < 0.3:
            cortex.assign(name, "home")
    summaries = {name: {kind: rng.choice(LEVELS) for kind in KINDS} for name in names if rng.random() < 0.8}
    active = None if rng.random() < 0.5 else {name for name in names if rng.random() < 0.8}
    return topology, CanvasProgram(CanvasSchema(layout, topology), regions, programs), cortex, summaries, active


def random_programmed_canvas(rng: Random, max_positions=40, pairs=True, fns=SOFTMAX):
    """(layout, topology, program, cortex, summaries, active region names or None)."""
    layout = random_layout(rng, max_positions, none=False)
    topology = random_topology(rng, layout, pairs, ("add", "add", "replace", "gate"))
    return layout, *programmed(rng, layout, topology, pairs, fns)


programmed_canvases = drawn(random_programmed_canvas)
