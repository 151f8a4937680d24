"""What is said after a run: a verdict in words, the worst layers, the next commands."""

from dataclasses import replace
from pathlib import Path

import pytest

from ptq.cli.outcome import print_next, print_outcome, verdict
from ptq.pipeline.against_nearest import AgainstNearest
from ptq.pipeline.recipe import Recipe
from ptq.pipeline.run import quantize_model
from ptq.runtime.inspect import Report, inspect


@pytest.fixture(scope="module")
def report(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    out = tmp_path_factory.mktemp("outcome") / "q"
    quantize_model(tiny_llama, out, recipe=Recipe.default("nvfp4", samples=8, seq_len=64))
    return inspect(out)


def with_errors(report: Report, *errors: float, **fields: float) -> Report:
    """Its layers with other errors, the last one repeated."""
    given = [*errors, *[errors[-1]] * len(report.layers)]
    rows = [
        replace(row, **{"error": e, "rtn_error": 2 * e, "held_out_error": e} | fields)
        for row, e in zip(report.layers, given, strict=False)
    ]
    return replace(report, layers=tuple(rows))


@pytest.mark.parametrize(
    ("kl", "nearest", "words"),
    [
        (0.004, 0.01, "hard to tell from the original: KL 0.004 nats per token on 1,022 "),
        (0.06, 0.3, "a loss that shows in measurements: "),
        (0.06, 0.3, "rounding to nearest: 0.3, of which 80% is avoided"),
        (2.0, 2.001, "badly damaged: KL 2 nats per token on 1,022 held-out tokens, as by rounding"),
        (0.4, 0.3, "rounding to nearest: 0.3, which is better: say --quality fast"),
    ],
)
def test_the_verdict_is_in_words(kl: float, nearest: float, words: str):
    assert words in verdict(AgainstNearest(kl=kl, nearest_kl=nearest, tokens=1022))


def test_the_worst_layers_are_named_with_a_remedy(
    capsys: pytest.CaptureFixture[str], report: Report
):
    compared = AgainstNearest(kl=0.02, nearest_kl=0.05, tokens=1022)
    print_outcome(with_errors(report, 0.09, 0.001), "compressed-tensors", "all", 95, compared)
    text = " ".join(capsys.readouterr().out.split())
    assert "in 1 min 35 s" in text and "opens in all (dialect compressed-tensors)" in text
    assert "verdict close to the original: KL 0.02 nats" in text
    assert "2.0 times less than by rounding to nearest" in text
    assert f"worst {report.layers[0].layer} 9.00 %, " in text and "--eight-bit 10%" in text
    assert "more text" not in text


def test_too_little_text_shows(capsys: pytest.CaptureFixture[str], report: Report):
    for quality, remedy in (("default", "--quality best"), ("best", "more --samples")):
        drifted = with_errors(report, 0.01, held_out_error=0.02)
        drifted = replace(drifted, recipe=drifted.recipe | {"quality": quality})
        print_outcome(drifted, "ptq", "as asked", 5, None)
        text = " ".join(capsys.readouterr().out.split())
        assert "2.00 % on text kept aside" in text and f"more text would help: {remedy}" in text
        assert "no other engine (dialect ptq: as asked)" in text
        assert "verdict" not in text and "--eight-bit" not in text


def test_rounding_to_nearest_says_what_is_better(
    capsys: pytest.CaptureFixture[str], report: Report
):
    rows = [replace(row, of_outputs=False, error=0.006) for row in report.layers]
    nearest = replace(
        report, layers=tuple(rows), recipe=report.recipe | {"algorithm": "rtn", "quality": "fast"}
    )
    print_outcome(nearest, "compressed-tensors", "all", 5, None)
    text = " ".join(capsys.readouterr().out.split())
    assert "weights are off by 0.60 % on average" in text and "--quality default reads" in text


def test_the_next_commands_can_be_copied(capsys: pytest.CaptureFixture[str]):
    print_next("demo", Path("my model"), chats=True, compared=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["next", "ptq"] and "ptq chat 'my model'" in lines[0]
    print_next("demo", Path("q"), chats=False, compared=False)
    lines = capsys.readouterr().out.splitlines()
    assert "ptq eval q --reference demo" in lines[0]
    assert "ptq generate q --prompt 'def main():'" in lines[1]
