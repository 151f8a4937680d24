"""The scale rule of inputs is settled before calibration, by who will read the checkpoint."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ptq.model.blueprint import Blueprint
from ptq.pipeline.readers import plan_for
from ptq.pipeline.recipe import Recipe


@pytest.fixture
def rules(tiny_llama: Path) -> Callable[..., set[str]]:
    """The input rules that a checkpoint would name, by the recipe's changes and the dialect."""

    def settle(dialect: str | None, dtype: str = "bfloat16", **given: object) -> set[str]:
        recipe = Recipe.default("nvfp4", scheme="w4a4", **given)
        plan = plan_for(Blueprint.of(tiny_llama), recipe, dialect, dtype=dtype)
        return {info.input_rule for info in plan.infos.values()} | {str(plan.recipe.input_rule)}

    return settle


def test_readers_that_apply_no_rule_get_weights_calibrated_with_the_formats_own(rules) -> None:
    for dialect in ("auto", "compressed-tensors"):
        assert rules(dialect) == {"default", "absmax"}
    assert rules("ptq") == rules(None) == {"four_six"}


def test_what_other_readers_could_not_load_anyway_gets_the_best_rule(rules) -> None:
    assert rules("auto", dtype="float32") == {"four_six"}
    assert rules("auto", rules=(("o_proj", {"input_scale": "token"}),)) == {"four_six"}


def test_a_rule_that_is_asked_for_is_taken(rules) -> None:
    for dialect in ("auto", "compressed-tensors", "ptq", None):
        assert rules(dialect, input_rule="four_six") == {"four_six"}
        assert rules(dialect, input_rule="absmax") == {"default", "absmax"}


def test_a_hadamard_means_absmax(rules) -> None:
    for dialect in ("auto", "ptq", None):
        assert rules(dialect, rotation=16) == {"default", "absmax"}
    assert rules("ptq", rules=(("o_proj", {"rotation": 16}),)) == {"default", "four_six", "None"}


def test_a_dialect_that_cannot_express_the_plan_is_refused_at_once(rules) -> None:
    for given in ({}, {"input_rule": "absmax"}):
        with pytest.raises(ValueError, match=r"cannot write compressed-tensors: .*global scale"):
            rules("compressed-tensors", input_scale="token", **given)


def test_weights_alone_have_no_rule(tiny_llama: Path) -> None:
    recipe = Recipe.default("nvfp4")
    plan = plan_for(Blueprint.of(tiny_llama), recipe, "ptq", dtype="bfloat16")
    assert plan.recipe == replace(recipe, samples=plan.samples, seq_len=plan.seq_len)
    assert {info.input_rule for info in plan.infos.values()} == {"default"}


def test_what_is_said_of_inputs(tiny_llama: Path) -> None:
    def about(dialect: str, **given: object) -> str:
        recipe = Recipe.default("nvfp4", **{"scheme": "w4a4", **given})
        return plan_for(
            Blueprint.of(tiny_llama), recipe, dialect, dtype="bfloat16"
        ).about_inputs.removeprefix("inputs are scaled by ")

    ours = "; with --dialect ptq by four_six, which is more accurate"
    assert about("auto") == f"absmax, as engines do that read compressed-tensors{ours}"
    assert about("ptq") == "four_six"
    assert about("ptq", rotation="auto") == "absmax or four_six"
    assert about("auto", rotation=16) == about("auto", input_rule="absmax") == "absmax"
    theirs = "; engines that read compressed-tensors scale them by absmax"
    assert about("compressed-tensors", input_rule="four_six") == f"four_six{theirs}"
    assert about("auto", scheme="w4a16") == ""


def test_who_opens_a_mixture_is_known_before_its_layers_are_chosen(tiny_llama: Path) -> None:
    def written(dialect: str | None = "auto", **given: object):
        recipe = Recipe.default("nvfp4", scheme="w4a4", **given)
        return plan_for(Blueprint.of(tiny_llama), recipe, dialect, dtype="bfloat16").written

    assert written(None) is None
    pure, mixed = written(), written(eight_bit=0.1)
    assert pure is not None and pure.dialect == "compressed-tensors"
    assert mixed is not None and mixed.dialect == "compressed-tensors"
    six = written(eight_bit=0.1, rules=(("o_proj", "mxint6"),))
    assert six is not None and six.dialect == "ptq" and "no format for mxint6" in six.reason
    with pytest.raises(ValueError, match="cannot write compressed-tensors: it has no format for"):
        written("compressed-tensors", budget=4.75, rules=(("o_proj", "mxint6"),))


def test_rules_of_other_formats_do_not_meet_an_input_rule_of_the_run(tiny_llama: Path) -> None:
    """The own rule of MXFP6 is none of NVFP4, which a rule by fields would have inherited."""
    change = {"format": "nvfp4", "rotation": 16}
    recipe = Recipe.default("mxfp6", scheme="w4a4", rules=(("q_proj", change),))
    plan = plan_for(Blueprint.of(tiny_llama), recipe, "auto", dtype="bfloat16")
    q, k = (plan[f"model.layers.0.self_attn.{leaf}_proj"].recipe for leaf in "qk")
    assert (q.format, q.rotation, k.format) == ("nvfp4", 16, "mxfp6")
