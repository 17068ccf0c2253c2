"""Compiles every shipped kernel configuration ahead of time, without a GPU, and checks what the compiler made of it.

    python -m benchmarks.aot [--arch sm_90] [--head-dim 64,128] [--dtype bf16] [--jobs 2] [--save ROWS] [--commit]

A fault is, up to head_dim 128 where it says so:
- shared memory beyond the architecture's limit (sm_80: that of its consumer relatives);
- a spilled byte (≤ 128); of 16-bit sm_90 kernels with tiles of at least 64 rows, whose machine code is read
  (:mod:`benchmarks.static_model`), a local load or store inside of a loop or more than 16 bytes of stack (≤ 128);
- of these kernels also a dot that is no wgmma, matrix work executed over work asked for ("waste") above 1, a wgmma that
  waits for the one before it;
- sm_80, sm_90, sm_100: walked tensors whose loads are not asynchronous copies inside the loop, that is, pipelined.

The status is 1 where a fault is not in the committed rows, and where a kernel is worse than in these: gone; more
spilled, waste, serialised wgmmas, local accesses; fewer wgmma dots, asynchronous copies or programs on a
multiprocessor; a predicted rate more than 3 % lower. Where the rows are another Triton's, worse kernels are only
printed. Triton 3.6.0 has rows of its own. ``--commit`` writes over the committed rows of what is compiled, and keeps
the others.
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

from benchmarks import measure, static_model, yardstick
from canvas_kernels.triton_ops import configs
from canvas_kernels.triton_ops.configs import Launch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOAT32_POINTERS = ("lse_ptr", "lse2_ptr", "delta_ptr")
SPILL_FREE_UP_TO, STACK = 128, 16
# Bytes that a program may have. sm_86, sm_89 and sm_120 run sm_80's configurations and have 99 of its 163 KiB.
SHARED_LIMIT = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
KEY = ("arch", "stage", "form", "signed", "head_dim", "dtype", "tile")
AT_MOST = ("spilled", "waste", "serialised", "local")
AT_LEAST = {"wgmma": 1, "copies": 1, "resident": 1, "predicted": 0.97}
"""What is compared of a kernel: what may not grow, and the share of it that has to be left."""


def launches(archs=configs.ARCHITECTURES, head_dims=configs.HEAD_DIMS, dtypes=tuple(DTYPES)) -> list[Launch]:
    """The shipped launches to compile, slow ones first, and the yardstick's."""
    shipped = (launch for arch in archs for launch in configs.shipped(arch, tuple(head_dims)))
    chosen = [launch for launch in shipped if DTYPE_NAMES[launch.dtype] in dtypes]
    if "sm_90" in archs and "bf16" in dtypes:
        plain = ((dim, torch.bfloat16, yardstick.CONFIG) for dim in {64, 128}.intersection(head_dims))
        chosen += [Launch("sm_90", "forward", "dense", False, *each) for each in plain]
    return sorted(chosen, key=lambda launch: -launch.head_dim)


def is_read(launch: Launch) -> bool:
    """Whether the machine code of a launch is read: tensor cores of sm_90 take 16-bit tiles of 64 rows and more."""
    return launch.arch == "sm_90" and launch.dtype != torch.float32 and launch.config.block_m >= 64


def resident(arch: str, registers: int, shared: int, num_warps: int) -> int:
    """Programs that fit a multiprocessor at once: of ``num_warps`` warps, ``registers`` a lane and ``shared`` bytes.

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
    """Compile a launch; returns its row: resources, faults, and what :func:`benchmarks.static_model.describe` reads."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    config, arch = launch.config, launch.arch
    function, signature, constants, attributes = _signature(launch)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    if config.max_registers and arch != "gfx942":
        options["maxnreg"] = config.max_registers
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("hip", arch, 64) if arch == "gfx942" else GPUTarget("cuda", int(arch[3:]), 32)
    began = time.perf_counter()
    kernel = triton.compile(source, target=target, options=options)
    row = describe(launch) | {"seconds": round(time.perf_counter() - began, 2), "shared": kernel.metadata.shared}
    row |= _amd_resources(kernel) if arch == "gfx942" else _nvidia_resources(kernel, launch)
    row["resident"] = resident(arch, row["registers"], row["shared"], kernel.metadata.num_warps)
    if is_read(launch):
        shape = (config.block_m, config.block_n, configs.block_d(launch.head_dim), config.num_warps)
        consumers = 1 + ("ttg.warp_specialize" in kernel.asm["ttgir"])
        row |= static_model.describe(kernel.asm["cubin"], launch.stage, *shape, consumers=consumers)
    row["faults"] = faults(launch, row) if launch.form != "dense" else []
    return row


