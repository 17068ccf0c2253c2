"""Types of latent space: a tree of objects with Fields becomes a schema.

`declare` holds declarations, `walk` turns an object into a tree of types, `pack` places its fields, `wire` connects
them, and `bound` is what comes out.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from canvas_engineering.canvas import CanvasLayout, RegionSpec
from canvas_engineering.checked import checked_int, checked_ints, checked_kind
from canvas_engineering.connectivity import CanvasTopology
from canvas_engineering.program import CanvasProgram, RegionProgram
from canvas_engineering.program.specs import resolved_carrier
from canvas_engineering.schema import CanvasSchema
from canvas_engineering.semantic import auto_semantic_type
from canvas_engineering.types.bound import BoundField, BoundSchema
from canvas_engineering.types.declare import ConnectivityPolicy, Field, LayoutStrategy, checked_strategy
from canvas_engineering.types.pack import auto_shape, field_shapes, pack, spatial_dims
from canvas_engineering.types.walk import TypeNode, walk
from canvas_engineering.types.wire import warn_of_parts_apart, wire

__all__ = [
    "DEFAULT_WIRING",
    "BoundField",
    "BoundSchema",
    "ConnectivityPolicy",
    "Field",
    "LayoutStrategy",
    "compile_program",
    "compile_schema",
]

# (src family, dst family): the operator of their connections
DEFAULT_WIRING: dict[tuple[str, str], str] = {
    ("observation", "state"): "observe",
    ("state", "observation"): "predict",
    ("state", "state"): "integrate",
    ("state", "memory"): "write",
    ("memory", "state"): "retrieve",
    ("state", "action"): "act",
    ("action", "state"): "intervene",
    ("state", "residual"): "emit_residual",
    ("observation", "residual"): "emit_residual",
    ("observation", "observation"): "attend",
    ("action", "action"): "attend",
    ("memory", "memory"): "attend",
    ("residual", "residual"): "attend",
}


def compile_schema(
    root: Any,
    T: int = 1,
    spatial_shape: tuple[int, ...] | None = None,
    d_model: int = 64,
    connectivity: ConnectivityPolicy | None = None,
    layout_strategy: str | LayoutStrategy = LayoutStrategy.PACKED,
    t_current: int = 0,
    H: int | None = None,
    W: int | None = None,
) -> BoundSchema:
    """Compiles an object with Field attributes into a layout, a topology, and its fields by path.

    The object is a dataclass, a Pydantic model or a plain object; its attributes may be such objects themselves, or
    lists of them. Fields come in declaration order, a type's own first, then nested types, then lists, under paths such
    as ``sensor.rgb`` and ``vehicles[3].plan``. Every nested object also gets a *coarse* field at its own path, which
    stands for it one level up. It is as ``metadata={"coarse": Field(h, w)}`` of the attribute declares, else as
    ``__coarse__`` of its class does, else a scalar. Its period is the declared one, else the mean of all periods
    below it, weighted by positions per frame. Parents attend to it and it to them, so a thousand
    children cost a thousand times what one does. Parts of one object are connected through its own fields; where it has
    none they stay unconnected (below the root they share its coarse field), and one UserWarning names them.

    Args:
        root: the object.
        T: frames of the canvas.
        spatial_shape: positions per spatial dimension; this, or ``H`` and ``W``; what is left open is sized to fit.
        d_model: channels per position.
        connectivity: which fields attend to which; by default all fields of one type do, and list elements do not.
        layout_strategy: "packed" (declaration order) or "interleaved" (fields of equal local name side by side).
        t_current: positions of frames from here on are outputs.
        H, W: rows and columns of a two-dimensional canvas.

    Raises:
        ValueError: no Field; an object that holds itself; fields that do not fit the canvas; both ``spatial_shape`` and
            ``H`` or ``W``; an unknown strategy. Messages name the field.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Robot:
    ...     camera: Field = Field(12, 12)
    ...     joints: Field = Field(1, 8)
    ...     action: Field = Field(1, 8, loss_weight=2.0)
    >>> bound = compile_schema(Robot(), T=8, d_model=256)
    >>> bound.field_names, bound.layout.spatial_shape, len(bound.topology.connections)
    (['camera', 'joints', 'action'], (17, 14), 9)
    """
    return compile_tree(walk(root), T, spatial_shape, d_model, connectivity, layout_strategy, t_current, H, W)


def compile_program(
    root: Any,
    T: int = 1,
    spatial_shape: tuple[int, ...] | None = None,
    d_model: int = 64,
    connectivity: ConnectivityPolicy | None = None,
    layout_strategy: str | LayoutStrategy = LayoutStrategy.PACKED,
    t_current: int = 0,
    H: int | None = None,
    W: int | None = None,
) -> tuple[BoundSchema, CanvasProgram]:
    """Returns `compile_schema`, and a program with the family, tags and carrier of every field, coarse ones too.

    A field that says nothing is a "state" of carrier "deterministic". Connections between two fields that both declare
    a family get the operator of DEFAULT_WIRING, if it has one for the pair. That alone changes nothing that is
    computed: ``program.connections`` is empty, for the ConnectionPrograms that are to be executed.

    Args:
        root, T, spatial_shape, d_model, connectivity, layout_strategy, t_current, H, W: as for `compile_schema`.

    Returns:
        the bound schema, and the program; ``bound.schema`` is ``program.schema``.

    Raises:
        ValueError: as `compile_schema`.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Robot:
    ...     camera: Field = Field(12, 12, family="observation")
    ...     joints: Field = Field(1, 8, family="observation", carrier="deterministic")
    ...     belief: Field = Field(4, 4, family="state", tags=("belief",))
    ...     action: Field = Field(1, 8, family="action", loss_weight=2.0)
    >>> bound, program = compile_program(Robot(), T=8, d_model=256)
    >>> print(program.summary())
    CanvasProgram (v2.0.0, 4 regions programmed):
      families: action=1, observation=2, state=1
    >>> {c.operator for c in bound.topology.connections if (c.src, c.dst) == ("belief", "camera")}
    {'predict'}
    """
    tree = walk(root)
    bound = compile_tree(tree, T, spatial_shape, d_model, connectivity, layout_strategy, t_current, H, W)
    declared = dict(tree.fields())
    families = {path: field.family for path, field in declared.items() if field.family is not None}
    connections = []
    for c in bound.topology.connections:
        operator = DEFAULT_WIRING.get((families.get(c.src, ""), families.get(c.dst, "")), c.operator)
        connections.append(c if operator == c.operator else dataclasses.replace(c, operator=operator))
    bound.schema.topology = CanvasTopology(connections)
    regions = {
        path: RegionProgram(field.family or "state", field.tags, bound.region_specs[path].carrier)
        for path, field in declared.items()
    }
    return bound, CanvasProgram(bound.schema, regions)


def compile_tree(
    tree: TypeNode,
    T: int,
    spatial_shape: tuple[int, ...] | None,
    d_model: int,
    connectivity: ConnectivityPolicy | None,
    layout_strategy: str | LayoutStrategy,
    t_current: int,
    H: int | None,
    W: int | None,
) -> BoundSchema:
    """Runs `compile_schema` on an existing tree."""
    policy = ConnectivityPolicy() if connectivity is None else connectivity
    checked_kind(policy, "connectivity", ConnectivityPolicy)
    strategy = checked_strategy(layout_strategy)
    T = checked_int(T, "compile_schema T", 1)
    fields: dict[str, Field] = {}
    for path, declared in tree.fields():
        if path in fields:
            raise ValueError(f"two fields have the path {path!r}: rename an attribute")
        fields[path] = declared
    places, grid = _places(fields, strategy, spatial_shape, H, W)
    specs = {path: _region(path, declared, T, *places[path]) for path, declared in fields.items()}
    layout = CanvasLayout(T=T, d_model=d_model, spatial_shape=grid, regions=specs, t_current=t_current)
    warn_of_parts_apart(tree, policy)
    return BoundSchema(CanvasSchema(layout, wire(tree, policy)), specs)


def _places(
    fields: dict[str, Field],
    strategy: LayoutStrategy,
    spatial_shape: tuple[int, ...] | None,
    H: int | None,
    W: int | None,
) -> tuple[dict[str, tuple[tuple[int, ...], tuple[int, ...]]], tuple[int, ...]]:
    """Returns the start and size of every field, and the grid they lie on."""
    given = H is not None or W is not None
    if spatial_shape is not None and given:
        raise ValueError(f"Cannot specify both: give spatial_shape={spatial_shape!r} or H={H}, W={W}, not both")
    H = None if H is None else checked_int(H, "compile_schema H", 1)
    W = None if W is None else checked_int(W, "compile_schema W", 1)
    if spatial_shape is None:
        n_dims = 2 if given else spatial_dims(list(fields.values()))
    else:
        spatial_shape = checked_ints(spatial_shape, "spatial_shape", 1, each="every size of spatial_shape")
        if not spatial_shape:
            raise ValueError("spatial_shape must be a tuple of ints, at least one, got ()")
        n_dims = len(spatial_shape)
    shapes = dict(zip(fields, field_shapes(fields, n_dims)))
    order = list(fields)
    if strategy is LayoutStrategy.INTERLEAVED:
        groups: dict[str, list[str]] = {}
        for path in order:
            groups.setdefault(_local_name(path), []).append(path)
        order = [path for group in groups.values() for path in group]
    in_order = [shapes[path] for path in order]
    if spatial_shape is None:
        spatial_shape = (H, W) if H is not None and W is not None else auto_shape(in_order, n_dims, H, W)
    starts = pack(order, in_order, spatial_shape)
    return {path: (start, shapes[path]) for path, start in zip(order, starts)}, spatial_shape


def _local_name(path: str) -> str:
    """Returns the last attribute's name: that of its list for an array element."""
    return path.rpartition(".")[2].partition("[")[0]


def _region(path: str, declared: Field, T: int, start: tuple[int, ...], shape: tuple[int, ...]) -> RegionSpec:
    bounds = [0, min(declared.temporal_extent or T, T)]
    for low, size in zip(start, shape):
        bounds += (low, low + size)
    return RegionSpec(
        bounds=tuple(bounds),
        period=declared.period,
        is_output=declared.is_output,
        loss_weight=declared.loss_weight,
        semantic_type=auto_semantic_type(path) if declared.semantic_type is None else declared.semantic_type,
        default_attn=declared.attn,
        carrier=resolved_carrier(declared.family, declared.carrier),
    )
