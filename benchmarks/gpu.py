"""The Triton kernels on a device: one call takes less than six minutes, ``--resume`` goes on in less than four more.

    python -m benchmarks.gpu --out DIR [--resume] [--phases defaults,ours,…] [--interpret | --plan]

What we need to know first comes first:

defaults     the configurations that most users meet, bf16 at head_dim 64 and 128 in all forms, against float64
ours         the cases (``bench.py``): ours and unmasked attention, head_dim 128 and long cases early
correctness  every other configuration, dtype, head dimension and layout
providers    the same cases, against everyone else
sweep        tile candidates per pass, for ``configs.py``: checked in many processes, then timed
profile      torch.profiler on the slowest of ours
dispatcher   AttentionDispatcher against the per-edge loop, and how long kernels wait for launches
tools        compute-sanitizer, and ncu on the slowest of ours, where the machine has them

Every phase has a deadline. Its rows are in ``DIR/<phase>.jsonl`` as soon as they are known, each with the ``item`` that
it is of; ``--resume`` takes up the items that have none in that folder. A process that dies, hangs or loses the device
costs the item it was at: another one goes on. Nothing is timed whose results, outputs and all gradients, were not found
right before. The status is 1 where something of ours is wrong or failed. ``--interpret`` runs the same at toy size in
Triton's interpreter; ``--plan`` runs no kernel, only what comes before.
"""

from __future__ import annotations

import argparse
import contextlib
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

from canvas_engineering.files import replace_file

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
SWEPT_PASSES = (
    ("joint", "forward"),
    ("edge", "forward"),
    ("joint", "dq"),
    ("joint", "dkv"),
    ("edge", "dq"),
    ("edge", "dkv"),
    ("edge", "delta"),
)
# block_m, block_n, warps, stages, by head dimension
SWEEP = {
    64: ((128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4)),
    128: ((128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3)),
}
SWEPT_CASES = ("frames_2_d128", "frames_2_d64")


class Wrong(Exception):
    """Results differ from the oracle: there is nothing to time."""


class Session:
    """One process of a run: where it goes, on which device, at which size, and what is known already."""

    def __init__(self, out: Path, interpret: bool, began: float | None = None, share: float = 1.0):
        import torch
        import triton

        from benchmarks import measure

        self.out, self.interpret, self.share = out, interpret, share
        self.device = "cpu" if interpret else "cuda"
        self.dtype = torch.float32 if interpret else torch.bfloat16
        self.environment = measure.environment(self.device) | {"triton": triton.__version__}
        self.began = time.time() if began is None else began

    def say(self, text: str) -> None:
        print(f"[{time.time() - self.began:6.1f} s] {text}", flush=True)

    def left(self, phase: str) -> float:
        """Seconds until the phase's deadline."""
        return self.began + PHASES[phase] * self.share - time.time()

    def rows(self, phase: str) -> list[dict]:
        """What is known of a phase."""
        from benchmarks import measure

        path = self.out / f"{phase}.jsonl"
        return measure.read_rows(path) if path.exists() else []

    def write(self, phase: str, item: str, rows: list[dict]) -> None:
        """Adds an item's rows to the phase's, in place of earlier ones."""
        from benchmarks import measure

        others = [row for row in self.rows(phase) if row["item"] != item]
        added = [{"item": item} | row | self.environment for row in rows]
        measure.write_rows(others + added, self.out / f"{phase}.jsonl")

    def missing(self, phase: str, items: Iterable[str]) -> list[str]:
        """The items that have no rows yet, or that there was no time for all of."""
        from benchmarks import measure

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
                rows = [{"failed": f"{type(cause).__name__}: {str(cause)[:300]}"}]
                self.say(f"{item}: {traceback.format_exc()}")
            self.write(phase, item, rows)
            self.check()

    def check(self) -> None:
        """Ends the process if the device answers it no more: after a fault in a kernel it does not."""
        import torch

        try:
            if self.device == "cuda":
                torch.cuda.synchronize()
        except RuntimeError:
            self.say("the device answers no more: another process goes on")
            sys.exit(LOST)

    def seconds(self, call) -> dict[str, float]:
        """Quantiles of one call's seconds."""
        if self.interpret:
            start = time.perf_counter()
            call()
            return {"p50": time.perf_counter() - start}
        from triton.testing import do_bench

        times = do_bench(call, warmup=20, rep=80, quantiles=[0.1, 0.5, 0.9])
        return dict(zip(("p10", "p50", "p90"), (milliseconds / 1e3 for milliseconds in times)))

    @property
    def cases(self) -> dict:
        """By name, those of head_dim 128 and the longest first."""
        from benchmarks import cases

        found = cases.TOY if self.interpret else cases.GPU
        return {case.name: case for case in sorted(found, key=is_late)}


