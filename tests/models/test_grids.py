"""Token grids: another one than the layout's is refused, and several layouts are told apart, call by call."""

from __future__ import annotations

import warnings

import pytest
import torch

from canvas_engineering import tile_topology, window_topology
from canvas_engineering.cogvideox import CanvasAttnProcessor, cogvideox_layout
from canvas_engineering.graft import graft_looped_blocks
from canvas_engineering.models import remove_canvas_attention, set_canvas_attention
from tests.cogvideox_models import FRAMES, TEXT, inputs, randomise_loops, tiny_model

TOPOLOGIES = {"window": window_topology(), "tiles": tile_topology(2, 2)}


def grafted(kind, topology="window", **options):
    model = tiny_model(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the density
        graft_looped_blocks(model, 3, layout=layout_for(model, 8, 8), topology=TOPOLOGIES[topology], **options)
    return model


def run(model, kind):
    return model(**inputs(kind))[0]


def of_shape(rows, columns, kind="2b", frames=FRAMES):
    """A model for latents of this shape and the inputs of one call."""
    given = inputs(kind)
    g = torch.Generator().manual_seed(3)
    given["hidden_states"] = torch.randn(2, frames, 4, rows, columns, generator=g)
    if "image_rotary_emb" in given:
        angle = torch.randn(frames * rows * columns // 4, 8, generator=g).repeat_interleave(2, 1)
        given["image_rotary_emb"] = (angle.cos(), angle.sin())
    return given


def layout_for(model, rows, columns, frames=FRAMES):
    return cogvideox_layout(model.config, 8 * rows, 8 * columns, 4 * (frames - 1) + 1)


@pytest.mark.parametrize("topology", ["tiles", "window"])
@pytest.mark.parametrize("graft", [True, False])
def test_another_grid_of_as_many_tokens_is_refused(topology, graft):
    model = tiny_model("5b")
    landscape = layout_for(model, 4, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        if graft:
            graft_looped_blocks(model, 3, layout=landscape, topology=TOPOLOGIES[topology])
        else:
            set_canvas_attention(model, landscape, TOPOLOGIES[topology])
    assert torch.isfinite(model(**of_shape(4, 16, "5b"))[0]).all()
    with pytest.raises(ValueError, match=r"is 4 × 2 × 8, this video's 4 × 8 × 2"):
        model(**of_shape(16, 4, "5b"))
    given = list(of_shape(16, 4, "5b").values())  # by position
    with pytest.raises(ValueError, match=r"is 4 × 2 × 8, this video's 4 × 8 × 2"):
        model(given[0], given[1], given[2])


@pytest.mark.parametrize("kind", ["2b", "5b"])
@pytest.mark.parametrize("packed", [True, False])
def test_layouts_of_several_grids_are_chosen_per_call(kind, packed):
    shapes = [(4, 16), (16, 4), (8, 8)]
    model = tiny_model(kind)
    layouts = [layout_for(model, *shape) for shape in shapes]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        graft_looped_blocks(model, 3, loops=2, layout=layouts, topology=TOPOLOGIES["tiles"], packed=packed)
    randomise_loops(model.transformer_blocks)
    for checkpointing in (False, True):
        if checkpointing:
            model.train().enable_gradient_checkpointing()
        outs = [model(**of_shape(*shape, kind))[0] for shape in shapes]
        model.zero_grad()
        outs[0].square().mean().backward()  # after the others have run: what is recomputed has its own grid
        gradient = model.transformer_blocks[0].loop_emb.grad.clone()
        for layout, shape, out in zip(layouts, shapes, outs):
            alone = tiny_model(kind)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                graft_looped_blocks(alone, 3, loops=2, layout=layout, topology=TOPOLOGIES["tiles"], packed=packed)
            randomise_loops(alone.transformer_blocks)
            assert torch.equal(alone(**of_shape(*shape, kind))[0], out)
            if shape == shapes[0]:
                alone(**of_shape(*shape, kind))[0].square().mean().backward()
                torch.testing.assert_close(gradient, alone.transformer_blocks[0].loop_emb.grad)
    with pytest.raises(ValueError, match=r"4 × 2 × 8 or 4 × 8 × 2 or 4 × 4 × 4, this video's 4 × 2 × 4"):
        model(**of_shape(4, 8, kind))


def test_several_layouts_are_saved_and_compared(tmp_path):
    model = tiny_model("2b")
    layouts = [layout_for(model, 4, 16), layout_for(model, 16, 4)]
    with pytest.warns(UserWarning, match="computes"):
        graft_looped_blocks(model, 3, layout=layouts, topology=[window_topology(), tile_topology(2, 2)])
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for shape in ((4, 16), (16, 4)):
        assert torch.equal(loaded(**of_shape(*shape))[0], model(**of_shape(*shape))[0])
    with pytest.raises(ValueError, match="two layouts have the grid 4 × 2 × 8"):
        CanvasAttnProcessor([layouts[0], layouts[0]], window_topology())
    with pytest.raises(ValueError, match="a topology for each layout, got 2 and 1"):
        CanvasAttnProcessor(layouts, [window_topology()])
    with pytest.raises(ValueError, match=r"of 64 tokens have the grids 4 × 2 × 8 and 4 × 8 × 2"):
        attn = tiny_model("2b").transformer_blocks[0].attn1
        CanvasAttnProcessor(layouts, window_topology())(attn, torch.randn(1, 64, 32), torch.randn(1, TEXT, 32))


def test_canvas_attention_is_set_and_taken_away_on_a_stock_model():
    model = tiny_model("5b")
    expected, before = run(model, "5b"), model.attn_processors
    processor = set_canvas_attention(model, layout_for(model, 8, 8), TOPOLOGIES["tiles"])
    assert type(model) is type(tiny_model("5b")) and 0 < processor.plan.density < 1
    assert torch.equal(run(model, "5b"), run(grafted("5b", "tiles", packed=False), "5b"))
    assert set(model.attn_processors.values()) != set(before.values())
    assert remove_canvas_attention(model) is model and model.attn_processors == before
    assert torch.equal(run(model, "5b"), expected)
    assert torch.isfinite(model(**of_shape(16, 4, "5b"))[0]).all()
    with pytest.raises(ValueError, match=r"is grafted, a LoopedCogVideoX.*: ungraft it"):
        remove_canvas_attention(grafted("5b"))
