"""Every adapter against diffusers' own model: the numbers, looping, saving, and the features that users rely on."""

from __future__ import annotations

import copy

import pytest
import torch

from canvas_engineering.graft import graft_looped_blocks, ungraft
from canvas_engineering.models import (
    CanvasAttnProcessor,
    adapter_of,
    measure_topology,
    remove_canvas_attention,
    set_canvas_attention,
    topologies,
    video_layout,
)
from canvas_engineering.models.block import LoopedBlock
from tests.video_models import (
    GRID,
    TEXT,
    TINY,
    error,
    inputs,
    layout_of,
    masked_twin,
    random_topology,
    randomise_loops,
    run_with_gradients,
    tiny,
    token_mask,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:attention computes .* of all token pairs",  # a graft says so, rightly
    "ignore:In CPU autocast, but the target dtype",  # Mochi's own
)
NAMES = [*TINY]


def run(name, model, dtype=torch.float32, **options):
    return model(**{**inputs(name, dtype), **options})[0]


def grafted(name, loops=1, dtype=torch.float32, **options):
    model = tiny(name, dtype)
    declared = topologies.window(layout_of(name, model))
    blocks, _ = graft_looped_blocks(
        model, 3, loops=loops, **{"layout": declared[0], "topology": declared[1], "freeze": "none", **options}
    )
    if loops > 1:
        randomise_loops(blocks)
    return model


# -- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_dense_attention_is_the_stock_processor_to_rounding(name):
    model = tiny(name)
    expected, exact = run(name, model), run(name, tiny(name, torch.float64), torch.float64)
    processor = set_canvas_attention(model, *topologies.dense(layout_of(name, model)))
    assert processor.plan.density == 1.0
    assert error(run(name, model), exact) <= max(2 * error(expected, exact), 1e-5)
    for _, attn in adapter_of(model).attentions(model):  # without a declaration: torch's own attention
        attn.processor = CanvasAttnProcessor(model=adapter_of(model).name)
    assert error(run(name, model), exact) <= max(2 * error(expected, exact), 1e-5)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", NAMES)
def test_random_topologies_are_the_stock_model_with_a_dense_mask(name, seed, backend):
    model = tiny(name)
    declared = random_topology(layout_of(name, model), seed)
    expected, exact = run_with_gradients(
        name, masked_twin(name, model, token_mask(name, model, *declared)), torch.float64
    )
    set_canvas_attention(model, *declared, backend=backend)
    out, gradients = run_with_gradients(name, model, torch.float32)
    assert error(out, expected) <= 1e-5
    assert set(gradients) == set(exact)
    largest = max(float(g.abs().max()) for g in exact.values())
    for parameter, gradient in gradients.items():
        assert float((gradient.double() - exact[parameter]).abs().max()) <= 1e-5 * largest, parameter


@pytest.mark.parametrize("name", NAMES)
def test_triton_computes_the_same(name):
    pytest.importorskip("triton", reason="the Triton backend needs triton")
    if torch.cuda.is_available():
        pytest.skip("benchmarks.gpu checks the kernels on a GPU")
    models = [tiny(name, num_layers=1) for _ in range(2)]
    for model, backend in zip(models, ("triton", "reference")):
        set_canvas_attention(model, *random_topology(layout_of(name, model), 0), backend=backend)
    assert error(run(name, models[0]), run(name, models[1])) <= 2e-5


# -- looping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_a_graft_is_its_backbone_bit_for_bit(name, dtype):
    plain = tiny(name, dtype)
    model = copy.deepcopy(plain)
    blocks, _ = graft_looped_blocks(model, 3, loops=1)
    expected = run(name, plain, dtype)
    for loops in (1, 2, 3):
        model.set_loops(loops)
        assert torch.equal(run(name, model, dtype), expected)
    assert all(isinstance(block, LoopedBlock) for block in blocks) and len(blocks) == len(
        adapter_of(plain).blocks(plain)
    )
    names = [key for key in model.state_dict() if ".loop." not in key]
    assert names == list(plain.state_dict())
    randomise_loops(blocks)
    assert not torch.equal(run(name, model, dtype), expected)
    assert type(ungraft(model)) is type(plain) and torch.equal(run(name, model, dtype), expected)
    assert set(vars(model)) == set(vars(plain)) and model.config == plain.config


