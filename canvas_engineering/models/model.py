"""The video transformers with loops in their config, and what grafts and ungrafts them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from ..attention import BACKENDS
from ..checked import checked_bool, checked_choice, checked_items, checked_kind, checked_number, shown
from ..derived_buffers import outside_inference
from ..files import replace_file
from ..schema import CanvasSchema
from . import packing, parallel
from .adapter import ModelAdapter
from .attach import attach, detach
from .block import LOOPED_BLOCKS, LoopedBlock
from .processor import CanvasAttnProcessor
from .registry import ADAPTERS, find_adapter

_COUNTING_CACHES = ("PyramidAttentionBroadcastConfig", "FasterCacheConfig", "TaylorSeerCacheConfig")
OWN_CONFIG = ("max_loops", "loops", "gate", "sharpening", "canvas", "backend", "packed")


class LoopedModel:
    """Adds loops and their attention to diffusers' class, and to its config.

    ``graft_looped_blocks`` turns a stock model into one, in place. Further config: ``max_loops``; ``loops`` (of all
    blocks, or a list with a number for each); ``gate`` ("tanh" or "sigmoid"); ``sharpening`` (a factor for each loop,
    or None); ``canvas`` (the declaration that the attention follows, or None), ``backend`` and ``packed``.
    """

    canvas_adapter: ModelAdapter
    config: Any
    register_to_config: Callable[..., None]

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

    def enable_cache(self, config: Any) -> None:
        """Enables one of diffusers' caches.

        Raises:
            ValueError: a cache that counts calls inside of blocks as steps, while a block runs several loops.
        """
        looping = [block.block_idx for block in blocks_of(self) if block.loops > 1]
        if looping and type(config).__name__ in _COUNTING_CACHES:
            raise ValueError(
                f"a {type(config).__name__} counts every call inside of a block as a step, and blocks {looping} run "
                "several loops in one: set_loops(1), or use FirstBlockCacheConfig or MagCacheConfig"
            )
        super().enable_cache(config)  # pyright: ignore[reportAttributeAccessIssue] of diffusers' class

    def _register_loops(self) -> None:
        numbers = [block.loops for block in blocks_of(self)]
        self.register_to_config(loops=numbers[0] if len(set(numbers)) == 1 else numbers)

    def save_config(self, *args, **kwargs):
        """Saves the config with the loops and the attention of the blocks, which may have been set since."""
        self._register_loops()
        register_attention(self)
        folder = kwargs.get("save_directory", args[0] if args else None)
        if isinstance(folder, (str, os.PathLike)) and not os.path.isfile(folder):
            # what AutoModel with trust_remote_code=True runs to find the class
            module, name = type(self).__module__, type(self).__name__
            os.makedirs(folder, exist_ok=True)
            code = f'"""Where this model is defined."""\n\nfrom {module} import {name}\n\n__all__ = ["{name}"]\n'
            replace_file(Path(folder) / f"{module.split('.')[-1]}.py", code.encode())
        return super().save_config(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue] of diffusers' class

    @classmethod
    def from_config(cls, config, *args, **kwargs):
        """Makes a model of its config.

        Raises:
            ValueError: the config of a model without loops.
        """
        saved_by = config.get("_class_name", cls.__name__) if isinstance(config, dict) else cls.__name__
        if saved_by != cls.__name__:
            raise ValueError(
                f"this is the config of a {saved_by}, whose checkpoint holds no loops: load it as {saved_by}, then "
                "graft_looped_blocks"
            )
        if isinstance(config, dict):  # which diffusers would name as unknown
            config = {name: value for name, value in config.items() if name != "auto_map"}
        return super().from_config(config, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue] as above


class LoopedModelOfOneProcessor(LoopedModel):
    """A looped model whose every attention is of one kind, set by ``set_attn_processor`` and replaced by fusing."""

    attn_processors: dict[str, Any]

    def set_attn_processor(self, processor) -> None:
        """Sets the processors, as diffusers does; ValueError for one that takes tokens in another order."""
        given: Any = [*processor.values()] if isinstance(processor, dict) else [processor]
        packing.check(self, given)  # pyright: ignore[reportArgumentType] a module
        parallel.check(self, given)
        super().set_attn_processor(processor)  # pyright: ignore[reportAttributeAccessIssue] of diffusers' class

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

    def fuse_qkv_projections(self) -> None:
        """Fuses query, key and value projections, as the stock model does, and keeps canvas processors."""
        before = self.attn_processors
        super().fuse_qkv_projections()  # pyright: ignore[reportAttributeAccessIssue] of diffusers' class
        fused = {}
        for name, stock_one in self.attn_processors.items():
            own: Any = before[name]
            fused[name] = own.with_fused() if hasattr(own, "with_fused") else stock_one
        self.set_attn_processor(fused)


@cache
def looped_model_class(name: str) -> type[Any]:
    """Returns the looped class of the model ``name`` among :data:`ADAPTERS`, made at the first call, for its base class
    needs diffusers: ``Looped`` and the name of that."""
    import diffusers
    from diffusers.configuration_utils import register_to_config

    adapter = ADAPTERS[name]
    stock = getattr(diffusers, adapter.model_class)

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
        **stock_config,
    ):
        stock.__init__(self, *args, **stock_config)
        loop_blocks(self, adapter, max_loops, gate)
        self._set_block_loops(loops)
        checked_choice(backend, "backend", BACKENDS)
        packed = checked_bool(packed, "packed")
        processor = processor_for(adapter, sharpening, schemas_of(canvas), max_loops, backend)
        set_attention(self, sharpening, processor, packed)

    # diffusers takes names and defaults of the config from this signature: its version's own, and ours.
    signature = inspect.signature(stock.__init__)
    own = [p for p in inspect.signature(__init__).parameters.values() if p.name in OWN_CONFIG]
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    __init__.__signature__ = signature.replace(
        parameters=[*signature.parameters.values(), *(p.replace(kind=keyword_only) for p in own)]
    )
    class_name = f"Looped{adapter.model_class}"
    __init__.__qualname__ = f"{class_name}.__init__"
    base = LoopedModelOfOneProcessor if adapter.replaces_processors else LoopedModel

    # A plain function: diffusers marks some classes as opaque to torch.compile.
    stock_forward = stock.forward

    @wraps(stock_forward)
    def forward(self, *args, **kwargs):
        for hook in self.__dict__.get("canvas_calls", ()):
            args, kwargs = hook(self, args, kwargs) or (args, kwargs)
        return stock_forward(self, *args, **kwargs)

    body = {
        "forward": forward,
        "__doc__": f"``{adapter.model_class}`` whose blocks loop, and whose config says how.\n\n{LoopedModel.__doc__}",
        "__init__": register_to_config(__init__),
        "__module__": adapter.module,  # where pickles and pipelines look for it
        "canvas_adapter": adapter,
        "_auto_class": "AutoModel",
        "_no_split_modules": [*(stock._no_split_modules or ()), adapter.looped_block.__name__],
        "_repeated_blocks": [adapter.looped_block.__name__],
        # also where from_pretrained or `to` is given another dtype
        "_keep_in_fp32_modules": [*(stock._keep_in_fp32_modules or ()), "loop"],
    }
    _register_for_caches()
    return type(class_name, (base, stock), body)


@cache
def _register_for_caches() -> None:
    if find_spec("diffusers.hooks") is None or find_spec("diffusers.hooks._helpers") is None:
        return  # a diffusers without caches that go by block class
    from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

    for block in LOOPED_BLOCKS:
        text: Any = 1 if block.two_streams else None
        metadata = TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=text)
        TransformerBlockRegistry.register(block, metadata)


def is_looped(transformer: nn.Module) -> bool:
    """Whether this is a looped model of this package."""
    return isinstance(transformer, LoopedModel)


def blocks_of(transformer: Any) -> Sequence[LoopedBlock]:
    """Returns the blocks of a looped model, also where compilers or wrappers stand around them."""
    return transformer.canvas_adapter.blocks(transformer)


def loop_blocks(transformer: nn.Module, adapter: ModelAdapter, max_loops: int, gate: str) -> None:
    """Grafts every block of a stock model."""
    config: Any = transformer.config
    inner_dim = config["num_attention_heads"] * config["attention_head_dim"]
    for number, block in enumerate(adapter.blocks(transformer)):
        graft = adapter.looped_block.graft
        graft(block, number, max_loops, inner_dim, gate, adapter.text_dim(config), adapter.attention)


def canvas_processor(transformer: nn.Module) -> CanvasAttnProcessor | None:
    """Returns the processor that all blocks of a looped model share, if it is a canvas processor; None if none has one.

    Raises:
        ValueError: blocks with different processors, which the config has no form for.
    """
    adapter: Any = transformer.canvas_adapter
    processors = [attn.processor for _, attn in adapter.attentions(transformer)]
    canvas = [processor for processor in processors if isinstance(processor, CanvasAttnProcessor)]
    if canvas and (len(canvas) < len(processors) or any(p.declared != canvas[0].declared for p in canvas)):
        raise ValueError("the blocks have different attention processors; a config can name one for all of them")
    return canvas[0] if canvas else None


def schemas_of(canvas: Any) -> list[CanvasSchema]:
    """Returns the schemas of a config's ``canvas``; none for None."""
    if canvas is None:
        return []
    if not {"schema", "schemas"} & set(checked_kind(canvas, "canvas", Mapping)):
        raise ValueError(f"canvas must hold the schema that the attention follows, got {shown(canvas)}")
    given = canvas["schemas"] if "schemas" in canvas else [canvas["schema"]]
    return [CanvasSchema.from_dict(schema) for schema in given]


