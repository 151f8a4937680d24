"""What a direct cast comes to: who wins, what broke, the table."""

import csv
import io

import pytest

from ptq.numerics.formats import FORMATS
from ptq.pipeline.cast_results import (
    PAPER_WINS,
    Cast,
    DirectCast,
    collapsed,
    perplexity,
    table,
    versus,
)
from ptq.reading.schema import check, plain


def cast(format: str, rotated: bool, kl: float, windows: tuple[float, ...]) -> Cast:
    return Cast(
        format=format, rotated=rotated, nll=2 + kl, kl=kl, kl_top25=sum(windows) / len(windows),
        top1_agreement=0.9, windows=windows,
    )  # fmt: skip


@pytest.fixture
def found() -> DirectCast:
    return DirectCast(
        identity={"text": "t"}, tokens=30, seq_len=16, reference_nll=2.0, seconds=1.0,
        casts=(
            cast("nvint4", False, 0.5, (0.4, 0.1)),
            cast("nvfp4", False, 0.3, (0.2, 0.2)),
            cast("nvint4", True, 0.2, (0.1, 0.1)),
            cast("nvfp4", True, 0.9, (0.5, 0.4)),
            cast("mxint8", True, 0.001, (0.001, 0.001)),
        ),
    )  # fmt: skip


def test_wins_are_counted_by_window_and_by_model(found: DirectCast) -> None:
    plainly, rotated = versus(found)
    assert (plainly.ints, plainly.floats, plainly.rotated) == ("nvint4", "nvfp4", False)
    assert (plainly.won, plainly.windows, plainly.paper) == (1, 2, 0)
    assert not plainly.ints_win and plainly.kl == (0.5, 0.3)
    assert rotated.ints_win and (rotated.won, rotated.paper) == (2, 12)
    assert rotated.perplexity[0] == pytest.approx(perplexity(2.2))


def test_a_rotation_that_breaks_a_format_is_told(found: DirectCast) -> None:
    assert collapsed(found) == ["nvfp4"]


def test_a_table_and_json(found: DirectCast) -> None:
    rows = list(csv.DictReader(io.StringIO(table(found))))
    assert rows[0]["format"] == "original" and float(rows[0]["kl"]) == 0
    assert len(rows) == 1 + 5 and rows[3]["rotated"] == "1"
    assert float(rows[1]["kl_top25_printed"]) == pytest.approx(0.25 * 1e6 / 25)
    assert check(plain(found), DirectCast, "it") == found


def test_pairs_of_the_study_are_pairs_of_formats() -> None:
    assert PAPER_WINS.keys() <= FORMATS.keys() and perplexity(1e4) == float("inf")
