"""BlockTable: which query rows attend to which key rows, in which softmax, with which weight.

The format suits attention whose pattern is a modest number of rectangles in a good order of positions: memory is
proportional to rectangles, never to pairs. ``kernels/README.md`` is the contract.
"""

from __future__ import annotations

import hashlib
import weakref
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from .autograd import apply_map, mark_for_compilers
from .derived import Store, derived, to_device
from .packing import RESOLVERS, IndexMap
from .ranges import clip_ranges, expand_ranges, runs_of
from .triton_ops.tiling import TileClass, Tiling, build_tilings

_LIVE: weakref.WeakValueDictionary[str, BlockTable] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class QueryRanges:
    """The query ranges of a table: maximal ranges of query rows that attend to the same keys in one segment.

    Range i holds query rows ``q_start[i] … q_stop[i] − 1`` of segment ``segment[i]``, whose first row has slot
    ``slot[i]``; its keys are those of the rectangles ``rectangle[ptr[i] : ptr[i + 1]]``, in ascending key order. All
    arrays are int64.
    """

    segment: np.ndarray
    q_start: np.ndarray
    q_stop: np.ndarray
    slot: np.ndarray
    ptr: np.ndarray
    rectangle: np.ndarray


@dataclass(frozen=True)
class SlotLayout:
    """Slots in slot order, on a device: for the gradient of gains.

    ``position`` int64 [n_slots], ``weight`` float32 [n_slots], ``replace`` int64 [n_slots] (0 adds, 1 replaces),
    ``per_edge`` int64 [n_edges] (slots of one edge are contiguous and edges ascend).
    """

    position: torch.Tensor
    weight: torch.Tensor
    replace: torch.Tensor
    per_edge: torch.Tensor


