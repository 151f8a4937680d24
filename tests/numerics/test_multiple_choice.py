"""One option for every unit within a limit: against all choices there are, and at the edges."""

import itertools

import numpy as np
import pytest

from ptq.numerics.multiple_choice import choose


def total(table, chosen) -> float:
    return sum(row[o] for row, o in zip(table, chosen, strict=True))


@pytest.mark.parametrize("seed", range(6))
def test_the_best_of_all_choices(seed: int) -> None:
    draw = np.random.default_rng(seed)
    sizes = draw.integers(1, 5, 6)
    losses = [draw.lognormal(0, 2, n).tolist() for n in sizes]
    costs = [draw.integers(1, 20, n).astype(float).tolist() for n in sizes]
    every = list(itertools.product(*(range(n) for n in sizes)))
    for limit in (total(costs, [int(np.argmin(c)) for c in costs]) + d for d in (0, 5, 17, 1000)):
        chosen = choose(losses, costs, limit)
        assert total(costs, chosen) <= limit
        least = min(total(losses, c) for c in every if total(costs, c) <= limit)
        assert total(losses, chosen) == pytest.approx(least, rel=1e-4)


def test_the_order_by_gain_over_cost_is_not_good_enough() -> None:
    losses = [[6.5, 0.0], [5.0, 0.0], [5.0, 0.0]]
    costs = [[0.0, 6.0], [0.0, 5.0], [0.0, 5.0]]
    assert choose(losses, costs, 10.0) == [0, 1, 1]


def test_scales_do_not_matter() -> None:
    assert choose([[1e-9, 0.0], [2e-9, 0.0]], [[0.0, 3e6], [0.0, 3e6]], 4e6) == [0, 1]
    assert choose([[1e9, 0.0], [2e9, 0.0]], [[0.0, 3e-6], [0.0, 3e-6]], 4e-6) == [0, 1]


def test_dearer_options_that_lose_more_are_not_taken() -> None:
    assert choose([[1.0, 2.0]], [[1.0, 9.0]], 100.0) == [0]
    assert choose([[1.0, 1.0, 0.5]], [[2.0, 1.0, 9.0]], 5.0) == [1]


def test_the_cheapest_is_always_possible_and_less_is_refused() -> None:
    assert choose([[5.0, 0.0]], [[2.0, 3.0]], 2.0) == [0]
    assert choose([], [], 0.0) == []
    with pytest.raises(ValueError, match="limit of 1 is less than the 2 of the cheapest"):
        choose([[5.0, 0.0]], [[2.0, 3.0]], 1.0)


def test_many_units_take_no_time_and_are_near_the_bound() -> None:
    """Of the relaxed problem: with 2000 units a step more or less is nothing."""
    draw = np.random.default_rng(0)
    losses = draw.lognormal(0, 1.5, (2000, 1)) * np.array([1.0, 0.1, 0.01, 0.0])
    costs = draw.integers(1, 4, (2000, 1)) * np.array([4.0, 6.0, 8.0, 16.0])
    chosen = choose(losses.tolist(), costs.tolist(), 1.3 * costs[:, 0].sum())
    rows = np.arange(2000)
    assert costs[rows, chosen].sum() <= 1.3 * costs[:, 0].sum()
    price = [10.0**e for e in np.linspace(-3, 1, 200)]
    bound = max((losses + p * costs).min(1).sum() - p * 1.3 * costs[:, 0].sum() for p in price)
    assert bound <= losses[rows, chosen].sum() <= 1.01 * bound
