"""From rows to what people look at: lines, Markdown tables between marks of documents, a figure.

A document has its own words; ``<!-- table: NAME -->`` to ``<!-- end -->`` is written from rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from benchmarks.cases import CLAIMS
from benchmarks.measure import RESULTS, ROOT, read_rows
from benchmarks.static_model import FLOP_PER_PAIR, pass_rates
from canvas_engineering.files import replace_file, replacing

DOCUMENTS = [ROOT / "docs" / name for name in ("benchmarks/report.md", "performance.md", "families.md")]
MARKS = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
NAMES = {
    "sdpa_mask": "SDPA, dense mask",
    "sdpa_mask_used": "SDPA, dense mask of gathered rows",
    "flex": "FlexAttention",
    "flex_packed": "FlexAttention, in our packed order",
}
"""Providers as the figure names them."""
FEW = 3
"""Fewer rounds give no median and no quartiles."""


def timed(rows: Iterable[dict], *groups: str) -> list[dict]:
    """The rows of some groups, () for all, that were timed; of several of a case, form and provider, the first."""
    known = {}
    for row in rows:
        if (row["group"] in groups or not groups) and seconds_of(row):
            known.setdefault(who(row), row)
    return [*known.values()]


def who(row: dict) -> tuple[str, str, str]:
    return row["case"], row["form"], row["provider"]


def part_of(row: dict) -> str:
    """What a row is judged by: forward + backward, or forward where there is no backward."""
    return "step" if "step_seconds" in row else "forward"


def seconds_of(row: dict) -> dict[str, float] | None:
    """Quantiles of the seconds that a row is judged by."""
    return row.get(f"{part_of(row)}_seconds") or row.get("seconds")


def noise_in(rows: Iterable[dict]) -> Callable[[dict], float]:
    """The noise that a row is judged by: of nine in ten cases, or of its own where that is larger."""
    own: dict[str, float] = {}
    for row in rows:
        if row.get("noise"):
            own[row["case"]] = max(own.get(row["case"], 0.0), row["noise"])
    every = float(np.quantile([*own.values()], 0.9)) if own else 0.0
    return lambda row: max(every, own.get(row.get("case"), 0.0))


def is_tie(ratio: dict[str, float], noise: float) -> bool:
    """Whether quantiles of a ratio tell nobody ahead: the median is within noise of 1, or the quartiles enclose 1."""
    return abs(math.log(ratio["p50"])) <= noise or ratio["p25"] <= 1 <= ratio["p75"]


def spread(ratio: dict[str, float], rounds: int) -> str:
    """The median with three digits and the quartiles, or how few rounds there were."""
    middle, low, high = (f"{ratio[q]:.1f}" if ratio[q] >= 9.95 else f"{ratio[q]:.2f}" for q in ("p50", "p25", "p75"))
    few = "one round" if rounds == 1 else f"{rounds} rounds"
    return f"{middle} ({few if rounds < FEW else f'{low} to {high}'})"


def line(row: dict) -> str:
    """A row as a line of a terminal."""
    words = f"{row['case']:26} {row['form']:9} {row['provider']:15}"
    why, seconds, ratio = row.get("skipped") or row.get("failed"), seconds_of(row), row.get(f"{part_of(row)}_ratio")
    if why or not seconds:
        return f"{words} {why}"
    words += f" {1e3 * seconds['p50']:10.2f} ms" + (f", time over ours {spread(ratio, row['rounds'])}" if ratio else "")
    rates = (f"{part} {1e3 * row[f'{part}_tflops']:.3g}" for part in ("forward", "backward") if f"{part}_tflops" in row)
    return words + "".join(f", {rate} GFLOP/s" for rate in rates)


def table(titles: Sequence[str], cells: list[Sequence[str]]) -> str:
    """Markdown, without columns that are empty; says so where there are no lines."""
    shown = [number for number in range(len(titles)) if any(line[number] for line in cells)]
    lines = [[line[number] for number in shown] for line in (titles, ["---"] * len(titles), *cells)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) if cells else "Nothing was timed.\n"


def _value(row: dict, name: str, digits: str, factor: float = 1, of: str = "p50") -> str:
    """A number of a row, or the median of its quantiles, in so many digits; "" where there is none."""
    value = row.get(name)
    value = value.get(of) if isinstance(value, dict) else value
    return "" if value is None else f"{factor * value:{digits}}"


COLUMNS: dict[str, Callable[[dict], str]] = {
    "case": lambda row: row["case"],
    "form": lambda row: row["form"],
    "provider": lambda row: row["provider"],
    "tokens": lambda row: _value(row, "tokens", ","),
    "rectangles": lambda row: _value(row, "rectangles", ","),
    "density": lambda row: _value(row, "density", ".3g", 100.0) + " %" * ("density" in row),
    "declaration, ms": lambda row: _value(row, "declare_seconds", ".4g", 1e3),
    "ms": lambda row: _value(row, "seconds", ".4g", 1e3),
    "forward, ms": lambda row: _value(row, "forward_seconds", ".4g", 1e3),
    "forward + backward, ms": lambda row: _value(row, "step_seconds", ".4g", 1e3),
    "of SDPA's rate": lambda row: _value(row, f"{part_of(row)}_roofline", ".2f"),
    "MiB": lambda row: _value(row, "peak_bytes", ".3g", 2**-20),
    "resident MiB": lambda row: _value(row, "resident_bytes", ".3g", 2**-20),
}


def over_ours(row: dict, noise: float) -> str:
    """The median and quartiles of a row's time over that of "ours", "=" before a tie; "" for "ours" itself."""
    ratio = row.get(f"{part_of(row)}_ratio")
    return "= " * is_tie(ratio, noise) + spread(ratio, row["rounds"]) if ratio else ""


