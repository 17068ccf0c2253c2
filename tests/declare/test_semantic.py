"""Semantic embeddings, distances and conditioning, held to their formulas in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from canvas_engineering import (
    CanvasLayout,
    RegionSpec,
    SemanticConditioner,
    SpatiotemporalCanvas,
    auto_semantic_type,
    compute_semantic_embeddings,
    program_distance,
)

D_MODEL, EMBED = 6, 4
EMBEDDINGS = {"b": (1.0, 0.0, 2.0, -1.0), "a": (0.5, 0.25, 0.0, 3.0), "c.d": (0.0, 0.0, 1.0, 0.0)}


def conditioner(**options) -> SemanticConditioner:
    torch.manual_seed(0)
    made = SemanticConditioner(D_MODEL, EMBED, EMBEDDINGS, **options)
    if made.residuals is not None:
        torch.nn.init.normal_(made.residuals)
    return made


def expected_vector(made: SemanticConditioner, name: str) -> torch.Tensor:
    """projector(embedding) + residual, one product at a time."""
    weight = made.projector.weight.detach().double()
    vector = [sum(weight[i, j].item() * EMBEDDINGS[name][j] for j in range(EMBED)) for i in range(D_MODEL)]
    vector = torch.tensor(vector, dtype=torch.float64)
    if made.projector.bias is not None:
        vector += made.projector.bias.detach().double()
    if made.residuals is not None:
        vector += made.residuals[sorted(EMBEDDINGS).index(name)].detach().double()
    return vector


def layout(**regions) -> CanvasLayout:
    return CanvasLayout(T=2, spatial_shape=(3, 4), d_model=D_MODEL, regions=regions)


# -- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, words",
    [
        ("camera", "camera"),
        ("sensor.rgb", "sensor / rgb"),
        ("left_arm.force_torque", "left arm / force torque"),
        ("vehicles[3].plan", "vehicles 3 / plan"),
        ("vehicles[12]", "vehicles 12"),
        ("grid[0][1].cell_state", "grid 0 1 / cell state"),
    ],
)
def test_paths_in_words(path, words):
    assert auto_semantic_type(path) == words


def test_embeddings_of_paths():
    asked = []

    def embed(texts):
        asked.append(texts)
        return [[float(len(text)), -1.0] for text in texts]

    types = {"cam": "RGB video", "eye": "", "other": "x"}
    found = compute_semantic_embeddings(["arm.grip", "cam", "eye"], embed, types)
    assert asked == [["arm / grip", "RGB video", "eye"]]  # one call; an empty type is none
    assert found == {"arm.grip": (10.0, -1.0), "cam": (9.0, -1.0), "eye": (3.0, -1.0)}
    assert all(type(value) is float for vector in found.values() for value in vector)
    assert compute_semantic_embeddings([], embed) == {}
    assert len(asked) == 1


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_embeddings_may_be_arrays(kind):
    found = compute_semantic_embeddings(["a", "b"], lambda texts: kind([[1.0, 2.0], [3.0, 4.0]]))
    assert found == {"a": (1.0, 2.0), "b": (3.0, 4.0)}


@pytest.mark.parametrize(
    "vectors, message",
    [
        ([[1.0]], "embed_fn was given 2 strings and gave 1 vectors"),
        ([[1.0, 2.0], [1.0]], r"embedding of 'b\.c' \('b / c'\) has 1 entries, others have 2"),
        ([[1.0], [math.nan]], r"embedding of 'b\.c' \('b / c'\) must be finite"),
        ([[1.0], 2.0], r"embedding of 'b\.c' .* must be a vector, got shape \(\)"),
        ([[], []], r"embedding of 'a' .* must be a vector, got shape \(0,\)"),
        ([["x"], [1.0]], "embedding of 'a' .* must be a vector of numbers"),
    ],
)
def test_embedding_functions_that_fail(vectors, message):
    with pytest.raises(ValueError, match=message):
        compute_semantic_embeddings(["a", "b.c"], lambda texts: vectors)


# -- distances --------------------------------------------------------------------------------------------------------


def test_program_distance_adds_to_the_transfer_distance():
    a = RegionSpec((0, 1, 0, 1), semantic_embedding=(1.0, 2.0, 2.0))
    b = RegionSpec((0, 1, 0, 1), semantic_embedding=(2.0, 1.0, -2.0))
    distance = 1.0 - (1 * 2 + 2 * 1 - 2 * 2) / (3.0 * 3.0)
    state, filtered = (SimpleNamespace(family="state", carrier=c) for c in ("deterministic", "filter"))
    action, acting = (SimpleNamespace(family="action", carrier=c) for c in ("deterministic", "filter"))
    assert program_distance(a, state, b, state) == pytest.approx(distance)
    assert program_distance(a, state, b, action) == pytest.approx(distance + 0.3)
    assert program_distance(a, state, b, filtered) == pytest.approx(distance + 0.2)
    assert program_distance(a, state, b, acting) == pytest.approx(distance + 0.5)
    assert program_distance(a, state, a, state) == pytest.approx(0.0, abs=1e-12)


def test_program_distance_needs_embeddings():
    a = RegionSpec((0, 1, 0, 1), semantic_type="camera")
    program = SimpleNamespace(family="state", carrier="filter")
    with pytest.raises(ValueError, match=r"'camera'\) has no semantic_embedding"):
        program_distance(a, program, a, program)


# -- the conditioner --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residuals", [False, True])
def test_conditioning_is_projection_plus_residual(bias, residuals):
    made = conditioner(learn_residuals=residuals, projector_bias=bias)
    assert made.region_names == ["a", "b", "c.d"]
    assert made.n_regions == 3
    every = made.get_all_conditioning()
    assert every.shape == (3, D_MODEL)
    for row, name in enumerate(made.region_names):
        torch.testing.assert_close(every[row].double(), expected_vector(made, name), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(made.get_conditioning(name), every[row])


def test_what_is_learned_and_what_checkpoints_hold():
    frozen, learned = conditioner(), conditioner(freeze_embeddings=False, learn_residuals=False, projector_bias=True)
    assert set(frozen.state_dict()) == {"_embeddings", "projector.weight", "residuals"}
    assert {name for name, _ in frozen.named_parameters()} == {"projector.weight", "residuals"}
    assert set(learned.state_dict()) == {"_embeddings", "projector.weight", "projector.bias"}
    assert {name for name, _ in learned.named_parameters()} == {"_embeddings", "projector.weight", "projector.bias"}
    assert frozen.state_dict()["_embeddings"].tolist() == [list(EMBEDDINGS[name]) for name in sorted(EMBEDDINGS)]
    assert SemanticConditioner(D_MODEL, EMBED, EMBEDDINGS).residuals.abs().max() == 0
    other = conditioner()
    other.load_state_dict({name: value + 1 for name, value in frozen.state_dict().items()})
    assert torch.equal(other.residuals, frozen.residuals + 1)


def test_embeddings_may_be_tensors():
    made = SemanticConditioner(D_MODEL, EMBED, {name: torch.tensor(vector) for name, vector in EMBEDDINGS.items()})
    assert made.state_dict()["_embeddings"].tolist() == [list(EMBEDDINGS[name]) for name in sorted(EMBEDDINGS)]


def test_condition_canvas_adds_vectors_at_known_regions():
    made = conditioner()
    places = layout(a=(0, 2, 0, 2, 0, 2), b=(0, 1, 1, 3, 1, 2), unknown=(0, 2, 2, 3, 2, 4))
    canvas = torch.randn(3, 24, D_MODEL)
    before = canvas.clone()
    expected = canvas.double().reshape(3, 2, 3, 4, D_MODEL).clone()
    expected[:, :, 0:2, 0:2] += expected_vector(made, "a")
    expected[:, 0:1, 1:3, 1:2] += expected_vector(made, "b")  # overlaps a at one cell, where both count
    out = made.condition_canvas(canvas, places)
    torch.testing.assert_close(out.double(), expected.reshape(3, 24, D_MODEL), atol=1e-6, rtol=1e-6)
    assert torch.equal(canvas, before)
    assert torch.equal(out.reshape(3, 2, 3, 4, D_MODEL)[:, :, 2, 2:], before.reshape(3, 2, 3, 4, D_MODEL)[:, :, 2, 2:])


def test_condition_canvas_follows_its_layout():
    made = conditioner()
    places, elsewhere = layout(a=(0, 2, 0, 1, 0, 1)), layout(a=(0, 1, 2, 3, 3, 4))
    canvas = torch.zeros(1, 24, D_MODEL)
    for each, where in ((places, [0, 12]), (elsewhere, [11]), (places, [0, 12])):
        touched = made.condition_canvas(canvas, each).abs().sum(-1).nonzero()[:, 1].tolist()
        assert touched == where
    places.regions["b"] = (0, 1, 1, 2, 0, 1)
    assert made.condition_canvas(canvas, places).abs().sum(-1).nonzero()[:, 1].tolist() == [0, 4, 12]
    none = layout(other=(0, 1, 0, 1, 0, 1))
    assert torch.equal(made.condition_canvas(canvas, none), canvas)


def test_conditioning_trains_projector_and_residuals():
    made = conditioner()
    places = layout(a=(0, 2, 0, 2, 0, 2), b=(0, 1, 2, 3, 1, 2))
    made.condition_canvas(torch.zeros(5, 24, D_MODEL), places).sum().backward()
    assert made.residuals.grad.tolist() == [[40.0] * D_MODEL, [5.0] * D_MODEL, [0.0] * D_MODEL]  # positions · batch
    row = 40 * torch.tensor(EMBEDDINGS["a"]) + 5 * torch.tensor(EMBEDDINGS["b"])
    torch.testing.assert_close(made.projector.weight.grad, row.expand(D_MODEL, EMBED))
    assert "_embeddings" not in dict(made.named_parameters())


def test_condition_canvas_keeps_the_dtype_of_the_canvas():
    canvas = torch.zeros(1, 24, D_MODEL, dtype=torch.bfloat16)
    out = conditioner().condition_canvas(canvas, layout(a=(0, 2, 0, 2, 0, 2)))
    assert out.dtype == torch.bfloat16


def test_canvases_take_a_conditioner_instead_of_modality_embeddings():
    made = conditioner()
    places = layout(a=(0, 2, 0, 2, 0, 2), b=(0, 1, 2, 3, 1, 2))
    canvas = SpatiotemporalCanvas(places, made)
    plain = SpatiotemporalCanvas(places)
    plain.load_state_dict({n: v for n, v in canvas.state_dict().items() if "semantic" not in n}, strict=False)
    assert canvas.modality_embeddings is None
    difference = (canvas.create_empty(2) - plain.create_empty(2)).double()
    torch.testing.assert_close(difference, made.condition_canvas(torch.zeros(2, 24, D_MODEL), places).double())
    placed = canvas.place(canvas.create_empty(1), torch.zeros(1, 8, D_MODEL), "a")
    expected = expected_vector(made, "a") + canvas.period_embedding(1).detach().double()
    torch.testing.assert_close(canvas.extract(placed, "a")[0, 0].double(), expected, atol=1e-6, rtol=1e-6)


def test_canvases_ask_for_all_vectors_at_once(monkeypatch):
    made = conditioner()
    canvas = SpatiotemporalCanvas(layout(b=(0, 2, 0, 2, 0, 2), a=(0, 1, 2, 3, 1, 2)), made)
    before = canvas.create_empty(1)
    monkeypatch.setattr(made, "get_conditioning", lambda name: pytest.fail(f"asked for {name!r} alone"))
    assert torch.equal(canvas.create_empty(1), before)


def test_a_canvas_with_a_region_that_the_conditioner_lacks():
    canvas = SpatiotemporalCanvas(layout(arm=(0, 1, 0, 1, 0, 1)), conditioner())
    with pytest.raises(KeyError, match="no semantic embedding for region 'arm'"):
        canvas.create_empty(1)


@pytest.mark.parametrize(
    "build, error, message",
    [
        (lambda: SemanticConditioner(6, 4, {}), ValueError, "needs the embedding of at least one region"),
        (lambda: SemanticConditioner(6, 3, EMBEDDINGS), ValueError, "embedding of region 'a' has 4 entries, not 3"),
        (lambda: SemanticConditioner(0, 4, EMBEDDINGS), ValueError, "d_model must be at least 1, got 0"),
        (lambda: SemanticConditioner(6, 0, EMBEDDINGS), ValueError, "embed_dim must be at least 1, got 0"),
        (lambda: SemanticConditioner(6, 1, {"x": [math.inf]}), ValueError, "embedding of region 'x' must be finite"),
        (lambda: conditioner().get_conditioning("arm"), KeyError, "no semantic embedding for region 'arm'; .*'a', 'b'"),
        (
            lambda: conditioner().condition_canvas(torch.zeros(1, 24, 5), layout(a=(0, 2, 0, 2, 0, 2))),
            ValueError,
            r"a canvas must have shape \(batch, 24, 6\), got \(1, 24, 5\)",
        ),
    ],
)
def test_conditioners_refuse(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_conditioning_trains_after_inference():
    layout = CanvasLayout(T=1, H=1, W=2, d_model=8, regions={"a": (0, 1, 0, 1, 0, 2)})
    conditioner = SemanticConditioner(8, 4, {"a": [1.0, 2.0, 3.0, 4.0]})
    canvas = torch.zeros(1, 2, 8)
    with torch.inference_mode():
        expected = conditioner.condition_canvas(canvas, layout)
    found = conditioner.condition_canvas(canvas, layout)
    found.square().sum().backward()
    assert torch.equal(found, expected)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in conditioner.parameters())
