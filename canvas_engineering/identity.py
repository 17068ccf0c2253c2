"""Identity: regions whose keys are slot banks, bound to their positions at every step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from canvas_engineering.checked import (
    checked_bool,
    checked_choice,
    checked_heads,
    checked_int,
    checked_string,
    checked_tensor,
)
from canvas_engineering.derived_buffers import CanvasModule
from canvas_kernels.torch_ops.dense import dense_attention

__all__ = ["IdentitySpec", "SlotBindingModule"]

IDENTITY_MODES = ("persistent",)
BINDING_FNS = ("cross_attention",)


@dataclass(frozen=True)
class IdentitySpec:
    """Declares that a region keeps the identity of objects by slots.

    Args:
        mode: "persistent": the slots are learned, and bind to the region's positions at every step.
        slot_capacity: number of slots.
        binding_fn: how slots attend to positions: "cross_attention".
        birth_death: whether a learned gate decides which slots are alive.

    Raises:
        ValueError: fewer than one slot, or a field of the wrong kind.

    >>> IdentitySpec(slot_capacity=8).binding_fn
    'cross_attention'
    """

    mode: str = "persistent"
    slot_capacity: int = 64
    binding_fn: str = "cross_attention"
    birth_death: bool = False

    def __post_init__(self) -> None:
        for name in ("mode", "binding_fn"):
            checked_string(getattr(self, name), f"IdentitySpec {name}")
        object.__setattr__(self, "slot_capacity", checked_int(self.slot_capacity, "IdentitySpec slot_capacity", 1))
        object.__setattr__(self, "birth_death", checked_bool(self.birth_death, "IdentitySpec birth_death"))

    def check(self) -> None:
        """ValueError: a mode or binding function that does not exist, with those that do."""
        for name, choices in (("mode", IDENTITY_MODES), ("binding_fn", BINDING_FNS)):
            checked_choice(getattr(self, name), f"identity {name}", choices)


class _Binding(CanvasModule):
    """softmax(q kᵀ / √head_dim) v of slots over positions, projected."""

    def __init__(self, d_model: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(d_model, d_model) for _ in range(4))

    def forward(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for proj, x in ((self.q_proj, queries), (self.k_proj, keys), (self.v_proj, keys))
        )
        return self.out_proj(dense_attention(q, k, v).transpose(1, 2).flatten(2))


class SlotBindingModule(CanvasModule):
    """A slot bank, learned slots that bind to observations: LayerNorm(binding_attn(slots → observations) + slots).

    With ``birth_death`` each bound slot is multiplied by its life gate, σ(Linear(GELU(Linear(slot)))).

    Args:
        d_model: width.
        n_slots: number of slots.
        n_heads: heads of the binding; must divide d_model.
        birth_death: whether slots have a life gate.

    Raises:
        ValueError: heads that do not divide d_model, or a size below 1.

    >>> SlotBindingModule(8, n_slots=3, n_heads=2)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 3, 8])
    """

    def __init__(self, d_model: int, n_slots: int, n_heads: int = 4, birth_death: bool = False):
        super().__init__()
        d_model, n_slots = checked_int(d_model, "d_model", 1), checked_int(n_slots, "n_slots", 1)
        n_heads, birth_death = checked_heads(n_heads, d_model), checked_bool(birth_death, "birth_death")
        self.slots = nn.Parameter(torch.randn(n_slots, d_model) * 0.02)
        self.binding_attn = _Binding(d_model, n_heads)
        self.layer_norm = nn.LayerNorm(d_model)
        self.life_gate = None
        if birth_death:
            # one neuron at least: d_model 1 has no half
            hidden = max(1, d_model // 2)
            self.life_gate = nn.Sequential(nn.Linear(d_model, hidden), nn.GELU(), nn.Linear(hidden, 1), nn.Sigmoid())

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        """Returns the bound slots (B, n_slots, d_model) of observations (B, m, d_model)."""
        bound = self._bound(observations)
        return bound if self.life_gate is None else bound * self.life_gate(bound)

    def alive_mask(self, observations: torch.Tensor) -> torch.Tensor:
        """Returns bool (B, n_slots): slots whose life gate is above one half; all of them without a gate."""
        if self.life_gate is None:
            size = (checked_tensor(observations, "observations").shape[0], self.slots.shape[0])
            return torch.ones(size, dtype=torch.bool, device=observations.device)
        return self.life_gate(self._bound(observations)).squeeze(-1) > 0.5

    def __repr__(self) -> str:
        (n_slots, d_model), n_heads = self.slots.shape, self.binding_attn.n_heads
        birth_death = self.life_gate is not None
        return f"SlotBindingModule(d_model={d_model}, n_slots={n_slots}, n_heads={n_heads}, birth_death={birth_death})"

    def _bound(self, observations: torch.Tensor) -> torch.Tensor:
        if checked_tensor(observations, "observations").dim() != 3:
            raise ValueError(f"observations must be (batch, rows, d_model), got {tuple(observations.shape)}")
        slots = self.slots.expand(observations.shape[0], -1, -1)
        return self.layer_norm(self.binding_attn(slots, observations) + slots)
