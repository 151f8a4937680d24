"""Layers in the order of the model, the worst by name."""

import pytest

from ptq.drawing.layer_plot import LayerSeries, layer_plot, wide_and_narrow
from ptq.drawing.style import COUNT
from ptq.drawing.svg import NARROW, WIDE, Picture

NAMES = [f"model.layers.{i // 3}.{kind}" for i, kind in enumerate(("q", "k", "v") * 4)]
BLOCKS = [name.split(".")[2] for name in NAMES]


def drawn(*series: LayerSeries, width: float = WIDE) -> Picture:
    return layer_plot(NAMES, BLOCKS, series, width=width, what="error", label="errors")


def words(picture: Picture) -> list[str]:
    return [e.text or "" for e in picture.body if e.tag == "text"]


def test_marks_are_of_layers_whose_figure_is_known() -> None:
    values = (None, *(0.1 + i / 100 for i in range(11)))
    found = drawn(LayerSeries(name="GPTQ", values=values))
    assert found.marks == 11
    titles = [e.findtext("title") for e in found.body if "m" in (e.get("class") or "").split()]
    assert titles[0] == "model.layers.0.k, GPTQ: 0.1"
    assert "error, lower is better" in words(found)


def test_the_worst_of_the_last_are_named() -> None:
    rtn = LayerSeries(name="RTN", values=(1.0,) * 12)
    last = LayerSeries(name="GPTQ", values=(0.01,) * 5 + (0.9, 0.02, 0.7, 0.8) + (0.01,) * 3)
    found = words(drawn(rtn, last))
    assert "worst of GPTQ" in found
    named = [word for word in found if word[:1] in "123" and "model.layers" in word]
    assert named == ["1  model.layers.1.v", "2  model.layers.2.v", "3  model.layers.2.k"]


def test_names_of_layers_where_there_is_room() -> None:
    series = LayerSeries(name="a", values=(0.5,) * 12)
    assert words(drawn(series)).count("q") == 4
    many = [f"model.layers.{i}.q" for i in range(200)]
    found = layer_plot(many, many, [LayerSeries(name="a", values=(0.5,) * 200)],
                       width=NARROW, what="error", label="many")  # fmt: skip
    assert "q" not in words(found) and found.marks == 200


def test_more_lines_than_colours_are_refused() -> None:
    series = [LayerSeries(name=str(i), values=(0.5,) * 12) for i in range(COUNT + 1)]
    with pytest.raises(ValueError, match="cannot be told apart"):
        drawn(*series)


def test_nothing_known_is_no_error() -> None:
    assert drawn(LayerSeries(name="a", values=(None,) * 12)).marks == 0
    assert drawn().marks == 0


def test_two_widths() -> None:
    series = [LayerSeries(name="a", values=(0.5,) * 12)]
    wide, narrow = wide_and_narrow(NAMES, BLOCKS, series, what="error", label="errors")
    assert (wide.width, narrow.width) == (WIDE, NARROW)
    assert wide.marks == narrow.marks == 12
