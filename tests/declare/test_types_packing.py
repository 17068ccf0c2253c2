"""Fields of compiled types on their canvas: random types against an oracle, grids and packing."""

from __future__ import annotations

import itertools
from dataclasses import field as dc_field
from dataclasses import make_dataclass
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from canvas_engineering import (
    CanvasSchema,
    Field,
    LayoutStrategy,
    compile_schema,
)
from tests.declare.test_types import Arm, Robot, pairs_of

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
