"""Tokens of a looped model over several ranks: cut before the first block, gathered before the final norm.

Attention exchanges them for heads; everything else between the two treats tokens alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..attention import canvas_attention
from ..attention.sharded import attend_by_heads
from ..parallel.exchange import gather_shards, split_evenly
from ..parallel.mesh import check_alike, digest_of
from .processor import CanvasAttnProcessor

NAMES = ("ring", "ulysses")
"""Names of diffusers' meshes for shards of rows, none of which runs a ring here, and for the ranks that share heads."""


def install(transformer: Any, config: Any, cp_plan: Any) -> None:
    """Cuts a looped model's tokens over ranks; arguments and errors are those of ``enable_parallelism``."""
    refuse(transformer)
    context = getattr(config, "context_parallel_config", config)
    if cp_plan is not None or not hasattr(context, "ulysses_degree"):
        raise ValueError(
            "a looped CogVideoX model shares heads and rows: enable_parallelism(config=ContextParallelConfig("
            f"ulysses_degree=…, ring_degree=…)) alone; got config={config!r}, cp_plan={cp_plan!r}"
        )
    device, sizes = next(transformer.parameters()).device.type, (context.ring_degree, context.ulysses_degree)
    mesh = context.mesh or init_device_mesh(device, sizes, mesh_dim_names=NAMES)
    if not set(NAMES) <= set(mesh.mesh_dim_names or ()) or mesh[NAMES].shape != sizes:
        raise ValueError(f"a mesh of {sizes} ranks along {NAMES} is needed, got {mesh}")
    processors = {name: _sharable(processor) for name, processor in transformer.attn_processors.items()}
    shards = TokenShards(next(iter(processors.values())), mesh[NAMES])
    for name, processor in processors.items():
        processors[name] = processor.with_fused(processor.fused)
        processors[name].shards = shards
    transformer.__dict__["_token_shards"] = shards
    transformer.set_attn_processor(processors)
    transformer.transformer_blocks[0].register_forward_pre_hook(_CutTokens(shards), with_kwargs=True)
    # before tokens in packed order are put back
    transformer.norm_final.register_forward_pre_hook(_GatherVideo(shards), prepend=True)


def remove(transformer: Any) -> None:
    """Undoes :func:`install`, processors apart."""
    if transformer.__dict__.pop("_token_shards", None) is None:
        return
    for module in (transformer.transformer_blocks[0], transformer.norm_final):
        for number, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, (_CutTokens, _GatherVideo)):
                del module._forward_pre_hooks[number]
                module._forward_pre_hooks_with_kwargs.pop(number, None)


def refuse(transformer: Any) -> None:
    """ValueError if the model's tokens are cut over ranks already."""
    if "_token_shards" in transformer.__dict__:
        raise ValueError("this model's tokens are cut over ranks already: ungraft it, and graft it again, first")


def check(transformer: Any, processors: Iterable[Any]) -> None:
    """ValueError if one of ``processors`` takes another share of the tokens than the model gives it."""
    shards = transformer.__dict__.get("_token_shards")
    for processor in processors:
        if getattr(processor, "shards", None) is not shards:
            raise ValueError(
                f"this model's tokens are {'cut over ranks' if shards else 'whole'}, which {processor} does not take: "
                "graft it with the attention that it shall have, then call enable_parallelism"
            )


def _sharable(processor: Any) -> CanvasAttnProcessor:
    """Returns a canvas processor as it is, and a dense one for diffusers' own.

    Raises:
        ValueError: a processor by someone else.
    """
    if isinstance(processor, CanvasAttnProcessor):
        if len(processor.plans) > 1:
            raise ValueError(f"heads are shared for videos of one size, {processor} has several")
        return processor
    fused = {"CogVideoXAttnProcessor2_0": False, "FusedCogVideoXAttnProcessor2_0": True}
    if type(processor).__name__ not in fused:
        raise ValueError(f"{type(processor).__name__} does not share heads: set a CanvasAttnProcessor")
    return CanvasAttnProcessor().with_fused(fused[type(processor).__name__])


