"""``python -m canvas_engineering bench``: the suite, its rows, its report, and the gate against slow-downs.

Times every case of ``cases.py`` in both forms against whoever can run it here (:mod:`benchmarks.suite`), writes rows,
and from the rows a Markdown report with figures. With ``--compare ROWS`` it exits with 1 where ours has become slower
than those rows by more than noise, or larger, and where the two cannot be compared (:mod:`benchmarks.compare`); with
``--case``, those cases are compared. Rows of ``benchmarks.aot`` are compared by what their kernels need.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import sys
import textwrap
from pathlib import Path

import torch
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import cases, compare, contestants, measure, report, suite

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

TABLE_LINES = 7
"""What the live display takes beside rows: progress, title, header and borders."""
WHY = 40
"""How many characters of a reason the table shows."""


def table_of(rows: list[dict]) -> Table:
    """A line per contestant: medians, and how many times ours' time it takes."""
    table = Table(title="forward + backward; FlexAttention on a CPU forward only")
    for column in ("case", "form", "contestant", "ms", "time / ours", "of SDPA's rate", "MiB", "first call s"):
        table.add_column(column, justify="left" if column in ("case", "form", "contestant") else "right")
    for row, following in zip(rows, [*rows[1:], None]):
        names = row["case"], row["form"], row["contestant"]
        end = following is None or following["case"] != row["case"]
        why = row.get("skipped") or row.get("failed")
        if why:
            table.add_row(*names, f"[dim]{escape(textwrap.shorten(why, WHY, placeholder=' …'))}", end_section=end)
            continue
        part = "step" if "step_seconds" in row else "forward"
        ratio, share, peak = row.get(f"{part}_ratio"), row.get(f"{part}_roofline"), row.get("peak_bytes")
        table.add_row(
            *names,
            f"{1e3 * row[f'{part}_seconds']['p50']:.2f}",
            "" if ratio is None else f"[{'red' if ratio['p50'] < 1 else 'green'}]{ratio['p50']:.2f}",
            "" if share is None else f"{share['p50']:.2f}",
            "" if peak is None else f"{peak / 2**20:.1f}",
            f"{row['first_seconds']:.2f}" if "first_seconds" in row else "",
            end_section=end,
        )
    return table


def nowhere(rows: list[dict]) -> dict[str, list[str]]:
    """Who ran in none of the rows, always for the same reason, by that reason. Ours is not among them."""
    reasons: dict[str, dict] = {}
    for row in rows:
        reasons.setdefault(row["contestant"], {})[row.get("skipped") or row.get("failed")] = None
    found: dict[str, list[str]] = {}
    for name, (why, *others) in reasons.items():
        if name != "ours" and why and not others:
            found.setdefault(why, []).append(name)
    return found


def shown(rows: list[dict]) -> list[dict]:
    """The rows that a table has lines for: without those of :func:`nowhere`."""
    absent = {name for names in nowhere(rows).values() for name in names}
    return [row for row in rows if row["contestant"] not in absent]


def chosen(options: argparse.Namespace, device: str) -> list[cases.Case]:
    """The cases that were asked for; ValueError where a pattern fits none."""
    every = cases.CPU if device == "cpu" else cases.GPU
    known = tuple(case for case in every if case.long) if options.long else every
    if not options.case:
        return list(known)
    names = ", ".join(case.name for case in known)
    for pattern in options.case:
        if fnmatch.filter([case.name for case in known], pattern):
            continue
        if fnmatch.filter([case.name for case in every], pattern):
            raise ValueError(f"{pattern} leaves nobody out: there is nothing long to time; that is in {names}")
        raise ValueError(f"no case is called {pattern!r}; there are {names}")
    return [case for case in known if any(fnmatch.fnmatch(case.name, pattern) for pattern in options.case)]


