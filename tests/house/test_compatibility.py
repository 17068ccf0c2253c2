"""What code and files made for canvas-engineering 0.5 rely on."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import json
import operator
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

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
    with pytest.raises(ValueError, match=r"old\.json.* no region_programs: .*CanvasProgram"):
        ce.CanvasSchema.from_json(path)
    with pytest.raises(ValueError, match=r"no connection_programs: .*CanvasProgram"):
        ce.CanvasSchema.from_dict(old_form(connection_programs=[]))
    empty = {"program_version": "2.0.0", "region_programs": {}, "connection_programs": None}
    assert ce.CanvasSchema.from_dict(old_form(**empty)) == schema


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
    with pytest.raises(ValueError, match="'region_program' for region_programs"):
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


def mixed():
    """A program with a region of every compile mode, ``mode`` its name, and one that says nothing."""
    names = ["runtime", "freeze", "constant", "export", "silent"]
    regions = {name: (0, 1, row, row + 1) for row, name in enumerate(names)}
    layout = ce.CanvasLayout(T=1, spatial_shape=(len(names),), d_model=8, regions=regions)
    schema = ce.CanvasSchema(layout, ce.CanvasTopology.dense(names))
    return ce.CanvasProgram(schema, {name: ce.RegionProgram(compile_mode=name) for name in names[:-1]})


def test_compiled_programs_of_mixed_modes():
    compiled = ce.ProgramCompiler(mixed()).compile()
    assert compiled.active_regions == {"runtime", "freeze", "silent"}
    assert compiled.frozen_regions == {"freeze"} and compiled.constant_regions == {"constant"}
    assert compiled.exported_memories == {"export"}
    assert compiled.all_regions == compiled.active_regions | {"constant", "export"} and compiled.n_eliminated == 2
    assert [(c.src, c.dst) for c in compiled.active_connections] == [
        (src, dst) for src in ("runtime", "freeze", "silent") for dst in ("runtime", "freeze", "silent")
    ]
    assert isinstance(compiled.schema, ce.CanvasSchema) and "frozen: freeze" in compiled.summary()


def test_current_loops_is_what_set_loops_set():
    block = ce.LoopedBlockWrapper(torch.nn.Linear(4, 4), max_loops=3, embed_dim=4)
    assert block.current_loops == 1
    block.set_loops(2)
    assert block.current_loops == 2
    block.current_loops = 9
    assert block.current_loops == block.loops == 3


def test_a_layout_has_one_grid():
    with pytest.raises(ValueError, match="Cannot specify both"):
        ce.CanvasLayout(T=1, d_model=4, spatial_shape=(3, 4), H=3, W=4)
    assert (LAYOUT.spatial_shape, LAYOUT.H, LAYOUT.W) == ((3, 4), 3, 4)


def test_fields_have_a_spatial_shape():
    assert ce.Field(4, 8).spatial_shape == (4, 8) and ce.Field().spatial_shape == (1, 1)
    assert ce.Field(4, 8) == ce.Field(spatial_shape=(4, 8))
    assert dataclasses.replace(ce.Field(4, 8), h=5, spatial_shape=None).spatial_shape == (5, 8)
    with pytest.raises(ValueError, match="contradicts h=5"):
        ce.Field(5, 8, spatial_shape=(4, 8))
    # a scalar fits canvases of any number of dimensions
    bound = ce.compile_schema(SimpleNamespace(line=ce.Field(spatial_shape=(5,)), scalar=ce.Field()))
    assert bound.layout.n_spatial_dims == 1 and bound["line"].num_positions == 5


def test_family_and_carrier_embeddings():
    embedding = ce.FamilyCarrierEmbedding(8)
    assert embedding.d_model == 8
    assert embedding.family_embedding.weight.shape == embedding.carrier_embedding.weight.shape == (6, 8)
    assert set(embedding.FAMILIES) == ce.REGION_FAMILIES and set(embedding.CARRIERS) == ce.CARRIERS
    assert embedding.family_idx("mood") == len(embedding.FAMILIES)
    assert embedding.carrier_idx("wave") == len(embedding.CARRIERS)
    assert [embedding.family_idx(name) for name in embedding.FAMILIES] == [0, 1, 2, 3, 4]


def test_errors_that_code_matches_on():
    bound = ce.compile_schema(SimpleNamespace(a=ce.Field(2, 2)), d_model=8)
    with pytest.raises(RuntimeError, match="No canvas"):
        bound["a"].place(torch.zeros(1, 9, 8), torch.zeros(1, 4, 8))
    with pytest.raises(ValueError, match="No Field"):
        ce.compile_schema(SimpleNamespace(a=3))
    with pytest.raises(ValueError, match="sundial"):
        ce.ClockExpr.from_dict({"type": "sundial"})


def test_sparse_masks_without_a_pattern_are_full():
    with pytest.warns(UserWarning, match="without a pattern masks nothing"):
        mask = ce.MaskSpec(kind="sparse")
    assert mask.kind == "sparse"
    assert ce.mask_to_index_pairs(mask, LAYOUT, "a", "b") == ce.mask_to_index_pairs(ce.MaskSpec(), LAYOUT, "a", "b")
    x = torch.randn(1, LAYOUT.num_positions, 8)
    found = []
    for fn in ("cross_attention", "perceiver"):
        for t_dst in (None, 0):
            for given in (mask, None):
                topology = ce.CanvasTopology([ce.Connection("a", "b", t_dst=t_dst, fn=fn, mask=given)])
                torch.manual_seed(0)
                found.append((ce.AttentionDispatcher(topology, LAYOUT, 8)(x), topology.to_attention_mask(LAYOUT)))
    for (out, matrix), (full, expected) in zip(found[::2], found[1::2]):
        torch.testing.assert_close(out, full)
        assert torch.equal(matrix, expected) and matrix.any()
    schema = ce.CanvasSchema(LAYOUT, ce.CanvasTopology([ce.Connection("a", "b", mask=mask)]))
    with pytest.warns(UserWarning, match="without a pattern"):
        assert ce.CanvasSchema.from_dict(schema.to_dict()) == schema


# -- text that people read


def test_topologies_are_summed_up():
    predicts = ce.Connection("b", "a", t_src=0, t_dst=-1, operator="predict", temporal_fill=ce.TemporalFill.DROP)
    topology = ce.CanvasTopology.causal_temporal(["a"])
    assert ce.CanvasTopology([*topology.connections, predicts, ce.Connection("b", "b")]).summary().splitlines() == [
        "CanvasTopology: 4 connections among 2 regions",
        "  3 temporal: drop=1, hold=2",
        "  operators: attend=3, predict=1",
        "  a ↺ self, weight 1, fn default, t (0, 0) hold",
        "  a ↺ self, weight 1, fn default, t (0, -1) hold",
        "  b -> a, weight 1, fn default, t (0, -1) drop, operator predict",
        "  b ↺ self, weight 1, fn default",
    ]
    assert ce.CanvasTopology.dense(["a"]).summary().splitlines()[1:] == ["  a ↺ self, weight 1, fn default"]


def test_reprs_name_sizes_on_a_line():
    made = [
        ce.CanvasTopology([ce.Connection("a", "b")]),
        ce.ResidualAccumulator(["a", "b"]),
        ce.SlotBindingModule(8, 3, birth_death=True),
        ce.LearnedScheduler(2, 5, 1),
    ]
    assert list(map(repr, made)) == [
        "CanvasTopology(connections=1, regions=2)",
        "ResidualAccumulator(regions=2, kinds=1, reduce='max_mean', decay=0.95)",
        "SlotBindingModule(d_model=8, n_slots=3, n_heads=4, birth_death=True)",
        "LearnedScheduler(n_regions=2, summary_dim=5, max_active=1, temperature=1)",
    ]
    assert repr(ce.LearnedScheduler(2, None, 1)).startswith("LearnedScheduler(n_regions=2, summary_dim=None, ")
    crowd = ce.CanvasTopology.dense([f"region {number}" for number in range(200)])
    assert repr(crowd) == "CanvasTopology(connections=40000, regions=200)"


# -- names and signatures

SIGNATURES = json.loads(Path(__file__).with_name("public_signatures.json").read_text())
"""Module to name to signature, of 0.5 and what its documentation adds; "Class.name" is a method or a property."""
# at the package's root, where these words would be too short
ROOT_NAMES = {
    **{name: f"clock_{name}" for name in ("periodic", "on", "boundary")},
    **{name: f"Clock{name}" for name in ("Cooldown", "MaxSilence")},
}
# parameter that ours has in the place of theirs; docs/migration.md says why
REPLACED = {
    "LoopedCogVideoXBlock.forward: **kwargs": "attention_kwargs=None",
    # a window of the same width, on grids in two dimensions
    "LocalAttention: window_size=8": "window_size=None",
}


def parameters_of(text):
    """The parameters of a signature that is written as "(a, b=1)"."""
    known = {"FACTORY": "<factory>", "TemporalFill": ce.TemporalFill, "LayoutStrategy": ce.LayoutStrategy}
    return list(inspect.signature(eval(f"lambda {text[1:-1]}: None", known)).parameters.values())


def differences(name, found, text):
    """What a call that 0.5 takes could stumble over."""
    theirs = parameters_of(text)
    ours = [bare(p) for p in inspect.signature(found).parameters.values() if p.name != "self"]
    by_place = [p for p in ours if p.kind is not p.KEYWORD_ONLY]
    for place, parameter in enumerate(theirs):
        by_name = [p for p in ours if p.kind is p.KEYWORD_ONLY and p.name == parameter.name]
        (twin,) = by_name if parameter.kind is parameter.KEYWORD_ONLY else by_place[place : place + 1] or [None]
        if str(twin) not in (str(parameter), REPLACED.get(f"{name}: {parameter}")):
            yield f"{name} takes {twin}, not {parameter}"
    for parameter in ours[len(theirs) :]:
        if parameter.default is parameter.empty and not str(parameter).startswith("*"):
            yield f"{name} wants {parameter} too"


def bare(parameter):
    """A parameter without its annotation, as 0.5 would have it."""
    default = "<factory>" if repr(parameter.default) in ("<factory>", "{}") else parameter.default
    return parameter.replace(annotation=parameter.empty, default=default)


@pytest.mark.parametrize("module", SIGNATURES)
def test_names_and_signatures_are_the_published_ones(module):
    imported, problems = importlib.import_module(module), []
    for name, expected in SIGNATURES[module].items():
        owner, _, attribute = name.partition(".")
        found = getattr(imported, owner, None)
        if found is not getattr(ce, ROOT_NAMES.get(owner, owner), None):
            problems.append(f"{owner} is not at the package's root")
        found = getattr(found, attribute, None) if attribute else found
        if found is None:
            problems.append(f"{name} is gone")
        elif expected == "property":
            problems += [] if isinstance(found, property) else [f"{name} is no property"]
        elif expected == "enum":
            problems += [] if issubclass(found, enum.Enum) else [f"{name} is no enumeration"]
        elif expected[0] != "(":
            kind, _, least = expected.partition(" of ")
            right = type(found).__name__ == kind and len(found) >= int(least)
            problems += [] if right else [f"{name} is a {type(found).__name__} of {len(found)}, was a {expected}"]
        else:
            problems += differences(name, found, expected)
    assert problems == []


# -- docs/migration.md

PAGE = Path(__file__).resolve().parents[2] / "docs/migration.md"
# what the readme of 0.5 asks for
REQUIRED = {
    "Python": ">=3.9",
    "package `torch`": ">=2.0",
    "package `einops`": ">=0.7",
    "extra `cogvideox`": "`diffusers>=0.28`, `transformers>=4.40`, `accelerate`",
    "extra `data`": "`av`, `numpy`, `Pillow`",
    "extra `docs`": "`mkdocs-material>=9.0`, `mkdocstrings[python]>=0.24`, `pymdown-extensions>=10.0`",
}


def page_rows():
    """The rows of the page's one table, as lists of four cells."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def requirements():
    """What pyproject.toml asks for, in the form of REQUIRED."""
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli", reason="reads pyproject.toml")
    project = tomllib.loads((PAGE.parents[1] / "pyproject.toml").read_text())["project"]
    plain = [wanted.partition(";")[0] for wanted in project["dependencies"]]
    packages = (re.fullmatch(r"([\w-]+)(.*)", wanted).groups() for wanted in plain)
    return {
        "Python": project["requires-python"],
        **{f"package `{name}`": bounds for name, bounds in packages},
        **{
            f"extra `{extra}`": ", ".join(f"`{wanted.partition(';')[0]}`" for wanted in names)
            for extra, names in project["optional-dependencies"].items()
            if extra != "dev"
        },
    }


