"""CartPole on a canvas, end to end: ``make demo``, or ``python examples/cartpole.py``.

Records simulated trajectories with their rendered frames, declares a multi-rate canvas over them, trains a small canvas
transformer to predict the second half of each window, and measures it on held-out episodes against persistence (the
last observed frame, repeated). Exits with 1 unless every error is smaller than persistence's. Then the same model is
timed on the two ways of attending that need no block tables, and the layout, the compiled table and the loss curve are
drawn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

if not __package__:  # run as a file, whose folder has no package `examples`
    sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("", "kernels")]

from canvas_engineering import AttentionDispatcher, draw
from canvas_engineering.files import replacing
from canvas_engineering.plan import compile_attention
from examples import cartpole_data
from examples.cartpole_model import FRAMES, OBSERVED, WorldModel, declare
from examples.plain_attention import DenseMask, PerEdgeLoop

PROVIDERS = {"block tables": AttentionDispatcher, "per-edge loop": PerEdgeLoop, "dense mask": DenseMask}


@dataclass(frozen=True)
class Batches:
    """Windows as tensors: video (n, 16, 16, 24) in [0, 1], states (n, 16, 4) standardised, actions (n, 16) int64."""

    video: Tensor
    states: Tensor
    actions: Tensor

    def take(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.video[index], self.states[index], self.actions[index]


def batches(recording: cartpole_data.Recording, starts: np.ndarray, mean: np.ndarray, std: np.ndarray) -> Batches:
    """The windows that begin at ``starts``."""
    index = starts[:, None] + np.arange(FRAMES)
    return Batches(
        torch.from_numpy(recording.frames[index]).float() / 255.0,
        torch.from_numpy((recording.states[index] - mean) / std).float(),
        torch.from_numpy(recording.actions[index]).long(),
    )


def squared_errors(video: Tensor, states: Tensor, data: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Mean squared error of predicted second halves: (5,), the four state variables, then video."""
    true_video, true_states, _ = data
    return torch.cat(
        [
            (states - true_states[:, OBSERVED:]).square().mean((0, 1)),
            (video - true_video[:, OBSERVED:]).square().mean()[None],
        ]
    )


def persistence(data: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The errors of repeating the last observed frame, as :func:`squared_errors` gives them."""
    video, states, _ = data
    return squared_errors(video[:, OBSERVED - 1, None], states[:, OBSERVED - 1, None], data)


def beats(model: Tensor, baseline: Tensor) -> bool:
    """Whether every error is finite and smaller than the baseline's."""
    return bool((model < baseline).all())


def loss_of(model: WorldModel, data: tuple[Tensor, Tensor, Tensor], scale: Tensor) -> Tensor:
    """Errors in units of persistence's: state variables and video count the same, and 1 is what repetition gets."""
    errors = squared_errors(*model(*data), data) / scale
    return 0.5 * errors[:4].mean() + 0.5 * errors[4]


def train(
    model: WorldModel, data: Batches, scale: Tensor, steps: int, batch: int, seed: int, console: Console
) -> list[float]:
    """AdamW with a short warm-up and a cosine to zero; the loss of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * np.cos(np.pi * step / max(1, steps))),
    )
    generator = torch.Generator().manual_seed(seed)
    losses = []
    with progress(console, "training", steps, "loss {task.fields[loss]:.3f}", loss=float("nan")) as advance:
        for _ in range(steps):
            loss = loss_of(model, data.take(torch.randint(len(data.video), (batch,), generator=generator)), scale)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            advance(loss=statistics.fmean(losses[-20:]))
    return losses


@torch.no_grad()
def measure(model: WorldModel, data: Batches, batch: int = 32) -> Tensor:
    """The model's errors on all windows, as :func:`squared_errors` gives them."""
    total = torch.zeros(5)
    for index in torch.arange(len(data.video)).split(batch):
        window = data.take(index)
        total += squared_errors(*model(*window), window) * len(index)
    return total / len(data.video)


class progress:
    """A rich progress bar as a context: gives a function that advances it by one and sets its fields."""

    def __init__(self, console: Console, title: str, total: int, text: str = "", **fields):
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn(text))
        self.bar = Progress(TextColumn(f"{title:10}"), *columns, console=console)
        self.task = self.bar.add_task(title, total=total, **fields)

    def __enter__(self):
        self.bar.start()
        return lambda **fields: self.bar.update(self.task, advance=1, **fields)

    def __exit__(self, *_):
        self.bar.stop()


def twin(model: WorldModel, attention: type) -> WorldModel:
    """The same model with the same parameters on another attention."""
    other = WorldModel(attention, *model.size)
    other.load_state_dict(model.state_dict())
    return other


def gradients(model: WorldModel) -> dict[str, Tensor]:
    """Gradients by parameter; what the loss does not reach has none."""
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def step_times(
    model: WorldModel, data: tuple[Tensor, Tensor, Tensor], scale: Tensor, rounds: int
) -> dict[str, list[float]]:
    """Seconds of one training step (forward, backward) per provider, in interleaved rounds in this process.

    Before anything is timed, the per-edge loop must give our predictions and our gradients; RuntimeError otherwise. The
    dense mask is another function (one softmax over all that a position attends to): only its cost is comparable.
    """
    models = {name: twin(model, attention) for name, attention in PROVIDERS.items()}

    def step(provider: WorldModel) -> None:
        provider.zero_grad(set_to_none=True)
        loss_of(provider, data, scale).backward()

    for provider in models.values():
        step(provider)
    ours, loop = (gradients(models[name]) for name in ("block tables", "per-edge loop"))
    for name, expected in loop.items():
        difference = (ours[name] - expected).abs().max()
        if not difference <= 1e-3 * expected.abs().max() + 1e-6:
            raise RuntimeError(f"the gradient of {name} differs from the per-edge loop's by {difference:.2e}")

    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, provider in models.items():
            start = time.perf_counter()
            step(provider)
            times[name].append(time.perf_counter() - start)
    return times


