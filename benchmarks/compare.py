"""Two runs of a benchmark: what has become slower or larger than measuring it twice explains.

*The suite.* Ours fails where it has lost time or memory; what the plan and the first call took is told.

Times are shares of unmasked attention's rate in the same rounds, forward alone and forward + backward: a slower moment
of the machine is no slow-down. Medians are compared. Around each lies an interval of 1.57 · IQR / √rounds (the notches
of McGill, Tukey and Larsen), as a share of the median, so more rounds make it smaller. Where it is larger, the case's
noise takes the place of 1.57 · IQR: by how much two runs of the same call within a round differed. Of fewer rounds than
``MEDIAN_ROUNDS`` the noise of all cases does. A share is slower where it has lost more than both intervals and
``BETWEEN_RUNS``, added as squares.

Memory is that of tensors in one call where rows have it, for that repeats exactly, else ``peak_bytes``: the allocator's
on a GPU, the process's on a CPU, which takes and returns pages in lumps. It may grow by ``GROWTH``, and by
``RESIDENT_SLACK`` more where it is the process's.

Rows of another device, processor or number of threads are refused; another torch, Triton or driver is told.

*Compiled kernels* (``benchmarks.aot``) are compared by what they need, as that module says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from benchmarks.report import CASE, MEDIAN_ROUNDS, ON_A_GPU, case_of, identity, is_aot, noise_of, own_noise, timed

NOTCH, BETWEEN_RUNS = 1.57, 0.10
"""Whatever the rounds, medians of two runs of the same code differ: 99 of 100 by at most 11 % (``LOG.md``)."""
COARSE = 4 / 3
"""Rows that only show slow-downs from here on are counted in a line of their own."""
GROWTH, RESIDENT_SLACK = 0.10, 16 << 20
TOLD = ("torch", "triton", "driver")
RESOURCES = ("arch", "stage", "form", "signed", "head_dim", "dtype", "tile")
REPORTED, AT_MOST = ("registers", "shared", "instructions"), ("spilled", "waste", "serialised", "local")
AT_LEAST = {"wgmma": 1, "copies": 1, "resident": 1, "predicted": 0.97}
"""What is compared of a kernel: what is only shown, what may not grow, the share of it that has to be left."""


def compare(earlier: list[dict], later: list[dict]) -> tuple[list[str], bool]:
    """Lines to print, and whether the comparison fails: ours slower or larger, a kernel worse, runs that cannot be
    compared, nothing to compare. Rows that only one side has are named, and do not fail."""
    if not (earlier and later):
        return ["nothing to compare: one side has no rows"], True
    if is_aot(earlier) != is_aot(later):
        return ["rows of compiled kernels can only be compared with such"], True
    if is_aot(earlier):
        return compare_compiled(earlier, later)
    before, after = _ours(earlier), _ours(later)
    alone = {"later": before.keys() - after.keys(), "earlier": after.keys() - before.keys()}
    lines = [f"not in the {side} rows: {', '.join(sorted(map(_named, keys)))}" for side, keys in alone.items() if keys]
    both = [key for key in before if key in after]
    if not both:
        return ["nothing to compare: no case of ours is in both, with equal shapes and dtype", *lines], True
    pairs = [(before[key], after[key]) for key in both]
    refused = [line for name in _machine(pairs[0][0]) for line in _differing(name, pairs)]
    if refused:
        return [f"these runs cannot be compared: {line}" for line in refused], True
    lines += [f"another {line}" for name in TOLD for line in _differing(name, pairs)]
    unknown = [name for name in _machine(pairs[0][0]) if any(row.get(name) is None for pair in pairs for row in pair)]
    lines += [f"not every row names its {name}: it is not compared" for name in unknown]
    noise = noise_of((*earlier, *later))
    lines.append(f"noise of all: {100 * noise:.0f} %. Our share of unmasked attention's rate, and how far it may fall:")
    slower, larger, coarse = 0, 0, 0
    for key, (old, new) in zip(both, pairs):
        limits = {part: _limit(old, new, part, noise) for part in ("forward", "step")}
        coarse += min(limits.values()) < 1 / COARSE
        times, memory = [_time(old, new, part, limit) for part, limit in limits.items()], [*_memory(old, new)]
        slower += any(is_slower for is_slower, _ in times)
        larger += any(is_larger for is_larger, _ in memory)
        lines.append(f"{_named(key)}: {'; '.join(text for _, text in (*times, *memory))}; {_told(old, new)}")
    if coarse:
        lines.append(f"{coarse} of {len(both)} cannot show a slow-down of {COARSE:.2f}: give them more --seconds")
    return [*lines, _verdict(slower, larger, len(both))], slower + larger > 0


def _verdict(slower: int, larger: int, every: int) -> str:
    """The last line: of how many rows ours has become slower, and larger."""
    found = [f"{what}: {count} of {every}" for what, count in (("SLOWER", slower), ("LARGER", larger)) if count]
    return ", ".join(found) or f"no slow-down and no growth in {every} of {every}"


def _ours(rows: list[dict]) -> dict[tuple, dict]:
    """Ours by case and form, with the case's noise."""
    noise = own_noise(rows)
    ours = (row for row in timed(rows, contestant="ours") if "step_roofline" in row)
    return {(*case_of(row), row["form"]): row | {"noise": noise.get(case_of(row), 0.0)} for row in ours}


