"""Simulated clips with actions for ``examples.train_robot``, rendered by gymnasium without a display."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

if not __package__:  # run as a file, whose folder has no package `examples`
    sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("", "kernels")]

from canvas_engineering.files import replacing
from examples.cartpole_data import exploring_policy


@dataclass(frozen=True)
class Clips:
    """Rendered clips. frames: (n, F, H, W, 3) uint8. actions: (n, F, A) float32, in force from each frame to the next.

    ``environment`` is the gymnasium id: the data is simulated.
    """

    frames: np.ndarray
    actions: np.ndarray
    environment: str


def shrink(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """A (rows, columns, 3) uint8 picture, cut to the shape's aspect around its middle and averaged down to it."""
    rows, columns = picture.shape[:2]
    cell = min(rows // height, columns // width)
    if cell < 1:
        raise ValueError(f"a picture of {rows} × {columns} pixels cannot be averaged down to {height} × {width}")
    top, left = (rows - cell * height) // 2, (columns - cell * width) // 2
    cut = picture[top : top + cell * height, left : left + cell * width].astype(np.float32)
    return cut.reshape(height, cell, width, cell, 3).mean(axis=(1, 3)).round().astype(np.uint8)


def offscreen(environment: str, side: int | None = None):
    """A gymnasium environment that draws into memory; MuJoCo's draw squares of ``side`` pixels where that is given.

    Raises:
        RuntimeError: the environment cannot be made or drawn on this machine, with what it may want.
    """
    for variable, value in (("SDL_VIDEODRIVER", "dummy"), ("SDL_AUDIODRIVER", "dummy"), ("MUJOCO_GL", "egl")):
        os.environ.setdefault(variable, value)
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    import gymnasium

    mujoco = "mujoco" in str(gymnasium.spec(environment).entry_point)
    if mujoco:
        with contextlib.suppress(ImportError):
            import triton  # noqa: F401  its LLVM crashes where Mesa's, which EGL draws with, is loaded first
    try:
        size = {"width": side, "height": side} if mujoco and side else {}
        world = gymnasium.make(environment, render_mode="rgb_array", **size)
        world.reset(seed=0)
        world.render()
    except Exception as error:  # an import, a missing library of the system, a display
        wanted = (
            "canvas-engineering[mujoco], and EGL (on Debian: libegl1, libgl1-mesa-dri) or another MUJOCO_GL than "
            f"{os.environ['MUJOCO_GL']}"
            if mujoco
            else "what gymnasium's documentation lists for it"
        )
        raise RuntimeError(
            f"{environment} cannot be drawn here ({type(error).__name__}: {error}): it wants {wanted}"
        ) from error
    return world


def record(
    environment: str,
    clips: int,
    frames: int,
    height: int,
    width: int,
    seed: int,
    advance: Callable[[], None] = lambda: None,
) -> Clips:
    """Play ``environment`` until there are ``clips`` clips of ``frames`` frames; ``advance`` is called once a clip.

    CartPole is balanced while it drifts towards a goal; any other environment gets a slowly changing random action. A
    clip lies within one episode.

    Raises:
        RuntimeError: the environment cannot be made or drawn on this machine, with what it may want.
    """
    rng = np.random.default_rng(seed)
    world = offscreen(environment)
    state, _ = world.reset(seed=seed)
    discrete = hasattr(world.action_space, "n")
    size = 1 if discrete else int(np.prod(world.action_space.shape))
    pictures = np.empty((clips, frames, height, width, 3), np.uint8)
    actions = np.empty((clips, frames, size), np.float32)
    clip, number = 0, 0
    goal, drift = rng.uniform(-1.5, 1.5), np.zeros(size, np.float32)
    while clip < clips:
        if environment.startswith("CartPole"):
            action = exploring_policy(state, goal, rng)
        elif discrete:
            action = int(rng.integers(world.action_space.n))
        else:
            drift = 0.9 * drift + 0.3 * rng.standard_normal(size).astype(np.float32)
            action = np.clip(drift, -1.0, 1.0) * world.action_space.high
        pictures[clip, number] = shrink(world.render(), height, width)
        actions[clip, number] = action
        number += 1
        state, _, terminated, truncated, _ = world.step(action)
        if number == frames:
            clip, number = clip + 1, 0
            goal = rng.uniform(-1.5, 1.5)
            advance()
        if terminated or truncated:
            state, _ = world.reset()
            number = 0  # the clip begins anew in the new episode
    world.close()
    return Clips(pictures, actions, environment)


def pooled_latents(frames: np.ndarray, vae_scale: int = 8, compression: int = 4) -> Tensor:
    """(n, F, H, W, 3) uint8 → (n, T, 4, H / 8, W / 8) float32: stand-ins for a VAE's latents, for random models.

    Every fourth frame, in grey, averaged down to twice the latent size; each 2 × 2 cell is four channels. Standardised
    over everything. :func:`pictures` turns them back into small grey frames.
    """
    grey = torch.from_numpy(frames[:, ::compression].mean(axis=-1, dtype=np.float32))
    small = torch.nn.functional.avg_pool2d(grey, vae_scale // 2)
    latents = torch.nn.functional.pixel_unshuffle(small.flatten(0, 1)[:, None], 2).unflatten(0, small.shape[:2])
    return (latents - latents.mean()) / latents.std()


def vae_latents(vae: torch.nn.Module, frames: np.ndarray, batch: int = 1) -> Tensor:
    """(n, F, H, W, 3) uint8 → (n, T, C, H / 8, W / 8) float32, the means of CogVideoX's own VAE, scaled."""
    encoded = []
    for part in np.array_split(frames, -(-len(frames) // batch)):
        video = torch.from_numpy(part).permute(0, 4, 1, 2, 3).to(vae.device, vae.dtype) / 127.5 - 1.0
        with torch.no_grad():
            encoded.append(vae.encode(video).latent_dist.mode().float().cpu() * vae.config.scaling_factor)
    return torch.cat(encoded).transpose(1, 2).contiguous()


def pictures(latents: Tensor) -> Tensor:
    """(n, T, C, h, w) latents → (n, T, 2h, 2w) in [0, 1], for looking at: of :func:`pooled_latents` the frames, of a
    VAE's latents their first channels."""
    n, T = latents.shape[:2]
    small = torch.nn.functional.pixel_shuffle(latents[:, :, :4].flatten(0, 1).float(), 2)[:, 0].unflatten(0, (n, T))
    low, high = small.amin(), small.amax()
    return (small - low) / (high - low).clamp_min(1e-6)


def vae_pictures(vae: torch.nn.Module, latents: Tensor) -> Tensor:
    """(n, T, C, h, w) latents → (n, F, H, W, 3) in [0, 1], decoded by CogVideoX's own VAE."""
    with torch.no_grad():
        scaled = latents.transpose(1, 2).to(vae.device, vae.dtype) / vae.config.scaling_factor
        return (vae.decode(scaled).sample.float().cpu() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1)


def save(path: Path, **arrays: np.ndarray) -> None:
    """Write an npz in one step: a reader finds the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        np.savez_compressed(file, **arrays)
