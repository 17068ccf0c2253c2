"""Compiled kernels against earlier rows of ``benchmarks.aot``: what has become worse, is gone, or has new faults."""

from __future__ import annotations

RESOURCES = ("arch", "stage", "form", "signed", "head_dim", "dtype", "tile")
REPORTED, AT_MOST = ("registers", "shared", "instructions"), ("spilled", "waste", "serialised", "local")
AT_LEAST = {"wgmma": 1, "copies": 1, "resident": 1, "predicted": 0.97}
"""What is compared of a kernel: what is only shown, what may not grow, the share of it that has to be left."""


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
