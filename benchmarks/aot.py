"""Compiles every shipped kernel configuration ahead of time, without a GPU, and checks what the compiler made of it.

    python -m benchmarks.aot [--arch sm_90] [--head-dim 64,128] [--dtype bf16] [--jobs 2] [--compare ROWS] [--save ROWS]

A fault is, up to head_dim 128 where it says so:
- shared memory beyond the architecture's limit (sm_80: that of its consumer relatives);
- a spilled byte (≤ 128); of 16-bit sm_90 kernels with tiles of at least 64 rows, whose machine code is read
  (:mod:`benchmarks.static_model`), a local load or store inside of a loop or more than 16 bytes of stack (≤ 128);
- of these kernels also a dot that is no wgmma, matrix work executed over work asked for ("waste") above 1, a wgmma that
  waits for the one before it;
- sm_80, sm_90, sm_100: walked tensors whose loads are not asynchronous copies inside the loop, that is, pipelined.

A fault ends the program with status 1, unless the committed rows have it of the same kernel: it is a known one. So does
what is worse than in these rows: a configuration that is gone; more spilled, waste, serialised wgmmas, local accesses;
fewer wgmma dots or asynchronous copies; room for fewer programs on a multiprocessor; a predicted rate more than 3 %
lower. Where the rows are another Triton's, that is told only. Triton 3.6.0 has rows of its own.

A change that is meant: ``--commit`` writes over the committed rows of what is compiled, and keeps the others.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks import compare, measure, static_model, yardstick
from canvas_kernels.triton_ops import configs
from canvas_kernels.triton_ops.configs import Launch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOAT32_POINTERS = ("lse_ptr", "lse2_ptr", "delta_ptr")
SPILL_FREE_UP_TO, STACK = 128, 16
RESULTS = ("registers", "resident", "spilled", "shared", "wgmma", "copies", "seconds", "faults")
READ = ("instructions", "other_instructions", "waste", "exp2", "waits", "serialised", "local", "bound", "predicted")
YARDSTICK_HEAD_DIMS = (64, 128)
# KiB a program may have. sm_86, sm_89 and sm_120 run sm_80's configurations and have 99 of its 163.
SHARED_LIMIT = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}


def launches(archs=configs.ARCHITECTURES, head_dims=configs.HEAD_DIMS, dtypes=tuple(DTYPES)) -> list[Launch]:
    """The shipped launches to compile, slow ones first, and the yardstick's."""
    chosen = [
        launch
        for arch in archs
        for launch in configs.shipped(arch, tuple(head_dims))
        if DTYPE_NAMES[launch.dtype] in dtypes
    ]
    if "sm_90" in archs and "bf16" in dtypes:
        chosen += [
            Launch("sm_90", stage, "dense", False, head_dim, torch.bfloat16, config)
            for head_dim in YARDSTICK_HEAD_DIMS
            if head_dim in head_dims
            for stage, config in yardstick.CONFIGS.items()
        ]
    return sorted(chosen, key=lambda launch: -launch.head_dim)


def is_read(launch: Launch) -> bool:
    """Whether the machine code of a launch is read: tensor cores of sm_90 take 16-bit tiles of 64 rows and more."""
    return launch.arch == "sm_90" and launch.dtype != torch.float32 and launch.config.block_m >= 64


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
    """What the compiler made of a launch: registers, bytes spilled, shared memory, wgmmas, copies, seconds, faults, and
    what :func:`benchmarks.static_model.describe` gives."""
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
    row["resident"] = resident(launch.arch, row["registers"], row["shared"], kernel.metadata.num_warps)
    if is_read(launch):
        config, specialised = launch.config, "ttg.warp_specialize" in kernel.asm["ttgir"]
        shape = (config.block_m, config.block_n, configs.block_d(launch.head_dim), config.num_warps)
        row |= static_model.describe(kernel.asm["cubin"], launch.stage, *shape, consumers=1 + specialised)
    row["faults"] = faults(launch, row) if launch.form != "dense" else []
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
    found, bounded, read = [], launch.head_dim <= SPILL_FREE_UP_TO, is_read(launch)
    if bounded and row["spilled"] > STACK * read:
        found.append(f"spills {row['spilled']} bytes")
    if row["shared"] > SHARED_LIMIT[launch.arch]:
        found.append(f"{row['shared']} bytes of shared memory, limit {SHARED_LIMIT[launch.arch]}")
    if read and row["wgmma"] < row["dots"]:
        found.append(f"{row['wgmma']} of {row['dots']} dots are wgmma")
    if launch.arch != "gfx942" and row["copies"] < 2:
        found.append(f"{row['copies']} of 2 walked tensors are copied asynchronously in the loop")
    if read and "waste" not in row:
        found.append("no loop of matrix products")
    elif read:
        found += [f"waste {row['waste']}"] * (row["waste"] > 1)
        found += [f"{row['serialised']} wgmmas are serialised"] * (row["serialised"] > 0)
        found += [f"{row['local']} local accesses in loops"] * (bounded and row["local"] > 0)
    return found


# -- one launch -> compiler input -------------------------------------------------------------------------------------


def _target(arch: str):
    from triton.backends.compiler import GPUTarget

    return GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)


