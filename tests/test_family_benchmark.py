"""The benchmark of attention functions: its loops are right, its gates see wrong results, the table is of the rows."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

pytest.importorskip("rich", reason="benchmarks print their tables with rich")

from benchmarks import families, measure
from benchmarks.step_loops import MambaCutLoop, MambaLoop, RWKVCutLoop, RWKVLoop
from canvas_engineering import ATTENTION_REGISTRY, ATTENTION_TYPES, PoolingAttention, create_attention
from tests import family_oracle


@pytest.mark.parametrize(
    ("fn", "loop"), [("mamba", MambaLoop), ("mamba", MambaCutLoop), ("rwkv", RWKVLoop), ("rwkv", RWKVCutLoop)]
)
def test_the_loops_are_the_oracle(fn, loop):
    torch.manual_seed(0)
    module = loop(8, 2).double()
    x_q, x_k = (torch.randn(2, n, 8, dtype=torch.float64) for n in (7, 5))
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    torch.testing.assert_close(module(x_q, x_k, x_k), family_oracle.oracle(fn, state, x_q, x_k, 2))
    assert set(module.state_dict()) == set(create_attention(fn, 8, 2).state_dict())


def test_the_gate_sees_a_wrong_result():
    torch.manual_seed(0)
    x = torch.randn(1, 6, 4, requires_grad=True)
    right, wrong = nn.Linear(4, 4), nn.Linear(4, 4)
    wrong.load_state_dict(right.state_dict())
    assert families.gate(wrong, right, (x,)) < 1e-5
    with torch.no_grad():
        wrong.weight[0, 0] += 1e-3
    with pytest.raises(families.Disagreement, match=r"Linear differs from Linear in float64: .*output"):
        families.gate(wrong, right, (x,))


def test_every_function_that_is_declared_passes_its_gate(monkeypatch):
    assert (
        {"cross_attention", "sigmoid_attention", "copy", "mixture"} <= set(families.functions()) <= set(families.CLAIMS)
    )
    assert families.CLAIMS["hyena"] == "O(N log N + M)" and "none" not in families.CLAIMS
    for fn in families.functions():
        assert families.check_read(fn, 9) <= 1e-6
    monkeypatch.setattr(PoolingAttention, "forward", lambda self, q, k, v: 1.001 * self.proj(k.mean(1, keepdim=True)))
    with pytest.raises(families.Disagreement, match=r"pooling: the dispatcher is 1\.0e-03 off its module"):
        families.check_read("pooling")


def test_exponents_and_peaks_are_what_they_say():
    assert families.exponent([8, 16, 32], [3.0, 12.0, 48.0]) == pytest.approx(2.0)
    a = torch.ones(1000, 250)

    def run():
        b = a + 1
        c = b + 1
        del b
        return c + 1

    assert 2_000_000 <= families.peak_bytes(run) < 2_000_100  # the ones that are added are tensors too


def test_a_slow_first_call_is_the_only_one():
    calls = []
    assert len(families.seconds_of(lambda: calls.append(sum(range(400_000))), budget=1e-4)) == len(calls) == 1
    assert len(families.seconds_of(lambda: None, budget=0.01)) == 30


def test_rows_of_every_question(tmp_path, monkeypatch):
    monkeypatch.setattr(families, "SCALING_WIDTH", 8)
    rows = families.scaling_rows("perceiver", (256, 1024, 4096, 8192))
    assert [(r["kind"], r["claim"]) for r in rows] == [("reads itself", "O((N+M)K)"), ("64 queries", "O((N+M)K)")]
    assert 0.8 < rows[0]["memory_exponent"] < 1.2
    rows += families.loop_rows(length=24, width=8)
    assert [(r["fn"], r["queries"], r["contestant"]) for r in rows[2:]] == [
        (fn, 24, name)
        for fn, more in (("mamba", (families.PRODUCTS,)), ("mamba", (families.PRODUCTS,)), ("rwkv", ()))
        for name in ("ours", *more, "indexed loop", "cut loop")
    ]
    rows.append(families.edge_row("perceiver", edges=5, size=4, width=8, rounds=2))
    assert rows[-1]["worst_error"] <= 1e-5 and rows[-1]["at_most"] == 1.5 and rows[-1]["keys_of_long"] == 20
    measure.write_rows(rows, tmp_path / "rows.json")
    families.write_document(
        [json.loads(line) for line in (tmp_path / "rows.json").read_text().splitlines()], tmp_path / "d.md"
    )
    text = (tmp_path / "d.md").read_text()
    assert text.count("| perceiver |") == 3 and "| mamba | 24 | 24 | cut loop |" in text
    assert {p.name for p in tmp_path.iterdir()} == {"rows.json", "d.md"}


def test_the_committed_table_is_of_the_committed_rows():
    rows = [json.loads(line) for line in (measure.RESULTS / "families.json").read_text().splitlines()]
    assert families.DOCS.read_text() == families.document(rows)
    for question in ("scaling", "edges"):
        assert {r["fn"] for r in rows if r["question"] == question} == set(families.functions())
    # the others are other names of one of these, or no read
    classes = {ATTENTION_REGISTRY[fn] for fn in families.functions()}
    assert all(issubclass(ATTENTION_REGISTRY[fn], tuple(classes)) for fn in ATTENTION_TYPES if fn != "none")
    assert {r["question"] for r in rows} == {"scaling", "loops", "edges"}
    edges = [r for r in rows if r["question"] == "edges"]
    missed = [r["fn"] for r in edges if r["ratio"]["batch"]["p50"] > families.MOST_RATIO]
    missed += [r["fn"] for r in rows if r["question"] == "loops" and r["at_least"] and r["ratio"] < r["at_least"]]
    assert not missed
