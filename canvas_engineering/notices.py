"""Warnings that point at the caller's line outside of this package."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable

PACKAGE = __name__.partition(".")[0]
MAX_SHOWN = 6


def warn(message: str) -> None:
    """A UserWarning at the innermost line outside this package.

    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     warn("there are no keys")
    >>> [str(warning.message) for warning in caught]
    ['there are no keys']
    """
    frame, level = sys._getframe(1), 2
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == PACKAGE:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def join_truncated(things: Iterable[str]) -> str:
    """Returns the first six things, separated by commas.

    >>> join_truncated("abcdefgh")
    'a, b, c, d, e, f, ...'
    """
    things = list(things)
    return ", ".join([*things[:MAX_SHOWN], *["..."] * (len(things) > MAX_SHOWN)])
