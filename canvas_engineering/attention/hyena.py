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
    """``order`` gated convolutions along the keys (Poli et al., 2023), with filters parametrised by their spectra.

        v, x_1 … = in_proj(x_k);  per order o: v ← irfft(rfft(v · σ(gate_o(x_o))) · filter_o);  out_proj(v)

    The convolution is circular over the next power of two, with the spectrum ``filter_o`` from bin 0 up. For n queries
    and m ≠ n keys it runs over n rows, row i being the mean of keys ⌊i·m/n⌋ … ⌈(i + 1)·m/n⌉ − 1; only the number of
    queries matters. Beyond ``max_len`` the spectrum is interpolated linearly in frequency.

    Time is O((n log n + m) · d_model) plus the projections, memory O((n + m) · d_model).

    Args:
        d_model: width of the canvas.
        n_heads, dropout: unused, kept for a common signature: there are no heads and no attention probabilities.
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
        """Returns n = queries.shape[1] rows from keys (B, m, d_model), in order: (B, n, d_model).

        ``values`` are unused.
        """
        checked_read(queries, keys, values)
        n = queries.shape[1]
        v, *gates = self.in_proj(average_to(keys, n)).chunk(self.order + 1, dim=-1)
        length = 1 << (n - 1).bit_length()
        wide = torch.promote_types(v.dtype, torch.float32)  # CPUs have no 16-bit FFT
        for gate, x, spectrum in zip(self.gates, gates, self.filter_params):
            bins = _resampled(spectrum.to(wide), length // 2 + 1)
            wave = (v * torch.sigmoid(gate(x))).to(wide).transpose(1, 2).contiguous()  # [B, d, n]
            if wave.numel():  # FFTs of an empty batch are not supported
                wave = torch.fft.irfft(torch.fft.rfft(wave, n=length) * bins, n=length)
            else:
                wave = wave * spectrum.sum()
            v = wave[..., :n].to(x.dtype).transpose(1, 2)
        return self.out_proj(v)


def _resampled(spectrum: torch.Tensor, bins: int) -> torch.Tensor:
    """Maps (d, K, 2) to complex (d, bins): the first bins, or K bins interpolated linearly if more are needed."""
    last, n_new = spectrum.shape[1] - 1, bins - 1
    if n_new <= last:
        return torch.view_as_complex(spectrum[:, :bins].contiguous())
    # Every interval between two bins makes as many new bins as the fullest one, and those needed are selected: so no
    # bin is gathered twice, and the gradient is a copy.
    interval = torch.arange(last, device=spectrum.device)
    first = -(-interval * n_new // last)  # the first new bin of each interval
    per_interval = -(-n_new // last)
    number = first + torch.arange(per_interval, device=spectrum.device)[:, None]  # [per_interval, intervals]
    fraction = ((number * last - interval * n_new) / n_new).to(spectrum.dtype)
    parts = spectrum.permute(2, 0, 1).contiguous()  # [2, d, K]
    between = torch.lerp(parts[..., None, :-1], parts[..., None, 1:], fraction)  # [2, d, per_interval, intervals]
    between = between.transpose(2, 3).flatten(2)
    if n_new % last:
        new = torch.arange(n_new, device=spectrum.device)
        low = new * last // n_new
        between = between.index_select(2, low * per_interval + new - first[low])
    return torch.complex(*torch.cat([between, parts[..., -1:]], 2))


def average_to(x: torch.Tensor, n: int) -> torch.Tensor:
    """Averages x (B, m, d) to n rows: row i is the mean of rows ⌊i·m/n⌋ … ⌈(i + 1)·m/n⌉ − 1.

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
    """Returns the map of :func:`average_to` for the string "m n"."""
    m, n = map(int, sizes.split())
    i = np.arange(n)
    start, stop = i * m // n, -(-(i + 1) * m // n)
    owner, row = expand_ranges(start, stop - start)
    offset = np.concatenate([[0], np.cumsum(stop - start)])
    return IndexMap.sums(row, offset, m, 1.0 / (stop - start)[owner])


MEANS = "means"
RESOLVERS[MEANS] = _means
