"""Random calls of canvas_attention, in one process and over the ranks of a mesh."""

from __future__ import annotations

import dataclasses
import math
from random import Random

import numpy as np
import torch
import torch.distributed as dist

from canvas_engineering import AttentionPlan, CanvasLayout, CanvasTopology, Connection, canvas_attention
from canvas_engineering.plan import compile_attention
from tests.strategies import random_layout, random_topology

TOLERANCE = 1e-12


@dataclasses.dataclass(frozen=True)
class Call:
    """A plan, float tensors, and which of them need gradients: q, k, v and perhaps the gains."""

    plan: AttentionPlan
    tensors: tuple[torch.Tensor, ...]
    options: dict
    upstream: torch.Tensor


def random_plan(rng: Random, form: str, max_positions: int = 40) -> AttentionPlan:
    layout = random_layout(rng, max_positions)
    modes = ("add", "add", "replace") if form == "edge" else ("add",)
    topology = random_topology(rng, layout, write_modes=modes, fns=(None,))
    return compile_attention(layout, topology, normalize=form)


def frames_plan(form: str, frames: int = 6, tokens: int = 4, text: int = 3) -> AttentionPlan:
    """A video whose frames attend to the frame before, to themselves and to a text, which attends to everything."""
    regions = {"text": (0, 1, 0, text), "video": (0, frames, text, text + tokens)}
    connections = [
        Connection("text", "text"),
        Connection("text", "video"),
        Connection("video", "text"),
        Connection("video", "video", t_src=0, t_dst=0),
        Connection("video", "video", t_src=0, t_dst=-1, weight=0.5),
    ]
    layout = CanvasLayout(T=frames, d_model=8, spatial_shape=(text + tokens,), regions=regions)
    return compile_attention(layout, CanvasTopology(connections), normalize=form)


def call_of(plan: AttentionPlan, seed: int, dtype=torch.float64, heads: int | None = None) -> Call:
    """A call with drawn sizes, memory orders, gains, activity and row scales."""
    rng, generator = Random(f"call {seed}"), torch.Generator().manual_seed(seed)
    heads = heads or rng.choice([1, 2, 3, 5])
    batch, dim, n = rng.choice([1, 2]), rng.choice([3, 8]), plan.n_positions

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def rows():
        return draw(batch, n, heads, dim).transpose(1, 2) if rng.random() < 0.5 else draw(batch, heads, n, dim)

    tensors, options = [rows() for _ in range(3)], {"scale": 0.7 / math.sqrt(dim)}
    if plan.normalize == "edge":
        if rng.random() < 0.6:
            tensors.append(draw(plan.n_connections))
        if rng.random() < 0.6:
            options["active"] = torch.tensor([float(rng.random() < 0.7) for _ in range(plan.n_connections)])
        if rng.random() < 0.3:
            scale = plan.row_scale(options.get("active"), torch.float64, torch.device("cpu"))
            options["row_scale"] = scale * (1 + draw(*scale.shape).square())
    return Call(plan, tuple(tensors), options, draw(batch, n, heads, dim).transpose(1, 2))


def run_whole(call: Call, **options) -> list[torch.Tensor]:
    """The result and the gradients of q, k, v and gains in one process."""
    tensors = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in call.tensors]
    out = _attend(call, tensors, call.plan, options)
    return [out.detach(), *torch.autograd.grad(out, tensors, call.upstream)]


def run_own(call: Call, placed, attend=None, **options) -> list[torch.Tensor]:
    """The same of this rank's positions; gradients of gains summed over ranks."""
    own = torch.from_numpy(placed.positions)
    tensors = [like(x, x[:, :, own]).requires_grad_() for x in call.tensors[:3]]
    tensors += [x.clone().requires_grad_() for x in call.tensors[3:]]
    out = (attend or _attend)(call, tensors, placed, options)
    results = [out.detach(), *torch.autograd.grad(out, tensors, call.upstream[:, :, own])]
    for x in results[4:]:
        dist.all_reduce(x)
    return results


def like(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``rows`` in the memory order of x, which decides how torch computes."""
    return rows.contiguous() if x.is_contiguous() else rows.transpose(1, 2).contiguous().transpose(1, 2)


def _attend(call: Call, tensors, plan, options) -> torch.Tensor:
    q, k, v, *gain = tensors
    return canvas_attention(q, k, v, plan, gain=gain[0] if gain else None, **call.options, **options)


def run_by_heads(call: Call, ranks: int, **options) -> list[torch.Tensor]:
    """What :func:`run_whole` gives where one process runs the heads of each rank after those of the one before.

    BLAS may round otherwise where more heads lie side by side, and only there.
    """
    results = []
    for own in torch.arange(call.upstream.shape[1]).tensor_split(ranks):
        tensors = [x if x.dim() == 1 else like(x, x[:, own]) for x in call.tensors]
        upstream = call.upstream[:, own].transpose(1, 2).contiguous().transpose(1, 2)
        results.append(run_whole(dataclasses.replace(call, tensors=tuple(tensors), upstream=upstream), **options))
    return [sum(parts) if parts[0].dim() == 1 else torch.cat(parts, 1) for parts in zip(*results)]


def check_own(call: Call, placed, name: str, heads: int = 0, **options) -> None:
    """Raises unless this rank's results are those rows of one process's; with ``heads``, the number of ranks that
    share them, bit for bit."""
    results = run_own(call, placed, **options)
    budget = TOLERANCE if call.upstream.dtype == torch.float64 else 1e-5
    check_rows(results, run_whole(call, **options), placed, name, budget)
    if heads:
        check_rows(results[:4], run_by_heads(call, heads, **options)[:4], placed, name, 0.0)


def check_rows(results: list[torch.Tensor], expected: list[torch.Tensor], placed, name: str, budget: float) -> None:
    """Raises unless ``results`` are these rows of ``expected``, within ``budget`` of its largest value."""
    own = torch.from_numpy(placed.positions)
    assert len(results) == len(expected)
    for what, whole, x in zip(("out", "dq", "dk", "dv", "dgain"), expected, results):
        wanted = whole if what == "dgain" else whole[:, :, own]
        assert x.shape == wanted.shape, f"{name}: {what} is {tuple(x.shape)} for {tuple(wanted.shape)}"
        error = (x - wanted).abs().max().item() if x.numel() else 0.0
        scale = max(whole.abs().max().item(), 1e-30) if whole.numel() else 1.0
        assert error <= budget * scale, f"{name}: {what} is off by {error / scale:.2e}"


def owners(plan: AttentionPlan, world: int, rng: Random) -> dict[str, np.ndarray]:
    """Owner arrays: uneven, one rank without positions, one with a single one, and all on one rank."""
    n = plan.n_positions
    uneven = np.sort([rng.randrange(world) for _ in range(n)])
    one_row = np.zeros(n, np.int64)
    one_row[:1] = world - 1
    return {
        "uneven": uneven,
        "scattered": np.array([rng.randrange(world) for _ in range(n)]),
        "an empty rank": uneven % (world - 1) if world > 1 else uneven,
        "one row": one_row,
        "everything on one rank": np.full(n, world - 1),
    }
