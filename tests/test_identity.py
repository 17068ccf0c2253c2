"""Slot banks, against their formula in float64."""

from __future__ import annotations

import math

import pytest
import torch

from canvas_engineering.identity import IdentitySpec, SlotBindingModule


def oracle_slots(module, x, heads):
    """LayerNorm(out(softmax(q kᵀ / √(d/h)) v) + slots), times the life gate, head by head and row by row."""
    state = {name: value.double() for name, value in module.state_dict().items()}
    x = x.double()

    def project(part, rows):
        return rows @ state[f"binding_attn.{part}_proj.weight"].T + state[f"binding_attn.{part}_proj.bias"]

    slots, banks = state["slots"], []
    width = slots.shape[1] // heads
    for observations in x:
        q, k, v = project("q", slots), project("k", observations), project("v", observations)
        columns = [slice(head * width, (head + 1) * width) for head in range(heads)]
        read = torch.cat([((q[:, c] @ k[:, c].T) / math.sqrt(width)).softmax(-1) @ v[:, c] for c in columns], dim=1)
        bound = project("out", read) + slots
        centred = bound - bound.mean(1, keepdim=True)
        bound = centred / torch.sqrt(centred.square().mean(1, keepdim=True) + 1e-5)
        banks.append(bound * state["layer_norm.weight"] + state["layer_norm.bias"])
    bank = torch.stack(banks)
    if module.life_gate is None:
        return bank, torch.ones(bank.shape[:2])
    hidden = torch.nn.functional.gelu(bank @ state["life_gate.0.weight"].T + state["life_gate.0.bias"])
    gate = torch.sigmoid(hidden @ state["life_gate.2.weight"].T + state["life_gate.2.bias"])
    return bank * gate, gate[..., 0]


@pytest.mark.parametrize("birth_death", [False, True])
def test_slots_bind_as_the_formula_says(birth_death):
    torch.manual_seed(0)
    module = SlotBindingModule(12, n_slots=5, n_heads=3, birth_death=birth_death)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 7, 12)
    bank, gate = oracle_slots(module, x, 3)
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
