"""The Triton kernels on a device: one call takes less than six minutes, ``--resume`` goes on in less than four more.

    python -m benchmarks.gpu --out DIR [--resume] [--phases defaults,ours,…] [--interpret | --plan]

What we need to know first comes first:

defaults     the configurations that most users meet, bf16 at head_dim 64 and 128 in all forms, against float64
ours         the cases (``bench.py``): canvas_attention and unmasked attention, head_dim 128 and long cases early
correctness  every other configuration, dtype, head dimension and layout
providers    the same cases, against everyone else
sweep        tile candidates per pass, for ``configs.py``: checked in many processes, then timed
profile      torch.profiler on the slowest case of the second phase and on layers; how long kernels wait for launches
tools        compute-sanitizer, and ncu on the slowest case, where the machine has them

Every phase has a deadline. Its rows are in ``DIR/<phase>.jsonl`` as soon as they are known, each with the ``item`` that
it is of; ``--resume`` takes up the items that have none in that folder. A process that dies, hangs or loses the device
costs the item it was at: another one goes on. Nothing is timed whose results, outputs and all gradients, were not found
right before. The status is 1 where a kernel or "ours" is wrong or failed. ``--interpret`` runs the same at toy size in
Triton's interpreter; ``--plan`` runs no kernel, only what comes before.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import triton
from torch.profiler import ProfilerActivity

from benchmarks import aot, bench, cases, measure, plot
from benchmarks.measure import Run
from benchmarks.problem import Problem
from benchmarks.worker import Failed, Worker
from canvas_engineering.files import replace_file
from canvas_kernels.triton_ops.configs import Config
from tests.kernels import device_checks

Calls = dict[str, Callable[[], list[dict]]]
PHASES = {"defaults": 60, "ours": 160, "correctness": 215, "providers": 290, "sweep": 325, "profile": 340, "tools": 350}
"""Seconds after the start at which each phase takes up nothing more."""
RESUMED, UNHURRIED, GRACE, PATIENCE = 230 / 350, 10.0, 5.0, 30.0
"""The share of these that a resumed run has, and one in the interpreter, where no device waits; seconds that an item
may go on beyond its phase's deadline; seconds after which one that is ended there is not tried again."""
ABSENT = ("diffusers", "transformers", "gymnasium", "rich", "typer", "matplotlib")
"""What the reference machine lacks: ``--interpret`` does without, too."""
SWEPT_PASSES = [(form, stage) for stage in ("forward", "dq", "dkv") for form in ("joint", "edge")] + [("edge", "delta")]
# block_m, block_n, warps, stages, by head dimension
SWEEP = {
    64: ((128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4)),
    128: ((128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3)),
}
SWEPT_CASES, SWEEP_STEPS = ("frames_2_d128", "frames_2_d64"), 9
WORKERS = {False: 14, True: 1}
"""Processes of checks on a device, and in the interpreter."""


class Pool:
    """Processes that each make one call after another. One that dies, hangs or loses the device costs the call that it
    was at: another process goes on."""

    def __init__(self) -> None:
        self.telling = threading.Lock()
        self.idle: list[Worker] = []

    def run(
        self, calls: Calls, until: float, on_rows: Callable[[str, list[dict]], None], workers: int = 1
    ) -> list[str]:
        """Tell ``on_rows`` the name and the rows of each call as they come; what raised, died or hung is a failed row.

        Returns the names of those that were not begun at ``until``, or that had hardly begun when they were ended then.
        """

        def run_one(name: str) -> bool:
            """Whether there was time for it."""
            began = time.time()
            if began >= until:
                return False
            try:
                worker = self.idle.pop()
            except IndexError:
                worker = Worker()
            try:
                rows = worker.call(in_worker, calls[name], seconds=until + GRACE - began)
            except TimeoutError as cause:
                if time.time() - began < PATIENCE:
                    return False
                rows = [{"failed": str(cause)}]
            except Failed as cause:
                rows = [{"failed": str(cause)}]
            if worker.is_sound:
                self.idle.append(worker)
            with self.telling:
                on_rows(name, rows)
            return True

        with ThreadPoolExecutor(workers) as threads:
            return [name for name, was_run in zip(calls, list(threads.map(run_one, calls))) if not was_run]

    def close(self) -> None:
        """End the processes."""
        while self.idle:
            self.idle.pop().close()


