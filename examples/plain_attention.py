"""Modules as one writes them down first, as honest providers and as plain oracles.

A canvas is attended over without block tables in two ways, which take the declaration that
:class:`canvas_engineering.AttentionDispatcher` takes, precompute all that depends on it alone, and keep its parameter
names, so that one state dict fits all three.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from canvas_engineering.attention import create_attention
from canvas_engineering.canvas import CanvasLayout
from canvas_engineering.connectivity import CanvasTopology, Connection, connection_frames
from canvas_engineering.masks import MaskSpec

SOFTMAX_FNS = ("cross_attention", "self_attention", "cogvideox")


class Projections(nn.Module):
    """Multi-head softmax attention with the parameter names that checkpoints rely on."""

    def __init__(self, d_model: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(d_model, d_model) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        """(B, n, d_model) → (B, heads, n, head_dim)."""
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """queries (B, n, d_model), keys and values (B, m, d_model), additive mask (n, m) → (B, n, d_model)."""
        q, k, v = self.split(self.q_proj(queries)), self.split(self.k_proj(keys)), self.split(self.v_proj(values))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class PerEdgeLoop(nn.Module):
    """Edge form, one attention set after another: gather, project, attend, scatter; then divide by the sum of weights.
    Raises ValueError for sparse masks and other writes than "add"."""

    def __init__(self, topology: CanvasTopology, layout: CanvasLayout, d_model: int, n_heads: int = 4):
        super().__init__()
        self.fn_modules = nn.ModuleDict()
        self.sets: list[tuple[str, float]] = []
        total_weight = torch.zeros(layout.num_positions)
        for connection in topology.connections:
            fn = topology.resolve_fn(connection, layout)
            if connection.weight == 0 or fn == "none":
                continue
            if connection.write_mode != "add":
                raise ValueError(
                    f"{connection.src} → {connection.dst}: {connection.write_mode!r} writes are not done here"
                )
            if fn not in self.fn_modules:
                kind = Projections if fn in SOFTMAX_FNS else partial(create_attention, fn)
                self.fn_modules[fn] = kind(d_model, n_heads)
            for queries, keys, fraction in attention_sets(layout, connection):
                weight = connection.weight * fraction
                total_weight[queries] += weight
                self.register_buffer(f"queries_{len(self.sets)}", queries, persistent=False)
                self.register_buffer(f"keys_{len(self.sets)}", keys, persistent=False)
                self.sets.append((fn, weight))
        covered = total_weight > 0
        self.register_buffer("covered", covered[:, None], persistent=False)
        self.register_buffer("total_weight", total_weight.where(covered, torch.ones(()))[:, None], persistent=False)

    def forward(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        """(B, N, d_model) → (B, N, d_model); positions without keys keep their input, or ``add_to``."""
        total = torch.zeros_like(x)
        for index, (fn, weight) in enumerate(self.sets):
            queries, keys = getattr(self, f"queries_{index}"), getattr(self, f"keys_{index}")
            out = self.fn_modules[fn](x[:, queries], x[:, keys], x[:, keys])
            total = total.index_add(1, queries, (out * weight).to(total.dtype))  # which differ under autocast
        return landed(total / self.total_weight, self.covered, x, add_to)


class DenseMask(nn.Module):
    """Joint form on the whole canvas: one projection, one softmax over all N keys under an additive (N, N) mask, which
    is ln of the largest weight of a set that pairs two positions: what a user of ``to_additive_mask`` pays."""

    def __init__(self, topology: CanvasTopology, layout: CanvasLayout, d_model: int, n_heads: int = 4):
        super().__init__()
        self.fn_modules = nn.ModuleDict({"cross_attention": Projections(d_model, n_heads)})
        mask = topology.to_attention_mask(layout)
        covered = (mask > 0).any(1, keepdim=True)
        # A softmax over no key is NaN: such a row attends to itself and is then replaced by its input.
        self.register_buffer("mask", topology.to_additive_mask(layout, weighted=True), persistent=False)
        self.register_buffer("covered", covered, persistent=False)

    def forward(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        """(B, N, d_model) → (B, N, d_model); positions without keys keep their input, or ``add_to``."""
        return landed(self.fn_modules["cross_attention"](x, x, x, self.mask), self.covered, x, add_to)


def landed(out: Tensor, covered: Tensor, x: Tensor, add_to: Tensor | None) -> Tensor:
    """``out`` where ``covered`` (N, 1), added to ``add_to`` if there is one; else that, or x."""
    return torch.where(covered, out, x) if add_to is None else torch.where(covered, add_to + out, add_to)


def attention_sets(layout: CanvasLayout, connection: Connection) -> list[tuple[Tensor, Tensor, float]]:
    """(query positions, key positions, fraction) of every attention set of a connection; ValueError for masks that are
    neither "full" nor "tile"."""
    src, dst, mask = layout.region_spec(connection.src), layout.region_spec(connection.dst), connection.mask
    frames = connection_frames(connection, layout)
    grid = torch.arange(layout.num_positions).view(layout.T, *layout.spatial_shape)

    def positions(bounds, start: int, stop: int) -> Tensor:
        box = (slice(int(start), int(stop)), *(slice(a, b) for a, b in zip(bounds[2::2], bounds[3::2])))
        return grid[box].flatten()

    columns = (frames.q_start, frames.q_stop, frames.k_start, frames.k_stop, frames.fraction)
    sets = [
        (positions(src.bounds, q0, q1), positions(dst.bounds, k0, k1), float(fraction))
        for q0, q1, k0, k1, fraction in zip(*columns)
    ]
    if mask is None or mask.kind == "full":
        return sets
    if mask.kind != "tile":
        raise ValueError(f"{connection.src} → {connection.dst}: {mask.kind!r} masks are not resolved here")
    tile = _tile_numbers(layout, mask)
    parts = []
    for queries, keys, fraction in sets:
        for number in tile[queries].unique():
            inside = keys[tile[keys] == number]
            parts.append((queries[tile[queries] == number], inside if len(inside) else keys, fraction))
    return parts


def _tile_numbers(layout: CanvasLayout, mask: MaskSpec) -> Tensor:
    """int64 (N,): the number of the tile that each position lies in."""
    sizes = mask.tile_shape or (mask.tile_h, mask.tile_w)
    number = torch.zeros((), dtype=torch.long)
    for extent, size in zip(layout.spatial_shape, sizes):
        number = number[..., None] * -(-extent // size) + torch.arange(extent) // size
    return number.expand(layout.T, *layout.spatial_shape).flatten()
