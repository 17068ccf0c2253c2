"""The training example: a run that is killed and resumed is the run that was not."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("pyarrow", reason="the example wants the extra data")
pytest.importorskip("av", reason="the example wants the extra data")
pytest.importorskip("gymnasium", reason="the example wants the extra data")
pytest.importorskip("accelerate", reason="the example wants the extra cogvideox")

from examples import train_bridge_v2

SMALL = ["--width", "16", "--depth", "1", "--batch", "4", "--patch", "20", "--seed", "3"]


def losses(folder):
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


@pytest.mark.filterwarnings("ignore")  # accelerate's own
@pytest.mark.parametrize("diffusive", [[], ["--diffusive"]])
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(tmp_path, diffusive, monkeypatch):
    train_bridge_v2.record("CartPole-v1", tmp_path / "data", 3, longest=14, size=(40, 60))
    data = ["--data", str(tmp_path / "data"), "--save-every", "3", *diffusive, *SMALL]
    assert train_bridge_v2.main([*data, "--out", str(tmp_path / "whole"), "--steps", "8"]) == 0
    whole = losses(tmp_path / "whole")
    assert [row["step"] for row in whole] == list(range(8))
    result = json.loads((tmp_path / "whole/result.json").read_text())
    assert set(result) == {"parameters", "loading", "camera", "state", "action"}
    assert result["camera"]["persistence_psnr"] > 10 and 0 <= result["loading"]["waiting"] <= 1
    assert (tmp_path / "whole/losses.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "whole/sample.mp4").stat().st_size > 500

    class Killed(Exception):
        pass

    add = train_bridge_v2.Log.add

    def die(self, step, loss, errors):
        add(self, step, loss, errors)
        if step == 4:
            raise Killed

    monkeypatch.setattr(train_bridge_v2.Log, "add", die)
    with pytest.raises(Killed):
        train_bridge_v2.main([*data, "--out", str(tmp_path / "cut"), "--steps", "8"])
    monkeypatch.setattr(train_bridge_v2.Log, "add", add)
    assert len(losses(tmp_path / "cut")) == 5
    train_bridge_v2.main([*data, "--out", str(tmp_path / "cut"), "--steps", "8", "--resume"])
    assert losses(tmp_path / "cut") == whole


def test_batches_are_epochs_and_ranks_share_them():
    every = list(train_bridge_v2.batches(10, 4, 0, 4, seed=1))
    assert sorted(every[0] + every[1]) != sorted(every[2] + every[3]) or every[:2] != every[2:]
    assert len(set(every[0] + every[1])) == 8 and all(len(batch) == 4 for batch in every)
    assert list(train_bridge_v2.batches(10, 4, 2, 4, seed=1)) == every[2:]
    parts = [list(train_bridge_v2.batches(10, 4, 0, 4, 1, rank, 2)) for rank in (0, 1)]
    for batch, one, other in zip(every, *parts):
        assert sorted(one + other) == sorted(batch) and len(one) == len(other) == 2


def test_what_cannot_be_trained_on_is_an_error(capsys):
    assert train_bridge_v2.main([]) == 2
    assert "--data" in capsys.readouterr().err
