"""How everything is measured: a gate, then rounds in which all providers take turns; and rows of results.

Before a provider is timed, its output and all of its gradients are held to float64. Forward and backward are timed
apart. Memory is what tensors hold at once, masks and tables included, from building a provider to the end of its first
call: on a CPU as torch's profiler counts them, on a GPU as the allocator does.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import shlex
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
BUDGET = 1e-5
"""The largest error of float32, over the largest exact value."""
FLOOR = 1e-3
"""The least scale of a gradient's error, as a share of the largest gradient: some cancel to nothing."""
REPEATED_SECONDS, LONG_SECONDS, CLOSE = 3.0, 15.0, 2.0
"""Steps that take longer (the second in long runs), or so many times as long as ``ours``, are taken once: no ties."""
NO_TIME = "no time was left"
T = TypeVar("T")


class Wrong(Exception):
    """A result is not what it must be: there is nothing to time."""


class Unavailable(Exception):
    """The provider cannot run this case here; the text says why."""


@dataclass
class Settings:
    """How a run is made."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    seconds: float = 4.0  # of timed rounds per case
    rounds: tuple[int, int] = (3, 31)  # the least and the most of them
    backend: str = "auto"
    reference_tokens: int | None = None
    only: Sequence[str] = ()  # the providers that are timed, () for all
    forms: Sequence[str] = ("joint", "edge")
    long: bool = False  # what other runs leave out, alone
    deadline: float = math.inf  # of time.perf_counter: then only ``ours`` is timed, and no case begun
    environment: dict = field(default_factory=dict)  # what every row says of the machine


@dataclass(eq=False)
class Run:
    """A provider that is built."""

    call: Callable[..., Tensor]
    inputs: Sequence[Tensor]
    leaves: dict[str, Tensor]  # whose gradients are asked for; {} where there is no backward
    upstream: Tensor | None = None  # the gradient of the output
    pack: Callable[[Tensor], Tensor] = lambda x: x  # from canvas order into the provider's
    unpack: Callable[[Tensor], Tensor] = lambda x: x  # and back
    times: list[list[float]] = field(default_factory=list)  # seconds of forward and backward, of each round

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
        """Time one round: on a GPU by its own clock, on a CPU in seconds of the process where it has one thread."""
        on_gpu = device == "cuda"
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        marks = []

        def mark() -> None:
            marks.append(torch.cuda.Event(enable_timing=True) if on_gpu else clock())
            if on_gpu:
                marks[-1].record()

        if on_gpu:
            torch.cuda._sleep(2_000_000)  # about 1 ms in which the host gets ahead: kernels are timed, not launches
        mark()
        self.results(mark=mark)
        if on_gpu:
            torch.cuda.synchronize()
        spans = itertools.pairwise(marks)
        self.times.append([1e-3 * a.elapsed_time(b) if on_gpu else b - a for a, b in spans])

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
    """A case made concrete: who computes it, and what holds them to it."""

    providers: list[Provider]  # ``ours`` first in each form
    exact: Callable[[str], dict[str, Tensor]]  # form → exact results by name
    facts: dict = field(default_factory=dict)  # what its rows say
    of_form: Callable[[str], dict] = lambda form: {}  # and those of a form
    select: Callable[[str, Tensor], Tensor] = lambda name, x: x  # the part of a result that is compared
    budgets: Callable[[str, dict], dict[str, float]] = lambda form, exact: dict.fromkeys(exact, BUDGET)
    upstream: Tensor | None = None  # the output's gradient in the call that is compared; a run's own without
    reference: Run | None = None  # timed twice a round

    def check(self, run: Run, results: dict[str, Tensor], exact: dict[str, Tensor], budgets: dict[str, float]) -> dict:
        """The errors and budgets of a provider's first results. Raises Wrong where one is too large or missing."""
        largest = max((float(x.abs().max()) for name, x in exact.items() if name != "out"), default=0.0)
        results = {name: self.select(name, run.unpack(x)) for name, x in results.items() if name in exact}
        exact = {name: x for name, x in exact.items() if name == "out" or name in run.leaves}
        # a key bias shifts every score of a row alike: its gradient is zero, and its weight's gives the scale
        scales = {name: float(exact[name.replace("k_proj.bias", "k_proj.weight")].abs().max()) for name in exact}
        scales |= {name: max(scale, FLOOR * largest) for name, scale in scales.items() if name != "out"}
        checked = compare(results, exact, budgets, scales)
        if faults := checked.pop("faults"):
            raise Wrong(f"differs from float64: {', '.join(faults)}")
        return checked


