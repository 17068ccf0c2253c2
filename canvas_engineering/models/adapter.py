"""The contract between canvas attention and looping on one side and one of diffusers' video models on the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .block import LoopedBlock

TEXT, VIDEO = "text", "video"


class ModelAdapter:
    """Describes a model to canvas attention and looping; the next model is one subclass of this.

    Attributes:
        name: short name, as :class:`CanvasAttnProcessor` takes it.
        model_class: name of diffusers' class.
        module: module path that pickles and saved pipelines name for the looped class.
        block_lists: dotted names of the model's lists of blocks, in the order in which they run.
        embedding: name of the module that makes tokens of latents.
        attention: name, in a block, of the module whose processor is canvas attention; every other attention of the
            model (cross-attention, text refiners) is left alone.
        streams: regions of the token sequence of that attention, in order. Each is one raster of (frame, row, column).
        looped_block: the class that a block becomes when it loops: of one stream, or two if blocks return the text too.
        rotary: names that a block's forward may give to its rotary tables, which it hands to attention unseen; empty
            where blocks take ``attention_kwargs`` instead.
        packed_at: names of (the modules behind which tokens may be packed, and before which they must be unpacked), or
            None for a model whose tokens stay in raster order, for the reason given in ``why_unpacked``.
        replaces_processors: whether ``fuse_qkv_projections`` of the model replaces every processor.
        vae_scale, vae_frames: pixels per latent row and column, and video frames per latent frame.
        pads_frames: whether latent frames that a temporal patch does not divide are padded in front, by pipelines.
    """

    name: str
    model_class: str
    module = "canvas_engineering.models"
    block_lists: tuple[str, ...] = ("transformer_blocks",)
    embedding = "patch_embed"
    attention = "attn1"
    streams: tuple[str, ...] = (VIDEO,)
    looped_block: type[LoopedBlock] = LoopedBlock
    rotary: tuple[str, ...] = ("image_rotary_emb",)
    packed_at: tuple[str, str] | None = None
    why_unpacked = ""
    replaces_processors = False
    vae_scale = 8
    vae_frames = 4
    pads_frames = False

    # -- the token grid ------------------------------------------------------------------------------------------------

    def patch(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        """Returns the latent frames, rows and columns of a token."""
        raise NotImplementedError

    def compression(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Returns (pixels per latent row and column, video frames per latent frame) of the model's usual VAE."""
        return self.vae_scale, self.vae_frames

    def text_tokens(self, config: Mapping[str, Any]) -> int:
        """Returns the usual number of text tokens, for models with text among the tokens."""
        raise NotImplementedError

    def grid(self, config: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[int, int, int] | None:
        """Returns the token grid (frames, rows, columns) of a call of the model's forward, or None if the arguments
        ``given``, by name, do not hold it. The default is for latents (B, channels, frames, rows, columns)."""
        latents = given.get("hidden_states")
        if not isinstance(latents, torch.Tensor) or latents.dim() != 5:
            return None
        frames, rows, columns = self.patch(config)
        return latents.shape[2] // frames, latents.shape[3] // rows, latents.shape[4] // columns

    # -- attention -----------------------------------------------------------------------------------------------------

    def project(
        self, attn: Any, video: torch.Tensor, text: Any, rotary: tuple | None, fused: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns q, k and v, (B, heads, tokens, head_dim), tokens in the order of ``streams``: projected, normalised
        and rotated as the model's own processor does."""
        raise NotImplementedError

    def output(self, attn: Any, out: torch.Tensor, n_text: int, text_mask: torch.Tensor | None) -> Any:
        """Returns what the model's own processor returns, from attention's results (B, tokens, inner_dim)."""
        raise NotImplementedError

    def key_mask(self, mask: torch.Tensor | None, n_text: int) -> torch.Tensor | None:
        """Returns the text tokens that may be attended to, bool (B, text), from what the model hands to the processor
        as attention_mask; None for all.

        Raises:
            ValueError: a mask that canvas attention has no form for.
        """
        if mask is not None:
            raise ValueError(f"an attention mask {tuple(mask.shape)} was given: declare the pattern as a topology")
        return None

    def stock_processor(self, fused: bool) -> Any:
        """Returns a processor as diffusers makes it for the model."""
        raise NotImplementedError

    def check_call(self, given: Mapping[str, Any]) -> None:
        """ValueError for arguments of the model's forward, by name, that the model's own processor treats otherwise
        than canvas attention can."""

    # -- looping -------------------------------------------------------------------------------------------------------

    def text_dim(self, config: Mapping[str, Any]) -> int | None:
        """Returns the width of the text stream in blocks where it is not that of the video, else None."""
        return None

    # -- of a model ----------------------------------------------------------------------------------------------------

    def blocks(self, transformer: nn.Module) -> list[Any]:
        """Returns the blocks in the order in which they run."""
        return [block for name in self.block_lists for block in transformer.get_submodule(name).children()]

    def attentions(self, transformer: nn.Module) -> Iterator[tuple[str, Any]]:
        """Yields (dotted name, module) of every attention that canvas attention takes over."""
        for name in self.block_lists:
            for number, block in enumerate(transformer.get_submodule(name).children()):
                yield f"{name}.{number}.{self.attention}", getattr(block, self.attention)


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Returns (B, heads, tokens, head_dim) of (B, tokens, heads · head_dim)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def self_projections(attn: Any, tokens: torch.Tensor, fused: bool) -> tuple[torch.Tensor, ...]:
    """Returns the three projections of ``tokens`` (B, tokens, inner_dim), by the fused weights if there are any."""
    if fused or (getattr(attn, "fused_projections", False) and hasattr(attn, "to_qkv")):
        return attn.to_qkv(tokens).chunk(3, -1)
    return attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)
