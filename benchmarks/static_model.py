"""What an H200 can make of a compiled kernel, read off its machine code; no GPU is needed.

The kernel is disassembled, its loops with matrix products are found, and each loop's instructions become clocks of the
multiprocessor's units. One iteration of the loop of full blocks, the shortest one, is predicted to take

    (clocks of the tensor cores + the larger of those for issuing instructions and for exp2) / EFFICIENCY

calibrated on two published rates of a plain dense kernel (403 and 487 TFLOP/s, head_dim 64 and 128). Rates are of the
work that is asked for, 4 · D FLOP per selected pair forward and 10 · D backward, whatever is executed.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import NamedTuple

MULTIPROCESSORS, CLOCK, EFFICIENCY = 132, 1.755e9, 0.87
TENSOR_FLOP, SHARED_BYTES = 4096, 128
"""Of 16-bit products with 32-bit sums, and of shared memory: per clock and multiprocessor."""
MEMORY_BYTES, SLOT_KEYS = 4.8e12, 1024
"""Of device memory per second; and keys of a (segment, row) where the edge form stores its output, about the median of
the canvases of more than 8,192 positions that ``make gpu`` times."""
DOTS = {"forward": 2, "delta": 2, "dq": 3, "dkv": 4}
"""Matrix products per block of each pass, each of 2 · block_m · block_n · D FLOP."""
FLOP_PER_PAIR = {"forward": 4, "backward": 10}  # in units of D
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?(U?P\w+)\s+)?([\w.]+)\s*(.*?)\s*;")
_LABEL = re.compile(r"(\.L_[\w.]+):")
_TARGET = re.compile(r"`\((\.L_[\w.]+)\)")
_SHAPE = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)")
_WIDTHS = ((re.compile(r"\.(128|MT?88\.4)\b"), 512), (re.compile(r"\.(64|MT?88\.2)\b"), 256), (re.compile(""), 128))
"""Bytes that a warp moves in one access to shared memory."""
_FLOAT = {"FFMA", "FMUL", "FADD"}
_INTEGER = {"FMNMX", "FMNMX3", "FSEL", "FSETP", "FCHK", "SEL", "ISETP", "LOP3", "IADD", "IADD3", "LEA", "PLOP3", "F2FP"}
_INTEGER |= {"SHF", "VIADD", "VIADDMNMX", "VIMNMX", "VIMNMX3", "P2R", "R2P", "PRMT", "SGXT", "IABS", "MOV", "CS2R"}
_INTEGER |= {"I2FP", "BFE"}


class Instruction(NamedTuple):
    """``guard``: the predicate that it is executed under; ``target``: the index that it may jump to."""

    opcode: str
    operands: str
    guard: str | None
    target: int | None

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]


def run_tool(name: str, *options: str, cubin: bytes) -> str:
    """What a CUDA program that comes with Triton prints of a compiled kernel."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [Path(triton.__file__).parent / "backends/nvidia/bin" / name, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parse(listing: str) -> list[Instruction]:
    """The instructions of ``nvdisasm -c``'s listing of one kernel."""
    found, labels, waiting = [], {}, []
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            waiting.append(label[1])
        elif match := _INSTRUCTION.match(line):
            labels.update(dict.fromkeys(waiting, len(found)))
            waiting = []
            found.append((match[3], match[4], match[2]))
    targets = (_TARGET.search(operands) if opcode.startswith("BRA") else None for opcode, operands, _ in found)
    return [Instruction(*each, labels.get(match[1]) if match else None) for each, match in zip(found, targets)]


def loops(instructions: list[Instruction]) -> list[tuple[int, int]]:
    """First and last index of every loop: from the target of a backward jump to the jump."""
    found = [(i.target, index) for index, i in enumerate(instructions) if i.target is not None and i.target <= index]
    return [(first, last) for first, last in found if first < last]


def product_loops(instructions: list[Instruction]) -> list[list[Instruction]]:
    """The bodies of the innermost loops with matrix products, the shortest first, without what a conditional jump skips
    (such as the end of a segment, once in many blocks) unless there are products in it."""

    def has_products(body: list[Instruction]) -> bool:
        return any(i.name == "HGMMA" for i in body)

    spans = [(first, last) for first, last in loops(instructions) if has_products(instructions[first : last + 1])]
    bodies = []
    for first, last in spans:
        if any((a, b) != (first, last) and first <= a and b <= last for a, b in spans):
            continue
        skipped = set()
        for index in range(first, last):
            target = instructions[index].target
            ahead = instructions[index].guard and target is not None and index < target <= last
            if ahead and not has_products(instructions[index + 1 : target]):
                skipped |= set(range(index + 1, target))
        bodies.append([instructions[index] for index in range(first, last + 1) if index not in skipped])
    # of a loop's copies, those that do less than the others are what pipelining has split off
    most = max(map(product_flop, bodies), default=0)
    return sorted((body for body in bodies if product_flop(body) == most), key=len)


def product_flop(body: list[Instruction]) -> int:
    """FLOP of the matrix products that four warps, which share each, execute."""
    shapes = (_SHAPE.match(i.opcode) for i in body if i.name == "HGMMA")
    return sum(2 * math.prod(map(int, shape.groups())) for shape in shapes)


