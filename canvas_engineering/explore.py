"""A page to explore a canvas: rotatable regions, connections over time, and the block table.

:func:`explore_page` returns one HTML document that needs no network and no package, with the declaration as JSON. Its
size depends on regions and connections, not on positions: connections with equal frames, periods, offsets and fill
share one pattern of frames.
"""

from __future__ import annotations

import html
import json
import re
from importlib import resources
from typing import Any

import numpy as np

from canvas_engineering.canvas import CanvasLayout
from canvas_engineering.checked import checked_kind, checked_string
from canvas_engineering.clock_ir import And, BoundaryExpr, ClockExpr, Cooldown, MaxSilence, Not, OnEvent, Or, Periodic
from canvas_engineering.connectivity import Connection, TemporalFill, connection_frames
from canvas_engineering.masks import mask_parts
from canvas_engineering.plan import AttentionPlan, compile_attention
from canvas_engineering.program import CanvasProgram, ClockSpec, RegionProgram
from canvas_engineering.schema import CanvasSchema

__all__ = ["explore_page"]

FILES = ("explore.html", "explore.js", "explore_scene.js", "explore_table.js")
"""The page and its scripts, which are put into it; they lie beside this file."""
MAX_RECTANGLES = 20_000
"""Rectangles on the page; beyond, the largest."""
MAX_MASKED = 20_000
"""Boxes that masks split attention sets into; connections beyond are shown as if they had no mask."""


