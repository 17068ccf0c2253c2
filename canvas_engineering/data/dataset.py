"""LeRobotCanvasDataset: clips of a LeRobot dataset as what the regions of a canvas hold."""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from canvas_engineering.canvas.layout import CanvasLayout
from canvas_engineering.checked import checked_choice, checked_int, checked_number, shown
from canvas_engineering.data.folder import DEFAULT_COLUMNS, Episode, LeRobotFolder

NORMALIZE = ("mean_std", "min_max", "none")
# Episodes whose rows one process keeps.
MAX_EPISODES = 64


class LeRobotCanvasDataset(Dataset):
    """Clips around every frame of a LeRobot dataset (v3.0 and v2.1), one sample for each region's frames.

    Frame f of a region with period p lies at real step f · p of the canvas, that is (f · p − anchor) / fps seconds from
    the sample's own frame; the region takes the dataset's nearest sample to it. Times outside of the episode repeat its
    first or last sample, are False in the mask, and have no loss.

    A sample is a dict: each region's values, float32 (frames, …), cameras (frames, 3, height, width) in [0, 1] before
    normalisation; "mask", region to bool (frames,); "loss_weights", float32 (N,), those of the layout where samples
    are; "episode_index", "frame_index" and "task".

    Args:
        path_or_repo_id: a dataset's folder, or the id of a dataset on the Hugging Face Hub, which is downloaded.
        layout: a CanvasLayout, or what has one (a CanvasSchema, a BoundSchema).
        features: feature of the dataset to region. By default a region takes the feature of its name, or the one whose
            last part is its name, as "front" takes "observation.images.front".
        fps: canvas frames per second of real time; None for the dataset's.
        anchor: real step of the canvas that is the sample's own frame: the last observed one; None is the step before
            ``layout.t_current``, or step 0 of a canvas without observed frames.
        normalize: "mean_std", "min_max" (to −1 … 1) or "none", by the dataset's statistics; one for all, or feature to
            one.
        episodes: numbers of the episodes to use; None for all.

    Attributes:
        regions: region to feature.
        delta_timestamps: feature to seconds from a sample's own frame, as LeRobotDataset takes them.

    Raises:
        KeyError: a feature or a region that is not there.
        ValueError: no dataset, an option that does not fit, or statistics that are missing.
        ImportError: pyarrow, PyAV, or huggingface_hub for an id, is not installed (extra ``data``).
    """

    def __init__(
        self,
        path_or_repo_id: str | Path,
        layout: Any,
        features: Mapping[str, str] | None = None,
        *,
        fps: float | None = None,
        anchor: int | None = None,
        normalize: str | Mapping[str, str] = "mean_std",
        episodes: Iterable[int] | None = None,
    ) -> None:
        self.layout = _layout_of(layout)
        self.source = LeRobotFolder(_local(path_or_repo_id))
        self.regions = _regions(self.source, self.layout, features)
        self.fps = self.source.fps if fps is None else checked_number(fps, "fps")
        if self.fps <= 0:
            raise ValueError(f"fps must be above 0, got {fps!r}")
        self.anchor = max(self.layout.t_current - 1, 0) if anchor is None else checked_int(anchor, "anchor")
        self._scales = {feature: self._scale(feature, normalize) for feature in self.regions.values()}
        self._offsets = {region: self._offsets_of(region) for region in self.regions}
        self.delta_timestamps = {self.regions[region]: offsets.tolist() for region, offsets in self._offsets.items()}
        self._episodes = self._chosen(episodes)
        self._ends = np.cumsum([episode.length for episode in self._episodes]).tolist()
        self._rows: OrderedDict[int, dict[str, np.ndarray]] = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": OrderedDict()}

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the sample around the ``index``-th frame.

        Raises:
            IndexError: no such frame.
            ValueError: a gap in the data, or a file that is cut short; the message names the file.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index %= len(self)
        place = bisect.bisect_right(self._ends, index)
        episode = self._episodes[place]
        frame = index - (self._ends[place - 1] if place else 0)
        rows = self._columns(episode)
        sample: dict[str, Any] = {"mask": {}}
        for region, feature in self.regions.items():
            chosen, inside = self._nearest(episode, rows["timestamp"], frame, self._offsets[region], region)
            sample[region] = self._values(episode, rows, feature, chosen)
            sample["mask"][region] = torch.from_numpy(inside)
        sample["loss_weights"] = self._loss_weights(sample["mask"])
        sample["episode_index"], sample["frame_index"] = episode.index, frame
        sample["task"] = episode.tasks[0] if episode.tasks else ""
        return sample

    def normalize(self, region: str, values: torch.Tensor) -> torch.Tensor:
        """Values of a region, (…, *shape), as samples have them."""
        shift, scale = (torch.from_numpy(part).to(values) for part in self._scales[self.regions[region]])
        return (values - shift) / scale

    def denormalize(self, region: str, values: torch.Tensor) -> torch.Tensor:
        """Values of a region as the dataset has them: the inverse of the normalisation, (…, *shape)."""
        shift, scale = (torch.from_numpy(part).to(values) for part in self._scales[self.regions[region]])
        return values * scale + shift

    # -- where samples lie

    def _offsets_of(self, region: str) -> np.ndarray:
        """Seconds from the sample's own frame to each of the region's frames."""
        spec = self.layout.region_spec(region)
        return (np.arange(*spec.bounds[:2]) * spec.period - self.anchor) / self.fps

    def _nearest(
        self, episode: Episode, times: np.ndarray, frame: int, offsets: np.ndarray, region: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the episode nearest to the wanted times, int64, and whether these lie inside of it, bool."""
        wanted = times[frame] + offsets
        after = np.searchsorted(times, wanted).clip(1, max(len(times) - 1, 1))
        if len(times) == 1:
            chosen = np.zeros(len(wanted), np.int64)
        else:
            chosen = np.where(wanted - times[after - 1] <= times[after] - wanted, after - 1, after)
        half = 0.5 / self.source.fps + 1e-4  # timestamps are float32
        inside = (wanted >= times[0] - half) & (wanted <= times[-1] + half)
        gap = np.abs(times[chosen] - wanted)
        if (gap[inside] > half).any():
            worst = int(np.where(inside, gap, 0).argmax())
            raise ValueError(
                f"{episode.data}: region {region!r} wants a sample at {wanted[worst]:.4f} s of episode "
                f"{episode.index}; the nearest is {gap[worst]:.4f} s away, {half:.4f} s are allowed"
            )
        return chosen, inside

    def _values(self, episode: Episode, rows: dict[str, np.ndarray], feature: str, chosen: np.ndarray) -> torch.Tensor:
        if feature in self.source.video_keys:
            unique, back = np.unique(chosen, return_inverse=True)
            images = self.source.frames(episode, feature, rows["timestamp"][unique] - rows["timestamp"][0])
            values = images[back].transpose(0, 3, 1, 2).astype(np.float32) / 255.0
        else:
            # single numbers are stored without their dimension
            shape = self.source.features[feature]["shape"]
            values = rows[feature][chosen].astype(np.float32).reshape(len(chosen), *shape)
        shift, scale = self._scales[feature]
        return torch.from_numpy(((values - shift) / scale).astype(np.float32))

    def _columns(self, episode: Episode) -> dict[str, np.ndarray]:
        if episode.index not in self._rows:
            self._rows[episode.index] = self.source.columns(episode)
            while len(self._rows) > MAX_EPISODES:
                self._rows.popitem(last=False)
        self._rows.move_to_end(episode.index)
        return self._rows[episode.index]

    def _loss_weights(self, masks: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns `CanvasLayout.loss_weight_mask` without frames that have no sample."""
        layout, weights = self.layout, np.zeros(self.layout.num_positions, dtype=np.float32)
        for region in layout.regions:
            spec = layout.region_spec(region)
            if spec.is_output:
                positions = layout.region_index(region).numpy()
                frames = masks[region].numpy() if region in masks else np.ones(spec.bounds[1] - spec.bounds[0], bool)
                # a region's positions come frame by frame
                weights[positions] += spec.loss_weight * np.repeat(frames, len(positions) // len(frames))
        return torch.from_numpy(weights)

    # -- declaration

    def _chosen(self, episodes: Iterable[int] | None) -> list[Episode]:
        if episodes is None:
            return list(self.source.episodes)
        by_index = {episode.index: episode for episode in self.source.episodes}
        wanted = [checked_int(index, "an episode") for index in episodes]
        missing = [index for index in wanted if index not in by_index]
        if missing:
            raise ValueError(f"{self.source.root} has no episodes {missing}; it has {len(by_index)}")
        return [by_index[index] for index in wanted]

    def _scale(self, feature: str, normalize: str | Mapping[str, str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns (shift, scale), float32: values are normalised as (value − shift) / scale."""
        how = normalize.get(feature, "mean_std") if isinstance(normalize, Mapping) else normalize
        checked_choice(how, f"normalize of {feature!r}", NORMALIZE)
        if how == "none":
            return np.zeros(1, np.float32), np.ones(1, np.float32)
        stats = self.source.stats.get(feature, {})
        names = ("mean", "std") if how == "mean_std" else ("min", "max")
        if any(name not in stats for name in names):
            raise ValueError(
                f"{self.source.root} has no {' and '.join(names)} of {feature!r}: normalize={{{feature!r}: 'none'}}"
            )
        first, second = (stats[name] for name in names)
        shift, scale = (first, second) if how == "mean_std" else ((first + second) / 2, (second - first) / 2)
        # what never varies is shifted only
        return shift.astype(np.float32), np.where(scale > 1e-8, scale, 1.0).astype(np.float32)


def _layout_of(layout: Any) -> CanvasLayout:
    canvas_layout = layout if isinstance(layout, CanvasLayout) else getattr(layout, "layout", None)
    if not isinstance(canvas_layout, CanvasLayout):
        raise ValueError(f"layout must be a CanvasLayout, or a schema that has one, got {shown(layout)}")
    return canvas_layout


def _local(path_or_repo_id: str | Path) -> Path:
    """Returns the folder, downloaded where it is the id of a dataset on the Hub."""
    path = Path(path_or_repo_id)
    if path.exists() or isinstance(path_or_repo_id, Path) or str(path_or_repo_id).count("/") != 1:
        return path
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(path_or_repo_id), repo_type="dataset"))


def _regions(source: LeRobotFolder, layout: CanvasLayout, features: Mapping[str, str] | None) -> dict[str, str]:
    """Returns a dict from region to feature; KeyError where either is not there."""
    known = [name for name in source.features if name not in DEFAULT_COLUMNS]
    if features is None:
        named = {region: [f for f in known if region in (f, f.rpartition(".")[2])] for region in layout.regions}
        several = {region: names for region, names in named.items() if len(names) > 1}
        if several:
            raise ValueError(f"features= must say which of these a region takes: {several}")
        regions = {region: names[0] for region, names in named.items() if names}
    else:
        regions = {region: feature for feature, region in features.items()}
        if len(regions) < len(features):
            raise ValueError(f"features= gives one region several features: {dict(features)}")
    missing = [feature for feature in regions.values() if feature not in known]
    if missing:
        raise KeyError(f"{source.root} has no features {missing}; it has {', '.join(known)}")
    unknown = [region for region in regions if region not in layout.regions]
    if unknown or not regions:
        raise KeyError(
            f"no regions {unknown} in the layout, which has {', '.join(layout.regions)}"
            if unknown
            else f"no region is named as a feature: regions {', '.join(layout.regions)}; features {', '.join(known)}"
        )
    return regions
