"""The Triton kernels on a device: one call takes less than six minutes, ``--resume`` goes on in less than four more.

    python -m benchmarks.gpu --out DIR [--resume] [--phases defaults,ours,…] [--interpret | --plan]

What we need to know first comes first:

defaults     the configurations that most users meet, bf16 at head_dim 64 and 128 in all forms, against float64
ours         the cases (``bench.py``): canvas_attention and unmasked attention, head_dim 128 and long cases early
correctness  every other configuration, dtype, head dimension and layout
providers    the same cases, against everyone else
sweep        tile candidates per pass, for ``configs.py``: checked in many processes, then timed
profile      torch.profiler on the slowest case of the second phase
dispatcher   AttentionDispatcher against the per-edge loop, and how long kernels wait for launches
tools        compute-sanitizer, and ncu on the slowest case, where the machine has them

Every phase has a deadline. Its rows are in ``DIR/<phase>.jsonl`` as soon as they are known, each with the ``item`` that
it is of; ``--resume`` takes up the items that have none in that folder. A process that dies, hangs or loses the device
costs the item it was at: another one goes on. Nothing is timed whose results, outputs and all gradients, were not found
right before. The status is 1 where a kernel or "ours" is wrong or failed. ``--interpret`` runs the same at toy size in
Triton's interpreter; ``--plan`` runs no kernel, only what comes before.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import triton
from torch.profiler import ProfilerActivity

from benchmarks import aot, bench, cases, gpu_checks, layers, measure, plot
from benchmarks.measure import Run
from benchmarks.problem import Problem
from canvas_engineering.attention import canvas_attention
from canvas_engineering.files import replace_file
from canvas_kernels.triton_ops.configs import Config

PHASES = {"defaults": 60, "ours": 160, "correctness": 215, "providers": 290, "sweep": 325}
PHASES |= {"profile": 332, "dispatcher": 340, "tools": 350}
"""Seconds after the start at which each phase takes up nothing more."""
RESUMED, UNHURRIED, GRACE, PATIENCE = 230 / 350, 10.0, 5.0, 30.0
"""The share of these that a resumed run has, and one in the interpreter, where no device waits; seconds that an item
may go on beyond its phase's deadline; seconds after which one that is ended there is not tried again."""
LOST = 3
"""Status of a process that the device answers no more."""
ABSENT = ("diffusers", "transformers", "gymnasium", "rich", "typer", "matplotlib")
"""What the reference machine lacks: ``--interpret`` does without, too."""
SWEPT_PASSES = [(form, stage) for stage in ("forward", "dq", "dkv") for form in ("joint", "edge")] + [("edge", "delta")]
# block_m, block_n, warps, stages, by head dimension
SWEEP = {
    64: ((128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4)),
    128: ((128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3)),
}
SWEPT_CASES, SWEEP_SECONDS = ("frames_2_d128", "frames_2_d64"), 0.1


