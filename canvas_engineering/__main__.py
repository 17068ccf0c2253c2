"""``python -m canvas_engineering``: inspect a saved schema, measure this machine.

    python -m canvas_engineering inspect SCHEMA.json --heads 24 --head-dim 64 --dtype bfloat16
    python -m canvas_engineering inspect SCHEMA.json --heads 48 --dtype bfloat16 --ranks 64 --node 8
    python -m canvas_engineering draw SCHEMA.json --out PICTURE.png --normalize joint
    python -m canvas_engineering explore SCHEMA.json --out PAGE.html
    python -m canvas_engineering bench --case "frames_*"
    python -m canvas_engineering doctor

typer and rich, of the ``cli`` extra, and matplotlib, of the ``draw`` extra, are imported when a command needs them; the
doctor needs none of them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from canvas_engineering.files import replace_file, replacing
from canvas_engineering.parallel.report import Model, describe_ranks
from canvas_engineering.plan import NORMALIZE, compile_attention

MAX_ROWS = 60
EXTRA_OF = {"typer": "cli", "rich": "cli", "matplotlib": "draw"}
"""The extra that each package comes with."""
DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of an element."""
KEY = """
src: the query region, whose positions get the result; dst: the key/value region, which src attends to
frames: t → t-1: src at each frame attends to dst at the previous frame; all: every frame at once
fill: how frames of dst are chosen where it has none at that time
attention set: queries and keys of one softmax; rectangle: a block of the table that attention runs on
density: computed share of all pairs of positions; tile fill: computed share of the pairs in a GPU's tiles
multiprocessors that work: the mean over a pass of the forward or backward; little work leaves most of a GPU idle
log-sum-exp rows: numbers that each head saves for the backward pass
in the picture: queries down, keys across; the darker, the more pairs are computed
"""


def load_schema(path: Path):
    """Loads the schema of a JSON file of a schema or a program; ValueError names the file."""
    return load_program(path).schema


def load_program(path: Path):
    """Loads the program of a JSON file, empty if that is a schema; ValueError names the file."""
    from canvas_engineering.program import CanvasProgram

    try:
        return CanvasProgram.from_json(path)
    except OSError as cause:
        raise ValueError(f"{path}: {cause.strerror}") from cause
    except (ValueError, KeyError, TypeError) as cause:
        why = str(cause).removeprefix(f"{path}: ")  # most causes name the file too
        raise ValueError(f"{path} is no schema: {why}") from cause


def region_table(layout):
    """Returns a table with one row per region: bounds, positions, period, loss weight, default function."""
    from rich.table import Table

    grid = " × ".join(map(str, (layout.T, *layout.spatial_shape)))
    positions = f"{layout.num_positions:,} positions of {layout.d_model}"
    table = Table(title=f"{len(layout.regions)} regions on {grid} = {positions}")
    for column in ("region", "bounds", "positions", "period", "loss", "function"):
        table.add_column(column, justify="right" if column in ("positions", "period") else "left")
    for name in list(layout.regions)[:MAX_ROWS]:
        spec = layout.region_spec(name)
        box = " × ".join(f"{a}:{b}" for a, b in zip(spec.bounds[::2], spec.bounds[1::2]))
        loss = f"{spec.loss_weight:g}" if spec.is_output else "no"
        table.add_row(name, box, f"{layout.region_numel(name):,}", str(spec.period), loss, spec.default_attn)
    _caption_truncated(table, len(layout.regions))
    return table


def connection_table(layout, topology, plan):
    """Returns a table with one row per connection: regions, frames, fill, weight, function, sets."""
    from rich.table import Table

    table = Table(title=f"{len(topology.connections)} connections")
    for column in ("src", "dst", "frames", "fill", "weight", "function", "attention sets"):
        table.add_column(column, justify="right" if column in ("weight", "attention sets") else "left")
    counts = plan.attention_sets.counts(plan.n_connections).tolist()
    for connection, count in zip(topology.connections[:MAX_ROWS], counts):
        offsets = (connection.t_src, connection.t_dst)
        frames = " → ".join("all" if t is None else f"t{t:+d}" if t else "t" for t in offsets)
        fill = "" if offsets == (None, None) else connection.temporal_fill.value
        known = connection.src in layout.regions and connection.dst in layout.regions
        fn = topology.resolve_fn(connection, layout) if known else "skipped: no such region"
        table.add_row(connection.src, connection.dst, frames, fill, f"{connection.weight:g}", fn, f"{count:,}")
    _caption_truncated(table, len(topology.connections))
    return table


