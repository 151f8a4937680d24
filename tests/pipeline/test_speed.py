"""What is timed before a run, with a clock that counts calls instead of seconds."""

import itertools

import pytest
import torch

from ptq.pipeline import speed
from ptq.pipeline.recipe import Recipe

CPU = torch.device("cpu")


def test_what_a_recipe_does_not_do_costs_nothing() -> None:
    found = speed.measure(Recipe.default("nvfp4"), CPU, 64, 16, 32)
    assert found.rounded == 0
    for value in (found.flop, found.element, found.attention, found.column, found.factor):
        assert 0 < value < 1e-2
    nearest = speed.measure(Recipe.default("nvfp4", quality="fast"), CPU, 64, 16, 32)
    assert nearest.factor == 0


@pytest.mark.parametrize("given", [{"scheme": "w4a4"}, {"rotation": 32}])
def test_rounded_and_rotated_inputs_are_timed(given: dict[str, object]) -> None:
    recipe = Recipe.default("nvfp4", quality="fast", **given)
    assert speed.measure(recipe, CPU, 64, 16, 32).rounded > 0


def test_of_several_tries_the_fastest_counts_and_the_first_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moments = itertools.accumulate([0.0, 0.1, 1.0, 5.0, 1.0, 3.0, 1.0, 4.0])
    monkeypatch.setattr(speed, "clock", lambda: next(moments))
    assert speed._fastest(lambda: None, CPU) == pytest.approx(3.0)


def test_attention_counts_both_products() -> None:
    assert speed.attention_flops(576, 512) == 4 * 576 * 512
