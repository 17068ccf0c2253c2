"""Topologies of a video model's tokens, as functions of its layout that return (layout, topology): plain data.

Tiles and blocks of frames are regions, so that a topology is boxes that attend to boxes, whatever the size. Where text
is among the tokens, it attends to everything and everything attends to it, if nothing else is said.
"""

from __future__ import annotations

from itertools import product

from ..canvas import CanvasLayout, RegionSpec
from ..checked import checked_int, checked_ints, checked_kind
from ..connectivity import CanvasTopology, Connection, TemporalFill
from ..masks import MaskSpec
from .adapter import TEXT, VIDEO
from .layout import FIRST_FRAME, grid_of

__all__ = [
    "block_causal",
    "dense",
    "dense_topology",
    "first_frame_and_text_global",
    "previous_frame",
    "radial",
    "sliding_tiles",
    "spatial_tiles",
    "tile_topology",
    "window",
    "window_topology",
]

_MAX_COUNT = 100_000  # frames of a window, each a connection
_DROP = TemporalFill.DROP

Declared = tuple[CanvasLayout, CanvasTopology]


# -- functions of a layout ---------------------------------------------------------------------------------------------


def dense(layout: CanvasLayout) -> Declared:
    """Returns dense attention, with which the model was trained.

    >>> from canvas_engineering import CanvasLayout
    >>> video = CanvasLayout(T=3, d_model=8, spatial_shape=(4, 4), regions={"video": (0, 3, 0, 4, 0, 4)})
    >>> len(dense(video)[1].connections)
    1
    """
    return layout, CanvasTopology([*_text(layout), Connection(VIDEO, VIDEO)])


def window(layout: CanvasLayout, past: int = 1, future: int = 0) -> Declared:
    """Returns a temporal window: the video attends to its own frame, ``past`` previous and ``future`` next frames.

    Raises:
        ValueError: a negative number of frames, or more than 100,000.

    >>> from canvas_engineering import CanvasLayout
    >>> video = CanvasLayout(T=3, d_model=8, spatial_shape=(4, 4), regions={"video": (0, 3, 0, 4, 0, 4)})
    >>> [c.t_dst for c in window(video, past=2)[1].connections]
    [-2, -1, 0]
    """
    return layout, CanvasTopology([*_text(layout), *_window(past, future)])


def previous_frame(layout: CanvasLayout) -> Declared:
    """Returns :func:`window` of one past frame: the video attends to its own frame and the previous one.

    >>> from canvas_engineering import CanvasLayout
    >>> video = CanvasLayout(T=3, d_model=8, spatial_shape=(4, 4), regions={"video": (0, 3, 0, 4, 0, 4)})
    >>> [c.t_dst for c in previous_frame(video)[1].connections]
    [-1, 0]
    """
    return window(layout, past=1)


def spatial_tiles(layout: CanvasLayout, rows: int, columns: int) -> Declared:
    """Returns spatial tiles: the video attends to its own tile of ``rows`` × ``columns`` tokens, in all frames. Tiles
    at the lower and right border may be smaller.

    Raises:
        ValueError: a tile size below 1.

    >>> from canvas_engineering import CanvasLayout
    >>> video = CanvasLayout(T=3, d_model=8, spatial_shape=(4, 4), regions={"video": (0, 3, 0, 4, 0, 4)})
    >>> len(spatial_tiles(video, 2, 2)[1].connections)
    4
    """
    sides = [checked_int(side, "the side of a tile", 1) for side in (rows, columns)]
    T, H, W = grid_of(layout)
    regions = _Regions(layout)
    tiles = [
        regions.name("tile", (0, T, *row, *column)) for row, column in product(_cut(H, sides[0]), _cut(W, sides[1]))
    ]
    return regions.layout(), CanvasTopology([*_text(layout), *(Connection(tile, tile) for tile in tiles)])


