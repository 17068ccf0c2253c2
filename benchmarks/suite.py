"""The suite: every case of ``cases.py``, every contestant of ``contestants.py``, in both forms.

Per case and contestant: the gate (output and all gradients against float64, in this run, before anything is timed);
the time to build what it needs and of its first call; memory; then rounds in which all contestants take turns, forward
and backward timed apart. Who does not run is a row that says why. scaled_dot_product_attention without a mask runs
twice in each round: it is the device's reference line, and how much the two differ is the machine's noise.

On a CPU, glibc's allocator has two settings here, each the same for all contestants: while memory is measured, which is
while a contestant is built and makes its first call, every tensor over 1 MiB is mapped and returned by itself; while
times are taken, freed memory is kept for the next call (:func:`allocations_mapped`).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import contestants, measure
from benchmarks.cases import Case
from benchmarks.contestants import Contestant, Packed, Unavailable
from benchmarks.problem import Problem
from canvas_engineering.connectivity import resolve_frames
from canvas_engineering.plan import compile_attention

FLOAT32_BUDGET = 1e-5
EAGER_ERRORS = 2.0
"""Errors are the largest difference over the largest exact value. In 16 bits they may be this many times those of plain
dense attention in the same dtype, and a correct rounding of the result is always let through."""
REFERENCE_TOKENS = {"cpu": 1024, "cuda": 16384}
REPEATED_SECONDS, LONG_SECONDS, CLOSE = 3.0, 15.0, 2.0
"""Where a case's time is up, steps that take longer (the second in long runs), or so many times as long as ours, are
taken once: they are no ties."""
NEAR, NEAR_ROUNDS = 1.25, 6
"""Who takes up to so many times as long as ours, or ours as that one, takes turns with ours alone at the end, until it
had at least so many rounds."""
COUNTED_SECONDS = 1.5
GATED_HEADS = 4
NAMED = ("case", "form", "contestant", "batch", "heads", "head_dim", "dtype")
"""What every row says."""


NO_TIME = "no time was left"


class Wrong(Exception):
    """A result differs from float64: there is nothing to time."""


@dataclass
class Settings:
    """How a run is made. ``seconds``: of timed rounds per case, at least and at most so many ``rounds``. ``only``:
    contestants; ours always run. ``long``: those alone that other runs leave out for the time they take, beside ours.
    ``deadline``, of ``time.perf_counter``: after it others than ours are skipped, and cases not begun."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    seconds: float = 6.0
    rounds: tuple[int, int] = (3, 31)
    backend: str = "auto"
    reference_tokens: int | None = None
    only: frozenset[str] = frozenset()
    long: bool = False
    deadline: float = float("inf")
    environment: dict = field(default_factory=dict)


@dataclass
class Runner:
    """One contestant of one case, built and found right."""

    contestant: Contestant
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    inputs: list[Tensor]
    row: dict
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)

    def times(self, part: str) -> np.ndarray:
        """Seconds of each round's "forward", "backward" or "step"."""
        sides = {"forward": (self.forward,), "backward": (self.backward,), "step": (self.forward, self.backward)}
        return sum(np.array(side) for side in sides[part])

    @property
    def seconds(self) -> float:
        """Of all rounds so far."""
        return sum(self.forward) + sum(self.backward)

    def step(self, device: str) -> None:
        """One round: a forward, and the backward where there is one."""
        *leaves, upstream = self.inputs
        with torch.set_grad_enabled(not self.contestant.forward_only):
            clock = Clock(device)
            out = self.attend(*leaves)
            clock.mark()
            if not self.contestant.forward_only:
                torch.autograd.grad(out, leaves, upstream)
                clock.mark()
        for times, seconds in zip((self.forward, self.backward), clock.seconds()):
            times.append(seconds)


class Clock:
    """Seconds between construction and marks: the host's on a CPU, on a GPU the device's."""

    def __init__(self, device: str):
        self.device, self.marks = device, []
        self.mark()

    def mark(self) -> None:
        if self.device == "cpu":
            self.marks.append(time.perf_counter())
        else:
            if not self.marks:
                torch.cuda._sleep(2_000_000)  # about 1 ms in which the host gets ahead: kernels are timed, not launches
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)

    def seconds(self) -> list[float]:
        if self.device == "cpu":
            return np.diff(self.marks).tolist()
        torch.cuda.synchronize()
        return [1e-3 * a.elapsed_time(b) for a, b in zip(self.marks, self.marks[1:])]


