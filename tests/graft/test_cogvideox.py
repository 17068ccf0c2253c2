"""Looped CogVideoX: the backbone's bits and names, the recurrence, saving, and every feature of diffusers."""

from __future__ import annotations

import copy
import logging
import re

import pytest
import torch
from torch import nn

from canvas_engineering.cogvideox import LoopedCogVideoXBlock, detect_inner_dim
from canvas_engineering.graft import graft_looped_blocks, ungraft
from canvas_engineering.looped_block import LoopedBlockWrapper
from tests.cogvideox_models import FRAMES, KINDS, TEXT, diffusers, inputs, randomise_loops, tiny_model

Plain = diffusers.CogVideoXTransformer3DModel
LOOP_NAMES = {f"transformer_blocks.{i}.loop.{p}" for i in (0, 1) for p in ("loop_emb", "loop_emb_enc", "loop_gate")}


def looped_class():
    from canvas_engineering.cogvideox import LoopedCogVideoXTransformer3DModel

    return LoopedCogVideoXTransformer3DModel


def trained(kind="2b", loops=3, num_layers=2, **options):
    """A grafted model with random loop parameters."""
    model = tiny_model(kind, num_layers=num_layers)
    blocks, _ = graft_looped_blocks(model, 3, loops=loops, **options)
    randomise_loops(blocks)
    return model


def version(text):
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def run(model, kind="2b", **options):
    return model(**inputs(kind, **options))[0]


@pytest.fixture
def process_group():
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# -- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_a_graft_is_its_backbone_bit_for_bit(kind, dtype, training):
    plain = tiny_model(kind).to(dtype).train(training)
    model = copy.deepcopy(plain)
    graft_looped_blocks(model, 3, loops=1)
    expected = run(plain, kind, dtype=dtype)
    for loops in (1, 2, 3):
        model.set_loops(loops)
        out = run(model, kind, dtype=dtype)
        assert out.dtype == dtype and torch.equal(out, expected)
    with torch.no_grad():
        model.transformer_blocks[1].loop_gate[2] = 0.5
    assert not torch.equal(run(model, kind, dtype=dtype), expected)


@pytest.mark.parametrize("gate", ["tanh", "sigmoid"])
def test_blocks_compute_the_recurrence_on_both_streams(gate):
    plain = tiny_model("5b").transformer_blocks[0].double()
    looped = LoopedCogVideoXBlock(plain, 0, 3, 32, gate)
    randomise_loops([looped])
    looped.set_loops(3)
    g = torch.Generator().manual_seed(5)
    video, text = (torch.randn(2, n, 32, generator=g, dtype=torch.float64) for n in (9, 5))
    temb = torch.randn(2, 8, generator=g, dtype=torch.float64)
    angle = torch.randn(9, 16, generator=g)
    rope = (angle.cos(), angle.sin())
    out = looped(video, text, temb, rope)
    for l in range(3):
        new = plain(video + looped.loop_emb[l], text + looped.loop_emb_enc[l], temb, rope)
        value = looped.loop_gate[l]
        c = torch.sigmoid(value) if gate == "sigmoid" else (l == 0) + torch.tanh(value)
        video, text = (h + c * (n - h) for h, n in zip((video, text), new))
    torch.testing.assert_close(out, (video, text), rtol=1e-12, atol=1e-12)


def test_345690_parameters_train_on_the_2b_model_with_three_loops():
    with torch.device("meta"):
        model = Plain(num_layers=30, num_attention_heads=30, attention_head_dim=64)
    backbone = sum(p.numel() for p in model.parameters())
    blocks, head = graft_looped_blocks(model, 3, wrapper_class=LoopedCogVideoXBlock, loops=3)
    assert backbone > 1.6e9 and len(blocks) == 30 and next(head.parameters()).is_meta
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 345_690
    assert sum(block.trainable_params() for block in blocks) == 345_690


