"""Where an analysis lies: what is kept, what is refused, what is never half there."""

import csv
import io
import json
from pathlib import Path

import pytest
import torch

from ptq.pipeline.analysis import BlockAnalysis, LayerAnalysis, forms, tensor_analysis
from ptq.pipeline.analysis_files import (
    PAGE,
    PARTIAL,
    RESULT,
    TABLE,
    VERSION,
    Analysis,
    Partial,
    check_folder,
    read_analysis,
    write_results,
)


@pytest.fixture(scope="module")
def block() -> BlockAnalysis:
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    tensor = tensor_analysis("weight", ["m.0.a"], forms(x, None, "absmax"), x)
    layer = LayerAnalysis(name="m.0.a", out_features=8, in_features=32, errors=())
    return BlockAnalysis(name="m.0", index=0, tensors=(tensor,), layers=(layer,))


def whole(block: BlockAnalysis) -> Analysis:
    identity = {"scales": "absmax"}
    return Analysis(version=VERSION, model="m", identity=identity, seconds=1.0, blocks=(block,))


def test_results_are_read_as_they_were_written(tmp_path: Path, block: BlockAnalysis) -> None:
    Partial(tmp_path, {"a": 1}).add(block)
    write_results(tmp_path, whole(block), "<p>page</p>")
    assert read_analysis(tmp_path) == whole(block)
    assert {file.name for file in tmp_path.iterdir()} == {RESULT, TABLE, PAGE}
    rows = list(csv.DictReader(io.StringIO((tmp_path / TABLE).read_text("utf-8"))))
    assert len(rows) == 2 * 8 and rows[0]["format"] == "mxfp4" and rows[0]["rotated"] == "0"
    figures = block.tensors[0].variants[0].formats["mxfp4"]
    assert float(rows[0]["qsnr_db"]) == pytest.approx(figures.qsnr, rel=1e-5)


def test_finished_blocks_are_found_again(tmp_path: Path, block: BlockAnalysis) -> None:
    first = Partial(tmp_path / "new", {"a": 1})
    assert first.blocks == {}
    first.add(block)
    again = Partial(tmp_path / "new", {"a": 1})
    assert again.blocks == {"m.0": block}


def test_a_line_that_was_cut_off_does_not_count(tmp_path: Path, block: BlockAnalysis) -> None:
    Partial(tmp_path, {"a": 1}).add(block)
    with open(tmp_path / PARTIAL, "ab") as file:
        file.write(b'{"name": "m.1", "ind')
    again = Partial(tmp_path, {"a": 1})
    assert list(again.blocks) == ["m.0"]
    again.add(block)
    assert len((tmp_path / PARTIAL).read_bytes().splitlines()) == 3


def test_other_runs_are_not_mixed(tmp_path: Path, block: BlockAnalysis) -> None:
    Partial(tmp_path, {"a": 1}).add(block)
    with pytest.raises(FileExistsError, match="unfinished analysis of another model"):
        Partial(tmp_path, {"a": 2})
    assert Partial(tmp_path, {"a": 2}, overwrite=True).blocks == {}


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    Partial(tmp_path, {})
    with open(tmp_path / PARTIAL, "ab") as file:
        file.write(b'{"name": 3}\n')
    with pytest.raises(ValueError, match=r"partial\.jsonl, line 2"):
        Partial(tmp_path, {})


def test_without_a_folder_nothing_is_written(block: BlockAnalysis) -> None:
    partial = Partial(None, {})
    partial.add(block)
    assert partial.blocks == {"m.0": block}


def test_folders_that_may_be_written_to(tmp_path: Path, block: BlockAnalysis) -> None:
    check_folder(tmp_path / "new", overwrite=False)
    check_folder(tmp_path, overwrite=False)
    write_results(tmp_path, whole(block))
    with pytest.raises(FileExistsError, match="finished analysis"):
        check_folder(tmp_path, overwrite=False)
    check_folder(tmp_path, overwrite=True)
    (tmp_path / "letter.txt").write_text("dear", "utf-8")
    with pytest.raises(FileExistsError, match=r"holds letter\.txt, which no analysis wrote"):
        check_folder(tmp_path, overwrite=True)
    with pytest.raises(FileExistsError, match="not a directory"):
        check_folder(tmp_path / "letter.txt", overwrite=True)
    with pytest.raises(ValueError, match="--out is empty"):
        check_folder(Path(" "), overwrite=True)


def test_what_is_no_analysis_is_refused(tmp_path: Path, block: BlockAnalysis) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no analysis\.json: run ptq analyze"):
        read_analysis(tmp_path)
    write_results(tmp_path, whole(block))
    file = tmp_path / RESULT
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {"version": 9}), "utf-8")
    with pytest.raises(ValueError, match="version is 9"):
        read_analysis(tmp_path)
    file.write_text("{}", "utf-8")
    with pytest.raises(ValueError, match="run ptq analyze again"):
        read_analysis(tmp_path)
