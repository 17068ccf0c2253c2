"""LTX-Video: self-attention over the video's tokens; the text is attended to by cross-attention, untouched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .adapter import ModelAdapter, self_projections, split_heads


class LTXVideo(ModelAdapter):
    """diffusers' ``LTXVideoTransformer3DModel``; its latents come as a sequence already, with the grid in arguments."""

    name = "ltx"
    model_class = "LTXVideoTransformer3DModel"
    embedding = "proj_in"
    vae_scale = 32
    vae_frames = 8
    why_unpacked = "its timesteps may be one of each token, and the caller makes them in raster order"

    def patch(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        return config["patch_size_t"], config["patch_size"], config["patch_size"]

    def grid(self, config, given):
        # of tokens already: the pipeline has cut the latents into patches
        grid = tuple(given.get(name) for name in ("num_frames", "height", "width"))
        return None if any(size is None for size in grid) else grid

    def project(self, attn, video, text, rotary, fused):
        from diffusers.models.transformers.transformer_ltx import apply_rotary_emb

        q, k, v = self_projections(attn, video, fused)
        q, k = attn.norm_q(q), attn.norm_k(k)
        if rotary is not None:
            q, k = (apply_rotary_emb(x, rotary) for x in (q, k))
        q, k, v = (split_heads(x, attn.heads) for x in (q, k, v))
        return q, k, v

    def output(self, attn, out, n_text, text_mask):
        return attn.to_out[1](attn.to_out[0](out))

    def stock_processor(self, fused):
        from diffusers.models.transformers.transformer_ltx import LTXVideoAttnProcessor

        return LTXVideoAttnProcessor()
