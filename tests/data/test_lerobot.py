"""LeRobot datasets: what is recorded comes back, in the regions and at the times that a canvas declares."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("pyarrow", reason="datasets are read by pyarrow, of the extra data")
pytest.importorskip("av", reason="videos are read by PyAV, of the extra data")

import pyarrow.parquet as parquet

from canvas_engineering import CanvasLayout, CanvasSchema, RegionSpec
from canvas_engineering.data import LeRobotCanvasDataset, LeRobotFolder, LeRobotRecorder

FPS, LENGTHS, SIZE = 10, (12, 7), (16, 24)
FEATURES = {
    "observation.images.front": {"dtype": "video", "shape": (*SIZE, 3)},
    "observation.state": {"dtype": "float32", "shape": (3,), "names": ["x", "y", "z"]},
    "action": {"dtype": "float32", "shape": (1,)},
}


def brightness(episode, t):
    return 20 + 10 * t + 100 * episode


def state(episode, t):
    return np.array([t, 10.0 * episode, t * t], np.float32)


def record(root, codec="h264", lengths=LENGTHS):
    recorder = LeRobotRecorder(root, FPS, FEATURES, robot_type="test", codec=codec)
    for episode, length in enumerate(lengths):
        for t in range(length):
            image = np.full((*SIZE, 3), brightness(episode, t), np.uint8)
            frame = {"observation.images.front": image, "observation.state": state(episode, t), "action": [0.5 * t]}
            recorder.add_frame(frame, task=f"task {episode % 2}")
        recorder.save_episode()
    return root


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return record(tmp_path_factory.mktemp("lerobot") / "data")


def layout(T=4, t_current=2):
    regions = {
        "front": (0, T, 0, 2, 0, 4),
        "state": RegionSpec((0, T // 2, 2, 3, 0, 3), period=2, loss_weight=2.0),
        "action": (0, T, 3, 4, 0, 1),
        "thought": (0, 1, 3, 4, 1, 4),
    }
    return CanvasLayout(T=T, d_model=8, spatial_shape=(4, 4), regions=regions, t_current=t_current)


@pytest.mark.parametrize("codec", ["h264", "av1"])
def test_recorded_frames_come_back(tmp_path, codec):
    folder = LeRobotFolder(record(tmp_path / "data", codec))
    assert folder.version == "v3.0" and [e.length for e in folder.episodes] == list(LENGTHS)
    for number, episode in enumerate(folder.episodes):
        rows = folder.columns(episode)
        times = np.arange(episode.length)
        np.testing.assert_array_equal(rows["observation.state"], [state(number, t) for t in times])
        np.testing.assert_array_equal(rows["episode_index"], number)
        some = times[1::3]
        images = folder.frames(episode, "observation.images.front", some / FPS)
        assert images.shape == (len(some), *SIZE, 3)
        np.testing.assert_allclose(images.mean((1, 2, 3)), [brightness(number, t) for t in some], atol=4)
        assert episode.tasks == (f"task {number % 2}",)
    every = np.concatenate([[state(e, t) for t in range(n)] for e, n in enumerate(LENGTHS)])
    np.testing.assert_allclose(folder.stats["observation.state"]["mean"], every.mean(0), rtol=1e-6)
    np.testing.assert_allclose(folder.stats["observation.state"]["std"], every.std(0), rtol=1e-6)
    assert folder.stats["observation.images.front"]["mean"].shape == (3, 1, 1)


def test_a_sample_has_each_regions_frames_at_their_times(dataset):
    data = LeRobotCanvasDataset(dataset, CanvasSchema(layout()), normalize="none")
    assert len(data) == sum(LENGTHS)
    assert data.regions == {"front": "observation.images.front", "state": "observation.state", "action": "action"}
    # the anchor is step 1: actions one step before to two behind, states at steps 0 and 2
    assert data.delta_timestamps["action"] == pytest.approx([-0.1, 0.0, 0.1, 0.2])
    assert data.delta_timestamps["observation.state"] == pytest.approx([-0.1, 0.1])
    sample = data[5]
    assert (sample["episode_index"], sample["frame_index"], sample["task"]) == (0, 5, "task 0")
    assert sample["action"].flatten().tolist() == [2.0, 2.5, 3.0, 3.5]
    np.testing.assert_array_equal(sample["state"], [state(0, 4), state(0, 6)])
    assert sample["front"].shape == (4, 3, *SIZE)
    np.testing.assert_allclose(255 * sample["front"].mean((1, 2, 3)), [brightness(0, t) for t in (4, 5, 6, 7)], atol=4)
    assert all(mask.all() for mask in sample["mask"].values())
    torch.testing.assert_close(sample["loss_weights"], layout().loss_weight_mask())
    with pytest.raises(IndexError, match="sample 19 of 19"):
        data[19]
    torch.testing.assert_close(data[-1]["action"], data[18]["action"])


def test_what_lies_outside_of_an_episode_has_no_loss(dataset):
    data = LeRobotCanvasDataset(dataset, layout(), normalize="none")
    first, last = data[12], data[11]  # the first frame of the second episode, the last of the first
    assert first["action"].flatten().tolist() == [0.0, 0.0, 0.5, 1.0]
    assert first["mask"]["action"].tolist() == [False, True, True, True]
    assert last["mask"]["action"].tolist() == [True, True, False, False]
    assert last["mask"]["state"].tolist() == [True, False] and last["state"][1].tolist() == state(0, 11).tolist()
    canvas = layout()
    for sample in (first, last):
        expected = torch.zeros(canvas.num_positions)
        for region, spec in ((name, canvas.region_spec(name)) for name in canvas.regions):
            for frame in range(*spec.bounds[:2]):
                if region not in sample["mask"] or sample["mask"][region][frame - spec.bounds[0]]:
                    expected[canvas.region_indices_at_t(region, frame)] += spec.loss_weight
        torch.testing.assert_close(sample["loss_weights"], expected)


def test_other_rates_anchors_episodes_and_features(dataset):
    regions = {"hand": (0, 3, 0, 1), "move": RegionSpec((0, 2, 1, 2), period=2)}
    canvas = CanvasLayout(T=3, d_model=8, spatial_shape=(2,), regions=regions)
    named = {"observation.state": "hand", "action": "move"}
    data = LeRobotCanvasDataset(dataset, canvas, named, fps=5, anchor=2, normalize="none", episodes=[1])
    assert len(data) == 7 and data.delta_timestamps["observation.state"] == pytest.approx([-0.4, -0.2, 0.0])
    np.testing.assert_array_equal(data[6]["hand"], [state(1, t) for t in (2, 4, 6)])
    assert data[6]["move"].flatten().tolist() == [1.0, 3.0]


def test_normalisation_is_that_of_the_statistics_and_is_undone(dataset):
    plain, normal = (LeRobotCanvasDataset(dataset, layout(), normalize=how) for how in ("none", "mean_std"))
    every = torch.stack([normal[i]["state"][0] for i in range(1, len(normal))])
    assert every.mean(0).abs().max() < 0.35 and (every.std(0) - 1).abs().max() < 0.35
    torch.testing.assert_close(normal.denormalize("state", normal[3]["state"]), plain[3]["state"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(normal.normalize("state", plain[3]["state"]), normal[3]["state"], rtol=1e-4, atol=1e-4)
    ranged = LeRobotCanvasDataset(dataset, layout(), normalize={"observation.state": "min_max", "action": "none"})
    values = torch.cat([ranged[i]["state"] for i in range(len(ranged))])
    assert values.min() == pytest.approx(-1, abs=1e-5) and values.max() == pytest.approx(1, abs=1e-5)


def test_workers_and_copies_give_the_same_samples(dataset):
    data = LeRobotCanvasDataset(dataset, layout())
    alone = [data[i] for i in range(len(data))]
    copied = pickle.loads(pickle.dumps(data))
    for workers, source in ((0, copied), (2, data)):
        loader = torch.utils.data.DataLoader(source, batch_size=4, num_workers=workers)
        for start, batch in zip(range(0, len(data), 4), loader):
            for region in ("front", "state", "action"):
                torch.testing.assert_close(batch[region], torch.stack([s[region] for s in alone[start : start + 4]]))
            assert batch["mask"]["action"].dtype == torch.bool


def test_the_older_format_is_read(dataset, tmp_path):
    """v2.1, made of the same rows: a file for each episode, lists of JSON lines."""
    new, root = LeRobotFolder(dataset), tmp_path / "old"
    info = json.loads((dataset / "meta/info.json").read_text())
    info |= {
        "codebase_version": "v2.1",
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }
    lines = {"episodes": [], "episodes_stats": []}
    for episode in new.episodes:
        where = {"episode_chunk": 0, "episode_index": episode.index}
        for name, source in (
            ("data_path", episode.data),
            ("video_path", episode.videos["observation.images.front"][0]),
        ):
            target = root / info[name].format(video_key="observation.images.front", **where)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
        lines["episodes"].append(
            {"episode_index": episode.index, "tasks": list(episode.tasks), "length": episode.length}
        )
        meta = parquet.read_table(dataset / f"meta/episodes/chunk-000/file-{episode.index:03d}.parquet").to_pylist()[0]
        stats = {
            name: {key: meta[f"stats/{name}/{key}"] for key in ("min", "max", "mean", "std", "count")}
            for name in FEATURES
        }
        lines["episodes_stats"].append({"episode_index": episode.index, "stats": stats})
    (root / "meta").mkdir()
    (root / "meta/info.json").write_text(json.dumps(info))
    for name, rows in lines.items():
        (root / f"meta/{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    old = LeRobotFolder(root)
    for name in FEATURES:
        for key, value in new.stats[name].items():
            np.testing.assert_allclose(old.stats[name][key], value, rtol=1e-6)
    samples = [LeRobotCanvasDataset(folder, layout())[8] for folder in (dataset, root)]
    assert samples[0].pop("task") == samples[1].pop("task") == "task 0"
    torch.testing.assert_close(samples[0], samples[1])


def broken(root, name, change):
    path = root / name
    path.write_bytes(change(path.read_bytes()))
    return root


def changed(**entries):
    return lambda content: json.dumps({**json.loads(content), **entries}).encode()


VIDEO = "videos/observation.images.front/chunk-000/file-000.mp4"
DATA = "data/chunk-000/file-000.parquet"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("meta/info.json", changed(codebase_version="v1.6"), r"version .v1\.6.; v3\.0 and v2\.1 are supported"),
        ("meta/info.json", lambda content: b"{", r"info\.json"),
        ("meta/info.json", changed(fps=None), "lacks fps"),
        (VIDEO, lambda content: content[: len(content) // 3], r"file-000\.mp4"),
        (DATA, lambda content: content[:100], r"file-000\.parquet is no table"),
        (
            "meta/info.json",
            lambda content: content.replace(b"16,", b"18,", 1),
            r"file-000\.mp4 has frames of \(16, 24, 3\), and info.json declares \(18, 24, 3\)",
        ),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path, name, change, message):
    root = broken(record(tmp_path / "data", lengths=(6,)), name, change)
    with pytest.raises(ValueError, match=message):
        LeRobotCanvasDataset(root, layout())[3]


def test_gaps_between_samples_are_named(tmp_path):
    root = record(tmp_path / "data", lengths=(8,))
    table = parquet.read_table(root / DATA)
    times = np.arange(8, dtype=np.float32) / FPS
    times[4:] += 0.35
    parquet.write_table(table.set_column(table.column_names.index("timestamp"), "timestamp", [times]), root / DATA)
    data = LeRobotCanvasDataset(root, layout(), {"action": "action"}, normalize="none")
    assert data[1]["action"].flatten().tolist() == [0.0, 0.5, 1.0, 1.5]
    with pytest.raises(
        ValueError, match=r"region 'action' wants a sample at 0\.\d+ s of episode 0; the nearest is 0\.\d+"
    ):
        data[3]


def test_declarations_that_do_not_fit_are_named(dataset):
    with pytest.raises(KeyError, match=r"no features \['observation.torque'\]; it has observation.images.front"):
        LeRobotCanvasDataset(dataset, layout(), {"observation.torque": "state"})
    with pytest.raises(KeyError, match=r"no regions \['arm'\] in the layout"):
        LeRobotCanvasDataset(dataset, layout(), {"action": "arm"})
    other = CanvasLayout(T=1, d_model=8, spatial_shape=(1,), regions={"arm": (0, 1, 0, 1)})
    with pytest.raises(
        KeyError, match=r"no region is named as a feature: regions arm; features observation\.images\.front"
    ):
        LeRobotCanvasDataset(dataset, other)
    with pytest.raises(ValueError, match=r"no episodes \[5\]; it has 2"):
        LeRobotCanvasDataset(dataset, layout(), episodes=[5])
    with pytest.raises(ValueError, match="unknown normalize of 'action' 'max': choose one of"):
        LeRobotCanvasDataset(dataset, layout(), normalize={"action": "max"})
    with pytest.raises(ValueError, match="is no LeRobot dataset"):
        LeRobotCanvasDataset(dataset / "meta", layout())


def test_a_recorder_keeps_what_is_there_and_whole(tmp_path):
    root = record(tmp_path / "data", lengths=(4,))
    with pytest.raises(ValueError, match="has files in it"):
        LeRobotRecorder(root, FPS, FEATURES)
    recorder = LeRobotRecorder(tmp_path / "new", FPS, FEATURES)
    with pytest.raises(ValueError, match="an episode needs a frame"):
        recorder.save_episode()
    frame = {"observation.images.front": np.zeros((*SIZE, 3)), "observation.state": np.zeros(3), "action": [0.0]}
    with pytest.raises(ValueError, match=r"a frame has \['action'\]"):
        recorder.add_frame({"action": [0.0]})
    with pytest.raises(ValueError, match=r"'observation.state' has the shape \(2,\), declared is \(3,\)"):
        recorder.add_frame({**frame, "observation.state": np.zeros(2)})
    recorder.add_frame(frame)
    recorder.save_episode()
    info = (tmp_path / "new/meta/info.json").read_bytes()
    recorder.add_frame(frame)
    recorder.save_episode()
    # as a crash before the last file leaves it: the first episode alone
    (tmp_path / "new/meta/info.json").write_bytes(info)
    assert [episode.length for episode in LeRobotFolder(tmp_path / "new").episodes] == [1]
    for feature, message in (
        ({"dtype": "video", "shape": (15, 16, 3)}, "must have an even height"),
        ({"dtype": "words", "shape": (1,)}, "must be a video, or numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            LeRobotRecorder(tmp_path / "bad", FPS, {"x": feature})


def test_an_environment_is_recorded_with_its_states_and_actions(tmp_path):
    pytest.importorskip("gymnasium", reason="gymnasium plays the environments, of the extra data")
    from examples import record_robot

    out = tmp_path / "data"
    options = ["--episodes", "3", "--longest", "12", "--out", str(out), "--size", "20", "30"]
    assert record_robot.main(options) == 0
    folder = LeRobotFolder(out)
    assert folder.info["robot_type"] == "CartPole-v1" and 3 <= sum(e.length for e in folder.episodes) <= 36
    for episode in folder.episodes:
        rows = folder.columns(episode)
        assert np.abs(rows["observation.state"]).max() < 5 and set(np.unique(rows["action"])) <= {0.0, 1.0}
        # the position moves by the velocity times the two steps of 0.02 s between frames
        position, velocity = rows["observation.state"][:, 0], rows["observation.state"][:, 1]
        np.testing.assert_allclose(np.diff(position), 0.02 * (velocity[:-1] + velocity[1:]), atol=0.02)
        images = folder.frames(episode, "observation.images.front", np.arange(episode.length) / folder.fps)
        assert images.shape == (episode.length, 20, 30, 3) and images.std() > 5  # a cart on white ground
