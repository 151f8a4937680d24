"""The damped Hessian, its factor, and the orders of columns."""

import pytest
import torch
from torch import Tensor

from ptq.numerics.factor import IndefiniteHessian, column_order, damped, factorize
from ptq.numerics.formats import NVFP4, Format
from ptq.numerics.gptq import gptq
from ptq.numerics.scales import Grid


def grid(w: Tensor, fmt: Format, rule: str = "mse", margin: float = 1.0) -> Grid:
    return Grid(fmt, fmt.global_scale(w.abs().amax(), margin), rule)


def test_the_factor_is_the_cholesky_factor_of_the_inverse(problem) -> None:
    """One factorisation and one triangular inverse give the U of the usual three steps (G12)."""
    h = damped(problem[2], 0.01)
    expected = torch.linalg.cholesky(torch.linalg.inv(h), upper=True).float()
    factor = factorize(problem[2], 16, order="natural", damping=0.01)
    assert torch.equal(factor.perm, torch.arange(len(h)))
    # rounded once, from float64: cond(A) may reach 1 + in/damping
    torch.testing.assert_close(factor.upper, expected, rtol=2e-7, atol=1e-11)


def test_orders(problem) -> None:
    diagonal = torch.rand(64)
    act, by_group = column_order(diagonal, 16, "act"), column_order(diagonal, 16, "group")
    assert (diagonal[act].diff() <= 0).all()
    assert column_order(diagonal, 16, "natural").tolist() == list(range(64))
    groups = by_group.unflatten(0, (-1, 16))
    assert (groups // 16 == groups[:, :1] // 16).all()  # groups stay together
    assert (diagonal[groups].mean(1).diff() <= 0).all()
    assert (diagonal[groups].diff(dim=1) <= 0).all()


def test_an_indefinite_hessian_is_an_error_and_damping_cures_it(problem) -> None:
    """G13: never a silent fall-back."""
    w, _, h = problem
    shifted = h - 0.02 * h.diagonal().mean() * torch.eye(128, dtype=h.dtype)
    with pytest.raises(IndefiniteHessian, match="raise the damping"):
        gptq(w, shifted, grid(w, NVFP4), damping=0.001)
    gptq(w, shifted, grid(w, NVFP4), damping=0.1)


@pytest.mark.parametrize(
    ("poison", "message"),
    [(float("nan"), "not finite"), (float("inf"), "not finite"), (0.0, "no tokens")],
)
def test_hessians_without_sense_are_refused(problem, poison: float, message: str) -> None:
    """G14, G15."""
    w, _, h = problem
    bad = (
        torch.zeros_like(h)
        if poison == 0
        else h.clone().index_put_((torch.tensor(3), torch.tensor(4)), torch.tensor(poison).double())
    )
    with pytest.raises(ValueError, match=message):
        gptq(w, bad, grid(w, NVFP4))
