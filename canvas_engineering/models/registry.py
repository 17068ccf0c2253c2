"""The models that canvas attention and looping know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .adapter import ModelAdapter
from .cogvideox import CogVideoX
from .hunyuan_video import HunyuanVideo
from .ltx import LTXVideo
from .mochi import Mochi
from .wan import Wan

ADAPTERS: dict[str, ModelAdapter] = {
    adapter.name: adapter for adapter in (CogVideoX(), Wan(), HunyuanVideo(), LTXVideo(), Mochi())
}
"""Adapters by name."""
_PACKAGES = ("diffusers", "canvas_engineering")


def find_adapter(transformer: nn.Module) -> ModelAdapter | None:
    """Returns the adapter of diffusers' model, looped or not; None for other models and others' subclasses."""
    model_class = type(transformer)
    if model_class.__module__.split(".")[0] not in _PACKAGES:
        return None
    names = {adapter.model_class: adapter for adapter in ADAPTERS.values()}
    return names.get(model_class.__name__.removeprefix("Looped"))


def adapter_of(model_or_config: nn.Module | Mapping[str, Any]) -> ModelAdapter:
    """Returns the adapter of a model or of its config.

    Raises:
        ValueError: a model that has none, or a config that does not name its class.
    """
    if isinstance(model_or_config, nn.Module):
        adapter, given = find_adapter(model_or_config), type(model_or_config).__name__
    else:
        given = model_or_config.get("_class_name") if isinstance(model_or_config, Mapping) else None
        adapter = next((a for a in ADAPTERS.values() if str(given).removeprefix("Looped") == a.model_class), None)
    if adapter is None:
        known = ", ".join(adapter.model_class for adapter in ADAPTERS.values())
        raise ValueError(
            f"diffusers' {known} are known, got {given!r}: give the model, or a config with its _class_name"
        )
    return adapter