def error(value: Tensor, exact: Tensor, scale: float | None = None) -> float:
    """max |difference| / ``scale``, by default max |exact| (1 where that is 0); infinite where NaN."""
    scale = (float(exact.abs().max()) if scale is None else scale) or 1.0
    result = float((value.double() - exact).abs().max()) / scale
    return math.inf if math.isnan(result) else result


def compare(results: dict[str, Tensor], exact: dict[str, Tensor], budgets: dict[str, float], scales=None) -> dict:
    """The "errors" of results by name, their "budgets", and "faults": what exceeds them, or is missing, in words."""
    errors = {n: error(results[n], exact[n], (scales or {}).get(n)) if n in results else math.inf for n in exact}
    faults = [f"{n}: error {off:.2e} over {budgets[n]:.2e}" for n, off in errors.items() if not off <= budgets[n]]
    return {"errors": errors, "budgets": {name: budgets[name] for name in errors}, "faults": faults}


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


def time_contest(contest: Contest, described: dict, settings: Settings, without: dict[str, str]) -> list[dict]:
    """A row for each provider of a case, gated and timed, and one of the reference; who cannot run, fails or is wrong
    is a row that says why. ``described`` is what every row says, ``without`` why providers are left out."""
    described = described | contest.facts
    runs, rows, known = {}, [], {}
    for provider in contest.providers:
        form, name, _ = provider
        row = described | {"form": form, "provider": name}
        rows.append(row)
        late = name != "ours" and time.perf_counter() > settings.deadline
        if name in without or late:
            row["skipped"] = without.get(name, NO_TIME)
            continue
        try:
            if form not in known:
                exact = contest.exact(form)
                known[form] = exact, contest.budgets(form, exact)
            runs[form, name] = _prepare(provider, contest, known[form], settings.device, row)
        except Unavailable as cause:
            row["skipped"] = str(cause)
        except Exception as cause:  # out of memory, say: the next one may well run
            row["failed"] = told(cause)
    known.clear()
    take_turns(runs, contest.reference, settings)
    for row in rows:
        run, own = (runs.get((row["form"], name)) for name in (row["provider"], "ours"))
        if run:
            row |= contest.of_form(row["form"])
            row |= timings(run, own, contest.reference, row)
    if contest.reference:
        rows.append(described | {"form": "reference", "provider": "sdpa_unmasked"})
        rows[-1] |= _reference_line(contest.reference, described)
    return rows


def _prepare(provider: Provider, contest: Contest, known: tuple[dict, dict], device: str, row: dict) -> Run:
    """Build a provider and make its first call under the gate, measuring both. Raises Unavailable or Wrong."""
    run, results = None, {}

    def first() -> None:
        nonlocal run, results
        run = provider.build()
        results = run.results(None if contest.upstream is None else run.pack(contest.upstream))

    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row["peak_bytes"] = peak_bytes(first, device)
    row["first_seconds"] = time.perf_counter() - start
    row |= contest.check(run, results, *known)
    return run


def turns(providers: Sequence[T], rounds: int) -> Iterator[list[T]]:
    """The providers of each round, in another order each, drawn once and for ever: whoever came before has filled the
    caches, and rotating alone would leave that one the same in most rounds."""
    generator = np.random.default_rng(0)
    yield from ([providers[i] for i in generator.permutation(len(providers))] for _ in range(rounds))


