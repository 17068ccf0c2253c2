"""Schemas and their JSON form."""

from __future__ import annotations

import json
import math
import os
import stat

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from canvas_engineering import (
    CanvasLayout,
    CanvasSchema,
    CanvasTopology,
    Connection,
    MaskSpec,
    RegionSpec,
    TemporalFill,
    transfer_distance,
)
from tests.strategies import layouts, masks

texts = st.text(max_size=8)
names = st.text(min_size=1, max_size=8)
numbers = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def schemas(draw):
    """Schemas with every field of every part drawn at random."""
    base = draw(layouts(max_positions=60))
    regions = {}
    for spec in map(base.region_spec, base.regions):
        regions[draw(names)] = RegionSpec(
            bounds=spec.bounds,
            period=draw(st.integers(1, 9)),
            is_output=draw(st.booleans()),
            loss_weight=draw(numbers),
            semantic_type=draw(st.none() | texts),
            semantic_embedding=draw(st.none() | st.lists(numbers, max_size=3).map(tuple)),
            embedding_model=draw(texts),
            default_attn=draw(texts),
            carrier=draw(texts),
        )
    if draw(st.booleans()):
        regions["raw bounds"] = base.region_spec("r0").bounds
    layout = CanvasLayout(
        T=base.T, d_model=3, spatial_shape=base.spatial_shape, regions=regions, t_current=draw(st.integers(0, 9))
    )
    connections = [
        Connection(
            src=draw(st.sampled_from(list(regions))),
            dst=draw(st.sampled_from(list(regions))),
            weight=draw(st.just(0.0) | st.floats(1e-18, 9)),
            t_src=draw(st.none() | st.integers(-9, 9)),
            t_dst=draw(st.none() | st.integers(-9, 9)),
            fn=draw(st.none() | names),
            operator=draw(names),
            write_mode=draw(st.sampled_from(["add", "replace", "gate"])),
            temporal_fill=draw(st.sampled_from(TemporalFill)),
            interpolation_order=draw(st.integers(0, 5)),
            mask=draw(masks(base, "r0", "r0")),
        )
        for _ in range(draw(st.integers(0, 3)))
    ]
    return CanvasSchema(
        layout=layout,
        topology=draw(st.sampled_from([None, CanvasTopology(connections)])),
        version=draw(texts),
        metadata=draw(st.dictionaries(texts, texts | st.lists(st.integers() | st.none(), max_size=2), max_size=2)),
    )


def robot():
    layout = CanvasLayout(
        T=8,
        H=16,
        W=16,
        d_model=256,
        regions={
            "visual": RegionSpec((0, 8, 0, 12, 0, 12), semantic_type="RGB video", semantic_embedding=(0.12, -0.05)),
            "action": RegionSpec((0, 8, 12, 14, 0, 2), loss_weight=2.0, semantic_embedding=(0.31, 0.08)),
        },
        t_current=3,
    )
    topology = CanvasTopology(
        [
            Connection("visual", "visual"),
            Connection("action", "visual", t_src=0, t_dst=-1, temporal_fill=TemporalFill.INTERPOLATE),
            Connection("action", "action", 0.5, interpolation_order=2, mask=MaskSpec("tile", tile_h=2)),
        ]
    )
    return CanvasSchema(layout, topology, metadata={"model": "CogVideoX-2B", "data": "bridge_v2"})


@settings(max_examples=80)
@given(schemas())
def test_every_field_comes_back(schema):
    form = schema.to_dict()
    assert CanvasSchema.from_dict(form) == schema
    # Through text as well: nothing in the dict is more than JSON.
    text = json.dumps(form, allow_nan=False)
    back = CanvasSchema.from_dict(json.loads(text))
    assert back == schema
    assert json.dumps(back.to_dict()) == text
    assert list(back.layout.regions) == list(schema.layout.regions)


