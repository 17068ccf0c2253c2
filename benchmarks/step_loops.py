"""mamba and rwkv position by position, as one writes them down first: what the scans are timed and checked against."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from canvas_engineering.attention import MambaAttention, RWKVAttention


def _at(x: torch.Tensor, t: int) -> torch.Tensor:
    return x[:, t]


def _listed(*tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Position after position of tensors (B, m, …), cut once: autograd then joins the gradients once."""
    return list(zip(*(t.unbind(1) for t in tensors)))


class MambaLoop(MambaAttention):
    """The recurrence with an index into every input at every step, the gradient of which is a whole tensor of zeros."""

    def summarise(self, features: torch.Tensor) -> torch.Tensor:
        u, z, dt, b, c = self._inputs(features)
        rate, h, rows = -torch.exp(self.A_log), u.new_zeros(len(u), *self.A_log.shape), []
        for t in range(u.shape[1]):
            dt_t, u_t, b_t, c_t = (_at(x, t) for x in (dt, u, b, c))
            h = torch.exp(rate * dt_t[..., None]) * h + (dt_t * u_t)[..., None] * b_t[:, None]
            rows.append((h * c_t[:, None]).sum(-1))
        return (torch.stack(rows, 1) + self.D * u) * F.silu(z)

    def _inputs(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        d = len(self.D)
        u, z, dt, b, c = features.split([d, d, self.dt_rank, self.state_size, self.state_size], dim=-1)
        return u, z, F.softplus(self.dt_proj(dt)), b, c


class MambaCutLoop(MambaLoop):
    """The same loop over inputs cut into positions beforehand: as fast as a loop of small operations gets."""

    def summarise(self, features: torch.Tensor) -> torch.Tensor:
        u, z, dt, b, c = self._inputs(features)
        rate, h, rows = -torch.exp(self.A_log), u.new_zeros(len(u), *self.A_log.shape), []
        for dt_t, u_t, b_t, c_t in _listed(dt, u, b, c):
            h = torch.exp(rate * dt_t[..., None]) * h + (dt_t * u_t)[..., None] * b_t[:, None]
            rows.append((h * c_t[:, None]).sum(-1))
        return (torch.stack(rows, 1) + self.D * u) * F.silu(z)


class RWKVLoop(RWKVAttention):
    """The recurrence with an index into every input at every step."""

    def summarise(self, features: torch.Tensor) -> torch.Tensor:
        k, v = features.chunk(2, dim=-1)
        a = k.clamp(-10, 10).exp()
        keep, bonus = torch.exp(-torch.exp(self.decay.flatten())), torch.exp(self.bonus.flatten())
        total = mass = torch.zeros_like(a[:, 0])
        rows = []
        for t in range(a.shape[1]):
            total, mass, row = self._step(total, mass, _at(a, t), _at(v, t), keep, bonus)
            rows.append(row)
        return torch.stack(rows, 1)

    def _step(self, total, mass, a, v, keep, bonus):
        row = (total + bonus * a * v) / (mass + bonus * a + 1e-6)
        return total * keep + a * v, mass * keep + a, row


class RWKVCutLoop(RWKVLoop):
    """The same loop over inputs cut into positions beforehand."""

    def summarise(self, features: torch.Tensor) -> torch.Tensor:
        k, v = features.chunk(2, dim=-1)
        keep, bonus = torch.exp(-torch.exp(self.decay.flatten())), torch.exp(self.bonus.flatten())
        total = mass = torch.zeros_like(k[:, 0])
        rows = []
        for a_t, v_t in _listed(k.clamp(-10, 10).exp(), v):
            total, mass, row = self._step(total, mass, a_t, v_t, keep, bonus)
            rows.append(row)
        return torch.stack(rows, 1)
