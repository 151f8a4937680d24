"""``ptq compare``: a table, JSON, a page, and one line about what is none."""

import json
import shutil
from pathlib import Path

from command_line import Run


def test_a_table_json_and_a_page(ptq: Run, two_checkpoints: list[Path], tmp_path: Path) -> None:
    page = tmp_path / "c.html"
    done = ptq("compare", *two_checkpoints, "--html", page)
    assert done.code == 0, done.err
    for word in ("nvfp4", "mxfp4 + mxfp8", "bits per quantized weight", "· down_proj", "--keep"):
        assert word in done.out
    assert "written" in done.err and "ptq compare" in page.read_text("utf-8")
    found = json.loads(ptq("compare", *two_checkpoints, "--json").out)
    assert [c["name"] for c in found["checkpoints"]] == ["nvfp4", "mxfp4"]
    assert found["checkpoints"][0]["output_error"] > 0


def test_bad_checkpoints_are_one_line(
    ptq: Run, two_checkpoints: list[Path], tiny_llama: Path, tmp_path: Path
) -> None:
    page = tmp_path / "c.html"
    assert "two checkpoints or more" in ptq("compare", two_checkpoints[0]).error
    assert str(tiny_llama) in ptq("compare", two_checkpoints[0], tiny_llama, "--html", page).error
    assert "none" in ptq("compare", two_checkpoints[0], tmp_path / "none").error
    damaged = tmp_path / "damaged"
    shutil.copytree(two_checkpoints[0], damaged)
    (damaged / "config.json").write_text("{", "utf-8")
    assert "config.json" in ptq("compare", two_checkpoints[0], damaged, "--html", page).error
    assert not page.exists()


def test_evaluations_that_were_kept_are_shown(
    ptq: Run, two_checkpoints: list[Path], tiny_llama: Path, tiny_text: Path, tmp_path: Path
) -> None:
    copies = [tmp_path / path.name for path in two_checkpoints]
    for path, copy in zip(two_checkpoints, copies, strict=True):
        shutil.copytree(path, copy)
    options = ("--text", tiny_text, "--seq-len", 32, "--max-tokens", 256, "--quiet", "--json")
    for copy in copies:
        done = ptq("eval", copy, "--reference", tiny_llama, "--keep", *options)
        assert done.code == 0, done.err
    found = json.loads(ptq("compare", *copies, "--json").out)
    kl = json.loads(done.out)["kl"]
    assert found["checkpoints"][1]["evaluation"]["kl"] == kl > 0
    assert "KL to the reference" in ptq("compare", *copies).out
    assert "ok" in ptq("verify", copies[0]).out
    assert "no directory of a quantized" in ptq("eval", "demo", "--keep", "--quiet").error
    assert "config.json" in ptq("eval", tiny_llama, "--keep", "--quiet").error
