"""Validators of arguments: they return the expected kind, or raise an error that shows the argument and its value."""

from __future__ import annotations

import json
import math
import operator
import os
import reprlib
from collections.abc import Callable, Iterable, Mapping, Set
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch

LARGEST_INT = 2**31 - 1
"""Real times are products of a frame count and a period: both up to this keep them exact in int64."""
DEEPEST = 100
"""Maximum levels of nested JSON, types and clocks: recursion over them must fit the stack of 1,000 frames."""

_Kind = TypeVar("_Kind")

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlong = 4, 80
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxfrozenset = _SHORT.maxdeque = 12
_SHORT.maxstring = _SHORT.maxother = 200


def shown(value: Any) -> str:
    """Returns a value's repr for an error message, shortened if long or deep.

    >>> shown("eye"), shown([[[[[1]]]]]), shown(10**5000)
    ("'eye'", '[[[[[...]]]]]', 'an int of 16610 bits')
    """
    if isinstance(value, int) and value.bit_length() > 1000:
        return f"an int of {value.bit_length()} bits"
    try:
        text = _SHORT.repr(value)
    except Exception:  # a repr is anybody's code, and deep objects end the stack
        return f"a {type(value).__name__}"
    return text if len(text) <= 400 else f"{text[:400]}..."


def _is_bool(value: Any) -> bool:
    return isinstance(value, (bool, np.bool_)) or "bool" in str(getattr(value, "dtype", ""))


def checked_int(
    value: Any, what: str, least: int | None = None, most: int = LARGEST_INT, kind: str | None = None
) -> int:
    """Returns the int that is given, numpy's and tensors' integers included.

    Raises:
        ValueError: no int, or one below ``least`` or above ``most`` (in magnitude, where there is no least); the
            message names ``kind`` and the violated bound.
    """
    try:
        # an int as it is: a compiler that traces a size would take it for a constant
        number = value if type(value) is int else None if _is_bool(value) else int(operator.index(value))
    except (TypeError, ValueError, RuntimeError):  # a tensor says by either that it is none
        number = None
    if number is None:
        allowed = "an int"
    elif least is not None and number < least:
        allowed = f"at least {least}"
    elif abs(number) > most:
        allowed = "below 2**31 in magnitude" if most == LARGEST_INT else f"at most {most}"
        kind = kind and f"an int {allowed}"
    else:
        return number
    raise ValueError(f"{what} must be {kind or allowed}, got {shown(value if number is None else number)}")


def checked_ints(
    values: Any, what: str, least: int | None = None, each: str | None = None, kind: str | None = None
) -> tuple[int, ...]:
    """Returns a tuple of ints; ``each`` is what one of them is called, ``kind`` what it must be.

    Raises:
        ValueError: not several values in an order, or one that is no int or too small.
    """
    return tuple(checked_int(value, each or what, least, kind=kind) for value in checked_items(values, what, "ints"))


def checked_number(value: Any, what: str, kind: str = "a finite number") -> float:
    """Returns a float of the number that is given; of tensors and arrays, those without dimensions and gradient.

    Raises:
        ValueError: none, or one that is not finite; the message names ``kind``.
    """
    refused = _is_bool(value) or isinstance(value, (str, bytes, bytearray)) or getattr(value, "requires_grad", False)
    try:
        number = math.nan if refused or getattr(value, "ndim", 0) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{what} must be {kind}, got {shown(value)}")
    return number


def checked_bool(value: Any, what: str) -> bool:
    """Returns the bool that is given; ValueError: anything else, numbers included."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{what} must be a bool, got {shown(value)}")
    return bool(value)


def checked_string(value: Any, what: str, optional: bool = False) -> Any:
    """Returns the string that is given (or None where that is allowed); ValueError: anything else."""
    if not isinstance(value, str) and not (optional and value is None):
        raise ValueError(f"{what} must be a string{', or None' if optional else ''}, got {shown(value)}")
    return value


def checked_name(value: Any, what: str, kind: str = "be a string of at least one character") -> str:
    """Returns the string that is given; ValueError: an empty one, or anything else; the message says it must
    ``kind``."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{what} must {kind}, got {shown(value)}")
    return value


def checked_strings(values: Any, what: str) -> tuple[str, ...]:
    """Returns a tuple of the strings that are given; ValueError: one string, or anything else."""
    items = checked_items(values, what, "strings")
    if not all(isinstance(item, str) for item in items):
        raise ValueError(f"{what} must be a tuple of strings, got {shown(values)}")
    return items


def checked_names(values: Any, what: str) -> tuple[str, ...]:
    """Returns `checked_strings`, none of them empty; also the names that a dict or a set holds."""
    strings = checked_strings(tuple(values) if isinstance(values, (Mapping, Set)) else values, what)
    return tuple(checked_name(item, f"every name of {what}") for item in strings)


def checked_items(values: Any, what: str, of: str) -> tuple[Any, ...]:
    """Returns a tuple of several values in an order; ValueError: a string, a dict, a set, or one value."""
    # a tensor or an array without dimensions has the method, and cannot be iterated over
    several = isinstance(values, Iterable) and getattr(values, "ndim", 1) != 0
    if not several or isinstance(values, (str, bytes, bytearray, Mapping, Set)):
        raise ValueError(f"{what} must be a tuple of {of}, got {shown(values)}")
    return tuple(values)


