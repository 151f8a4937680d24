"""Theory on the page: what is counted, and what is thinned."""

import pytest
import torch

from ptq.pipeline import analysis_theory
from ptq.pipeline.analysis import BlockAnalysis, forms, tensor_analysis
from ptq.pipeline.analysis_theory import crest_factors, predictions


@pytest.fixture(scope="module")
def blocks() -> list[BlockAnalysis]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(3):
        x = torch.randn(64, 64, generator=generator)
        tensors = tuple(
            tensor_analysis(role, [f"m.{i}.a"], forms(x, None, "absmax"), x)
            for role in ("weight", "input")
        )
        made.append(BlockAnalysis(name=f"m.{i}", index=i, tensors=tensors, layers=()))
    return made


def test_medians_are_those_of_gaussian_blocks(blocks: list[BlockAnalysis]) -> None:
    section = crest_factors(blocks, "absmax")
    assert section is not None and len(section.figures) == 4
    medians = {row[0]: (float(row[1]), float(row[2])) for row in section.tables[0].rows}
    for role in ("Weights", "Inputs"):
        assert medians[f"{role}, blocks of 16"] == pytest.approx((2.09, 2.09), abs=0.08)
        assert medians[f"{role}, blocks of 32"] == pytest.approx((2.34, 2.34), abs=0.08)
    assert {row[-1] for row in section.tables[0].rows} == {str(3 * 64 * 4), str(3 * 64 * 2)}


def test_lines_are_the_crossovers_of_the_rule(blocks: list[BlockAnalysis]) -> None:
    for rule, at in (("absmax", "2.29"), ("mse", "2.19")):
        section = crest_factors(blocks, rule)
        assert section is not None
        drawn = [
            e.findtext("title") or ""
            for figure in section.figures
            for e in figure.picture.body
            if e.get("class") == "guide"
        ]
        assert f"nvint4 wins below {at}: {at}" in drawn


def test_every_tensor_is_a_point_of_every_format(blocks: list[BlockAnalysis]) -> None:
    section = predictions(blocks)
    assert section is not None
    assert [figure.picture.marks for figure in section.figures] == [12] * 8
    for row in section.tables[0].rows:
        assert row[1] == "12" and float(row[2]) < 0.5, "Gaussian numbers are foreseen"


def test_many_points_are_thinned_and_that_is_said(
    blocks: list[BlockAnalysis], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(analysis_theory, "POINTS", 6)
    section = predictions(blocks)
    assert section is not None
    assert section.figures[0].picture.marks == 6
    assert "Every second point is drawn" in section.words[0]


def test_without_tensors_there_is_nothing() -> None:
    assert crest_factors([], "absmax") is None and predictions([]) is None
