"""Train a policy and world model on robot data: ``python examples/train_bridge_v2.py --record CartPole-v1``.

Any LeRobot dataset (``--data`` a folder or a Hub id; extra ``data``), or one that is recorded first from a gymnasium
environment. A canvas holds what was seen (camera, states, actions up to now) and what comes; the model fills in the
latter, actions first of all. Held-out error is printed beside persistence (the last known value, repeated), and, where
the environment is there, the policy plays it: its return beside a random policy's and the data's.

``--vae`` puts a VAE's latents in place of the camera's pixels, ``--model`` a grafted CogVideoX in place of the small
transformer, ``--text`` the episode's task on the canvas.

One process or many (``accelerate launch examples/train_bridge_v2.py …``; ``--shard`` spreads the parameters over them,
FSDP2), with mixed precision, gradient accumulation, averaged weights, and checkpoints that ``--resume`` goes on from as
if nothing had happened. The folder ``--out`` gets losses (losses.jsonl, losses.png, and TensorBoard's or W&B's with
``--log``), a held-out clip beside its prediction (sample.mp4) and result.json.
"""

from __future__ import annotations

import inspect
import json
import math
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
from torch import Tensor
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

if not __package__:  # run as a file, whose folder has no package `examples`
    sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("", "kernels")]

from canvas_engineering import CanvasLayout, CanvasTopology
from canvas_engineering.data import LeRobotCanvasDataset, LeRobotFolder
from canvas_engineering.data.video import write_video
from canvas_engineering.files import replace_file, replacing
from examples.bridge_data import Clips, batches, byte_text, canvas_of, t5_text
from examples.canvas_cogvideox import FrameVAE, VideoBackbone, load_transformer, load_vae
from examples.canvas_model import CanvasModel
from examples.record_robot import make, record
from examples.robot_data import shrink
from examples.train_robot import alone_by_intent

OUT = Path("out/bridge")


def setting(default: Any, about: str) -> Any:
    """A field of Settings, with the help of its option."""
    return field(default=default, metadata={"about": about})


@dataclass
class Settings:
    """What a run is made with; ``--config FILE.json`` gives any of these, the command line the rest."""

    data: str | None = setting(None, "a LeRobot dataset: a folder, or an id on the Hub")
    record: str | None = setting(None, "a gymnasium environment to record first, and to play afterwards")
    episodes: int = setting(40, "episodes to record")
    out: Path = setting(OUT, "folder for data, checkpoints, losses and results")  # noqa: RUF009
    observed: int = setting(4, "frames that are known")
    future: int = setting(4, "frames that are predicted")
    patch: int = setting(20, "pixels of a camera's cell, each way; under --vae latents, under --model the model's own")
    width: int = setting(96, "channels of a position; under --model the model's own")
    depth: int = setting(3, "transformer blocks")
    vae: str | None = setting(None, "a CogVideoX VAE for the camera: a folder, an id on the Hub, or tiny")
    model: str | None = setting(None, "a CogVideoX in place of the transformer, with its VAE: a folder, an id, or tiny")
    loops: int = setting(2, "loops of the model's blocks")
    freeze: str = setting("none", "of the model: none, half or full")
    text: str = setting("none", "the task on the canvas: none, bytes (a learned table), or a T5 encoder's folder or id")
    tokens: int = setting(24, "tokens of the text, at least")
    diffusive: bool = setting(False, "predict the camera by flow matching in place of regression")
    steps: int = setting(1000, "batches to train on")
    batch: int = setting(16, "clips of a batch, over all processes")
    lr: float = setting(1e-3, "learning rate at its highest")
    accumulate: int = setting(1, "batches whose gradients are summed for one update")
    ema: float = setting(0.99, "decay of the averaged weights, which are what is evaluated")
    shard: bool = setting(False, "spread parameters, gradients and optimizer over the processes (FSDP2)")
    mixed_precision: str = setting("no", "no, bf16 or fp16")
    save_every: int = setting(500, "steps between checkpoints")
    workers: int = setting(2, "processes that load clips")
    log: str = setting("none", "none, tensorboard or wandb")
    play: int = setting(10, "episodes to play")
    seed: int = setting(0, "of everything that is drawn")
    resume: bool = setting(False, "go on from the last checkpoint in --out")


