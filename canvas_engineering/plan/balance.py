"""Simulated load balance: how evenly the passes of a plan occupy a GPU's multiprocessors."""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np
import torch

from canvas_kernels.block_table import BlockTable
from canvas_kernels.triton_ops.configs import Config, classes, form_of, lookup

MULTIPROCESSORS = 132
ARCHITECTURE = "sm_90"
"""MULTIPROCESSORS and ARCHITECTURE are those of an H200."""
FIXED_BLOCKS = 2
"""Time of a program besides its key blocks, in blocks: loading and storing its own rows."""


class Balance(NamedTuple):
    """The fraction of a pass's time during which multiprocessors are busy, as predicted and as possible."""

    name: str
    predicted: float
    possible: float


def balance(table: BlockTable, batch_heads: int, head_dim: int, dtype: torch.dtype) -> list[Balance]:
    """Returns the balance of the passes over a table: forward, dQ, dK with dV.

    Programs start in the kernels' order, each on the first multiprocessor that has room; a program takes as long as
    its blocks and :data:`FIXED_BLOCKS` more. With W the work of all programs and S how many run at once, the balance is
    W / (S · time). No order takes less time than the longest program, and programs that are alike come in whole waves:
    W / (S · max(longest, waves · mean)) is possible, at most 1; more where unlike ones fill the last wave better. A
    pass's launches, one for each size of tile, follow each other.

    Args:
        table: the block table.
        batch_heads: batch entries times heads.
        head_dim: of q, k and v.
        dtype: float32, float16 or bfloat16.

    Raises:
        ValueError: a head_dim or dtype that the Triton kernels do not support.
    """
    balances, form = [], form_of(table)
    for name in ("forward", "dq", "dkv"):
        sizes = lookup(ARCHITECTURE, head_dim, dtype, name, form)
        config_of = {(config.block_m, config.block_n): config for config in sizes}
        by_slot = (name, form) == ("forward", "edge")
        times = np.zeros(3)
        for tiling in table.device_tilings("cpu", classes(sizes), name == "dkv", by_slot):
            config = config_of[tiling.block_m, tiling.block_n]
            slots = MULTIPROCESSORS * _resident(config)
            times += config.cost * np.array(simulate(tiling.blocks, tiling.n_long, batch_heads, slots))
        if times[0]:
            ideal, predicted, least = times.tolist()
            balances.append(Balance(name, ideal / predicted, ideal / min(least, predicted)))
    return balances


def simulate(blocks: np.ndarray, n_long: int, batch_heads: int, slots: int) -> tuple[float, float, float]:
    """Returns (ideal, predicted, least) time of a launch: its work spread evenly, in the kernels' order, and the longer
    of the longest program and whole waves of the mean one.

    Args:
        blocks: int64 (tiles,), the key blocks of each tile, the longest first.
        n_long: number of tiles that start first, for all heads.
        batch_heads: batch entries times heads.
        slots: programs that run at once.

    >>> simulate(np.array([8, 1, 1, 1]), 1, 2, 2)  # programs of 10, 10 and six times 3 on two multiprocessors
    (19.0, 19.0, 19.0)
    """
    times = blocks + FIXED_BLOCKS
    programs = np.concatenate([np.repeat(times[:n_long], batch_heads), np.tile(times[n_long:], batch_heads)])
    work, count = int(programs.sum()), len(programs)
    busy = [0] * min(slots, count)
    for time in programs.tolist():
        heapq.heapreplace(busy, busy[0] + time)
    ideal, waves = work / slots, -(-count // slots)
    return ideal, float(max(busy)), max(ideal, float(times.max()), waves * work / count)


def _resident(config: Config) -> int:
    """Returns how many programs fit a multiprocessor's registers, at the most registers per thread."""
    threads = 32 * config.num_warps
    return max(1, min(65536 // (threads * (config.max_registers or 255)), 2048 // threads, 32))
