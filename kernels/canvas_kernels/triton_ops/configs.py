"""Tile sizes, as data: per architecture, padded head dimension, element size and pass. Imports no triton.

The comments give registers on Triton 3.6.0 in bfloat16, and in brackets the programs that fit a multiprocessor. The
rule behind the choices: 4 warps take 64 rows and 8 take 128, each warp 16, or everything is computed twice.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch

from .tiling import TileClass

if TYPE_CHECKING:
    from ..block_table import BlockTable

MAX_HEAD_DIM = 256
HEAD_DIMS = (16, 32, 64, 128, 256)
"""What head dimensions are padded to."""
SMALL_TILE_COST = 0.2


MIN_STORED_KEYS, MAX_STORED_SLOTS = 128, 4


def stores_segments(table: BlockTable) -> bool:
    """Whether the outputs of segments are kept apart, in edge form, until a second kernel adds them up.

    Then backward needs no other walk for δ, and segments share nothing: 4 · head_dim operations a pair are saved. It
    costs 6 · head_dim bytes for every (segment, row), to write them and to read them twice: at 400 TFLOP/s and 4.8 TB/s
    as much as 125 keys. So it wants 128 keys a slot at least, and for memory's sake at most 4 slots a row. Otherwise
    they are added up in place.
    """
    small = table.n_slots <= MAX_STORED_SLOTS * table.n_positions
    return table.form == "edge" and small and table.pairs >= MIN_STORED_KEYS * max(table.n_slots, 1)


def form_of(table: BlockTable, sigmoid: bool = False) -> str:
    """The form that passes are configured for: "joint", "edge", "in_place" (edge, no segments kept) or "sigmoid"."""
    if sigmoid or table.form == "joint":
        return "sigmoid" if sigmoid else "joint"
    return "edge" if stores_segments(table) else "in_place"


class Config(NamedTuple):
    """One tile size of one pass, ``block_m`` rows of the tile × ``block_n`` walked rows, and how to compile it."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    @property
    def cost(self) -> float:
        """Time of a block relative to one of 64 × 64: its area; 16 × 16 waits for memory 3.2 times that long."""
        area = self.block_m * self.block_n
        return SMALL_TILE_COST if area == 256 else area / 4096


class Launch(NamedTuple):
    """A kernel that can be launched: what ``make aot`` compiles and ``make gpu`` checks."""

    arch: str
    stage: str
    form: str
    signed: bool
    head_dim: int
    dtype: torch.dtype
    config: Config


# "in_place" is the edge form whose segments are added up where they are computed, "edge" that which keeps them.
_PASSES = (
    ("forward", "joint"),
    ("forward", "edge"),
    ("forward", "in_place"),
    ("forward", "sigmoid"),
    ("delta", "in_place"),
    ("dq", "joint"),
    ("dq", "edge"),
    ("dq", "in_place"),
    ("dq", "sigmoid"),
    ("dkv", "joint"),
    ("dkv", "edge"),
    ("dkv", "sigmoid"),
)
# "signed": of the sigmoid's dq, that gains are trained.
_SIGNS = {("dq", "sigmoid"): (False, True)}