def checked_path(value: Any, what: str) -> Path:
    """Returns a path; ValueError: an empty one, or anything else (a number would be an open file to `open`)."""
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise ValueError(f"{what} must be a path, got {shown(value)}")
    return Path(value)


def checked_choice(value: Any, what: str, known: Iterable[str]) -> str:
    """Returns the value, if it is one of the known strings; ValueError lists them otherwise."""
    if not isinstance(value, str) or value not in known:
        listed = ", ".join(known if isinstance(known, tuple) else sorted(known))
        raise ValueError(f"unknown {what} {shown(value)}: choose one of {listed}")
    return value


@overload
def checked_kind(value: Any, what: str, kind: type[_Kind]) -> _Kind: ...
@overload
def checked_kind(value: Any, what: str, kind: type[_Kind], optional: bool) -> _Kind | None: ...
def checked_kind(value: Any, what: str, kind: type, optional: bool = False) -> Any:
    """Returns the value, if it is of a class of ours (or None where that is allowed); ValueError otherwise."""
    if not isinstance(value, kind) and not (optional and value is None):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise ValueError(
            f"{what} must be {article} {kind.__name__}{', or None' if optional else ''}, got {shown(value)}"
        )
    return value


def checked_heads(n_heads: Any, d_model: int, what: str = "n_heads") -> int:
    """Returns a number of heads that divides the width; ValueError otherwise."""
    heads = checked_int(n_heads, what, 1)
    if d_model % heads:
        raise ValueError(f"{what} {heads} must divide d_model {d_model}")
    return heads


def checked_dropout(value: Any, what: str = "dropout") -> float:
    """Returns a probability below 1; ValueError otherwise."""
    p = checked_number(value, what, "a number in [0, 1)")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{what} must lie in [0, 1), got {p}")
    return p


def checked_sizes(d_model: Any, n_heads: Any, dropout: Any, divides: bool = True) -> tuple[int, int, float]:
    """Checks the three arguments of every attention function.

    Args:
        d_model: width of the canvas, at least 1.
        n_heads: number of heads, at least 1.
        dropout: probability of dropping an attention weight.
        divides: whether n_heads must divide d_model; not where a function has no heads.

    Raises:
        ValueError: what is none of these, named.
    """
    d_model = checked_int(d_model, "d_model", 1)
    n_heads = checked_heads(n_heads, d_model) if divides else checked_int(n_heads, "n_heads", 1)
    return d_model, n_heads, checked_dropout(dropout)


def checked_tensor(value: Any, what: str, floating: bool = True) -> torch.Tensor:
    """Returns the tensor that is given; ValueError: anything else, arrays included, or integers where ``floating``."""
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{what} must be a tensor, got a {type(value).__name__}: {shown(value)}")
    if floating and not value.is_floating_point():
        raise ValueError(f"{what} must be a floating-point tensor, got {value.dtype}")
    return value


def checked_read(queries: Any, keys: Any, values: Any) -> None:
    """Checks the inputs of one attention set; ValueError: no floating-point tensor (B, rows, d_model)."""
    for what, value in (("queries", queries), ("keys", keys), ("values", values)):
        if checked_tensor(value, what).dim() != 3:
            raise ValueError(f"{what} must be (batch, rows, d_model), got {tuple(value.shape)}")


def checked_depth(value: Any, what: str, deepest: int = DEEPEST) -> None:
    """Refuses dicts, lists and tuples nested too deeply for recursion.

    Raises:
        ValueError: more than ``deepest`` levels, or a value that holds itself.

    >>> checked_depth({"a": [{"b": 1}]}, "the form")
    """
    level = [value]
    for _ in range(deepest + 1):
        # each object once per level, however many references it has
        inner = {id(item): item for outer in level for item in _items(outer) if isinstance(item, (dict, list, tuple))}
        if not inner:
            return
        level = list(inner.values())
    raise ValueError(f"{what} is nested more than {deepest} levels deep, or holds itself")


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, (list, tuple)) else ()


def parsed_json(text: str | bytes) -> Any:
    """Returns the value of a JSON text, which is not nested too deeply for recursion.

    Raises:
        ValueError: no JSON (NaN is none), or more levels of it than a program of the deepest parts has.
    """
    deepest = DEEPEST + 20
    try:
        value = json.loads(text, parse_constant=_no_json)
    except RecursionError:
        raise ValueError(f"JSON is nested more than {deepest} levels deep") from None
    checked_depth(value, "JSON", deepest)
    return value


def _no_json(word: str) -> None:
    raise ValueError(f"JSON has no {word}")


def read_json(path: str | os.PathLike, build: Callable[[Any], Any]) -> Any:
    """Returns ``build`` of a file's JSON.

    Raises:
        OSError: the file cannot be read.
        ValueError: no JSON, or what ``build`` refuses; the message names the file.
    """
    content = checked_path(path, "path").read_bytes()
    try:
        return build(parsed_json(content))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