def check(options: argparse.Namespace) -> None:
    """ValueError for contestants that there are not, and for what this machine has not."""
    known = dict.fromkeys(contestant.name for contestant in contestants.of(options.device))
    unknown = [name for name in options.contestant or () if name not in known]
    if unknown:
        raise ValueError(f"no contestant is called {unknown[0]!r}; there are {', '.join(known)}")
    if options.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {options.threads}")
    if not options.seconds >= 0:  # nan is not, either
        raise ValueError(f"--seconds must be at least 0, got {options.seconds:g}")
    if options.device == "cuda" and not (options.rows or options.list or torch.cuda.is_available()):
        raise ValueError("--device cuda: torch finds no GPU here")


def check_writable(out: Path, save: Path | None) -> None:
    """ValueError where the report, or rows, could not be written there."""
    measure.check_folder(out)
    if save is None:
        return
    measure.check_folder(save.parent)
    if save.is_dir():
        raise ValueError(f"{save} is a folder: --save takes a file")


def rows_of_the_suite(path: Path, or_aot: bool = False) -> list[dict]:
    """The rows of a file; ValueError where one of them is another benchmark's. ``or_aot``: they may all be of
    ``benchmarks.aot``."""
    rows = measure.read_rows(path)
    if or_aot and report.is_aot(rows):
        return rows
    for number, row in enumerate(rows, 1):
        lacking = [name for name in suite.NAMED if name not in row]
        if lacking:
            why = f"it has no {' and no '.join(lacking)}; these rows are another benchmark's"
            raise ValueError(f"{path}, line {number} is no row of this suite: {why}")
    return rows


def of_cases(rows: list[dict], patterns: list[str] | None) -> list[dict]:
    """The rows whose case fits one of the patterns; all of them without patterns."""
    if not patterns:
        return rows
    if report.is_aot(rows):
        raise ValueError("rows of compiled kernels have no cases: leave out --case")
    return [row for row in rows if any(fnmatch.fnmatch(row["case"], pattern) for pattern in patterns)]


def given(options: argparse.Namespace) -> list[dict] | None:
    """The rows to report instead of measuring, of the cases that were asked for; ValueError where a pattern fits
    none."""
    if options.rows is None:
        return None
    rows = rows_of_the_suite(options.rows, or_aot=options.compare is not None)
    for pattern in options.case or ():
        if not of_cases(rows, [pattern]):
            names = ", ".join(dict.fromkeys(row["case"] for row in rows))
            raise ValueError(f"{options.rows} has no case {pattern!r}; there are {names}")
    return of_cases(rows, options.case)


def earlier_rows(options: argparse.Namespace, or_aot: bool) -> list[dict] | None:
    """The rows to compare with, of the cases that were asked for; ValueError where there are none of these."""
    if options.compare is None:
        return None
    every = rows_of_the_suite(options.compare, or_aot)
    rows = of_cases(every, options.case)
    if every and not rows:
        raise ValueError(f"nothing to compare: {options.compare} has no case {' or '.join(map(repr, options.case))}")
    return rows


def recent(rows: list[dict], lines: int) -> list[dict]:
    """The rows of the last cases that fit into so many lines, and of the last one in any case."""
    found: list[dict] = []
    for case in reversed(dict.fromkeys(row["case"] for row in rows)):
        own = [row for row in rows if row["case"] == case]
        if found and len(own) + 1 + len(found) > lines:  # a line is drawn between cases
            break
        found = own + found
    return found


def measured(found: list[cases.Case], settings: suite.Settings, save: Path) -> list[dict]:
    """Rows of all cases, saved as they come; a terminal shows the latest meanwhile. All are printed at the end."""
    console, rows = measure.console(), []
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
    task = progress.add_task(found[0].name, total=len(found))
    live = Live(progress, console=console, refresh_per_second=4, transient=True)
    with live if console.is_terminal else contextlib.nullcontext():
        for number, new in enumerate(suite.run(found, settings), 1):
            rows += new
            measure.write_rows(rows, save)
            progress.update(task, advance=1, description=found[number].name if number < len(found) else "done")
            # progress is first: what does not fit is cut off at the bottom
            live.update(Group(progress, table_of(recent(shown(rows), console.height - TABLE_LINES))))
            if not console.is_terminal:
                console.print(f"{new[0]['case']}: {new[0].get('rounds', 'no')} rounds")
    console.print(table_of(shown(rows)))
    for why, names in nowhere(rows).items():
        console.print(f"{', '.join(names)}: {why}", highlight=False, markup=False)
    return rows


