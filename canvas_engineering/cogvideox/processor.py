"""The attention processor: what CogVideoX's own one does, with canvas attention in its middle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ..attention import BACKENDS, canvas_attention
from ..canvas import CanvasLayout
from ..checked import checked_bool, checked_kind
from ..connectivity import CanvasTopology
from ..schema import CanvasSchema
from .layout import TEXT, VIDEO
from .tokens import token_plan

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

    from .parallel import TokenShards

__all__ = ["CanvasAttnProcessor"]


class CanvasAttnProcessor:
    """An attention processor for CogVideoX: set it with ``transformer.set_attn_processor``.

    It projects, normalises, rotates and splits as diffusers' own processor does; each token attends, in one softmax,
    over its keys under the topology (joint form; docs/semantics.md, section 3). Tokens without keys attend to
    themselves.

    A grafted model keeps it when projections are fused. On a stock model ``fuse_qkv_projections`` replaces every
    processor: set ``processor.with_fused()`` after it.

    Args:
        layout: of the model's tokens, from :func:`cogvideox_layout`; None for dense attention.
        topology: which regions attend to which.
        backend: see :func:`canvas_attention`.
        packed: the tokens come in the plan's packed order, which the grafted model takes care of.

    Attributes:
        plan: the compiled :class:`AttentionPlan` over tokens, or None. ``plan.density`` is the share of pairs.
        counts: text and video tokens of the layout, or None.
        fused: whether projections are those of ``to_qkv``; set by ``fuse_qkv_projections`` of a grafted model.

    Raises:
        ValueError: a layout without a topology or the reverse, an unknown backend, or a declaration that the joint
            form cannot compute.

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
        layout: CanvasLayout | None = None,
        topology: CanvasTopology | None = None,
        *,
        backend: str = "auto",
        packed: bool = False,
    ):
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
        checked_kind(layout, "layout", CanvasLayout, optional=True)
        checked_kind(topology, "topology", CanvasTopology, optional=True)
        packed = checked_bool(packed, "packed")
        if (layout is None) != (topology is None):
            raise ValueError("give both layout= and topology=, or neither for dense attention")
        self.layout, self.topology, self.backend, self.packed, self.fused = layout, topology, backend, packed, False
        self.plan = None if layout is None or topology is None else token_plan(layout, topology)
        self.counts = None if layout is None else tuple(int(layout.region_numel(name)) for name in (TEXT, VIDEO))

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        sharpness: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention over [text; video].

        Args:
            attn: diffusers' ``Attention`` module.
            hidden_states: (B, video tokens, inner_dim).
            encoder_hidden_states: (B, text tokens, inner_dim).
            attention_mask: not possible.
            image_rotary_emb: cos and sin, (video tokens, head_dim) each.
            sharpness: factor on the attention scale.

        Returns:
            both streams, projected.

        Raises:
            ValueError: an attention mask, a token count other than the layout's, or a kernel of diffusers that was
                set.
        """
        self._check(hidden_states, encoder_hidden_states, attention_mask)
        n_text = encoder_hidden_states.shape[1]
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        if self.fused:
            projected = attn.to_qkv(tokens).chunk(3, -1)
        else:
            assert attn.to_k is not None and attn.to_v is not None
            projected = [projection(tokens) for projection in (attn.to_q, attn.to_k, attn.to_v)]
        # (B, heads, tokens, head_dim)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in projected)
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        if image_rotary_emb is not None:
            if self.shards is not None:
                image_rotary_emb = self.shards.own_video(image_rotary_emb)
            q, k = (_rotate(x, n_text, image_rotary_emb) for x in (q, k))
        scale = q.shape[-1] ** -0.5 * sharpness
        if self.shards is not None:
            out = self.shards.attend(q, k, v, scale, self.backend)
        elif self.plan is None:
            out = F.scaled_dot_product_attention(q, k, v, scale=scale)
        else:
            out = canvas_attention(q, k, v, self.plan, scale=scale, backend=self.backend, packed=self.packed)
        assert attn.to_out is not None
        out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
        return out[:, n_text:], out[:, :n_text]

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
        if self.plan is None or self.layout is None:
            return None
        return {"schema": CanvasSchema(self.layout, self.topology).to_dict(), "form": self.plan.normalize}

    def __getstate__(self) -> dict[str, Any]:
        # tables and process groups of this process; the declaration makes the tables again
        return {**self.__dict__, "plan": None, "shards": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.layout is not None and self.topology is not None:
            self.plan = token_plan(self.layout, self.topology)

    def __deepcopy__(self, memo) -> CanvasAttnProcessor:
        return self.with_fused(self.fused)  # of immutable parts

    def __repr__(self) -> str:
        what = "dense" if self.plan is None else f"{self.plan.n_positions} tokens, density {self.plan.density:.4f}"
        return f"CanvasAttnProcessor({what}, backend={self.backend!r}, packed={self.packed}, fused={self.fused})"

    def _check(self, hidden_states, encoder_hidden_states, attention_mask) -> None:
        if attention_mask is not None:
            raise ValueError(
                f"an attention mask {tuple(attention_mask.shape)} was given: declare the pattern as a topology"
            )
        if self._attention_backend is not None:
            raise ValueError(
                f"diffusers was set to the attention backend {self._attention_backend!r}; canvas attention has "
                "backends of its own (backend=): reset_attention_backend(), or ungraft"
            )
        given = (encoder_hidden_states.shape[1], hidden_states.shape[1])
        counts = self.counts if self.shards is None else self.shards.own_counts
        if counts is not None and given != counts:
            raise ValueError(
                f"the layout is of {counts[0]} text and {counts[1]} video tokens; got {given[0]} and "
                f"{given[1]}: build it with cogvideox_layout for this video's size"
            )


def _rotate(x: torch.Tensor, n_text: int, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """x (B, heads, tokens, head_dim) with its video tokens rotated."""
    from diffusers.models.embeddings import apply_rotary_emb

    video = x[:, :, n_text:]
    rotated: torch.Tensor = apply_rotary_emb(video, rotary)  # pyright: ignore[reportArgumentType, reportAssignmentType] its annotations take no pair
    return torch.cat([x[:, :, :n_text], rotated], dim=2)
