"""Train a policy and world model on robot data: ``python examples/train_bridge_v2.py --record CartPole-v1``.

Any LeRobot dataset (``--data`` a folder or a Hub id; extra ``data``), or one that is recorded first from a gymnasium
environment. A canvas holds what was seen (camera, states, actions up to now) and what comes; the model fills in the
latter, actions first of all. Held-out error is printed beside persistence (the last known value, repeated), and, where
the environment is there, the policy plays it: its return beside a random policy's and the data's.

One process or many (``accelerate launch examples/train_bridge_v2.py …``), with mixed precision, gradient accumulation,
averaged weights, and checkpoints that ``--resume`` goes on from as if nothing had happened. The folder ``--out`` gets
losses (losses.jsonl, losses.png, TensorBoard's with ``--log tensorboard``), a held-out clip beside its prediction
(sample.mp4) and result.json.
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
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

if not __package__:  # run as a file, whose folder has no package `examples`
    sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("", "kernels")]

from canvas_engineering import CanvasLayout, CanvasTopology, Connection, RegionSpec
from canvas_engineering.data import LeRobotCanvasDataset, LeRobotFolder
from canvas_engineering.data.video import write_video
from canvas_engineering.files import replace_file, replacing
from examples.canvas_model import CanvasModel
from examples.record_robot import make, record
from examples.robot_data import shrink

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
    patch: int = setting(20, "pixels of a camera's cell, each way")
    width: int = setting(96, "channels of a position")
    depth: int = setting(3, "transformer blocks")
    diffusive: bool = setting(False, "predict the camera by flow matching in place of regression")
    steps: int = setting(1000, "batches to train on")
    batch: int = setting(16, "clips of a batch, over all processes")
    lr: float = setting(1e-3, "learning rate at its highest")
    accumulate: int = setting(1, "batches whose gradients are summed for one update")
    ema: float = setting(0.99, "decay of the averaged weights, which are what is evaluated")
    mixed_precision: str = setting("no", "no, bf16 or fp16")
    save_every: int = setting(500, "steps between checkpoints")
    workers: int = setting(2, "processes that load clips")
    log: str = setting("none", "none, tensorboard or wandb")
    play: int = setting(10, "episodes to play")
    seed: int = setting(0, "of everything that is drawn")
    resume: bool = setting(False, "go on from the last checkpoint in --out")


def canvas_of(source: LeRobotFolder, settings: Settings) -> tuple[CanvasLayout, CanvasTopology, dict[str, str]]:
    """A canvas of the dataset's first camera, its state and its action: (layout, topology, feature to region)."""
    T = settings.observed + settings.future
    features, regions, rows, columns = {}, {}, 0, 1
    if source.video_keys:
        camera = source.video_keys[0]
        features[camera] = "camera"
        rows, columns = (size // settings.patch for size in source.features[camera]["shape"][:2])
        carrier = "diffusive" if settings.diffusive else "deterministic"
        regions["camera"] = RegionSpec((0, T, 0, rows, 0, columns), carrier=carrier)
    for feature, region, weight in (("observation.state", "state", 1.0), ("action", "action", 4.0)):
        if feature in source.features:
            features[feature] = region
            regions[region] = RegionSpec((0, T, rows, rows + 1, 0, 1), loss_weight=weight)
            rows += 1
    layout = CanvasLayout(
        T=T, d_model=settings.width, spatial_shape=(rows, columns), regions=regions, t_current=settings.observed
    )
    others = [name for name in regions if name != "camera"]
    connections = [Connection(a, b) for a in others for b in others]
    if "camera" in regions:
        # frames attend to themselves and those before; what is short attends to all of the video, and the reverse
        connections += [Connection("camera", "camera", t_src=0, t_dst=-k) for k in range(settings.observed)]
        connections += [pair for name in others for pair in (Connection(name, "camera"), Connection("camera", name))]
    return layout, CanvasTopology(connections), features


def batches(count: int, size: int, first: int, last: int, seed: int, rank: int = 0, ranks: int = 1):
    """Indices of this rank's part of the batches ``first`` to ``last``: those of an endless run of shuffled epochs."""
    per_epoch = max(1, count // size)
    for step in range(first, last):
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(count)
        yield order[place * size : (place + 1) * size][rank::ranks].tolist()


def clip_of(batch: dict, regions: dict[str, str], device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(values, masks) of a batch, on the device."""
    values = {name: batch[name].to(device) for name in regions}
    return values, {name: batch["mask"][name].to(device) for name in regions}


def train(settings: Settings) -> dict:
    """Trains, evaluates and writes everything into ``settings.out``; returns what is printed."""
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        gradient_accumulation_steps=settings.accumulate,
        cpu=not torch.accelerator.is_available(),  # else torchrun's processes do not find each other on CPUs
        log_with=None if settings.log == "none" else settings.log,
        project_dir=settings.out,
    )
    accelerator.init_trackers("bridge", {name: str(value) for name, value in asdict(settings).items()})
    set_seed(settings.seed)
    settings.out.mkdir(parents=True, exist_ok=True)
    root = settings.data or settings.out / "data"
    if settings.record and accelerator.is_main_process and not Path(root).exists():
        accelerator.print(f"recording {settings.episodes} episodes of {settings.record}")
        record(settings.record, Path(root), settings.episodes, seed=settings.seed)
    accelerator.wait_for_everyone()
    source = LeRobotFolder(root) if Path(root).exists() else LeRobotCanvasDataset(root, CanvasLayout(T=1)).source
    layout, topology, features = canvas_of(source, settings)
    held_out = max(1, len(source.episodes) // 10)
    parts = [source.episodes[:-held_out], source.episodes[-held_out:]]
    trained, held = (
        LeRobotCanvasDataset(root, layout, features, episodes=[episode.index for episode in part]) for part in parts
    )
    shapes = {name: tuple(trained[0][name].shape[1:]) for name in trained.regions}
    now = settings.observed - 1
    known = {name: now - (name == "action") for name in shapes}
    # what is done next does not follow what was done before
    model = CanvasModel(layout, topology, shapes, known, shapes.keys() - {"action"}, settings.depth)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
    optimizer = torch.optim.AdamW(model.parameters(), settings.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / 50) * 0.5 * (1 + math.cos(math.pi * min(1.0, s / settings.steps)))
    )
    run, optimizer = accelerator.prepare(model, optimizer)
    averaged.to(accelerator.device)
    accelerator.register_for_checkpointing(averaged, schedule)
    first = _resume(accelerator, settings.out) if settings.resume else 0
    log = Log(settings.out / "losses.jsonl", first)
    sampler = batches(
        len(trained), settings.batch, first, settings.steps, settings.seed,
        accelerator.process_index, accelerator.num_processes,
    )  # fmt: skip
    # a generator of its own: starting workers must not draw from the one that noise comes from
    loader = torch.utils.data.DataLoader(
        trained, batch_sampler=list(sampler), num_workers=settings.workers, generator=torch.Generator()
    )
    steps = _Steps(loader, settings.steps - first, accelerator.is_main_process)
    for step, batch in enumerate(steps, first):
        clip, mask = clip_of(batch, trained.regions, accelerator.device)
        with accelerator.accumulate(run), accelerator.autocast():
            loss, errors = model.loss(clip, mask, run)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(run.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
        averaged.update_parameters(accelerator.unwrap_model(run))
        log.add(step, loss.item(), errors)
        accelerator.log({"loss": loss.item(), **errors}, step=step)
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
            _save(accelerator, settings.out, step + 1)
            accelerator.print(f"step {step + 1}: " + ", ".join(f"{name} {value:.4f}" for name, value in errors.items()))
    result: dict = {"parameters": sum(p.numel() for p in model.parameters()), "loading": steps.shares()}
    accelerator.end_training()
    if accelerator.is_main_process:
        best = averaged.module.eval()
        draw_losses(settings.out)
        sample(best, held, settings.out / "sample.mp4", accelerator.device)
        result |= held_out_errors(best, held, accelerator.device, settings)
        if settings.record and settings.play:
            result["returns"] = play(best, held, settings, accelerator.device)
        replace_file(settings.out / "result.json", f"{json.dumps(result, indent=2)}\n".encode())
    return result


class Log:
    """Losses, a JSON line for each step; a resumed run goes on behind the step that it resumes from."""

    def __init__(self, path: Path, first: int):
        lines = path.read_text().splitlines()[:first] if path.exists() else []
        path.write_text("".join(f"{line}\n" for line in lines))
        self.path = path

    def add(self, step: int, loss: float, errors: dict[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(f"{json.dumps({'step': step, 'loss': loss, **errors})}\n")


class _Steps:
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


def _save(accelerator, out: Path, step: int) -> None:
    """A checkpoint of everything; the one before is there until this one is whole."""
    folder = out / f"checkpoint-{step}"
    accelerator.save_state(str(folder))
    if accelerator.is_main_process:
        replace_file(out / "latest.json", json.dumps({"step": step}).encode())


def _resume(accelerator, out: Path) -> int:
    """The step to go on with: that of the last whole checkpoint, 0 where there is none."""
    if not (out / "latest.json").exists():
        return 0
    step = json.loads((out / "latest.json").read_text())["step"]
    accelerator.load_state(str(out / f"checkpoint-{step}"))
    return step


# -- evaluation --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def held_out_errors(model: CanvasModel, held: LeRobotCanvasDataset, device, settings: Settings) -> dict:
    """Mean squared error of what is predicted beside persistence's, by region; of cameras also PSNR in dB."""
    sums: dict[str, np.ndarray] = {name: np.zeros(3) for name in held.regions}
    for batch in torch.utils.data.DataLoader(held, batch_size=settings.batch):
        clip, mask = clip_of(batch, held.regions, device)
        filled = model.predict(clip)
        for name in held.regions:
            wanted = mask[name] & ~model.known(name)
            for place, guess in enumerate((filled[name], model.last_known(name, clip))):
                error = (held.denormalize(name, guess) - held.denormalize(name, clip[name])).square()
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
def sample(model: CanvasModel, held: LeRobotCanvasDataset, path: Path, device, scale: int = 6) -> None:
    """A video of one held-out clip, enlarged ``scale`` times: what happened left, the prediction right."""
    if "camera" not in held.regions:
        return
    clip, _ = clip_of(torch.utils.data.default_collate([held[len(held) // 2]]), held.regions, device)
    sides = [held.denormalize("camera", frames["camera"][0].cpu()) for frames in (clip, model.predict(clip))]
    pixels = (torch.cat(sides, dim=-1).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    pixels = pixels.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    write_video(path, pixels.numpy(), max(1, round(held.fps)), "h264")


@torch.no_grad()
def play(model: CanvasModel, held: LeRobotCanvasDataset, settings: Settings, device) -> dict:
    """Returns of whole episodes: the policy's, a random one's, and those of the controller that made the data."""
    from examples.record_robot import controller_of

    world, layout = make(settings.record), model.layout
    discrete = not world.action_space.shape
    size = held.source.features[held.source.video_keys[0]]["shape"][:2] if held.source.video_keys else None
    repeats = max(1, round(world.metadata.get("render_fps", held.fps) / held.fps))
    now, T = settings.observed - 1, layout.T

    def policy(history: deque) -> np.ndarray | int:
        frames = [history[0]] * (settings.observed - len(history)) + list(history)
        clip = {name: torch.zeros(1, T, *model.coders[name].shape, device=device) for name in model.coders}
        for name in held.regions:
            values = torch.from_numpy(np.stack([frame[name] for frame in frames]).astype(np.float32))
            clip[name][0, : settings.observed] = held.normalize(name, values).to(device)
        action = held.denormalize("action", model.predict(clip)["action"][0, now].cpu()).numpy()
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
        print(report(train(settings)))

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