def test_the_published_form():
    assert robot().to_dict() == {
        "schema_version": "0.2.0",
        "layout": {"T": 8, "spatial_shape": [16, 16], "d_model": 256, "t_current": 3},
        "regions": {
            "visual": {
                "bounds": [0, 8, 0, 12, 0, 12],
                "semantic_type": "RGB video",
                "semantic_embedding": [0.12, -0.05],
            },
            "action": {"bounds": [0, 8, 12, 14, 0, 2], "loss_weight": 2.0, "semantic_embedding": [0.31, 0.08]},
        },
        "topology": [
            {"src": "visual", "dst": "visual"},
            {"src": "action", "dst": "visual", "t_src": 0, "t_dst": -1, "temporal_fill": "interpolate"},
            {
                "src": "action",
                "dst": "action",
                "weight": 0.5,
                "interpolation_order": 2,
                "mask": {"kind": "tile", "tile_h": 2},
            },
        ],
        "metadata": {"model": "CogVideoX-2B", "data": "bridge_v2"},
    }


def test_what_differs_is_not_equal():
    schema = robot()
    for change in (
        lambda form: form["layout"].update(t_current=4),
        lambda form: form["regions"]["visual"].update(period=2),
        lambda form: form["topology"][1].update(temporal_fill="drop"),
        lambda form: form["topology"][2]["mask"].update(tile_h=3),
        lambda form: form.pop("topology"),
        lambda form: form["metadata"].clear(),
        lambda form: form.update(schema_version="0.3.0"),
    ):
        form = schema.to_dict()
        change(form)
        assert CanvasSchema.from_dict(form) != schema


def test_no_topology_and_an_empty_one_are_kept_apart():
    layout = CanvasLayout(T=1, H=2, d_model=4)
    for schema in (CanvasSchema(layout), CanvasSchema(layout, CanvasTopology())):
        assert CanvasSchema.from_dict(schema.to_dict()) == schema
    assert "topology" not in CanvasSchema(layout).to_dict()
    assert CanvasSchema(layout, CanvasTopology()).to_dict()["topology"] == []


def test_the_older_layout_form_loads():
    form = {"layout": {"T": 2, "H": 3, "W": 4, "d_model": 8}, "regions": {"a": [0, 2, 0, 3, 0, 4]}, "topology": None}
    schema = CanvasSchema.from_dict(form)
    assert schema.layout == CanvasLayout(T=2, spatial_shape=(3, 4), d_model=8, regions={"a": (0, 2, 0, 3, 0, 4)})
    assert schema.topology is None
    assert (schema.version, schema.metadata) == ("0.2.0", {})


def test_entries_of_a_program_are_left_to_their_owner():
    form = {**robot().to_dict(), "program_version": "2.0.0", "region_programs": {}, "connection_programs": {}}
    assert CanvasSchema.from_dict(form) == robot()


def _with(**changes):
    form = robot().to_dict()
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = form
        for step in parents:
            place = place[int(step) if isinstance(place, list) else step]
        if value is None:
            del place[last]
        else:
            place[last] = value
    return form


@pytest.mark.parametrize(
    "form, message",
    [
        ([], r"must be a dict with a 'layout', got \[\]"),
        ({"regions": {}}, "must be a dict with a 'layout'"),
        (_with(layout__spatial_shape=None), "layout needs spatial_shape, or H and W, got .*'T': 8"),
        (_with(layout__H=16), "not both"),
        (_with(layout__T=None), "layout lacks T"),
        (_with(layout__depth=3), r"layout has unknown fields \['depth'\]; known are T, spatial_shape, H, W, d_model, "),
        (_with(region_program={}), "which look like a program's: 'region_program' for region_programs"),
        (_with(regions=[]), r"regions must be a dict of names to fields, got \[\]"),
        (_with(regions__action__bounds=None), "region 'action' lacks bounds"),
        (_with(regions__action__colour="red"), r"region 'action' has unknown fields \['colour'\]; known are bounds, "),
        (_with(regions__action__period=0), "region 'action': period .* at least 1, got 0"),
        (_with(regions__action__bounds=[0, 8, 12, 17, 0, 2]), r"'action'.*outside the grid \(8, 16, 16\)"),
        (_with(regions__action=5), "region 'action' must be a dict of its fields, got 5"),
        (_with(layout__regions={}), "the regions of a schema stand beside its layout"),
        (_with(topology={}), r"topology must be a list of connections, \[.*\], got {}"),
        (_with(topology__1__src=None), r"topology\[1\] lacks src"),
        (_with(topology__1__offset=1), r"topology\[1\] has unknown fields \['offset'\]"),
        (_with(topology__1__temporal_fill="guess"), r"topology\[1\]: .*unknown temporal_fill 'guess'"),
        (_with(topology__2__mask__kind="round"), r"topology\[2\] mask: unknown mask kind 'round'"),
        (_with(topology__2__mask__size=2), r"topology\[2\] mask has unknown fields \['size'\]"),
        (_with(schema_version=3), "version must be a string, got 3"),
    ],
)
def test_bad_forms_name_the_entry(form, message):
    with pytest.raises(ValueError, match=message):
        CanvasSchema.from_dict(form)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"layout": "a grid"}, "layout must be a CanvasLayout, got 'a grid'"),
        ({"topology": [Connection("a", "b")]}, "topology must be a CanvasTopology, or None"),
        ({"metadata": ["a"]}, "metadata must be a dict with string keys"),
        ({"metadata": {1: "a"}}, "metadata must be a dict with string keys"),
    ],
)
def test_bad_schemas(arguments, message):
    with pytest.raises(ValueError, match=message):
        CanvasSchema(**{"layout": CanvasLayout(T=1, H=1, d_model=1), **arguments})