def test_a_grafted_model_says_how_often_it_loops():
    model = tiny_model()
    blocks, _ = graft_looped_blocks(model, max_loops=3)
    assert repr(model).count("1 of 3 loops") == len(blocks)
    model.set_loops(3)
    assert repr(model).count("3 of 3 loops") == len(blocks)


def test_the_published_constructor_shares_the_blocks_modules():
    plain = tiny_model().transformer_blocks[1]
    block = LoopedCogVideoXBlock(plain, 1, 4, 32)
    assert block.attn1 is plain.attn1 and "loop" not in dict(plain.named_children())
    assert type(plain).__name__ == "CogVideoXBlock" and block.trainable_params() == 4 * (2 * 32 + 1)
    assert (block.max_loops, block.loops, block.block_idx) == (4, 1, 1)
    block.set_loops(7)
    assert block.loops == 4 and "4 of 4 loops" in repr(block)
    with pytest.raises(ValueError, match="block 1 loops already"):
        LoopedCogVideoXBlock(block, 1, 4, 32)


def test_inner_dim_is_found():
    assert detect_inner_dim(tiny_model()) == 32
    assert detect_inner_dim(nn.Sequential(nn.LayerNorm(24))) == 24
    with pytest.raises(ValueError, match="hidden size of Linear cannot be inferred"):
        detect_inner_dim(nn.Linear(2, 2))


# -- names, config, undoing -------------------------------------------------------------------------------------------


def test_names_processors_and_config_of_the_backbone_stay():
    plain = tiny_model()
    model = copy.deepcopy(plain)
    graft_looped_blocks(model, 3, loops=2)
    assert list(plain.state_dict()) == [name for name in model.state_dict() if name not in LOOP_NAMES]
    assert set(model.state_dict()) == set(plain.state_dict()) | LOOP_NAMES
    assert list(model.attn_processors) == list(plain.attn_processors)
    assert {**model.config, **plain.config} == dict(model.config)
    assert {name: value for name, value in model.config.items() if name not in plain.config} == {
        "max_loops": 3,
        "loops": 2,
        "gate": "tanh",
        "sharpening": None,
        "canvas": None,
        "backend": "auto",
        "packed": False,
    }


def test_plain_checkpoints_load_onto_a_grafted_model():
    other = tiny_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    model = trained()
    gates = [block.loop_gate.clone() for block in model.transformer_blocks]
    model.load_state_dict(other.state_dict())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in other.state_dict().items())
    assert all(torch.equal(block.loop_gate, gate) for block, gate in zip(model.transformer_blocks, gates))


@pytest.mark.parametrize("fuse", [False, True])
def test_ungraft_restores_the_plain_model(fuse):
    plain = tiny_model("5b")
    plain.proj_out.weight.requires_grad_(False)
    model = copy.deepcopy(plain)
    if fuse:
        model.fuse_qkv_projections()
        plain.fuse_qkv_projections()
    processors = model.attn_processors
    blocks, _ = graft_looped_blocks(model, 3, loops=3)
    randomise_loops(blocks)
    assert ungraft(model) is model and ungraft(model) is model
    assert type(model) is Plain
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert model.config == plain.config
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in plain.parameters()]
    assert {n: type(p) for n, p in model.attn_processors.items()} == {n: type(p) for n, p in processors.items()}
    assert set(vars(model)) == set(vars(plain))
    assert set(vars(model.transformer_blocks[0])) == set(vars(plain.transformer_blocks[0]))
    assert torch.equal(run(model, "5b"), run(plain, "5b"))


def test_grafting_twice_is_grafting_once():
    model = tiny_model()
    first, _ = graft_looped_blocks(model, 3, loops=2)
    again, _ = graft_looped_blocks(model, 3, loops=3)
    assert all(a is b for a, b in zip(first, again)) and again[0].loops == 3
    with pytest.raises(ValueError, match=r"grafted with max_loops=3, gate='tanh'; requested max_loops=4"):
        graft_looped_blocks(model, 4, loops=3)


