"""Maps a video model's prediction to actions."""

from __future__ import annotations

import torch
from torch import nn

from .checked import checked_int, checked_tensor
from .derived_buffers import CanvasModule

__all__ = ["ActionHead"]


class ActionHead(CanvasModule):
    """Linear → GELU → Linear on the mean over time and space of a latent prediction.

    Args:
        latent_channels: C.
        action_dim: numbers per action.
        hidden_dim: width between the layers, by default max(C // 2, 8).

    >>> ActionHead(latent_channels=16, action_dim=7)(torch.zeros(2, 13, 16, 60, 90)).shape
    torch.Size([2, 7])
    """

    def __init__(self, latent_channels: int = 16, action_dim: int = 7, hidden_dim: int | None = None):
        super().__init__()
        self.latent_channels = latent_channels = checked_int(latent_channels, "latent_channels", 1)
        self.action_dim = action_dim = checked_int(action_dim, "action_dim", 1)
        hidden_dim = max(latent_channels // 2, 8) if hidden_dim is None else checked_int(hidden_dim, "hidden_dim", 1)
        self.net = nn.Sequential(nn.Linear(latent_channels, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, action_dim))

    def forward(self, noise_pred: torch.Tensor) -> torch.Tensor:
        """Maps (B, T, C, *spatial), averaged over T and space, or (B, N, C), averaged over N, to (B, action_dim).

        Raises:
            ValueError: fewer than three dimensions, or another number of channels.
        """
        if checked_tensor(noise_pred, "noise_pred").dim() < 3 or noise_pred.shape[2] != self.latent_channels:
            raise ValueError(
                f"noise_pred must be (B, T, C, *spatial) or (B, N, C) with C = {self.latent_channels}; "
                f"got {tuple(noise_pred.shape)}"
            )
        # (B, C, …): with three dimensions, N stands for time
        mean = noise_pred.transpose(1, 2).flatten(2).mean(-1)
        weight = self.net[0].weight
        assert isinstance(weight, torch.Tensor)
        return self.net(mean.to(weight.dtype))
