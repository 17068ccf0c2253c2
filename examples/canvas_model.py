"""CanvasModel: encoders, a transformer on a canvas, decoders and losses, for clips of a LeRobotCanvasDataset.

Cameras enter as patches, one for each of a region's cells; numbers as one linear map of a frame. What is not known yet
is predicted: by regression, or, in regions of the carrier "diffusive", by flow matching (Lipman et al., 2023): x_t =
(1 − t) · noise + t · x, and the model learns the velocity x − noise.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from canvas_engineering import AttentionDispatcher, CanvasLayout, CanvasTopology, SpatiotemporalCanvas


class Block(nn.Module):
    """Pre-norm attention along the topology, and an MLP."""

    def __init__(self, layout: CanvasLayout, topology: CanvasTopology, n_heads: int):
        super().__init__()
        width = layout.d_model
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = AttentionDispatcher(topology, layout, width, n_heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(self.norms[0](x), add_to=x)
        return x + self.mlp(self.norms[1](x))


class Coder(nn.Module):
    """One region's encoder and decoder: (B, frames, *shape) ↔ (B, positions, d_model)."""

    def __init__(self, name: str, layout: CanvasLayout, shape: tuple[int, ...]):
        super().__init__()
        frames, *cells = layout.region_size(name)
        self.shape, self.frames, self.cells, width = shape, frames, math.prod(cells), layout.d_model
        self.grid = tuple(cells) if len(shape) == 3 else None
        if self.grid:
            channels, height, columns = shape
            if len(cells) != 2 or height % cells[0] or columns % cells[1]:
                raise ValueError(f"region {name!r} of {cells} cells cannot hold {height} × {columns} pixels in patches")
            self.patch = (height // cells[0], columns // cells[1])
            size = channels * math.prod(self.patch)
            self.into, self.out = nn.Linear(size, width), nn.Linear(width, size)
        else:
            size = math.prod(shape)
            self.into, self.out = nn.Linear(size, self.cells * width), nn.Linear(self.cells * width, size)
        # at first zero: of a held region the last known frame
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def encode(self, values: Tensor) -> Tensor:
        """(B, frames, *shape) → (B, frames, cells, d_model)."""
        if self.grid:
            (rows, columns), (height, width) = self.grid, self.patch
            values = values.unflatten(-2, (rows, height)).unflatten(-1, (columns, width))
            # (B, frames, C, rows, height, columns, width) → patches
            values = values.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(2, 3)
            return self.into(values)
        return self.into(values.flatten(2)).unflatten(-1, (self.cells, -1))

    def decode(self, x: Tensor) -> Tensor:
        """(B, positions, d_model) → (B, frames, *shape)."""
        x = x.unflatten(1, (self.frames, self.cells))
        if self.grid:
            (rows, columns), (height, width) = self.grid, self.patch
            x = self.out(x).unflatten(-1, (self.shape[0], height, width)).unflatten(2, (rows, columns))
            return x.permute(0, 1, 4, 2, 5, 3, 6).flatten(5).flatten(3, 4)
        return self.out(x.flatten(2)).unflatten(-1, self.shape)


class TextCoder(nn.Module):
    """Text, a position for a token: bytes (B, n) by a table, or a language model's (B, n, size) by a linear map."""

    def __init__(self, width: int, shape: tuple[int, ...]):
        super().__init__()
        self.into = nn.Embedding(257, width) if len(shape) == 1 else nn.Linear(shape[-1], width)

    def forward(self, values: Tensor) -> Tensor:
        """Returns (B, n, d_model)."""
        return self.into(values)


class CanvasModel(nn.Module):
    """Predicts what of a clip is not known.

    Args:
        layout, topology: the canvas.
        shapes: region to the shape of one frame's value: (3, height, width) of a camera, (n,) of numbers.
        known: region to the real steps up to which its frames are known, inclusive.
        held: regions that are predicted as a change from their last known frame, as what moves slowly is; others are
            predicted as they are.
        depth, n_heads: of the transformer.
        texts: regions that hold text, all of it known, to the shape of a sample: (n,) bytes, or (n, size).
        backbone: called with x and the time of flow matching in place of the transformer, as a `VideoBackbone` is.
    """

    def __init__(
        self,
        layout: CanvasLayout,
        topology: CanvasTopology,
        shapes: Mapping[str, tuple[int, ...]],
        known: Mapping[str, int],
        held: Collection[str] = (),
        depth: int = 4,
        n_heads: int = 4,
        texts: Mapping[str, tuple[int, ...]] | None = None,
        backbone: nn.Module | None = None,
    ):
        super().__init__()
        self.layout, self.held = layout, frozenset(held)
        self.canvas = SpatiotemporalCanvas(layout)
        self.coders = nn.ModuleDict({name: Coder(name, layout, tuple(shape)) for name, shape in shapes.items()})
        self.texts = nn.ModuleDict({name: TextCoder(layout.d_model, shape) for name, shape in (texts or {}).items()})
        self.blocks = nn.ModuleList(Block(layout, topology, n_heads) for _ in range(depth if backbone is None else 0))
        self.backbone = backbone
        self.norm = nn.LayerNorm(layout.d_model)
        self.diffusive = tuple(name for name in shapes if layout.region_spec(name).carrier == "diffusive")
        width = layout.d_model
        if self.diffusive:  # what no loss reaches would stop data parallel training
            self.time = nn.Sequential(nn.Linear(16, width), nn.GELU(), nn.Linear(width, width))
        others = [name for name in shapes if name not in self.diffusive]
        self.unknown = nn.ParameterDict({name: nn.Parameter(0.02 * torch.randn(width)) for name in others})
        for name in shapes:
            spec = layout.region_spec(name)
            real = torch.arange(*spec.bounds[:2]) * spec.period
            self.register_buffer(f"known_{name}", real <= known[name], persistent=False)

    def known(self, name: str) -> Tensor:
        """bool (frames,): which of a region's frames are known."""
        return getattr(self, f"known_{name}")

    def forward(self, clip: Mapping[str, Tensor], noisy: Mapping[str, Tensor], t: Tensor) -> dict[str, Tensor]:
        """Region to its prediction, (B, frames, *shape): values, and velocities of diffusive regions.

        ``clip``: region to values. ``noisy``: of diffusive regions x_t, which stand for the frames that are not known.
        ``t``: (B,), the time of flow matching.
        """
        x = self.canvas.create_empty(len(t)).to(t.device)
        if noisy:
            steps = torch.exp2(torch.arange(8, device=t.device)) * torch.pi * t[:, None]
            time = self.time(torch.cat([steps.sin(), steps.cos()], -1))[:, None, None]
        for name, coder in self.coders.items():
            known = self.known(name)[:, None, None]
            other = coder.encode(noisy[name]) + time if name in noisy else self.unknown[name]
            x = self.canvas.place(x, torch.where(known, coder.encode(clip[name]), other).flatten(1, 2), name)
        for name, text in self.texts.items():
            x = self.canvas.place(x, text(clip[name]), name)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x if self.backbone is None else self.backbone(x, t))
        decoded = {name: coder.decode(self.canvas.extract(x, name)) for name, coder in self.coders.items()}
        changes = self.held - noisy.keys()
        # sums, as FSDP2 wants no views of what a model returns
        return {name: y + (self.last_known(name, clip) if name in changes else 0.0) for name, y in decoded.items()}

    def last_known(self, name: str, clip: Mapping[str, Tensor]) -> Tensor:
        """(B, 1, *shape): a region's last known frame; 0 where none is known."""
        count = int(self.known(name).sum())
        return clip[name][:, count - 1 : count] if count else torch.zeros_like(clip[name][:, :1])

    def loss(
        self, clip: Mapping[str, Tensor], mask: Mapping[str, Tensor], run: nn.Module | None = None
    ) -> tuple[Tensor, dict[str, float]]:
        """The weighted loss of what is not known, and each region's mean squared error.

        ``mask``: (B, frames). ``run``: this model as DistributedDataParallel or FSDP wraps it, whose forward is called.
        """
        some = clip[next(iter(self.coders))]
        t = torch.rand(len(some), device=some.device) if self.diffusive else some.new_ones(len(some))
        noise = {name: torch.randn_like(clip[name]) for name in self.diffusive}
        at = {name: t.view(-1, *[1] * (clip[name].dim() - 1)) for name in noise}
        noisy = {name: (1 - at[name]) * noise[name] + at[name] * clip[name] for name in noise}
        total, errors = torch.zeros((), device=some.device), {}
        for name, found in (self if run is None else run)(clip, noisy, t).items():
            target = clip[name] - noise[name] if name in noise else clip[name]
            wanted = (mask[name] & ~self.known(name)).float()
            error = F.mse_loss(found.float(), target.float(), reduction="none").flatten(2).mean(-1)
            error = (error * wanted).sum() / wanted.sum().clamp(min=1)
            spec = self.layout.region_spec(name)
            total = total + spec.loss_weight * spec.is_output * error
            errors[name] = error.item()
        return total, errors

    @torch.no_grad()
    def predict(self, clip: Mapping[str, Tensor], steps: int = 8) -> dict[str, Tensor]:
        """The clip with what is not known filled in; diffusive regions by ``steps`` Euler steps from noise."""
        some = clip[next(iter(self.coders))]
        noisy = {name: torch.randn_like(clip[name]) for name in self.diffusive}
        for i in range(steps if noisy else 1):
            t = some.new_full((len(some),), i / steps if noisy else 1.0)
            found = self(clip, noisy, t)
            noisy = {name: x + found[name] / steps for name, x in noisy.items()}
        result = {}
        for name in self.coders:
            known = self.known(name).view(-1, *[1] * (clip[name].dim() - 2))
            result[name] = torch.where(known, clip[name], noisy.get(name, found[name]))
        return result
