"""Which regions attend to which, and when: connections, topologies, and the frames that a temporal connection pairs."""

from __future__ import annotations

import enum
import math
import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from canvas_engineering.canvas.layout import CanvasLayout
from canvas_engineering.checked import (
    LARGEST_INT,
    checked_bool,
    checked_choice,
    checked_int,
    checked_items,
    checked_kind,
    checked_name,
    checked_names,
    checked_number,
    shown,
)
from canvas_engineering.masks import MaskSpec, mask_parts
from canvas_engineering.notices import join_truncated, warn

__all__ = [
    "CanvasTopology",
    "Connection",
    "FrameSets",
    "TemporalFill",
    "resolve_connections",
    "connection_frames",
    "resolve_frames",
]

_WRITE_MODES = ("add", "replace", "gate")
# Products, sums and reciprocals of such weights and fractions stay finite in float32.
_SMALLEST_WEIGHT, _LARGEST_WEIGHT = 1e-18, 1e18


class TemporalFill(enum.Enum):
    """The choice of dst's frames where dst has no frame at the target time.

    >>> [fill.value for fill in TemporalFill]
    ['drop', 'hold', 'interpolate']
    """

    DROP = "drop"
    HOLD = "hold"
    INTERPOLATE = "interpolate"

    # Members are singletons; Enum's own hash is slow Python code in every cache key of a large topology.
    __hash__ = object.__hash__


@dataclass(frozen=True, eq=False)
class FrameSets:
    """The attention sets of a pair of temporal offsets, as ranges of absolute canvas frames, one row per set.

    Attributes:
        q_start, q_stop: int64 ``[n]``: the query frames ``q_start .. q_stop - 1`` of src.
        k_start, k_stop: int64 ``[n]``: the key/value frames ``k_start .. k_stop - 1`` of dst.
        fraction: float64 ``[n]``: the set's weight is the connection's weight times this; never 0.

    Rows ascend in the reference frame; for one reference frame the past comes before the future, and inverse-distance
    anchors are sorted by distance, the earlier first at equal distance. The arrays are read-only.
    """

    q_start: np.ndarray
    q_stop: np.ndarray
    k_start: np.ndarray
    k_stop: np.ndarray
    fraction: np.ndarray

    def __len__(self) -> int:
        return len(self.fraction)

    @property
    def queries(self) -> np.ndarray:
        """int64 ``[n, 2]``: q_start and q_stop."""
        return np.stack([self.q_start, self.q_stop], axis=1)

    @property
    def keys(self) -> np.ndarray:
        """int64 ``[n, 2]``: k_start and k_stop."""
        return np.stack([self.k_start, self.k_stop], axis=1)


def _frame_sets(q_start, q_stop, k_start, k_stop, fraction) -> FrameSets:
    arrays = [np.ascontiguousarray(array) for array in (q_start, q_stop, k_start, k_stop, fraction)]
    for array in arrays:
        array.setflags(write=False)
    return FrameSets(*arrays)


