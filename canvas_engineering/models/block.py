"""Blocks that loop, in place of the blocks whose modules they keep."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..checked import checked_int, checked_kind
from ..derived_buffers import CanvasModule, refuse_inference_tensors
from ..looped_block import LoopParameters, checked_loops, parameter_home

__all__ = ["LoopedBlock", "LoopedCogVideoXBlock", "LoopedTwoStreamBlock"]

_COUNTING_HOOKS = ("pyramid_attention_broadcast", "faster_cache_block", "taylorseer_cache")
_Block = TypeVar("_Block", bound="LoopedBlock")
_CONTAINERS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_OWN = ("loop", "loops", "block_idx", "sharpening", "block_class", "block_forward", "arguments", "attention")


class LoopedBlock(CanvasModule):
    """One of diffusers' video blocks, run ``loops`` times on its own output (docs/semantics.md, section 6).

    The given block's modules become this one's, under their own names: state-dict keys, attention processors, LoRA and
    whatever else goes by module names stay. The looping adds one module, ``loop``. The text that a block attends to is
    the same in every loop; blocks that hand it on as a second stream are :class:`LoopedTwoStreamBlock`.

    Args:
        original_block: a block of diffusers; it is not changed, and shares its modules from then on.
        block_idx: its number in the model.
        max_loops: the most loops that :meth:`set_loops` allows. It starts at 1 loop.
        inner_dim: width of the video's stream.
        gate: "tanh", or "sigmoid" for checkpoints made with that mixing; see :class:`LoopParameters`.
        text_dim: width of the text's stream, for blocks of two; by default ``inner_dim``.
        attention: name of the attention module whose processor sharpens.

    Attributes:
        loop_emb: (max_loops, inner_dim), added to the video stream.
        loop_gate: (max_loops, 1).
        sharpening: None, or a factor on the attention scale for each loop; needs a :class:`CanvasAttnProcessor`.
        gradient_checkpointing: in training, keep only each loop's input for backward; the model's
            ``enable_gradient_checkpointing`` sets it.

    Raises:
        ValueError: the block is offloaded or hooked already, it loops already, or it holds inference tensors.
    """

    loop: LoopParameters
    loops: int
    block_idx: int
    sharpening: list[float] | None
    block_class: Any
    block_forward: Callable[..., Any]
    arguments: tuple[str, ...]
    attention: str
    gradient_checkpointing = False
    two_streams = False

    def __init__(
        self,
        original_block: nn.Module,
        block_idx: int,
        max_loops: int,
        inner_dim: int,
        gate: str = "tanh",
        text_dim: int | None = None,
        attention: str = "attn1",
    ):
        super().__init__()
        checked_kind(original_block, "original_block", nn.Module)
        state = dict(original_block.__dict__)
        state.update({name: state[name].copy() for name in _CONTAINERS})
        adopted = object.__new__(type(original_block))
        adopted.__dict__.update(state)
        type(self).graft(adopted, block_idx, max_loops, inner_dim, gate, text_dim, attention)
        self.__dict__.update(adopted.__dict__)

    @classmethod
    def graft(
        cls: type[_Block],
        block: nn.Module,
        block_idx: int,
        max_loops: int,
        inner_dim: int,
        gate: str = "tanh",
        text_dim: int | None = None,
        attention: str = "attn1",
    ) -> _Block:
        """The same change made to ``block`` itself, hooks and all; :meth:`ungraft` undoes it."""
        block_idx = checked_int(block_idx, "block_idx")
        cls.check(block, block_idx)
        streams = 2 if cls.two_streams else 1
        loop = LoopParameters(max_loops, inner_dim, streams, gate, 0.0, *parameter_home(block), encoder_dim=text_dim)
        loop.train(block.training)
        before = type(block)
        block.__class__ = cls
        assert isinstance(block, cls)
        # A plain function too: diffusers marks the class as opaque to torch.compile.
        block.block_class, block.block_forward = before, before.forward
        block.loop, block.loops, block.block_idx, block.sharpening = loop, 1, block_idx, None
        by_position = [
            p for p in inspect.signature(before.forward).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD
        ]
        block.arguments, block.attention = tuple(p.name for p in by_position[3:]), attention
        block.__dict__.pop("_compiled_call_impl", None)  # compiled from the forward that it had
        return block

    @staticmethod
    def check(block: nn.Module, block_idx: int) -> None:
        """ValueError if :meth:`graft` cannot be done to ``block``; nothing is changed."""
        if isinstance(block, LoopedBlock):
            raise ValueError(f"block {block_idx} loops already: ungraft it first")
        refuse_inference_tensors(block, f"block {block_idx}")
        if "forward" in block.__dict__ or _is_offloaded(block) or not _is_of_diffusers(block):
            raise ValueError(
                f"hooks or wrappers run block {block_idx} ({type(block).__name__}), or move its parameters, and would "
                "not know of the loops: graft first, then offload or shard"
            )

    def ungraft(self) -> nn.Module:
        """This block as it was before :meth:`graft`, in place."""
        if "forward" in self.__dict__ or type(self) not in LOOPED_BLOCKS:
            raise ValueError(f"hooks or wrappers run block {self.block_idx} ({type(self).__name__}): undo them first")
        plain = self.block_class
        for name in _OWN:
            delattr(self, name)
        for name in ("gradient_checkpointing", "_gradient_checkpointing_func", "_compiled_call_impl"):
            self.__dict__.pop(name, None)
        self.__class__ = plain
        return self

    @property
    def max_loops(self) -> int:
        """The most loops that the parameters provide for."""
        return self.loop.max_loops

    @property
    def loop_emb(self) -> nn.Parameter:
        """(max_loops, inner_dim), added to the video stream."""
        return self.loop.loop_emb

    @property
    def loop_gate(self) -> nn.Parameter:
        """(max_loops, 1)."""
        return self.loop.loop_gate

    @property
    def current_loops(self) -> int:
        """Number of loops that run now: the published name of ``loops``."""
        return self.loops

    @current_loops.setter
    def current_loops(self, n: int) -> None:
        self.set_loops(n)

    def set_loops(self, n: int) -> None:
        """Run ``n`` loops from now on, at most max_loops.

        Raises:
            ValueError: below 1, or more than 1 with a cache of diffusers that counts calls inside of the block as
                steps.
        """
        n = checked_loops(n, self.max_loops)
        counting = n > 1 and self._counting_hook()
        if counting:
            raise ValueError(
                f"block {self.block_idx} has the cache {counting!r}, which counts every call inside of it as a step, "
                f"and {n} loops are {n} calls: disable_cache(), or use FirstBlockCacheConfig or MagCacheConfig"
            )
        self.loops = n

    def _counting_hook(self) -> str | None:
        registries = (getattr(module, "_diffusers_hook", None) for module in self.modules())
        hooks = (name for registry in registries for name in getattr(registry, "hooks", {}))
        return next((name for name in hooks if name in _COUNTING_HOOKS), None)

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Runs the block ``loops`` times.

        Args:
            hidden_states: (B, video tokens, inner_dim).
            encoder_hidden_states: (B, text tokens, width of the text).
            args, kwargs: further arguments of the block's own forward, the same in every loop.

        Returns:
            what the block returns: the video, or both streams, in their shapes and dtype.

        Raises:
            ValueError: sharpening that the attention processor cannot do.
        """
        processor = getattr(self, self.attention).processor
        if self.sharpening is not None and not getattr(processor, "sharpens", False):
            raise ValueError(
                f"block {self.block_idx} sharpens its attention, which {type(processor).__name__} cannot: "
                "set a CanvasAttnProcessor, or the block's sharpening to None"
            )
        given = {**dict(zip(self.arguments, args)), **kwargs}
        video, text = hidden_states, encoder_hidden_states
        saves = self.gradient_checkpointing and torch.is_grad_enabled() and self.loops > 1
        for loop in range(self.loops):
            arguments = (loop, tuple(given), video, text, *given.values())
            video, text = checkpoint(self._run, *arguments, use_reentrant=False) if saves else self._run(*arguments)
        return (video, text) if self.two_streams else video

    def _run(self, loop: int, names: tuple[str, ...], video: Any, text: Any, *values: Any) -> tuple[Any, Any]:
        """One loop, from its input to the next one's: all that checkpointing keeps of it is the streams."""
        video_embedding, text_embedding, gate = self.loop(loop, video.dtype)
        given = dict(zip(names, values))
        if self.sharpening is not None:
            given.update(self._sharpen(given, self.sharpening[loop]))
        entering = text if text_embedding is None else text + text_embedding
        states = {"hidden_states": video + video_embedding, "encoder_hidden_states": entering}
        out = self.block_forward(self, **states, **given)
        if not self.two_streams:
            return self.loop.mix(video, out, gate, loop), text
        new_video, new_text = out
        return self.loop.mix(video, new_video, gate, loop), self.loop.mix(text, new_text, gate, loop)

    def _sharpen(self, given: dict[str, Any], sharpness: float) -> dict[str, Any]:
        """Returns the arguments that hand ``sharpness`` to the processor: the block passes its rotary tables on as they
        are, so it goes with them."""
        (name,) = (name for name in given if name in ("rotary_emb", "image_rotary_emb", "freqs_cis"))
        return {name: tag_rotary(given[name], sharpness=sharpness)}

    def trainable_params(self) -> int:
        """Returns the number of loop parameters."""
        return self.loop.numel()

    def extra_repr(self) -> str:
        return f"block_idx={self.block_idx}, {self.loops} of {self.max_loops} loops, gate={self.loop.gate}"


