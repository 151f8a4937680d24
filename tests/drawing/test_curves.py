"""Curves and their names."""

from itertools import pairwise

from ptq.drawing.curves import Curve, curves
from ptq.drawing.svg import Picture, text_width

TICKS = [(1.0, "1"), (16.0, "16"), (128.0, "128")]
SPEEDS = [(0.5, "0.5×"), (1.0, "1×"), (2.0, "2×"), (64.0, "64×")]


def drawn(*found: Curve) -> Picture:
    return curves(found, width=340, x_ticks=TICKS, y_ticks=SPEEDS, x_name="tokens",
                  y_name="speed", title="a model", label="speeds")  # fmt: skip


def curve(name: str, *speeds: float, colour: int | None = 0) -> Curve:
    points = tuple((x, y) for (x, _), y in zip(TICKS, speeds, strict=True))
    return Curve(name=name, points=points, colour=colour)


def test_points_have_marks_and_titles() -> None:
    made = drawn(curve("w4a16", 3.0, 2.0, 0.7), curve("bf16", 1, 1, 1, colour=None))
    assert made.marks == 3
    titles = [e.findtext("title") for e in made.body if "m" in (e.get("class") or "").split()]
    assert titles == ["w4a16: 3.00 at 1", "w4a16: 2.00 at 16", "w4a16: 0.70 at 128"]
    words = [e.text for e in made.body if e.tag == "text"]
    assert "1×" in words and "2×" in words
    assert "64×" not in words, "outside of the plot"


def test_names_at_the_ends_do_not_overlap_and_fit() -> None:
    found = [curve(f"name {i}", 1.0, 1.1, 1.2 + i / 1000, colour=i) for i in range(4)]
    made = drawn(*found)
    names = [e for e in made.body if e.tag == "text" and (e.text or "").startswith("name")]
    ys = sorted(float(e.get("y", 0)) for e in names)
    assert len(names) == 4
    assert all(b - a >= 10.9 for a, b in pairwise(ys))
    for e in names:
        assert float(e.get("x", 0)) + text_width(e.text or "", 9) <= 340
