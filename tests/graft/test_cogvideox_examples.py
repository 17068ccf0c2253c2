"""The CogVideoX examples at toy size: they learn, resume exactly, and take weights from a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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
        "CartPole-v1-2-17x64x96-0.npz", "metrics.jsonl", "loss.png", "samples.png", "loops.safetensors", "checkpoint"
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


def test_lora_trains_beside_loops_and_loads_into_a_pipelines_model(latents, tmp_path):
    options = ("--freeze", "full", "--lora", "2", "--topology", "window")
    whole = run(tmp_path / "a", latents, *options)
    run(tmp_path / "b", latents, *options, "--stop-after", "2")
    assert run(tmp_path / "b", latents, *options, "--resume") == whole
    layers = safetensors.torch.load_file(tmp_path / "a/pytorch_lora_weights.safetensors")
    assert any(tensor.abs().sum() > 0 for name, tensor in layers.items() if "lora_B" in name)
    plain = diffusers.CogVideoXTransformer3DModel(**train_robot.TINY)
    plain.load_lora_adapter(layers)
    assert plain.peft_config


def test_a_checkpoint_of_another_freeze_is_refused(latents, tmp_path):
    run(tmp_path, latents, "--freeze", "full", "--stop-after", "2")
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match=r"trained with another --freeze.* do not share [0-9]+ parameters"):
        train_robot.main(["--out", str(tmp_path), "--latents", str(latents), "--freeze", "half", "--resume"])


def test_a_run_that_ends_amid_its_checkpoint_leaves_the_one_before(latents, tmp_path, monkeypatch):
    options = ("--steps", "3", "--save-every", "1")
    whole = run(tmp_path / "a", latents, *options)
    replace, calls = train_robot.os.replace, []

    def power_cut(source, target):
        calls.append(Path(target).name)
        if calls.count("checkpoint") == 2:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_robot.os, "replace", power_cut)
        run(tmp_path / "b", latents, *options)
    assert run(tmp_path / "b", latents, *options, "--resume") == whole


def test_mixed_precision_and_checkpointing(latents, tmp_path):
    options = ("--mixed-precision", "bf16", "--gradient-checkpointing", "--freeze", "full")
    log = run(tmp_path, latents, *options)
    exact = run(tmp_path / "float32", latents, "--freeze", "full")
    assert [e["diffusion"] for e in log] == pytest.approx([e["diffusion"] for e in exact], rel=0.05)


@pytest.mark.parametrize("version", ["1.0", "1.5"])
def test_weights_from_a_folder(version, tmp_path):
    torch.manual_seed(0)
    config = {**train_robot.TINY, "num_layers": 1, "use_rotary_positional_embeddings": True}
    if version == "1.5":  # which joins frames in pairs: the 5 latent frames of 17 become 6
        config |= {"patch_size_t": 2, "patch_bias": False, "ofs_embed_dim": 64}
    diffusers.CogVideoXTransformer3DModel(**config).save_pretrained(tmp_path / "model" / "transformer")
    vae = diffusers.AutoencoderKLCogVideoX(
        in_channels=3, out_channels=3, latent_channels=4, layers_per_block=1, norm_num_groups=2, sample_height=64,
        sample_width=96, temporal_compression_ratio=4, block_out_channels=(4, 4, 4, 4),
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "model" / "vae")
    folder = ["--model", str(tmp_path / "model")]
    topology, size = ("window", ["17", "32", "48"]) if version == "1.5" else ("dense", ["17", "64", "96"])
    log = run(tmp_path / "out", None, *folder, "--clips", "2", "--topology", topology, "--size", *size)
    assert len(log) == 4
    tour = [*folder, "--out", str(tmp_path / "graft")]
    assert graft_cogvideox.main([*tour, "--size", "5", "32", "32", "--steps", "3"]) == 0


def test_latents_are_fitted_to_the_model():
    latents = torch.randn(2, 5, 4, 2, 3)
    config = diffusers.configuration_utils.FrozenDict(in_channels=4, patch_size_t=2)
    fitted = train_robot.fitted(latents, config)
    assert torch.equal(fitted[:, 0], latents[:, 0]) and torch.equal(fitted[:, 1:], latents)
    one = diffusers.configuration_utils.FrozenDict(in_channels=4, patch_size_t=None)
    assert torch.equal(train_robot.fitted(latents, one), latents)
    with pytest.raises(ValueError, match="the model takes 4 latent channels, the data has 8"):
        train_robot.fitted(torch.randn(2, 5, 8, 2, 3), config)


def test_mujoco_is_drawn():
    pytest.importorskip("mujoco", reason="MuJoCo's environments need the extra mujoco")
    clips = robot_data.record("Pusher-v5", 1, 5, 32, 48, seed=1)
    assert clips.actions.shape == (1, 5, 7) and clips.actions.std() > 0.01
    assert clips.frames.shape == (1, 5, 32, 48, 3) and clips.frames[0, 0].std() > 1
    assert (clips.frames[0, 0] != clips.frames[0, -1]).any()


@pytest.mark.parametrize(
    ("name", "wanted"), [("Pusher-v5", r"canvas-engineering\[mujoco\], and EGL"), ("CartPole-v1", "gymnasium's")]
)
def test_what_cannot_be_drawn_says_what_is_missing(name, wanted, monkeypatch):
    import gymnasium

    def broken(*_, **__):
        raise ImportError("no such library")

    monkeypatch.setattr(gymnasium, "make", broken)
    with pytest.raises(RuntimeError, match=rf"{name} cannot be drawn here \(ImportError: no such library\).*{wanted}"):
        robot_data.record(name, 1, 5, 32, 48, seed=1)


def test_the_tour_holds(tmp_path, capsys):
    assert graft_cogvideox.main(["--out", str(tmp_path), "--size", "9", "32", "48", "--steps", "6"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("holds") == 6 and "FAILS" not in shown and "same + previous frame" in shown


TORCHRUN = """
import sys
from examples import train_robot
train_robot.TINY.update(num_layers=1, num_attention_heads=2, attention_head_dim=16)
sys.exit(train_robot.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_samples_and_losses_do_not_depend_on_the_number_of_processes(tmp_path, latents):
    (tmp_path / "run.py").write_text(TORCHRUN)
    options = ["--latents", str(latents), "--batch", "4", "--steps", "4", "--save-every", "2", "--freeze", "none"]

    def losses(processes, name, *further):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command += [str(tmp_path / "run.py"), "--out", str(tmp_path / name), *options, *further]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("wrote") == 1  # the main process alone speaks
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return np.array([[row["diffusion"], row["action"]] for row in rows])

    one = losses(1, "one")
    np.testing.assert_allclose(losses(2, "two"), one, rtol=1e-4)
    losses(2, "cut", "--stop-after", "2")
    np.testing.assert_allclose(losses(1, "cut", "--resume"), one, rtol=1e-4)
