"""What ATTENTION_TYPES says of costs, against operations counted at several sizes: never against a clock."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from canvas_engineering import (
    ATTENTION_REGISTRY,
    ATTENTION_TYPES,
    AttentionDispatcher,
    CanvasLayout,
    CanvasTopology,
    Connection,
    create_attention,
)
from canvas_kernels.block_table import BlockTable

QUERIES, KEYS = 512, 2048
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
CLAIMS = {fn: "O(" + text.rpartition("O(")[2] for fn, text in ATTENTION_TYPES.items() if fn != "none"}

# What the cost is times, at least and at most: with twice the queries and keys, twice the queries, twice the keys.
LINEAR = ((1.9, 2.1), (1.01, 2.1), (1.01, 2.1))
GROWTH = {
    "O(NM)": ((3.6, 4.4), (1.8, 2.2), (1.8, 2.2)),
    "O(N+M)": LINEAR,
    "O((N+M)K)": LINEAR,
    "O(NK + M)": LINEAR,
    "O((N+M)W)": ((1.9, 2.1), (1.0, 2.1), (1.01, 2.1)),  # 1-D windows of few queries over many keys are as many as keys
    "O(N log N + M)": ((2.02, 2.4), (1.01, 2.4), (1.01, 2.0)),
    "O(N)": ((1.9, 2.1), (1.9, 2.1), (1.0, 1.01)),
}

# The argument that a claim's K or W stands for.
COUNTS = {"perceiver": "n_latents", "random_fixed": "n_random", "local_attention": "window_size"}


class Operations(TorchDispatchMode):
    """Counts multiplications and additions of products, and for everything else the elements that go in or come out."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += self._cost(func, args, kwargs or {}, out)
        return out

    @staticmethod
    def _cost(func, args, kwargs, out):
        packet = func.overloadpacket
        if packet in flop_registry:
            return flop_registry[packet](*args, **kwargs, out_val=out)
        if packet is FLASH:
            return 4 * args[0].numel() * args[1].shape[2]
        if packet is torch.ops.canvas_kernels.attention:
            return 4 * args[0].numel() // args[0].shape[2] * BlockTable.lookup(args[6]).pairs
        if any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns):
            return 0  # a view
        tensors = [x for x in (*args, *(out if isinstance(out, (tuple, list)) else [out])) if torch.is_tensor(x)]
        elements = max((x.numel() for x in tensors), default=0)
        if packet is torch.ops.canvas_engineering.selective_scan:
            return elements * args[4].shape[1]
        return elements * math.ceil(math.log2(args[0].shape[-1])) if "fft" in func.name() else elements


def cost(module, n, m):
    queries, keys = torch.randn(1, n, 4), torch.randn(1, m, 4)
    with torch.no_grad(), Operations() as operations:
        out = module(queries, keys, keys)
    return operations.count + out.numel()


@pytest.mark.parametrize("fn", CLAIMS)
def test_the_claimed_complexity_is_the_counted_one(fn):
    torch.manual_seed(0)
    module = create_attention(fn, 4, n_heads=1).eval()
    one = cost(module, QUERIES, KEYS)
    sizes = ((2 * QUERIES, 2 * KEYS), (2 * QUERIES, KEYS), (QUERIES, 2 * KEYS))
    for (n, m), (least, most) in zip(sizes, GROWTH[CLAIMS[fn]]):
        times = cost(module, n, m) / one
        assert least <= times <= most, f"{n} queries and {m} keys cost {times:.3f} times {QUERIES} and {KEYS}"


@pytest.mark.parametrize("fn", CLAIMS)
def test_costs_grow_with_latents_and_windows_where_the_claim_says_so(fn):
    assert (fn in COUNTS) == any(letter in CLAIMS[fn] for letter in "KW")
    if fn in COUNTS:
        torch.manual_seed(0)
        few, many = (create_attention(fn, 4, n_heads=1, **{COUNTS[fn]: count}).eval() for count in (32, 64))
        assert 1.5 <= cost(many, QUERIES, KEYS) / cost(few, QUERIES, KEYS) <= 2.1


def grid_cost(query_grid, key_grid):
    """What a dispatcher's windows of two dimensions cost between regions of these rows and columns."""
    rows, columns = query_grid[0], max(query_grid[1], key_grid[1])
    regions = {"a": (0, 1, 0, rows, 0, query_grid[1]), "b": (0, 1, rows, rows + key_grid[0], 0, key_grid[1])}
    layout = CanvasLayout(T=1, d_model=4, spatial_shape=(rows + key_grid[0], columns), regions=regions)
    topology = CanvasTopology([Connection("a", "b", fn="local_attention")])
    dispatcher = AttentionDispatcher(topology, layout, 4, n_heads=1).eval()
    x = torch.randn(1, layout.num_positions, 4)
    dispatcher(x)
    with torch.no_grad(), Operations() as operations:
        dispatcher(x)
    return operations.count


def test_windows_on_grids_cost_no_more_than_in_order(monkeypatch):
    one = grid_cost((32, 32), (32, 32))
    assert 1.9 <= grid_cost((64, 32), (64, 32)) / one <= 2.1
    assert 3.8 <= grid_cost((64, 64), (64, 64)) / one <= 4.2
    # windows of 17 x 17 keys in the place of 9 x 9
    wide = functools.partial(ATTENTION_REGISTRY["local_attention"], window_size=(1, 16, 16))
    monkeypatch.setitem(ATTENTION_REGISTRY, "local_attention", wide)
    assert 1.5 <= grid_cost((32, 32), (32, 32)) / one <= 289 / 81


def test_the_count_tells_orders_apart():
    x = torch.randn(64, 4)
    with Operations() as operations:
        x @ x.T
    assert operations.count == 2 * 64 * 64 * 4
    with Operations() as operations:
        x.T[:2].exp()
    assert operations.count == 128
