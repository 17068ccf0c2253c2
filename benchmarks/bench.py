"""``python -m canvas_engineering bench``: time cases by provider and form, or compare with a commit.

Without further options every case but long ones is timed, and its rows are printed and saved. ``--base`` times the
"ours" of another commit against that of this tree instead. ``--documents`` writes the report and the tables of
docs/performance.md and docs/families.md from the committed rows.
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

from benchmarks import cases, layers, measure, plot, providers
from benchmarks.cases import Case
from benchmarks.measure import Run, Settings

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
KINDS = {"attention": providers.attention} | layers.KINDS
TOO_LONG, NEVER = "too long: `bench --long` times it", "left out of this case"
PROVIDERS = [*dict.fromkeys(name for _, name, _ in providers.of())]


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
    """The rows of one case."""
    contest, described = KINDS[case.kind](case, settings), _described(case, settings)
    if isinstance(contest, list):
        return [described | row for row in contest]
    wanted = settings.only or [name for _, name, _ in contest.providers]
    if settings.long and not case.long:
        wanted = [name for name in wanted if name in case.slow]
    contest.providers = [p for p in contest.providers if p.name in ("ours", *wanted) and p.form in settings.forms]
    without = dict.fromkeys(() if settings.long else case.slow, TOO_LONG) | dict.fromkeys(case.never, NEVER)
    return measure.time_contest(contest, described, settings, without)


def ours(case: Case, form: str, settings: Settings) -> Run | None:
    """The "ours" of a case, None where it has no such form."""
    contest = KINDS[case.kind](case, settings)
    return next((provider.build() for provider in contest.providers if provider[:2] == (form, "ours")), None)


def _described(case: Case, settings: Settings) -> dict:
    dtype = str(settings.dtype).removeprefix("torch.") if case.kind != "plan" else "float32"
    row = {"case": case.name, "group": case.group, "form": "joint", "provider": "ours", "dtype": dtype}
    return row | {"seconds_per_case": settings.seconds} | ({"long": True} if settings.long else {})


def parser_of_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m canvas_engineering bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='Exit status 1: "ours" failed, was wrong or is slower than --base, or nothing was timed. 2: options or '
        "files that cannot be used.",
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--case", action="append", help="a name, or a pattern as in 'cogvideox_*'; may repeat")
    add("--provider", action="append", choices=PROVIDERS, metavar="NAME", help=f"of {', '.join(PROVIDERS)}; may repeat")
    add("--form", action="append", choices=("joint", "edge"), help="(default: both)")
    add("--device", choices=("cpu", "cuda"), default=device, help="(default here: %(default)s)")
    add("--dtype", choices=DTYPES, help="(default: float32 on a CPU, bfloat16 on a GPU)")
    add("--seconds", type=float, default=4.0, help="of timed rounds per case (default: %(default)g)")
    add("--threads", type=int, default=1, help="on a CPU (default: %(default)s)")
    add("--long", action="store_true", help="what other runs leave out for its time, alone")
    add("--list", action="store_true", help="name the cases and stop")
    add("--save", type=Path, metavar="ROWS", default=Path("out/bench.json"), help="(default: %(default)s)")
    add("--base", metavar="GIT_REF", help='time "ours" of that commit against that here, in turns')
    add("--documents", action="store_true", help="write the documents' tables from the committed rows")
    return parser


def chosen_cases(options: argparse.Namespace) -> list[Case]:
    """The cases that were asked for; ValueError where a pattern fits none."""
    everyone = cases.CPU if options.device == "cpu" else cases.GPU
    if options.long or not options.case:
        everyone = [case for case in everyone if (case.long or case.slow if options.long else not case.long)]
    chosen: dict[str, Case] = {}
    for pattern in options.case or ("*",):
        fitting = {case.name: case for case in everyone if fnmatch.fnmatch(case.name, pattern)}
        if not fitting:
            names = ", ".join(case.name for case in everyone)
            raise ValueError(f"no {'long ' * options.long}case is called {pattern!r}; there are {names}")
        chosen |= fitting
    return [*chosen.values()]


def settings_of(options: argparse.Namespace) -> Settings:
    """The settings that were asked for; ValueError for what there is not, and where rows cannot be written."""
    if options.threads < 1 or not options.seconds >= 0:  # nan is not, either
        raise ValueError("--threads must be at least 1 and --seconds at least 0")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here")
    if options.save.is_dir():
        raise ValueError(f"--save {options.save} is a folder")
    options.save.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    dtype = DTYPES[options.dtype or ("float32" if options.device == "cpu" else "bfloat16")]
    names = {"only": options.provider or (), "forms": options.form or Settings.forms}
    return Settings(options.device, dtype, options.seconds, long=options.long, **names)


def main(argv: list[str] | None = None) -> int:
    parser = parser_of_options()
    options = parser.parse_args(argv)
    if options.documents:
        plot.write_documents()
        return 0
    try:
        chosen = chosen_cases(options)
        if options.list:
            print(*(f"{case.name}: {case.about}" for case in chosen), sep="\n")
            return 0
        settings = settings_of(options)
        if options.base:
            from benchmarks import base  # which builds "ours" by this module

            return base.compare(options.base, chosen, settings)
    except (ValueError, OSError) as cause:
        parser.error(str(cause))
    rows = []
    for number, new in enumerate(run(chosen, settings), 1):
        print(f"[{number}/{len(chosen)}]", *map(plot.line, new), sep="\n  ", flush=True)
        rows += new
        measure.write_rows(rows, options.save)
    faults = [
        f"{r['case']}, {r['form']} form: {r['failed']}" for r in rows if r["provider"] == "ours" and "failed" in r
    ]
    faults = faults or ["nothing was timed"] * (not plot.timed(rows))
    print(*faults, f"rows: {options.save}", sep="\n")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
