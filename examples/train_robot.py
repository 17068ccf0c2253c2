"""Train a looped CogVideoX on simulated robot clips with actions: ``python examples/train_robot.py --out out/robot``.

Without ``--model`` the transformer is tiny and random and everything runs on a CPU in minutes; with ``--model
THUDM/CogVideoX-2b`` (or a folder of one) the same command grafts onto its weights and encodes the clips with its VAE.
The data is simulated: clips of a gymnasium environment with the actions that were taken, or ``--latents`` from a file.

The loss is v-prediction on noised latents plus the squared error of an ActionHead that reads the mean action of a clip
off the prediction. Loops follow a curriculum. What trains: everything (``--freeze none``), loops alone (``--freeze
full``), or loops and LoRA (``--freeze full --lora 16``), whose ``pytorch_lora_weights.safetensors`` pipelines load.

``torchrun --nproc-per-node 2 examples/train_robot.py`` trains on the same samples, to the same losses, as one process
does. A run writes ``metrics.jsonl``, ``loss.png``, ``samples.png``, ``loops.safetensors``, and ``checkpoint/``, from
which ``--resume`` goes on as if nothing had happened, on any number of processes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

if not __package__:  # run as a file, whose folder has no package `examples`
    sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("", "kernels")]

from canvas_engineering import (
    ActionHead,
    CurriculumScheduler,
    SharpeningSchedule,
    cogvideox_layout,
    graft_looped_blocks,
    save_loop_checkpoint,
    tile_topology,
    window_topology,
)
from canvas_engineering.files import replace_file, replacing
from examples import robot_data
from examples.cartpole import progress

HEIGHT, WIDTH, FRAMES = 64, 96, 17
TINY = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 64,
    "text_embed_dim": 32,
    "num_layers": 4,
    "sample_height": HEIGHT // 8,
    "sample_width": WIDTH // 8,
    "sample_frames": FRAMES,
    "max_text_seq_length": 16,
}
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
TOPOLOGIES = {"dense": None, "window": window_topology(), "tiles": tile_topology(2, 2)}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python examples/train_robot.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/robot"))
    parser.add_argument("--model", help="CogVideoX weights: a name or a folder with transformer/ and vae/")
    parser.add_argument("--env", default="CartPole-v1", help="gymnasium environment, such as Pusher-v5 (extra mujoco)")
    size = {"nargs": 3, "type": int, "default": [FRAMES, HEIGHT, WIDTH], "metavar": ("FRAMES", "HEIGHT", "WIDTH")}
    parser.add_argument("--size", **size, help="of the clips; 49 480 720 is what CogVideoX-2b was trained on")
    parser.add_argument("--latents", type=Path, help="npz with latents (n, T, C, h, w) and actions (n, A), instead")
    parser.add_argument("--prompt-embeds", type=Path, help="torch file, (text tokens, text width); default: zeros")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=2, help="samples of a batch, over all processes")
    parser.add_argument("--accumulate", type=int, default=1, help="batches per optimizer step")
    parser.add_argument("--loops", type=int, default=3, help="loops at the end of the curriculum")
    parser.add_argument("--freeze", choices=["full", "half", "none"], default="none", help="of the backbone")
    parser.add_argument("--lora", type=int, default=0, help="rank of LoRA on the backbone's attention; 0 for none")
    parser.add_argument("--topology", choices=TOPOLOGIES, default="window", help="who attends to whom")
    parser.add_argument("--sharpen", type=float, default=1.0, help="factor on the attention scale in the last loop")
    parser.add_argument("--action-weight", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"], default="no")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--save-every", type=int, default=20, help="optimizer steps between checkpoints")
    parser.add_argument("--stop-after", type=int, help="end early, as a machine that is taken away does")
    parser.add_argument("--resume", action="store_true", help="go on from --out's checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def load_data(options: argparse.Namespace, vae: nn.Module | None, console: Console) -> tuple[Tensor, Tensor]:
    """Latents (n, T, C, h, w) and the mean action of each clip, standardised (n, A)."""
    if options.latents is not None:
        with np.load(options.latents) as arrays:
            latents, actions = (torch.from_numpy(arrays[name]).float() for name in ("latents", "actions"))
    else:
        path = options.out / f"{options.env}-{options.clips}-{'x'.join(map(str, options.size))}-{options.seed}.npz"
        if not path.exists():
            with progress(console, "recording", options.clips) as advance:
                clips = robot_data.record(options.env, options.clips, *options.size, options.seed, advance)
            robot_data.save(path, frames=clips.frames, actions=clips.actions)
        with np.load(path) as arrays:
            frames, actions = arrays["frames"], torch.from_numpy(arrays["actions"]).mean(1)
        console.print(f"{path}: {len(frames)} clips of {frames.shape[1]} frames, simulated by {options.env}")
        latents = robot_data.pooled_latents(frames) if vae is None else robot_data.vae_latents(vae, frames)
    return latents, (actions - actions.mean(0)) / actions.std(0).clamp_min(1e-6)


def load_model(options: argparse.Namespace, device: torch.device) -> tuple[nn.Module, nn.Module | None]:
    """The transformer, and the VAE on ``device``; without ``--model`` a tiny random one, and none."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

    if options.model is None:
        return CogVideoXTransformer3DModel(**TINY), None
    transformer = CogVideoXTransformer3DModel.from_pretrained(options.model, subfolder="transformer")
    return transformer, AutoencoderKLCogVideoX.from_pretrained(options.model, subfolder="vae").eval().to(device)