def is_late(case) -> bool:
    """Whether a case waits for those of head_dim 128 and long ones."""
    from benchmarks import cases

    return case.head_dim != 128 and case.name not in cases.EARLY_ON_A_GPU


# -- correctness -----------------------------------------------------------------------------------------------------


def defaults(session: Session) -> None:
    """The tasks of the default configurations."""
    _check_tasks(session, "defaults")


def correctness(session: Session) -> None:
    """All other tasks."""
    _check_tasks(session, "correctness")


def _check_tasks(session: Session, phase: str) -> None:
    """Tasks in processes of their own; a fault of the device, or a kernel that hangs, ends only one of them."""
    from benchmarks import gpu_checks

    every = gpu_checks.toy_tasks() if session.interpret else gpu_checks.tasks()
    tasks = {task.name: task for task in every[phase == "correctness"]}

    def tell(task, row: dict) -> None:
        worst = max((row["errors"][name] / row["budgets"][name] for name in row["errors"]), default=math.nan)
        session.say(f"{task.name}: {worst:.2f} of the budget; {'; '.join(row['faults']) or 'right'}")
        session.write(phase, task.name, [row])

    if session.interpret:
        for name in session.items(phase, tasks):
            tell(tasks[name], gpu_checks.run_task(tasks[name], "cpu"))
        return
    left = [tasks[name] for name in session.missing(phase, tasks)]
    session.watch(phase, None)
    late = gpu_checks.run_apart(left, "cuda", session.left(phase), tell)
    if late:
        session.say(f"{phase}: no time was left for {len(late)} of {len(left)} tasks")


# -- timings ---------------------------------------------------------------------------------------------------------


def ours(session: Session) -> None:
    """The cases without other providers."""
    _time_cases(session, "ours", frozenset({"ours"}))


def providers(session: Session) -> None:
    """The cases with everyone."""
    toy = {"ours", "ours_torch", "sdpa_mask", "per_edge_loop", "grouped"}
    _time_cases(session, "providers", frozenset(toy if session.interpret else ()))


def _time_cases(session: Session, phase: str, only: frozenset[str]) -> None:
    """A case is an item. Providers that fail are rows that say why."""
    from benchmarks import bench, measure

    settings = measure.Settings(session.device, session.dtype, seconds=0.5, only=only, environment=session.environment)
    settings.deadline = time.perf_counter() + session.left(phase)
    if session.interpret:
        settings.backend, settings.reference_tokens, settings.seconds = "triton", 16, 0.0
    left = [session.cases[name] for name in session.missing(phase, session.cases)]
    names = session.items(phase, session.cases)
    for name, rows in zip(names, bench.run(left, settings)):
        session.write(phase, name, rows)
        for row in rows:
            title = f"{name:24} {row['form']:9} {row['provider']:14}"
            why = row.get("skipped") or row.get("failed")
            if why or row["form"] == "reference":
                session.say(f"{title} {why or format(row['step_tflops'], '.1f') + ' TFLOP/s'}")
                continue
            parts = (part for part in ("forward", "backward") if f"{part}_tflops" in row)
            rates = ", ".join(f"{part} {row[f'{part}_tflops']:7.1f}" for part in parts)
            session.say(f"{title} {rates} TFLOP/s, first call {row['first_seconds']:.1f} s")
        session.check()


def attention(session: Session, name: str, form: str) -> tuple:
    """(call, leaves, grad_out) of our kernels on a case."""
    from benchmarks.problem import Problem
    from canvas_engineering.attention import canvas_attention

    problem = Problem(session.cases[name])
    plan = problem.plan(form).to(session.device)
    *leaves, grad_out = problem.inputs(session.device, session.dtype)
    leaves = [x.detach().requires_grad_() for x in leaves]
    return (lambda: canvas_attention(*leaves, plan, backend="triton")), leaves, grad_out


# -- tiles -----------------------------------------------------------------------------------------------------------


