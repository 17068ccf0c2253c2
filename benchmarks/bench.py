"""``python -m canvas_engineering bench``: time cases by provider and form, report rows, or compare with a commit.

Without further options every case but long ones is timed and reported. ``--base`` times ours of another commit against
ours here instead; ``--rows`` reports what was measured; ``--documents`` writes the report and the
tables of docs/performance.md and docs/families.md from the committed rows.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import base, cases, layers, measure, plot, providers
from benchmarks.cases import Case
from benchmarks.measure import Settings

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
KINDS = {"attention": providers.attention} | layers.KINDS
PROVIDERS = [*dict.fromkeys((*(name for _, name, _ in providers.of("cuda")), *layers.OTHERS))]
NAMED = ("case", "form", "provider")
"""What every row says."""


def run(chosen: Sequence[Case], settings: Settings) -> Iterator[list[dict]]:
    """The rows of each case as it ends. A case that cannot be made, or begins too late, is a row that says why."""
    settings.environment = settings.environment or measure.environment(settings.device)
    measure.keep_pages()
    for case in chosen:
        gc.collect()
        try:
            late = time.perf_counter() > settings.deadline
            rows = [_described(case, settings) | {"skipped": measure.NO_TIME}] if late else run_case(case, settings)
        except Exception as cause:  # too large for the device, say: the other cases still run
            rows = [_described(case, settings) | {"failed": f"the whole case: {measure.told(cause)}"}]
        yield [row | settings.environment for row in rows]
        if settings.device == "cuda":
            torch.cuda.empty_cache()
        else:
            torch.compiler.reset()  # FlexAttention is compiled for each case; after eight torch would run it uncompiled


def run_case(case: Case, settings: Settings) -> list[dict]:
    """The rows of one case, with its targets."""
    contest = KINDS[case.kind](case, settings)
    described = _described(case, settings)
    if isinstance(contest, list):
        return [described | row for row in contest]
    late = {name for name, why in case.without.items() if why in cases.TOO_LONG.values()}
    wanted = settings.only or [name for _, name, _ in contest.providers]
    if settings.long and not case.long:
        wanted = [name for name in wanted if name in late]
    forms = settings.forms or ("joint", "edge")
    contest.providers = [p for p in contest.providers if p.name in ("ours", *wanted) and p.form in forms]
    without = {name: why for name, why in case.without.items() if not (settings.long and name in late)}
    rows = measure.time_contest(contest, described, settings, without)
    for row in rows:
        if row["provider"] in case.at_least:
            row["at_least"] = case.at_least[row["provider"]]
        elif row["provider"] == "ours" and "sdpa_unmasked" in case.at_least:
            row["at_least_of_reference"] = case.at_least["sdpa_unmasked"]
    return rows


def _described(case: Case, settings: Settings) -> dict:
    dtype = str(settings.dtype).removeprefix("torch.") if case.kind == "attention" else "float32"
    row = {"case": case.name, "group": case.group, "form": "joint", "provider": "ours", "dtype": dtype}
    return row | {"seconds_per_case": settings.seconds} | ({"long": True} if settings.long else {})


def parser_of_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m canvas_engineering bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit status 1: ours failed or was wrong, nothing was timed, or ours is slower than --base. 2: options "
        "or files that cannot be used.",
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--case", action="append", help="a name, or a pattern as in 'cogvideox_*'; may repeat")
    parser.add_argument("--provider", action="append", help=f"of {', '.join(PROVIDERS)}; may repeat; ours always runs")
    parser.add_argument("--form", action="append", choices=("joint", "edge"), help="(default: both)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device, help="(default here: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="(default: float32 on a CPU, bfloat16 on a GPU)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of timed rounds per case (default: %(default)g)")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU (default: %(default)s)")
    parser.add_argument("--long", action="store_true", help="what other runs leave out for its time, alone")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument(
        "--out", type=Path, default=Path("out/bench"), help="the report's folder (default: %(default)s)"
    )
    parser.add_argument("--save", type=Path, metavar="ROWS", help="where rows go (default: rows.json in --out)")
    parser.add_argument("--rows", type=Path, action="append", help="report these instead of measuring; may repeat")
    parser.add_argument("--base", metavar="GIT_REF", help="time ours of that commit against ours here, in turns")
    parser.add_argument("--documents", action="store_true", help="write the documents' tables from the committed rows")
    return parser


def chosen_cases(options: argparse.Namespace) -> list[Case]:
    """The cases that were asked for; ValueError where a pattern or a provider fits none."""
    everyone = cases.CPU if options.device == "cpu" else cases.GPU
    if options.long:
        late = cases.TOO_LONG.values()
        everyone = [case for case in everyone if case.long or any(why in late for why in case.without.values())]
    for pattern in options.case or ():
        if not fnmatch.filter([case.name for case in everyone], pattern):
            names = ", ".join(case.name for case in everyone)
            raise ValueError(f"no {'long ' * options.long}case is called {pattern!r}; there are {names}")
    if not options.case:
        return [case for case in everyone if options.long or not case.long]
    return [case for case in everyone if any(fnmatch.fnmatch(case.name, pattern) for pattern in options.case)]


def check(options: argparse.Namespace) -> None:
    """Raise ValueError for what there is not, what this machine has not, and where nothing can be written."""
    for name in set(options.provider or ()) - {*PROVIDERS}:
        raise ValueError(f"no provider is called {name!r}; there are {', '.join(PROVIDERS)}")
    if options.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {options.threads}")
    if not options.seconds >= 0:  # nan is not, either
        raise ValueError(f"--seconds must be at least 0, got {options.seconds:g}")
    if options.device == "cuda" and not (options.rows or options.list or torch.cuda.is_available()):
        raise ValueError("--device cuda: torch finds no GPU here")
    for folder in (options.out, (options.save or options.out / "rows.json").parent):
        measure.check_folder(folder)
    if options.save and options.save.is_dir():
        raise ValueError(f"{options.save} is a folder: --save takes a file")


def rows_of(paths: Sequence[Path], patterns: Sequence[str] | None = None) -> list[dict]:
    """The rows of files, of the cases that fit a pattern; ValueError where one is no row of a case, or none fits."""
    rows = []
    for path in paths:
        for number, row in enumerate(measure.read_rows(path), 1):
            lacking = [name for name in NAMED if name not in row]
            if lacking:
                raise ValueError(f"{path}, line {number} is no row of a case: it has no {' and no '.join(lacking)}")
            rows.append(row)
    fitting = [row for row in rows if not patterns or any(fnmatch.fnmatch(row["case"], one) for one in patterns)]
    if rows and not fitting:
        raise ValueError(f"no case fits; there are {', '.join(dict.fromkeys(row['case'] for row in rows))}")
    return fitting


def main(argv: list[str] | None = None) -> int:
    parser = parser_of_options()
    options = parser.parse_args(argv)
    try:
        check(options)
        committed = [measure.RESULTS / f"{name}.json" for name in ("bench", "long")]
        paths = committed if options.documents else options.rows
        rows = rows_of(paths, options.case) if paths else []
        chosen = [] if paths else chosen_cases(options)
        dtype = DTYPES[options.dtype or ("float32" if options.device == "cpu" else "bfloat16")]
        settings = Settings(options.device, dtype, options.seconds, long=options.long)
        settings.only, settings.forms = options.provider or (), options.form or ()
        torch.set_num_threads(options.threads)
        if options.base:
            return base.compare(options.base, chosen, settings)
    except (ValueError, OSError) as cause:
        parser.error(str(cause))
    if options.list:
        print("\n".join(f"{case.name}: {case.about}" for case in chosen))
        return 0
    for number, new in enumerate(run(chosen, settings), 1):
        print(f"[{number}/{len(chosen)}]", *map(plot.line, new), sep="\n  ", flush=True)
        rows += new
        measure.write_rows(rows, options.save or options.out / "rows.json")
    faults = measure.faults(rows) or ([] if plot.timed(rows) else ["nothing was timed"])
    if options.documents:
        plot.write_documents(rows)
    elif not faults or plot.timed(rows):
        print(f"report: {plot.write(rows, options.out)}")
    print(*faults, sep="\n", end="\n" * bool(faults))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
