"""Curriculum, sharpening, action heads and loop checkpoints."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from canvas_engineering.action_heads import ActionHead
from canvas_engineering.checkpoint import load_loop_checkpoint, save_loop_checkpoint
from canvas_engineering.curriculum import CurriculumScheduler
from canvas_engineering.looped_block import LoopedBlockWrapper
from canvas_engineering.sharpening import SharpeningSchedule


def test_curriculum_has_equal_phases():
    curriculum = CurriculumScheduler(max_loops=3, total_steps=300)
    loops = [curriculum.get_loops(step) for step in range(400)]
    assert [loops.count(n) for n in (1, 2, 3)] == [100, 100, 200] and loops == sorted(loops)


def test_curriculum_warms_up_with_one_loop():
    curriculum = CurriculumScheduler(max_loops=2, total_steps=100, warmup_fraction=0.4)
    loops = [curriculum.get_loops(step) for step in range(100)]
    assert loops == [1] * 70 + [2] * 30


def test_curriculum_sets_blocks():
    blocks = [LoopedBlockWrapper(nn.Identity(), max_loops=3, embed_dim=2) for _ in range(2)]
    assert CurriculumScheduler(3, 30).step(blocks, 15) == 2
    assert [block.loops for block in blocks] == [2, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 10), "at least 1"), ((3, 0), "at least 1"), ((3, 10, 1.0), r"warmup_fraction must lie in \[0, 1\), got 1.0")],
)
def test_a_wrong_curriculum_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CurriculumScheduler(*arguments)
    with pytest.raises(ValueError, match="step must be at least 0"):
        CurriculumScheduler().get_loops(-1)


@pytest.mark.parametrize(
    ("schedule", "middle"),
    [("linear", 2.5), ("exponential", 2.0), ("cosine", 2.5)],
)
def test_sharpening_schedules(schedule, middle):
    betas = [SharpeningSchedule(3, 1.0, 4.0, schedule)(loop) for loop in range(3)]
    assert betas == pytest.approx([1.0, middle, 4.0])
    assert SharpeningSchedule(1, 1.5, 4.0, schedule)(0) == pytest.approx(1.5)


def test_cosine_sharpening_starts_slowly():
    # min + (max − min)(1 − cos π/4)/2
    assert SharpeningSchedule(5, 1.0, 3.0, "cosine")(1) == pytest.approx(1 + 2 * (1 - math.cos(math.pi / 4)) / 2)


def test_wrong_sharpening_is_refused():
    with pytest.raises(ValueError, match="unknown schedule 'step'"):
        SharpeningSchedule(schedule="step")
    with pytest.raises(ValueError, match="beta_min must be positive and finite, got 0"):
        SharpeningSchedule(beta_min=0)
    with pytest.raises(ValueError, match="0 … 3, got 4"):
        SharpeningSchedule()(4)


def test_action_head_averages_over_time_and_space():
    torch.manual_seed(0)
    head = ActionHead(latent_channels=16, action_dim=7)
    assert [tuple(p.shape) for p in head.parameters()] == [(8, 16), (8,), (7, 8), (7,)]
    assert ActionHead(64, 3).net[0].out_features == 32
    video = torch.randn(2, 3, 16, 4, 5)
    expected = head.net(video.mean(dim=(1, 3, 4)))
    torch.testing.assert_close(head(video), expected)
    tokens = video.permute(0, 1, 3, 4, 2).reshape(2, 60, 16)
    torch.testing.assert_close(head(tokens), expected)
    with pytest.raises(ValueError, match=r"C = 16; got \(2, 16\)"):
        head(torch.zeros(2, 16))
    with pytest.raises(ValueError, match=r"got \(2, 3, 4, 5, 6\)"):
        head(torch.zeros(2, 3, 4, 5, 6))


def looped(max_loops=3, dim=4, n=2, gate="tanh"):
    blocks = [LoopedBlockWrapper(nn.Identity(), i, max_loops, dim, gate=gate) for i in range(n)]
    for block in blocks:
        for parameter in block.loop.parameters():
            nn.init.normal_(parameter)
        block.set_loops(2)
    return blocks


@pytest.mark.parametrize("name", ["loops.safetensors", "loops.pt"])
def test_checkpoints_round_trip(name, tmp_path):
    pytest.importorskip("safetensors", reason="loop checkpoints are safetensors files")
    blocks, head = looped(), ActionHead(4, 2)
    path = tmp_path / "new" / name
    save_loop_checkpoint(blocks, head, path, {"step": 7})
    others, other_head = looped(), ActionHead(4, 2)
    others[0].set_loops(3)
    description = load_loop_checkpoint(others, other_head, path)
    assert description["metadata"] == {"step": 7} and description["versions"]["torch"] == torch.__version__
    for saved, loaded in zip([*blocks, head], [*others, other_head]):
        assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), loaded.parameters()))
    assert [block.loops for block in others] == [2, 2]
    assert list(path.parent.iterdir()) == [path]
    (tmp_path / "other").touch()  # and as readable as any other file
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_safetensors_metadata_is_versioned_json(tmp_path):
    safetensors = pytest.importorskip("safetensors", reason="loop checkpoints are safetensors files")
    save_loop_checkpoint(looped(), None, tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        description = json.loads(file.metadata()["canvas_engineering"])
        assert set(file.keys()) == {f"loop_blocks.block_{i}.{p}" for i in (0, 1) for p in ("loop_emb", "loop_gate")}
    assert description["format"] == "1.0.0" and description["max_loops"] == [3, 3] and description["gate"] == "tanh"


def test_published_checkpoints_load(tmp_path):
    blocks, head = looped(gate="sigmoid"), ActionHead(4, 2)
    group = {"loop_emb": torch.full((3, 4), 0.5), "loop_gate": torch.ones(3, 1)}
    saved = {
        "loop_blocks": {"block_0": group, "block_1": group},
        "action_head": {f"layers.{k}": torch.full_like(v, 0.25) for k, v in head.state_dict().items()},
    }
    torch.save(saved, tmp_path / "published.pt")
    assert load_loop_checkpoint(blocks, head, tmp_path / "published.pt") == {}
    assert blocks[1].loop_emb.eq(0.5).all() and blocks[0].loop_gate.eq(1).all()
    assert all(p.eq(0.25).all() for p in head.parameters())
    with pytest.raises(ValueError, match='gate "sigmoid"'):
        load_loop_checkpoint(looped(), head, tmp_path / "published.pt")


@pytest.mark.parametrize(
    ("model", "head", "message"),
    [
        (looped(n=3), ActionHead(4, 2), r"2 blocks, the model 3"),
        (looped(dim=5), ActionHead(4, 2), r"block_0\.loop_emb \(3, 4\), the model \(3, 5\)"),
        (looped(gate="sigmoid"), ActionHead(4, 2), 'gate "tanh", the model "sigmoid"'),
        (looped(), ActionHead(4, 3), r"action_head\.net\.2\.bias \(2,\), the model \(3,\)"),
    ],
)
def test_a_mismatch_is_told_and_changes_nothing(model, head, message, tmp_path):
    save_loop_checkpoint(looped(), ActionHead(4, 2), tmp_path / "a.pt")
    before = [p.detach().clone() for module in [*model, head] for p in module.parameters()]
    with pytest.raises(ValueError, match=message):
        load_loop_checkpoint(model, head, tmp_path / "a.pt")
    assert all(torch.equal(a, b) for a, b in zip(before, (p for m in [*model, head] for p in m.parameters())))


def test_a_missing_action_head_is_told(tmp_path):
    save_loop_checkpoint(looped(), None, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="no action head, the model has one"):
        load_loop_checkpoint(looped(), ActionHead(4, 2), tmp_path / "a.pt")


def test_files_that_are_no_checkpoints_are_named(tmp_path):
    pytest.importorskip("safetensors", reason="loop checkpoints are safetensors files")
    (tmp_path / "a.safetensors").write_bytes(b"nonsense, and more of it")
    with pytest.raises(ValueError, match=r"a\.safetensors is neither"):
        load_loop_checkpoint(looped(), None, tmp_path / "a.safetensors")
    torch.save({"weights": 1}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"b\.pt is not a loop checkpoint"):
        load_loop_checkpoint(looped(), None, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="metadata must be of the kinds that JSON holds"):
        save_loop_checkpoint(looped(), None, tmp_path / "c.pt", {"tensor": torch.zeros(1)})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.pt"]


# -- files that were cut short, and others ----------------------------------------------------------------------------


def state_of(blocks, head) -> list:
    tensors = [p.detach().clone() for module in [*blocks, head] for p in module.parameters()]
    return [*tensors, *(block.loops for block in blocks)]


def assert_refused(path, message):
    """Refused with the file's name, by a model that it changes nothing of."""
    blocks, head = looped(), ActionHead(4, 2)
    before = state_of(blocks, head)
    with pytest.raises(ValueError, match=rf"{re.escape(path.name)} is (not )?a loop checkpoint.*({message})"):
        load_loop_checkpoint(blocks, head, path)
    for old, new in zip(before, state_of(blocks, head)):
        assert torch.equal(old, new) if isinstance(old, torch.Tensor) else old == new


