"""Slot banks, against their formula in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from canvas_engineering import (
    AttentionDispatcher,
    CanvasLayout,
    CanvasProgram,
    CanvasSchema,
    CanvasTopology,
    Connection,
    RegionProgram,
    compile_attention,
)
from canvas_engineering.identity import IdentitySpec, SlotBindingModule
from tests import program_oracle
from tests.program_oracle import bound_slots
from tests.strategies import programmed_canvases


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


def hands(sizes, frames=3):
    """Two hands that attend to each other, to themselves, and each to an object of its own that has a bank, frame by
    frame: (layout, topology, program)."""
    regions = {name: (0, frames, i, i + 1) for i, name in enumerate(("cup", "plate", "left", "right"))}
    layout = CanvasLayout(T=frames, spatial_shape=(4,), d_model=8, regions=regions)
    pairs = [("left", "cup"), ("right", "plate"), *[(a, b) for a in ("left", "right") for b in ("left", "right")]]
    topology = CanvasTopology([Connection(src, dst, t_src=0, t_dst=0) for src, dst in pairs])
    banks = {
        name: RegionProgram(identity=IdentitySpec(slot_capacity=size)) for name, size in zip(("cup", "plate"), sizes)
    }
    return layout, topology, CanvasProgram(CanvasSchema(layout, topology), banks, {})


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("sizes", [(5, 1), (1, 5), (3, 2), (64, 8), (2, 2)])
def test_each_region_is_attended_to_through_its_own_slots_where_positions_are_packed_by_frame(sizes, backend):
    layout, topology, program = hands(sizes)
    torch.manual_seed(0)
    dispatcher = AttentionDispatcher(topology, layout, 8, n_heads=2, program=program, backend=backend).double()
    rows = dispatcher.plan.order[dispatcher.plan.order < layout.num_positions]
    assert (rows // 4 == sorted(rows // 4)).all(), "regions one after another test nothing"
    x = torch.randn(2, layout.num_positions, 8, dtype=torch.float64)
    expected, _ = program_oracle.step(dispatcher, x, 2, layout, topology, program)
    # sums of weights are float32
    torch.testing.assert_close(dispatcher(x), expected, rtol=1e-6, atol=1e-6)


@settings(max_examples=100)
@given(programmed_canvases())
def test_slots_stand_after_the_canvas_in_declared_order(canvas):
    layout, topology, program, cortex, _, _ = canvas
    order = compile_attention(layout, topology, program, cortex=cortex).order
    first = int((order < layout.num_positions).sum())
    assert (order[first:] >= layout.num_positions).all()
    assert order[first:].tolist() == sorted(order[first:].tolist())
