"""The CogVideoX transformer with loops in its config, and what grafts and ungrafts it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cache, wraps
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeGuard, cast

from torch import nn

from ..attention import BACKENDS
from ..canvas import CanvasLayout
from ..checked import checked_bool, checked_choice, checked_items, checked_kind, checked_number, shown
from ..connectivity import CanvasTopology
from ..derived_buffers import outside_inference
from ..schema import CanvasSchema
from . import packing, parallel
from .block import LoopedCogVideoXBlock
from .processor import CanvasAttnProcessor

if TYPE_CHECKING:
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel

OWN_CONFIG = ("max_loops", "loops", "gate", "sharpening", "canvas", "backend", "packed")


@cache
def looped_model_class() -> type[CogVideoXTransformer3DModel]:
    """Returns ``LoopedCogVideoXTransformer3DModel``, made at the first call, for its base class needs diffusers."""
    from diffusers.configuration_utils import register_to_config
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel

    @outside_inference
    def __init__(
        self,
        *args,
        max_loops: int = 3,
        loops: int | list[int] = 1,
        gate: str = "tanh",
        sharpening: list[float] | None = None,
        canvas: dict[str, Any] | None = None,
        backend: str = "auto",
        packed: bool = False,
        **stock,
    ):
        CogVideoXTransformer3DModel.__init__(self, *args, **stock)
        inner_dim = self.config.num_attention_heads * self.config.attention_head_dim
        for number, block in enumerate(self.transformer_blocks):
            LoopedCogVideoXBlock.graft(block, number, max_loops, inner_dim, gate)
        self._set_block_loops(loops)
        checked_choice(backend, "backend", BACKENDS)
        packed = checked_bool(packed, "packed")
        if canvas is not None and "schema" not in checked_kind(canvas, "canvas", Mapping):
            raise ValueError(f"canvas must hold the schema that the attention follows, got {shown(canvas)}")
        schema = None if canvas is None else CanvasSchema.from_dict(canvas["schema"])
        set_attention(self, sharpening, processor_for(sharpening, schema, max_loops, backend), packed)

    # diffusers takes names and defaults of the config from this signature: its version's own, and ours.
    stock = inspect.signature(CogVideoXTransformer3DModel.__init__)
    own = [p for p in inspect.signature(__init__).parameters.values() if p.name in OWN_CONFIG]
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    __init__.__signature__ = stock.replace(
        parameters=[*stock.parameters.values(), *(p.replace(kind=keyword_only) for p in own)]
    )

    class LoopedCogVideoXTransformer3DModel(CogVideoXTransformer3DModel):
        """``CogVideoXTransformer3DModel`` whose blocks loop, and whose config says how.

        ``graft_looped_blocks`` turns a stock model into one, in place. Further config: ``max_loops``; ``loops`` (of all
        blocks, or a list with a number for each); ``gate`` ("tanh" or "sigmoid"); ``sharpening`` (a factor for each
        loop, or None); ``canvas`` (the declaration that the attention follows, or None), ``backend`` and ``packed``.
        """

        _no_split_modules = [*CogVideoXTransformer3DModel._no_split_modules, "LoopedCogVideoXBlock"]
        _repeated_blocks = ["LoopedCogVideoXBlock"]
        _keep_in_fp32_modules = ["loop"]  # also where from_pretrained or `to` is given another dtype

        def set_loops(self, n: int) -> None:
            """Run ``n`` loops in every block from now on, at most max_loops. ValueError below 1."""
            self._set_block_loops(n)
            self._register_loops()

        def _set_block_loops(self, loops: int | list[int]) -> None:
            blocks = blocks_of(self)
            several = isinstance(loops, (list, tuple))
            numbers = checked_items(loops, "loops", "ints") if several else [loops] * len(blocks)
            if len(numbers) != len(blocks):
                raise ValueError(f"loops lists {len(numbers)} numbers for {len(blocks)} blocks: {loops}")
            for block, number in zip(blocks, numbers):
                block.set_loops(number)

        def _register_loops(self) -> None:
            numbers = [block.loops for block in blocks_of(self)]
            self.register_to_config(loops=numbers[0] if len(set(numbers)) == 1 else numbers)

        @wraps(CogVideoXTransformer3DModel.set_attn_processor)
        def set_attn_processor(self, processor):
            given = [*processor.values()] if isinstance(processor, dict) else [processor]
            packing.check(self, given)
            parallel.check(self, given)
            super().set_attn_processor(processor)

        def enable_parallelism(self, *, config, cp_plan=None) -> None:
            """Shares tokens over ``ring_degree`` · ``ulysses_degree`` ranks, and attention's heads over the latter.

            Every rank passes the same inputs and gets the whole output. Gradients averaged over these ranks, as DDP and
            FSDP2 average them, are those of one process. Each rank of the mesh has to call it.

            Args:
                config: diffusers' ``ContextParallelConfig``, or a ``ParallelConfig`` with one; sizes need not divide.
                    Over ``ring_degree`` rows move as the topology says; no ring runs.
                cp_plan: not possible: the model's own plan cuts its tokens.

            Raises:
                ValueError: another kind of parallelism, a ``ring_degree`` above 1 without a topology, a ``cp_plan``,
                    ranks with different topologies, or a model whose tokens are shared already; it is as before.
            """
            parallel.install(self, config, cp_plan)

        @wraps(CogVideoXTransformer3DModel.save_config)
        def save_config(self, *args, **kwargs):
            self._register_loops()  # blocks and processors may have been set since
            register_attention(self)
            return super().save_config(*args, **kwargs)

        @classmethod
        def from_config(cls, config, *args, **kwargs):
            saved_by = config.get("_class_name", cls.__name__) if isinstance(config, dict) else cls.__name__
            if saved_by != cls.__name__:
                raise ValueError(
                    f"this is the config of a {saved_by}, whose checkpoint holds no loops: load it as {saved_by}, then "
                    "graft_looped_blocks"
                )
            return super().from_config(config, *args, **kwargs)

        def fuse_qkv_projections(self) -> None:
            """Fuses query, key and value projections, as the stock model does, and keeps canvas processors."""
            before = self.attn_processors
            super().fuse_qkv_projections()
            fused = {}
            for name, stock_one in self.attn_processors.items():
                own: Any = before[name]
                fused[name] = own.with_fused() if hasattr(own, "with_fused") else stock_one
            self.set_attn_processor(fused)  # pyright: ignore[reportCallIssue] `wraps` hides from it that this is a method

    looped = LoopedCogVideoXTransformer3DModel
    looped.__init__ = register_to_config(__init__)
    # Where pickles and pipelines look for it.
    looped.__module__, looped.__qualname__ = "canvas_engineering.cogvideox", looped.__name__
    looped.__init__.__qualname__ = f"{looped.__name__}.__init__"
    _register_for_caches()
    return looped


def _register_for_caches() -> None:
    if find_spec("diffusers.hooks") is None or find_spec("diffusers.hooks._helpers") is None:
        return  # a diffusers without caches that go by block class
    from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

    TransformerBlockRegistry.register(
        LoopedCogVideoXBlock,
        TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=1),
    )


def is_cogvideox(transformer: nn.Module) -> TypeGuard[CogVideoXTransformer3DModel]:
    """Whether this is diffusers' CogVideoX transformer, looped or not; a subclass by someone else is not."""
    return type(transformer).__name__ in ("CogVideoXTransformer3DModel", "LoopedCogVideoXTransformer3DModel") and (
        type(transformer).__module__.split(".")[0] in ("diffusers", "canvas_engineering")
    )


