"""LeRobotRecorder: episodes written as a LeRobot dataset, v3.0."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from canvas_engineering.checked import checked_choice, checked_int, checked_path, shown
from canvas_engineering.data.folder import DEFAULT_COLUMNS
from canvas_engineering.data.video import ENCODERS, write_video
from canvas_engineering.files import replace_file

CHUNK = 1000
PATHS = {
    "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
    "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
}
EPISODES = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
# Frames whose pixels enter a camera's statistics, evenly spaced in each episode.
SAMPLED_FRAMES = 64


class LeRobotRecorder:
    """Writes a dataset episode by episode, each a file of rows and one for each camera.

    What is on disk is a whole dataset after every :meth:`save_episode`: ``info.json``, which says how many episodes
    there are, is replaced last.

    Args:
        root: a folder that is not there yet, or is empty.
        fps: frames per second.
        features: name to its declaration: {"dtype": "video", "shape": (height, width, 3)} for a camera,
            {"dtype": "float32", "shape": (n,), "names": […]} for numbers.
        robot_type: of the robot, in a word.
        codec: "h264" or "av1", of videos.

    Raises:
        ValueError: a folder with files in it, or features that cannot be written.
        ImportError: pyarrow or PyAV is not installed (extra ``data``).

    >>> import tempfile
    >>> from canvas_engineering.data import LeRobotFolder
    >>> features = {"action": {"dtype": "float32", "shape": (2,)}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     recorder = LeRobotRecorder(f"{folder}/data", 10, features)
    ...     for t in range(3):
    ...         recorder.add_frame({"action": np.array([t, 0.0], np.float32)}, task="push")
    ...     recorder.save_episode()
    ...     LeRobotFolder(f"{folder}/data").episodes[0].length
    3
    """

    def __init__(
        self,
        root: str | Path,
        fps: int,
        features: Mapping[str, Mapping[str, Any]],
        *,
        robot_type: str | None = None,
        codec: str = "h264",
    ) -> None:
        self.root, self.fps = checked_path(root, "root"), checked_int(fps, "fps", 1)
        self.codec = checked_choice(codec, "codec", tuple(ENCODERS))
        self.features = {name: _declared(name, feature, self.fps, codec) for name, feature in features.items()}
        if self.root.exists() and any(self.root.iterdir()):
            raise ValueError(f"{self.root} has files in it: a dataset is recorded into a folder of its own")
        (self.root / "meta").mkdir(parents=True, exist_ok=True)
        self.robot_type = robot_type
        self._frames: list[dict[str, Any]] = []
        self._tasks: dict[str, int] = {}
        self._episodes, self._total = 0, 0
        self._sums: dict[str, _Moments] = {}

    def add_frame(self, frame: Mapping[str, Any], task: str = "") -> None:
        """Adds one frame to the current episode.

        Args:
            frame: each feature's value: uint8 (height, width, 3) of cameras, arrays of the declared shapes of others.
            task: what the episode shows, in words.

        Raises:
            ValueError: features that are missing, unknown or of another shape.
        """
        if set(frame) != set(self.features):
            raise ValueError(f"a frame has {sorted(frame)}; the dataset's features are {sorted(self.features)}")
        values = {}
        for name, feature in self.features.items():
            video = feature["dtype"] == "video"
            value = np.array(frame[name], dtype=np.uint8 if video else feature["dtype"])
            if value.shape != tuple(feature["shape"]) and not (value.shape == () and feature["shape"] == [1]):
                raise ValueError(f"{name!r} has the shape {value.shape}, declared is {tuple(feature['shape'])}")
            values[name] = value
        self._frames.append({**values, "task": task})

    def save_episode(self) -> None:
        """Writes the frames since the last call as an episode.

        Raises:
            ValueError: there are none.
        """
        if not self._frames:
            raise ValueError("an episode needs a frame: add_frame first")
        index, length = self._episodes, len(self._frames)
        where = {"chunk_index": index // CHUNK, "file_index": index % CHUNK}
        tasks = list(dict.fromkeys(frame["task"] for frame in self._frames))
        for task in tasks:
            self._tasks.setdefault(task, len(self._tasks))
        row: dict[str, Any] = {
            "episode_index": index,
            "tasks": tasks,
            "length": length,
            "dataset_from_index": self._total,
            "dataset_to_index": self._total + length,
        }
        row |= {f"{kind}/{name}": value for kind in ("data", "meta/episodes") for name, value in where.items()}
        for name, feature in self.features.items():
            values = np.stack([frame[name] for frame in self._frames])
            if feature["dtype"] == "video":
                write_video(
                    self.root / PATHS["video_path"].format(video_key=name, **where), values, self.fps, self.codec
                )
                row |= {f"videos/{name}/{key}": value for key, value in where.items()}
                row |= {f"videos/{name}/from_timestamp": 0.0, f"videos/{name}/to_timestamp": length / self.fps}
            moments = _Moments.of(values, feature["dtype"] == "video")
            self._sums[name] = self._sums[name] + moments if name in self._sums else moments
            row |= {f"stats/{name}/{key}": value for key, value in moments.stats().items()}
        self._write_rows(index, length, PATHS["data_path"].format(**where))
        _write_table(self.root / EPISODES.format(**where), {name: [value] for name, value in row.items()})
        self._episodes, self._total, self._frames = index + 1, self._total + length, []
        self._write_meta()

    def _write_rows(self, index: int, length: int, name: str) -> None:
        import pyarrow

        numbers = np.arange(length)
        columns: dict[str, Any] = {}
        for key, feature in self.features.items():
            if feature["dtype"] == "video":
                continue
            values = np.stack([frame[key] for frame in self._frames])
            kind = pyarrow.from_numpy_dtype(values.dtype)
            if feature["shape"] == [1]:
                columns[key] = pyarrow.array(values.reshape(-1), kind)
            else:
                flat = pyarrow.array(values.reshape(-1), kind)
                columns[key] = pyarrow.FixedSizeListArray.from_arrays(flat, int(np.prod(feature["shape"])))
        columns["timestamp"] = (numbers / self.fps).astype(np.float32)
        columns["frame_index"] = numbers
        columns["episode_index"] = np.full(length, index)
        columns["index"] = self._total + numbers
        columns["task_index"] = np.array([self._tasks[frame["task"]] for frame in self._frames])
        _write_table(self.root / name, columns)

    def _write_meta(self) -> None:
        pandas = {
            "index_columns": ["task"],
            "column_indexes": [],
            "columns": [
                {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy, "metadata": None}
                for name, kind, numpy in (("task_index", "int64", "int64"), ("task", "unicode", "object"))
            ],
            "pandas_version": "2.0.0",
        }
        tasks = {"task_index": list(self._tasks.values()), "task": list(self._tasks)}
        _write_table(self.root / "meta/tasks.parquet", tasks, {b"pandas": json.dumps(pandas).encode()})
        stats = {name: moments.stats() for name, moments in self._sums.items()}
        self._write_json("meta/stats.json", stats)
        defaults = {name: {"dtype": "int64", "shape": [1], "names": None} for name in DEFAULT_COLUMNS}
        defaults["timestamp"]["dtype"] = "float32"
        info = {
            "codebase_version": "v3.0",
            "robot_type": self.robot_type,
            "total_episodes": self._episodes,
            "total_frames": self._total,
            "total_tasks": len(self._tasks),
            "chunks_size": CHUNK,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "fps": self.fps,
            "splits": {"train": f"0:{self._episodes}"},
            **PATHS,
            "features": {**self.features, **defaults},
        }
        self._write_json("meta/info.json", info)

    def _write_json(self, name: str, value: Any) -> None:
        replace_file(self.root / name, f"{json.dumps(value, indent=4)}\n".encode())


@dataclass(frozen=True)
class _Moments:
    """Count, mean, squared deviations and extremes of a feature's values, joined over episodes (Chan et al., 1979)."""

    count: int
    mean: np.ndarray
    deviation: np.ndarray
    least: np.ndarray
    most: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, video: bool) -> _Moments:
        """Returns statistics of (length, …); of videos by channel, scaled to [0, 1], over sampled frames."""
        if video:
            chosen = np.linspace(0, len(values) - 1, min(len(values), SAMPLED_FRAMES)).astype(int)
            values = values[chosen].reshape(-1, 3, 1, 1) / 255.0
        values = values.astype(np.float64)
        mean = values.mean(0)
        return cls(len(values), mean, ((values - mean) ** 2).sum(0), values.min(0), values.max(0))

    def __add__(self, other: _Moments) -> _Moments:
        count = self.count + other.count
        step = other.mean - self.mean
        return _Moments(
            count,
            self.mean + step * other.count / count,
            self.deviation + other.deviation + step**2 * self.count * other.count / count,
            np.minimum(self.least, other.least),
            np.maximum(self.most, other.most),
        )

    def stats(self) -> dict[str, list]:
        """Returns statistics in the form of LeRobot's ``stats.json``."""
        named = {"min": self.least, "max": self.most, "mean": self.mean, "std": np.sqrt(self.deviation / self.count)}
        return {**{name: np.atleast_1d(value).tolist() for name, value in named.items()}, "count": [self.count]}


