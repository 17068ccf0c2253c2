"""The Triton passes against a dense float64 oracle: on a GPU where there is one, in Triton's interpreter elsewhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from canvas_kernels import block_attention
from canvas_kernels.block_table import BlockTable
from canvas_kernels.triton_ops import configs, launch, steps
from canvas_kernels.triton_ops.configs import Config
from tests.kernels.device_checks import FLOAT32_BUDGET, by_kernels, by_reference
from tests.kernels.tables import TABLES, edge_table, error, joint_table, membership, row_scale_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

TILES = {
    "16": (Config(16, 16, 1, 2),),
    "32x16": (Config(32, 16, 4, 2),),
    "16x32": (Config(16, 32, 4, 2),),
    "64": (Config(64, 64, 4, 2),),
    "32+16": (Config(32, 32, 4, 2), Config(16, 16, 1, 2)),
}


# -- running both -----------------------------------------------------------------------------------------------------


def make_inputs(table, head_dim, dtype, batch=1, heads=1, seed=0, mean=0.0):
    """q, k, v, grad_out on the CPU, (batch, heads, n, head_dim)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, table.n_positions, head_dim)
    return [(torch.randn(shape, generator=generator) + mean).to(dtype) for _ in range(4)]


def computed(table, inputs, scale, gain=None, active=None, row_scale=None):
    """The kernels' results on the device."""
    options = {"gain": gain, "active": active, "row_scale": row_scale}
    options = {name: None if x is None else x.to(DEVICE) for name, x in options.items()}
    return by_kernels(table, [x.to(DEVICE) for x in inputs], scale=scale, **options)


def expected(table, inputs, scale, gain=None, active=None, row_scale=None, dtype=torch.float64):
    """The reference's, which is differentiated by autograd."""
    options = {"gain": gain, "active": active, "row_scale": row_scale}
    return by_reference(table, inputs, dtype, scale=scale, **options)


