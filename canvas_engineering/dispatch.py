"""AttentionDispatcher: a topology as a layer, under a program, one fused call per attention function.

Triggers become activity in :mod:`.residuals`, slot banks are bound in :mod:`.identity`, and the attention functions,
each with its backward, are in :mod:`.attention`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from canvas_kernels.block_table import row_sums, touched
from canvas_kernels.derived import real_tensors
from canvas_kernels.packing import IndexMap, gather_rows, replace_rows

from .attention import ATTENTION_REGISTRY, BACKENDS, create_attention
from .attention.base import Scales, attend_grouped, bind_plan, is_fused, prepare
from .attention.sharded import with_pulled_rows
from .attention.softmax import FixedPatternAttention
from .canvas import ATTENTION_TYPES, CanvasLayout, SpatiotemporalCanvas
from .canvas.tensor import parameter_key
from .checked import checked_bool, checked_names, checked_sizes, checked_tensor
from .compiler import CompiledProgram
from .connectivity import CanvasTopology
from .cortex import CortexRegistry
from .derived_buffers import CanvasModule
from .identity import SlotBindingModule
from .notices import warn
from .parallel import PlacedPlan
from .parallel.rank import own_plan
from .plan import AttentionPlan, compile_attention
from .program import CanvasProgram, validate_constraints
from .program.checks import clock_problems
from .residuals import ResidualAccumulator, TriggerFlags
from .schema import CanvasSchema

__all__ = ["AttentionDispatcher", "surviving_state"]


ROW_FUNCTIONS = (
    "CrossAttention",
    "CogVideoXAttention",
    "CosineAttention",
    "GatedAttention",
    "SigmoidAttention",
    "SparseAttention",
    "LinearAttention",
    "PoolingAttention",
    "PerceiverAttention",
    "RandomFixedAttention",
    "NoneAttention",
)
"""Attention functions whose rows ranks may share: each query is served by itself."""


@dataclass(frozen=True, eq=False)
class _Errors:
    """A connection whose output minus its queries goes into the residual summary of ``region``."""

    number: int
    region: str
    fn: str
    plan: AttentionPlan
    attending: IndexMap


class AttentionDispatcher(CanvasModule):
    """Runs every connection of a topology on a canvas tensor, in edge form (docs/semantics.md, sections 4 and 5).

    At each position the outputs of its attention sets r are averaged by weight, out_i = Σ_r a_r f_r(i) / Σ_r w_r, with
    a_r = w_r, or w_r·σ(g) for a connection of write mode "gate" with its learned g. Where a set of write mode "replace"
    is in force, only such sets count. Positions without keys keep their input, bit for bit.

    Args:
        topology, layout: the declaration. Connections to regions that the layout lacks are skipped with one
            UserWarning.
        d_model: width of the canvas tensor.
        n_heads: heads of each attention function; must divide d_model.
        dropout: on attention weights, in training.
        skip_temporal: whether to ignore temporal offsets.
        residual_accumulator: after each step, is updated with output − queries of every connection that ran and whose
            dst has the carrier "residual" (the default of the family "residual"), if it has that region; triggers use
            the summaries from before the step.
        program: its connection programs set functions, write modes, masks and triggers; slot banks stand for the keys
            of regions with an identity. Each violated constraint and each clock that waits for a missing region gets a
            UserWarning; constraints are not enforced, and schedulers run clocks.
        cortex: connections inside one cortex that name no function run its ``local_backend``; those inside an isolated
            one run separate modules.
        backend: "auto", "triton", "torch" or "reference"; see :func:`canvas_attention`.

    Attributes:
        plan: the compiled :class:`AttentionPlan`.
        fn_modules: ModuleDict by function name, one module shared by the connections of that function; those inside
            an isolated cortex share ``<function>__<cortex>``, also in ``plan.fns``.
        edge_gates: (gate connections,) parameter, initially zero; None without gates.
        slot_modules: ModuleDict of the slot banks, by region name with ``.`` as ``__`` and brackets as ``_``.

    A recomputed step, as under activation checkpointing, updates the summaries again, and its triggers use the updated
    ones: do not checkpoint steps with an accumulator.

    Raises:
        ValueError: an attention function that is not registered, n_heads that do not divide d_model, an unknown
            backend, a mask that does not fit its regions, or an invalid program.

    >>> from canvas_engineering import CanvasLayout, CanvasTopology
    >>> layout = CanvasLayout(T=2, H=2, W=2, d_model=16, regions={"a": (0, 2, 0, 1, 0, 2)})
    >>> dispatcher = AttentionDispatcher(CanvasTopology.dense(["a"]), layout, d_model=16)
    >>> x = torch.randn(1, 8, 16)
    >>> bool((dispatcher(x)[:, 2:4] == x[:, 2:4]).all())
    True
    """

    edge_gates: nn.Parameter | None

    def __init__(
        self,
        topology: CanvasTopology,
        layout: CanvasLayout,
        d_model: int,
        n_heads: int = 4,
        dropout: float = 0.0,
        skip_temporal: bool = False,
        residual_accumulator: ResidualAccumulator | None = None,
        program: CanvasProgram | None = None,
        cortex: CortexRegistry | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
        if not isinstance(topology, CanvasTopology) or not isinstance(layout, CanvasLayout):
            given = f"{type(topology).__name__}, {type(layout).__name__}"
            raise ValueError(f"AttentionDispatcher takes a CanvasTopology and then a CanvasLayout, got {given}")
        _check_kinds(residual_accumulator, program, cortex)
        d_model, n_heads, dropout = checked_sizes(d_model, n_heads, dropout, divides=False)
        skip_temporal = checked_bool(skip_temporal, "skip_temporal")
        self.topology, self.layout, self.d_model, self.backend = topology, layout, d_model, backend
        self.plan = plan = compile_attention(layout, topology, program, cortex=cortex, dense_in_time=skip_temporal)
        if program is not None:
            _warn_of_violations(program, plan, layout)
        compiled, names = _with_isolated(plan, cortex)
        self.fn_modules = nn.ModuleDict()
        self._plans = {}
        for number in np.unique(compiled.attention_sets.connection).tolist():
            name, connection = compiled.fns[number], plan.connections[number]
            if name in self.fn_modules:
                continue
            try:
                self.fn_modules[name] = create_attention(names[name], d_model, n_heads, dropout)
            except ValueError as error:
                raise ValueError(f"connection {connection.src!r} attends to {connection.dst!r}: {error}") from None
            self._plans[name] = bind_plan(names[name], self.fn_modules[name], compiled.for_fn(name), layout, backend)
        self.plan = plan = compiled.with_function_plans(self._plans)
        gates = [i for i, c in enumerate(plan.connections) if c.write_mode == "gate"]
        self.placed, self.n_held = None, layout.num_positions
        self.register_parameter("edge_gates", nn.Parameter(torch.zeros(len(gates))) if gates else None)
        regions = {name: i for i, name in enumerate(layout.regions)}
        self._gating = frozenset(plan.connections[number].src for number in gates)
        self._bank_keys = {bank.region: parameter_key(bank.region) for bank in plan.slot_banks}
        self._map_rows(plan, gates, regions)
        self._region_number = regions
        running = plan.attention_sets.connection.tolist()
        self._query_regions = frozenset(plan.connections[number].src for number in running)
        self._add_banks(program, n_heads)
        # regions outside the layout that schedulers may fire
        self._elsewhere = frozenset() if program is None else program.regions.keys() - regions.keys()
        self.residual_accumulator = residual_accumulator
        self.residual_connections = self._residual_connections(program, compiled)
        self.triggers = None
        if plan.triggers:
            self.triggers = TriggerFlags(plan.triggers, plan.n_connections, residual_accumulator)

    def forward(
        self,
        x: torch.Tensor,
        active_regions: Iterable[str] | torch.Tensor | None = None,
        *,
        add_to: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs one step.

        Args:
            x: (B, N, d_model), floating.
            active_regions: the query regions that run: names, or a tensor (regions,) in the layout's order, 0 for
                inactive ones, on the device and without gradient, as `DeviceScheduler` returns. Positions of other
                regions pass through and remain keys. None: all. Under ``torch.compile`` pass a tensor: each set of
                names compiles a new graph. Without gradients, names of which nothing runs return x itself; in training
                every parameter gets a gradient, zero if unused, as DDP and FSDP wait for it.
            add_to: like x. Results are added to it, and positions without keys keep it, bit for bit: a pre-norm block
                is ``x = attention(norm(x), add_to=x)``.

        Returns:
            (B, N, d_model) in x's dtype, or add_to's.

        Raises:
            ValueError: a wrong shape of x or add_to, or a dtype of x other than the parameters' without autocast.
            KeyError: a name that is a region of neither the layout nor the program.
        """
        n = self.n_held
        if checked_tensor(x, "x").dim() != 3 or x.shape[1] != n or x.shape[2] != self.d_model:
            raise ValueError(f"x must be (batch, {n}, {self.d_model}), got {tuple(x.shape)}")
        if add_to is not None and checked_tensor(add_to, "add_to").shape != x.shape:
            raise ValueError(f"add_to must be like x, {tuple(x.shape)}, got {tuple(add_to.shape)}")
        self._check_dtype(x)
        if active_regions is not None and not isinstance(active_regions, torch.Tensor):
            names = (active_regions,) if isinstance(active_regions, str) else active_regions
            active_regions = frozenset(checked_names(names, "active_regions"))
        if self.placed is not None and torch.compiler.is_compiling() and not self.placed.queries_everywhere:
            raise ValueError(
                "some rank holds no query, and compilers leave out an exchange whose rows nothing needs: cut "
                "the canvas otherwise (CanvasParallel(cut=…)), or run the step eagerly"
            )
        active = self._active_connections(active_regions, x.device)
        if not self.fn_modules or self._may_skip(active_regions):
            return x if add_to is None else add_to
        base = x if add_to is None else add_to
        dtype = torch.promote_types(x.dtype, torch.float32)
        row_scale = None if active is None else self.plan.row_scale(active, dtype, x.device)
        rows = self._rows(x if self.placed is None else with_pulled_rows(x, self.placed), active, row_scale)
        if self.residual_connections and self.residual_accumulator is not None:
            self._accumulate(self.residual_accumulator, x, rows, active)
        written = self._attended(rows, active, row_scale)
        written = gather_rows(written, self._written, 1)
        own = gather_rows(base, self._targets, 1)
        written = written.to(own.dtype) if add_to is None else own + written.to(own.dtype)
        if row_scale is not None:
            in_force = gather_rows((row_scale > 0).any(0)[:, None].to(torch.float32), self._written) > 0
            written = torch.where(in_force, written, own)
        return replace_rows(base, self._targets, written, 1)

    def _map_rows(self, plan: AttentionPlan, gates: list[int], regions: dict[str, int]) -> None:
        """Builds the index maps of a step."""
        order, n = plan.order, plan.n_canvas
        self._n_rows = n_rows = int((order < n).sum())
        attending = plan.table.has_keys()[:n_rows].nonzero()[0]
        # canvas → packed rows; packed rows → those with keys; canvas → rows with keys
        self._packed = IndexMap.gather(order[:n_rows], n)
        self._written = IndexMap.gather(attending, plan.n_packed)
        self._targets = IndexMap.gather(order[attending], self.n_held)
        # (gates, 1) → connections: 1 where there is no gate
        gate_number = np.full(plan.n_connections, len(gates))
        gate_number[gates] = np.arange(len(gates))
        self._gate_of = IndexMap.gather(gate_number, len(gates) + 1)
        sources = np.array([regions.get(c.src, 0) for c in plan.connections], np.int64)
        self._source_region = IndexMap.gather(sources, max(len(regions), 1))
        # rows outside a function's attention sets must not affect it
        with real_tensors():
            scale = plan.row_scale(None, torch.float64, torch.device("cpu"))
            self._touches_all = {fn: bool(touched(own.table, None, scale).all()) for fn, own in self._plans.items()}
            self._touches_all_banks = bool(touched(plan.table, None, scale)[n_rows:].all())

    def _rows(self, x: torch.Tensor, active: torch.Tensor | None, row_scale: torch.Tensor | None) -> torch.Tensor:
        """Returns packed rows of the canvas, followed by the slots of each slot bank, bound to x.

        Unused banks are bound to zeros, so that NaN and inf there reach nothing.
        """
        rows = gather_rows(x, self._packed, 1)
        if not self._bound:
            return rows
        used = None
        if active is not None or not self._touches_all_banks:
            if row_scale is None:
                dtype = torch.promote_types(x.dtype, torch.float32)
                row_scale = self.plan.row_scale(None, dtype, x.device)
            used = touched(self.plan.table, active, row_scale)
        parts = [rows]
        for key, canvas_rows, first, slots in self._bound:
            own = gather_rows(x, canvas_rows, 1)
            if used is not None:
                own = torch.where(used[first : first + slots.n_out].any(), own, own.new_zeros(()))
            bank = self.slot_modules[key](own)
            parts.append(gather_rows(bank, slots, 1).to(rows.dtype))
        return torch.cat(parts, 1)

    def _attended(
        self, rows: torch.Tensor, active: torch.Tensor | None, row_scale: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the weighted sum over all functions at every packed row, (B, n, d_model)."""
        plan, gain = self.plan, self._gain()
        shared = gain is not None or len(self.fn_modules) > 1
        own_scale, factor = row_scale, None
        if own_scale is None and (shared or not all(self._touches_all.values())):
            own_scale = plan.row_scale(None, torch.promote_types(rows.dtype, torch.float32), rows.device)
        if shared:
            assert own_scale is not None
            on = torch.ones(plan.n_connections, device=rows.device) if active is None else active
            factor = on.to(own_scale.dtype) if gain is None else gain.to(own_scale.dtype) * on
        written = None
        for fn, module in self.fn_modules.items():
            own, share, used = self._plans[fn], None, rows
            if factor is not None:
                assert own_scale is not None  # as where it is shared
                share = own.row_weight_fraction(factor, own_scale)
            if active is not None or not self._touches_all[fn]:
                assert own_scale is not None
                # NaN and inf there would reach the gradients of its projections
                used = torch.where(touched(own.table, active, own_scale)[:, None], rows, rows.new_zeros(()))
            part = self._attend(module, used, own, Scales(gain, active, own_scale), share)
            written = part if written is None else written + part
        assert written is not None  # forward returns early without functions
        return written

    def _check_dtype(self, x: torch.Tensor) -> None:
        first = next(self.fn_modules.parameters(), None)
        if first is None or first.dtype == x.dtype:
            return
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            return
        if all(parameter.dtype != x.dtype for parameter in self.fn_modules.parameters()):
            raise ValueError(
                f"x is {x.dtype} and the dispatcher's parameters are {first.dtype}: cast one of them, as by "
                f"x.to({first.dtype}), or run under torch.autocast"
            )

    def _attend(self, module, rows, plan, scales: Scales, bias_weight=None) -> torch.Tensor:
        if not plan.table.n_slots:
            # no query of this rank: parameters get gradients of zero, and the exchange of rows runs backward too
            unused = [*module.parameters(), *([] if scales.gain is None else [scales.gain])]
            unused = sum((parameter.sum() for parameter in unused), rows.new_zeros(()))
            return torch.where(torch.zeros_like(rows, dtype=torch.bool), rows, 0.0 * unused)
        if not is_fused(type(module)):
            return attend_grouped(module, rows, plan, scales)
        return module.attend(rows, plan, scales, bias_weight=bias_weight, backend=self.backend)

    def place(self, placed: PlacedPlan) -> None:
        """Runs this rank's positions of ``placed``, a sharding of this dispatcher's plan over rows, from now on.

        x and add_to then hold these alone, (B, own positions, d_model). :class:`.distributed.CanvasParallel` calls it.

        Raises:
            ValueError: functions, slot banks, residual averages or dropout that ranks cannot share, naming the
                connection.
        """
        plan, rank = self.plan, placed.rank_plan
        check_rows(self)
        own, plans = own_plan(plan, rank), {fn: own_plan(each, rank) for fn, each in self._plans.items()}
        for fn, module in self.fn_modules.items():
            if isinstance(module, FixedPatternAttention):
                selected = own_plan(module.with_pattern(self._plans[fn]), rank)
                plans[fn] = selected.index_sets[("pattern", *module.pattern_key())] = selected
            elif is_fused(type(module)):
                prepare(module, plans[fn])
        self.plan, self._plans = dataclasses.replace(own, by_fn=plans), plans
        self.placed, self.n_held = placed, len(placed.positions)
        gates = [i for i, c in enumerate(plan.connections) if c.write_mode == "gate"]
        self._map_rows(self.plan, gates, self._region_number)

    def microsteps(self, x: torch.Tensor, plan: Iterable[Iterable[str] | torch.Tensor | None]) -> torch.Tensor:
        """Runs consecutive steps, each with its own active regions, as from ``RegionScheduler.step_plan``."""
        for active_regions in plan:
            x = self(x, active_regions)
        return x

    def region_parameters(self, region: str) -> list[str]:
        """Returns the parts that belong to a region, for `ProgramCompiler`: its slot bank, and the gates of connections
        whose query region it is, one tensor for all regions."""
        key = self._bank_keys.get(region)
        banks = [] if key is None else [f"slot_modules.{key}"]
        return [*banks, *["edge_gates"] * (region in self._gating)]

    @property
    def summaries(self) -> dict[str, dict[str, float]] | None:
        """Residual summaries as floats, None without an accumulator; synchronises with the device."""
        return None if self.residual_accumulator is None else self.residual_accumulator.summaries()

    # -- identity

    def _add_banks(self, program: CanvasProgram | None, n_heads: int) -> None:
        self.slot_modules, self._bound = nn.ModuleDict(), []
        order, n = self.plan.order, self.layout.num_positions
        programs = {} if program is None else program.regions
        for bank in self.plan.slot_banks:
            identity, key = programs[bank.region].identity, parameter_key(bank.region)
            assert identity is not None  # by construction of the plan's slot banks
            if key in self.slot_modules or hasattr(nn.ModuleDict, key):
                raise ValueError(f"region {bank.region!r} cannot have a slot bank: the module name {key!r} is in use")
            self.slot_modules[key] = SlotBindingModule(self.d_model, bank.size, n_heads, identity.birth_death)
            # the bank's slots are contiguous packed rows
            bounds = [n + bank.start, n + bank.start + bank.size]
            first, stop = np.searchsorted(order[self._n_rows :], bounds) + self._n_rows
            if stop > first:
                canvas_rows = IndexMap.gather(self.layout.region_positions(bank.region), n)
                slots = IndexMap.gather(order[first:stop] - n - bank.start, bank.size)
                self._bound.append((key, canvas_rows, int(first), slots))

    # -- residuals

    def _residual_connections(self, program: CanvasProgram | None, plan: AttentionPlan) -> list[_Errors]:
        accumulator = self.residual_accumulator
        if accumulator is None:
            return []
        regions, programs = set(accumulator.region_names), {} if program is None else program.regions
        for region in sorted(regions & programs.keys() & self.layout.regions.keys()):
            carriers = {programs[region].carrier, self.layout.region_spec(region).carrier}
            if programs[region].family == "residual" and "residual" not in carriers:
                warn(
                    f"region {region!r} is of the family 'residual', but of the carrier {programs[region].carrier!r}: "
                    "its summaries are not updated; the dispatcher updates those of the carrier 'residual'"
                )
        errors = []
        for number in dict.fromkeys(plan.attention_sets.connection.tolist()):
            region = plan.connections[number].dst
            carriers = {self.layout.region_spec(region).carrier}
            if region in programs:
                carriers.add(programs[region].carrier)
            if "residual" in carriers and region in regions:
                fn = plan.fns[number]
                own = bind_plan(fn, self.fn_modules[fn], plan.for_connection(number), self.layout, self.backend)
                attending = IndexMap.gather(own.table.has_keys().nonzero()[0], plan.n_packed)
                errors.append(_Errors(number, region, fn, own, attending))
        return errors

    @torch.no_grad()
    def _accumulate(
        self, accumulator: ResidualAccumulator, x: torch.Tensor, rows: torch.Tensor, active: torch.Tensor | None
    ) -> None:
        if self._bound and (active is not None or not self._touches_all_banks):
            # replaced connections count here
            on = torch.ones(self.plan.n_connections, device=x.device) if active is None else (active != 0).float()
            rows = self._rows(x, active, row_sums(self.plan.table, on))
        for errors in self.residual_connections:
            attended = self._attend(self.fn_modules[errors.fn], rows, errors.plan, Scales())
            error = gather_rows(attended, errors.attending, 1) - gather_rows(rows, errors.attending, 1)
            if not error.shape[0]:
                continue
            on = None if active is None else active[errors.number]
            accumulator.update(errors.region, error, on)

    # -- activity

    def _may_skip(self, active_regions) -> bool:
        # in training DDP and FSDP2 wait for the gradient of every parameter
        named = isinstance(active_regions, frozenset) and not torch.is_grad_enabled()
        return named and self._query_regions.isdisjoint(active_regions)

    def _gain(self) -> torch.Tensor | None:
        if self.edge_gates is None:
            return None
        gates = torch.sigmoid(self.edge_gates.to(torch.promote_types(self.edge_gates.dtype, torch.float32)))
        return gather_rows(torch.nn.functional.pad(gates, (0, 1), value=1.0)[:, None], self._gate_of)[:, 0]

    def _active_connections(self, active_regions, device) -> torch.Tensor | None:
        active = self._sources_active(active_regions, device)
        if self.triggers is None:
            return active
        accumulator = self.residual_accumulator
        fires = self.triggers(None if accumulator is None else accumulator.values)
        return fires if active is None else active * fires

    def _sources_active(self, active_regions, device) -> torch.Tensor | None:
        if active_regions is None:
            return None
        if not isinstance(active_regions, torch.Tensor):
            active_regions = self._region_flags(active_regions, device)
        if active_regions.shape != (len(self._region_number),):
            raise ValueError(
                f"active_regions must be ({len(self._region_number)},), one entry per region of the layout; got "
                f"{tuple(active_regions.shape)}"
            )
        flags = (active_regions.detach().to(device) != 0).to(torch.float32)
        return gather_rows(flags[:, None], self._source_region)[:, 0]

    def _region_flags(self, names: frozenset, device: torch.device) -> torch.Tensor:
        """Returns flags (regions,) of names."""
        unknown = sorted(names - self._region_number.keys() - self._elsewhere, key=str)
        if unknown:
            known = ", ".join(list(self._region_number)[:12])
            raise KeyError(f"active_regions names {unknown}, which the layout does not have; it has {known}")
        flags = torch.tensor([name in names for name in self._region_number])
        # pinned, so that the copy is asynchronous
        return flags.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else flags.to(device)


def check_rows(dispatcher: AttentionDispatcher) -> None:
    """ValueError, naming the connection, if ranks cannot share the rows of a dispatcher."""
    plan = dispatcher.plan
    for number, (fn, connection) in enumerate(zip(plan.fns, plan.connections)):
        module = dict(dispatcher.fn_modules).get(fn)
        if module is not None and type(module).__name__ not in ROW_FUNCTIONS:
            raise ValueError(
                f"connection {number}, {connection.src!r} attends to {connection.dst!r} by {fn!r}, whose results need "
                f"other queries: ranks share the rows of {', '.join(ROW_FUNCTIONS)}"
            )
        if getattr(module, "dropout", 0.0):
            raise ValueError(
                f"connection {number} by {fn!r} has dropout, which ranks would not draw alike: set it to 0"
            )
    if dispatcher.slot_modules or dispatcher.residual_accumulator is not None or dispatcher.placed is not None:
        raise ValueError("ranks cannot share the rows of a dispatcher with slot banks or residual averages, or twice")


def surviving_state(
    module: nn.Module, state: Mapping[str, torch.Tensor], compiled: CompiledProgram
) -> dict[str, torch.Tensor]:
    """Filters the state dict of a full model down to that of the deployed model.

    The dispatchers of ``compiled.program`` have no parameters for functions and slot banks that only dropped
    connections used, and gates for surviving connections only; a canvas on its layout has modality embeddings of its
    regions only. Everything else is returned unchanged; state of schedulers, accumulators and conditioners for other
    regions does not fit.

    Args:
        module: the deployed model, or one dispatcher; dispatchers of other topologies and canvases of other layouts
            are ignored.
        state: state dict of the same model on the whole program.
        compiled: the result of `ProgramCompiler.compile` for that program.

    Returns:
        A state dict for ``module.load_state_dict``.

    Raises:
        ValueError: a number of gates other than that of the whole program.

    >>> from canvas_engineering import Connection, ProgramCompiler, RegionProgram
    >>> layout = CanvasLayout(T=1, d_model=8, spatial_shape=(2,), regions={"a": (0, 1, 0, 1), "b": (0, 1, 1, 2)})
    >>> topology = CanvasTopology([Connection("a", "a"), Connection("a", "b", fn="pooling")])
    >>> regions = {"a": RegionProgram(), "b": RegionProgram(compile_mode="constant")}
    >>> program = CanvasProgram(CanvasSchema(layout, topology), regions)
    >>> whole, compiled = AttentionDispatcher(topology, layout, 8), ProgramCompiler(program).compile()
    >>> small = AttentionDispatcher(compiled.schema.topology, compiled.schema.layout, 8, program=compiled.program)
    >>> small.load_state_dict(surviving_state(small, whole.state_dict(), compiled))
    <All keys matched successfully>
    """
    result, schema = dict(state), compiled.schema

    def keep(start: str, names: Iterable[str]) -> None:
        for name in [name for name in result if name.startswith(start)]:
            if name[len(start) :].split(".")[0] not in names:
                del result[name]

    for path, child in module.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(child, SpatiotemporalCanvas) and child.layout == schema.layout:
            keep(f"{prefix}modality_embeddings.", dict(child.modality_embeddings or {}))
        if not isinstance(child, AttentionDispatcher) or child.topology != schema.topology:
            continue
        keep(f"{prefix}fn_modules.", child.fn_modules)
        keep(f"{prefix}slot_modules.", child.slot_modules)
        gates = result.pop(f"{prefix}edge_gates", None)
        if gates is not None:
            if gates.shape != (len(compiled.gates),):
                raise ValueError(
                    f"{prefix}edge_gates has the shape {tuple(gates.shape)}; the whole program has "
                    f"{len(compiled.gates)} connections that gate"
                )
            if any(compiled.gates):
                result[f"{prefix}edge_gates"] = gates[torch.tensor(compiled.gates, device=gates.device)]
    return result


def _with_isolated(plan: AttentionPlan, cortex: CortexRegistry | None) -> tuple[AttentionPlan, dict[str, str]]:
    """Returns the plan with separate function names inside each isolated cortex, and a dict from names to functions.

    Raises:
        ValueError: a name that belongs to another function or cortex.
    """
    if cortex is None or not any(spec.isolated for spec in cortex.specs):
        return plan, {fn: fn for fn in plan.fns}
    functions: dict[str, tuple[str, str | None]] = {}
    fns = []
    for connection, fn in zip(plan.connections, plan.fns):
        spec = cortex.cortex_for(connection.src) if cortex.same_cortex(connection.src, connection.dst) else None
        home = spec.name if spec is not None and spec.isolated else None
        name = fn if home is None else f"{fn}__{parameter_key(home)}"
        if functions.setdefault(name, (fn, home)) != (fn, home):
            raise ValueError(f"two attention modules would have the name {name!r}: rename the cortex {home!r}")
        fns.append(name)
    return dataclasses.replace(plan, fns=tuple(fns)), {name: fn for name, (fn, _) in functions.items()}


def _warn_of_violations(program: CanvasProgram, plan: AttentionPlan, layout: CanvasLayout) -> None:
    """Warns of each constraint that the plan's connections violate, and of each clock that cannot fire."""
    running = CanvasProgram(CanvasSchema(layout, CanvasTopology(list(plan.connections))), program.regions)
    for problem in (*validate_constraints(running), *clock_problems(running)):
        warn(f"the program of region {problem}")


def _check_kinds(residual_accumulator, program, cortex) -> None:
    kinds = (
        ("residual_accumulator", residual_accumulator, ResidualAccumulator),
        ("program", program, CanvasProgram),
        ("cortex", cortex, CortexRegistry),
    )
    for name, value, kind in kinds:
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{name} must be a {kind.__name__}, or None, got {value!r}")
    known = sorted({*ATTENTION_REGISTRY, *ATTENTION_TYPES})
    for spec in () if cortex is None else cortex.specs:
        if spec.local_backend not in known:
            raise ValueError(
                f"cortex {spec.name!r}: unknown local_backend {spec.local_backend!r}: choose one of {', '.join(known)}"
            )
