"""Colours that can be told apart, on both backgrounds."""

import pytest

from ptq.drawing.style import SERIES, SHADES, STEPS, THEMES, contrast, rules, text_on

themes = pytest.mark.parametrize("theme", ["light", "dark"])


def test_contrast_is_that_of_the_guidelines() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
    assert contrast("#ffffff", "#ffffff") == 1


@themes
def test_words_are_read_and_series_are_seen(theme: str) -> None:
    colours = THEMES[theme]
    for ground in ("paper", "panel"):
        for name in ("ink", "soft", "accent", "alarm"):
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    for colour in SERIES[theme]:
        assert contrast(colour, colours["paper"]) >= 3.0, colour


@themes
def test_shades_rise_away_from_the_background_and_carry_words(theme: str) -> None:
    steps = [contrast(shade, THEMES[theme]["paper"]) for shade in SHADES[theme]]
    assert steps == sorted(steps) and len(steps) == STEPS
    for shade in SHADES[theme]:
        assert contrast(text_on(shade), shade) >= 4.5, shade


# Brettel, Viénot and Mollon's projections, as one matrix each (Viénot 1999), of linear RGB.
BLIND = {
    "protanopia": ((0.11238, 0.88762, 0.0), (0.11238, 0.88762, 0.0), (0.00401, -0.00401, 1.0)),
    "deuteranopia": ((0.29275, 0.70725, 0.0), (0.29275, 0.70725, 0.0), (-0.02234, 0.02234, 1.0)),
}


def seen(colour: str, matrix: tuple[tuple[float, ...], ...]) -> tuple[float, ...]:
    linear = [(int(colour[i : i + 2], 16) / 255) ** 2.2 for i in (1, 3, 5)]
    return tuple(
        max(sum(w * c for w, c in zip(row, linear, strict=True)), 0) ** (1 / 2.2) for row in matrix
    )


@themes
@pytest.mark.parametrize("kind", BLIND)
def test_the_first_three_series_differ_for_the_colour_blind(theme: str, kind: str) -> None:
    """Further ones differ in shape and dash alone."""
    found = [seen(colour, BLIND[kind]) for colour in SERIES[theme][:3]]
    for i, one in enumerate(found):
        for other in found[:i]:
            assert sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5 > 0.2


def test_both_themes_are_in_the_rules() -> None:
    text = rules()
    assert "prefers-color-scheme:dark" in text
    for theme in THEMES:
        assert all(colour in text for colour in (*SERIES[theme], *SHADES[theme]))
    assert "<" not in text and "&" not in text, "it stands in XML as it is"
