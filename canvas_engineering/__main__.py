"""``python -m canvas_engineering``: look at a saved schema, measure this machine.

    python -m canvas_engineering inspect SCHEMA.json --heads 24 --head-dim 64 --dtype bfloat16
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
from canvas_engineering.plan import NORMALIZE, compile_attention

MAX_ROWS = 60
EXTRA_OF = {"typer": "cli", "rich": "cli", "matplotlib": "draw"}
"""The extra that each package comes with."""
DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of an element."""
KEY = """
asks: the region whose positions query, and get the result; answers: the region that is read
frames: t → t-1 asks at each frame and reads the frame before; all is every frame at once
between frames: what is read where the region that answers has no frame at that time
read: one softmax of some positions over some others; rectangle: a block of the table that attention runs from
density: share of all pairs of positions that is computed; tile fill: how full the tiles of pairs are that a GPU walks
balance: share of a pass's time in which a GPU's multiprocessors work, and what whole tiles could give
log-sum-exp slots: numbers that each head keeps for the backward pass
in the picture: down, positions that ask; across, positions that are read; the darker, the more pairs are computed
"""


def load_schema(path: Path):
    """The schema in a JSON file, or of the program in it; ValueError that names the file otherwise."""
    return load_program(path).schema


def load_program(path: Path):
    """The program in a JSON file, which says nothing where that is a schema; ValueError that names the file
    otherwise."""
    from canvas_engineering.program import CanvasProgram

    try:
        return CanvasProgram.from_json(path)
    except OSError as cause:
        raise ValueError(f"{path}: {cause.strerror}") from cause
    except (ValueError, KeyError, TypeError) as cause:
        why = str(cause).removeprefix(f"{path}: ")  # most causes name the file too
        raise ValueError(f"{path} is no schema: {why}") from cause


def region_table(layout):
    """One row per region: bounds, positions, clock, part in the loss."""
    from rich.table import Table

    grid = " × ".join(map(str, (layout.T, *layout.spatial_shape)))
    positions = f"{layout.num_positions:,} positions of {layout.d_model}"
    table = Table(title=f"{len(layout.regions)} regions on {grid} = {positions}")
    for column in ("region", "bounds", "positions", "period", "loss", "reads with"):
        table.add_column(column, justify="right" if column in ("positions", "period") else "left")
    for name in list(layout.regions)[:MAX_ROWS]:
        spec = layout.region_spec(name)
        box = " × ".join(f"{a}:{b}" for a, b in zip(spec.bounds[::2], spec.bounds[1::2]))
        loss = f"{spec.loss_weight:g}" if spec.is_output else "no"
        table.add_row(name, box, f"{layout.region_numel(name):,}", str(spec.period), loss, spec.default_attn)
    _say_what_is_left_out(table, len(layout.regions))
    return table


def connection_table(layout, topology, plan):
    """One row per connection: who asks, who answers, at which frames, how, and in how many reads of the plan."""
    from rich.table import Table

    table = Table(title=f"{len(topology.connections)} connections")
    for column in ("asks", "answers", "frames", "between frames", "weight", "function", "reads"):
        table.add_column(column, justify="right" if column in ("weight", "reads") else "left")
    reads = plan.attention_sets.counts(plan.n_connections).tolist()
    for connection, count in zip(topology.connections[:MAX_ROWS], reads):
        offsets = (connection.t_src, connection.t_dst)
        frames = " → ".join("all" if t is None else f"t{t:+d}" if t else "t" for t in offsets)
        fill = "" if offsets == (None, None) else connection.temporal_fill.value
        known = connection.src in layout.regions and connection.dst in layout.regions
        fn = topology.resolve_fn(connection, layout) if known else "skipped: no such region"
        table.add_row(connection.src, connection.dst, frames, fill, f"{connection.weight:g}", fn, f"{count:,}")
    _say_what_is_left_out(table, len(topology.connections))
    return table