@dataclass(frozen=True, eq=False)
class BlockTable:
    """Rectangles of a block-sparse attention pattern, grouped in segments (one softmax per segment and query row).

    Build it with :meth:`from_rectangles`; ``kernels/README.md`` documents fields, dtypes and order. This loop gives the
    dense matrix of largest weights:

        for r in range(len(table.weight)):
            block = dense[table.q_start[r]:table.q_stop[r], table.k_start[r]:table.k_stop[r]]
            np.maximum(block, table.weight[r], out=block)

    >>> table = BlockTable.from_rectangles("edge", 4, 2, q_start=[0, 0], q_stop=[4, 2], k_start=[0, 2], k_stop=[2, 4],
    ...                                    segment=[0, 1], weight=[1.0, 0.5], edge=[0, 1])
    >>> table.pairs, table.n_slots
    (12, 6)
    >>> table.to_dense()
    array([[1. , 1. , 0.5, 0.5],
           [1. , 1. , 0.5, 0.5],
           [1. , 1. , 0. , 0. ],
           [1. , 1. , 0. , 0. ]])
    """

    form: str
    n_positions: int
    n_edges: int
    n_slots: int
    q_start: np.ndarray
    q_stop: np.ndarray
    k_start: np.ndarray
    k_stop: np.ndarray
    segment: np.ndarray
    weight: np.ndarray
    edge: np.ndarray
    replace: np.ndarray
    slot: np.ndarray
    store: Store = field(default_factory=Store, repr=False)

    @classmethod
    def from_rectangles(
        cls,
        form,
        n_positions,
        n_edges,
        *,
        q_start,
        q_stop,
        k_start,
        k_stop,
        weight,
        segment=None,
        edge=None,
        replace=None,
    ) -> BlockTable:
        """Checks, sorts and freezes rectangles (array-likes of one length R).

        ``form`` is "edge" (with ``segment`` and ``edge``, int [R], and optionally ``replace``, bool [R]) or "joint"
        (without). Within one segment the keys of a row must not repeat; this is not validated.

        Raises:
            ValueError: ranges that are empty or outside ``[0, n_positions)``, weights that are not finite and positive,
                or segments with several weights, edges or classes.
        """
        if form not in ("edge", "joint"):
            raise ValueError(f"form must be 'edge' or 'joint', got {form!r}")
        ranges = [np.asarray(a, dtype=np.int64).reshape(-1) for a in (q_start, q_stop, k_start, k_stop)]
        count = len(ranges[0])
        weight = np.asarray(weight, dtype=np.float32).reshape(-1)
        if form == "joint":
            if edge is not None or segment is not None or replace is not None:
                raise ValueError("joint form has one softmax per row: it takes no segment, edge or replace")
            segment = edge = np.zeros(count, np.int64)
        elif edge is None or segment is None:
            raise ValueError("edge form needs the segment and the edge of every rectangle")
        segment, edge = (np.asarray(a, dtype=np.int64).reshape(-1) for a in (segment, edge))
        replace = np.zeros(count, bool) if replace is None else np.asarray(replace, dtype=bool).reshape(-1)
        lengths = {"q_start": count, "q_stop": len(ranges[1]), "k_start": len(ranges[2]), "k_stop": len(ranges[3])}
        lengths |= {"segment": len(segment), "weight": len(weight), "edge": len(edge), "replace": len(replace)}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"rectangle arrays differ in length: {lengths}")
        if n_positions < 0 or n_positions >= 2**31:
            raise ValueError(f"n_positions must lie in [0, 2^31), got {n_positions}")
        for name, start, stop in (("q", *ranges[:2]), ("k", *ranges[2:])):
            bad = (start < 0) | (stop <= start) | (stop > n_positions)
            if bad.any():
                i = int(bad.argmax())
                raise ValueError(
                    f"rectangle {i}: {name} range [{start[i]}, {stop[i]}) is empty or outside [0, {n_positions})"
                )
        bad = ~(np.isfinite(weight) & (weight > 0))
        if bad.any():
            raise ValueError(f"rectangle {int(bad.argmax())}: weight {weight[bad.argmax()]} is not finite and positive")
        if count and (edge.min() < 0 or edge.max() >= max(n_edges, 1)):
            raise ValueError(f"edge numbers must lie in [0, {n_edges}), got {edge.min()} … {edge.max()}")
        if form == "edge":
            order = np.lexsort((ranges[2], ranges[0], segment, edge))
            # segments are renumbered along edges, so that the slots of an edge are contiguous
            segment = segment[order]
            fresh = np.ones(count, bool)
            fresh[1:] = (segment[1:] != segment[:-1]) | (edge[order][1:] != edge[order][:-1])
            segment_sorted = np.cumsum(fresh) - 1
            if len(np.unique(segment)) != int(fresh.sum()):
                raise ValueError("a segment's rectangles must share one edge")
        else:
            order = np.lexsort((ranges[2], ranges[0]))
            segment_sorted = np.zeros(count, np.int64)
        ranges = [a[order] for a in ranges]
        weight, edge, replace = weight[order], edge[order], replace[order]
        if form == "edge":
            same = segment_sorted[1:] == segment_sorted[:-1]
            if (same & ((weight[1:] != weight[:-1]) | (replace[1:] != replace[:-1]))).any():
                raise ValueError("a segment's rectangles must share one weight and one class")
            slot, n_slots = _assign_slots(segment_sorted, ranges[0], ranges[1])
        else:
            slot, n_slots = ranges[0].copy(), int(n_positions)
        if n_slots >= 2**31:
            raise ValueError(f"{n_slots} (segment, query row) pairs: the kernels address fewer than 2^31")
        names = ("q_start", "q_stop", "k_start", "k_stop", "segment", "edge")
        arrays: dict[str, Any] = {name: a.astype(np.int32) for name, a in zip(names, (*ranges, segment_sorted, edge))}
        arrays |= {"weight": weight, "replace": replace, "slot": slot}
        for array in arrays.values():
            array.setflags(write=False)
        mark_for_compilers()
        table = cls(form, int(n_positions), int(n_edges), int(n_slots), **arrays)
        return _LIVE.setdefault(table.key, table)

    def subtable(self, query_rows: np.ndarray, key_rows: np.ndarray) -> BlockTable:
        """Returns what is left of the rectangles for some queries and some keys, renumbered.

        Args:
            query_rows, key_rows: int64, ascending, distinct; other queries have no keys, and other keys do not count.

        Returns:
            A table over the union of both, in ascending order: its row i is ``np.union1d(query_rows, key_rows)[i]``.
            Connections and weights stay; equal numbers of rectangles where both are few runs of rows.

        >>> ranges = {"q_start": [0], "q_stop": [9], "k_start": [2], "k_stop": [8]}
        >>> table = BlockTable.from_rectangles("joint", 9, 1, **ranges, weight=[1])
        >>> table.subtable(np.array([7, 8]), np.array([0, 4, 5])).to_dense().tolist()[3]
        [0.0, 1.0, 1.0, 0.0, 0.0]
        """
        rows = np.union1d(query_rows, key_rows)
        owner, spans = np.arange(len(self.weight)), []
        for start, stop, own_rows in ((self.q_start, self.q_stop, query_rows), (self.k_start, self.k_stop, key_rows)):
            low, high = np.searchsorted(rows, start[owner]), np.searchsorted(rows, stop[owner])
            rectangle, _, *own = clip_ranges(low, high, *runs_of(np.searchsorted(rows, own_rows)))
            owner, spans = owner[rectangle], [span[rectangle] for span in spans] + own
        columns = dict(zip(("q_start", "q_stop", "k_start", "k_stop"), spans))
        columns |= {name: getattr(self, name)[owner] for name in ("weight", "segment", "edge", "replace")}
        if self.form == "joint":
            del columns["segment"], columns["edge"], columns["replace"]
        return BlockTable.from_rectangles(self.form, len(rows), self.n_edges, **columns)

    # Equal content is one object, so that derived values are shared; `lookup` works while the object is alive.
    def __deepcopy__(self, memo) -> BlockTable:
        return self

    def __reduce__(self):
        names = ("q_start", "q_stop", "k_start", "k_stop", "weight")
        if self.form == "edge":
            names += ("segment", "edge", "replace")
        return _rebuild, (self.form, self.n_positions, self.n_edges, {name: getattr(self, name) for name in names})

    @staticmethod
    def lookup(key: str) -> BlockTable:
        """Returns the live table with this :attr:`key`; KeyError if it has been garbage-collected."""
        table = _LIVE.get(key)
        if table is None:
            raise KeyError(
                f"no live BlockTable has the key {key}: keep the plan alive as long as functions compiled with it"
            )
        return table

    @cached_property
    def key(self) -> str:
        """Digest of the content, equal for equal tables in every process."""
        digest = hashlib.sha1(f"{self.form}/{self.n_positions}/{self.n_edges}".encode(), usedforsecurity=False)
        for array in (
            self.q_start,
            self.q_stop,
            self.k_start,
            self.k_stop,
            self.segment,
            self.weight,
            self.edge,
            self.replace,
        ):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    # -- sizes ---------------------------------------------------------------------------------------------------------

    @cached_property
    def pairs(self) -> int:
        """Number of (query, key) pairs, counted once per segment."""
        rows = (self.q_stop - self.q_start).astype(np.int64)
        return int(rows @ (self.k_stop - self.k_start).astype(np.int64))

    @property
    def density(self) -> float:
        """pairs / n_positions²: 1 for dense attention; may exceed 1 where segments overlap."""
        return self.pairs / max(self.n_positions, 1) ** 2

    @property
    def nbytes(self) -> int:
        """Bytes of the host arrays."""
        names = ("q_start", "q_stop", "k_start", "k_stop", "segment", "weight", "edge", "replace", "slot")
        return sum(getattr(self, name).nbytes for name in names)

    def flops(self, head_dim: int, batch_heads: int = 1, backward: bool = False) -> int:
        """Returns the floating-point operations: 4·head_dim per pair forward, 10·head_dim backward."""
        return self.pairs * head_dim * batch_heads * (10 if backward else 4)

    def to_dense(self) -> np.ndarray:
        """Returns float64 (n, n): the largest weight over rectangles that hold (i, j), 0 if none does. For tests."""
        dense = np.zeros((self.n_positions, self.n_positions))
        for q0, q1, k0, k1, w in zip(self.q_start, self.q_stop, self.k_start, self.k_stop, self.weight, strict=True):
            block = dense[q0:q1, k0:k1]
            np.maximum(block, w, out=block)
        return dense

    def __str__(self) -> str:
        head = f"BlockTable({self.form}, {self.n_positions} positions, {len(self.weight)} rectangles"
        return f"{head}, density {self.density:.4f})\n{self.draw()}"

    def draw(self, size: int = 32) -> str:
        """Draws the pattern in at most ``size`` × ``size`` characters: fraction of pairs as ` ░▒▓█`."""
        n = self.n_positions
        size = max(1, min(size, n))
        bounds = np.linspace(0, n, size + 1)
        n_pairs = np.zeros((size, size))

        def overlap(start, stop):
            return np.clip(np.minimum(stop, bounds[1:]) - np.maximum(start, bounds[:-1]), 0, None)

        for q0, q1, k0, k1 in zip(self.q_start, self.q_stop, self.k_start, self.k_stop, strict=True):
            rows, columns = overlap(q0, q1), overlap(k0, k1)
            i, j = rows.nonzero()[0], columns.nonzero()[0]
            n_pairs[i[0] : i[-1] + 1, j[0] : j[-1] + 1] += np.outer(rows[i], columns[j])
        fraction = n_pairs / max(n / size, 1e-9) ** 2
        shades = np.array(list(" ░▒▓█"))[np.minimum(np.ceil(fraction * 4), 4).astype(int)]
        return "\n".join("".join(row) for row in shades)

    # -- derived structures --------------------------------------------------------------------------------------------

    @derived(limit=1)
    def query_ranges(self) -> QueryRanges:
        """Returns the maximal ranges of query rows with equal keys, per segment."""
        stride = self.n_positions + 1
        base = self.segment.astype(np.int64) * stride
        first, stop = base + self.q_start, base + self.q_stop
        marks = np.unique(np.concatenate([first, stop]))
        low = np.searchsorted(marks, first)
        owner, run = expand_ranges(low, np.searchsorted(marks, stop) - low)
        order = np.lexsort((self.k_start[owner], run))
        owner, run = owner[order], run[order]
        runs, counts = np.unique(run, return_counts=True)
        ptr = np.concatenate([[0], np.cumsum(counts)])
        lead = owner[ptr[:-1]]
        q_start = marks[runs] - base[lead] if len(runs) else marks
        q_stop = marks[runs + 1] - base[lead] if len(runs) else marks
        slot = self.slot[lead] + (q_start - self.q_start[lead])
        return QueryRanges(self.segment[lead].astype(np.int64), q_start, q_stop, slot, ptr, owner)

    def has_keys(self) -> np.ndarray:
        """Returns bool [n]: rows with keys."""
        delta = np.zeros(self.n_positions + 1, np.int64)
        np.add.at(delta, self.q_start, 1)
        np.add.at(delta, self.q_stop, -1)
        return np.cumsum(delta[:-1]) > 0

    @derived(limit=1)
    def _runs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns (marks, rectangle, run): runs of rows with the same segments begin at ``marks``; segments' first
        rectangles and the runs that hold them, in order of runs."""
        ranges = self.query_ranges()
        lead = ranges.rectangle[ranges.ptr[:-1]]
        marks = np.unique(np.concatenate([[0, self.n_positions], ranges.q_start, ranges.q_stop]))
        low = np.searchsorted(marks, ranges.q_start)
        owner, run = expand_ranges(low, np.searchsorted(marks, ranges.q_stop) - low)
        order = np.argsort(run, kind="stable")
        return marks, lead[owner[order]], run[order]

    @derived(limit=1)
    def run_sums_map(self) -> IndexMap:
        """Returns the map from connections to (2 · runs) sums of their weights, those of adding segments first."""
        marks, rectangle, run = self._runs()
        count = len(marks) - 1
        output = self.replace[rectangle] * count + run
        order = np.argsort(output, kind="stable")
        offset = np.concatenate([[0], np.cumsum(np.bincount(output, minlength=2 * count))])
        return IndexMap.sums(self.edge[rectangle][order], offset, self.n_edges, self.weight[rectangle][order])

    @derived(limit=1)
    def run_rows_map(self) -> IndexMap:
        """Returns the map from runs of rows to rows."""
        marks, _, _ = self._runs()
        return IndexMap.gather(np.repeat(np.arange(len(marks) - 1), np.diff(marks)), len(marks) - 1)

    @derived(limit=1)
    def query_counts_map(self) -> IndexMap:
        """Returns the map from (2 · (n + 1)) running counts of rows, those of adding segments first, to the count of
        each rectangle's queries in its class."""
        first = self.replace.astype(np.int64) * (self.n_positions + 1)
        entry = np.stack([first + self.q_stop, first + self.q_start], 1)
        weight = np.tile([1.0, -1.0], len(entry))
        return IndexMap.sums(entry, 2 * np.arange(len(entry) + 1), 2 * (self.n_positions + 1), weight)

    @derived(limit=1)
    def edges_map(self) -> IndexMap:
        """Returns the map from connections to rectangles."""
        return IndexMap.gather(self.edge, self.n_edges)

    @derived(limit=1)
    def ends_map(self) -> IndexMap:
        """Returns the map from rectangles to (3 · (n + 1)) steps, whose running sums count the rectangles that hold
        each row as a query of an adding segment, as one of a replacing segment, and as a key."""
        n = self.n_positions + 1
        query = self.replace.astype(np.int64) * n
        target = np.concatenate([query + self.q_start, query + self.q_stop, 2 * n + self.k_start, 2 * n + self.k_stop])
        order = np.argsort(target, kind="stable")
        count = len(self.edge)
        weight = np.repeat([1.0, -1.0, 1.0, -1.0], count)[order]
        offset = np.concatenate([[0], np.cumsum(np.bincount(target, minlength=3 * n))])
        return IndexMap.sums(np.tile(np.arange(count), 4)[order], offset, count, weight)

    @derived(limit=8)
    def row_scale(self, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Returns the factors (2, n) of :func:`row_scale` with every connection active, on a device."""
        sums = np.zeros((2, self.n_positions + 1))
        ranges = self.query_ranges()
        lead = ranges.rectangle[ranges.ptr[:-1]]
        kind, weight = self.replace[lead].astype(np.int64), self.weight[lead].astype(np.float64)
        owner, position = expand_ranges(ranges.q_start, ranges.q_stop - ranges.q_start)
        np.add.at(sums, (kind[owner], position), weight[owner])
        return normalise_row_sums(torch.from_numpy(sums[:, :-1].copy())).to(device, dtype)

    @derived(limit=1)
    def row_scale_map(self) -> IndexMap:
        """Returns the (2 · n) factors of :meth:`row_scale` as a constant map."""
        return IndexMap.constant(self.row_scale(torch.device("cpu"), torch.float64).numpy())

    @derived(limit=4)
    def slot_layout(self, device: torch.device) -> SlotLayout:
        """Returns the slots as device tensors (edge form)."""
        ranges = self.query_ranges()
        lead = ranges.rectangle[ranges.ptr[:-1]]
        owner, position = expand_ranges(ranges.q_start, ranges.q_stop - ranges.q_start)
        order = np.argsort(ranges.slot[owner] + position - ranges.q_start[owner])
        owner, position = lead[owner[order]], position[order]
        arrays = (position, self.weight[owner], self.replace[owner].astype(np.int64))
        arrays += (np.bincount(self.edge[owner], minlength=self.n_edges),)
        return SlotLayout(*(to_device(a, device) for a in arrays))

    @derived(limit=4)
    def ones(self, device: torch.device) -> torch.Tensor:
        """Returns float32 (n_edges,) of 1: the default gains and activity."""
        return to_device(np.ones(max(self.n_edges, 1), np.float32), device)

    @derived(limit=16)
    def device_tilings(
        self,
        device: torch.device | str,
        classes: tuple[TileClass, ...],
        transposed: bool = False,
        by_slot: bool = False,
    ) -> tuple[Tiling, ...]:
        """Returns the tilings of one pass, one per launch (without empty ones), on ``device``."""
        return tuple(tiling.to(device) for tiling in build_tilings(self, classes, transposed, by_slot))


RESOLVERS["run sums"] = lambda key: BlockTable.lookup(key).run_sums_map()
RESOLVERS["run rows"] = lambda key: BlockTable.lookup(key).run_rows_map()
RESOLVERS["own scales"] = lambda key: BlockTable.lookup(key).row_scale_map()
RESOLVERS["query counts"] = lambda key: BlockTable.lookup(key).query_counts_map()
RESOLVERS["edges"] = lambda key: BlockTable.lookup(key).edges_map()
RESOLVERS["ends"] = lambda key: BlockTable.lookup(key).ends_map()


def row_sums(table: BlockTable, factor: torch.Tensor) -> torch.Tensor:
    """Returns Σ_r factor[e_r]·w_r over the segments of each row, (2, n): adding ones first, replacing ones second.

    ``factor`` (n_edges,), floating, gives the dtype and device of the result, and gets its gradient. Sums run in
    a fixed order.

    >>> table = BlockTable.from_rectangles("edge", 2, 1, q_start=[0], q_stop=[2], k_start=[0], k_stop=[1],
    ...                                    segment=[0], weight=[3.0], edge=[0])
    >>> row_sums(table, torch.tensor([0.5])).tolist()
    [[1.5, 1.5], [0.0, 0.0]]
    """
    if factor.shape != (table.n_edges,):
        raise ValueError(f"factor must be ({table.n_edges},), one entry per connection; got {tuple(factor.shape)}")
    sums = apply_map(factor[:, None], f"run sums:{table.key}", False, 0)
    return apply_map(sums.view(2, -1), f"run rows:{table.key}", False, 1)


def row_scale(
    table: BlockTable, active: torch.Tensor | None, dtype: torch.dtype, device: torch.device | None = None
) -> torch.Tensor:
    """Returns (2, n) factors that turn sums over segments into averages: see :func:`normalise_row_sums`.

    ``active`` (n_edges,): connections at 0 do not count; None for all, on ``device``.
    """
    if active is None:
        one = torch.ones(1, 1, dtype=dtype, device=device)
        return apply_map(one, f"own scales:{table.key}", False, 0).view(2, -1)
    return normalise_row_sums(row_sums(table, (active.detach() != 0).to(dtype)))


def touched(table: BlockTable, active: torch.Tensor | None, row_scale: torch.Tensor) -> torch.Tensor:
    """Returns bool (n,): rows that are a query or a key of an active segment.

    Active are segments whose connection is not 0 in ``active`` (n_edges,), or all for None, at query rows where
    ``row_scale`` (2, n) is above 0 for their class, adding or replacing.
    """
    if not table.n_slots:
        return torch.zeros(table.n_positions, dtype=torch.bool, device=row_scale.device)
    scaled = row_scale.detach() > 0
    counts = torch.nn.functional.pad(scaled.to(torch.float32).cumsum(1), (1, 0)).view(-1, 1)
    live = apply_map(counts, f"query counts:{table.key}", False, 0) > 0
    if active is not None:
        flags = (active.detach() != 0).to(torch.float32)[:, None]
        live = live & (apply_map(flags, f"edges:{table.key}", False, 0) > 0)
    steps = apply_map(live.to(torch.float32), f"ends:{table.key}", False, 0)
    queries_and_keys = steps.view(3, -1).cumsum(1)[:, :-1] > 0
    return (queries_and_keys[:2] & scaled).any(0) | queries_and_keys[2]


def _rebuild(form: str, n_positions: int, n_edges: int, arrays: dict[str, np.ndarray]) -> BlockTable:
    return BlockTable.from_rectangles(form, n_positions, n_edges, **arrays)


def normalise_row_sums(sums: torch.Tensor) -> torch.Tensor:
    """Turns weight sums (2, n) of adding and replacing segments into row scales (2, n).

    They are 1/ΣW of the class in force at each row, 0 for the other class and for rows without segments. The replacing
    class is in force where it has segments.
    """
    adding, replacing = sums
    replaced = replacing > 0
    zero = torch.zeros_like(adding)
    add_scale = torch.where(replaced | (adding <= 0), zero, 1.0 / adding)
    return torch.stack([add_scale, torch.where(replaced, 1.0 / replacing, zero)])


def _assign_slots(segment: np.ndarray, q_start: np.ndarray, q_stop: np.ndarray) -> tuple[np.ndarray, int]:
    """Assigns slots to rectangles sorted by (segment, q_start), consecutive along contiguous query rows."""
    if not len(segment):
        return np.zeros(0, np.int64), 0
    # running maximum of query rows per segment; offsets keep segments disjoint
    stride = int(q_stop.max()) + 1
    offset = segment * stride
    reach = np.maximum.accumulate(offset + q_stop)
    fresh = np.ones(len(segment), bool)
    fresh[1:] = offset[1:] + q_start[1:] > np.maximum(reach[:-1], offset[1:])
    fresh[1:] |= segment[1:] != segment[:-1]
    interval = np.cumsum(fresh) - 1
    interval_start = q_start[fresh]
    interval_stop = np.maximum.reduceat(q_stop, fresh.nonzero()[0])
    size = interval_stop - interval_start
    base = np.concatenate([[0], np.cumsum(size)])
    return base[interval] + q_start - interval_start[interval], int(base[-1])
