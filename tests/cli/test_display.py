"""What the command line shows: figures that can be read, JSON that can be parsed, progress with the
time left."""

import json
import math

import pytest

from ptq.cli import display


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
    assert display.number(value) == shown


@pytest.mark.parametrize(
    ("count", "shown"), [(12, "12 B"), (1234, "1.23 kB"), (5.1e9, "5.10 GB"), (3e15, "3000.00 TB")]
)
def test_sizes_are_decimal(count: float, shown: str):
    assert display.size(count) == shown


def test_json_has_no_numbers_that_json_lacks(capsys: pytest.CaptureFixture[str]):
    display.print_json({"a": math.inf, "b": [math.nan, 1.5], "c": ("ü", None)})

    def refuse(name: str) -> float:
        raise AssertionError(name)

    assert json.loads(capsys.readouterr().out, parse_constant=refuse) == {
        "a": None,
        "b": [None, 1.5],
        "c": ["ü", None],
    }


def test_progress_in_a_log_is_a_line_for_every_step(capsys: pytest.CaptureFixture[str]):
    with display.bar(False, "working") as step:
        step(1, 3, "first")
        step(2, 3, "second")
    captured = capsys.readouterr()
    assert captured.out == ""
    first, second = captured.err.splitlines()
    assert (
        first.startswith("working 1/3  first")
        and second.startswith("working 2/3  second")
        and "left" in first
    )


def test_a_quiet_bar_says_nothing(capsys: pytest.CaptureFixture[str]):
    with display.bar(True, "working") as step:
        step(1, 1, "x")
    assert capsys.readouterr() == ("", "")


def test_evaluation_in_a_log_tells_every_tenth_window(capsys: pytest.CaptureFixture[str]):
    with display.evaluating(quiet=False) as on_window:
        for done in range(1, 101):
            on_window(done, 100)
    assert len(capsys.readouterr().err.splitlines()) == 10
