"""Compiles every shipped kernel configuration ahead of time, without a GPU, and checks what the compiler made of it.

    python -m benchmarks.aot [--arch sm_90] [--head-dim 64,128] [--dtype bf16] [--jobs 2] [--save ROWS] [--compare ROWS]

Checked, and any failure ends the program with status 1:
- at most 56 bytes of stack up to head_dim 128;
- shared memory within the architecture's limit (sm_80: that of its consumer relatives);
- sm_90: every dot of a 16-bit kernel whose tile has at least 64 rows is a wgmma;
- sm_80, sm_90, sm_100: the loads of both walked tensors are asynchronous copies inside the loop, that is, pipelined.

With ``--compare`` also, against earlier rows of what was compiled: no configuration is gone, spills more, has fewer
wgmma dots or asynchronous copies, or leaves a multiprocessor room for fewer programs. Registers and shared memory count
through the last alone. Where the rows are another Triton's, what has become worse is printed, but only what is gone
fails. A change that is meant is written over the committed rows: ``--save benchmarks/results/aot.json``.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks import compare, measure
from canvas_kernels import configs
from canvas_kernels.configs import Launch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOAT32_POINTERS = ("lse_ptr", "lse2_ptr", "delta_ptr")
# of the loop over full blocks, and as many in that over partial ones
DOTS = {"forward": 4, "delta": 4, "dq": 6, "dkv": 8}
SPILL_FREE_UP_TO = 128
OUTSIDE_LOOPS = 56
"""Bytes of stack that a kernel may have: so few are written before its loops and read after them."""
RESULTS = ("registers", "resident", "spilled", "shared", "wgmma", "copies", "seconds", "faults")
# KiB a program may have. sm_86, sm_89 and sm_120 run sm_80's configurations and have 99 of its 163.
SHARED_LIMIT = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}


def launches(archs=configs.ARCHITECTURES, head_dims=configs.HEAD_DIMS, dtypes=tuple(DTYPES)) -> list[Launch]:
    """The shipped launches to compile, slow ones first."""
    chosen = [
        launch
        for arch in archs
        for launch in configs.shipped(arch, tuple(head_dims))
        if DTYPE_NAMES[launch.dtype] in dtypes
    ]
    return sorted(chosen, key=lambda launch: -launch.head_dim)


def resident(arch: str, registers: int, shared: int, num_warps: int) -> int:
    """Programs that fit a multiprocessor at once: each of ``num_warps`` warps, ``registers`` per lane and ``shared``
    bytes.

    >>> resident("sm_90", 168, 65536, 4), resident("gfx942", 168, 17408, 4)
    (3, 3)
    """
    lane = -(-registers // 8) * 8
    if arch == "gfx942":
        # four SIMDs, each with 512 registers per lane and at most 8 waves of 64 lanes
        warps, shared_by_all = 4 * min(512 // lane, 8), SHARED_LIMIT[arch]
    else:
        # four partitions, each with 16,384 registers for warps of 32 lanes; CUDA keeps 1 KiB for each program
        warps, shared, shared_by_all = 4 * (16384 // (32 * lane)), shared + 1024, SHARED_LIMIT[arch] + 1024
    return min(warps // num_warps, shared_by_all // max(shared, 1))


def compile_launch(launch: Launch) -> dict:
    """What the compiler made of a launch: registers, bytes spilled, shared memory, wgmmas, copies, seconds, faults."""
    import triton
    from triton.compiler import ASTSource

    function, signature, constants, attributes = _signature(launch)
    options = {"num_warps": launch.config.num_warps, "num_stages": launch.config.num_stages, "enable_fp_fusion": True}
    if launch.config.max_registers and launch.arch != "gfx942":
        options["maxnreg"] = launch.config.max_registers
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    began = time.perf_counter()
    kernel = triton.compile(source, target=_target(launch.arch), options=options)
    row = describe(launch) | {"seconds": round(time.perf_counter() - began, 2), "shared": kernel.metadata.shared}
    row |= _amd_resources(kernel) if launch.arch == "gfx942" else _nvidia_resources(kernel, launch)
    row["resident"] = resident(launch.arch, row["registers"], row["shared"], launch.config.num_warps)
    row["faults"] = faults(launch, row)
    return row


def describe(launch: Launch) -> dict:
    """A launch as plain values."""
    config = launch.config
    return {
        "arch": launch.arch,
        "stage": launch.stage,
        "form": launch.form,
        "signed": launch.signed,
        "head_dim": launch.head_dim,
        "dtype": DTYPE_NAMES[launch.dtype],
        "tile": f"{config.block_m}x{config.block_n}",
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "max_registers": config.max_registers,
    }


def faults(launch: Launch, row: dict) -> list[str]:
    """What is wrong with a compiled launch; empty if nothing is."""
    found = []
    if row["spilled"] > OUTSIDE_LOOPS and launch.head_dim <= SPILL_FREE_UP_TO:
        found.append(f"spills {row['spilled']} bytes")
    if row["shared"] > SHARED_LIMIT[launch.arch]:
        found.append(f"{row['shared']} bytes of shared memory, limit {SHARED_LIMIT[launch.arch]}")
    sixteen_bit = launch.dtype != torch.float32
    dots = DOTS[launch.stage]
    if launch.arch == "sm_90" and sixteen_bit and launch.config.block_m >= 64 and row["wgmma"] != dots:
        found.append(f"{row['wgmma']} of {dots} dots are wgmma")
    if launch.arch != "gfx942" and row["copies"] < 2:
        found.append(f"{row['copies']} of 2 walked tensors are copied asynchronously in the loop")
    return found


# -- one launch -> compiler input -------------------------------------------------------------------------------------


def _target(arch: str):
    from triton.backends.compiler import GPUTarget

    return GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)


def _signature(launch: Launch):
    """The kernel, and its arguments as a call with aligned tensors would specialise them."""
    from canvas_kernels.backward import dkv_kernel, dq_kernel
    from canvas_kernels.forward import forward_kernel

    function = {"forward": forward_kernel, "delta": dq_kernel, "dq": dq_kernel, "dkv": dkv_kernel}[launch.stage]
    sigmoid = launch.form == "sigmoid"
    values = {"JOINT": launch.form == "joint", "SIGMOID": sigmoid, "IN_PLACE": launch.form in ("in_place", "sigmoid")}
    values |= {"STORED": launch.form in ("joint", "edge"), "WRITE_DQ": launch.stage == "dq", "SIGNED": launch.signed}
    values |= {"WALK_DELTA": launch.stage == "delta" or (sigmoid and launch.signed), "HEAD_DIM": launch.head_dim}
    values |= {"BLOCK_D": configs.block_d(launch.head_dim)}
    values |= {"BLOCK_M": launch.config.block_m, "BLOCK_N": launch.config.block_n}
    tuples = {"tables": ("*i32", "*i32", "*fp32", "*i64", "*i32", "*i32"), "factors": ("*fp32",) * 3}
    tuples["strides"] = ("i32",) * (9 if launch.stage == "forward" else 12)
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(function.arg_names):
        if name in values:
            signature[name] = "constexpr"
            constants[(index,)] = values[name]
        elif name in tuples:
            signature[name] = tuples[name]
            pointers = [i for i, kind in enumerate(tuples[name]) if kind.startswith("*")]
            attributes |= {(index, i): [["tt.divisibility", 16]] for i in pointers}
        elif name.endswith("_ptr"):
            signature[name] = "*fp32" if name in FLOAT32_POINTERS else f"*{DTYPE_NAMES[launch.dtype]}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name.startswith("scale") else "i32"
    return function, signature, constants, attributes


# -- compiler output --------------------------------------------------------------------------------------------------


def _nvidia_resources(kernel, launch: Launch) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [_cuobjdump(), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    spilled = int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1])
    ttgir = kernel.asm["ttgir"]
    tile = f"<{launch.config.block_n}x{configs.block_d(launch.head_dim)}x!tt.ptr"
    loop = ttgir[ttgir.index("scf.for") :].splitlines()
    return {
        "registers": registers,
        "spilled": spilled,
        "wgmma": len(re.findall(r"ttng\.warp_group_dot ", ttgir)) if "wgmma.mma_async" in kernel.asm["ptx"] else 0,
        "copies": len([line for line in loop if "async_copy_global_to_local" in line and tile in line]),
    }


def _amd_resources(kernel) -> dict:
    assembly = kernel.asm["amdgcn"]

    def metadata(name):
        return int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1])

    return {"registers": metadata("vgpr_count"), "spilled": 4 * metadata("vgpr_spill_count"), "wgmma": 0, "copies": 0}


def _cuobjdump() -> str:
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not path.exists():
        raise FileNotFoundError(f"Triton {triton.__version__} came without {path}")
    return str(path)


# -- the command ------------------------------------------------------------------------------------------------------


def run(chosen: list, jobs: int, on_row) -> list[dict]:
    """Compiles the launches in ``jobs`` processes, calling ``on_row`` with each result as it comes."""
    rows = []
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for row in pool.map(compile_launch, chosen):
            rows.append(row)
            on_row(row)
    return rows


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default=",".join(configs.ARCHITECTURES), help="comma-separated")
    parser.add_argument("--head-dim", default=",".join(map(str, configs.HEAD_DIMS)), help="padded, comma-separated")
    parser.add_argument("--dtype", default=",".join(DTYPES), help="comma-separated")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--save", type=Path, metavar="ROWS", help="where to write the rows")
    parser.add_argument("--compare", type=Path, metavar="ROWS", help="exit with 1 where these were better")
    arguments = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: the interpreter compiles nothing")
    import triton
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    head_dims = [int(head_dim) for head_dim in arguments.head_dim.split(",")]
    archs, dtypes = arguments.arch.split(","), arguments.dtype.split(",")
    chosen = launches(archs, head_dims, dtypes)
    # before --save may write over them, and of what is compiled only
    earlier = measure.read_rows(arguments.compare) if arguments.compare else []
    asked = {"arch": archs, "head_dim": head_dims, "dtype": dtypes}
    earlier = [row for row in earlier if all(row[key] in values for key, values in asked.items())]
    console = Console(width=None if sys.stdout.isatty() else 140)
    with Progress(console=console, disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task("compiling", total=len(chosen))
        rows = run(chosen, arguments.jobs, lambda row: progress.advance(task))
    table = Table("arch", "pass", "D", "dtype", "compiled as", *RESULTS, title=f"Triton {triton.__version__}")
    for row in sorted(rows, key=lambda row: (row["arch"], row["stage"], row["form"], row["head_dim"], row["dtype"])):
        name = f"{row['stage']} {row['form']}{' signed' if row['signed'] else ''}"
        build = f"{row['tile']} {row['num_warps']} warps {row['num_stages']} stages"
        build += f" ≤{row['max_registers']}" if row["max_registers"] else ""
        results = ("; ".join(row[c]) if c == "faults" else str(row.get(c, "")) for c in RESULTS)
        style = "red" if row["faults"] else None
        table.add_row(row["arch"], name, str(row["head_dim"]), row["dtype"], build, *results, style=style)
    console.print(table)
    failed = [row for row in rows if row["faults"]]
    seconds = sum(row["seconds"] for row in rows)
    console.print(f"{len(rows)} configurations, {len(failed)} with faults, {seconds:.0f} s of compiling")
    rows = [row | {"triton": triton.__version__} for row in rows]
    if arguments.save:
        measure.write_rows(rows, arguments.save)
    lines, worse = compare.compare(earlier, rows) if arguments.compare else ([], False)
    console.print("\n".join(lines), highlight=False)
    return int(bool(failed) | worse)


if __name__ == "__main__":
    sys.exit(main())
