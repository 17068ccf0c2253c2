"""Slot banks, against their formula in float64."""

from __future__ import annotations

import pytest
import torch

from canvas_engineering.identity import IdentitySpec, SlotBindingModule
from tests.program_oracle import bound_slots


@pytest.mark.parametrize("birth_death", [False, True])
def test_slots_bind_as_the_formula_says(birth_death):
    torch.manual_seed(0)
    module = SlotBindingModule(12, n_slots=5, n_heads=3, birth_death=birth_death)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 7, 12)
    parameters = {name: value.double() for name, value in module.state_dict().items()}
    bank, gate = bound_slots(parameters, 3, x.double())
    torch.testing.assert_close(module(x).double(), bank, rtol=1e-5, atol=1e-5)
    assert torch.equal(module.alive_mask(x), gate > 0.5)
    assert not birth_death or 0 < (gate > 0.5).sum() < gate.numel(), "a gate that is always open tests nothing"


def test_parameter_names_are_the_published_ones():
    parts = [f"binding_attn.{p}_proj.{x}" for p in ("q", "k", "v", "out") for x in ("weight", "bias")]
    plain = {"slots", *parts, "layer_norm.weight", "layer_norm.bias"}
    assert set(SlotBindingModule(8, 2).state_dict()) == plain
    gates = {f"life_gate.{i}.{x}" for i in (0, 2) for x in ("weight", "bias")}
    assert set(SlotBindingModule(8, 2, birth_death=True).state_dict()) == plain | gates


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="slot_capacity must be at least 1, got 0"):
        IdentitySpec(slot_capacity=0)
    with pytest.raises(ValueError, match="unknown identity mode 'fleeting': choose one of persistent"):
        IdentitySpec("fleeting").check()
    with pytest.raises(ValueError, match="unknown identity binding_fn 'hash': choose one of cross_attention"):
        IdentitySpec(binding_fn="hash").check()
    with pytest.raises(ValueError, match="n_heads 4 must divide d_model 6"):
        SlotBindingModule(6, 2)
