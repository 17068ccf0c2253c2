"""Canvas attention in CogVideoX: the stock processor's numbers, the documents' joint form, and what is refused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from canvas_engineering import CanvasLayout, CanvasTopology, Connection, MaskSpec, SharpeningSchedule
from canvas_engineering.checkpoint import load_loop_checkpoint, save_loop_checkpoint
from canvas_engineering.cogvideox import (
    CanvasAttnProcessor,
    cogvideox_layout,
    dense_topology,
    measure_topology,
    tile_topology,
    window_topology,
)
from canvas_engineering.graft import graft_looped_blocks, ungraft
from tests import oracle
from tests.cogvideox_models import FRAMES, KINDS, SIDE, TEXT, diffusers, inputs, randomise_loops, tiny_model

BACKENDS = ("torch", "reference", "triton")
TOPOLOGIES = {
    "dense": dense_topology(),
    "window": window_topology(),
    "tiles": tile_topology(3, 2),
    # weights, a region of its own, and tokens that nothing covers
    "sparse": CanvasTopology(
        [
            Connection("video", "video", t_src=0, t_dst=-1, weight=0.5),
            Connection("hand", "text", weight=2.0),
            Connection("text", "hand", mask=MaskSpec()),
        ]
    ),
}


def layout_of(model):
    pixels = SIDE * 8
    return cogvideox_layout(model.config, pixels, pixels, 4 * (FRAMES - 1) + 1, {"hand": (1, 2, 0, 2, 1, 3)})


def grafted(kind="2b", topology="window", loops=1, num_layers=2, **options):
    model = tiny_model(kind, num_layers=num_layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the density, which has its own test
        blocks, _ = graft_looped_blocks(
            model, 3, loops=loops, layout=layout_of(model), topology=TOPOLOGIES[topology], **options
        )
    if loops > 1:
        randomise_loops(blocks)
    return model


def token_mask(layout, topology):
    """float64 (tokens, tokens), text first, from the documents: weights of pairs; a token without keys reads itself."""
    M = oracle.joint_matrix(layout, topology)
    place = torch.cat([layout.region_index("text"), layout.region_index("video")])
    M = M[place][:, place]
    alone = M.sum(1) == 0
    M[alone, alone] = 1.0
    return M


class Float64Processor:
    """The attention of a CogVideoX block in float64, written from its description."""

    def __init__(self, M):
        self.M, self.sharpens = M, True

    def __call__(
        self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None, sharpness=1.0
    ):
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        B, N, width = tokens.shape
        heads = [f(tokens).reshape(B, N, attn.heads, -1).permute(0, 2, 1, 3) for f in (attn.to_q, attn.to_k, attn.to_v)]
        q, k, v = attn.norm_q(heads[0]), attn.norm_k(heads[1]), heads[2]
        if image_rotary_emb is not None:
            cos, sin = (table.double() for table in image_rotary_emb)

            def rotate(x):
                video = x[:, :, encoder_hidden_states.shape[1] :]
                turned = torch.stack([-video[..., 1::2], video[..., 0::2]], -1).reshape(video.shape)
                return torch.cat([x[:, :, : encoder_hidden_states.shape[1]], video * cos + turned * sin], 2)

            q, k = rotate(q), rotate(k)
        out = oracle.joint_attention(q, k, v, self.M, sharpness / q.shape[-1] ** 0.5)
        out = attn.to_out[0](out.permute(0, 2, 1, 3).reshape(B, N, width))
        n = encoder_hidden_states.shape[1]
        return out[:, n:], out[:, :n]


def in_float64(model, M):
    twin = copy.deepcopy(model).double()
    from canvas_engineering.models import grid, packing

    packing.remove(twin)
    grid.remove(twin)
    twin.set_attn_processor(Float64Processor(M))
    return twin


def run(model, kind="2b", dtype=torch.float32, **options):
    given = inputs(kind, dtype=dtype, **options)
    return model(**given)[0]


def run_with_gradients(model, kind, dtype):
    model.zero_grad()
    out = run(model, kind, dtype)
    g = torch.Generator().manual_seed(9)
    (out.double() * torch.randn(out.shape, generator=g, dtype=torch.float64)).sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def error(actual, expected):
    actual, expected = actual.detach().double(), expected.detach()
    return float((actual - expected).abs().max() / expected.abs().max())


# -- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fuse", [False, True])
def test_without_a_declaration_it_is_the_stock_processor_bit_for_bit(kind, fuse):
    model = tiny_model(kind)
    if fuse:
        model.fuse_qkv_projections()
    expected = run(model, kind)
    model.set_attn_processor(CanvasAttnProcessor().with_fused(fuse))
    assert torch.equal(run(model, kind), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("fuse", [False, True])
def test_a_dense_plan_is_the_stock_processor_to_rounding(kind, backend, fuse):
    stock = tiny_model(kind)
    model = grafted(kind, "dense", backend=backend)
    assert model.transformer_blocks[0].attn1.processor.plan.density == 1.0
    expected = run(copy.deepcopy(stock).double(), kind, torch.float64)
    if fuse:
        model.fuse_qkv_projections()
    assert error(run(model, kind), expected) <= max(2 * error(run(stock, kind), expected), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_the_joint_form(kind, backend):
    if backend == "triton":
        pytest.importorskip("triton", reason="the Triton backend needs triton")
        if not torch.cuda.is_available() and kind != "5b":
            pytest.skip("one kind is enough for Triton's interpreter")
    topology = "sparse" if kind == "2b" else "window"
    options = {"backend": backend, "freeze": "none", "packed": backend != "reference"}
    loops = 1 if backend == "triton" else 3
    options["num_layers"] = 1 if backend == "triton" else 2
    model = grafted(kind, topology, loops=loops, sharpening=[1.0, 1.5, 2.0], **options)
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("benchmarks.gpu checks the kernels on a GPU")
    twin = in_float64(model, token_mask(layout_of(model), TOPOLOGIES[topology]))
    out, gradients = run_with_gradients(model, kind, torch.float32)
    expected, expected_gradients = run_with_gradients(twin, kind, torch.float64)
    tolerance = 2e-5 if backend == "triton" else 1e-5
    assert error(out, expected) <= tolerance
    assert set(gradients) == set(expected_gradients)
    largest = max(float(g.abs().max()) for g in expected_gradients.values())
    for name, gradient in gradients.items():
        assert float((gradient.double() - expected_gradients[name]).abs().max()) <= tolerance * largest, name


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("kind", ["2b", "1.5"])
def test_bfloat16_is_as_good_as_dense_bfloat16(topology, kind):
    model = grafted(kind, topology, loops=2, freeze="none")
    M = token_mask(layout_of(model), TOPOLOGIES[topology])
    # the parameters that bfloat16 has, so that all three compute with the same ones
    model = model.to(torch.bfloat16)
    naive = in_float64(model, M).to(torch.bfloat16)
    naive.set_attn_processor(MaskedStock(M))
    expected, expected_gradients = run_with_gradients(in_float64(model, M), kind, torch.float64)
    out, gradients = run_with_gradients(model, kind, torch.bfloat16)
    dense, dense_gradients = run_with_gradients(naive, kind, torch.bfloat16)
    assert error(out, expected) <= 2 * error(dense, expected)

    def distance(found):
        return sum(float((found[name].double() - g).square().sum()) for name, g in expected_gradients.items()) ** 0.5

    # All gradients together, and those next to the attention one by one; a gate's alone is a single rounding error.
    assert distance(gradients) <= 2 * distance(dense_gradients)
    for name, gradient in expected_gradients.items():
        if "attn1.to_" in name and "weight" in name:
            assert error(gradients[name], gradient) <= 2 * error(dense_gradients[name], gradient), name


class MaskedStock:
    """What a user has without tables: scaled_dot_product_attention with ln M as its mask."""

    def __init__(self, M):
        self.mask = M.log()

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        from diffusers.models.embeddings import apply_rotary_emb

        tokens, n = torch.cat([encoder_hidden_states, hidden_states], dim=1), encoder_hidden_states.shape[1]
        q, k, v = (f(tokens).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for f in (attn.to_q, attn.to_k, attn.to_v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if image_rotary_emb is not None:
            q, k = (torch.cat([x[:, :, :n], apply_rotary_emb(x[:, :, n:], image_rotary_emb)], 2) for x in (q, k))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask.to(q.dtype))
        out = attn.to_out[0](out.transpose(1, 2).flatten(2))
        return out[:, n:], out[:, :n]


def test_tokens_that_nothing_covers_read_themselves():
    model = tiny_model()
    processor = CanvasAttnProcessor(layout_of(model), CanvasTopology([]))
    n_tokens = TEXT + FRAMES * (SIDE // 2) ** 2
    assert processor.plan.n_positions == processor.plan.table.pairs == n_tokens
    attn = model.transformer_blocks[0].attn1
    g = torch.Generator().manual_seed(3)
    video, text = torch.randn(1, n_tokens - TEXT, 32, generator=g), torch.randn(1, TEXT, 32, generator=g)
    for out, given in zip(processor(attn, video, text), (video, text)):
        torch.testing.assert_close(out, attn.to_out[0](attn.to_v(given)))


# -- packed order -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loops", [1, 3])
def test_packed_order_gives_the_same_output(kind, loops):
    model, other = (grafted(kind, "tiles", loops, packed=packed, freeze="none") for packed in (True, False))
    assert model.transformer_blocks[0].attn1.processor.packed
    assert not other.transformer_blocks[0].attn1.processor.packed
    out, gradients = run_with_gradients(model, kind, torch.float32)
    expected, expected_gradients = run_with_gradients(other, kind, torch.float32)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    largest = max(float(g.abs().max()) for g in expected_gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-5 * largest)
    positional = list(inputs(kind).items())
    if kind == "5b":  # the rotary tables as the sixth argument
        given = dict(positional)
        args = (given["hidden_states"], given["encoder_hidden_states"], given["timestep"], None, None)
        again = model(*args, given["image_rotary_emb"], return_dict=False)[0]
        assert torch.equal(again, out)


def test_orders_that_move_nothing_are_not_packed():
    assert not grafted("2b", "dense").transformer_blocks[0].attn1.processor.packed
    assert grafted("2b", "dense").config.packed is False


def test_packing_moves_tokens_once_a_model():
    model = grafted("5b", "tiles", loops=3)
    counts = {"index_select": 0}
    select = torch.Tensor.index_select

    def counting(x, dim, index):
        counts["index_select"] += x.dim() == 3
        return select(x, dim, index)

    torch.Tensor.index_select = counting
    try:
        run(model, "5b")
    finally:
        torch.Tensor.index_select = select
    assert counts["index_select"] == 2  # in and out; the rotary tables have two dimensions


def test_a_processor_around_a_packed_one_gets_packed_tokens():
    model = grafted("5b", "tiles", loops=2)
    expected, inner = run(model, "5b"), model.transformer_blocks[0].attn1.processor
    assert inner.packed

    class Counting:
        sharpens, calls = True, 0

        def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
            self.calls += 1
            return inner(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)

    counting = Counting()
    model.set_attn_processor(counting)
    assert torch.equal(run(model, "5b"), expected) and counting.calls == 4


def test_processors_that_take_another_order_are_refused():
    model = grafted("5b", "tiles", loops=2)
    layout, expected = layout_of(model), run(model, "5b")
    for topology, packed in (("window", False), ("window", True), ("tiles", False)):
        processor = CanvasAttnProcessor(layout, TOPOLOGIES[topology], packed=packed)
        with pytest.raises(ValueError, match="tokens in the packed order of its topology, which CanvasAttnProcessor"):
            model.set_attn_processor(processor)
        assert torch.equal(run(model, "5b"), expected)
    with pytest.raises(ValueError, match="tokens in raster order"):
        grafted("5b", "window").set_attn_processor(CanvasAttnProcessor(layout, TOPOLOGIES["tiles"], packed=True))
    # one that knows no order may be set, and taken back; so may another topology, by another graft
    processors = model.attn_processors
    model.set_attn_processor(CanvasAttnProcessor())
    model.set_attn_processor(processors)
    assert torch.equal(run(model, "5b"), expected)
    with pytest.warns(UserWarning, match="computes"):
        graft_looped_blocks(model, 3, loops=2, layout=layout, topology=TOPOLOGIES["window"])
    torch.testing.assert_close(run(model, "5b"), run(grafted("5b", "window", loops=2), "5b"))


def test_ungraft_takes_the_hooks_away():
    model = grafted("5b", "tiles", loops=3)
    plain = ungraft(model)
    assert not (plain._forward_pre_hooks or plain._forward_pre_hooks_with_kwargs)
    assert not (plain.patch_embed._forward_hooks or plain.norm_final._forward_pre_hooks)
    assert torch.equal(run(plain, "5b"), run(tiny_model("5b"), "5b"))


# -- sharpening -------------------------------------------------------------------------------------------------------


def test_sharpening_reaches_the_scale():
    model = tiny_model("5b")
    attn = model.transformer_blocks[0].attn1
    given = inputs("5b")
    video = torch.randn(2, FRAMES * (SIDE // 2) ** 2, 32)
    text, rope = torch.randn(2, TEXT, 32), given["image_rotary_emb"]
    M = token_mask(layout_of(model), TOPOLOGIES["window"])
    out = CanvasAttnProcessor(layout_of(model), TOPOLOGIES["window"])(attn, video, text, None, rope, 2.5)
    expected = Float64Processor(M)(copy.deepcopy(attn).double(), video.double(), text.double(), None, rope, 2.5)
    for ours, theirs in zip(out, expected):
        assert error(ours, theirs) < 1e-5
    assert error(CanvasAttnProcessor()(attn, video, text, None, rope, 2.5)[0], expected[0]) > 1e-2


def test_sharpening_without_a_declaration():
    model = tiny_model()
    blocks, _ = graft_looped_blocks(model, 3, loops=3, sharpening=SharpeningSchedule(3, 1.0, 4.0))
    assert blocks[0].sharpening == [1.0, 2.5, 4.0]
    randomise_loops(blocks)
    M = torch.ones(TEXT + FRAMES * (SIDE // 2) ** 2, TEXT + FRAMES * (SIDE // 2) ** 2, dtype=torch.float64)
    expected = run(in_float64(model, M), dtype=torch.float64)
    assert error(run(model), expected) < 1e-5
    with pytest.raises(ValueError, match=r"positive factor for each of 3 loops, got \[1.0, 2.0\]"):
        graft_looped_blocks(tiny_model(), 3, loops=1, sharpening=[1.0, 2.0])


def test_sharpening_needs_a_processor_that_sharpens():
    model = tiny_model()
    graft_looped_blocks(model, 3, loops=3, sharpening=[1.0, 2.0, 3.0])
    model.set_attn_processor(tiny_model().transformer_blocks[0].attn1.processor)
    with pytest.raises(ValueError, match="block 0 sharpens its attention, which CogVideoXAttnProcessor2_0 cannot"):
        run(model)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_what_it_cannot_honour_is_refused():
    model = grafted("2b", "window")
    tokens = TEXT + FRAMES * (SIDE // 2) ** 2
    given = inputs()
    with pytest.raises(ValueError, match=rf"an attention mask \(2, {tokens}\) was given: declare"):
        model(**given, attention_kwargs={"attention_mask": torch.ones(2, tokens)})
    with pytest.raises(ValueError, match=r"attention_kwargs \['ip_scale'\] are unknown"):
        model(**given, attention_kwargs={"ip_scale": 1.0})
    short = {**given, "encoder_hidden_states": given["encoder_hidden_states"][:, :3]}
    model.patch_embed.use_positional_embeddings = False
    with pytest.raises(ValueError, match=r"layout is of 5 text and 64 video tokens; got 3 and 64"):
        model(**short)
    model.transformer_blocks[0].attn1.processor._attention_backend = "sage"  # as set_attention_backend does
    with pytest.raises(ValueError, match="attention backend 'sage'"):
        model(**given)


def test_diffusers_own_default_kernel_is_none():
    model = grafted("2b", "window")
    expected = run(model)
    model.set_attention_backend("native")
    assert torch.equal(run(model), expected)


def test_a_packed_model_names_a_wrong_size():
    model = grafted("5b", "tiles")
    given = inputs("5b")
    given["encoder_hidden_states"] = given["encoder_hidden_states"][:, :3]
    with pytest.raises(ValueError, match=r"layout is of 69 tokens, text and video; got 67"):
        model(**given)
    given = inputs("5b")  # a shorter video
    given["hidden_states"] = given["hidden_states"][:, :2]
    given["image_rotary_emb"] = tuple(table[:32] for table in given["image_rotary_emb"])
    with pytest.raises(ValueError, match="is 4 × 4 × 4, this video's 2 × 4 × 4"):
        model(**given)


@pytest.mark.parametrize(
    ("connections", "message"),
    [
        ([Connection("video", "video", write_mode="gate")], "'video' attends to 'video', has fn .* 'gate'"),
        ([Connection("text", "text"), Connection("video", "text", fn="linear_attention")], "connection 1.*'linear_att"),
        ([Connection("video", "margin")], r"region 'margin' at \(1, 2, 4, 5, 0, 1\) holds positions that are neither"),
    ],
)
def test_declarations_that_tokens_cannot_have(connections, message):
    plain = layout_of(tiny_model())
    regions = {**plain.regions, "margin": (1, 2, 4, 5, 0, 1)}
    layout = CanvasLayout(plain.T, plain.d_model, plain.spatial_shape, regions)
    with pytest.raises(ValueError, match=message):
        CanvasAttnProcessor(layout, CanvasTopology(connections))


def test_wrong_layouts_are_refused():
    layout = CanvasLayout(T=1, d_model=8, spatial_shape=(2, 2), regions={"video": (0, 1, 0, 2, 0, 2)})
    with pytest.raises(ValueError, match=r"has the regions 'text' and 'video'; this one has \['video'\]"):
        CanvasAttnProcessor(layout, dense_topology())
    regions = {**layout.regions, "text": (0, 1, 0, 1, 0, 1)}
    both = CanvasLayout(T=1, d_model=8, spatial_shape=(2, 2), regions=regions)
    with pytest.raises(ValueError, match="'text' and 'video' overlap"):
        CanvasAttnProcessor(both, dense_topology())
    with pytest.raises(ValueError, match="both layout= and topology="):
        CanvasAttnProcessor(layout)
    with pytest.raises(ValueError, match="got 'cuda'"):
        CanvasAttnProcessor(backend="cuda")
    encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2), 1, enable_nested_tensor=False)
    with pytest.raises(ValueError, match=r"are for diffusers' CogVideoX.*, got TransformerEncoder"):
        graft_looped_blocks(encoder, 2, "layers", layout=layout, topology=dense_topology())


# -- warnings and measures --------------------------------------------------------------------------------------------


def test_a_graft_warns_of_what_a_topology_leaves_out():
    model = tiny_model("5b")
    layout, topology = layout_of(model), window_topology(0)
    M = token_mask(layout, topology)
    density = float((M > 0).double().mean())
    with pytest.warns(UserWarning, match=rf"computes {100 * density:.2f} % of all.*measure_topology says"):
        graft_looped_blocks(model, 3, loops=1, layout=layout, topology=topology)
    other = tiny_model("5b")
    measured = measure_topology(other, layout, topology, inputs("5b"))
    with pytest.warns(UserWarning, match=rf"by {100 * measured.difference:.1f} % of their mean size"):
        graft_looped_blocks(other, 3, loops=1, layout=layout, topology=topology, measure_on=inputs("5b"))


def test_measured_differences_are_those_of_the_first_layers_true_outputs():
    model = tiny_model("5b")
    layout, topology = layout_of(model), window_topology(0)
    seen = {}
    attn = model.transformer_blocks[0].attn1
    handle = attn.register_forward_hook(lambda m, a, k, out: seen.update(given=k, out=out), with_kwargs=True)
    before = {name: type(p) for name, p in model.attn_processors.items()}
    expected_out = run(model, "5b")
    handle.remove()
    measured = measure_topology(model, layout, topology, inputs("5b"))
    assert {name: type(p) for name, p in model.attn_processors.items()} == before
    assert torch.equal(run(model, "5b"), expected_out)
    given = {name: seen["given"][name].double() for name in ("hidden_states", "encoder_hidden_states")}
    sparse = Float64Processor(token_mask(layout, topology))(
        copy.deepcopy(attn).double(), **given, image_rotary_emb=seen["given"]["image_rotary_emb"]
    )
    changed = sum((a - b).abs().sum() for a, b in zip(sparse, seen["out"])).detach()
    size = sum(b.abs().sum() for b in seen["out"]).detach()
    assert measured.per_layer["transformer_blocks.0.attn1.processor"] == pytest.approx(float(changed / size), rel=1e-4)
    assert 0 < measured.difference < 2 and 0 < measured.density < 1
    assert measure_topology(model, layout, dense_topology(), inputs("5b")).difference < 1e-5


def test_a_packed_model_is_not_measured():
    with pytest.raises(ValueError, match="measure a topology before the graft"):
        measure_topology(grafted("5b", "tiles"), layout_of(tiny_model()), window_topology(), inputs("5b"))


# -- citizens of diffusers --------------------------------------------------------------------------------------------


def test_saving_keeps_the_declaration(tmp_path):
    from canvas_engineering.cogvideox import LoopedCogVideoXTransformer3DModel

    model = grafted("5b", "tiles", loops=3, sharpening=[1.0, 1.5, 2.0])
    model.save_pretrained(tmp_path)
    loaded = LoopedCogVideoXTransformer3DModel.from_pretrained(tmp_path)
    assert loaded.config.canvas == model.config.canvas and loaded.config.sharpening == [1.0, 1.5, 2.0]
    assert loaded.transformer_blocks[1].attn1.processor.packed
    assert torch.equal(run(loaded, "5b"), run(model, "5b"))


def test_loop_checkpoints_know_the_declaration(tmp_path):
    pytest.importorskip("safetensors", reason="loop checkpoints are safetensors files")
    model = grafted("5b", "tiles", loops=3, sharpening=[1.0, 1.5, 2.0])
    path = tmp_path / "loops.safetensors"
    save_loop_checkpoint(model.transformer_blocks, None, path)
    same = grafted("5b", "tiles", loops=1, sharpening=[1.0, 1.5, 2.0])
    description = load_loop_checkpoint(same.transformer_blocks, None, path)
    assert description["canvas"]["form"] == "joint" and description["versions"]["diffusers"]
    assert torch.equal(run(same, "5b"), run(model, "5b"))
    with pytest.raises(ValueError, match=r"sharpening \[1.0, 1.5, 2.0\], the model null; canvas.schema.topology"):
        load_loop_checkpoint(grafted("5b", "window").transformer_blocks, None, path)
    with pytest.raises(ValueError, match=r"canvas \{.*the model null"):
        load_loop_checkpoint(graft_looped_blocks(tiny_model("5b"), 3, loops=1)[0], None, path)


def test_mixed_processors_are_not_saved_as_one(tmp_path):
    model = grafted("5b", "window")
    model.transformer_blocks[0].attn1.set_processor(tiny_model().transformer_blocks[0].attn1.processor)
    with pytest.raises(ValueError, match="blocks have different attention processors"):
        model.save_pretrained(tmp_path)


def test_copies_and_pickles_share_or_make_the_plan(tmp_path):
    model = grafted("5b", "tiles", loops=2)
    expected = run(model, "5b")
    twin = copy.deepcopy(model)
    assert twin.transformer_blocks[0].attn1.processor.plan is model.transformer_blocks[0].attn1.processor.plan
    torch.save(model, tmp_path / "model.pt")
    for other in (twin, torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(run(other, "5b"), expected)


@pytest.mark.parametrize("kind", ["2b", "5b"])
def test_fusing_keeps_the_processor(kind):
    model = grafted(kind, "window", loops=2)
    expected = run(model, kind)
    model.fuse_qkv_projections()
    processors = set(model.attn_processors.values())
    assert all(isinstance(p, CanvasAttnProcessor) and p.fused for p in processors)
    torch.testing.assert_close(run(model, kind), expected, rtol=1e-4, atol=1e-5)
    model.unfuse_qkv_projections()
    assert torch.equal(run(model, kind), expected)


def test_a_fused_model_can_be_grafted():
    model = tiny_model("5b")
    model.fuse_qkv_projections()
    for block in model.transformer_blocks:  # so that reading the separate projections would show
        torch.nn.init.zeros_(block.attn1.to_q.weight)
    expected = run(model, "5b")
    graft_looped_blocks(model, 3, loops=2, sharpening=[1.0, 1.0, 1.0])
    torch.testing.assert_close(run(model, "5b"), expected)


@pytest.mark.parametrize("topology", ["window", "tiles"])
def test_checkpointing_with_canvas_attention(topology):
    model = grafted("5b", topology, loops=3, freeze="none", sharpening=[1.0, 1.5, 2.0]).train()
    out, expected = run_with_gradients(model, "5b", torch.float32)
    model.enable_gradient_checkpointing()
    again, gradients = run_with_gradients(model, "5b", torch.float32)
    assert torch.equal(out, again)
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_full_graph_compilation_with_canvas_attention(training, backend):
    torch._dynamo.reset()
    options = {"packed": training, "freeze": "none", "sharpening": [1.0, 1.5, 2.0]}
    model = grafted("5b", "tiles", loops=2, num_layers=1, **options)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    # Compiled first: nothing has made index tensors yet, as after a move to another device.
    if not training:
        with torch.no_grad():
            out = run(compiled, "5b")
            torch.testing.assert_close(out, run(model, "5b"))
        return
    again, gradients = run_with_gradients(compiled, "5b", torch.float32)
    gradients = {name.removeprefix("_orig_mod."): gradient.clone() for name, gradient in gradients.items()}
    out, expected = run_with_gradients(model, "5b", torch.float32)
    torch.testing.assert_close(again, out)
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-4, atol=1e-5)


def test_group_offload_and_lora_with_canvas_attention(tmp_path):
    peft = pytest.importorskip("peft", reason="LoRA files need peft")
    model = grafted("5b", "tiles", loops=2)
    before = run(model, "5b")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    with torch.no_grad():
        expected = run(model, "5b")
        assert not torch.equal(expected, before)
        if hasattr(torch, "accelerator") and diffusers.__version__ >= "0.36":
            model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
        assert torch.equal(run(model, "5b"), expected)
        model.delete_adapters("default")


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")
def test_sharding_with_canvas_attention():
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    model = grafted("5b", "tiles", loops=2, freeze="none")
    out, expected = run_with_gradients(model, "5b", torch.float32)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for block in model.transformer_blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        again, gradients = run_with_gradients(model, "5b", torch.float32)
        gradients = {name: gradient.full_tensor() for name, gradient in gradients.items()}
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(again, out)
    assert set(gradients) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-4, atol=1e-5)


def test_layerwise_casting_and_offload_with_canvas_attention():
    accelerate = pytest.importorskip("accelerate", reason="CPU offload needs accelerate")
    model = grafted("5b", "tiles", loops=2)
    with torch.no_grad():
        expected = run(model, "5b")
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert torch.equal(run(model, "5b"), expected)
        other = grafted("5b", "tiles", loops=2)
        other.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        out = run(other, "5b")
    assert torch.isfinite(out).all() and 0 < error(out, expected.double()) < 0.5
