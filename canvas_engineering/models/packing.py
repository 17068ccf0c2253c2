"""Tokens in a plan's packed order from the embedding to the last block: moved once per model, not once per layer.

Everything between CogVideoX's patch embedding and its final norm treats tokens alike, attention aside, so blocks may be
skipped, cached or given another processor meanwhile: whatever is not canvas attention does not know an order.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from ..derived_buffers import CanvasModule
from .adapter import TEXT, ModelAdapter
from .grid import CheckGrid, Hook, before_calls, calls_of
from .processor import CanvasAttnProcessor


def can_pack(processor: CanvasAttnProcessor) -> bool:
    """Whether the packed orders keep the text in front, where blocks look for it, and move anything at all."""
    texts = [layout.region_numel(TEXT) for layout, _ in processor.declared]
    plans = list(processor.plans.values())
    fronted = all((plan.order[:n_text] < n_text).all() for plan, n_text in zip(plans, texts))
    return fronted and not all(plan.in_canvas_order for plan in plans)


def install(transformer: nn.Module, adapter: ModelAdapter, check: CheckGrid) -> None:
    """Hooks that pack behind the embedding of the tokens and unpack before the final norm."""
    remove(transformer)
    assert adapter.packed_at is not None
    first, last = adapter.packed_at
    transformer.canvas_order = order = PackedOrder(check.processor)
    before_calls(transformer, _PackRotary(order, check))
    transformer.get_submodule(first).register_forward_hook(_PackTokens(order, check))
    transformer.get_submodule(last).register_forward_pre_hook(_UnpackVideo(order, check))


def remove(transformer: nn.Module) -> None:
    """Takes :func:`install`'s hooks away, and nothing else."""
    Hook.remove([transformer, *transformer.children()], (_PackHook,))
    transformer._modules.pop("canvas_order", None)


def check(transformer: nn.Module, processors: Iterable[Any]) -> None:
    """ValueError if one of ``processors`` takes tokens in another order than the model's hooks leave them in."""
    packs = next((hook.check.processor for hook in calls_of(transformer) if isinstance(hook, _PackHook)), None)
    for processor in processors:
        if not isinstance(processor, CanvasAttnProcessor) or processor.plan is None:
            continue
        same = packs is not None and packs.declared == processor.declared
        if processor.packed != (packs is not None) or (packs is not None and not same):
            raise ValueError(
                f"this model keeps its tokens in {'the packed order of its topology' if packs else 'raster order'}, "
                f"which {processor} does not take: give layout= and topology= to graft_looped_blocks again"
            )


class PackedOrder(CanvasModule):
    """The packed orders of a processor's plans, as tables that move with the model: for layout i, "tokens_i" int64
    (tokens,), the token of each packed row, and "video_i" and "canvas_i" (video tokens,), the same of the video alone,
    and its inverse."""

    def __init__(self, processor: CanvasAttnProcessor):
        super().__init__()
        self.numbers = {grid: number for number, grid in enumerate(processor.plans)}
        for number, (plan, (layout, _)) in enumerate(zip(processor.plans.values(), processor.declared)):
            n_text = layout.region_numel(TEXT)
            video = plan.order[n_text:] - n_text
            self.register_table(f"tokens_{number}", plan.order)
            self.register_table(f"video_{number}", video)
            self.register_table(f"canvas_{number}", np.argsort(video))

    def take(self, x: torch.Tensor, which: str, grid: tuple[int, int, int], dim: int) -> torch.Tensor:
        """Returns x with the rows of a table along ``dim``."""
        table = getattr(self, f"{which}_{self.numbers[grid]}")
        if x.shape[dim] != len(table):
            raise ValueError(
                f"the layout is of {len(table)} {'tokens, text and video' if which == 'tokens' else 'video tokens'}; "
                f"got {x.shape[dim]}: build it with video_layout for this video's size"
            )
        # offloading may leave the tables where the model rests
        return x.index_select(dim, table.to(x.device))


class _PackHook(Hook):
    def __init__(self, order: PackedOrder, check: CheckGrid):
        self.order, self.check = order, check


class _PackTokens(_PackHook):
    def __call__(self, module, args, tokens: torch.Tensor) -> torch.Tensor:
        return tokens if self.check.grid is None else self.order.take(tokens, "tokens", self.check.grid, 1)


class _UnpackVideo(_PackHook):
    def __call__(self, module, args):
        return args if self.check.grid is None else (self.order.take(args[0], "canvas", self.check.grid, 1), *args[1:])


class _PackRotary(_PackHook):
    NAME = "image_rotary_emb"

    def __call__(self, module, args, kwargs):
        given = {**dict(zip(self.check.names, args)), **kwargs}
        grid, rotary = self.check.grid, given.get(self.NAME)
        if grid is None or rotary is None:
            return None
        return (), {**given, self.NAME: tuple(self.order.take(table, "video", grid, 0) for table in rotary)}