def test_grafting_again_keeps_the_attention_unless_another_is_asked_for():
    model = tiny_model()
    graft_looped_blocks(model, 3, loops=2, sharpening=[1.0, 2.0, 3.0])
    processor = model.transformer_blocks[0].attn1.processor
    blocks, _ = graft_looped_blocks(model, 3, loops=2)
    assert blocks[0].sharpening == [1.0, 2.0, 3.0] and blocks[0].attn1.processor is processor
    graft_looped_blocks(model, 3, loops=2, sharpening=[1.0, 1.0, 1.0])
    assert blocks[0].sharpening == [1.0, 1.0, 1.0]


def test_subclasses_by_others_loop_in_place_with_a_warning():
    class Theirs(Plain):
        pass

    model = tiny_model()
    model.__class__ = Theirs
    expected = run(model)
    with pytest.warns(UserWarning, match="save_pretrained does not know it"):
        blocks, _ = graft_looped_blocks(model, 3, loops=3, wrapper_class=LoopedCogVideoXBlock)
    assert all(type(block) is LoopedCogVideoXBlock for block in blocks) and torch.equal(run(model), expected)
    randomise_loops(blocks)
    assert not torch.equal(run(model), expected)
    assert type(ungraft(model)) is Theirs and torch.equal(run(model), expected)
    assert type(model.transformer_blocks[0]).__name__ == "CogVideoXBlock"


def test_freezing_a_graft():
    for freeze, expected in (("full", LOOP_NAMES), ("none", None), ("half", None)):
        model = tiny_model()
        graft_looped_blocks(model, 3, loops=1, freeze=freeze)
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        everything = {name for name, _ in model.named_parameters()}
        patch = {name for name in everything if "patch_embed" in name}
        assert patch and trainable == {"full": expected, "none": everything, "half": everything - patch}[freeze]


# -- saving -----------------------------------------------------------------------------------------------------------


def test_saving_round_trips_with_loops(tmp_path):
    model = trained("5b", loops=2, gate="sigmoid")
    model.transformer_blocks[1].set_loops(3)  # as a curriculum does it: the model is not asked
    model.save_pretrained(tmp_path)
    loaded = looped_class().from_pretrained(tmp_path)
    assert [block.loops for block in loaded.transformer_blocks] == [2, 3]
    assert loaded.transformer_blocks[0].loop.gate == "sigmoid"
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    assert torch.equal(run(loaded, "5b"), run(model, "5b"))
    ungraft(loaded)
    assert type(loaded) is Plain and "max_loops" not in loaded.config
    # diffusers' own refusal, for every model that keeps modules in float32
    with pytest.raises(ValueError, match="low_cpu_mem_usage"):
        looped_class().from_pretrained(tmp_path, low_cpu_mem_usage=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loop_parameters_stay_float32_whatever_the_dtype(dtype, tmp_path):
    model = tiny_model("5b").to(dtype)
    blocks, _ = graft_looped_blocks(model, 3, loops=2)
    randomise_loops(blocks)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    assert {name for name, value in expected.items() if value.dtype == torch.float32} == LOOP_NAMES
    model.to(dtype)
    model.save_pretrained(tmp_path)
    loaded = looped_class().from_pretrained(tmp_path, torch_dtype=dtype)
    for name, value in loaded.state_dict().items():
        assert value.dtype == expected[name].dtype and torch.equal(value, expected[name])
    assert model.dtype == loaded.dtype == dtype
    assert torch.equal(run(loaded, "5b", dtype=dtype), run(model, "5b", dtype=dtype))


def test_plain_diffusers_warns_of_loops_that_it_does_not_load(tmp_path):
    trained().save_pretrained(tmp_path)
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("diffusers")  # it does not propagate to the root, where caplog listens
    logger.addHandler(handler)
    try:
        Plain.from_pretrained(tmp_path)
    finally:
        logger.removeHandler(handler)
    warned = "\n".join(records)
    assert "max_loops" in warned and "not expected" in warned and "loop.loop_gate" in warned


def test_a_plain_checkpoint_does_not_open_as_a_looped_model(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="load it as CogVideoXTransformer3DModel, then graft_looped_blocks"):
        looped_class().from_pretrained(tmp_path)


def test_pickles_and_copies(tmp_path):
    model = trained("1.5")
    expected = run(model, "1.5")
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(run(other, "1.5"), expected)
        with torch.no_grad():
            other.transformer_blocks[0].loop_gate.add_(1.0)
        assert not torch.equal(run(other, "1.5"), expected) and torch.equal(run(model, "1.5"), expected)
        ungraft(other)
        assert type(other) is Plain


# -- features of diffusers --------------------------------------------------------------------------------------------


def gradients(model, kind="2b", **options):
    model.zero_grad()
    out = run(model, kind, **options)
    out.square().mean().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing():
    model = trained("5b", freeze="none").train()
    out, expected = gradients(model, "5b")
    model.enable_gradient_checkpointing()
    calls = []
    model.transformer_blocks[0].ff.register_forward_pre_hook(lambda *_: calls.append(1))
    again, ours = gradients(model, "5b")
    assert 3 + 3 + 2 <= len(calls) <= 9  # three loops, forward, recomputed by their block, and one by one
    assert torch.equal(out, again) and set(ours) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value)
    model.disable_gradient_checkpointing()
    calls.clear()
    gradients(model, "5b")
    assert len(calls) == 3


