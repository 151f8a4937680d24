"""An analysis from beginning to end: what is asked for is done, told and kept."""

import inspect
import json
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from ptq.api.arguments import AnalyzeOptions
from ptq.cli.analyze import analyze as command
from ptq.pipeline.advisor import AdviceOptions
from ptq.pipeline.analyze import Options
from ptq.pipeline.direct_cast import CastOptions
from ptq.pipeline.recipe import Recipe
from ptq.pipeline.study import Study, StudyOptions, study

RUN = {"device", "dtype", "activations"}


def quick(file: Path, /, **given: object) -> dict[str, object]:
    return {"calibration": str(file), "samples": 4, "seq_len": 32, "tokens": 32, **given}


class Stages:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int, int, str, bool]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[object]:
        def step(done: int, total: int, text: str, *, known: bool = False) -> None:
            self.told.append((name, done, total, text, known))

        yield step


def test_choices_are_those_of_the_command_line_with_its_defaults() -> None:
    shown = {
        name: parameter.default
        for name, parameter in inspect.signature(command).parameters.items()
        if name in AnalyzeOptions.__annotations__
    }
    assert shown.keys() == AnalyzeOptions.__annotations__.keys()
    named = {name: value for name, value in shown.items() if name not in RUN}
    for asked in ({}, {"direct_cast": True}, {"advise": True, "budget": 5.0}):
        flags = {n: v for n, v in asked.items() if n != "budget"}
        limits = {n: v for n, v in asked.items() if n == "budget"}
        assert StudyOptions.of({**named, **limits}, **flags) == StudyOptions.of(limits, **flags)
    taken = {f.name for record in (Options, CastOptions, AdviceOptions) for f in fields(record)}
    limits = {"budget", "max_kl", "measure", "numbers", "window"}
    assert named.keys() == taken - {"values", "keep"} | limits


def test_a_choice_reaches_what_it_is_for() -> None:
    made = StudyOptions.of(
        {
            "numbers": 99, "window": 77, "seq_len": 55, "field": "f", "ignore": ["a", "b"],
            "seed": 3, "formats": ["nvfp4"], "max_kl": 0.5, "measure": "kl_top25", "budget": None,
        },
        direct_cast=True, advise=True,
    )  # fmt: skip
    assert (made.tensors.values, made.tensors.seq_len, made.tensors.field) == (99, 55, "f")
    assert made.cast is not None and (made.cast.seq_len, made.cast.ignore) == (77, ("a", "b"))
    assert len(made.cast.formats) == 8  # formats are for advice
    assert made.advice is not None and (made.advice.formats, made.advice.seed) == (("nvfp4",), 3)
    assert (made.budget, made.max_kl, made.measure) == (None, 0.5, "kl_top25")
    assert StudyOptions.of({}).cast is StudyOptions.of({}).advice is None


@pytest.mark.parametrize(
    ("choices", "advise", "message"),
    [
        ({"scales": "up"}, False, "unknown scales 'up'"),
        ({"samples": "4"}, False, "the analysis: samples is '4'"),
        ({"ignore": "q_proj"}, False, "ignore is 'q_proj'"),
        ({"window": 1}, False, "seq_len of a direct cast must be at least 2"),
        ({"max_tokens": 0}, False, "max_tokens of a direct cast must be at least 2"),
        ({"scheme": "w8a8"}, False, "unknown scheme 'w8a8'"),
        ({"formats": ["fp3"]}, False, "unknown format 'fp3'"),
        ({"budget": 5.0}, False, "are for --advise"),
        ({}, True, "either --budget"),
        ({"budget": 5.0, "max_kl": 0.1}, True, "either --budget"),
        ({"budget": 5.0, "measure": "mse"}, True, "unknown measure 'mse'"),
    ],
)
def test_mistakes_are_one_line(choices: dict, advise: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        StudyOptions.of(choices, advise=advise)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def whole(tiny_llama: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory):
    """All that there is: (what was found, what was told)."""
    stages, folder = Stages(), tmp_path_factory.mktemp("study") / "a"
    cast = {"text": str(tiny_text), "window": 32, "max_tokens": 64}
    advice = {"formats": ["nvfp4", "mxint8"], "budget": 5.5}
    options = StudyOptions.of(quick(tiny_text, **cast, **advice), direct_cast=True, advise=True)
    return study(tiny_llama, options, stages, folder=folder), stages.told, options


def test_stages_are_told_in_turn(whole) -> None:
    _, told, _ = whole
    assert [t for t in told if t[0] == "analyzing"] == [
        ("analyzing", i, 2, f"model.layers.{i - 1}", False) for i in (1, 2)
    ]
    assert list(dict.fromkeys(t[0] for t in told)) == ["analyzing", "casting", "measuring damage"]
    assert all(done <= total for _, done, total, _, _ in told)


def test_what_was_found_is_data(whole) -> None:
    found: Study = whole[0]
    assert len(found.layers) == 14 and found.layers[0].name.startswith("model.layers.0.")
    assert len(found.worst) == 10
    errors = [worst.error for worst in found.worst]
    assert errors == sorted(errors, reverse=True)
    assert len(found.wins) == 4 * 4 * 3 and {row.rotated for row in found.wins} == {True, False}
    assert found.direct_cast is not None and len(found.direct_cast.casts) == 16
    assert found.advice is not None and found.advice.point.bits <= 5.5
    assert found.report is not None and found.report.read_text("utf-8").startswith("<!doctype")
    assert found.recipe_file is not None and found.recipe == found.recipe_file.read_text("utf-8")
    assert Recipe.from_dict(tomllib.loads(found.recipe)).rules is not None
    data = json.loads(json.dumps(found.to_dict()))
    assert data["recipe"] == found.recipe and len(data["worst"]) == 10


def test_it_shows_itself(whole) -> None:
    found: Study = whole[0]
    shown = str(found)
    for part in ("who has the higher QSNR", "the layers that will hurt", "direct cast, weights",
                 "INT against FP by KL", "advice for 5.5 bits"):  # fmt: skip
        assert part in shown
    assert found._repr_html_().count("<table>") == len(found.tables()) == 5
    assert repr(found) == shown


def test_what_is_there_is_not_measured_again(whole, tiny_llama: Path) -> None:
    found, _, options = whole
    stages = Stages()
    again = study(tiny_llama, options, stages, folder=found.folder)
    assert again.analysis == found.analysis and stages.told == []


def test_without_a_folder_nothing_is_kept(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = StudyOptions.of(quick(tiny_text, balance=0.0))
    found = study(tiny_llama, options, Stages(), device=torch.device("cpu"))
    assert found.folder is found.report is found.recipe_file is found.recipe is None
    assert found.advice is found.direct_cast is None and len(found.tables()) == 2
    assert list(tmp_path.iterdir()) == []
