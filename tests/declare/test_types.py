"""Compiling types: paths, coarse fields, packing, sizes and wiring, held to what the declaration says."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pickle
import re
import warnings
from collections import namedtuple
from dataclasses import dataclass, make_dataclass
from dataclasses import field as dc_field
from types import SimpleNamespace
from typing import Annotated, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from canvas_engineering import (
    BoundField,
    CanvasSchema,
    ConnectivityPolicy,
    Field,
    LayoutStrategy,
    SpatiotemporalCanvas,
    compile_program,
    compile_schema,
)


@dataclass
class Sensor:
    __coarse__ = Field(2, 4)
    rgb: Field = Field(4, 4)
    depth: Field = Field(2, 3, period=4)


@dataclass
class Arm:
    joints: Field = Field(1, 7)
    grip: Field = Field(1, 2, loss_weight=2.0)


@dataclass
class Robot:
    arms: list = dc_field(default_factory=lambda: [Arm(), Arm()])
    sensor: Sensor = dc_field(default_factory=Sensor)
    safety: Field = Field(2, 2)
    plan: Field = Field(1, 4)


def pairs_of(bound) -> list[tuple[str, str]]:
    return [(c.src, c.dst) for c in bound.topology.connections]


def policy(**kinds) -> ConnectivityPolicy:
    return ConnectivityPolicy(**kinds)


def list_of(n, policy_name, element=Arm):
    root = SimpleNamespace(task=Field(), arms=[element() for _ in range(n)])
    return compile_schema(root, connectivity=policy(array_element=policy_name))


def extra_pairs(n, policy_name, element=Arm) -> set[tuple[str, str]]:
    """What an array policy adds to isolated elements; fails on a pair that comes twice."""
    pairs, isolated = pairs_of(list_of(n, policy_name, element)), pairs_of(list_of(n, "isolated", element))
    assert len(set(pairs)) == len(pairs)
    assert set(isolated) <= set(pairs)
    return set(pairs) - set(isolated)


# -- Field ------------------------------------------------------------------------------------------------------------


def test_field_defaults_and_positions():
    scalar = Field()
    assert (scalar.h, scalar.w, scalar.period, scalar.is_output, scalar.loss_weight) == (1, 1, 1, True, 1.0)
    assert (scalar.attn, scalar.semantic_type, scalar.temporal_extent) == ("cross_attention", None, None)
    assert (scalar.family, scalar.tags, scalar.carrier, scalar.spatial_shape) == (None, (), None, (1, 1))
    assert scalar.num_positions == 1
    assert Field(3, 5).num_positions == 15
    assert Field(spatial_shape=(2, 3, 4)).num_positions == 24
    assert Field(spatial_shape=[2, 3]) == Field(2, 3, spatial_shape=(2, 3))
    assert Field(3, 5, tags=["belief"]).tags == ("belief",)
    assert hash(Field(3, 5)) == hash(Field(3, 5))  # a dataclass takes only hashable defaults


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"h": 0}, "Field h must be at least 1, got 0"),
        ({"w": 2.0}, r"Field w must be an int, got 2\.0"),
        ({"period": 0}, "Field period must be at least 1, got 0"),
        ({"temporal_extent": 0}, "Field temporal_extent must be at least 1, got 0"),
        ({"is_output": 1}, "Field is_output must be a bool, got 1"),
        ({"loss_weight": math.nan}, "Field loss_weight must be a finite number, got nan"),
        ({"loss_weight": "2"}, "Field loss_weight must be a finite number, got '2'"),
        ({"attn": None}, "Field attn must be the name of an attention function, got None"),
        ({"family": 3}, "Field family must be a string, or None, got 3"),
        ({"tags": "belief"}, "Field tags must be a tuple of strings, got 'belief'"),
        ({"spatial_shape": 3}, "Field spatial_shape must be a tuple of ints, got 3"),
        ({"spatial_shape": (2, 0)}, "every size of Field spatial_shape must be at least 1, got 0"),
        ({"h": 2, "spatial_shape": (3, 4)}, r"spatial_shape=\(3, 4\) contradicts h=2, w=1"),
    ],
)
def test_fields_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        Field(**arguments)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: ConnectivityPolicy(intra="full"), "unknown intra policy 'full': choose one of dense, isolated, "),
        (lambda: ConnectivityPolicy(array_element="grid"), "unknown array_element policy 'grid': .*_fields, ring"),
        (lambda: ConnectivityPolicy(temporal="past"), "unknown temporal policy 'past': .* dense, causal, same_frame"),
        (lambda: compile_schema(Arm(), layout_strategy="dense"), "layout_strategy 'dense': .* packed, interleaved"),
        (lambda: compile_schema(Arm(), connectivity="dense"), "connectivity must be a ConnectivityPolicy, got 'dense'"),
    ],
)
def test_unknown_policies_name_the_choices(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# -- which objects, which paths ---------------------------------------------------------------------------------------


def test_own_fields_then_nested_types_then_arrays():
    assert compile_schema(Robot()).field_names == [
        *("safety", "plan", "sensor", "sensor.rgb", "sensor.depth"),
        *("arms[0]", "arms[0].joints", "arms[0].grip", "arms[1]", "arms[1].joints", "arms[1].grip"),
    ]


def test_inherited_fields_come_first():
    @dataclass
    class Camera(Sensor):
        flow: Field = Field(2, 2)
        depth: Field = Field(3, 3)

    bound = compile_schema(SimpleNamespace(eye=Camera()))
    assert bound.field_names == ["eye", "eye.rgb", "eye.depth", "eye.flow"]
    assert bound.layout.region_size("eye.depth") == (1, 3, 3)
    assert bound.layout.region_size("eye") == (1, 2, 4)  # __coarse__ is inherited


def test_plain_objects_hold_fields_in_classes_and_instances():
    class Base:
        camera = Field(2, 3)
        joints = Field(1, 2)
        _hidden = Field(9, 9)
        rate = 30

        def reset(self):
            return None

    class Slotted:
        __slots__ = ("inner",)

        def __init__(self):
            self.inner = Field(1, 5)

    class Derived(Base):
        joints = Field(1, 4)

        def __init__(self):
            self.action = Field()
            self.slotted = Slotted()
            self._private = Field()
            self.notes = {"maker": "none", "sizes": [1, 2]}
            self.table = torch.zeros(3)

    bound = compile_schema(Derived())
    assert bound.field_names == ["camera", "joints", "action", "slotted", "slotted.inner"]
    assert bound.layout.region_size("joints") == (1, 1, 4)


def test_named_tuples_are_types():
    Pose = namedtuple("Pose", "position label heading")
    bound = compile_schema(SimpleNamespace(pose=Pose(Field(1, 3), "base", Field())))
    assert bound.field_names == ["pose", "pose.position", "pose.heading"]


def test_pydantic_models():
    pydantic = pytest.importorskip("pydantic", reason="pydantic is not installed")

    class Eye(pydantic.BaseModel):
        __coarse__ = Field(2, 4)
        rgb: Field = Field(3, 3)

    class Body(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="allow")
        eyes: list[Eye] = []
        left: Annotated[Eye, {"coarse": Field(5, 1)}] = Eye()
        right: Eye = pydantic.Field(default_factory=Eye, json_schema_extra={"coarse": Field(1, 6)})
        name: str = "b"
        action: Field = Field(1, 2)

    class Tall(Body):
        spine: Field = Field(4, 1)

    Tall.model_rebuild(_types_namespace={"Eye": Eye, "Annotated": Annotated, "Field": Field})
    bound = compile_schema(Tall(eyes=[Eye(rgb=Field(1, 1))], tail=Field(1, 9)))
    sizes = {name: bound.layout.region_size(name)[1:] for name in bound.field_names}
    assert list(sizes.items()) == [
        *(("action", (1, 2)), ("spine", (4, 1)), ("tail", (1, 9)), ("left", (5, 1)), ("left.rgb", (3, 3))),
        *(("right", (1, 6)), ("right.rgb", (3, 3)), ("eyes[0]", (2, 4)), ("eyes[0].rgb", (1, 1))),
    ]


def test_one_object_at_two_places_is_two_sets_of_fields():
    arm = Arm()
    bound = compile_schema(SimpleNamespace(task=Field(), left=arm, right=arm, spare=[arm, arm]))
    assert len(bound.field_names) == 13
    assert len({bound.layout.region_spec(name).bounds for name in bound.field_names}) == 13


def test_what_holds_no_field_is_passed_over():
    class Empty:
        note = "nothing"

    root = SimpleNamespace(a=Field(), empty=Empty(), many=[Empty(), Arm(), 3, None], none=[])
    assert compile_schema(root).field_names == ["a", "many[1]", "many[1].joints", "many[1].grip"]


def test_a_type_of_nothing_but_a_coarse_size_is_that_field():
    class Opaque:
        __coarse__ = Field(2, 2, period=3)

    bound = compile_schema(SimpleNamespace(task=Field(), box=Opaque()))
    assert bound.field_names == ["task", "box"]
    assert bound.layout.region_spec("box").period == 3


def test_lists_of_fields_and_of_lists():
    bound = compile_schema(SimpleNamespace(task=Field(), cells=[[Field(1, 2), Field(1, 3)], [Field(1, 4)]]))
    assert bound.field_names == ["task", "cells[0][0]", "cells[0][1]", "cells[1][0]"]
    assert bound.layout.region_size("cells[0][1]") == (1, 1, 3)
    assert bound.layout.region_spec("cells[1][0]").semantic_type == "cells 1 0"
    own = {(name, name) for name in bound.field_names}
    with_task = {pair for name in bound.field_names[1:] for pair in (("task", name), (name, "task"))}
    assert set(pairs_of(bound)) == own | with_task
    ring = compile_schema(
        SimpleNamespace(cells=[Field(), Field(), Field()]), connectivity=policy(array_element="matched_fields")
    )
    assert len(ring.topology.connections) == 3 + 6


def recursive_types():
    loop = SimpleNamespace(a=Field(), inner=SimpleNamespace(b=Field()))
    loop.inner.parent = loop
    below = SimpleNamespace(top=Field(), inner=SimpleNamespace(b=Field()))
    below.inner.again = [below.inner]

    @dataclass
    class Unannotated:
        joints: Field = Field()
        camera = Field(2, 2)

    class Undecorated(Arm):
        extra: Field = Field()

    @dataclass
    class Metadata:
        arm: Arm = dc_field(default_factory=Arm, metadata={"coarse": (2, 2)})

    class BadCoarse:
        __coarse__ = (2, 2)
        x = Field()

    twice = SimpleNamespace(a=SimpleNamespace(b=Field()))
    setattr(twice, "a.b", Field())
    return [
        (loop, "'inner.parent' leads back to 'the root'"),
        (below, r"'inner.again\[0\]' leads back to 'inner'"),
        (Unannotated(), r"Unannotated\.camera is a Field, and not among the dataclass fields"),
        (Undecorated(), r"Undecorated\.extra is a Field, .* decorate Undecorated"),
        (Metadata(), r"coarse size of 'arm' must be a Field, got \(2, 2\)"),
        (SimpleNamespace(b=BadCoarse()), r"coarse size of 'b' must be a Field, got \(2, 2\)"),
        (SimpleNamespace(a=1, b=[2], c=SimpleNamespace()), "No Field .* among the attributes of a SimpleNamespace"),
        (SimpleNamespace(a=Field(), d={"x": Field()}), r"d\['x'\] is declared inside a dict"),
        (SimpleNamespace(a=Field(), d={"x": [Field()]}), r"d\['x'\] is declared inside a dict"),
        (SimpleNamespace(a=Field(), d={"x": {"y": Field()}}), r"d\['x'\]\['y'\] is declared inside a dict"),
        (SimpleNamespace(a=Field(), d=[{"x": Arm()}]), r"d\[0\]\['x'\] is declared inside a dict"),
        (Arm, r"compile an object, not a class: Arm\(\) instead of Arm"),
        ([Arm()], r"compile an object with Field attributes, not a list"),
        (Field(), "compile an object with Field attributes, not a Field"),
        (None, "compile an object with Field attributes, not a NoneType"),
        (twice, "two fields have the path 'a.b'"),
    ]


@pytest.mark.parametrize("root, message", recursive_types())
def test_what_cannot_be_compiled(root, message):
    with pytest.raises(ValueError, match=message):
        compile_schema(root)


def test_a_class_constant_is_no_field():
    @dataclass
    class Sized:
        default: ClassVar[Field] = Field(9, 9)
        a: Field = Field(2, 2)

    assert compile_schema(Sized()).field_names == ["a"]


# -- region specs -----------------------------------------------------------------------------------------------------


def test_fields_become_regions():
    goal = Field(2, 3, 4, False, 0.5, "gated", None, 3, "residual", ("x",))
    root = SimpleNamespace(goal=goal, front_cam=Field(semantic_type="RGB"), filt=Field(carrier="filter"))
    layout = compile_schema(root, T=8, d_model=16, t_current=2).layout
    spec = layout.region_spec("goal")
    assert (layout.T, layout.d_model, layout.t_current) == (8, 16, 2)
    assert layout.region_size("goal") == (3, 2, 3)
    assert spec.bounds[0] == 0
    assert (spec.period, spec.is_output, spec.loss_weight, spec.default_attn) == (4, False, 0.5, "gated")
    assert (spec.semantic_type, spec.carrier) == ("goal", "residual")
    assert layout.region_spec("front_cam").semantic_type == "RGB"
    assert layout.region_spec("front_cam").carrier == "deterministic"
    assert layout.region_spec("filt").carrier == "filter"
    assert layout.region_size("filt")[0] == 8
    assert compile_schema(root, T=2).layout.region_size("goal")[0] == 2  # never longer than the canvas


def test_default_semantic_types_say_the_path_in_words():
    root = SimpleNamespace(units=[SimpleNamespace(front_camera=Field())])
    layout = compile_schema(root).layout
    assert layout.region_spec("units[0].front_camera").semantic_type == "units 0 / front camera"
    assert layout.region_spec("units[0]").semantic_type == "coarse: units[0]"


def test_families_do_not_change_who_reads_whom():
    plain = SimpleNamespace(a=Field(), b=Field())
    told = SimpleNamespace(a=Field(family="observation", tags=("rgb",)), b=Field(family="action", carrier="filter"))
    assert compile_schema(plain).topology == compile_schema(told).topology
    assert {c.operator for c in compile_schema(told).topology.connections} == {"attend"}


# -- coarse fields ----------------------------------------------------------------------------------------------------


def test_coarse_sizes_come_from_metadata_then_class_then_are_scalar():
    @dataclass
    class Body:
        task: Field = Field()
        overridden: Sensor = dc_field(default_factory=Sensor, metadata={"coarse": Field(3, 3)})
        by_class: Sensor = dc_field(default_factory=Sensor)
        scalar: Arm = dc_field(default_factory=Arm)
        listed: list = dc_field(default_factory=lambda: [Sensor(), Arm()], metadata={"coarse": Field(1, 5)})

    layout = compile_schema(Body()).layout
    sizes = {name: layout.region_size(name)[1:] for name in ("overridden", "by_class", "scalar")}
    assert sizes == {"overridden": (3, 3), "by_class": (2, 4), "scalar": (1, 1)}
    assert layout.region_size("listed[0]")[1:] == layout.region_size("listed[1]")[1:] == (1, 5)


def test_coarse_fields_carry_their_template():
    class Told:
        __coarse__ = Field(2, 2, 7, False, 3.0, "pooling", "summary", family="memory", carrier="memory")
        a = Field(1, 3, period=5)

    spec = compile_schema(SimpleNamespace(told=Told())).layout.region_spec("told")
    assert (spec.is_output, spec.loss_weight, spec.default_attn) == (False, 3.0, "pooling")
    assert (spec.semantic_type, spec.carrier) == ("summary", "memory")
    assert spec.period == 7  # as declared, whatever is below
    Told.__coarse__ = Field(2, 2, period=1)
    assert compile_schema(SimpleNamespace(told=Told())).layout.region_spec("told").period == 1
    # a field that names no period says so through copies too
    for copied in (dataclasses.replace(Field(1, 1), semantic_type="x"), pickle.loads(pickle.dumps(Field(1, 1)))):
        Told.__coarse__ = copied
        assert compile_schema(SimpleNamespace(told=Told())).layout.region_spec("told").period == 5
    by_attribute = make_dataclass(
        "Told", [("told", object, dc_field(default_factory=Arm, metadata={"coarse": Field(1, 2, period=3)}))]
    )
    assert compile_schema(by_attribute()).layout.region_spec("told").period == 3


def test_an_annotated_coarse_size_is_no_region():
    @dataclass
    class Annotated:
        __coarse__: Field = Field(2, 4)
        x: Field = Field()

    @dataclass(slots=True)
    class Slotted:
        x: Field = Field()
        __coarse__: Field = dc_field(default_factory=lambda: Field(1, 6))

    @dataclass
    class Root:
        __coarse__: Field = Field(9, 9)
        p: Field = Field()
        a: Annotated = dc_field(default_factory=Annotated)
        b: Annotated = dc_field(default_factory=lambda: Annotated(Field(3, 3)))
        c: Slotted = dc_field(default_factory=Slotted)

    layout = compile_schema(Root()).layout
    sizes = {name: layout.region_size(name)[1:] for name in layout.regions}
    assert sizes == {"p": (1, 1), "a": (2, 4), "a.x": (1, 1), "b": (3, 3), "b.x": (1, 1), "c": (1, 6), "c.x": (1, 1)}

    pydantic = pytest.importorskip("pydantic", reason="pydantic is not installed")

    class Model(pydantic.BaseModel):
        __coarse__: ClassVar[Field] = Field(2, 5)
        x: Field = Field()

    layout = compile_schema(SimpleNamespace(p=Field(), m=Model())).layout
    assert list(layout.regions) == ["p", "m", "m.x"] and layout.region_size("m")[1:] == (2, 5)


def test_coarse_periods_are_means_weighted_by_positions():
    def period_of(**fields):
        return compile_schema(SimpleNamespace(c=SimpleNamespace(**fields))).layout.region_spec("c").period

    assert period_of(a=Field(4, 4), b=Field(2, 3, period=4)) == 2  # (16 + 24) / 22 = 1.82
    assert period_of(a=Field(1, 1, period=8), b=Field(1, 3, period=1)) == 3  # 11 / 4 = 2.75
    assert period_of(a=Field(9, 9)) == 1
    nested = SimpleNamespace(x=Field(1, 2, period=16), parts=[SimpleNamespace(y=Field(1, 2, period=8))] * 2)
    assert period_of(a=Field(1, 2, period=4), inner=nested) == 9  # (8 + 32 + 16 + 16) / 8, coarse fields not counted


# -- wiring -----------------------------------------------------------------------------------------------------------


def test_parents_read_children_through_their_coarse_field_only():
    @dataclass
    class Leaf:
        x: Field = Field()

    @dataclass
    class Middle:
        m: Field = Field()
        leaf: Leaf = dc_field(default_factory=Leaf)

    bound = compile_schema(SimpleNamespace(top=Field(), mid=Middle()))
    expected = {(name, name) for name in ("top", "mid", "mid.m", "mid.leaf", "mid.leaf.x")}
    levels = [("top", "mid"), ("mid", "mid.m"), ("mid.m", "mid.leaf"), ("mid", "mid.leaf"), ("mid.leaf", "mid.leaf.x")]
    expected |= {pair for a, b in levels for pair in ((a, b), (b, a))}
    assert set(pairs_of(bound)) == expected
    assert len(pairs_of(bound)) == len(expected)


def test_coarse_siblings_are_not_connected():
    pairs = set(pairs_of(compile_schema(SimpleNamespace(task=Field(), left=Arm(), right=Arm()))))
    assert {("left", "task"), ("task", "right")} <= pairs
    assert not {("left", "right"), ("right", "left"), ("left", "right.grip"), ("left.grip", "right.grip")} & pairs


APART = r"the root has no field of its own, through which \d+ parts could be connected; unconnected are "


def apart_of(root, array_element="isolated"):
    """The warning of parts that nothing connects; None where there is none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compile_schema(root, connectivity=policy(array_element=array_element))
    assert len(caught) <= 1 and all(warning.filename == __file__ for warning in caught)
    return str(caught[0].message) if caught else None


