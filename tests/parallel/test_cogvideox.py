"""A looped CogVideoX model whose tokens and heads ranks share, over gloo."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist

from canvas_engineering.cogvideox import CanvasAttnProcessor
from canvas_engineering.graft import graft_looped_blocks, ungraft
from tests.cogvideox_models import diffusers, inputs, tiny_model
from tests.conformance.processes import run
from tests.graft.test_cogvideox_attention import TOPOLOGIES, grafted, layout_of

parallel_config = getattr(diffusers, "ContextParallelConfig", None)
pytestmark = pytest.mark.skipif(parallel_config is None, reason="this diffusers has no enable_parallelism")
# diffusers rotates in float32, which turns a last digit of float64 into one of float32
TOLERANCE = {"2b": 1e-12, "5b": 1e-6, "1.5": 1e-6}


def config(world: int, rings: int = 1):
    return parallel_config(ulysses_degree=world // rings, ring_degree=rings)


def dense(kind: str, loops: int = 1):
    model = tiny_model(kind, num_attention_heads=3)
    graft_looped_blocks(model, 3, loops=loops)
    return model


def models() -> dict:
    """Looped models: dense and of topologies, packed or not, of 2 and 3 heads, looping, fused, checkpointed."""
    cases = {
        "2b, dense": dense("2b"),
        "2b, tiles, packed": grafted("2b", "tiles", loops=2, sharpening=[1.0, 1.5, 2.0]),
        "5b, tiles, in raster order": grafted("5b", "tiles", packed=False),
        "1.5, sparse": grafted("1.5", "sparse", loops=2),
    }
    cases["1.5, sparse"].fuse_qkv_projections()
    cases["2b, tiles, packed"].enable_gradient_checkpointing()
    for model in cases.values():
        model.double().train().requires_grad_()
    return cases


def step(model, kind: str) -> list[torch.Tensor]:
    model.zero_grad()
    out = model(**inputs(kind, dtype=torch.float64))[0]
    out.square().mean().backward()
    return [out.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())]


def equal_to_one_process(rank: int, world: int) -> None:
    for name, model in models().items():
        kind = name.partition(",")[0]
        expected = step(copy.deepcopy(model), kind)
        # dense attention shares heads alone
        rings = 1 if "dense" in name else {2: 1, 3: 3, 4: 2}[world]
        model.enable_parallelism(config=config(world, rings))
        results = step(model, kind)
        for gradient in results[1:]:
            dist.all_reduce(gradient.div_(world))
        names = ["out", *(parameter for parameter, _ in model.named_parameters())]
        # gradients of biases of keys are 0 but for rounding
        largest = max(wanted.abs().max().item() for wanted in expected[1:])
        for what, wanted, x in zip(names, expected, results, strict=True):
            scale = max(wanted.abs().max().item(), 0.01 * largest)
            error = (x - wanted).abs().max().item() / scale
            assert error <= TOLERANCE[kind], f"{name}: {what} is off by {error:.2e}"
        with pytest.raises(ValueError, match="already"):
            model.enable_parallelism(config=parallel_config(ulysses_degree=world))
        with pytest.raises(ValueError, match="cut over ranks"):
            model.set_attn_processor(CanvasAttnProcessor())
        again = step(ungraft(model), kind)[0]
        assert again.shape == expected[0].shape
    refusals(rank, world)


def refusals(rank: int, world: int) -> None:
    """What is refused leaves the model as it was."""
    model = grafted("5b", "window").double()
    given = inputs("5b", dtype=torch.float64)
    before = model(**given)[0]
    with pytest.raises(ValueError, match="dense attention shares heads alone"):
        dense("2b").enable_parallelism(config=config(world, world))
    with pytest.raises(ValueError, match="shares heads and rows"):
        model.enable_parallelism(config=parallel_config(ulysses_degree=world), cp_plan={})
    assert torch.equal(model(**given)[0], before)
    other = grafted("5b", "window" if rank else "tiles").double()
    with pytest.raises(ValueError, match="ranks 0 and 1 differ in their declaration"):
        other.enable_parallelism(config=parallel_config(ulysses_degree=world))
    stock = tiny_model("5b").double()
    stock.set_attn_processor(CanvasAttnProcessor(layout_of(stock), TOPOLOGIES["window"]))
    before = stock(**given)[0]
    with pytest.raises(Exception):  # noqa: B017 diffusers has several, by device, and ours is the last of them
        stock.enable_parallelism(config=parallel_config(ulysses_degree=world))
    assert torch.equal(stock(**given)[0], before)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_heads_and_rows_of_a_looped_model(world, tmp_path):
    assert run(equal_to_one_process, world, folder=tmp_path, seconds=240, world=world) == [0] * world


def test_the_stock_model_cannot_be_cut_by_hand():
    processor = CanvasAttnProcessor()
    with pytest.raises(ValueError, match="graft the model"):
        processor._parallel_config = parallel_config(ulysses_degree=2)
    assert processor._parallel_config is None