def sweep(session: Session) -> None:
    """Times one pass at a time with candidate tiles, the others as shipped. What does not compile, or is wrong, is a
    row, too. Candidates are compiled and checked in many processes first: that takes most of the time."""
    from benchmarks import gpu_checks
    from canvas_kernels.triton_ops.configs import Config

    names = session.cases if session.interpret else SWEPT_CASES
    tried = {}
    for name in names:
        head_dim = session.cases[name].head_dim
        for form, stage in SWEPT_PASSES[:: 3 if session.interpret else 1]:
            for shape in ((16, 16, 1, 2),) if session.interpret else SWEEP[head_dim]:
                item = f"{name} {stage} {form} {'x'.join(map(str, shape))}"
                tried[item] = (name, form, stage, gpu_checks.Candidate(stage, Config(*shape)))
    checked: dict[str, list[str]] = {}
    if not session.interpret:
        tasks = {}
        for item in session.missing("sweep", tried):
            name, form, _, candidate = tried[item]
            head_dim = session.cases[name].head_dim
            tasks[gpu_checks.Task(head_dim, session.dtype, form, False, 1600, candidate=candidate)] = item
        session.watch("sweep", None)
        half = session.left("sweep") / 2
        gpu_checks.run_apart([*tasks], "cuda", half, lambda task, row: checked.update({tasks[task]: row["faults"]}))
    attending: dict[tuple, tuple] = {}

    def time_one(item: str) -> list[dict]:
        name, form, stage, candidate = tried[item]
        row = {"case": name, "form": form, "stage": stage, "config": list(candidate.config)}
        if checked.get(item):
            return [row | {"failed": "; ".join(checked[item])}]
        if (name, form) not in attending:
            attending.clear()
            call = attention(session, name, form)
            attending[name, form] = call, results(*call)
        row |= time_candidate(*attending[name, form], candidate, session)
        session.say(f"{item}: {row.get('failed') or format(1e3 * row['seconds'], '.3f') + ' ms'}")
        return [row]

    session.run("sweep", {item: lambda item=item: time_one(item) for item in tried})


def results(call, leaves, grad_out) -> tuple:
    """The output and the gradients of q, k and v."""
    import torch

    out = call()
    return (out.detach(), *torch.autograd.grad(out, leaves, grad_out))


def time_candidate(attending: tuple, shipped: tuple, candidate, session: Session) -> dict:
    """Seconds of the forward, or of the whole backward, with one pass's tiles replaced, and errors against ``shipped``,
    the results of the shipped ones; or why there are none. ``attending`` is what :func:`attention` gives."""
    import torch

    from benchmarks import gpu_checks

    row, (call, leaves, grad_out) = {}, attending
    try:
        with gpu_checks.replaced(candidate):
            checked = gpu_checks.same_results(results(*attending), shipped)
            row["errors"] = checked["errors"]
            if checked["faults"]:
                raise Wrong("; ".join(checked["faults"]))
            if candidate.stage == "forward":
                with torch.no_grad():
                    return row | {"seconds": session.seconds(call)["p50"]}
            out = call()
            backward = session.seconds(lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True))
            return row | {"seconds": backward["p50"]}
    except Exception as error:
        return row | {"failed": f"{type(error).__name__}: {str(error)[:200]}"}


# -- where the time goes ---------------------------------------------------------------------------------------------


def slowest(session: Session) -> tuple[str, str]:
    """Case and form of ours that took the longest in this run; without one, the first."""
    rows = [row for row in session.rows("ours") if row.get("provider") == "ours" and "step_seconds" in row]
    first = {"case": next(iter(session.cases)), "form": "edge"}
    found = max(rows, key=lambda row: row["step_seconds"]["p50"], default=first)
    return found["case"], found["form"]


def profile(session: Session) -> None:
    """Where the time of our slowest case goes, kernel by kernel: ``profile.txt``."""
    import torch
    from torch.profiler import ProfilerActivity

    def record() -> list[dict]:
        name, form = slowest(session)
        call, leaves, grad_out = attention(session, name, form)
        torch.autograd.grad(call(), leaves, grad_out)
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if session.device == "cuda" else [])
        with torch.profiler.profile(activities=activities) as recorded:
            for _ in range(1 if session.interpret else 5):
                torch.autograd.grad(call(), leaves, grad_out)
        order = "self_device_time_total" if session.device == "cuda" else "self_cpu_time_total"
        text = recorded.key_averages().table(sort_by=order, row_limit=25)
        replace_file(session.out / "profile.txt", f"{name}, {form} form\n{text}\n".encode())
        session.say(f"profile of {name}, {form} form\n{text}")
        return [{"case": name, "form": form}]

    session.run("profile", {"slowest": record})


