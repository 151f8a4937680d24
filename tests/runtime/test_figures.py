"""Numbers that can be read."""

import math

import pytest

from ptq.runtime import figures


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (0.0, "0"),
        (0.00012345, "0.0001234"),
        (12.3456, "12.35"),
        (123456.7, "123457"),
        (math.inf, "inf"),
    ],
)
def test_numbers_have_four_digits(value: float | None, shown: str):
    assert figures.number(value) == shown


@pytest.mark.parametrize(
    ("count", "shown"), [(12, "12 B"), (1234, "1.23 kB"), (5.1e9, "5.10 GB"), (3e15, "3000.00 TB")]
)
def test_sizes_are_decimal(count: float, shown: str):
    assert figures.size(count) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (-3, "0 s"),
        (0.4, "0 s"),
        (59.6, "1 min 00 s"),
        (809, "13 min 29 s"),
        (3600, "1 h 00 min"),
        (9 * 3600 + 299, "9 h 04 min"),
        (200_000, "2 d 07 h"),
    ],
)
def test_times_name_their_units(seconds: float, shown: str):
    assert figures.span(seconds) == shown


@pytest.mark.parametrize(
    ("number", "shown"), [(950, "950"), (134_515_008, "134.5 million"), (8.03e9, "8.03 billion")]
)
def test_models_are_named_by_their_parameters(number: float, shown: str):
    assert figures.count(int(number)) == shown
