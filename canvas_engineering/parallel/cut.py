"""Which shard owns which positions: cuts of a plan's rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checked import shown

if TYPE_CHECKING:
    from ..plan.plan import AttentionPlan

CUTS = ("by_rows",)


def cut_positions(plan: AttentionPlan, shards: int, cut: Any) -> tuple[np.ndarray, ...]:
    """Returns the positions of each shard, int64, in the order in which ranks hold them.

    Args:
        plan: the plan.
        shards: their number.
        cut: "by_rows" (equal numbers of rows, in packed order), an owner array (int [N], the shard of each position),
            or a sequence with an array of positions for each shard, in the order of the caller's tensors.

    Raises:
        ValueError: another kind of cut, or one that does not give every position to one shard.
    """
    if isinstance(cut, str):
        if cut not in CUTS:
            raise ValueError(f"cut must be one of {', '.join(CUTS)}, an owner array or positions; got {cut!r}")
        return _deal(_in_packed_order(plan), np.array_split(plan.order, shards), shards)
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
    order = _in_packed_order(plan)
    return tuple(order[owner[order] == shard] for shard in range(shards))


def _in_packed_order(plan: AttentionPlan) -> np.ndarray:
    """Returns all N positions: those of the packed order, then those that no attention set uses."""
    return np.concatenate([plan.order, _unused(plan)])


def _unused(plan: AttentionPlan) -> np.ndarray:
    used = np.zeros(plan.n_positions, bool)
    used[plan.order] = True
    return (~used).nonzero()[0]


def _deal(order: np.ndarray, owned: Sequence[np.ndarray], shards: int) -> tuple[np.ndarray, ...]:
    """Returns ``owned`` with the rest of ``order`` dealt out evenly."""
    rest = order[sum(map(len, owned)) :]
    return tuple(np.concatenate(pair) for pair in zip(owned, np.array_split(rest, shards)))


def _checked(shards: list[np.ndarray], n_positions: int) -> tuple[np.ndarray, ...]:
    positions = np.concatenate(shards)
    if len(positions) and (positions.min() < 0 or positions.max() >= n_positions):
        raise ValueError(f"the cut names positions in [0, {n_positions}), got {positions.min()} … {positions.max()}")
    counts = np.bincount(positions, minlength=n_positions)
    if (counts != 1).any():
        position = int((counts != 1).argmax())
        raise ValueError(f"the cut gives position {position} to {counts[position]} shards: each has one")
    return tuple(shards)
