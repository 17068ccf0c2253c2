"""Ours of another commit against ours here: two processes that take turns, forward and backward, in CPU seconds.

The commit is checked out into a temporary ``git worktree`` with this tree's ``benchmarks``, so that both run the same
cases. Ours is slower where the median ratio of the rounds exceeds 1 by more than ``BETWEEN`` and 1.57 · IQR / √rounds,
added as squares (the notches of McGill, Tukey and Larsen).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks import measure
from benchmarks.cases import CPU, GPU, Case
from benchmarks.measure import ROOT, Settings, turns

BETWEEN, NOTCH = 0.05, 1.57
"""Two processes of the same code differ by up to so much, whatever the rounds: 12 pairs came to 0.978 to 1.009."""
TURN_SECONDS, ROUNDS = 0.05, (5, 101)


@contextlib.contextmanager
def worktree(ref: str) -> Iterator[Path]:
    """A commit's files, with this tree's benchmarks. Raises ValueError where there is no such commit."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "base"
        done = subprocess.run(
            ["git", "-C", str(ROOT), "worktree", "add", "--detach", str(tree), ref], capture_output=True, text=True
        )
        if done.returncode:
            raise ValueError(f"--base {ref}: {done.stderr.strip()}")
        try:
            shutil.rmtree(tree / "benchmarks", ignore_errors=True)
            shutil.copytree(ROOT / "benchmarks", tree / "benchmarks")
            yield tree
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], capture_output=True)


class Worker:
    """A process that runs the code of a tree."""

    def __init__(self, tree: Path, settings: Settings):
        paths = os.pathsep.join(map(str, (tree, tree / "kernels")))
        options = [settings.device, str(settings.dtype).removeprefix("torch."), str(measure.torch.get_num_threads())]
        command = [sys.executable, "-m", "benchmarks.base", *options]
        self.process = subprocess.Popen(
            command, cwd=tree, env=os.environ | {"PYTHONPATH": paths}, stdin=-1, stdout=-1, text=True
        )

    def ask(self, **request) -> dict:
        """Send a request and return the answer. Raises Unavailable where it cannot be done there."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"failed": "its process died"}
        if "failed" in answer:
            raise measure.Unavailable(answer["failed"])
        return answer


def serve(device: str, dtype: str, threads: str) -> None:
    """Answer each line of stdin: ``case`` and ``form`` build ours, ``steps`` takes so many and gives CPU seconds."""
    from benchmarks.bench import KINDS

    torch = measure.torch
    torch.set_num_threads(int(threads))
    measure.keep_pages()
    answers, sys.stdout = sys.stdout, sys.stderr
    settings, run = Settings(device, getattr(torch, dtype)), None
    for line in sys.stdin:
        request, answer = json.loads(line), {}
        try:
            if "case" in request:
                case = next(case for case in (CPU if device == "cpu" else GPU) if case.name == request["case"])
                build = {provider[:2]: provider.build for provider in KINDS[case.kind](case, settings).providers}
                run = None
                if (request["form"], "ours") not in build:
                    raise measure.Unavailable("no such form")
                run = build[request["form"], "ours"]()
                run.results()
            start = time.process_time()
            for _ in range(request.get("steps", 1)):
                run.results()
            if device == "cuda":
                torch.cuda.synchronize()
            answer["seconds"] = time.process_time() - start
        except Exception as cause:
            answer["failed"] = measure.told(cause)
        print(json.dumps(answer), file=answers, flush=True)


def slower_than(ratios: np.ndarray) -> float:
    """What the median of ratios must exceed to be a slow-down."""
    low, high = np.quantile(np.log(ratios), (0.25, 0.75))
    return math.exp(math.hypot(BETWEEN, NOTCH * (high - low) / math.sqrt(len(ratios))))


def compare(ref: str, chosen: Sequence[Case], settings: Settings) -> int:
    """Print a line for each case and form; 1 where ours here is slower, or cannot run, in one of them."""
    chosen = [case for case in chosen if case.kind not in ("plan", "scaling")]
    if not chosen:
        raise ValueError("--base: what plans and sizes cost has no forward and backward to compare")
    bad = 0
    with worktree(ref) as tree, contextlib.ExitStack() as stack:
        workers = {"base": Worker(tree, settings), "here": Worker(ROOT, settings)}
        for worker in workers.values():
            stack.enter_context(worker.process)
        for case in chosen:
            for form in settings.forms or ("joint", "edge"):
                bad += _compare_one(workers, case.name, form, settings.seconds)
    return int(bad > 0)


def _compare_one(workers: dict[str, Worker], case: str, form: str, seconds: float) -> bool:
    """Whether ours here is slower, or cannot run, in a case and form; prints a line unless there is no such form."""
    for name, worker in reversed(workers.items()):
        try:
            once = worker.ask(case=case, form=form)["seconds"]
        except measure.Unavailable as cause:
            if "no such form" not in str(cause):
                print(f"{case}, {form}: {name}: {cause}", flush=True)
                return name == "here"
            return False
    steps = max(int(TURN_SECONDS / max(once, 1e-6)), 1)
    rounds = int(np.clip(seconds / (2 * steps * max(once, 1e-6)), *ROUNDS))
    times = {name: [] for name in workers}
    for names in turns([*workers], rounds):
        for name in names:
            times[name].append(workers[name].ask(steps=steps)["seconds"] / steps)
    ratios = np.array(times["here"]) / np.array(times["base"])
    low, middle, high = np.quantile(ratios, (0.1, 0.5, 0.9))
    limit = slower_than(ratios)
    verdict = "SLOWER" if middle > limit else "faster" if middle < 1 / limit else "the same"
    spread = f"{middle:.3f} ({low:.3f} to {high:.3f}) of the time of base, {verdict}"
    print(f"{case}, {form}: {1e3 * np.median(times['here']):.2f} ms, {spread}; noise {limit - 1:.1%}", flush=True)
    return middle > limit


if __name__ == "__main__":
    serve(*sys.argv[1:])