def _named(key: tuple) -> str:
    """As in robot/edge, and robot/edge/bfloat16 where it is not float32."""
    case, dtype, form = key[0], key[-2], key[-1]
    return "/".join((case, form) if dtype == "float32" else (case, form, str(dtype)))


def _machine(row: dict) -> tuple[str, ...]:
    """What has to be the same of two rows besides their case."""
    return tuple(name for name in identity(row) if name not in CASE)


def _differing(name: str, pairs: list[tuple[dict, dict]]) -> list[str]:
    """A line where rows that are compared differ in that, if all of them say."""
    found = [dict.fromkeys(row.get(name) for row in rows) for rows in zip(*pairs)]
    if found[0] == found[1] or any(None in values for values in found):
        return []
    return [f"{name}: {', then '.join(' and '.join(map(str, values)) for values in found)}"]


def _limit(old: dict, new: dict, part: str, noise: float) -> float:
    """The share of its earlier rate that a row may fall to."""
    return math.exp(-math.hypot(BETWEEN_RUNS, *(_interval(row, part, noise) for row in (old, new))))


def _interval(row: dict, part: str, noise: float) -> float:
    """Half of the interval around a median, as a share of it."""
    share, rounds = row[f"{part}_roofline"], row["rounds"]
    width = noise if rounds < MEDIAN_ROUNDS else NOTCH * math.log(share["p75"] / share["p25"])
    return max(width, row["noise"]) / math.sqrt(rounds)


def _time(old: dict, new: dict, part: str, limit: float) -> tuple[bool, str]:
    before, after = (row[f"{part}_roofline"]["p50"] for row in (old, new))
    is_slower = after < limit * before
    ratio = f"{after / before:.2f} of at least {limit:.2f}"
    return is_slower, f"{part} {before:.3f} → {after:.3f}, {ratio}{' SLOWER' * is_slower}"


def _memory(old: dict, new: dict) -> Iterable[tuple[bool, str]]:
    for name, what in (("tensor_bytes", "of tensors"), ("peak_bytes", "in all")):
        before, after = old.get(name), new.get(name)
        if before is not None and after is not None:
            slack = RESIDENT_SLACK * (name == "peak_bytes" and ON_A_GPU not in new)
            is_larger = after > (1 + GROWTH) * before + slack
            yield is_larger, f"{before / 2**20:.1f} → {after / 2**20:.1f} MiB {what}{' LARGER' * is_larger}"
            return


def _told(old: dict, new: dict) -> str:
    plan, first = ([f"{row[name]:.3g}" for row in (old, new)] for name in ("setup_seconds", "first_seconds"))
    return f"plan {' → '.join(plan)} s, first call {' → '.join(first)} s"


def compare_compiled(earlier: list[dict], later: list[dict]) -> tuple[list[str], bool]:
    """As the docstring of :mod:`benchmarks.aot` says."""
    old, new = ({tuple(row[key] for key in RESOURCES): row for row in rows} for rows in (earlier, later))
    tritons = [" and ".join(sorted({row.get("triton", "unknown") for row in rows.values()})) for rows in (old, new)]
    lines, same, changed, worse = [], tritons[0] == tritons[1], 0, 0
    if old and not same:
        lines.append(f"Triton {tritons[0]} before, {tritons[1]} now: what has become worse is shown, and does not fail")
    for key in (key for key in old if key in new):
        both = (name for name in (*REPORTED, *AT_MOST, *AT_LEAST) if name in old[key] and name in new[key])
        pairs = {name: (old[key][name], new[key][name]) for name in both}
        is_worse = any(b > a for name, (a, b) in pairs.items() if name in AT_MOST)
        is_worse |= any(b < AT_LEAST[name] * a for name, (a, b) in pairs.items() if name in AT_LEAST)
        is_changed = any(a != b for a, b in pairs.values())
        changed, worse = changed + is_changed, worse + is_worse
        if is_worse or (is_changed and same):
            what = ", ".join(f"{name} {a} → {b}" for name, (a, b) in pairs.items() if a != b)
            lines.append(f"{' '.join(map(str, key))}: {what}{' WORSE' * is_worse}")
    gone = [" ".join(map(str, key)) for key in old if key not in new]
    lines += [f"{name}: GONE" for name in gone]
    faulty = {key: row["faults"] for key, row in new.items() if row.get("faults")}
    # of what is known, the amounts are compared above
    unknown = {key: found for key, found in faulty.items() if len(found) > len(old.get(key, {}).get("faults", ()))}
    lines += [f"{' '.join(map(str, key))}: FAULT, {'; '.join(found)}" for key, found in unknown.items()]
    if gone or (worse and same):
        lines.append("if that is meant: python -m benchmarks.aot --commit")
    lines.append(f"{len(new)} configurations, {changed} changed, {len(gone)} of the earlier ones gone")
    if faulty:
        lines[-1] += f", {len(unknown)} with new faults, {len(faulty) - len(unknown)} with known ones"
    return lines, bool(gone or unknown) or (same and worse > 0)
