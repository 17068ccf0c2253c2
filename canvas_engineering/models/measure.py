"""Measures how a topology changes a model that was trained with dense attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..canvas import CanvasLayout
from ..checked import checked_kind
from ..connectivity import CanvasTopology
from .attach import set_processor
from .processor import CanvasAttnProcessor
from .registry import adapter_of

__all__ = ["TopologyMeasure", "measure_topology"]


@dataclass(frozen=True)
class TopologyMeasure:
    """``density``: share of all token pairs that are computed. ``difference``: mean |sparse − dense| of the attention
    outputs over mean |dense|, over all calls; ``per_layer``: the same for each attention layer, by its processor name.
    """

    density: float
    difference: float
    per_layer: dict[str, float]


@dataclass
class _Both:
    """A processor that computes both and returns the dense result, so that every layer gets its true input."""

    dense: Any
    sparse: CanvasAttnProcessor
    changed: list[float] = field(default_factory=list)
    size: list[float] = field(default_factory=list)
    sharpens = True

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        image_rotary_emb=None,
        sharpness=1.0,
        grid=None,
    ):
        given = (attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, sharpness, grid)
        expected, actual = self.dense(*given), self.sparse(*given)
        several = isinstance(expected, tuple)
        for a, b in zip(expected if several else [expected], actual if several else [actual]):
            self.changed.append(float((a - b).abs().sum(dtype=torch.float64)))
            self.size.append(float(a.abs().sum(dtype=torch.float64)))
        return expected


@torch.no_grad()
def measure_topology(
    transformer: nn.Module,
    layout: CanvasLayout,
    topology: CanvasTopology,
    batch: Mapping[str, Any],
    *,
    backend: str = "auto",
) -> TopologyMeasure:
    """Compares a model's attention outputs under a topology with those of dense attention, on one batch.

    Args:
        transformer: one of diffusers' video transformers that are known, grafted or not; it is left as it was.
        layout, topology: the declaration.
        batch: arguments of the transformer's forward.
        backend: see :func:`canvas_attention`.

    Raises:
        ValueError: a batch of another size than the layout's, or a model that stays in packed order: measure before
            the graft.

    >>> from canvas_engineering import cogvideox_layout, window_topology
    >>> from diffusers import CogVideoXTransformer3DModel
    >>> model = CogVideoXTransformer3DModel(
    ...     num_layers=1, num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_embed_dim=8,
    ...     max_text_seq_length=2, sample_height=4, sample_width=4, sample_frames=9,
    ... )
    >>> batch = {
    ...     "hidden_states": torch.randn(1, 3, 4, 4, 4), "encoder_hidden_states": torch.randn(1, 2, 8),
    ...     "timestep": torch.tensor([500]),
    ... }
    >>> layout = cogvideox_layout(model.config, 32, 32, 9)
    >>> measure_topology(model, layout, window_topology(), batch).density < 1
    True
    """
    checked_kind(batch, "batch", Mapping)
    adapter = adapter_of(transformer)
    attentions = dict(adapter.attentions(transformer))
    before = {name: attn.processor for name, attn in attentions.items()}
    if any(getattr(processor, "packed", False) for processor in before.values()):
        raise ValueError("this model keeps its tokens in packed order: measure a topology before the graft")
    sparse = CanvasAttnProcessor(layout, topology, backend=backend, model=adapter.name)
    if sparse.plan is None:
        raise ValueError(f"measure_topology needs a layout and a topology, got {layout!r} and {topology!r}")
    dense, both = CanvasAttnProcessor(model=adapter.name), {}
    for name, attn in attentions.items():
        fused = getattr(before[name], "fused", "Fused" in type(before[name]).__name__)
        both[name] = _Both(dense.with_fused(fused), sparse.with_fused(fused))
        set_processor(attn, both[name])
    try:
        transformer(**batch)
    finally:
        for name, attn in attentions.items():
            set_processor(attn, before[name])
    per_layer = {f"{name}.processor": sum(p.changed) / max(sum(p.size), 1e-300) for name, p in both.items()}
    total = sum(sum(p.size) for p in both.values())
    difference = sum(sum(p.changed) for p in both.values()) / max(total, 1e-300)
    return TopologyMeasure(sparse.plan.density, difference, per_layer)