@lru_cache(maxsize=1024)
def resolve_frames(
    T: int,
    src_frames: tuple[int, int],
    dst_frames: tuple[int, int],
    src_period: int,
    dst_period: int,
    t_src: int | None,
    t_dst: int | None,
    fill: TemporalFill,
    order: int,
) -> FrameSets:
    """Pairs src frames with dst frames, for every reference frame ``r`` of ``0 .. T - 1``.

    Src's frame ``r + t_src`` (all of its frames if ``t_src`` is None) attends to dst at the real time
    ``(r + t_dst) * p``, with ``p`` src's period if ``t_src`` is an int, else 1 (all of dst if ``t_dst`` is None). The
    real time of dst's frame ``f`` is ``f * dst_period``. Where dst has no frame at that time, ``fill`` decides: DROP
    makes no set; HOLD takes the latest earlier frame; INTERPOLATE of order up to 1 the nearest earlier and later
    frames, at distances a and b, with fractions b / (a + b) and a / (a + b), or the only one there is; INTERPOLATE of
    order n >= 2 the n + 1 nearest frames with fractions d**-n / sum(d**-n).

    Args:
        T: number of canvas frames.
        src_frames, dst_frames: absolute half-open frame ranges (t0, t1).
        src_period, dst_period: real-time steps per canvas frame.
        t_src, t_dst: offsets from the reference frame, or None for all frames.
        fill: how frames are chosen where dst has none.
        order: interpolation order.

    Returns:
        The FrameSets; cost is linear in T (times the order).

    >>> frames = resolve_frames(3, (0, 3), (0, 1), 1, 2, 0, 0, TemporalFill.HOLD, 1)
    >>> frames.q_start.tolist(), frames.k_start.tolist()
    ([0, 1, 2], [0, 0, 0])
    """
    (src_first, src_end), (first, end) = src_frames, dst_frames
    if t_src is None and t_dst is None:
        q_start, q_stop, start, stop = (np.array([frame], dtype=np.int64) for frame in (*src_frames, *dst_frames))
        return _frame_sets(q_start, q_stop, start, stop, np.ones(1))
    if t_src is None:
        reference = np.arange(T, dtype=np.int64)
        q_start, q_stop = np.full(T, src_first, dtype=np.int64), np.full(T, src_end, dtype=np.int64)
    else:
        reference = np.arange(max(0, src_first - t_src), min(T, src_end - t_src), dtype=np.int64)
        q_start, q_stop = reference + t_src, reference + t_src + 1
    if t_dst is None:
        n = len(reference)
        full = np.full(n, first, dtype=np.int64), np.full(n, end, dtype=np.int64)
        return _frame_sets(q_start, q_stop, *full, np.ones(n))

    time = (reference + t_dst) * (1 if t_src is None else src_period)
    floor = time // dst_period
    exact = (floor * dst_period == time) & (floor >= first) & (floor < end)
    # [n, anchors]: candidate dst frames of each row, with fraction 0 where not used
    if fill is TemporalFill.DROP:
        anchors, fractions = floor[:, None], exact[:, None].astype(np.float64)
    elif fill is TemporalFill.HOLD:
        anchors = np.minimum(floor, end - 1)[:, None]
        fractions = (anchors >= first).astype(np.float64)
    elif order <= 1:
        anchors, fractions = _linear_anchors(time, floor, exact, first, end, dst_period)
    else:
        anchors, fractions = _nearest_anchors(time, floor, exact, first, end, dst_period, order)
    row, anchor = np.nonzero(fractions >= _SMALLEST_WEIGHT)
    k_start = anchors[row, anchor]
    return _frame_sets(q_start[row], q_stop[row], k_start, k_start + 1, fractions[row, anchor])


def _linear_anchors(time, floor, exact, first, end, period):
    past, future = np.minimum(floor, end - 1), np.maximum(floor + 1, first)
    has_past, has_future = past >= first, (future < end) & ~exact
    after, before = time - past * period, future * period - time  # distances to the past and to the future frame
    span = np.maximum(after + before, 1)
    past_fraction = np.where(has_future, before / span, 1.0) * has_past
    future_fraction = np.where(has_past, after / span, 1.0) * has_future
    return np.stack([past, future], axis=1), np.stack([past_fraction, future_fraction], axis=1)


def _nearest_anchors(time, floor, exact, first, end, period, order):
    count = min(order + 1, end - first)
    # dst's frames are evenly spaced, so the nearest `count` lie within `count` frames of the one just before.
    window = np.clip(floor, first, end - 1)[:, None] + np.arange(-count, count + 1)
    distance = np.abs(window * period - time[:, None])
    distance[(window < first) | (window >= end)] = np.iinfo(np.int64).max
    nearest = np.argsort(distance, axis=1, kind="stable")[:, :count]  # stable: the earlier one first at equal distance
    anchors, distance = np.take_along_axis(window, nearest, 1), np.take_along_axis(distance, nearest, 1)
    # Relative to the nearest distance, powers of distances neither overflow nor all underflow.
    ratio = (distance[:, :1] / np.maximum(distance, 1)) ** float(order)
    ratio[exact] = np.arange(count) == 0
    return anchors, ratio / ratio.sum(axis=1, keepdims=True)


