"""Elements, pictures, and names that would be markup."""

import xml.etree.ElementTree as ET

import pytest

from ptq.drawing.style import MARKERS
from ptq.drawing.svg import (
    NARROW,
    Picture,
    draw,
    legend,
    marker,
    number,
    path,
    shortened,
    side_by_side,
    text,
    text_width,
)

NASTY = "</text><script>alert(1)</script>&\"'\x00\u202e"


def picture(*body: ET.Element) -> Picture:
    return Picture(width=100, height=50, label=NASTY, body=body)


def test_names_are_text_in_every_place() -> None:
    parts = (text(0, 0, NASTY), draw("rect", title=NASTY, class_="m", data_name=NASTY))
    for written in (picture(*parts).inline(), picture(*parts).file()):
        root = ET.fromstring(written)
        assert {e.tag.rpartition("}")[2] for e in root.iter()} <= {
            "svg", "text", "rect", "title", "style",
        }  # fmt: skip
        assert "\x00" not in written and "\u202e" not in written
        assert "<script" not in written
        shown = NASTY.replace("\x00", r"\x00").replace("\u202e", r"\u202e")
        assert root.attrib["aria-label"] == shown
        assert [e.text for e in root.iter() if e.tag.endswith("text")] == [shown]


def test_marks_are_counted_however_deep() -> None:
    inner = picture(draw("g", draw("rect", class_="m f1"), draw("rect", class_="mm")))
    assert inner.marks == 1
    assert side_by_side([inner, inner], 2, "two").marks == 2


def test_a_file_stands_alone() -> None:
    written = picture(path([(0, 0), (1.234, 5)], class_="curve l0")).file()
    assert written.startswith("<?xml") and "prefers-color-scheme" in written
    assert 'd="M0 0L1.23 5"' in written and written.endswith("</svg>\n")
    assert "http" not in written.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0, "0"), (-0.001, "0"), (3.0, "3"), (2.5, "2.5"), (10.0, "10")]
)
def test_coordinates_are_short(value: float, shown: str) -> None:
    assert number(value) == shown


@pytest.mark.parametrize("shape", sorted(set(MARKERS)))
def test_markers_lie_about_their_place(shape: str) -> None:
    made = marker(shape, 10, 20, 3, title="here", class_="m")
    assert made.find("title") is not None
    if shape != "circle":
        corners = [tuple(map(float, c.split(","))) for c in made.attrib["points"].split()]
        assert all(abs(x - 10) < 4 and abs(y - 20) < 4 for x, y in corners)


def test_long_names_keep_their_end() -> None:
    assert shortened("model.layers.3.mlp", 500) == "model.layers.3.mlp"
    short = shortened("model.layers.3.mlp.down_proj", 60)
    assert short.startswith("…") and short.endswith("proj") and text_width(short) <= 62


def test_a_legend_breaks_into_rows() -> None:
    one, low = legend(["a", "b"], NARROW)
    many, high = legend([f"a series with a long name {i}" for i in range(4)], NARROW)
    assert low < high and len(many) == 2 * len(one)
    assert legend([], NARROW) == ([], 0.0)


def test_pictures_side_by_side_do_not_overlap() -> None:
    whole = side_by_side([picture(), picture(), picture()], 2, "title", "note")
    places = [(float(e.attrib["x"]), float(e.attrib["y"])) for e in whole.body if e.tag == "svg"]
    assert len(set(places)) == 3
    assert whole.width >= max(x for x, _ in places) + 100
    assert whole.height >= max(y for _, y in places) + 50
