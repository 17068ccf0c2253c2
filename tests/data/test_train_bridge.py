"""The training example: a run that is killed and resumed is the run that was not."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("pyarrow", reason="the example wants the extra data")
pytest.importorskip("av", reason="the example wants the extra data")
pytest.importorskip("gymnasium", reason="the example wants the extra data")
pytest.importorskip("accelerate", reason="the example wants the extra cogvideox")

from examples import bridge_data, train_bridge_v2

SMALL = ["--width", "16", "--depth", "1", "--batch", "4", "--patch", "16", "--seed", "3"]


def losses(folder):
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


@pytest.mark.filterwarnings("ignore")  # accelerate's own
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param([], id="regression"),
        pytest.param(["--diffusive", "--text", "bytes"], id="flow"),
        pytest.param(["--vae", "tiny", "--patch", "4"], id="vae"),
        pytest.param(["--model", "tiny", "--text", "bytes"], id="grafted"),
        pytest.param(["--model", "tiny", "--diffusive", "--freeze", "full"], id="grafted flow"),
    ],
)
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(tmp_path, kind, monkeypatch):
    train_bridge_v2.record("CartPole-v1", tmp_path / "data", 3, longest=14, size=(32, 64))
    data = ["--data", str(tmp_path / "data"), "--save-every", "3", *SMALL, *kind]
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

    def die(self, step, row):
        add(self, step, row)
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


def test_a_task_is_read_by_bytes_or_by_a_text_encoder(tmp_path):
    transformers = pytest.importorskip("transformers", reason="text encoders are transformers'")
    assert bridge_data.byte_text(6)("pull").tolist() == [112, 117, 108, 108, 256, 256]
    assert bridge_data.byte_text(3)("pull").tolist() == [112, 117, 108]
    config = transformers.T5Config(vocab_size=384, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(tmp_path / "t5")
    transformers.ByT5Tokenizer().save_pretrained(tmp_path / "t5")
    encode = bridge_data.t5_text(str(tmp_path / "t5"), 6)
    assert encode("pull").shape == (6, 8) and encode("pull") is encode("pull")
    assert not torch.equal(encode("pull"), encode("push"))
    train_bridge_v2.record("CartPole-v1", tmp_path / "data", 2, longest=10, size=(32, 64))
    options = ["--data", str(tmp_path / "data"), "--text", str(tmp_path / "t5"), "--tokens", "6", *SMALL]
    assert train_bridge_v2.main([*options, "--out", str(tmp_path / "out"), "--steps", "2"]) == 0


@pytest.mark.slow
def test_two_processes_share_a_run_and_its_shards(tmp_path):
    """DDP and FSDP2 train alike, and one process goes on from what two have written."""
    train_bridge_v2.record("CartPole-v1", tmp_path / "data", 3, longest=14, size=(32, 64))
    options = ["--data", str(tmp_path / "data"), "--save-every", "3", "--diffusive", "--workers", "0", *SMALL]
    for name, further in (("copies", []), ("shards", ["--shard"])):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += [train_bridge_v2.__file__, *options, "--out", str(tmp_path / name), "--steps", "6", *further]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    copies, shards = losses(tmp_path / "copies"), losses(tmp_path / "shards")
    assert len(copies) == len(shards) == 6
    for one, other in zip(copies, shards):
        assert one == pytest.approx(other, rel=1e-4)
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("copies", "shards")]
    assert results[0]["action"] == pytest.approx(results[1]["action"], rel=1e-3)
    assert train_bridge_v2.main([*options, "--out", str(tmp_path / "shards"), "--steps", "8", "--resume"]) == 0
    assert losses(tmp_path / "shards")[:6] == shards and len(losses(tmp_path / "shards")) == 8
