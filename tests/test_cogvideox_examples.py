"""The CogVideoX examples at toy size: they learn, resume exactly, and take weights from a folder."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.cogvideox_models import diffusers

pytest.importorskip("accelerate", reason="the examples train with accelerate")
pytest.importorskip("safetensors", reason="the examples write safetensors")
pytest.importorskip("gymnasium", reason="the examples record their data with gymnasium")
pytest.importorskip("rich", reason="the examples show progress with rich")
pytest.importorskip("matplotlib", reason="the examples draw with matplotlib")

import safetensors.torch
from accelerate.state import AcceleratorState

from examples import graft_cogvideox, robot_data, train_robot

pytestmark = pytest.mark.filterwarnings(
    "ignore:attention computes:UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)


@pytest.fixture(autouse=True)
def toy_size(monkeypatch):
    for name, value in (("num_layers", 1), ("num_attention_heads", 2), ("attention_head_dim", 16)):
        monkeypatch.setitem(train_robot.TINY, name, value)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """A small data set of the examples' own kind, so that most runs need not record."""
    clips = robot_data.record("CartPole-v1", 4, 9, 32, 48, seed=1)
    assert clips.frames.shape == (4, 9, 32, 48, 3) and clips.actions.shape == (4, 9, 1)
    assert clips.frames.std() > 1 and set(np.unique(clips.actions)) == {0.0, 1.0}
    path = tmp_path_factory.mktemp("data") / "latents.npz"
    pooled = robot_data.pooled_latents(clips.frames)
    robot_data.save(path, latents=pooled.numpy(), actions=clips.actions.mean(1))
    assert [p.name for p in path.parent.iterdir()] == ["latents.npz"]
    return path


def run(out, latents, *options):
    AcceleratorState._reset_state(reset_partial_state=True)
    arguments = ["--out", str(out), "--steps", "4", "--save-every", "2", *options]
    if latents is not None:
        arguments += ["--latents", str(latents)]
    assert train_robot.main(arguments) == 0
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_pooled_latents_are_the_pictures():
    frames = np.random.default_rng(0).integers(0, 256, (2, 9, 16, 24, 3)).astype(np.uint8)
    latents = robot_data.pooled_latents(frames)
    assert latents.shape == (2, 3, 4, 2, 3)
    grey = torch.from_numpy(frames[:, ::4].astype(np.float64)).mean(-1)
    small = grey.reshape(2, 3, 4, 4, 6, 4).mean((3, 5)).float()
    shown = robot_data.pictures(latents)
    torch.testing.assert_close(shown, (small - small.min()) / (small.max() - small.min()), rtol=1e-4, atol=1e-5)


def test_pictures_that_are_too_small_are_named():
    with pytest.raises(ValueError, match="10 × 10 pixels cannot be averaged down to 16 × 8"):
        robot_data.shrink(np.zeros((10, 10, 3), np.uint8), 16, 8)


def test_training_records_learns_and_writes(tmp_path):
    log = run(tmp_path, None, "--clips", "2", "--steps", "6", "--freeze", "none")
    assert [entry["loops"] for entry in log] == [1, 1, 2, 2, 3, 3]
    assert log[-1]["diffusion"] < log[0]["diffusion"]
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {
        "CartPole-v1-2-0.npz", "metrics.jsonl", "loss.png", "samples.png", "loops.safetensors", "checkpoint"
    }  # fmt: skip


@pytest.mark.parametrize("freeze", ["full", "half"])
def test_a_resumed_run_is_an_uninterrupted_one(freeze, latents, tmp_path):
    options = ("--freeze", freeze, "--accumulate", "2", "--topology", "tiles", "--sharpen", "2.0")
    whole = run(tmp_path / "a", latents, *options)
    first = run(tmp_path / "b", latents, *options, "--stop-after", "2")
    assert first == whole[:2]
    again = run(tmp_path / "b", latents, *options, "--resume")
    assert again == whole
    a, b = (safetensors.torch.load_file(tmp_path / name / "loops.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert any(tensor.abs().sum() > 0 for name, tensor in a.items() if "loop_gate" in name)


def test_a_checkpoint_of_another_freeze_is_refused(latents, tmp_path):
    run(tmp_path, latents, "--freeze", "full", "--stop-after", "2")
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="trained with another --freeze"):
        train_robot.main(["--out", str(tmp_path), "--latents", str(latents), "--freeze", "half", "--resume"])


def test_mixed_precision_and_checkpointing(latents, tmp_path):
    options = ("--mixed-precision", "bf16", "--gradient-checkpointing", "--freeze", "full")
    log = run(tmp_path, latents, *options)
    exact = run(tmp_path / "float32", latents, "--freeze", "full")
    assert [e["diffusion"] for e in log] == pytest.approx([e["diffusion"] for e in exact], rel=0.05)


def test_weights_from_a_folder(tmp_path):
    torch.manual_seed(0)
    config = {**train_robot.TINY, "num_layers": 1, "use_rotary_positional_embeddings": True}
    diffusers.CogVideoXTransformer3DModel(**config).save_pretrained(tmp_path / "model" / "transformer")
    vae = diffusers.AutoencoderKLCogVideoX(
        in_channels=3, out_channels=3, latent_channels=4, layers_per_block=1, norm_num_groups=2, sample_height=64,
        sample_width=96, temporal_compression_ratio=4, block_out_channels=(4, 4, 4, 4),
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "model" / "vae")
    log = run(tmp_path / "out", None, "--model", str(tmp_path / "model"), "--clips", "2", "--topology", "dense")
    assert len(log) == 4
    folders = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "graft")]
    assert graft_cogvideox.main([*folders, "--size", "5", "32", "32", "--steps", "3"]) == 0


def test_the_tour_holds(tmp_path, capsys):
    assert graft_cogvideox.main(["--out", str(tmp_path), "--size", "9", "32", "48", "--steps", "6"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("holds") == 6 and "FAILS" not in shown and "same + previous frame" in shown
