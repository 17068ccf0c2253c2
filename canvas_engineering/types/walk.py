"""An object hierarchy → a tree of types: whose fields are whose."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from canvas_engineering.checked import DEEPEST, shown
from canvas_engineering.types.declare import Field, UndeclaredPeriod

# Values that declare nothing. Everything else may be a plain object with Fields among its attributes.
_OPAQUE = (
    *(str, bytes, int, float, complex, type(None), type, set, frozenset, enum.Enum, np.ndarray, np.generic),
    *(torch.Tensor, torch.dtype, torch.device, types.ModuleType, types.FunctionType, types.BuiltinFunctionType),
    *(types.MethodType, Field),
)


@dataclass(slots=True, eq=False)
class TypeNode:
    """One object of the hierarchy.

    Attributes:
        path: where it stands, such as ``vehicles[3]``; empty for the root.
        coarse: the field at that path: the parent's view of the object; None for the root. An array element that is
            itself a Field has that here, and nothing below.
        own: local name to Field, of the object's own attributes.
        nested: objects among its attributes.
        arrays: elements of each list among its attributes.
        positions, period_sum: of all declared fields from here on down: positions per frame, and Σ positions · period.
    """

    path: str
    coarse: Field | None = None
    own: dict[str, Field] = field(default_factory=dict)
    nested: list[TypeNode] = field(default_factory=list)
    arrays: list[list[TypeNode]] = field(default_factory=list)
    positions: int = 0
    period_sum: int = 0

    def child_path(self, name: str) -> str:
        """Returns path of an attribute of the object."""
        return f"{self.path}.{name}" if self.path else name

    def own_paths(self) -> list[str]:
        """Paths of the object's own fields."""
        return [self.child_path(name) for name in self.own]

    @property
    def is_field(self) -> bool:
        """Whether this is an array element that is itself a Field."""
        return self.coarse is not None and not (self.own or self.nested or self.arrays)

    def children(self) -> Iterator[TypeNode]:
        """Returns nested objects, then array elements."""
        yield from self.nested
        for elements in self.arrays:
            yield from elements

    def fields(self) -> Iterator[tuple[str, Field]]:
        """Returns path and Field of every region from here on down: coarse, own, then each child's."""
        if self.coarse is not None:
            yield self.path, self.coarse
        for name, declared in self.own.items():
            yield self.child_path(name), declared
        for child in self.children():
            yield from child.fields()

    def count(self, declared: Field) -> None:
        self.positions += declared.num_positions
        self.period_sum += declared.num_positions * declared.period


def walk(root: Any) -> TypeNode:
    """Returns the tree of an object: a dataclass, a Pydantic model, a named tuple or a plain object.

    A type's attributes are a dataclass's or a model's fields, else the public attributes of its classes (bases first),
    followed by whatever else its instance holds. Attributes that hold no Field at any depth are passed over.

    Raises:
        ValueError: no Field anywhere; a class in place of an object; an object that holds itself; a coarse size that is
            not a Field; Fields in a dict, or in a dataclass's body without being among its fields.
    """
    if isinstance(root, type):
        raise ValueError(f"compile an object, not a class: {root.__name__}() instead of {root.__name__}")
    if isinstance(root, (*_OPAQUE, list, Mapping)):
        raise ValueError(f"compile an object with Field attributes, not {_shown(root)}")
    node = _Walker().visit(root, "", None)
    if node is None:
        raise ValueError(f"No Field to compile: there is no Field among the attributes of {_shown(root)}, at any depth")
    return node


def _shown(value: Any) -> str:
    text = shown(value)
    return f"a {type(value).__name__} ({text if len(text) <= 80 else text[:80] + '...'})"


def _below(depth: int, path: str) -> int:
    """One level down. ValueError: too many, as of lists or dicts that hold themselves."""
    if depth == DEEPEST:
        raise ValueError(
            f"{path[:80]}... lies more than {DEEPEST} levels deep: a type cannot hold itself, nor others that deep"
        )
    return depth + 1


