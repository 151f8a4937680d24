"""What the blocks of a run are expected to take: what grows with what."""

from dataclasses import replace
from pathlib import Path

import pytest

from ptq.model.blueprint import Blueprint
from ptq.pipeline.duration import Group, Work, block_seconds, other_seconds
from ptq.pipeline.plan import Plan
from ptq.pipeline.recipe import Recipe
from ptq.pipeline.speed import FEATURES, Speed

# One at a time, so that a law can be read off a sum.
NOTHING = Speed(
    flop=0.0, element=0.0, attention=0.0, rounded=0.0, column=0.0, weight=0.0, factor=0.0
)
GROUPS = (Group(FEATURES, (512, 128, 128), None), Group(1024, (256,), None))
WORK = Work(parameters=1e6, groups=GROUPS, attention=256, routed=1.0)
TOKENS = 4096


@pytest.fixture
def plan(tiny_llama: Path):
    def make(**given: object) -> Plan:
        return Plan.of(Blueprint.of(tiny_llama), Recipe.default("nvfp4", **given))

    return make


def seconds(speed: Speed, plan: Plan, *works: Work, ranks: int = 1) -> list[float]:
    return block_seconds(works, plan, speed, tokens=TOKENS, hidden=256, ranks=ranks)


def test_a_block_runs_three_times_and_the_last_one_twice(plan) -> None:
    products = replace(NOTHING, flop=1.0)
    moments = 2 * (FEATURES**2 + 1024**2)
    solving = sum(
        (1 + 2 * 5 + 10) * rows * group.features * (group.features - FEATURES)
        for group in GROUPS
        for rows in group.rows
    )
    first, last = seconds(products, plan(), WORK, WORK)
    passes = 2e6 * TOKENS
    assert first == pytest.approx(3 * passes + 2 * moments * TOKENS + solving)
    assert first - last == pytest.approx(passes)
    (unbalanced,) = seconds(products, plan(balance=0.0), WORK)
    assert last - unbalanced == pytest.approx(passes + moments * TOKENS)


def test_layers_are_solved_column_by_column_and_ranks_share_that(plan) -> None:
    columns = replace(NOTHING, column=1.0)
    assert seconds(columns, plan(), WORK) == [3 * FEATURES + 1024]
    assert seconds(columns, plan(), WORK, ranks=2) == [(3 * FEATURES + 1024) / 2]
    weights = replace(NOTHING, weight=1.0)
    assert seconds(weights, plan(), WORK) == [sum(group.weights for group in GROUPS)]
    factors = replace(NOTHING, factor=1.0)
    assert seconds(factors, plan(), WORK) == [FEATURES**3 + 1024**3]


def test_rounding_to_nearest_is_one_pass_without_moments(plan) -> None:
    products = replace(NOTHING, flop=1.0)
    nearest = plan(quality="fast")
    assert seconds(products, nearest, WORK) == [2e6 * TOKENS]


def test_inputs_are_rounded_for_every_layer_and_then_for_every_group(plan) -> None:
    rounding = replace(NOTHING, rounded=1.0)
    observed, later = TOKENS * (3 * FEATURES + 1024), TOKENS * (FEATURES + 1024)
    first, last = seconds(rounding, plan(scheme="w4a4"), WORK, WORK)
    assert (first, last) == (observed + later, observed)


def test_experts_see_the_tokens_that_are_sent_to_them(plan) -> None:
    groups = [Group(FEATURES, (64,), f"e{i}") for i in range(4)]
    sparse = Work(parameters=1e5, groups=groups, attention=0, routed=0.25)
    dense = Work(parameters=1e5, groups=groups[:1], attention=0, routed=1.0)
    products = replace(NOTHING, flop=1.0)
    assert seconds(products, plan(), sparse) == seconds(products, plan(), dense)
    again = replace(sparse, repeated=1000)
    more = seconds(products, plan(), again)[0] - seconds(products, plan(), sparse)[0]
    assert more == 2 * 1000 * TOKENS * 0.25


def test_attention_grows_with_the_length_of_sequences(plan) -> None:
    attending = replace(NOTHING, attention=1.0)
    short, long = (seconds(attending, plan(seq_len=n), WORK)[0] for n in (64, 128))
    assert long == 2 * short > 0


def test_text_and_weights_are_read_as_well(plan) -> None:
    little, much = plan(samples=1, seq_len=64), plan(samples=1000, seq_len=64)
    assert other_seconds(much, 0) > other_seconds(little, 0)
    assert other_seconds(little, 10**10) > other_seconds(little, 10**9) + 10