def describe_call(plan, batch: int, heads: int, head_dim: int, dtype: str) -> str:
    """Describes one attention call over the plan: FLOPs, bytes of its tensors, and fill by tile size."""
    forward, backward = (plan.flops(head_dim, batch * heads, is_backward) / 1e9 for is_backward in (False, True))
    tensors = 4 * batch * heads * plan.n_positions * head_dim * DTYPES[dtype]
    fills = ", ".join(f"{share:.0%} of {tile} tiles" for tile, share in plan.fill_by_tile.items())
    return (
        f"batch {batch}, {heads} head{'s' * (heads != 1)} of {head_dim}, {dtype}: {forward:.3g} GFLOP forward, "
        f"{backward:.3g} backward; q, k, v and the output take {tensors / 2**20:.3g} MiB"
        + (f"\n  tile fill, as a GPU cuts the table: {fills}" if fills else "")
    )


def describe_balance(plan, batch: int, heads: int, head_dim: int, dtype: str) -> str:
    """Describes the share of each pass in which an H200 is busy; empty where no kernel is built for it."""
    import torch

    from canvas_engineering.plan.balance import MULTIPROCESSORS, balance

    try:
        balances = balance(plan.table, batch * heads, head_dim, getattr(torch, dtype))
    except ValueError:
        return ""
    names = {"forward": "forward", "dq": "dQ", "dkv": "dK and dV"}
    passes = ", ".join(f"{names[b.name]} {b.predicted:.0%} (whole tiles allow {b.possible:.0%})" for b in balances)
    return f"  share of {MULTIPROCESSORS} multiprocessors that work, predicted: {passes}"


def _caption_truncated(table, total: int) -> None:
    if total > MAX_ROWS:
        table.caption = f"the first {MAX_ROWS} of {total}"