def processor_for(
    adapter: ModelAdapter, sharpening: list[float] | None, schemas: list[CanvasSchema], max_loops: int, backend: str
) -> CanvasAttnProcessor | None:
    """Returns the processor for a declaration or sharpening; None if there is neither.

    Raises:
        ValueError: as its class, and sharpening without a positive factor for each loop.
    """
    factors = [] if sharpening is None else checked_items(sharpening, "sharpening", "numbers")
    factors = [checked_number(beta, "every factor of sharpening", "a positive number") for beta in factors]
    if (sharpening is not None and len(factors) < max_loops) or not all(0.0 < beta < float("inf") for beta in factors):
        raise ValueError(f"sharpening must hold a positive factor for each of {max_loops} loops, got {sharpening}")
    if not schemas:
        return None if sharpening is None else CanvasAttnProcessor(backend=backend, model=adapter.name)
    topologies: Any = [s.topology for s in schemas]  # a schema without one is refused there
    return CanvasAttnProcessor([s.layout for s in schemas], topologies, backend=backend, model=adapter.name)


def check_packed(adapter: ModelAdapter, packed: bool | None) -> None:
    """ValueError for ``packed`` of a model whose tokens stay in raster order."""
    if packed and adapter.packed_at is None:
        raise ValueError(f"packed=True: tokens of {adapter.model_class} stay in raster order: {adapter.why_unpacked}")


