"""Mochi: video and text in one sequence, video first; the text stream is narrower and has projections of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .adapter import TEXT, VIDEO, ModelAdapter
from .block import LoopedTwoStreamBlock


class Mochi(ModelAdapter):
    """diffusers' ``MochiTransformer3DModel``. Its mask of the text is bool (B, text): padding is not attended to, and
    what it attends to is 0."""

    name = "mochi"
    model_class = "MochiTransformer3DModel"
    looped_block = LoopedTwoStreamBlock
    streams = (VIDEO, TEXT)
    vae_frames = 6
    why_unpacked = "its rotary tables are made inside of the forward, one for each head"

    def patch(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        return 1, config["patch_size"], config["patch_size"]

    def text_tokens(self, config: Mapping[str, Any]) -> int:
        return config["max_sequence_length"]

    def text_dim(self, config: Mapping[str, Any]) -> int | None:
        return config["pooled_projection_dim"]

    def key_mask(self, mask, n_text):
        return None if mask is None else mask.bool()

    def check_call(self, given):
        """ValueError for a mask that is no prefix: the model's own processor moves the rows that it keeps to the front,
        and gives their results to other tokens. On a device it is an assertion there, which waits for nothing."""
        mask = given.get("encoder_attention_mask")
        if mask is None:
            return
        mask = mask.bool()
        is_prefix = (mask[:, 1:] <= mask[:, :-1]).all()
        message = "encoder_attention_mask must keep the first tokens of each text: padding lies behind them"
        if torch.compiler.is_compiling() or not mask.is_cpu:
            torch.ops.aten._assert_async.msg(is_prefix, message)
        elif not is_prefix:
            raise ValueError(message)

    def project(self, attn, video, text, rotary, fused):
        # (B, tokens, heads, head_dim) of each stream
        streams = [
            [f(x).unflatten(2, (attn.heads, -1)) for f in projections]
            for x, projections in (
                (video, (attn.to_q, attn.to_k, attn.to_v)),
                (text, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)),
            )
        ]
        for heads, norms in zip(streams, ((attn.norm_q, attn.norm_k), (attn.norm_added_q, attn.norm_added_k))):
            heads[:2] = [x if norm is None else norm(x) for x, norm in zip(heads, norms)]
        if rotary is not None:
            streams[0][:2] = [_rotate(x, *rotary) for x in streams[0][:2]]
        q, k, v = (torch.cat(both, 1).transpose(1, 2) for both in zip(*streams))
        return q, k, v

    def output(self, attn, out, n_text, text_mask):
        video, text = out[:, :-n_text], out[:, -n_text:]
        if text_mask is not None:
            text = text.masked_fill(~text_mask[..., None], 0.0)
        video = attn.to_out[1](attn.to_out[0](video))
        return video, attn.to_add_out(text) if hasattr(attn, "to_add_out") else text

    def stock_processor(self, fused):
        from diffusers.models.attention_processor import MochiAttnProcessor2_0

        return MochiAttnProcessor2_0()


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (B, tokens, heads, head_dim) rotated by tables (tokens, heads, head_dim / 2), in float32."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    turned = (even * cos - odd * sin).to(x.dtype), (even * sin + odd * cos).to(x.dtype)
    return torch.stack(turned, -1).flatten(-2)