@dataclass(frozen=True, slots=True)
class Connection:
    """One attention operation: the positions of ``src`` attend to those of ``dst``.

    Args:
        src: the query region, which receives the result.
        dst: the key/value region.
        weight: weight of the connection's attention sets; 0 disables it.
        t_src, t_dst: offsets from a shared reference frame (see `resolve_frames`), or None for all frames.
        fn: attention function; None leaves it to src's ``default_attn``; "none" disables the connection.
        operator: what the connection is for; any string, metadata only.
        write_mode: "add", "replace" or "gate".
        temporal_fill: how frames are chosen where dst has none at the target time; a TemporalFill or its value.
        interpolation_order: 0 and 1 interpolate linearly, n >= 2 by inverse distance to the n-th power.
        mask: which pairs of the two regions' positions are computed; None for all.

    Raises:
        ValueError: a weight that is neither 0 nor from 1e-18 to 1e18, an offset that is not an int, a negative
            order, an unknown fill or write mode, or a field of the wrong kind.

    >>> Connection("action", "obs", t_src=0, t_dst=-1, temporal_fill="drop").temporal_fill
    <TemporalFill.DROP: 'drop'>
    """

    src: str
    dst: str
    weight: float = 1.0
    t_src: int | None = None
    t_dst: int | None = None
    fn: str | None = None
    operator: str = "attend"
    write_mode: str = "add"
    temporal_fill: TemporalFill = TemporalFill.HOLD
    interpolation_order: int = 1
    mask: MaskSpec | None = None

    def __post_init__(self) -> None:
        # Fast path: topologies may have 100,000 connections, and nearly all need none of the coercions below.
        if (
            type(self.src) is type(self.dst) is type(self.operator) is str
            and self.src
            and self.dst
            and self.operator
            and type(self.weight) is float
            and (self.weight == 0.0 or _SMALLEST_WEIGHT <= self.weight <= _LARGEST_WEIGHT)
            and (self.t_src is None or (type(self.t_src) is int and -LARGEST_INT <= self.t_src <= LARGEST_INT))
            and (self.t_dst is None or (type(self.t_dst) is int and -LARGEST_INT <= self.t_dst <= LARGEST_INT))
            and self.fn is None
            and type(self.write_mode) is str
            and self.write_mode in _WRITE_MODES
            and type(self.temporal_fill) is TemporalFill
            and type(self.interpolation_order) is int
            and self.interpolation_order == 1
            and self.mask is None
        ):
            return
        self._check()

    def _check(self) -> None:
        try:
            self._check_fields()
        except ValueError as error:
            raise ValueError(f"connection {shown(self.src)} -> {shown(self.dst)}: {error}") from None

    def _check_fields(self) -> None:
        """Checks every field, and replaces numpy's types and others by plain ones."""
        put = object.__setattr__
        for name in ("src", "dst", "operator"):
            checked_name(getattr(self, name), name)
        allowed = f"0, or a number from {_SMALLEST_WEIGHT:g} to {_LARGEST_WEIGHT:g}"
        weight = checked_number(self.weight, "weight", allowed)
        if not (weight == 0.0 or _SMALLEST_WEIGHT <= weight <= _LARGEST_WEIGHT):
            raise ValueError(f"weight must be {allowed}, got {shown(self.weight)}")
        put(self, "weight", weight)
        for name in ("t_src", "t_dst"):
            if getattr(self, name) is not None:
                put(self, name, checked_int(getattr(self, name), name, kind="an int below 2**31 in magnitude, or None"))
        if self.fn is not None:
            checked_name(self.fn, "fn", "be the name of an attention function, or None")
        checked_choice(self.write_mode, "write_mode", _WRITE_MODES)
        put(self, "temporal_fill", _checked_fill(self.temporal_fill))
        order = checked_int(self.interpolation_order, "interpolation_order", 0, kind="an int of at least 0")
        put(self, "interpolation_order", order)
        checked_kind(self.mask, "mask", MaskSpec, optional=True)


def _checked_fill(value: Any) -> TemporalFill:
    if isinstance(value, TemporalFill):
        return value
    return TemporalFill(checked_choice(value, "temporal_fill", tuple(fill.value for fill in TemporalFill)))


class _ConnectionsKey(tuple):
    """The connections, equal by value; the hash is computed once, without a tuple per connection."""

    def __hash__(self) -> int:
        try:
            return self._hash
        except AttributeError:
            columns = (
                tuple(map(operator.attrgetter(name), self)) for name in ("src", "dst", "weight", "t_src", "t_dst")
            )
            self._hash = hash(tuple(columns))
            return self._hash


