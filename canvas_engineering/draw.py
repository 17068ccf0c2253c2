"""Pictures of a layout, a topology and a plan.

Each function returns a :class:`matplotlib.figure.Figure` that belongs to no window: ``figure.savefig("layout.png")``.
matplotlib is imported when a picture is drawn, not before.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

from canvas_engineering.canvas import CanvasLayout, RegionSpec, transfer_distance
from canvas_engineering.connectivity import CanvasTopology, Connection, connection_frames

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from canvas_engineering.plan import AttentionPlan
    from canvas_engineering.schema import CanvasSchema

__all__ = [
    "alignment_figure",
    "distance_figure",
    "frames_figure",
    "layout_figure",
    "plan_figure",
    "topology_figure",
    "volume_figure",
]

MAX_PANELS = 8
MAX_LABELS = 40
MAX_NAMED = 12
MAX_OUTLINED = 1000
CHARACTERS_PER_PANEL = 44
BOUNDS = ("q_start", "q_stop", "k_start", "k_stop")


def layout_figure(layout: CanvasLayout) -> Figure:
    """Regions as boxes on the grid, one panel per run of frames that hold the same regions, over their clocks.

    Grids with more than two spatial dimensions are drawn along the last two; a one-dimensional grid is one row. Below,
    each region has one tick per frame at that frame's real time, ``frame · period``.
    """
    specs = {name: layout.region_spec(name) for name in layout.regions}
    runs = _frame_runs(layout.T, specs)
    shown = runs[:MAX_PANELS]
    figure = _figure(width=max(6.0, 3.2 * len(shown)), height=4.2 + 0.22 * min(len(specs), MAX_LABELS))
    heights = [3.2, 1.0 + 0.22 * min(len(specs), MAX_LABELS)]
    panels, clocks = (part[0] for part in figure.subfigures(2, 1, squeeze=False, height_ratios=heights))
    colours = _colours(specs)
    rows, columns = _plane(layout.spatial_shape)
    for axes, (first, last, names) in zip(panels.subplots(1, len(shown), squeeze=False)[0], shown):
        for name in names:
            _draw_region(axes, name, specs[name], colours[name], characters=CHARACTERS_PER_PANEL / columns)
        axes.set(xlim=(0, columns), ylim=(rows, 0), aspect="equal")
        axes.set_title(f"frame {first}" if first == last else f"frames {first} to {last}", fontsize=9)
    grid = " × ".join(map(str, (layout.T, *layout.spatial_shape)))
    left_out = f" (the first {MAX_PANELS} of {len(runs)} runs of frames)" if len(runs) > MAX_PANELS else ""
    panels.suptitle(f"{len(specs)} regions on {grid} = {layout.num_positions:,} positions{left_out}", fontsize=10)
    _draw_clocks(clocks.subplots(), specs, colours)
    return figure


def volume_figure(layout: CanvasLayout, azimuth: float = -60.0, elevation: float = 22.0) -> Figure:
    """Regions as boxes in (T, H, W), viewed from ``azimuth`` and ``elevation``, in degrees.

    Grids with more than two spatial dimensions are drawn along the last two.

    >>> layout = CanvasLayout(T=2, d_model=8, spatial_shape=(2, 2), regions={"video": (0, 2, 0, 2, 0, 2)})
    >>> volume_figure(layout).axes[0].get_xlabel()
    'frame'
    """
    from matplotlib.patches import Patch

    rows, columns = _plane(layout.spatial_shape)
    colours = _colours(layout.regions)
    figure = _figure(width=8.0, height=5.4)
    axes = figure.add_subplot(projection="3d")
    for name in layout.regions:
        t0, t1, *box = layout.region_spec(name).bounds
        top, bottom, left, right = (0, 1, 0, 1, *box)[-4:]
        corner, size = (t0, left, top), (t1 - t0, right - left, bottom - top)
        axes.bar3d(*corner, *size, color=colours[name], alpha=0.45, edgecolor="k", linewidth=0.3, shade=False)
    axes.set(xlim=(0, layout.T), ylim=(0, columns), zlim=(rows, 0))
    axes.set(xlabel="frame", ylabel="column", zlabel="row")
    axes.set_box_aspect((1.6, 1.0, rows / max(rows, columns)))
    axes.view_init(elev=elevation, azim=azimuth)
    handles = [Patch(color=colour, label=name) for name, colour in list(colours.items())[:MAX_LABELS]]
    if handles:
        figure.legend(handles=handles, loc="outside right upper", fontsize=8)
    return figure


def frames_figure(layout: CanvasLayout, connection: Connection) -> Figure:
    """Which frames of the key/value region each frame of the query region attends to, and with which share of the
    connection's weight (docs/semantics.md, section 2): a row for each query frame, a column for each key frame.

    >>> regions = {"fast": (0, 4, 0, 1), "slow": RegionSpec((0, 2, 1, 2), period=2)}
    >>> layout = CanvasLayout(T=4, d_model=8, spatial_shape=(2,), regions=regions)
    >>> frames_figure(layout, Connection("fast", "slow", t_src=0, t_dst=0)).axes[0].get_ylabel()
    'frame of fast (real time)'
    """
    import numpy as np

    src, dst = (layout.region_spec(name) for name in (connection.src, connection.dst))
    pairs = connection_frames(connection, layout)
    shares = np.zeros((layout.T, layout.T))
    for q_start, q_stop, k_start, k_stop, fraction in zip(
        pairs.q_start, pairs.q_stop, pairs.k_start, pairs.k_stop, pairs.fraction
    ):
        shares[q_start:q_stop, k_start:k_stop] += fraction
    shares = shares[slice(*src.bounds[:2]), slice(*dst.bounds[:2])]
    figure = _figure(width=3.2 + 0.32 * shares.shape[1], height=1.6 + 0.32 * shares.shape[0])
    axes = figure.subplots()
    image = axes.imshow(np.ma.masked_equal(shares, 0.0), cmap="Blues", vmin=0.0, vmax=max(1.0, shares.max()))
    _write_values(axes, np.ma.masked_equal(shares, 0.0), "{:.2g}", dark=0.6)
    axes.set_yticks(range(len(shares)), _frame_names(src), fontsize=7)
    axes.set_xticks(range(shares.shape[1]), _frame_names(dst), fontsize=7, rotation=60)
    axes.set(ylabel=f"frame of {connection.src} (real time)", xlabel=f"frame of {connection.dst} (real time)")
    offsets = _offsets(connection.t_src, connection.t_dst)
    axes.set_title(f"{connection.temporal_fill.value}; offsets {offsets}", fontsize=9)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the weight")
    return figure


def _frame_names(spec: RegionSpec) -> list[str]:
    return [f"{frame} ({frame * spec.period})" for frame in range(*spec.bounds[:2])]


def _write_values(axes: Axes, values, form: str, dark: float) -> None:
    """Writes each value in its square, white where that is darker than ``dark``."""
    import numpy as np

    for (row, column), value in np.ma.ndenumerate(values):
        colour = "w" if value > dark else "k"
        axes.text(column, row, form.format(value), ha="center", va="center", fontsize=7, color=colour)


def distance_figure(layout: CanvasLayout) -> Figure:
    """Transfer distances between all regions that have a semantic embedding: 0 is the same meaning.

    Raises:
        ValueError: embeddings that cannot be compared, or fewer than two.
    """
    import numpy as np

    names = [name for name in layout.regions if layout.region_spec(name).semantic_embedding is not None]
    if len(names) < 2:
        raise ValueError(f"distances need two regions with an embedding; this layout has {names}")
    specs = [layout.region_spec(name) for name in names]
    distances = np.array([[transfer_distance(a, b) for b in specs] for a in specs])
    figure = _figure(width=4.0 + 0.4 * len(names), height=2.6 + 0.4 * len(names))
    axes = figure.subplots()
    image = axes.imshow(distances, cmap="viridis_r", vmin=0.0)
    _write_values(axes, distances, "{:.2f}", dark=0.5 * distances.max())
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.8, label="transfer distance")
    return figure


def alignment_figure(a: CanvasSchema, b: CanvasSchema, threshold: float = 0.3) -> Figure:
    """Two schemas side by side, with a line between regions within a transfer distance, the thicker the nearer."""
    figure = _figure(width=7.0, height=1.2 + 0.4 * max(len(a.layout.regions), len(b.layout.regions)))
    axes = figure.subplots()
    places = {}
    for column, schema in enumerate((a, b)):
        for row, name in enumerate(schema.layout.regions):
            places[column, name] = (column, -row)
            side = "right" if column == 0 else "left"
            axes.text(column + (0.03 if column else -0.03), -row, name, ha=side, va="center", fontsize=9)
            axes.plot(column, -row, "o", color="k", markersize=4)
    for one, other, distance in a.compatible_regions(b, threshold):
        (x0, y0), (x1, y1) = places[0, one], places[1, other]
        width = 0.5 + 3.5 * (1 - distance / max(threshold, 1e-9))
        axes.plot([x0, x1], [y0, y1], color="tab:blue", linewidth=width, alpha=0.6)
        axes.text(0.5, (y0 + y1) / 2, f"{distance:.2f}", ha="center", va="bottom", fontsize=7)
    axes.set(xlim=(-0.6, 1.6))
    axes.set_axis_off()
    axes.set_title(f"regions within a transfer distance of {threshold:g}", fontsize=10)
    return figure


def topology_figure(topology: CanvasTopology) -> Figure:
    """Which region attends to which: a row for each query region, a column for each key/value region; the colour is the
    sum of the weights.

    With up to 12 regions every square names the frames that its connections attend to, seen from the query's frame:
    "same frame", "1 to 8 frames back", or "all frames" for no offsets. Where only one of (t_src, t_dst) is given, it
    names both, "all" for the other.
    """
    import numpy as np

    names = sorted(topology.regions)
    place = {name: i for i, name in enumerate(names)}
    weights = np.zeros((len(names), len(names)))
    cells: dict[tuple[int, int], list[tuple[int | None, int | None]]] = {}
    for connection in topology.connections:
        cell = place[connection.src], place[connection.dst]
        weights[cell] += connection.weight
        cells.setdefault(cell, []).append((connection.t_src, connection.t_dst))

    side = min(14.0, 3.0 + 0.9 * len(names))
    figure = _figure(width=side + 1.0, height=side)
    axes = figure.subplots()
    image = axes.imshow(np.ma.masked_equal(weights, 0.0), cmap="Blues", vmin=0.0)
    figure.colorbar(image, ax=axes, shrink=0.7, label="sum of weights")
    if len(names) <= MAX_NAMED:
        size = 7.5 if len(names) <= MAX_NAMED // 2 else 6.5
        for (row, column), offsets in cells.items():
            dark = weights[row, column] > 0.6 * weights.max()
            text = textwrap.fill(offsets_in_words(offsets), 12, break_long_words=False)
            axes.text(column, row, text, ha="center", va="center", fontsize=size, color="w" if dark else "k")
    if len(names) <= MAX_LABELS:
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(xlabel="key/value region (dst)", ylabel="query region (src)")
    axes.set_title(f"{len(topology.connections)} connections between {len(names)} regions", fontsize=10)
    return figure


def plan_figure(plan: AttentionPlan) -> Figure:
    """The compiled table: every rectangle of query rows × key columns in packed order, in its pair of regions' colour.

    Positions that nothing attends to, and that attend to nothing, are not drawn. Both axes give positions that no
    rectangle tells apart the square root of their number, so that small regions are visible beside large ones. The
    title gives the density (selected pairs over N²); the legend names the first pairs, and the frames they attend to.
    """
    import numpy as np
    from matplotlib.collections import PolyCollection
    from matplotlib.patches import Patch

    table = plan.table
    pairs = [(c.src, c.dst) for c in plan.connections]
    colours = _colours(dict.fromkeys(pairs)) if pairs else {}
    corners = np.stack(
        [
            np.stack([table.k_start, table.k_stop, table.k_stop, table.k_start], axis=1),
            np.stack([table.q_start, table.q_start, table.q_stop, table.q_stop], axis=1),
        ],
        axis=2,
    )
    # In joint form rectangles belong to no single connection: all have number 0.
    faces = [colours[pairs[edge]] for edge in table.edge.tolist()]
    figure = _figure(width=10.0, height=7.0)
    axes = figure.subplots()
    # The thin outline tells neighbours apart, and keeps a rectangle visible that is smaller than a pixel.
    width = 0.3 if len(table.weight) > MAX_OUTLINED else 0.8
    outlines = faces if len(table.weight) > MAX_OUTLINED else "w"
    axes.add_collection(PolyCollection(list(corners), facecolors=faces, edgecolors=outlines, linewidths=width))
    end = max(1, plan.n_packed)
    cuts = np.unique(np.concatenate([[0, end], *(getattr(table, name) for name in BOUNDS)]))
    places = np.concatenate([[0.0], np.cumsum(np.sqrt(np.diff(cuts)))])
    functions = (lambda x: np.interp(x, cuts, places), lambda y: np.interp(y, places, cuts))
    axes.set_xscale("function", functions=functions)
    axes.set_yscale("function", functions=functions)
    axes.set(xlim=(0, end), ylim=(end, 0), box_aspect=1)
    axes.set(xlabel="keys, packed order (√ scale)", ylabel="queries, packed order (√ scale)")
    axes.set_title(
        f"{len(table.weight):,} rectangles, {plan.normalize} form, density {100 * plan.density:.2f} %, "
        f"{plan.n_packed:,} of {plan.n_positions:,} positions in use",
        fontsize=10,
    )
    if plan.normalize == "edge" and pairs:
        _name_regions(axes, plan, pairs)
        frames: dict[tuple[str, str], list] = {pair: [] for pair in colours}
        for pair, c in zip(pairs, plan.connections):
            frames[pair].append((c.t_src, c.t_dst))
        handles = [
            Patch(color=colours[pair], label=f"{pair[0]} attends to {pair[1]}: {offsets_in_words(offsets)}")
            for pair, offsets in list(frames.items())[:MAX_LABELS]
        ]
        size = 8 if len(handles) <= 20 else 7
        title = f"{len(pairs)} connections"
        beside = (1.01, 1.0)
        axes.legend(
            handles=handles, fontsize=size, title=title, loc="upper left", bbox_to_anchor=beside, borderaxespad=0.0
        )
    return figure


def _name_regions(axes: Axes, plan: AttentionPlan, pairs: list[tuple[str, str]]) -> None:
    """Ticks at the regions' first positions, with their names, where the regions lie in a few runs."""
    table, ends = plan.table, {}
    for edge, *bounds in zip(table.edge.tolist(), *(getattr(table, name).tolist() for name in BOUNDS)):
        for region, start, stop in zip(pairs[edge], bounds[::2], bounds[1::2]):
            ends[start] = max(ends.get(start, (0, "")), (stop, region))
    starts = sorted(ends)
    runs = [next(run) for _, run in groupby(starts, key=lambda start: ends[start][1])]
    if len(runs) <= MAX_LABELS // 2:
        names = [ends[start][1] for start in runs]
        axes.set_xticks(runs, names, rotation=60, ha="right", fontsize=8)
        axes.set_yticks(runs, names, fontsize=8)


