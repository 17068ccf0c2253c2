"""What every benchmark shares: interleaved rounds, and rows with quantiles, device, versions and commit."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from canvas_engineering.files import replace_file

RESULTS = Path(__file__).parent / "results"
CPUINFO = Path("/proc/cpuinfo")
IDENTITY = {"vendor_id": "", "cpu family": "family", "model": "model", "stepping": "stepping"}
IDENTITY |= {f"CPU {word}": word for word in ("implementer", "part", "variant", "revision")}
"""What /proc/cpuinfo calls the parts of a processor's identity, on x86 and on ARM, and what rows call them."""
WRITTEN = ("benchmarks/results", "docs", "README.md")
"""What benchmarks write into the tree, which is no other code."""
ON_GPUS = ("triton", "xformers", "flashinfer-python")
"""Packages besides torch that contestants stand on."""
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
T = TypeVar("T")


def turns(contestants: Sequence[T], rounds: int) -> Iterator[list[T]]:
    """The contestants of each round, in another order each, drawn once and for ever: whoever came before has filled the
    caches, and rotating alone would leave that one the same in most rounds."""
    generator = np.random.default_rng(0)
    for _ in range(rounds):
        yield [contestants[i] for i in generator.permutation(len(contestants))]


def interleave(contestants: dict[str, Callable[[], object]], rounds: int, warm_up: int = 2) -> dict[str, np.ndarray]:
    """Seconds per call, ``rounds`` of each, taking :func:`turns`: a slow moment of the machine hits all contestants
    alike."""
    for _ in range(warm_up):
        for run in contestants.values():
            run()
    times = {name: [] for name in contestants}
    for names in turns(list(contestants), rounds):
        for name in names:
            start = time.perf_counter()
            contestants[name]()
            times[name].append(time.perf_counter() - start)
    return {name: np.array(seconds) for name, seconds in times.items()}


def step(module: torch.nn.Module, *inputs: torch.Tensor, upstream: torch.Tensor | None = None) -> Callable[[], None]:
    """One forward and backward, from ``upstream`` or random gradients; earlier gradients are thrown away before."""
    if upstream is None:
        with torch.no_grad():
            upstream = torch.randn_like(module(*inputs))

    def run() -> None:
        for x in inputs:
            x.grad = None
        module.zero_grad(set_to_none=True)
        module(*inputs).backward(upstream)

    return run


def quantiles(values: np.ndarray) -> dict[str, float]:
    """The quantiles that rows hold, keyed "p10" to "p90"."""
    return {f"p{int(100 * q)}": float(np.quantile(values, q)) for q in QUANTILES}


def commit_of(root: Path) -> str:
    """The short hash of HEAD, with "+" where tracked files differ other than what benchmarks write; "unknown" outside
    of a repository."""

    def git(*arguments: str) -> str:
        if shutil.which("git") is None:
            return ""
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    others = (f":(exclude){path}" for path in WRITTEN)
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *others)
    return (git("rev-parse", "--short", "HEAD") or "unknown") + "+" * bool(changed)


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def free_bytes(meminfo: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> int:
    """The memory that this process may still take: what the system has free, or what a control group leaves of its
    limit where that is less. Where the system does not tell, what the machine has."""
    try:
        kilobytes = dict(line.split(":") for line in meminfo.read_text().splitlines())["MemAvailable"]
        free = int(kilobytes.split()[0]) * 1024
    except (OSError, KeyError):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no such group, or its limit is "max"
        limit, taken = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # files that the system keeps while nobody wants the room are counted as taken
        free = min(free, max(limit - taken + int(stat.get("inactive_file", 0)), 0))
    return free


def cpuinfo() -> dict[str, str]:
    """What Linux says of the first processor; nothing elsewhere."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    pairs = (line.split(":", 1) for line in reversed(lines) if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def processor() -> str:
    """The name of this machine's processor, which others may share: :func:`processor_key` tells them apart."""
    return cpuinfo().get("model name") or platform.processor() or platform.machine()


def processor_key(threads: int) -> str:
    """What machine rows are of, and with how many threads: many processors call themselves Xeon."""
    info = cpuinfo()
    found = (f"{label} {info[name]}".strip() for name, label in IDENTITY.items() if name in info)
    return f"{processor()} ({', '.join(found) or platform.machine()}), {threads} thread{'s' * (threads != 1)}"


def environment(device: str = "cpu") -> dict[str, str | int]:
    """Device, driver, versions and commit of a row; on a GPU also the versions of what contestants are made of."""
    found = {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
        "commit": commit_of(Path(__file__).parent.parent),
    }
    if device == "cuda":
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(ask, capture_output=True, text=True, check=False) if shutil.which(ask[0]) else None
        found["driver"] = done.stdout.split("\n")[0] if done and done.returncode == 0 else "unknown"
        found["cuda"] = str(torch.version.cuda)
        found |= versions(ON_GPUS)
    else:
        found["processor"] = processor_key(torch.get_num_threads())
    return found


def tensor_bytes(call: Callable[[], object]) -> int:
    """The most that tensors made in a call hold at once on a CPU, in bytes, as the profiler counts allocations: neither
    tables that are there already nor pages that the allocator keeps. It repeats exactly."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(held.max(initial=0))


def console():
    """Where tables go: the terminal, or 110 columns of a log."""
    from rich.console import Console  # not everywhere that is measured has it

    found = Console()
    return found if found.is_terminal else Console(width=110)


def check_folder(folder: Path) -> None:
    """ValueError where no file can be made in that folder, which need not be there yet: told before, not after hours of
    measuring."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise ValueError(f"nothing can be written into {folder}: {nearest} is no folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"nothing can be written into {folder}: {nearest} is not ours to write")


def write_rows(rows: list[dict], path: Path) -> None:
    """One JSON object per line, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def read_rows(path: Path) -> list[dict]:
    """What :func:`write_rows` wrote. ValueError: the file holds something else."""
    rows = []
    try:
        lines = path.read_text().splitlines()
    except UnicodeDecodeError as cause:
        raise ValueError(f"{path} holds no rows: {cause}") from cause
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as cause:
            raise ValueError(f"{path}, line {number} is no row: {cause}") from cause
        if not isinstance(rows[-1], dict):
            raise ValueError(f"{path}, line {number} is no row: {line[:80]}")
    return rows
