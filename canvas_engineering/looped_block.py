"""Looping: a block applied several times to its own output, with a learned embedding and gate per loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeGuard, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from canvas_engineering.derived_buffers import CanvasModule, refuse_inference_tensors

from .checked import checked_bool, checked_int, checked_kind, checked_number, checked_tensor, shown

__all__ = ["LoopParameters", "LoopedBlockWrapper", "checked_loops"]

GATES = ("tanh", "sigmoid")
HALVES = (torch.float16, torch.bfloat16)
LOOP_PARAMETER_NAMES = ("loop_emb", "loop_emb_enc", "loop_gate")


def checked_loops(n: int, max_loops: int) -> int:
    """Returns ``n``, at most ``max_loops``.

    Raises:
        ValueError: n below 1, or no int.
    """
    try:
        return min(checked_int(n, "loops", 1), max_loops)
    except ValueError:
        raise ValueError(f"a block runs at least 1 loop, got {shown(n)}") from None


class LoopParameters(CanvasModule):
    """The parameters of looping: an embedding per loop and stream, and a gate per loop.

    A module of its own, for what moves parameters between devices (offloading, sharding) does so around a forward. Its
    parameters are float32 beside a backbone of half precision, whatever the model is cast to: a bfloat16 gate cannot
    move by AdamW's steps once it is a few hundred of them large. They are cast where they are used. A sharding that
    groups parameters of one dtype (FSDP2) makes each block's ``loop`` a group of its own.

    Args:
        max_loops: rows of every parameter.
        dim: width of the block's streams.
        streams: 1, or 2 for blocks that carry an encoder stream besides.
        gate: "tanh": h ← lerp(h, block(h + e_l), c_l), c_0 = 1 + tanh(g_0) and c_l = tanh(g_l) for l ≥ 1, which at
            g = 0 is the block alone. "sigmoid": c_l = σ(g_l) for all l, the mixing of older checkpoints.
        gate_init: what the gates start at; the embeddings start at 0.
        device, dtype: of the parameters.
        encoder_dim: width of the encoder stream, by default ``dim``.

    Attributes:
        loop_emb: (max_loops, dim).
        loop_emb_enc: (max_loops, encoder_dim), or None for one stream.
        loop_gate: (max_loops, 1).
    """

    def __init__(
        self, max_loops, dim, streams=1, gate="tanh", gate_init=0.0, device=None, dtype=None, encoder_dim=None
    ):
        super().__init__()
        if not isinstance(gate, str) or gate not in GATES:
            raise ValueError(f"gate must be one of {', '.join(GATES)}; got {shown(gate)}")
        try:
            max_loops = checked_int(max_loops, "max_loops", 1)
        except ValueError:
            raise ValueError(f"max_loops must be an int of at least 1, got {shown(max_loops)}") from None
        dim, gate_init = checked_int(dim, "the width of a block", 1), checked_number(gate_init, "what gates start at")
        self.max_loops, self.gate = max_loops, gate
        zeros = {"device": device, "dtype": torch.float32 if dtype in HALVES else dtype}
        self.loop_emb = nn.Parameter(torch.zeros(max_loops, dim, **zeros))
        of_encoder = dim if encoder_dim is None else checked_int(encoder_dim, "the width of the encoder stream", 1)
        self.loop_emb_enc = nn.Parameter(torch.zeros(max_loops, of_encoder, **zeros)) if streams == 2 else None
        self.loop_gate = nn.Parameter(torch.full((max_loops, 1), gate_init, **zeros))

    def forward(self, loop: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Returns (e_l, e_l of the encoder stream or None, gate value (1,)) of loop ``loop``, cast to ``dtype``.

        The gate value is tanh(g_l) or σ(g_l): :func:`mix` adds the 1 of loop 0 where no rounding can lose tanh(g_0).
        """
        gate = self.loop_gate[loop]
        value = torch.tanh(gate) if self.gate == "tanh" else torch.sigmoid(gate)
        encoder = None if self.loop_emb_enc is None else self.loop_emb_enc[loop].to(dtype)
        return self.loop_emb[loop].to(dtype), encoder, value.to(dtype)

    def mix(self, before: torch.Tensor, after: torch.Tensor, gate: torch.Tensor, loop: int) -> torch.Tensor:
        """Returns lerp(before, after, c_l), which for a zero gate is exactly ``after`` (loop 0) or ``before``."""
        if self.gate == "sigmoid":
            return gate * after + (1 - gate) * before
        base = after if loop == 0 else before
        return base + gate * (after - before)

    def _apply(self, fn, recurse=True):
        def keep(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return tensor.float().to(moved.device) if moved.dtype in HALVES else moved

        return super()._apply(keep, recurse)

    def numel(self) -> int:
        """Returns the number of loop parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *rest):
        # The checkpoint of a plain model has no loop parameters, and none of them is missing from it.
        absent: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, absent, *rest)
        if len(absent) < len(list(self.parameters())):
            missing_keys.extend(absent)


class Loops(Protocol):
    """The interface of blocks that loop, of this package and others."""

    loop: LoopParameters
    loops: int

    @property
    def max_loops(self) -> int: ...

    def set_loops(self, n: int) -> None: ...


def can_loop(block: object) -> TypeGuard[Loops]:
    """Whether a block loops, of whatever class."""
    return hasattr(block, "set_loops")


def set_loops(modules: Iterable[nn.Module], n: int) -> None:
    """Runs ``n`` loops from now on in each of the modules, which loop."""
    for module in cast("Iterable[Loops]", modules):
        module.set_loops(n)


class LoopedBlockWrapper(CanvasModule):
    """Any transformer block, run ``loops`` times on its own output (docs/semantics.md, section 6).

    The wrapped block is called as ``block(hidden_states, *args, **kwargs)`` and gives a tensor like ``hidden_states``,
    or a tuple whose first item is one, and whose other items are dropped; later loops get the same further arguments.
    With zero embeddings and gates, as they start, the result is the block's own, bit for bit, whatever the number of
    loops. Blocks that hand on a second stream, as many video models have one for text, need a wrapper of their own.
    Attributes that the wrapper does not have are the block's.

    Args:
        original: the block; its tensors must not be inference tensors.
        block_idx: its number in the model.
        max_loops: the most loops that :meth:`set_loops` allows. It starts at 1 loop.
        embed_dim: width of ``hidden_states``.
        gate_init_bias: what the gates start at.
        use_gradient_checkpointing: in training with several loops, keep only each loop's input for backward.
        gate: "tanh", or "sigmoid" for checkpoints made with that mixing; see :class:`LoopParameters`.

    Attributes:
        loop_emb: (max_loops, embed_dim).
        loop_gate: (max_loops, 1).

    Raises:
        ValueError: the block holds inference tensors, an unknown gate, or max_loops that is no int of at least 1.

    >>> block = LoopedBlockWrapper(nn.Linear(8, 8), max_loops=3, embed_dim=8)
    >>> x = torch.randn(2, 5, 8)
    >>> block.set_loops(3)
    >>> torch.equal(block(x), block.original(x)), block.trainable_params()
    (True, 27)
    """

    def __init__(
        self,
        original: nn.Module,
        block_idx: int = 0,
        max_loops: int = 4,
        embed_dim: int = 256,
        gate_init_bias: float = 0.0,
        use_gradient_checkpointing: bool = True,
        gate: str = "tanh",
    ):
        super().__init__()
        self.original = checked_kind(original, "original", nn.Module)
        self.block_idx = checked_int(block_idx, "block_idx")
        self.embed_dim = embed_dim = checked_int(embed_dim, "embed_dim", 1)
        self.use_gradient_checkpointing = checked_bool(use_gradient_checkpointing, "use_gradient_checkpointing")
        refuse_inference_tensors(original, f"block {block_idx}")
        self.loop = LoopParameters(max_loops, embed_dim, 1, gate, gate_init_bias, *parameter_home(original))
        self.loops = 1

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "original":
                raise
        return getattr(super().__getattr__("original"), name)

    @property
    def max_loops(self) -> int:
        """The most loops that the parameters provide for."""
        return self.loop.max_loops

    @property
    def loop_emb(self) -> nn.Parameter:
        """(max_loops, embed_dim)."""
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
        """Run ``n`` loops from now on, at most max_loops. ValueError below 1."""
        self.loops = checked_loops(n, self.max_loops)

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """Runs the block on (…, embed_dim); returns the same shape and dtype.

        Raises:
            ValueError: another width, or a block that returns a second stream.
        """
        checked_tensor(hidden_states, "hidden_states")
        if hidden_states.shape[-1:] != (self.embed_dim,):
            raise ValueError(
                f"block {self.block_idx} loops over states of width {self.embed_dim}, got {tuple(hidden_states.shape)}"
            )
        saves = self.use_gradient_checkpointing and self.training and torch.is_grad_enabled() and self.loops > 1
        for loop in range(self.loops):
            if saves:
                hidden_states = checkpoint(self._run, loop, hidden_states, *args, use_reentrant=False, **kwargs)
            else:
                hidden_states = self._run(loop, hidden_states, *args, **kwargs)
        return hidden_states

    def _run(self, loop: int, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """One loop, from its input to the next one's: all that checkpointing keeps of it is ``hidden_states``."""
        embedding, _, gate = self.loop(loop, hidden_states.dtype)
        out = self.original(hidden_states + embedding, *args, **kwargs)
        if isinstance(out, tuple):
            self._check_one_stream(hidden_states, out, (*args, *kwargs.values()))
            out = out[0]
        return self.loop.mix(hidden_states, out, gate, loop)

    def _check_one_stream(self, hidden_states: torch.Tensor, out: tuple, further: tuple) -> None:
        """ValueError where dropping all but the first item would lose a stream: an item shaped like an argument."""
        shapes = [item.shape if isinstance(item, torch.Tensor) else None for item in out]
        streams = [x.shape for x in further if isinstance(x, torch.Tensor) and x.dim() == hidden_states.dim()]
        if shapes[0] != hidden_states.shape or any(shape in streams for shape in shapes[1:]):
            shown = [None if shape is None else tuple(shape) for shape in shapes]
            raise ValueError(
                f"block {self.block_idx}, a {type(self.original).__name__}, returns {len(out)} items of shapes "
                f"{shown}: LoopedBlockWrapper loops one stream, the first item, here {tuple(hidden_states.shape)}, and "
                "would lose another: give wrapper_class="
            )

    def trainable_params(self) -> int:
        """Returns the number of loop parameters."""
        return self.loop.numel()

    def extra_repr(self) -> str:
        return f"block_idx={self.block_idx}, {self.loops} of {self.max_loops} loops, gate={self.loop.gate}"


def parameter_home(block: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    """Returns the device and dtype for new parameters of a block: those of its first floating one, else None."""
    for parameter in block.parameters():
        if parameter.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            return parameter.device, parameter.dtype
    return None, None