@dataclass(repr=False)
class CanvasTopology:
    """The attention graph of a canvas: a list of connections, in the order in which they were declared.

    ``connections`` may be changed in place; caches use `key`, which follows it. Topologies compare by value and, being
    mutable, are not hashable.

    Raises:
        ValueError: something in ``connections`` is not a Connection.

    >>> CanvasTopology.causal_chain(["obs", "act"]).attention_ops()[-1]
    ('act', 'obs', 1.0, 'cross_attention')
    """

    connections: list[Connection] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.connections = list(checked_items(self.connections, "connections", "Connections"))
        for position, connection in enumerate(self.connections):
            if not isinstance(connection, Connection):
                raise ValueError(f"connections[{position}] must be a Connection, got {shown(connection)}")
        self._key: tuple[Any, Any] = (None, None)  # the connections that it was made of, and the key

    def __repr__(self) -> str:
        return f"CanvasTopology(connections={len(self.connections)}, regions={len(self.regions)})"

    def _repr_html_(self) -> str:
        from canvas_engineering.notebook import topology_html

        return topology_html(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"connections": self.connections}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.connections, self._key = state["connections"], (None, None)

    def key(self) -> tuple:
        """Returns the connections as one hashable tuple, equal by value, for caches.

        It follows changes of ``connections``; while there are none, the same object is returned.
        """
        snapshot, key = self._key
        # Connections are immutable: comparing the lists checks identities first and is cheap.
        if snapshot != self.connections:
            key = _ConnectionsKey(self.connections)
            self._key = (list(self.connections), key)
        return key

    @staticmethod
    def dense(regions: Sequence[str]) -> CanvasTopology:
        """Returns a topology in which every region attends to every region, itself included."""
        regions = checked_names(regions, "regions")
        return CanvasTopology([Connection(src, dst) for src in regions for dst in regions])

    @staticmethod
    def isolated(regions: Sequence[str]) -> CanvasTopology:
        """Returns a topology in which every region attends to itself only."""
        return CanvasTopology([Connection(name, name) for name in checked_names(regions, "regions")])

    @staticmethod
    def hub_spoke(hub: str, spokes: Sequence[str], bidirectional: bool = True) -> CanvasTopology:
        """Returns a topology in which all regions attend to themselves, the hub to each spoke, and the spokes to the
        hub if ``bidirectional``."""
        spokes, bidirectional = checked_names(spokes, "spokes"), checked_bool(bidirectional, "bidirectional")
        connections = [Connection(name, name) for name in (checked_name(hub, "hub"), *spokes)]
        for spoke in spokes:
            connections.append(Connection(hub, spoke))
            if bidirectional:
                connections.append(Connection(spoke, hub))
        return CanvasTopology(connections)

    @staticmethod
    def causal_chain(regions: Sequence[str]) -> CanvasTopology:
        """Returns a topology in which all regions attend to themselves and to their predecessor."""
        regions = checked_names(regions, "regions")
        connections = [Connection(name, name) for name in regions]
        connections += [Connection(name, before) for before, name in pairwise(regions)]
        return CanvasTopology(connections)

    @staticmethod
    def causal_temporal(
        regions: Sequence[str],
        layout: CanvasLayout | None = None,
        temporal_fill: TemporalFill = TemporalFill.HOLD,
    ) -> CanvasTopology:
        """Returns a topology of each region attending to itself at the same frame and to all at the previous one.

        Raises:
            KeyError: a layout is given and has no such region.
        """
        regions = checked_names(regions, "regions")
        layout = checked_kind(layout, "layout", CanvasLayout, optional=True)
        if layout is not None:
            for name in regions:
                layout.region_spec(name)
        connections = []
        for src in regions:
            connections.append(Connection(src, src, t_src=0, t_dst=0, temporal_fill=temporal_fill))
            for dst in (src, *(name for name in regions if name != src)):
                connections.append(Connection(src, dst, t_src=0, t_dst=-1, temporal_fill=temporal_fill))
        return CanvasTopology(connections)

    @property
    def regions(self) -> list[str]:
        """Names of all regions in connections, in order of first appearance."""
        return list(dict.fromkeys(name for connection in self.connections for name in (connection.src, connection.dst)))

    @property
    def has_temporal_constraints(self) -> bool:
        """Whether any connection has a temporal offset."""
        return any(c.t_src is not None or c.t_dst is not None for c in self.connections)

    def resolve_fn(self, connection: Connection, layout: CanvasLayout | None = None) -> str:
        """Returns the connection's ``fn``, else src's ``default_attn`` in the layout, else "cross_attention"."""
        checked_kind(layout, "layout", CanvasLayout, optional=True)
        fn = checked_kind(connection, "connection", Connection).fn
        if fn is not None:
            return fn
        if layout is not None and connection.src in layout.regions:
            return layout.region_spec(connection.src).default_attn
        return "cross_attention"

    def resolve_fns(self, layout: CanvasLayout | None = None) -> list[str]:
        """Returns `resolve_fn` of every connection, in declaration order."""
        checked_kind(layout, "layout", CanvasLayout, optional=True)
        specs = {} if layout is None else {name: layout.region_spec(name) for name in layout.regions}
        defaults = {name: spec.default_attn for name, spec in specs.items()}
        return [defaults.get(c.src, "cross_attention") if c.fn is None else c.fn for c in self.connections]

    def attention_ops(self, layout: CanvasLayout | None = None) -> list[tuple[str, str, float, str]]:
        """Returns (src, dst, weight, fn) of every connection as declared, with its fn resolved."""
        return [(c.src, c.dst, c.weight, fn) for c, fn in zip(self.connections, self.resolve_fns(layout))]

    def neighbors_of(self, region: str) -> list[str]:
        """Returns the names of the regions that ``region`` attends to, each once, in declaration order."""
        return list(dict.fromkeys(c.dst for c in self.connections if c.src == region))

    def attended_by(self, region: str) -> list[str]:
        """Returns the names of the regions that attend to ``region``, each once, in declaration order."""
        return list(dict.fromkeys(c.src for c in self.connections if c.dst == region))

    def to_block_adjacency(self) -> dict[tuple[str, str], float]:
        """Returns the largest weight of each (src, dst) pair."""
        adjacency: dict[tuple[str, str], float] = {}
        for c in self.connections:
            adjacency[c.src, c.dst] = max(c.weight, adjacency.get((c.src, c.dst), 0.0))
        return adjacency

    def to_attention_mask(self, layout: CanvasLayout, device: str | torch.device = "cpu") -> torch.Tensor:
        """Returns the joint mask: ``M[i, j]`` is the largest weight over attention sets that pair i with j.

        Args:
            layout: the canvas. Connections to regions that it lacks are skipped, with one warning.
            device: device of the result.

        Returns:
            float32 ``(N, N)`` with N the number of positions; 0 where no set pairs the two. Connections of fn "none"
            and of weight 0 have no sets.

        Raises:
            ValueError: a mask that does not fit its regions; the message names the connection.
        """
        matrix, _ = _paint(self, layout, 0.0, np.asarray)
        return torch.from_numpy(matrix).to(device)

    def to_additive_mask(
        self, layout: CanvasLayout, device: str | torch.device = "cpu", weighted: bool = False
    ) -> torch.Tensor:
        """Returns the joint mask as a term to add to attention logits.

        Args:
            layout, device: as for `to_attention_mask`.
            weighted: whether to return ln M, with weights and interpolation fractions, instead of 0 where attended.

        Returns:
            float32 ``(N, N)``: 0 (or ln M) where attended and −inf elsewhere; positions without keys attend to
            themselves, with 0, so that no row of a softmax is empty.
        """
        matrix, covered = _paint(self, layout, -math.inf, np.log if weighted else np.zeros_like)
        alone = np.flatnonzero(~covered)
        matrix[alone, alone] = 0.0
        return torch.from_numpy(matrix).to(device)

    def summary(self) -> str:
        """Returns counts of connections, temporal ones by fill and all by operator, and one line each."""
        lines = [f"CanvasTopology: {len(self.connections)} connections among {len(self.regions)} regions"]
        fills = [c.temporal_fill.value for c in self.connections if (c.t_src, c.t_dst) != (None, None)]
        operators = [c.operator for c in self.connections]
        if fills:
            lines.append(f"  {len(fills)} temporal: {_counted(fills)}")
        if set(operators) - {"attend"}:
            lines.append(f"  operators: {_counted(operators)}")
        for c in self.connections:
            ends = f"{c.src} ↺ self" if c.src == c.dst else f"{c.src} -> {c.dst}"
            parts = [ends, f"weight {c.weight:g}", f"fn {c.fn or 'default'}"]
            if c.t_src is not None or c.t_dst is not None:
                parts.append(f"t ({c.t_src}, {c.t_dst}) {c.temporal_fill.value}")
            if c.mask is not None:
                parts.append(f"mask {c.mask.kind}")
            if c.write_mode != "add":
                parts.append(c.write_mode)
            if c.operator != "attend":
                parts.append(f"operator {c.operator}")
            lines.append("  " + ", ".join(parts))
        return "\n".join(lines)


