"""The fast torch executor: the CPU default.

A table's small cells run as a few batches (:mod:`.grouping`): gather rows, one product, one softmax, one product a batch, and one gather-reduce
back to the canvas, so the number of torch calls grows with the number of distinct shapes, never with cells or edges. Large cells run one by
one on slices. Everything is computed in float32 (float64 for float64 inputs).

With c the coefficient of a segment and s the row scale, f = P V per segment and the backward of ``kernels/README.md`` reads

    out += s ∘ (P (c V))       dO' = s ∘ dO       dV = c Pᵀ dO'       dS = P ∘ (dO' Vᵀ − rowsum(P ∘ dO' Vᵀ))
    dQ = scale · dS (c K)      dK = scale · c dSᵀ Q                   dgain = w · active · Σ V ∘ Pᵀ dO'

c touches keys only and s rows only, so neither costs a pass over the pairs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from . import reference
from .grouping import Batch, Grouping, LargeCell, group
from .table import BlockTable

# Probabilities of the batches are kept for backward up to this many per position and head_dim element (16: four times the bytes of
# q, k, v and out); above it backward computes them again, which costs a fifth more time.
SAVED_PAIRS = 16
# Index tensors per table, one per (batch, heads, strides) that it meets.
MAX_INDICES = 64

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_softmax_out = torch.ops.aten._softmax.out
_softmax_backward_out = torch.ops.aten._softmax_backward_data.out


def saved_size(table: BlockTable, heads: int, head_dim: int, own_activity: bool) -> int:
    """Elements that forward keeps for backward, ``heads`` being batch · heads.

    ``own_activity``: the row scale follows from this call's ``active`` and is kept too.
    """
    key = ("saved_size", head_dim)
    if key not in table.cache:
        grouping = group(table)
        pairs = sum(_padded(batch.pairs) for batch in grouping.batches) if _keeps(table, head_dim) else 0
        table.cache[key] = pairs + sum((cell.stop - cell.start) * (head_dim + 1) for cell in grouping.large)
    return heads * table.cache[key] + (2 * table.n_positions if own_activity and table.form == "edge" else 0)


def _padded(pairs: int) -> int:
    """A multiple of 16, so that every batch's probabilities start on a cache line."""
    return -(-pairs // 16) * 16


def _keeps(table: BlockTable, head_dim: int) -> bool:
    return sum(batch.pairs for batch in group(table).batches) <= SAVED_PAIRS * table.n_positions * head_dim


# -- index tensors -------------------------------------------------------------------------------------------------------------


class _Side(NamedTuple):
    """Query or key rows of a stage: ``position`` and ``valid`` [m] per batch, and of each batch how many rows it has (m)."""

    position: list[np.ndarray]
    valid: list[np.ndarray]

    @property
    def rows(self) -> int:
        return sum(len(position) for position in self.position)


def _sides(stage: tuple[Batch, ...]) -> tuple[_Side, _Side]:
    # padded segments are real keys with coefficient 0, but their gradients are not worth adding up
    real = [(batch.key_valid & (batch.segment[..., None] >= 0)).reshape(-1) for batch in stage]
    queries = _Side([batch.rows.reshape(-1) for batch in stage], [batch.row_valid.reshape(-1) for batch in stage])
    return queries, _Side([batch.keys.reshape(-1) for batch in stage], real)


class _Reduce(NamedTuple):
    """Gather-reduce of a stage's rows to canvas rows in (batch, position, head) order: bags of ``index`` rows from ``offset`` on. ``target`` names
    the canvas rows where they are not all of them."""

    index: torch.Tensor
    offset: torch.Tensor
    target: torch.Tensor | None


class _Indices:
    """Index tensors of one table on one device for (batch, heads): made on first use, cached."""

    def __init__(self, table: BlockTable, batch: int, heads: int, dtype: torch.dtype, device: torch.device):
        self.table, self.grouping = table, group(table)
        self.batch, self.heads, self.device, self.dtype = batch, heads, device, dtype
        self.sides = [_sides(stage) for stage in self.grouping.stages]
        self._made: dict = {}

    def _cached(self, key, make):
        if key not in self._made:
            if len(self._made) >= MAX_INDICES:
                self._made.pop(next(iter(self._made)))
            self._made[key] = make()
        return self._made[key]

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def _spread(self, parts: list[np.ndarray], base: np.ndarray, step: int) -> torch.Tensor:
        """base[bh] + step · part per batch, flattened [batch][bh][row]: int32 unless that overflows."""
        flat = [(base[:, None] + step * part[None]).reshape(-1) for part in parts]
        flat = np.concatenate(flat) if flat else np.zeros(0, np.int64)
        return self._tensor(flat if flat.size and flat.max() >= 2**31 else flat.astype(np.int32))

    def gather(self, stage: int, side: int, strides: tuple[int, int, int]) -> torch.Tensor:
        """Rows of a tensor (batch, heads, position), strides in rows, that the stage reads."""

        def make():
            by_batch, by_head, by_position = strides
            base = (np.arange(self.batch)[:, None] * by_batch + np.arange(self.heads) * by_head).reshape(-1)
            return self._spread(self.sides[stage][side].position, base, by_position)

        return self._cached(("gather", stage, side, strides), make)

    def segment_of_key(self, stage: int) -> torch.Tensor:
        """Number of the segment that each gathered key row belongs to; the number of segments for padding."""

        def make():
            count = len(self.grouping.weight)
            parts = [
                np.repeat(np.where(b.segment < 0, count, b.segment).reshape(-1), b.keys.shape[2])
                for b in self.grouping.stages[stage]
            ]
            return self._spread(parts, np.zeros(self.batch * self.heads, np.int64), 1)

        return self._cached(("segment_of_key", stage), make)

    def scale_of_row(self, stage: int) -> torch.Tensor:
        """Number of the entry of row_scale, flattened, that scales each gathered query row; 2 n for padding."""

        def make():
            n = self.table.n_positions
            parts = []
            for b, position, valid in zip(self.grouping.stages[stage], *self.sides[stage][0]):
                replace = np.repeat(self.grouping.replace[b.segment[:, 0]], b.rows.shape[1])
                parts.append(np.where(valid, replace * n + position, 2 * n))
            return self._spread(parts, np.zeros(self.batch * self.heads, np.int64), 1)

        return self._cached(("scale_of_row", stage), make)

    def reduce(self, stage: int, side: int) -> _Reduce:
        return self._cached(("reduce", stage, side), lambda: self._reduce(stage, side))

    def _reduce(self, stage: int, side: int) -> _Reduce:
        positions, valid = self.sides[stage][side]
        heads = self.batch * self.heads
        # entry e of canvas row (bh, position) is buffer row first[e] + bh · stride[e]
        first, stride, position, begin = [], [], [], 0
        for part, ok in zip(positions, valid):
            first.append(begin + ok.nonzero()[0])
            stride.append(np.full(len(first[-1]), len(part)))
            position.append(part[ok])
            begin += heads * len(part)
        first, stride, position = (np.concatenate(x) for x in (first, stride, position))
        order = np.argsort(position, kind="stable")
        first, stride, position = first[order], stride[order], position[order]
        count = np.bincount(position, minlength=self.table.n_positions)
        target = None
        if len(self.grouping.stages) > 1:
            touched = count.nonzero()[0]
            count = count[touched]
            target = self._tensor(
                (np.arange(self.batch)[:, None, None] * self.table.n_positions + touched[None, :, None]) * self.heads + np.arange(self.heads)
            ).reshape(-1)
        # (batch, position, head, entry): position p's entries of head h start at heads · start[p] + h · count[p]
        start = np.cumsum(count) - count
        entry = np.arange(len(first))
        bag = np.repeat(np.arange(len(count)), count)
        h = np.arange(self.heads)[:, None]
        place = self.heads * start[bag] + h * count[bag] + entry - start[bag]
        index = np.empty((self.batch, self.heads * len(first)), np.int64)
        for b in range(self.batch):
            index[b, place] = first + (b * self.heads + h) * stride
        offset = np.cumsum(np.tile(np.repeat(count, self.heads), self.batch))
        offset = np.concatenate([[0], offset])
        dtype = np.int64 if begin >= 2**31 or offset[-1] >= 2**31 else np.int32
        return _Reduce(self._tensor(index.reshape(-1).astype(dtype)), self._tensor(offset.astype(dtype)), target)

    def bias(self, stage: int, number: int) -> torch.Tensor | None:
        batch = self.grouping.stages[stage][number]
        if batch.bias is None:
            return None
        # [1, G, 1, S·W]
        return self._cached(("bias", stage, number), lambda: self._tensor(batch.bias).to(self.dtype)[None, :, None])

    def cell_bias(self, number: int) -> torch.Tensor | None:
        cell = self.grouping.large[number]
        if cell.bias is None:
            return None
        # [1, 1, 1, keys]
        return self._cached(("cell_bias", number), lambda: self._tensor(cell.bias).to(self.dtype)[None, None, None])

    def edges(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(weight, edge) per segment."""
        grouping = self.grouping
        return self._cached("edges", lambda: (self._tensor(grouping.weight).to(self.dtype), self._tensor(grouping.edge)))

    def own_key_coefficient(self, stage: int) -> torch.Tensor | None:
        """:func:`_key_coefficient` of the table's own weights; None where all are 1."""

        def make():
            coefficient = _key_coefficient(self, stage, self.edges()[0])
            return None if bool((coefficient == 1).all()) else coefficient

        return self._cached(("own_key_coefficient", stage), make)

    def own_row_coefficient(self, stage: int) -> torch.Tensor:
        return self._cached(("own_row_coefficient", stage), lambda: _row_coefficient(self, stage, own_row_scale(self)))

    def padding_coefficient(self, stage: int) -> torch.Tensor | None:
        """Joint form: 1 for gathered query rows, 0 for padding; None where there is none."""

        def make():
            parts = [np.where(valid, 0, 1) for valid in self.sides[stage][0].valid]
            if not any(part.any() for part in parts):
                return None
            padding = self._spread(parts, np.zeros(self.batch * self.heads, np.int64), 1)
            return (padding == 0).to(self.dtype)[:, None]

        return self._cached(("padding_coefficient", stage), make)


def _indices(table: BlockTable, x: torch.Tensor) -> _Indices:
    key = ("rectangles", x.shape[0], x.shape[1], x.dtype, x.device)
    made = table.cache.get(key)
    if made is None:
        made = table.cache[key] = _Indices(table, x.shape[0], x.shape[1], x.dtype, x.device)
    return made


def own_row_scale(indices: _Indices, active: torch.Tensor | None = None) -> torch.Tensor:
    """The table's row scale in the dtype that is computed in."""
    if indices.dtype == torch.float64:
        return reference.row_scales(indices.table, active, torch.float64, indices.device)
    return indices.table.row_scale(active, indices.device)


def _key_coefficient(indices: _Indices, stage: int, coefficient: torch.Tensor) -> torch.Tensor:
    """[gathered key rows, 1]: the coefficient of each row's segment, 0 for padding."""
    return F.pad(coefficient, (0, 1)).index_select(0, indices.segment_of_key(stage))[:, None]


def _row_coefficient(indices: _Indices, stage: int, row_scale: torch.Tensor) -> torch.Tensor:
    """[gathered query rows, 1]: the row scale of each row in its segments' class, 0 for padding."""
    flat = F.pad(row_scale.to(indices.dtype).reshape(-1), (0, 1))
    return flat.index_select(0, indices.scale_of_row(stage))[:, None]


# -- one step's inputs -----------------------------------------------------------------------------------------------------------


class _Step:
    """Coefficients of one call: what gain, active and row_scale make of the table."""

    def __init__(self, indices: _Indices, gain, active, row_scale):
        self.indices = indices
        self.joint = indices.table.form == "joint"
        self.own_weights = gain is None and active is None
        self.own_rows = row_scale is None and active is None
        self.live = None
        if self.joint:
            return
        if not self.own_rows:
            self.row_scale = own_row_scale(indices, active) if row_scale is None else row_scale
        elif indices.grouping.large:
            self.row_scale = own_row_scale(indices)
        self.coefficient, edge = indices.edges()
        if gain is not None:
            self.coefficient = self.coefficient * gain.detach().to(indices.dtype)[edge]
        if active is not None:
            on = active != 0
            self.coefficient = self.coefficient * on.to(indices.dtype)[edge]
            if active.device.type == "cpu":
                # reading activity costs nothing here, so what is inactive is not computed
                self.live = on.numpy()[indices.grouping.edge]

    def keys(self, stage: int) -> torch.Tensor | None:
        if self.joint:
            return None
        if self.own_weights:
            return self.indices.own_key_coefficient(stage)
        return _key_coefficient(self.indices, stage, self.coefficient)

    def rows(self, stage: int) -> torch.Tensor | None:
        if self.joint:
            return self.indices.padding_coefficient(stage)
        if self.own_rows:
            return self.indices.own_row_coefficient(stage)
        return _row_coefficient(self.indices, stage, self.row_scale)

    def runs(self, batch: Batch) -> bool:
        return self.live is None or bool(self.live[np.maximum(batch.segment, 0)].any())

    def cell_runs(self, cell: LargeCell) -> bool:
        return self.live is None or bool(self.live[cell.segment])

    def cell_rows(self, cell: LargeCell) -> torch.Tensor | None:
        """[rows, 1]: coefficient · row scale of a large cell; None in joint form."""
        if self.joint:
            return None
        replace = int(self.indices.grouping.replace[cell.segment])
        scale = self.row_scale[replace, cell.start : cell.stop].to(self.indices.dtype)
        return (scale * self.coefficient[cell.segment])[:, None]


def _as_rows(x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """x (B, H, n, D) as rows of D in memory, and the strides of batch, head and position in rows; a copy only where rows are not apart by D."""
    dim = x.shape[3]
    if x.stride(3) != 1 or any(stride % dim for stride in x.stride()[:3]):
        x = x.contiguous()
    strides = tuple(stride // dim for stride in x.stride()[:3])
    count = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, strides))
    return x.as_strided((count, dim), (dim, 1)), strides


def _gather(x: torch.Tensor, indices: _Indices, stage: int, side: int) -> torch.Tensor:
    rows, strides = _as_rows(x)
    return rows.index_select(0, indices.gather(stage, side, strides))


def _accumulate(total: torch.Tensor | None, rows: torch.Tensor, indices: _Indices, stage: int, side: int, x: torch.Tensor):
    """Add a stage's rows to canvas rows, in (batch, position, head) order."""
    index, offset, target = indices.reduce(stage, side)
    reduced = torch.ops.aten._embedding_bag_forward_only(rows, index, offset, False, 0, False, None, True)[0]
    if target is None:
        return reduced
    if total is None:
        total = reduced.new_zeros(x.shape[0] * x.shape[2] * x.shape[1], x.shape[3])
    # targets are distinct: the order of additions is that of the stages
    return total.index_add_(0, target, reduced)


def _to_canvas(total: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """(batch, position, head) rows as (B, H, n, D)."""
    batch, heads, n, dim = x.shape
    if total is None:
        total = x.new_zeros(batch * n * heads, dim)
    return total.view(batch, n, heads, dim).transpose(1, 2)


# -- batches ---------------------------------------------------------------------------------------------------------------------


def _probabilities(out, queries, keys, batch: Batch, bias, scale, lse=None):
    """softmax(scale · Q Kᵀ + bias) over each segment, into ``out`` [m, R, S·W]."""
    _, rows, segments, width = batch.shape
    if width == 1 and bias is None and lse is None:
        return out.fill_(1.0)
    if bias is not None:
        out.view(-1, batch.shape[0], rows, segments * width).copy_(bias)
    torch.baddbmm(out, queries, keys.transpose(1, 2), beta=0 if bias is None else 1, alpha=scale, out=out)
    by_segment = out.view(-1, rows, segments, width)
    if lse is not None:
        lse(by_segment)
    _softmax_out(by_segment, -1, False, out=by_segment)
    return out


class _Cursor:
    """Walks the batches of a stage through its gathered rows."""

    def __init__(self, stage: tuple[Batch, ...], heads: int, dim: int):
        self.stage, self.heads, self.dim = stage, heads, dim

    def __iter__(self):
        row = key = 0
        for number, batch in enumerate(self.stage):
            units, rows, segments, width = batch.shape
            m = self.heads * units
            yield number, batch, (slice(row, row + m * rows), (m, rows, self.dim)), (
                slice(key, key + m * segments * width),
                (m, segments * width, self.dim),
            )
            row += m * rows
            key += m * segments * width


def _part(x: torch.Tensor, where) -> torch.Tensor:
    rows, shape = where
    return x[rows].view(shape)


# -- large cells -----------------------------------------------------------------------------------------------------------------


def _cell_keys(x: torch.Tensor, cell: LargeCell) -> torch.Tensor:
    parts = [x[:, :, start:stop] for start, stop in cell.ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _add_cell_keys(x: torch.Tensor, cell: LargeCell, gradient: torch.Tensor) -> None:
    begin = 0
    for start, stop in cell.ranges:
        x[:, :, start:stop] += gradient[:, :, begin : begin + stop - start]
        begin += stop - start


def _dense(q, k, v, bias, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, natural-log lse [B, H, rows]) of plain attention."""
    if q.device.type == "cpu":
        return _flash(q, k, v, attn_mask=_expand(bias, q, k), scale=scale)
    logits = scale * (q @ k.transpose(-1, -2))
    if bias is not None:
        logits += bias
    lse = torch.logsumexp(logits, -1)
    return torch.softmax(logits, -1) @ v, lse


def _dense_backward(grad_out, q, k, v, out, lse, bias, scale):
    if q.device.type == "cpu":
        return _flash_backward(grad_out, q, k, v, out, lse, 0.0, False, attn_mask=_expand(bias, q, k), scale=scale)
    logits = scale * (q @ k.transpose(-1, -2))
    if bias is not None:
        logits += bias
    p = torch.exp(logits - lse[..., None])
    delta = (grad_out * out).sum(-1, keepdim=True)
    ds = scale * p * (grad_out @ v.transpose(-1, -2) - delta)
    return ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad_out


def _expand(bias, q, k):
    return None if bias is None else bias.expand(1, 1, q.shape[2], k.shape[2])


def _saved_parts(aux: torch.Tensor, grouping: Grouping, heads: int, dim: int, keeps: bool):
    """(probabilities per batch, (out, lse) per large cell): flat pieces of aux."""
    at = 0
    probabilities, cells = [], []
    for batch in grouping.batches if keeps else ():
        probabilities.append(aux[at : at + heads * batch.pairs])
        at += heads * _padded(batch.pairs)
    for cell in grouping.large:
        rows = heads * (cell.stop - cell.start)
        cells.append((aux[at : at + rows * dim], aux[at + rows * dim : at + rows * (dim + 1)]))
        at += rows * (dim + 1)
    return probabilities, cells


# -- the executor ----------------------------------------------------------------------------------------------------------------


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: BlockTable,
    *,
    scale: float,
    gain: torch.Tensor | None = None,
    active: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    need_lse: bool = False,
    need_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(out, lse, saved)``: out (B, H, n, D) in q's dtype, stored as (B, n, H, D); lse (B, H, n_slots) base 2, without slots unless ``need_lse``;
    saved: what :func:`backward` wants, empty unless ``need_grad``."""
    grouping = group(table)
    dtype = torch.promote_types(q.dtype, torch.float32)
    original = q.dtype
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    batch_size, heads, _, dim = q.shape
    own_activity = active is not None and row_scale is None
    saved = q.new_empty(saved_size(table, batch_size * heads, dim, own_activity) if need_grad else 0)
    lse = q.new_full((batch_size, heads, table.n_slots if need_lse else 0), math.inf)
    if q.numel() == 0 or not (grouping.stages or grouping.large):
        return _to_canvas(None, q).to(original), lse, saved
    keeps = need_grad and _keeps(table, dim)
    kept, cell_parts = _saved_parts(saved, grouping, batch_size * heads, dim, keeps) if need_grad else ([], [])
    indices = _indices(table, q)
    step = _Step(indices, gain, active, row_scale)
    if own_activity and need_grad and not step.joint:
        saved[-2 * table.n_positions :] = step.row_scale.reshape(-1)
    total, done = None, 0
    for number, stage in enumerate(grouping.stages):
        total = _forward_stage(number, stage, step, q, k, v, scale, kept[done : done + len(stage)] if keeps else None, lse, total)
        done += len(stage)
    out = _to_canvas(total, q)
    for number, cell in enumerate(grouping.large):
        if not step.cell_runs(cell):
            continue
        result, cell_lse = _dense(
            q[:, :, cell.start : cell.stop], _cell_keys(k, cell), _cell_keys(v, cell), indices.cell_bias(number), scale
        )
        coefficient = step.cell_rows(cell)
        rows = out[:, :, cell.start : cell.stop]
        if coefficient is None:
            rows.copy_(result)
        else:
            rows.addcmul_(result, coefficient)
        if need_grad:
            cell_parts[number][0].view(batch_size, -1, heads, dim).copy_(result.transpose(1, 2))
            cell_parts[number][1].view(batch_size, heads, -1).copy_(cell_lse)
        if need_lse:
            lse[:, :, cell.slot : cell.slot + cell.stop - cell.start] = (cell_lse + cell.offset) / math.log(2)
    if need_lse and active is not None and table.form == "edge":
        lse.masked_fill_((active == 0).repeat_interleave(table.slot_layout(q.device).per_edge), math.inf)
    return out.to(original), lse, saved


def _forward_stage(number, stage, step: _Step, q, k, v, scale, kept, lse, total):
    indices = step.indices
    queries = _gather(q, indices, number, 0)
    keys, values = _gather(k, indices, number, 1), _gather(v, indices, number, 1)
    coefficient = step.keys(number)
    if coefficient is not None:
        values.mul_(coefficient)
    results = torch.empty_like(queries)
    for i, batch, row_part, key_part in _Cursor(stage, q.shape[0] * q.shape[1], q.shape[3]):
        result = _part(results, row_part)
        if not step.runs(batch):
            result.zero_()
            continue
        bias = indices.bias(number, i)
        a, b, c = _part(queries, row_part), _part(keys, key_part), _part(values, key_part)
        write_lse = None
        if lse.shape[2]:
            write_lse = _LseWriter(lse, batch, step.joint)
        shape = (a.shape[0], a.shape[1], b.shape[1])
        out = q.new_empty(shape) if kept is None else kept[i].view(shape)
        torch.bmm(_probabilities(out, a, b, batch, bias, scale, write_lse), c, out=result)
    coefficient = step.rows(number)
    if coefficient is not None:
        results.mul_(coefficient)
    return _accumulate(total, results, indices, number, 0, q)


class _LseWriter:
    """Writes a batch's log-sum-exp to its slots."""

    def __init__(self, lse: torch.Tensor, batch: Batch, joint: bool):
        valid = batch.row_valid[:, :, None] & (batch.segment >= 0)[:, None]
        # [G, R, S]; in joint form the slot of a row is the row
        slots = batch.slot[:, None] + np.arange(batch.rows.shape[1])[:, None]
        self.lse = lse
        self.slots = torch.from_numpy(slots[valid]).to(lse.device)
        self.source = torch.from_numpy(valid.reshape(-1).nonzero()[0]).to(lse.device)
        self.offset = torch.from_numpy(np.broadcast_to(batch.offset[:, None, None], valid.shape)[valid]).to(lse)

    def __call__(self, logits: torch.Tensor) -> None:
        """``logits`` [B·H·G, R, S, W]"""
        heads = self.lse.shape[0] * self.lse.shape[1]
        values = torch.logsumexp(logits, -1).view(heads, -1).index_select(1, self.source)
        self.lse.view(heads, -1).index_copy_(1, self.slots, (values + self.offset) / math.log(2))


def backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    saved: torch.Tensor,
    table: BlockTable,
    *,
    scale: float,
    gain: torch.Tensor | None = None,
    active: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    need_gain: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """``(dq, dk, dv, dgain)`` from :func:`forward`'s inputs and ``saved``; dgain (n_edges,) in the computing dtype, None unless ``need_gain``."""
    grouping = group(table)
    original = q.dtype
    q, k, v, grad_out = (x.to(torch.promote_types(original, torch.float32)) for x in (q, k, v, grad_out))
    batch_size, heads, _, dim = q.shape
    per_segment = q.new_zeros(len(grouping.weight)) if need_gain else None
    totals: list[torch.Tensor | None] = [None, None, None]
    if q.numel() == 0 or not (grouping.stages or grouping.large):
        gradients = [_to_canvas(None, q).to(original) for _ in range(3)]
        return *gradients, q.new_zeros(table.n_edges) if need_gain else None
    keeps = _keeps(table, dim)
    kept, cell_parts = _saved_parts(saved, grouping, batch_size * heads, dim, keeps)
    indices = _indices(table, q)
    if active is not None and row_scale is None:
        row_scale = saved[-2 * table.n_positions :].view(2, -1)
    step = _Step(indices, gain, active, row_scale)
    done = 0
    for number, stage in enumerate(grouping.stages):
        probabilities = kept[done : done + len(stage)] if keeps else None
        totals = _backward_stage(number, stage, step, (q, k, v, grad_out), scale, probabilities, totals, per_segment)
        done += len(stage)
    dq, dk, dv = (_to_canvas(total, q) for total in totals)
    for number, cell in enumerate(grouping.large):
        if not step.cell_runs(cell):
            continue
        result = cell_parts[number][0].view(batch_size, -1, heads, dim).transpose(1, 2)
        cell_lse = cell_parts[number][1].view(batch_size, heads, -1)
        rows = slice(cell.start, cell.stop)
        upstream = grad_out[:, :, rows]
        coefficient = step.cell_rows(cell)
        if need_gain:
            per_row = (upstream * result).sum((0, 1, 3))
            per_segment[cell.segment] += per_row @ step.row_scale[int(grouping.replace[cell.segment]), rows].to(q.dtype)
        if coefficient is not None:
            upstream = upstream * coefficient
        cell_keys, cell_values = _cell_keys(k, cell), _cell_keys(v, cell)
        gradients = _dense_backward(
            upstream, q[:, :, rows], cell_keys, cell_values, result, cell_lse, indices.cell_bias(number), scale
        )
        dq[:, :, rows] += gradients[0]
        _add_cell_keys(dk, cell, gradients[1])
        _add_cell_keys(dv, cell, gradients[2])
    dgain = None
    if need_gain:
        dgain = _gain_gradient(indices, per_segment, active)
    return dq.to(original), dk.to(original), dv.to(original), dgain


def _backward_stage(number, stage, step: _Step, inputs, scale, kept, totals, per_segment):
    indices = step.indices
    q, k, v, grad_out = inputs
    heads = q.shape[0] * q.shape[1]
    queries, keys, values = _gather(q, indices, number, 0), _gather(k, indices, number, 1), _gather(v, indices, number, 1)
    upstream = _gather(grad_out, indices, number, 0)
    row_coefficient, key_coefficient = step.rows(number), step.keys(number)
    if row_coefficient is not None:
        upstream.mul_(row_coefficient)
    scaled_keys = keys
    if key_coefficient is not None:
        # computing the probabilities again needs the keys as they are
        scaled_keys = keys.mul_(key_coefficient) if kept is not None else keys * key_coefficient
    dq, dk, dv = torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(values)
    for i, batch, row_part, key_part in _Cursor(stage, heads, q.shape[3]):
        a, g, da = (_part(x, row_part) for x in (queries, upstream, dq))
        b, scaled_b, c, db, dc = (_part(x, key_part) for x in (keys, scaled_keys, values, dk, dv))
        if not step.runs(batch):
            for x in (da, db, dc):
                x.zero_()
            continue
        _, rows, segments, width = batch.shape
        shape = (a.shape[0], rows, segments * width)
        if kept is None:
            p = _probabilities(q.new_empty(shape), a, b, batch, indices.bias(number, i), scale)
        else:
            p = kept[i].view(shape)
        torch.bmm(p.transpose(1, 2), g, out=dc)
        if per_segment is not None:
            _add_gain(per_segment, batch, c, dc, heads)
        if width == 1:
            # one key: its probability is 1 whatever the logit
            da.zero_()
            db.zero_()
            continue
        ds = torch.bmm(g, c.transpose(1, 2))
        by_segment = ds.view(-1, rows, segments, width)
        _softmax_backward_out(by_segment, p.view(by_segment.shape), -1, p.dtype, grad_input=by_segment)
        torch.baddbmm(da, ds, scaled_b, beta=0, alpha=scale, out=da)
        torch.baddbmm(db, ds.transpose(1, 2), a, beta=0, alpha=scale, out=db)
    if key_coefficient is not None:
        dk.mul_(key_coefficient)
        dv.mul_(key_coefficient)
    sides = ((dq, 0), (dk, 1), (dv, 1))
    return [_accumulate(total, rows, indices, number, side, q) for total, (rows, side) in zip(totals, sides)]


def _add_gain(per_segment: torch.Tensor, batch: Batch, values: torch.Tensor, gradient: torch.Tensor, heads: int) -> None:
    """Σ V ∘ Pᵀ dO' over batch, heads and keys, added to each segment's sum."""
    units, _, segments, width = batch.shape
    sums = (values * gradient).view(heads, units * segments, width * values.shape[2]).sum((0, 2))
    valid = (batch.segment >= 0).reshape(-1)
    index = torch.from_numpy(batch.segment.reshape(-1)[valid]).to(values.device)
    sums = sums if valid.all() else sums[torch.from_numpy(valid).to(values.device)]
    # a segment may have several cells in one batch: accumulate in their order
    per_segment.put_(index, sums, accumulate=True)


def _gain_gradient(indices: _Indices, per_segment: torch.Tensor, active: torch.Tensor | None) -> torch.Tensor:
    weight, edge = indices.edges()
    n_edges = indices.table.n_edges
    # segments ascend with their edges
    lengths = torch.from_numpy(np.bincount(indices.grouping.edge, minlength=n_edges)).to(edge.device)
    dgain = torch.segment_reduce(weight * per_segment, "sum", lengths=lengths, axis=0, initial=0.0, unsafe=True)
    return dgain if active is None else dgain * (active != 0).to(dgain.dtype)
