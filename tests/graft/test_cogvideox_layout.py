"""Token grids of CogVideoX: sizes, boxes of pixels, and the usual topologies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from canvas_engineering import CanvasLayout, RegionSpec, compile_attention
from canvas_engineering.cogvideox import PixelBox, cogvideox_layout, dense_topology, tile_topology, window_topology
from canvas_engineering.models.tokens import token_plan
from tests import oracle, strategies

CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "patch_size": 2,
    "patch_size_t": None,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": 226,
}
CONFIG_1_5 = {**CONFIG, "patch_size_t": 2, "max_text_seq_length": 224}


def test_the_2b_grid_and_where_its_tokens_lie():
    layout = cogvideox_layout(CONFIG, 480, 720, 49)
    assert layout.region_size("video") == (13, 30, 45) and layout.region_numel("text") == 226
    assert layout.d_model == 32 and layout.region_size("first_frame") == (1, 30, 45)
    video = layout.region_index("video").reshape(13, 30, 45)
    text = layout.region_index("text")
    assert len(set(video.flatten().tolist()) & set(text.tolist())) == 0
    # Token (t, h, w) stands at 226 + (t·30 + h)·45 + w of the sequence: raster order, as the positions of the region.
    plan = token_plan(layout, dense_topology())
    assert plan.n_positions == 226 + 13 * 30 * 45 and plan.density == 1.0
    assert (video.flatten().diff() > 0).all() and video[2, 3, 4] == layout.flat_index(2, 3, 4)


@pytest.mark.parametrize(("frames", "latent"), [(1, 1), (5, 2), (9, 3), (13, 4), (49, 13), (48, 12)])
def test_latent_frames(frames, latent):
    assert latent == cogvideox_layout(CONFIG, 32, 32, frames).T
    assert -(-latent // 2) == cogvideox_layout(CONFIG_1_5, 32, 32, frames).T


def brute_force(config, frames, height, width, box):
    """Tokens that hold some pixel of some frame of the box, pixel by pixel."""
    ratio, joined = config["temporal_compression_ratio"], config["patch_size_t"] or 1
    latents = (frames - 1) // ratio + 1
    padding = -latents % joined
    found = set()
    for frame in range(*(box.frames or (0, frames))):
        latent = 0 if frame == 0 else (frame - 1) // ratio + 1
        for y in range(*(box.rows or (0, height))):
            for x in range(*(box.columns or (0, width))):
                found.add(((latent + padding) // joined, y // 16, x // 16))
    return found


@pytest.mark.parametrize("config", [CONFIG, CONFIG_1_5])
@pytest.mark.parametrize(
    "box",
    [
        PixelBox(),
        PixelBox(frames=(0, 1)),
        PixelBox(frames=(1, 5), rows=(16, 32)),
        PixelBox(frames=(4, 6), rows=(15, 33), columns=(0, 1)),
        PixelBox(frames=(12, 17), columns=(47, 48)),
    ],
)
def test_pixel_boxes_are_the_tokens_that_they_touch(config, box):
    layout = cogvideox_layout(config, 48, 48, 17, {"box": box})
    t0, t1, h0, h1, w0, w1 = layout.region_spec("box").bounds
    tokens = {(t, h, w) for t in range(t0, t1) for h in range(h0, h1) for w in range(w0, w1)}
    assert tokens == brute_force(config, 17, 48, 48, box)


def test_regions_in_tokens_keep_their_spec():
    spec = RegionSpec((0, 2, 0, 1, 1, 2), loss_weight=2.0)
    layout = cogvideox_layout(CONFIG, 32, 32, 9, {"a": (1, 3, 0, 2, 0, 1), "b": spec}, text_tokens=7)
    assert layout.region_spec("b") == spec and layout.region_spec("a").bounds == (1, 3, 0, 2, 0, 1)
    assert layout.region_numel("text") == 7


@pytest.mark.parametrize(
    ("arguments", "regions", "message"),
    [
        ((40, 32, 9), None, "height 40 must be a multiple of 16"),
        ((32, 0, 9), None, "width 0 must be a multiple of 16"),
        ((32, 32, 0), None, "num_frames must be at least 1"),
        ((32, 32, 9), {"text": (0, 1, 0, 1, 0, 1)}, "cannot be called 'text'"),
        ((32, 32, 9), {"a": (0, 4, 0, 1, 0, 1)}, r"region 'a': bounds \(0, 4, 0, 1, 0, 1\) do not lie.*3 × 2 × 2"),
        ((32, 32, 9), {"a": (0, 1, 2, 3, 0, 1)}, "do not lie in the video's tokens"),
        ((32, 32, 9), {"a": PixelBox(rows=(0, 33))}, r"region 'a': rows \(0, 33\) are empty or outside.*0 … 32"),
        ((32, 32, 9), {"a": PixelBox(frames=(5, 5))}, r"frames \(5, 5\) are empty"),
    ],
)
def test_wrong_grids_are_refused(arguments, regions, message):
    with pytest.raises(ValueError, match=message):
        cogvideox_layout(CONFIG, *arguments, regions)
    with pytest.raises(ValueError, match="text_tokens must be at least 1"):
        cogvideox_layout(CONFIG, 32, 32, 9, text_tokens=0)


def token_reads(layout, topology):
    """bool (tokens, tokens) as the library resolves it, split into text and video."""
    dense = torch.from_numpy(token_plan(layout, topology).to_dense()) > 0
    n = layout.region_numel("text")
    assert dense[:n].all() and dense[:, :n].all(), "text reads all, all read text"
    return dense[n:, n:]


@pytest.mark.parametrize(("past", "future"), [(1, 0), (0, 0), (2, 1), (9, 9)])
def test_windows_of_frames(past, future):
    layout = cogvideox_layout(CONFIG, 32, 48, 17, text_tokens=3)
    reads = token_reads(layout, window_topology(past, future))
    t = torch.arange(5).repeat_interleave(6)
    offset = t[None] - t[:, None]
    assert torch.equal(reads, (offset >= -past) & (offset <= future))


def test_spatial_tiles_with_text_and_first_frame_global():
    layout = cogvideox_layout(CONFIG, 48, 64, 9, text_tokens=5)
    reads = token_reads(layout, tile_topology(2, 3))
    t, h, w = (x.flatten() for x in torch.meshgrid(torch.arange(3), torch.arange(3), torch.arange(4), indexing="ij"))
    tile = h // 2 * 10 + w // 3
    expected = (tile[None] == tile[:, None]) | (t[None] == 0) | (t[:, None] == 0)
    assert torch.equal(reads, expected)


@strategies.drawn
def declarations(rng):
    """A token layout with up to two more regions, at several rates, and a random topology on it."""
    layout = cogvideox_layout(CONFIG, 32, 48, 9, text_tokens=rng.choice([1, 2, 5]))
    regions = dict(layout.regions)
    for number in range(rng.randint(0, 2)):
        lows = [rng.randrange(size) for size in (3, 2, 3)]
        bounds = [bound for size, low in zip((3, 2, 3), lows) for bound in (low, rng.randint(low + 1, size))]
        regions[f"r{number}"] = RegionSpec(tuple(bounds), period=rng.randint(1, 3))
    layout = CanvasLayout(layout.T, layout.d_model, layout.spatial_shape, regions)
    return layout, strategies.random_topology(rng, layout)


@given(declarations())
def test_any_declaration_is_the_joint_matrix_over_text_and_video(declaration):
    layout, topology = declaration
    place = torch.cat([layout.region_index("text"), layout.region_index("video")])
    expected = oracle.joint_matrix(layout, topology)[place][:, place]
    alone = expected.sum(1) == 0
    expected[alone, alone] = 1.0
    plan = token_plan(layout, topology)
    assert plan.n_packed == plan.n_positions == len(place)
    torch.testing.assert_close(torch.from_numpy(plan.to_dense()), expected, rtol=1e-6, atol=0)


def test_wrong_windows_are_refused():
    with pytest.raises(ValueError, match="at least 0, got -1 and 0"):
        window_topology(-1)


def test_the_plan_of_a_full_size_block_is_small_and_quick():
    layout = cogvideox_layout(CONFIG, 480, 720, 49)
    plan = token_plan(layout, window_topology())
    frame, text, frames = 30 * 45, 226, 13
    pairs = text * (text + frames * frame) + frames * frame * text + (2 * frames - 1) * frame * frame
    assert plan.table.pairs == pairs and plan.n_positions == text + frames * frame
    assert len(plan.table.weight) < 100 and plan.in_canvas_order
    # the canvas that carries the text costs nothing: what no read uses is not packed
    assert compile_attention(layout, window_topology(), normalize="joint").n_packed == plan.n_positions
