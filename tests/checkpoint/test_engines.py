"""Verdicts on engines: their words, and that nothing is called tested that was not run."""

import json
from dataclasses import asdict

import pytest

from ptq.checkpoint import engines
from ptq.checkpoint.dialects import DIALECTS
from ptq.checkpoint.engines import (
    ENGINES,
    TARGETS,
    Kind,
    Opening,
    Verdict,
    exact,
    opened_by,
    refusals,
    results,
)
from ptq.checkpoint.quantization_config import LayerInfo
from ptq.numerics.formats import FORMATS

ATTENTION = "model.layers.0.self_attn.o_proj"
DOWN, EXPERT = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.experts.7.down_proj"


def layers_of(kind: Kind) -> dict[str, LayerInfo]:
    """Layers of that kind; of two formats the first is that of attention."""
    names = (ATTENTION, EXPERT if kind.experts else DOWN)
    formats = kind.formats.split("+")
    return {
        name: LayerInfo(
            format=fmt,
            rotation=16 if kind.rotated else 1,
            quantize_inputs=kind.quantize_inputs,
            static_inputs=kind.quantize_inputs and FORMATS[fmt].has_global_scale,
        )
        for name, fmt in zip(names[-len(formats) :], formats, strict=True)
    }


def test_every_target_is_made_of_engines() -> None:
    assert TARGETS["any"] == ENGINES
    assert all(set(target) <= set(ENGINES) for target in TARGETS.values())


def test_what_does_not_serve_is_refused_with_its_reason() -> None:
    said = {
        "a": Opening(Verdict.RIGHT, "with a caveat"),
        "b": Opening(Verdict.WRONG, "it does not rotate"),
        "c": Opening(Verdict.STOPS),
        "d": Opening(Verdict.IMPORT),
        "e": Opening(Verdict.UNKNOWN),
    }
    assert refusals(said, "abcde") == {
        "b": "it does not rotate",
        "c": "stops with an error",
        "e": "not known",
    }
    assert str(said["a"]) == "right: with a caveat" and str(said["c"]) == "stops with an error"


def test_a_kind_is_what_engines_tell_apart() -> None:
    layers = {
        DOWN: LayerInfo(format="nvfp4", rotation=16),
        EXPERT: LayerInfo(format="mxfp8", quantize_inputs=True),
    }
    assert Kind.of("ptq", layers) == Kind(
        dialect="ptq", formats="mxfp8+nvfp4", experts=True, rotated=True, quantize_inputs=True
    )
    plain = Kind(
        dialect="ptq", formats="nvfp4", experts=False, rotated=False, quantize_inputs=False
    )
    assert Kind.of("ptq", layers_of(plain)) == plain


KIND = Kind(dialect="ptq", formats="nvfp4", experts=False, rotated=False, quantize_inputs=False)


@pytest.fixture
def some_results(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Writes the file of results."""

    def write(*given: dict) -> None:
        rows = [{"kind": asdict(KIND), "result": {"engine": "vLLM", **result}} for result in given]
        (tmp_path / "results.json").write_text(json.dumps(rows))
        monkeypatch.setattr(engines, "RESULTS", tmp_path / "results.json")
        results.cache_clear()

    yield write
    results.cache_clear()


def test_tested_is_what_was_opened_and_right(some_results) -> None:
    works = {"outcome": "works", "kl": 0.0, "same_bits": True}
    some_results({"version": "1", **works}, {"version": "2", "outcome": "refused", "reason": "no"})
    assert opened_by("vLLM", KIND) == "1" and opened_by("transformers", KIND) is None
    assert not exact("vLLM", KIND)  # not in all versions
    some_results({"version": "1", **works}, {"version": "3", **works}, {"outcome": "not installed"})
    assert opened_by("vLLM", KIND) == "1; 3" and exact("vLLM", KIND)
    some_results({"version": "1", **works, "same_bits": False})
    assert opened_by("vLLM", KIND) == "1" and not exact("vLLM", KIND)


def test_nothing_was_run_where_there_are_no_results(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(engines, "RESULTS", tmp_path / "none.json")
    results.cache_clear()
    assert results() == ()
    results.cache_clear()


@pytest.mark.parametrize("engine", ENGINES)
def test_what_was_run_agrees_with_what_is_said(engine: str) -> None:
    """Whoever said "right" of what was wrong, or "an error" of what worked, has to change it."""
    for kind, result in results():
        if result.engine != engine:
            continue
        verdict = DIALECTS[kind.dialect].opens(layers_of(kind))[engine].verdict
        assert result.outcome != "wrong" or verdict is Verdict.WRONG, (kind, result)
        if result.works:
            assert verdict.serves, (kind, result)
