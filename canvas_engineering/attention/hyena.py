"""hyena: gated long convolutions of the keys, by FFT."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import nn

from canvas_kernels.autograd import apply_map, mark_for_compilers
from canvas_kernels.packing import RESOLVERS, IndexMap
from canvas_kernels.ranges import expand_ranges

from ..checked import checked_int, checked_read, checked_sizes
from ..derived_buffers import CanvasModule


class HyenaAttention(CanvasModule):
    """``order`` gated convolutions along the keys (Poli et al., 2023), with filters that are learned as spectra.

        v, x_1 … = in_proj(x_k);  per order o: v ← irfft(rfft(v · σ(gate_o(x_o))) · filter_o);  out_proj(v)

    The convolution is circular over the next power of two, its spectrum ``filter_o`` from bin 0 up. A read of n queries
    over m ≠ n keys convolves n rows, row i the mean of keys ⌊i·m/n⌋ … ⌈(i + 1)·m/n⌉ − 1; the queries themselves count
    for their number only. A power of two beyond ``max_len`` takes the spectrum interpolated linearly in frequency.

    Time is O((n log n + m) · d_model) beside the projections, memory O((n + m) · d_model).

    Args:
        d_model: width of the canvas.
        n_heads, dropout: taken for the sake of one signature; there are no heads and no attention probabilities.
        order: number of gated convolutions.
        max_len: rows that the spectra resolve; each has max_len // 2 + 1 bins.

    >>> module = HyenaAttention(8, max_len=16)
    >>> module(torch.randn(1, 3, 8), torch.randn(1, 5, 8), torch.randn(1, 5, 8)).shape
    torch.Size([1, 3, 8])
    """

    def __init__(self, d_model: int, n_heads: int = 4, dropout: float = 0.0, order: int = 2, max_len: int = 4096):
        super().__init__()
        mark_for_compilers()
        d_model, _, _ = checked_sizes(d_model, n_heads, dropout, divides=False)
        self.order = order = checked_int(order, "order", 1)
        max_len = checked_int(max_len, "max_len", 2)
        self.in_proj = nn.Linear(d_model, d_model * (order + 1))
        # mean |bin|² is 1: a convolution keeps the variance
        bins = (torch.randn(d_model, max_len // 2 + 1, 2) * 0.5**0.5 for _ in range(order))
        self.filter_params = nn.ParameterList(nn.Parameter(part) for part in bins)
        self.gates = nn.ModuleList(nn.Linear(d_model, d_model) for _ in range(order))
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """One read: n = queries.shape[1] rows made of keys (B, m, d_model), in order → (B, n, d_model).

        ``values`` are not used: what is convolved is made of the keys.
        """
        checked_read(queries, keys, values)
        n = queries.shape[1]
        v, *gates = self.in_proj(average_to(keys, n)).chunk(self.order + 1, dim=-1)
        length = 1 << (n - 1).bit_length()
        wide = torch.promote_types(v.dtype, torch.float32)  # there is no 16-bit FFT on CPUs
        for gate, x, spectrum in zip(self.gates, gates, self.filter_params):
            bins = _resampled(spectrum.to(wide), length // 2 + 1)
            wave = (v * torch.sigmoid(gate(x))).to(wide).transpose(1, 2).contiguous()  # [B, d, n]
            if wave.numel():  # there is no FFT of an empty batch
                wave = torch.fft.irfft(torch.fft.rfft(wave, n=length) * bins, n=length)
            else:
                wave = wave * spectrum.sum()
            v = wave[..., :n].to(x.dtype).transpose(1, 2)
        return self.out_proj(v)


def _resampled(spectrum: torch.Tensor, bins: int) -> torch.Tensor:
    """(d, K, 2) → complex (d, bins): the first bins, or K bins interpolated linearly where more are wanted."""
    last, wanted = spectrum.shape[1] - 1, bins - 1
    if wanted <= last:
        return torch.view_as_complex(spectrum[:, :bins].contiguous())
    # Every interval between two bins makes as many new ones as the fullest, and those that there are taken from where
    # they stand: so nothing is gathered twice, and the gradient is a copy.
    interval = torch.arange(last, device=spectrum.device)
    first = -(-interval * wanted // last)  # the first new bin of each interval
    room = -(-wanted // last)
    place = first + torch.arange(room, device=spectrum.device)[:, None]  # [room, intervals]
    share = ((place * last - interval * wanted) / wanted).to(spectrum.dtype)
    parts = spectrum.permute(2, 0, 1).contiguous()  # [2, d, K]
    between = torch.lerp(parts[..., None, :-1], parts[..., None, 1:], share)  # [2, d, room, intervals]
    between = between.transpose(2, 3).flatten(2)
    if wanted % last:
        new = torch.arange(wanted, device=spectrum.device)
        low = new * last // wanted
        between = between.index_select(2, low * room + new - first[low])
    return torch.complex(*torch.cat([between, parts[..., -1:]], 2))


def average_to(x: torch.Tensor, n: int) -> torch.Tensor:
    """x (B, m, d) averaged to n rows: row i is the mean of rows ⌊i·m/n⌋ … ⌈(i + 1)·m/n⌉ − 1.

    >>> average_to(torch.tensor([[[1.0], [2.0], [6.0]]]), 2).flatten().tolist()
    [1.5, 4.0]
    """
    m = x.shape[1]
    if m == n:
        return x
    if m % n == 0:
        return x.unflatten(1, (n, m // n)).mean(2)
    if n % m == 0:
        return x[:, :, None].expand(-1, -1, n // m, -1).flatten(1, 2)
    return apply_map(x, f"{MEANS}:{m} {n}", False, 1)


@functools.lru_cache(maxsize=256)
def _means(sizes: str) -> IndexMap:
    """The map of :func:`average_to` for "m n"."""
    m, n = map(int, sizes.split())
    i = np.arange(n)
    start, stop = i * m // n, -(-(i + 1) * m // n)
    owner, row = expand_ranges(start, stop - start)
    offset = np.concatenate([[0], np.cumsum(stop - start)])
    return IndexMap.sums(row, offset, m, 1.0 / (stop - start)[owner])


MEANS = "means"
RESOLVERS[MEANS] = _means
