"""Shares by bin, and lines with names."""

from ptq.drawing.histogram import Line, histogram
from ptq.drawing.svg import Picture

EDGES = [1.0, 2.0, 3.0, 4.0]


def drawn(lines: list[Line]) -> Picture:
    series = [("before", [1, 2, 1]), ("after", [30, 10, 0])]
    return histogram(EDGES, series, lines, x_name="κ", label="crest factors")


def test_every_bin_says_its_shares() -> None:
    found = drawn([])
    titles = [e.findtext("title") for e in found.body if e.get("class") == "m sense"]
    assert found.marks == 3
    assert titles[0] == "1.00 to 2.00: before 25.00 %, after 75.00 %"
    assert titles[2] == "3.00 to 4.00: before 25.00 %, after 0.00 %"


def test_lines_stand_at_their_numbers_and_cross_no_name() -> None:
    found = drawn([Line(at=2.0, name="one"), Line(at=2.2, name="two"),
                   Line(at=3.0, name="dotted", dashed=True)])  # fmt: skip
    guides = [e for e in found.body if e.get("class") == "guide"]
    places = {e.findtext("title"): float(e.get("x1", 0)) for e in guides}
    assert list(places) == ["dotted: 3.00", "two: 2.20", "one: 2.00"]
    names = {e.text: e for e in found.body if e.tag == "text" and e.text in ("one", "two")}
    assert set(names) == {"one", "two"}
    tops = {e.findtext("title"): float(e.get("y1", 0)) for e in guides}
    # the line to the right ends below the name of the one to the left
    assert tops["two: 2.20"] > float(names["one"].get("y", 0))


def test_nothing_counted_is_no_error() -> None:
    empty = histogram(EDGES, [("none", [0, 0, 0])], [], x_name="κ", label="nothing")
    assert empty.marks == 3
