"""Where numbers lie, and which are written."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptq.drawing.axes import Axis, frame, short, spanning

finite = st.floats(-1e6, 1e6, allow_nan=False)


def test_numbers_lie_between_the_ends() -> None:
    axis = Axis(low=1, high=3, start=10, end=110)
    assert [axis(v) for v in (1, 2, 3)] == [10, 60, 110]
    assert [axis(v) for v in (-5, 99)] == [10, 110], "what is outside lies at the edge"
    up = Axis(low=0.01, high=100, start=200, end=0, log=True)
    assert [round(up(v)) for v in (0.01, 1, 100)] == [200, 100, 0]
    assert up(0.0) == 200


@given(st.lists(finite, min_size=1))
def test_a_span_holds_all_values(values: list[float]) -> None:
    axis = spanning(values, 0, 100)
    assert axis.low <= min(values) and max(values) <= axis.high and axis.low < axis.high


@given(st.lists(st.floats(1e-9, 1e9), min_size=1))
def test_a_logarithmic_span_holds_all_values(values: list[float]) -> None:
    axis = spanning([*values, 0.0, math.nan], 0, 100, log=True)
    assert axis.low < min(values) and max(values) < axis.high


@given(st.floats(-1e5, 1e5), st.floats(1e-4, 1e5))
def test_ticks_are_few_and_inside(low: float, width: float) -> None:
    axis = Axis(low=low, high=low + width, start=0, end=1)
    ticks = axis.ticks(6)
    assert 1 <= len(ticks) <= 8
    assert all(axis.low - 1e-6 * width <= v <= axis.high + 1e-6 * width for v, _ in ticks)
    assert len({word for _, word in ticks}) == len(ticks)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.001, 10, ["0.001", "0.01", "0.1", "1", "10"]),
        (0.02, 0.09, ["0.02", "0.05"]),
        (4.4, 5.6, ["5"]),
    ],
)
def test_logarithmic_ticks(low: float, high: float, words: list[str]) -> None:
    found = [word for _, word in Axis(low=low, high=high, start=0, end=1, log=True).ticks()]
    assert set(words) <= set(found)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0123, "0.012"), (1.2e-5, "1.2e-5"), (3e-4, "3e-4"), (3.44, "3.4"), (1234.5, "1234"),
     (0.0, "0"), (math.inf, "inf")],
)  # fmt: skip
def test_short_numbers(value: float, shown: str) -> None:
    assert short(value) == shown


def test_words_of_an_axis_do_not_overlap() -> None:
    x = Axis(low=0, high=10, start=30, end=90)
    y = Axis(low=0, high=1, start=100, end=20)
    made = frame(x, y, x_name="n", y_name="e", x_ticks=[(i, "a long word") for i in range(11)])
    words = [e for e in made.back if e.tag == "text" and e.text == "a long word"]
    assert 1 <= len(words) <= 2
