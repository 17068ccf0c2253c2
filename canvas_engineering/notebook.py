"""HTML representations of layouts, topologies and plans in notebooks: a picture and a table.

A page to turn and to search is `canvas_engineering.explore`'s.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

MAX_ROWS = 40
MAX_BOXES = 400
MAX_RECTANGLES = 1500
PALETTE = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#76b7b2", "#edc948", "#ff9da7", "#9c755f", "#5b5ea6")


def layout_html(layout: Any) -> str:
    """A CanvasLayout: its regions as boxes, time running back to the right, and as a table."""
    specs = {name: layout.region_spec(name) for name in itertools.islice(layout.regions, max(MAX_ROWS, MAX_BOXES))}
    grid = " × ".join(map(str, (layout.T, *layout.spatial_shape)))
    title = f"CanvasLayout: {len(layout.regions):,} regions on {grid} = {layout.num_positions:,} positions"
    rows = []
    for (name, spec), colour in zip(specs.items(), itertools.cycle(PALETTE)):
        bounds = " × ".join(f"{low}:{high}" for low, high in zip(spec.bounds[::2], spec.bounds[1::2]))
        rows.append((_swatch(colour) + _text(name), bounds, f"{layout.region_numel(name):,}", str(spec.period)))
    table = _table(("region", "bounds", "positions", "period"), rows, len(layout.regions))
    boxes = [_plane(spec.bounds) for spec in specs.values()][:MAX_BOXES]
    height, width = (1, 1, *layout.spatial_shape)[-2:]
    return _titled(title, _boxes((layout.T, height, width), boxes), table)


def topology_html(topology: Any) -> str:
    """A CanvasTopology: its connections as a table."""
    title = f"CanvasTopology: {len(topology.connections):,} connections among {len(topology.regions):,} regions"
    connections = topology.connections[:MAX_ROWS]
    rows = [(*_connection(c), _text(c.fn or "default")) for c in connections]
    columns = ("query region", "key/value region", "frames", "fill", "weight", "function")
    return _titled(title, _table(columns, rows, len(topology.connections)))


def plan_html(plan: Any) -> str:
    """An AttentionPlan: its rectangles, queries down and keys across, what it costs, and its connections."""
    first, *costs = plan.summary().splitlines()
    counts = plan.attention_sets.counts(plan.n_connections)
    connections = zip(plan.connections[:MAX_ROWS], plan.fns, counts.tolist(), itertools.cycle(PALETTE))
    rows = [(_swatch(colour), *_connection(c), _text(fn), f"{count:,}") for c, fn, count, colour in connections]
    columns = ("", "query region", "key/value region", "frames", "fill", "weight", "function", "attention sets")
    words = "".join(f"<div>{_text(line.strip())}</div>" for line in costs)
    return _titled(first, _rectangles(plan), words, _table(columns, rows, plan.n_connections))


def _connection(c: Any) -> tuple[str, ...]:
    offsets = (c.t_src, c.t_dst)
    frames = " → ".join("all" if t is None else f"t{t:+d}" if t else "t" for t in offsets)
    fill = "" if c.t_dst is None else c.temporal_fill.value
    return _text(c.src), _text(c.dst), frames, fill, f"{c.weight:g}"


def _plane(bounds: Sequence[int]) -> tuple[int, ...]:
    """Returns (t0, t1, row0, row1, column0, column1): the last two spatial dimensions; one dimension is one row."""
    return (*bounds[:2], *(0, 1, 0, 1, *bounds[2:])[-4:])


def _boxes(size: tuple[int, int, int], boxes: list[tuple[int, ...]]) -> str:
    """Boxes (t0, t1, row0, row1, column0, column1) on a grid of (frames, rows, columns), as their visible faces."""
    frames, rows, columns = size
    unit = 200 / max(rows, columns)
    depth = np.array([0.55, -0.35]) * min(16.0, 160 / frames)  # of a frame, in pixels

    def corner(t: int, row: int, column: int) -> str:
        x, y = np.array([column * unit, row * unit - frames * depth[1]]) + t * depth
        return f"{x:.1f},{y:.1f}"

    def face(corners: Iterable[tuple[int, int, int]], style: str) -> str:
        return f'<polygon points="{" ".join(corner(*c) for c in corners)}" {style}/>'

    drawn = []
    # what lies in front is drawn last: earlier frames, higher rows, columns to the right
    for i in sorted(range(len(boxes)), key=lambda i: (-boxes[i][0], -boxes[i][2], boxes[i][4])):
        t0, t1, r0, r1, c0, c1 = boxes[i]
        style = f'fill="{PALETTE[i % len(PALETTE)]}" fill-opacity=".75" stroke="#333" stroke-width=".5"'
        drawn.append(face([(t0, r0, c0), (t1, r0, c0), (t1, r0, c1), (t0, r0, c1)], style))
        drawn.append(face([(t0, r0, c1), (t1, r0, c1), (t1, r1, c1), (t0, r1, c1)], style))
        drawn.append(face([(t0, r0, c0), (t0, r0, c1), (t0, r1, c1), (t0, r1, c0)], style))
    width, height = columns * unit + frames * depth[0], rows * unit - frames * depth[1]
    return _svg(width, height, drawn)


def _rectangles(plan: Any) -> str:
    table, side = plan.table, 240
    area = (table.q_stop - table.q_start) * (table.k_stop - table.k_start)
    largest = np.argsort(-area, kind="stable")[:MAX_RECTANGLES]
    scale = side / max(1, plan.n_packed)
    drawn = [f'<rect width="{side}" height="{side}" fill="#fff" stroke="#999" stroke-width=".5"/>']
    columns = (table.q_start, table.q_stop, table.k_start, table.k_stop, table.edge)
    for q0, q1, k0, k1, edge in np.stack([column[largest] for column in columns], axis=1).tolist():
        size = f'width="{max(0.5, (k1 - k0) * scale):.1f}" height="{max(0.5, (q1 - q0) * scale):.1f}"'
        corner = f'x="{k0 * scale:.1f}" y="{q0 * scale:.1f}"'
        drawn.append(f'<rect {corner} {size} fill="{PALETTE[edge % len(PALETTE)]}"/>')
    return _svg(side, side, drawn)


def _svg(width: float, height: float, drawn: list[str]) -> str:
    box = f'viewBox="-1 -1 {width + 2:.0f} {height + 2:.0f}" width="{width + 2:.0f}" height="{height + 2:.0f}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box}>{"".join(drawn)}</svg>'


def _text(value: str) -> str:
    return html.escape(value)


def _swatch(colour: str) -> str:
    return f'<span style="display:inline-block;width:.8em;height:.8em;margin-right:.4em;background:{colour}"></span>'


def _table(columns: Sequence[str], rows: list[tuple[str, ...]], total: int) -> str:
    """Returns a table of HTML entries, the first of ``total`` rows."""
    head = "".join(f'<th style="text-align:left">{name}</th>' for name in columns)
    cells = ("".join(f'<td style="text-align:left">{cell}</td>' for cell in row) for row in rows[:MAX_ROWS])
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    more = f"<div>the first {MAX_ROWS} of {total:,}</div>" if total > MAX_ROWS else ""
    return f"<table><tr>{head}</tr>{body}</table>{more}"


def _titled(title: str, *parts: str) -> str:
    return f"<div><div><b>{_text(title)}</b></div>{''.join(parts)}</div>"
