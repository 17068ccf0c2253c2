"""The attention processor: what a model's own one does, with canvas attention in its middle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ..attention import BACKENDS, canvas_attention
from ..canvas import CanvasLayout
from ..checked import checked_bool, checked_choice, checked_kind
from ..connectivity import CanvasTopology
from ..plan import AttentionPlan
from ..schema import CanvasSchema
from .adapter import TEXT, VIDEO
from .layout import grid_of
from .registry import ADAPTERS
from .tokens import token_plan

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

    from .parallel import TokenShards

__all__ = ["CanvasAttnProcessor"]

Grid = tuple[int, int, int]


class CanvasAttnProcessor:
    """An attention processor for one of diffusers' video models; :func:`set_canvas_attention` sets it where it belongs.

    It projects, normalises, rotates and splits as diffusers' own processor does; each token attends, in one softmax,
    over its keys under the topology (joint form; docs/semantics.md, section 3). Tokens without keys attend to
    themselves.

    By itself a processor sees token counts only: a video of another grid with as many tokens (portrait for landscape)
    looks the same to it. :func:`set_canvas_attention` and :func:`graft_looped_blocks` check the grid of every call. On
    a stock CogVideoX, whose every attention is of this kind, ``transformer.set_attn_processor`` sets one too, and
    ``fuse_qkv_projections`` replaces it: set ``processor.with_fused()`` after it.

    Args:
        layout: of the model's tokens, from :func:`video_layout`; a list of them for videos of several sizes; None for
            dense attention.
        topology: which regions attend to which; a list with one for each layout, or one for all of them.
        backend: see :func:`canvas_attention`.
        packed: the tokens come in the plan's packed order, which the grafted model takes care of.
        model: the model's name among :data:`ADAPTERS`.

    Attributes:
        plan: the compiled :class:`AttentionPlan` over tokens, or None. ``plan.density`` is the share of pairs.
        plans: the plans by token grid (frames, rows, columns).
        counts: text and video tokens of the layout, or None.
        fused: whether projections are those of ``to_qkv``; set by ``fuse_qkv_projections`` of a grafted CogVideoX.

    Raises:
        ValueError: a layout without a topology or the reverse, two layouts of one grid, an unknown backend or model,
            or a declaration that the joint form cannot compute.

    >>> from canvas_engineering import dense_topology
    >>> regions = {"text": (0, 1, 0, 1), "video": (0, 2, 1, 4)}
    >>> layout = CanvasLayout(T=2, d_model=8, spatial_shape=(4,), regions=regions)
    >>> CanvasAttnProcessor(layout, dense_topology()).plan.density
    1.0
    """

    # diffusers' registries of kernels and of sequence parallelism look for these two, and set them.
    _attention_backend = None
    sharpens = True
    # the ranks that share the tokens of a model; set by its enable_parallelism
    shards: TokenShards | None = None

    def __init__(
        self,
        layout: CanvasLayout | Sequence[CanvasLayout] | None = None,
        topology: CanvasTopology | Sequence[CanvasTopology] | None = None,
        *,
        backend: str = "auto",
        packed: bool = False,
        model: str = "cogvideox",
    ):
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
        self.model, packed = checked_choice(model, "model", ADAPTERS), checked_bool(packed, "packed")
        self.declared = declarations(layout, topology)
        self.backend, self.packed, self.fused = backend, packed, False
        self._compile()

    def _compile(self) -> None:
        streams = ADAPTERS[self.model].streams
        self.plans: dict[Grid, AttentionPlan] = {}
        self.counts: tuple[int, int] | None = None
        self._by_counts: dict[tuple[int, int], list[Grid]] = {}
        for layout, topology in self.declared:
            plan = token_plan(layout, topology, streams)
            grid = _grid(layout)
            if grid in self.plans:
                raise ValueError(f"two layouts have the grid {_shown(grid)}: one of them can be chosen for a call")
            self.plans[grid] = plan
            n_text = layout.region_numel(TEXT) if TEXT in streams else 0
            self.counts = (int(n_text), int(plan.n_positions - n_text))
            self._by_counts.setdefault(self.counts, []).append(grid)
        if self.declared:
            self.counts = next(iter(self._by_counts))
        self.plan = next(iter(self.plans.values()), None)

    @property
    def layout(self) -> CanvasLayout | None:
        """The layout, the first one of several, or None."""
        return self.declared[0][0] if self.declared else None

    @property
    def topology(self) -> CanvasTopology | None:
        """The topology, the first one of several, or None."""
        return self.declared[0][1] if self.declared else None

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple | None = None,
        sharpness: float = 1.0,
        grid: Grid | None = None,
    ):
        """Attention over the model's tokens.

        Args:
            attn: the model's attention module.
            hidden_states: (B, video tokens, inner_dim).
            encoder_hidden_states: (B, text tokens, inner_dim), for models with text among the tokens.
            attention_mask: as the model gives it; what has no form here is refused.
            image_rotary_emb: the model's rotary tables; a grafted model appends the next two to them where its blocks
                have no other way.
            sharpness: factor on the attention scale.
            grid: the token grid (frames, rows, columns), where there are several layouts.

        Returns:
            what the model's own processor returns: the video's states, projected, and the text's where there are any.

        Raises:
            ValueError: an attention mask, a token count other than the layout's, or a kernel of diffusers that was
                set.
        """
        adapter = ADAPTERS[self.model]
        self._check_kernels()
        if image_rotary_emb is not None and len(image_rotary_emb) > 2:
            *tables, grid, sharpness = image_rotary_emb
            image_rotary_emb = tuple(tables)
        n_text = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        plan = self._plan_of(n_text, hidden_states.shape[1], grid)
        if self.shards is not None and image_rotary_emb is not None:
            image_rotary_emb = self.shards.own_video(image_rotary_emb)
        text_mask = adapter.key_mask(attention_mask, n_text)
        key_mask = None
        if text_mask is not None:
            video = text_mask.new_ones(()).expand(len(text_mask), hidden_states.shape[1])
            masks = {TEXT: text_mask, VIDEO: video}
            key_mask = torch.cat([masks[stream] for stream in adapter.streams], 1)
        q, k, v = adapter.project(attn, hidden_states, encoder_hidden_states, image_rotary_emb, self.fused)
        scale = q.shape[-1] ** -0.5 * sharpness
        if self.shards is not None:
            out = self.shards.attend(q, k, v, scale, self.backend)
        elif plan is None:
            mask = None if key_mask is None else key_mask[:, None, None]
            out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
        else:
            options: Any = {"scale": scale, "backend": self.backend, "packed": self.packed, "key_mask": key_mask}
            out = canvas_attention(q, k, v, plan, **options)
        return adapter.output(attn, out.transpose(1, 2).flatten(2), n_text, text_mask)

    @property
    def _parallel_config(self) -> None:
        return None

    @_parallel_config.setter
    def _parallel_config(self, config) -> None:
        if config is not None:
            raise ValueError(
                "diffusers' own parallelism would give canvas attention tokens that it does not know of: "
                "graft the model (graft_looped_blocks), whose enable_parallelism shares its heads"
            )

    def with_fused(self, fused: bool = True) -> CanvasAttnProcessor:
        """Returns this processor with fused (or separate) projections; the plan is shared."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, fused=fused)
        return other

    def declaration(self) -> dict[str, Any] | None:
        """Returns its declaration as JSON types; None for dense attention."""
        if self.plan is None:
            return None
        schemas = [CanvasSchema(layout, topology).to_dict() for layout, topology in self.declared]
        declared = {"schema": schemas[0]} if len(schemas) == 1 else {"schemas": schemas}
        return {**declared, "form": self.plan.normalize}

    def check_grid(self, grid: Grid) -> None:
        """ValueError, naming both grids, if no layout has this token grid."""
        if self.plans and grid not in self.plans:
            known = " or ".join(map(_shown, self.plans))
            raise ValueError(
                f"the layout's grid of tokens (frames × rows × columns) is {known}, this video's {_shown(grid)}: build "
                "it with video_layout for this video's size"
            )

    def __getstate__(self) -> dict[str, Any]:
        # tables and process groups of this process; the declaration makes the tables again
        return {**self.__dict__, "plan": None, "plans": {}, "shards": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._compile()

    def __deepcopy__(self, memo) -> CanvasAttnProcessor:
        return self.with_fused(self.fused)  # of immutable parts

    def __repr__(self) -> str:
        what = "dense" if self.plan is None else f"{self.plan.n_positions} tokens, density {self.plan.density:.4f}"
        more = "" if len(self.plans) < 2 else f" and {len(self.plans) - 1} more grids"
        return f"CanvasAttnProcessor({what}{more}, backend={self.backend!r}, packed={self.packed}, fused={self.fused})"

    def _check_kernels(self) -> None:
        kernel = getattr(self._attention_backend, "value", self._attention_backend)
        if kernel not in (None, "native"):
            raise ValueError(
                f"diffusers was set to the attention backend {self._attention_backend!r}; canvas attention has "
                'backends of its own (backend=): set_attention_backend("native"), reset_attention_backend(), or ungraft'
            )

    def _plan_of(self, n_text: int, n_video: int, grid: Grid | None) -> AttentionPlan | None:
        if self.counts is None:
            return None
        own = None if self.shards is None else self.shards.own_counts
        grids = self._by_counts.get((n_text, n_video)) if own is None else self._by_counts[self.counts]
        if grids is None or (own is not None and own != (n_text, n_video)):
            text, video = own or self.counts
            raise ValueError(
                f"the layout is of {text} text and {video} video tokens; got {n_text} and {n_video}: build it with "
                "video_layout for this video's size"
            )
        if grid is None and len(grids) > 1:
            raise ValueError(
                f"layouts of {n_video} tokens have the grids {' and '.join(map(_shown, grids))}: set_canvas_attention "
                "and graft_looped_blocks tell the processor which one a call has"
            )
        return self.plans[grids[0] if grid is None else grid]


def declarations(layout: Any, topology: Any) -> tuple[tuple[CanvasLayout, CanvasTopology], ...]:
    """Returns pairs of a layout and its topology, none for dense attention.

    Raises:
        ValueError: one without the other, lists of different lengths, or what is neither.
    """
    if (layout is None) != (topology is None):
        raise ValueError("give both layout= and topology=, or neither for dense attention")
    if layout is None:
        return ()
    layouts = list(layout) if isinstance(layout, (list, tuple)) else [layout]
    topologies = list(topology) if isinstance(topology, (list, tuple)) else [topology] * len(layouts)
    if len(layouts) != len(topologies) or not layouts:
        raise ValueError(f"there must be a topology for each layout, got {len(layouts)} and {len(topologies)}")
    for each, one in zip(layouts, topologies):
        checked_kind(each, "layout", CanvasLayout)
        checked_kind(one, "topology", CanvasTopology)
    return tuple(zip(layouts, topologies))


def _grid(layout: CanvasLayout) -> Grid:
    # a canvas of one spatial dimension has no grid that a model could be asked for
    return grid_of(layout) if layout.n_spatial_dims == 2 and "video" in layout.regions else (0, 0, 0)


def _shown(grid: Grid) -> str:
    return " × ".join(map(str, grid))
