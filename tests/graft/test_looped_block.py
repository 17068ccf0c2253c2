"""Looping on any block: the formula, the bits at the start, and models with a list of blocks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from canvas_engineering.graft import freeze_full, freeze_half, graft_looped_blocks, ungraft
from canvas_engineering.looped_block import LoopedBlockWrapper, LoopParameters


class Residual(nn.Module):
    """x + W x, as a tensor or as the first of a tuple."""

    def __init__(self, dim=6, as_tuple=False):
        super().__init__()
        self.linear, self.as_tuple, self.kind = nn.Linear(dim, dim), as_tuple, "residual"

    def forward(self, x, shift=0.0, *, factor=1.0):
        out = x + factor * self.linear(x) + shift
        return (out, "attention weights") if self.as_tuple else out


def randomise(block):
    for parameter in block.loop.parameters():
        nn.init.normal_(parameter, std=0.5)


def expected_loops(block, x, loops, gate):
    """The recurrence of the semantics page, in float64, with lerp spelled out."""
    original, h = copy.deepcopy(block.original).double(), x.double()
    for l in range(loops):
        g = block.loop_gate[l].detach().double()
        out = original(h + block.loop_emb[l].detach().double(), 0.25, factor=0.5)
        out = out[0] if isinstance(out, tuple) else out
        c = torch.sigmoid(g) if gate == "sigmoid" else (1.0 if l == 0 else 0.0) + torch.tanh(g)
        h = h + c * (out - h)
    return h


@pytest.mark.parametrize("gate", ["tanh", "sigmoid"])
@pytest.mark.parametrize("loops", [1, 2, 4])
@pytest.mark.parametrize("as_tuple", [False, True])
def test_loops_are_the_recurrence(gate, loops, as_tuple):
    torch.manual_seed(0)
    block = LoopedBlockWrapper(Residual(as_tuple=as_tuple), max_loops=4, embed_dim=6, gate=gate)
    randomise(block)
    block.set_loops(loops)
    x = torch.randn(2, 5, 6)
    out = block(x, 0.25, factor=0.5)
    torch.testing.assert_close(out.double(), expected_loops(block, x, loops, gate), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_fresh_blocks_give_the_bits_of_the_block(dtype, training):
    block = LoopedBlockWrapper(Residual().to(dtype), max_loops=3, embed_dim=6).train(training)
    assert {p.dtype for p in block.original.parameters()} == {dtype}
    assert {p.dtype for p in block.loop.parameters()} == {torch.float32}
    x = torch.randn(2, 5, 6).to(dtype)
    for loops in (1, 2, 3):
        block.set_loops(loops)
        out = block(x)
        assert out.dtype == dtype and torch.equal(out, block.original(x))


class TwoStreams(nn.Module):
    """Two streams in and out, in either order, as joint blocks of video and text have them."""

    def __init__(self, swapped=False):
        super().__init__()
        self.linear, self.swapped = nn.Linear(6, 6), swapped

    def forward(self, x, text, scale=1.0):
        return (text, self.linear(x)) if self.swapped else (self.linear(x), text * scale)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_second_stream_is_not_dropped_in_silence(swapped):
    # A model that unpacks two streams would unpack a batch of two as them.
    block = LoopedBlockWrapper(TwoStreams(swapped), 3, max_loops=2, embed_dim=6)
    shapes = r"\[\(2, 4, 6\), \(2, 5, 6\)\]" if swapped else r"\[\(2, 5, 6\), \(2, 4, 6\)\]"
    message = rf"block 3, a TwoStreams, returns 2 items of shapes {shapes}.* one stream, .*give wrapper_class="
    for call in (lambda x, text: block(x, text), lambda x, text: block(x, text=text)):
        with pytest.raises(ValueError, match=message):
            call(torch.randn(2, 5, 6), torch.randn(2, 4, 6))


def test_the_published_mixing_halves_the_block():
    # What the tanh gate is there to avoid: sigmoid(0) = 1/2.
    block = LoopedBlockWrapper(Residual(), max_loops=1, embed_dim=6, gate="sigmoid")
    x = torch.randn(1, 3, 6)
    torch.testing.assert_close(block(x), 0.5 * x + 0.5 * block.original(x))


def test_float32_loop_parameters_keep_a_bfloat16_stream():
    block = LoopedBlockWrapper(Residual().bfloat16(), max_loops=2, embed_dim=6)
    block.loop.float()
    block.set_loops(2)
    out = block(torch.randn(1, 3, 6).bfloat16())
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and block.loop_gate.grad.dtype == torch.float32


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(1)
    block = LoopedBlockWrapper(Residual(3), max_loops=3, embed_dim=3).double()
    randomise(block)
    block.set_loops(3)
    names = ("loop_emb", "loop_gate")

    def run(x, *loop_parameters):
        values = {f"loop.{name}": value for name, value in zip(names, loop_parameters)}
        return torch.func.functional_call(block, values, (x,))

    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    leaves = [getattr(block, name).detach().clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(run, (x, *leaves))


@pytest.mark.parametrize("checkpointing", [True, False])
def test_checkpointing_changes_no_gradient(checkpointing):
    torch.manual_seed(2)
    plain = LoopedBlockWrapper(Residual(), max_loops=3, embed_dim=6, use_gradient_checkpointing=False)
    randomise(plain)
    other = copy.deepcopy(plain)
    other.use_gradient_checkpointing = checkpointing
    x = torch.randn(2, 5, 6)
    calls = []
    other.original.register_forward_pre_hook(lambda *_: calls.append(1))
    for block in (plain, other):
        block.set_loops(3)
        block(x, 0.1, factor=2.0).square().sum().backward()
    assert len(calls) == (6 if checkpointing else 3)
    for ours, expected in zip(other.parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-6, atol=1e-7)


def test_loops_are_clamped_above_and_refused_below():
    block = LoopedBlockWrapper(Residual(), max_loops=2, embed_dim=6)
    assert block.loops == 1
    block.set_loops(9)
    assert block.loops == 2
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=f"at least 1 loop, got {wrong}"):
            block.set_loops(wrong)
    assert "2 of 2 loops" in repr(block)


def test_wrong_widths_and_options_are_named():
    block = LoopedBlockWrapper(Residual(), block_idx=4, max_loops=2, embed_dim=6)
    with pytest.raises(ValueError, match=r"block 4 loops over states of width 6, got \(1, 3, 5\)"):
        block(torch.zeros(1, 3, 5))
    with pytest.raises(ValueError, match="'relu'"):
        LoopParameters(2, 6, gate="relu")
    with pytest.raises(ValueError, match="max_loops must be an int of at least 1, got 0"):
        LoopedBlockWrapper(Residual(), max_loops=0, embed_dim=6)


def test_attributes_come_from_the_block_and_missing_ones_are_missing():
    block = LoopedBlockWrapper(Residual(), max_loops=2, embed_dim=6)
    assert block.kind == "residual" and block.linear is block.original.linear
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = block.no_such_thing


def test_a_plain_checkpoint_of_a_block_leaves_loops_and_half_a_one_is_refused():
    loop = LoopParameters(2, 6)
    with torch.no_grad():
        loop.loop_gate.fill_(0.5)
    loop.load_state_dict({})
    assert loop.loop_gate.eq(0.5).all()
    with pytest.raises(RuntimeError, match="loop_gate"):
        loop.load_state_dict({"loop_emb": torch.zeros(2, 6)})


# -- models -----------------------------------------------------------------------------------------------------------


def encoder(dtype=torch.float32):
    torch.manual_seed(3)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("loops", [1, 3])
def test_a_grafted_encoder_is_its_backbone_until_it_learns(dtype, training, loops):
    plain = encoder(dtype).train(training)
    model = copy.deepcopy(plain)
    blocks, head = graft_looped_blocks(model, 3, "layers", loops=loops, freeze="none")
    x = torch.randn(2, 7, 16).to(dtype)
    mask = nn.Transformer.generate_square_subsequent_mask(7, dtype=dtype)
    # eval without grad takes torch's fused layer, of other rounding, in the plain model only
    assert torch.equal(model(x, mask), plain(x, mask))
    with torch.no_grad():
        blocks[0].loop_gate.fill_(0.3)
    assert not torch.equal(model(x, mask), plain(x, mask))
    assert head(torch.zeros(1, 2, 16)).shape == (1, 7)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # the plain encoder's
def test_a_grafted_encoder_takes_padding_in_inference():
    # torch's encoder would turn padded batches into nested tensors here, and give 0 for the padding.
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 2)}).eval()
    plain = copy.deepcopy(model)
    graft_looped_blocks(model, 2, "encoder.layers", loops=2)
    x, padding = torch.randn(2, 5, 16), torch.tensor([[False] * 4 + [True], [False] * 3 + [True] * 2])
    with torch.no_grad():
        expected = plain.encoder(x, src_key_padding_mask=padding)
        out = model.encoder(x, src_key_padding_mask=padding)
        torch.testing.assert_close(out[~padding], expected[~padding], rtol=1e-5, atol=1e-6)
        ungraft(model, "encoder.layers")
        assert vars(model.encoder).keys() == vars(plain.encoder).keys()
        assert torch.equal(model.encoder(x, src_key_padding_mask=padding), expected)


def test_a_graft_is_undone_and_done_once():
    model = encoder()
    model.layers[0].linear1.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    types, originals = [type(m) for m in model.modules()], list(model.layers)
    first, _ = graft_looped_blocks(model, 2, "layers", loops=1)
    again, _ = graft_looped_blocks(model, 2, "layers", loops=2)
    assert [a is b for a, b in zip(first, again)] == [True, True] and again[0].loops == 2
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"layers.{i}.loop.{name}" for i in (0, 1) for name in ("loop_emb", "loop_gate")}
    with pytest.raises(ValueError, match=r"grafted with max_loops=2.*requested max_loops=3"):
        graft_looped_blocks(model, 3, "layers", loops=1)
    ungraft(model, "layers")
    ungraft(model, "layers")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert [type(m) for m in model.modules()] == types and all(a is b for a, b in zip(model.layers, originals))


def test_freezing():
    model = nn.ModuleDict({"patch_embed": nn.Linear(2, 3), "rest": nn.Linear(3, 1)})
    model.rest.register_parameter("pos_embedding", nn.Parameter(torch.zeros(5)))
    assert freeze_half(model) == 9 + 5
    assert [p.requires_grad for p in model.rest.parameters()] == [True, True, False]
    assert freeze_full(model) == sum(p.numel() for p in model.parameters())


def test_grafts_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"no list of blocks at 'transformer_blocks'; it has \['layers'\]"):
        graft_looped_blocks(encoder())
    with pytest.raises(ValueError, match="freeze must be one of full, half, none; got 'most'"):
        graft_looped_blocks(encoder(), block_attr="layers", freeze="most")
    with pytest.raises(ValueError, match=r"backend must be one of .*; got 'cuda'"):
        graft_looped_blocks(encoder(), block_attr="layers", backend="cuda")
    with pytest.raises(ValueError, match="give layout= and topology= too"):
        graft_looped_blocks(encoder(), block_attr="layers", measure_on={})
    bare = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(3, 3)])})
    with pytest.raises(ValueError, match="pass inner_dim="):
        graft_looped_blocks(bare, block_attr="layers")


def test_a_wrapper_of_the_users_is_used():
    class Own(LoopedBlockWrapper):
        pass

    blocks, _ = graft_looped_blocks(encoder(), 2, "layers", wrapper_class=Own, loops=2)
    assert all(type(block) is Own and block.loops == 2 and block.embed_dim == 16 for block in blocks)


def test_a_graft_says_that_it_does_not_loop_yet(caplog):
    model = encoder()
    blocks, _ = graft_looped_blocks(model, 3, "layers")
    assert "they run 1 loop until set_loops" in caplog.text
    assert repr(model).count("1 of 3 loops") == len(blocks)
    blocks[0].set_loops(2)
    assert "2 of 3 loops" in repr(model)
    caplog.clear()
    graft_looped_blocks(encoder(), 3, "layers", loops=3)
    assert not caplog.text


def test_a_looped_encoder_learns():
    model = encoder()
    graft_looped_blocks(model, 3, "layers", loops=3)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    x, target = torch.randn(4, 5, 16), torch.randn(4, 5, 16)
    losses = []
    for _ in range(30):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
