"""``ptq merge``: a model of several, or one line that says why not."""

import json
from pathlib import Path

import pytest
from command_line import Run

from ptq.cli.merge import METHODS
from ptq.pipeline import merge as module


def test_the_methods_are_those_of_the_table() -> None:
    assert tuple(module.METHODS) == METHODS


@pytest.mark.parametrize("method", METHODS)
def test_it_says_what_it_did(ptq: Run, tiny_llama: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "out"
    done = ptq("merge", tiny_llama, tiny_llama, tiny_llama, "--out", out, "--method", method)
    assert done.code == 0 and f"14 matrices merged by {method}" in " ".join(done.out.split())
    assert "merging" in done.err
    # copies that changed nothing merge to what they are
    assert (out / "model.safetensors").read_bytes() == (
        tiny_llama / "model.safetensors"
    ).read_bytes()


def test_figures_as_json_and_errors_in_one_line(ptq: Run, tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = ptq("merge", tiny_llama, tiny_llama, tiny_llama, "--out", out, "--json", "-q")
    assert json.loads(told.out)["matrices"] == 14
    assert "not empty" in ptq("merge", tiny_llama, tiny_llama, tiny_llama, "--out", out).error
    assert "two or more" in ptq("merge", tiny_llama, tiny_llama, "--out", tmp_path / "x").error
    assert (
        "ties"
        in ptq(
            "merge", tiny_llama, tiny_llama, tiny_llama, "-o", tmp_path / "x", "--method", "ties"
        ).error
    )
