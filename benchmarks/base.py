"""The "ours" of another commit against that of this tree: two processes that take turns, forward and backward.

The commit is checked out into a temporary ``git worktree`` with this tree's ``benchmarks``, so that both run the same
cases. This tree is slower where it took more than ``BETWEEN`` longer in three quarters of the rounds, in CPU seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks import cases, measure
from benchmarks.cases import Case
from benchmarks.measure import ROOT, Settings

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


class Worker:
    """A process that runs the code of a tree."""

    def __init__(self, tree: Path, settings: Settings):
        paths = os.pathsep.join(map(str, (tree, tree / "kernels")))
        options = [settings.device, str(settings.dtype).removeprefix("torch."), str(torch.get_num_threads())]
        command = [sys.executable, "-m", "benchmarks.base", *options]
        environment = os.environ | {"PYTHONPATH": paths}
        self.process = subprocess.Popen(command, cwd=tree, env=environment, stdin=-1, stdout=-1, text=True)

    def seconds(self, case: str, form: str, steps: int = 1) -> float:
        """CPU seconds of so many steps of a case. Raises Unavailable where they cannot be taken there."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps([case, form, steps]) + "\n")
            self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline() or '"its process died"')
        if isinstance(answer, str):
            raise measure.Unavailable(answer)
        return answer


def serve(device: str, dtype: str, threads: str) -> None:
    """Answer each line of stdin, a case, form and number of steps, with the CPU seconds of these, or why not."""
    from benchmarks.bench import KINDS

    torch.set_num_threads(int(threads))
    measure.keep_pages()
    known = {case.name: case for case in (cases.CPU if device == "cpu" else cases.GPU)}
    answers, sys.stdout = sys.stdout, sys.stderr
    settings, built, run = Settings(device, getattr(torch, dtype)), None, None
    for line in sys.stdin:
        name, form, steps = json.loads(line)
        try:
            if built != (name, form):
                providers = KINDS[known[name].kind](known[name], settings).providers
                build = {provider[:2]: provider.build for provider in providers}.get((form, "ours"))
                if build is None:
                    raise measure.Unavailable("no such form")
                run, built = build(), (name, form)
                run.results()
            start = time.process_time()
            for _ in range(steps):
                run.results()
            if device == "cuda":
                torch.cuda.synchronize()
            answer = time.process_time() - start
        except Exception as cause:
            answer, built = measure.told(cause), None
        print(json.dumps(answer), file=answers, flush=True)


def compare(ref: str, chosen: Sequence[Case], settings: Settings) -> int:
    """Print a line for each case and form; 1 where this tree is slower, or cannot run, in one of them."""
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
    """Whether this tree is slower, or cannot run, in a case and form; prints a line unless there is no such form."""
    for name, worker in reversed(workers.items()):
        try:
            once = worker.seconds(case, form)
        except measure.Unavailable as cause:
            if "no such form" in str(cause):
                return False
            print(f"{case}, {form}: {name}: {cause}", flush=True)
            return name == "here"
    steps = max(int(TURN_SECONDS / max(once, 1e-6)), 1)
    rounds = int(np.clip(seconds / (2 * steps * max(once, 1e-6)), *ROUNDS))
    times = {name: [] for name in workers}
    for names in measure.turns([*workers], rounds):
        for name in names:
            times[name].append(workers[name].seconds(case, form, steps) / steps)
    low, middle, high = np.quantile(np.array(times["here"]) / np.array(times["base"]), (0.25, 0.5, 0.75))
    verdict = "SLOWER" if low > 1 + BETWEEN else "faster" if high < 1 / (1 + BETWEEN) else "the same"
    spread = f"{middle:.3f} ({low:.3f} to {high:.3f}) of the time of base, {verdict}"
    print(f"{case}, {form}: {1e3 * np.median(times['here']):.2f} ms, {spread}", flush=True)
    return verdict == "SLOWER"


if __name__ == "__main__":
    serve(*sys.argv[1:])