class Session:
    """One process of a run: where it goes, on which device, at which size, and what is known already."""

    def __init__(self, out: Path, interpret: bool, began: float | None = None, share: float = 1.0):
        self.out, self.interpret, self.share = out, interpret, share
        self.device = "cpu" if interpret else "cuda"
        self.dtype = torch.float32 if interpret else torch.bfloat16
        self.environment = measure.environment(self.device) | {"triton": triton.__version__}
        self.began, self.workers = time.time() if began is None else began, 1 if interpret else 14
        # by name, those of head_dim 128 and the longest first
        known = cases.TOY if interpret else cases.GPU
        self.cases = {case.name: case for case in sorted(known, key=is_late)}

    def say(self, text: str) -> None:
        print(f"[{time.time() - self.began:6.1f} s] {text}", flush=True)

    def left(self, phase: str) -> float:
        """Seconds until the phase's deadline."""
        return self.began + PHASES[phase] * self.share - time.time()

    def settings(self, phase: str, only: Iterable[str] = ()) -> measure.Settings:
        """How cases are timed in a phase."""
        settings = measure.Settings(self.device, self.dtype, 0.5, only=tuple(only), environment=self.environment)
        settings.deadline = time.perf_counter() + self.left(phase)
        if self.interpret:
            settings.backend, settings.reference_tokens, settings.seconds = "triton", 16, 0.0
        return settings

    def rows(self, phase: str) -> list[dict]:
        """What is known of a phase."""
        path = self.out / f"{phase}.jsonl"
        return measure.read_rows(path) if path.exists() else []

    def write(self, phase: str, item: str, rows: list[dict]) -> None:
        """Adds an item's rows to the phase's, in place of earlier ones."""
        others = [row for row in self.rows(phase) if row["item"] != item]
        added = [{"item": item} | row | self.environment for row in rows]
        measure.write_rows(others + added, self.out / f"{phase}.jsonl")

    def missing(self, phase: str, items: Iterable[str]) -> list[str]:
        """The items that have no rows yet, or that there was no time for all of."""
        rows = self.rows(phase)
        known = {row["item"] for row in rows} - {row["item"] for row in rows if row.get("skipped") == measure.NO_TIME}
        return [item for item in items if item not in known]

    def items(self, phase: str, items: Iterable[str]) -> Iterator[str]:
        """The missing items, one after the other, until the phase's deadline. Whoever watches is told each."""
        left = self.missing(phase, items)
        for number, item in enumerate(left):
            if self.left(phase) <= 0:
                self.say(f"{phase}: no time was left for {len(left) - number}: {', '.join(left[number:])[:200]}")
                return
            self.watch(phase, item)
            yield item

    def watch(self, phase: str, item: str | None) -> None:
        """Tells whoever watches what this process is at, and until when."""
        now = time.time()
        told = {"phase": phase, "item": item, "since": now, "until": now + max(self.left(phase), 0) + GRACE}
        replace_file(self.out / "running.json", json.dumps(told).encode())

    def run(self, phase: str, work: dict[str, Callable[[], list[dict]]]) -> None:
        """Does the missing items; what raises is a row that says so. Ends the process where the device is lost."""
        for item in self.items(phase, work):
            try:
                rows = work[item]()
            except Exception as cause:
                rows = [{"failed": measure.told(cause)}]
                self.say(f"{item}: {traceback.format_exc()}")
            self.write(phase, item, rows)
            self.check()

    def check(self) -> None:
        """Ends the process if the device answers it no more: after a fault in a kernel it does not."""
        try:
            if self.device == "cuda":
                torch.cuda.synchronize()
        except RuntimeError:
            self.say("the device answers no more: another process goes on")
            sys.exit(LOST)

    def attention(self, name: str, form: str) -> Run:
        """The kernels on a case."""
        problem = Problem(self.cases[name])
        plan = problem.plan(form).to(self.device)
        *inputs, upstream = problem.inputs(self.device, self.dtype)
        inputs = [x.detach().requires_grad_() for x in inputs]
        leaves = dict(zip(gpu_checks.RESULTS[1:], inputs))
        return Run(lambda q, k, v: canvas_attention(q, k, v, plan, backend="triton"), inputs, leaves, upstream)

    def slowest(self) -> tuple[str, str]:
        """Case and form of "ours" that took the longest in this run; without one, the first."""
        rows = [row for row in self.rows("ours") if row.get("provider") == "ours" and "step_seconds" in row]
        first = {"case": next(iter(self.cases)), "form": "edge"}
        longest = max(rows, key=lambda row: row["step_seconds"]["p50"], default=first)
        return longest["case"], longest["form"]


def is_late(case: cases.Case) -> bool:
    """Whether a case waits for those of head_dim 128 and long ones."""
    return case.head_dim != 128 and case.name not in cases.EARLY_ON_A_GPU


def check_tasks(session: Session, phase: str) -> None:
    """Tasks in processes of their own; a fault of the device, or a kernel that hangs, ends only one of them."""
    tasks = {task.name: task for task in gpu_checks.tasks(session.interpret)[phase == "correctness"]}

    def tell(task: gpu_checks.Task, row: dict) -> None:
        worst = max((row["errors"][name] / row["budgets"][name] for name in row["errors"]), default=math.nan)
        session.say(f"{task.name}: {worst:.2f} of the budget; {'; '.join(row['faults']) or 'right'}")
        session.write(phase, task.name, [row])

    left = [tasks[name] for name in session.missing(phase, tasks)]
    session.watch(phase, None)
    late = gpu_checks.run_apart(left, session.device, session.left(phase), tell, session.workers)
    if late:
        session.say(f"{phase}: no time was left for {len(late)} of {len(left)} tasks")


