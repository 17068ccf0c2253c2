"""Connections → reads, as boxes: who attends over whom, in one softmax each, never as pairs of positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..canvas import CanvasLayout
from ..connectivity import CanvasTopology, resolve_connections, resolve_frames
from ..masks import MaskSpec, pattern_cover, split_boxes


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
        part_read: int64 [P], non-decreasing. part_q, part_k: int64 [P], rows of ``boxes``.
        weight: float64 [R], > 0. connection: int64 [R], non-decreasing, the connection's place in the topology.
    """

    boxes: np.ndarray
    part_read: np.ndarray
    part_q: np.ndarray
    part_k: np.ndarray
    weight: np.ndarray
    connection: np.ndarray

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
            one UserWarning tells of all of them.
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
        whole = mask is None or mask.kind == "full"
        offsets = (None, None) if dense_in_time else (connection.t_src, connection.t_dst)
        if whole and offsets == (None, None):
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
        if whole:
            collect.framed.append((number, src, dst, connection.weight, frames))
            continue
        try:
            collect.masked(number, src, dst, connection.weight, frames, mask)
        except ValueError as error:
            raise ValueError(f"connection {number}, {connection.src!r} reads {connection.dst!r}: {error}") from None
    return collect.reads()


class _Collector:
    """Gathers reads of the three kinds and numbers them in declaration order at the end."""

    def __init__(self, regions: np.ndarray, banks: np.ndarray, bank_of: dict[int, int]):
        """``regions``, ``banks``: boxes [n, D, 2]; ``bank_of``: region number to that of its bank."""
        self.regions, self.banks, self.bank_of = regions, banks, bank_of
        # of each read between whole regions: its connection, src and dst region, and weight
        self.whole: tuple[list[int], list[int], list[int], list[float]] = ([], [], [], [])
        self.framed: list[tuple] = []
        # one entry per read of a masked connection: (connection, weight, q boxes [n, D, 2], k boxes [n, D, 2])
        self.split: list[tuple[int, float, np.ndarray, np.ndarray]] = []

    def keys(self, dst: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes [n, D, 2] of what is read in regions ``dst``, their banks where they have one; and where those are."""
        if not self.bank_of:
            return self.regions[dst], np.zeros(len(dst), bool)
        bank = np.array([self.bank_of.get(region, -1) for region in np.asarray(dst).tolist()])
        boxes = self.regions[dst]
        boxes[bank >= 0] = self.banks[bank[bank >= 0]]
        return boxes, bank >= 0

    def masked(self, number, src, dst, weight, frames, mask: MaskSpec) -> None:
        q_region, k_region = self.regions[src], self.regions[dst]
        bank = self.bank_of.get(dst)
        if mask.kind == "sparse":
            cover = pattern_cover(mask, tuple(np.diff(q_region).ravel()), tuple(np.diff(k_region).ravel()))
        for i in range(len(frames)):
            q_box, k_box = q_region.copy(), k_region.copy()
            q_box[0] = frames.q_start[i], frames.q_stop[i]
            k_box[0] = frames.k_start[i], frames.k_stop[i]
            read_weight = weight * frames.fraction[i]
            if mask.kind == "tile":
                for q_tile, k_tile in zip(*split_boxes(mask, q_box, k_box), strict=True):
                    k_tile = k_tile if bank is None else self.banks[bank]
                    self.split.append((number, read_weight, q_tile[None], k_tile[None]))
            elif cover.pair:
                rects = cover.rects if bank is None else _any_key(cover.rects, k_region, k_box)
                pairs = list(_pair_boxes(rects, q_region, k_region, q_box, k_box))
                if pairs and bank is not None:
                    # one part for each box of queries: all of them see the whole bank
                    pairs = [(box, self.banks[bank]) for box in {box.tobytes(): box for box, _ in pairs}.values()]
                if pairs:
                    q_boxes, k_boxes = zip(*pairs, strict=True)
                    self.split.append((number, read_weight, np.array(q_boxes), np.array(k_boxes)))
            else:
                k_boxes = cover.k_boxes + k_region[:, :1]
                k_boxes[:, 0] = np.clip(k_boxes[:, 0], *k_box[0])
                k_boxes = k_boxes[k_boxes[:, 0, 0] < k_boxes[:, 0, 1]]
                if bank is not None:
                    k_boxes = self.banks[[bank] if len(k_boxes) else []]
                if len(k_boxes):
                    self.split.append((number, read_weight, np.repeat(q_box[None], len(k_boxes), 0), k_boxes))

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
        if self.split:
            number, weight, q, k = zip(*self.split, strict=True)
            own = np.repeat(np.arange(len(q)), [len(boxes) for boxes in q])
            add(np.array(number), np.array(weight), np.concatenate(q), np.concatenate(k), own)
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


def _any_key(rects: np.ndarray, k_region: np.ndarray, k_box: np.ndarray) -> np.ndarray:
    """[n, 2, 2]: the queries that have a key in the frames of ``k_box``, as disjoint ranges, and all keys for each."""
    volume = int(np.prod(np.diff(k_region[1:])))
    low, high = (k_box[0] - k_region[0, 0]) * volume
    held = rects[(rects[:, 1, 0] < high) & (rects[:, 1, 1] > low), 0]
    joined: list[list[int]] = []
    for start, stop in sorted(held.tolist()):
        if joined and start <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], stop)
        else:
            joined.append([start, stop])
    return np.array([[queries, [low, high]] for queries in joined], dtype=np.int64).reshape(-1, 2, 2)


def _pair_boxes(rects, q_region, k_region, q_box, k_box):
    """The boxes of a pattern over (src position, dst position) that fall into the frames of one read."""
    q_volume, k_volume = (int(np.prod(np.diff(region[1:]))) for region in (q_region, k_region))
    q_low, q_high = (q_box[0] - q_region[0, 0]) * q_volume
    k_low, k_high = (k_box[0] - k_region[0, 0]) * k_volume
    for (i0, i1), (j0, j1) in rects.tolist():
        q_parts = _range_boxes(q_region, max(i0, q_low), min(i1, q_high))
        k_parts = _range_boxes(k_region, max(j0, k_low), min(j1, k_high))
        for q_part in q_parts:
            for k_part in k_parts:
                yield q_part, k_part


def _range_boxes(region: np.ndarray, low: int, high: int) -> list[np.ndarray]:
    """Boxes that together are the elements ``low … high − 1`` of the region's row-major list."""
    if low >= high:
        return []
    if len(region) == 1:
        return [np.array([[region[0, 0] + low, region[0, 0] + high]])]
    volume = int(np.prod(np.diff(region[1:])))
    first, last = -(-low // volume), high // volume
    slabs: list[tuple[int, int, np.ndarray]] = []
    if first > last:  # inside one slab
        slabs = [(last, last + 1, part) for part in _range_boxes(region[1:], low - last * volume, high - last * volume)]
    else:
        slabs += [
            (first - 1, first, p) for p in _range_boxes(region[1:], low - (first - 1) * volume, volume) if low % volume
        ]
        slabs += [(first, last, region[1:])] if first < last else []
        slabs += [(last, last + 1, p) for p in _range_boxes(region[1:], 0, high - last * volume)]
    return [np.concatenate([[[region[0, 0] + a, region[0, 0] + b]], inner]) for a, b, inner in slabs]
