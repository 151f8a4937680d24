"""A page of HTML that needs nothing beside itself: no script, no network, no other file.

All words are text: jinja2 escapes them, and what would not be seen as a character is written out.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from html import escape

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from ptq.drawing.style import rules
from ptq.drawing.svg import Picture
from ptq.reading.printable import printable

LONG = 12  # characters
OPTION = re.compile(r"(?<!\S)(\(?--[a-z][a-z-]+(?: [\d.]+%?)?)")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of words under a head; the first column names the row, others are numbers or words.

    Attributes:
        title: what it holds.
        folded: shown when it is asked for.
        words: columns that hold text rather than numbers, by index.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    folded: bool = False
    words: frozenset[int] = frozenset((0,))

    @property
    def long(self) -> bool:
        """Whether a cell needs a line of its own on a phone."""
        cells = (*self.head[1:], *(cell for row in self.rows for cell in row[1:]))
        return any(len(cell) > LONG for cell in cells)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture with what to see in it.

    Attributes:
        wide: the same for a screen, where ``picture`` is that for a phone.
    """

    title: str
    caption: str
    picture: Picture
    wide: Picture | None = None


@dataclass(frozen=True, kw_only=True)
class Card:
    """Something that stands out: its name, a figure, and sentences."""

    title: str
    figure: str
    words: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page; ``name`` is that of its anchor, in ASCII letters."""

    name: str
    title: str
    words: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    cards: tuple[Card, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Page:
    """What is shown: ``kind`` says what sort of page, ``title`` of what; ``facts`` are pairs of a
    name and a value, ``summary`` is what a reader in a hurry should know."""

    kind: str
    title: str
    facts: tuple[tuple[str, str], ...]
    summary: tuple[str, ...]
    sections: tuple[Section, ...]
    foot: str


def render(page: Page) -> str:
    """The page as HTML."""
    return _template().render(page=page, rules=rules())


@lru_cache(maxsize=1)
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("ptq.drawing", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters |= {"options": options, "dotted": dotted}
    return environment.get_template("page.html")


def options(words: str) -> str:
    """``words`` as HTML, with options of the command line (``--rotation 16``) as code, which no
    line breaks, and an arrow for ``->``."""
    escaped = escape(printable(words)).replace("-&gt;", "→")
    return OPTION.sub(r"<code>\1</code>", escaped)


def dotted(name: str) -> str:
    """The name of a layer as HTML; lines break behind its dots."""
    return escape(printable(name)).replace(".", ".<wbr>")