def test_parts_of_a_root_without_a_field_are_named_once():
    two = SimpleNamespace(left=Arm(), right=Arm())
    message = apart_of(two)
    assert re.match(APART + r"'left', 'right'. Give it a field$", message)
    # the topology stays as published
    with pytest.warns(UserWarning, match=APART):
        pairs = set(pairs_of(compile_schema(two)))
    assert not {(src, dst) for src, dst in pairs if src[:4] != dst[:4]}
    with pytest.warns(UserWarning, match=APART) as caught:
        compile_program(two)
    assert len(caught) == 1
    # a field, a single part, or a level between them
    for joined in (SimpleNamespace(task=Field(), left=Arm(), right=Arm()), SimpleNamespace(left=Arm())):
        assert apart_of(joined) is None
    assert "'a', 'b', 'c', 'd', 'e', 'f', ..." in apart_of(SimpleNamespace(**{name: Arm() for name in "abcdefgh"}))


def test_parts_of_nested_objects_without_a_field_are_named_in_the_same_warning():
    two = SimpleNamespace(left=Arm(), right=Arm())
    message = apart_of(SimpleNamespace(body=two))
    assert "'body' has no field of its own" in message and "unconnected are 'body.left', 'body.right' (" in message
    message = apart_of(SimpleNamespace(here=two, there=two))
    assert "the root, 'here', 'there' have no field of their own, through which 6 parts" in message
    assert apart_of(SimpleNamespace(body=SimpleNamespace(pose=Field(), left=Arm(), right=Arm()))) is None