@pytest.mark.parametrize("name", ["cut.pt", "cut.safetensors"])
def test_a_file_that_was_cut_short_is_named_and_changes_nothing(name, tmp_path):
    pytest.importorskip("safetensors", reason="loop checkpoints are safetensors files")
    save_loop_checkpoint(looped(), ActionHead(4, 2), tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for length in (0, 1, 2, 8, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / name).write_bytes(whole[:length])
        assert_refused(tmp_path / name, "torch cannot load it|neither a safetensors file")


def described(tmp_path, change) -> Path:
    """A safetensors checkpoint whose description is changed."""
    safetensors = pytest.importorskip("safetensors", reason="loop checkpoints are safetensors files")
    from safetensors.torch import save_file

    blocks, head = looped(), ActionHead(4, 2)
    for parameter in [p for module in [*blocks, head] for p in module.parameters()]:
        torch.nn.init.ones_(parameter)
    save_loop_checkpoint(blocks, head, tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        text = file.metadata()["canvas_engineering"]
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
    save_file(tensors, tmp_path / "changed.safetensors", metadata={"canvas_engineering": change(text)})
    return tmp_path / "changed.safetensors"


def with_entry(name, value):
    return lambda text: json.dumps({**json.loads(text), name: value})


@pytest.mark.parametrize(
    "change, message",
    [
        (with_entry("loops", [0, 1]), "loops must be at least 1, got 0"),
        (with_entry("loops", ["2", 1]), "loops must be an int, got '2'"),
        (with_entry("loops", [True, 1]), "loops must be an int, got True"),
        (with_entry("loops", [1]), "the loops of 1 blocks, and holds 2"),
        (with_entry("loops", None), "loops must be a tuple of ints, got None"),
        (with_entry("loops", 2), "loops must be a tuple of ints, got 2"),
        (with_entry("format", "99.0.0"), r'its format is "99\.0\.0", known are 1\.0\.0'),
        (with_entry("format", "1.1.0"), r'its format is "1\.1\.0"'),
        (with_entry("format", None), "its format is null"),
        (with_entry("format", ["1.0.0"]), "its format is"),
        (with_entry("canvas", [[[1]]]), r"canvas \[\[\[1\]\]\], the model null"),
        (lambda text: "[1]", r"its description must be a dict, got \[1\]"),
        (lambda text: "null", "its description must be a dict, got None"),
        (lambda text: text[:-9], "Expecting|Unterminated"),
        (lambda text: "[" * 5000 + "]" * 5000, "nested more than 120 levels"),
    ],
)
def test_descriptions_that_cannot_be_meant_are_refused_before_anything_is_set(change, message, tmp_path):
    assert_refused(described(tmp_path, change), message)


@pytest.mark.parametrize(
    "content, message",
    [
        ([1], "it has no loop_blocks"),
        ({"loop_blocks": [1]}, "it has no loop_blocks"),
        ({"loop_blocks": {"block_0": 1, "block_1": {}}}, "its block_0 holds something else than plain tensors"),
        ({"loop_blocks": {"block_0": {"loop_emb": [1.0]}}}, "its block_0 holds something else"),
        ({"loop_blocks": {}, "action_head": [1]}, "its action_head holds something else"),
        ({"loop_blocks": {}, "metadata": [1]}, "its description must be a dict"),
        ({"loop_blocks": {}, "metadata": {"format": "2.0.0"}}, r'its format is "2\.0\.0"'),
    ],
)
def test_what_another_program_saved_is_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "foreign.pt")
    assert_refused(tmp_path / "foreign.pt", message)


# torch 2.11 warns where it loads such tensors
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
def test_tensors_of_another_kind_are_told(tmp_path):
    group = {"loop_emb": torch.ones(3, 4, dtype=torch.complex64), "loop_gate": torch.ones(3, 1, dtype=torch.int64)}
    torch.save({"loop_blocks": {"block_0": group, "block_1": group}}, tmp_path / "kinds.pt")
    assert_refused(tmp_path / "kinds.pt", r"block_0.loop_emb of torch.complex64, the model torch.float32")
    sparse = {name: tensor.float().to_sparse() for name, tensor in {"loop_gate": group["loop_gate"]}.items()}
    torch.save({"loop_blocks": {"block_0": sparse}}, tmp_path / "sparse.pt")
    assert_refused(tmp_path / "sparse.pt", "its block_0 holds something else than plain tensors")


def test_a_checkpoint_that_is_not_there_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        load_loop_checkpoint(looped(), None, tmp_path / "none.pt")


@pytest.mark.parametrize("metadata", [{"x": float("nan")}, {"x": {1, 2}}, [[torch.ones(1)]]])
def test_metadata_that_json_has_no_form_for_leaves_the_file_alone(metadata, tmp_path):
    save_loop_checkpoint(looped(), None, tmp_path / "a.pt", {"step": 1})
    with pytest.raises(ValueError, match="metadata must be of the kinds that JSON holds"):
        save_loop_checkpoint(looped(), None, tmp_path / "a.pt", metadata)
    assert load_loop_checkpoint(looped(), None, tmp_path / "a.pt")["metadata"] == {"step": 1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loop_parameters_stay_float32_beside_halves(dtype):
    block = LoopedBlockWrapper(nn.Linear(4, 4).to(dtype), max_loops=2, embed_dim=4)
    assert {p.dtype for p in block.loop.parameters()} == {torch.float32} and block.original.weight.dtype == dtype
    with torch.no_grad():
        block.loop.loop_gate.fill_(1 / 3)
    for cast in (lambda b: b.to(dtype), lambda b: b.half(), lambda b: b.bfloat16(), lambda b: b.to("cpu", dtype)):
        cast(block)
        assert torch.equal(block.loop_gate, torch.full((2, 1), 1 / 3)) and block.loop_gate.dtype == torch.float32
    block.to(dtype).set_loops(2)
    out = block(torch.randn(2, 3, 4, dtype=dtype))
    out.float().square().mean().backward()
    assert out.dtype == dtype and block.loop_gate.grad.dtype == torch.float32
    assert block.double().loop_gate.dtype == torch.float64
    assert LoopedBlockWrapper(nn.Linear(4, 4).double(), embed_dim=4).loop_gate.dtype == torch.float64


def test_a_gate_of_a_bfloat16_backbone_goes_on_moving():
    block = LoopedBlockWrapper(nn.Linear(4, 4).bfloat16(), embed_dim=4)
    optimizer = torch.optim.AdamW([block.loop_gate], lr=1e-4, weight_decay=0.0)
    for _ in range(1500):
        block.loop_gate.grad = -torch.ones_like(block.loop_gate)
        optimizer.step()
    assert float(block.loop_gate.detach().min()) > 0.14  # in bfloat16 it stands still at 1/16


def test_each_further_loop_keeps_one_copy_of_its_input():
    from benchmarks.measure import peak_bytes

    def peak(loops: int, saves: bool) -> int:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 2, 128, batch_first=True, dropout=0.0)
        block = LoopedBlockWrapper(layer, max_loops=4, embed_dim=32, use_gradient_checkpointing=saves)
        block.train().set_loops(loops)
        nn.init.constant_(block.loop.loop_gate, 0.3)
        x = torch.randn(2, 400, 32)
        block(x).square().mean().backward()  # gradients are there, and autograd is warm
        return peak_bytes(lambda: block(x).square().mean().backward())

    copy = 2 * 400 * 32 * 4
    further = [(peak(loops + 1, True) - peak(loops, True)) / copy for loops in (2, 3)]
    assert max(further) <= 1.15, further
    assert (peak(4, False) - peak(3, False)) / copy > 10
