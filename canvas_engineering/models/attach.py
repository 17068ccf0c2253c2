"""Canvas attention set on a model's attention modules, and taken away again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..canvas import CanvasLayout
from ..checked import checked_kind
from ..connectivity import CanvasTopology
from . import grid, packing
from .adapter import ModelAdapter
from .processor import CanvasAttnProcessor
from .registry import adapter_of

__all__ = ["remove_canvas_attention", "set_canvas_attention"]


def set_canvas_attention(
    transformer: nn.Module,
    layout: CanvasLayout | Sequence[CanvasLayout],
    topology: CanvasTopology | Sequence[CanvasTopology],
    *,
    backend: str = "auto",
) -> CanvasAttnProcessor:
    """Makes a video model's tokens attend under a topology, in place; :func:`remove_canvas_attention` undoes it.

    The model stays the stock class: its ``save_pretrained`` knows nothing of the topology. A grafted model
    (:func:`graft_looped_blocks` with ``layout=`` and ``topology=``, also at one loop) saves it.

    Args:
        transformer: one of diffusers' video transformers that :data:`ADAPTERS` has.
        layout: of the model's tokens, from :func:`video_layout`; a list of them for videos of several sizes, each
            compiled here, of which every call takes the one that has its grid.
        topology: which regions attend to which; a list with one for each layout, or one for all of them.
        backend: see :func:`canvas_attention`.

    Returns:
        the processor that all of the attention modules share.

    Raises:
        ValueError: an unknown model, or what :class:`CanvasAttnProcessor` refuses. Later calls of the model with
            another grid than those of the layouts are ValueErrors that name both.

    >>> from diffusers import WanTransformer3DModel
    >>> from canvas_engineering.models import topologies, video_layout
    >>> model = WanTransformer3DModel(
    ...     num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
    ...     ffn_dim=32, num_layers=1, rope_max_seq_len=32,
    ... )
    >>> layout = video_layout(model, 64, 64, 9)
    >>> round(set_canvas_attention(model, *topologies.window(layout)).plan.density, 3)
    0.556
    """
    checked_kind(transformer, "transformer", nn.Module)
    adapter = adapter_of(transformer)
    processor = CanvasAttnProcessor(layout, topology, backend=backend, model=adapter.name)
    if processor.plan is None:
        raise ValueError("set_canvas_attention needs a layout and a topology: remove_canvas_attention takes them away")
    attach(transformer, adapter, processor)
    return processor


def remove_canvas_attention(transformer: nn.Module) -> nn.Module:
    """Undoes :func:`set_canvas_attention`: every attention module has the processor that it had, or diffusers' own.

    Returns:
        ``transformer``.

    Raises:
        ValueError: an unknown model, or a grafted one, which :func:`ungraft` restores.

    >>> from diffusers import LTXVideoTransformer3DModel
    >>> from canvas_engineering.models import topologies, video_layout
    >>> model = LTXVideoTransformer3DModel(
    ...     in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, num_layers=1,
    ...     cross_attention_dim=32, caption_channels=16,
    ... )
    >>> _ = set_canvas_attention(model, *topologies.previous_frame(video_layout(model, 128, 128, 17)))
    >>> type(remove_canvas_attention(model).transformer_blocks[0].attn1.processor).__name__
    'LTXVideoAttnProcessor'
    """
    adapter = adapter_of(transformer)
    if type(transformer).__name__ != adapter.model_class:
        raise ValueError(f"this model is grafted, a {type(transformer).__name__}: ungraft it")
    detach(transformer, adapter)
    return transformer


def attach(transformer: nn.Module, adapter: ModelAdapter, processor: CanvasAttnProcessor) -> None:
    """Sets ``processor`` on every attention that it is for, with the hooks that it needs."""
    packing.remove(transformer)
    grid.remove(transformer)
    attentions = list(adapter.attentions(transformer))
    before = transformer.__dict__.setdefault("_processors_before_canvas", {})
    for name, attn in attentions:
        if not isinstance(attn.processor, CanvasAttnProcessor):
            before[name] = attn.processor
    if adapter.replaces_processors:
        fused = any(getattr(attn.processor, "fused", _is_fused(attn.processor)) for _, attn in attentions)
        processor = processor.with_fused(fused)
    for _, attn in attentions:
        set_processor(attn, processor)
    if processor.plan is not None:
        check = grid.install(transformer, adapter, processor)
        if processor.packed:
            packing.install(transformer, adapter, check)


def detach(transformer: nn.Module, adapter: ModelAdapter) -> None:
    """Restores the processors that :func:`attach` replaced, and takes its hooks away."""
    packing.remove(transformer)
    grid.remove(transformer)
    before = transformer.__dict__.pop("_processors_before_canvas", {})
    for name, attn in adapter.attentions(transformer):
        if isinstance(attn.processor, CanvasAttnProcessor):
            fused = attn.processor.fused
            known = before.get(name)
            use_known = known is not None and _is_fused(known) == fused
            set_processor(attn, known if use_known else adapter.stock_processor(fused))


def set_processor(attn: Any, processor: Any) -> None:
    """Sets the processor of one attention module; Mochi's has no method for it."""
    if hasattr(attn, "set_processor"):
        attn.set_processor(processor)
    else:
        attn.processor = processor


def _is_fused(processor: Any) -> bool:
    return "Fused" in type(processor).__name__
