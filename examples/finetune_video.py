"""Wan under a sparse topology: LoRA, loops, full finetuning, or sampling: ``python examples/finetune_video.py lora``.

The same command trains real weights: ``--model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --size 33 480 832 --data clips.pt
--device cuda``, with a file that ``torch.save({"latents": (clips, channels, frames, rows, columns), "text": (clips,
tokens, dim)}, "clips.pt")`` made of encoded clips. Without these a tiny random model learns random clips.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not __package__:  # run as a file, whose folder has no package `examples`
    sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("", "kernels")]

from canvas_engineering import (
    graft_looped_blocks,
    measure_topology,
    remove_canvas_attention,
    set_canvas_attention,
    video_layout,
)
from canvas_engineering.models import topologies

TOPOLOGIES = {
    "window": lambda layout: topologies.window(layout, past=1, future=1),
    "sliding_tiles": lambda layout: topologies.sliding_tiles(layout, tile=(2, 4, 4), around=(1, 1, 1)),
    "radial": lambda layout: topologies.radial(layout, rows=4, columns=4),
    "first_frame": topologies.first_frame_and_text_global,
}
RATES = {"lora": 1e-2, "loops": 1e-2, "full": 1e-3}


def load(name: str | None) -> Any:
    """The transformer: of the weights that are named, or a tiny one of random numbers."""
    from diffusers import WanTransformer3DModel

    if name is not None:
        return WanTransformer3DModel.from_pretrained(name, subfolder="transformer", torch_dtype=torch.bfloat16)
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=64, num_layers=2, rope_max_seq_len=64,
    )  # fmt: skip


def load_clips(path: Path | None, config: Any, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Latents (clips, channels, frames, rows, columns) and text (clips, tokens, dim)."""
    if path is not None:
        clips = torch.load(path)
        return clips["latents"], clips["text"]
    g = torch.Generator().manual_seed(1)
    frames, rows, columns = (size * patch for size, patch in zip(grid, config.patch_size))
    latents = torch.randn(2, config.in_channels, frames, rows, columns, generator=g)
    return latents, torch.randn(2, 8, config.text_dim, generator=g)


def prepare(recipe: str, model: Any, declared: tuple) -> None:
    """Gives the model its topology, and says which parameters train."""
    layout, topology = declared
    if recipe == "lora":
        from peft import LoraConfig

        model.requires_grad_(False)
        set_canvas_attention(model, layout, topology)
        model.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    else:
        loops, freeze = (3, "full") if recipe == "loops" else (1, "none")
        graft_looped_blocks(model, max_loops=3, loops=loops, freeze=freeze, layout=layout, topology=topology)


def flow_loss(model: Any, latents: Tensor, text: Tensor, generator: torch.Generator) -> Tensor:
    """The error of the velocity from clips to noise, at random times between."""
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    share = torch.rand(len(latents), generator=generator).to(latents)
    mixed = torch.lerp(latents, noise, share[:, None, None, None, None])
    velocity = model(mixed, timestep=1000 * share, encoder_hidden_states=text, return_dict=False)[0]
    return (velocity - (noise - latents)).float().square().mean()


@torch.no_grad()
def evaluate(model: Any, latents: Tensor, text: Tensor) -> float:
    """The loss at the same noise and times whenever it is asked for."""
    g = torch.Generator().manual_seed(4)
    return sum(flow_loss(model, latents, text, g).item() for _ in range(8)) / 8


def train(recipe: str, model: Any, latents: Tensor, text: Tensor, steps: int) -> tuple[float, float]:
    """Flow matching. Returns :func:`evaluate` before and after."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    print(f"{sum(p.numel() for p in parameters):,} of {sum(p.numel() for p in model.parameters()):,} parameters train")
    optimizer = torch.optim.AdamW(parameters, lr=RATES[recipe])
    model.train().enable_gradient_checkpointing()
    before, g = evaluate(model, latents, text), torch.Generator().manual_seed(2)
    for step in range(steps):
        loss = flow_loss(model, latents, text, g)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.4f}")
    after = evaluate(model, latents, text)
    print(f"on the same noise: {before:.4f} before, {after:.4f} after")
    return before, after


@torch.no_grad()
def sample(model: Any, shape: torch.Size, text: Tensor, steps: int) -> Tensor:
    """Euler steps from noise to a clip."""
    video = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(text)
    for step in range(steps):
        share = 1 - step / steps
        timestep = torch.full((len(video),), 1000 * share, device=video.device)
        video = video - model(video, timestep=timestep, encoder_hidden_states=text, return_dict=False)[0] / steps
    return video


def compare(model: Any, declared: tuple, latents: Tensor, text: Tensor, steps: int) -> None:
    """Samples with dense attention and under the topology, and says what that changes."""
    batch = {"hidden_states": latents, "timestep": torch.full((len(latents),), 500.0), "encoder_hidden_states": text}
    measured = measure_topology(model, *declared, {**batch, "timestep": batch["timestep"].to(latents.device)})
    print(f"{100 * measured.density:.1f} % of all pairs; attention outputs move by {100 * measured.difference:.1f} %")
    for name in ("dense", "sparse"):
        if name == "sparse":
            set_canvas_attention(model, *declared)
        begin = time.perf_counter()
        video = sample(model, latents.shape, text, steps)
        print(f"{name}: {time.perf_counter() - begin:.2f} s, mean square {video.float().square().mean():.3f}")
    remove_canvas_attention(model)


def main(argv: list[str] | None = None) -> tuple[float, float] | None:
    """The losses before and after training, none for sampling."""
    parser = argparse.ArgumentParser(prog="python examples/finetune_video.py", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", choices=[*RATES, "sample"])
    parser.add_argument("--model", help="Wan weights in diffusers' form: a name, or a folder with transformer/")
    parser.add_argument("--data", type=Path, help="encoded clips and texts")
    parser.add_argument("--size", type=int, nargs=3, default=[17, 64, 96], metavar=("FRAMES", "HEIGHT", "WIDTH"))
    parser.add_argument("--topology", choices=TOPOLOGIES, default="window")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("out/video"))
    options = parser.parse_args(argv)
    model = load(options.model).to(options.device)
    frames, height, width = options.size
    declared = TOPOLOGIES[options.topology](video_layout(model, height, width, frames))
    clips = load_clips(options.data, model.config, declared[0].region_size("video"))
    latents, text = (x.to(options.device, model.dtype) for x in clips)
    if options.recipe == "sample":
        compare(model, declared, latents, text, options.steps)
        return None
    prepare(options.recipe, model, declared)
    losses = train(options.recipe, model, latents, text, options.steps)
    save = model.save_lora_adapter if options.recipe == "lora" else model.save_pretrained
    save(options.out / options.recipe)
    print(f"saved in {options.out / options.recipe}")
    return losses


if __name__ == "__main__":
    main()