def is_looped_cogvideox(transformer: nn.Module) -> TypeGuard[CogVideoXTransformer3DModel]:
    """Whether this is a ``LoopedCogVideoXTransformer3DModel``."""
    return type(transformer).__name__ == "LoopedCogVideoXTransformer3DModel"


def blocks_of(transformer: CogVideoXTransformer3DModel) -> Sequence[LoopedCogVideoXBlock]:
    """Returns the blocks of a looped model, also where compilers or wrappers stand around them."""
    return cast("Sequence[LoopedCogVideoXBlock]", transformer.transformer_blocks)


def canvas_processor(transformer: CogVideoXTransformer3DModel) -> CanvasAttnProcessor | None:
    """Returns the processor that all blocks share, if it is a canvas processor; None if none has one.

    Raises:
        ValueError: blocks with different processors, which the config has no form for.
    """
    processors = [block.attn1.processor for block in blocks_of(transformer)]
    canvas = [processor for processor in processors if isinstance(processor, CanvasAttnProcessor)]
    if canvas and (len(canvas) < len(processors) or any(p.declaration() != canvas[0].declaration() for p in canvas)):
        raise ValueError("the blocks have different attention processors; a config can name one for all of them")
    return canvas[0] if canvas else None


def processor_for(
    sharpening: list[float] | None, schema: CanvasSchema | None, max_loops: int, backend: str
) -> CanvasAttnProcessor | None:
    """Returns the processor for a declaration or sharpening; None if there is neither.

    Raises:
        ValueError: as its class, and sharpening without a positive factor for each loop.
    """
    factors = [] if sharpening is None else checked_items(sharpening, "sharpening", "numbers")
    factors = [checked_number(beta, "every factor of sharpening", "a positive number") for beta in factors]
    if (sharpening is not None and len(factors) < max_loops) or not all(0.0 < beta < float("inf") for beta in factors):
        raise ValueError(f"sharpening must hold a positive factor for each of {max_loops} loops, got {sharpening}")
    if schema is not None:
        return CanvasAttnProcessor(schema.layout, schema.topology, backend=backend)
    return None if sharpening is None else CanvasAttnProcessor(backend=backend)