def sliding_tiles(
    layout: CanvasLayout, tile: tuple[int, int, int] = (1, 8, 8), around: tuple[int, int, int] = (1, 1, 1)
) -> Declared:
    """Returns sliding tile attention (STA): tiles of (frames, rows, columns) tokens attend to the tiles that lie within
    ``around`` tiles of them along each axis; at the borders the window keeps its size and lies inside of the video.

    Raises:
        ValueError: a tile size below 1, or a negative width of the window.

    >>> from canvas_engineering import CanvasLayout
    >>> video = CanvasLayout(T=3, d_model=8, spatial_shape=(4, 4), regions={"video": (0, 3, 0, 4, 0, 4)})
    >>> declared = sliding_tiles(video, (1, 2, 2), around=(0, 0, 0))
    >>> len(declared[1].connections)
    12
    """
    sides, widths = checked_ints(tile, "tile"), checked_ints(around, "around")
    if len(sides) != 3 or min(sides) < 1 or len(widths) != 3 or min(widths) < 0:
        raise ValueError(
            f"tile must be three sizes of at least 1, and around three of at least 0; got {tile}, {around}"
        )
    axes = [_around(_cut(size, side), 2 * width + 1) for size, side, width in zip(grid_of(layout), sides, widths)]
    regions, connections = _Regions(layout), _text(layout)
    for ranges in product(*axes):
        own, keys = (tuple(bound for pair in ranges for bound in pair[which]) for which in (0, 1))
        connections.append(Connection(regions.name("tile", own), regions.name("tiles", keys)))
    return regions.layout(), CanvasTopology(connections)


