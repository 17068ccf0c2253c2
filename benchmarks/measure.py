"""How everything is measured: a gate, then rounds in which all providers take turns; and rows of results.

Before a provider is timed, its output and all of its gradients are held to float64. Forward and backward are timed
apart. Memory is what tensors hold at once, masks and tables included, from building a provider to the end of its first
call: on a CPU as torch's profiler counts them, on a GPU as the allocator does.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import json
import os
import platform
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from canvas_engineering.files import replace_file

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
WRITTEN = ("benchmarks/results", "docs", "README.md")
"""What benchmarks write into the tree, which is no other code."""
ON_GPUS = ("triton", "flash-attn-4")
BUDGET = 1e-5
"""The largest error of float32, over the largest exact value."""
FLOOR = 1e-3
"""The least scale of a gradient's error, as a share of the largest gradient: some cancel to nothing."""
REPEATED_SECONDS, LONG_SECONDS, CLOSE = 3.0, 15.0, 2.0
"""Steps that take longer (the second in long runs), or so many times as long as ours, are taken once: no ties."""
NO_TIME = "no time was left"
T = TypeVar("T")


class Wrong(Exception):
    """A result is not what it must be: there is nothing to time."""


class Unavailable(Exception):
    """The provider cannot run this case here; the text says why."""


@dataclass
class Settings:
    """How a run is made: ``seconds`` of timed rounds per case, within so many ``rounds``; ``only`` these providers and
    ``forms``, () for all; ``long``, those alone that other runs leave out; after ``deadline`` (``time.perf_counter``)
    others than ours are skipped and cases not begun; ``environment`` is what every row says of the machine."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    seconds: float = 4.0
    rounds: tuple[int, int] = (3, 31)
    backend: str = "auto"
    reference_tokens: int | None = None
    only: Sequence[str] = ()
    forms: Sequence[str] = ()
    long: bool = False
    deadline: float = float("inf")
    environment: dict = field(default_factory=dict)


@dataclass(eq=False)
class Run:
    """A provider that is built: ``call`` gives the output of ``inputs``, whose gradient is ``upstream``; ``leaves`` are
    the tensors whose gradients are asked for, by name, {} where there is no backward; ``pack`` and ``unpack`` bring a
    result from canvas order into the provider's, and back."""

    call: Callable[..., Tensor]
    inputs: Sequence[Tensor]
    leaves: dict[str, Tensor]
    upstream: Tensor | None = None
    pack: Callable[[Tensor], Tensor] = lambda x: x
    unpack: Callable[[Tensor], Tensor] = lambda x: x
    times: list[list[float]] = field(default_factory=list)

    def results(self, upstream: Tensor | None = None, mark: Callable[[], None] = lambda: None) -> dict[str, Tensor]:
        """The output and the gradients by name, ``mark`` called after the forward and after the backward."""
        with torch.set_grad_enabled(bool(self.leaves)):
            out, gradients = self.call(*self.inputs), ()
            mark()
            if self.leaves:
                upstream = self.upstream if upstream is None else upstream
                gradients = torch.autograd.grad(out, [*self.leaves.values()], upstream, allow_unused=True)
                mark()
        return {"out": out.detach()} | {name: x for name, x in zip(self.leaves, gradients) if x is not None}

    def step(self, device: str = "cpu") -> None:
        """Time one round: a forward, and the backward where there is one."""
        clock = Clock(device)
        self.results(mark=clock.mark)
        self.times.append(clock.seconds())

    def seconds(self, part: str) -> np.ndarray:
        """Seconds of each round's "forward", "backward" or "step"."""
        times = np.array(self.times)
        return times.sum(1) if part == "step" else times[:, ("forward", "backward").index(part)]

    @property
    def parts(self) -> tuple[str, ...]:
        """What of it is timed; the last is what it is judged by."""
        return ("forward", "backward", "step") if self.leaves else ("forward",)


class Provider(NamedTuple):
    """Who is timed: a name within a form, and what builds it; :class:`Unavailable` says why it cannot."""

    form: str
    name: str
    build: Callable[[], Run]


