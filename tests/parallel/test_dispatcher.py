"""Dispatchers on rows of several ranks, alone, compiled, checkpointed, and under DDP and FSDP2, over gloo."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from canvas_engineering import AttentionDispatcher, CanvasLayout, CanvasTopology, Connection, ResidualAccumulator
from canvas_engineering.distributed import CanvasParallel, rank_rows
from tests.conformance.processes import run

D, TOLERANCE = 8, 1e-12
FUNCTIONS = (
    "cross_attention",
    "cosine_attention",
    "gated",
    "sigmoid_attention",
    "sparse_attention",
    "linear_attention",
    "pooling",
    "perceiver",
    "random_fixed",
)


def layout() -> CanvasLayout:
    regions = {"text": (0, 1, 0, 3), "video": (0, 5, 3, 7), "state": (0, 5, 7, 9)}
    return CanvasLayout(T=5, d_model=D, spatial_shape=(10,), regions=regions)


def topology(fn: str) -> CanvasTopology:
    return CanvasTopology(
        [
            Connection("video", "video", t_src=0, t_dst=0),
            Connection("video", "video", t_src=0, t_dst=-1, fn=fn, weight=0.5),
            Connection("video", "text", fn=fn),
            Connection("text", "video", fn=fn, write_mode="gate"),
            Connection("state", "video", fn=fn, write_mode="replace", t_src=0, t_dst=0),
            Connection("state", "state"),
        ]
    )


class Block(nn.Module):
    """A pre-norm block of attention and an MLP, which treats positions alike."""

    def __init__(self, fn: str = "cross_attention"):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.mlp = nn.LayerNorm(D), nn.Linear(D, D)
        self.attention = AttentionDispatcher(topology(fn), layout(), D, n_heads=2, backend="torch")
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        self.double()

    def forward(self, x: torch.Tensor, active: torch.Tensor | None = None) -> torch.Tensor:
        x = self.attention(self.norm(x), active, add_to=x)
        return x + self.mlp(x)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, target = torch.randn(2, 2, layout().num_positions, D, generator=generator, dtype=torch.float64)
    return x, target


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    own = {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in own.items()}


def close(x: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    error = (x - wanted).abs().max().item() if x.numel() else 0.0
    assert error <= TOLERANCE, f"{what} is off by {error:.2e}"


def step(block, model, rows, call, active, what, average: bool, whole) -> None:
    """One step on own rows against one of the whole canvas."""
    x, target = batch()
    model.zero_grad()
    out = call(model, rows.take(x), active)
    errors = (out - rows.take(target)).square().sum((0, 2))
    (errors.sum() / max(len(errors), 1) * rows.share).backward()
    expected, expected_gradients = whole
    close(out.detach(), rows.take(expected), f"{what}: out")
    for name, gradient in gradients(model).items():
        assert gradient is not None, f"{what}: {name} has no gradient"
        if average:
            dist.all_reduce(gradient.div_(dist.get_world_size()))
        close(gradient, expected_gradients[name], f"{what}: {name}")


def whole_step(block, active):
    x, target = batch()
    block.zero_grad()
    out = block(x, active)
    (out - target).square().sum((0, 2)).mean().backward()
    return out.detach(), {name: parameter.grad.clone() for name, parameter in block.named_parameters()}


def run_model(model, *args):
    return model(*args)


def equal_to_one_process(rank: int, world: int, folder: str) -> None:
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("rows",))
    n = layout().num_positions
    cuts = ("balanced", "by_rows", [(i % (world - 1)) if world > 1 else 0 for i in range(n)])
    for number, fn in enumerate(FUNCTIONS):
        block = Block(fn)
        active = torch.tensor([1.0, 1.0, 0.0]) if number % 2 else None
        whole = whole_step(block, active)
        for cut in cuts if number == 0 else cuts[number % 3 :][:1]:
            own = parallelize_module(copy.deepcopy(block), mesh, {"attention": CanvasParallel(cut)})
            rows = rank_rows(own.attention)
            step(block, own, rows, run_model, active, f"{fn}, {cut}", True, whole)
            close(rows.gather(rows.take(whole[0])), whole[0], "gathered")
            assert own.state_dict().keys() == block.state_dict().keys()
    block = Block()
    whole = whole_step(block, None)

    def make():
        return parallelize_module(copy.deepcopy(block), mesh, {"attention": CanvasParallel()})

    rows = rank_rows(make().attention)
    step(block, make(), rows, partial(checkpoint, use_reentrant=False), None, "checkpointed", True, whole)
    step(block, DistributedDataParallel(make()), rows, run_model, None, "DDP", False, whole)
    if world == 2:
        model = make()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

        def run_compiled(_, *args):
            return compiled(*args)

        step(block, model, rows, run_compiled, None, "compiled", True, whole)
    sharded = fully_shard(make(), mesh=mesh)
    step(block, sharded, rows, run_model, None, "FSDP2", False, whole)
    dcp.save(get_model_state_dict(sharded), checkpoint_id=folder)
    refusals(mesh)


def refusals(mesh) -> None:
    for bad, why in {
        "hyena": "'video' attends to 'video' by 'hyena'",
        "local_attention": "by 'local_attention'",
    }.items():
        with pytest.raises(ValueError, match=why):
            parallelize_module(Block(bad), mesh, {"attention": CanvasParallel()})
    with pytest.raises(ValueError, match="for an AttentionDispatcher"):
        parallelize_module(Block(), mesh, {"mlp": CanvasParallel()})
    with pytest.raises(ValueError, match="parallelize_module first"):
        rank_rows(Block().attention)
    averages = ResidualAccumulator(["video"])
    other = AttentionDispatcher(topology("pooling"), layout(), D, n_heads=2, residual_accumulator=averages)
    with pytest.raises(ValueError, match="residual averages"):
        parallelize_module(other, mesh, CanvasParallel())


def loads(rank: int, world: int, folder: str) -> None:
    """A checkpoint of other numbers of ranks is that of one process."""
    block = Block()
    other = copy.deepcopy(block)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    if world > 1:
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("rows",))
        other = fully_shard(parallelize_module(other, mesh, {"attention": CanvasParallel()}), mesh=mesh)
    state = get_model_state_dict(other)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(other, state)
    for (name, x), wanted in zip(other.named_parameters(), block.parameters(), strict=True):
        assert torch.equal(x.full_tensor() if isinstance(x, DTensor) else x, wanted), name


@pytest.mark.parametrize("world", [2, 3, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_a_block_on_rows_of_ranks_equals_one_process(world, tmp_path):
    for name in ("a", "b", "state"):
        (tmp_path / name).mkdir()
    state, seconds = str(tmp_path / "state"), 240
    assert run(equal_to_one_process, world, state, folder=tmp_path / "a", seconds=seconds, world=world) == [0] * world
    if world == 4:
        assert run(loads, 2, state, folder=tmp_path / "b", seconds=seconds, world=2) == [0, 0]
        assert list(Path(state).glob("*.distcp"))
