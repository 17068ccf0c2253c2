"""What each attention function costs: ``python -m benchmarks.families``; the table is docs/families.md.

Three questions, forward and backward in float32 on one thread, batch 1, each behind a gate:

- scaling: a dispatcher of one region of 2⁶ … 2¹³ positions that reads itself, and one of 64 queries that read 2⁶ … 2¹³
  keys; d_model 64, 4 heads. Time, the most memory held at once, and the exponents of both, fitted to the larger sizes.
- loops: mamba and rwkv over 4,096 positions of d_model 256 against a loop over positions; at least 20 times as fast as
  one that indexes its inputs, where the softmax that reads mamba's rows, the same in both, is not most of the time; its
  products are timed by themselves.
- edges: 200 edges of one function against one edge that does the same work, in turns; at most 1.5 times as long.

Gates: a read by the dispatcher agrees with the function's module in float64; a scan and its gradients with a loop in
float64; gradients of many edges with those of one.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import measure
from benchmarks.step_loops import MambaCutLoop, MambaLoop, RWKVCutLoop, RWKVLoop
from canvas_engineering import (
    ATTENTION_REGISTRY,
    ATTENTION_TYPES,
    AttentionDispatcher,
    CanvasLayout,
    CanvasTopology,
    Connection,
)
from canvas_engineering.files import replace_file

DOCS = Path(__file__).parent.parent / "docs" / "families.md"
SIZES = tuple(2**i for i in range(6, 14))
QUERIES = 64
SCALING_WIDTH, WIDTH, HEADS = 64, 256, 4
EDGES, EDGE_SIZE = 200, 16
LENGTH, LEAST_RATIO, MOST_RATIO, TOLERANCE = 4096, 20.0, 1.5, 1e-5
SECONDS_PER_CASE = 0.2
# other names of cross_attention and pooling: what they cost is known
SAME_AS = ("self_attention", "cogvideox", "pooling_attention")
CLAIMS = {fn: "O(" + text.rpartition("O(")[2] for fn, text in ATTENTION_TYPES.items() if fn not in ("none", *SAME_AS)}
"""The complexity that each function's description states."""
PRODUCTS = "products of the read-out"
PAIRS_AND_KEYS = ("sparse_attention", "mixture", "mamba")
NOTES = {
    "mamba": "the scan is O(M); its result is read by a softmax over all rows",
    "sparse_attention": "the k largest logits are found among all N·M of them",
    "mixture": "the chunks of the keys grow with M: 2 experts of 4 see half of all pairs",
    "rwkv": "query i reads row i: 64 queries need 64 keys",
    "hyena": "64 queries convolve 64 averages",
}
FLA = """
On a GPU in float32, where the extra `fla` (flash-linear-attention) is installed, `fla.ops.hgrn.fused_recurrent_hgrn`,
h_t = exp(g_t) h_{t−1} + x_t, runs the recurrences of rwkv (g = −exp(decay)) and mamba (g = −exp(A_log) · dt_t, a
channel for each pair of channel and state), forward and backward, in chunks side by side. It is held to the torch path
within 1e-5, and `backend="torch"` keeps that path. mamba's softmax stays with torch, and so does linear_attention: the
sums over all keys of a read are one batched product, and the kernels there are causal.
"""


class Disagreement(Exception):
    """Ours and a contestant do not compute the same numbers: there is nothing to time."""


def functions() -> list[str]:
    """Names of the functions that are measured: registered ones, each once."""
    return [fn for fn in CLAIMS if fn in ATTENTION_REGISTRY]


def seconds_of(run: Callable[[], None], budget: float = SECONDS_PER_CASE) -> np.ndarray:
    """CPU seconds of as many calls as the budget holds, at least 2 and at most 30, after one to warm up. A first call
    that takes more than the budget is the only one."""
    times: list[float] = []
    while len(times) < 3 or (sum(times[1:]) < budget and len(times) < 31):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
        if times[0] > budget:
            return np.array(times)
    return np.array(times[1:])


def keep_pages() -> None:
    """Makes glibc keep freed memory: half the time of a large cheap operation can be fresh pages, from a size on that
    no function has to do with."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def peak_bytes(run: Callable[[], None]) -> int:
    """The most bytes that one call holds at once, beyond what is there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return int(np.cumsum([0, *changes]).max())