def explore_page(declaration: CanvasSchema | CanvasProgram, *, normalize: str = "edge", title: str = "canvas") -> str:
    """Returns a self-contained HTML page of a canvas, to open in any browser.

    Args:
        declaration: a schema, or a program, whose families, clocks, triggers and write modes are then shown too.
        normalize: the form of the table beside the canvas: "edge" or "joint", as for :func:`compile_attention`.
        title: heading of the page.

    Returns:
        the document. A schema without a topology gives regions and clocks alone.

    Raises:
        ValueError: neither a schema nor a program, or a declaration that cannot be compiled in this form.

    >>> from canvas_engineering import CanvasTopology
    >>> layout = CanvasLayout(T=2, H=2, W=2, d_model=8, regions={"a": (0, 2, 0, 2, 0, 2)})
    >>> page = explore_page(CanvasSchema(layout, CanvasTopology.dense(["a"])))
    >>> page.startswith("<!doctype html>"), "http" in page
    (True, False)
    """
    if isinstance(declaration, CanvasSchema):
        declaration = CanvasProgram(declaration)
    program = checked_kind(declaration, "what is explored", CanvasProgram)
    title = checked_string(title, "title")
    # "<" would let a name end the script that holds it
    data = json.dumps(_page_data(program, normalize), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    folder = resources.files("canvas_engineering")
    page, *scripts = ((folder / name).read_text(encoding="utf-8") for name in FILES)
    parts = {"TITLE": html.escape(title), "SCRIPT": "\n".join(scripts), "DATA": data}
    return re.sub("@(TITLE|SCRIPT|DATA)@", lambda mark: parts[mark[1]], page)


def _page_data(program: CanvasProgram, normalize: str) -> dict[str, Any]:
    layout, topology = program.schema.layout, program.schema.topology
    data = {
        "grid": [layout.T, *layout.spatial_shape],
        "width": layout.d_model,
        "regions": _regions(layout, program),
        "connections": None,
        "table": None,
    }
    if topology is not None:
        plan = compile_attention(layout, topology, program, normalize=normalize)
        data["connections"] = _connections(layout, plan, program)
        data["table"] = _table(plan)
    return data


def _regions(layout: CanvasLayout, program: CanvasProgram) -> dict[str, list]:
    """Columns over regions: names, bounds, periods, badges and facts, (name, value) each, and slots or 0."""
    specs = [layout.region_spec(name) for name in layout.regions]
    programs = [program.regions.get(name) for name in layout.regions]
    return {
        "name": list(layout.regions),
        "bounds": [spec.bounds for spec in specs],
        "period": [spec.period for spec in specs],
        "badges": [[] if region is None else _badges(region) for region in programs],
        "facts": [_facts(spec) for spec in specs],
        "slots": [r.identity.slot_capacity if r is not None and r.identity is not None else 0 for r in programs],
    }


def _facts(spec) -> list[tuple[str, str]]:
    """Returns a region's non-default declarations beyond bounds and period."""
    facts = [
        ("semantic type", spec.semantic_type or ""),
        ("in the loss", "no" if not spec.is_output else f"weight {spec.loss_weight:g}" * (spec.loss_weight != 1)),
        ("attends with", spec.default_attn * (spec.default_attn != "cross_attention")),
        ("carrier", spec.carrier * (spec.carrier != "deterministic")),
    ]
    return [fact for fact in facts if fact[1]]


def _badges(region: RegionProgram) -> list[tuple[str, str]]:
    """Returns a region's program as (what, value)."""
    learning, mode = region.learning, region.effective_compile_mode()
    badges = [
        ("family", region.family),
        *(("tag", tag) for tag in region.tags),
        ("carrier", region.carrier * (region.carrier != "deterministic")),
        ("clock", "" if region.clock is None else _clock_words(region.clock)),
        ("learning", "" if learning is None else ", ".join((learning.mode, *learning.losses))),
        ("deploy", mode * (mode != "runtime")),
        ("identity", "" if region.identity is None else f"{region.identity.slot_capacity} slots"),
    ]
    return [badge for badge in badges if badge[1]]


def _clock_words(clock: ClockSpec) -> str:
    if clock.expr is not None:
        words = _expression_words(clock.expr)
    elif clock.mode == "periodic":
        words = f"every {clock.period}" if clock.period > 1 else "every step"
    elif clock.mode == "on_event":
        words = f"while {clock.event_source} > {clock.event_threshold:g}"
    else:
        words = f"at {clock.event_source}"
    limits = [
        f"cooldown {clock.cooldown}" * bool(clock.cooldown),
        f"silent at most {clock.max_silence}" * bool(clock.max_silence),
        f"{clock.max_inner_steps} inner steps" if clock.max_inner_steps else "",
        f"{clock.domain} time" * (clock.domain != "external"),
    ]
    return ", ".join([words, *filter(None, limits)])


def _expression_words(clock: ClockExpr) -> str:
    if isinstance(clock, (And, Or)):
        joint = "and" if isinstance(clock, And) else "or"
        return f"({_expression_words(clock.left)} {joint} {_expression_words(clock.right)})"
    if isinstance(clock, Periodic):
        return f"every {clock.period}"
    if isinstance(clock, OnEvent):
        bounds = ((">", clock.gt), ("<", clock.lt))
        return " and ".join(f"{clock.source} {sign} {bound:g}" for sign, bound in bounds if bound is not None)
    if isinstance(clock, BoundaryExpr):
        return f"at {clock.name}"
    if not isinstance(clock, (Not, Cooldown, MaxSilence)):
        return repr(clock)
    child = _expression_words(clock.child)
    if isinstance(clock, Not):
        return f"not ({child})"
    if isinstance(clock, Cooldown):
        return f"{child}, cooldown {clock.steps}"
    return f"{child}, silent at most {clock.steps}"


def _connections(layout: CanvasLayout, plan: AttentionPlan, program: CanvasProgram) -> dict[str, Any]:
    """Columns over connections, as they run under the program; regions by number, -1 for those that the layout lacks.

    "frames" numbers a pattern: rows (q_start, q_stop, k_start, k_stop, fraction) of frames. "masked" gives, instead,
    rows (query box, key/value box, fraction) by connection.
    """
    number = {name: i for i, name in enumerate(layout.regions)}
    patterns = _Patterns(layout)
    notes, masked = {}, {}
    room = MAX_MASKED
    for i, c in enumerate(plan.connections):
        note = _notes(c, plan.triggers.get(i), program)
        if c.mask is not None and c.mask.effective_kind != "full" and c.src in number and c.dst in number:
            boxes = _masked_boxes(c, layout) if room > 0 else []
            room -= len(boxes)
            if room < 0 or not boxes:
                note.append(("mask", f"{c.mask.kind}, not drawn"))
            else:
                note.append(("mask", c.mask.kind))
                masked[i] = boxes
        if note:
            notes[i] = note
    work = plan.work_by_connection() if plan.normalize == "edge" else {}
    return {
        "src": [number.get(c.src, -1) for c in plan.connections],
        "dst": [number.get(c.dst, -1) for c in plan.connections],
        "weight": [c.weight for c in plan.connections],
        "offsets": [(c.t_src, c.t_dst) for c in plan.connections],
        "fill": [_fill_words(c) for c in plan.connections],
        "fn": plan.fns,
        "replaces": plan.replace.nonzero()[0].tolist(),
        "sets": plan.attention_sets.counts(plan.n_connections).tolist(),
        "frames": [patterns.of(c) for c in plan.connections],
        "patterns": patterns.rows,
        "notes": notes,
        "masked": masked,
        **{name: values.tolist() for name, values in work.items()},
    }


def _fill_words(c: Connection) -> str:
    """Returns the temporal fill, empty for a connection over all frames."""
    if c.t_dst is None:
        return ""
    higher = c.temporal_fill is TemporalFill.INTERPOLATE and c.interpolation_order > 1
    return f"{c.temporal_fill.value} {c.interpolation_order}" if higher else c.temporal_fill.value


def _notes(c: Connection, trigger: str | None, program: CanvasProgram) -> list[tuple[str, str]]:
    declared = program.connections.get((c.src, c.dst))
    operator = c.operator if declared is None else declared.operator
    notes = [
        ("operator", operator * (operator != "attend")),
        ("write", c.write_mode * (c.write_mode != "add")),
        ("trigger", trigger or ""),
    ]
    return [note for note in notes if note[1]]


class _Patterns:
    """Frame patterns of connections, each once."""

    def __init__(self, layout: CanvasLayout):
        self.layout, self.number, self.rows = layout, {}, []

    def of(self, c: Connection) -> int:
        """Returns the number of a connection's pattern; -1 where the layout lacks one of its regions."""
        if c.src not in self.layout.regions or c.dst not in self.layout.regions:
            return -1
        key = _times(c, self.layout)
        if key not in self.number:
            self.number[key] = len(self.rows)
            frames = connection_frames(c, self.layout)
            columns = (frames.q_start, frames.q_stop, frames.k_start, frames.k_stop, frames.fraction)
            self.rows.append(list(zip(*(column.tolist() for column in columns))))
        return self.number[key]


def _times(c: Connection, layout: CanvasLayout) -> tuple:
    """Returns the fields that determine a connection's frames."""
    src, dst = layout.region_spec(c.src), layout.region_spec(c.dst)
    frames = (layout.T, src.bounds[:2], dst.bounds[:2], src.period, dst.period)
    return (*frames, c.t_src, c.t_dst, c.temporal_fill, c.interpolation_order)


def _masked_boxes(c: Connection, layout: CanvasLayout) -> list[tuple]:
    frames = connection_frames(c, layout)
    boxes = layout.region_box(c.src), layout.region_box(c.dst)
    assert c.mask is not None  # masked connections alone get here
    row, part, queries, keys = mask_parts(c.mask, *boxes, frames.queries, frames.keys)
    columns = (queries.reshape(len(queries), -1), keys.reshape(len(keys), -1), frames.fraction[row[part]])
    return list(zip(*(column.tolist() for column in columns)))


def _table(plan: AttentionPlan) -> dict[str, Any]:
    """Returns the block table: its largest rectangles as rows (q_start, q_stop, k_start, k_stop, connection), and its
    sums."""
    table = plan.table
    area = (table.q_stop - table.q_start) * (table.k_stop - table.k_start)
    # among equals, spread over the table: multiples of the golden ratio fill a circle evenly
    largest = np.lexsort((np.arange(len(area)) * 0.6180339887 % 1, -area))[:MAX_RECTANGLES]
    columns = (table.q_start, table.q_stop, table.k_start, table.k_stop, table.edge)
    return {
        "form": plan.normalize,
        "rows": plan.n_packed,
        "rectangles": np.stack([column[largest] for column in columns], axis=1).tolist(),
        "total": len(table.weight),
        "pairs": int(table.pairs),
        "density": plan.density,
        "fill": plan.fill,
        "fills": plan.fill_by_tile,
        "sets": len(plan.attention_sets.weight),
    }
