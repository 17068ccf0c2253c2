"""AttentionDispatcher: a topology as a layer, one fused call per attention function."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from canvas_kernels.rows import join_rows, split_rows

from .attention import BACKENDS, create_attention
from .canvas import CanvasLayout
from .connectivity import CanvasTopology
from .plan import compile_attention

__all__ = ["AttentionDispatcher"]

_ACTIVITY_CACHE_SIZE = 256


class AttentionDispatcher(nn.Module):
    """Runs every connection of a topology on a canvas tensor, in edge form (semantics, section 4).

    At each position the outputs of its reads are averaged by weight, out_i = Σ_r a_r f_r(i) / Σ_r w_r, with a_r = w_r,
    or w_r·σ(g) on a connection of write mode "gate" with its learned g; where a "replace" read is in force, only
    replace reads count. Positions without a read keep their input, bit for bit.

    Args:
        topology, layout: the declaration. Connections to regions that the layout lacks are skipped with one
        UserWarning. d_model: width of the canvas tensor.
        n_heads: heads of each attention function; must divide d_model.
        dropout: on attention weights, in training.
        skip_temporal: read every connection as dense in time.
        backend: "auto", "triton", "torch" or "reference"; see :func:`canvas_attention`.

    Attributes:
        plan: the compiled :class:`AttentionPlan`.
        fn_modules: ModuleDict by function name, one module shared by the connections of that function.
        edge_gates: (gate connections,) parameter, zeros at first; None where no connection gates.

    Raises:
        ValueError: an attention function that is not registered, n_heads that do not divide d_model, an unknown
        backend, or
            a mask that does not fit its regions.

    >>> from canvas_engineering import CanvasLayout, CanvasTopology
    >>> layout = CanvasLayout(T=2, H=2, W=2, d_model=16, regions={"a": (0, 2, 0, 1, 0, 2)})
    >>> dispatcher = AttentionDispatcher(CanvasTopology.dense(["a"]), layout, d_model=16)
    >>> x = torch.randn(1, 8, 16)
    >>> bool((dispatcher(x)[:, 2:4] == x[:, 2:4]).all())
    True
    """

    def __init__(
        self,
        topology: CanvasTopology,
        layout: CanvasLayout,
        d_model: int,
        n_heads: int = 4,
        dropout: float = 0.0,
        skip_temporal: bool = False,
        *,
        backend: str = "auto",
    ):
        super().__init__()
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
        self.topology, self.layout, self.d_model, self.backend = topology, layout, d_model, backend
        self.plan = plan = compile_attention(layout, topology, dense_in_time=skip_temporal)
        reading = {plan.fns[c] for c in plan.reads.connection}
        self.fn_modules = nn.ModuleDict()
        self._plans = {}
        for fn in dict.fromkeys(plan.fns):
            if fn not in reading:
                continue
            try:
                self.fn_modules[fn] = create_attention(fn, d_model, n_heads, dropout)
            except ValueError as error:
                connection = plan.connections[plan.fns.index(fn)]
                raise ValueError(f"connection {connection.src!r} reads {connection.dst!r}: {error}") from None
            self._plans[fn] = plan.for_fn(fn)
        gates = [i for i, c in enumerate(plan.connections) if c.write_mode == "gate"]
        self.register_parameter("edge_gates", nn.Parameter(torch.zeros(len(gates))) if gates else None)
        regions = {name: i for i, name in enumerate(layout.regions)}
        reads = torch.zeros(plan.n_packed, 1, dtype=torch.bool)
        reads[plan.rows("reading")] = True
        self._every_row_reads = bool(reads.all())
        index = {
            "_order": plan.rows("order"),
            "_reads": reads,
            "_gates": torch.tensor(gates, dtype=torch.int64),
            "_source_region": torch.tensor([regions.get(c.src, 0) for c in plan.connections], dtype=torch.int64),
        }
        for name, tensor in index.items():
            self.register_buffer(name, tensor, persistent=False)
        self._region_number = regions
        self._activity: dict[tuple, torch.Tensor] = {}

    def forward(self, x: torch.Tensor, active_regions: Iterable[str] | torch.Tensor | None = None) -> torch.Tensor:
        """One step.

        Args:
            x: (B, N, d_model), floating.
            active_regions: regions whose reads run: names, or a tensor (regions,) of 0 and 1 in the layout's order,
            which
                stays on the device. The others' positions pass through and stay readable. None: all.

        Returns:
            (B, N, d_model) in x's dtype.

        Raises:
            ValueError: x of another shape. KeyError: the name of a region that the layout does not have.
        """
        if x.dim() != 3 or x.shape[1] != self.plan.n_positions or x.shape[2] != self.d_model:
            raise ValueError(f"x must be (batch, {self.plan.n_positions}, {self.d_model}), got {tuple(x.shape)}")
        active = self._active_connections(active_regions, x.device)
        if not self.fn_modules:
            return x
        plan = self.plan
        rows, rest = (x, None) if plan.in_canvas_order else split_rows(x, self._order, 1)
        gain, single = self._gain(), len(self.fn_modules) == 1
        row_scale = None
        if active is not None or gain is not None or not single:
            everyone = torch.ones(plan.n_connections, device=x.device) if active is None else active
            row_scale = plan.row_scale(everyone)
            factor = everyone if gain is None else gain * everyone
        written = None
        for fn, module in self.fn_modules.items():
            whole_bias = single and gain is None
            part = module.attend(
                rows,
                self._plans[fn],
                gain=gain,
                active=active,
                row_scale=row_scale,
                bias_share=None if whole_bias else self._plans[fn].row_share(factor, row_scale),
                backend=self.backend,
            )
            written = part if written is None else written + part
        written = written.to(x.dtype)
        if active is not None:
            written = torch.where((row_scale.sum(0) > 0)[:, None], written, rows)
        elif not self._every_row_reads:
            written = torch.where(self._reads, written, rows)
        return written if rest is None else join_rows(rest, self._order, written, 1)

    def _gain(self) -> torch.Tensor | None:
        if self.edge_gates is None:
            return None
        ones = torch.ones(self.plan.n_connections, device=self.edge_gates.device)
        return ones.index_copy(0, self._gates, torch.sigmoid(self.edge_gates.float()))

    def _active_connections(self, active_regions, device) -> torch.Tensor | None:
        if active_regions is None:
            return None
        if isinstance(active_regions, torch.Tensor):
            if active_regions.shape != (len(self._region_number),):
                raise ValueError(
                    f"active_regions must be ({len(self._region_number)},), one entry per region of the layout; got "
                    f"{tuple(active_regions.shape)}"
                )
            # a copy in float32: a backward that is still pending keeps the activity of its own forward
            return active_regions.to(device=device, dtype=torch.float32)[self._source_region]
        names = frozenset([active_regions] if isinstance(active_regions, str) else active_regions)
        key = (names, str(device))
        if key not in self._activity:
            unknown = sorted(names - self._region_number.keys())
            if unknown:
                known = ", ".join(list(self._region_number)[:12])
                raise KeyError(f"active_regions names {unknown}, which the layout does not have; it has {known}")
            flags = [float(c.src in names) for c in self.plan.connections]
            if len(self._activity) >= _ACTIVITY_CACHE_SIZE:
                self._activity.pop(next(iter(self._activity)))
            self._activity[key] = torch.tensor(flags, device=device)
        return self._activity[key]
