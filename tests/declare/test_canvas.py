"""Layouts, embeddings and the canvas tensor."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from canvas_engineering import (
    ATTENTION_TYPES,
    CanvasLayout,
    FamilyCarrierEmbedding,
    PeriodEmbedding,
    RegionSpec,
    SinusoidalPositionalEncoding3D,
    SinusoidalPositionalEncodingND,
    SpatiotemporalCanvas,
    transfer_distance,
)
from tests.strategies import layouts


def robot_layout():
    return CanvasLayout(
        T=5,
        H=8,
        W=8,
        d_model=16,
        regions={"visual": (0, 5, 0, 6, 0, 6), "action": (0, 5, 6, 7, 0, 1), "reward": (2, 3, 7, 8, 0, 1)},
        t_current=2,
    )


# --- layout


def test_readme_robot_canvas():
    layout = robot_layout()
    assert layout.num_positions == 320
    assert [layout.region_numel(name) for name in ("visual", "action", "reward")] == [180, 5, 1]
    assert layout.output_mask() == list(range(128, 320))


def test_readme_computer_use_canvas():
    regions = {
        "screen": (0, 16, 0, 24, 0, 24),
        "mouse": (0, 16, 24, 26, 0, 4),
        "keyboard": (0, 16, 26, 28, 0, 4),
        "llm": (0, 16, 28, 32, 0, 8),
    }
    layout = CanvasLayout(T=16, H=32, W=32, d_model=768, regions=regions)
    assert layout.num_positions == 16384
    assert [layout.region_numel(name) for name in regions] == [9216, 128, 128, 512]


def test_readme_frequencies():
    regions = {
        "screen": (0, 16, 0, 24, 0, 24),
        "mouse": RegionSpec(bounds=(0, 16, 24, 26, 0, 4), period=1, loss_weight=2.0),
        "thought": RegionSpec(bounds=(0, 4, 28, 32, 0, 8), period=4, loss_weight=1.0),
        "task_prompt": RegionSpec(bounds=(0, 1, 26, 28, 0, 4), is_output=False),
    }
    layout = CanvasLayout(T=16, H=32, W=32, d_model=768, regions=regions)
    assert layout.real_frame("thought", canvas_t=2) == 8
    assert layout.canvas_frame("thought", real_t=8) == 2
    assert layout.canvas_frame("thought", real_t=7) is None
    assert layout.region_spec("screen") == RegionSpec(bounds=(0, 16, 0, 24, 0, 24))
    weights = layout.loss_weight_mask()
    assert weights[layout.region_index("mouse")].unique().tolist() == [2.0]
    assert weights[layout.region_index("task_prompt")].unique().tolist() == [0.0]
    assert weights.sum() == 9216 + 2 * 128 + 128


def test_frames_count_from_the_regions_start():
    layout = CanvasLayout(T=8, H=2, d_model=4, regions={"slow": RegionSpec((3, 6, 0, 1), period=4)})
    assert [layout.real_frame("slow", t) for t in range(3)] == [0, 4, 8]
    assert [layout.canvas_frame("slow", t) for t in (0, 4, 8, 12, -4)] == [0, 1, 2, None, None]
    assert layout.region_timesteps("slow") == [3, 4, 5]


@pytest.mark.parametrize("shape", [(6,), (3, 4), (2, 3, 4)])
def test_height_and_width_mirror_the_first_dimensions(shape):
    layout = CanvasLayout(T=2, spatial_shape=shape, d_model=4)
    assert (shape[0], shape[1] if len(shape) > 1 else None) == (layout.H, layout.W)
    assert (layout.n_spatial_dims, layout.spatial_volume) == (len(shape), math.prod(shape))
    assert layout == CanvasLayout(T=2, d_model=4, **({"H": 6} if len(shape) == 1 else {"spatial_shape": list(shape)}))


@given(layouts())
def test_positions_are_row_major(layout):
    grid = np.arange(layout.num_positions).reshape(layout.T, *layout.spatial_shape)
    for name in layout.regions:
        bounds = layout.region_spec(name).bounds
        box = tuple(slice(low, high) for low, high in zip(bounds[::2], bounds[1::2]))
        assert layout.region_indices(name) == grid[box].reshape(-1).tolist()
        assert layout.region_index(name).tolist() == layout.region_indices(name)
        assert layout.region_size(name) == grid[box].shape
        assert layout.region_box(name).tolist() == [list(pair) for pair in zip(bounds[::2], bounds[1::2])]
        for t in range(-1, layout.T + 1):
            expected = grid[t][box[1:]].reshape(-1).tolist() if bounds[0] <= t < bounds[1] else []
            assert layout.region_indices_at_t(name, t) == expected
    corner = tuple(size - 1 for size in grid.shape)
    assert layout.flat_index(*corner) == grid[corner]
    assert layout.flat_index(*(0 for _ in corner)) == 0


def test_loss_weights_add_up_over_overlapping_output_regions():
    regions = {
        "a": RegionSpec((0, 1, 0, 3), loss_weight=2.0),
        "b": RegionSpec((0, 1, 2, 4), loss_weight=0.5),
        "c": RegionSpec((0, 1, 0, 4), loss_weight=9.0, is_output=False),
    }
    layout = CanvasLayout(T=1, spatial_shape=(5,), d_model=4, regions=regions)
    assert layout.loss_weight_mask().tolist() == [2.0, 2.0, 2.5, 0.5, 0.0]


def test_regions_may_be_added_and_replaced():
    layout = CanvasLayout(T=2, spatial_shape=(4,), d_model=4, regions={"a": (0, 1, 0, 2)})
    before = layout.key()
    assert layout.key() is before
    assert layout.region_indices("a") == [0, 1]
    layout.regions["a"] = RegionSpec((1, 2, 0, 2), period=3)
    layout.regions["b"] = (0, 1, 3, 4)
    assert layout.region_indices("a") == [4, 5]
    assert layout.region_indices("b") == [3]
    assert layout.key() != before
    layout.regions["c"] = (0, 3, 0, 1)
    with pytest.raises(ValueError, match=r"'c'.*\(0, 3, 0, 1\).*\(2, 4\)"):
        layout.region_index("c")


def test_keys_and_equality_go_by_value():
    def build(**changes):
        spec = RegionSpec((0, 1, 0, 2), **changes)
        return CanvasLayout(T=2, spatial_shape=(4,), d_model=4, regions={"a": spec})

    assert build() == CanvasLayout(T=2, H=4, d_model=4, regions={"a": (0, 1, 0, 2)})
    assert build().key() == build().key()
    assert hash(build().key()) == hash(build().key())
    assert build(period=2) != build()
    for change in ({"period": 2}, {"default_attn": "none"}):
        assert build(**change).key() != build().key()
    # The loss has no say in attention.
    assert build(loss_weight=2.0).key() == build().key()
    assert build(loss_weight=2.0) != build()


def test_layouts_survive_pickle_and_copy():
    layout = robot_layout()
    layout.region_index("visual")
    for twin in (pickle.loads(pickle.dumps(layout)), copy.deepcopy(layout)):
        assert twin == layout
        assert twin.key() == layout.key()
        assert twin.region_indices("action") == layout.region_indices("action")


BAD_REGIONS = {
    "outside": ((0, 2, 0, 5), r"region 'x'.*\(0, 2, 0, 5\).*outside the grid \(2, 4\)"),
    "outside in time": ((0, 3, 0, 4), r"region 'x'.*outside the grid \(2, 4\)"),
    "reversed": ((0, 2, 3, 1), r"region 'x' on the grid \(2, 4\).*\(0, 2, 3, 1\).*\(3, 1\)"),
    "empty": ((1, 1, 0, 4), r"region 'x'.*\(1, 1\).*empty"),
    "negative": ((0, 2, -1, 2), r"region 'x'.*\(-1, 2\).*negative"),
    "too long": ((0, 2, 0, 4, 0, 1), r"region 'x'.*6 entries.*needs 4"),
    "odd": ((0, 2, 0), r"region 'x'.*\(0, 2, 0\)"),
    "not ints": ((0, 2, 0, 1.5), r"region 'x'.*must be an int, got 1.5"),
    "a bool": ((0, True, 0, 1), r"region 'x'.*must be an int, got True"),
    "not bounds": ("everywhere", r"region 'x'.*must be a tuple of ints, got 'everywhere'"),
    "a number": (7, r"region 'x'.*must be a tuple of ints, got 7"),
}


@pytest.mark.parametrize("bounds, message", BAD_REGIONS.values(), ids=BAD_REGIONS)
def test_bad_bounds_name_the_region(bounds, message):
    with pytest.raises(ValueError, match=message):
        CanvasLayout(T=2, spatial_shape=(4,), d_model=4, regions={"x": bounds})


BAD_LAYOUTS = {
    "both grids": ({"spatial_shape": (4, 4), "H": 4, "W": 5}, r"spatial_shape=\(4, 4\) or H=4, W=5, not both"),
    "the same twice": ({"spatial_shape": (4, 4), "H": 4, "W": 4}, "Cannot specify both"),
    "both, one": ({"spatial_shape": (4,), "W": 4}, "Cannot specify both"),
    "no grid": ({}, "needs spatial_shape, or H and W"),
    "W alone": ({"W": 4}, "needs spatial_shape, or H and W"),
    "T of 0": ({"H": 4, "T": 0}, "T must be at least 1, got 0"),
    "T float": ({"H": 4, "T": 2.0}, "T must be an int, got 2.0"),
    "T too large": ({"H": 4, "T": 2**31}, "T must be below"),
    "d_model": ({"H": 4, "d_model": 0}, "d_model must be at least 1, got 0"),
    "t_current": ({"H": 4, "t_current": -1}, "t_current must be at least 0, got -1"),
    "cells": ({"spatial_shape": (4, 0)}, "spatial_shape must be at least 1, got 0"),
    "an int": ({"spatial_shape": 4}, "must be a tuple of ints, got 4"),
    "regions": ({"H": 4, "regions": [("a", (0, 1, 0, 1))]}, "regions must be a dict"),
    "a name": ({"H": 4, "regions": {3: (0, 1, 0, 1)}}, "region names must be strings.*got 3"),
    "no name": ({"H": 4, "regions": {"": (0, 1, 0, 1)}}, "region names must be strings.*got ''"),
}


@pytest.mark.parametrize("arguments, message", BAD_LAYOUTS.values(), ids=BAD_LAYOUTS)
def test_bad_layouts(arguments, message):
    with pytest.raises(ValueError, match=message):
        CanvasLayout(**{"T": 2, "d_model": 4, **arguments})


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"period": 0}, r"period of the region at \(0, 1, 0, 1\) must be at least 1, got 0"),
        ({"period": 1.5}, "period.*must be an int, got 1.5"),
        ({"period": 2**31}, "period.*below"),
        ({"loss_weight": math.nan}, "loss_weight.*finite number, got nan"),
        ({"loss_weight": "1"}, "loss_weight.*finite number, got '1'"),
        ({"is_output": 1}, "is_output.*must be a bool, got 1"),
        ({"default_attn": None}, "default_attn.*must be a string, got None"),
        ({"semantic_type": 3}, "semantic_type.*must be a string, got 3"),
        ({"semantic_embedding": (1.0, math.inf)}, "semantic_embedding.*finite"),
        ({"semantic_embedding": ("a",)}, "semantic_embedding.*must hold numbers"),
        ({"semantic_embedding": ((1.0,),)}, "semantic_embedding.*vector"),
    ],
)
def test_bad_region_specs(fields, message):
    with pytest.raises(ValueError, match=message):
        RegionSpec((0, 1, 0, 1), **fields)


def test_unknown_regions_are_key_errors_that_list_the_known_ones():
    layout = robot_layout()
    for ask in (layout.region_spec, layout.region_indices, layout.region_box, layout.region_numel):
        with pytest.raises(KeyError, match=r"no region 'vision'.*'visual', 'action', 'reward'"):
            ask("vision")
    many = CanvasLayout(T=1, H=99, d_model=4, regions={f"r{i}": (0, 1, i, i + 1) for i in range(99)})
    with pytest.raises(KeyError, match=r"'r11', \.\.\. \(99 in all\)"):
        many.region_index("r99")


@pytest.mark.parametrize("position", [(0, 8, 0), (5, 0, 0), (0, -1, 0), (0, 0), (0, 0, 0, 0)])
def test_flat_index_outside_the_grid(position):
    with pytest.raises(ValueError, match=r"does not lie on the grid \(5, 8, 8\)"):
        robot_layout().flat_index(*position)


def test_specs_are_hashable_whatever_they_were_given():
    spec = RegionSpec([0, np.int64(1), 0, 1], semantic_embedding=torch.tensor([1.0, 2.0]), loss_weight=2)
    assert spec == RegionSpec((0, 1, 0, 1), semantic_embedding=(1, 2), loss_weight=2.0)
    assert hash(spec) == hash(RegionSpec((0, 1, 0, 1), semantic_embedding=[1.0, 2.0], loss_weight=2.0))
    assert type(spec.bounds[1]) is int


def test_attention_types_are_the_seventeen_declared_ones():
    assert len(ATTENTION_TYPES) == 17
    assert {"cross_attention", "none", "random_fixed", "mixture", "cogvideox"} <= set(ATTENTION_TYPES)


# --- transfer distance


def _embedded(vector, model="m"):
    return RegionSpec((0, 1, 0, 1), semantic_embedding=vector, embedding_model=model)


@given(st.lists(st.floats(-5, 5), min_size=3, max_size=3), st.lists(st.floats(-5, 5), min_size=3, max_size=3))
def test_transfer_distance_is_the_cosine_distance(a, b):
    a, b = [1.0, *a], [2.0, *b]
    cosine = math.fsum(x * y for x, y in zip(a, b)) / math.hypot(*a) / math.hypot(*b)
    assert transfer_distance(_embedded(a), _embedded(b)) == pytest.approx(1 - cosine, abs=1e-12)


def test_transfer_distance_stays_in_range():
    assert transfer_distance(_embedded((0.1, 0.2, 0.3)), _embedded((0.1, 0.2, 0.3))) == pytest.approx(0, abs=1e-15)
    assert transfer_distance(_embedded((0.1, 0.2, 0.3)), _embedded((0.1, 0.2, 0.3))) >= 0
    assert transfer_distance(_embedded((1, 2)), _embedded((-1, -2))) == pytest.approx(2)
    assert transfer_distance(_embedded((0, 0)), _embedded((1, 2))) == 1


@pytest.mark.parametrize(
    "a, b, message",
    [
        (RegionSpec((0, 1, 0, 1)), _embedded((1, 2)), r"region at \(0, 1, 0, 1\).*no semantic_embedding"),
        (_embedded((1, 2), "m"), _embedded((1, 2), "n"), "different models.*'m', 'n'"),
        (_embedded((1, 2)), _embedded((1, 2, 3)), "differ in length: 2.*3"),
    ],
)
def test_transfer_distance_of_what_cannot_be_compared(a, b, message):
    with pytest.raises(ValueError, match=message):
        transfer_distance(a, b)


# --- encodings


@pytest.mark.parametrize("d_model, sizes", [(8, (3, 4)), (13, (3, 4, 5)), (17, (2, 3, 2, 4)), (3, (2, 2, 2, 2))])
def test_positional_encoding_is_the_formula(d_model, sizes):
    encoding = SinusoidalPositionalEncodingND(d_model, sizes[0], sizes[1:])
    assert list(encoding.state_dict()) == ["pe"]
    share = d_model // len(sizes)
    widths = [share] * (len(sizes) - 1) + [d_model - share * (len(sizes) - 1)]
    grid = encoding(sizes[0], sizes[1:])
    assert grid.shape == (*sizes, d_model)
    for position in np.ndindex(*sizes):
        expected = []
        for coordinate, width in zip(position, widths):
            for channel in range(width):
                angle = coordinate / 10000 ** (2 * (channel // 2) / width)
                expected.append(math.cos(angle) if channel % 2 else math.sin(angle))
        torch.testing.assert_close(grid[position], torch.tensor(expected), rtol=0, atol=1e-6)


def test_positional_encoding_of_a_part_of_the_grid():
    encoding = SinusoidalPositionalEncoding3D(12, max_T=4, max_H=5, max_W=6)
    assert torch.equal(encoding(2, 3, 4), encoding.pe[:2, :3, :4])
    assert torch.equal(encoding(2, spatial_shape=(3, 4)), encoding.pe[:2, :3, :4])
    for asked in ((5, (1, 1)), (1, (6, 1)), (1, (1,)), (1, (0, 1))):
        with pytest.raises(ValueError, match=r"grids up to \(4, 5, 6\)"):
            SinusoidalPositionalEncodingND.forward(encoding, *asked)


def test_positional_encoding_loads_checkpoints_of_other_grids():
    small, large = SinusoidalPositionalEncodingND(6, 2, (2,)), SinusoidalPositionalEncodingND(6, 4, (5,))
    before = small.pe.clone()
    small.load_state_dict(large.state_dict())
    assert torch.equal(small.pe, before)


def test_period_buckets():
    embedding = PeriodEmbedding(8)
    for period in (0, 1, 2, 3, 7, 10, 99, 100, 5000, 10000, 10**6):
        expected = 0 if period <= 1 else min(int(math.log(period) / math.log(10000) * 15) + 1, 15)
        assert embedding.bucket(period) == expected
        assert torch.equal(embedding(period), embedding.embedding.weight[expected])
    assert embedding(3).shape == (8,)
    assert 0.01 < PeriodEmbedding(512).embedding.weight.std() < 0.03
    with pytest.raises(ValueError, match="n_buckets must be at least 2, got 1"):
        PeriodEmbedding(8, n_buckets=1)


def test_family_and_carrier_embeddings():
    embedding = FamilyCarrierEmbedding(8)
    families = ["observation", "state", "memory", "residual", "action"]
    carriers = ["deterministic", "diffusive", "filter", "memory", "residual"]
    assert [embedding.family_idx(name) for name in [*families, "dream"]] == list(range(6))
    assert [embedding.carrier_idx(name) for name in [*carriers, "pigeon"]] == list(range(6))
    expected = embedding.family_embedding.weight[4] + embedding.carrier_embedding.weight[1]
    assert torch.equal(embedding("action", "diffusive"), expected)
    assert torch.equal(embedding("a", "b"), embedding("c", "d"))
    assert [tuple(p.shape) for p in embedding.parameters()] == [(6, 8), (6, 8)]


# --- the canvas tensor


class Conditioner(torch.nn.Module):
    def __init__(self, names, d_model):
        super().__init__()
        self.table = torch.nn.ParameterDict({name: torch.randn(d_model) for name in names})

    def get_conditioning(self, region_name):
        return self.table[region_name] * 2


def _canvases(layout):
    region = SimpleNamespace(family="action", carrier="filter")
    return {
        "plain": SpatiotemporalCanvas(layout),
        "program": SpatiotemporalCanvas(layout, program=SimpleNamespace(regions={"action": region})),
        "semantic": SpatiotemporalCanvas(layout, semantic_conditioner=Conditioner(layout.regions, layout.d_model)),
    }


def _identity(canvas, name, modality):
    spec = canvas.layout.region_spec(name)
    identity = canvas.period_embedding(spec.period)
    if canvas.program is not None:
        family, carrier = ("action", "filter") if name == "action" else ("state", spec.carrier)
        identity = identity + canvas.family_carrier_embedding(family, carrier)
    if canvas.semantic_conditioner is not None:
        identity = identity + canvas.semantic_conditioner.get_conditioning(name)
    elif modality:
        identity = identity + canvas.modality_embeddings[name]
    return identity


def overlapping_layout():
    regions = {
        "visual": RegionSpec((0, 3, 0, 3, 0, 3), carrier="diffusive"),
        "action": RegionSpec((1, 3, 2, 4, 1, 2), period=7),
    }
    return CanvasLayout(T=3, H=4, W=4, d_model=8, regions=regions)


@pytest.mark.parametrize("kind", ["plain", "program", "semantic"])
def test_empty_canvas(kind):
    torch.manual_seed(0)
    layout = overlapping_layout()
    canvas = _canvases(layout)[kind]
    expected = canvas.empty_token + canvas.pos_enc(3, (4, 4)).reshape(-1, 8)
    for name in layout.regions:
        for index in layout.region_indices(name):
            row = torch.zeros_like(expected)
            row[index] = 1
            expected = expected + row * _identity(canvas, name, modality=False)
    empty = canvas.create_empty(2)
    assert empty.shape == (2, 48, 8)
    torch.testing.assert_close(empty[0], expected)
    assert torch.equal(empty[0], empty[1])
    empty[0].zero_()  # the samples share no memory
    assert empty[1].abs().sum() > 0


@pytest.mark.parametrize("kind", ["plain", "program", "semantic"])
@pytest.mark.parametrize("n", [0, 2, 4, 6])
def test_place_and_extract(kind, n):
    torch.manual_seed(0)
    layout = overlapping_layout()
    canvas = _canvases(layout)[kind]
    before = torch.randn(2, 48, 8)
    embeddings = torch.randn(2, n, 8)
    kept = before.clone()
    after = canvas.place(before, embeddings, "action")
    assert torch.equal(before, kept)
    padded = torch.zeros(2, 4, 8)
    padded[:, : min(n, 4)] = embeddings[:, :4]
    inside = layout.region_indices("action")
    torch.testing.assert_close(after[:, inside], padded + _identity(canvas, "action", modality=True))
    outside = [index for index in range(48) if index not in inside]
    assert torch.equal(after[:, outside], before[:, outside])
    assert torch.equal(canvas.extract(after, "action"), after[:, inside])


def test_gradients_reach_what_is_learned():
    layout = robot_layout()
    canvas = SpatiotemporalCanvas(layout)
    embeddings = torch.randn(1, 5, 16, requires_grad=True)
    out = canvas.place(canvas.create_empty(1), embeddings, "action")
    out.pow(2).sum().backward()
    for tensor in (embeddings, canvas.empty_token, canvas.modality_embeddings["action"]):
        assert tensor.grad.abs().sum() > 0
    assert canvas.modality_embeddings["visual"].grad is None
    # What lies under a placed region is gone, the rest of the canvas is not.
    assert canvas.period_embedding.embedding.weight.grad[0].abs().sum() > 0


def test_place_keeps_the_canvas_dtype():
    canvas = SpatiotemporalCanvas(robot_layout())
    out = canvas.place(torch.zeros(1, 320, 16, dtype=torch.bfloat16), torch.randn(1, 5, 16), "action")
    assert out.dtype == torch.bfloat16
    assert out[0, 48].abs().sum() > 0


def test_checkpoints_hold_the_published_names():
    layout = CanvasLayout(
        T=2, H=4, W=4, d_model=8, regions={"v[3].plan": (0, 2, 0, 1, 0, 1), "goal": (0, 1, 1, 2, 0, 1)}
    )
    common = {"empty_token", "pos_enc.pe", "period_embedding.embedding.weight"}
    plain = SpatiotemporalCanvas(layout)
    assert set(plain.state_dict()) == common | {"modality_embeddings.v_3___plan", "modality_embeddings.goal"}
    assert plain.family_carrier_embedding is None
    program = SpatiotemporalCanvas(layout, program=SimpleNamespace(regions={}))
    tables = {f"family_carrier_embedding.{name}_embedding.weight" for name in ("family", "carrier")}
    assert set(program.state_dict()) == set(plain.state_dict()) | tables
    semantic = SpatiotemporalCanvas(layout, semantic_conditioner=SimpleNamespace(get_conditioning=None))
    assert semantic.modality_embeddings is None
    assert set(semantic.state_dict()) == common


def test_indices_move_with_the_module():
    canvas = SpatiotemporalCanvas(robot_layout(), program=SimpleNamespace(regions={})).to("meta")
    assert {tensor.device.type for tensor in (*canvas.parameters(), *canvas.buffers())} == {"meta"}
    out = canvas.place(canvas.create_empty(3), torch.zeros(3, 5, 16, device="meta"), "action")
    assert canvas.extract(out, "visual").shape == (3, 180, 16)


def test_a_canvas_without_regions():
    canvas = SpatiotemporalCanvas(CanvasLayout(T=2, H=3, d_model=4), program=SimpleNamespace(regions={}))
    expected = canvas.empty_token + canvas.pos_enc(2, (3,)).reshape(6, 4)
    assert torch.equal(canvas.create_empty(1)[0], expected)


@pytest.mark.parametrize(
    "canvas_shape, embeddings_shape, strict, message",
    [
        ((2, 320, 16), (2, 5, 8), False, r"\(2, 5, 8\).*'action'.*\(2, 5, 16\).*\(2, 320, 16\)"),
        ((2, 320, 16), (3, 5, 16), False, r"\(3, 5, 16\).*'action'.*\(2, 5, 16\)"),
        ((2, 320, 16), (5, 16), False, r"\(5, 16\).*'action'"),
        ((2, 320, 16), (2, 4, 16), True, r"\(2, 4, 16\).*'action'.*\(2, 5, 16\)"),
        ((2, 321, 16), (2, 5, 16), False, r"shape \(batch, 320, 16\), got \(2, 321, 16\)"),
        ((320, 16), (2, 5, 16), False, r"shape \(batch, 320, 16\), got \(320, 16\)"),
    ],
)
def test_place_refuses_what_does_not_fit(canvas_shape, embeddings_shape, strict, message):
    canvas = SpatiotemporalCanvas(robot_layout())
    with pytest.raises(ValueError, match=message):
        canvas.place(torch.zeros(canvas_shape), torch.zeros(embeddings_shape), "action", strict=strict)


def test_canvas_refuses_unknown_regions_and_shapes():
    layout = robot_layout()
    canvas = SpatiotemporalCanvas(layout)
    batch = canvas.create_empty(1)
    with pytest.raises(KeyError, match=r"no region 'arm'.*'visual'"):
        canvas.extract(batch, "arm")
    with pytest.raises(KeyError, match="no region 'arm'"):
        canvas.place(batch, torch.zeros(1, 1, 16), "arm")
    with pytest.raises(ValueError, match=r"got \(1, 320, 15\)"):
        canvas.extract(batch[..., :15], "visual")
    with pytest.raises(ValueError, match=r"batch_size must be an int, got 1\.5"):
        canvas.create_empty(1.5)
    layout.regions["late"] = (0, 1, 7, 8, 7, 8)
    with pytest.raises(KeyError, match="'late' was added to the layout after"):
        canvas.extract(batch, "late")


@pytest.mark.parametrize(
    "names, message",
    [
        (["a.b", "a__b"], "'a.b' and 'a__b' would share the parameter name 'a__b'"),
        (["copy"], "'copy' cannot have a modality embedding"),
        (["training"], "'training' cannot have a modality embedding"),
    ],
)
def test_names_that_cannot_be_parameters(names, message):
    layout = CanvasLayout(T=1, H=4, d_model=4, regions={name: (0, 1, 0, 1) for name in names})
    with pytest.raises(ValueError, match=message):
        SpatiotemporalCanvas(layout)


def test_a_layout_made_of_another_keeps_its_grid():
    layout = CanvasLayout(T=2, H=3, W=4, d_model=8, regions={"a": (0, 2, 0, 3, 0, 4)})
    other = dataclasses.replace(layout, t_current=1)
    assert (other.t_current, other.spatial_shape, other.regions) == (1, (3, 4), layout.regions)
    wider = dataclasses.replace(layout, spatial_shape=(9, 9))
    assert (wider.H, wider.W) == (9, 9)
    # sizes of one layout are sizes for another
    assert CanvasLayout(T=1, H=layout.H, W=layout.W, d_model=8).spatial_shape == (3, 4)


def test_indices_are_made_on_the_host_whatever_the_default_device():
    layout = CanvasLayout(T=2, H=1, W=2, d_model=8, regions={"a": (1, 2, 0, 1, 0, 2)})
    with torch.device("meta"):
        assert layout.region_index("a").tolist() == [2, 3]