def set_attention(
    transformer: CogVideoXTransformer3DModel,
    sharpening: list[float] | None,
    processor: CanvasAttnProcessor | None,
    packed: bool,
) -> None:
    """Gives all blocks of a looped model a processor and its sharpening; without a processor they keep theirs."""
    if processor is not None:
        parallel.refuse(transformer)
        packing.remove(transformer)
        if packed and packing.can_pack(processor):
            processor.packed = True
            packing.install(transformer, processor)
        fused = any(getattr(p, "fused", "Fused" in type(p).__name__) for p in transformer.attn_processors.values())
        own: Any = processor.with_fused(fused)  # diffusers' annotation lists its own classes
        transformer.set_attn_processor(own)
    for block in blocks_of(transformer):
        block.sharpening = None if sharpening is None else list(sharpening)
    register_attention(transformer)


def register_attention(transformer: CogVideoXTransformer3DModel) -> None:
    """Writes the attention that the blocks have into the model's config."""
    processor = canvas_processor(transformer)
    transformer.register_to_config(
        sharpening=blocks_of(transformer)[0].sharpening,
        canvas=None if processor is None else processor.declaration(),
        backend="auto" if processor is None else processor.backend,
        packed=processor is not None and processor.packed,
    )


def graft_cogvideox(
    transformer: CogVideoXTransformer3DModel,
    max_loops: int,
    inner_dim: int,
    gate: str,
    sharpening: list[float] | None,
    layout: CanvasLayout | None,
    topology: CanvasTopology | None,
    backend: str,
    packed: bool,
) -> list[LoopedCogVideoXBlock]:
    """Makes a stock model a looped one, in place; a looped one with equal loops gets the given attention."""
    config, blocks = transformer.config, blocks_of(transformer)
    schema = None if layout is None else CanvasSchema(layout, topology)
    # Everything that can be refused is refused before anything is changed.
    processor = processor_for(sharpening, schema, max_loops, backend)
    if isinstance(transformer, looped_model_class()):
        if (config["max_loops"], config["gate"]) != (max_loops, gate):
            raise ValueError(
                f"this model is grafted with max_loops={config['max_loops']}, gate={config['gate']!r}; requested "
                f"max_loops={max_loops}, gate={gate!r}. ungraft it first"
            )
        if processor is None:
            return list(blocks)
    else:
        for number, block in enumerate(blocks):
            LoopedCogVideoXBlock.check(block, number)
        processors = transformer.attn_processors
        for number, block in enumerate(blocks):
            looped = LoopedCogVideoXBlock.graft(block, number, max_loops, inner_dim, gate)
            looped.gradient_checkpointing = transformer.gradient_checkpointing
        transformer.__class__ = looped_model_class()
        transformer.__dict__["_processors_before_graft"] = processors
        transformer.register_to_config(max_loops=max_loops, gate=gate)
    set_attention(transformer, sharpening, processor, packed)
    return list(blocks)


def ungraft_cogvideox(transformer: CogVideoXTransformer3DModel) -> nn.Module:
    """The stock model, in place: classes, config and attention processors as before the graft."""
    from diffusers.configuration_utils import FrozenDict
    from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel

    packing.remove(transformer)
    parallel.remove(transformer)
    for block in blocks_of(transformer):
        block.ungraft()
    transformer.__class__ = CogVideoXTransformer3DModel
    config = {name: value for name, value in transformer.config.items() if name not in OWN_CONFIG}
    if config.get("_class_name") == "LoopedCogVideoXTransformer3DModel":
        config["_class_name"] = "CogVideoXTransformer3DModel"
    transformer._internal_dict = FrozenDict(config)
    before = transformer.__dict__.pop("_processors_before_graft", {})
    transformer.set_attn_processor(
        {
            name: (before.get(name) or CogVideoXAttnProcessor2_0()) if hasattr(current, "with_fused") else current
            for name, current in transformer.attn_processors.items()
        }
    )
    return transformer