def test_lists_of_a_root_without_a_field_go_by_their_policy():
    arms = SimpleNamespace(arms=[Arm(), Arm()])
    message = apart_of(arms)
    assert "'arms[0]', 'arms[1]'" in message and "by the array_element policy 'dense' or 'ring'" in message
    assert all(apart_of(arms, name) is None for name in ("dense", "ring", "matched_fields"))
    mixed = SimpleNamespace(x=[Arm(), Sensor(), Arm()])
    assert apart_of(mixed, "dense") is None and "which 3 parts" in apart_of(mixed, "matched_fields")
    both = SimpleNamespace(a=Field(), b=Field())
    bridge = SimpleNamespace(x=[SimpleNamespace(a=Field()), SimpleNamespace(b=Field()), both])
    assert apart_of(bridge, "matched_fields") is None and "which 3 parts" in apart_of(bridge)
    assert apart_of(SimpleNamespace(x=[Field(), Field()]), "matched_fields") is None
    # two lists do not meet, whatever the policy
    message = apart_of(SimpleNamespace(left=[Arm()] * 2, right=[Arm()] * 2), "dense")
    assert "'left[0]', 'left[1]', 'right[0]', 'right[1]'" in message and "array_element" not in message


INTRA = {
    "dense": {(a, b) for a in "abc" for b in "abc"},
    "isolated": {("a", "a"), ("b", "b"), ("c", "c")},
    "causal_chain": {("a", "a"), ("b", "b"), ("c", "c"), ("b", "a"), ("c", "b")},
    "star": {("a", "a"), ("b", "b"), ("c", "c"), ("a", "b"), ("b", "a"), ("a", "c"), ("c", "a")},
}