def offsets_in_words(offsets: list[tuple[int | None, int | None]]) -> str:
    """Describes the frames of connections with these (t_src, t_dst): "same frame, 1 to 3 frames back"."""
    words = []
    steps = [dst - src for src, dst in offsets if src is not None and dst is not None]
    if 0 in steps:
        words.append("same frame")
    for what, sign in (("back", -1), ("ahead", 1)):
        runs = _runs(sorted({sign * step for step in steps if sign * step > 0}))
        if runs:
            listed = " and ".join(str(first) if first == last else f"{first} to {last}" for first, last in runs)
            words.append(f"{listed} frame{'s' * (runs != [(1, 1)])} {what}")
    if (None, None) in offsets:
        words.append("all frames")
    return ", ".join([*words, *(_offsets(*pair) for pair in offsets if (pair[0] is None) != (pair[1] is None))])


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Returns the first and last of each run of consecutive numbers."""
    firsts = [n for n in numbers if n - 1 not in numbers]
    lasts = [n for n in numbers if n + 1 not in numbers]
    return list(zip(firsts, lasts))


def _frame_runs(frames: int, specs: dict[str, RegionSpec]) -> list[tuple[int, int, tuple[str, ...]]]:
    """Returns the maximal runs of frames that hold the same regions: (first, last, names)."""
    cuts = sorted({0, frames, *(bound for spec in specs.values() for bound in spec.bounds[:2])})
    spans = [
        (start, stop - 1, tuple(n for n, s in specs.items() if s.bounds[0] <= start and stop <= s.bounds[1]))
        for start, stop in pairwise(cuts)
    ]
    merged = (list(group) for _, group in groupby(spans, key=lambda span: span[2]))
    return [(group[0][0], group[-1][1], group[0][2]) for group in merged]


def _plane(spatial: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the last two spatial dimensions."""
    rows, columns = (1, 1, *spatial)[-2:]
    return rows, columns


