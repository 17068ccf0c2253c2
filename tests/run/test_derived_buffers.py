"""Modules in every state that torch gives them: made under inference_mode, fake or on meta, then trained or loaded."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from canvas_engineering import (
    ATTENTION_REGISTRY,
    ActionHead,
    HybridScheduler,
    LoopedBlockWrapper,
    ResidualAccumulator,
    SemanticConditioner,
    SlotBindingModule,
    SpatiotemporalCanvas,
    create_attention,
    graft_looped_blocks,
)
from canvas_engineering.derived_buffers import CanvasModule
from canvas_engineering.looped_block import LoopParameters
from canvas_engineering.scheduling import LearnedScheduler
from tests.run.test_processes import D_MODEL, Programmed, canvases, declaration, programmed

MODULES = {
    "dispatcher": lambda: Programmed().dispatcher,
    "scheduler": lambda: Programmed().scheduler,
    "canvas": lambda: SpatiotemporalCanvas(declaration()[0], program=Programmed().scheduler.program),
    "semantic": lambda: SpatiotemporalCanvas(
        declaration()[0], SemanticConditioner(D_MODEL, 2, {name: (1.0, 2.0) for name in "abc"})
    ),
    "slots": lambda: SlotBindingModule(8, 3, 2, birth_death=True),
    "loops": lambda: LoopParameters(3, 8, streams=2),
    "head": ActionHead,
    "learned": lambda: LearnedScheduler(3, 2, 1),
}
MODULES |= {fn: lambda fn=fn: create_attention(fn, 16, 2) for fn in ATTENTION_REGISTRY}


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, buffers, and state that processes keep for themselves."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers()), **module.state_dict(keep_vars=True)}


def steps(model: nn.Module) -> list[torch.Tensor]:
    """Outputs of the steps of both ranks' canvases, and what is then saved."""
    outs = [model(*arguments) for arguments in (a for rank in canvases(declaration()[0]) for a in rank)]
    return [*outs, *model.state_dict().values()]


@pytest.mark.parametrize("name", MODULES)
def test_modules_that_are_made_under_inference_mode_can_be_trained(name):
    with torch.inference_mode():
        module = MODULES[name]().double()
    assert not [name for name, tensor in tensors(module).items() if tensor.is_inference()]


@pytest.mark.parametrize("name", MODULES)
def test_modules_can_be_made_of_fake_tensors_and_real_ones_after(name):
    with FakeTensorMode():
        fake = tensors(MODULES[name]())
    real = tensors(MODULES[name]())
    assert {type(tensor) for tensor in real.values()} <= {torch.Tensor, nn.Parameter}
    assert {key: (t.shape, t.dtype) for key, t in fake.items()} == {key: (t.shape, t.dtype) for key, t in real.items()}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_a_meta_start_and_a_load_give_every_tensor(name, assign):
    whole = MODULES[name]()
    with torch.device("meta"):
        module = MODULES[name]()
    if not assign:
        fill = torch.utils.deterministic.fill_uninitialized_memory
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.use_deterministic_algorithms(True)
        try:
            module.to_empty(device="cpu")
        finally:
            torch.use_deterministic_algorithms(False)
            torch.utils.deterministic.fill_uninitialized_memory = fill
    module.load_state_dict(whole.state_dict(), strict=True, assign=assign)
    found = tensors(module)
    for key, tensor in tensors(whole).items():
        assert torch.equal(found[key], tensor) and found[key].dtype == tensor.dtype, key


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), lambda model: model.half().double()],
    ids=["deepcopy", "pickle", "16 bits and back"],
)
def test_tables_and_state_are_copied_and_keep_their_dtype(copied):
    model = programmed()[0]
    with torch.no_grad():
        for parameter in model.parameters():  # numbers that 16 bits hold
            parameter.copy_(parameter.half())
    steps(model)
    before = {key: tensor.clone() for key, tensor in tensors(model).items()}
    assert "dispatcher.residual_accumulator.values" in model.state_dict()
    other = copied(model)
    for key, tensor in tensors(other).items():
        assert torch.equal(tensor, before[key]) and tensor.dtype == before[key].dtype, key
    if other is not model:
        other.dispatcher.residual_accumulator.reset()
        assert model.dispatcher.summaries["b"]["prediction"] > 0


def test_state_is_no_buffer_of_its_parents():
    # which is what DistributedDataParallel broadcasts in each forward
    listed = dict(nn.Sequential(Programmed()).named_buffers())
    names = ("values", "last_fired", "boundary_t")
    assert not [name for name in listed if name.rpartition(".")[2] in names]
    assert [name for name, _ in ResidualAccumulator(["a"]).named_buffers()] == ["values"]


def test_state_can_be_handed_to_functional_calls():
    accumulator = ResidualAccumulator(["a"])
    model = nn.Module()
    model.errors, model.forward = accumulator, lambda error: accumulator.update("a", error) or accumulator.values.sum()
    values = torch.ones(1, 1)
    found = torch.func.functional_call(model, {"errors.values": values}, (torch.zeros(2),))
    torch.testing.assert_close(found, torch.tensor(0.95))
    assert accumulator.summaries() == {"a": {"prediction": 0.0}}


def test_a_scorer_whose_first_step_was_an_evaluation_can_be_trained():
    program = Programmed().scheduler.program
    scheduler = HybridScheduler(program, ["a", "b"])
    with torch.inference_mode():
        scheduler.step(0, {"a": {"error": 1.0}})
    _, scores = scheduler.learned(torch.ones(1))
    scores.sum().backward()
    assert all(parameter.grad is not None for parameter in scheduler.parameters())


def test_others_modules_made_under_inference_mode_are_refused_by_name():
    with torch.inference_mode():
        block = nn.Linear(8, 8)
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, batch_first=True), 1)
    with pytest.raises(ValueError, match=r"block 3, a Linear, was made or moved under torch.inference_mode.*: weight"):
        LoopedBlockWrapper(block, 3, embed_dim=8)
    with pytest.raises(ValueError, match=r"the model, a TransformerEncoder,.*layers\.0\..* and \d+ more\. Make it"):
        graft_looped_blocks(encoder, block_attr="layers", loops=2)
    # the way out that the message names
    encoder = copy.deepcopy(encoder)
    with torch.inference_mode():
        _, head = graft_looped_blocks(encoder, block_attr="layers", loops=2, freeze="none")
    encoder(torch.randn(1, 3, 16)).sum().backward()
    assert all(p.grad is not None for p in encoder.parameters()) and not next(head.parameters()).is_inference()


def test_subclasses_of_users_leave_inference_mode_too():
    class Scaled(CanvasModule):
        def __init__(self, size: int):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(size))

    with torch.inference_mode():
        assert not Scaled(3).scale.is_inference() and torch.is_inference_mode_enabled()


def test_a_table_is_an_array():
    with pytest.raises(TypeError, match="table 'rows' must be a numpy array"):
        CanvasModule().register_table("rows", torch.zeros(2))
    module = CanvasModule()
    module.register_table("rows", np.array([True]))
    assert module.half().rows.dtype == torch.bool and not module.state_dict()
