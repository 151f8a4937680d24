"""From a model to advice and to a recipe that a run takes: what is measured, what is written."""

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ptq.model.checkpoint_source import CheckpointSource
from ptq.pipeline.advice import Damage, advise
from ptq.pipeline.advisor import AdviceOptions, measure_damage, recipe_of
from ptq.pipeline.plan import Plan
from ptq.pipeline.recipe import Recipe
from ptq.pipeline.recipe_file import to_toml
from ptq.pipeline.run import quantize_model
from ptq.runtime.evaluate import evaluate
from ptq.runtime.load import load
from ptq.text.windows import load_tokenizer


@pytest.fixture(scope="module")
def options(tiny_text: Path) -> AdviceOptions:
    return AdviceOptions(formats=("nvfp4", "mxfp4", "mxint8", "mxfp6"), calibration=str(tiny_text))


@pytest.fixture(scope="module")
def damage(tiny_llama: Path, options: AdviceOptions) -> Damage:
    return measure_damage(tiny_llama, options)


def test_every_option_of_every_unit_is_measured(
    tiny_llama: Path, options: AdviceOptions, damage: Damage
) -> None:
    labels = ["nvfp4", "nvfp4 r16", "mxfp4", "mxfp4 r32", "mxint8", "mxint8 r32", "mxfp6"]
    for unit in damage.units:
        assert [option.label for option in unit.options] == [*labels, "mxfp6 r32", "16 bit"]
        assert all(option.kl > 0 and option.kl_top25 > 0 for option in unit.options[:-1])
        assert unit.options[-1].kl == 0
    assert measure_damage(tiny_llama, options, known=damage) is damage
    other = replace(options, scheme="w4a16", keep=False)
    steps: list[tuple[int, int]] = []
    weights = measure_damage(
        tiny_llama, other, known=damage, on_block=lambda *step: steps.append(step)
    )
    assert steps == [(i, 4) for i in range(1, 5)]
    assert weights.scheme == "w4a16" and len(weights.units[0].options) == 8
    for unit, alone in zip(damage.units, weights.units, strict=True):
        assert alone.options[0].kl < unit.options[0].kl


def test_a_recipe_gives_each_layer_what_was_chosen(
    tiny_llama: Path, options: AdviceOptions, damage: Damage
) -> None:
    source = CheckpointSource(tiny_llama)
    for budget in (4.25, 4.6, 5.5, 9.0, 12.0):
        advice = advise(damage, budget=budget)
        recipe = recipe_of(advice, options)
        read = Recipe.default(**tomllib.loads(to_toml(recipe)))
        assert read == recipe
        plan = Plan.of(source, recipe)
        for unit, chosen in zip(damage.units, advice.choice, strict=True):
            option = unit.options[chosen]
            for name in unit.layers:
                if option.format is None:
                    assert name not in plan.layers
                    continue
                layer = plan[name].recipe
                assert (layer.format, layer.rotation) == (option.format, option.rotation)
                best = recipe.in_format(option.format)
                assert replace(layer, rotation=1, rules=()) == replace(best, rotation=1, rules=())
        assert advice.point.bits <= budget


def test_all_in_sixteen_bits_is_no_recipe(options: AdviceOptions, damage: Damage) -> None:
    with pytest.raises(ValueError, match="every layer would stay in 16 bits"):
        recipe_of(advise(damage, budget=16.0), options)


def test_what_was_predicted_is_lost_after_quantizing(
    tiny_llama: Path, options: AdviceOptions, damage: Damage, tmp_path: Path
) -> None:
    """By the recipe as it is, on the text that it was measured on, and less than in NVFP4 alone."""
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    text = Path(options.calibration).read_text("utf-8")
    tokens = torch.tensor(load_tokenizer(tiny_llama)(text)["input_ids"])

    def loss(recipe: Recipe, name: str) -> float:
        few = replace(recipe, samples=8, seq_len=64)
        quantize_model(tiny_llama, tmp_path / name, recipe=few, device="cpu")
        subject = load(tmp_path / name, dtype=torch.float32, inputs="quantized")
        found = evaluate(subject, tokens, reference=original, seq_len=64, max_tokens=2048).kl
        assert found is not None
        return found

    advice = advise(damage, budget=5.0)
    assert len(advice.point.shares) > 1
    advised = loss(recipe_of(advice, options), "advised")
    assert advised == pytest.approx(advice.point.kl, rel=0.4)
    assert advised < 0.7 * loss(options.recipe("nvfp4"), "uniform")


def test_options_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown format 'fp3'"):
        AdviceOptions(formats=("fp3",))
    with pytest.raises(ValueError, match="name one format"):
        AdviceOptions(formats=())