def describe(launch: Launch) -> dict:
    """A launch as plain values."""
    row = {name: getattr(launch, name) for name in ("arch", "stage", "form", "signed", "head_dim")}
    row |= {"dtype": DTYPE_NAMES[launch.dtype], "tile": f"{launch.config.block_m}x{launch.config.block_n}"}
    return row | {name: getattr(launch.config, name) for name in ("num_warps", "num_stages", "max_registers")}


def faults(launch: Launch, row: dict) -> list[str]:
    """What is wrong with a compiled launch; empty if nothing is."""
    bounded, read, limit = launch.head_dim <= SPILL_FREE_UP_TO, is_read(launch), SHARED_LIMIT[launch.arch]
    dots, copies = row.get("dots", 0), row["copies"]
    checks = [
        (bounded and row["spilled"] > STACK * read, f"spills {row['spilled']} bytes"),
        (row["shared"] > limit, f"{row['shared']} bytes of shared memory, limit {limit}"),
        (read and row["wgmma"] < dots, f"{row['wgmma']} of {dots} dots are wgmma"),
        (launch.arch != "gfx942" and copies < 2, f"{copies} of 2 walked tensors are copied asynchronously in the loop"),
        (read and "waste" not in row, "no loop of matrix products"),
    ]
    if read and "waste" in row:
        checks += [
            (row["waste"] > 1, f"waste {row['waste']}"),
            (row["serialised"] > 0, f"{row['serialised']} wgmmas are serialised"),
            (bounded and row["local"] > 0, f"{row['local']} local accesses in loops"),
        ]
    return [fault for is_wrong, fault in checks if is_wrong]


def _signature(launch: Launch):
    """The kernel, and its arguments as a call with aligned tensors would specialise them."""
    from canvas_kernels.triton_ops.backward import dkv_kernel, dq_kernel
    from canvas_kernels.triton_ops.forward import forward_kernel

    passes = {"forward": forward_kernel, "delta": dq_kernel, "dq": dq_kernel, "dkv": dkv_kernel}
    function = yardstick.dense_forward_kernel if launch.form == "dense" else passes[launch.stage]
    sigmoid = launch.form == "sigmoid"
    values = {"JOINT": launch.form == "joint", "SIGMOID": sigmoid, "IN_PLACE": launch.form in ("in_place", "sigmoid")}
    values |= {"STORED": launch.form in ("joint", "edge"), "WRITE_DQ": launch.stage == "dq", "SIGNED": launch.signed}
    values |= {"WALK_DELTA": launch.stage == "delta" or (sigmoid and launch.signed), "HEAD_DIM": launch.head_dim}
    values |= {"BLOCK_D": configs.block_d(launch.head_dim), "MASKED": False}
    values |= {"BLOCK_M": launch.config.block_m, "BLOCK_N": launch.config.block_n}
    tuples = {"tables": ("*i32", "*i32", "*fp32", "*i64", "*i32", "*i32"), "factors": ("*fp32",) * 3}
    tuples["strides"] = ("i32",) * (9 if launch.stage == "forward" else 12)
    half, full = f"*{DTYPE_NAMES[launch.dtype]}", "*fp32"
    tuples["tensors"] = (*[half] * 4, full)
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(function.arg_names):
        if name in values:
            signature[name], constants[(index,)] = "constexpr", values[name]
        elif name in tuples:
            signature[name] = tuples[name]
            pointers = [i for i, kind in enumerate(tuples[name]) if kind.startswith("*")]
            attributes |= {(index, i): [["tt.divisibility", 16]] for i in pointers}
        elif name.endswith("_ptr"):
            signature[name] = full if name in FLOAT32_POINTERS else half
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name.startswith("scale") else "i32"
            if "stride_" in name:  # the yardstick's
                attributes[(index,)] = [["tt.divisibility", 16]]
    return function, signature, constants, attributes


def _nvidia_resources(kernel, launch: Launch) -> dict:
    usage = static_model.run_tool("cuobjdump", "--dump-resource-usage", cubin=kernel.asm["cubin"])
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    ttgir = kernel.asm["ttgir"]
    tile = f"<{launch.config.block_n}x{configs.block_d(launch.head_dim)}x!tt.ptr"
    loop = ttgir[ttgir.index("scf.for") :].splitlines()
    wgmma = len(re.findall(r"ttng\.warp_group_dot ", ttgir))
    row = {"registers": registers, "spilled": stack + local, "wgmma": wgmma}
    row["dots"] = wgmma + len(re.findall(r"\btt\.dot ", ttgir))
    return row | {"copies": sum("async_copy_global_to_local" in line and tile in line for line in loop)}