def in_worker(call: Callable[[], list[dict]]) -> list[dict]:
    """Make a call; in the interpreter without what the reference machine lacks."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        forget_absent()
    return call()


def forget_absent() -> None:
    """Imports of what the reference machine lacks fail from now on."""
    sys.modules.update({name: None for name in ABSENT if name not in sys.modules})


@dataclass(frozen=True)
class Session:
    """Where a run goes, on which device, at which size, and what is known already."""

    out: Path
    interpret: bool
    began: float = field(default_factory=time.time)
    share: float = 1.0
    environment: dict = field(default_factory=dict)

    @property
    def device(self) -> str:
        return "cpu" if self.interpret else "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.interpret else torch.bfloat16

    @property
    def cases(self) -> dict[str, cases.Case]:
        """By name, those of head_dim 128 and the longest first."""
        return {case.name: case for case in sorted(cases.TOY if self.interpret else cases.GPU, key=is_late)}

    def say(self, text: str) -> None:
        print(f"[{time.time() - self.began:6.1f} s] {text}", flush=True)

    def until(self, phase: str) -> float:
        """The time of the phase's deadline."""
        return self.began + PHASES[phase] * self.share

    def rows(self, phase: str) -> list[dict]:
        """What is known of a phase."""
        path = self.out / f"{phase}.jsonl"
        return measure.read_rows(path) if path.exists() else []

    def write(self, phase: str, item: str, rows: list[dict]) -> None:
        """Adds an item's rows to the phase's, in place of earlier ones, and says them."""
        others = [row for row in self.rows(phase) if row["item"] != item]
        added = [{"item": item} | row | self.environment for row in rows]
        measure.write_rows(others + added, self.out / f"{phase}.jsonl")
        self.say("\n".join(map(line, added)))

    def run(self, phase: str, calls: Calls, pool: Pool, workers: int = 1, until: float | None = None) -> None:
        """Makes the calls of items that have no rows yet, or that there was no time for all of."""
        rows = self.rows(phase)
        known = {row["item"] for row in rows} - {row["item"] for row in rows if row.get("skipped") == measure.NO_TIME}
        calls = {item: call for item, call in calls.items() if item not in known}
        late = pool.run(calls, until or self.until(phase), partial(self.write, phase), workers)
        if late:
            self.say(f"{phase}: no time was left for {len(late)}: {', '.join(late)[:200]}")

    def settings(self, **more) -> measure.Settings:
        """How cases are timed."""
        toy = {"backend": "triton", "reference_tokens": 16, "seconds": 0.0} if self.interpret else {"seconds": 0.5}
        return measure.Settings(self.device, self.dtype, environment=self.environment, **toy | more)

    def ours(self, name: str, form: str) -> Run:
        """The kernels on a case."""
        return bench.ours(self.cases[name], form, self.settings())

    def slowest(self) -> tuple[str, str]:
        """Case and form of "ours" that took the longest in this run; without one, the first."""
        rows = [row for row in self.rows("ours") if row.get("provider") == "ours" and "step_seconds" in row]
        first = {"case": next(iter(self.cases)), "form": "edge"}
        longest = max(rows, key=lambda row: row["step_seconds"]["p50"], default=first)
        return longest["case"], longest["form"]


def is_late(case: cases.Case) -> bool:
    """Whether a case waits for those of head_dim 128 and long ones."""
    return case.head_dim != 128 and case.name not in cases.EARLY_ON_A_GPU


def line(row: dict) -> str:
    """A row of any phase as a line of a terminal."""
    if "provider" in row:
        return plot.line(row)
    shares = [row["errors"][name] / budget for name, budget in row.get("budgets", {}).items()]
    result = (
        f"{1e3 * row['seconds']:.3f} ms" if "seconds" in row else f"{max(shares):.2f} of the budget" if shares else ""
    )
    return f"{row['item']}: {wrong_in(row) or row.get('skipped') or result or 'done'}"


def wrong_in(row: dict) -> str:
    """What is wrong, or failed; "" for nothing."""
    return "; ".join(row.get("faults") or ([row["failed"]] if row.get("failed") else []))


def check_tasks(session: Session, phase: str, pool: Pool) -> None:
    """Tasks of the kernels, in many processes: compiling takes most of the time."""
    tasks = device_checks.tasks(session.interpret)[phase == "correctness"]
    calls = {task.name: partial(device_checks.run_task, task, session.device) for task in tasks}
    session.run(phase, calls, pool, WORKERS[session.interpret])


def time_cases(session: Session, phase: str, pool: Pool) -> None:
    """A case is an item, with "ours" alone or everyone. Providers that fail are rows that say why."""
    session.run(phase, {name: partial(time_case, session, phase, name) for name in session.cases}, pool)


