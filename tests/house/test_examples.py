"""The demo at toy size: it learns, its verdict is real, and its data and pictures are what they claim."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("gymnasium", reason="the demo records its data with gymnasium")
pytest.importorskip("rich", reason="the demo shows progress with rich")
pytest.importorskip("matplotlib", reason="the demo draws with matplotlib")

from canvas_engineering import AttentionDispatcher
from examples import cartpole, cartpole_data
from examples.cartpole_model import FRAMES, OBSERVED, WorldModel, declare, hold_present

RECORDED = 260


@pytest.fixture(scope="module")
def recording():
    return cartpole_data.record(RECORDED, seed=3)


def test_frames_show_the_state(recording):
    # The cart is the darkest thing in the bottom rows: its column is its position, 4.8 m over 24 columns.
    ink = recording.frames[:, 13:].astype(float).sum(1)
    centre = (ink * np.arange(cartpole_data.WIDTH)).sum(1) / ink.sum(1)
    position = (centre + 0.5) * 4.8 / cartpole_data.WIDTH - 2.4
    assert np.corrcoef(position, recording.states[:, 0])[0, 1] > 0.99
    assert recording.frames.max() > 200


def test_states_follow_the_physics(recording):
    # Velocity is position's rate: two steps of 0.02 s lie between frames of one episode.
    same = recording.episode[1:] == recording.episode[:-1]
    moved = np.diff(recording.states[:, 0])[same]
    mean_velocity = 0.5 * (recording.states[1:, 1] + recording.states[:-1, 1])[same]
    np.testing.assert_allclose(moved, 0.04 * mean_velocity, atol=0.01)
    # Pushing right accelerates to the right.
    gained = np.diff(recording.states[:, 1])[same]
    assert (gained[recording.actions[:-1][same] == 1] > 0).all()
    assert (gained[recording.actions[:-1][same] == 0] < 0).all()


def test_windows_stay_in_one_episode_and_the_split_shares_none(recording):
    train, test = cartpole_data.split(recording, FRAMES, stride=1)
    for starts in (train, test):
        windows = recording.episode[starts[:, None] + np.arange(FRAMES)]
        assert (windows == windows[:, :1]).all()
    assert recording.episode[train].max() < recording.episode[test].min()


def test_too_short_a_recording_is_named(recording):
    short = cartpole_data.Recording(*(array[:20] for array in vars(recording).values()))
    with pytest.raises(ValueError, match="20 frames in 1 episodes"):
        cartpole_data.split(short, FRAMES, stride=1)


def test_recordings_round_trip_and_leave_nothing_else(recording, tmp_path):
    path = tmp_path / "new" / "recording.npz"
    cartpole_data.save(recording, path)
    for name, array in vars(cartpole_data.load(path)).items():
        np.testing.assert_array_equal(array, getattr(recording, name))
    assert list(path.parent.iterdir()) == [path]


def test_a_broken_recording_is_named(tmp_path):
    path = tmp_path / "half.npz"
    path.write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(ValueError, match=r"half\.npz is not a recording"):
        cartpole_data.load(path)


def test_the_canvas_is_multi_rate():
    layout, topology = declare(16)
    assert layout.region_spec("summary").period == 4
    fills = {c.temporal_fill.value for c in topology.connections if c.dst == "summary" and c.t_dst is not None}
    assert fills == {"hold", "interpolate"}


def test_an_untrained_model_is_persistence_and_never_sees_the_future():
    torch.manual_seed(0)
    model = WorldModel(AttentionDispatcher, d_model=16, n_heads=2, n_blocks=1)
    video, states = torch.rand(2, FRAMES, 16, 24), torch.randn(2, FRAMES, 4)
    actions = torch.randint(0, 2, (2, FRAMES))
    predicted_video, predicted_states = model(video, states, actions)
    assert torch.equal(predicted_video, video[:, OBSERVED - 1, None].expand_as(predicted_video))
    assert torch.equal(predicted_states, states[:, OBSERVED - 1, None].expand_as(predicted_states))

    for decoder in (model.decode_patch, model.decode_state):
        torch.nn.init.normal_(decoder[-1].weight)
    other_video, other_states = video.clone(), states.clone()
    other_video[:, OBSERVED:], other_states[:, OBSERVED:] = 0.5, 9.0
    expected, found = model(video, states, actions), model(other_video, other_states, actions)
    assert all(torch.equal(a, b) for a, b in zip(expected, found))
    turned = model(video, states, 1 - actions)
    assert not torch.allclose(turned[1], expected[1])


def test_patches_and_pixels_are_inverse():
    # A decoder that returns its input's patch must give back the held frame twice over.
    model = WorldModel(AttentionDispatcher, d_model=16, n_heads=2, n_blocks=0)
    video = torch.rand(1, FRAMES, 16, 24)
    model.encode_patch = torch.nn.Identity()
    model.decode_patch = torch.nn.Identity()
    model.add = lambda x, name, embeddings: embeddings.flatten(1, -2) if name == "video" else x
    model.canvas.extract = lambda x, name: x if name == "video" else torch.zeros(1, FRAMES, 16)
    predicted, _ = model(video, torch.zeros(1, FRAMES, 4), torch.zeros(1, FRAMES, dtype=torch.int64))
    torch.testing.assert_close(predicted, 2 * video[:, OBSERVED - 1, None].expand_as(predicted))


def test_hold_present():
    x = torch.arange(FRAMES, dtype=torch.float32).view(1, FRAMES, 1)
    assert hold_present(x).flatten().tolist() == [*range(OBSERVED), *[OBSERVED - 1] * (FRAMES - OBSERVED)]


@pytest.mark.parametrize(
    ("model", "verdict"),
    [
        ([0.5] * 5, True),
        ([0.5, 0.5, 1.0, 0.5, 0.5], False),
        ([0.5, 0.5, 0.5, 0.5, 1.1], False),
        ([0.5, float("nan"), 0.5, 0.5, 0.5], False),
    ],
)
def test_every_error_must_beat_persistence(model, verdict):
    assert cartpole.beats(torch.tensor(model), torch.ones(5)) is verdict


# A few windows of one episode teach the states' dynamics, and no rendering: video is judged in the full demo.
TOY = ["--frames", str(RECORDED), "--batch", "2", "--rounds", "1", "--seed", "3", "--judge", "states"]


def test_the_demo_learns_and_writes_its_pictures(tmp_path, recording, capsys):
    path = tmp_path / "data.npz"
    cartpole_data.save(recording, path)
    assert cartpole.main([*TOY, "--steps", "30", "--data", str(path), "--out", str(tmp_path)]) == 0
    for name in ("layout", "table", "loss"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    # lines break where the path leaves no room
    printed = " ".join(capsys.readouterr().out.split())
    for words in ("simulated data", "cart position", "dense mask", "per-edge loop", "beats persistence"):
        assert words in printed


def test_the_demo_fails_where_nothing_was_learned(tmp_path, recording, capsys):
    path = tmp_path / "data.npz"
    cartpole_data.save(recording, path)
    assert cartpole.main([*TOY, "--steps", "0", "--data", str(path), "--out", str(tmp_path)]) == 1
    assert "does not beat persistence" in capsys.readouterr().out
