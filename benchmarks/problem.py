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
from canvas_engineering.plan import AttentionPlan, compile_attention
from examples.plain_attention import attention_sets

SAMPLED_PAIRS = 1 << 23
SAMPLED_ROWS = (48, 768)
CHUNK_ROWS = 64
RESULTS = ("out", "dq", "dk", "dv")


class AttentionSet(NamedTuple):
    """One softmax of edge form: ``queries`` and ``keys`` are tokens, int64."""

    queries: np.ndarray
    keys: np.ndarray
    weight: float


class Problem:
    """A case's ``tokens``, n, at canvas positions ``place``, int64 (n,), and its attention ``sets``."""

    def __init__(self, case: Case):
        self.case = case
        self.layout, self.topology = layout, topology = case.declare()
        every = np.arange(layout.num_positions)
        self.place = np.concatenate([layout.region_index(r).numpy() for r in case.sequence]) if case.sequence else every
        self.tokens = len(self.place)
        token = np.full(layout.num_positions, -1)
        token[self.place] = np.arange(self.tokens)
        self.sets = [
            AttentionSet(token[queries.numpy()], token[keys.numpy()], connection.weight * fraction)
            for connection in topology.connections
            if connection.weight and topology.resolve_fn(connection, layout) != "none"
            for queries, keys, fraction in attention_sets(layout, connection)
        ]

    def plan(self, form: str) -> AttentionPlan:
        """The compiled plan over the tokens; ``form`` "joint" or "edge"."""
        return compile_attention(self.layout, self.topology, normalize=form).reindex(self.place)

    def inputs(self, device: str, dtype: torch.dtype) -> list[Tensor]:
        """q, k, v and the gradient of the output, (B, H, n, D), random, laid out as a projection leaves them."""
        generator = torch.Generator(device).manual_seed(0)
        shape = (self.case.batch, self.tokens, self.case.heads, self.case.head_dim)
        return [torch.randn(shape, generator=generator, device=device).to(dtype).transpose(1, 2) for _ in range(4)]

    @cached_property
    def kinds(self) -> np.ndarray:
        """int32 (n,): equal for tokens that are queries of the same sets and keys of the same sets."""
        generator = np.random.default_rng(0)
        mark = np.zeros(self.tokens, np.uint64)
        for one in self.sets:
            as_query, as_key = generator.integers(1, 2**63, 2, dtype=np.uint64)
            mark[one.queries] ^= as_query
            mark[one.keys] ^= as_key
        return np.unique(mark, return_inverse=True)[1].reshape(-1).astype(np.int32)

    @cached_property
    def weight_of_kinds(self) -> np.ndarray:
        """float64 (kinds, kinds): the largest weight of a set that pairs a query and a key of these kinds; 0: none."""
        count = int(self.kinds.max()) + 1
        weight = np.zeros((count, count))
        for one in self.sets:
            cell = np.ix_(np.unique(self.kinds[one.queries]), np.unique(self.kinds[one.keys]))
            weight[cell] = np.maximum(weight[cell], one.weight)
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
        for one in self.sets:
            total[one.queries] += one.weight
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

    def exact(self, form: str, tensors: list[Tensor], rows: np.ndarray, dtype=torch.float64) -> dict[str, Tensor]:
        """Exact "out" and "dq" at token ``rows``, ascending, "dk" and "dv", of q, k, v and an upstream gradient
        that is zero elsewhere, (B, H, n, D); in another dtype, what plain dense attention makes of the same inputs."""
        device, scale = tensors[0].device, self.case.head_dim**-0.5
        at = torch.from_numpy(rows).to(device)
        q, k, v, upstream = (x.detach().to(dtype) for x in tensors)
        q, upstream = q[:, :, at], upstream[:, :, at]
        sums = {name: torch.zeros_like(x, dtype=torch.float64) for name, x in zip(RESULTS, (q, q, k, v))}
        for part, keys, bias, share in self._softmaxes(form, rows, device):
            slots = torch.from_numpy(np.searchsorted(rows, part)).to(device)
            leaves = [x.requires_grad_() for x in (q[:, :, slots], k[:, :, keys], v[:, :, keys])]
            with torch.enable_grad():
                scores = scale * (leaves[0] @ leaves[1].transpose(-1, -2)) + bias.to(dtype)
                out = (scores.softmax(-1) @ leaves[2]) * share.to(dtype)
                gradients = torch.autograd.grad(out, leaves, upstream[:, :, slots])
            for name, where, value in zip(RESULTS, (slots, slots, keys, keys), (out.detach(), *gradients)):
                sums[name].index_add_(2, where, value.double())
        return {name: x.to(dtype) for name, x in sums.items()}

    def _softmaxes(self, form: str, rows: np.ndarray, device: torch.device) -> Iterator[tuple]:
        """Some of ``rows``, their keys, bias and share in the output: each softmax of the form, in chunks of rows."""
        if form == "joint":
            for part in np.array_split(rows, -(-len(rows) // CHUNK_ROWS)):
                weights = self.weights(part, device)
                share = weights.any(1, keepdim=True)  # rows without keys have no softmax; their output is 0
                keys = weights.any(0).nonzero()[:, 0]
                yield part, keys, weights[:, keys].masked_fill(~share, 1.0).log(), share
            return
        chosen = np.zeros(self.tokens, bool)
        chosen[rows] = True
        for queries, keys, weight in self.sets:
            queries, keys = queries[chosen[queries]], torch.from_numpy(keys).to(device)
            for part in np.split(queries, range(CHUNK_ROWS, len(queries), CHUNK_ROWS)) if len(queries) else ():
                share = torch.from_numpy(weight / self.total_weight[part]).to(device)[:, None]
                yield part, keys, share.new_zeros(()), share