def check(table, inputs, gain=None, active=None, scale=0.3, row_scale=None):
    """Every result within its budget; returns the kernels' results."""
    if row_scale is None and table.form == "edge":
        row_scale = row_scale_of(table, active)
    wanted = expected(table, inputs, scale, gain, active, row_scale)
    found = computed(table, inputs, scale, gain, active, row_scale)
    dtype = inputs[0].dtype
    plain = None if dtype == torch.float32 else expected(table, inputs, scale, gain, active, row_scale, dtype)
    finite = wanted["lse"].isfinite()
    # +inf exactly where a slot has no key; the reference leaves out those that others replace, too
    extra = found["lse"].cpu().isfinite() != finite
    assert not extra.any() or (table.replace.any() and not extra[finite].any())
    for results in (wanted, found, plain or {}):
        results.pop("lse", None) if not finite.any() else None
    for name, value in wanted.items():
        if value is None:
            continue
        got = found[name].cpu()
        if name == "lse":
            got, value = got[finite], value[finite]
            budget = 1e-5 if plain is None else 1e-2
        else:
            assert got.dtype == (torch.float32 if name == "dgain" else dtype) and got.is_contiguous()
            # a handful of gains can agree by luck: at least one unit in the last place is granted
            budget = FLOAT32_BUDGET if plain is None else max(2 * error(plain[name], value), torch.finfo(dtype).eps)
        assert error(got, value) <= budget, f"{name}: error {error(got, value):.2e}, budget {budget:.2e}"
    return found


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan(monkeypatch):
    """What a kernel forgets to write is NaN, and not a lucky zero."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(x):
        return x.fill_(math.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))


@pytest.fixture
def tiles(monkeypatch):
    """Sets the tile sizes of every pass."""
    return lambda name: monkeypatch.setattr(configs, "lookup", lambda *args: TILES[name])


@pytest.fixture
def stored(monkeypatch):
    """Keeps the outputs of segments of every table, or of none."""

    def choose(every: bool) -> None:
        monkeypatch.setattr(configs, "MIN_STORED_KEYS", 0 if every else math.inf)
        monkeypatch.setattr(configs, "MAX_STORED_SLOTS", math.inf)

    return choose


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tile"),
    [
        ("overlap", "16"),
        ("overlap", "64"),
        ("overlap", "32x16"),
        ("pieces", "16"),
        ("pieces", "32+16"),
        ("replace", "16x32"),
        ("tiny", "32+16"),
        ("tiny", "64"),
        ("joint", "16"),
        ("joint", "32+16"),
        ("joint", "64"),
        ("joint dense", "32x16"),
    ],
)
@pytest.mark.parametrize("every", [False, True])
def test_float32_results_are_the_oracles(tiles, stored, name, tile, every):
    tiles(tile)
    stored(every)
    table = TABLES[name]()
    if every and table.form == "joint":
        pytest.skip("joint form has one segment, whose output is the result")
    check(table, make_inputs(table, 16, torch.float32))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("form", ["joint", "in_place", "edge"])
def test_random_tables_give_the_oracles_results(tiles, stored, seed, form):
    rng = np.random.default_rng(seed)
    tiles(("32+16", "16x32", "64")[seed % 3])
    stored(form == "edge")
    n, edges = int(rng.integers(40, 110)), int(rng.integers(1, 5))
    rows = []
    for r in range(int(rng.integers(1, 7)) if form != "joint" else 1):
        cuts = np.sort(rng.choice(n + 1, 6, replace=False))
        for k0, k1 in cuts.reshape(3, 2):
            q0, q1 = np.sort(rng.choice(n + 1, 2, replace=False))
            rows.append((r, r % edges, 0.5 + r, q0, q1, k0, k1))
    table = edge_table(n, rows, edges, replace=(1,))
    if form == "joint":
        table = joint_table(n, [(rng.uniform(0.2, 3), *row[3:]) for row in rows])
    edge = form != "joint"
    gain = torch.tensor(rng.normal(size=edges), dtype=torch.float32) if edge and seed % 2 else None
    active = torch.tensor(rng.integers(0, 2, edges), dtype=torch.float32) if edge and seed > 2 else None
    if active is None or active[table.edge.tolist()].any():
        check(table, make_inputs(table, 24, torch.float32, seed=seed), gain, active)


@pytest.mark.parametrize("name", ["overlap", "joint", "dense", "joint dense"])
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_sixteen_bit_errors_are_at_most_twice_those_of_plain_attention(tiles, name, dtype):
    tiles("32+16")
    table = TABLES[name]()
    check(table, make_inputs(table, 32, dtype), scale=0.2)


def test_values_far_from_zero_keep_their_gradients(tiles):
    tiles("32+16")
    table = TABLES["overlap"]()
    check(table, make_inputs(table, 32, torch.float16, mean=2.0), gain=torch.tensor([1.0, 0.5, 2.0]), scale=0.1)


@pytest.mark.parametrize("head_dim", [8, 64, 80, 96])
def test_head_dims_are_padded(tiles, head_dim):
    tiles("32x16")
    table = TABLES["pieces"]()
    check(table, make_inputs(table, head_dim, torch.float32), scale=head_dim**-0.5)


@pytest.mark.parametrize("head_dim", [40, 72])
def test_head_dims_are_padded_in_joint_form(tiles, head_dim):
    tiles("32+16")
    table = TABLES["joint"]()
    check(table, make_inputs(table, head_dim, torch.float32), scale=head_dim**-0.5)


@pytest.mark.parametrize("name", ["replace", "joint"])
def test_batches_and_heads_find_their_own_rows(tiles, name):
    tiles("64")
    table = TABLES[name]()
    check(table, make_inputs(table, 16, torch.float32, batch=2, heads=2))


@pytest.mark.parametrize("joint", [False, True])
def test_long_tiles_of_all_heads_come_first(tiles, joint):
    tiles("16")
    rows = [(1.0, 0, 16, 0, 90), *((0.5, start, start + 15, start, start + 9) for start in range(16, 75, 15))]
    table = joint_table(91, rows) if joint else edge_table(91, [(i, i, *row) for i, row in enumerate(rows)])
    for transposed in (False, True):
        (tiling,) = table.device_tilings("cpu", configs.classes(TILES["16"]), transposed)
        assert transposed or 0 < tiling.n_long < tiling.n_tiles
    check(table, make_inputs(table, 16, torch.float32, batch=2, heads=3))


@pytest.mark.parametrize("name", ["replace", "joint"])
def test_strides_are_followed(tiles, name):
    """q is a (B, N, H, D) view, k a slice of a wider tensor, v has no unit stride, grad_out is one expanded number."""
    tiles("64")
    table = TABLES[name]()
    n = table.n_positions
    dense = make_inputs(table, 16, torch.float32, heads=2)
    q = dense[0].transpose(1, 2).contiguous().transpose(1, 2)
    k = torch.cat([dense[1], torch.full_like(dense[1], math.nan)], -1)[..., :16]
    v = dense[2].transpose(2, 3).contiguous().transpose(2, 3)
    grad_out = torch.tensor(0.5).expand(1, 2, n, 16)
    assert q.stride() == (n * 32, 16, 32, 1) and k.stride(2) == 32 and v.stride(3) == n
    check(table, [q, k, v, grad_out])


@pytest.mark.parametrize("head_dim", [40, 72, 88, 120, 128])
def test_views_of_one_projection_are_read_as_they_lie(tiles, head_dim):
    """(B, n, 3, H, D): rows begin at multiples of 8 elements, so nothing is copied."""
    tiles("32x16")
    table = TABLES["replace"]()
    n = table.n_positions
    fused = torch.randn(2, n, 3, 2, head_dim, generator=torch.Generator().manual_seed(1))
    views = [x.transpose(1, 2) for x in fused.unbind(2)]
    upstream = torch.randn(2, n, 2, head_dim).transpose(1, 2)
    assert all(launch.aligned_rows(x) is x for x in (*views, upstream))
    row_scale = row_scale_of(table)
    found = computed(table, [*views, upstream], 0.2, row_scale=row_scale)
    packed = computed(table, [x.contiguous() for x in (*views, upstream)], 0.2, row_scale=row_scale)
    assert all(torch.equal(found[name], packed[name]) for name in ("out", "lse", "dq", "dk", "dv"))


@pytest.mark.parametrize("name", ["replace", "joint"])
def test_rows_that_no_lane_can_load_whole_are_copied_once(tiles, name):
    tiles("32x16")
    table = TABLES[name]()
    inputs = make_inputs(table, 20, torch.float32)
    copy = launch.aligned_rows(inputs[0])
    assert copy.stride(2) == 24 and torch.equal(copy, inputs[0])
    assert launch.aligned_rows(torch.zeros(2, 2, 9, 17)[..., 1:]).data_ptr() % 16 == 0
    check(table, inputs)


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:All-NaN slice encountered")
def test_rows_outside_every_rectangle_may_hold_anything(tiles):
    """0 · NaN is NaN: rows that a run does not hold must never be loaded to be weighted by 0."""
    tiles("16")
    table = edge_table(60, [(0, 0, 1.0, 3, 20, 18, 37), (1, 1, 0.5, 21, 30, 40, 51)])
    clean = make_inputs(table, 16, torch.float32)
    row_scale = row_scale_of(table)
    wanted = expected(table, clean, 0.3, row_scale=row_scale)
    q, k, v, grad_out = (x.clone() for x in clean)
    for x in (k, v):
        x[:, :, :18] = x[:, :, 37:40] = x[:, :, 51:] = math.nan
    for x in (q, grad_out):
        x[:, :, :3] = x[:, :, 20] = x[:, :, 30:] = math.inf
    found = computed(table, [q, k, v, grad_out], 0.3, row_scale=row_scale)
    queries, keys = [*range(3, 20), *range(21, 30)], [*range(18, 37), *range(40, 51)]
    for name, rows in (("out", queries), ("dq", queries), ("dk", keys), ("dv", keys)):
        assert error(found[name][:, :, rows], wanted[name][:, :, rows]) <= FLOAT32_BUDGET, name


def affected(table: BlockTable, what: str, row: int, active) -> dict[str, set[int]]:
    """The rows of each result that depend on ``row`` of an input. A query's lse and δ depend on all of its keys in a
    segment, and what a key gets on all of its queries' lse and δ."""
    found = {name: {row} for name in ("out", "dq", "dk", "dv")}
    for segment in range(int(table.segment.max()) + 1):
        lead = int(np.flatnonzero(table.segment == segment)[0])
        if active is not None and not active[table.edge[lead]]:
            continue
        pairs = membership(table)[segment]
        queries = pairs[:, row].nonzero()[0] if what in "kv" else [row]
        keys = pairs[queries].any(0).nonzero()[0]
        if what in "kv":
            found["out"].update(queries)
            found["dq"].update(queries)
        found["dk"].update(keys)
        found["dv"].update(keys)
    return found