def dispatcher(session: Session) -> None:
    """AttentionDispatcher and the per-edge loop with equal parameters: forward and backward in one step. Both are timed
    after ours is right, outputs and all gradients."""
    from benchmarks import cases

    chosen = cases.TOY if session.interpret else [*cases.DISPATCH, cases.Case("computer_use", cases.computer_use)]
    session.run("dispatcher", {case.name: lambda case=case: _time_dispatcher(session, case) for case in chosen})


def _time_dispatcher(session: Session, case) -> list[dict]:
    import torch

    from benchmarks import gpu_checks
    from benchmarks.naive import PerEdgeLoop
    from canvas_engineering.dispatch import AttentionDispatcher

    layout, topology = case.declare()
    heads = max(layout.d_model // 64, 1)
    backend = {"backend": "triton"} if session.interpret else {}
    timed = {"ours": AttentionDispatcher(topology, layout, layout.d_model, heads, **backend)}
    timed["per_edge"] = PerEdgeLoop(topology, layout, layout.d_model, heads)
    timed["per_edge"].load_state_dict(timed["ours"].state_dict())
    x = torch.randn(1 if session.interpret else 4, layout.num_positions, layout.d_model, device=session.device)
    for module in timed.values():
        module.to(session.device)
    checked = gpu_checks.check_module(timed["ours"], timed["per_edge"], x, session.dtype)
    row = {"case": case.name, "positions": layout.num_positions}
    if checked["faults"]:
        return [row | {"provider": "ours"} | checked]
    rows = []
    for name, module in timed.items():

        def step(module=module):
            with torch.autocast(session.device, torch.bfloat16, enabled=not session.interpret):
                out = module(x)
            return torch.autograd.grad(out.float().square().mean(), list(module.parameters()))

        step()
        rows.append(row | {"provider": name, "seconds": session.seconds(step)})
        if session.device == "cuda":
            rows[-1]["launch_gaps"] = launch_gaps(step)
    ratio = rows[1]["seconds"]["p50"] / rows[0]["seconds"]["p50"]
    gaps = f", {100 * rows[0]['launch_gaps']:.0f} % of it between kernels" if "launch_gaps" in rows[0] else ""
    session.say(f"{case.name}: {1e3 * rows[0]['seconds']['p50']:.2f} ms{gaps}, {ratio:.2f} times as fast as the loop")
    return [rows[0] | checked, rows[1]]


def launch_gaps(step, steps: int = 5) -> float:
    """The share of time, from the first kernel of several steps to the end of the last, in which no kernel runs."""
    import torch
    from torch.profiler import ProfilerActivity

    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    on_device = (event.time_range for event in recorded.events() if event.device_type.name == "CUDA")
    return idle_share([(span.start, span.end) for span in on_device])


def idle_share(spans: list[tuple[float, float]]) -> float:
    """The share of the time from the first start to the last end that no span covers; nan without spans.

    >>> idle_share([(0, 4), (2, 5), (7, 10)])
    0.2
    """
    if not spans:
        return math.nan
    spans, idle, reached = sorted(spans), 0.0, min(spans)[0]
    first = reached
    for start, end in spans:
        idle += max(start - reached, 0.0)
        reached = max(reached, end)
    return idle / (reached - first)


def tools(session: Session) -> None:
    """compute-sanitizer over a small case, ncu over the slowest: what they print is in files of their names."""
    small = ("toy" if session.interpret else "robot", "edge")
    found = {
        "compute-sanitizer": (["--tool", "memcheck", "--error-exitcode", "1"], small),
        "ncu": (["--set", "basic", "--launch-count", "24"], slowest(session)),
    }

    def run_tool(name: str) -> list[dict]:
        options, what = found[name]
        command = [name, *options, sys.executable, "-m", "benchmarks.gpu", "--out", str(session.out), "--once", *what]
        command += ["--interpret"] * session.interpret
        path, row = session.out / f"{name}.txt", {"case": what[0], "form": what[1]}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=session.left("tools") + GRACE / 2)
        except subprocess.TimeoutExpired:
            return [row | {"skipped": "it took too long"}]
        replace_file(path, (done.stdout + done.stderr).encode())
        session.say(f"{name} on {' '.join(what)}: status {done.returncode}, {path}")
        # ncu may lack the right to read counters: that is no fault of ours
        what = "failed" if name == "compute-sanitizer" else "skipped"
        return [row | ({what: f"status {done.returncode}"} if done.returncode else {})]

    session.run("tools", {name: lambda name=name: run_tool(name) for name in found if shutil.which(name)})


