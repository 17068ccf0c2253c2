"""What `examples.train_bridge_v2` trains on: the canvas of a LeRobot dataset, batches of its clips, and these as a
model takes them: a VAE's latents in place of a camera's pixels, tasks as bytes or as a T5 encoder's embeddings.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

if not __package__:  # run as a file, whose folder has no package `examples`
    sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("", "kernels")]

from canvas_engineering import CanvasLayout, CanvasTopology, Connection, RegionSpec
from canvas_engineering.data import LeRobotCanvasDataset, LeRobotFolder
from examples.canvas_cogvideox import FrameVAE

PAD = 256  # behind the last byte


def canvas_of(
    source: LeRobotFolder, observed: int, future: int, cell: int, width: int, tokens: int = 0, diffusive: bool = False
) -> tuple[CanvasLayout, CanvasTopology, dict[str, str]]:
    """Returns a canvas of the dataset's first camera, its state and its action: (layout, topology, feature to region).

    Args:
        source: the dataset.
        observed, future: frames that are known, and that are predicted.
        cell: pixels of a camera's cell, each way.
        width: channels of a position.
        tokens: of the text, at least; 0 for none.
        diffusive: whether the camera is predicted by flow matching.
    """
    T = observed + future
    features, regions, rows, columns = {}, {}, 0, 1
    if source.video_keys:
        camera = source.video_keys[0]
        features[camera] = "camera"
        rows, columns = (size // cell for size in source.features[camera]["shape"][:2])
        regions["camera"] = RegionSpec(
            (0, T, 0, rows, 0, columns), carrier="diffusive" if diffusive else "deterministic"
        )
    for feature, region, weight in (("observation.state", "state", 1.0), ("action", "action", 4.0)):
        if feature in source.features:
            features[feature] = region
            regions[region] = RegionSpec((0, T, rows, rows + 1, 0, 1), loss_weight=weight)
            rows += 1
    if tokens:
        lines = -(-tokens // columns)
        regions["task"] = RegionSpec((0, 1, rows, rows + lines, 0, columns), is_output=False)
        rows += lines
    layout = CanvasLayout(T=T, d_model=width, spatial_shape=(rows, columns), regions=regions, t_current=observed)
    others = [name for name in regions if name != "camera"]
    connections = [Connection(a, b) for a in others for b in others]
    if "camera" in regions:
        # frames attend to themselves and those before; what is short attends to all of the video, and the reverse
        connections += [Connection("camera", "camera", t_src=0, t_dst=-k) for k in range(observed)]
        connections += [pair for name in others for pair in (Connection(name, "camera"), Connection("camera", name))]
    return layout, CanvasTopology(connections), features


def batches(
    count: int, size: int, first: int, last: int, seed: int, rank: int = 0, ranks: int = 1
) -> Iterator[list[int]]:
    """Indices of this rank's part of the batches ``first`` to ``last``: those of an endless run of shuffled epochs."""
    per_epoch = max(1, count // size)
    for step in range(first, last):
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(count)
        yield order[place * size : (place + 1) * size][rank::ranks].tolist()


def byte_text(count: int) -> Callable[[str], Tensor]:
    """Returns what encodes a text as its first ``count`` bytes, int64 (count,)."""

    def encode(text: str) -> Tensor:
        data = list(text.encode()[:count])
        return torch.tensor(data + [PAD] * (count - len(data)))

    return encode


def t5_text(name: str, count: int) -> Callable[[str], Tensor]:
    """Returns what encodes a text by the T5 encoder of a folder or a Hub id, float32 (count, size); each text once."""
    from transformers import AutoTokenizer, T5EncoderModel

    tokenizer, encoder = AutoTokenizer.from_pretrained(name), T5EncoderModel.from_pretrained(name).eval()
    known: dict[str, Tensor] = {}

    @torch.no_grad()
    def encode(text: str) -> Tensor:
        if text not in known:
            given = tokenizer(text, padding="max_length", truncation=True, max_length=count, return_tensors="pt")
            known[text] = encoder(**given).last_hidden_state[0].float()
        return known[text]

    return encode


class Clips:
    """A dataset's clips as the model takes them, and the model's values as the dataset has them.

    Args:
        dataset: of the clips; under a VAE its camera is not normalised.
        device: of the clips.
        vae: for the camera, or None for pixels.
        text: what encodes a task, or None.
    """

    def __init__(
        self,
        dataset: LeRobotCanvasDataset,
        device: torch.device,
        vae: FrameVAE | None = None,
        text: Callable[[str], Tensor] | None = None,
    ):
        self.dataset, self.device, self.vae, self.text = dataset, device, vae, text

    def of(self, batch: Mapping) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Returns (values, masks) of a batch of samples, by region."""
        values = {name: batch[name].to(self.device) for name in self.dataset.regions}
        if self.vae is not None and "camera" in values:
            values["camera"] = self.vae.encode(values["camera"])
        return values | self.task(batch["task"]), {name: m.to(self.device) for name, m in batch["mask"].items()}

    def task(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Returns the text of a batch by its region; nothing where there is none."""
        return {} if self.text is None else {"task": torch.stack([self.text(each) for each in texts]).to(self.device)}

    def encode(self, name: str, values: Tensor) -> Tensor:
        """(B, frames, …) of the dataset → as the model has them."""
        values = self.dataset.normalize(name, values).to(self.device)
        return self.vae.encode(values) if self.vae is not None and name == "camera" else values

    def decode(self, name: str, values: Tensor) -> Tensor:
        """(B, frames, …) of the model → as the dataset has them, cameras in [0, 1]."""
        if self.vae is not None and name == "camera":
            return self.vae.decode(values)
        return self.dataset.denormalize(name, values)
