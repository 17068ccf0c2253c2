"""Cases that time modules and compilers: a function a kind, from a case to a contest or, without one, to its rows."""

from __future__ import annotations

import gc
import math
import time
import tracemalloc
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.cases import Case
from benchmarks.measure import Contest, Provider, Run, Settings
from canvas_engineering.connectivity import resolve_frames
from canvas_engineering.dispatch import AttentionDispatcher
from canvas_engineering.plan import compile_attention
from examples.plain_attention import PerEdgeLoop


def layer(case: Case, settings: Settings) -> Contest:
    """The dispatcher against the loop over connections, which is exact in float64: gradients are those of the input,
    "x", and of every parameter. In 16 bits both run under autocast, and errors may be twice those of the loop."""
    layout, topology = case.declare()
    arguments, device, dtype = (topology, layout, layout.d_model, case.heads), settings.device, settings.dtype
    torch.manual_seed(0)
    state = AttentionDispatcher(*arguments).state_dict()
    x, upstream = torch.randn(2, case.batch, layout.num_positions, layout.d_model).to(device)
    covered = PerEdgeLoop(*arguments).covered.to(device)

    def build(kind: type[nn.Module], computed: torch.dtype = torch.float32, **options) -> Run:
        module = kind(*arguments, **options)
        module.load_state_dict(state)
        module.to(device, computed)
        leaf = x.detach().to(computed, copy=True).requires_grad_()

        def call(x: Tensor) -> Tensor:
            with torch.autocast(device, dtype, enabled=dtype.itemsize == 2 and computed == torch.float32):
                return module(x).to(computed)

        return Run(call, [leaf], {"x": leaf} | dict(module.named_parameters()), upstream.to(computed))

    def exact(form: str) -> dict[str, Tensor]:
        return {name: select(name, y) for name, y in build(PerEdgeLoop, torch.float64).results().items()}

    def select(name: str, y: Tensor) -> Tensor:
        """Without what passes through, which is larger than what is computed, and would hide errors."""
        passed = {"out": x, "x": upstream}.get(name)
        return y if passed is None else y - passed.where(~covered, torch.zeros_like(passed))

    def budgets(form: str, exact: dict[str, Tensor]) -> dict[str, float]:
        if dtype == torch.float32:
            return dict.fromkeys(exact, measure.BUDGET)
        plain = build(PerEdgeLoop)
        errors = contest.check(plain, plain.results(), exact, dict.fromkeys(exact, math.inf))["errors"]
        return {name: max(2 * error, torch.finfo(dtype).eps / 2) for name, error in errors.items()}

    builds = {"ours": partial(build, AttentionDispatcher, backend=settings.backend)}
    builds["per_edge_loop"] = partial(build, PerEdgeLoop)
    providers = [Provider("edge", name, each) for name, each in builds.items()]
    contest = Contest(providers, exact, {"tokens": layout.num_positions} | case.options, select=select, budgets=budgets)
    return contest


def plan(case: Case, settings: Settings) -> list[dict]:
    """CPU seconds of declaring a canvas and of compiling its plan, cold; and the most memory that compiling holds."""
    times = []
    for _ in range(case.options.get("rounds", 9) + 1):  # the first also pays for lazy imports
        compile_attention.cache_clear()
        resolve_frames.cache_clear()
        gc.collect()
        start = time.process_time()
        layout, topology = case.declare()
        declared = time.process_time()
        compiled = compile_attention(layout, topology)
        times.append((declared - start, time.process_time() - declared))
    declared, seconds = np.array(times[1:]).T
    row = {"form": "edge", "provider": "ours", "tokens": layout.num_positions}
    row |= {"connections": len(topology.connections), "rectangles": len(compiled.table.weight)}
    compile_attention.cache_clear()
    tracemalloc.start()
    compile_attention(layout, topology)
    row["peak_bytes"] = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return [row | {"seconds": measure.quantiles(seconds), "declare_seconds": measure.quantiles(declared)}]


KINDS = {"layer": layer, "plan": plan}