def _draw_region(axes: Axes, name: str, spec: RegionSpec, colour, characters: float) -> None:
    """A box with its name, where ``characters`` to a column leave room for it; the clocks below name every colour."""
    from matplotlib.patches import Rectangle

    top, bottom, left, right = (0, 1, 0, 1, *spec.bounds[2:])[-4:]
    axes.add_patch(Rectangle((left, top), right - left, bottom - top, facecolor=colour, edgecolor="k", alpha=0.55))
    if len(name) <= characters * (right - left):
        text = name if spec.period == 1 else f"{name}\nevery {spec.period}"
        axes.text((left + right) / 2, (top + bottom) / 2, text, ha="center", va="center", fontsize=7, clip_on=True)


def _draw_clocks(axes: Axes, specs: dict[str, RegionSpec], colours: dict) -> None:
    shown = list(specs.items())[:MAX_LABELS]
    for row, (name, spec) in enumerate(shown):
        times = [frame * spec.period for frame in range(spec.bounds[0], spec.bounds[1])]
        axes.plot(times, [row] * len(times), marker="|", linewidth=0.8, color=colours[name])
    axes.set_yticks(range(len(shown)), [f"{name} (period {spec.period})" for name, spec in shown], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("real time of each frame", fontsize=8)


def _offsets(t_src: int | None, t_dst: int | None) -> str:
    if t_src is None and t_dst is None:
        return "all"
    return ", ".join("all" if t is None else f"{t:+d}" if t else "0" for t in (t_src, t_dst))


def _colours(names) -> dict:
    from matplotlib import colormaps

    palette = colormaps["tab20"]
    return {name: palette(i % palette.N) for i, name in enumerate(names)}


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
