"""Results are kept with the checkpoint that they are of, and nothing else of it changes."""

from pathlib import Path

import pytest

from ptq.checkpoint.checksums import differences
from ptq.checkpoint.evaluations import record, stored, with_results

RESULT = {
    "text": "texts/wiki.txt",
    "reference": "models/original",
    "seq_len": 128,
    "tokens": 1000,
    "perplexity": 12.34567,
    "reference_perplexity": 12.0,
    "kl": 0.01234,
    "top1_agreement": 0.95,
}


@pytest.fixture
def checkpoint(make_run, tmp_path: Path) -> Path:
    make_run("llama", "nvfp4")(tmp_path / "out")
    return tmp_path / "out"


def test_a_result_is_in_the_card_and_in_a_file(checkpoint: Path) -> None:
    record(checkpoint, RESULT)
    (row,) = stored(checkpoint)
    assert row["text"] == "wiki.txt" and row["reference"] == "original"  # no paths of this machine
    card = (checkpoint / "README.md").read_text()
    assert "| wiki.txt, windows of 128 | 1000 | 12.35 | 12 | 0.01234 | 0.95 |" in card
    assert card.index("## What runs it") < card.index("## Measured") < card.index("## Recipe")
    assert list(differences(checkpoint)) == []


def test_the_same_question_replaces_its_answer(checkpoint: Path) -> None:
    record(checkpoint, RESULT)
    record(checkpoint, RESULT | {"kl": 0.5})
    record(checkpoint, RESULT | {"text": "other.txt", "kl": None, "reference": None})
    assert [row["kl"] for row in stored(checkpoint)] == [0.5, None]
    card = (checkpoint / "README.md").read_text()
    assert card.count("## Measured") == card.count("## Recipe") == 1
    assert "0.01234" not in card and "| other.txt, windows of 128 |" in card
    assert list(differences(checkpoint)) == []


def test_a_card_that_people_wrote_keeps_what_it_says() -> None:
    card = with_results("# mine\n\nwords\n", [RESULT])
    assert card.startswith("# mine\n\nwords\n\n## Measured\n") and card.endswith("|\n")
    more = with_results(card + "\n## More\n\nwords\n", [RESULT | {"kl": 0.5}])
    assert "## More\n\nwords" in more and more.count("## Measured") == 1 and "| 0.5 |" in more


def test_what_is_no_finished_checkpoint_gets_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="SHA256SUMS"):
        record(tmp_path, RESULT)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_of_results_is_named(checkpoint: Path) -> None:
    (checkpoint / "ptq_eval.json").write_text("[")
    with pytest.raises(ValueError, match=r"ptq_eval\.json"):
        stored(checkpoint)
