"""Elements of SVG, and pictures made of them.

Text is text: the names of a model's layers may hold anything, and are escaped by the library that
writes the XML. Sizes are in units of a picture, which are pixels where it is not scaled.
"""

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass

from ptq.drawing.style import MARKERS, rules
from ptq.reading.printable import printable

NARROW = 340.0  # width of a picture that a phone shows as it is
WIDE = 720.0
CHARACTER = 0.6  # mean width of a character over the size of the font, in a wide one
XMLNS = "http://www.w3.org/2000/svg"
Element = ET.Element


def draw(tag: str, *children: Element | str, **attributes: str | float | None) -> Element:
    """An element with children or text. The attribute ``title`` is what a pointer over it shows;
    ``class_`` and ``stroke_width`` are ``class`` and ``stroke-width``; None is left out."""
    title = attributes.pop("title", None)
    named = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
    element = Element(tag, {k: _text(value) for k, value in named.items() if value is not None})
    if title is not None:
        ET.SubElement(element, "title").text = printable(str(title))
    for child in children:
        if isinstance(child, str):
            element.text = printable(child)
        else:
            element.append(child)
    return element


def _text(value: str | float) -> str:
    return printable(value) if isinstance(value, str) else number(value)


def number(value: float) -> str:
    """A coordinate to a hundredth, as short as can be."""
    short = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if short in ("-0", "") else short


def text(x: float, y: float, content: str, style: str = "", *, anchor: str = "start") -> Element:
    """Text at a place; ``style`` are classes of :mod:`ptq.drawing.style`."""
    return draw("text", content, x=x, y=y, class_=f"t {style}".strip(), text_anchor=anchor)


def text_width(content: str, size: float = 10.0) -> float:
    """About how wide a text is."""
    return CHARACTER * size * len(content)


def shortened(content: str, room: float, size: float = 10.0) -> str:
    """``content``, or its end after an ellipsis, to fit into about so much room."""
    content = printable(content)
    count = max(int(room / (CHARACTER * size)), 2)
    return content if len(content) <= count else f"…{content[1 - count :]}"


def path(points: Sequence[tuple[float, float]], **attributes: str | float) -> Element:
    """Straight lines from point to point."""
    d = "L".join(f"{number(x)} {number(y)}" for x, y in points)
    return draw("path", d=f"M{d}", **attributes)


def marker(
    shape: str, x: float, y: float, size: float, *, title: str | None = None, class_: str = ""
) -> Element:
    """A mark of about ``size`` in every direction; ``shape`` is one of ``MARKERS``."""
    if shape == "circle":
        return draw("circle", title=title, cx=x, cy=y, r=size, class_=class_)
    corners = {
        "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
        "diamond": ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
        "triangle": ((0, -1.2), (1.15, 0.9), (-1.15, 0.9)),
        "cross": (
            *((-1.2, -0.4), (-0.4, -0.4), (-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4)),
            *((1.2, 0.4), (0.4, 0.4), (0.4, 1.2), (-0.4, 1.2), (-0.4, 0.4), (-1.2, 0.4)),
        ),
    }[shape]
    at = " ".join(f"{number(x + size * u)},{number(y + size * v)}" for u, v in corners)
    return draw("polygon", title=title, points=at, class_=class_)


def legend(
    names: Sequence[str], room: float, *, x: float = 0.0, lines: bool = False
) -> tuple[list[Element], float]:
    """Keys of series in rows of at most so much room, and the height that they take."""
    made: list[Element] = []
    left, y = x, 10.0
    for i, name in enumerate(names):
        shown = shortened(name, room - 24)
        wide = 24 + text_width(shown)
        if left > x and left + wide > x + room:
            left, y = x, y + 15
        if lines:
            made.append(path([(left, y - 3), (left + 14, y - 3)], class_=f"curve l{i}"))
        made.append(marker(MARKERS[i], left + 7, y - 3, 3.2, class_=f"f{i}"))
        made.append(text(left + 18, y, shown))
        left += wide
    return made, y + 8 if names else 0.0


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture.

    Attributes:
        label: what it shows, for those who do not see it.
        marks: how many marks of data it has; each element of the class ``m`` is one.
    """

    width: float
    height: float
    label: str
    body: tuple[Element, ...]

    @property
    def marks(self) -> int:
        return sum(
            "m" in (element.get("class") or "").split()
            for part in self.body
            for element in part.iter()
        )

    def element(self, **attributes: str | float) -> Element:
        """The picture as an element ``svg``."""
        return draw(
            "svg",
            *self.body,
            xmlns=XMLNS,
            viewBox=f"0 0 {number(self.width)} {number(self.height)}",
            role="img",
            aria_label=self.label,
            data_marks=str(self.marks),
            **attributes,
        )

    def inline(self) -> str:
        """For a page that has the rules of :func:`ptq.drawing.style.rules`."""
        return ET.tostring(self.element(), "unicode")

    def file(self) -> str:
        """A whole file, with its own rules and background."""
        whole = self.element(width=self.width, height=self.height)
        whole.insert(0, draw("title", self.label))
        whole.insert(1, draw("style", rules()))
        whole.insert(2, draw("rect", class_="back", width="100%", height="100%"))
        return f'<?xml version="1.0" encoding="UTF-8"?>\n{ET.tostring(whole, "unicode")}\n'


def side_by_side(
    pictures: Sequence[Picture], columns: int, title: str, note: str = "", *, alarm: bool = False
) -> Picture:
    """Pictures in a grid, under a title and a note, which may be an alarming one."""
    top = 44.0 if note else 28.0
    wide = max(picture.width for picture in pictures)
    tall = max(picture.height for picture in pictures)
    gap = 18.0
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    body = [text(gap, 24, title, "large")]
    if note:
        body.append(text(gap, 40, note, "alarm bold" if alarm else "soft"))
    for i, picture in enumerate(pictures):
        body.append(
            picture.element(
                x=gap + i % columns * (wide + gap),
                y=top + 10 + i // columns * (tall + gap),
                width=picture.width,
                height=picture.height,
            )
        )
    return Picture(
        width=gap + columns * (wide + gap),
        height=top + 10 + rows * (tall + gap),
        label=f"{title}. {note}".rstrip(". ") + ".",
        body=tuple(body),
    )