def error_table(model: Tensor, baseline: Tensor, std: np.ndarray) -> Table:
    """Root mean squared errors in the variables' own units."""
    scales = [*std, 1.0]
    names = [f"{name} ({unit})" for name, unit in zip(cartpole_data.STATE_NAMES, ("m", "m/s", "rad", "rad/s"))]
    table = Table(title="error on held-out episodes, next 8 frames (0.32 s)")
    for column in ("", "persistence", "model", "model / persistence"):
        table.add_column(column, justify="left" if column == "" else "right")
    for name, ours, theirs, scale in zip(
        [*names, "video (ink)"], model.sqrt().tolist(), baseline.sqrt().tolist(), scales
    ):
        table.add_row(name, f"{theirs * scale:.4f}", f"{ours * scale:.4f}", f"{ours / theirs:.2f}")
    return table


def time_table(times: dict[str, list[float]], batch: int) -> Table:
    """Medians, and their ratio to ours."""
    table = Table(title=f"one training step of this model, batch {batch}, {torch.get_num_threads()} threads")
    for column in ("attention", "median ms", "time / ours"):
        table.add_column(column, justify="left" if column == "attention" else "right")
    ours = statistics.median(times["block tables"])
    for name, seconds in times.items():
        median = statistics.median(seconds)
        table.add_row(name, f"{median * 1e3:.0f}", f"{median / ours:.1f}")
    return table


def loss_figure(losses: list[float]):
    """The loss of every step, and its running mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(losses, color="0.75", label="each step")
    window = max(1, len(losses) // 20)
    if losses:
        smooth = np.convolve(losses, np.ones(window) / window, "valid")
        axes.plot(np.arange(window - 1, len(losses)), smooth, label=f"mean of {window}")
    axes.axhline(1.0, color="k", linestyle=":", label="persistence")
    axes.set(xlabel="step", ylabel="error / persistence's", yscale="log", title="training loss")
    axes.legend()
    return figure


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python examples/cartpole.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder of the pictures")
    parser.add_argument("--data", type=Path, help="the recording, made if missing (default: in the --out folder)")
    parser.add_argument("--frames", type=int, default=2400, help="frames to record")
    parser.add_argument("--steps", type=int, default=160, help="training steps")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--judge", choices=["all", "states"], default="all", help="errors that must beat persistence's")
    parser.add_argument("--rounds", type=int, default=3, help="timing rounds")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the demo; 0 if every held-out error is below persistence's, else 1."""
    options = arguments(argv)
    console = Console()
    if not console.is_terminal:
        console = Console(width=110)  # a log: rich would wrap at 80
    torch.manual_seed(options.seed)
    began = time.perf_counter()

    options.out.mkdir(parents=True, exist_ok=True)
    path = options.data or options.out / f"cartpole-{options.frames}-{options.seed}.npz"
    if not path.exists():
        with progress(console, "recording", options.frames) as advance:
            cartpole_data.save(cartpole_data.record(options.frames, options.seed, advance), path)
    recording = cartpole_data.load(path)
    train_starts, test_starts = cartpole_data.split(recording, FRAMES, stride=2)
    mean, std = recording.states[train_starts].mean(0), recording.states[train_starts].std(0)
    training, held_out = (batches(recording, starts, mean, std) for starts in (train_starts, test_starts))
    console.print(
        f"{path}: {len(recording.frames)} frames of simulated data in {recording.episode[-1] + 1} episodes; "
        f"{len(train_starts)} training windows, {len(test_starts)} held-out"
    )

    model = WorldModel(AttentionDispatcher)
    plan = compile_attention(*declare(model.size[0]))
    console.print(plan.summary(), highlight=False)
    scale = persistence(training.take(torch.arange(len(train_starts))))
    losses = train(model, training, scale, options.steps, options.batch, options.seed, console)

    errors, baseline = measure(model, held_out), persistence(held_out.take(torch.arange(len(test_starts))))
    console.print(error_table(errors, baseline, std))
    batch = min(max(1, options.batch // 2), len(train_starts))
    console.print(time_table(step_times(model, training.take(torch.arange(batch)), scale, options.rounds), batch))

    figures = {
        "layout": draw.layout_figure(model.canvas.layout),
        "table": draw.plan_figure(plan),
        "loss": loss_figure(losses),
    }
    for name, figure in figures.items():
        with replacing(options.out / f"{name}.png") as file:
            figure.savefig(file, format="png", dpi=120, bbox_inches="tight")
    console.print(f"pictures: {', '.join(str(options.out / f'{name}.png') for name in figures)}")
    console.print(f"{time.perf_counter() - began:.0f} s")

    judged = slice(None) if options.judge == "all" else slice(4)
    if not beats(errors[judged], baseline[judged]):
        console.print("[bold red]the model does not beat persistence on held-out episodes")
        return 1
    console.print("[bold green]the model beats persistence on held-out episodes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
