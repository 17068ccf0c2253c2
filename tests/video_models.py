"""Tiny real video models of diffusers with random weights, inputs that fit, and twins with a dense mask."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from canvas_engineering import CanvasTopology, Connection
from canvas_engineering.models import adapter_of, video_layout
from tests import oracle

diffusers = pytest.importorskip("diffusers", reason="the models are diffusers' own")

GRID, TEXT, BATCH = (3, 4, 4), 6, 2
TOKENS = GRID[0] * GRID[1] * GRID[2]


@dataclass(frozen=True)
class Tiny:
    """A tiny model: diffusers' class and config, the size of a video of GRID tokens, and how its inputs look."""

    model_class: str
    config: dict[str, Any]
    size: tuple[int, int, int]
    latents: tuple[int, ...]
    text_dim: int
    more: dict[str, Any] = field(default_factory=dict)
    text: bool = False


_WAN = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
    "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32,
}  # fmt: skip
MASK = torch.tensor([[1] * TEXT, [1] * (TEXT - 2) + [0] * 2])
_HUNYUAN = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1,
    "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 16, "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 4, 4), "guidance_embeds": False,
}  # fmt: skip
_HUNYUAN_MORE = {
    "encoder_attention_mask": MASK,
    "pooled_projections": torch.linspace(-1.0, 1.0, BATCH * 8).reshape(BATCH, 8),
}
TINY = {
    "cogvideox": Tiny(
        "CogVideoXTransformer3DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
            "time_embed_dim": 8, "text_embed_dim": 16, "num_layers": 2, "sample_width": 8, "sample_height": 8,
            "sample_frames": 9, "patch_size": 2, "max_text_seq_length": TEXT,
        },
        (64, 64, 9),
        (3, 4, 8, 8),
        16,
        {},
        True,
    ),
    "wan": Tiny("WanTransformer3DModel", _WAN, (64, 64, 9), (4, 3, 8, 8), 16),
    # Wan 2.2's 5B: a timestep for each token
    "wan2.2": Tiny(
        "WanTransformer3DModel",
        _WAN,
        (64, 64, 9),
        (4, 3, 8, 8),
        16,
        {"timestep": torch.arange(BATCH * TOKENS).reshape(BATCH, TOKENS) * 7 % 1000},
    ),
    "ltx": Tiny(
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
            "cross_attention_dim": 32, "caption_channels": 16,
        },
        (128, 128, 17),
        (TOKENS, 8),
        16,
        {
            "num_frames": GRID[0], "height": GRID[1], "width": GRID[2],
            "encoder_attention_mask": MASK,
        },
    ),
    "mochi": Tiny(
        "MochiTransformer3DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "pooled_projection_dim": 12,
            "in_channels": 4, "text_embed_dim": 16, "time_embed_dim": 8, "max_sequence_length": TEXT,
        },
        (64, 64, 13),
        (4, 3, 8, 8),
        16,
        {"encoder_attention_mask": MASK.bool()},
        True,
    ),
    "hunyuan": Tiny("HunyuanVideoTransformer3DModel", _HUNYUAN, (64, 64, 9), (4, 3, 8, 8), 16, _HUNYUAN_MORE, True),
    "hunyuan i2v": Tiny(
        "HunyuanVideoTransformer3DModel",
        {**_HUNYUAN, "image_condition_type": "token_replace"},
        (64, 64, 9),
        (4, 3, 8, 8),
        16,
        _HUNYUAN_MORE,
        True,
    ),
}  # fmt: skip


def tiny(name: str, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A model whose parameters are random, zero-initialised ones and norms too."""
    spec = TINY[name]
    torch.manual_seed(0)
    model = getattr(diffusers, spec.model_class)(**{**spec.config, **config})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.2 * noise if parameter.dim() > 1 else 0.1 * noise)
    return model.to(dtype).eval()


def inputs(name: str, dtype: torch.dtype = torch.float32, seed: int = 2) -> dict[str, Any]:
    """What the model's forward takes, with return_dict=False."""
    spec, g = TINY[name], torch.Generator().manual_seed(seed)
    given = {
        "hidden_states": torch.randn(BATCH, *spec.latents, generator=g).to(dtype),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, spec.text_dim, generator=g).to(dtype),
        "timestep": torch.arange(1, BATCH + 1) * 100,
        "return_dict": False,
        **spec.more,
    }
    return {name: value.to(dtype) if _floats(value) else value for name, value in given.items()}


def _floats(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def layout_of(name: str, model: Any):
    return video_layout(model, *TINY[name].size, **({"text_tokens": TEXT} if TINY[name].text else {}))


def random_topology(layout, seed: int):
    """A layout with three more boxes of the video, and connections of random offsets and weights among all regions."""
    rng = random.Random(seed)
    boxes = {}
    for number in range(3):
        bounds = []
        for size in GRID:
            low = rng.randrange(size)
            bounds += [low, rng.randint(low + 1, size)]
        boxes[f"box{number}"] = tuple(bounds)
    layout = type(layout)(layout.T, layout.d_model, layout.spatial_shape, {**layout.regions, **boxes})
    names = [*layout.regions]
    connections = []
    for _ in range(6):
        src, dst = rng.choice(names), rng.choice(names)
        offsets = rng.choice([{}, {}, {"t_src": 0, "t_dst": rng.choice([-1, 0, 1])}])
        connections.append(Connection(src, dst, weight=rng.choice([1.0, 1.0, 0.5, 2.0]), **offsets))
    return layout, CanvasTopology(connections)


def token_mask(name: str, model: Any, layout, topology) -> torch.Tensor:
    """float64 (tokens, tokens) in the model's order, from the documents: weights of pairs; a token without keys attends
    to itself."""
    M = oracle.joint_matrix(layout, topology)
    place = torch.cat([layout.region_index(stream) for stream in adapter_of(model).streams])
    M = M[place][:, place]
    alone = M.sum(1) == 0
    M[alone, alone] = 1.0
    return M


class Masked:
    """The model's own processor, whose scaled_dot_product_attention has the addends ln M besides."""

    def __init__(self, stock: Any, M: torch.Tensor):
        self.stock, self.bias = stock, M.log()

    # diffusers drops what is not among the names of this signature
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        given = (hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        plain = F.scaled_dot_product_attention

        def masked(query, key, value, attn_mask=None, **options):
            n = query.shape[2]
            bias = self.bias[:n, :n].to(query.dtype)
            if attn_mask is not None:
                bias = torch.where(attn_mask, bias, -torch.inf)
            return plain(query, key, value, attn_mask=bias, **options)

        F.scaled_dot_product_attention = masked
        try:
            return self.stock(attn, *given)
        finally:
            F.scaled_dot_product_attention = plain


def masked_twin(name: str, model: Any, M: torch.Tensor) -> Any:
    """The stock model in float64 with its own processors and a dense mask."""
    twin = copy.deepcopy(model).double()
    for _, attn in adapter_of(twin).attentions(twin):
        attn.processor = Masked(attn.processor, M)
    return twin


def randomise_loops(blocks: Any, std: float = 0.3) -> None:
    """Loop parameters of a model that has trained."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for block in blocks:
            for parameter in block.loop.parameters():
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))


def run_with_gradients(name: str, model: Any, dtype: torch.dtype):
    """(output, gradients by parameter name) of a random linear function of the output."""
    model.zero_grad()
    out = model(**inputs(name, dtype))[0]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (out.double() * weights).sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max())
