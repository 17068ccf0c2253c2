"""Connections → attention sets, as boxes of positions: the queries and keys of each softmax, never single pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..canvas import CanvasLayout
from ..connectivity import CanvasTopology, FrameSets, resolve_connections, resolve_frames
from ..masks import MaskSpec, mask_parts
from ..notices import join_truncated, warn


@dataclass(frozen=True)
class SlotBank:
    """The learned slots that stand for a region's keys: positions N + start … N + start + size − 1."""

    region: str
    start: int
    size: int

    def box(self, layout: CanvasLayout) -> np.ndarray:
        """Returns int64 [D, 2]: the slots as the first position of as many frames, after the canvas's own."""
        frames = (layout.T + self.start, layout.T + self.start + self.size)
        return np.array([frames, *[(0, 1)] * layout.n_spatial_dims], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class AttentionSets:
    """Every attention set of a topology on a layout. R sets, P parts, U distinct boxes, D = 1 + spatial dimensions.

    A part lets the queries of box ``part_q`` attend to the keys of box ``part_k`` within set ``part_set``; the parts of
    a set that hold one query row have disjoint keys, and together they are that row's softmax. Almost every set has one
    part; sparse masks make more.

    Attributes:
        boxes: int64 [U, D, 2], half-open, in (t, s0, …).
        part_set: int64 [P], non-decreasing.
        part_q, part_k: int64 [P], rows of ``boxes``.
        weight: float64 [R], > 0.
        connection: int64 [R], non-decreasing, the connection's number in the topology.
    """

    boxes: np.ndarray
    part_set: np.ndarray
    part_q: np.ndarray
    part_k: np.ndarray
    weight: np.ndarray
    connection: np.ndarray

    def counts(self, connections: int) -> np.ndarray:
        """Returns int64 [connections]: how many attention sets each connection has."""
        return np.bincount(self.connection, minlength=connections)

    def of(self, connections: np.ndarray) -> AttentionSets:
        """Returns the sets of the connections marked in ``connections`` (bool [number of connections])."""
        keep = connections[self.connection]
        number = np.cumsum(keep) - 1
        parts = keep[self.part_set]
        return AttentionSets(
            self.boxes,
            number[self.part_set[parts]],
            self.part_q[parts],
            self.part_k[parts],
            self.weight[keep],
            self.connection[keep],
        )


def resolve_attention_sets(
    layout: CanvasLayout, topology: CanvasTopology, dense_in_time: bool = False, banks: Sequence[SlotBank] = ()
) -> AttentionSets:
    """Resolves every connection (docs/semantics.md, section 2).

    Args:
        layout, topology: the declaration. A connection that names a region missing from the layout makes no set, and
            one UserWarning names all of them; another names those without any set.
        dense_in_time: whether to ignore the temporal offsets of every connection.
        banks: every set whose dst is the region of a slot bank has the whole bank as its keys.

    Raises:
        ValueError: a mask that does not fit its regions, named with its connection.
    """
    names = {name: i for i, name in enumerate(layout.regions)}
    regions = np.array([layout.region_box(name) for name in names], dtype=np.int64)
    regions = regions.reshape(len(names), 1 + layout.n_spatial_dims, 2)
    periods = [layout.region_spec(name).period for name in names]
    bank_of = {names[bank.region]: number for number, bank in enumerate(banks)}
    collect = _Collector(regions, np.array([bank.box(layout) for bank in banks]), bank_of)
    # Columns of numbers: a tuple per connection would be an object for the garbage collector.
    whole_number, whole_src, whole_dst, whole_weight = collect.whole
    for number, connection, _ in resolve_connections(topology, layout):
        src, dst, mask = names[connection.src], names[connection.dst], connection.mask
        mask = None if mask is None or mask.effective_kind == "full" else mask
        offsets = (None, None) if dense_in_time else (connection.t_src, connection.t_dst)
        if mask is None and offsets == (None, None):
            whole_number.append(number)
            whole_src.append(src)
            whole_dst.append(dst)
            whole_weight.append(connection.weight)
            continue
        frames = resolve_frames(
            layout.T,
            (int(regions[src, 0, 0]), int(regions[src, 0, 1])),
            (int(regions[dst, 0, 0]), int(regions[dst, 0, 1])),
            periods[src],
            periods[dst],
            *offsets,
            connection.temporal_fill,
            connection.interpolation_order,
        )
        if mask is None:
            collect.framed.append((number, src, dst, connection.weight, frames))
            continue
        try:
            collect.masked(number, src, dst, connection.weight, frames, mask)
        except ValueError as error:
            raise ValueError(
                f"connection {number}, {connection.src!r} attends to {connection.dst!r}: {error}"
            ) from None
    sets = collect.attention_sets()
    _warn_of_empty_connections(topology, sets, [number for number, *_ in (*collect.framed, *collect.split)])
    return sets


def _warn_of_empty_connections(topology: CanvasTopology, sets: AttentionSets, numbers: list[int]) -> None:
    """Warns of the connections ``numbers``, which offsets or a mask restrict, that leave their pair of regions without
    a set. One of several may well have none, as the previous frame of a region with one frame."""
    count = sets.counts(len(topology.connections)).tolist()
    if all(count[number] for number in numbers):
        return
    connected = {(c.src, c.dst) for number, c in enumerate(topology.connections) if count[number]}
    named = (topology.connections[number] for number in sorted(numbers))
    empty = [c for c in named if (c.src, c.dst) not in connected]
    if empty:
        shown = join_truncated(f"{c.src!r} → {c.dst!r} at t_src={c.t_src}, t_dst={c.t_dst}" for c in empty)
        warn(f"{len(empty)} of {len(topology.connections)} connections have no keys on this layout: {shown}")


class _Collector:
    """Collects sets of the three kinds and numbers them in declaration order at the end."""

    def __init__(self, regions: np.ndarray, banks: np.ndarray, bank_of: dict[int, int]):
        """Takes boxes [n, D, 2] of ``regions`` and ``banks``; ``bank_of`` maps regions to banks."""
        self.regions, self.banks, self.bank_of = regions, banks, bank_of
        # sets between whole regions: connection, src and dst region, and weight
        self.whole: tuple[list[int], list[int], list[int], list[float]] = ([], [], [], [])
        self.framed: list[tuple] = []
        # masked connections: number, the weights of the sets, and the set and the boxes of their parts
        self.split: list[tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []

    def keys(self, dst: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the boxes [n, D, 2] of the keys of regions ``dst``, their slot banks where they have one, and bool
        [n]: which are banks."""
        if not self.bank_of:
            return self.regions[dst], np.zeros(len(dst), bool)
        bank = np.array([self.bank_of.get(region, -1) for region in np.asarray(dst).tolist()])
        boxes = self.regions[dst]
        boxes[bank >= 0] = self.banks[bank[bank >= 0]]
        return boxes, bank >= 0

    def masked(self, number, src, dst, weight, frames: FrameSets, mask: MaskSpec) -> None:
        bank = self.bank_of.get(dst)
        regions = self.regions[src], self.regions[dst]
        row, part_set, q, k = mask_parts(mask, *regions, frames.queries, frames.keys, whole_keys=bank is not None)
        if bank is not None:
            k[:] = self.banks[bank]
        self.split.append((number, weight * frames.fraction[row], part_set, q, k))

    def attention_sets(self) -> AttentionSets:
        numbers, weights, q_boxes, k_boxes, owner = [], [], [], [], []
        count = 0

        def add(number, weight, q, k, own):
            nonlocal count
            numbers.append(number)
            weights.append(weight)
            q_boxes.append(q)
            k_boxes.append(k)
            owner.append(own + count)
            count += len(number)

        if self.whole[0]:
            number, src, dst, weight = map(np.array, self.whole)
            add(number, weight, self.regions[src], self.keys(dst)[0], np.arange(len(number)))
        if self.framed:
            number, src, dst, weight, frames = zip(*self.framed, strict=True)
            lengths = [len(f) for f in frames]
            k, in_bank = self.keys(np.array(dst))
            q, k = (np.repeat(boxes, lengths, axis=0) for boxes in (self.regions[np.array(src)], k))
            framed = ~np.repeat(in_bank, lengths)
            for box, start, stop, rows in ((q, "q_start", "q_stop", slice(None)), (k, "k_start", "k_stop", framed)):
                box[rows, 0, 0] = np.concatenate([getattr(f, start) for f in frames])[rows]
                box[rows, 0, 1] = np.concatenate([getattr(f, stop) for f in frames])[rows]
            weight = np.repeat(np.array(weight, dtype=np.float64), lengths)
            weight *= np.concatenate([f.fraction for f in frames])
            add(np.repeat(np.array(number), lengths), weight, q, k, np.arange(len(weight)))
        for number, weight, part_set, q, k in self.split:
            add(np.full(len(weight), number), weight, q, k, part_set)
        shape = (0, *self.regions.shape[1:])
        number = np.concatenate([np.zeros(0, np.int64), *numbers])
        order = np.argsort(number, kind="stable")
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        part_set = rank[np.concatenate([np.zeros(0, np.int64), *owner])]
        by_set = np.argsort(part_set, kind="stable")
        boxes, inverse = _unique_boxes(np.concatenate([np.zeros(shape, np.int64), *q_boxes, *k_boxes]))
        part_q, part_k = inverse[: len(part_set)], inverse[len(part_set) :]
        weight = np.concatenate([np.zeros(0), *weights])[order]
        return AttentionSets(boxes, part_set[by_set], part_q[by_set], part_k[by_set], weight, number[order])


def _unique_boxes(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the distinct boxes and the number of each given box among them."""
    flat = np.ascontiguousarray(boxes.reshape(len(boxes), boxes.shape[1] * 2))
    # one opaque value per row: np.unique(axis=0) compares field by field and is ten times slower
    rows = flat.view(np.dtype((np.void, flat.dtype.itemsize * flat.shape[1]))).ravel()
    _, first, inverse = np.unique(rows, return_index=True, return_inverse=True)
    return boxes[first], inverse.reshape(-1)
