"""``--html``: what is written, and what is never replaced."""

from pathlib import Path

import pytest
from command_line import Run

from ptq.cli.pages import SIGN, check_page, write_page
from ptq.drawing.page import Page, render

EMPTY = Page(kind="", title="", facts=(), summary=(), sections=(), foot="")


def test_a_page_of_ours_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    check_page(page)
    write_page(page, render(EMPTY))
    assert SIGN in page.read_text("utf-8")
    check_page(page)
    page.write_text("<p>mine</p>", "utf-8")
    with pytest.raises(FileExistsError, match="is no page of ptq"):
        check_page(page)
    assert page.read_text("utf-8") == "<p>mine</p>"


def test_places_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in \.html"):
        check_page(tmp_path / "page.pdf")
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        check_page(tmp_path / "none" / "page.html")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(IsADirectoryError):
        check_page(tmp_path / "folder.html")
    with pytest.raises(ValueError, match="lies in the checkpoint"):
        check_page(tmp_path / "page.html", tmp_path)


def test_inspect_writes_one(ptq: Run, two_checkpoints: list[Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = ptq("inspect", two_checkpoints[0], "--html", page)
    assert done.code == 0 and f"written: {page}" in done.err and "nvfp4" in done.out
    assert page.read_text("utf-8").startswith("<!doctype html>")
    assert "ends in .html" in ptq("inspect", two_checkpoints[0], "--html", tmp_path / "x").error
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
