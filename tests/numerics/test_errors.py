"""What a Hessian says of an error."""

import math

import pytest
import torch
from torch import Tensor

from ptq.numerics.errors import output_error, quadratic_form, relative, sqnr
from ptq.numerics.formats import MXFP4, MXINT4, NVFP4, NVINT4, Format
from ptq.numerics.gptq import gptq
from ptq.numerics.scales import Grid

deployed = pytest.mark.parametrize("fmt", [MXFP4, NVFP4, NVINT4, MXINT4], ids=lambda f: f.name)


@deployed
def test_the_loss_is_the_output_error_on_the_same_tokens(fmt: Format, problem) -> None:
    """G17: un-damped."""
    w, x, h = problem
    swept = gptq(w, h, Grid(fmt, fmt.global_scale(w.abs().amax()), "mse")).dequantize()
    direct = ((w - swept).double() @ x.double().T).square().sum() / (
        w.double() @ x.double().T
    ).square().sum()
    assert abs(float(output_error(w, swept, h)) / float(direct) - 1) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_form_is_the_mean_square_of_a_rows_output(problem, dtype: torch.dtype) -> None:
    w, x, h = problem
    forms = quadratic_form(w, h.to(dtype))
    assert forms.dtype == torch.float64 and forms.shape == (len(w),)
    expected = (x.double() @ w.double().T).square().mean(0)
    torch.testing.assert_close(forms, expected, rtol=1e-4, atol=0)


def test_forms_are_quadratic_and_nothing_is_modified(problem) -> None:
    w, _, h = problem
    before = w.clone(), h.clone()
    torch.testing.assert_close(quadratic_form(-3 * w, h), 9 * quadratic_form(w, h))
    assert (quadratic_form(torch.zeros_like(w), h) == 0).all()
    assert torch.equal(w, before[0]) and torch.equal(h, before[1])


def test_white_inputs_make_the_error_that_of_the_weight(problem) -> None:
    w, _, _ = problem
    rounded = w.round()
    error = float(output_error(w, rounded, torch.eye(128)))
    assert error == pytest.approx(10 ** (-float(sqnr(w, rounded)) / 10), rel=1e-5)


def test_the_error_does_not_know_the_size_of_weights_or_inputs(problem) -> None:
    w, _, h = problem
    error = float(output_error(w, w.round(), h))
    assert float(output_error(4 * w, 4 * w.round(), h)) == pytest.approx(error, rel=1e-12)
    assert float(output_error(w, w.round(), 100 * h)) == pytest.approx(error, rel=1e-12)


def test_an_error_without_a_signal_is_infinite_and_none_is_zero() -> None:
    error, signal = torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([0.0, 0.0, 2.0, 2.0])
    assert relative(error, signal).tolist() == [0, math.inf, 0, 0.5]
    silent = torch.zeros(4, 4)
    assert float(output_error(torch.ones(2, 4), torch.zeros(2, 4), silent)) == 0


def test_ten_decibels_are_a_factor_of_ten_in_energy() -> None:
    x: Tensor = torch.full((5, 4), 10.0)
    assert float(sqnr(x, x - 1)) == pytest.approx(20)
    assert float(sqnr(x, x - 10**0.5)) == pytest.approx(10, rel=1e-6)
    assert float(sqnr(x, x)) == math.inf
