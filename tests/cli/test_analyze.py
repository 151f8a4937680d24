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


def test_a_direct_cast_and_advice_are_added_to_what_is_there(
    ptq: Run, tiny_llama: Path, few: list[object], tmp_path: Path
) -> None:
    out, text = tmp_path / "a", few[1]
    given = ("analyze", tiny_llama, "--out", out, *few)
    casting = ("--direct-cast", "--text", text, "--window", 32, "--max-tokens", 64)
    result = ptq(*given, *casting)
    assert result.code == 0, result.err
    assert "INT against FP by KL over the top 25" in result.out
    assert "casting 4/4  logits" in result.err
    advising = ("--advise", "--formats", "nvfp4,mxint8", "--budget", 5.5)
    result = ptq(*given, *advising)
    assert result.code == 0, result.err
    assert "analyzing" not in result.err and "measuring damage 4/4" in result.err
    assert "advice for 5.5 bits per weight" in result.out
    names = {"analysis.json", "analysis.csv", "direct-cast.csv", "pareto.csv", "recipe.toml"}
    names.add("report.html")
    assert {f.name for f in out.iterdir()} == names
    stored = json.loads((out / "analysis.json").read_text("utf-8"))
    assert len(stored["direct_cast"]["casts"]) == 16 and stored["advice"]["budget"] == 5.5
    again = ptq(*given, *advising[:-1], 6, "--json")  # what was measured is not measured again
    found = json.loads(again.out)
    assert "measuring" not in again.err and found["advice"]["budget"] == 6
    assert found["recipe"] == (out / "recipe.toml").read_text("utf-8")
    shown = ptq("quantize", "--recipe", out / "recipe.toml", "--show-recipe")
    assert shown.code == 0 and shown.out == found["recipe"]


def test_advice_needs_a_limit(ptq: Run, tiny_llama: Path) -> None:
    assert "either --budget" in ptq("analyze", tiny_llama, "--advise").error
    both = ("--budget", 5, "--max-kl", 0.1)
    assert "either --budget" in ptq("analyze", tiny_llama, "--advise", *both).error
    assert "are for --advise" in ptq("analyze", tiny_llama, "--budget", 5).error
    wrong = ("--advise", "--budget", 5, "--formats", "fp3")
    assert "unknown format 'fp3'" in ptq("analyze", tiny_llama, *wrong).error
