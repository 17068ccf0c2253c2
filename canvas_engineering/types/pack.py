"""Packing of fields on a grid, and the size of grid that they need."""

from __future__ import annotations

import math
from collections.abc import Sequence

from canvas_engineering.types.declare import Field

SLACK = 1.15
"""Auto-sized grids have this much more room than their fields take."""


def spatial_dims(fields: Sequence[Field]) -> int:
    """Returns the largest number of spatial dimensions of any field, at least 1; a plain scalar fits all."""
    return max((len(f.shape) for f in fields if f.shape != (1, 1)), default=2)


def field_shapes(fields: dict[str, Field], n_dims: int) -> list[tuple[int, ...]]:
    """Returns the fields' sizes in ``n_dims`` dimensions.

    With one dimension, a field is as long as it has positions. Otherwise dimensions of size 1 are put in front, or left
    out from the front, until the number is right.

    Raises:
        ValueError: a field of more dimensions than the grid.
    """
    shapes = []
    for path, declared in fields.items():
        shape = declared.shape
        if n_dims == 1:
            shape = (math.prod(shape),)
        elif len(shape) < n_dims:
            shape = (1,) * (n_dims - len(shape)) + shape
        elif len(shape) > n_dims:
            spare = len(shape) - n_dims
            sizes = [size for axis, size in enumerate(shape) if size > 1 or shape[: axis + 1].count(1) > spare]
            if len(sizes) != n_dims:
                raise ValueError(f"field {path!r} of shape {shape} does not fit a grid of {n_dims} spatial dimensions")
            shape = tuple(sizes)
        shapes.append(shape)
    return shapes


def pack(paths: Sequence[str], shapes: Sequence[tuple[int, ...]], grid: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Returns the first coordinates of each field on the grid.

    One dimension: end to end. Two: in strips, left to right and then the next strip, each as high as its highest field.
    More: stacked along the first.

    Raises:
        ValueError: the grid is too small; the message names the first field that does not fit, and what is needed.
    """
    if not shapes:
        return []
    largest = [max(sizes) for sizes in zip(*shapes)]
    for axis in range(1, len(grid)):
        if largest[axis] > grid[axis]:
            index = next(i for i, shape in enumerate(shapes) if shape[axis] > grid[axis])
            needed = (None, *(max(pair) for pair in zip(largest[1:], grid[1:])))
            raise _too_small(paths[index], shapes, index, grid, needed)
    starts, extent = _strips(shapes, grid[1]) if len(grid) == 2 else _stack(shapes, len(grid))
    if extent > grid[0]:
        index = next(i for i, (start, shape) in enumerate(zip(starts, shapes)) if start[0] + shape[0] > grid[0])
        raise _too_small(paths[index], shapes, index, grid, (extent, *grid[1:]))
    return starts


def _too_small(path: str, shapes: Sequence[tuple[int, ...]], index: int, grid, needed) -> ValueError:
    if needed[0] is None:
        extent = _strips(shapes, needed[1])[1] if len(grid) == 2 else _stack(shapes, len(grid))[1]
        needed = (max(extent, grid[0]), *needed[1:])
    return ValueError(
        f"field {path!r} of shape {shapes[index]} does not fit the grid {tuple(grid)}: "
        f"the {len(shapes)} fields, coarse ones included, need {tuple(needed)}"
    )


def _strips(shapes: Sequence[tuple[int, ...]], width: int) -> tuple[list[tuple[int, ...]], int]:
    """Starts of the fields in strips of the given width, and the height of all strips."""
    starts, top, left, height = [], 0, 0, 0
    for h, w in shapes:
        if left and left + w > width:
            top, left, height = top + height, 0, 0
        starts.append((top, left))
        left, height = left + w, max(height, h)
    return starts, top + height


def _stack(shapes: Sequence[tuple[int, ...]], n_dims: int) -> tuple[list[tuple[int, ...]], int]:
    starts, top, rest = [], 0, (0,) * (n_dims - 1)
    for shape in shapes:
        starts.append((top, *rest))
        top += shape[0]
    return starts, top


def auto_shape(
    shapes: Sequence[tuple[int, ...]], n_dims: int, H: int | None = None, W: int | None = None
) -> tuple[int, ...]:
    """Returns a grid on which `pack` places the fields, with some room to spare.

    One dimension: 1.15 times the total. Two: W is the root of 1.15 times the area, at least the widest field; H is 1.15
    times the height of the strips at that width. More: every side is the n-th root of 1.15 times the volume, at least
    its largest field, and the first is long enough for the stack.

    Args:
        shapes: of the fields, in packing order.
        n_dims: spatial dimensions.
        H, W: either one is kept where it is given; two dimensions only.
    """
    volume = sum(map(math.prod, shapes))
    largest = [max(sizes) for sizes in zip(*shapes)]
    if n_dims == 1:
        return (math.ceil(volume * SLACK),)
    if n_dims == 2:
        if H is not None:
            # Strips grow flatter as they grow wider; one strip as high as the highest field is the last resort.
            W, widest = max(math.ceil(volume * SLACK / H), largest[1]), sum(w for _, w in shapes)
            while widest > W and _strips(shapes, W)[1] > H:
                W = min(math.ceil(W * SLACK), widest)
            return H, W
        if W is None:
            W = max(math.ceil(math.sqrt(volume * SLACK)), largest[1])
        return max(math.ceil(_strips(shapes, W)[1] * SLACK), largest[0]), W
    side = math.ceil((volume * SLACK) ** (1 / n_dims))
    return (max(side, _stack(shapes, n_dims)[1]), *(max(side, size) for size in largest[1:]))