def test_a_further_loop_keeps_one_copy_of_the_streams_in_the_whole_model():
    from benchmarks.measure import peak_bytes

    def peak(loops):
        model = tiny_model("2b", num_layers=3, sample_width=32, sample_height=32).train()
        model.enable_gradient_checkpointing()  # before the graft, or after it
        graft_looped_blocks(model, 3, loops=loops)

        def step():
            model(**batch)[0].square().mean().backward()

        step()
        return peak_bytes(step)

    batch = inputs("2b")
    batch["hidden_states"] = torch.randn(2, FRAMES, 4, 32, 32)
    streams = 2 * (FRAMES * 16 * 16 + TEXT) * 32 * 4
    assert peak(3) - peak(2) <= 1.1 * streams


@pytest.mark.parametrize("kind", ["2b", "5b"])
def test_fused_projections(kind):
    model = trained(kind)
    expected = run(model, kind)
    model.fuse_qkv_projections()
    assert hasattr(model.transformer_blocks[0].attn1, "to_qkv")
    torch.testing.assert_close(run(model, kind), expected)
    model.unfuse_qkv_projections()
    assert torch.equal(run(model, kind), expected)


def test_plain_lora_loads_onto_a_graft(tmp_path):
    peft = pytest.importorskip("peft", reason="LoRA files need peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    plain = tiny_model()
    plain.add_adapter(config, adapter_name="style")
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.3)
    plain.save_lora_adapter(tmp_path, adapter_name="style")
    bare, model = tiny_model(), tiny_model()
    graft_looped_blocks(model, 3, loops=2)
    file = {"weight_name": "pytorch_lora_weights.safetensors", "use_safetensors": True}
    model.load_lora_adapter(tmp_path, prefix=None, adapter_name="style", **file)
    assert not torch.equal(run(model), run(bare))
    assert torch.equal(run(model), run(plain))
    model.delete_adapters("style")
    assert torch.equal(run(model), run(bare))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own
def test_regional_compilation():
    model = trained("5b", loops=2, num_layers=1)
    expected = run(model, "5b")
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert all(block._compiled_call_impl is not None for block in model.transformer_blocks)
    torch.testing.assert_close(run(model, "5b"), expected)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_full_graph_compilation_in_training(backend):
    # Inference is compiled in test_cogvideox_attention.
    torch._dynamo.reset()
    model = trained("5b", loops=2, num_layers=1, freeze="none").train()
    out, expected = gradients(model, "5b")
    again, ours = gradients(torch.compile(model, fullgraph=True, backend=backend), "5b")
    torch.testing.assert_close(again, out)
    for name, value in expected.items():
        torch.testing.assert_close(ours[f"_orig_mod.{name}"], value)