@dataclass
class Contest:
    """A case made concrete: who computes it, and what holds them to it.

    Attributes:
        providers: ours first in each form.
        exact: form → exact results by name.
        facts, of_form: what its rows say, and those of a form.
        select: name, result → the rows of it that are compared.
        budgets: form, exact results → the largest error by name.
        upstream: the gradient of the output in the call that is compared; a run's own without.
        reference, reference_flops: timed twice a round; operations of its forward.
        flops: form → floating-point operations of "forward", "backward" and "step".
    """

    providers: list[Provider]
    exact: Callable[[str], dict[str, Tensor]]
    facts: dict = field(default_factory=dict)
    of_form: Callable[[str], dict] = lambda form: {}
    select: Callable[[str, Tensor], Tensor] = lambda name, x: x
    budgets: Callable[[str, dict], dict[str, float]] = lambda form, exact: dict.fromkeys(exact, BUDGET)
    upstream: Tensor | None = None
    reference: Run | None = None
    reference_flops: int = 0
    flops: Callable[[str], dict[str, int]] = lambda form: {}
    known: dict[str, tuple[dict, dict]] = field(default_factory=dict)

    def check(self, provider: Provider, run: Run, results: dict[str, Tensor]) -> dict:
        """The errors and budgets of a provider's first results. Raises Wrong where one is too large or missing."""
        exact, budgets = self.known[provider.form]
        largest = max((float(x.abs().max()) for name, x in exact.items() if name != "out"), default=0.0)
        errors = {}
        for name in (name for name in exact if name == "out" or name in run.leaves):
            # a key bias shifts every score of a row alike: its gradient is zero, and its weight's gives the scale
            scale = float(exact[name.replace("k_proj.bias", "k_proj.weight")].abs().max())
            scale = scale if name == "out" else max(scale, FLOOR * largest)
            value = self.select(name, run.unpack(results[name])) if name in results else torch.tensor(torch.nan)
            errors[name] = error(value, exact[name], scale)
        wrong = {name: value for name, value in errors.items() if not value <= budgets[name]}
        if wrong:
            raise Wrong(f"{provider.name} differs from the {provider.form} form in float64: {wrong}")
        return {"errors": errors, "budgets": budgets}

    def expect(self, form: str) -> None:
        """Compute the exact results of a form, and the errors that they allow, once."""
        if form not in self.known:
            exact = self.exact(form)
            self.known[form] = exact, self.budgets(form, exact)


def error(value: Tensor, exact: Tensor, scale: float | None = None) -> float:
    """max |difference| / ``scale``, by default max |exact| (1 where that is 0); infinite where NaN."""
    scale = float(exact.abs().max()) if scale is None else scale
    result = float((value.double() - exact).abs().max()) / (scale or 1.0)
    return result if result == result else float("inf")


class Clock:
    """Seconds between construction and marks: on a GPU the device's, on a CPU those of the process where it has one
    thread, for other processes do not count then."""

    def __init__(self, device: str):
        self.on_device, self.marks = device == "cuda", []
        self.now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        if self.on_device:
            torch.cuda._sleep(2_000_000)  # about 1 ms in which the host gets ahead: kernels are timed, not launches
        self.mark()

    def mark(self) -> None:
        self.marks.append(torch.cuda.Event(enable_timing=True) if self.on_device else self.now())
        if self.on_device:
            self.marks[-1].record()

    def seconds(self) -> list[float]:
        if self.on_device:
            torch.cuda.synchronize()
            return [1e-3 * a.elapsed_time(b) for a, b in zip(self.marks, self.marks[1:])]
        return np.diff(self.marks).tolist()


def keep_pages() -> None:
    """Make glibc keep what is freed for the next call: half the time of a large cheap operation can be fresh pages."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 26)  # M_TRIM_THRESHOLD


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """The most bytes that tensors made in a call hold at once. On a CPU it repeats to the byte."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(held.max(initial=0))


