"""What the examples of typed canvases share: a small transformer on a compiled schema, data, training, pictures.

The data is a world in which one thing happens: a hidden number drifts in time, and every position of every field shows
it with a gain of its own. A model that sees some fields can therefore work out the others, if its topology lets it.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from canvas_engineering import AttentionDispatcher, BoundSchema, compile_attention, draw
from canvas_engineering.files import replacing


class TypedModel(nn.Module):
    """Residual blocks of declared attention and an MLP on a schema's canvas; one number per position in and out."""

    def __init__(self, bound: BoundSchema, n_blocks: int, n_heads: int = 4):
        super().__init__()
        self.bound, d_model = bound, bound.layout.d_model
        self.canvas = bound.build_canvas()
        self.encode = nn.Linear(1, d_model)
        self.attention = nn.ModuleList(
            AttentionDispatcher(bound.topology, bound.layout, d_model, n_heads) for _ in range(n_blocks)
        )
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(d_model), nn.Linear(d_model, d_model), nn.GELU(), nn.Linear(d_model, d_model))
            for _ in range(n_blocks)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(n_blocks))
        self.decode = nn.Linear(d_model, 1)

    def forward(self, observed: dict[str, Tensor], wanted: list[str]) -> dict[str, Tensor]:
        """Values (B, positions) of the observed fields → values (B, positions) of the wanted ones."""
        x = self.bound.create_batch(len(next(iter(observed.values()))))
        for path, values in observed.items():
            x = self.bound[path].place(x, self.encode(values[..., None]))
        for path in wanted:
            # Nothing is known of these but what they are: place adds the field's own embedding.
            x = self.bound[path].place(x, self.bound[path].extract(x))
        for attention, norm, mlp in zip(self.attention, self.norms, self.mlp):
            x = attention(norm(x), add_to=x)
            x = x + mlp(x)
        return {path: self.decode(self.bound[path].extract(x)).squeeze(-1) for path in wanted}


def simulate(bound: BoundSchema, paths: list[str], samples: int, seed: int) -> dict[str, Tensor]:
    """Values (samples, positions) of every field: a standard normal that drifts from frame to frame, times gains."""
    hidden = torch.randn(samples, bound.layout.T, 1, generator=torch.Generator().manual_seed(seed))
    for t in range(1, bound.layout.T):
        hidden[:, t] = 0.9 * hidden[:, t - 1] + 0.19**0.5 * hidden[:, t]  # the variance stays 1
    world = torch.Generator().manual_seed(0)  # the gains stay the same, whatever is sampled
    values = {}
    for path in paths:
        frames, *size = bound.layout.region_size(path)
        gains = 0.5 + torch.rand(math.prod(size), generator=world)
        values[path] = (hidden[:, :frames] * gains).flatten(1)
    return values


@dataclass(frozen=True)
class Result:
    """Held-out error relative to predicting the mean, weighted as the fields declare, before and after training."""

    before: float
    after: float


def train(
    bound: BoundSchema, observed: list[str], wanted: list[str], n_blocks: int, steps: int, batch: int = 16
) -> Result:
    """Trains a model to predict the wanted fields from the observed ones; fresh samples every step."""
    torch.manual_seed(0)
    model = TypedModel(bound, n_blocks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    weights = {path: bound[path].spec.loss_weight for path in wanted}

    def error(values: dict[str, Tensor]) -> Tensor:
        predicted = model({path: values[path] for path in observed}, wanted)
        parts = [w * (predicted[p] - values[p]).square().mean() for p, w in weights.items()]
        scale = [w * values[p].square().mean() for p, w in weights.items()]
        return torch.stack(parts).sum() / torch.stack(scale).sum()

    held_out = simulate(bound, observed + wanted, 64, seed=1)

    def evaluate() -> float:
        with torch.no_grad():
            return error(held_out).item()

    before = evaluate()
    for step in range(steps):
        optimizer.zero_grad()
        error(simulate(bound, observed + wanted, batch, seed=2 + step)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return Result(before, evaluate())


def draw_schema(bound: BoundSchema, out: Path) -> list[Path]:
    """Pictures of the layout, the topology and the plan, as PNG files under ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    figures = {
        "layout": draw.layout_figure(bound.layout),
        "topology": draw.topology_figure(bound.topology),
        "plan": draw.plan_figure(compile_attention(bound.layout, bound.topology)),
    }
    paths = []
    for name, figure in figures.items():
        paths.append(out / f"{name}.png")
        with replacing(paths[-1]) as file:
            figure.savefig(file, format="png")
    return paths


def run(
    argv: list[str] | None,
    name: str,
    doc: str,
    bound: BoundSchema,
    observed: list[str],
    wanted: list[str],
    n_blocks: int,
) -> int:
    """What each example's ``main`` does: say, draw, train. 1 unless training reduced the held-out error."""
    parser = argparse.ArgumentParser(prog=f"python examples/{name}.py", description=doc.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("out") / name)
    options = parser.parse_args(argv)
    print(bound.summary())
    for path in draw_schema(bound, options.out):
        print(f"drawn: {path}")
    result = train(bound, observed, wanted, n_blocks, options.steps)
    print(f"{', '.join(wanted)} from {', '.join(observed)}, held out, relative to predicting the mean:")
    print(f"before training {result.before:.3f}, after {options.steps} steps {result.after:.3f}")
    return int(not result.after < result.before)
