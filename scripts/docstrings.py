"""Examples in docstrings as code on the site: an extension of griffe, which reads docstrings for mkdocstrings."""

from __future__ import annotations

import re

import griffe

# A doctest: lines from the first >>> to a blank line, however far they are indented.
EXAMPLE = re.compile(r"^([ ]*)>>> .*(?:\n[ ]*\S.*)*", re.MULTILINE)


class Examples(griffe.Extension):
    """Fences every doctest."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        """Rewrites the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(lambda m: f"{m[1]}```pycon\n{m[0]}\n{m[1]}```", obj.docstring.value)