def run(cases: list[Case] | tuple[Case, ...], settings: Settings) -> Iterator[list[dict]]:
    """The rows of each case as it ends. With the last case the reference's rows are told which kernels it ran."""
    settings.environment = settings.environment or measure.environment(settings.device)
    _collect()
    try:
        yield from _each(cases, settings)
    finally:
        gc.unfreeze()


def _each(cases: list[Case] | tuple[Case, ...], settings: Settings) -> Iterator[list[dict]]:
    references = []
    for number, case in enumerate(cases, 1):
        late = time.perf_counter() > settings.deadline
        try:
            rows = run_case(case, settings) if not late else _not_begun(case, settings)
        except Exception as cause:
            # too large for the device, say: the other cases still run
            why = f"the whole case: {_told(cause)}"
            rows = [_described(case, settings) | {"form": "joint", "contestant": "ours", "failed": why}]
        rows = [row | settings.environment for row in rows]
        references += [(case, row) for row in rows if row["form"] == "reference"]
        if number == len(cases):
            name_kernels(references, settings)
        yield rows
        if settings.device == "cpu":
            torch.compiler.reset()  # FlexAttention is compiled for each case; after eight torch would run it uncompiled
        _collect()
        if settings.device == "cuda":
            torch.cuda.empty_cache()


