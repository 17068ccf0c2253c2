"""Wan 2.1 and 2.2: self-attention over the video's tokens; the text is attended to by cross-attention, untouched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .adapter import ModelAdapter, self_projections, split_heads

_CHANNELS_2_2 = 48  # of the latents of Wan 2.2's own VAE


class Wan(ModelAdapter):
    """diffusers' ``WanTransformer3DModel``: Wan 2.1, both transformers of Wan 2.2's 14B, and its 5B."""

    name = "wan"
    model_class = "WanTransformer3DModel"
    block_lists = ("blocks",)
    embedding = "patch_embedding"
    rotary = ("rotary_emb",)
    why_unpacked = "its patch embedding ends inside of the forward, and the modulation of Wan 2.2 is one of each token"

    def patch(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        frames, rows, columns = config["patch_size"]
        return frames, rows, columns

    def compression(self, config: Mapping[str, Any]) -> tuple[int, int]:
        return 16 if config.get("in_channels") == _CHANNELS_2_2 else 8, self.vae_frames

    def project(self, attn, video, text, rotary, fused):
        q, k, v = self_projections(attn, video, fused)
        q, k = attn.norm_q(q), attn.norm_k(k)
        q, k, v = (split_heads(x, attn.heads) for x in (q, k, v))
        if rotary is not None:
            q, k = (_rotate(x, *rotary) for x in (q, k))
        return q, k, v

    def output(self, attn, out, n_text, text_mask):
        return attn.to_out[1](attn.to_out[0](out))

    def stock_processor(self, fused):
        from diffusers.models.transformers.transformer_wan import WanAttnProcessor

        return WanAttnProcessor()


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (B, heads, tokens, head_dim) rotated by tables (1, tokens, 1, head_dim), each angle twice."""
    cos, sin = cos.transpose(1, 2)[..., 0::2], sin.transpose(1, 2)[..., 1::2]
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([x1 * cos - x2 * sin, x1 * sin + x2 * cos], -1).flatten(-2).type_as(x)