@dataclass
class Parts:
    """What is made from the settings and the data before anything is trained."""

    layout: CanvasLayout
    topology: CanvasTopology
    trained: Clips
    held: Clips
    model: CanvasModel


def build(settings: Settings, device: torch.device) -> Parts:
    """Declares the canvas of the data, and makes the model; ValueError where the camera does not divide."""
    root = settings.data or settings.out / "data"
    source = LeRobotFolder(root) if Path(root).exists() else LeRobotCanvasDataset(root, CanvasLayout(T=1)).source
    vae, text, backbone = None, None, None
    cell, width, tokens = settings.patch, settings.width, 0 if settings.text == "none" else settings.tokens
    if settings.vae or settings.model:
        vae = FrameVAE(load_vae(settings.vae or settings.model or "").to(device))
        cell *= 8
    if settings.model:
        backbone = load_transformer(settings.model)
        cell, width = 8 * backbone.config.patch_size, backbone.config.in_channels * backbone.config.patch_size**2
    layout, topology, features = canvas_of(
        source, settings.observed, settings.future, cell, width, tokens, settings.diffusive
    )
    if tokens:
        tokens = layout.region_numel("task")
        text = byte_text(tokens) if settings.text == "bytes" else t5_text(settings.text, tokens)
    if backbone is not None:
        backbone = VideoBackbone(backbone, layout, topology, settings.loops, settings.freeze)
    held_out = max(1, len(source.episodes) // 10)
    normalize = {} if vae is None else dict.fromkeys(source.video_keys, "none")
    trained, held = (
        Clips(
            LeRobotCanvasDataset(root, layout, features, normalize=normalize, episodes=[e.index for e in episodes]),
            device,
            vae,
            text,
        )
        for episodes in (source.episodes[:-held_out], source.episodes[-held_out:])
    )
    first, _ = trained.of(torch.utils.data.default_collate([trained.dataset[0]]))
    shapes = {name: tuple(first[name].shape[2:]) for name in trained.dataset.regions}
    texts = {name: tuple(first[name].shape[1:]) for name in first.keys() - shapes.keys()}
    now = settings.observed - 1
    known = {name: now - (name == "action") for name in shapes}
    # what is done next does not follow what was done before
    held_regions = shapes.keys() - {"action"}
    model = CanvasModel(
        layout, topology, shapes, known, held_regions, settings.depth, texts=texts, backbone=backbone
    ).to(device)
    return Parts(layout, topology, trained, held, model)


def train(settings: Settings) -> None:
    """Trains, evaluates, and writes everything into ``settings.out``; the main process prints what was measured."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, set_seed

    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        gradient_accumulation_steps=settings.accumulate,
        cpu=not torch.accelerator.is_available(),  # else torchrun's processes do not find each other on CPUs
        log_with=None if settings.log == "none" else settings.log,
        project_dir=settings.out,
    )
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError("launch without FSDP settings of accelerate: --shard does that")
    accelerator.init_trackers("bridge", {name: str(value) for name, value in asdict(settings).items()})
    set_seed(settings.seed)
    settings.out.mkdir(parents=True, exist_ok=True)
    root = Path(settings.data or settings.out / "data")
    if settings.record and accelerator.is_main_process and not root.exists():
        accelerator.print(f"recording {settings.episodes} episodes of {settings.record}")
        size = (48, 64) if settings.vae or settings.model else None  # what a VAE and patches of its latents divide
        record(settings.record, root, settings.episodes, size=size, seed=settings.seed)
    accelerator.wait_for_everyone()
    parts = build(settings, accelerator.device)
    model = parts.model
    if settings.shard:
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        for block in model.blocks if model.backbone is None else model.backbone.transformer.transformer_blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, settings.lr, weight_decay=0.01)
    run = model if settings.shard else accelerator.prepare(model)  # what is sharded is not wrapped once more
    optimizer = accelerator.prepare(optimizer)
    averaged = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    checkpoint = Checkpoint(settings.out, model, optimizer.optimizer, averaged, accelerator.scaler)
    first = checkpoint.load() if settings.resume else 0
    log = Log(settings.out / "losses.jsonl", first) if accelerator.is_main_process else None
    rank, ranks = accelerator.process_index, accelerator.num_processes
    clips = parts.trained
    sampler = batches(len(clips.dataset), settings.batch, first, settings.steps, settings.seed, rank, ranks)
    loader = torch.utils.data.DataLoader(clips.dataset, batch_sampler=list(sampler), num_workers=settings.workers)
    steps = Steps(loader, settings.steps - first, accelerator.is_main_process)
    for step, batch in enumerate(steps, first):
        # noise follows from the step, so that a resumed run draws the same
        torch.manual_seed((settings.seed * 1_000_003 + step) * ranks + rank)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * rate(step, settings.steps)
        clip, mask = clips.of(batch)
        with accelerator.accumulate(run), accelerator.autocast():
            loss, errors = model.loss(clip, mask, run)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.values()), trainable, 1 - min(settings.ema, step / (step + 1)))
        means = accelerator.reduce(torch.tensor([loss.item(), *errors.values()], device=accelerator.device), "mean")
        row = dict(zip(("loss", *errors), means.tolist()))
        if log is not None:
            log.add(step, row)
        accelerator.log(row, step=step)
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
            checkpoint.save(step + 1, accelerator.is_main_process)
            accelerator.print(f"step {step + 1}: " + ", ".join(f"{name} {value:.4f}" for name, value in row.items()))
    result: dict = {"parameters": sum(p.numel() for p in model.parameters()), "loading": steps.shares()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in averaged:
                parameter.copy_(averaged[name])
    best = whole(settings, accelerator, model)
    if accelerator.is_main_process:
        best.eval()
        draw_losses(settings.out)
        sample(best, parts.held, settings.out / "sample.mp4")
        result |= held_out_errors(best, parts.held, settings.batch)
        if settings.record and settings.play:
            result["returns"] = play(best, parts.held, settings)
        replace_file(settings.out / "result.json", f"{json.dumps(result, indent=2)}\n".encode())
        print(report(result))
    accelerator.end_training()


def rate(step: int, steps: int) -> float:
    """Share of the highest learning rate: fifty steps up, then half a cosine down."""
    return min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def whole(settings: Settings, accelerator, model: CanvasModel) -> CanvasModel:
    """Returns the model with all of its parameters here; of a sharded one that is a copy on the main process."""
    if not settings.shard:
        return model
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)  # of all processes together
    if not accelerator.is_main_process:
        return model
    copy = build(settings, accelerator.device).model
    copy.load_state_dict(state)
    return copy


class Checkpoint:
    """Everything a run goes on from, by torch.distributed.checkpoint: each process writes what it holds, and any number
    of processes reads it. The one before is there until this one is whole."""

    def __init__(self, out: Path, model: CanvasModel, optimizer, averaged: dict[str, Tensor], scaler):
        self.out, self.model, self.optimizer = out, model, optimizer
        self.averaged, self.scaler = averaged, scaler

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        scaler = {} if self.scaler is None else {"scaler": self.scaler.state_dict()}
        return {"model": model, "optimizer": optimizer, "averaged": self.averaged, **scaler}

    def save(self, step: int, is_main: bool) -> None:
        """Writes checkpoint-``step``; called by all processes."""
        with alone_by_intent():
            distributed_checkpoint.save(self._state(), checkpoint_id=self.out / f"checkpoint-{step}")
        if is_main:
            replace_file(self.out / "latest.json", json.dumps({"step": step}).encode())

    def load(self) -> int:
        """Reads the last whole checkpoint; returns the step to go on with, 0 where there is none."""
        if not (self.out / "latest.json").exists():
            return 0
        step = json.loads((self.out / "latest.json").read_text())["step"]
        state = self._state()
        with alone_by_intent():
            distributed_checkpoint.load(state, checkpoint_id=self.out / f"checkpoint-{step}")
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        return step


class Log:
    """Losses, a JSON line for each step; a resumed run goes on behind the step that it resumes from."""

    def __init__(self, path: Path, first: int):
        lines = path.read_text().splitlines()[:first] if path.exists() else []
        path.write_text("".join(f"{line}\n" for line in lines))
        self.path = path

    def add(self, step: int, row: dict[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(f"{json.dumps({'step': step, **row})}\n")


class Steps:
    """Batches of a loader, with a progress bar, and the time that was spent waiting for them."""

    def __init__(self, loader: torch.utils.data.DataLoader, count: int, shown: bool):
        self.loader, self.count, self.shown = loader, count, shown
        self.waited = self.total = 0.0
        self.done = 0

    def __iter__(self) -> Iterator[dict]:
        from rich.progress import track

        batches = iter(self.loader)
        for _ in track(range(self.count), "training", disable=not self.shown, transient=True):
            begun = time.perf_counter()
            batch = next(batches)
            ready = time.perf_counter()
            yield batch
            if self.done:  # the first batch waits for the workers to start
                self.waited += ready - begun
                self.total += time.perf_counter() - begun
            self.done += 1

    def shares(self) -> dict[str, float]:
        """Steps a second, and the share of a step spent waiting for its batch."""
        if not self.total:
            return {}
        return {"steps_per_second": (self.done - 1) / self.total, "waiting": self.waited / self.total}


# -- evaluation --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def held_out_errors(model: CanvasModel, held: Clips, size: int) -> dict:
    """Mean squared error of what is predicted beside persistence's, by region; of cameras also PSNR in dB."""
    sums: dict[str, np.ndarray] = {name: np.zeros(3) for name in held.dataset.regions}
    for batch in torch.utils.data.DataLoader(held.dataset, batch_size=size):
        clip, mask = held.of(batch)
        filled = model.predict(clip)
        for name in sums:
            # in the dataset's own units: what a VAE loses counts
            truth = held.dataset.denormalize(name, batch[name].to(held.device))
            wanted = mask[name] & ~model.known(name)
            for place, guess in enumerate((held.decode(name, filled[name]), model.last_known(name, {name: truth}))):
                error = (guess - truth).square()
                sums[name][place] += float((error.flatten(2).mean(-1) * wanted).sum())
            sums[name][2] += float(wanted.sum())
    result = {}
    for name, (ours, persistence, count) in sums.items():
        result[name] = {"error": ours / count, "persistence": persistence / count}
        if name == "camera":
            result[name] |= {f"{k}_psnr": -10 * math.log10(max(v, 1e-12)) for k, v in list(result[name].items())}
    return result


def draw_losses(out: Path) -> None:
    """losses.png: the loss and each region's error by step, of ``out``'s losses.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name in rows[0].keys() - {"step"}:
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], label=name, linewidth=1)
    axes.set(xlabel="step", ylabel="normalised squared error", yscale="log")
    axes.legend()
    with replacing(out / "losses.png") as file:
        figure.savefig(file, dpi=120, format="png")
    pyplot.close(figure)


@torch.no_grad()
def sample(model: CanvasModel, held: Clips, path: Path, scale: int = 6) -> None:
    """A video of one held-out clip, enlarged ``scale`` times: what happened left, the prediction right."""
    if "camera" not in held.dataset.regions:
        return
    batch = torch.utils.data.default_collate([held.dataset[len(held.dataset) // 2]])
    truth = held.dataset.denormalize("camera", batch["camera"])
    sides = [truth[0], held.decode("camera", model.predict(held.of(batch)[0])["camera"])[0].cpu()]
    pixels = (torch.cat(sides, dim=-1).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    pixels = pixels.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    write_video(path, pixels.numpy(), max(1, round(held.dataset.fps)), "h264")


@torch.no_grad()
def play(model: CanvasModel, held: Clips, settings: Settings) -> dict:
    """Returns of whole episodes: the policy's, a random one's, and those of the controller that made the data."""
    from examples.record_robot import controller_of

    world, layout = make(settings.record), model.layout
    discrete = not world.action_space.shape
    source, fps = held.dataset.source, held.dataset.fps
    size = source.features[source.video_keys[0]]["shape"][:2] if source.video_keys else None
    repeats = max(1, round(world.metadata.get("render_fps", fps) / fps))
    task = held.task([source.episodes[0].tasks[0] if source.episodes[0].tasks else ""])
    now, T = settings.observed - 1, layout.T

    def policy(history: deque) -> np.ndarray | int:
        frames = [history[0]] * (settings.observed - len(history)) + list(history)
        clip = {name: torch.zeros(1, T, *model.coders[name].shape, device=held.device) for name in model.coders}
        for name in held.dataset.regions:
            values = torch.from_numpy(np.stack([frame[name] for frame in frames]).astype(np.float32))
            clip[name][:, : settings.observed] = held.encode(name, values[None])
        action = held.decode("action", model.predict(clip | task)["action"][0, now].cpu()).numpy()
        if discrete:
            return int(np.clip(round(float(action[0])), 0, world.action_space.n - 1))
        return np.clip(action, world.action_space.low, world.action_space.high).astype(np.float32)

    def episode(seed: int, who: str) -> float:
        rng = np.random.default_rng(seed)
        state, _ = world.reset(seed=seed)
        world.action_space.seed(seed)
        controller = controller_of(settings.record, world.action_space, rng)
        history, total, action = deque(maxlen=settings.observed), 0.0, np.zeros(model.coders["action"].shape)
        for _ in range(250):
            frame = {"state": np.ravel(state), "action": np.atleast_1d(action)}
            if size is not None and who == "policy":
                frame["camera"] = shrink(world.render(), *size).transpose(2, 0, 1) / 255.0
            if history:  # what was done from the frame before on is known now
                history[-1]["action"] = np.atleast_1d(np.asarray(action, np.float32))
            history.append(frame)
            action = {
                "policy": lambda: policy(history),
                "random": world.action_space.sample,
                "data": lambda state=state: controller(state),
            }[who]()
            for _ in range(repeats):
                state, reward, ended, cut, _ = world.step(action)
                total += float(reward)
                if ended or cut:
                    return total
        return total

    found = {
        who: np.array([episode(1000 + i, who) for i in range(settings.play)]) for who in ("policy", "random", "data")
    }
    return {who: {"mean": float(r.mean()), "error": float(r.std(ddof=1) / len(r) ** 0.5)} for who, r in found.items()}


def report(result: dict) -> str:
    """What was measured, as lines."""
    lines = [f"{result['parameters']:,} parameters"]
    if result["loading"]:
        speed, waiting = result["loading"]["steps_per_second"], result["loading"]["waiting"]
        lines.append(f"{speed:.2f} steps a second, {waiting:.1%} of each waiting for its batch")
    for name, row in result.items():
        if isinstance(row, dict) and "persistence" in row:
            psnr = (
                f", {row['error_psnr']:.1f} dB (persistence {row['persistence_psnr']:.1f})"
                if "error_psnr" in row
                else ""
            )
            lines.append(f"held-out {name}: error {row['error']:.4g}, persistence {row['persistence']:.4g}{psnr}")
    for who, row in result.get("returns", {}).items():
        lines.append(f"return of {who}: {row['mean']:.1f} ± {row['error']:.1f}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    import click
    import typer

    def run(config: Path | None = None, **options: Any) -> None:
        given = {name: value for name, value in options.items() if value is not None}
        settings = Settings(**(json.loads(config.read_text()) if config else {}) | given)
        settings.out = Path(settings.out)
        if not (settings.data or settings.record):
            raise click.UsageError("what to train on: --data FOLDER or ID, or --record ENVIRONMENT")
        train(settings)

    # an option for each setting: those that are not given come from the file, or stay
    kinds = {"config": Path} | get_type_hints(Settings)
    about = {"config": "JSON with any of the options below"}
    about |= {each.name: f"{each.metadata['about']} (default: {each.default})" for each in fields(Settings)}
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=typer.Option(None, help=about[name]))
        for name in kinds
    )
    run.__annotations__ = {name: kind | None for name, kind in kinds.items()}
    app = typer.Typer(add_completion=False)
    app.command(help=__doc__.splitlines()[0])(run)
    try:
        typer.main.get_command(app).main(argv, prog_name="train_bridge_v2", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