def _amd_resources(kernel) -> dict:
    counts = ("vgpr_count", "vgpr_spill_count")
    registers, spills = (int(re.search(rf"\.{name}:\s*(\d+)", kernel.asm["amdgcn"])[1]) for name in counts)
    return {"registers": registers, "spilled": 4 * spills, "wgmma": 0, "copies": 0}


def committed(triton: str) -> Path:
    """The committed rows of this Triton, where it has some of its own, or those of .venv's."""
    own = measure.RESULTS / f"aot-{triton}.json"
    return own if own.exists() else measure.RESULTS / "aot.json"


def compare(earlier: list[dict], later: list[dict]) -> tuple[list[str], bool]:
    """Lines on what has become worse, is gone or has new faults; and whether that fails, as the module's text says."""
    old, new = ({tuple(row[key] for key in KEY): row for row in rows} for rows in (earlier, later))
    tritons = [" and ".join(sorted({row["triton"] for row in rows.values()})) for rows in (old, new)]
    lines, worse, unknown, same = [], 0, 0, tritons[0] == tritons[1]
    if old and not same:
        lines.append(f"Triton {tritons[0]} before, {tritons[1]} now: what has become worse is shown, and does not fail")
    for key, row in new.items():
        before, words = old.get(key, {}), []
        for name in (*AT_MOST, *AT_LEAST):
            a, b = before.get(name), row.get(name)
            if a is not None and b is not None and (b > a if name in AT_MOST else b < AT_LEAST[name] * a):
                words.append(f"{name} {a} → {b}")
        worse += bool(words)
        # of known faults, the amounts are compared here
        if len(row["faults"]) > len(before.get("faults", ())):
            unknown += 1
            words += ["FAULT", *row["faults"]]
        if words:
            lines.append(f"{' '.join(map(str, key))}: {', '.join(words)}")
    gone = [f"{' '.join(map(str, key))}: GONE" for key in old if key not in new]
    lines += gone
    if gone or (worse and same):
        lines.append("if that is meant: python -m benchmarks.aot --commit")
    faulty = sum(bool(row["faults"]) for row in new.values())
    lines.append(
        f"{len(new)} configurations: {worse} worse, {len(gone)} gone, {faulty} with faults, {unknown} of them new"
    )
    return lines, bool(gone or unknown) or (same and worse > 0)


def line(row: dict) -> str:
    """A row as a line of a terminal."""
    told = (
        f"{name} {value}" for name, value in row.items() if name not in (*KEY, "faults", "clocks") and value is not None
    )
    return f"{' '.join(str(row[key]) for key in KEY)}: {', '.join(told)}{''.join(map('; {}'.format, row['faults']))}"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default=",".join(configs.ARCHITECTURES), help="comma-separated")
    parser.add_argument("--head-dim", default=",".join(map(str, configs.HEAD_DIMS)), help="padded, comma-separated")
    parser.add_argument("--dtype", default=",".join(DTYPES), help="comma-separated")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--save", type=Path, metavar="ROWS", help="where to write the rows")
    parser.add_argument("--commit", action="store_true", help="write the rows over the committed ones")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: the interpreter compiles nothing")
    import triton

    archs, dtypes = options.arch.split(","), options.dtype.split(",")
    asked = {"arch": archs, "head_dim": [int(size) for size in options.head_dim.split(",")], "dtype": dtypes}
    path, rows = committed(triton.__version__), []
    every = measure.read_rows(path) if path.exists() else []
    earlier = [row for row in every if all(row[key] in values for key, values in asked.items())]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for row in pool.map(compile_launch, launches(*asked.values())):
            rows.append(row | {"triton": triton.__version__})
            print(line(row), flush=True)
    lines, failed = compare(earlier, rows)
    print("\npredicted for an H200, TFLOP/s of selected pairs:", *static_model.pass_rates(rows), sep="\n")
    print(f"\nTriton {triton.__version__}, against {path}:", *lines, sep="\n")
    if options.save:
        measure.write_rows(rows, options.save)
    if options.commit:
        kept = [row for row in every if row not in earlier]
        if any(row["triton"] != triton.__version__ for row in kept):
            parser.error(f"{path} is another Triton's: all of it has to be compiled")
        # in one order, whatever was compiled
        measure.write_rows(sorted(kept + rows, key=lambda row: [str(row[key]) for key in KEY]), path)
    return int(failed and not options.commit)


if __name__ == "__main__":
    sys.exit(main())
