"""LeRobot datasets on disk, loaded by pyarrow and PyAV. Formats v3.0 and v2.1.

https://huggingface.co/docs/lerobot/lerobot-dataset-v3: ``meta/info.json`` names features, rates and where files lie;
v3.0 has several episodes a file and tables of episodes, v2.1 a file for each episode and lists of JSON lines.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from canvas_engineering.checked import parsed_json, shown
from canvas_engineering.data.video import VideoReader

VERSIONS = ("v3.0", "v2.1")
# Columns that every dataset has beside its features.
DEFAULT_COLUMNS = ("timestamp", "frame_index", "episode_index", "index", "task_index")


@dataclass(frozen=True)
class Episode:
    """The files and rows of one episode.

    Attributes:
        index: its number; length: of its frames.
        data: file of its rows; first: of these rows.
        videos: feature to (file, seconds from the file's start at which the episode begins).
        tasks: what it shows, in words.
    """

    index: int
    length: int
    data: Path
    first: int
    videos: dict[str, tuple[Path, float]] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()


class LeRobotFolder:
    """A dataset's metadata, and its rows and frames by episode.

    Args:
        root: the dataset's folder.

    Attributes:
        version, fps: "v3.0" or "v2.1"; frames per second.
        features: name to its declaration in ``info.json``: "dtype", "shape", "names".
        episodes: list of :class:`Episode`.
        stats: feature to "mean", "std", "min" and "max" as float64 arrays; {} where there are none.

    Raises:
        ValueError: no dataset, or one of another format; the message names the file.
        ImportError: pyarrow or PyAV is not installed (extra ``data``).
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.info = self._json("meta/info.json")
        self.version = self.info.get("codebase_version")
        if self.version not in VERSIONS:
            raise ValueError(
                f"{self.root}/meta/info.json has the codebase version {shown(self.version)}; {' and '.join(VERSIONS)} "
                "are supported: convert older datasets by lerobot's own converters"
            )
        for name, kind in (("fps", (int, float)), ("features", dict), ("data_path", str)):
            if not isinstance(self.info.get(name), kind):
                raise ValueError(f"{self.root}/meta/info.json lacks {name}: {shown(self.info.get(name))}")
        self.fps, self.features = float(self.info["fps"]), self.info["features"]
        self.video_keys = tuple(name for name, f in self.features.items() if f.get("dtype") == "video")
        self.episodes = self._episodes_v3() if self.version == "v3.0" else self._episodes_v2()
        self.stats = self._stats()
        self._reader = VideoReader()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": VideoReader()}

    def columns(self, episode: Episode) -> dict[str, np.ndarray]:
        """Returns the episode's rows: each column but videos, (length, …).

        Raises:
            ValueError: fewer rows than the episode has frames; the message names the file.
        """
        names = [name for name in (*self.features, *DEFAULT_COLUMNS) if name not in self.video_keys]
        table = _read_table(episode.data, tuple(dict.fromkeys(names)))
        rows = table.slice(episode.first, episode.length)
        if len(rows) != episode.length:
            end = episode.first + episode.length
            raise ValueError(f"{episode.data} has {len(table)} rows; episode {episode.index} ends at {end}")
        return {name: np.array(rows[name].to_pylist()) for name in rows.column_names}

    def frames(self, episode: Episode, key: str, times: np.ndarray) -> np.ndarray:
        """Frames of a camera at seconds since the episode's start, ascending: uint8 (count, height, width, 3).

        Raises:
            ValueError: no such frames, or frames of another size than declared; the message names the file.
        """
        path, begin = episode.videos[key]
        images = self._reader.frames(path, times + begin, 0.5 / self.fps + 1e-4)
        shape = tuple(self.features[key]["shape"])
        # earlier writers declare channels first
        if images.shape[1:] != shape and (*images.shape[3:], *images.shape[1:3]) != shape:
            raise ValueError(f"{path} has frames of {images.shape[1:]}, and info.json declares {shape} for {key!r}")
        return images

    # -- metadata

    def _json(self, name: str) -> dict[str, Any]:
        path = self.root / name
        try:
            content = parsed_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.root} is no LeRobot dataset: {path}: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds {shown(content)}, not an object")
        return content

    def _lines(self, name: str) -> list[dict[str, Any]]:
        path = self.root / name
        try:
            return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.root} is no LeRobot dataset of version {self.version}: {path}: {error}") from error

    def _episodes_v3(self) -> list[Episode]:
        files = sorted((self.root / "meta/episodes").glob("*/*.parquet"))
        rows = [row for path in files for row in _read_table(path, None).to_pylist()]
        rows = sorted(rows, key=lambda row: row["episode_index"])[: self.info.get("total_episodes", len(rows))]
        first_in_file: dict[Path, int] = {}
        episodes = []
        for row in rows:
            data = self._path("data_path", chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
            first = first_in_file.setdefault(data, row["dataset_from_index"])
            videos = {}
            for key in self.video_keys:
                where = {name: row[f"videos/{key}/{name}"] for name in ("chunk_index", "file_index")}
                videos[key] = self._path("video_path", video_key=key, **where), row[f"videos/{key}/from_timestamp"]
            tasks = tuple(row.get("tasks") or ())
            episodes.append(
                Episode(row["episode_index"], row["length"], data, row["dataset_from_index"] - first, videos, tasks)
            )
        return episodes

    def _episodes_v2(self) -> list[Episode]:
        size = self.info.get("chunks_size", 1000)
        episodes = []
        for row in sorted(self._lines("meta/episodes.jsonl"), key=lambda row: row["episode_index"]):
            index = row["episode_index"]
            where = {"episode_chunk": index // size, "episode_index": index}
            videos = {key: (self._path("video_path", video_key=key, **where), 0.0) for key in self.video_keys}
            tasks = tuple(row.get("tasks") or ())
            episodes.append(Episode(index, row["length"], self._path("data_path", **where), 0, videos, tasks))
        return episodes

    def _path(self, name: str, **where: Any) -> Path:
        return self.root / self.info[name].format(**where)

    def _stats(self) -> dict[str, dict[str, np.ndarray]]:
        if (self.root / "meta/stats.json").exists():
            stats = self._json("meta/stats.json")
        elif (self.root / "meta/episodes_stats.jsonl").exists():
            stats = _merged([row["stats"] for row in self._lines("meta/episodes_stats.jsonl")])
        else:
            stats = {}
        statistics = ("mean", "std", "min", "max")
        return {
            key: {name: np.asarray(values[name], dtype=np.float64) for name in statistics if name in values}
            for key, values in stats.items()
        }


def _merged(stats: list[dict[str, Any]]) -> dict[str, Any]:
    """Statistics of all episodes from those of each, weighted by their counts."""
    merged: dict[str, Any] = {}
    for key in stats[0] if stats else ():
        parts = [one[key] for one in stats if key in one]
        count = np.array([np.ravel(part["count"])[0] for part in parts], dtype=np.float64)
        mean, std = (np.array([part[name] for part in parts], dtype=np.float64) for name in ("mean", "std"))
        weight = (count / count.sum()).reshape(-1, *[1] * (mean.ndim - 1))
        total = (weight * mean).sum(0)
        merged[key] = {
            "mean": total,
            "std": np.sqrt((weight * (std**2 + (mean - total) ** 2)).sum(0)),
            "min": np.min([part["min"] for part in parts], axis=0),
            "max": np.max([part["max"] for part in parts], axis=0),
        }
    return merged


@lru_cache(maxsize=16)
def _read_table(path: Path, columns: tuple[str, ...] | None) -> Any:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        names = parquet.read_schema(path).names
        return parquet.read_table(path, columns=None if columns is None else [c for c in columns if c in names])
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} is no table of a LeRobot dataset: {error}") from error
