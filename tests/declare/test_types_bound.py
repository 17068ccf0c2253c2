"""Bound types: what they place, extract, build, say and write."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from canvas_engineering import (
    BoundField,
    CanvasSchema,
    Field,
    SpatiotemporalCanvas,
    compile_schema,
)
from tests.declare.test_types import Arm, Robot, policy


def test_bound_fields_place_and_extract():
    torch.manual_seed(0)
    bound = compile_schema(Robot(), T=2, d_model=8)
    field = bound["sensor.rgb"]
    assert isinstance(field, BoundField)
    assert (field.region_name, field.num_positions) == ("sensor.rgb", 32)
    assert field.spec == bound.layout.region_spec("sensor.rgb")
    assert field.indices() == bound.layout.region_indices("sensor.rgb")
    batch = bound.create_batch(3)
    assert batch.shape == (3, bound.layout.num_positions, 8)
    embeddings = torch.randn(3, 32, 8)
    placed = field.place(batch, embeddings)
    identity = bound.canvas.modality_embeddings["sensor__rgb"] + bound.canvas.period_embedding(1)
    assert torch.equal(field.extract(placed), placed[:, field.indices()])
    torch.testing.assert_close(field.extract(placed), embeddings + identity)
    rest = [i for i in range(batch.shape[1]) if i not in set(field.indices())]
    assert torch.equal(placed[:, rest], batch[:, rest])
    with pytest.raises(ValueError, match=r"embeddings of shape \(3, 5, 8\) do not fit region 'sensor.rgb'"):
        field.place(batch, embeddings[:, :5], strict=True)


def test_another_canvas_may_be_passed():
    bound = compile_schema(Robot(), d_model=8)
    canvas = SpatiotemporalCanvas(bound.layout)
    batch = canvas.create_empty(1)
    placed = bound["plan"].place(batch, torch.zeros(1, 4, 8), canvas)
    assert torch.equal(bound["plan"].extract(placed, canvas), canvas.extract(placed, "plan"))
    assert bound.canvas is None


def test_fields_without_a_canvas_say_so():
    bound = compile_schema(Robot(), d_model=8)
    batch = torch.zeros(1, bound.layout.num_positions, 8)
    with pytest.raises(RuntimeError, match=r"No canvas: field 'plan' .* call build_canvas\(\)"):
        bound["plan"].extract(batch)
    with pytest.raises(RuntimeError, match="No canvas: field 'plan'"):
        bound["plan"].place(batch, torch.zeros(1, 4, 8))


def test_schemas_answer_by_path():
    bound = compile_schema(Robot())
    assert "arms[1].grip" in bound
    assert "arms[2]" not in bound
    assert list(bound.fields) == bound.field_names
    assert bound.fields["plan"].spec == bound["plan"].spec == bound.region_specs["plan"]
    assert (bound.layout, bound.topology) == (bound.schema.layout, bound.schema.topology)
    with pytest.raises(KeyError, match=r"no field 'arms\[2\]'; its fields: 'safety', 'plan'"):
        bound["arms[2]"]


def test_build_canvas_is_kept():
    bound = compile_schema(Arm(), d_model=8)
    canvas = bound.build_canvas()
    assert bound.canvas is canvas
    bound.create_batch(1)
    assert bound.canvas is canvas


def test_semantic_conditioner_of_a_schema():
    bound = compile_schema(Robot(), d_model=8)
    asked = []

    def embed(texts):
        asked.append(texts)
        return [[float(len(text)), 1.0, -2.0] for text in texts]

    conditioner = bound.build_semantic_conditioner(embed, embed_dim=3, freeze_embeddings=False, learn_residuals=False)
    assert asked == [[bound.layout.region_spec(name).semantic_type for name in bound.field_names]]
    assert conditioner.region_names == sorted(bound.field_names)
    assert conditioner.residuals is None
    row = conditioner.region_names.index("sensor")
    assert dict(conditioner.named_parameters())["_embeddings"][row].tolist() == [len("coarse: sensor"), 1.0, -2.0]
    canvas = bound.build_canvas(conditioner)
    assert canvas.modality_embeddings is None
    placed = bound["plan"].place(bound.create_batch(1), torch.zeros(1, 4, 8))
    expected = conditioner.get_conditioning("plan") + canvas.period_embedding(1)
    torch.testing.assert_close(bound["plan"].extract(placed), expected.expand(1, 4, 8))


def test_summary_says_what_was_compiled():
    root = SimpleNamespace(goal=Field(2, 3, 4, False, 0.5, "gated"), action=Field())
    assert compile_schema(root, T=2, H=4, W=4, d_model=16).summary().splitlines() == [
        "BoundSchema: 2 fields, 4 connections, canvas (T=2, (4, 4)) of 32 positions, 44 % used, d_model=16",
        "  goal    2 frames of 2 x 3, period 4, input only, loss x 0.5, gated",
        "  action  2 frames of 1 x 1",
    ]


def test_json_round_trip():
    bound = compile_schema(Robot(), T=3, connectivity=policy(temporal="causal"))
    assert CanvasSchema.from_dict(bound.schema.to_dict()) == bound.schema


def test_fields_are_values():
    field = Field(2, 3, period=2)
    assert dataclasses.replace(field, period=3) == Field(2, 3, period=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        field.h = 3
