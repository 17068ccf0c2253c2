"""Which shard owns which positions: cuts of a plan's rows, and which queries travel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from canvas_kernels.block_table import BlockTable

from ..checked import shown
from .needs import Owners, keys_of_rows, pairs_of_rows, pulls, visits

if TYPE_CHECKING:
    from ..plan.plan import AttentionPlan

CUTS = ("balanced", "by_rows")
# Thresholds that are tried for which queries travel.
MAX_THRESHOLDS = 6
# Share of a shard by which a cut may move to where rectangles begin: shards then differ by twice as much at most.
MAX_UNEVEN = 0.07


def cut_positions(plan: AttentionPlan, shards: int, cut: Any, width: int) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Returns the positions of each shard, int64, in the order in which ranks hold them, and which packed rows travel.

    Args:
        plan: the plan.
        shards: their number.
        cut: as for :meth:`AttentionPlan.shard`.
        width: the model's width, which weighs rows against pairs.

    Raises:
        ValueError: another kind of cut, or one that does not give every position to one shard.
    """
    nothing = np.zeros(plan.n_packed, bool)
    unused = np.array_split(np.flatnonzero(~_used(plan)), shards)
    if isinstance(cut, str):
        if cut not in CUTS:
            raise ValueError(f"cut must be one of {', '.join(CUTS)}, an owner array or positions; got {cut!r}")
        if cut == "by_rows" or shards == 1:
            rows = np.array_split(np.arange(plan.n_packed), shards)
            travels = travels_for(plan, _owner(rows)) if shards > 1 else nothing
        else:
            travels, rows = _balanced(plan, shards, width)
        return tuple(np.concatenate([plan.order[own], rest]) for own, rest in zip(rows, unused)), travels
    owned = given_positions(plan, shards, cut)
    owner = np.zeros(plan.n_positions, np.int64)
    for shard, positions in enumerate(owned):
        owner[positions] = shard
    return owned, travels_for(plan, owner[plan.order]) if shards > 1 else nothing


def given_positions(plan: AttentionPlan, shards: int, cut: Any) -> tuple[np.ndarray, ...]:
    """Returns the positions of each shard of an owner array, or of a sequence with positions for each shard."""
    if isinstance(cut, Sequence) and len(cut) == shards and all(np.ndim(own) == 1 for own in cut):
        return _checked([np.array(own, np.int64) for own in cut], plan.n_positions)
    owner = np.asarray(cut)
    if owner.shape != (plan.n_positions,) or owner.dtype.kind not in "iu":
        raise ValueError(
            f"cut must be {', '.join(CUTS)}, an owner array of {plan.n_positions} ints or {shards} arrays of "
            f"positions; got {shown(cut)}"
        )
    if len(owner) and (owner.min() < 0 or owner.max() >= shards):
        raise ValueError(f"an owner array names shards in [0, {shards}), got {owner.min()} … {owner.max()}")
    order = np.concatenate([plan.order, np.flatnonzero(~_used(plan))])
    return tuple(order[owner[order] == shard] for shard in range(shards))


# -- travelling --------------------------------------------------------------------------------------------------------


def thresholds(keys: np.ndarray) -> np.ndarray:
    """Returns numbers of keys above which queries might travel, the largest, at which none does, first."""
    distinct = np.unique(keys[keys > 0])[::-1]
    chosen = np.unique(np.linspace(0, len(distinct) - 1, MAX_THRESHOLDS).round().astype(int)) if len(distinct) else []
    return distinct[chosen]


def travels_for(plan: AttentionPlan, owner: np.ndarray) -> np.ndarray:
    """Returns the mask of the packed rows that travel where these shards own them."""
    choices = candidates(plan)
    return choices[choose_travels(plan, choices, [owner] * len(choices))]


def choose_travels(plan: AttentionPlan, choices: Sequence[np.ndarray], owners: Sequence[np.ndarray]) -> int:
    """Returns the number of the choice that moves the fewest rows between shards, the first of equal ones.

    Args:
        plan: the plan.
        choices: masks of the packed rows that travel.
        owners: for each of them, the shard of each packed row.
    """
    counts = []
    for travels, owner in zip(choices, owners):
        runs = Owners.of(owner)
        moved = (pulls(plan.table, travels, runs), visits(plan.table, travels, runs))
        counts.append(sum(int((need.stop - need.start)[need.target != need.source].sum()) for need in moved))
    return int(np.argmin(counts))


def candidates(plan: AttentionPlan) -> list[np.ndarray]:
    """Returns masks of the packed rows that might travel, the first of which is empty."""
    if plan.normalize == "edge":
        return [np.zeros(plan.n_packed, bool)]
    keys = keys_of_rows(plan.table)
    return [keys > threshold for threshold in thresholds(keys)] or [np.zeros(plan.n_packed, bool)]


# -- balance -----------------------------------------------------------------------------------------------------------


def _balanced(plan: AttentionPlan, shards: int, width: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns which rows travel, and the packed rows of each shard: those that travel dealt out evenly, the others cut
    where they weigh the same, 24 · width² operations a row and 4 · width a pair."""
    choices, cuts = [], []
    for travels in candidates(plan):
        for tolerance in (0.0, MAX_UNEVEN):
            choices.append(travels)
            cuts.append(_cut_evenly(plan.table, travels, shards, width, tolerance))
    best = choose_travels(plan, choices, [_owner(rows) for rows in cuts])
    return choices[best], cuts[best]


def _cut_evenly(table: BlockTable, travels: np.ndarray, shards: int, width: int, tolerance: float) -> list[np.ndarray]:
    """Returns the packed rows of each shard; cuts are moved to where rectangles begin, if that is within ``tolerance``
    of a shard."""
    weight = pairs_of_rows(table, travels) + 6 * width
    (line,), (hubs,) = (~travels).nonzero(), travels.nonzero()
    reach = np.append(0, np.cumsum(weight[line]))
    ideal = np.arange(1, shards) * (reach[-1] / shards)
    bounds = np.searchsorted(reach, ideal)
    marks = np.unique(np.searchsorted(line, np.append(table.q_start, len(weight))))
    near = np.searchsorted(reach[marks], ideal)
    for side in (np.maximum(near - 1, 0), np.minimum(near, len(marks) - 1)) if tolerance else ():
        close = np.abs(reach[marks[side]] - ideal) <= tolerance * reach[-1] / shards
        bounds = np.where(close, marks[side], bounds)
    parts = zip(np.split(line, bounds), np.array_split(hubs, shards))
    return [np.sort(np.concatenate(pair)) for pair in parts]


def _owner(rows: Sequence[np.ndarray]) -> np.ndarray:
    owner = np.zeros(sum(map(len, rows)), np.int64)
    for shard, own in enumerate(rows):
        owner[own] = shard
    return owner


def _used(plan: AttentionPlan) -> np.ndarray:
    used = np.zeros(plan.n_positions, bool)
    used[plan.order] = True
    return used


def _checked(shards: list[np.ndarray], n_positions: int) -> tuple[np.ndarray, ...]:
    positions = np.concatenate(shards)
    if len(positions) and (positions.min() < 0 or positions.max() >= n_positions):
        raise ValueError(f"the cut names positions in [0, {n_positions}), got {positions.min()} … {positions.max()}")
    counts = np.bincount(positions, minlength=n_positions)
    if (counts != 1).any():
        position = int((counts != 1).argmax())
        raise ValueError(f"the cut gives position {position} to {counts[position]} shards: each has one")
    return tuple(shards)
