"""Cases that time modules and compilers: a function a kind, from a case to a contest or, without one, to its rows.

All of it runs in float32 on a CPU, layers on a GPU too; gradients are those of the inputs and of every parameter.
"""

from __future__ import annotations

import gc
import math
import time
import tracemalloc
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.cases import Case
from benchmarks.measure import Contest, Provider, Run, Settings
from benchmarks.naive import LOOPS, DenseMask, PerEdgeLoop, Projections
from benchmarks.problem import Problem
from canvas_engineering.attention import ATTENTION_REGISTRY, canvas_attention
from canvas_engineering.canvas import CanvasLayout
from canvas_engineering.connectivity import CanvasTopology, Connection, resolve_frames
from canvas_engineering.dispatch import AttentionDispatcher
from canvas_engineering.plan import compile_attention

CALL_SECONDS = 0.2
"""Of repeated calls of one size, where cost is fitted to sizes."""
COGVIDEOX = {"num_attention_heads": 4, "attention_head_dim": 64, "in_channels": 4, "out_channels": 4, "num_layers": 4}
COGVIDEOX |= {"time_embed_dim": 64, "text_embed_dim": 64, "max_text_seq_length": 32}
COGVIDEOX |= {"use_rotary_positional_embeddings": True}


def run_of(module: nn.Module, inputs: Sequence[Tensor], upstream: Tensor, call: Callable | None = None, **order) -> Run:
    """Forward and backward of a module: the gradients of "x" and "x1", its inputs, and of its parameters by name."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    leaves = dict(zip(("x", "x1"), inputs)) | dict(module.named_parameters())
    return Run(call or module, inputs, leaves, upstream, **order)


def contest_of(builds: dict[str, Callable[[], Run]], exact: Callable[[], dict], form: str = "edge", **facts) -> Contest:
    """A contest in one form, of builds by the names of their providers."""
    providers = [Provider(form, name, build) for name, build in builds.items()]
    return Contest(providers, lambda form: exact(), facts)


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

        return run_of(module, [x], upstream, call)

    def exact(form: str) -> dict[str, Tensor]:
        module = loaded([*LAYERS[form].values()][-1]).double()
        if form == "joint":  # painted anew from the declaration: a mistake in compiling masks cannot hide in it
            weight = Problem(case).weights(np.arange(layout.num_positions), device)
            module.mask = torch.where(covered, weight, 1.0).log()
        results = run_of(module, [x.double()], upstream.double()).results()
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
    contest = Contest(providers, exact, {"tokens": layout.num_positions}, select=select, budgets=budgets)
    return contest


def program(case: Case, settings: Settings) -> Contest:
    """The dispatcher with a program that says much and changes nothing, against the dispatcher without: equal bits."""
    from canvas_engineering import CanvasProgram, CanvasSchema, ClockSpec, ConnectionProgram, RegionProgram
    from canvas_engineering.residuals import ResidualAccumulator

    layout, topology = case.declare()
    says_much = CanvasProgram(
        CanvasSchema(layout, topology),
        {name: RegionProgram("observation", clock=ClockSpec(period=2)) for name in layout.regions},
        {(c.src, c.dst): ConnectionProgram("observe") for c in topology.connections},
    )
    torch.manual_seed(0)
    plain = AttentionDispatcher(topology, layout, layout.d_model, case.heads)
    x, upstream = torch.randn(2, 1, layout.num_positions, layout.d_model)

    def build(programmed: bool) -> Run:
        options = {"residual_accumulator": ResidualAccumulator(list(layout.regions)), "program": says_much}
        module = AttentionDispatcher(topology, layout, layout.d_model, case.heads, **options if programmed else {})
        module.load_state_dict({**module.state_dict(), **plain.state_dict()})
        return run_of(module, [x], upstream)

    builds = {"ours": partial(build, True), "without_program": partial(build, False)}
    contest = contest_of(builds, lambda: build(False).results(), tokens=layout.num_positions)
    contest.budgets = lambda form, exact: dict.fromkeys(exact, 0.0)
    return contest


def skipping(case: Case, settings: Settings) -> Contest:
    """The attention of a step of examples.belief_world in which memory and belief rest, against one in which everything
    updates, forward: positions that rest pass through, the others are as ever."""
    from examples import belief_world  # wants gymnasium

    bound, says = belief_world.declare(belief_world.WINDOW, belief_world.TOKENS * belief_world.TIMES)
    torch.manual_seed(0)
    blocks = belief_world.Thinker(bound, says, belief_world.WINDOW).eval().blocks
    x = torch.randn(1, bound.layout.num_positions, belief_world.D_MODEL)
    rests = torch.zeros(bound.layout.num_positions, 1, dtype=torch.bool)
    for name in belief_world.THOUGHT:
        rests[bound.layout.region_index(name)] = True
    active = {"ours": set(bound.field_names) - set(belief_world.THOUGHT), "everything": set(bound.field_names)}

    def build(name: str) -> Run:
        call = lambda x: torch.stack([block(x, active[name]) for block in blocks])  # noqa: E731
        return Run(call, [x], {}, unpack=lambda out: torch.where(rests, x, out) if name == "everything" else out)

    def exact() -> dict[str, Tensor]:
        run = build("everything")
        return {"out": run.unpack(run.results()["out"])}

    return contest_of({name: partial(build, name) for name in active}, exact, tokens=len(rests))


def packed(case: Case, settings: Settings) -> Contest:
    """A training step of a CogVideoX model whose tokens are packed once per model, against once per layer."""
    from diffusers import CogVideoXTransformer3DModel

    from canvas_engineering import cogvideox_layout, graft_looped_blocks, tile_topology
    from examples.train_robot import rotary_tables

    height, width, frames = case.options["size"]
    T, shape = (frames - 1) // 4 + 1, (height // 8, width // 8)
    sizes = {"sample_height": shape[0], "sample_width": shape[1], "sample_frames": frames}
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, T, COGVIDEOX["in_channels"], *shape, generator=generator)
    text = torch.randn(1, 32, COGVIDEOX["text_embed_dim"], generator=generator)
    upstream = torch.randn(x.shape, generator=generator) / x.numel()

    def build(is_packed: bool) -> Run:
        torch.manual_seed(0)
        module = CogVideoXTransformer3DModel(**COGVIDEOX | sizes)
        graft = {"layout": cogvideox_layout(module.config, height, width, frames), "topology": tile_topology(4, 4)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the density, which is not the matter here
            graft_looped_blocks(module, 1, loops=1, freeze="none", packed=is_packed, **graft)
        if module.config.packed != is_packed:
            raise measure.Wrong("the plan moves no tokens: there is nothing to compare")
        options = {"timestep": torch.tensor([500]), "image_rotary_emb": rotary_tables(module.config, T, *shape)}
        return run_of(module, [x, text], upstream, lambda x, text: module(x, text, return_dict=False, **options)[0])

    builds = {"ours": partial(build, True), "once_per_layer": partial(build, False)}
    tokens = 32 + T * shape[0] * shape[1] // 4
    contest = contest_of(builds, lambda: build(False).results(), "joint", tokens=tokens)
    contest.budgets = lambda form, exact: dict.fromkeys(exact, 1e-4)
    return contest


def scan(case: Case, settings: Settings) -> Contest:
    """A function's scan against a loop that indexes its inputs at every position; options ``fn``, ``queries``, ``keys``
    and ``width``."""
    fn, queries, keys, width = (case.options[name] for name in ("fn", "queries", "keys", "width"))
    torch.manual_seed(0)
    state = ATTENTION_REGISTRY[fn](width, n_heads=case.heads).state_dict()
    inputs = [torch.randn(1, n, width) for n in (queries, keys)]
    upstream = torch.randn(inputs[0].shape)

    def build(kind: type[nn.Module], dtype: torch.dtype = torch.float32) -> Run:
        module = kind(width, n_heads=case.heads)
        module.load_state_dict(state)
        module.to(dtype)
        return run_of(module, [x.to(dtype) for x in inputs], upstream.to(dtype), lambda q, k: module(q, k, k))

    builds = {"ours": partial(build, ATTENTION_REGISTRY[fn]), "indexed_loop": partial(build, LOOPS[fn])}
    exact = lambda: build(LOOPS[fn], torch.float64).results()  # noqa: E731
    return contest_of(builds, exact, fn=fn, queries=queries, keys=keys)


def dispatcher_of(fn: str, regions: dict[str, int], pairs: dict[str, str], width: int) -> AttentionDispatcher:
    """A dispatcher on a canvas of one frame and one dimension, of regions of so many positions, one after another."""
    starts = dict(zip(regions, np.cumsum([0, *regions.values()]).tolist()))
    boxes = {name: (0, 1, starts[name], starts[name] + size) for name, size in regions.items()}
    layout = CanvasLayout(T=1, spatial_shape=(sum(regions.values()),), d_model=width, regions=boxes)
    connections = [Connection(src, dst, fn=fn) for src, dst in pairs.items()]
    return AttentionDispatcher(CanvasTopology(connections), layout, width, 4)


def edges(case: Case, settings: Settings) -> Contest:
    """Many connections of one function against one connection that does the same work, on as many canvases; options
    ``fn``, ``edges``: regions of ``size`` positions, each of which attends to itself, and ``width``."""
    fn, count, size, width = (case.options[name] for name in ("fn", "edges", "size", "width"))
    torch.manual_seed(0)
    state = dispatcher_of(fn, {"r0": size}, {"r0": "r0"}, width).state_dict()
    x, upstream = torch.randn(2, 1, count * size, width)

    def build(n: int) -> Run:
        names = [f"r{i}" for i in range(n)]
        module = dispatcher_of(fn, dict.fromkeys(names, size), dict(zip(names, names)), width)
        module.load_state_dict(state)
        inputs, grad = (y.view(-1, n * size, width) for y in (x, upstream))
        return run_of(module, [inputs], grad, unpack=lambda y: y.reshape(x.shape))

    def exact() -> dict[str, Tensor]:
        results = build(1).results()
        return {name: results[name].reshape(x.shape) for name in ("out", "x")}

    builds = {"ours": partial(build, count), "batch": partial(build, 1)}
    return contest_of(builds, exact, fn=fn, edges=count, tokens=count * size)


def scaling(case: Case, settings: Settings) -> list[dict]:
    """What one connection costs by its size: forward and backward, seconds and the most that tensors hold at once.

    Options: ``fn``, ``width``, ``sizes``: of the keys; exponents are fitted to the larger half; ``queries`` that attend
    to them, 0 for the keys themselves. Raises Wrong where the dispatcher and the function's module differ in float64.
    """
    fn, sizes, queries, width = (case.options[name] for name in ("fn", "sizes", "queries", "width"))

    def dispatcher(keys: int, queries: int) -> AttentionDispatcher:
        torch.manual_seed(0)
        src = "queries" if queries else "keys"
        return dispatcher_of(fn, {"keys": keys} | ({src: queries} if queries else {}), {src: "keys"}, width)

    module, x = dispatcher(48, 0).double(), torch.randn(1, 48, width, dtype=torch.float64)
    with torch.no_grad():
        off = measure.error(module(x), module.fn_modules[fn](x, x, x))
    if not off <= 1e-6:  # what weights of sets in float32 leave
        raise measure.Wrong(f"{fn}: the dispatcher is {off:.1e} off its module")
    seconds, held = [], []
    for size in sizes:
        module = dispatcher(size, queries)
        x = torch.randn(1, size + queries, width)
        run = run_of(module, [x], torch.randn(x.shape))
        seconds.append(measure.quantiles(measure.repeat(run, CALL_SECONDS)))
        held.append(measure.peak_bytes(run.results))
    half = len(sizes) // 2
    slope = [np.polyfit(np.log(sizes[half:]), np.log(y[half:]), 1)[0] for y in ([s["p10"] for s in seconds], held)]
    row = {"form": "edge", "provider": "ours", "fn": fn, "claim": case.options["claim"], "queries": queries}
    row |= {"sizes": list(sizes), "seconds": seconds, "bytes": held, "errors": {"out": off}}
    return [row | {"time_exponent": float(slope[0]), "memory_exponent": float(slope[1])}]


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
    row = {"form": "edge", "provider": "ours", "tokens": layout.num_positions, "at_most": case.at_most}
    row |= {"connections": len(topology.connections), "rectangles": len(compiled.table.weight)}
    compile_attention.cache_clear()
    tracemalloc.start()
    compile_attention(layout, topology)
    row["peak_bytes"] = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return [row | {"seconds": measure.quantiles(seconds), "declare_seconds": measure.quantiles(declared)}]


PROVIDERS = ["dense_mask", "without_program", "everything", "once_per_layer", "indexed_loop", "batch"]
KINDS = {kind.__name__: kind for kind in (layer, program, skipping, packed, scan, edges, scaling, plan)}