def _counted(names: list[str]) -> str:
    return ", ".join(f"{name}={count}" for name, count in sorted(Counter(names).items()))


def resolve_connections(topology: CanvasTopology, layout: CanvasLayout) -> Iterator[tuple[int, Connection, str]]:
    """Yields (declaration index, connection, resolved fn) of the connections that run on the layout.

    Connections of weight 0 or of fn "none" do not run. Those to regions that the layout lacks are skipped, with one
    UserWarning for all of them.
    """
    known = checked_kind(layout, "layout", CanvasLayout).regions
    missing = [c for c in topology.connections if c.src not in known or c.dst not in known]
    if missing:
        names = dict.fromkeys(repr(name) for c in missing for name in (c.src, c.dst) if name not in known)
        warn(
            f"skipping {len(missing)} of {len(topology.connections)} connections that name regions missing from the "
            f"layout ({join_truncated(names)}): {join_truncated(f'{c.src!r} -> {c.dst!r}' for c in missing)}"
        )
    # A generator: 100,000 tuples at a time would burden the garbage collector.
    resolved = enumerate(zip(topology.connections, topology.resolve_fns(layout)))
    return (
        (index, c, fn)
        for index, (c, fn) in resolved
        if c.weight > 0 and fn != "none" and c.src in known and c.dst in known
    )