# -- the command -----------------------------------------------------------------------------------------------------


def faults(session: Session, phases: Iterable[str]) -> list[str]:
    """What is wrong, or failed, of ours."""
    found = []
    for phase in phases:
        for row in session.rows(phase):
            whose = phase != "sweep" and row.get("provider", "ours") == "ours"
            wrong = row.get("faults") or ([row["failed"]] if row.get("failed") else [])
            found += [f"{phase}, {row['item']}: {'; '.join(wrong)}"] * bool(whose and wrong)
    return found


def plan() -> int:
    """What needs neither a GPU nor the interpreter: every import, the plans of all cases, a kernel for sm_90."""
    sys.modules.update(dict.fromkeys(ABSENT))
    import numpy
    import torch
    import triton

    from benchmarks import aot, cases, gpu_checks
    from benchmarks.problem import Problem

    for case in cases.GPU:
        pairs = [f"{form} {Problem(case).plan(form).table.pairs:,}" for form in ("joint", "edge")]
        print(f"{case.name}: {', '.join(pairs)} pairs", flush=True)
    row = aot.compile_launch(aot.launches(["sm_90"], [64], ["bf16"])[0])
    print(f"{row['stage']} {row['form']}: {row['registers']} registers, predicted {row['predicted']} TFLOP/s")
    versions = {"torch": torch.__version__, "triton": triton.__version__, "numpy": numpy.__version__}
    print(f"{len(cases.GPU)} cases planned, {sum(map(len, gpu_checks.tasks()))} checks known; {versions}")
    return 0


def work(session: Session, phases: list[str]) -> int:
    """All phases, in this process."""
    session.say(", ".join(f"{name} {value}" for name, value in session.environment.items()))
    for phase in phases:
        session.say(f"== {phase}")
        globals()[phase](session)
    found = faults(session, phases)
    session.say("\n".join(["FAULTS", *found]) if found else "done")
    return int(bool(found))


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
            earlier = rows.read_bytes() if rows.exists() else b""
            replace_file(rows, earlier + f"{json.dumps(failed)}\n".encode())
    return 1


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder for rows, profile and logs")
    parser.add_argument("--phases", default=",".join(PHASES), help="comma-separated")
    parser.add_argument("--resume", action="store_true", help="go on with what has no rows yet")
    parser.add_argument("--interpret", action="store_true", help="toy sizes in Triton's interpreter, on the CPU")
    parser.add_argument("--plan", action="store_true", help="no run: plan every case, compile a kernel ahead of time")
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--once", nargs=2, metavar=("CASE", "FORM"), help="one step of ours, for tools that watch it")
    arguments = parser.parse_args(argv)
    phases = arguments.phases.split(",")
    if unknown := set(phases) - set(PHASES):
        parser.error(f"no phase {', '.join(sorted(unknown))}; there are {', '.join(PHASES)}")
    share = UNHURRIED if arguments.interpret else RESUMED if arguments.resume else 1.0
    if arguments.plan:
        return plan()
    if arguments.began is None and not arguments.once:
        arguments.out.mkdir(parents=True, exist_ok=True)
        for phase in () if arguments.resume else phases:
            (arguments.out / f"{phase}.jsonl").unlink(missing_ok=True)
        command = [sys.executable, "-m", "benchmarks.gpu", *(argv or sys.argv[1:])]
        return watch(command, arguments.out, time.time(), max(PHASES.values()) * share)
    if arguments.interpret:
        # read when kernels are defined: nothing above imports triton
        os.environ["TRITON_INTERPRET"] = "1"
        sys.modules.update(dict.fromkeys(ABSENT))
    import torch

    if not arguments.interpret and not torch.cuda.is_available():
        parser.error("no NVIDIA device here; --interpret runs toy sizes on the CPU")
    session = Session(arguments.out, arguments.interpret, arguments.began, share)
    if arguments.once:
        results(*attention(session, *arguments.once))
        session.check()
        return 0
    return work(session, phases)


if __name__ == "__main__":
    sys.exit(main())
