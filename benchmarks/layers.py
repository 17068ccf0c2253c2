"""Cases that time modules and compilers: a function a kind, from a case to a contest or, without one, to its rows.

All of it runs in float32 on a CPU, layers on a GPU too; gradients are those of the inputs and of every parameter.
"""

from __future__ import annotations

import gc
import math
import time
import tracemalloc
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.cases import Case
from benchmarks.measure import Contest, Provider, Run, Settings
from benchmarks.problem import Problem
from canvas_engineering.attention import canvas_attention
from canvas_engineering.canvas import CanvasLayout
from canvas_engineering.connectivity import CanvasTopology, resolve_frames
from canvas_engineering.dispatch import AttentionDispatcher
from canvas_engineering.plan import compile_attention
from examples.plain_attention import DenseMask, PerEdgeLoop, Projections


def run_of(module: nn.Module, x: Tensor, upstream: Tensor, call: Callable | None = None) -> Run:
    """Forward and backward of a module: the gradients of "x", its input, and of its parameters by name."""
    x = x.detach().clone().requires_grad_()
    return Run(call or module, [x], {"x": x} | dict(module.named_parameters()), upstream)


class JointAttention(nn.Module):
    """Joint form by block tables: the dense mask's projections around :func:`canvas_attention`."""

    def __init__(self, topology: CanvasTopology, layout: CanvasLayout, d_model: int, n_heads: int = 4):
        super().__init__()
        self.fn_modules = nn.ModuleDict({"cross_attention": Projections(d_model, n_heads)})
        self.plan = compile_attention(layout, topology, normalize="joint")
        covered = torch.from_numpy(self.plan.rows_with_keys())
        self.register_buffer("covered", covered[:, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, d_model) → (B, N, d_model); positions without keys keep their input."""
        p = self.fn_modules["cross_attention"]
        q, k, v = (p.split(project(x)) for project in (p.q_proj, p.k_proj, p.v_proj))
        out = p.out_proj(canvas_attention(q, k, v, self.plan).transpose(1, 2).flatten(2))
        return torch.where(self.covered, out, x)


LAYERS = {
    "edge": {"ours": AttentionDispatcher, "per_edge_loop": PerEdgeLoop},
    "joint": {"ours": JointAttention, "dense_mask": DenseMask},
}
"""The plain module of a form, which is exact in float64, comes last."""


def layer(case: Case, settings: Settings) -> Contest:
    """The dispatcher against the loop over connections; in joint form, :class:`JointAttention` against a dense mask.

    In 16 bits all run under autocast, and errors may be twice those of the plain module. Options: ``forms`` that are
    timed, by default both.
    """
    layout, topology = case.declare()
    arguments, device, dtype = (topology, layout, layout.d_model, case.heads), settings.device, settings.dtype
    torch.manual_seed(0)
    state = AttentionDispatcher(*arguments).state_dict()
    x, upstream = torch.randn(2, case.batch, layout.num_positions, layout.d_model).to(device)
    covered = PerEdgeLoop(*arguments).covered.to(device)
    forms = {form: LAYERS[form] for form in case.options.get("forms", LAYERS)}

    def loaded(kind: type[nn.Module], **options) -> nn.Module:
        module = kind(*arguments, **options)
        module.load_state_dict(state)
        return module.to(device)

    def build(kind: type[nn.Module]) -> Run:
        module = loaded(kind, **({"backend": settings.backend} if kind is AttentionDispatcher else {}))

        def call(x: Tensor) -> Tensor:
            with torch.autocast(device, dtype, enabled=dtype.itemsize == 2):
                return module(x).float()

        return run_of(module, x, upstream, call)

    def exact(form: str) -> dict[str, Tensor]:
        module = loaded([*LAYERS[form].values()][-1]).double()
        if form == "joint":  # painted anew from the declaration: a mistake in compiling masks cannot hide in it
            weight = Problem(case).weights(np.arange(layout.num_positions), device)
            module.mask = torch.where(covered, weight, 1.0).log()
        results = run_of(module, x.double(), upstream.double()).results()
        return {name: select(name, y) for name, y in results.items()}

    def select(name: str, y: Tensor) -> Tensor:
        """Without what passes through, which is larger than what is computed, and would hide errors."""
        passed = {"out": x, "x": upstream}.get(name)
        return y if passed is None else y - passed.where(~covered, torch.zeros_like(passed))

    def budgets(form: str, exact: dict[str, Tensor]) -> dict[str, float]:
        if dtype == torch.float32:
            return dict.fromkeys(exact, measure.BUDGET)
        plain = build([*LAYERS[form].values()][-1])
        errors = contest.check(plain, plain.results(), exact, dict.fromkeys(exact, math.inf))["errors"]
        return {name: max(2 * error, torch.finfo(dtype).eps / 2) for name, error in errors.items()}

    providers = [Provider(f, name, partial(build, kind)) for f, kinds in forms.items() for name, kind in kinds.items()]
    facts = {"tokens": layout.num_positions} | {
        name: case.options[name] for name in ("fn", "keys") if name in case.options
    }
    contest = Contest(providers, exact, facts, select=select, budgets=budgets)
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