def free_bytes(meminfo: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> int:
    """The bytes that this process may still take: of the system, or of its control group's limit where that is less."""
    try:
        kilobytes = dict(line.split(":") for line in meminfo.read_text().splitlines())["MemAvailable"]
        free = int(kilobytes.split()[0]) * 1024
    except (OSError, KeyError):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no such group, or its limit is "max"
        limit, held = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # files that the system keeps while nobody wants the room count as held
        free = min(free, max(limit - held + int(stat.get("inactive_file", 0)), 0))
    return free


def time_contest(contest: Contest, described: dict, settings: Settings, without: dict[str, str]) -> list[dict]:
    """A row for each provider of a case, gated and timed, and one of the reference; who cannot run, fails or is wrong
    is a row that says why. ``described`` is what every row says, ``without`` why providers are left out."""
    described = described | contest.facts
    runs, rows = {}, []
    for provider in contest.providers:
        row = described | {"form": provider.form, "provider": provider.name}
        rows.append(row)
        if provider.name in without:
            row["skipped"] = without[provider.name]
        elif provider.name != "ours" and time.perf_counter() > settings.deadline:
            row["skipped"] = NO_TIME
        else:
            try:
                runs[provider[:2]] = prepare(provider, contest, settings.device, row)
            except Unavailable as cause:
                row["skipped"] = str(cause)
            except Exception as cause:  # out of memory, say: the next one may well run
                row["failed"] = told(cause)
    contest.known.clear()
    take_turns(runs, contest.reference, settings)
    for row in rows:
        run, own = (runs.get((row["form"], name)) for name in (row["provider"], "ours"))
        if run:
            row |= contest.of_form(row["form"]) | timings(run, own, contest, contest.flops(row["form"]))
    if contest.reference:
        rows.append(described | {"form": "reference", "provider": "sdpa_unmasked"} | reference_line(contest))
    return rows


def prepare(provider: Provider, contest: Contest, device: str, row: dict) -> Run:
    """Build a provider and make its first call under the gate, measuring both. Raises Unavailable or Wrong."""
    contest.expect(provider.form)
    run, results, times = None, {}, []

    def first() -> None:
        nonlocal run, results
        times.append(_now(device))
        run = provider.build()
        times.append(_now(device))
        results = run.results(None if contest.upstream is None else run.pack(contest.upstream))
        times.append(_now(device))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row["peak_bytes"] = peak_bytes(first, device)
    row["setup_seconds"], row["first_seconds"] = np.diff(times).tolist()
    row |= contest.check(provider, run, results)
    return run


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def turns(providers: Sequence[T], rounds: int) -> Iterator[list[T]]:
    """The providers of each round, in another order each, drawn once and for ever: whoever came before has filled the
    caches, and rotating alone would leave that one the same in most rounds."""
    generator = np.random.default_rng(0)
    for _ in range(rounds):
        yield [providers[i] for i in generator.permutation(len(providers))]


def take_turns(runs: dict[tuple[str, str], Run], reference: Run | None, settings: Settings) -> None:
    """Take a round of all runs, by (form, name); then as many as fit ``settings.seconds``, within ``settings.rounds``,
    of all if these fit, else of those whose steps are short and CLOSE to ours."""
    start = time.perf_counter()
    _round([*runs.values()], reference, settings.device)
    seconds = time.perf_counter() - start
    if seconds * settings.rounds[0] > settings.seconds:
        runs = {who: run for who, run in runs.items() if _is_worth_repeating(run, runs.get((who[0], "ours")), settings)}
        seconds = sum(sum(run.times[0]) for run in runs.values())
    rounds = int(np.clip(settings.seconds / max(seconds, 1e-9), *settings.rounds))
    # everyone after the same: after a like call the inputs are in the caches, a fifth of a small forward
    before = reference.results if reference and settings.device == "cpu" else lambda: None
    for turn in turns([*runs.values()], rounds - 1):
        _round(turn, reference, settings.device, before)


def _round(turn: list[Run], reference: Run | None, device: str, before: Callable[[], object] = lambda: None) -> None:
    for run in turn:
        before()
        run.step(device)
    for run in (reference, reference) if reference else ():
        run.step(device)


def _is_worth_repeating(run: Run, own: Run | None, settings: Settings) -> bool:
    own, part = own or run, run.parts[-1]
    longest = max(sum(run.times[0]), sum(own.times[0]))
    is_close = run.seconds(part)[0] <= CLOSE * own.seconds(part)[0]
    return is_close and longest <= (LONG_SECONDS if settings.long else REPEATED_SECONDS)


def timings(run: Run, own: Run | None, contest: Contest, flops: dict[str, int]) -> dict:
    """Times, rates and ratios to ours of a row."""
    rounds = len(run.times)
    row = {"rounds": rounds}
    for part in run.parts:
        seconds = run.seconds(part)
        row[f"{part}_seconds"] = quantiles(seconds)
        if contest.reference:
            # paired, round by round: the rate of the reference in this very round
            factor = {"forward": 1.0, "backward": 2.5, "step": 3.5}[part] * contest.reference_flops
            rate = factor / contest.reference.seconds(part).reshape(-1, 2)[:rounds].mean(1)
            row[f"{part}_tflops"] = flops[part] / float(np.median(seconds)) / 1e12
            row[f"{part}_roofline"] = quantiles(flops[part] / seconds / rate)
        if own not in (None, run):
            both = min(rounds, len(own.times))
            row[f"{part}_ratio"] = quantiles(seconds[:both] / own.seconds(part)[:both])
    return row


def reference_line(contest: Contest) -> dict:
    """What the reference's row says. Noise is by how much two like calls differ in nine of ten rounds: 0.05 is 5 %."""
    run = contest.reference
    row = {f"{part}_seconds": quantiles(run.seconds(part)) for part in run.parts}
    pairs = np.log(run.seconds("step")).reshape(-1, 2)
    row["step_tflops"] = 3.5 * contest.reference_flops / row["step_seconds"]["p50"] / 1e12
    return row | {"noise": float(np.quantile(np.abs(pairs[:, 0] - pairs[:, 1]), 0.9))}


def quantiles(values: np.ndarray) -> dict[str, float]:
    """The quantiles that rows hold, keyed "p10" to "p90"."""
    return {f"p{percent}": float(np.quantile(values, percent / 100)) for percent in (10, 25, 50, 75, 90)}


def told(cause: Exception) -> str:
    """An exception in one line of a row."""
    return f"{type(cause).__name__}: {str(cause).strip()[:300]}"


def faults(rows: list[dict]) -> list[str]:
    """What failed of ours, a line each."""
    failed = (row for row in rows if row["provider"] == "ours" and "failed" in row)
    return [f"{row['case']}, {row['form']} form: {row['failed']}" for row in failed]


def output_of(*command: str) -> str:
    """What a command prints; "" where it fails or is missing."""
    with contextlib.suppress(FileNotFoundError):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""
    return ""


def commit_of(root: Path) -> str:
    """The short hash of HEAD, with "+" where tracked files differ other than what benchmarks write, or "unknown"."""
    others = (f":(exclude){path}" for path in WRITTEN)
    changed = output_of("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no", "--", ".", *others)
    return (output_of("git", "-C", str(root), "rev-parse", "--short", "HEAD") or "unknown") + "+" * bool(changed)


def environment(device: str = "cpu") -> dict[str, str | int]:
    """Device, versions and commit of a row; on a GPU also its driver and the versions of what providers stand on."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")]
    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else (*names, platform.machine())[0],
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
        "commit": commit_of(ROOT),
    }
    if device == "cuda":
        result["driver"] = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
        for name in ON_GPUS:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                result[name] = importlib.metadata.version(name)
    return result


def check_folder(folder: Path) -> None:
    """Raise ValueError where no file can be made in a folder, which need not be there: before hours of measuring."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        raise ValueError(f"nothing can be written into {folder}: {nearest} is no folder that we may write into")


def write_rows(rows: list[dict], path: Path) -> None:
    """Write one JSON object per line, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def read_rows(path: Path) -> list[dict]:
    """Return what :func:`write_rows` wrote. Raises ValueError where the file holds something else."""
    rows = []
    try:
        for line in path.read_text().splitlines():
            rows.append(dict(json.loads(line)))
    except (ValueError, TypeError) as cause:  # no text, no JSON, or no object
        raise ValueError(f"{path}, line {len(rows) + 1} is no row: {cause}") from cause
    return rows
