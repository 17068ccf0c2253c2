"""Robot data in LeRobot's format: recorded, and loaded as clips of a canvas (extra ``data``)."""

from canvas_engineering.data.dataset import LeRobotCanvasDataset
from canvas_engineering.data.folder import LeRobotFolder
from canvas_engineering.data.recorder import LeRobotRecorder

__all__ = ["LeRobotCanvasDataset", "LeRobotFolder", "LeRobotRecorder"]