def time_cases(session: Session, phase: str) -> None:
    """A case is an item, with "ours" alone or everyone. Providers that fail are rows that say why."""
    toy = ("ours", "ours_torch", "sdpa_mask", "per_edge_loop", "grouped") if session.interpret else ()
    settings = session.settings(phase, ("ours",) if phase == "ours" else toy)
    left = [session.cases[name] for name in session.missing(phase, session.cases)]
    for name, rows in zip(session.items(phase, session.cases), bench.run(left, settings)):
        session.write(phase, name, rows)
        session.say("\n".join(map(plot.line, rows)))
        session.check()


def sweep(session: Session, phase: str) -> None:
    """Times one pass at a time with candidate tiles, the others as shipped. What does not compile, or is wrong, is a
    row, too. Candidates are compiled and checked in many processes first: that takes most of the time."""
    tried, checked, known = {}, {}, {}
    for name in session.cases if session.interpret else SWEPT_CASES:
        head_dim = session.cases[name].head_dim
        for form, stage in SWEPT_PASSES[:: 3 if session.interpret else 1]:
            for shape in ((16, 16, 1, 2),) if session.interpret else SWEEP[head_dim]:
                candidate = gpu_checks.Candidate(stage, Config(*shape))
                task = gpu_checks.Task(head_dim, session.dtype, form, False, candidate=candidate)
                task = task._replace(positions=40) if session.interpret else task
                tried[f"{name} {stage} {form} {'x'.join(map(str, shape))}"] = name, task
    session.watch(phase, None)
    left = [tried[item][1] for item in session.missing(phase, tried)]
    half = session.left(phase) / 2
    gpu_checks.run_apart(left, session.device, half, lambda task, row: checked.update({task: row}), session.workers)

    def time_one(item: str) -> list[dict]:
        name, task = tried[item]
        row = {"case": name, "form": task.form, "stage": task.candidate.stage, "config": list(task.candidate.config)}
        if faults := checked.get(task, {}).get("faults"):
            return [row | {"failed": "; ".join(faults)}]
        if (name, task.form) not in known:
            known.clear()
            run = session.attention(name, task.form)
            known[name, task.form] = run, run.results()
        row |= time_candidate(*known[name, task.form], task.candidate, session.device)
        session.say(f"{item}: {1e3 * row['seconds']:.3f} ms")
        return [row]

    session.run(phase, {item: lambda item=item: time_one(item) for item in tried})


def time_candidate(run: Run, shipped: dict, candidate: gpu_checks.Candidate, device: str) -> dict:
    """Errors and seconds of the forward, or of the whole backward, with one pass's tiles replaced. Raises Wrong where a
    result is further than two units in the last place of the largest from ``shipped``, that of the shipped tiles."""
    dtype = shipped["out"].dtype
    budget = gpu_checks.FLOAT32_BUDGET if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    with gpu_checks.replaced(candidate):
        checked = measure.compare(run.results(), shipped, dict.fromkeys(shipped, budget))
        if checked["faults"]:
            raise measure.Wrong("; ".join(checked["faults"]))
        part = "forward" if candidate.stage == "forward" else "backward"
        seconds = measure.quantiles(measure.repeat(run, SWEEP_SECONDS, device, part))["p50"]
    return {"errors": checked["errors"], "seconds": seconds}


def profile(session: Session, phase: str) -> None:
    """Where the time of the slowest case goes, kernel by kernel: ``profile.txt``."""

    def record() -> list[dict]:
        name, form = session.slowest()
        run = session.attention(name, form)
        run.results()
        on_gpu = session.device == "cuda"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
        with torch.profiler.profile(activities=activities) as recorded:
            for _ in range(5 if on_gpu else 1):
                run.results()
        order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        text = recorded.key_averages().table(sort_by=order, row_limit=25)
        replace_file(session.out / "profile.txt", f"{name}, {form} form\n{text}\n".encode())
        session.say(f"profile of {name}, {form} form\n{text}")
        return [{"case": name, "form": form}]

    session.run(phase, {"slowest": record})


