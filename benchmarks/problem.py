"""A case made concrete: its tokens, its reads as plain lists of indices, and exact results in float64.

Reads are resolved from the declaration alone (docs/semantics.md, section 2) and not from a plan, so that a mistake of
the compiler cannot hide. Nothing is of size N²: exact results are computed for some of the query rows.
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


class Read(NamedTuple):
    """One softmax of edge form: ``queries`` and ``keys`` int64, tokens; ``weight``; the connection's number."""

    queries: np.ndarray
    keys: np.ndarray
    weight: float
    connection: int


class Problem:
    """A case's tokens and reads.

    Attributes:
        case, layout, topology: what was declared.
        place: int64 [n], the canvas position of each token.
        reads: list of :class:`Read`.
    """

    def __init__(self, case: Case):
        self.case = case
        self.layout, self.topology = layout, topology = case.declare()
        every = np.arange(layout.num_positions)
        self.place = np.concatenate([layout.region_index(r).numpy() for r in case.sequence]) if case.sequence else every
        token = np.full(layout.num_positions, -1)
        token[self.place] = np.arange(len(self.place))
        self.reads = []
        for number, connection in enumerate(topology.connections):
            if connection.weight == 0 or topology.resolve_fn(connection, layout) == "none":
                continue
            for queries, keys, fraction in reads_of(layout, connection):
                weight = connection.weight * fraction
                self.reads.append(Read(token[queries.numpy()], token[keys.numpy()], weight, number))

    @property
    def tokens(self) -> int:
        """n, the length of q, k and v."""
        return len(self.place)

    def plan(self, form: str) -> AttentionPlan:
        """The compiled plan over the tokens; ``form`` "joint" or "edge"."""
        return compile_attention(self.layout, self.topology, normalize=form).over(self.place)

    def inputs(self, device: str, dtype: torch.dtype, heads: int | None = None) -> list[Tensor]:
        """q, k, v and the gradient of the output, (B, H, n, D), random, laid out as a projection leaves them."""
        generator = torch.Generator(device).manual_seed(0)
        shape = (self.case.batch, self.tokens, heads or self.case.heads, self.case.head_dim)
        return [torch.randn(shape, generator=generator, device=device).to(dtype).transpose(1, 2) for _ in range(4)]

    # -- joint form --------------------------------------------------------------------------------------------------

    @cached_property
    def kinds(self) -> np.ndarray:
        """int32 [n]: equal for tokens that are queries of the same reads and keys of the same reads."""
        generator = np.random.default_rng(0)
        mark = np.zeros(self.tokens, np.uint64)
        for read in self.reads:
            as_query, as_key = generator.integers(1, 2**63, 2, dtype=np.uint64)
            mark[read.queries] ^= as_query
            mark[read.keys] ^= as_key
        return np.unique(mark, return_inverse=True)[1].reshape(-1).astype(np.int32)

    @cached_property
    def weight_of_kinds(self) -> np.ndarray:
        """float64 [kinds, kinds]: the largest weight with which a query of one kind reads a key of another; 0: none."""
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

    # -- edge form ---------------------------------------------------------------------------------------------------

    @cached_property
    def total_weight(self) -> np.ndarray:
        """float64 [n]: Σ of the weights of the reads of each token; 1 where there are none."""
        total = np.zeros(self.tokens)
        for read in self.reads:
            total[read.queries] += read.weight
        return np.where(total > 0, total, 1.0)

    # -- exact results -----------------------------------------------------------------------------------------------

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
        """Output at ``rows`` (ascending), and the gradients of q (at ``rows``), k and v when the upstream gradient is
        zero at all other rows: (B, H, …, D) of ``tensors``' entries and heads.

        In float64 these are the exact results, in another dtype what plain dense attention makes of the same inputs: it
        rounds scores, probabilities and results, not the sums within a product.
        """
        lead, device, scale = tensors[0].shape[:2], tensors[0].device, self.case.head_dim**-0.5
        at = torch.from_numpy(rows).to(device)
        q, upstream = (x.detach()[:, :, at].flatten(0, 1).to(dtype) for x in (tensors[0], tensors[3]))
        k, v = (x.detach().flatten(0, 1).to(dtype) for x in tensors[1:3])
        found = {name: torch.zeros_like(x) for name, x in (("out", q), ("dq", q), ("dk", k), ("dv", v))}
        for queries, keys, weight in self._softmaxes(form, rows):
            keys = torch.from_numpy(keys).to(device) if form == "edge" else keys
            own_k, own_v = k[:, keys], v[:, keys]
            sums = [torch.zeros_like(x, dtype=torch.float64) for x in (own_k, own_v)]
            for low in range(0, len(queries), CHUNK_ROWS):
                part = queries[low : low + CHUNK_ROWS]
                slots = torch.from_numpy(np.searchsorted(rows, part)).to(device)
                columns, bias, share = slice(None), 0.0, 1.0
                if form == "joint":
                    weights = self.weights(part, device)
                    columns = weights.any(0).nonzero()[:, 0]
                    # rows that read nothing would have no softmax; their output is 0
                    share = weights.any(1, keepdim=True).to(dtype)
                    bias = weights[:, columns].masked_fill(share == 0, 1.0).log().to(dtype)
                else:
                    share = torch.from_numpy(weight / self.total_weight[part]).to(device, dtype)[:, None]
                product = (q[:, slots] @ own_k[:, columns].transpose(-1, -2)).requires_grad_()
                with torch.enable_grad():
                    p = (scale * product + bias).softmax(-1)
                    read = p @ own_v[:, columns]
                    out = read * share
                    d_product, d_read = torch.autograd.grad(out, (product, read), upstream[:, slots])
                found["out"][:, slots] += out.detach()
                found["dq"][:, slots] += d_product @ own_k[:, columns]
                for total, a, b in zip(sums, (d_product, p.detach()), (q[:, slots], d_read)):
                    total[:, columns] += a.double().transpose(-1, -2) @ b.double()
            for name, total in zip(("dk", "dv"), sums):
                found[name][:, keys] += total.to(dtype)
        return {name: x.unflatten(0, lead) for name, x in found.items()}

    def _softmaxes(self, form: str, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray | slice, float]]:
        """Query rows among ``rows``, keys and weight of each softmax: one in joint form, in edge form one per read."""
        if form == "joint":
            yield rows, slice(None), 1.0
            return
        chosen = np.zeros(self.tokens, bool)
        chosen[rows] = True
        for read in self.reads:
            queries = read.queries[chosen[read.queries]]
            if len(queries):
                yield queries, read.keys, read.weight
