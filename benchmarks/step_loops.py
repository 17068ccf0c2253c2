"""mamba and rwkv position by position, as one writes them down first: what the scans are timed and checked against."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from canvas_engineering.attention import MambaAttention, RWKVAttention


class MambaLoop(MambaAttention):
    def summarise(self, features: torch.Tensor) -> torch.Tensor:
        d = len(self.D)
        u, z, dt, b, c = features.split([d, d, self.dt_rank, self.state_size, self.state_size], dim=-1)
        rate, h, rows, dt = -torch.exp(self.A_log), 0.0, [], F.softplus(self.dt_proj(dt))
        for t in range(u.shape[1]):
            h = torch.exp(rate * dt[:, t, :, None]) * h + (dt[:, t] * u[:, t])[..., None] * b[:, t, None]
            rows.append((h * c[:, t, None]).sum(-1))
        return (torch.stack(rows, 1) + self.D * u) * F.silu(z)


class RWKVLoop(RWKVAttention):
    def summarise(self, features: torch.Tensor) -> torch.Tensor:
        k, v = features.chunk(2, dim=-1)
        keep, bonus = torch.exp(-torch.exp(self.decay.flatten())), torch.exp(self.bonus.flatten())
        a, total, mass, rows = k.clamp(-10, 10).exp(), 0.0, 0.0, []
        for t in range(k.shape[1]):
            rows.append((total + bonus * a[:, t] * v[:, t]) / (mass + bonus * a[:, t] + 1e-6))
            total, mass = total * keep + a[:, t] * v[:, t], mass * keep + a[:, t]
        return torch.stack(rows, 1)


LOOPS = {"mamba": MambaLoop, "rwkv": RWKVLoop}
