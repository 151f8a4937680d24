"""From option strings to values: rotations, dtypes, devices, recipes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from ptq.cli import options
from ptq.cli.commands import app
from ptq.cli.options import (
    make_recipe,
    parse_device,
    parse_dtype,
    parse_rotation,
    parse_share,
    read_choices,
)
from ptq.pipeline.recipe import Recipe


def test_rotations_have_names() -> None:
    assert (parse_rotation("none"), parse_rotation("NONE"), parse_rotation("64")) == (1, 1, 64)
    for name in ("", "-16", "1.5", "full"):
        with pytest.raises(ValueError, match="unknown rotation"):
            parse_rotation(name)


def test_shares_are_numbers_or_percent() -> None:
    assert [parse_share("--x", text) for text in ("10%", "0.1", " 100 % ", "0")] == [0.1, 0.1, 1, 0]
    for text in ("", "%", "ten", "101%", "-1%", "1.5", "10%%", "nan"):
        with pytest.raises(ValueError, match=r"^--x .*: give a share from 0% to 100%"):
            parse_share("--x", text)


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_options_override_the_file_and_both_the_default(tmp_path: Path, suffix: str) -> None:
    choices = {"format": "mxfp4", "scheme": "w4a4", "samples": 9, "ignore": ["o_proj"]}
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in choices.items())
    file = tmp_path / f"recipe{suffix}"
    file.write_text(lines if suffix == ".toml" else json.dumps(choices))
    recipe = make_recipe(None, file, {"samples": 3, "seed": None})
    expected = {"scheme": "w4a4", "samples": 3, "ignore": ("o_proj",)}
    assert recipe == Recipe.default("mxfp4", **expected)
    assert make_recipe("NVFP4", file, {}).format == "nvfp4"


@pytest.mark.parametrize(
    ("name", "text", "error", "message"),
    [
        ("r.json", "{", ValueError, "--recipe .*r.json"),
        (
            "r.json",
            "[1]",
            ValueError,
            r"r.json is \[1\], it should be an object: write a table of choices",
        ),
        ("r.toml", "a = ", ValueError, "--recipe .*r.toml"),
        ("none.toml", None, FileNotFoundError, "no such file"),
    ],
)
def test_files_that_are_no_recipe(
    tmp_path: Path, name: str, text: str | None, error: type[Exception], message: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(error, match=message):
        read_choices(tmp_path / name)


def test_a_recipe_needs_a_format() -> None:
    with pytest.raises(ValueError, match="say which format"):
        make_recipe(None, None, {})


def test_dtypes_and_devices_have_names():
    assert parse_dtype(None) is None and parse_dtype("bfloat16") is torch.bfloat16
    assert parse_device("cpu") == torch.device("cpu")
    assert parse_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "cuda:x", "cpu:0:1", "mps"):
        with pytest.raises(ValueError, match="unknown device"):
            parse_device(name)
    with pytest.raises(ValueError, match="float32, bfloat16, float16"):
        parse_dtype("float64")


# ---------------------------------------------------------------- what help says


def test_values_that_help_lists_are_those_of_the_tables():
    from ptq.calib.hidden_states import HiddenStates
    from ptq.checkpoint.dialect_choice import CHOICES
    from ptq.checkpoint.engines import TARGETS
    from ptq.numerics.activations import input_rules
    from ptq.numerics.algorithms import ALGORITHMS
    from ptq.numerics.formats import FORMATS
    from ptq.numerics.scales import RULES
    from ptq.pipeline.quality import QUALITIES
    from ptq.pipeline.recipe import IN_LOOP, SCHEMES, TUNED_BY

    assert set(options.FORMATS) == set(FORMATS)
    assert options.SCHEMES == SCHEMES
    assert set(options.ALGORITHMS) == set(ALGORITHMS)
    assert set(options.SCALES) == {*RULES, *IN_LOOP}
    assert set(options.INPUT_RULES) == {r for fmt in FORMATS.values() for r in input_rules(fmt)}
    assert set(options.QUALITIES) == set(QUALITIES)
    assert options.DIALECTS == CHOICES
    assert tuple(TUNED_BY) == options.TUNED_BY
    assert tuple(TARGETS) == options.TARGETS
    for place in options.ACTIVATIONS:
        HiddenStates(place, torch.device("cpu"))
    for name in options.ROTATIONS[:-1]:
        assert options.parse_rotation(name) >= 1


def commands() -> dict[str, Any]:
    return typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("command", commands())
def test_every_option_shows_its_default(command: str):
    """Flags are off; what has no default of its own says in words what happens without it."""
    silent = [
        parameter.opts[0]
        for parameter in commands()[command].params
        if parameter.param_type_name == "option"
        and not parameter.is_flag
        and not parameter.required
        and parameter.default is None
        and not isinstance(parameter.show_default, str)
    ]
    assert silent == []


@pytest.mark.parametrize("command", commands())
def test_flags_take_no_value_and_are_off(command: str):
    """Typer would show ``--json <bool>``, and nothing of what happens without it."""
    found = commands()[command]
    shown = found.get_params(typer.Context(found))
    flags = [parameter for parameter in shown if getattr(parameter, "is_flag", False)]
    assert flags
    wrong = [
        flag.opts[0]
        for flag in flags
        if flag.metavar != "" or not (flag.is_eager or isinstance(flag.show_default, str))
    ]
    assert wrong == []


def test_short_lists_are_the_placeholder_and_long_ones_are_in_the_help():
    short = options.values(["a", "b"], "Of it.")
    assert (short["metavar"], short["help"], short["autocompletion"]()) == (
        *("a|b", "Of it."),
        ["a", "b"],
    )
    names = [f"name{i}" for i in range(12)]
    long = options.values(names, "Of it.")
    assert long["metavar"] == "NAME"
    assert long["help"] == f"Of it: {', '.join(names)}."


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (["--out", "o", "--model", "m"], ["m", "--out", "o"]),
        (["-m", "m", "-q"], ["m", "-q"]),
        (["--model=m", "-q"], ["m", "-q"]),
        (["m", "-q"], ["m", "-q"]),
        (["m", "--", "--model", "other"], ["m", "--", "--model", "other"]),
        (["--model"], ["--model"]),
    ],
)
def test_the_option_model_is_the_first_argument(given: list[str], taken: list[str]):
    assert options.model_first(given) == taken
