"""mamba and rwkv position by position, as one writes them down first: what the scans are timed and checked against."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from canvas_engineering.attention import MambaAttention, RWKVAttention


def indexed(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Position after position of tensors (B, m, …), by an index whose gradient is a whole tensor of zeros."""
    return (tuple(x[:, t] for x in tensors) for t in range(tensors[0].shape[1]))


def cut(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same, cut once: autograd then joins the gradients once, and a loop of small operations gets no faster."""
    return zip(*(x.unbind(1) for x in tensors))


class MambaLoop(MambaAttention):
    steps = staticmethod(indexed)

    def summarise(self, features: Tensor) -> Tensor:
        d = len(self.D)
        u, z, dt, b, c = features.split([d, d, self.dt_rank, self.state_size, self.state_size], dim=-1)
        rate, h, rows = -torch.exp(self.A_log), u.new_zeros(len(u), *self.A_log.shape), []
        for dt_t, u_t, b_t, c_t in self.steps(F.softplus(self.dt_proj(dt)), u, b, c):
            h = torch.exp(rate * dt_t[..., None]) * h + (dt_t * u_t)[..., None] * b_t[:, None]
            rows.append((h * c_t[:, None]).sum(-1))
        return (torch.stack(rows, 1) + self.D * u) * F.silu(z)


class RWKVLoop(RWKVAttention):
    steps = staticmethod(indexed)

    def summarise(self, features: Tensor) -> Tensor:
        k, v = features.chunk(2, dim=-1)
        keep, bonus = torch.exp(-torch.exp(self.decay.flatten())), torch.exp(self.bonus.flatten())
        total, mass, rows = torch.zeros_like(k[:, 0]), torch.zeros_like(k[:, 0]), []
        for a, v_t in self.steps(k.clamp(-10, 10).exp(), v):
            rows.append((total + bonus * a * v_t) / (mass + bonus * a + 1e-6))
            total, mass = total * keep + a * v_t, mass * keep + a
        return torch.stack(rows, 1)


class MambaCutLoop(MambaLoop):
    steps = staticmethod(cut)


class RWKVCutLoop(RWKVLoop):
    steps = staticmethod(cut)


LOOPS = {
    ("mamba", "indexed_loop"): MambaLoop,
    ("mamba", "cut_loop"): MambaCutLoop,
    ("rwkv", "indexed_loop"): RWKVLoop,
    ("rwkv", "cut_loop"): RWKVCutLoop,
}
