"""The "ours" of another commit against that of this tree: two processes that take turns, forward and backward.

The commit is checked out into a temporary ``git worktree`` with this tree's ``benchmarks``, so that both run the same
cases. This tree is slower where it took more than ``BETWEEN`` longer in three quarters of the rounds, in CPU seconds.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import bench, cases, measure
from benchmarks.cases import Case
from benchmarks.measure import ROOT, Run, Settings
from benchmarks.worker import Failed, Worker

BETWEEN = 0.05
"""Two processes of the same code differ by up to so much, whatever the rounds: 12 pairs came to 0.978 to 1.009."""
TURN_SECONDS, ROUNDS = 0.05, (5, 101)


@contextlib.contextmanager
def worktree(ref: str) -> Iterator[Path]:
    """A commit's files, with this tree's benchmarks. Raises ValueError where there is no such commit."""
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "base"
        done = subprocess.run([*git, "add", "--detach", str(tree), ref], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"--base {ref}: {done.stderr.strip()}")
        try:
            shutil.rmtree(tree / "benchmarks", ignore_errors=True)
            shutil.copytree(ROOT / "benchmarks", tree / "benchmarks")
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], capture_output=True)


@lru_cache(maxsize=1)
def built(name: str, form: str, device: str, dtype: torch.dtype, threads: int) -> Run | None:
    """The "ours" of a case after its first call, None where the case has no such form."""
    torch.set_num_threads(threads)
    measure.keep_pages()
    case = {case.name: case for case in (cases.CPU if device == "cpu" else cases.GPU)}[name]
    run = bench.ours(case, form, Settings(device, dtype))
    if run:
        run.results()
    return run


def step_seconds(name: str, form: str, device: str, dtype: torch.dtype, threads: int, steps: int) -> float | None:
    """CPU seconds of so many steps of "ours" on a case; None where the case has no such form."""
    run = built(name, form, device, dtype, threads)
    start = time.process_time()
    for _ in range(steps if run else 0):
        run.results()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() - start if run else None


def compare(ref: str, chosen: Sequence[Case], settings: Settings) -> int:
    """Print a line for each case and form; 1 where this tree is slower, or cannot run, in one of them."""
    chosen = [case for case in chosen if case.kind != "plan"]
    if not chosen:
        raise ValueError("--base: what plans cost has no forward and backward to compare")
    bad, shared = 0, (settings.device, settings.dtype, torch.get_num_threads())
    with worktree(ref) as tree, contextlib.ExitStack() as stack:
        workers = {"base": Worker(tree), "here": Worker(ROOT)}
        for worker in workers.values():
            stack.callback(worker.close)
        for case in chosen:
            for form in settings.forms:
                calls = {
                    name: partial(one.call, step_seconds, case.name, form, *shared) for name, one in workers.items()
                }
                bad += _is_worse(f"{case.name}, {form}", calls, settings.seconds)
    return int(bad > 0)


def _is_worse(what: str, seconds: dict[str, Callable], budget: float) -> bool:
    """Whether this tree is slower, or cannot run; prints a line unless there is no such form."""
    once = 0.0
    for name in ("here", "base"):
        try:
            once = seconds[name](1)
        except Failed as cause:
            print(f"{what}: {name}: {cause}", flush=True)
            return name == "here"
        if once is None:
            return False
    steps = max(int(TURN_SECONDS / max(once, 1e-6)), 1)
    rounds = int(np.clip(budget / (2 * steps * max(once, 1e-6)), *ROUNDS))
    times = {name: [] for name in seconds}
    for names in measure.turns([*seconds], rounds):
        for name in names:
            times[name].append(seconds[name](steps) / steps)
    low, middle, high = np.quantile(np.array(times["here"]) / np.array(times["base"]), (0.25, 0.5, 0.75))
    verdict = "SLOWER" if low > 1 + BETWEEN else "faster" if high < 1 / (1 + BETWEEN) else "the same"
    spread = f"{middle:.3f} ({low:.3f} to {high:.3f}) of the time of base, {verdict}"
    print(f"{what}: {1e3 * np.median(times['here']):.2f} ms, {spread}", flush=True)
    return verdict == "SLOWER"
