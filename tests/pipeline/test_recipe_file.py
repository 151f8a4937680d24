"""A recipe that is written as TOML and read again is the same recipe."""

import tomllib

import pytest

from ptq.numerics.formats import FORMATS
from ptq.pipeline.recipe import SCHEMES, Recipe
from ptq.pipeline.recipe_file import to_toml

RULES = (
    ("re:.*\\.down_proj", {"format": "mxfp8", "balance": 0.125}),
    ('a "quoted"\tñame\x7f', "skip"),
    ("*.q_proj", "nvfp4"),
)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [(n, s) for n, f in FORMATS.items() for s in SCHEMES if s == "w4a16" or not f.weights_only],
)
def test_what_is_written_is_read(name: str, scheme: str):
    recipe = Recipe.default(name, scheme=scheme, ignore=("*.v_proj", "lm_head"), rules=RULES)
    text = to_toml(recipe)
    assert Recipe.from_dict(tomllib.loads(text)) == recipe
    choices = tomllib.loads(text)
    assert Recipe.default(choices.pop("format"), **choices) == recipe


def test_a_line_for_every_choice_that_is_made():
    lines = to_toml(Recipe.default("nvfp4")).splitlines()
    assert lines[0] == 'format = "nvfp4"' and "damping = 0.05" in lines
    assert not any(line.startswith("field") for line in lines)
