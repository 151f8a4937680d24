"""Heat maps: a cell for every row and column, shaded by size or coloured by what it is."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ptq.drawing.axes import short
from ptq.drawing.style import STEPS
from ptq.drawing.svg import NARROW, Element, Picture, draw, shortened, text, text_width

ROW = 17.0
SLANT = 40.0  # degrees
LONGEST = 96.0  # name of a column
LEAST_SPAN = 4.0  # of the shades, from first to last
ROOM_FOR_TEXT = 30.0  # of a cell


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A number at a row and a column, and what a pointer over it shows."""

    row: int
    column: int
    value: float
    title: str


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A cell that says which of some choices it is, by index."""

    row: int
    column: int
    choice: int
    title: str


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Sequence[Cell],
    *,
    label: str,
    edges: Sequence[float] | None = None,
) -> Picture:
    """Cells in shades of equal ratios, with their numbers where there is room, and a key.

    Args:
        label: what it shows, for those who do not see it.
        edges: of the shades, for maps that are compared; None is :func:`shade_edges` of its own.
    """
    edges = shade_edges(cell.value for cell in cells) if edges is None else edges
    shaded = [(cell, shade(cell.value, edges)) for cell in cells]
    made, left, wide, bottom = _grid(rows, columns)
    for cell, step in shaded:
        x, y = left + cell.column * wide, _top(columns, wide) + cell.row * ROW
        made.append(
            draw(
                "rect", title=cell.title, class_=f"m h{step}",
                x=x + 0.5, y=y + 0.5, width=wide - 1, height=ROW - 1,
            )
        )  # fmt: skip
        if wide >= ROOM_FOR_TEXT:
            made.append(_inside(x + wide / 2, y, short(cell.value), f"small on{step}"))
    made += _key(edges, left, bottom + 8, NARROW - left - 14)
    return Picture(width=NARROW, height=bottom + 36, label=label, body=tuple(made))


def tile_map(
    rows: Sequence[str],
    columns: Sequence[str],
    tiles: Sequence[Tile],
    choices: Sequence[str],
    *,
    label: str,
) -> Picture:
    """Cells by choice: a letter and a colour each, with a key that says which is which."""
    letters = [chr(ord("A") + i) for i in range(len(choices))]
    made, left, wide, bottom = _grid(rows, columns)
    for tile in tiles:
        x, y = left + tile.column * wide, _top(columns, wide) + tile.row * ROW
        made.append(
            draw(
                "rect", title=tile.title, class_=f"m f{tile.choice} tint",
                x=x + 0.5, y=y + 0.5, width=wide - 1, height=ROW - 1,
            )
        )  # fmt: skip
        made.append(_inside(x + wide / 2, y, letters[tile.choice], "small"))
    x, y = left, bottom + 8
    for i, (letter, name) in enumerate(zip(letters, choices, strict=True)):
        room = 30 + text_width(name)
        if x > left and x + room > NARROW:
            x, y = left, y + 17
        made.append(draw("rect", class_=f"f{i} tint", x=x, y=y, width=13, height=13))
        made.append(_inside(x + 6.5, y - 2, letter, "small"))
        made.append(text(x + 17, y + 10, name))
        x += room
    return Picture(width=NARROW, height=y + 20, label=label, body=tuple(made))


def shade_edges(values: Iterable[float]) -> list[float]:
    """The lower bounds of all shades but the first: equal ratios up to the largest number, from
    that below which a twentieth of those above zero lie (a few small ones would leave no shades to
    all others). They span a factor of four at least: what is nearly equal looks equal."""
    found = sorted(v for v in values if v > 0 and math.isfinite(v))
    if not found:
        return []
    low, high = found[len(found) // 20], found[-1]
    if high < LEAST_SPAN * low:
        middle, half = math.sqrt(low * high), math.sqrt(LEAST_SPAN)
        low, high = middle / half, middle * half
    return [low * (high / low) ** (i / STEPS) for i in range(1, STEPS)]


def shade(value: float, edges: Sequence[float]) -> int:
    """The shade of a number; the last one of what is not finite."""
    if not math.isfinite(value):
        return STEPS - 1
    return sum(value >= edge for edge in edges) if edges and edges[0] < edges[-1] else 0


def _width(columns: Sequence[str], left: float) -> float:
    """Of a column; to the right of the last one its slanted name has room."""
    count = max(len(columns), 1)
    longest = min(max(map(text_width, columns), default=0), LONGEST)
    lean = longest * math.cos(math.radians(SLANT))
    # the last name begins in the middle of its column: (left + (count - ½) wide + lean) fits
    return min((NARROW - left - lean - 2) / (count - 0.5), (NARROW - left - 2) / count, 76.0)


def _columns(columns: Sequence[str], wide: float) -> tuple[float, float]:
    """How high the names of the columns are, and how long they may be."""
    longest = min(max(map(text_width, columns), default=0), LONGEST)
    if longest <= wide - 4:
        return 16.0, wide
    return 12 + longest * math.sin(math.radians(SLANT)), LONGEST


def _top(columns: Sequence[str], wide: float) -> float:
    return _columns(columns, wide)[0]


def _grid(rows: Sequence[str], columns: Sequence[str]) -> tuple[list[Element], float, float, float]:
    """The names of rows and columns; where cells begin, how wide they are, where they end."""
    left = min(max(map(text_width, rows), default=0) + 6, NARROW / 3)
    wide = _width(columns, left)
    top, room = _columns(columns, wide)
    slanted = top > 16
    made: list[Element] = []
    for i, name in enumerate(columns):
        x = left + (i + 0.5) * wide
        word = text(0, 0, shortened(name, room), "soft", anchor="start" if slanted else "middle")
        turn = f" rotate({-SLANT:g})" if slanted else ""
        word.set("transform", f"translate({x:.1f} {top - 4:.1f}){turn}")
        made.append(word)
    for i, name in enumerate(rows):
        y = top + i * ROW + ROW - 5
        made.append(text(left - 5, y, shortened(name, left - 4), "soft", anchor="end"))
    return made, left, wide, top + len(rows) * ROW


def _inside(x: float, y: float, content: str, style: str) -> Element:
    """Text in the middle of a cell that begins at ``y``, through which a pointer sees the cell."""
    word = text(x, y + ROW / 2 + 3.2, content, style, anchor="middle")
    word.set("pointer-events", "none")
    return word


def _key(edges: Sequence[float], left: float, y: float, room: float) -> list[Element]:
    if not edges:
        return []
    wide = room / STEPS
    made = [
        draw("rect", class_=f"h{i}", x=left + i * wide, y=y, width=wide, height=8)
        for i in range(STEPS)
    ]
    if edges[0] < edges[-1]:
        for i in range(0, len(edges), 2):
            at = left + (i + 1) * wide
            made.append(text(at, y + 19, short(edges[i]), "small soft", anchor="middle"))
    return made
