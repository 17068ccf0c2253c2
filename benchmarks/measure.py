"""What every benchmark shares: interleaved rounds, and rows with quantiles, device, versions and commit."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from canvas_kernels.costs import processor, processor_key

RESULTS = Path(__file__).parent / "results"
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


def interleave(contestants: dict[str, Callable[[], object]], rounds: int, warm_up: int = 2) -> dict[str, np.ndarray]:
    """Seconds per call, ``rounds`` of each, taking turns: a slow moment of the machine hits all contestants alike. Each
    round has another order, drawn once and for ever: whoever came before has filled the caches."""
    for _ in range(warm_up):
        for run in contestants.values():
            run()
    times = {name: np.empty(rounds) for name in contestants}
    names, generator = list(contestants), np.random.default_rng(0)
    for turn in range(rounds):
        for name in generator.permutation(names):
            start = time.perf_counter()
            contestants[name]()
            times[name][turn] = time.perf_counter() - start
    return times


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


def environment(device: str = "cpu") -> dict[str, str | int]:
    """Device, driver, versions and commit of a row. A commit of a changed tree ends in "+"."""
    root = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        if shutil.which("git") is None:
            return ""
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    found = {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
        "commit": commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else ""),
    }
    if device == "cuda":
        from canvas_kernels.launch import arch_of

        found["architecture"] = arch_of(torch.device("cuda"))
        found["multiprocessors"] = torch.cuda.get_device_properties("cuda").multi_processor_count
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(ask, capture_output=True, text=True, check=False) if shutil.which(ask[0]) else None
        found["driver"] = done.stdout.split("\n")[0] if done and done.returncode == 0 else "unknown"
        found["cuda"] = str(torch.version.cuda)
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


def write_rows(rows: list[dict], path: Path) -> None:
    """One JSON object per line, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.partial")
    unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(unfinished, path)


def read_rows(path: Path) -> list[dict]:
    """What :func:`write_rows` wrote."""
    return [json.loads(line) for line in path.read_text().splitlines()]
