"""Who reads whom, and when: connections, topologies, and the frames that a temporal connection pairs."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

__all__ = ["FrameReads", "TemporalFill", "resolve_frames"]


class TemporalFill(enum.Enum):
    """What a read does when dst has no frame at the real time that is asked for."""

    DROP = "drop"
    HOLD = "hold"
    INTERPOLATE = "interpolate"

    # Members are singletons; Enum's own hash is Python code, which every cache key of a large topology would pay for.
    __hash__ = object.__hash__


@dataclass(frozen=True, eq=False)
class FrameReads:
    """The reads that a pair of temporal offsets makes, as ranges of absolute canvas frames, one row per read.

    Attributes:
        q_start, q_stop: int64 ``[n]``: the src frames ``q_start .. q_stop - 1`` query.
        k_start, k_stop: int64 ``[n]``: the dst frames ``k_start .. k_stop - 1`` are read.
        fraction: float64 ``[n]``: the read's weight is the connection's weight times this; never 0.

    Rows go up in the reference frame; for one reference frame the past comes before the future, and inverse-distance
    anchors go by nearness, the earlier first at equal distance. The arrays are read-only.
    """

    q_start: np.ndarray
    q_stop: np.ndarray
    k_start: np.ndarray
    k_stop: np.ndarray
    fraction: np.ndarray

    def __len__(self) -> int:
        return len(self.fraction)


def _frame_reads(q_start, q_stop, k_start, k_stop, fraction) -> FrameReads:
    arrays = [np.ascontiguousarray(array) for array in (q_start, q_stop, k_start, k_stop, fraction)]
    for array in arrays:
        array.setflags(write=False)
    return FrameReads(*arrays)


@lru_cache(maxsize=1024)
def resolve_frames(
    T: int,
    src_frames: tuple[int, int],
    dst_frames: tuple[int, int],
    src_period: int,
    dst_period: int,
    t_src: int | None,
    t_dst: int | None,
    fill: TemporalFill,
    order: int,
) -> FrameReads:
    """Pairs src frames with dst frames, for every reference frame ``r`` of ``0 .. T - 1``.

    Src queries at frame ``r + t_src`` (all of its frames if ``t_src`` is None) and asks for dst at the real time
    ``(r + t_dst) * p``, with ``p`` src's period if ``t_src`` is an int, else 1 (all of dst if ``t_dst`` is None). The
    real time of dst's frame ``f`` is ``f * dst_period``. A time at which dst has no frame goes by ``fill``: DROP reads
    nothing; HOLD the latest earlier frame; INTERPOLATE of order up to 1 the nearest earlier and later frames, at
    distances a and b, with fractions b / (a + b) and a / (a + b), or the only one there is; INTERPOLATE of order n >= 2
    the n + 1 nearest frames with fractions d**-n / sum(d**-n).

    Args:
        T: number of canvas frames.
        src_frames, dst_frames: absolute half-open frame ranges (t0, t1).
        src_period, dst_period: real-time steps per canvas frame.
        t_src, t_dst: offsets from the reference frame, or None for all frames.
        fill: what to do where dst has no frame.
        order: interpolation order.

    Returns:
        FrameReads of the given frames; the cost goes with T (times the order), not with its square.

    >>> reads = resolve_frames(3, (0, 3), (0, 1), 1, 2, 0, 0, TemporalFill.HOLD, 1)
    >>> reads.q_start.tolist(), reads.k_start.tolist()
    ([0, 1, 2], [0, 0, 0])
    """
    (src_first, src_end), (first, end) = src_frames, dst_frames
    if t_src is None and t_dst is None:
        rows = [np.array([frame], dtype=np.int64) for frame in (src_first, src_end, first, end)]
        return _frame_reads(*rows, np.ones(1))
    if t_src is None:
        reference = np.arange(T, dtype=np.int64)
        q_start, q_stop = np.full(T, src_first, dtype=np.int64), np.full(T, src_end, dtype=np.int64)
    else:
        reference = np.arange(max(0, src_first - t_src), min(T, src_end - t_src), dtype=np.int64)
        q_start, q_stop = reference + t_src, reference + t_src + 1
    if t_dst is None:
        n = len(reference)
        full = np.full(n, first, dtype=np.int64), np.full(n, end, dtype=np.int64)
        return _frame_reads(q_start, q_stop, *full, np.ones(n))

    time = (reference + t_dst) * (1 if t_src is None else src_period)
    floor = time // dst_period
    exact = (floor * dst_period == time) & (floor >= first) & (floor < end)
    # [n, anchors]: the dst frames that each row may read, with fraction 0 for those that it does not
    if fill is TemporalFill.DROP:
        anchors, fractions = floor[:, None], exact[:, None].astype(np.float64)
    elif fill is TemporalFill.HOLD:
        anchors = np.minimum(floor, end - 1)[:, None]
        fractions = (anchors >= first).astype(np.float64)
    elif order <= 1:
        anchors, fractions = _linear_anchors(time, floor, exact, first, end, dst_period)
    else:
        anchors, fractions = _nearest_anchors(time, floor, exact, first, end, dst_period, order)
    row, anchor = np.nonzero(fractions)
    k_start = anchors[row, anchor]
    return _frame_reads(q_start[row], q_stop[row], k_start, k_start + 1, fractions[row, anchor])


def _linear_anchors(time, floor, exact, first, end, period):
    past, future = np.minimum(floor, end - 1), np.maximum(floor + 1, first)
    has_past, has_future = past >= first, (future < end) & ~exact
    after, before = time - past * period, future * period - time  # distances to the past and to the future frame
    span = np.maximum(after + before, 1)
    past_fraction = np.where(has_future, before / span, 1.0) * has_past
    future_fraction = np.where(has_past, after / span, 1.0) * has_future
    return np.stack([past, future], axis=1), np.stack([past_fraction, future_fraction], axis=1)


def _nearest_anchors(time, floor, exact, first, end, period, order):
    count = min(order + 1, end - first)
    # dst's frames are evenly spaced, so the nearest `count` lie within `count` frames of the one just before.
    window = np.clip(floor, first, end - 1)[:, None] + np.arange(-count, count + 1)
    distance = np.abs(window * period - time[:, None])
    distance[(window < first) | (window >= end)] = np.iinfo(np.int64).max
    nearest = np.argsort(distance, axis=1, kind="stable")[:, :count]  # stable: the earlier one first at equal distance
    anchors, distance = np.take_along_axis(window, nearest, 1), np.take_along_axis(distance, nearest, 1)
    # Relative to the nearest distance, no power of a distance can overflow or vanish altogether.
    ratio = (distance[:, :1] / np.maximum(distance, 1)) ** float(order)
    ratio[exact] = np.arange(count) == 0
    return anchors, ratio / ratio.sum(axis=1, keepdims=True)