def exponent(sizes: list[int], values: list[float]) -> float:
    """The slope of log value over log size, by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


# -- scaling ----------------------------------------------------------------------------------------------------------


def one_read(fn: str, queries: int | None, keys: int) -> nn.Module:
    """A dispatcher of one edge: ``keys`` positions that read themselves, or ``queries`` others that read them."""
    extra = 0 if queries is None else queries
    regions = {"keys": (0, 1, 0, keys)}
    if extra:
        regions["queries"] = (0, 1, keys, keys + extra)
    layout = CanvasLayout(T=1, spatial_shape=(keys + extra,), d_model=SCALING_WIDTH, regions=regions)
    topology = CanvasTopology([Connection("queries" if extra else "keys", "keys", fn=fn)])
    return AttentionDispatcher(topology, layout, SCALING_WIDTH, HEADS)


def check_read(fn: str, size: int = 48) -> float:
    """Error of the dispatcher, where ``size`` positions read themselves, against the function's own module, both in
    float64. Raises :class:`Disagreement` over 1e-6, which is what float32 weights of reads leave."""
    torch.manual_seed(0)
    dispatcher = one_read(fn, None, size).double()
    x = torch.randn(1, size, SCALING_WIDTH, dtype=torch.float64)
    with torch.no_grad():
        expected = dispatcher.fn_modules[fn](x, x, x)
        error = float((dispatcher(x) - expected).abs().max() / expected.abs().max())
    if not error <= 1e-6:
        raise Disagreement(f"{fn}: the dispatcher is {error:.1e} off its module")
    return error


def scaling_rows(fn: str, sizes: tuple[int, ...] = SIZES) -> list[dict]:
    """One row per kind of read, gated: its sizes, and the exponents fitted to the larger half of them."""
    rows, error = [], check_read(fn)
    for kind, queries in (("reads itself", None), ("64 queries", QUERIES)):
        found = []
        for size in sizes:
            torch.manual_seed(0)
            dispatcher = one_read(fn, queries, size)
            x = torch.randn(1, dispatcher.plan.n_positions, SCALING_WIDTH, requires_grad=True)
            run = measure.step(dispatcher, x)
            found.append((measure.quantiles(seconds_of(run)), peak_bytes(run)))
        half = len(sizes) // 2
        times, bytes_ = [f[0]["p10"] for f in found], [f[1] for f in found]
        slopes = (exponent(list(sizes[half:]), values[half:]) for values in (times, bytes_))
        rows.append(
            {
                "question": "scaling",
                "fn": fn,
                "kind": kind,
                "claim": CLAIMS[fn],
                "d_model": SCALING_WIDTH,
                "sizes": list(sizes),
                "seconds": [f[0] for f in found],
                "peak_bytes": bytes_,
                **dict(zip(("time_exponent", "memory_exponent"), slopes)),
                "worst_error": error,
                **measure.environment(),
            }
        )
    return rows


# -- loops ------------------------------------------------------------------------------------------------------------


def gate(module: nn.Module, expected: nn.Module, inputs: tuple[torch.Tensor, ...]) -> float:
    """The largest error of outputs and gradients against ``expected`` in float64, relative to the largest value of
    each. Raises :class:`Disagreement` over 1e-5."""
    results = []
    upstream = torch.randn(inputs[0].shape)
    for one, dtype in ((module, torch.float32), (expected.double(), torch.float64)):
        given = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = one(*given)
        leaves = {**{f"input {i}": x for i, x in enumerate(given)}, **dict(one.named_parameters())}
        grads = torch.autograd.grad(out, list(leaves.values()), upstream.to(dtype), allow_unused=True)
        results.append({"output": out.detach(), **{n: g for n, g in zip(leaves, grads) if g is not None}})
    expected.float()
    found, wanted = results
    largest = max(float(w.abs().max()) for name, w in wanted.items() if name != "output")
    errors = {}
    for name, value in wanted.items():
        # A gradient that cancels to almost nothing is held to the scale of the others; a key bias, which shifts all
        # scores alike, to that of its weight.
        size = float(wanted[name.replace("k_proj.bias", "k_proj.weight")].abs().max())
        scale = size if name == "output" else max(size, 1e-3 * largest)
        errors[name] = float((found[name].double() - value).abs().max()) / scale
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE}
    if wrong:
        raise Disagreement(f"{type(module).__name__} differs from {type(expected).__name__} in float64: {wrong}")
    return max(errors.values())


def readout_products(queries: int, keys: int, width: int) -> Callable[[], None]:
    """The products without which mamba's rows cannot be read and trained: two forward, and five backward where the
    probabilities, which would be N·M numbers, are not kept."""
    q, y, pairs = torch.randn(queries, width), torch.randn(keys, width), torch.empty(min(queries, 512), keys)

    def run() -> None:
        for part in q.split(len(pairs)):
            for _ in range(7):
                torch.mm(part, y.T, out=pairs[: len(part)])

    return run


def loop_rows(
    length: int = LENGTH,
    width: int = WIDTH,
) -> list[dict]:
    """Ours and both loops, by function and number of queries."""
    rows = []
    cases = (
        ("mamba", (MambaLoop, MambaCutLoop), min(QUERIES, length)),
        ("mamba", (MambaLoop, MambaCutLoop), length),
        ("rwkv", (RWKVLoop, RWKVCutLoop), length),
    )
    for fn, loops, queries in cases:
        torch.manual_seed(0)
        ours = ATTENTION_REGISTRY[fn](width, n_heads=HEADS)
        contestants = {"ours": ours, "indexed loop": loops[0](width, HEADS), "cut loop": loops[1](width, HEADS)}
        for loop in list(contestants.values())[1:]:
            loop.load_state_dict(ours.state_dict())
        x_q, x_k = (torch.randn(1, n, width, requires_grad=True) for n in (queries, length))

        class Read(nn.Module):
            def __init__(self, module):
                super().__init__()
                self.module = module

            def forward(self, x_q, x_k):
                return self.module(x_q, x_k, x_k)

        reads = {name: Read(module) for name, module in contestants.items()}
        error = gate(reads["ours"], reads["cut loop"], (x_q, x_k))
        runs = {name: measure.step(read, x_q, x_k) for name, read in reads.items()}
        times = {"ours": seconds_of(runs["ours"], 1.0)}
        if (fn, queries) == ("mamba", length):
            times[PRODUCTS] = seconds_of(readout_products(queries, length, width), 1.0)
        for name in list(runs)[1:]:  # minutes of them are not needed to tell 20 from 1, nor a warm-up
            start = time.process_time()
            runs[name]()
            times[name] = np.array([time.process_time() - start])
        for name, seconds in times.items():
            rows.append(
                {
                    "question": "loops",
                    "fn": fn,
                    "contestant": name,
                    "queries": queries,
                    "keys": length,
                    "d_model": width,
                    "seconds": measure.quantiles(seconds),
                    "ratio": float(np.median(seconds) / np.median(times["ours"])),
                    "at_least": LEAST_RATIO if name == "indexed loop" and (fn, queries) != ("mamba", length) else None,
                    "worst_error": error,
                    **measure.environment(),
                }
            )
    return rows


# -- edges ------------------------------------------------------------------------------------------------------------


def dispatcher_of(fn: str, regions: dict[str, tuple], reads: list[tuple[str, str]], positions: int, width: int):
    layout = CanvasLayout(T=1, spatial_shape=(positions,), d_model=width, regions=regions)
    connections = [Connection(src, dst, fn=fn) for src, dst in reads]
    return AttentionDispatcher(CanvasTopology(connections), layout, width, HEADS)


def edge_row(fn: str, edges: int = EDGES, size: int = EDGE_SIZE, width: int = WIDTH, rounds: int = 7) -> dict:
    """``edges`` regions of ``size`` positions that read themselves, against one edge of the same work, in two ways.

    "batch": one such region on as many canvases: the same work to the last product, which is the gate too, and is held
    to :data:`MOST_RATIO`. "long": all positions in one region, which read ``size`` keys where the function's time goes
    with pairs, else themselves. Functions whose time goes with pairs and with keys have no such edge.
    """
    torch.manual_seed(0)
    n = edges * size
    regions = {f"r{i}": (0, 1, i * size, (i + 1) * size) for i in range(edges)}
    many = dispatcher_of(fn, regions, [(r, r) for r in regions], n, width)
    batch = dispatcher_of(fn, {"r": (0, 1, 0, size)}, [("r", "r")], size, width)
    batch.load_state_dict(many.state_dict())
    x = torch.randn(1, n, width, requires_grad=True)
    apart = x.detach().view(edges, size, width).requires_grad_()
    upstream = torch.randn(x.shape)
    for module, given, grad in ((many, x, upstream), (batch, apart, upstream.view_as(apart))):
        module(given).backward(grad)
    error = float((x.grad - apart.grad.view_as(x)).abs().max() / x.grad.abs().max())
    if not error <= TOLERANCE:
        raise Disagreement(f"{fn}: gradients of {edges} edges differ from those of one by {error:.1e}")
    runs = {"many": measure.step(many, x), "batch": measure.step(batch, apart)}
    keys = None if fn in PAIRS_AND_KEYS else size if CLAIMS[fn] == "O(NM)" else n
    if keys is not None:
        long = dispatcher_of(fn, {"all": (0, 1, 0, n), "keys": (0, 1, 0, keys)}, [("all", "keys")], n, width)
        long.load_state_dict(many.state_dict())
        runs["long"] = measure.step(long, x)
    times = measure.interleave(runs, rounds)
    return {
        "question": "edges",
        "fn": fn,
        "edges": edges,
        "positions": n,
        "keys_of_long": keys,
        "d_model": width,
        "seconds": {name: measure.quantiles(seconds) for name, seconds in times.items()},
        "ratio": {name: measure.quantiles(times["many"] / times[name]) for name in runs if name != "many"},
        "at_most": MOST_RATIO,
        "worst_error": error,
        **measure.environment(),
    }


# -- tables -----------------------------------------------------------------------------------------------------------


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}" if seconds < 0.0995 else f"{seconds * 1e3:.0f}"


def document(rows: list[dict]) -> str:
    """docs/families.md from the rows."""
    scaling = {(r["fn"], r["kind"]): r for r in rows if r["question"] == "scaling"}
    loops = [r for r in rows if r["question"] == "loops"]
    edges = [r for r in rows if r["question"] == "edges"]
    names = list(dict.fromkeys(fn for fn, _ in scaling))
    first = rows[0]
    lines = [
        "# What each attention function costs",
        "",
        "Written by `python -m benchmarks.families` from `benchmarks/results/families.json`; not edited by hand.",
        "",
        f"Forward and backward through a dispatcher, float32, one thread, batch 1, on {first['device']} with torch "
        f"{first['torch']}. Exponents are slopes of log cost over log size, fitted to sizes 2¹⁰ … 2¹³: 1 is linear, 2 "
        "quadratic. Times are CPU time, the fastest tenth of repeated calls, with an allocator that keeps its pages; "
        "memory is the most that one call holds at once.",
        "",
        f"## A region that reads itself (N = M, d_model {SCALING_WIDTH}, {HEADS} heads)",
        "",
        "| function | claimed | time exponent | memory exponent | ms at 2⁸ | ms at 2¹⁰ | ms at 2¹³ | MiB at 2¹³ |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for fn in names:
        row = scaling[fn, "reads itself"]
        cells = (_time(row["seconds"][row["sizes"].index(size)]["p10"]) for size in (256, 1024, 8192))
        lines.append(
            f"| {fn} | {CLAIMS[fn]} | {row['time_exponent']:.2f} | {row['memory_exponent']:.2f} | "
            + " | ".join(cells)
            + f" | {row['peak_bytes'][-1] / 2**20:.0f} |"
        )
    lines += [
        "",
        f"## {QUERIES} queries that read M keys",
        "",
        "| function | time exponent in M | memory exponent in M | ms at 2¹³ | MiB at 2¹³ |",
        "|---|---|---|---|---|",
    ]
    for fn in names:
        row = scaling[fn, "64 queries"]
        slowest, largest = row["seconds"][-1]["p10"], row["peak_bytes"][-1] / 2**20
        exponents = f"{row['time_exponent']:.2f} | {row['memory_exponent']:.2f}"
        lines.append(f"| {fn} | {exponents} | {_time(slowest)} | {largest:.0f} |")
    lines += ["", "Where an exponent needs a word:", ""]
    lines += [f"- {fn}: {note}." for fn, note in NOTES.items() if fn in names]
    lines += FLA.rstrip().splitlines()
    lines += [
        "",
        f"## Scans against loops over positions (d_model {WIDTH})",
        "",
        "The indexed loop takes `x[:, t]` at every step, which autograd answers with a tensor of zeros per step; the "
        "cut loop takes its inputs apart once. CPU time; outputs and gradients agree to 1e-5 with the loop in float64. "
        f"mamba's softmax of {LENGTH:,} queries over as many rows is the same in all three, and most of ours: its "
        "seven products alone, at the rate of plain ones, take what the table says, so that no scan comes to 20 there.",
        "",
        "| function | queries | keys | contestant | ms | time / ours |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['fn']} | {r['queries']:,} | {r['keys']:,} | {r['contestant']} | {_time(r['seconds']['p50'])} | "
        f"{r['ratio']:.1f} |"
        for r in loops
    ]
    lines += [
        "",
        f"## {EDGES} edges against one of the same work",
        "",
        f"{EDGES} regions of {EDGE_SIZE} positions that read themselves, d_model {WIDTH}, over (batch) one such region "
        f"on {EDGES} canvases, which is the same work, and over (long) one region of all {EDGES * EDGE_SIZE:,} "
        f"positions that reads as many keys as the last column says: {EDGE_SIZE}, which makes as many pairs, or all "
        "where no pairs are made. Paired ratios of interleaved rounds.",
        "",
        "| function | ms | over batch | p10 to p90 | over long | p10 to p90 | keys of long |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in edges:
        ratios = [f"{q['p50']:.2f} | {q['p10']:.2f} to {q['p90']:.2f}" for q in r["ratio"].values()]
        cells = " | ".join([*ratios, f"{r['keys_of_long']:,}"] if "long" in r["ratio"] else [*ratios, "", "", ""])
        lines.append(f"| {r['fn']} | {_time(r['seconds']['many']['p50'])} | {cells} |")
    return "\n".join(lines) + "\n"


def write_document(rows: list[dict], path: Path = DOCS) -> None:
    replace_file(path, document(rows).encode())


def table(rows: list[dict]) -> Table:
    """Exponents by function."""
    result = Table(title="forward + backward, float32, one thread, d_model 64: exponents over 2¹⁰ … 2¹³")
    for column in ("function", "kind", "claimed", "time", "memory", "ms at the largest"):
        result.add_column(column)
    for row in rows:
        cells = row["fn"], row["kind"], row["claim"], f"{row['time_exponent']:.2f}", f"{row['memory_exponent']:.2f}"
        result.add_row(*cells, _time(row["seconds"][-1]["p10"]))
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description=__doc__.splitlines()[0])
    parser.add_argument("--fn", action="append", choices=functions(), help="default: all")
    parser.add_argument("--question", action="append", choices=("scaling", "loops", "edges"), help="default: all")
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "families.json")
    parser.add_argument("--render", action="store_true", help="write docs/families.md from rows that are there")
    options = parser.parse_args(argv)
    if options.render:
        write_document(measure.read_rows(options.out))
        return 0
    torch.set_num_threads(1)
    keep_pages()
    console, questions = measure.console(), options.question or ("scaling", "loops", "edges")
    fns, rows, failed = options.fn or functions(), [], False
    try:
        if "scaling" in questions:
            for fn in fns:
                rows += scaling_rows(fn)
            console.print(table(rows))
        if "loops" in questions and {"mamba", "rwkv"} & set(fns):
            found = loop_rows()
            for row in found:
                console.print(
                    f"{row['fn']}, {row['queries']} queries, {row['contestant']}: {row['seconds']['p50']:.3f} s, "
                    f"{row['ratio']:.1f} × ours"
                )
            rows += found
            failed |= any(row["at_least"] is not None and row["ratio"] < row["at_least"] for row in found)
        if "edges" in questions:
            for fn in fns:
                row = edge_row(fn)
                ratios = {name: ratio["p50"] for name, ratio in row["ratio"].items()}
                said = ", ".join(f"{ratio:.2f} times one edge ({name})" for name, ratio in ratios.items())
                console.print(f"{fn}: {EDGES} edges take {said}")
                rows.append(row)
                failed |= ratios["batch"] > row["at_most"]
    except Disagreement as cause:
        console.print(f"[red]{cause}")
        return 1
    measure.write_rows(rows, options.out)
    console.print(f"rows: {options.out}")
    if len(questions) == 3 and not options.fn:
        write_document(rows)
        console.print(f"table: {DOCS}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
