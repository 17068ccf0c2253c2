"""Index maps: rows gathered, repeated, summed and put back, as one linear operation that is its own derivative."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from .autograd import DEVICES, MAPS, TAGS, apply_map, mark_for_compilers, replace_rows_by_map, under_autograd
from .derived import Store, derived, to_device

_LIVE: weakref.WeakValueDictionary[str, IndexMap] = weakref.WeakValueDictionary()
RESOLVERS: dict[str, Callable[[str], IndexMap]] = {}
"""Makers of maps that belong to other keyed objects: code that is traced names them before they are made."""
_sum_bags = torch.ops.aten._embedding_bag_forward_only.default


class _Bags(NamedTuple):
    """Row i is the sum of the rows ``index[offset[i] : offset[i + 1]]``, each times its ``weight``."""

    index: torch.Tensor
    offset: torch.Tensor
    weight: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class IndexMap:
    """A sparse matrix (n_out, n_in) that is applied to rows: y_i = Σ_e weight_e · x[index_e] over the entries of row i.

    Built by :meth:`gather` or :meth:`sums`. Equal content is one object, found by its ``key`` while it is alive;
    operators take the key, so that compiled and exported graphs hold no index tensors.

    Attributes:
        index: int64 (entries,), the row of x of each entry.
        offset: int64 (n_out + 1,): the entries of output row i are ``offset[i] … offset[i + 1] − 1``.
        n_in, n_out: rows of x and of the result.
        weight: float64 (entries,), or None where all are 1.
        key: digest of the content, equal in every process.
        is_gather: whether each row of the result is one unscaled row of x.
        is_distinct: whether no row of x is used twice.
        is_identity: whether the result is x.

    >>> rows = IndexMap.gather(np.array([1, 0, 1]), 2)
    >>> gather_rows(torch.tensor([[1.0], [2.0]]), rows).flatten().tolist()
    [2.0, 1.0, 2.0]
    >>> scatter_rows(torch.tensor([[1.0], [2.0], [4.0]]), rows).flatten().tolist()
    [2.0, 5.0]
    """

    index: np.ndarray
    offset: np.ndarray
    n_in: int
    n_out: int
    weight: np.ndarray | None
    key: str
    is_gather: bool
    is_distinct: bool
    is_identity: bool
    store: Store = field(default_factory=Store, repr=False)

    @classmethod
    def gather(cls, index: np.ndarray, n_in: int) -> IndexMap:
        """Returns the map whose output row i is row ``index[i]`` of ``n_in`` rows."""
        return cls.sums(index, np.arange(len(index) + 1), n_in)

    @classmethod
    def sums(cls, index: np.ndarray, offset: np.ndarray, n_in: int, weight: np.ndarray | None = None) -> IndexMap:
        """Returns the map whose output row i is the weighted sum of the rows ``index[offset[i] : offset[i + 1]]``.

        Raises:
            ValueError: an index outside of [0, n_in), offsets that do not ascend to the number of entries, or another
                number of weights.
        """
        # copies: shared objects must not change with the caller's arrays
        index, offset = (np.array(a, np.int64).reshape(-1) for a in (index, offset))
        if len(index) and (index.min() < 0 or index.max() >= n_in):
            raise ValueError(f"indices must lie in [0, {n_in}), got {index.min()} … {index.max()}")
        if not len(offset) or offset[0] != 0 or offset[-1] != len(index) or (np.diff(offset) < 0).any():
            raise ValueError(f"offsets must ascend from 0 to {len(index)}, the number of entries")
        if weight is not None:
            weight = np.array(weight, np.float64).reshape(-1)
            if len(weight) != len(index):
                raise ValueError(f"{len(index)} entries need as many weights, got {len(weight)}")
            weight = None if (weight == 1).all() else weight
        digest = hashlib.sha1(f"{n_in}/{len(offset)}/{weight is None}".encode(), usedforsecurity=False)
        for array in (index, offset, weight):
            if array is not None:
                array.setflags(write=False)
                digest.update(array.tobytes())
        mark_for_compilers()
        is_gather = weight is None and len(index) == len(offset) - 1 and bool((np.diff(offset) == 1).all())
        is_distinct = not len(index) or int(np.bincount(index).max()) == 1
        is_identity = is_gather and len(index) == n_in and bool((index == np.arange(n_in)).all())
        key = digest.hexdigest()
        sizes = (int(n_in), len(offset) - 1)
        return _LIVE.setdefault(key, cls(index, offset, *sizes, weight, key, is_gather, is_distinct, is_identity))

    @classmethod
    def constant(cls, values: np.ndarray) -> IndexMap:
        """Returns the map from a single 1 to ``values``, flattened: constants outside of traced graphs."""
        count = np.size(values)
        return cls.sums(np.zeros(count), np.arange(count + 1), 1, values)

    def __deepcopy__(self, memo) -> IndexMap:
        return self

    def __reduce__(self):
        return IndexMap.sums, (self.index, self.offset, self.n_in, self.weight)

    @staticmethod
    def lookup(key: str) -> IndexMap:
        """Returns the live map with this key, or that of a live object, "kind:key" with the kind in ``RESOLVERS``;
        KeyError if it has been garbage-collected."""
        kind, _, owner = key.rpartition(":")
        index_map = RESOLVERS[kind](owner) if kind else _LIVE.get(key)
        if index_map is None:
            raise KeyError(f"no live IndexMap has the key {key}: keep the plan alive")
        return index_map

    @derived(limit=4)
    def rows(self, device: torch.device) -> torch.Tensor:
        """Returns ``index`` on a device."""
        return to_device(self.index, device)

    @derived(limit=4)
    def places(self, device: torch.device) -> torch.Tensor:
        """Returns the inverse [n_in] of a distinct gather: the output row of each row, n_out for rows not gathered."""
        inverse = np.full(self.n_in, self.n_out)
        inverse[self.index] = np.arange(self.n_out)
        return to_device(inverse, device)

    @derived(limit=8)
    def bags(self, transposed: bool, device: torch.device, dtype: torch.dtype) -> _Bags:
        """Returns the entries by output row, or by row of x if ``transposed``, in ascending order."""
        index, offset, weight = self.index, self.offset, self.weight
        if transposed:
            order = np.argsort(index, kind="stable")
            index = np.repeat(np.arange(self.n_out), np.diff(offset))[order]
            offset = np.concatenate([[0], np.cumsum(np.bincount(self.index, minlength=self.n_in))])
            weight = None if weight is None else weight[order]
        weight = None if weight is None else to_device(weight, device).to(dtype)
        return _Bags(to_device(index, device), to_device(offset, device), weight)


def gather_rows(x: torch.Tensor, rows: IndexMap, dim: int = 0) -> torch.Tensor:
    """Applies a map to the rows of ``x`` along ``dim``: (… n_in …) → (… n_out …).

    Differentiable in every mode of torch, without atomics; sums run in a fixed order, 16-bit ones in float32.

    Raises:
        ValueError: another number of rows.
    """
    _check(x, rows.n_in, dim)
    return x if rows.is_identity else apply_map(x, rows.key, False, dim % x.dim())


def scatter_rows(y: torch.Tensor, rows: IndexMap, dim: int = 0) -> torch.Tensor:
    """Applies the transposed map, the adjoint of :func:`gather_rows`: (… n_out …) → (… n_in …), with 0
    in rows that are not gathered.

    Raises:
        ValueError: another number of rows.
    """
    _check(y, rows.n_out, dim)
    return y if rows.is_identity else apply_map(y, rows.key, True, dim % y.dim())


def replace_rows(x: torch.Tensor, rows: IndexMap, y: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """Returns ``x`` with the rows of a distinct gather replaced by those of ``y``; other rows bit for bit.

    Raises:
        ValueError: another number of rows, or a map that gathers a row twice.

    >>> rows, y = IndexMap.gather(np.array([2, 0]), 3), torch.tensor([[1.0], [2.0]])
    >>> replace_rows(torch.zeros(3, 1), rows, y).flatten().tolist()
    [2.0, 0.0, 1.0]
    """
    _check(x, rows.n_in, dim)
    _check(y, rows.n_out, dim)
    if not (rows.is_gather and rows.is_distinct):
        raise ValueError("replacing rows needs a gather without repeated rows")
    return y if rows.is_identity else replace_rows_by_map(x, y, rows.key, dim % x.dim())


def _check(x: torch.Tensor, length: int, dim: int) -> None:
    if x.shape[dim] != length:
        raise ValueError(f"the index map has {length} rows along dimension {dim}, got {tuple(x.shape)}")


MAPS["lookup"] = IndexMap.lookup


# -- operators ---------------------------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("canvas_kernels", "FRAGMENT")
_LIBRARY.define("apply_map(Tensor x, str map, bool transposed, int dim) -> Tensor", tags=TAGS)
_LIBRARY.define("replace_rows(Tensor x, Tensor? y, str map, int dim) -> Tensor", tags=TAGS)


def apply_now(x: torch.Tensor, rows: IndexMap, transposed: bool = False, dim: int = 0) -> torch.Tensor:
    """Applies a map inside of an operator, without autograd."""
    n = rows.n_in if transposed else rows.n_out
    if rows.is_gather and not transposed:
        return x.index_select(dim, rows.rows(x.device))
    shape = (*x.shape[:dim], n, *x.shape[dim + 1 :])
    if not x.numel() or not len(rows.index):
        return x.new_zeros(shape)
    if rows.is_gather and rows.is_distinct:
        return put_rows(x, rows, dim, tuple(range(x.dim())))
    # 16-bit sums would round at every term
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    flat = wide.movedim(dim, 0)
    tail = flat.shape[1:]
    flat = flat.reshape(len(flat), -1).contiguous()
    index, offset, weight = rows.bags(transposed, x.device, flat.dtype)
    out = _sum_bags(flat, index, offset, False, 0, False, weight, True)[0]
    return out.to(x.dtype).view(n, *tail).movedim(0, dim).contiguous()


def take_rows(x: torch.Tensor, rows: IndexMap, dim: int, order: Sequence[int]) -> torch.Tensor:
    """Gathers rows of ``x`` along ``dim`` into a dense tensor with dimensions in memory in ``order``, outermost first;
    whole rows are copied if ``x`` has that order."""
    return put_back(x.permute(*order).index_select(order.index(dim), rows.rows(x.device)), order)


def put_rows(y: torch.Tensor, rows: IndexMap, dim: int, order: Sequence[int]) -> torch.Tensor:
    """Scatters the rows of ``y`` of a distinct gather, with 0 elsewhere, into a dense tensor with dimensions in memory
    in ``order``.

    It gathers from ``y`` and a row of zeros, which writes every row once.
    """
    source, at = y.permute(*order), order.index(dim)
    if rows.n_out < rows.n_in:
        nothing = source.new_zeros((*source.shape[:at], 1, *source.shape[at + 1 :]))
        source = torch.cat((source, nothing), at)
    return put_back(source.index_select(at, rows.places(y.device)), order)


def put_back(x: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """Inverts ``x.permute(order)``."""
    return x.permute([order.index(dim) for dim in range(len(order))])


def empty_in(order: Sequence[int], shape: Sequence[int], like: torch.Tensor, dtype=None) -> torch.Tensor:
    """Returns an empty dense tensor with dimensions in memory in ``order``, outermost first."""
    return put_back(like.new_empty([shape[dim] for dim in order], dtype=dtype), order)


def _apply(x: torch.Tensor, map: str, transposed: bool, dim: int) -> torch.Tensor:
    return apply_now(x, IndexMap.lookup(map), transposed, dim)


def _replace(x: torch.Tensor, y: torch.Tensor | None, map: str, dim: int) -> torch.Tensor:
    index = IndexMap.lookup(map).rows(x.device)
    out = x.clone(memory_format=torch.contiguous_format)
    return out.index_fill_(dim, index, 0) if y is None else out.index_copy_(dim, index, y)


def _fake_apply(x, map, transposed, dim):
    rows = IndexMap.lookup(map)
    return x.new_empty((*x.shape[:dim], rows.n_in if transposed else rows.n_out, *x.shape[dim + 1 :]))


for _key in DEVICES:
    _LIBRARY.impl("apply_map", _apply, _key)
    _LIBRARY.impl("replace_rows", _replace, _key)
torch.library.register_fake("canvas_kernels::apply_map", _fake_apply, lib=_LIBRARY)
torch.library.register_fake("canvas_kernels::replace_rows", lambda x, y, map, dim: x.new_empty(x.shape), lib=_LIBRARY)
_LIBRARY.impl("apply_map", under_autograd(torch.ops.canvas_kernels.apply_map.default, apply_map), "Autograd")
_LIBRARY.impl(
    "replace_rows", under_autograd(torch.ops.canvas_kernels.replace_rows.default, replace_rows_by_map), "Autograd"
)