def fitted(latents: Tensor, config) -> Tensor:
    """Latents (n, T, C, h, w) whose frames the model's tokens divide: CogVideoX 1.5 joins frames in pairs, and an odd
    one is helped out by a copy of the first in front. ValueError: another number of channels than the model's."""
    if latents.shape[2] != config.in_channels:
        raise ValueError(
            f"the model takes {config.in_channels} latent channels, the data has {latents.shape[2]}: {latents.shape} "
            "(image-to-video models take twice as many, and are not trained here)"
        )
    missing = -latents.shape[1] % (config.patch_size_t or 1)
    return torch.cat([*[latents[:, :1]] * missing, latents], dim=1)


def build(
    options: argparse.Namespace, model: nn.Module, latents: Tensor, n_actions: int
) -> tuple[list[nn.Module], ActionHead]:
    """Grafts the transformer; its looped blocks and the action head."""
    topology, (T, channels, h, w) = TOPOLOGIES[options.topology], latents.shape[1:]
    video_frames = (T - 1) * model.config.temporal_compression_ratio + 1
    layout = None if topology is None else cogvideox_layout(model.config, 8 * h, 8 * w, video_frames)
    sharpening = SharpeningSchedule(options.loops, 1.0, options.sharpen) if options.sharpen != 1.0 else None
    blocks, head = graft_looped_blocks(
        model,
        options.loops,
        loops=1,
        freeze=options.freeze,
        action_dim=n_actions,
        latent_channels=channels,
        sharpening=sharpening,
        layout=layout,
        topology=topology,
    )
    if options.lora:
        from peft import LoraConfig

        model.add_adapter(LoraConfig(r=options.lora, lora_alpha=options.lora, target_modules=LORA_TARGETS))
    if options.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return blocks, head


class Conditions:
    """What the transformer's forward takes besides latents: text, rotary tables, and 1.5's offset."""

    def __init__(self, options: argparse.Namespace, config, latents: Tensor):
        self.text = torch.zeros(config.max_text_seq_length, config.text_embed_dim)
        if options.prompt_embeds is not None:
            self.text = torch.load(options.prompt_embeds, weights_only=True).float()
        self.rotary = rotary_tables(config, *latents.shape[1:2], *latents.shape[3:])
        self.ofs = torch.full((1,), 2.0) if config.ofs_embed_dim else None

    def __call__(self, noisy: Tensor, steps: Tensor) -> dict:
        text = self.text.to(noisy.device, noisy.dtype).expand(len(noisy), -1, -1)
        rotary = None if self.rotary is None else tuple(table.to(noisy.device) for table in self.rotary)
        ofs = None if self.ofs is None else self.ofs.to(noisy.device)
        given = {"hidden_states": noisy, "encoder_hidden_states": text, "timestep": steps, "image_rotary_emb": rotary}
        return {**given, "ofs": ofs, "return_dict": False}


