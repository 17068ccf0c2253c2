"""Record a gymnasium environment as a LeRobot dataset: ``python examples/record_robot.py --out out/cartpole_data``.

A controller plays: of CartPole one by hand, with a fifth of its actions drawn at random; of MuJoCo's Reacher one that
pulls the fingertip to the target, with noise; of others, random actions that change slowly. Frames are rendered without
a display, and written as the camera "observation.images.front" beside "observation.state" and "action", in the format
of LeRobot v3.0 (extra ``data``, and ``mujoco`` for its robots).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

if not __package__:  # run as a file, whose folder has no package `examples`
    sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("", "kernels")]

from canvas_engineering.data import LeRobotRecorder
from examples.cartpole_data import exploring_policy
from examples.robot_data import offscreen, shrink

CARTPOLE_NAMES = ["cart position", "cart velocity", "pole angle", "pole velocity"]


def make(environment: str):
    """A gymnasium environment that draws into memory, small where it is drawn by software."""
    return offscreen(environment, 240)


def controller_of(environment: str, space, rng: np.random.Generator) -> Callable[[np.ndarray], np.ndarray | int]:
    """A controller for one episode: state to action."""
    if environment.startswith("CartPole"):
        goal = rng.uniform(-1.5, 1.5)
        return lambda state: exploring_policy(state, goal, rng)
    if environment.startswith("Reacher"):
        return lambda state: reach(state, rng)
    drift = {"action": np.zeros(space.shape)}

    def wander(_state: np.ndarray) -> np.ndarray:
        drift["action"] = 0.9 * drift["action"] + 0.4 * rng.standard_normal(space.shape)
        return np.clip(drift["action"], space.low, space.high).astype(np.float32)

    return wander


def reach(state: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Torques of Reacher's two joints, float32 (2,): a damped pull of the fingertip to the target, with noise.

    The pull in the plane becomes torques by the fingertip's transposed Jacobian; the links are 0.1 and 0.11 long.
    ``state``: cosines and sines of the joints, the target, velocities, fingertip minus target.
    """
    (cosine, other), (sine, other_sine) = state[:2], state[2:4]
    x, y = 0.11 * (cosine * other - sine * other_sine), 0.11 * (sine * other + cosine * other_sine)
    jacobian = np.array([[-0.1 * sine - y, -y], [0.1 * cosine + x, x]])
    torque = -15.0 * jacobian.T @ state[8:10] - 0.07 * state[6:8] + 0.1 * rng.standard_normal(2)
    return np.clip(torque, -1.0, 1.0).astype(np.float32)


def record(
    environment: str,
    root: Path,
    episodes: int,
    *,
    longest: int = 100,
    size: tuple[int, int] | None = None,
    fps: int = 25,
    seed: int = 0,
    codec: str = "h264",
    advance: Callable[[], None] = lambda: None,
) -> int:
    """Records ``episodes`` episodes of at most ``longest`` frames of ``size``; returns the number of frames.

    ``size``: (40, 60) or, where the environment draws squares, (40, 40), if None.
    An action holds until the next frame; episodes end where the environment ends them. ``advance`` is called after each
    episode.
    """
    rng, world = np.random.default_rng(seed), make(environment)
    if size is None:
        world.reset(seed=seed)
        rows, columns = world.render().shape[:2]
        size = (40, 40) if rows == columns else (40, 60)
    discrete = not world.action_space.shape
    width = 1 if discrete else int(np.prod(world.action_space.shape))
    length = int(np.prod(world.observation_space.shape))
    features = {
        "observation.images.front": {"dtype": "video", "shape": (*size, 3)},
        "observation.state": {
            "dtype": "float32",
            "shape": (length,),
            "names": CARTPOLE_NAMES if environment.startswith("CartPole") else None,
        },
        "action": {"dtype": "float32", "shape": (width,)},
    }
    recorder = LeRobotRecorder(root, fps, features, robot_type=environment, codec=codec)
    repeats = max(1, round(world.metadata.get("render_fps", fps) / fps))
    total = 0
    for _ in range(episodes):
        state, _ = world.reset(seed=int(rng.integers(2**31)))
        controller = controller_of(environment, world.action_space, rng)
        for _ in range(longest):
            action = controller(state)
            frame = {
                "observation.images.front": shrink(world.render(), *size),
                "observation.state": np.ravel(state).astype(np.float32),
                "action": np.atleast_1d(np.asarray(action, np.float32)),
            }
            recorder.add_frame(frame, task=f"play {environment}")
            total += 1
            for _ in range(repeats):
                state, _, ended, cut, _ = world.step(action)
                if ended or cut:
                    break
            if ended or cut:
                break
        recorder.save_episode()
        advance()
    world.close()
    return total


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="record_robot", description=__doc__.splitlines()[0])
    parser.add_argument("--environment", default="CartPole-v1", help="a gymnasium id")
    parser.add_argument("--out", type=Path, default=Path("out/cartpole_data"), help="a folder that is not there yet")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--longest", type=int, default=100, help="frames of an episode, at most")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of frames")
    parser.add_argument("--fps", type=int, default=25)
    parser.add_argument("--codec", choices=("h264", "av1"), default="h264")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    from rich.progress import Progress

    with Progress(transient=True) as progress:
        task = progress.add_task("recording", total=options.episodes)
        frames = record(
            options.environment,
            options.out,
            options.episodes,
            longest=options.longest,
            size=options.size and tuple(options.size),
            fps=options.fps,
            seed=options.seed,
            codec=options.codec,
            advance=lambda: progress.advance(task),
        )
    print(f"{frames} frames in {options.episodes} episodes: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