def connection_frames(c: Connection, layout: CanvasLayout) -> FrameSets:
    """Returns :func:`resolve_frames` of a connection on a layout, cached."""
    src, dst = layout.region_spec(c.src), layout.region_spec(c.dst)
    periods = src.period, dst.period
    offsets = c.t_src, c.t_dst
    return resolve_frames(
        layout.T, src.bounds[:2], dst.bounds[:2], *periods, *offsets, c.temporal_fill, c.interpolation_order
    )


def _boxes(c: Connection, layout: CanvasLayout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns weights ``[n]``, query and key boxes ``[n, D, 2]``, whose products are the pairs of the connection."""
    frames = connection_frames(c, layout)
    mask, regions = c.mask or MaskSpec(), (layout.region_box(c.src), layout.region_box(c.dst))
    row, part_set, q_boxes, k_boxes = mask_parts(mask, *regions, frames.queries, frames.keys)
    return (c.weight * frames.fraction)[row[part_set]], q_boxes, k_boxes


def _paint(topology: CanvasTopology, layout: CanvasLayout, background: float, value) -> tuple[np.ndarray, np.ndarray]:
    """Returns float32 (N, N) with ``value(weight)`` of the largest weight of every pair, and which rows have keys."""
    N = checked_kind(layout, "layout", CanvasLayout).num_positions
    boxes: list[tuple[slice, ...]] = []  # of the matrix as (t, s0, … of the query, t, s0, … of the key)
    weights = [np.zeros(0)]
    for index, c, _ in resolve_connections(topology, layout):
        try:
            weight, queries, keys = _boxes(c, layout)
        except ValueError as error:
            raise ValueError(f"connection {index}, {c.src!r} -> {c.dst!r}: {error}") from None
        both = np.concatenate([queries, keys], axis=1)
        boxes += (tuple(map(slice, *ends)) for ends in zip(both[..., 0].tolist(), both[..., 1].tolist()))
        weights.append(weight)
    weight = np.concatenate(weights)
    values = value(weight).astype(np.float32)
    grid = (layout.T, *layout.spatial_shape)
    matrix = np.zeros((N, N), dtype=np.float32) if background == 0.0 else np.full((N, N), background, dtype=np.float32)
    covered = np.zeros(N, dtype=bool)
    grids, rows = matrix.reshape(*grid, *grid), covered.reshape(grid)
    # Written by increasing weight, so that the largest remains.
    for number in np.argsort(weight, kind="stable").tolist():
        grids[boxes[number]] = values[number]
        rows[boxes[number][: len(grid)]] = True
    return matrix, covered