def everything(rows: list[dict], *groups: str) -> str:
    """A line for each row of some groups."""
    noise = noise_in(rows)
    cells = [[*(cell(row) for cell in COLUMNS.values()), over_ours(row, noise(row))] for row in timed(rows, *groups)]
    return table([*COLUMNS, "time over ours"], cells)


def by_provider(rows: list[dict], *groups: str) -> str:
    """A line for each case, and a column for each form and provider with its time over that of "ours"."""
    noise = noise_in(rows)
    cells = {
        (row["case"], f"{row['form']}: {row['provider']}"): over_ours(row, noise(row)) for row in timed(rows, *groups)
    }
    titles = [*dict.fromkeys(title for (_, title), text in cells.items() if text)]
    names = dict.fromkeys(name for (name, title) in cells if title in titles)
    return table(["case", *titles], [[name, *(cells.get((name, title), "") for title in titles)] for name in names])


def functions(rows: list[dict], group: str) -> str:
    """A line for each attention function: the complexity that it claims, times by number of keys, and memory."""
    own = {(row["fn"], row["keys"]): row for row in timed(rows, group) if row["provider"] == "ours"}
    sizes = sorted({keys for _, keys in own})
    cells = [
        [
            fn,
            CLAIMS[fn],
            *(COLUMNS["forward + backward, ms"](own[fn, keys]) for keys in sizes),
            COLUMNS["MiB"](own[fn, sizes[-1]]),
        ]
        for fn in dict.fromkeys(fn for fn, _ in own)
    ]
    return table(["function", "claimed", *(f"ms at {keys:,}" for keys in sizes), "MiB"], cells)


def machines(rows: list[dict]) -> str:
    """Where rows come from, with their commits, and by how much two like calls differ there."""
    names, commits = ("device", "driver", "cores", "threads", "torch", "python"), {}
    for row in timed(rows):
        machine = ", ".join(f"{name} {row[name]}" for name in names if name in row)
        commits.setdefault(machine, {})[row["commit"]] = None
    noise = f"Two calls of the same thing differ by up to {100 * noise_in(rows)({}):.0f} %, in nine of ten rounds.\n"
    return "".join(f"- {one}, of commits {', '.join(own)}\n" for one, own in commits.items()) + f"\n{noise}"