def _declared(name: str, feature: Mapping[str, Any], fps: int, codec: str) -> dict[str, Any]:
    """Returns a feature as ``info.json`` declares it."""
    dtype, shape = feature.get("dtype"), [int(size) for size in feature.get("shape", ())]
    if name in DEFAULT_COLUMNS:
        raise ValueError(f"feature {name!r} is written by itself")
    if dtype == "video":
        if len(shape) != 3 or shape[2] != 3 or shape[0] % 2 or shape[1] % 2:
            raise ValueError(f"camera {name!r} must have an even height and width, and 3 channels, got {tuple(shape)}")
        info = {
            "video.height": shape[0],
            "video.width": shape[1],
            "video.codec": codec,
            "video.pix_fmt": "yuv420p",
            "video.is_depth_map": False,
            "video.fps": fps,
            "video.channels": 3,
            "has_audio": False,
        }
        return {"dtype": "video", "shape": shape, "names": ["height", "width", "channels"], "info": info}
    try:
        kind = np.dtype(dtype)
    except TypeError:
        kind = np.dtype(object)
    if kind.kind not in "fiub" or len(shape) != 1 or shape[0] < 1:
        raise ValueError(f"feature {name!r} must be a video, or numbers of shape (n,), got {shown(dict(feature))}")
    names = feature.get("names")
    return {"dtype": kind.name, "shape": shape, "names": None if names is None else list(names)}


def _write_table(path: Path, columns: Mapping[str, Any], metadata: dict[bytes, bytes] | None = None) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    table = pyarrow.table(dict(columns))
    if metadata is not None:
        table = table.replace_schema_metadata(metadata)
    file = BytesIO()
    parquet.write_table(table, file)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, file.getvalue())
