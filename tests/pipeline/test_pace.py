"""The time left, with steps of any length: foretold, measured, and while a step goes on."""

import pytest

from ptq.pipeline.pace import OPEN, Pace


class Clock:
    """A clock that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_before_the_first_step_is_over_the_forecast_counts_down() -> None:
    clock = Clock()
    pace = Pace([60.0, 120.0], seconds=True, clock=clock)
    assert (pace.remaining, pace.share) == (180.0, 0.0)
    clock.now += 30
    assert (pace.remaining, pace.share) == (150.0, pytest.approx(30 / 180))


def test_shares_alone_foretell_nothing_until_a_step_is_over() -> None:
    clock = Clock()
    pace = Pace([1.0, 3.0], clock=clock)
    clock.now += 10
    assert pace.remaining is None and pace.share == 0
    assert Pace([1.0, 3.0], clock=clock, since=clock.now - 5).finish(1) == 5
    assert pace.finish(1) == 10
    assert pace.remaining == 30 and pace.share == 0.25


def test_steps_of_an_hour_still_count_down() -> None:
    clock = Clock()
    pace = Pace([1.0] * 4, clock=clock)
    clock.now += 3600
    pace.finish(1)
    seen = []
    for _ in range(4):
        clock.now += 900
        seen.append(pace.remaining)
    assert seen == [9900, 9000, 8100, 7200]
    clock.now += 5000  # late: the two that follow are all that is known
    assert pace.remaining == 7200
    assert pace.share == pytest.approx((1 + OPEN) / 4)


def test_uneven_steps_are_weighed_by_what_they_cost() -> None:
    clock = Clock()
    pace = Pace([1.0, 10.0, 10.0], seconds=True, clock=clock)
    clock.now += 2  # twice as slow as foretold
    pace.finish(1)
    assert pace.remaining == 40


def test_what_an_earlier_run_finished_says_nothing_of_the_speed() -> None:
    clock = Clock()
    pace = Pace([10.0] * 4, seconds=True, clock=clock)
    for done in (1, 2):
        clock.now += 0.1
        pace.finish(done, known=True)
    assert pace.remaining == 20


def test_the_speed_is_that_of_the_last_steps_and_the_first_one_is_special() -> None:
    clock = Clock()
    pace = Pace([1.0] * 100, clock=clock)
    clock.now += 9
    pace.finish(1)  # with what comes before the first block
    clock.now += 1
    pace.finish(2)
    assert pace.remaining == 98
    for done in range(3, 51):
        clock.now += 5
        pace.finish(done)
    assert pace.remaining == 250


def test_steps_without_a_cost_are_alike_and_none_are_done() -> None:
    clock = Clock()
    pace = Pace([0.0, 0.0], clock=clock)
    clock.now += 4
    pace.finish(1)
    assert (pace.remaining, pace.share) == (4, 0.5)
    pace.finish(2)
    assert (pace.remaining, pace.share) == (0, 1)
    assert (Pace([]).remaining, Pace([]).share) == (0, 1)