ISOLATED = {
    # tile mates that attend to themselves; a band; a full block beside a ragged one
    "mates": lambda form: [(i, i % 2, 5 * i, 5 * i + 5, 5 * i, 5 * i + 5) for i in range(8)],
    "band": lambda form: [(0, 0, i, i + 1, max(i - 3, 0), min(i + 4, 60)) for i in range(60)],
    "full": lambda form: [(0, 0, 0, 32, 0, 32), (0, 0, 0, 20, 32, 43), (1, 1, 32, 50, 43, 60)],
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", ISOLATED)
@pytest.mark.parametrize("form", ["joint", "in_place", "edge", "sigmoid"])
@pytest.mark.parametrize("inactive", [False, True])
def test_what_is_not_finite_stays_among_those_that_attend_to_it(tiles, stored, kind, form, inactive):
    tiles("32+16")
    stored(form == "edge")
    rows = ISOLATED[kind](form)
    if form == "joint":
        table = joint_table(60, [(1.0, *row[2:]) for row in rows])
    else:
        table = edge_table(60, [(s, e, 1.0, *row) for s, e, *row in rows], n_edges=2)
    active = torch.tensor([1.0, 0.0]) if inactive and form != "joint" else None
    row_scale = None if form == "joint" else row_scale_of(table, active)
    options = dict(scale=0.3, active=active, row_scale=row_scale)

    def results(inputs):
        q, k, v, grad_out = (x.to(DEVICE) for x in inputs)
        given = {name: None if x is None else x.to(DEVICE) for name, x in options.items() if name != "scale"}
        given |= {"scale": 0.3, "sigmoid": form == "sigmoid"}
        out, lse, kept = launch.forward(q, k, v, table, **given)
        gradients, _ = launch.backward(grad_out, q, k, v, kept, lse, table, **given)
        return {name: x.cpu()[0, 0] for name, x in zip(("out", "dq", "dk", "dv"), (out, *gradients))}

    clean = make_inputs(table, 16, torch.float32)
    wanted = results(clean)
    assert all(x.isfinite().all() for x in wanted.values())
    bad = [(what, math.nan) for what in "qkvd"] + [("k", math.inf), ("v", -math.inf)]
    for what, value in bad:
        inputs = [x.clone() for x in clean]
        inputs["qkvd".index(what)][:, :, 34, 3] = value
        found, touched = results(inputs), affected(table, what, 34, active)
        for name in wanted:
            others = [row for row in range(60) if row not in touched[name]]
            assert torch.equal(found[name][others], wanted[name][others]), (what, value, name)
        attending = sorted(touched["out"] - {34}) if what in "kv" and math.isnan(value) else []
        assert not found["out"][attending].isfinite().any(), what


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("every", [False, True])
def test_nothing_that_was_not_written_enters_a_result(monkeypatch, tiles, stored, every):
    """A key of NaN makes NaN of every lse: what their slots held before may not matter."""
    tiles("16")
    stored(every)
    table = edge_table(40, [(0, 0, 1.0, 0, 20, 0, 20), (1, 1, 1.0, 10, 40, 20, 40), (2, 2, 1.0, 0, 40, 0, 40)])
    inputs = make_inputs(table, 16, torch.float32)
    inputs[1][0, 0, 3] = math.nan
    active = torch.tensor([1.0, 1.0, 0.0])
    row_scale, found = row_scale_of(table, active), []
    empty = torch.empty
    for held in (0.0, 7.0):
        monkeypatch.setattr(torch, "empty", lambda *args, held=held, **options: empty(*args, **options).fill_(held))
        monkeypatch.setattr(torch, "empty_like", lambda x, held=held, **options: torch.full_like(x, held))
        found.append(computed(table, inputs, 0.3, torch.ones(3), active, row_scale))
    for name, value in found[0].items():
        assert torch.equal(value.nan_to_num(5e30), found[1][name].nan_to_num(5e30)), name
    assert found[0]["dv"][0, 0, 20:].isfinite().all() and not found[0]["out"][0, 0, :20].isfinite().any()


def test_a_table_without_rectangles_gives_zeros():
    table = BlockTable.from_rectangles(
        "edge", 20, 1, q_start=[], q_stop=[], k_start=[], k_stop=[], weight=[], segment=[], edge=[]
    )
    inputs = make_inputs(table, 16, torch.float32)
    found = computed(table, inputs, 0.3, gain=torch.ones(1), row_scale=torch.zeros(2, 20))
    for name in ("out", "dq", "dk", "dv", "dgain"):
        assert torch.equal(found[name], torch.zeros_like(found[name])), name


def test_large_logits_neither_overflow_nor_lose_the_maximum(tiles):
    tiles("16")
    table = TABLES["joint"]()
    inputs = make_inputs(table, 16, torch.float32)
    inputs[0] *= 30
    inputs[1] *= 30
    check(table, inputs, scale=0.02)
    hot = computed(table, inputs, 1.0)
    assert all(hot[name].isfinite().all() for name in ("out", "dq", "dk", "dv"))


# -- gains and activity -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["overlap", "replace"])
def test_gains_of_every_sign_have_the_right_gradients(tiles, name):
    tiles("32x16")
    table = TABLES[name]()
    check(table, make_inputs(table, 16, torch.float32), gain=torch.tensor([1.3, -0.6, 0.0]))


def test_gains_of_sixteen_bits_are_read_as_they_are(tiles):
    tiles("32+16")
    table = TABLES["replace"]()
    inputs, gain = make_inputs(table, 16, torch.float32), torch.tensor([1.5, -0.5, 0.25])
    wanted = expected(table, inputs, 0.3, gain, None, row_scale_of(table))
    found = computed(table, inputs, 0.3, gain.half(), None, row_scale_of(table))
    for name in ("out", "dq", "dk", "dv"):
        assert error(found[name], wanted[name]) <= FLOAT32_BUDGET, name
    assert (
        found["dgain"].dtype == torch.float16 and error(found["dgain"], wanted["dgain"]) <= torch.finfo(torch.half).eps
    )


@pytest.mark.parametrize("gained", [False, True])
def test_row_scales_of_every_sign_have_the_right_gradients(tiles, gained):
    """A row's adding and replacing segments may be scaled by different signs, or not at all."""
    tiles("32+16")
    table = TABLES["replace"]()
    row_scale = torch.randn(2, table.n_positions, generator=torch.Generator().manual_seed(3))
    row_scale[:, ::7] = 0
    gain = torch.tensor([1.3, -0.6, 0.4]) if gained else None
    check(table, make_inputs(table, 16, torch.float32), gain=gain, row_scale=row_scale)


def band_table(n=70) -> BlockTable:
    """Each row attends to its neighbours, in one segment; the last ten rows to two rows more, in another one."""
    rows = [(0, 0, 1.0, i, i + 1, max(i - 2, 0), min(i + 3, n)) for i in range(n)]
    return edge_table(n, [*rows, (1, 1, 0.5, n - 10, n, 0, 2)])


@pytest.mark.parametrize("make", [band_table, *(TABLES[name] for name in ("overlap", "replace", "pieces", "tiny"))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_row_scales_of_an_activity_take_one_launch(make, dtype):
    table = make()
    for seed in range(3):
        active = torch.rand(table.n_edges, generator=torch.Generator().manual_seed(seed)) < 0.6
        found = launch.row_scale_of(active.to(dtype).to(DEVICE), table)
        assert torch.allclose(found.cpu(), row_scale_of(table, active), rtol=1e-6, atol=0)


def test_rows_of_a_band_share_a_chunk():
    chunks, _, _ = steps.scale_chunks(band_table(), torch.device("cpu"))
    assert chunks[:, :2].tolist() == [[0, 60], [60, 70]]


def test_a_gain_of_zero_still_has_a_gradient(tiles):
    tiles("64")
    table = TABLES["dense"]()
    found = check(table, make_inputs(table, 16, torch.float32), gain=torch.zeros(1))
    assert found["out"].abs().max() == 0 and found["dgain"].abs().item() > 1e-3


@pytest.mark.parametrize(
    ("name", "active", "tile"),
    [
        ("overlap", [1, 0, 1], "16"),
        ("replace", [1, 0, 1], "32+16"),
        ("pieces", [0, 1], "32x16"),
        ("tiny", [0, 1, 1, 0, 0, 0, 1, 0, 0, 1, 1, 0], "32+16"),
        ("overlap", [0, 0, 0], "64"),
    ],
)
def test_inactive_edges_are_as_if_they_were_not_there(tiles, name, active, tile):
    tiles(tile)
    table = TABLES[name]()
    active = torch.tensor(active, dtype=torch.float32)
    gain = torch.linspace(0.5, 1.5, table.n_edges)
    row_scale = row_scale_of(table, active)
    if not active.any():
        found = computed(table, make_inputs(table, 16, torch.float32), 0.3, gain, active, row_scale)
        assert all((found[key] == 0).all() for key in ("out", "dq", "dk", "dv", "dgain"))
        assert found["lse"].isposinf().all()
        return
    check(table, make_inputs(table, 16, torch.float32), gain=gain, active=active)


# -- promises ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["overlap", "joint"])
def test_the_same_inputs_give_the_same_bits(tiles, name):
    tiles("32+16")
    table = TABLES[name]()
    inputs = make_inputs(table, 16, torch.float16)
    row_scale = row_scale_of(table) if table.form == "edge" else None
    gain = torch.tensor([1.0, -0.5, 2.0]) if table.form == "edge" else None
    first, second = (computed(table, inputs, 0.3, gain, None, row_scale) for _ in range(2))
    for key, value in first.items():
        assert value is None or torch.equal(value, second[key]), key


def test_the_operator_runs_the_kernels_with_autograd(tiles):
    tiles("64")
    table = TABLES["replace"]()
    inputs = make_inputs(table, 16, torch.float32)
    gain, active = torch.tensor([1.0, 0.5, 2.0]), torch.tensor([1.0, 1.0, 0.0])
    row_scale = row_scale_of(table, active)
    wanted = expected(table, inputs, 0.3, gain, active, row_scale)
    leaves = [x.to(DEVICE).requires_grad_() for x in (*inputs[:3], gain)]
    out = block_attention(*leaves[:3], table, scale=0.3, gain=leaves[3], active=active.to(DEVICE), backend="triton")
    grads = torch.autograd.grad(out, leaves, inputs[3].to(DEVICE))
    assert error(out, wanted["out"]) <= FLOAT32_BUDGET
    for name, grad in zip(("dq", "dk", "dv", "dgain"), grads):
        assert error(grad, wanted[name]) <= FLOAT32_BUDGET, name


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["replace", "joint"])
def test_a_step_neither_waits_for_the_device_nor_escapes_a_captured_graph(name):
    table = TABLES[name]()
    inputs = [x.cuda() for x in make_inputs(table, 64, torch.bfloat16)]
    edge = table.form == "edge"
    active = torch.tensor([1.0, 0.0, 1.0], device="cuda") if edge else None
    gain = torch.tensor([1.0, -0.5, 2.0], device="cuda") if edge else None

    def step():
        row_scale = launch.row_scale_of(active, table) if edge else None
        options = dict(scale=0.1, gain=gain, active=active, row_scale=row_scale)
        out, lse, kept = launch.forward(*inputs[:3], table, **options)
        return out, *launch.backward(inputs[3], *inputs[:3], kept, lse, table, **options, need_gain=edge)[0]

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    if edge:
        active.copy_(torch.tensor([0.0, 1.0, 1.0]))
    graph.replay()
    for found, wanted in zip(captured, step()):
        assert torch.equal(found, wanted)


# -- configurations ---------------------------------------------------------------------------------------------------


def test_every_shipped_configuration_is_found_where_it_is_looked_up():
    count = 0
    for shipped in configs.shipped():
        found = configs.lookup(shipped.arch, shipped.head_dim, shipped.dtype, shipped.stage, shipped.form)
        assert shipped.config in found and found[0].block_m >= found[-1].block_m
        # tilings nest the classes: a large tile splits into whole small ones
        assert all(found[0].block_m % config.block_m == 0 for config in found)
        count += 1
    # architectures · passes (signs of gains apart) · head dims · (two 16-bit dtypes of two tiles, float32 of one), less
    # small tiles that the large one of gfx942 at head_dim 256 always beats
    assert count == 4 * 13 * 5 * (2 * 2 + 1) - 13 * 2


@pytest.mark.parametrize(("head_dim", "padded"), [(1, 16), (16, 16), (17, 32), (64, 64), (80, 128), (160, 256)])
def test_head_dims_pad_to_powers_of_two(head_dim, padded):
    assert configs.block_d(head_dim) == padded


def test_what_has_no_configuration_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="gfx1100"):
        configs.arch_of_hip("gfx1100")
    with pytest.raises(ValueError, match=r"7\.5"):
        configs.arch_of_cuda((7, 5))
    with pytest.raises(ValueError, match="sm_70"):
        configs.lookup("sm_70", 64, torch.float16, "forward", "edge")
    with pytest.raises(ValueError, match="257"):
        configs.lookup("sm_90", 257, torch.float16, "forward", "edge")
    with pytest.raises(ValueError, match="float64"):
        configs.lookup("sm_90", 64, torch.float64, "forward", "edge")


def test_devices_take_the_configurations_of_their_family():
    found = [configs.arch_of_cuda(c) for c in ((8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0))]
    assert found == ["sm_80", "sm_80", "sm_90", "sm_100", "sm_100", "sm_80"]
    assert configs.arch_of_hip("gfx942:sramecc+:xnack-") == "gfx942"
