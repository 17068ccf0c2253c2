"""A CogVideoX block that loops, in place of the block whose modules it keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..checked import checked_int, checked_kind
from ..derived_buffers import CanvasModule, refuse_inference_tensors
from ..looped_block import LoopParameters, checked_loops, parameter_home

__all__ = ["LoopedCogVideoXBlock"]

_CONTAINERS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


class LoopedCogVideoXBlock(CanvasModule):
    """diffusers' CogVideoX block, run ``loops`` times on its own two streams (docs/semantics.md, section 6).

    The given block's modules become this one's, under their own names: state-dict keys, attention processors, LoRA and
    whatever else goes by module names stay. The looping adds one module, ``loop``. Video and text stream are mixed by
    the same gate; each has embeddings of its own.

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
        gradient_checkpointing: in training, keep only each loop's input for backward; the model's
            ``enable_gradient_checkpointing`` sets it.

    Raises:
        ValueError: the block is offloaded or hooked already, it loops already, or it holds inference tensors.

    >>> from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
    >>> stock = CogVideoXBlock(dim=8, num_attention_heads=2, attention_head_dim=4, time_embed_dim=4)
    >>> block = LoopedCogVideoXBlock(stock, block_idx=0, max_loops=3, inner_dim=8)
    >>> block.loop_emb.shape, block.current_loops
    (torch.Size([3, 8]), 1)
    """

    loop: LoopParameters
    loops: int
    block_idx: int
    sharpening: list[float] | None
    block_class: Any
    block_forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    gradient_checkpointing = False
    attn1: Any  # of diffusers' block

    def __init__(
        self, original_block: nn.Module, block_idx: int, max_loops: int, inner_dim: int, gate: str = "tanh"
    ):
        super().__init__()
        checked_kind(original_block, "original_block", nn.Module)
        state = dict(original_block.__dict__)
        state.update({name: state[name].copy() for name in _CONTAINERS})
        adopted = object.__new__(type(original_block))
        adopted.__dict__.update(state)
        LoopedCogVideoXBlock.graft(adopted, block_idx, max_loops, inner_dim, gate)
        self.__dict__.update(adopted.__dict__)

    @staticmethod
    def graft(
        block: nn.Module, block_idx: int, max_loops: int, inner_dim: int, gate: str = "tanh"
    ) -> LoopedCogVideoXBlock:
        """The same change made to ``block`` itself, hooks and all; :meth:`ungraft` undoes it."""
        block_idx = checked_int(block_idx, "block_idx")
        LoopedCogVideoXBlock.check(block, block_idx)
        loop = LoopParameters(max_loops, inner_dim, 2, gate, 0.0, *parameter_home(block))
        loop.train(block.training)
        before = type(block)
        block.__class__ = LoopedCogVideoXBlock
        assert isinstance(block, LoopedCogVideoXBlock)
        # A plain function too: diffusers marks the class as opaque to torch.compile.
        block.block_class, block.block_forward = before, before.forward
        block.loop, block.loops, block.block_idx, block.sharpening = loop, 1, block_idx, None
        block.__dict__.pop("_compiled_call_impl", None)  # compiled from the forward that it had
        return block

    @staticmethod
    def check(block: nn.Module, block_idx: int) -> None:
        """ValueError if :meth:`graft` cannot be done to ``block``; nothing is changed."""
        if isinstance(block, LoopedCogVideoXBlock):
            raise ValueError(f"block {block_idx} loops already: ungraft it first")
        refuse_inference_tensors(block, f"block {block_idx}")
        if "forward" in block.__dict__ or _is_offloaded(block) or type(block).__name__ != "CogVideoXBlock":
            raise ValueError(
                f"hooks or wrappers run block {block_idx} ({type(block).__name__}), or move its parameters, and would "
                "not know of the loops: graft first, then offload or shard"
            )

    def ungraft(self) -> nn.Module:
        """This block as it was before :meth:`graft`, in place."""
        if "forward" in self.__dict__ or type(self) is not LoopedCogVideoXBlock:
            raise ValueError(f"hooks or wrappers run block {self.block_idx} ({type(self).__name__}): undo them first")
        plain = self.block_class
        for name in ("loop", "loops", "block_idx", "sharpening", "block_class", "block_forward"):
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
    def loop_emb_enc(self) -> nn.Parameter:
        """(max_loops, inner_dim), added to the text stream."""
        embedding = self.loop.loop_emb_enc
        assert embedding is not None  # of the two streams
        return embedding

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
        """Run ``n`` loops from now on, at most max_loops. ValueError below 1."""
        self.loops = checked_loops(n, self.max_loops)

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
        if self.sharpening is not None and not getattr(self.attn1.processor, "sharpens", False):
            raise ValueError(
                f"block {self.block_idx} sharpens its attention, which {type(self.attn1.processor).__name__} cannot: "
                "set a CanvasAttnProcessor, or the block's sharpening to None"
            )
        if getattr(self.attn1.processor, "sharpens", False) and attention_kwargs:
            unknown = sorted(set(attention_kwargs) - {"attention_mask", "sharpness"})
            if unknown:  # diffusers would drop them with a log line
                raise ValueError(f"attention_kwargs {unknown} are unknown to canvas attention")
        video, text = hidden_states, encoder_hidden_states
        saves = self.gradient_checkpointing and torch.is_grad_enabled() and self.loops > 1
        for loop in range(self.loops):
            arguments = (loop, video, text, temb, image_rotary_emb, attention_kwargs)
            video, text = checkpoint(self._run, *arguments, use_reentrant=False) if saves else self._run(*arguments)
        return video, text

    def _run(self, loop, video, text, temb, image_rotary_emb, attention_kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """One loop, from its input to the next one's: all that checkpointing keeps of it is both streams."""
        video_embedding, text_embedding, gate = self.loop(loop, video.dtype)
        if self.sharpening is not None:
            attention_kwargs = {**(attention_kwargs or {}), "sharpness": self.sharpening[loop]}
        new_video, new_text = self.block_forward(
            self,
            hidden_states=video + video_embedding,
            encoder_hidden_states=text + text_embedding,
            temb=temb,
            image_rotary_emb=image_rotary_emb,
            **({} if attention_kwargs is None else {"attention_kwargs": attention_kwargs}),
        )
        return self.loop.mix(video, new_video, gate, loop), self.loop.mix(text, new_text, gate, loop)

    def trainable_params(self) -> int:
        """Returns the number of loop parameters."""
        return self.loop.numel()

    def extra_repr(self) -> str:
        return f"block_idx={self.block_idx}, {self.loops} of {self.max_loops} loops, gate={self.loop.gate}"


def _is_offloaded(block: nn.Module) -> bool:
    """Whether accelerate's or diffusers' hooks move parameters of the block."""
    for module in block.modules():
        names = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        if hasattr(module, "_hf_hook") or any("offload" in name for name in names):
            return True
    return False
