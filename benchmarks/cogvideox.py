"""CogVideoX's attention along a topology, and packed order: ``python -m benchmarks.cogvideox``, or ``make costs``.

*attention*: a block's tokens (13 × 30 × 45 of video, 226 of text, 2 heads of 64) under same frame + previous frame +
text, against dense ``scaled_dot_product_attention``, float32 on one thread, forward and backward apart. What matters is
the time relative to dense over the share of pairs that are computed: 1 is a kernel as good as the dense one, at most
1.25 is the target. Before timing, what is timed must agree with float64 to 1e-5: some rows of the output, and the
gradients that come of these rows.

*packed order*: a whole model under spatial tiles with its tokens moved once per model, against once per layer; the same
outputs and gradients are asked for first.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn

from benchmarks import measure
from canvas_engineering import (
    AttentionPlan,
    canvas_attention,
    cogvideox_layout,
    graft_looped_blocks,
    tile_topology,
    window_topology,
)
from canvas_engineering.cogvideox.tokens import token_plan

HEADS, HEAD_DIM, TOLERANCE, TARGET, GATED_ROWS = 2, 64, 1e-5, 1.25, 512
CONFIG = {
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "patch_size": 2,
    "patch_size_t": None,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": 226,
}
MODEL = {
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 64,
    "text_embed_dim": 64,
    "num_layers": 4,
    "max_text_seq_length": 32,
    "use_rotary_positional_embeddings": True,
}


class Disagreement(Exception):
    """Two ways of computing the same thing do not agree: there is nothing to time."""


def plan_of(height: int, width: int, frames: int, text: int) -> tuple[AttentionPlan, tuple[int, ...]]:
    """The plan of same frame + previous frame + text on a video of that size in pixels, and its grid."""
    layout = cogvideox_layout(CONFIG, height, width, frames, text_tokens=text)
    return token_plan(layout, window_topology()), tuple(int(size) for size in layout.region_size("video"))


def tensors(n: int, count: int = 4) -> list[Tensor]:
    """(1, HEADS, n, HEAD_DIM) float32, laid out as a projection leaves them."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, n, HEADS, HEAD_DIM, generator=generator).transpose(1, 2) for _ in range(count)]


def gate(plan: AttentionPlan, grid: tuple[int, int, int]) -> float:
    """The largest error of output and gradients over their largest value, of some queries; Disagreement over 1e-5. The
    gradient of all other rows of the output is zero, so that every key's is exact as well."""
    T, H, W = grid
    rows = torch.linspace(0, plan.n_positions - 1, min(plan.n_positions, GATED_ROWS)).long()
    text = plan.n_positions - T * H * W
    frame = torch.cat([torch.full((text,), -1), torch.arange(T).repeat_interleave(H * W)])
    asking = frame[rows, None]
    offset = asking - frame
    # whatever is text reads all, and is read by all
    allowed = (asking < 0) | (frame < 0) | (offset == 0) | (offset == 1)
    *qkv, upstream = tensors(plan.n_positions)
    upstream = torch.zeros_like(upstream).index_copy(2, rows, upstream[:, :, rows])
    exact = [x.double() for x in qkv]
    expected = outputs_and_gradients(lambda q, k, v: masked(q[:, :, rows], k, v, allowed), exact, upstream[:, :, rows])
    found = outputs_and_gradients(lambda q, k, v: canvas_attention(q, k, v, plan), qkv, upstream)
    found[0] = found[0][:, :, rows]
    worst = max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, expected))
    if not worst <= TOLERANCE:
        raise Disagreement(f"attention differs from float64 by {worst:.1e}")
    return worst


