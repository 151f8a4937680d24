"""Results as text and as HTML: aligned, escaped, and nothing lost."""

from dataclasses import replace
from html.parser import HTMLParser

import pytest

from ptq.runtime.tables import Table, Tabular

TABLE = Table(
    title="a title",
    columns=("module", "count"),
    rows=(("q_proj", "12"), ("<b>&", "3")),
    dim=frozenset({1}),
    notes=("below",),
)


def test_text_is_aligned_and_ends_without_blanks():
    assert TABLE.text().splitlines() == [
        "a title",
        "module  count",
        "─────────────",
        "q_proj     12",
        "<b>&        3",
        "below",
    ]


def test_words_stand_on_the_left():
    table = replace(TABLE, columns=("module", "why"), rows=(("a", "long"), ("b", "x")))
    table = replace(table, words=frozenset({1}), title="", notes=())
    assert table.text().splitlines() == [
        "module  why",
        "────────────",
        "a       long",
        "b       x",
    ]
    assert table.html().count("text-align:left") == 6
    assert [TABLE.left(0), TABLE.left(1), table.left(1)] == [True, False, True]


class Cells(HTMLParser):
    """The text of every element, and which rows are dim."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, str]] = []
        self.dim: list[bool] = []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "tr":
            self.dim.append("opacity" in (dict(attrs).get("style") or ""))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, "elements cross"

    def handle_data(self, data):
        self.found.append((self.open[-1], data))


def test_html_holds_the_same_cells_escaped():
    parser = Cells()
    parser.feed(TABLE.html())
    assert parser.open == []
    assert [text for tag, text in parser.found if tag in ("th", "td")] == [
        *TABLE.columns,
        *(cell for row in TABLE.rows for cell in row),
    ]
    assert ("caption", "a title") in parser.found and ("small", "below") in parser.found
    assert parser.dim == [False, False, True]


def test_without_rows_there_are_only_title_and_notes():
    table = Table(title="heading", columns=(), rows=(), notes=("note",))
    assert table.text() == "heading\nnote"
    assert "<thead>" not in table.html()


def test_a_row_of_another_length_is_no_table():
    with pytest.raises(ValueError):
        Table(title="", columns=("a", "b"), rows=(("1",),)).text()


def test_a_result_shows_its_tables_everywhere():
    class Two(Tabular):
        def tables(self):
            return TABLE, TABLE

    assert str(Two()) == repr(Two()) == f"{TABLE.text()}\n\n{TABLE.text()}"
    assert Two()._repr_html_() == TABLE.html() * 2
