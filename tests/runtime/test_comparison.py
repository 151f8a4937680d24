"""Checkpoints beside each other, and what cannot be compared."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import ptq
from ptq.runtime.comparison import Comparison, compare_checkpoints
from ptq.runtime.evaluate import Evaluation
from ptq.runtime.inspect import inspect
from ptq.runtime.kept_evaluations import keep


@pytest.fixture
def two(two_checkpoints: list[Path], tmp_path: Path) -> list[Path]:
    """Copies, for what is kept beside them."""
    for path in two_checkpoints:
        shutil.copytree(path, tmp_path / path.name)
    return [tmp_path / path.name for path in two_checkpoints]


def evaluation(text: str, kl: float) -> Evaluation:
    return Evaluation(
        perplexity=9.5, nll=2.25, kl=kl, kl_top25=kl, top1_agreement=0.9, reference_perplexity=9.0,
        reference_nll=2.2, tokens=100, windows=2, seq_len=51, seconds=1.0, model="out",
        reference="original", text=text,
    )  # fmt: skip


def test_sizes_are_those_of_inspect(two: list[Path]) -> None:
    found = compare_checkpoints(two)
    assert [c.name for c in found.checkpoints] == ["nvfp4", "mxfp4"]
    assert [c.report for c in found.checkpoints] == [inspect(path) for path in two]
    assert found.to_dict()["common_layers"] == len(found.common)


def test_errors_are_of_layers_that_all_have(two: list[Path]) -> None:
    found = compare_checkpoints(two)
    assert found.common == {row.layer for row in inspect(two[0]).layers}
    assert found.shown_kinds == ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    second = found.checkpoints[1]
    of = [row.error for row in second.report.layers if row.layer in found.common]
    assert None not in of
    assert found.error(second) == pytest.approx(sum(e or 0 for e in of) / len(of))


def test_errors_of_weights_and_of_outputs_are_not_mixed(two: list[Path]) -> None:
    found = compare_checkpoints(two)
    first = found.checkpoints[0]
    rows = tuple(replace(row, of_outputs=False) for row in first.report.layers)
    other = replace(first, report=replace(first.report, layers=rows))
    mixed = replace(found, checkpoints=(other, found.checkpoints[1]))
    assert mixed.error(other) is None and mixed.error(other, outputs=False) is not None
    table = dict((row[0], row[1:]) for row in mixed.tables()[0].rows)
    assert table["output error, mean"][0] == "–" and table["weight error, mean"][1] == "–"


def test_evaluations_are_compared_on_the_same_text(two: list[Path]) -> None:
    keep(two[0], evaluation("a.txt", 0.5))
    keep(two[0], evaluation("b.txt", 0.4))
    keep(two[1], evaluation("a.txt", 0.3))
    keep(two[1], evaluation("a.txt", 0.2))
    found = compare_checkpoints(two)
    assert [c.evaluation and c.evaluation.kl for c in found.checkpoints] == [0.5, 0.2]
    text = str(found)
    assert "a.txt: 100 predictions" in text and "KL to the reference" in text


def test_without_evaluations_it_says_how(two: list[Path]) -> None:
    found = compare_checkpoints(two)
    bare = tuple(replace(c, evaluation=None) for c in found.checkpoints)
    assert "--keep adds it" in str(Comparison(checkpoints=bare, common=found.common,
                                              kinds=found.kinds))  # fmt: skip


def test_what_cannot_be_compared_is_one_line(
    two: list[Path], make_tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="two checkpoints or more"):
        compare_checkpoints(two[:1])
    with pytest.raises(FileNotFoundError, match="none"):
        compare_checkpoints([*two, tmp_path / "none"])
    other = make_tiny_model("llama", intermediate_size=192)
    recipe = ptq.Recipe.default("nvfp4", algorithm="rtn")
    ptq.quantize(other, tmp_path / "other", recipe=recipe, progress=False)
    with pytest.raises(ValueError, match=r"another model than .*_proj has the shape"):
        compare_checkpoints([two[0], tmp_path / "other"])


def test_equal_names_are_told_apart(two: list[Path], tmp_path: Path) -> None:
    again = tmp_path / "again" / two[0].name
    shutil.copytree(two[0], again)
    names = [c.name for c in compare_checkpoints([two[0], again]).checkpoints]
    assert names == [str(two[0]), str(again)]
