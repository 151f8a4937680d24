"""What the command line shows: JSON that can be parsed."""

import json
import math

import pytest

from ptq.cli import display


def test_json_has_no_numbers_that_json_lacks(capsys: pytest.CaptureFixture[str]):
    display.print_json({"a": math.inf, "b": [math.nan, 1.5], "c": ("ü", None)})

    def refuse(name: str) -> float:
        raise AssertionError(name)

    assert json.loads(capsys.readouterr().out, parse_constant=refuse) == {
        "a": None,
        "b": [None, 1.5],
        "c": ["ü", None],
    }