def dispatcher(session: Session, phase: str) -> None:
    """AttentionDispatcher and the per-edge loop with equal parameters, as the layers of ``bench.py``."""
    computer = cases.Case("computer_use", cases.computer_use)
    chosen = cases.TOY if session.interpret else (*cases.DISPATCH, computer)

    def time_one(case: cases.Case) -> list[dict]:
        batch = 1 if session.interpret else 4
        case = dataclasses.replace(case, kind="layer", batch=batch, options={"forms": ("edge",)})
        settings = session.settings(phase)
        rows = bench.run_case(case, settings)
        if session.device == "cuda" and "step_seconds" in rows[0]:
            rows[0]["launch_gaps"] = launch_gaps(layers.layer(case, settings).providers[0].build())
        session.say("\n".join(map(plot.line, rows)) + f", launch gaps {rows[0].get('launch_gaps')}")
        return rows

    session.run(phase, {case.name: lambda case=case: time_one(case) for case in chosen})


def launch_gaps(run: Run, steps: int = 5) -> float:
    """The share of time, from the first kernel of several steps to the end of the last, in which no kernel runs."""
    run.results()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(steps):
            run.results()
        torch.cuda.synchronize()
    spans = [event.time_range for event in recorded.events() if event.device_type.name == "CUDA"]
    if not spans:  # without the right to trace
        return math.nan
    elapsed = max(span.end for span in spans) - min(span.start for span in spans)
    return 1 - sum(span.end - span.start for span in spans) / elapsed  # of one stream: kernels follow each other


def tools(session: Session, phase: str) -> None:
    """compute-sanitizer over a small case, ncu over the slowest: what they print is in files of their names."""
    known = {
        "compute-sanitizer": (["--tool", "memcheck", "--error-exitcode", "1"], (next(iter(session.cases)), "edge")),
        "ncu": (["--set", "basic", "--launch-count", "24"], session.slowest()),
    }
    if not session.interpret:
        known["compute-sanitizer"] = known["compute-sanitizer"][0], ("robot", "edge")

    def run_tool(name: str) -> list[dict]:
        options, what = known[name]
        command = [name, *options, sys.executable, "-m", "benchmarks.gpu", "--out", str(session.out), "--once", *what]
        command += ["--interpret"] * session.interpret
        path, row = session.out / f"{name}.txt", {"case": what[0], "form": what[1]}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=session.left(phase) + GRACE / 2)
        except subprocess.TimeoutExpired:
            return [row | {"skipped": "it took too long"}]
        replace_file(path, (done.stdout + done.stderr).encode())
        session.say(f"{name} on {' '.join(what)}: status {done.returncode}, {path}")
        # ncu may lack the right to read counters: that is no fault of the kernels
        verdict = "failed" if name == "compute-sanitizer" else "skipped"
        return [row | ({verdict: f"status {done.returncode}"} if done.returncode else {})]

    session.run(phase, {name: lambda name=name: run_tool(name) for name in known if shutil.which(name)})


WORK = {"defaults": check_tasks, "ours": time_cases, "correctness": check_tasks, "providers": time_cases}
WORK |= {"sweep": sweep, "profile": profile, "dispatcher": dispatcher, "tools": tools}


def faults(session: Session, phases: Iterable[str]) -> list[str]:
    """What is wrong, or failed, of the kernels and of "ours"."""
    lines = []
    rows = [(phase, row) for phase in phases if phase != "sweep" for row in session.rows(phase)]
    for phase, row in rows:
        wrong = row.get("faults") or ([row["failed"]] if row.get("failed") else [])
        if wrong and row.get("provider", "ours") == "ours":
            lines.append(f"{phase}, {row['item']}: {'; '.join(wrong)}")
    return lines


