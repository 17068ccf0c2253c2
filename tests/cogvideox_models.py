"""Tiny real CogVideoX models of the three kinds, with random weights and inputs that fit them."""

from __future__ import annotations

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="grafts onto CogVideoX need diffusers")
pytest.importorskip("transformers", reason="CogVideoX pipelines need transformers")

TEXT, FRAMES, SIDE = 5, 4, 8  # text tokens, latent frames, latent rows and columns
KINDS = ("2b", "5b", "1.5")
_TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 12,
    "num_layers": 2,
    "sample_width": SIDE,
    "sample_height": SIDE,
    "sample_frames": 4 * (FRAMES - 1) + 1,
    "patch_size": 2,
    "max_text_seq_length": TEXT,
}
_KIND = {
    "2b": {},
    "5b": {"use_rotary_positional_embeddings": True},
    "1.5": {"use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False, "ofs_embed_dim": 8},
}


def tiny_model(kind="2b", **config):
    """A model whose parameters are random, its zero-initialised ones and its norms too."""
    torch.manual_seed(0)
    model = diffusers.CogVideoXTransformer3DModel(**{**_TINY, **_KIND[kind], **config})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.2 * noise if parameter.dim() > 1 else 0.1 * noise)
    return model.eval()


def inputs(kind="2b", batch=2, dtype=torch.float32, seed=2):
    """What the model's forward takes, with return_dict=False."""
    g = torch.Generator().manual_seed(seed)
    given = {
        "hidden_states": torch.randn(batch, FRAMES, 4, SIDE, SIDE, generator=g).to(dtype),
        "encoder_hidden_states": torch.randn(batch, TEXT, 12, generator=g).to(dtype),
        "timestep": torch.arange(1, batch + 1) * 100,
        "return_dict": False,
    }
    if kind != "2b":
        frames = FRAMES // 2 if kind == "1.5" else FRAMES
        angle = torch.randn(frames * (SIDE // 2) ** 2, 8, generator=g).repeat_interleave(2, 1)
        given["image_rotary_emb"] = (angle.cos(), angle.sin())
    if kind == "1.5":
        given["ofs"] = torch.full((1,), 2.0)
    return given


def randomise_loops(blocks, std=0.3):
    """Loop parameters of a model that has trained."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for block in blocks:
            for parameter in block.loop.parameters():
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
