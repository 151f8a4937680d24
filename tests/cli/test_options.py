"""From option strings to values: rotations, dtypes, devices, recipes."""

import json
from pathlib import Path

import pytest
import torch

from ptq.cli.options import make_recipe, parse_device, parse_dtype, parse_rotation, read_choices
from ptq.pipeline.recipe import Recipe


def test_rotations_have_names() -> None:
    assert (parse_rotation("none"), parse_rotation("NONE"), parse_rotation("64")) == (1, 1, 64)
    for name in ("", "-16", "1.5", "full"):
        with pytest.raises(ValueError, match="unknown rotation"):
            parse_rotation(name)


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