def test_layerwise_casting():
    model = trained()
    with torch.no_grad():
        expected = run(model)
    plain = copy.deepcopy(model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.transformer_blocks[0].ff.net[0].proj.weight.dtype == torch.float8_e4m3fn
    assert model.transformer_blocks[0].loop_emb.dtype == torch.float32
    with torch.no_grad():
        out = run(model)
        for name, module in plain.named_modules():  # the same weights, rounded
            if isinstance(module, nn.Linear) and not re.search("norm|patch_embed|^proj_out", name):
                for parameter in module.parameters():
                    parameter.copy_(parameter.to(torch.float8_e4m3fn).float())
        torch.testing.assert_close(out, run(plain))
    assert not torch.allclose(out, expected, rtol=1e-4)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offload(offload_type):
    model = trained()
    with torch.no_grad():
        expected = run(model)
        options = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
        if version(diffusers.__version__) < (0, 36) and not torch.cuda.is_available():
            pytest.skip("before 0.36, diffusers offloads groups only where there is an accelerator")
        model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type=offload_type, **options)
        assert torch.equal(run(model), expected)


def test_accelerate_cpu_offload():
    accelerate = pytest.importorskip("accelerate", reason="CPU offload needs accelerate")
    model = trained()
    with torch.no_grad():
        expected = run(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.transformer_blocks[0].loop_gate.is_meta  # out of the way until its forward
    with torch.no_grad():
        assert torch.equal(run(model), expected)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert type(ungraft(model)) is Plain


def test_offloaded_blocks_are_not_grafted():
    accelerate = pytest.importorskip("accelerate", reason="CPU offload needs accelerate")
    model = tiny_model()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="graft first, then offload or shard"):
        graft_looped_blocks(model, 3, loops=1)


def test_a_sharded_model_is_neither_grafted_nor_ungrafted(process_group):
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for model, act in ((tiny_model(), lambda m: graft_looped_blocks(m, 3, loops=1)), (trained(), ungraft)):
        for block in model.transformer_blocks:
            fully_shard(block, mesh=mesh)
        with pytest.raises(ValueError, match=r"hooks or wrappers run block 0 \(FSDP"):
            act(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "relu"}, "gate must be one of"),
        ({"sharpening": [1.0]}, "positive factor for each of 3 loops"),
        ({"max_loops": 0}, "max_loops must be an int of at least 1"),
        ({"loops": 0}, "at least 1 loop"),
        ({"loops": 4, "max_loops": 3}, "loops=4 are more than max_loops=3"),
    ],
)
def test_a_graft_that_is_refused_changes_nothing(options, message):
    model = tiny_model()
    model.proj_out.weight.requires_grad_(False)
    attributes, config = set(vars(model)), dict(model.config)
    with pytest.raises(ValueError, match=message):
        graft_looped_blocks(model, **{"max_loops": 3, "loops": 1, **options})
    assert type(model) is Plain and set(vars(model)) == attributes and dict(model.config) == config
    assert all(type(block).__name__ == "CogVideoXBlock" for block in model.transformer_blocks)
    assert sum(not p.requires_grad for p in model.parameters()) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        *({"max_loops": n} for n in (0, 2.0, True, "3", None)),
        *({"loops": n} for n in (0, 2.0, True, "ab", [1], [1, "x"], None)),
        *({"sharpening": betas} for betas in ("123", 5, [1, 2, "x"], [1.0, 2.0], [1, 1, 0])),
        *({"canvas": canvas} for canvas in ({}, "a", {"schema": 5})),
        *({"backend": backend} for backend in ("x", 5, None)),
        {"gate": 3},
        {"packed": "no"},
    ],
    ids=str,
)
def test_a_config_that_means_nothing_is_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=rf"{name.removesuffix('s')}|a schema must be a dict"):
        looped_class()(**{**dict(tiny_model().config), "max_loops": 3, **wrong})