def computed_rows():
    """(what, 0.5, ours) of every difference that can be read off signatures and requirements."""
    ours = requirements()
    for what in [*REQUIRED, *(what for what in ours if what not in REQUIRED)]:
        if REQUIRED.get(what) != ours.get(what):
            yield what, REQUIRED.get(what, "none"), ours.get(what, "none")
    for module, names in SIGNATURES.items():
        for name, text in names.items():
            if text[0] == "(":
                found = operator.attrgetter(name)(importlib.import_module(module))
                now = [bare(p) for p in inspect.signature(found).parameters.values() if p.name != "self"]
                both = (parameters_of(text), now)
                before, now = ([str(p).replace("'<factory>'", "…") for p in each] for each in both)
                gone, new = [p for p in before if p not in now], [p for p in now if p not in before]
                if gone or new:
                    yield f"`{name}`", ", ".join(f"`{p}`" for p in gone) or "without", ", ".join(f"`{p}`" for p in new)


def missing_rows():
    found = [tuple(row[:3]) for row in page_rows()]
    return [f"| {' | '.join(row)} | why? |" for row in computed_rows() if row not in found]


def test_the_migration_page_has_every_difference_and_its_reason():
    rows = page_rows()
    assert [row for row in rows if len(row) != 4 or not all(row)] == []
    assert len({row[0] for row in rows}) == len(rows), "one row for each thing"
    missing = missing_rows()
    assert not missing, "docs/migration.md wants these rows, with their reasons:\n" + "\n".join(missing)


def test_the_migration_page_names_no_difference_that_is_none():
    stated = {tuple(row[:3]) for row in page_rows() if re.match(r"(Python|package|extra)\b", row[0])}
    assert stated <= set(computed_rows())


if __name__ == "__main__":
    print("\n".join(missing_rows()) or "docs/migration.md has them all")
