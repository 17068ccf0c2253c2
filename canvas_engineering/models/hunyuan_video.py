"""HunyuanVideo: video and text in one sequence, video first; blocks of two streams, then blocks of one sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .adapter import TEXT, VIDEO, ModelAdapter
from .block import LoopedTwoStreamBlock

_USUAL_TEXT = 256  # tokens that its pipeline pads prompts to


class HunyuanVideo(ModelAdapter):
    """diffusers' ``HunyuanVideoTransformer3DModel``, image conditioning included. Its mask is bool
    (B, 1, 1, video + text): padding of the text is not attended to. Refiners of the text are left alone."""

    name = "hunyuan_video"
    model_class = "HunyuanVideoTransformer3DModel"
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    embedding = "x_embedder"
    attention = "attn"
    looped_block = LoopedTwoStreamBlock
    streams = (VIDEO, TEXT)
    rotary = ("freqs_cis", "image_rotary_emb")
    why_unpacked = "blocks that replace tokens take the first frame for the first tokens"

    def patch(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        return config["patch_size_t"], config["patch_size"], config["patch_size"]

    def text_tokens(self, config: Mapping[str, Any]) -> int:
        return _USUAL_TEXT

    def key_mask(self, mask, n_text):
        if mask is None:
            return None
        if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1:3] != (1, 1):
            raise ValueError(f"the mask must be bool (B, 1, 1, tokens), got {mask.dtype} {tuple(mask.shape)}")
        return mask[:, 0, 0, -n_text:]

    def project(self, attn, video, text, rotary, fused):
        from diffusers.models.embeddings import apply_rotary_emb

        apart = attn.add_q_proj is not None
        tokens = video if apart else torch.cat([video, text], 1)
        # (B, tokens, heads, head_dim)
        q, k, v = (f(tokens).unflatten(2, (attn.heads, -1)) for f in (attn.to_q, attn.to_k, attn.to_v))
        q, k = _normalised(q, attn.norm_q), _normalised(k, attn.norm_k)
        n_video = video.shape[1]
        if rotary is not None:
            tables: Any = tuple(rotary)
            turned = [apply_rotary_emb(x[:, :n_video], tables, sequence_dim=1) for x in (q, k)]
            q, k = (torch.cat([first, x[:, n_video:]], 1) for first, x in zip(turned, (q, k)))  # pyright: ignore[reportArgumentType]
        if apart:
            added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text_q, text_k, text_v = (f(text).unflatten(2, (attn.heads, -1)) for f in added)
            text_q, text_k = _normalised(text_q, attn.norm_added_q), _normalised(text_k, attn.norm_added_k)
            q, k, v = (torch.cat(both, 1) for both in ((q, text_q), (k, text_k), (v, text_v)))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def output(self, attn, out, n_text, text_mask):
        video, text = out[:, :-n_text], out[:, -n_text:]
        if getattr(attn, "to_out", None) is not None:
            video = attn.to_out[1](attn.to_out[0](video))
        if getattr(attn, "to_add_out", None) is not None:
            text = attn.to_add_out(text)
        return video, text

    def stock_processor(self, fused):
        from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0

        return HunyuanVideoAttnProcessor2_0()


def _normalised(x: torch.Tensor, norm: Any) -> torch.Tensor:
    return x if norm is None else norm(x)
