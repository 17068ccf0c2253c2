"""Two economies in one world, three levels deep: ``python examples/world_model.py``.

What the one country's output says about the other's prices must climb to the country's summary, cross the regime that
both attend to, and descend again: six connections in a row, where a dense canvas needs one. `hops` counts them from the
topology; a model needs as many blocks. The example predicts politics and the regime from both countries' macro-economic
figures.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

if not __package__:  # run as a file, whose folder has no package `examples`
    sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("", "kernels")]

from canvas_engineering import BoundSchema, CanvasTopology, Field, compile_schema
from examples.typed_canvas import run


@dataclass
class MacroEconomy:
    __coarse__ = Field(2, 4)
    gdp: Field = Field(1, 2)
    inflation: Field = Field(1, 2)
    employment: Field = Field(1, 4)


@dataclass
class Country:
    __coarse__ = Field(4, 4)
    macro: MacroEconomy = field(default_factory=MacroEconomy)
    politics: Field = Field(2, 8)
    demographics: Field = Field(1, 4)


@dataclass
class World:
    us: Country = field(default_factory=Country)
    cn: Country = field(default_factory=Country)
    regime: Field = Field(4, 4)


OBSERVED = [f"{country}.macro.{name}" for country in ("us", "cn") for name in ("gdp", "inflation", "employment")]
ACROSS = ("cn.macro.inflation", "us.macro.gdp")
WANTED = ["us.politics", "cn.politics", "regime"]


def declare() -> BoundSchema:
    """The world, on a canvas of one frame."""
    return compile_schema(World(), d_model=32)


def hops(topology: CanvasTopology, query: str, key: str) -> int:
    """Returns how many connections in a row bring ``key`` to ``query``: the least number of blocks."""
    reached, count = {query}, 0
    while key not in reached:
        further = reached | {c.dst for c in topology.connections if c.src in reached}
        if further == reached:
            raise ValueError(f"{query!r} never learns of {key!r}")
        reached, count = further, count + 1
    return count


def main(argv: list[str] | None = None) -> int:
    bound = declare()
    print(f"Chinese inflation learns of the US GDP after {hops(bound.topology, *ACROSS)} connections")
    blocks = max(min(hops(bound.topology, wanted, observed) for observed in OBSERVED) for wanted in WANTED)
    return run(argv, "world_model", __doc__, bound, OBSERVED, WANTED, n_blocks=blocks)


if __name__ == "__main__":
    sys.exit(main())
