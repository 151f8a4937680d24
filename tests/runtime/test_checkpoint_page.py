"""Pages of checkpoints, in a browser."""

from dataclasses import replace
from pathlib import Path

import pytest
from browser import Browser, check_views

from ptq.drawing.style import COUNT
from ptq.runtime.checkpoint_page import compare_page, inspect_page
from ptq.runtime.comparison import Comparison, compare_checkpoints
from ptq.runtime.inspect import Report, inspect

KINDS = 7


@pytest.fixture(scope="module")
def found(two_checkpoints: list[Path]) -> Comparison:
    return compare_checkpoints(two_checkpoints)


@pytest.fixture(scope="module")
def report(two_checkpoints: list[Path]) -> Report:
    """With two formats."""
    return inspect(two_checkpoints[1])


def test_a_checkpoint_in_a_browser(report: Report, browser: Browser) -> None:
    """Three maps of errors, one of formats, and a line each for the result and for rounding to
    nearest."""
    views = browser.views(inspect_page(report))
    check_views(views, plots=5)
    layers = 2 * KINDS
    for view in views:
        assert [plot.drawn for plot in view.plots] == [*[layers] * 4, 2 * layers]
        assert "mxfp4 + mxfp8" in view.text and "lm_head.weight" in view.text
    worst = max(report.layers, key=lambda row: row.error or 0)
    assert f"{worst.layer} lost most" in views[0].text


def test_a_comparison_in_a_browser(found: Comparison, browser: Browser) -> None:
    """A line and a column of the map for each, and the front."""
    views = browser.views(compare_page(found), dark=True)
    check_views(views, plots=3)
    layers, kinds = 2 * (KINDS - 1), KINDS - 1
    for view in views:
        assert [plot.drawn for plot in view.plots] == [2 * layers, 2 * kinds, 2]
        assert "bits per quantized weight" in view.text


def test_without_reports_there_are_sizes_alone(report: Report) -> None:
    rows = tuple(replace(row, error=None, held_out_error=None, rtn_error=None)
                 for row in report.layers)  # fmt: skip
    page = inspect_page(replace(report, layers=rows))
    assert 'id="sizes"' in page and 'id="layers"' not in page
    assert "no report of a run" in page


def test_errors_of_weights_are_drawn_where_no_others_are_known(found: Comparison) -> None:
    weights = tuple(
        replace(c, report=replace(c.report, layers=tuple(
            replace(row, of_outputs=False) for row in c.report.layers
        )))
        for c in found.checkpoints
    )  # fmt: skip
    page = compare_page(replace(found, checkpoints=weights))
    assert "has the least mean error of weights" in page and 'id="layers"' in page


def test_more_checkpoints_than_colours(found: Comparison) -> None:
    many = tuple(replace(found.checkpoints[0], name=f"number {i}") for i in range(COUNT + 2))
    page = compare_page(replace(found, checkpoints=many))
    assert f"Lines are of the first {COUNT}." in page and f"number {COUNT + 1}" in page


def test_names_are_text(report: Report, found: Comparison) -> None:
    nasty = "<script>alert(1)</script>"
    rows = tuple(replace(row, layer=f"{nasty}.{row.layer}") for row in report.layers)
    page = inspect_page(replace(report, layers=rows, path=nasty, recipe={nasty: nasty}))
    named = tuple(replace(c, name=nasty) for c in found.checkpoints)
    for written in (page, compare_page(replace(found, checkpoints=named))):
        assert "<script" not in written and "&lt;script&gt;" in written