def _signature(launch: Launch):
    """The kernel, and its arguments as a call with aligned tensors would specialise them."""
    from canvas_kernels.triton_ops.backward import dkv_kernel, dq_kernel
    from canvas_kernels.triton_ops.forward import forward_kernel

    ours = {"forward": forward_kernel, "delta": dq_kernel, "dq": dq_kernel, "dkv": dkv_kernel}
    function = (yardstick.KERNELS if launch.form == "dense" else ours)[launch.stage]
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
            if "stride_" in name:  # the yardstick's
                attributes[(index,)] = [["tt.divisibility", 16]]
    return function, signature, constants, attributes


# -- compiler output --------------------------------------------------------------------------------------------------


def _nvidia_resources(kernel, launch: Launch) -> dict:
    usage = static_model.run_tool("cuobjdump", "--dump-resource-usage", cubin=kernel.asm["cubin"])
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    spilled = int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1])
    ttgir = kernel.asm["ttgir"]
    tile = f"<{launch.config.block_n}x{configs.block_d(launch.head_dim)}x!tt.ptr"
    loop = ttgir[ttgir.index("scf.for") :].splitlines()
    wgmma = len(re.findall(r"ttng\.warp_group_dot ", ttgir))
    return {
        "registers": registers,
        "spilled": spilled,
        "wgmma": wgmma,
        "dots": wgmma + len(re.findall(r"\btt\.dot ", ttgir)),
        "copies": len([line for line in loop if "async_copy_global_to_local" in line and tile in line]),
    }


def _amd_resources(kernel) -> dict:
    assembly = kernel.asm["amdgcn"]

    def metadata(name):
        return int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1])

    return {"registers": metadata("vgpr_count"), "spilled": 4 * metadata("vgpr_spill_count"), "wgmma": 0, "copies": 0}


# -- the command ------------------------------------------------------------------------------------------------------


def committed(triton: str) -> Path:
    """The committed rows of this Triton, where it has some of its own, or those of .venv's."""
    own = measure.RESULTS / f"aot-{triton}.json"
    return own if own.exists() else measure.RESULTS / "aot.json"


def tables(rows: list[dict]) -> list:
    """What is printed: a row for each launch; what its machine code shows, if it is read; what follows for passes."""
    from rich.table import Table

    compiled = Table("arch", "pass", "D", "dtype", "compiled as", *RESULTS, title="compiled")
    read = Table("pass", "D", "dtype", "tile", *READ, title="sm_90, an iteration of the loop of full blocks")
    rates = Table("D", "dtype", "form", "forward", "backward", title="predicted for an H200, TFLOP/s of selected pairs")
    for row in sorted(rows, key=lambda row: (row["arch"], row["stage"], row["form"], row["head_dim"], row["dtype"])):
        name = f"{row['stage']} {row['form']}{' signed' if row['signed'] else ''}"
        build = f"{row['tile']} {row['num_warps']} warps {row['num_stages']} stages"
        build += f" ≤{row['max_registers']}" if row["max_registers"] else ""
        results = ("; ".join(row[c]) if c == "faults" else str(row[c]) for c in RESULTS)
        style = "red" if row["faults"] else None
        compiled.add_row(row["arch"], name, str(row["head_dim"]), row["dtype"], build, *results, style=style)
        if "waste" in row:
            figures = ("" if row[c] is None else str(row[c]) for c in READ)
            read.add_row(name, str(row["head_dim"]), row["dtype"], row["tile"], *figures, style=style)
    for row in static_model.pass_rates(rows):
        rates.add_row(*map(str, row.values()))
    return [compiled, read, rates]


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
    parser.add_argument("--compare", type=Path, metavar="ROWS", help="exit with 1 where these were better")
    parser.add_argument("--save", type=Path, metavar="ROWS", help="where to write the rows")
    parser.add_argument("--commit", action="store_true", help="write the rows over the committed ones")
    arguments = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: the interpreter compiles nothing")
    import triton
    from rich.console import Console
    from rich.progress import Progress

    head_dims = [int(head_dim) for head_dim in arguments.head_dim.split(",")]
    archs, dtypes = arguments.arch.split(","), arguments.dtype.split(",")
    chosen = launches(archs, head_dims, dtypes)
    path = arguments.compare or committed(triton.__version__)
    asked = {"arch": archs, "head_dim": head_dims, "dtype": dtypes}
    every = measure.read_rows(path) if path.exists() else []
    earlier = [row for row in every if all(row[key] in values for key, values in asked.items())]
    console = Console(width=None if sys.stdout.isatty() else 160)
    with Progress(console=console, disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task("compiling", total=len(chosen))
        rows = run(chosen, arguments.jobs, lambda row: progress.advance(task))
    rows = [row | {"triton": triton.__version__} for row in rows]
    for table in tables(rows):
        console.print(table)
    seconds = sum(row["seconds"] for row in rows)
    lines, failed = compare.compare_compiled(earlier, rows)
    console.print(f"Triton {triton.__version__}, {seconds:.0f} s of compiling, compared with {path}")
    console.print("\n".join(lines), highlight=False)
    if arguments.save:
        measure.write_rows(rows, arguments.save)
    if arguments.commit:
        kept = [row for row in every if row not in earlier]
        if any(row["triton"] != triton.__version__ for row in kept):
            parser.error(f"{path} is another Triton's: all of it has to be compiled")
        # in one order, whatever was compiled
        measure.write_rows(sorted(kept + rows, key=lambda row: [str(row[key]) for key in compare.RESOURCES]), path)
    return int(failed and not arguments.commit)


if __name__ == "__main__":
    sys.exit(main())
