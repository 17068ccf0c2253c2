"""AttentionPlan: a compiled declaration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from canvas_kernels.block_table import BlockTable, row_scale, row_sums
from canvas_kernels.derived import Store, derived, to_device
from canvas_kernels.packing import IndexMap, gather_rows, scatter_rows
from canvas_kernels.triton_ops.tiling import TileClass, partial_width

from ..connectivity import Connection
from .attention_sets import Bank, Reads
from .index_sets import ReadSets, cell_sets, has_pairs, read_sets
from .ordering import PackedOrder
from .tables import edge_table, join_tables, joint_table

__all__ = ["AttentionPlan"]

_FILL_CLASSES = (TileClass(64, 64, 8.0), TileClass(16, 16, 1.0))


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """A declaration, compiled: which positions attend over which, in blocks. Immutable; make it with
    :func:`compile_attention`.

    Attributes:
        normalize: "edge" (a softmax per read, the dispatcher's form) or "joint" (one softmax per query, the masks'
            form).
        connections: the topology's connections as they run under the program; gains and activity are in their order.
        fns: the attention function that each connection resolves to.
        n_positions: N of the canvas, and the slots of all banks after them.
        table: the canvas_kernels.BlockTable over packed positions.
        order: int64 [n], the position at each packed place (read-only numpy), slots last; n ≤ N, for positions that no
            read uses have no packed place.
        banks: the slots through which regions with an identity are read.
        triggers: connection number to the trigger that has to hold for it to run.
        n_packed: n, the number of positions that some read uses.
        order_map: the IndexMap from canvas positions to packed places.
        replaces: whether some connection writes by replacing.
        by_fn: the plan of each function, where some function leaves out pairs of its reads; else empty.
        pairs: the table of the pairs that are left, where this is the plan of such a function.

    >>> from canvas_engineering import CanvasLayout, CanvasTopology, compile_attention
    >>> layout = CanvasLayout(T=1, d_model=8, spatial_shape=(4,), regions={"a": (0, 1, 0, 2), "b": (0, 1, 2, 4)})
    >>> plan = compile_attention(layout, CanvasTopology([Connection("a", "b")]))
    >>> plan.density, plan.flops(head_dim=4)
    (0.25, 64)
    """

    normalize: str
    connections: tuple[Connection, ...]
    fns: tuple[str, ...]
    n_positions: int
    table: BlockTable
    reads: Reads = field(repr=False)
    packed: PackedOrder = field(repr=False)
    banks: tuple[Bank, ...] = ()
    triggers: dict[int, str] = field(default_factory=dict)
    by_fn: Mapping[str, AttentionPlan] = field(default_factory=dict, repr=False)
    pairs: BlockTable | None = field(default=None, repr=False)
    order_map: IndexMap = field(init=False, repr=False)
    n_packed: int = field(init=False, repr=False)
    replaces: bool = field(init=False, repr=False)
    store: Store = field(default_factory=Store, init=False, repr=False)
    # index sets of attention functions and plans of some connections, by name: a compiler reads this plain dict
    index_sets: dict = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "order_map", IndexMap.gather(self.order, self.n_positions))
        # plain values: a compiler that traces a call would follow numpy arrays
        object.__setattr__(self, "n_packed", len(self.order))
        object.__setattr__(self, "replaces", bool(self.replace.any()))

    def __deepcopy__(self, memo) -> AttentionPlan:
        return self  # immutable; a copied model shares it

    def __getstate__(self) -> dict:
        return {**self.__dict__, "index_sets": {}}

    @property
    def order(self) -> np.ndarray:
        return self.packed.order

    @property
    def n_connections(self) -> int:
        return len(self.connections)

    @property
    def in_canvas_order(self) -> bool:
        """Whether packing changes nothing."""
        return self.order_map.is_identity

    @property
    def n_canvas(self) -> int:
        """N: the positions of the canvas alone, without slots."""
        return self.n_positions - sum(bank.size for bank in self.banks)

    # -- devices and orders --------------------------------------------------------------------------------------------

    @derived(limit=12)
    def rows(self, which: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """Returns index tensors, int64: ``which`` is "order" [n], "reading", the packed rows that have keys, or
        "written", their canvas positions."""
        reading = self.table.has_keys().nonzero()[0]
        return to_device({"order": self.order, "reading": reading, "written": self.order[reading]}[which], device)

    def to(self, device: torch.device | str) -> AttentionPlan:
        """Puts what execution needs on ``device`` ahead of the first step; the plan itself belongs to no device."""
        device = torch.device(device)
        self.order_map.rows(device)
        if self.normalize == "edge":
            self.table.row_scale(device, torch.float32)
        return self

    def over(self, positions: np.ndarray) -> AttentionPlan:
        """The same plan for a sequence that holds ``positions`` (int64 [m], distinct) of the canvas, in their order.

        Raises:
            ValueError: a position that some read uses is not among them.
        """
        place = np.full(self.n_positions, -1, np.int64)
        place[positions] = np.arange(len(positions))
        order = place[self.order]
        if (order < 0).any():
            lost = int(self.order[order < 0][0])
            raise ValueError(f"position {lost} is read or reads, but is not one of the {len(positions)} given")
        order.setflags(write=False)
        packed = dataclasses.replace(self.packed, order=order)
        return dataclasses.replace(self, n_positions=len(positions), packed=packed)

    def pack(self, x: torch.Tensor, dim: int = -2) -> torch.Tensor:
        """x (… N …) with its positions along ``dim`` in packed order (… n …); its gradient is a copy, not a scatter."""
        if x.shape[dim] != self.n_positions:
            raise ValueError(f"dimension {dim} of {tuple(x.shape)} must hold the canvas's {self.n_positions} positions")
        return gather_rows(x, self.order_map, dim)

    def unpack(self, y: torch.Tensor, dim: int = -2) -> torch.Tensor:
        """y (… n …) back in canvas order (… N …), zero at positions that no read uses."""
        if y.shape[dim] != self.n_packed:
            raise ValueError(
                f"dimension {dim} of {tuple(y.shape)} must hold the plan's {self.n_packed} packed positions"
            )
        return scatter_rows(y, self.order_map, dim)

    def row_scale(
        self, active: torch.Tensor | None, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> torch.Tensor:
        """Returns 1 / (sum of the weights in force) at each packed row, over all reads of the plan: (2, n).

        ``active`` (connections,): a connection at 0 does not count; None for all, on ``device``. Row 0 is for adding
        and gated reads, row 1 for replacing ones; where the latter are in force the former is 0, and both are 0 where
        nothing is attended to.
        """
        return row_scale(self.table, active, dtype, device)

    def row_share(self, factor: torch.Tensor, row_scale: torch.Tensor) -> torch.Tensor:
        """(n,) in factor's dtype: Σ_r factor·w_r·row_scale over the plan's reads at each packed row; differentiable."""
        return (row_sums(self.table, factor) * row_scale).sum(0)

    # -- families ------------------------------------------------------------------------------------------------------

    def for_fn(self, fn: str) -> AttentionPlan:
        """The same plan with the reads of one attention function only; packed order and connection numbers stay."""
        if fn not in self.fns:
            raise KeyError(f"no connection resolves to {fn!r}; the plan has {sorted(set(self.fns))}")
        if self.normalize != "edge":
            raise ValueError("joint form has one softmax over all connections: it cannot be taken apart by function")
        if fn in self.by_fn:
            return self.by_fn[fn]
        key = ("fn", fn)
        if key not in self.index_sets:
            self.index_sets[key] = self._of(np.array([name == fn for name in self.fns]))
        return self.index_sets[key]

    def for_connection(self, number: int) -> AttentionPlan:
        """The same plan with the reads of one connection only; packed order and connection numbers stay."""
        if self.normalize != "edge":
            raise ValueError("joint form has one softmax over all connections: it cannot be taken apart by connection")
        key = ("connection", number)
        if key not in self.index_sets:
            self.index_sets[key] = self._of(np.arange(self.n_connections) == number)
        return self.index_sets[key]

    def refined(self, by_fn: Mapping[str, AttentionPlan]) -> AttentionPlan:
        """This plan with the tables of ``by_fn``, one plan for each function that has reads: what counts where. Itself
        if they are those of :meth:`for_fn`."""
        if all(self.for_fn(fn) is plan for fn, plan in by_fn.items()):
            return self
        table = join_tables([plan.table for plan in by_fn.values()])
        return dataclasses.replace(self, table=table, by_fn=dict(by_fn))

    def sets(self) -> ReadSets:
        """The reads as lists of rows, cached. ValueError where the queries of a read see different keys."""
        if "sets" not in self.index_sets:
            self.index_sets["sets"] = read_sets(self.reads, self.packed, self.n_canvas)
        return self.index_sets["sets"]

    def row_sets(self) -> ReadSets:
        """:meth:`sets`, or, where the queries of a read see different keys, such reads split until they see the same;
        cached."""
        if not has_pairs(self.reads):
            return self.sets()
        if "row sets" not in self.index_sets:
            self.index_sets["row sets"] = cell_sets(self.table)
        return self.index_sets["row sets"]

    def _of(self, chosen: np.ndarray) -> AttentionPlan:
        reads = self.reads.of(chosen)
        if len(reads.weight) == len(self.reads.weight):
            return self
        table = edge_table(reads, self.packed, self.n_connections, self.replace)
        return dataclasses.replace(self, table=table, reads=reads, by_fn={}, pairs=None)

    @property
    def replace(self) -> np.ndarray:
        """bool [connections]: which ones write by replacing."""
        return np.array([c.write_mode == "replace" for c in self.connections], dtype=bool)

    # -- what a plan says without touching a device --------------------------------------------------------------------

    @property
    def density(self) -> float:
        """Selected pairs (once per softmax) over N²."""
        return self.table.pairs / max(self.n_positions, 1) ** 2

    @property
    def fill(self) -> float:
        """Selected pairs over the pairs that 64 × 64 and 16 × 16 tiles walk to cover them: 1 when no tile is part
        empty."""
        if "fill" not in self.index_sets:
            tilings = self.table.device_tilings("cpu", _FILL_CLASSES)
            walked = sum(tiling.walked for tiling in tilings)
            self.index_sets["fill"] = self.table.pairs / walked if walked else 1.0
        return self.index_sets["fill"]

    @property
    def fill_by_tile(self) -> dict[str, float]:
        """The fill of the tiles of each size that the plan is cut into, as in ``{"64 × 64": 0.9, "16 × 16": 0.5}``."""
        tilings = self.table.device_tilings("cpu", _FILL_CLASSES)
        return {f"{t.block_m} × {t.block_n}": t.pairs / t.walked for t in tilings if t.walked}

    def work_by_connection(self) -> dict[str, np.ndarray]:
        """What each connection's part of the table costs, in edge form.

        Returns:
            int64 [connections] each: "rectangles", "pairs", their selected pairs, and "walked", the pairs that tiles
            walk to cover them. Pairs over walked is the connection's fill.

        Raises:
            ValueError: a plan in joint form, whose rectangles belong to no one connection.
        """
        if self.normalize != "edge":
            raise ValueError("joint form has one softmax over all connections: its rectangles belong to none of them")
        table, n = self.table, self.n_connections
        walked = np.zeros(n, np.int64)
        for tiling in table.device_tilings("cpu", _FILL_CLASSES):
            _, n_full, _, n_partial, _, _, edge, _ = tiling.segments.numpy().T.astype(np.int64)
            keys = n_full * tiling.block_n + n_partial * partial_width(tiling.block_n)
            np.add.at(walked, edge, keys * tiling.block_m)
        pairs = np.zeros(n, np.int64)
        np.add.at(pairs, table.edge, (table.q_stop - table.q_start) * (table.k_stop - table.k_start))
        return {"rectangles": np.bincount(table.edge, minlength=n), "pairs": pairs, "walked": walked}

    @property
    def table_bytes(self) -> int:
        """Bytes of the walks, forward and transposed, at those tile sizes."""
        both = (self.table.device_tilings("cpu", _FILL_CLASSES, transposed) for transposed in (False, True))
        return sum(tiling.nbytes for tilings in both for tiling in tilings)

    def flops(self, head_dim: int, batch_heads: int = 1, backward: bool = False) -> int:
        """Operations of the selected pairs: 4·head_dim each forward, 10·head_dim backward."""
        return self.table.flops(head_dim, batch_heads, backward)

    def rows_with_keys(self) -> np.ndarray:
        """bool [N], canvas order: positions that some read gives a key; the others pass through."""
        rows = np.zeros(self.n_positions, bool)
        rows[self.order] = self.table.has_keys()
        return rows

    def to_dense(self) -> np.ndarray:
        """(N, N) float64 in canvas order: the joint matrix M, the largest weight over the reads of each pair, without
        the pairs that a function leaves out. For tests."""
        if self.by_fn:
            return np.maximum.reduce([plan.to_dense() for plan in self.by_fn.values()])
        table = self.table if self.normalize == "joint" else self.pairs or joint_table(self.reads, self.packed)
        dense = np.zeros((self.n_positions, self.n_positions))
        dense[np.ix_(self.order, self.order)] = table.to_dense()
        return dense

    def summary(self) -> str:
        """What the plan costs, in words.

        >>> from canvas_engineering import CanvasLayout, CanvasTopology, compile_attention
        >>> layout = CanvasLayout(T=2, H=4, W=4, d_model=8, regions={"a": (0, 2, 0, 4, 0, 2)})
        >>> print(compile_attention(layout, CanvasTopology.dense(["a"])).summary())
        AttentionPlan, edge form: 32 positions (16 read something), 1 connections, 1 reads, 1 rectangles
          density 25.00 %, tile fill 100.00 %, 0.1 MFLOP forward and 0.2 backward per head of 64
          tables 0.2 KiB, 16 log-sum-exp slots
        """
        table, reading = self.table, int(self.table.has_keys().sum())
        forward, backward = (self.flops(64, backward=b) / 1e6 for b in (False, True))
        return (
            f"AttentionPlan, {self.normalize} form: {self.n_positions} positions ({reading} read something), "
            f"{self.n_connections} connections, {len(self.reads.weight)} reads, {len(table.weight)} rectangles\n"
            f"  density {100 * self.density:.2f} %, tile fill {100 * self.fill:.2f} %, "
            f"{forward:.1f} MFLOP forward and {backward:.1f} backward per head of 64\n"
            f"  tables {self.table_bytes / 1024:.1f} KiB, {table.n_slots} log-sum-exp slots"
        )

    def __str__(self) -> str:
        return f"{self.summary()}\n{self.table.draw()}"

    def __repr__(self) -> str:
        return f"<{self.summary().splitlines()[0]}>"

    def _repr_html_(self) -> str:
        from canvas_engineering.notebook import plan_html

        return plan_html(self)
