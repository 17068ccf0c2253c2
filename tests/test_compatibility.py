"""What code and files made for canvas-engineering 0.5 rely on."""

from __future__ import annotations

import json

import pytest

import canvas_engineering as ce

LAYOUT = ce.CanvasLayout(T=2, H=3, W=4, d_model=8, regions={"a": (0, 2, 0, 1, 0, 4), "b": (0, 1, 1, 2, 0, 2)})
TOPOLOGY = ce.CanvasTopology([ce.Connection("a", "b"), ce.Connection("b", "b")])

# -- files


def old_form(**changes):
    """A schema as earlier releases wrote it."""
    return {
        "version": "0.2.0",
        "layout": {"T": 2, "H": 3, "W": 4, "d_model": 8},
        "regions": {"a": {"bounds": [0, 2, 0, 1, 0, 4]}, "b": {"bounds": [0, 1, 1, 2, 0, 2]}},
        "topology": [{"src": "a", "dst": "b"}, {"src": "b", "dst": "b"}],
        **changes,
    }


def test_files_of_earlier_releases_load(tmp_path):
    path = tmp_path / "old.json"
    path.write_text(json.dumps(old_form()))
    schema = ce.CanvasSchema(LAYOUT, TOPOLOGY)
    assert ce.CanvasSchema.from_json(path) == schema
    assert ce.CanvasProgram.from_json(path) == ce.CanvasProgram(schema)
    programs = {"program_version": "2.0.0", "region_programs": {"a": {"family": "memory"}}}
    path.write_text(json.dumps(old_form(**programs)))
    assert ce.CanvasProgram.from_json(path) == ce.CanvasProgram(schema, {"a": ce.RegionProgram("memory")})
    assert ce.CanvasSchema.from_json(path) == schema


def test_the_version_has_an_old_name():
    assert ce.CanvasSchema.from_dict(old_form(version="0.1.0")).version == "0.1.0"
    assert ce.CanvasSchema.from_dict(old_form(schema_version="0.2.0")).version == "0.2.0"
    with pytest.raises(ValueError, match=r"schema_version '0\.3\.0', and version, its old name, '0\.2\.0'"):
        ce.CanvasSchema.from_dict(old_form(schema_version="0.3.0"))


@pytest.mark.parametrize("kind", [ce.CanvasSchema, ce.CanvasProgram])
def test_unknown_fields_become_metadata(kind):
    form = old_form(metadata={"data": "x"}, author={"name": "N"}, topolgy=[])
    with pytest.warns(UserWarning, match=r"kept in its metadata: 'author', 'topolgy' \(did you mean topology\?\)"):
        loaded = kind.from_dict(form)
    schema = loaded if kind is ce.CanvasSchema else loaded.schema
    assert schema.metadata == {"data": "x", "author": {"name": "N"}, "topolgy": []}
    assert kind.from_dict(loaded.to_dict()) == loaded


@pytest.mark.parametrize("kind", [ce.CanvasSchema, ce.CanvasProgram])
def test_fields_that_would_be_lost_are_refused(kind):
    with pytest.raises(ValueError, match=r"unknown fields \['region_program'\]; .* region_programs"):
        kind.from_dict(old_form(region_program={}))
    with pytest.raises(ValueError, match=r"\['note'\] at its top level"):
        kind.from_dict(old_form(note=1, metadata={"note": 2}))
    # a region's program is no region
    with pytest.raises(ValueError, match=r"region 'a' has unknown fields \['family'\]"):
        kind.from_dict(old_form(regions={"a": {"bounds": [0, 2, 0, 1, 0, 4], "family": "memory"}}))


def test_files_say_which_version_wrote_them(tmp_path):
    path, schema = tmp_path / "new.json", ce.CanvasSchema(LAYOUT, TOPOLOGY)
    for written in (schema, ce.CanvasProgram(schema, {"a": ce.RegionProgram("memory")})):
        written.to_json(path)
        assert json.loads(path.read_text())["written_by"] == f"canvas-engineering {ce.__version__}"
        assert type(written).from_json(path) == written


def test_a_program_that_says_nothing_is_written_as_its_schema():
    schema = ce.CanvasSchema(LAYOUT, TOPOLOGY)
    assert ce.CanvasProgram(schema).to_dict() == schema.to_dict()
    silent = ce.CanvasProgram(schema, {"a": ce.RegionProgram()})
    assert silent.to_dict()["region_programs"] == {"a": {}}
    for program in (silent, ce.CanvasProgram(schema), ce.CanvasProgram(schema, version="2.7.1")):
        assert ce.CanvasProgram.from_dict(program.to_dict()) == program


# -- running


def test_dispatchers_without_an_accumulator_have_no_summaries():
    assert ce.AttentionDispatcher(TOPOLOGY, LAYOUT, 8).summaries is None
    kept = ce.AttentionDispatcher(TOPOLOGY, LAYOUT, 8, residual_accumulator=ce.ResidualAccumulator(["b"]))
    assert kept.summaries == {"b": {"prediction": 0.0}}