def set_attention(
    transformer: Any, sharpening: list[float] | None, processor: CanvasAttnProcessor | None, packed: bool | None
) -> None:
    """Gives all blocks of a looped model a processor and its sharpening; without a processor they keep theirs."""
    adapter = transformer.canvas_adapter
    check_packed(adapter, packed)
    if processor is not None:
        parallel.refuse(transformer)
        pack = adapter.packed_at is not None and packed is not False
        processor.packed = pack and processor.plan is not None and packing.can_pack(processor)
        attach(transformer, adapter, processor)
    for block in blocks_of(transformer):
        block.sharpening = None if sharpening is None else list(sharpening)
    register_attention(transformer)


def register_attention(transformer: Any) -> None:
    """Writes the attention that the blocks have into the model's config."""
    processor = canvas_processor(transformer)
    transformer.register_to_config(
        sharpening=blocks_of(transformer)[0].sharpening,
        canvas=None if processor is None else processor.declaration(),
        backend="auto" if processor is None else processor.backend,
        packed=processor is not None and processor.packed,
    )


def graft_model(
    transformer: Any,
    max_loops: int,
    gate: str,
    sharpening: list[float] | None,
    schemas: list[CanvasSchema],
    backend: str,
    packed: bool | None,
) -> list[LoopedBlock]:
    """Makes a stock model a looped one, in place; a looped one with equal loops gets the given attention."""
    adapter = find_adapter(transformer)
    assert adapter is not None
    config = transformer.config
    # Everything that can be refused is refused before anything is changed.
    processor = processor_for(adapter, sharpening, schemas, max_loops, backend)
    check_packed(adapter, packed)
    if is_looped(transformer):
        if (config["max_loops"], config["gate"]) != (max_loops, gate):
            raise ValueError(
                f"this model is grafted with max_loops={config['max_loops']}, gate={config['gate']!r}; requested "
                f"max_loops={max_loops}, gate={gate!r}. ungraft it first"
            )
        if processor is None:
            return list(blocks_of(transformer))
    else:
        blocks = adapter.blocks(transformer)
        for number, block in enumerate(blocks):
            adapter.looped_block.check(block, number)
        looped_class = looped_model_class(adapter.name)
        loop_blocks(transformer, adapter, max_loops, gate)
        for block in blocks:
            block.gradient_checkpointing = transformer.gradient_checkpointing
        transformer.__class__ = looped_class
        transformer.register_to_config(max_loops=max_loops, gate=gate)
    set_attention(transformer, sharpening, processor, packed)
    return list(blocks_of(transformer))


def ungraft_model(transformer: Any) -> nn.Module:
    """The stock model, in place: classes, config and attention processors as before the graft."""
    import diffusers
    from diffusers.configuration_utils import FrozenDict

    adapter = transformer.canvas_adapter
    parallel.remove(transformer)
    for block in blocks_of(transformer):
        block.ungraft()
    detach(transformer, adapter)
    transformer.__class__ = getattr(diffusers, adapter.model_class)
    config = {name: value for name, value in transformer.config.items() if name not in OWN_CONFIG}
    if config.get("_class_name") == f"Looped{adapter.model_class}":
        config["_class_name"] = adapter.model_class
    transformer._internal_dict = FrozenDict(config)
    return transformer


def looped_class_named(name: str, module: str) -> Any:
    """Returns the looped class of this name that ``module`` holds, or diffusers' ModelMixin; AttributeError otherwise.

    A saved pipeline names the module as the library of its transformer, and diffusers takes a class of a library for
    one that loads if it finds the library's own ModelMixin among its bases.
    """
    if name == "ModelMixin":
        return import_module("diffusers.models.modeling_utils").ModelMixin
    for adapter in ADAPTERS.values():
        if name == f"Looped{adapter.model_class}" and module == adapter.module:
            return looped_model_class(adapter.name)
    raise AttributeError(f"module {module!r} has no attribute {name!r}")
