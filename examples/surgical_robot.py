"""A surgical robot, declared as nested types: ``python examples/surgical_robot.py``.

Its sensor and its two arms are types of their own. The parent attends to each through one coarse field: 2 x 4 for the
sensor because its class says so, 2 x 4 for the left arm because this robot says so, a scalar for the right arm. The
arms do not attend to each other's joints, only to what passes through ``safety``. Grippers and safety are predicted
from all else.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

if not __package__:  # run as a file, whose folder has no package `examples`
    sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("", "kernels")]

from canvas_engineering import BoundSchema, Field, compile_schema
from examples.typed_canvas import run


@dataclass
class Sensor:
    __coarse__ = Field(2, 4)
    rgb: Field = Field(6, 6)
    depth: Field = Field(3, 3, period=2)
    lidar: Field = Field(2, 4)


@dataclass
class Arm:
    joints: Field = Field(1, 7)
    force_torque: Field = Field(1, 6)
    gripper: Field = Field(1, 2, loss_weight=2.0)


@dataclass
class SurgicalRobot:
    sensor: Sensor = field(default_factory=Sensor)
    left_arm: Arm = field(default_factory=Arm, metadata={"coarse": Field(2, 4)})
    right_arm: Arm = field(default_factory=Arm)
    safety: Field = Field(2, 4, loss_weight=5.0)


OBSERVED = [
    *("sensor.rgb", "sensor.depth", "sensor.lidar"),
    *(f"{arm}.{name}" for arm in ("left_arm", "right_arm") for name in ("joints", "force_torque")),
]
WANTED = ["left_arm.gripper", "right_arm.gripper", "safety"]


def declare() -> BoundSchema:
    """The robot on a canvas of two frames."""
    return compile_schema(SurgicalRobot(), T=2, d_model=32)


def main(argv: list[str] | None = None) -> int:
    return run(argv, "surgical_robot", __doc__, declare(), OBSERVED, WANTED, n_blocks=3)


if __name__ == "__main__":
    sys.exit(main())