def plan() -> int:
    """What needs neither a GPU nor the interpreter: every import, the plans of all cases, a kernel for sm_90."""
    for case in cases.GPU:
        pairs = [f"{form} {Problem(case).plan(form).table.pairs:,}" for form in ("joint", "edge")]
        print(f"{case.name}: {', '.join(pairs)} pairs", flush=True)
    print(aot.line(aot.compile_launch(aot.launches(["sm_90"], [64], ["bf16"])[0])))
    versions = {"torch": torch.__version__, "triton": triton.__version__, "numpy": sys.modules["numpy"].__version__}
    print(f"{len(cases.GPU)} cases planned, {sum(map(len, gpu_checks.tasks()))} checks known; {versions}")
    return 0


def work(session: Session, phases: list[str]) -> int:
    """All phases, in this process."""
    session.say(", ".join(f"{name} {value}" for name, value in session.environment.items()))
    for phase in phases:
        session.say(f"== {phase}")
        WORK[phase](session, phase)
    wrong = faults(session, phases)
    session.say("\n".join(["FAULTS", *wrong]) if wrong else "done")
    return int(bool(wrong))


def watch(command: list[str], out: Path, began: float, seconds: float) -> int:
    """Runs the phases in a process, and in another one whenever it has died, hung or lost the device; gives its status.
    What it was at then is a failed item, unless it had hardly begun when its phase's time was up."""
    running = out / "running.json"
    while time.time() < began + seconds:
        running.unlink(missing_ok=True)
        child = subprocess.Popen([*command, "--began", str(began)], start_new_session=True)
        status, told = None, {}
        while status is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = child.wait(0.5)
            told = json.loads(running.read_text()) if running.exists() else {}
            if time.time() > told.get("until", began + seconds + GRACE):
                break
        with contextlib.suppress(ProcessLookupError):
            # with the processes that it has started
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        if status in (0, 1, 2):
            return status
        if not told:
            return 1
        what = "it took too long" if status is None else f"its process ended with status {status}"
        print(f"{told['phase']}, {told['item']}: {what}; another process goes on", flush=True)
        if told["item"] and status != LOST and (status is not None or time.time() - told["since"] > PATIENCE):
            rows, failed = out / f"{told['phase']}.jsonl", {"item": told["item"], "failed": what}
            measure.write_rows([*(measure.read_rows(rows) if rows.exists() else ()), failed], rows)
    return 1


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder for rows, profile and logs")
    parser.add_argument("--phases", default=",".join(PHASES), help="comma-separated")
    parser.add_argument("--resume", action="store_true", help="go on with what has no rows yet")
    parser.add_argument("--interpret", action="store_true", help="toy sizes in Triton's interpreter, on the CPU")
    parser.add_argument("--plan", action="store_true", help="no run: plan every case, compile a kernel ahead of time")
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--once", nargs=2, metavar=("CASE", "FORM"), help="one step of the kernels, for tools")
    options = parser.parse_args(argv)
    phases = options.phases.split(",")
    if unknown := set(phases) - set(PHASES):
        parser.error(f"no phase {', '.join(sorted(unknown))}; there are {', '.join(PHASES)}")
    if not (options.interpret or options.plan or torch.cuda.is_available()):
        parser.error("no NVIDIA device here; --interpret runs toy sizes on the CPU")
    if options.plan or options.interpret:
        sys.modules.update({name: None for name in ABSENT if name not in sys.modules})
    share = UNHURRIED if options.interpret else RESUMED if options.resume else 1.0
    if options.plan:
        return plan()
    if options.began is None and not options.once:
        options.out.mkdir(parents=True, exist_ok=True)
        for phase in () if options.resume else phases:
            (options.out / f"{phase}.jsonl").unlink(missing_ok=True)
        if options.interpret:
            os.environ["TRITON_INTERPRET"] = "1"  # for the child, where kernels are defined after it is read
        command = [sys.executable, "-m", "benchmarks.gpu", *(argv or sys.argv[1:])]
        return watch(command, options.out, time.time(), max(PHASES.values()) * share)
    session = Session(options.out, options.interpret, options.began, share)
    if options.once:
        session.attention(*options.once).results()
        session.check()
        return 0
    return work(session, phases)


if __name__ == "__main__":
    sys.exit(main())
