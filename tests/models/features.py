"""What of diffusers works on grafted models: ``python -m tests.models.features`` writes docs/model_features.md.

A feature is a function of a tiny model's name, which holds the feature's outcome against the same model without it; a
refusal is named in REFUSALS, by what its error says.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from canvas_engineering.graft import graft_looped_blocks
from canvas_engineering.models import adapter_of, topologies
from tests.video_models import (
    BATCH,
    TINY,
    diffusers,
    error,
    inputs,
    layout_of,
    randomise_loops,
    run_with_gradients,
    tiny,
)

PATH = "docs/model_features.md"
INTRODUCTION = """# Features of diffusers

Every feature below runs on a tiny random model of each class, grafted with a topology and two trained loops unless it
says otherwise, and is held against the same model without the feature. A footnote: it is refused with an error that
says what its footnote says, or the stock model does not have it.

`python -m tests.models.features` writes this page from the outcomes that `tests/models` holds the models to.
"""
FEATURES: dict[str, Callable[[str], None]] = {}


def feature(title: str):
    def register(function):
        FEATURES[title] = function
        return function

    return register


def run(name: str, model: Any, dtype: torch.dtype = torch.float32, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**{**inputs(name, dtype), **options})[0]


def grafted(name: str, loops: int = 2, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = tiny(name, dtype)
    declared = topologies.window(layout_of(name, model))
    options = {"layout": declared[0], "topology": declared[1], "freeze": "none", **options}
    randomise_loops(graft_looped_blocks(model, 3, loops=loops, **options)[0])
    return model


def steps(name: str, model: Any, config: Any, count: int = 4) -> list[int]:
    """Attention calls of each of ``count`` steps of a sampler with a cache."""
    model.enable_cache(config)
    calls, per_step = [], []
    for _, attn in adapter_of(model).attentions(model):
        # what a hook skips is the forward, with its projections
        (attn.to_q if hasattr(attn, "to_q") else attn).register_forward_hook(lambda *_: calls.append(1))
    for _ in range(count):
        calls.clear()
        with model.cache_context("test"):
            run(name, model)
        per_step.append(len(calls))
    return per_step


# -- saving -----------------------------------------------------------------------------------------------------------


@feature("`save_pretrained`, `from_pretrained`, `torch.save`, copies")
def saving(name):
    model = grafted(name, sharpening=[1.0, 1.5, 2.0])
    expected = run(name, model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder)
        torch.save(model, f"{folder}/model.pt")
        again = torch.load(f"{folder}/model.pt", weights_only=False)
    assert type(model).__name__ == f"Looped{TINY[name].model_class}"
    for other in (loaded, again, copy.deepcopy(model)):
        assert torch.equal(run(name, other), expected)


@feature("`AutoModel.from_pretrained(folder, trust_remote_code=True)`")
def auto_model(name):
    model = grafted(name)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = diffusers.AutoModel.from_pretrained(folder, trust_remote_code=True)
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            diffusers.AutoModel.from_pretrained(folder)
    assert type(loaded) is type(model) and torch.equal(run(name, loaded), run(name, model))


@feature("`save_loop_checkpoint`, `load_loop_checkpoint`")
def loop_checkpoints(name):
    pytest.importorskip("safetensors", reason="loop checkpoints are safetensors files")
    from canvas_engineering import load_loop_checkpoint, save_loop_checkpoint

    model, fresh = grafted(name), tiny(name)
    declared = topologies.window(layout_of(name, fresh))
    other = graft_looped_blocks(fresh, 3, layout=declared[0], topology=declared[1])[0]
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/loops.safetensors"
        save_loop_checkpoint(adapter_of(model).blocks(model), None, path)
        load_loop_checkpoint(other, None, path)
        with pytest.raises(ValueError, match="the model null"):
            load_loop_checkpoint(graft_looped_blocks(tiny(name), 3)[0], None, path)
    assert torch.equal(run(name, fresh), run(name, model))


@feature("LoRA of the stock model (peft)")
def lora(name):
    peft = pytest.importorskip("peft", reason="LoRA files need peft")
    plain = tiny(name)
    plain.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "style")
    bare, model = run(name, tiny(name)), tiny(name)
    graft_looped_blocks(model, 3, loops=2)
    with tempfile.TemporaryDirectory() as folder:
        plain.save_lora_adapter(folder, adapter_name="style")
        file = {"weight_name": "pytorch_lora_weights.safetensors", "use_safetensors": True}
        model.load_lora_adapter(folder, prefix=None, adapter_name="style", **file)
    assert torch.equal(run(name, model), run(name, plain)) and not torch.equal(run(name, model), bare)
    model.delete_adapters("style")
    assert torch.equal(run(name, model), bare)


# -- training and compiling -------------------------------------------------------------------------------------------


def same_gradients(found, expected, prefix=""):
    largest = max(float(g.abs().max()) for g in expected.values())
    assert len(found) == len(expected)
    for parameter, value in expected.items():
        torch.testing.assert_close(found[f"{prefix}{parameter}"], value, rtol=1e-4, atol=1e-5 * largest)


@feature("`enable_gradient_checkpointing`")
def checkpointing(name):
    model = grafted(name, sharpening=[1.0, 1.5, 2.0]).train()
    out, expected = run_with_gradients(name, model, torch.float32)
    expected = {parameter: value.clone() for parameter, value in expected.items()}
    model.enable_gradient_checkpointing()
    again, gradients = run_with_gradients(name, model, torch.float32)
    assert torch.equal(out, again)
    same_gradients(gradients, expected)


@feature("`torch.compile(fullgraph=True)`, training")
def compiling(name):
    torch._dynamo.reset()
    model = grafted(name, sharpening=[1.0, 1.5, 2.0]).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    again, gradients = run_with_gradients(name, compiled, torch.float32)
    gradients = {parameter: value.clone() for parameter, value in gradients.items()}
    out, expected = run_with_gradients(name, model, torch.float32)
    torch.testing.assert_close(again, out)
    same_gradients(gradients, expected, "_orig_mod.")


@feature("batches of any size: one dynamic graph, packed or not")
def dynamic_batches(name):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, counter = grafted(name), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for copies in (1, 2, 3):
        given = inputs(name)
        given = {
            key: torch.cat([value] * copies) if isinstance(value, torch.Tensor) else value
            for key, value in given.items()
        }
        with torch.no_grad():
            out = compiled(**given)[0]
            torch.testing.assert_close(out, model(**given)[0])
        assert len(out) == copies * BATCH
    assert counter.frame_count == 2  # the first one has a size, the second any


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@feature("`compile_repeated_blocks`")
def regional_compilation(name):
    torch._dynamo.reset()
    model = grafted(name)
    expected = run(name, model)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert all(block._compiled_call_impl is not None for block in adapter_of(model).blocks(model))
    torch.testing.assert_close(run(name, model), expected)


@feature("`fuse_qkv_projections`")
def fused_projections(name):
    model = grafted(name)
    expected = run(name, model)
    model.fuse_qkv_projections()
    torch.testing.assert_close(run(name, model), expected)
    model.unfuse_qkv_projections()
    assert torch.equal(run(name, model), expected)


# -- memory -----------------------------------------------------------------------------------------------------------


@feature("`enable_layerwise_casting` to float8")
def layerwise_casting(name):
    model = grafted(name)
    expected = run(name, model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    small = [p for p in model.parameters() if p.dtype == torch.float8_e4m3fn]
    assert small and all(p.dtype == torch.float32 for key, p in model.named_parameters() if ".loop." in key)
    assert 0 < error(run(name, model), expected) < 0.5


@feature("`enable_group_offload`, by block and by leaf")
def group_offload(name):
    for options in ({"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}):
        model = grafted(name)
        expected = run(name, model)
        model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), **options)
        assert torch.equal(run(name, model), expected)


@feature("accelerate's `cpu_offload`")
def cpu_offload(name):
    accelerate = pytest.importorskip("accelerate", reason="CPU offload needs accelerate")
    model = grafted(name)
    expected = run(name, model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(run(name, model), expected)


@feature("bfloat16 and float16, with float32 loop parameters")
def half_precision(name):
    for dtype in (torch.bfloat16, torch.float16):
        model = grafted(name, dtype=dtype)
        out = run(name, model, dtype)
        assert out.dtype == dtype and torch.isfinite(out).all()
        assert all(p.dtype == torch.float32 for key, p in model.named_parameters() if ".loop." in key)


# -- attention backends and caches ------------------------------------------------------------------------------------


@feature('`set_attention_backend("native")`')
def native_backend(name):
    model = grafted(name)
    expected = run(name, model)
    model.set_attention_backend("native")
    assert torch.equal(run(name, model), expected)
    model.reset_attention_backend()
    assert torch.equal(run(name, model), expected)


@feature("`set_attention_backend` of another kernel")
def other_backend(name):
    model = grafted(name)
    for _, attn in adapter_of(model).attentions(model):
        attn.processor._attention_backend = "flash"  # as the method does where the kernel is installed
    run(name, model)


@feature("first-block cache, any number of loops")
def first_block_cache(name):
    cached = steps(name, grafted(name), diffusers.FirstBlockCacheConfig(threshold=1e9))
    plain = steps(name, tiny(name), diffusers.FirstBlockCacheConfig(threshold=1e9))
    assert cached == [2 * count for count in plain] and cached[1] < cached[0]


def broadcast():
    return diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
    )


@feature("pyramid attention broadcast, one loop")
def pyramid_attention_broadcast(name):
    assert steps(name, grafted(name, loops=1), broadcast()) == steps(name, tiny(name), broadcast())


@feature("pyramid attention broadcast, FasterCache and TaylorSeer, several loops")
def counting_caches(name):
    configs = [
        diffusers.FasterCacheConfig(current_timestep_callback=lambda: 500, tensor_format="BFCHW"),
        diffusers.TaylorSeerCacheConfig(),
        broadcast(),
    ]
    for config in configs[:-1]:
        with pytest.raises(
            ValueError, match=REFUSALS["pyramid attention broadcast, FasterCache and TaylorSeer, several loops"][0]
        ):
            grafted(name).enable_cache(config)
    model = grafted(name, loops=1)
    model.enable_cache(broadcast())
    for set_loops in (model.set_loops, adapter_of(model).blocks(model)[0].set_loops):
        with pytest.raises(ValueError, match="has the cache 'pyramid_attention_broadcast'"):
            set_loops(2)
    grafted(name).enable_cache(configs[-1])


@feature("tokens in packed order (`packed=True`)")
def packed_order(name):
    model, other = grafted(name, packed=True), grafted(name, packed=False)
    torch.testing.assert_close(run(name, model), run(name, other), rtol=1e-4, atol=1e-5)


# -- the table --------------------------------------------------------------------------------------------------------

BACKEND = ("canvas attention has backends of its own", "canvas attention has kernels of its own: `backend=`")
COUNTS = (
    "counts every call inside of a block as a step",
    "these caches take every call inside of a block for a step: use one loop, the first-block cache or MagCache",
)
PACKED = (
    "packed=True: tokens of .* stay in raster order",
    "these models make something for each token inside of their forward: tokens stay in raster order",
)
# by feature, or by (model, feature)
REFUSALS: dict[Any, tuple[str, str]] = {
    "`set_attention_backend` of another kernel": BACKEND,
    "pyramid attention broadcast, FasterCache and TaylorSeer, several loops": COUNTS,
    **{(name, "tokens in packed order (`packed=True`)"): PACKED for name in TINY if name != "cogvideox"},
    ("mochi", "`fuse_qkv_projections`"): (
        "has no attribute 'fuse_qkv_projections'",
        "diffusers' Mochi has no such method",
    ),
}


def refusal(name: str, title: str) -> tuple[str, str] | None:
    """(what the error says, the same for the table) of a feature of a model, or None where it works."""
    return REFUSALS.get((name, title)) or REFUSALS.get(title)


def document() -> str:
    """The page: a row for each feature, a column for models of equal outcomes, and footnotes."""
    columns: dict[tuple, list[str]] = {}
    for name in TINY:
        columns.setdefault(tuple(refusal(name, title) for title in FEATURES), []).append(name)
    notes = list(dict.fromkeys(each[1] for outcomes in columns for each in outcomes if each is not None))
    lines = [["", *(", ".join(names) for names in columns.values())], ["---"] + ["---"] * len(columns)]
    for title, outcomes in zip(FEATURES, zip(*columns)):
        marks = ["yes" if each is None else f"no [^{notes.index(each[1]) + 1}]" for each in outcomes]
        lines.append([title, *marks])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    footnotes = "".join(f"\n[^{number}]: {note}.\n" for number, note in enumerate(notes, 1))
    return f"{INTRODUCTION}\n{table}\n{footnotes}"


if __name__ == "__main__":
    (Path(__file__).parents[2] / PATH).write_text(document())
