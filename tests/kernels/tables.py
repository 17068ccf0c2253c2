"""Tables of rectangles that the kernels' tests share, and what they say of themselves."""

from __future__ import annotations

import math

import numpy as np
import torch

from canvas_kernels.block_table import BlockTable, row_scale


def error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """max |difference| / max |expected|, the difference itself where zero is expected; infinite where NaN."""
    if not expected.numel():
        return 0.0
    value, expected = value.detach().cpu().double(), expected.detach().cpu().double()
    result = ((value - expected).abs().max() / (expected.abs().max() or 1.0)).item()
    return math.inf if math.isnan(result) else result


def membership(table: BlockTable) -> np.ndarray:
    """bool (segments, n, n): which pairs each segment holds."""
    pairs = np.zeros((int(table.segment.max(initial=-1)) + 1, table.n_positions, table.n_positions), bool)
    for s, q0, q1, k0, k1 in zip(table.segment, table.q_start, table.q_stop, table.k_start, table.k_stop, strict=True):
        pairs[s, q0:q1, k0:k1] = True
    return pairs


def row_scale_of(table, active=None, device="cpu") -> torch.Tensor:
    return row_scale(table, active, torch.float32, torch.device(device))


def edge_table(n, rectangles, n_edges=None, replace=()) -> BlockTable:
    """Rectangles as (segment, edge, weight, q_start, q_stop, k_start, k_stop); edges in ``replace`` replace."""
    segment, edge, weight, *ranges = zip(*rectangles)
    names = ("q_start", "q_stop", "k_start", "k_stop")
    return BlockTable.from_rectangles(
        "edge",
        n,
        n_edges or max(edge) + 1,
        segment=segment,
        edge=edge,
        weight=weight,
        replace=[e in replace for e in edge],
        **dict(zip(names, ranges)),
    )


def joint_table(n, rectangles) -> BlockTable:
    """Rectangles as (weight, q_start, q_stop, k_start, k_stop)."""
    names = ("weight", "q_start", "q_stop", "k_start", "k_stop")
    return BlockTable.from_rectangles("joint", n, 0, **dict(zip(names, zip(*rectangles))))


# Lengths are ragged for every tile size; rows 0 … 2 and 66 … of "overlap" see nothing.
TABLES = {
    "overlap": lambda: edge_table(
        71,
        [
            (0, 0, 1.0, 3, 40, 5, 50),
            (1, 1, 0.5, 20, 66, 30, 71),
            (2, 1, 2.0, 10, 30, 0, 7),
            (3, 2, 0.3, 39, 41, 70, 71),
        ],
    ),
    # segment 0 has two separate query ranges in one 16-row tile, one with two key ranges; segment 1 two that overlap
    "pieces": lambda: edge_table(
        45,
        [
            (0, 0, 1.0, 2, 5, 0, 9),
            (0, 0, 1.0, 2, 5, 20, 43),
            (0, 0, 1.0, 9, 14, 4, 30),
            (0, 0, 1.0, 40, 45, 1, 3),
            (1, 1, 0.7, 0, 30, 10, 20),
            (1, 1, 0.7, 11, 45, 31, 45),
        ],
    ),
    "replace": lambda: edge_table(
        50, [(0, 0, 1.0, 0, 50, 0, 50), (1, 1, 0.4, 10, 30, 5, 25), (2, 2, 1.5, 20, 41, 30, 47)], replace=(1, 2)
    ),
    "tiny": lambda: edge_table(
        40, [(i, i, 0.1 + i, 4 * i, 4 * i + 3, 4 * i, 4 * i + 4) for i in range(10)], n_edges=12
    ),
    "dense": lambda: edge_table(70, [(0, 0, 1.0, 0, 70, 0, 70)]),
    "joint": lambda: joint_table(
        67,
        [
            (1.0, 0, 20, 0, 67),
            (0.25, 20, 45, 10, 31),
            (3.0, 20, 45, 40, 67),
            (1.5, 30, 60, 35, 39),
            (0.5, 60, 61, 0, 1),
        ],
    ),
    "joint dense": lambda: joint_table(70, [(1.0, 0, 70, 0, 70)]),
}
