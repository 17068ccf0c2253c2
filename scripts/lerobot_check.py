"""Files of ours in LeRobot's loader, and LeRobot's in ours: run by ``make lerobot``, where lerobot is installed."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from canvas_engineering import CanvasLayout
from canvas_engineering.data import LeRobotCanvasDataset, LeRobotRecorder

FPS, LENGTHS, SIZE = 10, (12, 7), (32, 48)
CAMERA, STATE = "observation.images.front", "observation.state"
FEATURES = {
    CAMERA: {"dtype": "video", "shape": (*SIZE, 3), "names": ["height", "width", "channels"]},
    STATE: {"dtype": "float32", "shape": (3,), "names": ["x", "y", "z"]},
    "action": {"dtype": "float32", "shape": (1,), "names": ["force"]},
}


def frame(episode: int, t: int) -> dict[str, np.ndarray]:
    """A frame whose brightness and numbers say which it is."""
    image = np.full((*SIZE, 3), 20 + 10 * t + 100 * episode, np.uint8)
    return {
        CAMERA: image,
        STATE: np.array([t, 10 * episode, t * t], np.float32),
        "action": np.array([0.5 * t], np.float32),
    }


def fill(recorder) -> None:
    """Records the episodes with either's recorder."""
    for episode, length in enumerate(LENGTHS):
        for t in range(length):
            if isinstance(recorder, LeRobotRecorder):
                recorder.add_frame(frame(episode, t), task=f"task {episode}")
            else:
                recorder.add_frame({**frame(episode, t), "task": f"task {episode}"})
        recorder.save_episode()


def check(sample: dict, episode: int, t: int, where: str) -> None:
    """Raises AssertionError unless a sample is the frame that was recorded."""
    wanted = frame(episode, t)
    image = 255 * sample[CAMERA].float().mean().item()
    assert abs(image - wanted[CAMERA].mean()) < 4, (where, episode, t, image)
    for name in (STATE, "action"):
        np.testing.assert_allclose(np.ravel(sample[name]), wanted[name], err_msg=f"{where} {episode} {t} {name}")


def main(folder: Path) -> None:
    """Writes with each, reads with the other, for both codecs of ours."""
    for codec in ("h264", "av1"):
        root = folder / f"ours_{codec}"
        fill(LeRobotRecorder(root, FPS, FEATURES, codec=codec))
        theirs = LeRobotDataset("test/ours", root=root)
        assert len(theirs) == sum(LENGTHS) and theirs.meta.total_episodes == len(LENGTHS)
        places = [(e, t) for e, length in enumerate(LENGTHS) for t in range(length)]
        for index, (episode, t) in enumerate(places):
            check(theirs[index], episode, t, f"lerobot reads ours, {codec}")
            assert theirs[index]["task"] == f"task {episode}"
    root = folder / "theirs"
    recorder = LeRobotDataset.create("test/theirs", FPS, FEATURES, root=root, use_videos=True)
    fill(recorder)
    getattr(recorder, "finalize", lambda: None)()
    regions = {"front": (0, 1, 0, 1), "state": (0, 1, 1, 2), "action": (0, 1, 2, 3)}
    ours = LeRobotCanvasDataset(
        root, CanvasLayout(T=1, d_model=8, spatial_shape=(3,), regions=regions), normalize="none"
    )
    assert len(ours) == sum(LENGTHS)
    for index, (episode, t) in enumerate(places):
        sample = ours[index]
        named = {feature: sample[region][0] for region, feature in ours.regions.items()}
        check(named, episode, t, "we read lerobot's")
        assert sample["task"] == f"task {episode}"
    print(f"lerobot {__import__('lerobot').__version__}, torch {torch.__version__}: files go both ways")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
    sys.exit()
