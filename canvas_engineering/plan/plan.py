"""AttentionPlan: a compiled declaration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from canvas_kernels.block_table import BlockTable, row_scale, row_sums
from canvas_kernels.derived import Store, derived, to_device
from canvas_kernels.packing import IndexMap, gather_rows, scatter_rows
from canvas_kernels.triton_ops.tiling import TileClass, partial_width

from ..connectivity import Connection
from .attention_sets import AttentionSets, SlotBank
from .index_sets import RowSets, has_pairs, row_sets, uniform_row_sets
from .ordering import PackedOrder
from .tables import edge_table, join_tables, joint_table

if TYPE_CHECKING:
    from ..parallel.shards import ShardedPlan

__all__ = ["AttentionPlan"]

_FILL_CLASSES = (TileClass(64, 64, 8.0), TileClass(16, 16, 1.0))


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """A compiled declaration: which positions attend to which, as tables. Immutable; made by
    :func:`compile_attention`.

    Attributes:
        normalize: "edge" (one softmax per attention set, the dispatcher's form) or "joint" (one softmax per query).
        connections: the topology's connections as they run under the program; gains and activity follow their order.
        fns: the attention function that each connection resolves to.
        n_positions: N of the canvas plus the slots of all slot banks.
        table: the canvas_kernels.BlockTable over packed positions.
        attention_sets: the attention sets that connections resolve to.
        order: int64 [n], the canvas position of each packed row (read-only numpy), slots last; n ≤ N, since positions
            that no attention set uses have no packed row.
        slot_banks: the slots that stand for the keys of regions with an identity.
        triggers: connection number to the trigger that has to hold for it to run.
        n_packed: n, the number of positions that some attention set uses.
        order_map: the IndexMap from canvas positions to packed rows.
        replaces: whether some connection has the write mode "replace".
        by_fn: the plan of each function, where some function drops pairs of its attention sets; else empty.
        pairs: the table of the remaining pairs, where this is the plan of such a function.

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
    attention_sets: AttentionSets = field(repr=False)
    packed: PackedOrder = field(repr=False)
    slot_banks: tuple[SlotBank, ...] = ()
    triggers: dict[int, str] = field(default_factory=dict)
    by_fn: Mapping[str, AttentionPlan] = field(default_factory=dict, repr=False)
    pairs: BlockTable | None = field(default=None, repr=False)
    order_map: IndexMap = field(init=False, repr=False)
    n_packed: int = field(init=False, repr=False)
    replaces: bool = field(init=False, repr=False)
    store: Store = field(default_factory=Store, init=False, repr=False)
    # index sets of attention functions and plans of some connections, by name: a plain dict, which compilers can trace
    index_sets: dict = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "order_map", IndexMap.gather(self.order, self.n_positions))
        # plain values: compilers cannot trace the numpy arrays that they come from
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
        """Whether the packed order is the canvas order."""
        return self.order_map.is_identity

    @property
    def n_canvas(self) -> int:
        """N: the positions of the canvas alone, without slots."""
        return self.n_positions - sum(bank.size for bank in self.slot_banks)

    # -- devices and orders --------------------------------------------------------------------------------------------

    @derived(limit=12)
    def rows(self, which: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """Returns index tensors, int64: ``which`` is "order" [n], "queries", the packed rows that have keys, or
        "written", their canvas positions."""
        queries = self.table.has_keys().nonzero()[0]
        return to_device({"order": self.order, "queries": queries, "written": self.order[queries]}[which], device)

    def to(self, device: torch.device | str) -> AttentionPlan:
        """Moves the tensors that execution needs to ``device`` ahead of the first step."""
        device = torch.device(device)
        self.order_map.rows(device)
        if self.normalize == "edge":
            self.table.row_scale(device, torch.float32)
        return self

    def reindex(self, positions: np.ndarray) -> AttentionPlan:
        """Returns the plan for a sequence of ``positions`` (int64 [m], distinct) of the canvas, in their order.

        Raises:
            ValueError: a position that some attention set uses is missing.
        """
        index = np.full(self.n_positions, -1, np.int64)
        index[positions] = np.arange(len(positions))
        order = index[self.order]
        if (order < 0).any():
            lost = int(self.order[order < 0][0])
            raise ValueError(f"the plan uses position {lost}, which is not one of the {len(positions)} given")
        order.setflags(write=False)
        packed = dataclasses.replace(self.packed, order=order)
        return dataclasses.replace(self, n_positions=len(positions), packed=packed)

    def pack(self, x: torch.Tensor, dim: int = -2) -> torch.Tensor:
        """Permutes x (… N …) along ``dim`` to packed order (… n …); its gradient is a copy, not a scatter."""
        if x.shape[dim] != self.n_positions:
            raise ValueError(f"dimension {dim} of {tuple(x.shape)} must hold the canvas's {self.n_positions} positions")
        return gather_rows(x, self.order_map, dim)

    def unpack(self, y: torch.Tensor, dim: int = -2) -> torch.Tensor:
        """Permutes y (… n …) back to canvas order (… N …), with zeros at positions that no attention set uses."""
        if y.shape[dim] != self.n_packed:
            raise ValueError(
                f"dimension {dim} of {tuple(y.shape)} must hold the plan's {self.n_packed} packed positions"
            )
        return scatter_rows(y, self.order_map, dim)

    def row_scale(
        self, active: torch.Tensor | None, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> torch.Tensor:
        """Returns 1 / (sum of the weights in force) at each packed row, over all attention sets of the plan: (2, n).

        ``active`` (connections,): a connection at 0 does not count; None for all, on ``device``. Row 0 is for the
        write modes add and gate, row 1 for replace; where the latter is in force the former is 0, and both are 0 for
        rows without keys.
        """
        return row_scale(self.table, active, dtype, device)

    def row_weight_fraction(self, factor: torch.Tensor, row_scale: torch.Tensor) -> torch.Tensor:
        """Returns (n,) in factor's dtype: Σ_r factor·w_r·row_scale over the sets r of each packed row;
        differentiable."""
        return (row_sums(self.table, factor) * row_scale).sum(0)

    # -- parts of a plan -----------------------------------------------------------------------------------------------

    def for_fn(self, fn: str) -> AttentionPlan:
        """Returns the plan of one attention function's connections; packed order and connection numbers stay."""
        if fn not in self.fns:
            raise KeyError(f"no connection resolves to {fn!r}; the plan has {sorted(set(self.fns))}")
        if self.normalize != "edge":
            raise ValueError("joint form has one softmax over all connections: it cannot be split by function")
        if fn in self.by_fn:
            return self.by_fn[fn]
        key = ("fn", fn)
        if key not in self.index_sets:
            self.index_sets[key] = self._select(np.array([name == fn for name in self.fns]))
        return self.index_sets[key]

    def for_connection(self, number: int) -> AttentionPlan:
        """Returns the plan of one connection; packed order and connection numbers stay."""
        if self.normalize != "edge":
            raise ValueError("joint form has one softmax over all connections: it cannot be split by connection")
        key = ("connection", number)
        if key not in self.index_sets:
            self.index_sets[key] = self._select(np.arange(self.n_connections) == number)
        return self.index_sets[key]

    def with_function_plans(self, by_fn: Mapping[str, AttentionPlan]) -> AttentionPlan:
        """Returns this plan with the tables of ``by_fn``, one plan for each function; self if they are those of
        :meth:`for_fn`."""
        if all(self.for_fn(fn) is plan for fn, plan in by_fn.items()):
            return self
        table = join_tables([plan.table for plan in by_fn.values()])
        return dataclasses.replace(self, table=table, by_fn=dict(by_fn))

    def row_sets(self) -> RowSets:
        """Returns the attention sets as lists of rows, cached.

        Raises:
            ValueError: the queries of a set attend to different keys.
        """
        if "row sets" not in self.index_sets:
            self.index_sets["row sets"] = row_sets(self.attention_sets, self.packed, self.n_canvas)
        return self.index_sets["row sets"]

    def uniform_row_sets(self) -> RowSets:
        """Returns :meth:`row_sets`, or, where the queries of a set attend to different keys, such sets split until
        their queries attend to the same keys; cached."""
        if not has_pairs(self.attention_sets):
            return self.row_sets()
        if "uniform row sets" not in self.index_sets:
            self.index_sets["uniform row sets"] = uniform_row_sets(self.table)
        return self.index_sets["uniform row sets"]

    def shard(self, *, rows: int = 1, heads: int = 1, cut: Any = "balanced", width: int = 1024) -> ShardedPlan:
        """Cuts the plan over ranks: :func:`canvas_attention` takes ``plan.shard(rows=4).on(mesh)`` too.

        Args:
            rows: number of shards of rows.
            heads: number of ranks that share the heads of a shard; any number of heads over any number of ranks.
            cut: which rank holds which positions: "balanced" (shards of equal work, and few rows that move), "by_rows"
                (equal numbers, in packed order), an owner array (int [N], the rank of each position, row · heads +
                head), or a sequence with each rank's positions, in the order of its tensors.
            width: of the model, for "balanced": a row counts 24 · width² operations, a pair 4 · width.

        Raises:
            ValueError: numbers below 1, or a cut that does not give every position to one rank.
        """
        from ..parallel.shards import ShardedPlan

        return ShardedPlan.cut(self, rows, heads, cut, width)

    def _select(self, connections: np.ndarray) -> AttentionPlan:
        sets = self.attention_sets.of(connections)
        if len(sets.weight) == len(self.attention_sets.weight):
            return self
        table = edge_table(sets, self.packed, self.n_connections, self.replace)
        return dataclasses.replace(self, table=table, attention_sets=sets, by_fn={}, pairs=None)

    @property
    def replace(self) -> np.ndarray:
        """bool [connections]: whose write mode is "replace"."""
        return np.array([c.write_mode == "replace" for c in self.connections], dtype=bool)

    # -- statistics, on the host ---------------------------------------------------------------------------------------

    @property
    def density(self) -> float:
        """Number of (query, key) pairs, counted once per softmax, over N²."""
        return self.table.pairs / max(self.n_positions, 1) ** 2

    @property
    def fill(self) -> float:
        """Number of pairs over the pairs in the 64 × 64 and 16 × 16 tiles that cover them; 1 if all tiles are full."""
        if "fill" not in self.index_sets:
            tilings = self.table.device_tilings("cpu", _FILL_CLASSES)
            walked = sum(tiling.walked for tiling in tilings)
            self.index_sets["fill"] = self.table.pairs / walked if walked else 1.0
        return self.index_sets["fill"]

    @property
    def fill_by_tile(self) -> dict[str, float]:
        """Fill by tile size, as in ``{"64 × 64": 0.9, "16 × 16": 0.5}``."""
        tilings = self.table.device_tilings("cpu", _FILL_CLASSES)
        return {f"{t.block_m} × {t.block_n}": t.pairs / t.walked for t in tilings if t.walked}

    def work_by_connection(self) -> dict[str, np.ndarray]:
        """Returns what each connection costs, in edge form.

        Returns:
            int64 [connections] each: "rectangles", "pairs", and "walked", the pairs in the tiles that cover them. Pairs
            over walked is the connection's fill.

        Raises:
            ValueError: a plan in joint form, whose rectangles belong to no single connection.
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
        """Bytes of the tilings, forward and transposed, at those tile sizes."""
        both = (self.table.device_tilings("cpu", _FILL_CLASSES, transposed) for transposed in (False, True))
        return sum(tiling.nbytes for tilings in both for tiling in tilings)

    def flops(self, head_dim: int, batch_heads: int = 1, backward: bool = False) -> int:
        """Returns floating-point operations: 4·head_dim per pair forward, 10·head_dim backward."""
        return self.table.flops(head_dim, batch_heads, backward)

    def rows_with_keys(self) -> np.ndarray:
        """Returns bool [N], canvas order: positions that have keys; the others pass through."""
        rows = np.zeros(self.n_positions, bool)
        rows[self.order] = self.table.has_keys()
        return rows

    def to_dense(self) -> np.ndarray:
        """Returns the joint matrix M, float64 (N, N) in canvas order: the largest weight over the attention sets of
        each pair, without pairs that a function drops. For tests."""
        if self.by_fn:
            return np.maximum.reduce([plan.to_dense() for plan in self.by_fn.values()])
        table = self.table if self.normalize == "joint" else self.pairs or joint_table(self.attention_sets, self.packed)
        dense = np.zeros((self.n_positions, self.n_positions))
        dense[np.ix_(self.order, self.order)] = table.to_dense()
        return dense

    def summary(self) -> str:
        """Returns the plan's sizes and costs as text.

        >>> from canvas_engineering import CanvasLayout, CanvasTopology, compile_attention
        >>> layout = CanvasLayout(T=2, H=4, W=4, d_model=8, regions={"a": (0, 2, 0, 4, 0, 2)})
        >>> print(compile_attention(layout, CanvasTopology.dense(["a"])).summary())
        AttentionPlan, edge form: 32 positions (16 with keys), 1 connections, 1 attention sets, 1 rectangles
          density 25.00 %, tile fill 100.00 %, 0.1 MFLOP forward and 0.2 backward per head of 64
          tables 0.2 KiB, 16 log-sum-exp rows
        """
        table, n_queries = self.table, int(self.table.has_keys().sum())
        forward, backward = (self.flops(64, backward=b) / 1e6 for b in (False, True))
        return (
            f"AttentionPlan, {self.normalize} form: {self.n_positions} positions ({n_queries} with keys), "
            f"{self.n_connections} connections, {len(self.attention_sets.weight)} attention sets, "
            f"{len(table.weight)} rectangles\n"
            f"  density {100 * self.density:.2f} %, tile fill {100 * self.fill:.2f} %, "
            f"{forward:.1f} MFLOP forward and {backward:.1f} backward per head of 64\n"
            f"  tables {self.table_bytes / 1024:.1f} KiB, {table.n_slots} log-sum-exp rows"
        )

    def __str__(self) -> str:
        return f"{self.summary()}\n{self.table.draw()}"

    def __repr__(self) -> str:
        return f"<{self.summary().splitlines()[0]}>"

    def _repr_html_(self) -> str:
        from canvas_engineering.notebook import plan_html

        return plan_html(self)
