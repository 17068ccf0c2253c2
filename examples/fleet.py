"""A fleet of vehicles and their dispatcher: ``python examples/fleet.py``.

Dispatch and each vehicle's 4 x 4 summary attend to each other; no vehicle attends to another's camera. Connections grow
with the number of vehicles, not with its square: 27 for each, 1,351 for fifty. Plans and actions are predicted from the
vehicles' cameras and from what dispatch holds.
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
class Vehicle:
    __coarse__ = Field(4, 4)
    camera: Field = Field(8, 8)
    lidar: Field = Field(4, 8)
    plan: Field = Field(2, 4)
    action: Field = Field(1, 4, loss_weight=2.0)


@dataclass
class Fleet:
    dispatch: Field = Field(4, 4)
    vehicles: list = field(default_factory=list)


def declare(n_vehicles: int, T: int = 1, d_model: int = 32) -> BoundSchema:
    """A fleet of ``n_vehicles`` on a canvas of T frames."""
    return compile_schema(Fleet(vehicles=[Vehicle() for _ in range(n_vehicles)]), T=T, d_model=d_model)


def main(argv: list[str] | None = None) -> int:
    vehicles = [f"vehicles[{i}]" for i in range(4)]
    observed = ["dispatch", *(f"{vehicle}.{name}" for vehicle in vehicles for name in ("camera", "lidar"))]
    wanted = [f"{vehicle}.{name}" for vehicle in vehicles for name in ("plan", "action")]
    return run(argv, "fleet", __doc__, declare(len(vehicles)), observed, wanted, n_blocks=2)


if __name__ == "__main__":
    sys.exit(main())