@pytest.mark.parametrize("name", INTRA)
def test_intra_policies(name):
    root = SimpleNamespace(a=Field(), b=Field(), c=Field())
    pairs = pairs_of(compile_schema(root, connectivity=policy(intra=name)))
    assert set(pairs) == INTRA[name]
    assert len(pairs) == len(INTRA[name])
    nested = pairs_of(compile_schema(SimpleNamespace(part=root), connectivity=policy(intra=name)))
    inner = {("part." + a, "part." + b) for a, b in INTRA[name]}
    coarse = {("part", "part")} | {pair for x in "abc" for pair in (("part", "part." + x), ("part." + x, "part"))}
    assert set(nested) == inner | coarse


def test_dense_arrays():
    names = [f"arms[{i}]" for i in range(4)]
    assert extra_pairs(4, "dense") == set(itertools.permutations(names, 2))


def test_ring_arrays():
    both = {("arms[0]", "arms[1]"), ("arms[1]", "arms[0]")}
    assert extra_pairs(1, "ring") == set()
    assert extra_pairs(2, "ring") == both
    around = {(f"arms[{i}]", f"arms[{(i + d) % 5}]") for i in range(5) for d in (1, -1)}
    assert extra_pairs(5, "ring") == around


def test_matched_fields_of_arrays():
    expected = {
        (f"arms[{i}].{name}", f"arms[{j}].{name}")
        for name in ("joints", "grip")
        for i, j in itertools.permutations(range(3), 2)
    }
    assert extra_pairs(3, "matched_fields") == expected
    mixed_list = SimpleNamespace(x=[Arm(), Sensor(), Arm()])
    with pytest.warns(UserWarning, match=APART + r"'x\[0\]', 'x\[2\]', 'x\[1\]'"):
        mixed = compile_schema(mixed_list, connectivity=policy(array_element="matched_fields"))
    across = {pair for pair in pairs_of(mixed) if pair[0][:4] != pair[1][:4]}
    assert across == {
        *(("x[0].joints", "x[2].joints"), ("x[2].joints", "x[0].joints")),
        *(("x[0].grip", "x[2].grip"), ("x[2].grip", "x[0].grip")),
    }


