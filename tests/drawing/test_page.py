"""A page that needs nothing, and on which every name is text."""

import re
from html.parser import HTMLParser

from browser import check_views

from ptq.drawing.heat_map import Cell, heat_map
from ptq.drawing.page import Card, Figure, Page, Section, Table, dotted, options, render

NASTY = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7*7 }}\u202e"


class Reader(HTMLParser):
    """The tags, attributes and words of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def page(word: str, columns: int = 7) -> str:
    cells = [Cell(row=0, column=i, value=0.1, title=word) for i in range(columns)]
    picture = heat_map([word], [word] * columns, cells, label=word)
    figure = Figure(title=word, caption=word, picture=picture)
    wide = Figure(title=word, caption=word, picture=picture, wide=picture)
    row = (word,) * columns
    tables = (
        Table(title=word, head=row, rows=(row, row)),
        Table(title=word, head=row, rows=(row,), folded=True, words=frozenset((0, 1))),
    )
    section = Section(
        name="all",
        title=word,
        words=(word,),
        figures=(figure, wide),
        tables=tables,
        cards=(Card(title=word, figure=word, words=(word,)),),
    )
    return render(
        Page(kind=word, title=word, facts=((word, word),), summary=(word,), sections=(section,),
             foot=word)
    )  # fmt: skip


def test_every_name_is_text_everywhere() -> None:
    found = Reader()
    found.feed(page(NASTY))
    assert not {"script", "img", "iframe", "object"} & found.tags
    assert not {name for name in found.attributes if name.startswith("on")}
    shown = NASTY.replace("\u202e", r"\u202e")
    assert found.words.count(shown) > 20
    assert "49" not in "".join(found.words) and "\u202e" not in "".join(found.words)


def test_it_needs_nothing() -> None:
    written = page("a")
    assert "default-src 'none'" in written
    assert "http" not in re.sub(r"http-equiv|http://www\.w3\.org/2000/svg", "", written)
    assert "prefers-color-scheme:dark" in written and "<script" not in written


def test_options_of_the_command_line_are_code() -> None:
    assert options("rotate it (--rotation 16): 2") == "rotate it <code>(--rotation 16</code>): 2"
    assert options("as --eight-bit 10% does") == "as <code>--eight-bit 10%</code> does"
    assert options("<b> a--b: 1 -> 2") == "&lt;b&gt; a--b: 1 → 2"


def test_names_of_layers_break_at_their_dots() -> None:
    assert dotted("a.<b>.c") == "a.<wbr>&lt;b&gt;.<wbr>c"


def test_in_a_browser_nothing_is_wider_than_a_phone(browser) -> None:
    names = "model.layers.12.mlp.experts.17.gate_up_proj"
    check_views(browser.views(page(names)), plots=2)
    check_views(browser.views(page(NASTY, columns=12)), plots=2)


def test_the_browser_finds_what_is_wrong(browser) -> None:
    """The check can fail: something wide, a mark that is not drawn, a word that is cut off."""
    wide = page("a").replace("<main>", '<main><div style="width:700px">wide</div>')
    phone, screen = browser.views(wide)
    assert len(phone.too_wide) >= 1 and screen.too_wide == ()
    lost = re.sub(r'(class="m h\d" [^>]*width)="[\d.]+" height="[\d.]+"', r'\1="0" height="0"',
                  page("a"))  # fmt: skip
    assert all(plot.drawn < plot.said for plot in browser.views(lost)[0].plots)
    cut = page("a").replace('<text x="0" y="0"', '<text x="900" y="0"', 1)
    assert browser.views(cut)[0].plots[0].cut != ()


def test_both_themes(browser) -> None:
    light, dark = (browser.views(page("a"), dark=dark)[0].paper for dark in (False, True))
    assert (light, dark) == ("rgb(255, 255, 255)", "rgb(20, 23, 27)")
