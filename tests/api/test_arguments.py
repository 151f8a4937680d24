"""Arguments as people write them, and the recipe that they make."""

import tomllib
from dataclasses import fields

import pytest
import torch

from ptq.api.arguments import Choices, QuantizeOptions, follower, placed, shown, split
from ptq.pipeline.recipe import Recipe
from ptq.pipeline.recipe_file import to_toml


def test_choices_are_the_fields_of_a_recipe():
    named = {"format", "scheme"}  # arguments of their own
    assert Choices.__annotations__.keys() == {f.name for f in fields(Recipe)} - named


def test_choices_become_the_recipe_of_the_command_line():
    run, recipe = split(
        {"rotation": "none", "eight_bit": "10%", "ignore": ["lm_head"], "device": "cpu"},
        "NVFP4",
        "w4a4",
        None,
    )
    expected = Recipe.default(
        "nvfp4", scheme="w4a4", rotation=1, eight_bit=0.1, ignore=("lm_head",)
    )
    assert recipe == expected and run == {"device": "cpu"}
    rules = split(
        {"rules": {"*down_proj": "mxfp8", "*q_proj": {"rotation": 16}}}, "nvfp4", None, None
    )
    assert rules[1].rules == (("*down_proj", "mxfp8"), ("*q_proj", {"rotation": 16}))


def test_a_recipe_is_all_choices():
    recipe = Recipe.default("mxfp4")
    assert split({"overwrite": True}, None, None, recipe) == ({"overwrite": True}, recipe)
    with pytest.raises(ValueError, match=r"put format, seed into it"):
        split({"seed": 3}, "nvfp4", None, recipe)
    with pytest.raises(ValueError, match=r"put scheme into it"):
        split({}, None, "w4a4", recipe)


def test_arguments_override_a_recipe_file(tmp_path):
    file = tmp_path / "r.toml"
    file.write_text(to_toml(Recipe.default("mxfp4", seed=7)))
    assert tomllib.loads(file.read_text())["seed"] == 7
    _, recipe = split({"seed": 3}, None, None, file)
    assert recipe == Recipe.default("mxfp4", seed=3)


@pytest.mark.parametrize(
    ("options", "format", "message"),
    [
        ({"colour": "w4a4"}, "nvfp4", "unknown argument 'colour'; help"),
        ({"sample": 4}, "nvfp4", "unknown argument 'sample'; did you mean samples"),
        ({}, None, "say which format"),
        ({}, "nvfp5", "unknown format 'nvfp5'"),
        ({"rotation": "many"}, "nvfp4", "unknown rotation 'many'"),
        ({"eight_bit": "110%"}, "nvfp4", "from 0% to 100%"),
        ({"samples": 0}, "nvfp4", "samples is 0"),
    ],
)
def test_mistakes_are_one_line(options, format, message):
    with pytest.raises(ValueError, match=message) as error:
        split(options, format, None, None)
    assert "\n" not in str(error.value)


def test_places():
    run = {"device": "cpu", "dtype": "bfloat16", "dialect": "ptq"}
    assert placed(run) == (torch.device("cpu"), torch.bfloat16) and run == {"dialect": "ptq"}
    assert placed({"device": torch.device("cpu"), "dtype": torch.float32})[1] is torch.float32
    with pytest.raises(ValueError, match="unknown device"):
        placed({"device": "tpu"})


def test_a_function_takes_the_place_of_the_bar():
    def bar():
        raise AssertionError("not asked for")

    def told(done: int) -> None: ...

    with shown(told, bar) as on_block:
        assert on_block is told


def test_one_process_of_several_speaks(monkeypatch):
    assert not follower()
    monkeypatch.setenv("RANK", "1")
    assert follower()


def test_options_are_not_listed_twice():
    assert QuantizeOptions.__annotations__.keys() > Choices.__annotations__.keys()