def left_out(rows: list[dict]) -> str:
    """Who did not run in which cases, by the reason."""
    done = {who(row) for row in timed(rows)}
    idle = [row for row in rows if "skipped" in row or "failed" in row]
    reasons: dict[str, dict] = {}
    for row in idle:
        if who(row) not in done:
            why = f"{row['provider']}, {row['form']} form: {row.get('skipped') or row['failed']}"
            reasons.setdefault(why, {})[row["case"]] = None
    every = len({row["case"] for row in idle})
    cells = ((why, "all of these cases" if len(own) == every > 1 else ", ".join(own)) for why, own in reasons.items())
    return "".join(f"- {why} ({names})\n" for why, names in cells) or "Nothing.\n"


def rates(rows: list[dict]) -> str:
    """The predicted rates of passes in bfloat16, by each Triton's committed rows of ``benchmarks.aot``."""
    titles, cells = [], {}
    for path in sorted(RESULTS.glob("aot*.json")):
        compiled = read_rows(path)
        new = [f"{part}, Triton {compiled[0]['triton']}" for part in FLOP_PER_PAIR]
        titles += new
        for row in (row for row in pass_rates(compiled) if row["dtype"] == "bf16"):
            rate = {title: f"{row[part]:.0f}" for title, part in zip(new, FLOP_PER_PAIR) if part in row}
            cells.setdefault((row["head_dim"], row["form"]), {}).update(rate)
    lines = [[f"{dim}, {form}", *(cells[dim, form].get(title, "") for title in titles)] for dim, form in sorted(cells)]
    return table(["head_dim, form", *titles], lines)


TABLES: dict[str, Callable[[list[dict]], str]] = {
    "machines": machines,
    "attention": lambda rows: everything(rows, "canvas", "cogvideox", "density", "length"),
    "canvases": lambda rows: by_provider(rows, "canvas", "cogvideox"),
    "layers": lambda rows: by_provider(rows, "layer"),
    "plans": lambda rows: everything(rows, "plan"),
    "functions": lambda rows: functions(rows, "functions"),
    "queries": lambda rows: functions(rows, "queries"),
    "left_out": left_out,
    "rates": rates,
}


def filled(text: str, rows: list[dict]) -> str:
    """A document with the tables between its marks written from rows. Raises KeyError for a table that there is not."""
    return MARKS.sub(lambda match: f"{match[1]}{TABLES[match[2]](rows)}{match[3]}", text)


def write_documents() -> None:
    """Write the tables of the report, docs/performance.md and docs/families.md, and the report's figure."""
    rows = read_rows(RESULTS / "bench.json") + read_rows(RESULTS / "long.json")
    with replacing(DOCUMENTS[0].parent / "speedup.png") as file:
        speedup(rows).savefig(file, format="png", dpi=120, bbox_inches="tight")
    for path in DOCUMENTS:
        replace_file(path, filled(path.read_text(), rows).encode())


def speedup(rows: list[dict]):
    """A figure of joint form: every provider's time over that of "ours" by density; hollow where one round was run."""
    from matplotlib.figure import Figure

    points: dict[str, list] = {}
    for row in timed(rows):
        if row["form"] == "joint" and f"{part_of(row)}_ratio" in row and "density" in row:
            label = NAMES.get(row["provider"], row["provider"]) + ", forward alone" * (part_of(row) == "forward")
            point = row["density"], row[f"{part_of(row)}_ratio"]["p50"], row.get("rounds", 0) >= FEW
            points.setdefault(label, []).append(point)
    result = Figure(figsize=(7.5, 5.5), layout="constrained")
    axes = result.subplots()
    axes.set(xlabel="density: selected pairs of all pairs", ylabel="time over ours", xscale="log", yscale="log")
    axes.set_title("joint form on a CPU, one thread, forward + backward; hollow: one round", fontsize=10)
    axes.grid(True, which="both", alpha=0.2)
    for number, (label, several) in enumerate(points.items()):
        x, y, firm = zip(*sorted(several))
        faces = [f"C{number}" if each else "w" for each in firm]
        axes.scatter(x, y, label=label, facecolors=faces, edgecolors=f"C{number}")
    axes.axhline(1, color="grey", label="as long as ours")
    result.legend(loc="outside lower center", ncols=2, fontsize="small")
    return result
