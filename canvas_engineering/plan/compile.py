"""Declaration → :class:`AttentionPlan`, on the host, once: :func:`compile_attention`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from threading import Lock

import numpy as np

from ..canvas import CanvasLayout
from ..checked import checked_bool, checked_kind
from ..connectivity import CanvasTopology, resolve_connections
from ..cortex import CortexRegistry
from ..program import CanvasProgram
from ..program.checks import check_program
from ..program.connections import apply_program
from .attention_sets import SlotBank, resolve_attention_sets
from .ordering import pack_positions
from .plan import AttentionPlan
from .tables import edge_table, joint_table

__all__ = ["compile_attention"]

NORMALIZE = ("edge", "joint")
_CACHE_SIZE = 128
_cache: OrderedDict[Hashable, AttentionPlan] = OrderedDict()
_cache_lock = Lock()


def compile_attention(
    layout: CanvasLayout,
    topology: CanvasTopology,
    program: CanvasProgram | None = None,
    *,
    cortex: CortexRegistry | None = None,
    normalize: str = "edge",
    dense_in_time: bool = False,
) -> AttentionPlan:
    """Compiles a declaration into block tables. It runs on the host; cost and memory are proportional to the number of
    rectangles and positions.

    Args:
        layout: the regions and where they lie.
        topology: which regions attend to which. Connections to regions that the layout lacks are skipped with one
            UserWarning; another names connections that offsets or masks leave without any keys.
        program: how connections run: functions, write modes, masks and triggers, and which regions have slot banks.
            Connection programs for pairs without a connection get one UserWarning.
        cortex: gives connections inside one cortex its attention function.
        normalize: "edge" for one softmax per attention set, averaged by weight; "joint" for one softmax per query over
            the union of its sets, with ln w added to the logits.
        dense_in_time: whether to ignore the temporal offsets of all connections.

    Returns:
        The plan. A second call with an equal declaration returns the same object; ``compile_attention.cache_clear()``
        empties the cache, and plans in use stay valid.

    Raises:
        ValueError: an unknown ``normalize``, a mask that does not fit its connection's regions, an invalid program or
            cortex, or gates or triggers in joint form.

    >>> from canvas_engineering import CanvasLayout, CanvasTopology
    >>> layout = CanvasLayout(T=2, H=2, W=2, d_model=8, regions={"a": (0, 2, 0, 1, 0, 2), "b": (0, 2, 1, 2, 0, 2)})
    >>> plan = compile_attention(layout, CanvasTopology.hub_spoke("a", ["b"]))
    >>> plan is compile_attention(layout, CanvasTopology.hub_spoke("a", ["b"])), plan.density
    (True, 1.0)
    """
    if not isinstance(layout, CanvasLayout) or not isinstance(topology, CanvasTopology):
        given = f"{type(layout).__name__}, {type(topology).__name__}"
        raise ValueError(f"compile_attention takes a CanvasLayout and then a CanvasTopology, got {given}")
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize must be one of {NORMALIZE}, got {normalize!r}")
    dense_in_time = checked_bool(dense_in_time, "dense_in_time")
    if program is not None:
        check_program(program)
    cortex = checked_kind(cortex, "cortex", CortexRegistry, optional=True)
    if cortex is not None:
        cortex.check(layout)
    topology, triggers = apply_program(topology, layout, program, cortex)
    banks = _slot_banks(layout, program)
    if normalize == "joint":
        _check_joint(topology, triggers, program)
    key = (layout.key(), topology.key(), normalize, dense_in_time, banks, tuple(triggers.items()))
    with _cache_lock:
        plan = _cache.get(key)
        if plan is not None:
            _cache.move_to_end(key)
    if plan is not None:
        if plan.index_sets.get("skips"):
            resolve_connections(topology, layout)  # repeats its warning for each compilation
        return plan
    fns = tuple(topology.resolve_fns(layout))
    sets = resolve_attention_sets(layout, topology, dense_in_time, banks)
    packed = pack_positions(layout, sets, banks)
    connections = tuple(topology.connections)
    if normalize == "joint":
        table = joint_table(sets, packed)
    else:
        replace = np.array([c.write_mode == "replace" for c in connections], dtype=bool)
        table = edge_table(sets, packed, len(connections), replace)
    packed.order.setflags(write=False)
    n_positions = layout.num_positions + sum(bank.size for bank in banks)
    plan = AttentionPlan(normalize, connections, fns, n_positions, table, sets, packed, banks, triggers)
    plan.index_sets["skips"] = any(c.src not in layout.regions or c.dst not in layout.regions for c in connections)
    with _cache_lock:
        # another thread may have compiled the same declaration meanwhile: the first plan wins
        plan = _cache.setdefault(key, plan)
        while len(_cache) > _CACHE_SIZE:
            _cache.popitem(last=False)
    return plan


def _cache_clear() -> None:
    with _cache_lock:
        _cache.clear()


compile_attention.cache_clear = _cache_clear


def _slot_banks(layout: CanvasLayout, program: CanvasProgram | None) -> tuple[SlotBank, ...]:
    banks: list[SlotBank] = []
    for name, region in ({} if program is None else program.regions).items():
        if region.identity is not None and name in layout.regions:
            start = banks[-1].start + banks[-1].size if banks else 0
            banks.append(SlotBank(name, start, region.identity.slot_capacity))
    return tuple(banks)


def _check_joint(topology: CanvasTopology, triggers: dict[int, str], program: CanvasProgram | None) -> None:
    gated = {number for number, c in enumerate(topology.connections) if program is not None and c.write_mode == "gate"}
    for number in sorted(gated | triggers.keys()):
        c, what = topology.connections[number], "gate" if number in gated else f"trigger {triggers.get(number)!r}"
        raise ValueError(
            f"connection {number}, {c.src!r} attends to {c.dst!r} with a {what}, which belongs to the edge form: "
            "joint form has one softmax per query with constant weights"
        )