def radial(layout: CanvasLayout, rows: int = 8, columns: int = 8) -> Declared:
    """Returns radial attention: a tile of ``rows`` × ``columns`` tokens attends to its own frame and the two next to it
    as a whole, and in frames at distance d to a window of tiles around it whose sides halve each time that d doubles,
    down to the tile itself.

    At 2^k ≤ d < 2^(k+1) the window has ⌈tiles of a side / 2^k⌉ tiles on that side; at the borders it lies inside of the
    frame.

    Raises:
        ValueError: a tile size below 1.

    >>> from canvas_engineering import CanvasLayout
    >>> video = CanvasLayout(T=3, d_model=8, spatial_shape=(4, 4), regions={"video": (0, 3, 0, 4, 0, 4)})
    >>> sorted({c.t_dst for c in radial(video, 2, 2)[1].connections})
    [-2, -1, 0, 1, 2]
    """
    sides = [checked_int(side, "the side of a tile", 1) for side in (rows, columns)]
    T, *size = grid_of(layout)
    axes = [_cut(length, side) for length, side in zip(size, sides)]
    regions, connections = _Regions(layout), [*_text(layout), *_window(min(1, T - 1), min(1, T - 1))]
    for distance in range(2, T):
        halved = [-(-len(tiles) // (1 << (distance.bit_length() - 1))) for tiles in axes]
        for ranges in product(*(_around(tiles, count) for tiles, count in zip(axes, halved))):
            own, keys = (tuple(bound for pair in ranges for bound in pair[which]) for which in (0, 1))
            names = regions.name("tile", (0, T, *own)), regions.name("tiles", (0, T, *keys))
            connections += [Connection(*names, t_src=0, t_dst=d, temporal_fill=_DROP) for d in (distance, -distance)]
    return regions.layout(), CanvasTopology(connections)


def first_frame_and_text_global(layout: CanvasLayout, topology: CanvasTopology | None = None) -> Declared:
    """Returns a topology, :func:`previous_frame` by default, with the first frame, and text where there is any,
    attending to everything and attended to by everything.

    >>> from canvas_engineering import CanvasLayout
    >>> video = CanvasLayout(T=3, d_model=8, spatial_shape=(4, 4), regions={"video": (0, 3, 0, 4, 0, 4)})
    >>> first = first_frame_and_text_global(video)[1].connections[-2:]
    >>> [(c.src, c.dst) for c in first]
    [('video', 'first_frame'), ('first_frame', 'video')]
    """
    checked_kind(topology, "topology", CanvasTopology, optional=True)
    connections = list((previous_frame(layout)[1] if topology is None else topology).connections)
    known = [(c.src, c.dst) for c in connections if c.t_src is None and c.t_dst is None and c.mask is None]
    added = [*_text(layout), Connection(VIDEO, FIRST_FRAME), Connection(FIRST_FRAME, VIDEO)]
    connections += [c for c in added if (c.src, c.dst) not in known]
    regions = _Regions(layout)
    _, H, W = grid_of(layout)
    regions.placed.setdefault(FIRST_FRAME, (0, 1, 0, H, 0, W))
    return regions.layout(), CanvasTopology(connections)


def block_causal(layout: CanvasLayout, frames: int = 1) -> Declared:
    """Returns attention that is causal in time by blocks: a block of ``frames`` frames attends to itself and everything
    before. Text attends to text alone, or later frames would reach earlier ones through it; the video attends to it.

    Raises:
        ValueError: ``frames`` below 1.

    >>> from canvas_engineering import CanvasLayout
    >>> video = CanvasLayout(T=3, d_model=8, spatial_shape=(4, 4), regions={"video": (0, 3, 0, 4, 0, 4)})
    >>> block_causal(video, 2)[0].region_spec("until 1").bounds
    (0, 3, 0, 4, 0, 4)
    """
    frames = checked_int(frames, "frames", 1)
    T, H, W = grid_of(layout)
    regions = _Regions(layout)
    text = [Connection(TEXT, TEXT), Connection(VIDEO, TEXT)] if TEXT in layout.regions else []
    blocks = []
    for start, stop in _cut(T, frames):
        own = regions.name("frames", (start, stop, 0, H, 0, W))
        blocks.append(Connection(own, regions.name("until", (0, stop, 0, H, 0, W))))
    return regions.layout(), CanvasTopology([*text, *blocks])


class _Regions:
    """The regions of a layout, and boxes that are added to them under names like "tile 3", each once."""

    def __init__(self, layout: CanvasLayout):
        self.base, self.placed = layout, dict(layout.regions)
        self.names: dict[tuple[str, tuple[int, ...]], str] = {}

    def name(self, kind: str, bounds: tuple[int, ...]) -> str:
        if (kind, bounds) not in self.names:
            number = sum(known == kind for known, _ in self.names)
            self.names[kind, bounds] = name = f"{kind} {number}"
            if name in self.base.regions:
                raise ValueError(f"the layout has a region {name!r} already: a topology is added to a layout once")
            self.placed[name] = RegionSpec(bounds)
        return self.names[kind, bounds]

    def layout(self) -> CanvasLayout:
        base = self.base
        return CanvasLayout(base.T, base.d_model, base.spatial_shape, self.placed, base.t_current)


def _text(layout: CanvasLayout) -> list[Connection]:
    checked_kind(layout, "layout", CanvasLayout)
    if VIDEO not in layout.regions:
        raise ValueError(f"a layout of tokens has the region 'video' (video_layout makes one), got {[*layout.regions]}")
    return _text_connections() if TEXT in layout.regions else []


def _cut(size: int, side: int) -> list[tuple[int, int]]:
    return [(start, min(start + side, size)) for start in range(0, size, side)]


def _around(tiles: list[tuple[int, int]], count: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Returns each tile of an axis with the range of the ``count`` tiles around it, moved inside."""
    count = min(count, len(tiles))
    starts = [min(max(number - count // 2, 0), len(tiles) - count) for number in range(len(tiles))]
    return [(tile, (tiles[start][0], tiles[start + count - 1][1])) for tile, start in zip(tiles, starts)]


# -- topologies alone, of CogVideoX's layouts --------------------------------------------------------------------------


def _text_connections() -> list[Connection]:
    return [Connection(TEXT, TEXT), Connection(TEXT, VIDEO), Connection(VIDEO, TEXT)]


def _window(past: int, future: int) -> list[Connection]:
    past, future = checked_int(past, "past", most=_MAX_COUNT), checked_int(future, "future", most=_MAX_COUNT)
    if past < 0 or future < 0:
        raise ValueError(f"past and future must be at least 0, got {past} and {future}")
    return [Connection(VIDEO, VIDEO, t_src=0, t_dst=t, temporal_fill=_DROP) for t in range(-past, future + 1)]


def dense_topology() -> CanvasTopology:
    """Returns the topology of dense attention, with which the model was trained, of layouts with text.

    >>> len(dense_topology().connections)
    4
    """
    return CanvasTopology([*_text_connections(), Connection(VIDEO, VIDEO)])


def window_topology(past: int = 1, future: int = 0) -> CanvasTopology:
    """Returns a topology with a temporal window, of layouts with text: the video attends to its own frame, ``past``
    previous and ``future`` next frames, and the text; the text attends to everything. The default is same frame +
    previous frame + text.

    Raises:
        ValueError: a negative number of frames, or more than 100,000.

    >>> [c.t_dst for c in window_topology(past=2).connections if (c.src, c.dst) == ("video", "video")]
    [-2, -1, 0]
    """
    return CanvasTopology([*_text_connections(), *_window(past, future)])


def tile_topology(rows: int, columns: int) -> CanvasTopology:
    """Returns a topology of spatial tiles, of layouts with text: the video attends to the same tile (``rows`` ×
    ``columns`` tokens) of all frames; text and first frame attend to everything, and everything attends to them.

    Raises:
        ValueError: a tile size below 1.

    >>> {(c.src, c.dst) for c in tile_topology(4, 4).connections} >= {("video", "video"), ("video", "text")}
    True
    """
    tile = MaskSpec("tile", tile_h=rows, tile_w=columns)
    return CanvasTopology(
        [
            *_text_connections(),
            Connection(VIDEO, FIRST_FRAME),
            Connection(FIRST_FRAME, VIDEO),
            Connection(VIDEO, VIDEO, mask=tile),
        ]
    )