def test_arrays_are_wired_one_by_one():
    root = SimpleNamespace(task=Field(), left=[Arm(), Arm()], right=[Arm(), Arm()])
    pairs = set(pairs_of(compile_schema(root, connectivity=policy(array_element="dense"))))
    assert ("left[0]", "left[1]") in pairs
    assert not {(src, dst) for src, dst in pairs if "task" not in (src, dst) and src[0] != dst[0]}


def test_temporal_policies():
    root = SimpleNamespace(a=Field(), b=Field())

    def edges(temporal):
        connections = compile_schema(root, T=2, connectivity=policy(temporal=temporal)).topology.connections
        return sorted((c.src, c.dst, c.t_src, c.t_dst) for c in connections)

    everyone = [("a", "a"), ("a", "b"), ("b", "a"), ("b", "b")]
    assert edges("dense") == [(*pair, None, None) for pair in everyone]
    assert edges("same_frame") == [(*pair, 0, 0) for pair in everyone]
    assert edges("causal") == [
        *(("a", "a", 0, -1), ("a", "a", 0, 0), ("a", "b", 0, -1)),
        *(("b", "a", 0, -1), ("b", "b", 0, -1), ("b", "b", 0, 0)),
    ]


# -- random types against an oracle -----------------------------------------------------------------------------------

names = st.integers(1, 3)
fields = st.builds(Field, st.integers(1, 4), st.integers(1, 4), period=st.integers(1, 5))
WITHOUT_PERIOD = 5  # rows that tell fields which name no period from those that do
coarse_fields = st.one_of(st.none(), fields, st.builds(Field, st.just(WITHOUT_PERIOD), st.integers(1, 4)))
trees = st.recursive(
    st.fixed_dictionaries({"own": st.lists(fields, min_size=1, max_size=3)}),
    lambda inner: st.fixed_dictionaries(
        {
            "own": st.lists(fields, max_size=3),
            "nested": st.lists(inner, max_size=2),
            "arrays": st.lists(st.lists(inner, min_size=1, max_size=3), max_size=2),
            "coarse": coarse_fields,
        }
    ),
    max_leaves=6,
)


