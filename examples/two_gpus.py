"""One canvas on the rows of several processes: ``torchrun --standalone --nproc-per-node 2 examples/two_gpus.py``.

Each process holds a share of the positions, gets the rows that its queries attend to before every step, and gives
gradients that are averaged. It trains the same block alone beside it, and prints both losses, which are equal, and what
a process sent. On GPUs it runs over NCCL, else over gloo on the CPU; without torchrun it is one process.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

if not __package__:  # run as a file, whose folder has no package `examples`
    sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("", "kernels")]

from canvas_engineering import AttentionDispatcher, CanvasLayout, CanvasTopology, Connection, RegionSpec, TemporalFill
from canvas_engineering.distributed import CanvasParallel, rank_rows

D_MODEL = 64


class Block(nn.Module):
    """A pre-norm transformer block on a video with a plan, which ticks four times slower."""

    def __init__(self) -> None:
        super().__init__()
        regions = {"video": (0, 8, 0, 8, 0, 8), "plan": RegionSpec((0, 2, 8, 9, 0, 8), period=4)}
        self.layout = CanvasLayout(T=8, d_model=D_MODEL, spatial_shape=(9, 8), regions=regions)
        topology = CanvasTopology(
            [
                Connection("video", "video", t_src=0, t_dst=0),
                Connection("video", "video", t_src=0, t_dst=-1),
                Connection("video", "plan", t_src=0, t_dst=0, temporal_fill=TemporalFill.INTERPOLATE),
                Connection("plan", "video", fn="pooling"),
            ]
        )
        self.attention = AttentionDispatcher(topology, self.layout, d_model=D_MODEL, n_heads=4)
        self.norm, self.mlp = nn.LayerNorm(D_MODEL), nn.Linear(D_MODEL, D_MODEL)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attention(self.norm(x), add_to=x)
        return x + self.mlp(x)


def train(model: nn.Module, take, share: float, steps: int, device: torch.device, positions: int) -> list[float]:
    """Returns the mean loss of every step; ``take`` gives own positions, which count ``share`` in the mean."""
    optimizer, generator = torch.optim.AdamW(model.parameters(), lr=3e-3), torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        # the same batch on every process
        x = torch.randn(2, positions, D_MODEL, generator=generator).to(device)
        error = model(take(x)) - take(x.roll(1, 1))
        loss = error.square().sum() / max(error.numel(), 1) * share
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach()
        if isinstance(model, DistributedDataParallel):
            dist.all_reduce(total)
            total /= dist.get_world_size()
        losses.append(float(total))
    return losses


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args(argv).steps
    torch.manual_seed(0)
    block = Block()
    alone, positions = copy.deepcopy(block), block.layout.num_positions
    if "RANK" not in os.environ:
        losses = train(alone, lambda x: x, 1.0, steps, torch.device("cpu"), positions)
        print(f"one process: loss {losses[0]:.5f} to {losses[-1]:.5f}; start it by torchrun for more")
        return 0
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    mesh = init_device_mesh(kind, (int(os.environ["WORLD_SIZE"]),), mesh_dim_names=("rows",))
    device = torch.device(kind)
    try:
        parallelize_module(block, mesh, {"attention": CanvasParallel()})
        rows = rank_rows(block.attention)
        model = DistributedDataParallel(block.to(device))
        losses = train(model, rows.take, rows.share, steps, device, positions)
        expected = train(alone.to(device), lambda x: x, 1.0, steps, device, positions)
        sent = block.attention.placed.sent_rows * 2 * D_MODEL * 4  # of a batch of 2, in float32
        own = f"process {dist.get_rank()}: {len(rows.positions)} of {positions} positions, sends {sent:,} bytes forward"
        print(f"{own}; loss {losses[-1]:.5f}, alone {expected[-1]:.5f}", flush=True)
        return int(max(abs(a - b) for a, b in zip(losses, expected)) > 1e-4)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
