"""Layers on the page: what is said of them, and where."""

import pytest

from ptq.pipeline.analysis import BlockAnalysis, LayerAnalysis, OutputErrors
from ptq.pipeline.analysis_layers import error_maps, form_words, worst_layers


def layer(name: str, *errors: tuple[bool, str, float]) -> LayerAnalysis:
    """Errors are (rotated, format, error of outputs); weights alone cost half."""
    forms = tuple(
        OutputErrors(balanced=False, rotated=rotated, both={fmt: error}, weights={fmt: error / 2})
        for rotated, fmt, error in errors
    )
    return LayerAnalysis(name=name, out_features=64, in_features=64, errors=forms)


@pytest.fixture
def layers() -> list[LayerAnalysis]:
    return [
        layer("m.0.q", (False, "nvfp4", 0.2), (True, "nvint4", 0.1)),
        layer("m.0.experts.0.up", (False, "mxfp4", 0.01)),
        layer("m.0.experts.1.up", (False, "nvfp4", 0.03)),
        layer("m.1.q", (False, "nvfp4", 0.4), (True, "nvint4", 0.5)),
        layer("m.1.unseen"),
    ]


def test_a_cell_is_the_least_error_of_its_layers(layers: list[LayerAnalysis]) -> None:
    section = error_maps(layers)
    assert section is not None
    both, alone, choice = (figure.picture for figure in section.figures)
    titles = [
        [e.findtext("title") for e in picture.body if "m" in (e.get("class") or "").split()]
        for picture in (both, alone, choice)
    ]
    assert titles[0] == [
        "block 0, q: 0.1, nvint4 rotated",
        "block 0, up: mean 0.02 of 2 layers, 0.01 to 0.03",
        "block 1, q: 0.4, nvfp4 as it is",
    ]
    assert titles[1][0] == "block 0, q: 0.05, nvint4 rotated"
    assert titles[2][1] == "block 0, up: mxfp4 in 1 of 2 layers"
    assert section.tables[0].rows == (("0", "0.1", "0.02"), ("1", "0.4", "–"))


def test_the_worst_have_a_card(layers: list[LayerAnalysis]) -> None:
    block = BlockAnalysis(name="m.0", index=0, tensors=(), layers=tuple(layers))
    section = worst_layers([block])
    assert section is not None and section.title.startswith("The 4 layers")
    assert [card.title for card in section.cards][:2] == ["m.1.q", "m.0.q"]
    assert section.cards[1].figure == "0.1000 in nvint4, rotated"
    assert all(word.endswith(".") for card in section.cards for word in card.words)


def test_without_errors_there_is_nothing() -> None:
    assert error_maps([layer("m.0.q")]) is None
    assert worst_layers([]) is None


def test_forms_in_words() -> None:
    assert form_words(False, False) == "as it is"
    assert form_words(True, True) == "balanced, rotated"