def build(tree):
    """A dataclass instance of the tree, its attributes deliberately in another order than fields come out."""
    members = [(f"many{i}", [build(t) for t in elements], {}) for i, elements in enumerate(tree.get("arrays", []))]
    for i, child in enumerate(tree.get("nested", [])):
        members.append((f"part{i}", build(child), {"coarse": child["coarse"]} if child.get("coarse") else {}))
    members += [(f"f{i}", declared, {}) for i, declared in enumerate(tree["own"])]
    cls = make_dataclass("Type", [(name, object, dc_field(metadata=metadata)) for name, _, metadata in members])
    return cls(*(value for _, value, _ in members))


def join(path, name):
    return name if path == "" else path + "." + name


def expected(tree, path=""):
    """(fields, pairs): path to (h, w, period) in order, and the default wiring, from the words of the docs."""
    own = [join(path, f"f{i}") for i in range(len(tree["own"]))]
    regions = {name: (f.h, f.w, f.period) for name, f in zip(own, tree["own"])}
    pairs = [(a, b) for a in own for b in own]
    children = [(join(path, f"part{i}"), child, child.get("coarse")) for i, child in enumerate(tree.get("nested", []))]
    for i, elements in enumerate(tree.get("arrays", [])):
        children += [(join(path, f"many{i}") + f"[{j}]", child, None) for j, child in enumerate(elements)]
    for name, child, coarse in children:
        below, below_pairs = expected(child, name)
        if not below:
            continue
        declared = [f for f in leaves(child)]
        mean = sum(f.h * f.w * f.period for f in declared) / sum(f.h * f.w for f in declared)
        size = coarse or Field()
        declares = coarse is not None and size.h != WITHOUT_PERIOD
        regions[name] = (size.h, size.w, size.period if declares else max(1, round(mean)))
        regions |= below
        level_above = own + ([path] if path else [])
        level_below = [join(name, f"f{i}") for i in range(len(child["own"]))]
        pairs.append((name, name))
        for other in level_above + level_below:
            pairs += [(name, other), (other, name)]
        pairs += below_pairs
    return regions, pairs


def leaves(tree):
    yield from tree["own"]
    for child in [*tree.get("nested", []), *itertools.chain(*tree.get("arrays", []))]:
        yield from leaves(child)


@given(trees, st.sampled_from(["packed", "interleaved"]))
@settings(max_examples=60)
@pytest.mark.filterwarnings("ignore:.* no field of (its|their) own:UserWarning")
def test_random_types(tree, strategy):
    # A coarse size alone makes a type too; here only what has fields counts.
    if not list(leaves(tree)) or any(not list(leaves(t)) for t in inner_trees(tree)):
        return
    regions, pairs = expected(tree)
    bound = compile_schema(build(tree), T=2, layout_strategy=strategy)
    layout = bound.layout
    found = {name: (*layout.region_size(name)[1:], layout.region_spec(name).period) for name in bound.fields}
    assert list(found.items()) == list(regions.items())
    assert sorted(pairs_of(bound)) == sorted(pairs)
    assert int(disjoint_cover(bound).sum()) == sum(h * w for h, w, _ in regions.values())
    assert CanvasSchema.from_dict(bound.schema.to_dict()) == bound.schema


def inner_trees(tree):
    for child in [*tree.get("nested", []), *itertools.chain(*tree.get("arrays", []))]:
        yield child
        yield from inner_trees(child)


def disjoint_cover(bound) -> torch.Tensor:
    """bool: the cells that some region holds; fails where two do."""
    count = torch.zeros(bound.layout.spatial_shape, dtype=torch.int64)
    for name in bound.field_names:
        bounds = bound.layout.region_spec(name).bounds[2:]
        count[tuple(slice(low, high) for low, high in zip(bounds[::2], bounds[1::2]))] += 1
    assert int(count.max()) <= 1
    return count > 0


# -- packing ----------------------------------------------------------------------------------------------------------


def starts(bound):
    return {name: bound.layout.region_spec(name).bounds[2::2] for name in bound.field_names}


def test_strips_run_left_to_right_and_are_as_high_as_their_highest():
    root = SimpleNamespace(a=Field(2, 5), b=Field(3, 4), c=Field(1, 3), d=Field(1, 2), e=Field(1, 9))
    assert starts(compile_schema(root, H=9, W=10)) == {"a": (0, 0), "b": (0, 5), "c": (3, 0), "d": (3, 3), "e": (4, 0)}


def test_interleaving_groups_equal_local_names():
    root = SimpleNamespace(task=Field(1, 2), arms=[Arm(), Arm()])
    packed = starts(compile_schema(root, H=8, W=40))
    assert [name for name, _ in sorted(packed.items(), key=lambda item: item[1])] == [
        *("task", "arms[0]", "arms[0].joints", "arms[0].grip", "arms[1]", "arms[1].joints", "arms[1].grip")
    ]
    for strategy in ("interleaved", LayoutStrategy.INTERLEAVED):
        bound = compile_schema(root, H=8, W=40, layout_strategy=strategy)
        assert [name for name, _ in sorted(starts(bound).items(), key=lambda item: item[1])] == [
            *("task", "arms[0]", "arms[1]", "arms[0].joints", "arms[1].joints", "arms[0].grip", "arms[1].grip")
        ]
        assert bound.field_names == list(packed)  # only places change


