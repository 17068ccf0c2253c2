"""Functions that make a memory of the keys, which queries then read: the memory is made once for each set of keys."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from canvas_kernels.autograd import mark_for_compilers
from canvas_kernels.packing import IndexMap, gather_rows, scatter_rows

from ..checked import checked_read
from ..derived_buffers import CanvasModule
from ..plan import AttentionPlan
from .grouped import QueryPlaces, canvas_of, coefficients, from_reads, only, query_places, rows_of, to_reads
from .softmax import project_out


class MemoryAttention(CanvasModule):
    """out_projection(respond(query_features(x_q), summarise(key_features(x_k)))), the four of a subclass's own.

    What depends on one position alone (the features) is computed once per position, whatever number of reads hold it;
    ``summarise`` once for each distinct set of keys; the output projection once per position, after the weighted sum.

    Class attributes:
        takes_pairs: each query is served by itself and the order of keys does not count, so that masks of (query, key)
            pairs may split a read into smaller ones.
        causal: query i reads the first i + 1 rows of the memory at most, and these depend on as many keys.
    """

    takes_pairs = False
    causal = False
    out_proj: nn.Linear

    def __init__(self) -> None:
        super().__init__()
        # of scans that run without a plan
        mark_for_compilers()

    def key_features(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """(…, d_model), twice → (…, F), position by position."""
        raise NotImplementedError

    def summarise(self, features: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        """The features of a read's keys, (B, m, F) → its memory (B, rows, M). ``backend`` as for
        :func:`canvas_attention`."""
        raise NotImplementedError

    def query_features(self, queries: torch.Tensor) -> torch.Tensor:
        """(…, d_model) → (…, Q), position by position."""
        raise NotImplementedError

    def respond(self, features: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """The features of a read's queries, (B, n, Q), and its memory → (B, n, d_model)."""
        raise NotImplementedError

    @property
    def out_projection(self) -> nn.Linear:
        """The last layer."""
        return self.out_proj

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """One read: queries (B, n, d_model) over keys and values (B, m, d_model), in order → (B, n, d_model)."""
        checked_read(queries, keys, values)
        if self.causal:
            keys, values = keys[:, : queries.shape[1]], values[:, : queries.shape[1]]
        memory = self.summarise(self.key_features(keys, values))
        return self.out_projection(self.respond(self.query_features(queries), memory))

    def prepare(self, plan: AttentionPlan) -> None:
        """Makes the index sets of ``plan``."""
        shared_memories(plan)

    def attend(
        self,
        x: torch.Tensor,
        plan: AttentionPlan,
        *,
        gain: torch.Tensor | None = None,
        active: torch.Tensor | None = None,
        row_scale: torch.Tensor | None = None,
        bias_share: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> torch.Tensor:
        """Every read of ``plan``, one call for all memories of a length and one for all reads of a shape; arguments and
        result as for :meth:`CrossAttention.attend`."""
        found = shared_memories(plan)
        weights = coefficients(found.places, plan, x, gain, active, row_scale)
        (batch, _, width), rows = x.shape, rows_of(x)
        own = gather_rows(rows, found.key_rows).unflatten(1, (batch, width))
        key_features = self.key_features(own, own)
        keys = gather_rows(key_features.flatten(1), found.keys)
        own = gather_rows(rows, found.query_rows).unflatten(1, (batch, width))
        query_features = self.query_features(own)
        queries = only(gather_rows(query_features.flatten(1), found.queries), weights.live)
        pieces, first_read = [], 0
        for group in found.groups:
            features = keys[group.start : group.start + group.sets * group.m]
            features = to_reads(features, group.sets, batch, key_features.shape[2])
            memory = self.summarise(features[:, : group.longest] if self.causal else features, backend)
            shape = memory.shape[1:]
            memory = memory.unflatten(0, (group.sets, batch)).flatten(1)  # [sets, B · rows · M]
            for part in group.parts:
                taken = gather_rows(memory, part.of)
                if weights.live_reads is not None:
                    taken = only(taken, weights.live_reads[first_read : first_read + part.reads])
                first_read += part.reads
                taken = taken.reshape(part.reads * batch, *shape)
                asking = queries[part.start : part.start + part.reads * part.n]
                asking = to_reads(asking, part.reads, batch, query_features.shape[2])
                pieces.append(from_reads(self.respond(asking, taken), part.reads, batch))
        results = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        out = scatter_rows(weights.weigh(results), found.queries).to(results.dtype)
        out = canvas_of(out, batch, self.out_projection.in_features)
        if bias_share is not None:
            bias_share = gather_rows(bias_share[:, None], found.query_rows)[:, 0]
        out = project_out(self.out_projection, out, bias_share)
        return canvas_of(scatter_rows(rows_of(out), found.query_rows), batch, width)


@dataclass(frozen=True, eq=False)
class Part:
    """``reads`` reads with n queries each: their query places from ``start`` on, and ``of``, the key set of each within
    its group."""

    reads: int
    n: int
    start: int
    of: IndexMap


@dataclass(frozen=True, eq=False)
class MemoryGroup:
    """``sets`` key sets of m keys each: their key places from ``start`` on, the reads that want them, and the most
    queries that one of those has, or m if that is fewer."""

    sets: int
    m: int
    start: int
    longest: int
    parts: tuple[Part, ...]


@dataclass(frozen=True, eq=False)
class SharedMemories:
    """A plan's reads by the sets of their keys, and those by length.

    Attributes:
        groups: by m; their parts by n; reads stand in that order.
        key_rows: takes the distinct packed rows that are keys.
        keys: takes those to the K key places.
        query_rows, queries: the same of the S query places.
        places: of the queries.
    """

    groups: tuple[MemoryGroup, ...]
    key_rows: IndexMap
    keys: IndexMap
    query_rows: IndexMap
    queries: IndexMap
    places: QueryPlaces


def shared_memories(plan: AttentionPlan) -> SharedMemories:
    """Made once per plan. Reads whose queries attend to different keys are split into such as attend to the same."""
    if "shared memories" not in plan.index_sets:
        sets = plan.row_sets()
        n = sets.lengths(sets.queries)
        used = np.unique(sets.keys)
        used = used[np.argsort(sets.lengths(used), kind="stable")]
        number = np.empty(len(sets.ptr) - 1, np.int64)
        number[used] = np.arange(len(used))
        read_set = number[sets.keys]
        order = np.lexsort((read_set, n, sets.lengths(sets.keys)))
        place, q_rows = sets.rows_of(sets.queries[order])
        _, k_rows = sets.rows_of(used)
        plan.index_sets["shared memories"] = SharedMemories(
            _groups(sets.lengths(used), n[order], read_set[order]),
            *_distinct(k_rows, plan.n_packed),
            *_distinct(q_rows, plan.n_packed),
            query_places(plan, sets, order[place], q_rows, place),
        )
    return plan.index_sets["shared memories"]


def _groups(m: np.ndarray, n: np.ndarray, read_set: np.ndarray) -> tuple[MemoryGroup, ...]:
    """From the ascending lengths m of key sets, and of each read its length and its set, reads in order of (m, n)."""
    k_start, q_start = np.cumsum(m) - m, np.cumsum(n) - n
    read_m = m[read_set]
    groups = []
    for length in np.unique(m):
        first, stop = np.searchsorted(m, [length, length + 1])
        low, high = np.searchsorted(read_m, [length, length + 1])
        parts = []
        for size in np.unique(n[low:high]):
            begin, end = low + np.searchsorted(n[low:high], [size, size + 1])
            of = IndexMap.gather(read_set[begin:end] - first, int(stop - first))
            parts.append(Part(int(end - begin), int(size), int(q_start[begin]), of))
        longest = min(int(length), parts[-1].n)
        groups.append(MemoryGroup(int(stop - first), int(length), int(k_start[first]), longest, tuple(parts)))
    return tuple(groups)


def _distinct(rows: np.ndarray, size: int) -> tuple[IndexMap, IndexMap]:
    """The distinct rows among ``size``, and where each of ``rows`` stands among them."""
    found, place = np.unique(rows, return_inverse=True)
    return IndexMap.gather(found, size), IndexMap.gather(place.reshape(-1), len(found))