@pytest.mark.parametrize("name", NAMES)
def test_loops_are_the_recurrence(name):
    model = tiny(name, torch.float64)
    plain = copy.deepcopy(model)
    blocks, _ = graft_looped_blocks(model, 3, loops=3)
    randomise_loops(blocks)
    adapter = adapter_of(plain)
    twins = adapter.blocks(plain)
    for number, block in enumerate(blocks):
        stock = twins[number]

        def recurrence(video, text, *args, block=block, forward=stock.forward, **kwargs):
            for loop in range(3):
                value = block.loop_gate[loop]
                c = torch.tanh(value) + (loop == 0)
                into = text + block.loop_emb_enc[loop] if block.two_streams else text
                out = forward(video + block.loop_emb[loop], into, *args, **kwargs)
                new, new_text = out if block.two_streams else (out, text)
                video, text = video + c * (new - video), text + c * (new_text - text)
            return (video, text) if block.two_streams else video

        def named(*args, recurrence=recurrence, **kwargs):
            states = [kwargs.pop(key) for key in ("hidden_states", "encoder_hidden_states") if key in kwargs]
            return recurrence(*states, *args, **kwargs)

        stock.forward = named
    assert error(run(name, model, torch.float64), run(name, plain, torch.float64)) <= 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_sharpening_scales_the_logits(name):
    model, twin = tiny(name, torch.float64), tiny(name, torch.float64)
    graft_looped_blocks(model, 2, loops=1, sharpening=[1.7, 1.0])
    for _, attn in adapter_of(twin).attentions(twin):  # q is normalised: scaling its norm scales the logits
        for norm in ("norm_q", "norm_added_q"):
            weight = getattr(getattr(attn, norm, None), "weight", None)
            if weight is not None:
                weight.data.mul_(1.7)
    expected = run(name, twin, torch.float64)
    assert error(run(name, model, torch.float64), expected) <= 1e-6
    assert error(run(name, tiny(name, torch.float64), torch.float64), expected) > 1e-4
    graft_looped_blocks(model, 2, loops=2, sharpening=[1.7, 3.0])
    again = run(name, model, torch.float64)
    model.train().enable_gradient_checkpointing()
    assert torch.equal(run(name, model, torch.float64), again)


# -- features of diffusers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_saving_round_trips(name, tmp_path):
    model = grafted(name, loops=2, sharpening=[1.0, 1.5, 2.0])
    model.save_pretrained(tmp_path)
    looped = type(model)
    loaded = looped.from_pretrained(tmp_path)
    assert looped.__name__ == f"Looped{TINY[name].model_class}"
    assert torch.equal(run(name, loaded), run(name, model))
    assert [block.loops for block in adapter_of(loaded).blocks(loaded)] == [2] * len(adapter_of(model).blocks(model))
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(run(name, other), run(name, model))


@pytest.mark.parametrize("name", NAMES)
def test_plain_lora_loads_onto_a_graft(name, tmp_path):
    peft = pytest.importorskip("peft", reason="LoRA files need peft")
    plain = tiny(name)
    plain.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "style")
    plain.save_lora_adapter(tmp_path, adapter_name="style")
    bare, model = run(name, tiny(name)), tiny(name)
    graft_looped_blocks(model, 3, loops=2)
    file = {"weight_name": "pytorch_lora_weights.safetensors", "use_safetensors": True}
    model.load_lora_adapter(tmp_path, prefix=None, adapter_name="style", **file)
    assert torch.equal(run(name, model), run(name, plain)) and not torch.equal(run(name, model), bare)
    model.delete_adapters("style")
    assert torch.equal(run(name, model), bare)