def time_case(session: Session, phase: str, name: str) -> list[dict]:
    toy = ("ours", "sdpa_mask", "per_edge_loop", "grouped") if session.interpret else ()
    deadline = time.perf_counter() + session.until(phase) - time.time()
    settings = session.settings(only=("ours",) if phase == "ours" else toy, deadline=deadline)
    return next(bench.run([session.cases[name]], settings))


def sweep(session: Session, phase: str, pool: Pool) -> None:
    """Times one pass at a time with candidate tiles, the others as shipped. What does not compile, or is wrong, is a
    row, too. Candidates are compiled and checked in many processes first: that takes most of the time."""
    tried = {}
    for name in ("toy",) if session.interpret else SWEPT_CASES:
        head_dim = session.cases[name].head_dim
        for form, stage in SWEPT_PASSES[:: 3 if session.interpret else 1]:
            for shape in ((16, 16, 1, 2),) if session.interpret else SWEEP[head_dim]:
                candidate = device_checks.Candidate(stage, Config(*shape))
                positions = 40 if session.interpret else device_checks.POSITIONS
                task = device_checks.Task(head_dim, session.dtype, form, False, positions, candidate=candidate)
                tried[f"{name} {stage} {form} {'x'.join(map(str, shape))}"] = name, task
    checks = {f"check {i}": partial(device_checks.run_task, task, session.device) for i, (_, task) in tried.items()}
    half = (time.time() + session.until(phase)) / 2
    session.run(phase, checks, pool, WORKERS[session.interpret], half)
    wrong = {row["item"].removeprefix("check ") for row in session.rows(phase) if wrong_in(row)}
    calls = {item: partial(time_tiles, session, *what) for item, what in tried.items() if item not in wrong}
    session.run(phase, calls, pool)


def time_tiles(session: Session, name: str, task: device_checks.Task) -> list[dict]:
    candidate, (run, shipped) = task.candidate, _shipped(session.interpret, name, task.form)
    row = {"case": name, "form": task.form, "stage": candidate.stage, "config": list(candidate.config)}
    return [row | time_candidate(run, shipped, candidate, session.device)]


@lru_cache(maxsize=1)
def _shipped(interpret: bool, name: str, form: str) -> tuple[Run, dict]:
    run = Session(Path(), interpret).ours(name, form)
    return run, run.results()


def time_candidate(run: Run, shipped: dict, candidate: device_checks.Candidate, device: str) -> dict:
    """Errors and seconds of the forward, or of the whole backward, with one pass's tiles replaced. Raises Wrong where a
    result is further than two units in the last place of the largest from ``shipped``, that of the shipped tiles."""
    dtype = shipped["out"].dtype
    budget = device_checks.FLOAT32_BUDGET if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    with device_checks.replaced(candidate):
        checked = measure.compare(run.results(), shipped, dict.fromkeys(shipped, budget))
        if checked["faults"]:
            raise measure.Wrong("; ".join(checked["faults"]))
        run.times.clear()
        for _ in range(SWEEP_STEPS):
            run.step(device)
    seconds = run.seconds("forward" if candidate.stage == "forward" else "backward")
    return {"errors": checked["errors"], "seconds": float(np.median(seconds))}


def profile(session: Session, phase: str, pool: Pool) -> None:
    """Where the time of the slowest case and of layers goes, kernel by kernel: ``profile-ITEM.txt``."""
    items = {"slowest": session.slowest()}
    items |= {name: (name, "edge") for name, case in session.cases.items() if case.kind == "layer"}
    session.run(phase, {item: partial(record_profile, session, item, *what) for item, what in items.items()}, pool)


def record_profile(session: Session, item: str, name: str, form: str) -> list[dict]:
    """ "launch_gaps" is the share of time, from the first kernel to the end of the last, in which no kernel runs."""
    run, on_gpu = session.ours(name, form), session.device == "cuda"
    run.results()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=activities) as recorded:
        for _ in range(5 if on_gpu else 1):
            run.results()
        if on_gpu:
            torch.cuda.synchronize()
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    text = f"{name}, {form} form\n{recorded.key_averages().table(sort_by=order, row_limit=25)}\n"
    replace_file(session.out / f"profile-{item}.txt", text.encode())
    row, spans = {"case": name, "form": form}, [e.time_range for e in recorded.events() if e.device_type.name == "CUDA"]
    if spans:  # of one stream: kernels follow each other; there are none without the right to trace
        elapsed = max(span.end for span in spans) - min(span.start for span in spans)
        row["launch_gaps"] = 1 - sum(span.end - span.start for span in spans) / elapsed
    return [row]


