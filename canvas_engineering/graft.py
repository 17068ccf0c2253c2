"""Looping grafted onto a model, what stays frozen, and the way back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .action_heads import ActionHead
from .attention import BACKENDS
from .canvas import CanvasLayout
from .checked import checked_bool, checked_int, checked_items, checked_kind, checked_number, checked_string, shown
from .cogvideox import LoopedCogVideoXBlock, TopologyMeasure, detect_inner_dim, measure_topology
from .connectivity import CanvasTopology
from .derived_buffers import outside_inference, refuse_inference_tensors
from .looped_block import LOOP_PARAMETER_NAMES, LoopedBlockWrapper, can_loop, checked_loops, set_loops
from .models.block import LoopedBlock
from .models.model import graft_model, is_looped, ungraft_model
from .models.processor import declarations
from .models.registry import ADAPTERS, find_adapter
from .notices import warn
from .schema import CanvasSchema

__all__ = ["freeze_full", "freeze_half", "graft_looped_blocks", "ungraft"]

_log = logging.getLogger(__name__)
_FREEZE = ("full", "half", "none")


@outside_inference
def graft_looped_blocks(
    transformer: nn.Module,
    max_loops: int = 3,
    block_attr: str = "transformer_blocks",
    wrapper_class: type[nn.Module] | None = None,
    inner_dim: int | None = None,
    action_dim: int = 7,
    latent_channels: int = 16,
    freeze: str = "full",
    *,
    loops: int | None = None,
    gate: str = "tanh",
    sharpening: Callable[[int], float] | Sequence[float] | None = None,
    layout: CanvasLayout | Sequence[CanvasLayout] | None = None,
    topology: CanvasTopology | Sequence[CanvasTopology] | None = None,
    backend: str = "auto",
    packed: bool | None = None,
    measure_on: Mapping[str, Any] | None = None,
) -> tuple[list[nn.Module], ActionHead]:
    """Make the blocks of a model loop, in place; :func:`ungraft` undoes it.

    The grafted model gives the backbone's outputs bit for bit until its loop parameters are trained. diffusers' video
    models that are known (CogVideoX, Wan, HunyuanVideo, LTX-Video, Mochi) become looped classes, like
    ``LoopedCogVideoXTransformer3DModel``, that keep their state-dict keys, config and processors; blocks of other
    models are wrapped in :class:`LoopedBlockWrapper`.

    Args:
        transformer: a model with a ``nn.ModuleList`` of blocks.
        max_loops: the most loops that a block can run.
        block_attr: dotted name of the list of blocks; all blocks of a known model loop.
        wrapper_class: called as ``wrapper_class(block, number, max_loops, inner_dim)`` instead.
        inner_dim: width of the blocks' streams; see :func:`detect_inner_dim` for the default.
        action_dim, latent_channels: of the ActionHead that is made.
        freeze: "full" leaves only loop parameters trainable, "half" freezes the patch embedding only, "none" nothing.
        loops: loops to run, up to ``max_loops``; by default 1, until ``set_loops`` or a CurriculumScheduler says more.
        gate: "tanh", or "sigmoid" for loop checkpoints of the published package.
        sharpening: a factor on the attention scale for each loop: a :class:`SharpeningSchedule`, or a list. Of known
            models only, as everything below.
        layout, topology: canvas attention: each token attends, in one softmax, to its keys under the topology.
            From :func:`video_layout` and the likes of :func:`window_topology`. A list of layouts, with a topology
            for each or one for all, is for videos of several sizes: each is compiled here, and every call takes the one
            of its grid; other grids are refused. A UserWarning says how much of dense attention the (first) topology
            computes. A model that is grafted already keeps its attention if neither this nor sharpening is given.
        backend: see :func:`canvas_attention`.
        packed: keep tokens in the plan's packed order from the first block to the last, where that order moves any;
            by default where the model can, which is CogVideoX.
        measure_on: arguments of the model's forward: the warning then says how far the attention outputs move.

    Returns:
        the looped blocks, and an ActionHead on the model's device.

    Raises:
        ValueError: no such list of blocks, an unknown ``freeze``, ``gate`` or ``backend``, a model that is grafted
            otherwise already, blocks that are offloaded, inference tensors in the model, a declaration that attention
            over tokens cannot compute, one of ``layout`` and ``topology`` without the other, packing of a model that
            cannot, or attention options for a model that is not known.

    >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, batch_first=True), 2)
    >>> blocks, _ = graft_looped_blocks(encoder, block_attr="layers", loops=2)
    >>> sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    102
    """
    if freeze not in _FREEZE:
        raise ValueError(f"freeze must be one of {', '.join(_FREEZE)}; got {freeze!r}")
    checked_kind(transformer, "transformer", nn.Module)
    checked_string(block_attr, "block_attr")
    declared = declarations(layout, topology)
    checked_kind(measure_on, "measure_on", Mapping, optional=True)
    packed = None if packed is None else checked_bool(packed, "packed")
    max_loops = checked_int(max_loops, "max_loops", kind="an int of at least 1", least=1)
    if wrapper_class is not None and not callable(wrapper_class):
        raise ValueError(f"wrapper_class must be a class of blocks, got {shown(wrapper_class)}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if measure_on is not None and topology is None:
        raise ValueError("measure_on= is what a topology is measured on: give layout= and topology= too")
    refuse_inference_tensors(transformer, "the model")
    adapter = find_adapter(transformer) if wrapper_class in (None, LoopedCogVideoXBlock) else None
    if adapter is not None and block_attr not in ("transformer_blocks", *adapter.block_lists):
        adapter = None
    originals = _blocks(transformer, block_attr if adapter is None else adapter.block_lists[0])
    running = checked_loops(1 if loops is None else loops, max_loops)
    if loops is not None and loops > max_loops:
        raise ValueError(f"loops={loops} are more than max_loops={max_loops}")
    inner_dim = detect_inner_dim(transformer) if inner_dim is None else checked_int(inner_dim, "inner_dim", 1)
    frozen = frozenset(name for name, parameter in transformer.named_parameters() if not parameter.requires_grad)
    if adapter is not None:
        measured = None
        if measure_on is not None:
            measured = measure_topology(transformer, *declared[0], measure_on)
        betas = [sharpening(loop) for loop in range(max_loops)] if callable(sharpening) else sharpening
        if betas is not None:
            betas = [checked_number(beta, "sharpening") for beta in checked_items(betas, "sharpening", "numbers")]
        schemas = [CanvasSchema(*pair) for pair in declared]
        looped = graft_model(transformer, max_loops, gate, betas, schemas, backend, packed)
        set_loops([transformer], running)
        if declared:
            _warn_of_topology(getattr(looped[0], looped[0].attention).processor.plan.density, measured)
        blocks: list[nn.Module] = [*looped]
    elif sharpening is not None or declared:
        known = ", ".join(adapter.model_class for adapter in ADAPTERS.values())
        raise ValueError(
            f"sharpening, layout and topology are for diffusers' {known}, got {type(transformer).__name__}"
        )
    else:
        blocks = _wrap(originals, wrapper_class, max_loops, inner_dim, gate)
        set_loops(blocks, running)
        owner = _owner(transformer, block_attr)
        if getattr(owner, "use_nested_tensor", False):
            # torch's encoder hands nested tensors, which do not broadcast, to whatever stands for its own layers
            owner.__dict__.update(use_nested_tensor=False, _nested_before_graft=True)
    transformer.__dict__.setdefault("_frozen_before_graft", frozen)
    if freeze == "full":
        freeze_full(transformer)
    elif freeze == "half":
        freeze_half(transformer)
    if loops is None and max_loops > 1:
        _log.warning(
            "grafted %d blocks for up to %d loops; they run 1 loop until set_loops, loops= or a curriculum says more",
            len(blocks),
            max_loops,
        )
    device = next((p.device for p in transformer.parameters()), torch.device("cpu"))
    with torch.device(device):
        return blocks, ActionHead(latent_channels, action_dim)


def _warn_of_topology(density: float, measured: TopologyMeasure | None) -> None:
    lost = (
        "measure_topology says how far its outputs move on a batch"
        if measured is None
        else f"on the given batch its outputs move by {100 * measured.difference:.1f} % of their mean size"
    )
    warn(
        f"attention computes {100 * density:.2f} % of all token pairs; a backbone that was trained with dense "
        f"attention and stays frozen loses the others: {lost}"
    )


def ungraft(transformer: nn.Module, block_attr: str = "transformer_blocks") -> nn.Module:
    """Undo :func:`graft_looped_blocks`, in place: the plain model again. A model that is not grafted stays as it is.

    Returns:
        ``transformer``.

    >>> block = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    >>> model = nn.TransformerEncoder(block, 1, enable_nested_tensor=False)
    >>> _ = graft_looped_blocks(model, block_attr="layers", inner_dim=8, freeze="none")
    >>> type(ungraft(model, "layers").layers[0]).__name__
    'TransformerEncoderLayer'
    """
    if is_looped(transformer):
        ungraft_model(transformer)
    else:
        adapter = find_adapter(transformer)
        known = adapter is not None and block_attr == "transformer_blocks"
        blocks = _blocks(transformer, adapter.block_lists[0] if adapter is not None and known else block_attr)
        if not any(map(can_loop, blocks)):
            return transformer
        for number, block in enumerate(blocks):
            if isinstance(block, LoopedBlock):
                block.ungraft()
                continue
            original = getattr(block, "original", None)
            if not isinstance(original, nn.Module):
                raise ValueError(f"block {number}, a {type(block).__name__}, does not say its `original`")
            blocks[number] = original
        owner = _owner(transformer, block_attr)
        if owner.__dict__.pop("_nested_before_graft", False):
            owner.__dict__["use_nested_tensor"] = True
    # a looped model that was loaded from a checkpoint has no record, and what loads is trainable
    frozen = transformer.__dict__.pop("_frozen_before_graft", frozenset())
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return transformer


def freeze_full(transformer: nn.Module) -> int:
    """Freeze everything but loop parameters; the number of frozen parameters.

    >>> freeze_full(nn.Linear(3, 4))
    16
    """
    return _freeze(transformer, lambda name: name.split(".")[-1] not in LOOP_PARAMETER_NAMES)


def freeze_half(transformer: nn.Module) -> int:
    """Freeze the patch embedding and positional embeddings only; the number of frozen parameters.

    >>> model = nn.ModuleDict({"patch_embed": nn.Linear(3, 4), "blocks": nn.Linear(4, 4)})
    >>> freeze_half(model)
    16
    """
    adapter = find_adapter(transformer)
    if adapter is not None:
        return _freeze(transformer, lambda name: name.startswith(f"{adapter.embedding}."))
    return _freeze(transformer, lambda name: "patch_embed" in name or "pos_embedding" in name)


def _freeze(transformer: nn.Module, frozen) -> int:
    count = 0
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(not frozen(name))
        count += parameter.numel() if frozen(name) else 0
    return count


def _blocks(transformer: nn.Module, block_attr: str) -> nn.ModuleList:
    lists = [name for name, module in transformer.named_modules() if isinstance(module, nn.ModuleList)]
    if block_attr not in lists:
        raise ValueError(
            f"{type(transformer).__name__} has no list of blocks at {block_attr!r}; it has {lists or 'none'}: "
            "give block_attr="
        )
    blocks = transformer.get_submodule(block_attr)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def _owner(transformer: nn.Module, block_attr: str) -> nn.Module:
    """Returns the module that holds the list of blocks."""
    return transformer.get_submodule(block_attr.rpartition(".")[0])


def _wrap(blocks: nn.ModuleList, wrapper_class, max_loops: int, inner_dim: int, gate: str) -> list[nn.Module]:
    looped = {number: block for number, block in enumerate(blocks) if can_loop(block)}
    if looped and len(looped) == len(blocks):
        for block in looped.values():
            if (block.max_loops, block.loop.gate) != (max_loops, gate):
                raise ValueError(
                    f"this model is grafted with max_loops={block.max_loops}, gate={block.loop.gate!r}; requested "
                    f"max_loops={max_loops}, gate={gate!r}. ungraft it first"
                )
        return list(blocks)
    if looped:
        raise ValueError(f"blocks {[*looped]} loop already, the others do not")
    if wrapper_class in (None, LoopedCogVideoXBlock) and all(type(b).__name__ == "CogVideoXBlock" for b in blocks):
        warn(
            "these CogVideoX blocks belong to a model that is not diffusers' CogVideoXTransformer3DModel itself: they "
            "loop, and its save_pretrained does not know it; keep them with save_loop_checkpoint"
        )
        return [LoopedCogVideoXBlock.graft(b, number, max_loops, inner_dim, gate) for number, b in enumerate(blocks)]
    for number, block in enumerate(blocks):
        if wrapper_class is None:
            blocks[number] = LoopedBlockWrapper(block, number, max_loops, inner_dim, gate=gate)
        else:
            if gate != "tanh":
                raise ValueError(f"gate={gate!r} is for the wrappers of this package, not for {wrapper_class.__name__}")
            blocks[number] = wrapper_class(block, number, max_loops, inner_dim)
        blocks[number].train(block.training)
    return list(blocks)