def test_one_dimension_is_end_to_end():
    root = SimpleNamespace(a=Field(2, 3), b=Field(), c=Field(spatial_shape=(5,)))
    bound = compile_schema(root, spatial_shape=(12,))
    assert starts(bound) == {"a": (0,), "b": (6,), "c": (7,)}
    auto = compile_schema(SimpleNamespace(a=Field(spatial_shape=(9,)), b=Field(), c=Field(spatial_shape=(10,))))
    assert auto.layout.spatial_shape == (23,)  # ceil(20 * 1.15)


def test_three_dimensions_are_stacked():
    root = SimpleNamespace(a=Field(spatial_shape=(2, 3, 4)), b=Field(spatial_shape=(1, 5, 2)), c=Field(2, 3), d=Field())
    bound = compile_schema(root, spatial_shape=(5, 5, 4))
    assert starts(bound) == {"a": (0, 0, 0), "b": (2, 0, 0), "c": (3, 0, 0), "d": (4, 0, 0)}
    assert bound.layout.region_size("c") == (1, 1, 2, 3)
    auto = compile_schema(root).layout.spatial_shape
    assert auto == (5, 5, 4)  # side ceil((41 * 1.15) ** (1/3)) = 4, the stack 5 high, the largest 5 and 4


def test_automatic_sizes_in_two_dimensions():
    robot = SimpleNamespace(camera=Field(12, 12), joints=Field(1, 8), action=Field(1, 8))
    # W = ceil(sqrt(160 * 1.15)) = 14: three strips, 14 high; H = ceil(14 * 1.15)
    assert compile_schema(robot).layout.spatial_shape == (17, 14)
    assert compile_schema(SimpleNamespace(a=Field(1, 30), b=Field(3, 1))).layout.spatial_shape == (5, 30)
    assert compile_schema(robot, W=28).layout.spatial_shape == (14, 28)  # one strip, ceil(12 * 1.15)
    assert compile_schema(robot, H=14).layout.spatial_shape[0] == 14
    assert compile_schema(SimpleNamespace(a=Field(), b=Field())).layout.spatial_shape == (2, 2)


def test_a_given_height_is_kept_with_any_width_that_takes():
    root = SimpleNamespace(a=Field(2, 3), b=Field(2, 3), c=Field(2, 3), d=Field(1, 4))
    layout = compile_schema(root, H=2).layout
    assert layout.H == 2
    assert layout.W >= 13  # one strip
    disjoint_cover(compile_schema(root, H=2))


@pytest.mark.parametrize("n_dims", [1, 2, 3, 4])
@given(data=st.data())
@settings(max_examples=40)
def test_automatic_sizes_always_fit(n_dims, data):
    shapes = st.tuples(*[st.integers(1, 7)] * n_dims)
    drawn = data.draw(st.lists(shapes, min_size=1, max_size=9))
    declared = {f"f{i}": Field(spatial_shape=shape) for i, shape in enumerate(drawn)}
    strategy = data.draw(st.sampled_from(list(LayoutStrategy)))
    bound = compile_schema(SimpleNamespace(**declared), T=1, layout_strategy=strategy)
    assert bound.layout.n_spatial_dims == n_dims
    assert {name: bound.layout.region_size(name)[1:] for name in declared} == dict(zip(declared, drawn))
    assert int(disjoint_cover(bound).sum()) == sum(f.num_positions for f in declared.values())


def test_the_grid_may_be_given_either_way():
    shaped, named = compile_schema(Robot(), spatial_shape=(9, 20)), compile_schema(Robot(), H=9, W=20)
    assert shaped.schema == named.schema
    assert compile_schema(Robot(), 1, (9, 20), 64).schema == named.schema


@pytest.mark.parametrize(
    "grid, message",
    [
        ({"H": 3, "W": 8}, r"field 'sensor' of shape \(2, 4\) does not fit the grid \(3, 8\): .* need \(12, 8\)"),
        ({"H": 40, "W": 6}, r"field 'arms\[0\].joints' of shape \(1, 7\) .* the 11 fields, .* need \(40, 7\)"),
        ({"spatial_shape": (55,)}, r"field 'arms\[1\]\.joints' of shape \(7,\) .* the grid \(55,\): .* need \(58,\)"),
        ({"spatial_shape": (3, 9, 9)}, r"field 'sensor.rgb' of .* the grid \(3, 9, 9\): .* need \(11, 9, 9\)"),
        ({"spatial_shape": (20, 9, 3)}, r"field 'plan' of shape \(1, 1, 4\) .* need \(20, 9, 7\)"),
        ({"spatial_shape": (9, 9), "H": 9}, r"Cannot specify both: .*spatial_shape=\(9, 9\) or H=9, W=None"),
        ({"spatial_shape": 9}, "spatial_shape must be a tuple of ints, got 9"),
        ({"spatial_shape": (9, 0)}, "every size of spatial_shape must be at least 1, got 0"),
        ({"W": 0}, "compile_schema W must be at least 1, got 0"),
        ({"H": 1}, r"field 'safety' of shape \(2, 2\) does not fit the grid \(1, \d+\)"),
        ({"T": 0}, "compile_schema T must be at least 1, got 0"),
    ],
)
def test_grids_that_do_not_fit(grid, message):
    with pytest.raises(ValueError, match=message):
        compile_schema(Robot(), **grid)