def call_in_words(plan, batch: int, heads: int, head_dim: int, dtype: str) -> str:
    """FLOPs of one attention call over the plan, bytes of its tensors, and how full tiles of each size are."""
    forward, backward = (plan.flops(head_dim, batch * heads, is_backward) / 1e9 for is_backward in (False, True))
    tensors = 4 * batch * heads * plan.n_positions * head_dim * DTYPES[dtype]
    fills = "".join(f", {tile} tiles {share:.0%} full" for tile, share in plan.fill_by_tile.items())
    return (
        f"batch {batch}, {heads} head{'s' * (heads != 1)} of {head_dim}, {dtype}: {forward:.3g} GFLOP forward, "
        f"{backward:.3g} backward; q, k, v and the result {tensors / 2**20:.3g} MiB{fills}"
    )


def balance_in_words(plan, batch: int, heads: int, head_dim: int, dtype: str) -> str:
    """How evenly each pass occupies an H200, and how evenly it could; empty where no kernel is built for it."""
    import torch

    from canvas_engineering.plan.balance import MULTIPROCESSORS, balance

    try:
        found = balance(plan.table, batch * heads, head_dim, getattr(torch, dtype))
    except ValueError:
        return ""
    names = {"forward": "forward", "dq": "dQ", "dkv": "dK and dV"}
    passes = ", ".join(f"{names[b.name]} {b.predicted:.2f} of {b.possible:.2f}" for b in found)
    return f"balance on {MULTIPROCESSORS} multiprocessors, predicted of possible: {passes}"


def _say_what_is_left_out(table, total: int) -> None:
    if total > MAX_ROWS:
        table.caption = f"the first {MAX_ROWS} of {total}"


def build_app():
    """The command-line application, a ``typer.Typer``."""
    import typer
    from rich.console import Console

    out_option = typer.Option(..., help="the layout's picture; the topology's and the table's lie beside it")
    page_option = typer.Option(..., help="the page, a file that ends in .html")
    normalize_option = typer.Option("edge", help="edge: a softmax per read; joint: one per query over all it reads")
    options_argument = typer.Argument(None, help="what the suite takes")
    app = typer.Typer(add_completion=False, no_args_is_help=True, help="Look at a saved canvas schema, or measure.")

    @contextlib.contextmanager
    def refusals():
        """Prints what is wrong with a file as one line."""
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
    ) -> None:
        """Print regions, connections, the compiled plan, and FLOPs, bytes and fill of attention on q, k and v."""
        check("--dtype", dtype, DTYPES)
        check("--normalize", normalize, NORMALIZE)
        found = open_schema(schema)
        console = Console()
        console.print(region_table(found.layout))
        if found.topology is None:
            console.print("no topology: nothing reads anything")
            return
        plan = compile_attention(found.layout, found.topology, normalize=normalize)
        console.print(connection_table(found.layout, found.topology, plan))
        words = (in_words(plan, batch, heads, head_dim, dtype) for in_words in (call_in_words, balance_in_words))
        console.print("\n".join([str(plan), *filter(None, words), KEY]), highlight=False, markup=False, soft_wrap=True)

    @app.command()
    def draw(schema: Path, out: Path = out_option, normalize: str = normalize_option) -> None:
        """Draw the layout to OUT and, with a topology, OUT's name with -topology and -table added."""
        from canvas_engineering import draw as pictures

        check("--normalize", normalize, NORMALIZE)
        found = open_schema(schema)
        figures = {out: pictures.layout_figure(found.layout)}
        kinds = figures[out].canvas.get_supported_filetypes()
        if out.suffix[1:].lower() not in kinds:
            raise typer.BadParameter(f"{out.name} has to end in one of .{', .'.join(kinds)}", param_hint="--out")
        if found.topology is not None:
            figures[out.with_stem(f"{out.stem}-topology")] = pictures.topology_figure(found.topology)
            plan = compile_attention(found.layout, found.topology, normalize=normalize)
            figures[out.with_stem(f"{out.stem}-table")] = pictures.plan_figure(plan)
        for path, figure in figures.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                figure.savefig(file, format=path.suffix[1:].lower(), dpi=120, bbox_inches="tight")
            Console().print(str(path), highlight=False, soft_wrap=True)

    @app.command()
    def explore(schema: Path, out: Path = page_option, normalize: str = normalize_option) -> None:
        """Write OUT, a page to look around the canvas in: boxes that turn, times, connections, the block table."""
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
        """Print versions, devices and extras, and check every backend's numbers; exits with 1 if one is wrong."""
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
    if sys.argv[1:] == ["doctor"]:  # it says what is missing, so it needs none of that
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
