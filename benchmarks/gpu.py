"""The Triton kernels on a device: every configuration against float64, then timings, a profile, and a search for tiles.

    python -m benchmarks.gpu --out DIR [--phases correctness,timings,profile,dispatcher,sweep] [--interpret]

correctness  every configuration of the device's architecture, outputs and all gradients, in fp32, fp16 and bf16
timings      the benchmarks (``bench.py``): ours in both forms against every provider; medians, TFLOP/s on selected pairs
profile      torch.profiler on the slowest of ours
dispatcher   AttentionDispatcher against the per-edge loop, forward and backward, and how long kernels wait for launches
sweep        (not by default) tile candidates per pass, for ``configs.py``

Rows go to ``DIR/<phase>.jsonl`` as they come. A phase that fails is reported, the next one still runs (in a new process
if a kernel's fault has cost this one the device; it begins with the cases that are not timed yet), and the program ends
with status 1: time on a device is scarce. A case is timed only after its results have been found right: outputs and all
gradients, by the benchmarks' gate, against the loop in float64, or of tile candidates against the shipped tiles.
``--interpret`` runs the same code at toy size in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

from canvas_engineering.files import replace_file

PHASES = ("correctness", "timings", "profile", "dispatcher", "sweep")
DEFAULT_PHASES = PHASES[:-1]
SWEPT_PASSES = (
    ("joint", "forward"),
    ("edge", "forward"),
    ("edge", "delta"),
    ("joint", "dq"),
    ("edge", "dq"),
    ("joint", "dkv"),
    ("edge", "dkv"),
)
# block_m, block_n, warps, stages, by head dimension
SWEEP = {
    64: ((64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2)),
    128: ((64, 64, 8, 2), (64, 64, 8, 3), (64, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3)),
}
REGISTER_BOUNDS = (None, 168, 128)
SWEPT_CASES = ("frames_2_d64", "frames_2_d128", "cogvideox_5b_previous_frame")
CORRECTNESS_UNTIL, TIMINGS_UNTIL = 270.0, 420.0
"""Seconds after the start at which checks end, and timings stop taking up providers: the whole has ten minutes."""


class Wrong(Exception):
    """Results differ from the oracle: there is nothing to time."""


class Lost(Exception):
    """After ``case``, the device answers this process no more."""

    def __init__(self, case: str):
        super().__init__(f"after {case} the device answers no more")
        self.case = case


class Session:
    """One run: where it goes, on which device, at which size. ``elapsed``: seconds that an earlier process took of it;
    ``after``: the last case that it timed."""

    def __init__(self, out: Path, interpret: bool, elapsed: float = 0.0, after: str | None = None):
        import torch
        import triton

        from benchmarks import measure

        self.out, self.interpret = out, interpret
        self.device = "cpu" if interpret else "cuda"
        self.environment = measure.environment(self.device) | {"triton": triton.__version__}
        self.dtype = torch.float32 if interpret else torch.bfloat16
        self.began, self.after = time.perf_counter() - elapsed, after
        self.written: dict[str, list[dict]] = {}

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.began:6.1f} s] {text}", flush=True)

    def write(self, phase: str, rows: list[dict]) -> None:
        from benchmarks import measure

        self.written[phase] = rows
        measure.write_rows([row | self.environment for row in rows], self.out / f"{phase}.jsonl")

    def seconds(self, call) -> dict[str, float]:
        """Quantiles of one call's seconds."""
        if self.interpret:
            start = time.perf_counter()
            call()
            return {"p50": time.perf_counter() - start}
        from triton.testing import do_bench

        times = do_bench(call, warmup=20, rep=80, quantiles=[0.1, 0.5, 0.9])
        return dict(zip(("p10", "p50", "p90"), (milliseconds / 1e3 for milliseconds in times)))

    def usable(self) -> bool:
        """Whether the device still answers this process: after a fault in a kernel it does not."""
        import torch

        try:
            if self.device == "cuda":
                torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True

    @property
    def cases(self):
        from benchmarks import cases

        return cases.TOY if self.interpret else cases.GPU