class _Walker:
    def __init__(self) -> None:
        self.attributes_of: dict[type, dict[str, Any]] = {}
        self.open: dict[int, str] = {}  # id of each object that is being visited, and its path
        self.back: dict[int, str] = {}  # id of an open object, and a path below it that leads back to it
        self.barren: dict[int, Any] = {}  # objects without Fields; they are held so that their ids stay theirs

    def visit(self, obj: Any, path: str, coarse: Any, depth: int = 0) -> TypeNode | None:
        """The object's node, or None where no Field is below it. ``coarse``: what its parent declares for it;
        ``depth``: how many objects, lists and dicts it lies in."""
        depth = _below(depth, path)
        if id(obj) in self.barren:
            return None
        if id(obj) in self.open:
            self.back.setdefault(id(obj), path)
            return None
        if coarse is None:
            coarse = getattr(obj, "__coarse__", None)
        if coarse is not None and not isinstance(coarse, Field):
            raise ValueError(f"the coarse size of {path or type(obj).__name__!r} must be a Field, got {shown(coarse)}")
        node = TypeNode(path)
        self.open[id(obj)] = path
        nested, arrays = [], []
        for name, value, size in self.attributes(obj):
            if isinstance(value, Field):
                node.own[name] = value
                node.count(value)
            elif isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
                arrays.append((name, value, size))
            elif isinstance(value, Mapping):
                self.refuse_mapping(node.child_path(name), value, depth)
            elif not isinstance(value, _OPAQUE):
                nested.append((name, value, size))
        for name, value, size in nested:
            node.nested += self.keep(node, self.visit(value, node.child_path(name), size, depth))
        for name, values, size in arrays:
            self.array(node, node.child_path(name), values, size, depth)
        del self.open[id(obj)]
        if not (node.own or node.nested or node.arrays or (path and coarse is not None)):
            self.barren[id(obj)] = obj
            return None
        if id(obj) in self.back:
            raise ValueError(f"{self.back[id(obj)]!r} leads back to {path or 'the root'!r}: a type cannot hold itself")
        if path:
            node.coarse = _coarse_field(node, coarse)
        return node

    def array(self, node: TypeNode, path: str, values: Any, size: Any, depth: int) -> None:
        """Adds a list's elements to the node; lists in it are arrays of their own."""
        depth = _below(depth, path)
        elements = []
        for index, value in enumerate(values):
            element_path = f"{path}[{index}]"
            if isinstance(value, Field):
                leaf = TypeNode(element_path, value)
                leaf.count(value)
                elements += self.keep(node, leaf)
            elif isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
                self.array(node, element_path, value, size, depth)
            elif isinstance(value, Mapping):
                self.refuse_mapping(element_path, value, depth)
            elif not isinstance(value, _OPAQUE):
                elements += self.keep(node, self.visit(value, element_path, size, depth))
        if elements:
            node.arrays.append(elements)

    def keep(self, node: TypeNode, child: TypeNode | None) -> list[TypeNode]:
        if child is None:
            return []
        node.positions += child.positions
        node.period_sum += child.period_sum
        return [child]

    def refuse_mapping(self, path: str, values: Mapping, depth: int) -> None:
        depth = _below(depth, path)
        for key, value in values.items():
            below = f"{path}[{shown(key)}]"
            if isinstance(value, Mapping):
                self.refuse_mapping(below, value, depth)
                continue
            items = value if isinstance(value, (list, tuple, set, frozenset)) else (value,)
            plain = [item for item in items if not isinstance(item, (*_OPAQUE, list, tuple, Mapping))]
            fields = any(isinstance(item, Field) for item in items)
            if fields or any(self.visit(item, below, None, depth) is not None for item in plain):
                raise ValueError(f"{below} is declared inside a dict: put it in a list, or in a type of its own")

    def attributes(self, obj: Any) -> Iterator[tuple[str, Any, Any]]:
        """Returns name, value and declared coarse size of the object's attributes, in order."""
        cls = type(obj)
        if cls not in self.attributes_of:
            self.attributes_of[cls] = _class_attributes(cls)
        declared = self.attributes_of[cls]
        for name, size in declared.items():
            if name == "__coarse__":  # annotated, as a dataclass's other lines are
                continue
            yield name, getattr(obj, name, None), size
        for held in ("__dict__", "__pydantic_extra__"):
            for name, value in (getattr(obj, held, None) or {}).items():
                if name not in declared and not name.startswith("_"):
                    yield name, value, None


def _coarse_field(node: TypeNode, template: Field | None) -> Field:
    template = template or Field()
    period = template.period
    if isinstance(period, UndeclaredPeriod) and node.positions:
        period = max(1, round(node.period_sum / node.positions))
    semantic_type = f"coarse: {node.path}" if template.semantic_type is None else template.semantic_type
    return dataclasses.replace(template, period=period, semantic_type=semantic_type)


def _class_attributes(cls: type) -> dict[str, Any]:
    """Returns name to declared coarse size (or None) of the attributes that a class gives its objects."""
    if dataclasses.is_dataclass(cls):
        declared = {f.name: f.metadata.get("coarse") for f in dataclasses.fields(cls)}
        _refuse_undeclared(cls, declared, "dataclass fields")
        return declared
    # A Pydantic model: told by what it has, so that Pydantic need not be installed.
    models = getattr(cls, "model_fields", None)
    if isinstance(models, Mapping):
        declared = {name: _model_coarse(info) for name, info in models.items()}
        _refuse_undeclared(cls, declared, "model fields")
        return declared
    names = getattr(cls, "_fields", None)
    if issubclass(cls, tuple) and names is not None:
        return dict.fromkeys(names)
    return {
        name: None
        for base in reversed(cls.__mro__)
        for name, value in vars(base).items()
        if not name.startswith("_") and _holds_data(value)
    }


def _model_coarse(info: Any) -> Any:
    """Returns the coarse size among a Pydantic field's ``Annotated`` metadata or in its ``json_schema_extra``."""
    for given in (*getattr(info, "metadata", ()), getattr(info, "json_schema_extra", None)):
        if isinstance(given, Mapping) and "coarse" in given:
            return given["coarse"]
    return None


def _holds_data(value: Any) -> bool:
    """Whether a class attribute is data, or a slot that holds an object's data, rather than code."""
    if isinstance(value, types.MemberDescriptorType):
        return True
    return not isinstance(value, (type, Callable)) and not hasattr(value, "__get__")


def _refuse_undeclared(cls: type, declared: Mapping[str, Any], what: str) -> None:
    for base in cls.__mro__:
        for name, value in vars(base).items():
            if not isinstance(value, Field) or name in declared or name.startswith("_"):
                continue
            if "ClassVar" not in str(inspect.get_annotations(base).get(name, "")):
                raise ValueError(
                    f"{base.__name__}.{name} is a Field, and not among the {what} of {cls.__name__}: annotate it "
                    f"(`{name}: Field = ...`), and decorate {base.__name__} if it is to be a dataclass"
                )
