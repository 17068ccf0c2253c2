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
def test_freezing_half_freezes_what_makes_tokens(name):
    model = tiny(name)
    graft_looped_blocks(model, 2, freeze="half")
    embedding = {
        f"{adapter_of(model).embedding}.{key}"
        for key, _ in getattr(model, adapter_of(model).embedding).named_parameters()
    }
    assert embedding and {key for key, p in model.named_parameters() if not p.requires_grad} == embedding


@pytest.mark.parametrize("name", NAMES)
def test_sharpening_scales_the_logits(name):
    model, twin = tiny(name, torch.float64), tiny(name, torch.float64)
    graft_looped_blocks(model, 2, loops=1, sharpening=[1.7, 1.0])
    for _, attn in adapter_of(twin).attentions(twin):  # q is normalised: scaling its norm scales the logits
        for norm in ("norm_q", "norm_added_q"):
            for parameter in (getattr(attn, norm, None) or torch.nn.Identity()).parameters():
                parameter.data.mul_(1.7)
    expected = run(name, twin, torch.float64)
    assert error(run(name, model, torch.float64), expected) <= 1e-6
    assert error(run(name, tiny(name, torch.float64), torch.float64), expected) > 1e-4
    graft_looped_blocks(model, 2, loops=2, sharpening=[1.7, 3.0])
    again = run(name, model, torch.float64)
    model.train().enable_gradient_checkpointing()
    assert torch.equal(run(name, model, torch.float64), again)


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
        frames = (grid[0], 4) if name == "cogvideox" else (4, grid[0])
        given["hidden_states"] = torch.randn(shape[0], *frames, 2 * grid[1], 2 * grid[2], generator=g)
    if given["timestep"].dim() == 2:
        given["timestep"] = given["timestep"].repeat(1, 2)
    return given


@pytest.mark.parametrize("name", NAMES)
def test_what_a_model_cannot_do_is_refused(name):
    model = tiny(name)
    declared = topologies.window(layout_of(name, model))
    if name != "cogvideox":
        with pytest.raises(
            ValueError, match=rf"packed=True: tokens of {TINY[name].model_class} stay in raster order: "
        ):
            graft_looped_blocks(model, 2, layout=declared[0], topology=declared[1], packed=True)
    processors = [attn.processor for _, attn in adapter_of(model).attentions(model)]
    set_canvas_attention(model, *declared)
    others = [
        m for m in model.modules() if hasattr(m, "processor") and not isinstance(m.processor, CanvasAttnProcessor)
    ]
    assert bool(others) is (name not in ("cogvideox", "mochi"))  # cross-attention and refiners of text are left alone
    remove_canvas_attention(model)
    assert [attn.processor for _, attn in adapter_of(model).attentions(model)] == processors
    assert layout_of(name, model).region_size("video") == GRID


def test_models_without_an_adapter_are_refused():
    with pytest.raises(ValueError, match=r"CogVideoX.* are known, got 'Linear'"):
        set_canvas_attention(torch.nn.Linear(2, 2), *topologies.window(layout_of("wan", tiny("wan"))))
    with pytest.raises(ValueError, match=r"got None: give the model"):
        adapter_of({})
