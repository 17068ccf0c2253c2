"""The CogVideoX benchmark at toy size: its gate sees wrong numbers, and its rows say what they are."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("rich", reason="benchmarks print their tables with rich")
from benchmarks import cogvideox
from tests.cogvideox_models import diffusers


def test_the_gate_agrees_with_float64_and_sees_a_wrong_kernel(monkeypatch):
    plan, grid = cogvideox.plan_of(96, 144, 17, 7)
    right = cogvideox.canvas_attention
    for rows in (cogvideox.GATED_ROWS, 5):
        monkeypatch.setattr(cogvideox, "GATED_ROWS", rows)
        monkeypatch.setattr(cogvideox, "canvas_attention", right)
        assert cogvideox.gate(plan, grid) <= cogvideox.TOLERANCE
        monkeypatch.setattr(cogvideox, "canvas_attention", lambda q, k, v, plan: right(q, k, v * 1.001, plan))
        with pytest.raises(cogvideox.Disagreement, match="differs from float64 by 1"):
            cogvideox.gate(plan, grid)
        layout = cogvideox.cogvideox_layout(cogvideox.CONFIG, 96, 144, 17, text_tokens=7)
        other = cogvideox.token_plan(layout, cogvideox.window_topology(past=2))
        monkeypatch.setattr(cogvideox, "canvas_attention", lambda q, k, v, plan, other=other: right(q, k, v, other))
        with pytest.raises(cogvideox.Disagreement, match="differs from float64 by"):
            cogvideox.gate(plan, grid)


def test_the_gate_checks_what_is_timed(monkeypatch):
    checked = []
    monkeypatch.setattr(cogvideox, "gate", lambda plan, grid: checked.append((plan, grid)) or 0.0)
    rows = cogvideox.attention_rows(1, (64, 64, 9, 5))
    ((plan, grid),) = checked
    assert plan.n_positions == 53 and grid == (3, 4, 4)
    assert [(row["tokens"], row["density"]) for row in rows] == [(53, plan.density)] * 2


def test_rows_hold_ratios_to_the_share_of_pairs(tmp_path, monkeypatch):
    assert diffusers is not None
    monkeypatch.setitem(cogvideox.MODEL, "num_layers", 1)
    out = tmp_path / "rows.json"
    options = ["--rounds", "2", "--size", "64", "64", "9", "5", "--packed-size", "64", "128", "5", "--out", str(out)]
    threads = torch.get_num_threads()
    assert cogvideox.main(options) == 0
    assert torch.get_num_threads() == threads == 1
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["case"] for row in rows] == ["attention, forward", "attention, backward", "packed order, training step"]
    pairs = 5 * 53 + 48 * 5 + (2 * 3 - 1) * 16 * 16
    assert rows[0]["tokens"] == 53 and rows[0]["density"] == pytest.approx(pairs / 53**2)
    assert all(row["ratio"]["p50"] > 0 and row["worst_error"] < 1e-4 for row in rows)


def test_a_plan_that_moves_nothing_is_not_timed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cogvideox, "tile_topology", lambda *_: cogvideox.window_topology())
    options = ["--rounds", "1", "--size", "32", "32", "5", "5", "--packed-size", "32", "32", "5"]
    assert cogvideox.main([*options, "--out", str(tmp_path / "rows.json")]) == 1
    assert "moves no tokens" in capsys.readouterr().out and not (tmp_path / "rows.json").exists()