class TokenShards:
    """The tokens of each rank, an even share of the text, then one of the video, in the order ring · heads + head.

    Args:
        processor: of all blocks.
        mesh: the ranks, along the two dimensions :data:`NAMES`.

    Attributes:
        own_counts: this rank's text and video tokens; None before the first call where the model's layout does not say.
    """

    def __init__(self, processor: CanvasAttnProcessor, mesh: DeviceMesh):
        rings, heads = (mesh[name] for name in NAMES)
        self.sizes, self.ranks = (rings.size(), heads.size()), mesh.size()
        self.row, self.head = rings.get_local_rank(), heads.get_local_rank()
        self.rank = self.row * heads.size() + self.head
        self.groups = [str(dimension.get_group().group_name) for dimension in (rings, heads)]
        self.own_counts: tuple[int, int] | None = None
        self.placed = None
        if processor.plan is None:
            if self.sizes[0] > 1:
                raise ValueError("dense attention shares heads alone: ring_degree is for a topology")
            check_alike(mesh, digest_of([np.array([processor.packed])]), digest_of([]))
            return
        assert processor.counts is not None  # of the plan's layout
        self.set_counts(*processor.counts)
        plan = processor.plan.reindex(processor.plan.order) if processor.packed else processor.plan
        text, video = (np.split(tokens, np.cumsum(sizes)[:-1]) for tokens, sizes in self._tokens())
        cut = [np.concatenate(own) for own in zip(text, video)]
        self.placed = plan.shard(rows=rings.size(), heads=heads.size(), cut=cut).on(mesh, NAMES)

    def set_counts(self, n_text: int, n_video: int) -> None:
        """Shares this many tokens from now on."""
        self.text, self.video = split_evenly(n_text, self.ranks), split_evenly(n_video, self.ranks)
        self.own_counts = (self.text[self.rank], self.video[self.rank])

    def _tokens(self):
        n_text, n_video = sum(self.text), sum(self.video)
        return (np.arange(n_text), self.text), (n_text + np.arange(n_video), self.video)

    def cut(self, text: torch.Tensor, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns this rank's share of both streams (B, tokens, inner_dim)."""
        if self.placed is None:
            self.set_counts(text.shape[1], video.shape[1])
        counts = (sum(self.text), sum(self.video))
        if (text.shape[1], video.shape[1]) != counts:
            raise ValueError(
                f"the layout is of {counts[0]} text and {counts[1]} video tokens; got {text.shape[1]} and "
                f"{video.shape[1]}: build it with video_layout for this video's size"
            )
        return text.split(self.text, 1)[self.rank], video.split(self.video, 1)[self.rank]

    def own_video(self, rotary: tuple) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns this rank's rows of the rotary tables (video tokens, head_dim)."""
        cos, sin = (table.split(self.video)[self.rank] for table in rotary)
        return cos, sin

    def gather(self, video: torch.Tensor) -> torch.Tensor:
        """Returns all ranks' video tokens (B, tokens, inner_dim)."""
        video, (rings, heads) = video.transpose(0, 1), self.sizes
        shards = [self.video[row * heads : (row + 1) * heads] for row in range(rings)]
        if heads > 1:
            video = gather_shards(video, shards[self.row], self.head, self.groups[1])
        if rings > 1:
            video = gather_shards(video, [sum(counts) for counts in shards], self.row, self.groups[0])
        return video.transpose(0, 1)

    def attend(self, q, k, v, scale: float, backend: str) -> torch.Tensor:
        """Returns attention (B, heads, own tokens, head_dim) over the tokens of all ranks."""
        if self.placed is not None:
            return canvas_attention(q, k, v, self.placed, scale=scale, backend=backend)
        rows = [text + video for text, video in zip(self.text, self.video)]

        def attend(*tensors):
            # from text and video of each rank to all text, then all video
            sizes = [count for pair in zip(self.text, self.video) for count in pair]
            q, k, v = (torch.cat((parts := x.split(sizes, 2))[::2] + parts[1::2], 2) for x in tensors)
            parts = F.scaled_dot_product_attention(q, k, v, scale=scale).split(self.text + self.video, 2)
            return torch.cat([x for pair in zip(parts[: self.ranks], parts[self.ranks :]) for x in pair], 2)

        return attend_by_heads(attend, q, k, v, rows, self.rank, self.groups[1])

    def __deepcopy__(self, memo) -> TokenShards:
        return self


class _CutTokens:
    # The first two arguments of a block's forward.
    VIDEO, TEXT = "hidden_states", "encoder_hidden_states"

    def __init__(self, shards: TokenShards):
        self.shards = shards

    def __call__(self, module, args, kwargs):
        names = (self.VIDEO, self.TEXT)
        streams = {**kwargs, **dict(zip(names, args))}
        text, video = self.shards.cut(streams[self.TEXT], streams[self.VIDEO])
        own = {self.VIDEO: video, self.TEXT: text}
        given = names[: len(args)]
        return (*(own.pop(name) for name in given), *args[2:]), {**kwargs, **own}


class _GatherVideo:
    def __init__(self, shards: TokenShards):
        self.shards = shards

    def __call__(self, module, args):
        return (self.shards.gather(args[0]), *args[1:])