def tools(session: Session, phase: str, pool: Pool) -> None:
    """compute-sanitizer over a small case, ncu over the slowest: what they print is in files of their names."""
    small = next(iter(session.cases)) if session.interpret else "robot"
    known = {
        "compute-sanitizer": (["--tool", "memcheck", "--error-exitcode", "1"], (small, "edge")),
        "ncu": (["--set", "basic", "--launch-count", "24"], session.slowest()),
    }
    calls = {name: partial(run_tool, session, phase, name, *known[name]) for name in known if shutil.which(name)}
    session.run(phase, calls, pool)


def run_tool(session: Session, phase: str, name: str, options: list[str], what: tuple[str, str]) -> list[dict]:
    command = [name, *options, sys.executable, "-m", "benchmarks.gpu", "--out", str(session.out), "--once", *what]
    command += ["--interpret"] * session.interpret
    path, row = session.out / f"{name}.txt", {"case": what[0], "form": what[1]}
    try:
        left = session.until(phase) - time.time() + GRACE / 2
        done = subprocess.run(command, capture_output=True, text=True, timeout=left)
    except subprocess.TimeoutExpired:
        return [row | {"skipped": "it took too long"}]
    replace_file(path, (done.stdout + done.stderr).encode())
    # ncu may lack the right to read counters: that is no fault of the kernels
    verdict = "failed" if name == "compute-sanitizer" else "skipped"
    return [row | ({verdict: f"status {done.returncode}, {path}"} if done.returncode else {})]


WORK = {"defaults": check_tasks, "ours": time_cases, "correctness": check_tasks, "providers": time_cases}
WORK |= {"sweep": sweep, "profile": profile, "tools": tools}


def faults(session: Session, phases: Iterable[str]) -> list[str]:
    """What is wrong, or failed, of the kernels and of "ours"."""
    rows = [(phase, row) for phase in phases if phase != "sweep" for row in session.rows(phase)]
    own = ((phase, row) for phase, row in rows if wrong_in(row) and row.get("provider", "ours") == "ours")
    return [f"{phase}, {row['item']}: {wrong_in(row)}" for phase, row in own]


def plan() -> int:
    """What needs neither a GPU nor the interpreter: every import, the plans of all cases, a kernel for sm_90."""
    forget_absent()
    for case in cases.GPU:
        pairs = [f"{form} {Problem(case).plan(form).table.pairs:,}" for form in ("joint", "edge")]
        print(f"{case.name}: {', '.join(pairs)} pairs", flush=True)
    print(aot.line(aot.compile_launch(aot.launches(["sm_90"], [64], ["bf16"])[0])))
    versions = {"torch": torch.__version__, "triton": triton.__version__, "numpy": np.__version__}
    print(f"{len(cases.GPU)} cases planned, {sum(map(len, device_checks.tasks()))} checks known; {versions}")
    return 0


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder for rows, profile and logs")
    parser.add_argument("--phases", default=",".join(PHASES), help="comma-separated")
    parser.add_argument("--resume", action="store_true", help="go on with what has no rows yet")
    parser.add_argument("--interpret", action="store_true", help="toy sizes in Triton's interpreter, on the CPU")
    parser.add_argument("--plan", action="store_true", help="no run: plan every case, compile a kernel ahead of time")
    parser.add_argument("--once", nargs=2, metavar=("CASE", "FORM"), help="one step of the kernels, for tools")
    options = parser.parse_args(argv)
    phases = options.phases.split(",")
    if unknown := set(phases) - set(PHASES):
        parser.error(f"no phase {', '.join(sorted(unknown))}; there are {', '.join(PHASES)}")
    if not (options.interpret or options.plan or torch.cuda.is_available()):
        parser.error("no NVIDIA device here; --interpret runs toy sizes on the CPU")
    if options.plan:
        return plan()
    share = UNHURRIED if options.interpret else RESUMED if options.resume else 1.0
    session = Session(options.out, options.interpret, share=share)
    if options.once:
        session.ours(*options.once).results()
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    for phase in () if options.resume else phases:
        (options.out / f"{phase}.jsonl").unlink(missing_ok=True)
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # for other processes, which define kernels after it is read
    session.environment.update(measure.environment(session.device), triton=triton.__version__)
    session.say(", ".join(f"{name} {value}" for name, value in session.environment.items()))
    pool = Pool()
    for phase in phases:
        session.say(f"== {phase}")
        WORK[phase](session, phase, pool)
    wrong = faults(session, phases)
    session.say("\n".join(["FAULTS", *wrong]) if wrong else "done")
    pool.close()
    return int(bool(wrong))


if __name__ == "__main__":
    from benchmarks import gpu  # by its name: other processes look for its functions there

    sys.exit(gpu.main())
