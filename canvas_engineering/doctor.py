"""Reports what this machine can run: versions, devices, extras, and every backend's numbers against float64.

``python -m canvas_engineering doctor`` prints it. It needs nothing but the package itself, for it says what is missing.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import math
import os
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from canvas_engineering.attention import canvas_attention
from canvas_engineering.canvas import CanvasLayout, RegionSpec
from canvas_engineering.connectivity import CanvasTopology, Connection
from canvas_engineering.plan import NORMALIZE, compile_attention
from canvas_engineering.version import __version__

__all__ = ["Check", "check_numbers", "doctor"]

PACKAGE = "canvas-engineering"
HEADS, HEAD_DIM = 2, 16
# Largest error of outputs and gradients over the largest value: docs/semantics.md, section 7; half precision rounds its
# inputs and its results, to one part in 256 and in 2048.
LIMITS = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Check:
    """One run of tiny attention, forward and backward.

    Attributes:
        backend: of :func:`canvas_attention`: "reference", "torch" or "triton".
        device: where it ran; "interpreter" for Triton's kernels on a CPU.
        dtype: of queries, keys and values.
        form: "edge" or "joint".
        error: largest difference from float64 over the largest value, of outputs and of gradients; NaN if it failed.
        failure: what was raised instead; empty if nothing was.
    """

    backend: str
    device: str
    dtype: torch.dtype
    form: str
    error: float
    failure: str = ""

    @property
    def is_right(self) -> bool:
        """Whether the error is within the limit of the dtype."""
        return self.error <= LIMITS[self.dtype]


def _devices() -> list[str]:
    """Returns the devices that torch can put tensors on: "cpu" first, then "cuda:0" and so on, or "mps"."""
    accelerators = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return ["cpu", *accelerators, *["mps"] * torch.backends.mps.is_available()]


def _extras() -> dict[str, list[tuple[str, str, bool]]]:
    """Returns the installed package's extras: (requirement, version that is here or "", whether that suffices) each."""
    try:
        names = importlib.metadata.metadata(PACKAGE).get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:  # run from its source
        return {}
    extras = {}
    for extra in sorted(names):
        extras[extra] = []
        for wanted in dict.fromkeys(_requirements(PACKAGE, extra)):
            name, _, least = wanted.partition(">=")
            version = version_of(name)
            extras[extra].append((wanted, version, bool(version) and _numbers(version) >= _numbers(least)))
    return extras


def _requirements(package: str, extra: str) -> Iterator[str]:
    """Yields the requirements of a package's extra as "name>=version", including those of extras that it names."""
    try:
        listed = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for requirement in listed:
        wanted, _, marker = requirement.replace("'", '"').partition(";")
        if not re.search(rf'extra\s*==\s*"{re.escape(extra)}"', marker):
            continue
        if "python_version" in marker or ("platform_system" in marker and f'"{platform.system()}"' not in marker):
            continue  # for other machines
        parts = re.fullmatch(r"([\w.-]+)\s*(?:\[([^]]*)\])?\s*(.*?)\s*", wanted)
        if parts is None:
            continue  # no requirement that we would write
        name, inner, bounds = parts.groups()
        least = re.search(r">=\s*([\d.]+)", bounds)
        if name != package:
            yield f"{name}>={least[1]}" if least else name
        for other in (inner or "").split(","):
            yield from _requirements(name, other.strip()) if other else ()


def check_numbers() -> Iterator[Check]:
    """Runs every backend on every device that it can run on, in both forms, against float64 on the CPU.

    Yields:
        a Check as soon as it is known; all of them together take seconds. Triton's kernels run on CUDA devices, and
        where there are none in Triton's interpreter.
    """
    devices = _devices()
    cuda = [device for device in devices if device.startswith("cuda")]
    runs = [("reference", "cpu", (torch.float32,)), ("torch", "cpu", (torch.float32, torch.bfloat16))]
    runs += [("torch", device, (torch.float32,)) for device in devices[1:]]
    if importlib.util.find_spec("triton") is not None:
        runs += [("triton", device, tuple(LIMITS)) for device in cuda] or [("triton", "interpreter", (torch.float32,))]
    # Triton looks at it when it is imported, which other backends may do
    with contextlib.nullcontext() if cuda else mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        for backend, device, dtypes in runs:
            for dtype in dtypes:
                for form in NORMALIZE:
                    yield _check(backend, device, dtype, form)


