"""CogVideoX's parts in a CanvasModel: its VAE for cameras, and its transformer, grafted, in place of the small one.

The canvas lies in the video model's latent grid: a position is one of its tokens, and the rows below the camera hold
states, actions and text, as the camera's rows hold patches of latents.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

if not __package__:  # run as a file, whose folder has no package `examples`
    sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("", "kernels")]

from canvas_engineering import CanvasLayout, CanvasTopology, Connection, cogvideox_layout, graft_looped_blocks
from examples.train_robot import rotary_tables

TINY_VAE: dict[str, Any] = {
    "block_out_channels": (8, 8, 8, 8),
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
}
TINY_TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 32,
    "text_embed_dim": 16,
    "num_layers": 2,
    "max_text_seq_length": 4,
}


def load_vae(name: str) -> nn.Module:
    """Returns the AutoencoderKLCogVideoX of a folder or a Hub id, in its subfolder "vae" if it has one; "tiny" is a
    small random one."""
    from diffusers import AutoencoderKLCogVideoX

    if name == "tiny":
        return AutoencoderKLCogVideoX(**TINY_VAE)
    subfolder = "vae" if not Path(name).exists() or (Path(name) / "vae").exists() else None
    return AutoencoderKLCogVideoX.from_pretrained(name, subfolder=subfolder)


def load_transformer(name: str) -> nn.Module:
    """Returns the CogVideoXTransformer3DModel of a folder or a Hub id, in its subfolder "transformer"; "tiny" is small
    and random."""
    from diffusers import CogVideoXTransformer3DModel

    if name == "tiny":
        return CogVideoXTransformer3DModel(**TINY_TRANSFORMER)
    return CogVideoXTransformer3DModel.from_pretrained(name, subfolder="transformer")


class FrameVAE:
    """Frames as latents of a frozen VAE, each frame by itself.

    One by one, so that a region of any period can hold them and the last frame is known as soon as it is seen; a latent
    frame of CogVideoX's own videos holds four frames.
    """

    def __init__(self, vae: nn.Module):
        self.vae = vae.eval().requires_grad_(False)
        self.scale = vae.config.scaling_factor

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """(B, frames, 3, H, W) in [0, 1] → (B, frames, C, H / 8, W / 8)."""
        pixels = 2 * frames.flatten(0, 1).unsqueeze(2) - 1
        latents = self.vae.encode(pixels).latent_dist.mode() * self.scale
        return latents.squeeze(2).unflatten(0, frames.shape[:2])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, frames, C, H / 8, W / 8) → (B, frames, 3, H, W)."""
        pixels = self.vae.decode(latents.flatten(0, 1).unsqueeze(2) / self.scale).sample
        return ((pixels.squeeze(2) + 1) / 2).unflatten(0, latents.shape[:2])


class VideoBackbone(nn.Module):
    """A CogVideoX transformer whose tokens are the positions of a canvas, looped, attending along its topology.

    Args:
        transformer: diffusers' CogVideoXTransformer3DModel; it is grafted in place.
        layout, topology: the canvas; its ``d_model`` is the size of a token's latents, channels · patch_size².
        loops: of each block.
        freeze: what of the backbone does not train: see `graft_looped_blocks`.

    Raises:
        ValueError: another ``d_model``, or a model that joins frames (CogVideoX 1.5).
    """

    def __init__(
        self,
        transformer: nn.Module,
        layout: CanvasLayout,
        topology: CanvasTopology,
        loops: int = 1,
        freeze: str = "none",
    ):
        super().__init__()
        config: Mapping[str, Any] = transformer.config
        self.side, self.channels, self.grid = config["patch_size"], config["in_channels"], layout.spatial_shape
        self.frames, size = layout.T, config["in_channels"] * config["patch_size"] ** 2
        if layout.d_model != size or config["patch_size_t"] or config["out_channels"] != self.channels:
            raise ValueError(
                f"a canvas of width {layout.d_model} does not fit the tokens of {type(transformer).__name__}: "
                f"{self.channels} channels in, {config['out_channels']} out, patches of {self.side} and "
                f"{config['patch_size_t'] or 1} frames, which takes d_model={size}"
            )
        height, width = (8 * self.side * cells for cells in self.grid)
        count = config["temporal_compression_ratio"] * (layout.T - 1) + 1
        tokens = cogvideox_layout(config, height, width, count, layout.regions)
        text = [Connection("text", "text"), Connection("text", "video"), Connection("video", "text")]
        graft_looped_blocks(
            transformer,
            loops,
            loops=loops,
            freeze=freeze,
            layout=tokens,
            topology=CanvasTopology([*text, *topology.connections]),
        )
        self.transformer = transformer
        for i, table in enumerate(rotary_tables(config, layout.T, *(self.side * cells for cells in self.grid)) or ()):
            self.register_buffer(f"rotary_{i}", table, persistent=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, positions, d_model), and the time of flow matching (B,), 1 where nothing is noise → like x."""
        config, (rows, columns), side = self.transformer.config, self.grid, self.side
        x = x.unflatten(1, (self.frames, rows, columns)).unflatten(-1, (self.channels, side, side))
        # (B, T, rows, columns, C, side, side) → latents
        latents = x.permute(0, 1, 4, 2, 5, 3, 6).flatten(5).flatten(3, 4)
        text = x.new_zeros(len(x), config.max_text_seq_length, config.text_embed_dim)
        rotary = (self.rotary_0, self.rotary_1) if config.use_rotary_positional_embeddings else None
        out = self.transformer(latents, text, 1000 * (1 - t), image_rotary_emb=rotary, return_dict=False)[0]
        out = out.unflatten(-1, (columns, side)).unflatten(-3, (rows, side))
        return out.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)
