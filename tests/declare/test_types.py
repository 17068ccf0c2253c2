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

from canvas_engineering import (
    ConnectivityPolicy,
    Field,
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


# -- what comes out ---------------------------------------------------------------------------------------------------
