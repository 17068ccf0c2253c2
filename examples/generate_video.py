"""Generate a video with sparse attention: ``python examples/generate_video.py --prompt "a robot waves"``.

``--model`` is any pipeline of diffusers whose transformer `canvas_engineering.models` has an adapter for (CogVideoX,
Wan, HunyuanVideo, LTX-Video, Mochi), by name or folder: ``--model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --size 81 480 832``.
Without it a small random CogVideoX is taken, whose videos show nothing. ``--topology`` says what a token attends to,
``--dense`` for how many steps it still attends to everything before.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

if not __package__:  # run as a file, whose folder has no package `examples`
    sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("", "kernels")]

from canvas_engineering.data.video import write_video
from canvas_engineering.models import remove_canvas_attention, set_canvas_attention, topologies, video_layout
from examples.canvas_cogvideox import load_transformer, load_vae

TOPOLOGIES: dict[str, Callable] = {
    "previous_frame": topologies.previous_frame,
    "spatial_tiles": lambda layout: topologies.spatial_tiles(layout, 8, 8),
    "sliding_tiles": topologies.sliding_tiles,
    "radial": topologies.radial,
    "first_frame_and_text_global": topologies.first_frame_and_text_global,
    "block_causal": topologies.block_causal,
}


def tiny_pipeline() -> Any:
    """Returns a CogVideoXPipeline of small random parts, which takes any text."""
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    torch.manual_seed(0)
    transformer = load_transformer("tiny")
    text = T5Config(
        vocab_size=384, d_model=transformer.config.text_embed_dim, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    parts = {"text_encoder": T5EncoderModel(text).eval(), "vae": load_vae("tiny"), "transformer": transformer}
    return CogVideoXPipeline(tokenizer=ByT5Tokenizer(), scheduler=CogVideoXDDIMScheduler(), **parts)


def generate(pipe: Any, options: argparse.Namespace) -> np.ndarray:
    """Returns the video, uint8 (frames, height, width, 3)."""
    frames, height, width = options.size
    layout = video_layout(pipe.transformer, height, width, frames)
    declared = None if options.topology == "dense" else TOPOLOGIES[options.topology](layout)

    def sparse() -> None:
        processor = set_canvas_attention(pipe.transformer, *declared)
        print(f"{options.topology}: {processor.plan.density:.1%} of all pairs of tokens")

    def after(pipe: Any, step: int, _: Any, given: dict) -> dict:
        if declared is not None and step + 1 == options.dense:
            sparse()
        return given

    if declared is not None and options.dense == 0:
        sparse()
    given: dict[str, Any] = {"max_sequence_length": options.text_tokens} if options.text_tokens else {}
    try:
        video = pipe(
            options.prompt,
            height=height,
            width=width,
            num_frames=frames,
            num_inference_steps=options.steps,
            generator=torch.Generator().manual_seed(options.seed),
            callback_on_step_end=after,
            output_type="np",
            **given,
        ).frames[0]
    finally:
        if declared is not None:
            remove_canvas_attention(pipe.transformer)
    return (np.nan_to_num(video) * 255).round().clip(0, 255).astype(np.uint8)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(prog="python examples/generate_video.py", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="a pipeline of diffusers: a name on the Hub, or a folder")
    parser.add_argument("--prompt", default="a robot waves")
    size = {"nargs": 3, "type": int, "default": [9, 32, 48], "metavar": ("FRAMES", "HEIGHT", "WIDTH")}
    parser.add_argument("--size", **size, help="of the video")
    parser.add_argument("--topology", choices=["dense", *TOPOLOGIES], default="previous_frame")
    parser.add_argument("--dense", type=int, default=0, help="steps with dense attention before")
    parser.add_argument("--lora", help="LoRA weights, as examples/train_robot.py writes them")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--out", type=Path, default=Path("out/video.mp4"))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Generates and writes one video."""
    options = arguments(argv)
    if options.model == "tiny":
        pipe, options.text_tokens = tiny_pipeline(), 4
    else:
        from diffusers import DiffusionPipeline

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*torch_dtype", FutureWarning)  # the name that older diffusers know
            pipe = DiffusionPipeline.from_pretrained(options.model, torch_dtype=getattr(torch, options.dtype))
        options.text_tokens = None
    if torch.accelerator.is_available():
        pipe.to(torch.accelerator.current_accelerator())
    if options.lora:
        pipe.load_lora_weights(options.lora)
    begun = time.perf_counter()
    video = generate(pipe, options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_video(options.out, video, 8, "h264")
    seconds = time.perf_counter() - begun
    print(f"{options.out}: {len(video)} frames of {video.shape[1]} × {video.shape[2]}, {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