def masked(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """Softmax attention over the allowed pairs, spelled out."""
    scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v


def outputs_and_gradients(attend, qkv: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """The output, and the gradients of q, k and v."""
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def attention_rows(rounds: int, size: tuple[int, int, int, int]) -> list[dict]:
    """Rows for forward and for backward: seconds, and time relative to dense over the share of pairs."""
    plan, grid = plan_of(*size)
    worst = gate(plan, grid)
    *qkv, upstream = tensors(plan.n_positions)
    leaves = [x.requires_grad_() for x in qkv]
    dense = torch.nn.functional.scaled_dot_product_attention
    contestants = {"ours": lambda q, k, v: canvas_attention(q, k, v, plan), "dense": dense}
    seconds = {(name, part): [] for name in contestants for part in ("forward", "backward")}
    for turn in range(rounds + 1):
        for name, attend in contestants.items():
            start = time.perf_counter()
            out = attend(*leaves)
            middle = time.perf_counter()
            torch.autograd.grad(out, leaves, upstream)
            end = time.perf_counter()
            if turn:  # the first one warms up
                seconds[name, "forward"].append(middle - start)
                seconds[name, "backward"].append(end - middle)
    rows = []
    for part in ("forward", "backward"):
        ours, theirs = (np.array(seconds[name, part]) for name in ("ours", "dense"))
        rows.append(
            {
                "case": f"attention, {part}",
                "tokens": plan.n_positions,
                "density": plan.density,
                "ours_seconds": measure.quantiles(ours),
                "other_seconds": measure.quantiles(theirs),
                "ratio": measure.quantiles(ours / theirs / plan.density),
                "at_most": TARGET,
                "rounds": rounds,
                "worst_error": worst,
                **measure.environment(),
            }
        )
    return rows


def packed_models(size: tuple[int, int, int]) -> tuple[dict[str, nn.Module], dict]:
    """The same grafted model in packed order and not, and arguments of its forward."""
    from diffusers import CogVideoXTransformer3DModel

    from examples.train_robot import rotary_tables

    height, width, frames = size
    models = {}
    for name, packed in (("once per model", True), ("once per layer", False)):
        torch.manual_seed(0)
        config = {**MODEL, "sample_height": height // 8, "sample_width": width // 8, "sample_frames": frames}
        model = CogVideoXTransformer3DModel(**config)
        layout = cogvideox_layout(model.config, height, width, frames)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the density, which is not the matter here
            options = {"layout": layout, "topology": tile_topology(4, 4), "packed": packed}
            graft_looped_blocks(model, 1, loops=1, freeze="none", **options)
        models[name] = model
    if not models["once per model"].config.packed:
        raise Disagreement("the plan moves no tokens: there is nothing to compare")
    T = layout.T
    generator = torch.Generator().manual_seed(1)
    batch = {
        "hidden_states": torch.randn(1, T, MODEL["in_channels"], height // 8, width // 8, generator=generator),
        "encoder_hidden_states": torch.randn(1, 32, MODEL["text_embed_dim"], generator=generator),
        "timestep": torch.tensor([500]),
        "image_rotary_emb": rotary_tables(model.config, T, height // 8, width // 8),
        "return_dict": False,
    }
    return models, batch


def packed_row(rounds: int, size: tuple[int, int, int]) -> dict:
    """A training step with tokens moved once per model, over one with tokens moved once per layer."""
    models, batch = packed_models(size)

    def step(model: nn.Module) -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        out = model(**batch)[0]
        out.square().mean().backward()
        return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    found, expected = (step(model) for model in models.values())
    largest = max(float(x.abs().max()) for x in expected[1:])
    scales = [float(expected[0].abs().max()), *[largest] * (len(expected) - 1)]
    worst = max(float((a - b).abs().max()) / scale for a, b, scale in zip(found, expected, scales))
    if not worst <= 10 * TOLERANCE:
        raise Disagreement(f"packed order changes the results by {worst:.1e}")
    runs = {name: lambda model=model: step(model) for name, model in models.items()}
    times = measure.interleave(runs, rounds, warm_up=1)
    ours, theirs = times.values()
    plan = next(iter(models.values())).transformer_blocks[0].attn1.processor.plan
    return {
        "case": "packed order, training step",
        "tokens": plan.n_positions,
        "density": plan.density,
        "ours_seconds": measure.quantiles(ours),
        "other_seconds": measure.quantiles(theirs),
        "ratio": measure.quantiles(ours / theirs),
        "at_most": None,
        "rounds": rounds,
        "worst_error": worst,
        **measure.environment(),
    }


def table(rows: list[dict]) -> Table:
    """Medians, ratios with their 10 % and 90 % quantiles, and what each ratio must not exceed."""
    result = Table(title="CogVideoX, float32, one thread; attention: (ours / dense) / density")
    for column in ("case", "tokens", "density", "ours s", "other s", "ratio", "p10 to p90", "at most"):
        result.add_column(column, justify="left" if column == "case" else "right")
    for row in rows:
        ratio, target = row["ratio"], row["at_most"]
        met = "" if target is None else f"{target:g} {'reached' if ratio['p50'] <= target else 'MISSED'}"
        times = (f"{row[name]['p50']:.3f}" for name in ("ours_seconds", "other_seconds"))
        spread = f"{ratio['p10']:.2f} to {ratio['p90']:.2f}"
        result.add_row(
            row["case"], str(row["tokens"]), f"{row['density']:.4f}", *times, f"{ratio['p50']:.3f}", spread, met
        )
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cogvideox", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, nargs=4, default=[480, 720, 49, 226], help="height width frames text")
    parser.add_argument("--packed-size", type=int, nargs=3, default=[256, 384, 17], help="height width frames")
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "cogvideox.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    console = measure.console()
    try:
        rows = attention_rows(options.rounds, tuple(options.size))
        rows.append(packed_row(options.rounds, tuple(options.packed_size)))
    except Disagreement as cause:
        console.print(f"[red]{cause}")
        return 1
    console.print(table(rows))
    measure.write_rows(rows, options.out)
    console.print(f"rows: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