class LoopedTwoStreamBlock(LoopedBlock):
    """A :class:`LoopedBlock` that takes and returns the text as a second stream; both are mixed by the same gate, and
    each has embeddings of its own.

    Attributes:
        loop_emb_enc: (max_loops, text_dim), added to the text stream.
    """

    two_streams = True

    @property
    def loop_emb_enc(self) -> nn.Parameter:
        """(max_loops, text_dim), added to the text stream."""
        embedding = self.loop.loop_emb_enc
        assert embedding is not None  # of the two streams
        return embedding


class LoopedCogVideoXBlock(LoopedTwoStreamBlock):
    """diffusers' CogVideoX block, run ``loops`` times on its own two streams: a :class:`LoopedTwoStreamBlock` that
    hands on ``attention_kwargs``.

    Args:
        original_block: a ``CogVideoXBlock``; it is not changed, and shares its modules from then on.
        block_idx: its number in the model.
        max_loops: the most loops that :meth:`set_loops` allows. It starts at 1 loop.
        inner_dim: width of both streams.
        gate: "tanh", or "sigmoid" for checkpoints made with that mixing; see :class:`LoopParameters`.

    Attributes:
        loop_emb: (max_loops, inner_dim), added to the video stream.
        loop_emb_enc: (max_loops, inner_dim), added to the text stream.
        loop_gate: (max_loops, 1).
        sharpening: None, or a factor on the attention scale for each loop; needs a :class:`CanvasAttnProcessor`.

    >>> from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
    >>> stock = CogVideoXBlock(dim=8, num_attention_heads=2, attention_head_dim=4, time_embed_dim=4)
    >>> block = LoopedCogVideoXBlock(stock, block_idx=0, max_loops=3, inner_dim=8)
    >>> block.loop_emb.shape, block.current_loops
    (torch.Size([3, 8]), 1)
    """

    attn1: Any  # of diffusers' block

    def __init__(self, original_block: nn.Module, block_idx: int, max_loops: int, inner_dim: int, gate: str = "tanh"):
        super().__init__(original_block, block_idx, max_loops, inner_dim, gate)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the block ``loops`` times.

        Args:
            hidden_states: (B, video tokens, inner_dim).
            encoder_hidden_states: (B, text tokens, inner_dim).
            temb: (B, time_embed_dim).
            image_rotary_emb: cos and sin, (video tokens, head_dim) each.
            attention_kwargs: handed to the attention processor.

        Returns:
            both streams, in their shapes and dtype.

        Raises:
            ValueError: sharpening that the attention processor cannot do, or ``attention_kwargs`` that canvas attention
                does not know.
        """
        if getattr(self.attn1.processor, "sharpens", False) and attention_kwargs:
            unknown = sorted(set(attention_kwargs) - {"attention_mask", "sharpness", "grid"})
            if unknown:  # diffusers would drop them with a log line
                raise ValueError(f"attention_kwargs {unknown} are unknown to canvas attention")
        more = {} if attention_kwargs is None else {"attention_kwargs": attention_kwargs}
        return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, **more)

    def _sharpen(self, given, sharpness):
        return {"attention_kwargs": {**given.get("attention_kwargs", {}), "sharpness": sharpness}}


LOOPED_BLOCKS = (LoopedBlock, LoopedTwoStreamBlock, LoopedCogVideoXBlock)


def tag_rotary(rotary: tuple, grid: tuple[int, int, int] | None = None, sharpness: float = 1.0) -> tuple:
    """Returns rotary tables followed by the grid and the sharpness of a call. A block hands its tables to attention
    unseen: they carry what its forward has no argument for, and recomputation finds it again."""
    cos, sin, *before = rotary
    known = before[0] if before else None
    return cos, sin, known if grid is None else grid, sharpness


def _is_of_diffusers(block: nn.Module) -> bool:
    """Whether a block's class is diffusers' own: wrappers change it, as FSDP does."""
    return type(block).__module__.split(".")[0] == "diffusers"


def _is_offloaded(block: nn.Module) -> bool:
    """Whether accelerate's or diffusers' hooks move parameters of the block."""
    for module in block.modules():
        names = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        if hasattr(module, "_hf_hook") or any("offload" in name for name in names):
            return True
    return False
