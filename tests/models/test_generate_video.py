"""The example that generates videos: by a small CogVideoX, and by a Wan pipeline from a folder."""

from __future__ import annotations

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="pipelines are diffusers'")
transformers = pytest.importorskip("transformers", reason="text encoders are transformers'")
pytest.importorskip("av", reason="videos are written by PyAV (extra data)")

from examples import generate_video, train_robot  # noqa: E402


@pytest.mark.parametrize("topology", ["dense", *generate_video.TOPOLOGIES])
def test_every_topology_makes_a_video(topology, tmp_path, capsys):
    out = tmp_path / "video.mp4"
    options = ["--topology", topology, "--steps", "2", "--out", str(out)]
    assert generate_video.main(options) == 0
    assert out.stat().st_size > 500
    assert ("of all pairs of tokens" in capsys.readouterr().out) == (topology != "dense")


def test_dense_steps_come_first_and_the_pipeline_is_left_as_it_was():
    pipe = generate_video.tiny_pipeline()
    before = pipe.transformer.attn_processors
    kinds = []
    pipe.transformer.transformer_blocks[0].register_forward_pre_hook(
        lambda block, _: kinds.append(type(block.attn1.processor).__name__)
    )
    options = generate_video.arguments(["--steps", "4", "--dense", "3"])
    options.text_tokens = 4
    video = generate_video.generate(pipe, options)
    assert video.shape == (9, 32, 48, 3)
    assert kinds == ["CogVideoXAttnProcessor2_0"] * 3 + ["CanvasAttnProcessor"]
    assert {name: type(p) for name, p in pipe.transformer.attn_processors.items()} == {
        name: type(p) for name, p in before.items()
    }


def test_a_wan_pipeline_from_a_folder(tmp_path, capsys):
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip
    config = transformers.UMT5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    pipe = diffusers.WanPipeline(
        tokenizer=transformers.ByT5Tokenizer(),
        text_encoder=transformers.UMT5EncoderModel(config).eval(),
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer=transformer,
    )
    pipe.save_pretrained(tmp_path / "wan")
    options = ["--model", str(tmp_path / "wan"), "--size", "9", "32", "48", "--topology", "radial", "--steps", "2"]
    assert generate_video.main([*options, "--out", str(tmp_path / "video.mp4")]) == 0
    assert (tmp_path / "video.mp4").stat().st_size > 500 and "radial" in capsys.readouterr().out


def test_lora_of_the_training_example_loads(tmp_path):
    layers = {}
    for name, parameter in generate_video.load_transformer("tiny").named_parameters():
        if name.endswith(tuple(f"attn1.{target}.weight" for target in train_robot.LORA_TARGETS)):
            stem = name.removesuffix(".weight")
            layers[f"{stem}.lora_A.weight"] = torch.randn(2, parameter.shape[1])
            layers[f"{stem}.lora_B.weight"] = torch.randn(parameter.shape[0], 2)
    diffusers.CogVideoXPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    options = generate_video.arguments(["--steps", "1"])
    options.text_tokens = 4
    plain, tuned = generate_video.tiny_pipeline(), generate_video.tiny_pipeline()
    tuned.load_lora_weights(tmp_path)
    assert (generate_video.generate(plain, options) != generate_video.generate(tuned, options)).any()
