"""What grafting onto CogVideoX does, in one go: ``python examples/graft_cogvideox.py``.

Three changed lines make a model loop and attend along a topology. This shows that nothing else changes: the grafted
model gives its backbone's output bit for bit, loop parameters train through an accelerate loop, a checkpoint of them
alone brings a fresh model to the same output, and ungraft gives the plain model back. Then it measures the usual
topologies: which share of all token pairs each computes, and how far it moves the attention outputs of this backbone.

A tiny model with random weights, unless ``--model THUDM/CogVideoX-2b`` (or a folder of one) is given.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

if not __package__:  # run as a file, whose folder has no package `examples`
    sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("", "kernels")]

from canvas_engineering import (
    CurriculumScheduler,
    cogvideox_layout,
    dense_topology,
    graft_looped_blocks,
    load_loop_checkpoint,
    measure_topology,
    save_loop_checkpoint,
    tile_topology,
    ungraft,
    window_topology,
)
from examples.train_robot import TINY, rotary_tables

TOPOLOGIES = {
    "dense": dense_topology(),
    "same frame": window_topology(0),
    "same + previous frame": window_topology(1),
    "5 frames": window_topology(2, 2),
    "tiles, first frame global": tile_topology(2, 2),
}


def load(name: str | None) -> nn.Module:
    """The transformer, in float32 and in eval mode."""
    from diffusers import CogVideoXTransformer3DModel

    if name is None:
        torch.manual_seed(0)
        return CogVideoXTransformer3DModel(**TINY).eval()
    return CogVideoXTransformer3DModel.from_pretrained(name, subfolder="transformer").eval()


def random_batch(config, frames: int, height: int, width: int) -> dict:
    """Random arguments of the forward for one video of that size."""
    generator = torch.Generator().manual_seed(1)
    T = (frames - 1) // config.temporal_compression_ratio + 1
    T += -T % (config.patch_size_t or 1)
    h, w = height // 8, width // 8
    return {
        "hidden_states": torch.randn(1, T, config.in_channels, h, w, generator=generator),
        "encoder_hidden_states": torch.randn(1, config.max_text_seq_length, config.text_embed_dim, generator=generator),
        "timestep": torch.tensor([500]),
        "image_rotary_emb": rotary_tables(config, T, h, w),
        "ofs": torch.full((1,), 2.0) if config.ofs_embed_dim else None,
        "return_dict": False,
    }


def output(model: nn.Module, batch: dict) -> Tensor:
    with torch.no_grad():
        return model(**batch)[0]


def train(model: nn.Module, blocks: list[nn.Module], head: nn.Module, batch: dict, steps: int) -> list[float]:
    """A few steps of the loop parameters towards a fixed target, with accelerate; the losses."""
    from accelerate import Accelerator

    accelerator = Accelerator()
    parameters = [p for module in (model, head) for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    model, head, optimizer = accelerator.prepare(model, head, optimizer)
    curriculum, losses = CurriculumScheduler(blocks[0].max_loops, steps), []
    target = torch.randn(batch["hidden_states"].shape, generator=torch.Generator().manual_seed(2))
    for step in range(steps):
        curriculum.step(blocks, step)
        loss = (model(**batch)[0][:, :, : target.shape[2]] - target).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def main(argv: list[str] | None = None) -> int:
    """0 if everything that is claimed above holds."""
    parser = argparse.ArgumentParser(prog="python examples/graft_cogvideox.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/graft"))
    parser.add_argument("--model", help="CogVideoX weights: a name or a folder with transformer/")
    parser.add_argument("--size", type=int, nargs=3, default=[17, 64, 96], metavar=("FRAMES", "HEIGHT", "WIDTH"))
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args(argv)
    console = Console(width=None if Console().is_terminal else 110)
    frames, height, width = options.size
    model = load(options.model)
    batch = random_batch(model.config, frames, height, width)
    layout = cogvideox_layout(model.config, height, width, frames)
    expected = output(model, batch)

    size, n_text = layout.region_size("video"), layout.region_numel("text")
    table = Table(title=f"topologies on {size} video and {n_text} text tokens")
    for column in ("topology", "pairs computed", "attention outputs move by"):
        table.add_column(column, justify="left" if column == "topology" else "right")
    for name, topology in TOPOLOGIES.items():
        measured = measure_topology(model, layout, topology, batch)
        table.add_row(name, f"{100 * measured.density:.1f} %", f"{100 * measured.difference:.2f} %")
    console.print(table)

    failures = []

    def check(claim: str, holds: bool) -> None:
        console.print(("[green]holds[/]  " if holds else "[red]FAILS[/]  ") + claim)
        if not holds:
            failures.append(claim)

    blocks, head = graft_looped_blocks(model, 3, loops=3)
    check("the grafted model gives its backbone's bits, with 3 loops", torch.equal(output(model, batch), expected))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    console.print(f"       {trainable:,} of {sum(p.numel() for p in model.parameters()):,} parameters train")
    losses = train(model, blocks, head, batch, options.steps)
    check(f"loop parameters learn: {losses[0]:.4f} → {losses[-1]:.4f}", losses[-1] < losses[0])
    path = options.out / "loops.safetensors"
    save_loop_checkpoint(blocks, head, path, {"steps": options.steps})
    trained = output(model, batch)
    fresh = load(options.model)
    fresh_blocks, fresh_head = graft_looped_blocks(fresh, 3, loops=1)
    load_loop_checkpoint(fresh_blocks, fresh_head, path)
    size = f"{path.stat().st_size / 1024:.0f} KiB"
    check(f"{path} ({size}) brings a fresh model to the same output", torch.equal(output(fresh, batch), trained))
    check("ungraft gives the plain model back", torch.equal(output(ungraft(model), batch), expected))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the table above says it
        graft_looped_blocks(model, 3, loops=1, layout=layout, topology=dense_topology())
    error = float((output(model, batch) - expected).abs().max() / expected.abs().max())
    check(f"a dense plan is the stock attention to rounding: {error:.1e}", error < 1e-4)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
