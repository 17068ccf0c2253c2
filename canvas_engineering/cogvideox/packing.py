"""Tokens in a plan's packed order from the embedding to the last block: moved once per model, not once per layer.

Everything between the patch embedding and the final norm treats tokens alike, attention aside, so blocks may be
skipped, cached or given another processor meanwhile: whatever is not canvas attention does not know an order.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from ..derived_buffers import CanvasModule
from .layout import TEXT
from .processor import CanvasAttnProcessor


def can_pack(processor: CanvasAttnProcessor) -> bool:
    """Whether the packed order keeps the text in front, where blocks look for it, and moves anything at all."""
    plan, layout = processor.plan, processor.layout
    if plan is None or layout is None or plan.in_canvas_order:
        return False
    n_text = layout.region_numel(TEXT)
    return bool((plan.order[:n_text] < n_text).all())


def install(transformer: nn.Module, processor: CanvasAttnProcessor) -> None:
    """Hooks that pack behind the patch embedding and unpack before the final norm."""
    remove(transformer)
    transformer.canvas_order = order = PackedOrder(processor)
    transformer.register_forward_pre_hook(_PackRotary(order), with_kwargs=True)
    transformer.get_submodule("patch_embed").register_forward_hook(_PackTokens(order))
    transformer.get_submodule("norm_final").register_forward_pre_hook(_UnpackVideo(order))


def remove(transformer: nn.Module) -> None:
    """Takes :func:`install`'s hooks away, and nothing else."""
    for module in map(transformer.get_submodule, ("", "patch_embed", "norm_final")):
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for number, hook in list(hooks.items()):
                if isinstance(hook, _Hook):
                    del hooks[number]
                    module._forward_pre_hooks_with_kwargs.pop(number, None)
    transformer._modules.pop("canvas_order", None)


def check(transformer: nn.Module, processors: Iterable[Any]) -> None:
    """ValueError if one of ``processors`` takes tokens in another order than the model's hooks leave them in."""
    hooks = (hook for hook in transformer._forward_pre_hooks.values() if isinstance(hook, _Hook))
    packs = next((hook.order.processor for hook in hooks), None)
    for processor in processors:
        if not isinstance(processor, CanvasAttnProcessor) or processor.plan is None:
            continue
        same = packs is not None and (packs.layout, packs.topology) == (processor.layout, processor.topology)
        if processor.packed != (packs is not None) or (packs is not None and not same):
            raise ValueError(
                f"this model keeps its tokens in {'the packed order of its topology' if packs else 'raster order'}, "
                f"which {processor} does not take: give layout= and topology= to graft_looped_blocks again"
            )


class PackedOrder(CanvasModule):
    """The packed order of a processor's plan, as tables that move with the model.

    Attributes:
        tokens: int64 (tokens,), the token of each packed row.
        video, canvas: int64 (video tokens,), the same of the video alone, and its inverse.
    """

    tokens: torch.Tensor
    video: torch.Tensor
    canvas: torch.Tensor

    def __init__(self, processor: CanvasAttnProcessor):
        super().__init__()
        self.processor = processor
        assert processor.plan is not None and processor.layout is not None
        order, n_text = processor.plan.order, processor.layout.region_numel(TEXT)
        video = order[n_text:] - n_text
        self.register_table("tokens", order)
        self.register_table("video", video)
        self.register_table("canvas", np.argsort(video))


class _Hook:
    def __init__(self, order: PackedOrder):
        self.order = order

    def take(self, x: torch.Tensor, which: str, dim: int) -> torch.Tensor:
        # offloading may leave the tables where the model rests
        return x.index_select(dim, getattr(self.order, which).to(x.device))


class _PackTokens(_Hook):
    def __call__(self, module, args, tokens: torch.Tensor) -> torch.Tensor:
        n_tokens = len(self.order.tokens)
        if tokens.shape[1] != n_tokens:
            raise ValueError(
                f"the layout is of {n_tokens} tokens, text and video; got {tokens.shape[1]}: build it with "
                "cogvideox_layout for this video's size"
            )
        return self.take(tokens, "tokens", 1)


class _UnpackVideo(_Hook):
    def __call__(self, module, args):
        return (self.take(args[0], "canvas", 1), *args[1:])


class _PackRotary(_Hook):
    # The sixth argument of the transformer's forward.
    POSITION, NAME = 5, "image_rotary_emb"

    def __call__(self, module, args, kwargs):
        if kwargs.get(self.NAME) is not None:
            return args, {**kwargs, self.NAME: self._pack(kwargs[self.NAME])}
        if len(args) > self.POSITION and args[self.POSITION] is not None:
            packed = self._pack(args[self.POSITION])
            return (*args[: self.POSITION], packed, *args[self.POSITION + 1 :]), kwargs
        return args, kwargs

    def _pack(self, rotary):
        n_video = len(self.order.video)
        if any(len(table) != n_video for table in rotary):
            raise ValueError(
                f"the layout is of {n_video} video tokens, the rotary embedding of {len(rotary[0])}: build the layout "
                "with cogvideox_layout for this video's size"
            )
        return tuple(self.take(table, "video", 0) for table in rotary)
