"""What a plan costs on a device: seconds and bytes, from counts of its work and the device's measured rates.

On the processor whose rates are committed, the cases of ``benchmarks/cases.py`` were predicted within 25 %, forward and
backward each (``benchmarks/results/estimate.json``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from canvas_kernels.costs import COUNTS, all_rates, processor_key, total
from canvas_kernels.work import GpuWork, Work

if TYPE_CHECKING:
    from . import AttentionPlan

DTYPES = ("float32", "float16", "bfloat16")
SHOWN = 4
MEASURE = "python -m benchmarks.rates"


@dataclass(frozen=True)
class Estimate:
    """What one attention call over a plan costs on a device that does nothing else.

    Attributes:
        device: the entry of the measured rates that this is made of.
        forward_seconds, backward_seconds: of the call and of its gradients; 0 for a backward that was not asked for.
        peak_bytes: the most that tensors of the call hold at once beyond q, k, v and the gradient of the output, as
            torch's profiler counts it: copies, results, what is kept for backward. Neither the plan's tables, which
            stay, nor memory that the process or torch's allocator keeps: a benchmark that reads resident memory, as the
            report's MiB do on a CPU, finds more.
        breakdown: seconds, forward and backward together, by what takes them, the longest first.
    """

    device: str
    forward_seconds: float
    backward_seconds: float
    peak_bytes: int
    breakdown: dict[str, float] = field(repr=False)

    @property
    def seconds(self) -> float:
        return self.forward_seconds + self.backward_seconds

    def __str__(self) -> str:
        shares = {name: value / self.seconds for name, value in self.breakdown.items()} if self.seconds else {}
        longest = dict(list(shares.items())[:SHOWN])
        if len(shares) > SHOWN:
            longest["other"] = 1 - sum(longest.values())
        most = ", ".join(f"{name} {share:.0%}" for name, share in longest.items())
        return (
            f"{1e3 * self.forward_seconds:.3g} ms forward, {1e3 * self.backward_seconds:.3g} ms backward, "
            f"{self.peak_bytes / 2**20:.3g} MiB on {self.device}\n  {most or 'nothing takes time'}"
        )


def of_plan(
    plan: AttentionPlan,
    device: torch.device | str,
    batch: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype | str,
    backward: bool,
) -> Estimate:
    """:meth:`AttentionPlan.estimate`."""
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ValueError(f"rates are measured for {', '.join(DTYPES)}, got {dtype!r}")
    if min(batch, heads, head_dim) < 1:
        raise ValueError(f"batch, heads and head_dim must be at least 1, got {batch}, {heads} and {head_dim}")
    name = device_name(device)
    rates = all_rates().get(name)
    if rates is None:
        known = ", ".join(all_rates())
        raise ValueError(
            f"no rates were measured on {name}, only on {known}; {MEASURE} measures them on a processor, "
            "and with --rows fits them to what `make gpu` wrote"
        )
    outside = None if plan.in_canvas_order else plan.n_positions
    itemsize = getattr(torch, dtype).itemsize
    kind = GpuWork if "blocks" in rates else Work
    done = kind(plan.table, batch * heads, head_dim, outside, itemsize < 4 or batch > 1, itemsize)
    passes = [done.seconds(rates, is_backward) for is_backward in (False, True)[: 1 + backward]]
    breakdown = total(passes)
    return Estimate(
        name,
        sum(passes[0].values()),
        sum(passes[1].values()) if backward else 0.0,
        done.peak_bytes(backward),
        dict(sorted(breakdown.items(), key=lambda item: -item[1])),
    )


def in_words(plan: AttentionPlan, batch: int = 1, heads: int = 1, head_dim: int = 64, dtype: str = "float32") -> str:
    """What attention over the plan takes on one thread of this machine and what of, or why that is not known."""
    try:
        found = plan.estimate(processor_key(1), batch=batch, heads=heads, head_dim=head_dim, dtype=dtype)
    except ValueError as cause:
        return f"its time is not known: {cause}"
    words = "".join(f"\n    {name}: {COUNTS[name]}" for name in list(found.breakdown)[:SHOWN] if name in COUNTS)
    return f"batch {batch}, {heads} head{'s' * (heads != 1)} of {head_dim}, {dtype}: {found}{words}"


def device_name(device: torch.device | str) -> str:
    """The name under which a device's rates stand: "cpu" and "cuda" are this machine's, other names are taken as they
    are."""
    try:
        found = torch.device(device)
    except RuntimeError:
        return str(device)
    if found.type == "cpu":
        return processor_key(torch.get_num_threads())
    if found.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(found)
    raise ValueError(f"there is no {found} here: name the device that is meant, one of {', '.join(all_rates())}")
