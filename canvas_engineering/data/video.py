"""Videos as frames at given times, and frames as videos (PyAV)."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from canvas_engineering.files import replacing

# Encoders by the names that LeRobot's files carry. Every other frame is a key frame, as there: clips start anywhere.
ENCODERS = {"h264": ("libx264", {"g": "2", "crf": "23"}), "av1": ("libsvtav1", {"g": "2", "crf": "30", "preset": "8"})}
# Seconds between wanted frames from which seeking beats decoding what lies between them.
FAR = 1.0
MAX_OPEN = 64


class VideoReader:
    """Decodes frames at times. Open files are kept, a few in each process: it may be handed to workers."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, Any] = OrderedDict()
        self._process = os.getpid()
        self._reformatter: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()

    def frames(self, path: Path, times: Sequence[float] | np.ndarray, tolerance: float) -> np.ndarray:
        """Decodes the frames nearest to ``times``.

        Args:
            path: a video file.
            times: seconds from its start, ascending.
            tolerance: seconds that a frame may lie away.

        Returns:
            uint8 (len(times), height, width, 3), RGB.

        Raises:
            ValueError: no video, one that is cut short, or one without a frame near one of the times; the message names
                the file, the time and the gap.
        """
        from av.error import FFmpegError

        try:
            container = self._container(path)
            return self._decoded(container, path, np.asarray(times, dtype=np.float64), tolerance)
        except FFmpegError as error:
            self._open.pop(path, None)
            raise ValueError(f"{path} is no whole video: {error}") from error

    def _container(self, path: Path) -> Any:
        import av

        if self._process != os.getpid():  # a forked worker must not share file positions
            self.__init__()
        if path not in self._open:
            self._open[path] = av.open(str(path))
            if not self._open[path].streams.video:
                raise ValueError(f"{self._open.pop(path).name} holds no video")
            # workers decode side by side; threads for a clip's few frames cost more than they save
            self._open[path].streams.video[0].codec_context.thread_count = 1
            while len(self._open) > MAX_OPEN:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(path)
        return self._open[path]

    def _decoded(self, container: Any, path: Path, times: np.ndarray, tolerance: float) -> np.ndarray:
        stream = container.streams.video[0]
        start = float((stream.start_time or 0) * stream.time_base)
        images: list[np.ndarray] = [np.empty(0)] * len(times)
        gaps = np.full(len(times), np.inf)
        first = 0
        while first < len(times):
            # one pass for times that lie close together
            stop = first + 1
            while stop < len(times) and times[stop] - times[stop - 1] <= FAR:
                stop += 1
            self._pass(container, stream, start, times[first:stop], images, gaps, first)
            first = stop
        worst = int(gaps.argmax())
        if not gaps[worst] <= tolerance:
            away = "none" if np.isinf(gaps[worst]) else f"the nearest is {gaps[worst]:.4f} s away"
            raise ValueError(f"{path} has no frame at {times[worst]:.4f} s: {away}, {tolerance:.4f} s are allowed")
        return np.stack(images)

    def _rgb(self, frame: Any) -> np.ndarray:
        """uint8 (height, width, 3). One converter for all frames: one for each takes fifty times as long."""
        from av.video.reformatter import VideoReformatter

        self._reformatter = self._reformatter or VideoReformatter()
        try:  # a forked worker would wait for ever for the threads of a converter that has some
            converted = self._reformatter.reformat(frame, format="rgb24", threads=1)
        except TypeError:  # older releases of PyAV have none
            converted = self._reformatter.reformat(frame, format="rgb24")
        return converted.to_ndarray()

    def _pass(self, container, stream, start, times, images, gaps, first) -> None:
        """Decodes from the key frame before ``times`` to the frame behind the last, and keeps the nearest ones."""
        container.seek(int((times[0] + start) / stream.time_base), backward=True, stream=stream)
        for frame in container.decode(stream):
            at = float(frame.pts * stream.time_base) - start
            distance = np.abs(times - at)
            nearer = (distance < gaps[first : first + len(times)]).nonzero()[0]
            if len(nearer):
                image = self._rgb(frame)
                for place in nearer.tolist():
                    images[first + place], gaps[first + place] = image, distance[place]
            if at >= times[-1]:
                break


def write_video(path: Path, frames: np.ndarray, fps: int, codec: str) -> None:
    """Writes uint8 (count, height, width, 3) as an mp4 file, whole or not at all.

    Raises:
        ValueError: an unknown codec, or odd sizes, which the encoders' colour format does not have.
    """
    import av

    if codec not in ENCODERS:
        raise ValueError(f"codec must be one of {', '.join(ENCODERS)}, got {codec!r}")
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"videos need an even number of rows and columns, got {height} × {width}")
    encoder, options = ENCODERS[codec]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file, av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(encoder, rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = Fraction(1, fps)
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
