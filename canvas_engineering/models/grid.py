"""Hooks of a model with canvas attention: the grid of every call is checked, and told to attention where it chooses.

A looped model runs its hooks inside of its forward, so that a compiled model is one graph; a stock model has them as
forward pre-hooks.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

from .adapter import ModelAdapter
from .block import tag_rotary
from .processor import CanvasAttnProcessor

Grid = tuple[int, int, int]


class Hook:
    """Base class of this package's hooks."""

    @staticmethod
    def remove(modules: Iterable[nn.Module], kinds: tuple[type, ...]) -> None:
        """Takes hooks of these kinds from the modules, and nothing else."""
        for module in modules:
            own = [hook for hook in module.__dict__.pop("canvas_calls", ()) if not isinstance(hook, kinds)]
            if own:
                module.__dict__["canvas_calls"] = own
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for number, hook in list(hooks.items()):
                    if isinstance(hook, kinds):
                        del hooks[number]
                        module._forward_pre_hooks_with_kwargs.pop(number, None)


class CheckGrid(Hook):
    """Refuses calls with another token grid than the processor's, while some block has canvas attention with a
    declaration: a model with other processors everywhere takes any grid.

    Attributes:
        grid: that of the call that runs; None if it is none of the processor's.
        tells: whether attention is told the grid.
    """

    def __init__(self, adapter: ModelAdapter, processor: CanvasAttnProcessor, names: list[str]):
        self.adapter, self.processor, self.names = adapter, processor, names
        self.grid: Grid | None = None
        self.tells = False

    def __call__(self, transformer, args, kwargs):
        given = {**dict(zip(self.names, args)), **kwargs}
        grid = self.adapter.grid(transformer.config, given)
        in_use = any(getattr(attn.processor, "plan", None) for _, attn in self.adapter.attentions(transformer))
        if in_use and grid is not None:
            self.processor.check_grid(grid)
            self.adapter.check_call(given)
        # a processor that stands around a canvas processor has no plan, and still takes packed tokens
        self.grid = grid if grid in self.processor.plans else None
        self.tells = in_use and len(self.processor.plans) > 1
        if self.tells and not self.adapter.rotary:
            given["attention_kwargs"] = {**(given.get("attention_kwargs") or {}), "grid": grid}
            return (), given
        return None


class TagRotary(Hook):
    """Appends the grid of the call to the rotary tables."""

    def __init__(self, check: CheckGrid):
        self.check = check

    def __call__(self, module, args, rotary):
        return tag_rotary(rotary, grid=self.check.grid) if self.check.tells and self.check.grid else rotary


def install(transformer: nn.Module, adapter: ModelAdapter, processor: CanvasAttnProcessor) -> CheckGrid:
    """Hooks a model so that calls with other grids are refused, and several layouts are told apart."""
    remove(transformer)
    names = [*inspect.signature(type(transformer).forward).parameters][1:]
    check = CheckGrid(adapter, processor, names)
    before_calls(transformer, check)
    if len(processor.plans) > 1 and adapter.rotary:
        transformer.get_submodule("rope").register_forward_hook(TagRotary(check))
    return check


def remove(transformer: nn.Module) -> None:
    """Takes :func:`install`'s hooks away."""
    ropes: list[Any] = [module for name, module in transformer.named_children() if name == "rope"]
    Hook.remove([transformer, *ropes], (CheckGrid, TagRotary))


def before_calls(transformer: nn.Module, hook: Any) -> None:
    """Makes ``hook(transformer, args, kwargs)``, which may return other ones, run before every call of the model."""
    if hasattr(type(transformer), "canvas_adapter"):
        transformer.__dict__.setdefault("canvas_calls", []).append(hook)
    else:
        transformer.register_forward_pre_hook(hook, with_kwargs=True)


def calls_of(transformer: nn.Module) -> list[Any]:
    """Returns what runs before every call of the model."""
    return [*transformer.__dict__.get("canvas_calls", ()), *transformer._forward_pre_hooks.values()]