def take_turns(runs: dict[tuple[str, str], Run], reference: Run | None, settings: Settings) -> None:
    """Take a round of all runs, by (form, name); then as many as fit ``settings.seconds``, within ``settings.rounds``,
    of all if these fit, else of those whose steps are short and CLOSE to those of ``ours``."""

    def take(turn: list[Run], before: Callable[[], object]) -> None:
        for run in turn:
            before()
            run.step(settings.device)
        for run in (reference, reference) if reference else ():
            run.step(settings.device)

    def is_worth_repeating(form: str, run: Run) -> bool:
        own, part = runs.get((form, "ours"), run), run.parts[-1]
        longest = max(sum(run.times[0]), sum(own.times[0]))
        is_close = run.seconds(part)[0] <= CLOSE * own.seconds(part)[0]
        return is_close and longest <= (LONG_SECONDS if settings.long else REPEATED_SECONDS)

    start = time.perf_counter()
    take([*runs.values()], lambda: None)
    seconds, repeated = time.perf_counter() - start, [*runs.values()]
    if seconds * settings.rounds[0] > settings.seconds:
        repeated = [run for (form, _), run in runs.items() if is_worth_repeating(form, run)]
        seconds = sum(sum(run.times[0]) for run in repeated)
    rounds = int(np.clip(settings.seconds / max(seconds, 1e-9), *settings.rounds))
    # everyone after the same: after a like call the inputs are in the caches, a fifth of a small forward
    before = reference.results if reference and settings.device == "cpu" else lambda: None
    for turn in turns(repeated, rounds - 1):
        take(turn, before)


def timings(run: Run, own: Run | None, reference: Run | None, facts: dict) -> dict:
    """Times, rates and ratios to ``own``, the run of "ours", of a row; paired round by round."""
    rounds = len(run.times)
    row = {"rounds": rounds}
    for part in run.parts:
        seconds = run.seconds(part)
        row[f"{part}_seconds"] = quantiles(seconds)
        if reference:
            flop = _flop(part, facts, facts["pairs"] * facts["batch"])
            unmasked = _flop(part, facts, facts["reference_tokens"] ** 2)
            rate = unmasked / reference.seconds(part).reshape(-1, 2)[:rounds].mean(1)
            row[f"{part}_tflops"] = flop / float(np.median(seconds)) / 1e12
            row[f"{part}_roofline"] = quantiles(flop / seconds / rate)
        if own not in (None, run):
            both = min(rounds, len(own.times))
            row[f"{part}_ratio"] = quantiles(seconds[:both] / own.seconds(part)[:both])
    return row


def _reference_line(run: Run, facts: dict) -> dict:
    """What the reference's row says. Noise is by how much two like calls differ in nine of ten rounds: 0.05 is 5 %."""
    row = {f"{part}_seconds": quantiles(run.seconds(part)) for part in run.parts}
    pairs = np.log(run.seconds("step")).reshape(-1, 2)
    row["step_tflops"] = _flop("step", facts, facts["reference_tokens"] ** 2) / row["step_seconds"]["p50"] / 1e12
    return row | {"noise": float(np.quantile(np.abs(pairs[:, 0] - pairs[:, 1]), 0.9))}


def _flop(part: str, facts: dict, pairs: int) -> int:
    return {"forward": 4, "backward": 10, "step": 14}[part] * pairs * facts["head_dim"] * facts["heads"]


def quantiles(values: np.ndarray) -> dict[str, float]:
    """The quantiles that rows hold, keyed "p10" to "p90"."""
    return {f"p{percent}": float(np.quantile(values, percent / 100)) for percent in (10, 25, 50, 75, 90)}


def told(cause: Exception) -> str:
    """An exception in one line of a row."""
    return f"{type(cause).__name__}: {str(cause).strip()[:300]}"


def commit_of(root: Path) -> str:
    """The short hash of HEAD, with "+" where tracked files differ other than what benchmarks write, or "unknown"."""
    others = (f":(exclude){path}" for path in WRITTEN)
    changed = _output_of("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no", "--", ".", *others)
    return (_output_of("git", "-C", str(root), "rev-parse", "--short", "HEAD") or "unknown") + "+" * bool(changed)


def _output_of(*command: str) -> str:
    """What a command prints; "" where it fails or is missing."""
    status, text = subprocess.getstatusoutput(f"{shlex.join(command)} 2>/dev/null")
    return "" if status else text.strip()


def environment(device: str = "cpu") -> dict[str, str | int]:
    """Device, versions and commit of a row; on a GPU also its driver and the versions of what providers stand on."""
    named = re.search(r"model name\s*:\s*(.*)", _output_of("cat", "/proc/cpuinfo"))
    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else named[1] if named else platform.machine(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
        "commit": commit_of(ROOT),
    }
    if device == "cuda":
        driver = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        versions = {dist.name: dist.version for dist in importlib.metadata.distributions()}
        result |= {"driver": driver.split("\n")[0]}
        result |= {name: versions[name] for name in ("triton", "flash-attn-4") if name in versions}
    return result


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
