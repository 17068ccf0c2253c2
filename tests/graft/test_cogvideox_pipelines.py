"""Grafted transformers in CogVideoX's own pipelines, with guidance, from saved folders, on tiny random models."""

from __future__ import annotations

import warnings

import pytest
import torch

from canvas_engineering.cogvideox import cogvideox_layout, dense_topology, window_topology
from canvas_engineering.graft import graft_looped_blocks
from tests.cogvideox_models import KINDS, TEXT, diffusers, randomise_loops, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def tiny_vae():
    torch.manual_seed(5)
    return diffusers.AutoencoderKLCogVideoX(
        in_channels=3, out_channels=3, latent_channels=4, layers_per_block=1, norm_num_groups=2, sample_height=64,
        sample_width=64, temporal_compression_ratio=4, block_out_channels=(4, 4, 4, 4),
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
    ).eval()  # fmt: skip


def pipeline_of(transformer, image_to_video=False):
    cls = diffusers.CogVideoXImageToVideoPipeline if image_to_video else diffusers.CogVideoXPipeline
    pipe = cls(
        tokenizer=None, text_encoder=None, vae=tiny_vae(), transformer=transformer,
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, **options):
    g = torch.Generator().manual_seed(6)
    embeds = {name: torch.randn(1, TEXT, 12, generator=g) for name in ("prompt_embeds", "negative_prompt_embeds")}
    with torch.no_grad():
        return pipe(
            **embeds, height=64, width=64, num_frames=13, num_inference_steps=2, guidance_scale=4.0,
            output_type="latent", generator=torch.Generator().manual_seed(7), **options,
        ).frames  # fmt: skip


def graft(model, topology, **options):
    layout = cogvideox_layout(model.config, 64, 64, 13)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return graft_looped_blocks(model, 3, layout=layout, topology=topology, **options)[0]


@pytest.mark.parametrize("kind", KINDS[:2])
def test_text_to_video_with_guidance(kind):
    expected = sample(pipeline_of(tiny_model(kind)))
    looped = tiny_model(kind)
    graft_looped_blocks(looped, 3, loops=3)
    assert torch.equal(sample(pipeline_of(looped)), expected)
    dense = tiny_model(kind)
    graft(dense, dense_topology(), loops=3)
    torch.testing.assert_close(sample(pipeline_of(dense)), expected, rtol=1e-3, atol=1e-4)
    sparse = tiny_model(kind)
    graft(sparse, window_topology(0), loops=3)
    out = sample(pipeline_of(sparse))
    assert torch.isfinite(out).all() and not torch.allclose(out, expected, rtol=1e-3, atol=1e-3)


def test_image_to_video():
    def model():
        return tiny_model("5b", in_channels=8)

    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(8))
    expected = sample(pipeline_of(model(), True), image=image)
    dense = model()
    graft(dense, dense_topology(), loops=2)
    torch.testing.assert_close(sample(pipeline_of(dense, True), image=image), expected, rtol=1e-3, atol=1e-4)


def test_cogvideox_1_5_pads_frames_as_the_layout_does():
    # 9 frames are 3 latent frames, which pairs of frames do not divide: the pipeline adds one in front.
    model = tiny_model("1.5", ofs_embed_dim=None)
    layout = cogvideox_layout(model.config, 64, 64, 9)
    with pytest.warns(UserWarning, match="computes"):
        graft_looped_blocks(model, 3, loops=2, layout=layout, topology=window_topology())
    pipe = pipeline_of(model)
    g = torch.Generator().manual_seed(6)
    embeds = {name: torch.randn(1, TEXT, 12, generator=g) for name in ("prompt_embeds", "negative_prompt_embeds")}
    with torch.no_grad():
        video = pipe(
            **embeds, height=64, width=64, num_frames=9, num_inference_steps=1, output_type="latent", guidance_scale=3.0
        ).frames
    assert layout.T == 2 and video.shape[1] == 4 and torch.isfinite(video).all()


def test_a_saved_pipeline_comes_back_with_its_loops(tmp_path):
    model = tiny_model("5b")
    randomise_loops(graft(model, window_topology(), loops=3, sharpening=[1.0, 1.5, 2.0]))
    pipe = pipeline_of(model)
    expected = sample(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.CogVideoXPipeline.from_pretrained(tmp_path, tokenizer=None, text_encoder=None)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.transformer).__name__ == "LoopedCogVideoXTransformer3DModel"
    assert [block.loops for block in loaded.transformer.transformer_blocks] == [3, 3]
    assert torch.equal(sample(loaded), expected)


def test_a_pipeline_loads_plain_lora_files(tmp_path):
    peft = pytest.importorskip("peft", reason="LoRA files need peft")
    plain = tiny_model("5b")
    # a file without alphas is read with alpha = rank
    plain.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = peft.get_peft_model_state_dict(plain)
    diffusers.CogVideoXPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    dense, expected = sample(pipeline_of(tiny_model("5b"))), sample(pipeline_of(plain))
    model = tiny_model("5b")
    graft_looped_blocks(model, 3, loops=2)
    pipe = pipeline_of(model)
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(sample(pipe), expected) and not torch.equal(expected, dense)
    pipe.fuse_lora(components=["transformer"])
    torch.testing.assert_close(sample(pipe), expected, rtol=1e-3, atol=1e-4)
    pipe.unfuse_lora(components=["transformer"])
    pipe.unload_lora_weights()
    torch.testing.assert_close(sample(pipe), dense, rtol=1e-3, atol=1e-4)


def test_another_pipeline_takes_the_transformer_by_name():
    model = tiny_model("5b")
    graft(model, window_topology(), loops=2)
    pipe = pipeline_of(model)
    # diffusers compares classes: without the name it would look for the stock one
    other = diffusers.CogVideoXVideoToVideoPipeline.from_pipe(
        pipe, transformer=pipe.transformer, tokenizer=None, text_encoder=None
    )
    assert other.transformer is model and other.vae is pipe.vae
