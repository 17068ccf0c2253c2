"""The recipes of examples/finetune_video.py: each learns, and what it saves loads again."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers", reason="the example trains a model of diffusers")

from examples import finetune_video

pytestmark = pytest.mark.filterwarnings("ignore:attention computes .* of all token pairs")


@pytest.mark.parametrize("recipe", ["lora", "loops", "full"])
def test_recipes_learn_and_save(recipe, tmp_path):
    if recipe == "lora":
        pytest.importorskip("peft", reason="LoRA needs peft")
    before, after = finetune_video.main([recipe, "--steps", "20", "--out", str(tmp_path), "--size", "5", "32", "32"])
    assert after < before
    if recipe == "lora":
        model = finetune_video.load(None)
        file = {"weight_name": "pytorch_lora_weights.safetensors", "use_safetensors": True}
        model.load_lora_adapter(tmp_path / "lora", prefix=None, **file)
        assert any("lora" in name for name, _ in model.named_parameters())
        return
    from canvas_engineering.models import LoopedWanTransformer3DModel

    loaded = LoopedWanTransformer3DModel.from_pretrained(tmp_path / recipe)
    assert loaded.config.canvas is not None and loaded.blocks[0].loops == (3 if recipe == "loops" else 1)
    assert loaded.blocks[0].loop_gate.abs().sum() > 0


@pytest.mark.parametrize("topology", finetune_video.TOPOLOGIES)
def test_sampling_compares_dense_and_sparse(topology, capsys):
    finetune_video.main(["sample", "--steps", "2", "--topology", topology, "--size", "17", "64", "64"])
    said = capsys.readouterr().out
    assert "of all pairs" in said and "dense: " in said and "sparse: " in said
    assert torch.isfinite(torch.tensor(float(said.split()[0])))