def test_first_block_cache():
    hooks = pytest.importorskip("diffusers.hooks", reason="this diffusers has no caches")
    config_class = getattr(hooks, "FirstBlockCacheConfig", None)
    if config_class is None:
        pytest.skip("this diffusers has no first-block cache")
    model = trained()
    expected = run(model)
    model.enable_cache(config_class(threshold=1e-9))
    with model.cache_context("test"):
        torch.testing.assert_close(run(model), expected)
        torch.testing.assert_close(run(model), expected)
    model.disable_cache()


def test_blocks_are_not_split_across_devices():
    assert "LoopedCogVideoXBlock" in looped_class()._no_split_modules


def sharded_gradients(rank, processes, store, folder, dtype=torch.float32):
    """Saves the output of a sharded model, and all its gradients, gathered, as this process finds them."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.FileStore(store, processes), rank=rank, world_size=processes)
    try:
        model = trained("5b", freeze="none").train().to(dtype)
        mesh = dist.device_mesh.init_device_mesh("cpu", (processes,))
        for block in model.transformer_blocks:
            if dtype != torch.float32:  # a group has one dtype
                fully_shard(block.loop, mesh=mesh)
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        # three rows: two processes hold two and one of them
        assert processes == 1 or len(model.transformer_blocks[0].loop_emb.to_local()) == 2 - rank
        out, found = gradients(model, "5b", dtype=dtype)
        torch.save((out, {name: value.full_tensor() for name, value in found.items()}), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_fsdp2(processes, dtype, tmp_path):
    out, expected = gradients(trained("5b", freeze="none").train().to(dtype), "5b", dtype=dtype)
    options = (processes, str(tmp_path / "store"), str(tmp_path), dtype)
    if processes == 1:
        sharded_gradients(0, *options)
    else:
        torch.multiprocessing.spawn(sharded_gradients, options, processes)
    for rank in range(processes):
        again, ours = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(again, out)
        assert set(ours) == set(expected)
        for name, value in expected.items():
            scale = 0.0 if dtype == torch.float32 else 0.03 * float(value.abs().max())
            torch.testing.assert_close(ours[name], value, rtol=1.3e-6 + scale, atol=1e-5 + scale)


# -- a diffusers transformer without an adapter -----------------------------------------------------------------------


def test_blocks_of_other_models_are_wrapped():
    torch.manual_seed(0)
    model = diffusers.LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        patch_size=2, caption_channels=12, cross_attention_dim=16, video_length=2, norm_type="ada_norm_single",
    ).eval()  # fmt: skip
    plain = copy.deepcopy(model)
    blocks, _ = graft_looped_blocks(model, 3, loops=3)
    assert all(isinstance(block, LoopedBlockWrapper) and block.embed_dim == 16 for block in blocks)
    given = {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "timestep": torch.tensor([5]),
        "encoder_hidden_states": torch.randn(1, 6, 12),
        "return_dict": False,
    }
    assert torch.equal(model(**given)[0], plain(**given)[0])
    randomise_loops(blocks)
    assert not torch.equal(model(**given)[0], plain(**given)[0])
    ungraft(model)
    assert torch.equal(model(**given)[0], plain(**given)[0])


def test_two_streams_of_other_models_want_a_wrapper_of_their_own():
    class TwoStreams(nn.Module):
        def forward(self, video, text):
            return video + text.mean(), text + video.mean()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.transformer_blocks = nn.ModuleList([TwoStreams()])

        def forward(self, video, text):
            return self.transformer_blocks[0](video, text)

    model = Model()
    given = torch.randn(2, 6, 8), torch.randn(2, 3, 8)
    expected = model(*given)
    graft_looped_blocks(model, 2, loops=2, inner_dim=8)
    with pytest.raises(ValueError, match=r"block 0, a TwoStreams, returns 2 items.*give wrapper_class="):
        model(*given)
    assert all(map(torch.equal, ungraft(model)(*given), expected))