def rotary_tables(config, T: int, h: int, w: int) -> tuple[Tensor, Tensor] | None:
    """The rotary tables that CogVideoX's pipelines make for latents of T × h × w; None for a model that adds sines."""
    if not config.use_rotary_positional_embeddings:
        return None
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    p, joined = config.patch_size, config.patch_size_t
    grid, base = (h // p, w // p), (config.sample_height // p, config.sample_width // p)
    if joined is None:
        crops = get_resize_crop_region_for_grid(grid, base[1], base[0])
        return get_3d_rotary_pos_embed(config.attention_head_dim, crops, grid, T)
    frames = -(-T // joined)
    return get_3d_rotary_pos_embed(config.attention_head_dim, None, grid, frames, grid_type="slice", max_size=base)


def drawn(numbers: range, seed: int, clips: int, shape: torch.Size, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clip (n,), noise (n, *shape) and noise level (n,) of the samples with these numbers.

    A sample follows from its own number, so that neither the number of processes nor a resumption changes it.
    """
    parts = []
    for number in numbers:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
        clip, level = (torch.randint(most, (), generator=generator) for most in (clips, levels))
        parts.append((clip, torch.randn(shape, generator=generator), level))
    index, noise, steps = map(torch.stack, zip(*parts))
    return index, noise, steps


def loss_of(model, head, conditions, scheduler, clean: Tensor, actions: Tensor, noise: Tensor, steps: Tensor):
    """(v-prediction error, action error) of a batch under noise at these levels."""
    noisy = scheduler.add_noise(clean, noise, steps)
    predicted = model(**conditions(noisy, steps))[0]
    diffusion = (predicted.float() - scheduler.get_velocity(clean, noise, steps)).square().mean()
    return diffusion, (head(predicted.float()) - actions).square().mean()


@torch.no_grad()
def sample(model, conditions, scheduler, shape: tuple[int, ...], seed: int, steps: int = 10) -> Tensor:
    """Latents of ``shape``, denoised from noise."""
    scheduler.set_timesteps(steps)
    device = next(model.parameters()).device
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    for t in scheduler.timesteps:
        predicted = model(**conditions(latents, t.expand(len(latents)).to(device)))[0]
        latents = scheduler.step(predicted.float(), t, latents, return_dict=False)[0]
    return latents.cpu()


class Checkpoint:
    """A folder that is replaced as a whole: what trains of the model, the head and the optimizer, and the losses.

    Tensors are written by torch.distributed.checkpoint, each process its part, and read by any number of processes.
    """

    def __init__(
        self, folder: Path, model: nn.Module, blocks: list[nn.Module], head: ActionHead, optimizer, accelerator
    ):
        self.folder, self.previous = folder, folder.with_name(f"{folder.name}.previous")
        self.modules = nn.ModuleDict({"model": model, "head": head})
        self.blocks, self.head, self.optimizer, self.accelerator = blocks, head, optimizer, accelerator
        self.log: list[dict] = []

    def _state(self) -> dict[str, dict]:
        options = StateDictOptions(ignore_frozen_params=True)
        state = get_state_dict(self.modules, self.optimizer, options=options)
        return dict(zip(("model", "optimizer"), state))

    def save(self) -> None:
        """Called by all processes."""
        # one name for all: what a killed run left is cleared away by the next
        unfinished = self.folder.with_name(f"{self.folder.name}.partial")
        if self.accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with alone_by_intent():
            distributed_checkpoint.save(self._state(), checkpoint_id=unfinished)
        if self.accelerator.is_main_process:
            save_loop_checkpoint(self.blocks, self.head, unfinished / "loops.safetensors", {"step": len(self.log)})
            scaler = self.accelerator.scaler
            told = {"log": self.log, "scaler": None if scaler is None else scaler.state_dict()}
            replace_file(unfinished / "log.json", json.dumps(told).encode())
            if self.folder.exists():  # at no time is there neither
                shutil.rmtree(self.previous, ignore_errors=True)
                os.replace(self.folder, self.previous)
            os.replace(unfinished, self.folder)
            shutil.rmtree(self.previous, ignore_errors=True)

    def load(self) -> int:
        """The optimizer step to go on with. ValueError: a checkpoint of other parameters, with what differs."""
        folder = self.folder if self.folder.exists() or not self.previous.exists() else self.previous
        state = self._state()
        saved = distributed_checkpoint.FileSystemReader(folder).read_metadata().state_dict_metadata
        saved = {name.removeprefix("model.") for name in saved if name.startswith("model.")}
        if differing := sorted(saved ^ set(state["model"])):
            raise ValueError(
                f"{self.folder} was trained with another --freeze or --lora: it and this run do not share "
                f"{len(differing)} parameters, {differing[0]} first"
            )
        with alone_by_intent():
            distributed_checkpoint.load(state, checkpoint_id=folder)
        options = StateDictOptions(ignore_frozen_params=True, strict=False)
        set_state_dict(
            self.modules,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=options,
        )
        told = json.loads((folder / "log.json").read_text())
        if told["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(told["scaler"])
        self.log = told["log"]
        return len(self.log)


@contextlib.contextmanager
def alone_by_intent() -> Iterator[None]:
    """Without torch's warning that a checkpoint is that of a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)
        yield


def train(options, accelerator, model, blocks, head, conditions, scheduler, data, console) -> list[dict]:
    """The loop itself; the log has an entry for each optimizer step."""
    parameters = [p for module in (model, head) for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=0.0)
    curriculum = CurriculumScheduler(options.loops, options.steps)
    checkpoint = Checkpoint(options.out / "checkpoint", model, blocks, head, optimizer, accelerator)
    first = checkpoint.load() if options.resume else 0
    log = checkpoint.log
    model, head, optimizer = accelerator.prepare(model, head, optimizer)
    latents, actions = data
    n_levels = scheduler.config.num_train_timesteps
    last = options.steps if options.stop_after is None else min(options.steps, options.stop_after)
    with progress(console, "training", last - first, "loss {task.fields[loss]:.3f}", loss=float("nan")) as advance:
        for step in range(first, last):
            loops, sums = curriculum.step(blocks, step), [0.0, 0.0]
            for part in range(options.accumulate):
                begin = (step * options.accumulate + part) * options.batch
                numbers = range(begin, begin + options.batch)[accelerator.process_index :: accelerator.num_processes]
                index, noise, levels = drawn(numbers, options.seed, len(latents), latents.shape[1:], n_levels)
                clean, target, noise, levels = (
                    x.to(accelerator.device) for x in (latents[index], actions[index], noise, levels)
                )
                with accelerator.accumulate(model, head):
                    with accelerator.autocast():
                        losses = loss_of(model, head, conditions, scheduler, clean, target, noise, levels)
                    accelerator.backward(losses[0] + options.action_weight * losses[1])
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(parameters, 1.0)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                # all processes have equally many samples: the mean of their means is that of the batch
                means = accelerator.reduce(torch.stack([loss.detach() for loss in losses]), "mean").tolist()
                sums = [total + mean / options.accumulate for total, mean in zip(sums, means)]
            log.append({"step": step, "loops": loops, "diffusion": sums[0], "action": sums[1]})
            advance(loss=statistics.fmean(entry["diffusion"] for entry in log[-20:]))
            if (step + 1) % options.save_every == 0 or step + 1 == last:
                checkpoint.save()
    return log


def draw(out: Path, log: list[dict], latents: Tensor, vae: nn.Module | None) -> None:
    """loss.png, and samples.png of latents (2, T, C, h, w): a clip of the data above, a sampled one below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name in ("diffusion", "action"):
        axes.plot([entry[name] for entry in log], label=name)
    for before, entry in pairwise(log):
        if entry["loops"] != before["loops"]:
            axes.axvline(entry["step"], color="0.8", linestyle=":")
            axes.annotate(f"{entry['loops']} loops", (entry["step"], axes.get_ylim()[1]), va="top", fontsize=8)
    axes.set(xlabel="optimizer step", ylabel="mean squared error", yscale="log", title="training on simulated data")
    axes.legend()
    with replacing(out / "loss.png") as file:
        figure.savefig(file, format="png", dpi=120)
    if vae is None:
        rows = torch.cat([robot_data.pictures(clip) for clip in latents.split(1)])
    else:
        rows = robot_data.vae_pictures(vae, latents)[:, ::4]
    figure = Figure(figsize=(1.6 * rows.shape[1], 2.6), layout="constrained")
    for axes, picture in zip(figure.subplots(2, rows.shape[1]).flat, rows.flatten(0, 1)):
        axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
        axes.set_axis_off()
    figure.suptitle(f"{'pooled latents' if vae is None else 'decoded'}: simulated above, sampled below", fontsize=8)
    with replacing(out / "samples.png") as file:
        figure.savefig(file, format="png", dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Train; 0 unless a loss is not finite."""
    options = arguments(argv)
    from accelerate import Accelerator
    from diffusers import CogVideoXDDIMScheduler

    console = Console(width=None if Console().is_terminal else 110)
    options.out.mkdir(parents=True, exist_ok=True)
    precision = options.mixed_precision
    accelerator = Accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=options.accumulate,
        cpu=not torch.accelerator.is_available(),  # else torchrun's processes do not find each other on CPUs
    )
    if options.batch % accelerator.num_processes:
        console.print(f"--batch {options.batch} cannot be shared by {accelerator.num_processes} processes alike")
        return 2
    console.quiet = not accelerator.is_main_process
    torch.manual_seed(options.seed)
    model, vae = load_model(options, accelerator.device)
    with accelerator.main_process_first():  # who records, and the others read
        latents, actions = load_data(options, vae, console)
    latents = fitted(latents, model.config)
    blocks, head = build(options, model, latents, actions.shape[1])
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    console.print(f"{trainable:,} of {sum(p.numel() for p in model.parameters()):,} parameters train, {latents.shape}")
    conditions = Conditions(options, model.config, latents)
    scheduler = CogVideoXDDIMScheduler(prediction_type="v_prediction")
    parts = (model, blocks, head, conditions, scheduler, (latents, actions))
    log = train(options, accelerator, *parts, console)
    if accelerator.is_main_process:
        replace_file(options.out / "metrics.jsonl", "".join(json.dumps(entry) + "\n" for entry in log).encode())
        save_loop_checkpoint(blocks, head, options.out / "loops.safetensors", {"command": vars_as_text(options)})
        if options.lora:  # as pipelines load it: pipe.load_lora_weights(out)
            from diffusers import CogVideoXPipeline
            from peft import get_peft_model_state_dict

            CogVideoXPipeline.save_lora_weights(options.out, transformer_lora_layers=get_peft_model_state_dict(model))
        model.eval()
        sampled = sample(model, conditions, scheduler, latents[:1].shape, options.seed)
        draw(options.out, log, torch.cat([latents[:1], sampled]), vae)
    window = max(1, len(log) // 6)
    means = [statistics.fmean(e["diffusion"] for e in part) for part in (log[:window], log[-window:])]
    console.print(f"diffusion loss, first and last {window} steps: {means[0]:.3f}, {means[1]:.3f}; wrote {options.out}")
    return 0 if all(np.isfinite([entry["diffusion"], entry["action"]]).all() for entry in log) else 1


def vars_as_text(options: argparse.Namespace) -> dict[str, str]:
    """The options as JSON holds them."""
    return {name: str(value) for name, value in vars(options).items()}


if __name__ == "__main__":
    sys.exit(main())
