"""A tree of types and a policy → the connections between its fields."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise, permutations

from canvas_engineering.connectivity import CanvasTopology, Connection
from canvas_engineering.notices import join_truncated, warn
from canvas_engineering.types.declare import ConnectivityPolicy
from canvas_engineering.types.walk import TypeNode


class _Pairs:
    """(src, dst) pairs as two lists of names: half a million tuples would be half a million objects to collect."""

    def __init__(self) -> None:
        self.src: list[str] = []
        self.dst: list[str] = []

    def add(self, src: str, dst: str) -> None:
        self.src.append(src)
        self.dst.append(dst)

    def both_ways(self, one: str, others: Iterable[str]) -> None:
        for other in others:
            self.src += one, other
            self.dst += other, one


def wire(root: TypeNode, policy: ConnectivityPolicy) -> CanvasTopology:
    """Returns the connections of a tree, none of them twice; from each type on down: its own fields, then child by
    child."""
    pairs = _Pairs()
    _collect(root, policy, pairs)
    if policy.temporal == "dense":
        return CanvasTopology(list(map(Connection, pairs.src, pairs.dst)))
    connections = []
    for src, dst in zip(pairs.src, pairs.dst):
        if policy.temporal == "same_frame" or src == dst:
            connections.append(Connection(src, dst, t_src=0, t_dst=0))
        if policy.temporal == "causal":
            connections.append(Connection(src, dst, t_src=0, t_dst=-1))
    return CanvasTopology(connections)


def warn_of_parts_apart(root: TypeNode, policy: ConnectivityPolicy) -> None:
    """One UserWarning that names all objects without a field of their own, and the parts they leave unconnected.

    Parts of a nested object are still connected at the few positions of its coarse field; the root has none.
    """
    parents, parts, split, nodes = [], [], False, [root]
    for node in nodes:  # grows during iteration
        nodes += node.children()
        if node.own:
            continue
        lists = [_groups(elements, policy.array_element) for elements in node.arrays]
        if len(node.nested) + sum(map(len, lists)) > 1:
            parents.append(repr(node.path) if node.path else "the root")
            parts += [child.path for child in node.nested]
            parts += [path for groups in lists for group in groups for path in group]
            split |= any(len(groups) > 1 for groups in lists)
    if parents:
        several = len(parents) > 1
        warn(
            f"{join_truncated(parents)} {'have no field of their own' if several else 'has no field of its own'}, "
            f"through which {len(parts)} parts could be connected; unconnected are {join_truncated(map(repr, parts))}"
            + " (parts of a nested object share its coarse field only)" * (parents != ["the root"])
            + f". Give {'each' if several else 'it'} a field"
            + ", or connect the elements of a list by the array_element policy 'dense' or 'ring'" * split
        )


def _groups(elements: list[TypeNode], policy: str) -> list[list[str]]:
    """Paths of a list's elements, those together that its policy connects."""
    if policy in ("dense", "ring"):
        return [[element.path for element in elements]]
    if policy == "isolated":
        return [[element.path] for element in elements]
    names = {element.path: [*element.own, *[""] * element.is_field] for element in elements}
    having: dict[str, list[str]] = {}
    for path in names:
        for name in names[path]:
            having.setdefault(name, []).append(path)
    groups, done = [], set()
    for path in names:
        group, pending = [], [path]
        while pending:
            one = pending.pop()
            if one in done:
                continue
            done.add(one)
            group.append(one)
            for name in names[one]:
                pending += having.pop(name, ())
        groups += [group] * bool(group)
    return groups


def _collect(node: TypeNode, policy: ConnectivityPolicy, pairs: _Pairs) -> None:
    own = node.own_paths()
    _intra(own, policy.intra, pairs)
    # A coarse field speaks for its type one level up, and to the coarse fields one level down: a chain of levels.
    parents = own if node.coarse is None else [node.path, *own]
    for child in node.children():
        pairs.add(child.path, child.path)
        pairs.both_ways(child.path, parents)
        pairs.both_ways(child.path, child.own_paths())
        _collect(child, policy, pairs)
    for elements in node.arrays:
        _array(elements, policy.array_element, pairs)


def _intra(paths: list[str], policy: str, pairs: _Pairs) -> None:
    if policy == "dense":
        pairs.src += [path for path in paths for _ in paths]
        pairs.dst += paths * len(paths)
        return
    pairs.src += paths
    pairs.dst += paths
    if policy == "causal_chain":
        pairs.src += paths[1:]
        pairs.dst += paths[:-1]
    elif policy == "star" and paths:
        pairs.both_ways(paths[0], paths[1:])


def _array(elements: list[TypeNode], policy: str, pairs: _Pairs) -> None:
    paths = [element.path for element in elements]
    if policy == "dense":
        _all_ordered(paths, pairs)
    elif policy == "ring":
        for here, following in pairwise(paths):
            pairs.both_ways(here, [following])
        if len(paths) > 2:  # of two elements, each is the other's neighbour already
            pairs.both_ways(paths[-1], paths[:1])
    elif policy == "matched_fields":
        by_name: dict[str, list[str]] = {}
        for element in elements:
            for name in element.own:
                by_name.setdefault(name, []).append(element.child_path(name))
            if element.is_field:
                by_name.setdefault("", []).append(element.path)  # a list of Fields: the list's name is all they have
        for matched in by_name.values():
            _all_ordered(matched, pairs)


def _all_ordered(paths: list[str], pairs: _Pairs) -> None:
    for src, dst in permutations(paths, 2):
        pairs.add(src, dst)
