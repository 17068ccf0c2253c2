"""Cuts of a plan: every pair at one rank, few bytes, even load; simulated, without processes."""

from __future__ import annotations

import time
from random import Random

import numpy as np
import pytest

from canvas_engineering import CanvasLayout, CanvasTopology, Connection, compile_attention
from canvas_engineering.parallel.report import Model, choices, describe_ranks, rank_costs
from tests.parallel.cases import frames_plan, owners, random_plan

pytestmark = pytest.mark.filterwarnings("ignore:.*have no keys on this layout:UserWarning")
COGVIDEOX = Model(heads=48, head_dim=64, itemsize=2)


def fleet(robots: int, own: int = 496, shared: int = 64):
    """Robots that attend to themselves and to a dispatch, which attends to all."""
    regions = {f"r{i}": (0, 1, i * own, (i + 1) * own) for i in range(robots)}
    regions["dispatch"] = (0, 1, robots * own, robots * own + shared)
    connections = [Connection(name, name) for name in regions]
    connections += [Connection(*pair) for i in range(robots) for pair in ((f"r{i}", "dispatch"), ("dispatch", f"r{i}"))]
    layout = CanvasLayout(T=1, d_model=8, spatial_shape=(robots * own + shared,), regions=regions)
    return compile_attention(layout, CanvasTopology(connections), normalize="joint")


def rows_of_all_gather(plan, ranks: int) -> float:
    return plan.n_packed * (ranks - 1) / ranks


def received_rows(cost, model: Model) -> float:
    """The most that a rank gets, in rows of keys and values."""
    return cost.received.max() / (2 * model.width * model.itemsize)


@pytest.mark.parametrize(
    "cut", ["balanced", "by_rows", "uneven", "scattered", "an empty rank", "everything on one rank"]
)
@pytest.mark.parametrize("form", ["joint", "edge"])
def test_every_pair_is_computed_once(form, cut):
    for seed in range(8):
        rng = Random(f"{form} {cut} {seed}")
        plan = frames_plan(form) if seed == 0 else random_plan(rng, form)
        shards, n = rng.choice([1, 2, 3, 5]), plan.n_packed
        sharded = plan.shard(rows=shards, cut=owners(plan, shards, rng).get(cut, cut), width=rng.choice([1, 64]))
        assert sorted(np.concatenate([own for (own,) in sharded.owned]).tolist()) == list(range(plan.n_positions))
        total = np.zeros((n, n))
        for shard in range(shards):
            own = sharded.rank(shard)
            for table, rows in tables_of(sharded, shard, own):
                total[np.ix_(rows, rows)] += counted(table)
        assert np.array_equal(total, counted(plan.table))


def tables_of(sharded, shard: int, own):
    """Tables of a rank with the packed rows that theirs are."""
    yield own.table, own.packed.index
    if own.travel is not None:
        held = np.full(sharded.plan.n_positions, -1)
        held[sharded.plan.order] = np.arange(sharded.plan.n_packed)
        rows = np.concatenate([held[sharded.owned[shard][0]], own.travel.there.packed])
        yield own.travel.table, rows[own.travel.inputs.index]


def counted(table) -> np.ndarray:
    """How many segments hold each pair."""
    dense = np.zeros((table.n_positions, table.n_positions))
    for q0, q1, k0, k1 in zip(table.q_start, table.q_stop, table.k_start, table.k_stop):
        dense[q0:q1, k0:k1] += 1
    return dense


def test_what_is_sent_is_what_is_received():
    for seed in range(8):
        rng = Random(seed)
        plan = random_plan(rng, ("joint", "edge")[seed % 2])
        sharded = plan.shard(rows=3, cut=owners(plan, 3, rng)["uneven"])
        for which in (lambda own: own.pull, lambda own: own.travel and own.travel.there):
            exchanges = [which(sharded.rank(shard)) for shard in range(3)]
            if exchanges[0] is not None:
                sent = np.array([exchange.send for exchange in exchanges])
                assert np.array_equal(sent.T, [exchange.receive for exchange in exchanges])
                assert [len(exchange.rows.index) for exchange in exchanges] == sent.sum(1).tolist()


def test_a_minute_of_video_moves_a_twenty_fifth():
    plan = frames_plan("joint", frames=60, tokens=1350, text=226)
    cost = rank_costs(plan.shard(rows=8, width=COGVIDEOX.width), COGVIDEOX, node=8)
    assert received_rows(cost, COGVIDEOX) <= rows_of_all_gather(plan, 8) / 25
    assert max(cost.load, cost.rows_balance, cost.pairs_balance) <= 1.1
    assert cost.local > 0.8


def test_a_fleet_moves_a_five_hundredth():
    plan = fleet(1000)
    cost = rank_costs(plan.shard(rows=8, width=COGVIDEOX.width), COGVIDEOX, node=8)
    assert received_rows(cost, COGVIDEOX) <= rows_of_all_gather(plan, 8) / 500
    assert max(cost.load, cost.rows_balance, cost.pairs_balance) <= 1.1


def test_heads_in_the_node_and_rows_across_move_least_between_nodes():
    plan = frames_plan("joint", frames=60, tokens=1350, text=226)
    costs = [rank_costs(sharded, COGVIDEOX, node=8) for sharded in choices(plan, 64, COGVIDEOX)]
    assert [(cost.rows, cost.heads) for cost in costs] == [(64, 1), (32, 2), (16, 4), (8, 8), (4, 16)]
    assert min(costs, key=lambda cost: cost.remote.mean()).heads == 8
    text = describe_ranks(plan, 64, 8, COGVIDEOX)
    assert all(name in text for name in ("8 × 8", "all-gather", "ring", "simulated"))


def test_heads_alone_move_what_ulysses_moves():
    plan = frames_plan("joint", frames=8, tokens=30, text=16)
    n, vector = plan.n_packed, 2 * COGVIDEOX.width
    # every position of this layout is in use
    plan = plan.reindex(plan.order)
    cost = rank_costs(plan.shard(heads=8), COGVIDEOX, node=8)
    assert cost.received.sum() == pytest.approx(4 * n * 7 / 8 * vector)
    assert not (cost.pulled.any() or cost.travelled.any() or cost.remote.any())


def test_cutting_takes_time_in_proportion_to_rectangles(capsys):
    """A cut in quadratic time would take a hundred times as long."""
    seconds = {}
    for frames in (1_500, 15_000):
        plan = frames_plan("joint", frames=frames, tokens=2, text=1)
        best = []
        for _ in range(3):
            start = time.perf_counter()
            sharded = plan.shard(rows=8)
            sharded.pulls(), sharded.visits()
            best.append(time.perf_counter() - start)
        seconds[len(plan.table.weight)] = min(best)
    with capsys.disabled():
        print("\nseconds to cut by rectangles:", {count: round(took, 4) for count, took in seconds.items()})
    first, last = seconds.values()
    assert max(seconds) >= 30_000
    assert last <= 40 * first
