"""Recipes cannot contradict themselves, and errors list what is there."""

import json

import pytest

from ptq.numerics.formats import FORMATS
from ptq.pipeline.recipe import SCHEMES, Recipe, check_patterns
from ptq.reading.name_patterns import matches


@pytest.mark.parametrize(
    ("fmt", "scheme"),
    [(n, s) for n, f in FORMATS.items() for s in SCHEMES if s == "w4a16" or not f.weights_only],
)
def test_a_recipe_survives_json(fmt: str, scheme: str) -> None:
    recipe = Recipe.default(
        fmt,
        scheme=scheme,
        ignore=("lm_head",),
        rules=(("down_proj", {"format": "mxfp8", "rotation": 1}), ("o_proj", "skip")),
    )
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_what_is_given_wins_and_none_is_not_given() -> None:
    recipe = Recipe.default("nvfp4", rotation=64, damping=None, samples=3)
    assert (recipe.rotation, recipe.samples) == (64, 3)
    assert recipe.damping == Recipe.default("nvfp4").damping
    assert Recipe.default("nvfp4", algorithm="rtn").scales == "mse"
    assert Recipe.default("nvfp4", scales="mse").order == "act"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "nvfp5"}, "unknown format 'nvfp5'; choose from mxfp4, nvfp4"),
        ({"algorithm": "awq"}, "choose from rtn, gptq"),
        ({"format": "fp8-channel", "scales": "trial"}, "one scale a row; use --scales absmax"),
        ({"format": "int4-g128", "scheme": "w4a4"}, "int4-g128 is a format of weights alone: use"),
        ({"scheme": "w4a8"}, "choose from w4a16, w4a4"),
        ({"scales": "best"}, "choose from absmax"),
        ({"order": "down"}, "natural, act, group"),
        ({"rotation": 48}, "power of two"),
        ({"rotation": "huge"}, "unknown rotation"),
        ({"algorithm": "rtn", "scales": "trial"}, "inside the GPTQ sweep"),
        ({"scales": "trial", "order": "act"}, "order group or natural"),
        ({"damping": 0.0}, "damping is 0.0, it should be greater than 0"),
        ({"samples": 0}, "samples is 0, it should be greater than or equal to 1"),
        ({"rules": (("a", {"samples": 3}),)}, "samples cannot differ by module"),
        ({"input_rule": "mse"}, "unknown input_rule 'mse'; choose from absmax, four_six"),
        ({"format": "mxfp4", "input_rule": "four_six"}, "choose from theta, absmax"),
        ({"colour": "red"}, "unknown recipe keys colour"),
        ({"balance_factors": "odd"}, "choose from exact, power_of_two"),
        ({"algorithm": "llm-fp4", "scales": "trial"}, "inside the GPTQ sweep"),
        ({"nested": 4}, "nvfp4 holds no format of 4 bits within it"),
        ({"format": "mxint8", "nested": 5}, "choose from 4, 6"),
        ({"format": "mxint8", "nested": 4, "scheme": "w4a4"}, "use --scheme w4a16"),
        ({"format": "mxint8", "nested": 4, "budget": 8.3}, "leave out --eight-bit and --budget"),
    ],
)
def test_contradictions_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict({"format": "nvfp4", **change})


def test_algorithms_bring_the_choices_that_belong_to_them() -> None:
    fp4, refit = (Recipe.default("nvfp4", algorithm=a) for a in ("llm-fp4", "decoupleq"))
    assert (fp4.scales, fp4.descent, fp4.balance_factors) == ("mse", 0, "power_of_two")
    assert fp4.balance > 0 and "in powers of two" in fp4.levers
    assert (refit.scales, refit.order, refit.balance_factors) == ("trial", "group", "exact")
    assert Recipe.default("nvfp4", algorithm="llm-fp4", balance_factors="exact").measures


def test_nested_codes_are_chosen_as_those_of_the_narrow_format_are() -> None:
    nested, narrow = Recipe.default("mxint8", nested=4), Recipe.default("mxint4")
    assert nested.format == "mxint8" and "mxint4 nested in it" in nested.levers
    for field in ("scales", "order", "descent", "damping", "rotation", "balance"):
        assert getattr(nested, field) == getattr(narrow, field)
    assert nested.in_format("mxfp8").nested == 0


def test_patterns() -> None:
    name = "model.layers.3.mlp.down_proj"
    for pattern in (
        name,
        "down_proj",
        "mlp.down_proj",
        "*.down_proj",
        "model.layers.3.*",
        r"re:.*\.down_proj$",
    ):
        assert matches(pattern, name), pattern
    for pattern in ("own_proj", "model.layers.3", "re:down_proj", "up_proj"):
        assert not matches(pattern, name), pattern


def test_the_first_rule_that_matches_wins() -> None:
    recipe = Recipe.default(
        "nvfp4",
        rules=(("layers.0.*", "skip"), ("down_proj", "mxfp8"), ("*", {"rotation": 32})),
        ignore=("o_proj",),
    )
    assert recipe.for_module("model.layers.0.mlp.down_proj") is None
    assert recipe.for_module("model.layers.1.self_attn.o_proj") is None
    down = recipe.for_module("model.layers.1.mlp.down_proj")
    assert down is not None
    assert (down.format, down.algorithm, down.samples) == ("mxfp8", "gptq", recipe.samples)
    up = recipe.for_module("model.layers.1.mlp.up_proj")
    assert up is not None
    assert (up.format, up.rotation) == ("nvfp4", 32)


def test_a_pattern_that_matches_nothing_lists_near_names() -> None:
    names = ["model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"]
    check_patterns(["down_proj"], names, "linear layer")
    with pytest.raises(
        ValueError, match=r"'donw_proj' matches no linear layer of the model; near names: down_proj"
    ):
        check_patterns(["donw_proj"], names, "linear layer")


def test_the_rule_of_inputs_goes_by_the_rotation_unless_it_is_given() -> None:
    recipe = Recipe.default("nvfp4", scheme="w4a4")
    assert (recipe.rule_of_inputs(1), recipe.rule_of_inputs(16)) == ("four_six", "absmax")
    assert (recipe.stored_input_rule(1), recipe.stored_input_rule(16)) == ("four_six", "default")
    assert Recipe.default("nvfp4").stored_input_rule(1) == "default"
    given = Recipe.default(
        "nvfp4", scheme="w4a4", input_rule="four_six", rules=(("a", "mxfp4"), ("b", {"damping": 1}))
    )
    assert given.rule_of_inputs(16) == "four_six"
    other, same = given.for_module("a"), given.for_module("b")
    assert other is not None and other.rule_of_inputs(1) == "theta"
    assert same is not None and same.rule_of_inputs(16) == "four_six"
    with pytest.raises(ValueError, match="unknown input_rule 'four_six'"):
        given.from_dict(given.to_dict() | {"rules": [["a", {"format": "mxfp4"}]]})


def test_rotations_of_a_layer() -> None:
    assert Recipe.default("mxfp4", rotation=64).rotations(192) == [64]
    assert Recipe.default("nvfp4", rotation="auto").rotations(192) == [1, 16]
    with pytest.raises(ValueError, match="the largest that does is 64"):
        Recipe.default("mxfp4", rotation=128).rotations(192)
