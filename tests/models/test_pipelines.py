"""Grafted transformers in diffusers' pipelines, on tiny random models: the bits or the numbers of the stock one."""

from __future__ import annotations

import pytest
import torch

from canvas_engineering.graft import graft_looped_blocks
from canvas_engineering.models import set_canvas_attention, topologies
from tests.video_models import TEXT, diffusers, error, layout_of, tiny

pytestmark = pytest.mark.filterwarnings(
    "ignore:attention computes .* of all token pairs",  # a graft says so, rightly
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:In CPU autocast, but the target dtype",  # Mochi's own
)
FLOW = diffusers.FlowMatchEulerDiscreteScheduler


def embeds(dim, batch=1):
    g = torch.Generator().manual_seed(6)
    return {name: torch.randn(batch, TEXT, dim, generator=g) for name in ("prompt_embeds", "negative_prompt_embeds")}


def wan(transformer):
    vae = diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                                     temperal_downsample=[False, True, True])  # fmt: skip
    pipe = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, transformer=transformer, vae=vae, scheduler=FLOW(shift=7.0)
    )
    return pipe, {**embeds(16), "height": 64, "width": 64, "num_frames": 9, "guidance_scale": 3.0}


def ltx(transformer):
    vae = diffusers.AutoencoderKLLTXVideo(
        in_channels=3, out_channels=3, latent_channels=8, block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8), layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1), encoder_causal=True, decoder_causal=False,
        spatio_temporal_scaling=(True, True, True, False),
        decoder_spatio_temporal_scaling=(True, True, True, False),
    )  # fmt: skip
    pipe = diffusers.LTXPipeline(tokenizer=None, text_encoder=None, transformer=transformer, vae=vae, scheduler=FLOW())
    mask = torch.ones(1, TEXT, dtype=torch.bool)
    masks = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
    return pipe, {**embeds(16), **masks, "height": 128, "width": 128, "num_frames": 17, "guidance_scale": 3.0}


PIPELINES = {"wan": wan, "ltx": ltx}


def sample(name, transformer):
    pipe, options = PIPELINES[name](transformer)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        return pipe(
            **options, num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(7)
        ).frames


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_take_grafted_transformers(name):
    config = {"in_channels": 16, "out_channels": 16} if name == "wan" else {}
    expected = sample(name, tiny(name, **config))
    model = tiny(name, **config)
    graft_looped_blocks(model, 3, loops=2)
    assert torch.equal(sample(name, model), expected)
    dense, sparse = tiny(name, **config), tiny(name, **config)
    set_canvas_attention(dense, *topologies.dense(layout_of(name, dense)))
    assert error(sample(name, dense), expected) < 1e-3
    declared = topologies.window(layout_of(name, sparse), 0)
    graft_looped_blocks(sparse, 3, loops=2, layout=declared[0], topology=declared[1])
    out = sample(name, sparse)
    assert torch.isfinite(out).all() and error(out, expected) > 1e-3
