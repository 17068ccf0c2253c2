"""A case made concrete: its tokens, its attention sets as lists of indices, and exact results in float64.

Attention sets are resolved from the declaration alone (docs/semantics.md, section 2) and not from a plan, so that a
mistake of the compiler cannot hide. Nothing is of size N²: exact results are computed for some of the query rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.naive import reads_of
from canvas_engineering.plan import AttentionPlan, compile_attention

SAMPLED_PAIRS = 1 << 23
SAMPLED_ROWS = (48, 768)
CHUNK_ROWS = 64
RESULTS = ("out", "dq", "dk", "dv")


class Read(NamedTuple):
    """One softmax of edge form: ``queries`` and ``keys`` are tokens, int64."""

    queries: np.ndarray
    keys: np.ndarray
    weight: float


class Problem:
    """A case's tokens and attention sets.

    Attributes:
        case, layout, topology: what was declared.
        place: int64 (n,), the canvas position of each token.
        reads: list of :class:`Read`.
    """

    def __init__(self, case: Case):
        self.case = case
        self.layout, self.topology = layout, topology = case.declare()
        every = np.arange(layout.num_positions)
        self.place = np.concatenate([layout.region_index(r).numpy() for r in case.sequence]) if case.sequence else every
        token = np.full(layout.num_positions, -1)
        token[self.place] = np.arange(len(self.place))
        self.reads = [
            Read(token[queries.numpy()], token[keys.numpy()], connection.weight * fraction)
            for connection in topology.connections
            if connection.weight and topology.resolve_fn(connection, layout) != "none"
            for queries, keys, fraction in reads_of(layout, connection)
        ]

    @property
    def tokens(self) -> int:
        """n, the length of q, k and v."""
        return len(self.place)

    def plan(self, form: str) -> AttentionPlan:
        """The compiled plan over the tokens; ``form`` "joint" or "edge"."""
        return compile_attention(self.layout, self.topology, normalize=form).reindex(self.place)

    def inputs(self, device: str, dtype: torch.dtype, heads: int | None = None) -> list[Tensor]:
        """q, k, v and the gradient of the output, (B, H, n, D), random, laid out as a projection leaves them."""
        generator = torch.Generator(device).manual_seed(0)
        shape = (self.case.batch, self.tokens, heads or self.case.heads, self.case.head_dim)
        return [torch.randn(shape, generator=generator, device=device).to(dtype).transpose(1, 2) for _ in range(4)]

    @cached_property
    def kinds(self) -> np.ndarray:
        """int32 (n,): equal for tokens that are queries of the same sets and keys of the same sets."""
        generator = np.random.default_rng(0)
        mark = np.zeros(self.tokens, np.uint64)
        for read in self.reads:
            as_query, as_key = generator.integers(1, 2**63, 2, dtype=np.uint64)
            mark[read.queries] ^= as_query
            mark[read.keys] ^= as_key
        return np.unique(mark, return_inverse=True)[1].reshape(-1).astype(np.int32)

    @cached_property
    def weight_of_kinds(self) -> np.ndarray:
        """float64 (kinds, kinds): the largest weight of a set that pairs a query and a key of these kinds; 0: none."""
        count = int(self.kinds.max()) + 1
        weight = np.zeros((count, count))
        for read in self.reads:
            cell = np.ix_(np.unique(self.kinds[read.queries]), np.unique(self.kinds[read.keys]))
            weight[cell] = np.maximum(weight[cell], read.weight)
        return weight

    @property
    def weighted(self) -> bool:
        """Whether some weight of the joint form is neither 0 nor 1."""
        return bool(~np.isin(self.weight_of_kinds, (0.0, 1.0)).all())

    def weights(self, rows: np.ndarray, device: str | torch.device = "cpu") -> Tensor:
        """float64 (rows, n): the rows of the joint matrix."""
        weight, kinds = (torch.from_numpy(x).to(device) for x in (self.weight_of_kinds, self.kinds.astype(np.int64)))
        return weight[kinds[torch.from_numpy(rows).to(device)]][:, kinds]

    @cached_property
    def total_weight(self) -> np.ndarray:
        """float64 (n,): the sum of the weights of a token's attention sets; 1 where there are none."""
        total = np.zeros(self.tokens)
        for read in self.reads:
            total[read.queries] += read.weight
        return np.where(total > 0, total, 1.0)

    def sample(self) -> np.ndarray:
        """Query rows that exact results are computed for, ascending: all of a short sequence; of a long one a token of
        every kind, up to a half, and others by chance."""
        count = int(np.clip(SAMPLED_PAIRS // self.tokens, *SAMPLED_ROWS))
        if self.tokens <= count:
            return np.arange(self.tokens)
        generator = np.random.default_rng(1)
        order = generator.permutation(self.tokens)
        first = np.unique(self.kinds[order], return_index=True)[1]
        chosen = order[generator.permutation(first)[: count // 2]]
        rest = np.setdiff1d(order, chosen)
        return np.sort(np.concatenate([chosen, generator.choice(rest, count - len(chosen), replace=False)]))

    def exact(
        self, form: str, tensors: list[Tensor], rows: np.ndarray, dtype: torch.dtype = torch.float64
    ) -> dict[str, Tensor]:
        """Exact results where the upstream gradient is zero but at ``rows``.

        Args:
            tensors: q, k, v and the upstream gradient, (B, H, n, D).
            rows: tokens, ascending.
            dtype: in another one than float64, what plain dense attention makes of the same inputs.

        Returns:
            "out" and "dq" at ``rows``, "dk" and "dv".
        """
        device, scale = tensors[0].device, self.case.head_dim**-0.5
        at = torch.from_numpy(rows).to(device)
        q, k, v, upstream = (x.detach().to(dtype) for x in tensors)
        q, upstream = q[:, :, at], upstream[:, :, at]
        sums = {name: torch.zeros_like(x, dtype=torch.float64) for name, x in zip(RESULTS, (q, q, k, v))}
        for part, keys, bias, share in self._softmaxes(form, rows, device, dtype):
            slots = torch.from_numpy(np.searchsorted(rows, part)).to(device)
            leaves = [x.requires_grad_() for x in (q[:, :, slots], k[:, :, keys], v[:, :, keys])]
            with torch.enable_grad():
                scores = scale * (leaves[0] @ leaves[1].transpose(-1, -2)) + bias
                out = (scores.softmax(-1) @ leaves[2]) * share
                gradients = torch.autograd.grad(out, leaves, upstream[:, :, slots])
            for name, where, value in zip(RESULTS, (slots, slots, keys, keys), (out.detach(), *gradients)):
                sums[name].index_add_(2, where, value.double())
        return {name: x.to(dtype) for name, x in sums.items()}

    def _softmaxes(
        self, form: str, rows: np.ndarray, device: torch.device, dtype: torch.dtype
    ) -> Iterator[tuple[np.ndarray, Tensor, Tensor | float, Tensor]]:
        """Some of ``rows``, their keys, bias and share in the output: each softmax of the form, in chunks of rows."""
        if form == "joint":
            for part in np.array_split(rows, -(-len(rows) // CHUNK_ROWS)):
                weights = self.weights(part, device)
                share = weights.any(1, keepdim=True)  # rows without keys have no softmax; their output is 0
                keys = weights.any(0).nonzero()[:, 0]
                bias = weights[:, keys].masked_fill(~share, 1.0).log()
                yield part, keys, bias.to(dtype), share.to(dtype)
            return
        chosen = np.zeros(self.tokens, bool)
        chosen[rows] = True
        for read in self.reads:
            queries, keys = read.queries[chosen[read.queries]], torch.from_numpy(read.keys).to(device)
            for part in np.split(queries, range(CHUNK_ROWS, len(queries), CHUNK_ROWS)) if len(queries) else ():
                share = torch.from_numpy(read.weight / self.total_weight[part]).to(device, dtype)[:, None]
                yield part, keys, 0.0, share
