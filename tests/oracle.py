"""What a canvas computes, in plain float64 and plain loops: the numbers that everything else is held to.

It reads the fields of layouts and connections, and nothing else of the library.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch


@dataclass(frozen=True)
class Read:
    """Every query with its keys, all of one softmax per query; `keys` leaves out queries that have none. `shape` is the
    canvas's, frames first."""

    connection: int
    weight: float
    keys: dict[int, tuple[int, ...]]
    shape: tuple[int, ...] = ()


def _region(layout, name):
    raw = layout.regions[name]
    if isinstance(raw, tuple):
        return raw, 1, "cross_attention"
    return raw.bounds, raw.period, raw.default_attn


def positions(bounds) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(low, high) for low, high in zip(bounds[::2], bounds[1::2]))))


def flat(layout, position) -> int:
    index = 0
    for coordinate, size in zip(position, (layout.T, *layout.spatial_shape)):
        index = index * size + coordinate
    return index


def frame_reads(
    T, src_frames, dst_frames, src_period, dst_period, t_src, t_dst, fill, order
) -> Iterator[tuple[list[int], list[int], Fraction]]:
    """(src frames, dst frames, share of the connection's weight) of every read; `fill` is a string."""
    src, dst = list(range(*src_frames)), list(range(*dst_frames))
    if t_src is None and t_dst is None:
        yield src, dst, Fraction(1)
        return
    for r in range(T):
        queries = src if t_src is None else [frame for frame in src if frame == r + t_src]
        if not queries:
            continue
        if t_dst is None:
            yield queries, dst, Fraction(1)
            continue
        time = (r + t_dst) * (src_period if t_src is not None else 1)
        past = [frame for frame in dst if frame * dst_period < time]
        future = [frame for frame in dst if frame * dst_period > time]
        exact = [frame for frame in dst if frame * dst_period == time]
        if exact:
            yield queries, exact, Fraction(1)
        elif fill == "hold":
            if past:
                yield queries, [max(past)], Fraction(1)
        elif fill == "interpolate" and order <= 1:
            if past and future:
                a, b = time - max(past) * dst_period, min(future) * dst_period - time
                yield queries, [max(past)], Fraction(b, a + b)
                yield queries, [min(future)], Fraction(a, a + b)
            elif past:
                yield queries, [max(past)], Fraction(1)
            elif future:
                yield queries, [min(future)], Fraction(1)
        elif fill == "interpolate":
            nearest = sorted(dst, key=lambda frame: (abs(frame * dst_period - time), frame))[: order + 1]
            shares = [Fraction(1, abs(frame * dst_period - time) ** order) for frame in nearest]
            for frame, share in zip(nearest, shares):
                yield queries, [frame], share / sum(shares)
        else:
            assert fill == "drop", fill