def test_a_field_of_too_many_dimensions():
    with pytest.raises(ValueError, match=r"field 'v' of shape \(2, 3, 4\) does not fit a grid of 2 spatial dimensions"):
        compile_schema(SimpleNamespace(v=Field(spatial_shape=(2, 3, 4))), spatial_shape=(9, 9))
    flat = compile_schema(SimpleNamespace(v=Field(spatial_shape=(2, 1, 4)), s=Field(spatial_shape=(1, 1, 1))), H=9, W=9)
    assert flat.layout.region_size("v") == (1, 2, 4)
    assert flat.layout.region_size("s") == (1, 1, 1)


# -- what comes out ---------------------------------------------------------------------------------------------------


def test_bound_fields_place_and_extract():
    torch.manual_seed(0)
    bound = compile_schema(Robot(), T=2, d_model=8)
    field = bound["sensor.rgb"]
    assert isinstance(field, BoundField)
    assert (field.region_name, field.num_positions) == ("sensor.rgb", 32)
    assert field.spec == bound.layout.region_spec("sensor.rgb")
    assert field.indices() == bound.layout.region_indices("sensor.rgb")
    batch = bound.create_batch(3)
    assert batch.shape == (3, bound.layout.num_positions, 8)
    embeddings = torch.randn(3, 32, 8)
    placed = field.place(batch, embeddings)
    identity = bound.canvas.modality_embeddings["sensor__rgb"] + bound.canvas.period_embedding(1)
    assert torch.equal(field.extract(placed), placed[:, field.indices()])
    torch.testing.assert_close(field.extract(placed), embeddings + identity)
    rest = [i for i in range(batch.shape[1]) if i not in set(field.indices())]
    assert torch.equal(placed[:, rest], batch[:, rest])
    with pytest.raises(ValueError, match=r"embeddings of shape \(3, 5, 8\) do not fit region 'sensor.rgb'"):
        field.place(batch, embeddings[:, :5], strict=True)


def test_another_canvas_may_be_passed():
    bound = compile_schema(Robot(), d_model=8)
    canvas = SpatiotemporalCanvas(bound.layout)
    batch = canvas.create_empty(1)
    placed = bound["plan"].place(batch, torch.zeros(1, 4, 8), canvas)
    assert torch.equal(bound["plan"].extract(placed, canvas), canvas.extract(placed, "plan"))
    assert bound.canvas is None


def test_fields_without_a_canvas_say_so():
    bound = compile_schema(Robot(), d_model=8)
    batch = torch.zeros(1, bound.layout.num_positions, 8)
    with pytest.raises(RuntimeError, match=r"No canvas: field 'plan' .* call build_canvas\(\)"):
        bound["plan"].extract(batch)
    with pytest.raises(RuntimeError, match="No canvas: field 'plan'"):
        bound["plan"].place(batch, torch.zeros(1, 4, 8))


def test_schemas_answer_by_path():
    bound = compile_schema(Robot())
    assert "arms[1].grip" in bound
    assert "arms[2]" not in bound
    assert list(bound.fields) == bound.field_names
    assert bound.fields["plan"].spec == bound["plan"].spec == bound.region_specs["plan"]
    assert (bound.layout, bound.topology) == (bound.schema.layout, bound.schema.topology)
    with pytest.raises(KeyError, match=r"no field 'arms\[2\]'; its fields: 'safety', 'plan'"):
        bound["arms[2]"]


def test_build_canvas_is_kept():
    bound = compile_schema(Arm(), d_model=8)
    canvas = bound.build_canvas()
    assert bound.canvas is canvas
    bound.create_batch(1)
    assert bound.canvas is canvas


def test_semantic_conditioner_of_a_schema():
    bound = compile_schema(Robot(), d_model=8)
    asked = []

    def embed(texts):
        asked.append(texts)
        return [[float(len(text)), 1.0, -2.0] for text in texts]

    conditioner = bound.build_semantic_conditioner(embed, embed_dim=3, freeze_embeddings=False, learn_residuals=False)
    assert asked == [[bound.layout.region_spec(name).semantic_type for name in bound.field_names]]
    assert conditioner.region_names == sorted(bound.field_names)
    assert conditioner.residuals is None
    row = conditioner.region_names.index("sensor")
    assert dict(conditioner.named_parameters())["_embeddings"][row].tolist() == [len("coarse: sensor"), 1.0, -2.0]
    canvas = bound.build_canvas(conditioner)
    assert canvas.modality_embeddings is None
    placed = bound["plan"].place(bound.create_batch(1), torch.zeros(1, 4, 8))
    expected = conditioner.get_conditioning("plan") + canvas.period_embedding(1)
    torch.testing.assert_close(bound["plan"].extract(placed), expected.expand(1, 4, 8))


def test_summary_says_what_was_compiled():
    root = SimpleNamespace(goal=Field(2, 3, 4, False, 0.5, "gated"), action=Field())
    assert compile_schema(root, T=2, H=4, W=4, d_model=16).summary().splitlines() == [
        "BoundSchema: 2 fields, 4 connections, canvas (T=2, (4, 4)) of 32 positions, 44 % used, d_model=16",
        "  goal    2 frames of 2 x 3, period 4, input only, loss x 0.5, gated",
        "  action  2 frames of 1 x 1",
    ]


def test_json_round_trip():
    bound = compile_schema(Robot(), T=3, connectivity=policy(temporal="causal"))
    assert CanvasSchema.from_dict(bound.schema.to_dict()) == bound.schema


def test_fields_are_values():
    field = Field(2, 3, period=2)
    assert dataclasses.replace(field, period=3) == Field(2, 3, period=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        field.h = 3