def _collect() -> None:
    """Frees what is held in cycles, and keeps what lives on out of later collections, 0.4 s each otherwise."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def _told(cause: Exception) -> str:
    return f"{type(cause).__name__}: {str(cause).strip()[:300]}"


def _described(case: Case, settings: Settings) -> dict:
    shape = {"batch": case.batch, "heads": case.heads, "head_dim": case.head_dim}
    made = {"dtype": str(settings.dtype).removeprefix("torch."), "seconds_per_case": settings.seconds}
    return {"case": case.name, "group": case.group} | shape | made | ({"long": True} if settings.long else {})


def _wanted(case: Case, settings: Settings) -> list[Contestant]:
    everyone = contestants.of(settings.device, settings.backend)
    chosen = settings.only or {c.name for c in everyone}
    if settings.long:
        chosen = chosen & case.long
    return [c for c in everyone if c.name in chosen | {"ours"}]


def _not_begun(case: Case, settings: Settings) -> list[dict]:
    described = _described(case, settings) | {"skipped": NO_TIME}
    return [described | {"form": c.form, "contestant": c.name} for c in _wanted(case, settings)]


def run_case(case: Case, settings: Settings) -> list[dict]:
    """Gate and time one case. A contestant that cannot run, or is wrong, is a row that says why; others are timed."""
    problem = Problem(case)
    compile_attention.cache_clear()  # the plan's time is that of a first use
    resolve_frames.cache_clear()
    described = _described(case, settings) | {
        "tokens": problem.tokens,
        "connections": len(problem.topology.connections),
        "reads": len(problem.reads),
    }
    inputs = problem.inputs(settings.device, settings.dtype)
    gate = Gate(problem, inputs, settings)
    runners, rows = [], []
    for contestant in _wanted(case, settings):
        row = described | {"form": contestant.form, "contestant": contestant.name}
        rows.append(row)
        if contestant.name in case.without and not (settings.long and contestant.name in case.long):
            row["skipped"] = case.without[contestant.name]
            continue
        if contestant.name != "ours" and time.perf_counter() > settings.deadline:
            row["skipped"] = NO_TIME
            continue
        try:
            runners.append(prepare(contestant, problem, inputs, gate, settings, row))
        except Unavailable as cause:
            row["skipped"] = str(cause)
        except Exception as cause:
            # out of memory, say; time on a device is scarce, and the next case may well run
            row["failed"] = _told(cause)
            if settings.device == "cuda":
                torch.cuda.empty_cache()
    del gate
    reference = Reference(case, settings)
    _take_turns(runners, reference, settings)
    _finish(runners, reference, problem)
    _count_tensors(runners, settings)
    reference_row = described | {"form": "reference", "contestant": "sdpa_unmasked"} | reference.row()
    return [*rows, reference_row]


def prepare(
    contestant: Contestant, problem: Problem, inputs: list[Tensor], gate: Gate, settings: Settings, row: dict
) -> Runner:
    """Builds, makes the first call under the gate, and measures both."""
    gate.expect(contestant.form)
    with allocations_mapped(settings.device):
        memory = Memory(settings.device)
        start = _now(settings.device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            attend = contestant.build(problem, settings.device, settings.dtype)
        row["setup_seconds"] = _now(settings.device) - start
        own = [attend.pack(x) for x in inputs] if isinstance(attend, Packed) else inputs
        leaves = [x.detach().requires_grad_(i < 3 and not contestant.forward_only) for i, x in enumerate(own)]
        runner = Runner(contestant, attend, leaves, row)
        row["errors"] = gate(runner, memory)
    row["budgets"] = {name: gate.budgets[contestant.form][name] for name in row["errors"]}
    if not all(error <= row["budgets"][name] for name, error in row["errors"].items()):
        who = f"{problem.case.name}, {contestant.form} form, {contestant.name}"
        raise Wrong(f"{who}: errors {row['errors']}, budgets {row['budgets']}")
    return runner


class Gate:
    """Holds contestants to exact results, computed once per form: some query rows of some heads, of the first and the
    last entry of the batch. The upstream gradient is zero except in the rows that are compared, so that every key's
    gradient is exact as well."""

    def __init__(self, problem: Problem, inputs: list[Tensor], settings: Settings):
        self.problem, self.settings, self.rows = problem, settings, problem.sample()
        self.at = torch.from_numpy(self.rows).to(settings.device)
        self.upstream = torch.zeros_like(inputs[3]).index_copy_(2, self.at, inputs[3][:, :, self.at])
        heads = torch.linspace(0, problem.case.heads - 1, min(problem.case.heads, GATED_HEADS)).long()
        self.heads = heads.to(settings.device)
        self.entries = sorted({0, problem.case.batch - 1})
        self.tensors = [self._compared(x) for x in (*inputs[:3], self.upstream)]
        self.exact: dict[str, dict[str, Tensor]] = {}
        self.budgets: dict[str, dict[str, float]] = {}

    def _compared(self, x: Tensor) -> Tensor:
        return x[self.entries][:, self.heads]

    def expect(self, form: str) -> None:
        """Computes the exact results of a form and how far off a contestant may be, once."""
        if form in self.exact:
            return
        exact = self.problem.exact(form, self.tensors, self.rows)
        budgets = dict.fromkeys(exact, FLOAT32_BUDGET)
        if self.settings.dtype != torch.float32:
            eager = self.problem.exact(form, self.tensors, self.rows, self.settings.dtype)
            rounding = torch.finfo(self.settings.dtype).eps / 2
            budgets = {name: max(EAGER_ERRORS * error(eager[name], exact[name]), rounding) for name in exact}
            if float("inf") in budgets.values():
                raise Wrong(f"plain attention in {self.settings.dtype} is not finite: {budgets}")
        self.exact[form], self.budgets[form] = exact, budgets

    def __call__(self, runner: Runner, memory: Memory) -> dict[str, float]:
        """The errors of output, dq, dk and dv over their largest exact values; notes first_seconds and peak_bytes."""
        attend, form, device = runner.attend, runner.contestant.form, self.settings.device
        leaves, upstream = runner.inputs[:3], self.upstream
        packed = isinstance(attend, Packed)
        upstream = attend.pack(upstream) if packed else upstream
        start = _now(device)
        with torch.set_grad_enabled(not runner.contestant.forward_only), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = attend(*leaves)
            found = [out]
            if not runner.contestant.forward_only:
                found += torch.autograd.grad(out, leaves, upstream)
        runner.row["first_seconds"] = _now(device) - start
        runner.row["peak_bytes"] = memory.peak()
        errors = {}
        for name, value in zip(("out", "dq", "dk", "dv"), found):
            value = self._compared(attend.unpack(value.detach()) if packed else value.detach())
            errors[name] = error(value[:, :, self.at] if name in ("out", "dq") else value, self.exact[form][name])
        return errors


def error(found: Tensor, exact: Tensor) -> float:
    """max |difference| / max |exact| (the difference alone where that is 0), infinite where NaN."""
    value = float((found.double() - exact).abs().max()) / (float(exact.abs().max()) or 1.0)
    return value if value == value else float("inf")


@contextlib.contextmanager
def allocations_mapped(device: str) -> Iterator[None]:
    """On a CPU, every larger tensor is mapped by itself meanwhile, so that freed ones are resident no more. Afterwards
    glibc keeps up to 64 MiB that are freed, and maps only what is larger than 32 MiB: what all are timed with."""
    if device != "cpu":
        yield
        return
    _set_malloc(mapped_from=1 << 20, kept=1 << 17)
    try:
        yield
    finally:
        _set_malloc(mapped_from=1 << 25, kept=1 << 26)


def _set_malloc(mapped_from: int, kept: int) -> None:
    """Bytes from which an allocation is mapped by itself, and freed bytes that are kept; only glibc can."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, mapped_from)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, kept)  # M_TRIM_THRESHOLD
        libc.malloc_trim(0)