def clocks(body: list[Instruction], num_warps: int) -> dict[str, float]:
    """Clocks that each unit of a multiprocessor needs for an iteration of ``num_warps`` warps."""
    found, bytes_moved, operand_bytes = Counter(), 0, 0
    for i in body:
        found["issue"] += 1
        if i.name == "HGMMA":
            m, n, k = map(int, _SHAPE.match(i.opcode).groups())
            # the second factor always comes from shared memory, the first one unless it is in registers
            in_registers = re.match(r"R\d+\s*,\s*R\d+", i.operands)
            operand_bytes += 2 * k * (n if in_registers else n + m)
        elif i.name == "MUFU":
            found["exp2"] += 8
        elif i.name in _INTEGER:
            found["integer"] += 2
        elif i.name.removesuffix("2") in _FLOAT:
            found["float"] += 2 if i.name.endswith("2") else 1
        elif i.name == "IMAD":
            found["float"] += 2
        elif i.name.startswith("U") or i.name == "R2UR":
            found["uniform"] += 2
        elif i.name in ("LDS", "STS", "LDSM", "STSM", "LDGSTS"):
            bytes_moved += next(size for width, size in _WIDTHS if width.search(i.opcode))
    units = ("issue", "exp2", "integer", "float", "uniform")
    each = {unit: found[unit] * num_warps / 4 for unit in units}
    shared = (bytes_moved * num_warps + operand_bytes * num_warps / 4) / SHARED_BYTES
    return each | {"tensor": product_flop(body) / TENSOR_FLOP * num_warps / 4, "shared": shared}


def tflops(flop: float, spent: dict[str, float]) -> float:
    """The predicted TFLOP/s of a loop that does ``flop`` FLOP of what is asked for in clocks ``spent``."""
    serial = spent["tensor"] + max(spent["issue"], spent["exp2"])
    return EFFICIENCY * flop / serial * MULTIPROCESSORS * CLOCK / 1e12


def describe(
    cubin: bytes, stage: str, block_m: int, block_n: int, block_d: int, num_warps: int, consumers: int = 1
) -> dict:
    """What the machine code of a pass shows, of an iteration of the loop of full blocks; {} without matrix products.

    ``stage`` is a key of :data:`DOTS`, the shape that of a tile and its walked block. A warp-specialised kernel has
    ``consumers``, groups of ``num_warps`` that share a tile, each with loops of its own; that their work may overlap is
    not counted. "other_" is of the longest other loop; "waste" is matrix work executed over work asked for; "exp2" is
    per pair; "serialised" counts products that wait for the one before (ptxas's C7515), "local" loads and stores of the
    stack in any loop.
    """
    instructions = parse(run_tool("nvdisasm", "-c", cubin=cubin))
    bodies = product_loops(instructions)
    if not bodies:
        return {}
    asked = DOTS[stage] * 2 * block_m * block_n * block_d
    hot = list(chain.from_iterable(bodies[:consumers]))
    other = list(chain.from_iterable(bodies[consumers:][-consumers:])) or None
    spent = clocks(hot, num_warps)
    inside = (instructions[first : last + 1] for first, last in loops(instructions))
    local = {id(i) for body in inside for i in body if i.name in ("LDL", "STL")}
    committed = max(sum(i.name == "HGMMA" and "gsb0" in i.operands for i in body) for body in bodies)
    return {
        "instructions": len(hot),
        "other_instructions": other and len(other),
        "waste": round(product_flop(hot) * num_warps / 4 / asked, 2),
        "exp2": round(sum(i.opcode == "MUFU.EX2" for i in hot) * num_warps * 32 / (block_m * block_n), 2),
        "waits": sum(i.opcode.startswith("WARPGROUP.DEPBAR") for i in hot),
        "serialised": max(committed - DOTS[stage], 0),
        "local": len(local),
        "clocks": {unit: round(count) for unit, count in spent.items()},
        "bound": max(spent, key=spent.get),
        "predicted": round(tflops(asked, spent), 1),
        "other_predicted": other and round(tflops(asked, clocks(other, num_warps)), 1),
    }


def pass_rates(rows: list[dict]) -> list[dict]:
    """Predicted TFLOP/s on selected pairs of whole passes, from the rows of single kernels, each with its best tile.

    A backward's rate is 10 / (6 / dq + 8 / dkv), with 4 / delta where a pass walks for δ. An edge form without such a
    pass stores each segment's output: 4 · D bytes per (segment, row) of ``SLOT_KEYS`` keys are moved each way.
    """
    best: dict[tuple, dict[str, float]] = {}
    for row in rows:
        # a gain may be negative: the pass that minds the sign is the slower one, and not the usual one
        if row.get("predicted") and not row["signed"]:
            rates = best.setdefault((row["head_dim"], row["dtype"], row["form"]), {})
            rates[row["stage"]] = max(rates.get(row["stage"], 0.0), row["predicted"])
    passes = []
    for (head_dim, dtype, form), rates in sorted(best.items()):
        kept = best.get((head_dim, dtype, "edge"), {})
        if form == "in_place" and "dkv" in kept:  # dK and dV of both edge forms are one pass
            rates["dkv"] = kept["dkv"]
        if "forward" not in rates:
            continue
        work = {"forward": 4 / rates["forward"]}
        if {"dq", "dkv"} <= rates.keys():
            work["backward"] = 6 / rates["dq"] + 8 / rates["dkv"]
        if "delta" in rates and "backward" in work:
            work["backward"] += 4 / rates["delta"]
        elif form == "edge":
            # 10^12 bytes in 10^12 FLOP per second: both in units of D per pair
            work = {name: each + 4 / SLOT_KEYS / (MEMORY_BYTES / 1e12) for name, each in work.items()}
        name = {"head_dim": head_dim, "dtype": dtype, "form": form}
        passes.append(name | {part: round(FLOP_PER_PAIR[part] / each, 1) for part, each in work.items()})
    return passes