# --- files


def test_files(tmp_path):
    path = tmp_path / "robot_v1.json"
    robot().to_json(str(path))
    assert CanvasSchema.from_json(path) == robot()
    assert json.loads(path.read_text())["layout"]["T"] == 8
    assert len(path.read_text().splitlines()) > 20  # meant for people too
    assert os.listdir(tmp_path) == ["robot_v1.json"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("value", [math.nan, {1, 2}, torch.ones(1), (1, 2), {1: "a"}])
def test_what_json_cannot_keep_leaves_the_file_alone(tmp_path, value):
    path = tmp_path / "schema.json"
    robot().to_json(path)
    schema = robot()
    schema.metadata["note"] = value
    with pytest.raises(ValueError, match="the schema's metadata"):
        schema.to_json(path)
    assert CanvasSchema.from_json(path) == robot()
    assert os.listdir(tmp_path) == ["schema.json"]


def test_a_failed_replacement_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*paths):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        robot().to_json(tmp_path / "schema.json")
    assert os.listdir(tmp_path) == []


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "broken.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json: Expecting"):
        CanvasSchema.from_json(path)
    path.write_text('{"layout": {}}')
    with pytest.raises(ValueError, match=r"broken\.json: layout needs"):
        CanvasSchema.from_json(path)
    with pytest.raises(FileNotFoundError):
        CanvasSchema.from_json(tmp_path / "missing.json")


# --- compatible regions


def embedded(**vectors):
    regions = {name: RegionSpec((0, 1, 0, 1), **fields) for name, fields in vectors.items()}
    return CanvasSchema(CanvasLayout(T=1, H=1, d_model=4, regions=regions))


def test_compatible_regions_come_nearest_first():
    mine = embedded(
        visual={"semantic_embedding": (1.0, 0.0)},
        action={"semantic_embedding": (0.0, 1.0)},
        mute={},
        foreign={"semantic_embedding": (1.0, 0.0), "embedding_model": "another"},
        long={"semantic_embedding": (1.0, 0.0, 0.0)},
    )
    other = embedded(
        grip={"semantic_embedding": (0.3, 1.0)},
        camera={"semantic_embedding": (1.0, 0.1)},
        depth={"semantic_embedding": (1.0, 0.6)},
        silent={},
    )
    pairs = mine.compatible_regions(other, threshold=0.3)
    assert [pair[:2] for pair in pairs] == [("visual", "camera"), ("action", "grip"), ("visual", "depth")]
    for name, theirs, distance in pairs:
        expected = transfer_distance(mine.layout.region_spec(name), other.layout.region_spec(theirs))
        assert distance == pytest.approx(expected, abs=1e-15)
    assert [pair[:2] for pair in mine.compatible_regions(other, threshold=0.01)] == [("visual", "camera")]
    assert mine.compatible_regions(embedded(mute={})) == []
