"""Adam against torch's own, and the schedule."""

from itertools import pairwise

import pytest
import torch

from ptq.numerics.adam import BETAS, EPSILON, moments, rate


def test_steps_are_those_of_torchs_adam() -> None:
    start = torch.randn(50)
    expected = torch.nn.Parameter(start.double())
    optimizer = torch.optim.Adam([expected], lr=1.0, betas=BETAS, eps=1e-16)
    value, first, second = start, *torch.zeros(2, 50, dtype=torch.bfloat16)
    for count in range(1, 13):
        gradient, share = torch.randn(50) * 1e-9, 0.01 / count
        mean, root, first, second = moments(gradient, first, second, count=count)
        value = value - share * mean / root
        expected.grad = gradient.double()
        optimizer.param_groups[0]["lr"] = share
        optimizer.step()
        if count == 1:  # nothing was rounded yet
            assert torch.allclose(value.double(), expected, atol=1e-6)
    # moments have 8 bits, so that steps are right to about a percent
    assert torch.allclose(value.double() - start, expected - start.double(), atol=6e-4)
    assert first.dtype == second.dtype == torch.bfloat16


def test_what_has_no_gradient_stays() -> None:
    zero = torch.zeros(3, dtype=torch.bfloat16)
    mean, root, first, second = moments(torch.zeros(3), zero, zero, count=1)
    assert not mean.any() and not first.any() and not second.any()
    assert root.tolist() == pytest.approx([EPSILON] * 3)  # nothing is divided by 0


def test_the_rate_rises_for_some_steps_and_falls_to_its_end() -> None:
    rates = [rate(step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a > b for a, b in pairwise(rates[4:]))
    assert rates[-1] == pytest.approx(0.05)
    for steps in (1, 2, 3, 8):
        few = [rate(step, steps) for step in range(steps)]
        assert max(few) <= 1 and min(few) >= 0.05 - 1e-9