# -- correctness -----------------------------------------------------------------------------------------------------


def correctness(session: Session) -> list[dict]:
    """Every task in a process of several; a fault of the device, or a kernel that hangs, ends only one of them."""
    import torch

    from benchmarks import gpu_checks

    if session.interpret:
        chosen = gpu_checks.tasks(40, (16,), (torch.float32,))
        rows = [gpu_checks.run_task(task, "cpu") for task in chosen]
    else:
        workers = min(14, os.cpu_count() or 1)
        until = session.began + CORRECTNESS_UNTIL
        rows = gpu_checks.run_apart(gpu_checks.tasks(1600), "cuda", workers, until)
    for row in rows:
        worst = max((row["errors"][name] / row["budgets"][name] for name in row["errors"]), default=math.nan)
        name = f"D {row['head_dim']} {row['dtype']} {row['form']}{' with gains' if row['gained'] else ''}"
        session.say(f"{name}: {worst:.2f} of the budget; {'; '.join(row['faults']) or 'right'}")
    session.write("correctness", rows)
    if any(row["faults"] for row in rows):
        raise Wrong(f"{sum(bool(row['faults']) for row in rows)} of {len(rows)} tasks have faults")
    return rows


# -- timings ---------------------------------------------------------------------------------------------------------


def timings(session: Session) -> list[dict]:
    """The suite on this device. Providers that fail are rows that say why; ours failing ends the phase."""
    from benchmarks import bench, measure

    settings = measure.Settings(session.device, session.dtype, seconds=1.0, environment=session.environment)
    settings.deadline = session.began + TIMINGS_UNTIL
    if session.interpret:
        settings.backend, settings.reference_tokens, settings.seconds = "triton", 16, 0.0
        settings.only = ("ours_torch", "sdpa_mask", "per_edge_loop", "grouped")
    names = [case.name for case in session.cases]
    left, rows = session.cases, []
    if session.after:
        left, rows = left[names.index(session.after) + 1 :], measure.read_rows(session.out / "timings.jsonl")
    for case, new in zip(left, bench.run(left, settings)):
        rows += new
        session.write("timings", rows)
        for row in new:
            name = f"{row['case']:24} {row['form']:9} {row['provider']:14}"
            why = row.get("skipped") or row.get("failed")
            if why or row["form"] == "reference":
                rate = why or f"{row['step_tflops']:.1f} TFLOP/s"
                session.say(" ".join([name, rate, *row.get("kernels", ())]))
                continue
            parts = (part for part in ("forward", "backward") if f"{part}_tflops" in row)
            rates = (f"{part} {row[f'{part}_tflops']:7.1f}" for part in parts)
            session.say(f"{name} {', '.join(rates)} TFLOP/s, first call {row['first_seconds']:.1f} s")
        if not session.usable():
            raise Lost(case.name)
    if measure.faults(rows):
        raise Wrong("; ".join(measure.faults(rows)))
    return rows


def attention(case, form: str, session: Session):
    """(call, leaves, grad_out) of our kernels on a case."""
    from benchmarks.problem import Problem
    from canvas_engineering.attention import canvas_attention

    problem = Problem(case)
    plan = problem.plan(form).to(session.device)
    *leaves, grad_out = problem.inputs(session.device, session.dtype)
    leaves = [x.detach().requires_grad_() for x in leaves]
    return (lambda: canvas_attention(*leaves, plan, backend="triton")), leaves, grad_out


# -- profile, dispatcher, sweep --------------------------------------------------------------------------------------


