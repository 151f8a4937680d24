"""``ptq analyze``: what it prints, what it writes, what it refuses."""

import json
from pathlib import Path

import pytest
from command_line import Run


@pytest.fixture(scope="module")
def few(tiny_text: Path) -> list[object]:
    """Options that make an analysis quick."""
    return ["--calibration", tiny_text, "--samples", 4, "--seq-len", 32, "--tokens", 32]


def test_a_summary_and_files(ptq: Run, tiny_llama: Path, few: list[object], tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in tiny_llama.iterdir()}
    result = ptq("analyze", tiny_llama, "--out", tmp_path / "a", *few)
    assert result.code == 0, result.err
    assert "nvint4/nvfp4" in result.out and "balanced + rotated" in result.out
    assert "the layers that will hurt" in result.out
    assert "analyzing 2/2  model.layers.1" in result.err
    assert {f.name for f in (tmp_path / "a").iterdir()} == {
        "analysis.json", "analysis.csv", "report.html",
    }  # fmt: skip
    page = (tmp_path / "a" / "report.html").read_text("utf-8")
    assert page.startswith("<!doctype html>") and "which format for which layer" in page
    assert {file.name: file.read_bytes() for file in tiny_llama.iterdir()} == before
    assert (
        "finished analysis: choose another"
        in ptq("analyze", tiny_llama, "--out", tmp_path / "a", *few).error
    )


def test_json_alone_on_stdout(ptq: Run, tiny_llama: Path, few: list[object]) -> None:
    result = ptq("analyze", tiny_llama, "--json", "--balance", 0, "--quiet", *few)
    found = json.loads(result.out)
    assert result.err == "" and len(found["wins"]) == 2 * 4 * 3
    assert len(found["worst"]) == 10 and found["crossovers"]["mxint8"]["blocks"] is None


def test_mistakes_are_one_line(ptq: Run, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep", "utf-8")
    assert "which no analysis wrote" in ptq("analyze", tiny_llama, "--out", tmp_path).error
    assert "unknown scales 'up'" in ptq("analyze", tiny_llama, "--scales", "up").error
    assert "does not exist" in ptq("analyze", tmp_path / "none").error
    assert (tmp_path / "mine.txt").read_text("utf-8") == "keep"
