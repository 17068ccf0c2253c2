"""Half-open ranges of rows, as numpy arrays of their starts and lengths."""

from __future__ import annotations

import numpy as np


def expand_ranges(start: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (owner, value), int64: the integers of the ranges ``[start_i, start_i + length_i)``, owner being i."""
    length = np.asarray(length, np.int64)
    owner = np.repeat(np.arange(len(length)), length)
    first = np.cumsum(length) - length
    return owner, np.arange(len(owner)) - first[owner] + np.asarray(start, np.int64)[owner]