def profile(session: Session) -> list[dict]:
    """Where the time of our slowest case that this run has timed goes, kernel by kernel; without one, of the first."""
    import torch
    from torch.profiler import ProfilerActivity

    rows = session.written.get("timings", [])
    rows = [row for row in rows if row["provider"] == "ours" and "step_seconds" in row]
    first = {"case": session.cases[0].name, "form": "edge"}
    slowest = max(rows, key=lambda row: row["step_seconds"]["p50"], default=first)
    name, form = slowest["case"], slowest["form"]
    call, leaves, grad_out = attention(next(case for case in session.cases if case.name == name), form, session)
    torch.autograd.grad(call(), leaves, grad_out)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if session.device == "cuda" else [])
    with torch.profiler.profile(activities=activities) as recorded:
        for _ in range(1 if session.interpret else 5):
            torch.autograd.grad(call(), leaves, grad_out)
    order = "self_device_time_total" if session.device == "cuda" else "self_cpu_time_total"
    text = recorded.key_averages().table(sort_by=order, row_limit=25)
    replace_file(session.out / "profile.txt", f"{name}, {form} form, 5 steps\n{text}\n".encode())
    session.say(f"profile of {name}, {form} form\n{text}")
    return []


def dispatcher(session: Session) -> list[dict]:
    """AttentionDispatcher and the per-edge loop with equal parameters: forward and backward in one step. Both are timed
    after ours is right, outputs and all gradients; cases where it is not end the phase with :class:`Wrong`."""
    import torch

    from benchmarks import cases, gpu_checks
    from benchmarks.naive import PerEdgeLoop
    from canvas_engineering.dispatch import AttentionDispatcher

    rows, wrong = [], []
    large = cases.Case("computer_use", cases.computer_use)
    for case in cases.TOY if session.interpret else [*cases.DISPATCH, large]:
        layout, topology = case.declare()
        heads = max(layout.d_model // 64, 1)
        backend = {"backend": "triton"} if session.interpret else {}
        providers = {"ours": AttentionDispatcher(topology, layout, layout.d_model, heads, **backend)}
        providers["per_edge"] = PerEdgeLoop(topology, layout, layout.d_model, heads)
        providers["per_edge"].load_state_dict(providers["ours"].state_dict())
        x = torch.randn(1 if session.interpret else 4, layout.num_positions, layout.d_model, device=session.device)
        for module in providers.values():
            module.to(session.device)
        checked = gpu_checks.check_module(providers["ours"], providers["per_edge"], x, session.dtype)
        row = {"case": case.name, "positions": layout.num_positions}
        if checked["faults"]:
            wrong.append(f"{case.name}: {'; '.join(checked['faults'])}")
            rows.append(row | {"provider": "ours"} | checked)
            session.write("dispatcher", rows)
            continue
        medians = {}
        for name, module in providers.items():

            def step(module=module, x=x):
                with torch.autocast(session.device, torch.bfloat16, enabled=not session.interpret):
                    out = module(x)
                return torch.autograd.grad(out.float().square().mean(), list(module.parameters()))

            step()
            medians[name] = session.seconds(step)
            rows.append(row | {"provider": name, "seconds": medians[name]} | (checked if name == "ours" else {}))
            if session.device == "cuda":
                rows[-1]["launch_gaps"] = launch_gaps(step)
        ratio = medians["per_edge"]["p50"] / medians["ours"]["p50"]
        gaps = f", {100 * rows[-2]['launch_gaps']:.0f} % of it between kernels" if "launch_gaps" in rows[-2] else ""
        session.say(f"{case.name}: {1e3 * medians['ours']['p50']:.2f} ms{gaps}, {ratio:.2f} times as fast as the loop")
        session.write("dispatcher", rows)
    if wrong:
        raise Wrong(" | ".join(wrong))
    return rows


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


def sweep(session: Session) -> list[dict]:
    """Times one pass at a time with candidate tiles, the others as shipped, once the results are the shipped tiles'.
    What does not compile, or is wrong, is a row, too."""
    rows = []
    for case in session.cases if session.interpret else [c for c in session.cases if c.name in SWEPT_CASES]:
        calls = {form: attention(case, form, session) for form in ("joint", "edge")}
        shipped = {form: results(*call) for form, call in calls.items()}
        for form, stage in SWEPT_PASSES:
            tried = []
            for shape in ((16, 16, 1, 2),) if session.interpret else SWEEP[case.head_dim]:
                for bound in (None,) if session.interpret else REGISTER_BOUNDS:
                    row = {"case": case.name, "form": form, "stage": stage, "config": [*shape, bound]}
                    tried.append(row | time_candidate(calls[form], shipped[form], stage, (*shape, bound), session))
            rows += tried
            session.write("sweep", rows)
            timed = sorted((row for row in tried if "seconds" in row), key=lambda row: row["seconds"])
            best = ", ".join(f"{row['config']} {1e3 * row['seconds']:.3f} ms" for row in timed[:3])
            session.say(f"{case.name} {stage} {form}: {best}; {len(tried) - len(timed)} of {len(tried)} failed")
    return rows


def results(call, leaves, grad_out) -> tuple:
    """The output and the gradients of q, k and v."""
    import torch

    out = call()
    return (out.detach(), *torch.autograd.grad(out, leaves, grad_out))


def time_candidate(attending: tuple, shipped: tuple, stage: str, shape: tuple, session: Session) -> dict:
    """Seconds of the forward, or of the whole backward, with one pass's tiles replaced, and errors against ``shipped``,
    the results of the shipped ones; or why there are none. ``attending`` is what :func:`attention` gives."""
    import torch

    from benchmarks import gpu_checks
    from canvas_kernels import configs

    usual, candidate = configs.lookup, configs.Config(*shape)

    def lookup(arch, head_dim, dtype, wanted, form):
        return (candidate,) if wanted == stage else usual(arch, head_dim, dtype, wanted, form)

    row, (call, leaves, grad_out) = {}, attending
    configs.lookup = lookup
    try:
        checked = gpu_checks.same_results(results(*attending), shipped)
        row["errors"] = checked["errors"]
        if checked["faults"]:
            raise Wrong("; ".join(checked["faults"]))
        if stage == "forward":
            with torch.no_grad():
                row["seconds"] = session.seconds(call)["p50"]
        else:
            out = call()
            backward = session.seconds(lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True))
            row["seconds"] = backward["p50"]
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        configs.lookup = usual
    return row


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for rows and the profile")
    parser.add_argument("--phases", default=",".join(DEFAULT_PHASES), help="comma-separated")
    parser.add_argument("--interpret", action="store_true", help="toy sizes in Triton's interpreter, on the CPU")
    parser.add_argument("--after", help="the last case that is timed already: its rows and those before are kept")
    parser.add_argument("--elapsed", type=float, default=0.0, help="seconds that the run has taken already")
    arguments = parser.parse_args(argv)
    phases = arguments.phases.split(",")
    unknown = set(phases) - set(PHASES)
    if unknown:
        parser.error(f"no phase {', '.join(sorted(unknown))}; there are {', '.join(PHASES)}")
    if arguments.interpret:
        # read when kernels are defined: nothing above imports triton
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    if not arguments.interpret and not torch.cuda.is_available():
        parser.error("no NVIDIA device here; --interpret runs toy sizes on the CPU")
    arguments.out.mkdir(parents=True, exist_ok=True)
    session = Session(arguments.out, arguments.interpret, arguments.elapsed, arguments.after)
    session.say(", ".join(f"{name} {value}" for name, value in session.environment.items()))
    failed = []
    for number, phase in enumerate(phases, 1):
        session.say(f"== {phase}")
        try:
            globals()[phase](session)
        except Exception as cause:
            failed.append(phase)
            session.say(traceback.format_exc())
            left, more = phases[number:], []
            if isinstance(cause, Lost) and cause.case != session.cases[-1].name:
                left, more = [phase, *left], ["--after", cause.case]
            if left and not session.usable():
                session.say(f"failed: {', '.join(failed)}; the device answers no more, the rest runs in a new process")
                command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(arguments.out)]
                elapsed = f"{time.perf_counter() - session.began:.1f}"
                subprocess.run([*command, "--phases", ",".join(left), "--elapsed", elapsed, *more], check=False)
                return 1
    session.say(f"failed: {', '.join(failed)}" if failed else "done")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