class Memory:
    """The most that is held at once between construction and :meth:`peak`, beyond what was there before, in bytes:
    masks and tables, results, what is kept for backward, temporaries.

    On a CPU this is the process's resident memory, to be taken within :func:`allocations_mapped`; None where /proc does
    not tell.
    """

    def __init__(self, device: str):
        self.device = device
        gc.collect()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.before = self._status("VmRSS")
        except OSError:
            self.before = None

    def peak(self) -> int | None:
        if self.device == "cuda":
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - self.before
        return None if self.before is None else max(self._status("VmHWM") - self.before, 0)

    @staticmethod
    def _status(key: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
        raise OSError(f"/proc/self/status has no {key}")


class Reference:
    """Unmasked scaled_dot_product_attention of the case's heads, twice a round: the rate that the device gives.

    Which kernel that is, torch chooses, as for anyone who calls it: on GPUs by versions cuDNN's or FlashAttention's.
    """

    def __init__(self, case: Case, settings: Settings):
        self.case, self.device = case, settings.device
        self.tokens = settings.reference_tokens or REFERENCE_TOKENS[settings.device]
        generator = torch.Generator(self.device).manual_seed(1)
        shape = (1, self.tokens, case.heads, case.head_dim)
        tensors = (torch.randn(shape, generator=generator, device=self.device) for _ in range(4))
        tensors = [x.to(settings.dtype).transpose(1, 2) for x in tensors]
        *self.leaves, self.upstream = [x.requires_grad_(i < 3) for i, x in enumerate(tensors)]
        self.times: list[list[tuple[float, float]]] = []
        self.call()

    def call(self, mark: Callable[[], None] = lambda: None) -> None:
        """Forward and backward, with ``mark`` called after each."""
        out = F.scaled_dot_product_attention(*self.leaves)
        mark()
        torch.autograd.grad(out, self.leaves, self.upstream)
        mark()

    def once(self) -> tuple[float, float]:
        clock = Clock(self.device)
        self.call(clock.mark)
        return tuple(clock.seconds())

    def step(self) -> None:
        self.times.append([self.once(), self.once()])

    @property
    def flops(self) -> int:
        """Forward; backward takes 2.5 times as many."""
        return 4 * self.case.head_dim * self.case.heads * self.tokens**2

    def seconds(self, part: str) -> np.ndarray:
        """[rounds, 2] of "forward", "backward" or "step"."""
        times = np.array(self.times)
        return times.sum(-1) if part == "step" else times[..., ("forward", "backward").index(part)]

    def row(self) -> dict:
        step = self.seconds("step")
        row = {f"{part}_seconds": measure.quantiles(self.seconds(part)) for part in ("forward", "backward", "step")}
        row |= {"reference_tokens": self.tokens, "step_tflops": 3.5 * self.flops / float(np.median(step)) / 1e12}
        # the same thing twice: 0.05 says that one in ten pairs differs by more than 5 %
        return row | {"noise": float(np.quantile(np.abs(np.log(step[:, 0] / step[:, 1])), 0.9))}


def name_kernels(references: list[tuple[Case, dict]], settings: Settings) -> None:
    """Notes in the reference's rows, as "kernels", what runs in a call of it. To be called when all is timed: launches
    may stay slower after a profile (https://github.com/pytorch/pytorch/issues/144455)."""
    found: dict[tuple[int, int], list[str]] = {}
    for case, row in references:
        shape = case.heads, case.head_dim
        if shape not in found:
            try:
                found[shape] = kernels(Reference(case, settings).call, settings.device)
            except Exception as cause:
                found[shape] = [f"not known: {_told(cause)}"]
        row["kernels"] = found[shape]


def kernels(call: Callable[[], None], device: str) -> list[str]:
    """The kernels (on a CPU: operators) that take at least 5 % of the time of a call, the slowest first."""
    on_device = device == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_device else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as recorded:
        call()
        _now(device)
    times = Counter()
    for event in recorded.events():
        if not on_device:
            times[event.name] += event.self_cpu_time_total
        elif event.device_type.name == "CUDA":
            times[event.name] += event.time_range.elapsed_us()
    return [name for name, spent in times.most_common() if spent >= 0.05 * times.total()]


def _take_turns(runners: list[Runner], reference: Reference, settings: Settings) -> None:
    """As many rounds as fit ``settings.seconds``, within ``settings.rounds``, after the first one in
    :func:`measure.turns`. Steps that take too long, and those that are not CLOSE to ours, are in the first one only,
    unless all fit; the others have the seconds for themselves then. As many seconds again are for those NEAR."""
    start = time.perf_counter()
    for runner in runners:
        runner.step(settings.device)
    reference.step()
    seconds = time.perf_counter() - start
    rounds = int(np.clip(settings.seconds / seconds, *settings.rounds))
    if rounds * seconds > settings.seconds:
        ours = {runner.contestant.form: runner for runner in runners if runner.contestant.name == "ours"}
        most = LONG_SECONDS if settings.long else REPEATED_SECONDS
        runners = [runner for runner in runners if _worth_repeating(runner, ours.get(runner.contestant.form), most)]
        seconds = max(sum(runner.seconds for runner in runners), 1e-9)
        rounds = int(np.clip(settings.seconds / seconds, *settings.rounds))
    _rounds(runners, reference, rounds - 1, settings.device)
    near = _near(runners)
    if near:
        seconds = max(sum(runner.seconds for runner in near) / rounds, 1e-9)
        wanted = np.clip(rounds + int(settings.seconds / seconds), NEAR_ROUNDS, settings.rounds[1])
        # everyone after the same: after a like call the inputs are in the caches, a fifth of a small forward
        _rounds(near, reference, int(wanted) - rounds, settings.device, reference.call)


def _rounds(
    runners: list[Runner], reference: Reference, count: int, device: str, before: Callable[[], None] = lambda: None
) -> None:
    for turn in measure.turns(runners, count):
        for runner in turn:
            before()
            runner.step(device)
        reference.step()


def _near(runners: list[Runner]) -> list[Runner]:
    """Those within NEAR of ours of their form, and ours."""
    ours, found = {runner.contestant.form: runner for runner in runners if runner.contestant.name == "ours"}, []
    for runner in runners:
        own, part = ours.get(runner.contestant.form), "forward" if runner.contestant.forward_only else "step"
        if own is not None and runner is not own:
            ratio = np.median(runner.times(part)) / np.median(own.times(part))
            if 1 / NEAR <= ratio <= NEAR:
                found += [own] * (own not in found) + [runner]
    return found


def _worth_repeating(runner: Runner, ours: Runner | None, most: float) -> bool:
    if ours is None or max(runner.seconds, ours.seconds) > most:
        return ours is None and runner.seconds <= most
    part = "forward" if runner.contestant.forward_only else "step"
    return runner.times(part).sum() <= CLOSE * ours.times(part).sum()


def _finish(runners: list[Runner], reference: Reference, problem: Problem) -> None:
    """Times, rates and ratios into the rows."""
    ours = {r.contestant.form: r for r in runners if r.contestant.name == "ours"}
    for runner in runners:
        row, case = runner.row, problem.case
        table = problem.plan(runner.contestant.form).table
        batch_heads = case.batch * case.heads
        flops = {"forward": table.flops(case.head_dim, batch_heads)}
        if not runner.contestant.forward_only:
            flops["backward"] = table.flops(case.head_dim, batch_heads, backward=True)
            flops["step"] = flops["forward"] + flops["backward"]
        rounds = len(runner.forward)
        row |= {"rounds": rounds, "pairs": table.pairs, "density": table.pairs / problem.tokens**2}
        own = ours.get(runner.contestant.form)
        for part in flops:
            seconds = runner.times(part)
            row[f"{part}_seconds"] = measure.quantiles(seconds)
            row[f"{part}_tflops"] = flops[part] / float(np.median(seconds)) / 1e12
            # paired, round by round: the rate of the reference in this very round
            factor = 1.0 if part == "forward" else 2.5 if part == "backward" else 3.5
            rate = factor * reference.flops / reference.seconds(part)[:rounds].mean(1)
            row[f"{part}_roofline"] = measure.quantiles(flops[part] / seconds / rate)
            if own is not None and runner is not own:
                both = min(rounds, len(own.forward))
                row[f"{part}_ratio"] = measure.quantiles(seconds[:both] / own.times(part)[:both])


def _count_tensors(runners: list[Runner], settings: Settings) -> None:
    """Notes in the rows of ours what a step's tensors hold on a CPU, where one more step is COUNTED_SECONDS at most."""
    for runner in runners:
        if settings.device == "cpu" and runner.contestant.name == "ours" and runner.times("step")[0] <= COUNTED_SECONDS:
            runner.row["tensor_bytes"] = measure.tensor_bytes(lambda runner=runner: runner.step(settings.device))


def faults(rows: list[dict]) -> list[str]:
    """Of rows, those of ours that failed, in words."""
    failed = (row for row in rows if row["contestant"] == "ours" and "failed" in row)
    return [f"{row['case']}, {row['form']} form: {row['failed']}" for row in failed]


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
