"""Half-open ranges of rows, as numpy arrays of their starts and lengths."""

from __future__ import annotations

import numpy as np


def expand_ranges(start: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (owner, value), int64: the integers of the ranges ``[start_i, start_i + length_i)``, owner being i."""
    length = np.asarray(length, np.int64)
    owner = np.repeat(np.arange(len(length)), length)
    first = np.cumsum(length) - length
    return owner, np.arange(len(owner)) - first[owner] + np.asarray(start, np.int64)[owner]


def runs_of(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (start, stop) of the maximal ranges of ascending distinct integers.

    >>> [bounds.tolist() for bounds in runs_of(np.array([1, 2, 5]))]
    [[1, 5], [3, 6]]
    """
    rows = np.asarray(rows, np.int64)
    fresh = np.diff(rows, prepend=-2) != 1
    return rows[fresh], rows[np.append(fresh.nonzero()[0][1:], len(rows))[: fresh.sum()] - 1] + 1


def join_ranges(start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the union of ranges as ascending disjoint ranges (start, stop) that do not touch."""
    order = np.argsort(start, kind="stable")
    start, stop = start[order], np.maximum.accumulate(stop[order])
    fresh = np.ones(len(start), bool)
    fresh[1:] = start[1:] > stop[:-1]
    return start[fresh], stop[np.append(fresh.nonzero()[0][1:], len(start))[: fresh.sum()] - 1]


def clip_ranges(
    start: np.ndarray, stop: np.ndarray, run_start: np.ndarray, run_stop: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns (owner, run, start, stop): the parts that ranges have in common with ascending disjoint runs, none
    empty."""
    low, high = np.searchsorted(run_stop, start, "right"), np.searchsorted(run_start, stop, "left")
    owner, run = expand_ranges(low, np.where(start < stop, high - low, 0))
    return owner, run, np.maximum(start[owner], run_start[run]), np.minimum(stop[owner], run_stop[run])