def doctor() -> int:
    """Prints versions, devices, extras and checks. Returns 1 if a number is wrong or a backend fails, else 0."""
    print(f"{PACKAGE} {__version__} in {Path(__file__).parent}")
    print(f"Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    print(", ".join(f"{name} {version_of(name) or 'missing'}" for name in ("torch", "triton", "numpy", "einops")))
    print("\ndevices")
    for device in _devices():
        name = torch.cuda.get_device_name(device) if device.startswith("cuda") else ""
        print(f"  {device:<10} {name or f'{torch.get_num_threads()} threads' * (device == 'cpu')}".rstrip())
    print("\nextras")
    _print_extras()
    print("\nbackends: tiny attention, forward and backward; largest error over the largest value of float64")
    wrong = 0
    for check in check_numbers():
        wrong += not check.is_right
        verdict = "right" if check.is_right else f"WRONG: {check.failure or f'at most {LIMITS[check.dtype]:.0e}'}"
        what = f"{check.backend:<9} {check.device:<11} {str(check.dtype)[6:]:<8} {check.form:<5}"
        print(f"  {what} {check.error:8.1e}  {verdict}", flush=True)
    if importlib.util.find_spec("triton") is None:
        print("  triton    is not installed: GPUs would run the torch backend")
    elif not torch.cuda.is_available():
        print("  torch sees no CUDA device: Triton's kernels ran in its interpreter, and no GPU was checked")
    print(f"\n{wrong} wrong" if wrong else "\nall right")
    return int(wrong > 0)


def _print_extras() -> None:
    extras = _extras()
    if not extras:
        print("  not installed, run from its source: what is needed is in pyproject.toml")
    for extra, packages in extras.items():
        lacking = ", ".join(
            f"{wanted} (not {here})" if here else wanted for wanted, here, enough in packages if not enough
        )
        here = ", ".join(f"{wanted.partition('>=')[0]} {version}" for wanted, version, _ in packages)
        words = f"lacks {lacking}: pip install '{PACKAGE}[{extra}]'" if lacking else f"complete: {here}"
        print(f"  {extra:<10} {words}")


def version_of(name: str) -> str:
    """Returns the version of an installed package, "" where there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _numbers(version: str) -> tuple[int, ...]:
    """Returns the leading numbers of a version, without zeros at the end: (2, 13) of "2.13.0+cpu"."""
    leading = re.match(r"[\d.]*", version)
    numbers = [int(part) for part in leading[0].split(".") if part] if leading else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


# -- numbers ----------------------------------------------------------------------------------------------------------


def _canvas() -> tuple[CanvasLayout, CanvasTopology, list[tuple[list[int], list[int], float]]]:
    """Returns a layout, a topology on it, and its attention sets written out: (query positions, key positions,
    weight)."""
    regions = {"video": (0, 2, 0, 3, 0, 4), "plan": RegionSpec((0, 1, 3, 4, 0, 4), period=2)}
    layout = CanvasLayout(T=2, d_model=8, spatial_shape=(4, 4), regions=regions)
    connections = [
        Connection("video", "video", t_src=0, t_dst=0),
        Connection("video", "plan", weight=0.5),
        Connection("plan", "video", weight=2.0),
    ]
    video, plan = layout.region_indices("video"), layout.region_indices("plan")
    frames = [layout.region_indices_at_t("video", t) for t in range(2)]
    sets = [*((frame, frame, 1.0) for frame in frames), (video, plan, 0.5), (plan, video, 2.0)]
    return layout, CanvasTopology(connections), sets


def _expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sets: Sequence, form: str) -> torch.Tensor:
    """Computes the formulas of docs/semantics.md, sections 3 and 4, written out: (batch, heads, positions,
    head_dim)."""
    scale, out = q.shape[-1] ** -0.5, torch.zeros_like(v)
    if form == "joint":
        largest = q.new_zeros(q.shape[-2], q.shape[-2])
        for queries, keys, weight in sets:
            block = torch.tensor(queries)[:, None], torch.tensor(keys)
            largest[block] = largest[block].clamp_min(weight)
        rows = (largest > 0).any(1).nonzero()[:, 0]  # a row without keys stays 0
        logits = q[..., rows, :] @ k.mT * scale + largest[rows].log()
        return out.index_copy(-2, rows, logits.softmax(-1) @ v)
    total = q.new_zeros(q.shape[-2])
    for queries, keys, weight in sets:
        rows = torch.tensor(queries)
        share = (q[..., rows, :] @ k[..., keys, :].mT * scale).softmax(-1) @ v[..., keys, :]
        out, total = out.index_add(-2, rows, weight * share), total.index_add(0, rows, q.new_full(rows.shape, weight))
    return out / total.clamp_min(1e-30)[:, None]


def _check(backend: str, device: str, dtype: torch.dtype, form: str) -> Check:
    layout, topology, sets = _canvas()
    shape = (1, HEADS, layout.num_positions, HEAD_DIM)
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(4)]
    where = "cpu" if device == "interpreter" else device
    plan = compile_attention(layout, topology, normalize=form)
    run = partial(canvas_attention, plan=plan, backend=backend)
    try:
        results = _with_gradients(run, [x.to(where) for x in given])
    except Exception as cause:  # errors of drivers, compilers and kernels are what the doctor reports
        words = f"{type(cause).__name__}: {cause}".splitlines()[0]
        return Check(backend, device, dtype, form, math.nan, words)
    expected = _with_gradients(partial(_expected, sets=sets, form=form), [x.double() for x in given])
    errors = [float((a.cpu().double() - b).abs().max() / b.abs().max()) for a, b in zip(results, expected)]
    return Check(backend, device, dtype, form, math.nan if any(map(math.isnan, errors)) else max(errors))


def _with_gradients(run: Callable[..., torch.Tensor], given: list[torch.Tensor]) -> list[torch.Tensor]:
    """Returns the output of ``run`` on q, k and v, and their gradients by the fourth tensor."""
    *inputs, cotangent = given
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = run(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, cotangent)]
