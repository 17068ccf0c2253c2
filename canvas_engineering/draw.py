"""Pictures of a layout, a topology and a plan.

Each function returns a :class:`matplotlib.figure.Figure` that belongs to no window: ``figure.savefig("layout.png")``.
matplotlib is imported when a picture is drawn, not before.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

from canvas_engineering.canvas import CanvasLayout, RegionSpec
from canvas_engineering.connectivity import CanvasTopology

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from canvas_engineering.plan import AttentionPlan

__all__ = ["layout_figure", "plan_figure", "topology_figure"]

MAX_PANELS = 8
MAX_LABELS = 40
CHARACTERS_PER_PANEL = 44


def layout_figure(layout: CanvasLayout) -> Figure:
    """Regions as boxes on the grid, one panel per run of frames that hold the same regions, over their clocks.

    Grids with more than two spatial dimensions are seen along the last two; a one-dimensional grid is one row. Below,
    each region has one tick per frame at that frame's real time, ``frame · period``.
    """
    specs = {name: layout.region_spec(name) for name in layout.regions}
    runs = _frame_runs(layout.T, specs)
    shown = runs[:MAX_PANELS]
    figure = _figure(width=max(6.0, 3.2 * len(shown)), height=4.2 + 0.22 * min(len(specs), MAX_LABELS))
    panels, clocks = figure.subfigures(2, 1, height_ratios=[3.2, 1.0 + 0.22 * min(len(specs), MAX_LABELS)])
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


def topology_figure(topology: CanvasTopology) -> Figure:
    """Who reads whom as a matrix: rows ask, columns answer, the colour is the sum of the weights.

    With up to 12 regions every cell names its connections: the frames (t_src, t_dst), or "all" for no offsets.
    """
    import numpy as np

    names = sorted(topology.regions)
    place = {name: i for i, name in enumerate(names)}
    weights = np.zeros((len(names), len(names)))
    cells: dict[tuple[int, int], list[str]] = {}
    for connection in topology.connections:
        cell = place[connection.src], place[connection.dst]
        weights[cell] += connection.weight
        cells.setdefault(cell, []).append(_offsets(connection.t_src, connection.t_dst))

    side = min(14.0, 3.0 + 0.6 * len(names))
    figure = _figure(width=side + 1.0, height=side)
    axes = figure.subplots()
    image = axes.imshow(np.ma.masked_equal(weights, 0.0), cmap="Blues", vmin=0.0)
    figure.colorbar(image, ax=axes, shrink=0.7, label="sum of weights")
    if len(names) <= 12:
        for (row, column), texts in cells.items():
            dark = weights[row, column] > 0.6 * weights.max()
            axes.text(column, row, "\n".join(texts), ha="center", va="center", fontsize=7, color="w" if dark else "k")
    if len(names) <= MAX_LABELS:
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(xlabel="answers (dst)", ylabel="asks (src)")
    axes.set_title(f"{len(topology.connections)} connections between {len(names)} regions", fontsize=10)
    return figure


def plan_figure(plan: AttentionPlan) -> Figure:
    """The compiled table: every rectangle of query rows × key columns in packed order, in its connection's colour.

    Positions that no read uses have no packed place and are not drawn. The title gives the density (selected pairs over
    N²); the legend names the first connections.
    """
    import numpy as np
    from matplotlib.collections import PolyCollection
    from matplotlib.patches import Patch

    table = plan.table
    names = [f"{c.src} → {c.dst} ({_offsets(c.t_src, c.t_dst)})" for c in plan.connections]
    colours = _colours(range(max(1, len(names))))
    corners = np.stack(
        [
            np.stack([table.k_start, table.k_stop, table.k_stop, table.k_start], axis=1),
            np.stack([table.q_start, table.q_start, table.q_stop, table.q_stop], axis=1),
        ],
        axis=2,
    )
    # In joint form a rectangle belongs to no one connection: the table gives all of them edge 0.
    faces = [colours[edge] for edge in table.edge.tolist()]
    figure = _figure(width=9.0, height=7.0)
    axes = figure.subplots()
    # The thin outline keeps a rectangle visible that is smaller than a pixel.
    axes.add_collection(PolyCollection(corners, facecolors=faces, edgecolors=faces, linewidths=0.3, alpha=0.8))
    axes.set(xlim=(0, plan.n_packed), ylim=(plan.n_packed, 0), aspect="equal")
    axes.set(xlabel="keys, packed order", ylabel="queries, packed order")
    axes.set_title(
        f"{len(table.weight):,} rectangles, {plan.normalize} form, density {100 * plan.density:.2f} %, "
        f"{plan.n_packed:,} of {plan.n_positions:,} positions in use",
        fontsize=10,
    )
    if plan.normalize == "edge" and names:
        handles = [Patch(color=colours[i], label=name) for i, name in enumerate(names[:MAX_LABELS])]
        beside = dict(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)
        axes.legend(handles=handles, fontsize=7, title=f"{len(names)} connections", **beside)
    return figure


def _frame_runs(frames: int, specs: dict[str, RegionSpec]) -> list[tuple[int, int, tuple[str, ...]]]:
    """Maximal runs of frames that hold the same regions: (first, last, names)."""
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

    palette = colormaps["tab20"].colors
    return {name: palette[i % len(palette)] for i, name in enumerate(names)}


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