@pytest.mark.parametrize("name", NAMES)
def test_training_compiles_to_one_graph(name):
    torch._dynamo.reset()
    model = grafted(name, loops=2, sharpening=[1.0, 1.5, 2.0]).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    again, gradients = run_with_gradients(name, compiled, torch.float32)
    out, expected = run_with_gradients(name, model, torch.float32)
    torch.testing.assert_close(again, out)
    largest = max(float(g.abs().max()) for g in expected.values())
    for parameter, value in expected.items():
        torch.testing.assert_close(gradients[f"_orig_mod.{parameter}"], value, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing(name):
    model = grafted(name, loops=2, sharpening=[1.0, 1.5, 2.0]).train()
    out, expected = run_with_gradients(name, model, torch.float32)
    expected = {parameter: value.clone() for parameter, value in expected.items()}
    model.enable_gradient_checkpointing()
    again, gradients = run_with_gradients(name, model, torch.float32)
    assert torch.equal(out, again) and set(gradients) == set(expected)
    for parameter, value in expected.items():
        torch.testing.assert_close(gradients[parameter], value)


@pytest.mark.parametrize("name", NAMES)
def test_fused_projections(name):
    model = grafted(name, loops=2)
    if not hasattr(model, "fuse_qkv_projections"):
        pytest.skip(f"diffusers' {TINY[name].model_class} has no fused projections")
    expected = run(name, model)
    model.fuse_qkv_projections()
    torch.testing.assert_close(run(name, model), expected)
    model.unfuse_qkv_projections()
    assert torch.equal(run(name, model), expected)


@pytest.mark.parametrize("name", NAMES)
def test_measured_differences(name):
    model = tiny(name)
    layout, expected = layout_of(name, model), run(name, tiny(name))
    measured = measure_topology(model, *topologies.window(layout, 0), inputs(name))
    assert 0 < measured.difference < 2 and 0 < measured.density < 1
    assert len(measured.per_layer) == len(adapter_of(model).blocks(model))
    assert measure_topology(model, *topologies.dense(layout), inputs(name)).difference < 1e-5
    assert torch.equal(run(name, model), expected)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graft", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_another_grid_is_refused_and_several_are_told_apart(name, graft):
    model, (height, width, frames) = tiny(name), TINY[name].size
    options = {"text_tokens": TEXT} if TINY[name].text else {}
    layouts = [video_layout(model, *size, frames, **options) for size in ((height, 2 * width), (2 * height, width))]
    declared = [topologies.spatial_tiles(layout, 2, 3) for layout in layouts]

    def install(number):
        chosen = tiny(name)
        pairs = declared if number is None else [declared[number]]
        arguments = {"layout": [pair[0] for pair in pairs], "topology": [pair[1] for pair in pairs]}
        if graft:
            graft_looped_blocks(chosen, 2, loops=2, **arguments)
        else:
            set_canvas_attention(chosen, **arguments)
        return chosen

    both = install(None)
    for number, other in ((0, 1), (1, 0)):
        alone = install(number)
        given, wrong = (_of_grid(name, layouts[i].region_size("video")) for i in (number, other))
        assert torch.equal(alone(**given)[0], both(**given)[0])
        sizes = [" × ".join(map(str, layouts[i].region_size("video"))) for i in (number, other)]
        with pytest.raises(ValueError, match=f"is {sizes[0]}, this video's {sizes[1]}"):
            alone(**wrong)


def _of_grid(name, grid):
    given = inputs(name)
    g = torch.Generator().manual_seed(5)
    shape = given["hidden_states"].shape
    if len(shape) == 3:  # LTX: of tokens
        given.update(num_frames=grid[0], height=grid[1], width=grid[2])
        given["hidden_states"] = torch.randn(shape[0], grid[0] * grid[1] * grid[2], shape[2], generator=g)
    else:
        given["hidden_states"] = torch.randn(*shape[:2], grid[0], 2 * grid[1], 2 * grid[2], generator=g)
    if given["timestep"].dim() == 2:
        given["timestep"] = given["timestep"].repeat(1, 2)
    return given


@pytest.mark.parametrize("name", NAMES)
def test_what_a_model_cannot_do_is_refused(name):
    model = tiny(name)
    declared = topologies.window(layout_of(name, model))
    with pytest.raises(ValueError, match=rf"packed=True: tokens of {TINY[name].model_class} stay in raster order: "):
        graft_looped_blocks(model, 2, layout=declared[0], topology=declared[1], packed=True)
    processors = [attn.processor for _, attn in adapter_of(model).attentions(model)]
    set_canvas_attention(model, *declared)
    others = [
        m for m in model.modules() if hasattr(m, "processor") and not isinstance(m.processor, CanvasAttnProcessor)
    ]
    assert bool(others) is (name != "mochi")  # cross-attention and refiners of text are left alone
    remove_canvas_attention(model)
    assert [attn.processor for _, attn in adapter_of(model).attentions(model)] == processors
    assert layout_of(name, model).region_size("video") == GRID


def test_models_without_an_adapter_are_refused():
    with pytest.raises(ValueError, match=r"CogVideoX.* are known, got 'Linear'"):
        set_canvas_attention(torch.nn.Linear(2, 2), *topologies.window(layout_of("wan", tiny("wan"))))
    with pytest.raises(ValueError, match=r"got None: give the model"):
        adapter_of({})
