"""Cells, their shades and their words."""

import math

from ptq.drawing.heat_map import Cell, Tile, heat_map, shade, shade_edges, tile_map
from ptq.drawing.style import STEPS
from ptq.drawing.svg import NARROW, Picture, text_width


def cells(values: list[list[float]]) -> list[Cell]:
    return [
        Cell(row=i, column=j, value=value, title=f"{i} {j}")
        for i, row in enumerate(values)
        for j, value in enumerate(row)
    ]


def words(picture: Picture) -> list[str]:
    return [e.text or "" for e in picture.body if e.tag == "text"]


def test_shades_are_equal_ratios() -> None:
    edges = shade_edges([1.0, 512.0])
    assert len(edges) == STEPS - 1
    assert [shade(2.1 * 2**i, edges) for i in range(8)] == list(range(1, 9))
    assert shade(0.5, edges) == 0 and shade(1e9, edges) == STEPS - 1
    assert shade(math.nan, edges) == shade(math.inf, edges) == STEPS - 1


def test_a_few_small_ones_leave_shades_to_all_others() -> None:
    edges = shade_edges([1e-9, *(1.0 + i / 100 for i in range(100))])
    assert edges[0] > 0.4


def test_what_is_nearly_equal_looks_equal() -> None:
    values = [0.0062, 0.0063, 0.0064]
    assert len({shade(value, shade_edges(values)) for value in values}) == 1


def test_equal_and_missing_numbers_have_a_shade() -> None:
    assert shade(0.3, shade_edges([0.3, 0.3])) == STEPS // 2
    for values in ([0.0, 0.0], []):
        assert shade(0.3, shade_edges(values)) == 0


def test_a_cell_has_its_number_shade_and_title() -> None:
    picture = heat_map(["0", "1"], ["q", "k"], cells([[0.1, 0.02], [0.003, 0.5]]), label="errors")
    assert picture.marks == 4
    assert {"0.1", "0.02", "0.003", "0.5", "0", "1", "q", "k"} <= set(words(picture))
    rects = [e for e in picture.body if "m" in (e.get("class") or "").split()]
    assert [e.findtext("title") for e in rects] == ["0 0", "0 1", "1 0", "1 1"]
    assert rects[3].get("class") == f"m h{STEPS - 1}"


def test_many_columns_have_no_numbers_and_fit() -> None:
    names = [f"experts.projection_{i}" for i in range(30)]
    picture = heat_map(["0"], names, cells([[0.25] * 30]), label="errors")
    assert "0.25" not in words(picture) and picture.marks == 30
    for rect in picture.body:
        if rect.tag == "rect":
            assert float(rect.get("x", 0)) + float(rect.get("width", 0)) <= NARROW


def test_names_to_the_left_are_shortened() -> None:
    long = "a.very.long.name.of.a.layer.that.stands.alone"
    (name, *_) = [w for w in words(heat_map([long], ["q"], cells([[1.0]]), label="")) if "…" in w]
    assert long.endswith(name[1:]) and text_width(name) < NARROW / 3


def test_choices_have_a_letter_and_a_key() -> None:
    tiles = [Tile(row=0, column=0, choice=1, title="b"), Tile(row=0, column=1, choice=0, title="a")]
    picture = tile_map(["0"], ["q", "k"], tiles, ["mxfp4", "nvfp4"], label="best")
    assert picture.marks == 2
    assert words(picture).count("A") == words(picture).count("B") == 2
    assert {"mxfp4", "nvfp4"} <= set(words(picture))
