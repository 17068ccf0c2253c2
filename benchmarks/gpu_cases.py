"""The patterns that kernels are timed on, as data, and the contestants: part of ``python -m benchmarks.gpu``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from canvas_kernels.table import BlockTable


@dataclass(frozen=True)
class Pattern:
    """Positions in groups; group g reads group g − lag for every lag, and all groups read and are read by ``text``.

    ``sizes`` [groups]: positions per group. ``text``: positions before the first group. Every pair is selected by one
    read, so edge and joint form select the same pairs and differ in their softmaxes only.
    """

    name: str
    sizes: tuple[int, ...]
    lags: tuple[int, ...]
    batch: int
    heads: int
    head_dim: int
    text: int = 0
    contestants: tuple[str, ...] = ("sdpa_mask", "flex", "per_edge")
    starts: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "starts", self.text + np.concatenate([[0], np.cumsum(self.sizes)]))

    @property
    def positions(self) -> int:
        return int(self.starts[-1])

    def reads(self) -> list[tuple[int, int, int, int, int]]:
        """(edge, q_start, q_stop, k_start, k_stop): one edge per lag, then groups → text, then text → all."""
        found = []
        for edge, lag in enumerate(self.lags):
            for g in range(lag, len(self.sizes)):
                found.append((edge, *self.starts[g : g + 2].tolist(), *self.starts[g - lag : g - lag + 2].tolist()))
        if self.text:
            found.append((len(self.lags), self.text, self.positions, 0, self.text))
            found.append((len(self.lags) + 1, 0, self.text, 0, self.positions))
        return found

    def table(self, form: str) -> BlockTable:
        """The pattern with every weight 1, a segment per read in edge form."""
        edge, *ranges = (np.array(column) for column in zip(*self.reads()))
        names = dict(zip(("q_start", "q_stop", "k_start", "k_stop"), ranges), weight=np.ones(len(edge)))
        if form == "joint":
            return BlockTable.from_rectangles("joint", self.positions, 0, **names)
        names |= dict(segment=np.arange(len(edge)), edge=edge)
        return BlockTable.from_rectangles("edge", self.positions, int(edge.max()) + 1, **names)

    def group(self, device: str | torch.device) -> torch.Tensor:
        """int32 [n]: the group of each position, −1 for text."""
        sizes = np.array([self.text, *self.sizes])
        return torch.from_numpy(np.repeat(np.arange(-1, len(self.sizes)), sizes)).to(device, torch.int32)


PATTERNS = (
    Pattern("dense_d64", (16384,), (0,), 1, 32, 64, contestants=("sdpa",)),
    Pattern("dense_d128", (16384,), (0,), 1, 16, 128, contestants=("sdpa",)),
    Pattern("block_diagonal_90_d64", (1640,) * 10, (0,), 2, 32, 64),
    Pattern("causal_video_d64", (1024,) * 16, (0, 1), 2, 16, 64),
    Pattern("causal_video_d128", (1024,) * 16, (0, 1), 2, 8, 128),
    Pattern("cogvideox_d64", (1350,) * 13, (0, 1), 1, 48, 64, text=226),
    # The 5B model under 10 % density: each half of a frame reads itself and that half of the frame before. On an H200
    # joint form is to take at most 0.96 ms forward and 3.24 ms backward.
    Pattern("half_frames_cogvideox_d64", (675,) * 26, (0, 2), 1, 48, 64, text=226),
    Pattern("fleet_d64", (5, 3, 8, 6, 1, 4) * 256, (0, 1, 2), 8, 8, 64),
)
TOY = (Pattern("toy", (9, 14, 11), (0, 1), 1, 1, 16, text=5, contestants=("sdpa_mask", "per_edge")),)


def contestant(name: str, pattern: Pattern, q, k, v) -> Callable[[], torch.Tensor]:
    """A call that attends without our kernels: what ``name`` needs is built before it is timed.

    "sdpa": no mask. "sdpa_mask": a dense additive mask. "flex": compiled FlexAttention with a BlockMask. "per_edge": a
    scaled_dot_product_attention per read, summed. The first three are joint, the last is edge form.
    """
    if name == "sdpa":
        return lambda: F.scaled_dot_product_attention(q, k, v)
    if name == "sdpa_mask":
        mask = torch.full((pattern.positions, pattern.positions), -torch.inf, dtype=q.dtype, device=q.device)
        for _, q0, q1, k0, k1 in pattern.reads():
            mask[q0:q1, k0:k1] = 0
        return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if name == "flex":
        return _flex(pattern, q, k, v)
    if name == "per_edge":
        return _per_edge(pattern, q, k, v)
    raise KeyError(f"no contestant is called {name!r}")


def selector(pattern: Pattern, device: str | torch.device) -> Callable:
    """The pattern as FlexAttention's mask_mod: computed from two groups, never looked up in a mask."""
    group, lags, text = pattern.group(device), pattern.lags, pattern.text

    def selects(batch, head, query, key):
        lag = group[query] - group[key]
        chosen = lag == lags[0]
        for other in lags[1:]:
            chosen = chosen | (lag == other)
        apart = (group[query] >= 0) & (group[key] >= 0)
        return (chosen & apart) | ~apart if text else chosen

    return selects


def _flex(pattern, q, k, v):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    n = pattern.positions
    mask = create_block_mask(selector(pattern, q.device), None, None, n, n, device=q.device, _compile=True)
    attend = torch.compile(flex_attention)
    return lambda: attend(q, k, v, block_mask=mask)


def _per_edge(pattern, q, k, v):
    reads = pattern.reads()
    count = torch.zeros(pattern.positions, device=q.device)
    for _, q0, q1, _, _ in reads:
        count[q0:q1] += 1
    share = (1 / count)[:, None].to(q.dtype)

    def attend():
        total = torch.zeros_like(q)
        for _, q0, q1, k0, k1 in reads:
            total[:, :, q0:q1] += F.scaled_dot_product_attention(q[:, :, q0:q1], k[:, :, k0:k1], v[:, :, k0:k1])
        return total * share

    return attend
