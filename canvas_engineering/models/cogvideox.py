"""CogVideoX: text and video in one sequence, text first; blocks carry the two streams apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .adapter import TEXT, VIDEO, ModelAdapter, self_projections, split_heads
from .block import LoopedCogVideoXBlock


class CogVideoX(ModelAdapter):
    """diffusers' ``CogVideoXTransformer3DModel``, of the kinds 2B, 5B and 1.5."""

    name = "cogvideox"
    model_class = "CogVideoXTransformer3DModel"
    module = "canvas_engineering.cogvideox"
    streams = (TEXT, VIDEO)
    looped_block = LoopedCogVideoXBlock
    rotary = ()
    packed_at = ("patch_embed", "norm_final")
    replaces_processors = True
    pads_frames = True

    def patch(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        return config.get("patch_size_t") or 1, config["patch_size"], config["patch_size"]

    def compression(self, config: Mapping[str, Any]) -> tuple[int, int]:
        return self.vae_scale, config["temporal_compression_ratio"]

    def text_tokens(self, config: Mapping[str, Any]) -> int:
        return config["max_text_seq_length"]

    def grid(self, config, given):
        latents = given.get("hidden_states")
        if not isinstance(latents, torch.Tensor) or latents.dim() != 5:
            return None
        frames, rows, columns = self.patch(config)
        # (B, frames, channels, rows, columns)
        return latents.shape[1] // frames, latents.shape[3] // rows, latents.shape[4] // columns

    def project(self, attn, video, text, rotary, fused):
        tokens = torch.cat([text, video], dim=1)
        q, k, v = (split_heads(x, attn.heads) for x in self_projections(attn, tokens, fused))
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        if rotary is not None:
            q, k = (_rotate(x, text.shape[1], rotary) for x in (q, k))
        return q, k, v

    def output(self, attn, out, n_text, text_mask):
        out = attn.to_out[1](attn.to_out[0](out))
        return out[:, n_text:], out[:, :n_text]

    def stock_processor(self, fused):
        from diffusers.models import attention_processor

        return getattr(attention_processor, f"{'Fused' if fused else ''}CogVideoXAttnProcessor2_0")()


def _rotate(x: torch.Tensor, n_text: int, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """x (B, heads, tokens, head_dim) with its video tokens rotated."""
    from diffusers.models.embeddings import apply_rotary_emb

    video = x[:, :, n_text:]
    rotated: torch.Tensor = apply_rotary_emb(video, rotary)  # pyright: ignore[reportArgumentType, reportAssignmentType] its annotations take no pair
    return torch.cat([x[:, :, :n_text], rotated], dim=2)