# Keys are the largest padded head dimension that a row serves. A pass that has no row takes the edge form's, and that
# the joint form's.
_SIXTEEN_BIT = {
    "sm_90": {
        ("forward", "joint"): {
            32: Config(64, 64, 4, 3),  # 104
            64: Config(128, 128, 8, 2),  # 199 (1)
            128: Config(128, 128, 8, 3),  # 255 (1); 128 × 64 takes 207 and a tenth longer
            256: Config(128, 32, 8, 2),  # 254 (1)
        },
        ("forward", "edge"): {
            32: Config(64, 64, 4, 3),
            64: Config(128, 128, 8, 2),  # 206 (1)
            128: Config(128, 128, 8, 2),  # 232 (1)
            256: Config(128, 32, 8, 2),
        },
        ("forward", "in_place"): {
            64: Config(64, 64, 4, 3),  # 186 (2)
            128: Config(128, 64, 8, 2),  # 236 (1)
            256: Config(32, 32, 8, 2),  # 179
        },
        ("forward", "sigmoid"): {
            64: Config(64, 64, 4, 3),
            128: Config(128, 64, 8, 2),
            256: Config(32, 32, 8, 2),
        },
        ("delta", "in_place"): {
            64: Config(64, 64, 4, 2),  # 158 (3)
            128: Config(128, 64, 8, 2),  # 168 (1)
            256: Config(64, 32, 8, 2),  # 128 (1)
        },
        ("dq", "joint"): {
            32: Config(64, 64, 4, 3),  # 118
            64: Config(64, 64, 4, 2),  # 154 (3), in edge form 170 (2)
            128: Config(128, 64, 8, 2),  # 201 (1), in edge form 241
            256: Config(32, 32, 8, 2, 168),  # unbounded, ptxas aims at 128 and spills
        },
        ("dq", "sigmoid"): {
            64: Config(64, 64, 4, 2),
            128: Config(128, 64, 8, 2),
            256: Config(32, 32, 8, 2, 168),
        },
        ("dkv", "joint"): {
            32: Config(64, 64, 4, 3),  # 170 (2); bounded by 168, the edge form spills in its loops
            64: Config(64, 64, 4, 2),  # 218 (2), in edge form 255
            128: Config(128, 32, 8, 2),  # 255 (1)
            256: Config(32, 32, 8, 2),  # 255
        },
    },
    # Two stages keep every pass under the 99 KB of shared memory of sm_86, sm_89 and sm_120, which run these too.
    "sm_80": {
        ("forward", "joint"): {64: Config(64, 64, 4, 2), 128: Config(64, 64, 8, 2), 256: Config(32, 32, 8, 2, 168)},
        ("delta", "in_place"): {64: Config(64, 64, 4, 2), 128: Config(64, 64, 8, 2), 256: Config(32, 32, 8, 2, 168)},
        ("dq", "joint"): {64: Config(64, 64, 4, 2), 128: Config(64, 64, 8, 2), 256: Config(32, 32, 8, 2, 168)},
        ("dkv", "joint"): {64: Config(64, 32, 4, 2), 128: Config(64, 64, 8, 2), 256: Config(32, 32, 8, 2, 168)},
    },
    "sm_100": {
        ("forward", "joint"): {64: Config(64, 64, 4, 2), 128: Config(128, 64, 8, 2), 256: Config(64, 32, 8, 2)},
        ("forward", "in_place"): {64: Config(64, 64, 4, 2), 128: Config(64, 64, 8, 2), 256: Config(64, 32, 8, 2)},
        ("forward", "sigmoid"): {64: Config(64, 64, 4, 2), 128: Config(64, 64, 8, 2), 256: Config(64, 32, 8, 2)},
        ("delta", "in_place"): {64: Config(64, 64, 4, 2), 128: Config(64, 64, 8, 2), 256: Config(64, 32, 8, 2)},
        ("dq", "joint"): {64: Config(64, 64, 4, 2), 128: Config(64, 64, 8, 2), 256: Config(64, 32, 8, 2)},
        ("dkv", "joint"): {64: Config(64, 64, 4, 2), 128: Config(128, 64, 8, 2), 256: Config(64, 32, 8, 2)},
        # 128 × 64 has 376 bytes of stack with 3.9, 128 × 32 64
        ("dkv", "edge"): {64: Config(64, 64, 4, 2), 128: Config(128, 32, 8, 2), 256: Config(64, 32, 8, 2)},
        ("dkv", "sigmoid"): {64: Config(64, 64, 4, 2), 128: Config(128, 64, 8, 2), 256: Config(64, 32, 8, 2)},
    },
    # Registers here are vector registers plus accumulation registers, 512 in all; 8 warps have half of them.
    "gfx942": {
        (stage, form): {64: Config(64, 64, 4, 2), 128: Config(64, 32, 4, 2), 256: Config(32, 16, 4, 2)}
        for stage, form in (("forward", "joint"), ("delta", "in_place"), ("dq", "joint"), ("dkv", "joint"))
    },
}

# Regions of a few positions: 64-row tiles would be nearly empty. One warp spills. Bounded by 255, head_dim ≤ 64 would
# keep no 8 bytes of stack, and run 8 programs where 14 fit.
_SMALL = {
    64: Config(16, 16, 2, 2),
    128: Config(16, 16, 2, 2, 255),  # unbounded, ptxas aims at 168 registers and spills
    256: Config(16, 16, 4, 2),
}

