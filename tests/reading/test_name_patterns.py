"""Patterns select what people mean by them, in bounded time."""

import time

import pytest

from ptq.reading.name_patterns import LONGEST, check_pattern, matches, matches_name

NAME = "model.layers.3.mlp.down_proj"


@pytest.mark.parametrize(
    "pattern",
    [NAME, "down_proj", "mlp.down_proj", "*.down_proj", "model.layers.?.mlp.*", r"re:.*\.mlp\."],
)
def test_a_pattern_of_a_recipe_selects(pattern: str) -> None:
    assert matches(check_pattern(pattern), NAME)


@pytest.mark.parametrize("pattern", ["proj", "layers", "re:down_proj", "re:.*up_proj", ""])
def test_a_pattern_of_a_recipe_selects_no_other(pattern: str) -> None:
    assert not matches(check_pattern(pattern), NAME)


def test_any_name_of_a_module_counts() -> None:
    assert matches("gate", "model.experts", "mlp.gate")


@pytest.mark.parametrize(
    ("pattern", "selects"), [(NAME, True), ("down_proj", False), ("re:.*down", True), ("*", False)]
)
def test_a_configuration_has_exact_names_or_expressions(pattern: str, selects: bool) -> None:
    assert matches_name(pattern, NAME) is selects


@pytest.mark.parametrize("expression", [r"(a|aa)+$", r"(a+)+$", r"(.*a){20}$", r"(a*)*b"])
def test_an_expression_that_would_not_end_is_stopped(expression: str) -> None:
    start = time.monotonic()
    try:
        assert not matches_name(f"re:{expression}", "a" * 60 + "!")
    except ValueError as error:
        assert "takes too long on aaaa" in str(error)
        with pytest.raises(ValueError, match="takes too long"):  # and has no second chance
            for _ in range(100):
                matches_name(f"re:{expression}", "a" * 61 + "!")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("re:(", r"re:\( is no regular expression \(missing \)"),
        ("re:" + "(" * 900, "is no regular expression"),
        ("re:a{1" + "0" * 30 + "}", "."),
        ("re:" + "a" * (LONGEST + 1), "characters: use less than"),
        ("a" * (LONGEST + 1), "characters: use less than"),
    ],
)
def test_what_is_no_pattern_is_said(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check_pattern(pattern)
    assert "\n" not in str(caught.value)