def parser_of_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m canvas_engineering bench",
        description="Time every case in both forms against whoever can run it here; write rows and a report.",
        epilog="Exit status 1: ours failed or was wrong in a case, nothing was timed, or what --compare says. 2: "
        "options or files that cannot be used.",
    )
    names = ", ".join(dict.fromkeys(contestant.name for contestant in contestants.of("cuda")))
    every = "may repeat (default: all)"
    parser.add_argument("--case", action="append", help=f"a name, or a pattern as in cogvideox_*; {every}")
    who = f"of {names}; {every}; ours always runs"
    parser.add_argument("--contestant", action="append", metavar="NAME", help=who)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    which = "(default: cuda where torch finds a GPU, else cpu; here %(default)s)"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device, help=which)
    parser.add_argument("--dtype", choices=DTYPES, help="(default: float32 on a CPU, bfloat16 on a GPU)")
    parser.add_argument("--long", action="store_true", help="what other runs leave out for its time, alone")
    parser.add_argument("--beside", type=Path, metavar="ROWS", help="of a long run, reported where these leave out")
    parser.add_argument("--seconds", type=float, default=4.0, help="of timed rounds per case (default: %(default)g)")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU (default: %(default)s)")
    folder = "folder for the report and its figures (default: %(default)s)"
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help=folder)
    parser.add_argument("--save", type=Path, metavar="ROWS", help="where rows go (default: rows.json in --out)")
    parser.add_argument("--rows", type=Path, help="report and compare these, or their --case, instead of measuring")
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="ROWS",
        help="exit with 1 where ours became slower or larger than in these, or their --case, where they are another "
        "machine's, and where no case is in both with equal shapes and dtype; of rows of compiled kernels, where one "
        "became worse or is gone",
    )
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = parser_of_options()
    options = parser.parse_args(argv)
    console = measure.console()
    try:
        check(options)
        rows = given(options)
        found = chosen(options, options.device) if rows is None or options.list else []
        save = options.save or options.out / "rows.json"
        if options.compare and rows is None and options.compare.resolve() == save.resolve():
            raise ValueError(f"{save} would be written over, and is to be compared with: name another --save or --out")
        earlier = earlier_rows(options, or_aot=rows is not None and report.is_aot(rows))
        beside = rows_of_the_suite(options.beside) if options.beside else []
        if not options.list:
            check_writable(options.out, save if rows is None else None)
    except (ValueError, OSError) as cause:
        parser.error(str(cause))
    torch.set_num_threads(options.threads)
    if options.list:
        for case in found:
            console.print(f"{case.name}: {case.about}", highlight=False)
        return 0
    if rows is None:
        dtype = DTYPES[options.dtype or ("float32" if options.device == "cpu" else "bfloat16")]
        only = frozenset(options.contestant or ())
        settings = suite.Settings(options.device, dtype, options.seconds, only=only, long=options.long)
        rows = measured(found, settings, save)
    faults = []
    if not report.is_aot(rows):
        faults = suite.faults(rows)
        if report.one(rows):
            for line in report.not_merged(rows, beside):
                console.print(line, highlight=False)
            console.print(f"report: {report.write(report.merged(rows, beside), options.out)}", highlight=False)
        else:
            faults.append("no rows were timed")
    for fault in faults:
        console.print(fault, style="red", highlight=False)
    if earlier is None:
        return int(bool(faults))
    lines, slower = compare.compare(earlier, rows)
    console.print("\n".join(lines), highlight=False)
    return int(slower or bool(faults))


if __name__ == "__main__":
    sys.exit(main())
