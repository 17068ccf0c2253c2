"""Connections → reads, as boxes: who attends over whom, in one softmax each, never as pairs of positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..canvas import CanvasLayout
from ..connectivity import CanvasTopology, FrameReads, resolve_connections, resolve_frames
from ..masks import MaskSpec, mask_parts
from ..notices import some, warn


@dataclass(frozen=True)
class Bank:
    """The slots through which a region is read: positions N + start … N + start + size − 1, beyond the canvas."""

    region: str
    start: int
    size: int

    def box(self, layout: CanvasLayout) -> np.ndarray:
        """int64 [D, 2]: the slots as the first place of as many frames, after the canvas's own."""
        frames = (layout.T + self.start, layout.T + self.start + self.size)
        return np.array([frames, *[(0, 1)] * layout.n_spatial_dims], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Reads:
    """Every read of a topology on a layout. R reads, P parts, U distinct boxes, D = 1 + spatial dimensions.

    A part lets the queries of box ``part_q`` see the keys of box ``part_k`` within read ``part_read``; the parts of a
    read that hold one query row have disjoint keys, and together they are that row's softmax. Almost every read has one
    part; sparse masks make more.

    Attributes:
        boxes: int64 [U, D, 2], half-open, in (t, s0, …).
        part_read: int64 [P], non-decreasing.
        part_q, part_k: int64 [P], rows of ``boxes``.
        weight: float64 [R], > 0.
        connection: int64 [R], non-decreasing, the connection's place in the topology.
    """

    boxes: np.ndarray
    part_read: np.ndarray
    part_q: np.ndarray
    part_k: np.ndarray
    weight: np.ndarray
    connection: np.ndarray

    def counts(self, connections: int) -> np.ndarray:
        """int64 [connections]: how many reads each connection has."""
        return np.bincount(self.connection, minlength=connections)

    def of(self, connections: np.ndarray) -> Reads:
        """Only the reads of the connections marked in ``connections`` (bool [number of connections])."""
        keep = connections[self.connection]
        number = np.cumsum(keep) - 1
        parts = keep[self.part_read]
        return Reads(
            self.boxes,
            number[self.part_read[parts]],
            self.part_q[parts],
            self.part_k[parts],
            self.weight[keep],
            self.connection[keep],
        )


def topology_reads(
    layout: CanvasLayout, topology: CanvasTopology, dense_in_time: bool = False, banks: Sequence[Bank] = ()
) -> Reads:
    """Resolves every connection (docs/semantics.md, section 2).

    Args:
        layout, topology: the declaration. A connection that names a region missing from the layout makes no read, and
            one UserWarning tells of all of them; another of those whose offsets or mask leave two
            regions without any read.
        dense_in_time: take every connection as if it had no temporal offsets.
        banks: every read of a bank's region has the whole bank as its keys, whatever frame or tile it names.

    Raises:
        ValueError: a mask that does not fit its regions, named with its connection.
    """
    names = {name: i for i, name in enumerate(layout.regions)}
    regions = np.array([layout.region_box(name) for name in names], dtype=np.int64)
    regions = regions.reshape(len(names), 1 + layout.n_spatial_dims, 2)
    periods = [layout.region_spec(name).period for name in names]
    bank_of = {names[bank.region]: number for number, bank in enumerate(banks)}
    collect = _Collector(regions, np.array([bank.box(layout) for bank in banks]), bank_of)
    # Columns of numbers, for a tuple per connection would be an object to collect.
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
            raise ValueError(f"connection {number}, {connection.src!r} reads {connection.dst!r}: {error}") from None
    reads = collect.reads()
    _warn_of_idle_connections(topology, reads, [number for number, *_ in (*collect.framed, *collect.split)])
    return reads


def _warn_of_idle_connections(topology: CanvasTopology, reads: Reads, numbers: list[int]) -> None:
    """Says which of the connections ``numbers``, which offsets or a mask restrict, leave their pair of regions without
    a read. One of several may well find none: the frame before, of a region that has one frame."""
    count = reads.counts(len(topology.connections)).tolist()
    if all(count[number] for number in numbers):
        return
    reading = {(c.src, c.dst) for number, c in enumerate(topology.connections) if count[number]}
    named = (topology.connections[number] for number in sorted(numbers))
    idle = [c for c in named if (c.src, c.dst) not in reading]
    if idle:
        shown = some(f"{c.src!r} reads {c.dst!r} at t_src={c.t_src}, t_dst={c.t_dst}" for c in idle)
        warn(f"{len(idle)} of {len(topology.connections)} connections find nothing to read on this layout: {shown}")


class _Collector:
    """Gathers reads of the three kinds and numbers them in declaration order at the end."""

    def __init__(self, regions: np.ndarray, banks: np.ndarray, bank_of: dict[int, int]):
        """``regions``, ``banks``: boxes [n, D, 2]; ``bank_of``: region number to that of its bank."""
        self.regions, self.banks, self.bank_of = regions, banks, bank_of
        # of each read between whole regions: its connection, src and dst region, and weight
        self.whole: tuple[list[int], list[int], list[int], list[float]] = ([], [], [], [])
        self.framed: list[tuple] = []
        # of each masked connection: its number, the weights of its reads, and the read and the boxes of their parts
        self.split: list[tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []

    def keys(self, dst: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes [n, D, 2] of what is read in regions ``dst``, their banks where they have one; and where those are."""
        if not self.bank_of:
            return self.regions[dst], np.zeros(len(dst), bool)
        bank = np.array([self.bank_of.get(region, -1) for region in np.asarray(dst).tolist()])
        boxes = self.regions[dst]
        boxes[bank >= 0] = self.banks[bank[bank >= 0]]
        return boxes, bank >= 0

    def masked(self, number, src, dst, weight, frames: FrameReads, mask: MaskSpec) -> None:
        bank = self.bank_of.get(dst)
        regions = self.regions[src], self.regions[dst]
        row, read, q, k = mask_parts(mask, *regions, frames.queries, frames.keys, whole_keys=bank is not None)
        if bank is not None:
            k[:] = self.banks[bank]
        self.split.append((number, weight * frames.fraction[row], read, q, k))

    def reads(self) -> Reads:
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
        for number, weight, read, q, k in self.split:
            add(np.full(len(weight), number), weight, q, k, read)
        shape = (0, *self.regions.shape[1:])
        number = np.concatenate([np.zeros(0, np.int64), *numbers])
        order = np.argsort(number, kind="stable")
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        part_read = rank[np.concatenate([np.zeros(0, np.int64), *owner])]
        by_read = np.argsort(part_read, kind="stable")
        boxes, inverse = _unique_boxes(np.concatenate([np.zeros(shape, np.int64), *q_boxes, *k_boxes]))
        part_q, part_k = inverse[: len(part_read)], inverse[len(part_read) :]
        weight = np.concatenate([np.zeros(0), *weights])[order]
        return Reads(boxes, part_read[by_read], part_q[by_read], part_k[by_read], weight, number[order])


def _unique_boxes(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct boxes and, for each given one, its number among them."""
    flat = np.ascontiguousarray(boxes.reshape(len(boxes), boxes.shape[1] * 2))
    # one opaque value per row: np.unique(axis=0) compares field by field and is ten times slower
    rows = flat.view(np.dtype((np.void, flat.dtype.itemsize * flat.shape[1]))).ravel()
    _, first, inverse = np.unique(rows, return_index=True, return_inverse=True)
    return boxes[first], inverse.reshape(-1)
