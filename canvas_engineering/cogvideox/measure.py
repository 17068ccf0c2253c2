"""Measures how a topology changes a model that was trained with dense attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..canvas import CanvasLayout
from ..checked import checked_kind
from ..connectivity import CanvasTopology
from .processor import CanvasAttnProcessor

if TYPE_CHECKING:
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel

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

    dense: CanvasAttnProcessor
    sparse: CanvasAttnProcessor
    changed: list[float] = field(default_factory=list)
    size: list[float] = field(default_factory=list)
    sharpens = True

    def __call__(
        self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None, sharpness=1.0
    ):
        given = (attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, sharpness)
        expected, actual = self.dense(*given), self.sparse(*given)
        for a, b in zip(expected, actual):
            self.changed.append(float((a - b).abs().sum(dtype=torch.float64)))
            self.size.append(float(a.abs().sum(dtype=torch.float64)))
        return expected


@torch.no_grad()
def measure_topology(
    transformer: CogVideoXTransformer3DModel,
    layout: CanvasLayout,
    topology: CanvasTopology,
    batch: Mapping[str, Any],
    *,
    backend: str = "auto",
) -> TopologyMeasure:
    """Compares a model's attention outputs under a topology with those of dense attention, on one batch.

    Args:
        transformer: a CogVideoX transformer, grafted or not; it is left as it was.
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
    before = transformer.attn_processors
    if any(getattr(processor, "packed", False) for processor in before.values()):
        raise ValueError("this model keeps its tokens in packed order: measure a topology before the graft")
    sparse = CanvasAttnProcessor(layout, topology, backend=backend)
    if sparse.plan is None:
        raise ValueError(f"measure_topology needs a layout and a topology, got {layout!r} and {topology!r}")
    fused = {name: getattr(p, "fused", "Fused" in type(p).__name__) for name, p in before.items()}
    both = {name: _Both(CanvasAttnProcessor().with_fused(f), sparse.with_fused(f)) for name, f in fused.items()}
    processors: dict[str, Any] = dict(both)  # diffusers' annotation lists its own classes
    transformer.set_attn_processor(processors)
    try:
        transformer(**batch)
    finally:
        transformer.set_attn_processor(before)
    per_layer = {name: sum(p.changed) / max(sum(p.size), 1e-300) for name, p in both.items()}
    total = sum(sum(p.size) for p in both.values())
    difference = sum(sum(p.changed) for p in both.values()) / max(total, 1e-300)
    return TopologyMeasure(sparse.plan.density, difference, per_layer)
