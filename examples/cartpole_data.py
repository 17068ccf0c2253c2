"""Simulated data for the demo: CartPole-v1 trajectories with their rendered frames, recorded without a display.

One recorded frame is two physics steps (0.04 s) under one action. A frame is the band of the picture in which the pole
moves, averaged down to 16 x 24 pixels of ink (0 background, 1 black).
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from canvas_engineering.files import replacing

HEIGHT, WIDTH = 16, 24
BAND = slice(160, 320)  # rows of the 400 x 600 picture that the pole can reach
STEPS_PER_FRAME = 2
STATE_NAMES = ("cart position", "cart velocity", "pole angle", "pole velocity")


@dataclass(frozen=True)
class Recording:
    """Frames in the order in which they were recorded; a change of ``episode`` is a reset.

    frames: (n, 16, 24) uint8, ink · 255. states: (n, 4) float32 as CartPole gives them (m, m/s, rad, rad/s).
    actions: (n,) uint8, 0 pushes left and 1 right, in force from this frame to the next. episode: (n,) int32.
    """

    frames: np.ndarray
    states: np.ndarray
    actions: np.ndarray
    episode: np.ndarray

    def windows(self, length: int, stride: int) -> np.ndarray:
        """First frames of all windows of ``length`` frames that stay inside one episode, every ``stride`` frames."""
        starts = np.arange(0, max(0, len(self.episode) - length + 1), stride)
        return starts[self.episode[starts] == self.episode[starts + length - 1]]


def exploring_policy(state: np.ndarray, goal: float, rng: np.random.Generator) -> int:
    """Balance the pole while the cart drifts towards ``goal`` (m), with a fifth of the actions drawn at random."""
    if rng.random() < 0.2:
        return int(rng.integers(2))
    lean = 0.15 * (state[0] - goal) + 0.3 * state[1] + 3.0 * state[2] + 0.8 * state[3]
    return int(lean > 0)


def shrink(picture: np.ndarray) -> np.ndarray:
    """The (400, 600, 3) uint8 picture as (16, 24) uint8 of mean ink · 255."""
    # The darkest channel rather than the mean: the pole is light brown, and thin.
    grey = picture[BAND].min(axis=2)
    ink = 255.0 - grey.reshape(HEIGHT, grey.shape[0] // HEIGHT, WIDTH, grey.shape[1] // WIDTH).mean(axis=(1, 3))
    return ink.round().astype(np.uint8)


def record(n_frames: int, seed: int = 0, advance: Callable[[], None] = lambda: None) -> Recording:
    """Play CartPole-v1 until ``n_frames`` frames are recorded; ``advance`` is called once per frame."""
    # Renders into memory: neither an X server nor a sound card is needed.
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    import gymnasium

    rng = np.random.default_rng(seed)
    environment = gymnasium.make("CartPole-v1", render_mode="rgb_array")
    frames = np.empty((n_frames, HEIGHT, WIDTH), np.uint8)
    states = np.empty((n_frames, 4), np.float32)
    actions = np.empty(n_frames, np.uint8)
    episode = np.empty(n_frames, np.int32)

    state, _ = environment.reset(seed=seed)
    goal, current = rng.uniform(-1.5, 1.5), 0
    for i in range(n_frames):
        action = exploring_policy(state, goal, rng)
        frames[i], states[i], actions[i], episode[i] = shrink(environment.render()), state, action, current
        over = False
        for _ in range(STEPS_PER_FRAME):
            state, _, terminated, truncated, _ = environment.step(action)
            over = terminated or truncated
            if over:
                break
        if over:
            state, _ = environment.reset()
            current += 1
        if over or rng.random() < 0.03:
            goal = rng.uniform(-1.5, 1.5)
        advance()
    environment.close()
    return Recording(frames, states, actions, episode)


def save(recording: Recording, path: Path) -> None:
    """Write an npz in one step: a reader finds the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        np.savez_compressed(file, **vars(recording))


def load(path: Path) -> Recording:
    """Read what :func:`save` wrote; ValueError that names the file if it is something else."""
    try:
        with open(path, "rb") as file, np.load(file) as arrays:
            return Recording(**{name: arrays[name] for name in ("frames", "states", "actions", "episode")})
    except (KeyError, ValueError, zipfile.BadZipFile) as cause:
        raise ValueError(f"{path} is not a recording of this demo ({cause}); delete it to record anew") from cause


def split(recording: Recording, length: int, stride: int, held_out: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Windows for training and, from the last episodes alone, for measuring: no episode is in both."""
    starts = recording.windows(length, stride)
    boundary = recording.episode[int(len(recording.episode) * (1.0 - held_out))]
    train = starts[recording.episode[starts] < boundary]
    test = starts[recording.episode[starts] >= boundary]
    if len(train) == 0 or len(test) == 0:
        raise ValueError(
            f"{len(recording.episode)} frames in {recording.episode[-1] + 1} episodes give {len(train)} training and "
            f"{len(test)} held-out windows of {length} frames; record more frames"
        )
    return train, test
