"""Laws of the one-bit baselines, in float64."""

import pytest
import torch
from torch import Tensor

from ptq.numerics.errors import quadratic_form, sqnr
from ptq.numerics.one_bit import (
    bits_of_mask,
    masked_binary,
    phases,
    salient_channels,
    sign_mean,
)

Problem = tuple[Tensor, Tensor, Tensor]


def loss(w: Tensor, q: Tensor, h: Tensor) -> Tensor:
    return quadratic_form(w.double() - q, h)


def test_a_gaussian_matrix_loses_what_was_published_for_both_roundings() -> None:
    """4.40 dB each: 10 log₁₀ of 1 / (1 - 2/π)."""
    w = torch.randn(64, 65536, generator=torch.Generator().manual_seed(0))
    exact = float(-10 * torch.log10(torch.tensor(1 - 2 / torch.pi)))
    assert exact == pytest.approx(4.40, abs=0.005)
    assert float(sqnr(w, sign_mean(w))) == pytest.approx(exact, abs=0.02)
    assert float(sqnr(w, phases(w))) == pytest.approx(exact, abs=0.02)


def test_phases_are_the_nearest_of_four(problem: Problem) -> None:
    w = problem[0].double()
    found = torch.view_as_complex(phases(w).unflatten(1, (-1, 2)).contiguous())
    pairs = torch.view_as_complex(w.unflatten(1, (-1, 2)).contiguous())
    scale = found.abs().amax(1, keepdim=True)
    units = torch.tensor([1, -1, 1j, -1j])
    gaps = (pairs.unsqueeze(-1) - scale.unsqueeze(-1) * units).abs().min(-1).values
    torch.testing.assert_close((pairs - found).abs(), gaps, rtol=1e-9, atol=1e-12)
    for factor in (0.99, 1.01):  # the scale of least squares
        assert bool(
            ((pairs - factor * found).abs().square().sum(1)
             >= (pairs - found).abs().square().sum(1)).all()
        )  # fmt: skip


def test_the_mask_is_that_of_the_largest_inputs() -> None:
    diagonal = torch.tensor([1.0, 9, 2, 8, 3, 7, 4, 6])
    assert salient_channels(diagonal, 0.25).nonzero().flatten().tolist() == [1, 3]
    assert int(salient_channels(torch.rand(128), 0.2, multiple=32).sum()) == 32
    assert bits_of_mask(0.2, 4096) == pytest.approx(1.6 + 32 / 4096)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
def test_scales_are_the_best_for_their_codes(problem: Problem, share: float) -> None:
    w, _, h = problem
    found = masked_binary(w, h, share=share)
    mask = salient_channels(h.diagonal(), share)
    rest = found[:, ~mask]
    assert rest.abs().std(1).max() < 1e-9  # one magnitude a row
    assert torch.equal(rest.sign(), torch.where(w[:, ~mask] < 0, -1.0, 1.0).double())
    least = loss(w, found, h)
    for factor in (0.99, 1.01):
        other = found.clone()
        other[:, ~mask] *= factor
        assert bool((loss(w, other, h) >= least).all())
        if share:
            other = found.clone()
            other[:, mask] *= factor
            assert bool((loss(w, other, h) >= least).all())
    assert float(least.sum()) < float(loss(w, sign_mean(w), h).sum())


def test_more_salient_channels_cost_less(problem: Problem) -> None:
    w, _, h = problem
    totals = [float(loss(w, masked_binary(w, h, share=s), h).sum()) for s in (0.0, 0.2, 0.5, 1.0)]
    assert totals == sorted(totals, reverse=True)