def _masked(layout, mask, queries, keys, src_bounds, dst_bounds) -> Iterator[dict[int, tuple[int, ...]]]:
    """The reads that a mask makes of one read, whose queries and keys are positions."""
    key_list = tuple(flat(layout, key) for key in keys)
    if mask is None or mask.kind == "full":
        yield {flat(layout, query): key_list for query in queries}
    elif mask.kind == "tile":
        n = len(layout.spatial_shape)
        size = mask.tile_shape or ((mask.tile_h, mask.tile_w) + (1,) * n)[:n]

        def tile(position):
            return tuple(coordinate // extent for coordinate, extent in zip(position[1:], size))

        for this in sorted({tile(query) for query in queries}):
            own = tuple(flat(layout, key) for key in keys if tile(key) == this) or key_list
            yield {flat(layout, query): own for query in queries if tile(query) == this}
    else:
        assert mask.kind == "sparse", mask.kind
        pattern = torch.tensor(mask.pattern)
        src, dst = positions(src_bounds), positions(dst_bounds)
        shape = tuple(high - low for low, high in zip(dst_bounds[::2], dst_bounds[1::2]))
        if tuple(pattern.shape) == shape:
            pattern = pattern.reshape(1, -1).expand(len(src), -1)
        assert tuple(pattern.shape) == (len(src), len(dst)), pattern.shape
        marked = {}
        for query in queries:
            row = pattern[src.index(query)]
            own = tuple(flat(layout, key) for key in keys if row[dst.index(key)])
            if own:
                marked[flat(layout, query)] = own
        yield marked


def reads(layout, topology, banks=None) -> list[Read]:
    """All reads of a topology on a layout, by connection, reference frame and tile.

    ``banks``: region to the rows that every read of it has as its keys, whatever frame or tile it names.
    """
    found = []
    for index, c in enumerate(topology.connections):
        if c.src not in layout.regions or c.dst not in layout.regions or c.weight == 0:
            continue
        src, src_period, default_attn = _region(layout, c.src)
        dst, dst_period, _ = _region(layout, c.dst)
        if (c.fn or default_attn) == "none":
            continue
        frames = frame_reads(
            layout.T, src[:2], dst[:2], src_period, dst_period, c.t_src, c.t_dst,
            c.temporal_fill.value, c.interpolation_order,
        )  # fmt: skip
        for q_frames, k_frames, share in frames:
            queries = [position for position in positions(src) if position[0] in q_frames]
            keys = [position for position in positions(dst) if position[0] in k_frames]
            for pairs in _masked(layout, c.mask, queries, keys, src, dst):
                if c.dst in (banks or {}):
                    pairs = dict.fromkeys(pairs, banks[c.dst])
                if pairs:
                    found.append(Read(index, c.weight * float(share), pairs, (layout.T, *layout.spatial_shape)))
    return found


def joint_matrix(layout, topology, banks=None) -> torch.Tensor:
    """float64 (N, N): the largest weight of all reads that pair i with j, else 0; N with the rows of all ``banks``."""
    N = layout.T * math.prod(layout.spatial_shape) + sum(map(len, (banks or {}).values()))
    matrix = [[0.0] * N for _ in range(N)]
    for read in reads(layout, topology, banks):
        for query, keys in read.keys.items():
            for key in keys:
                matrix[query][key] = max(matrix[query][key], read.weight)
    return torch.tensor(matrix, dtype=torch.float64)


def joint_attention(q, k, v, M, scale) -> torch.Tensor:
    """softmax_j(scale·q_i·k_j + ln M_ij) v_j in float64; q, k, v (B, heads, N, head_dim); 0 in rows without a key."""
    q, k, v, M = (x.double() for x in (q, k, v, M))
    filled = (M > 0).any(-1)
    # Empty rows get some finite logits, so that neither they nor their gradients are NaN, and are zeroed afterwards.
    bias = torch.where(filled[:, None], M.log(), torch.zeros_like(M))
    out = (scale * q @ k.transpose(-1, -2) + bias).softmax(-1) @ v
    return torch.where(filled[:, None], out, torch.zeros_like(out))


def _is_active(read, active) -> bool:
    return active is None or bool(active[read.connection])


def covered(reads, N, active=None) -> torch.Tensor:
    """bool (N,): the positions that a read of an active connection queries."""
    rows = torch.zeros(N, dtype=torch.bool)
    for read in reads:
        if _is_active(read, active):
            rows[list(read.keys)] = True
    return rows


def edge_attention(q, k, v, reads, scale, gain=None, active=None, classes=None) -> torch.Tensor:
    """Σ_r a_r f_r(i) / Σ_r w_r in float64, one softmax per read; 0 where no read is.

    Args:
        q, k, v: (B, heads, N, head_dim).
        reads: of `reads`.
        scale: of the logits.
        gain: per connection: a_r = w_r · gain; None is 1.
        active: per connection: whether its reads count at all.
        classes: per connection: 1 for "replace", which silences every read of class 0 at the positions it queries.
    """
    q, k, v = (x.double() for x in (q, k, v))
    N = q.shape[2]
    live = [read for read in reads if _is_active(read, active)]

    def replaces(read):
        return classes is not None and int(classes[read.connection]) == 1

    replaced = {query for read in live if replaces(read) for query in read.keys}
    total, denominator = torch.zeros_like(v), torch.zeros(N, dtype=torch.float64)
    for read in live:
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for query, keys in read.keys.items():
            if replaces(read) or query not in replaced:
                rows_of.setdefault(keys, []).append(query)
        share = read.weight if gain is None else read.weight * gain[read.connection].double()
        for keys, rows in rows_of.items():
            logits = scale * q[:, :, rows] @ k[:, :, list(keys)].transpose(-1, -2)
            result = logits.softmax(-1) @ v[:, :, list(keys)]
            total = total.index_add(2, torch.tensor(rows), share * result)
            denominator[rows] += read.weight
    return total / denominator.clamp_min(1e-300)[:, None]