# ieee float32 dots run on the ordinary units, from registers: larger tiles spill by the kilobyte. Unbounded, ptxas aims
# at 64 or 80 registers and spills a few of them; bounded by 128 it spills more.
_FLOAT32_NVIDIA = {
    64: Config(32, 32, 8, 2, 255),
    128: Config(32, 16, 8, 2, 255),
    256: Config(16, 16, 8, 2, 255),
}
_FLOAT32 = {
    "sm_80": _FLOAT32_NVIDIA,
    "sm_90": _FLOAT32_NVIDIA,
    "sm_100": _FLOAT32_NVIDIA,
    "gfx942": {
        64: Config(32, 32, 4, 2),  # dkv 337
        128: Config(32, 16, 4, 2),
        256: Config(16, 16, 4, 2),  # dkv 382
    },
}

# Small, so that tests of a hundred positions meet ragged ends and several tiles of both classes.
_INTERPRETER = (Config(32, 32, 4, 2), Config(16, 16, 1, 2))

ARCHITECTURES = tuple(_SIXTEEN_BIT)


def block_d(head_dim: int) -> int:
    """``head_dim`` padded to the power of two ≥ 16 that tiles have."""
    return max(16, 1 << (head_dim - 1).bit_length())


@functools.lru_cache(maxsize=1024)
def lookup(arch: str, head_dim: int, dtype: torch.dtype, stage: str, form: str) -> tuple[Config, ...]:
    """The configurations of one pass, the larger tile first. ``form`` is "joint", "edge", "in_place" or "sigmoid".

    Raises ValueError for an architecture, head dimension or dtype that the kernels are not built for.
    """
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"the kernels take head_dim 1 … {MAX_HEAD_DIM}, got {head_dim}")
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"the kernels take float32, float16 and bfloat16, got {dtype}")
    if arch == "interpreter":
        return _INTERPRETER
    if arch not in _SIXTEEN_BIT:
        raise ValueError(f"no configurations for {arch}; there are some for {', '.join(ARCHITECTURES)}")
    if dtype == torch.float32:
        return (_serving(_FLOAT32[arch], head_dim),)
    passes = _SIXTEEN_BIT[arch]
    small = _serving(_SMALL, head_dim)
    large = _serving(next(passes[stage, f] for f in (form, "edge", "joint") if (stage, f) in passes), head_dim)
    return (large, small) if small.cost < large.cost else (large,)


@functools.lru_cache(maxsize=1024)
def classes(configs: tuple[Config, ...]) -> tuple[TileClass, ...]:
    """The tile classes that a tiling is cut by for these configurations."""
    return tuple(TileClass(config.block_m, config.block_n, config.cost) for config in configs)


def shipped(arch: str | None = None, head_dims: tuple[int, ...] = HEAD_DIMS) -> Iterator[Launch]:
    """Every kernel that can be launched, for one architecture or all; ``head_dims`` are padded ones."""
    for name in ARCHITECTURES if arch is None else (arch,):
        for stage, form in _PASSES:
            for signed in _SIGNS.get((stage, form), (False,)):
                for head_dim in head_dims:
                    for dtype in (torch.bfloat16, torch.float16, torch.float32):
                        for config in lookup(name, head_dim, dtype, stage, form):
                            yield Launch(name, stage, form, signed, head_dim, dtype, config)


def arch_of_cuda(capability: tuple[int, int]) -> str:
    """The architecture whose configurations run on a CUDA device of this compute capability; ValueError below 8.0."""
    major = capability[0]
    if major < 8:
        version = ".".join(map(str, capability))
        raise ValueError(f"the Triton kernels need compute capability 8.0 or newer, the device has {version}")
    # 11 and 12 lack the tensor-core instructions of 9 and 10: they take Ampere's, and Ampere's shared memory
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def arch_of_hip(name: str) -> str:
    """The architecture whose configurations run on a ROCm device; ValueError where none fit its matrix cores."""
    if not name.startswith("gfx9"):
        raise ValueError(f"the Triton kernels are configured for gfx942 and its family, the device is {name}")
    return "gfx942"


def _serving(by_head_dim: dict[int, Config], head_dim: int) -> Config:
    padded = block_d(head_dim)
    return by_head_dim[min(limit for limit in by_head_dim if limit >= padded)]