def build_app():
    """Returns the command-line application, a ``typer.Typer``."""
    import typer
    from rich.console import Console

    out_option = typer.Option(..., help="the layout's picture; the topology's and the table's are written beside it")
    page_option = typer.Option(..., help="the page, a file that ends in .html")
    forms = "edge: one softmax per attention set; joint: one per query over all of its sets"
    normalize_option = typer.Option("edge", help=forms)
    options_argument = typer.Argument(None, help="options of the suite")
    app = typer.Typer(add_completion=False, no_args_is_help=True, help="Inspect a saved canvas schema, or measure.")

    @contextlib.contextmanager
    def refusals():
        """Prints errors of a file as one line."""
        try:
            yield
        except ValueError as cause:
            Console(stderr=True).print(str(cause), style="red", highlight=False, markup=False, soft_wrap=True)
            raise typer.Exit(2) from cause

    def open_schema(path: Path):
        with refusals():
            return load_schema(path)

    def check(option: str, value: str, known: Iterable[str]) -> None:
        if value not in known:
            raise typer.BadParameter(f"{value!r} is none of {', '.join(known)}", param_hint=option)

    @app.command()
    def inspect(
        schema: Path,
        batch: int = typer.Option(1, min=1),
        heads: int = typer.Option(1, min=1),
        head_dim: int = typer.Option(64, min=1),
        dtype: str = typer.Option("float32", help=f"of q, k and v: {', '.join(DTYPES)}"),
        normalize: str = normalize_option,
        ranks: int = typer.Option(0, min=0, help="cut the canvas over so many ranks, and print what they exchange"),
        node: int = typer.Option(8, min=1, help="ranks on one node"),
    ) -> None:
        """Print regions, connections, the compiled plan, and FLOPs, bytes and fill of attention on q, k and v."""
        check("--dtype", dtype, DTYPES)
        check("--normalize", normalize, NORMALIZE)
        saved = open_schema(schema)
        console = Console()
        console.print(region_table(saved.layout))
        if saved.topology is None:
            console.print("no topology: no region attends to any")
            return
        plan = compile_attention(saved.layout, saved.topology, normalize=normalize)
        console.print(connection_table(saved.layout, saved.topology, plan))
        words = (describe(plan, batch, heads, head_dim, dtype) for describe in (describe_call, describe_balance))
        lines = [str(plan), *filter(None, words)]
        if ranks:
            lines.append(describe_ranks(plan, ranks, node, Model(heads, head_dim, DTYPES[dtype], batch)))
        console.print("\n".join([*lines, KEY]), highlight=False, markup=False, soft_wrap=True)

    @app.command()
    def draw(schema: Path, out: Path = out_option, normalize: str = normalize_option) -> None:
        """Draw the layout to OUT and, with a topology, OUT's name with -topology and -table added."""
        from canvas_engineering import draw as pictures

        check("--normalize", normalize, NORMALIZE)
        saved = open_schema(schema)
        figures = {out: pictures.layout_figure(saved.layout)}
        kinds = figures[out].canvas.get_supported_filetypes()
        if out.suffix[1:].lower() not in kinds:
            raise typer.BadParameter(f"{out.name} has to end in one of .{', .'.join(kinds)}", param_hint="--out")
        if saved.topology is not None:
            figures[out.with_stem(f"{out.stem}-topology")] = pictures.topology_figure(saved.topology)
            plan = compile_attention(saved.layout, saved.topology, normalize=normalize)
            figures[out.with_stem(f"{out.stem}-table")] = pictures.plan_figure(plan)
        for path, figure in figures.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                figure.savefig(file, format=path.suffix[1:].lower(), dpi=120, bbox_inches="tight")
            Console().print(str(path), highlight=False, soft_wrap=True)

    @app.command()
    def explore(schema: Path, out: Path = page_option, normalize: str = normalize_option) -> None:
        """Write OUT, an interactive page: regions in 3-D, frames, connections, the block table."""
        from canvas_engineering.explore import explore_page

        check("--normalize", normalize, NORMALIZE)
        if out.suffix.lower() not in (".html", ".htm"):
            raise typer.BadParameter(f"{out.name} has to end in .html", param_hint="--out")
        with refusals():
            page = explore_page(load_program(schema), normalize=normalize, title=schema.stem)
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out, page.encode())
        Console().print(str(out), highlight=False, soft_wrap=True)

    @app.command()
    def doctor() -> None:
        """Print versions, devices and extras, and check every backend's numbers; exits with 1 if one fails."""
        from canvas_engineering.doctor import doctor as examine

        raise typer.Exit(examine())

    @app.command(add_help_option=False, context_settings={"ignore_unknown_options": True})
    def bench(options: list[str] = options_argument) -> None:
        """Time block-sparse attention against dense masks and loops; --help lists the options."""
        if importlib.util.find_spec("benchmarks") is None:  # the suite is not installed with the package
            why = "there is no benchmarks/ here: run this in the folder of the source"
            Console(stderr=True).print(why, style="red", highlight=False)
            raise typer.Exit(2)
        raise typer.Exit(subprocess.call([sys.executable, "-m", "benchmarks.bench", *(options or ())]))

    return app


def main() -> None:
    """Run the command line; says which extra is missing where typer, rich or matplotlib is."""
    if sys.argv[1:] == ["doctor"]:  # works without the extras
        from canvas_engineering.doctor import doctor

        sys.exit(doctor())
    try:
        build_app()()
    except ModuleNotFoundError as cause:
        extra = EXTRA_OF.get((cause.name or "").partition(".")[0])
        if extra is None:
            raise
        sys.exit(f"{cause}: pip install 'canvas-engineering[{extra}]'")


if __name__ == "__main__":
    main()
