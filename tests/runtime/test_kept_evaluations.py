"""What was measured of a checkpoint, and only of that one."""

from pathlib import Path

import pytest

from ptq.checkpoint.checksums import SUMS, differences, write_sums
from ptq.checkpoint.safetensors_files import sha256
from ptq.runtime.evaluate import Evaluation
from ptq.runtime.kept_evaluations import FILE, check_keep, keep, kept_evaluations

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "compressed-tensors"


def evaluation(**changes) -> Evaluation:
    figures = {
        "perplexity": 9.5, "nll": 2.25, "kl": 0.1, "kl_top25": 0.09, "top1_agreement": 0.9,
        "reference_perplexity": 9.0, "reference_nll": 2.2, "tokens": 100, "windows": 2,
        "seq_len": 51, "seconds": 1.0, "model": "out", "reference": "original", "text": "a.txt",
    }  # fmt: skip
    return Evaluation(**(figures | changes))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    for file in GOLDEN.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    write_sums(folder, {file.name: sha256(file) for file in folder.iterdir()})
    return folder


def test_what_is_kept_is_found_in_order(checkpoint: Path) -> None:
    assert kept_evaluations(checkpoint) == []
    first, second = evaluation(), evaluation(kl=None, reference=None, text="b.txt")
    assert keep(checkpoint, first) == checkpoint / FILE
    keep(checkpoint, second)
    assert kept_evaluations(checkpoint) == [first, second]
    assert list(differences(checkpoint)) == [], "the checkpoint is what it was"


def test_another_checkpoint_in_the_same_place_has_none(checkpoint: Path) -> None:
    keep(checkpoint, evaluation())
    (checkpoint / SUMS).write_text((checkpoint / SUMS).read_text().replace("0", "1"), "utf-8")
    assert kept_evaluations(checkpoint) == []
    keep(checkpoint, evaluation(kl=0.2))
    assert [e.kl for e in kept_evaluations(checkpoint)] == [0.2]


def test_a_damaged_line_is_named(checkpoint: Path) -> None:
    for line in ("{", '{"checkpoint": "x", "evaluation": {"kl": "low"}}'):
        (checkpoint / FILE).write_text(line + "\n", "utf-8")
        with pytest.raises(ValueError, match=r"\.ptq_eval\.jsonl, line 1.*remove it"):
            kept_evaluations(checkpoint)


def test_only_of_checkpoints_with_sums(checkpoint: Path, tmp_path: Path) -> None:
    check_keep(checkpoint)
    with pytest.raises(ValueError, match="no directory of a quantized checkpoint"):
        check_keep(tmp_path / "none")
    (checkpoint / SUMS).unlink()
    with pytest.raises(FileNotFoundError, match="SHA256SUMS is missing"):
        keep(checkpoint, evaluation())
    assert not (checkpoint / FILE).exists()
