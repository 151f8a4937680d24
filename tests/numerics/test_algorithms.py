"""Laws that every row of the table of algorithms keeps."""

import pytest
import torch
from torch import Tensor

from ptq.numerics.algorithms import ALGORITHMS, Prepared, Problem, prepare, prepare_rtn
from ptq.numerics.errors import output_error, quadratic_form
from ptq.numerics.factor import damped
from ptq.numerics.formats import FORMATS, MXFP4, MXINT4, NVFP4, NVINT4, Format
from ptq.numerics.scales import Grid, round_to

algorithms = pytest.mark.parametrize("name", ALGORITHMS)
deployed = pytest.mark.parametrize("fmt", [MXFP4, NVFP4, NVINT4, MXINT4], ids=lambda f: f.name)
every = pytest.mark.parametrize("fmt", list(FORMATS.values()), ids=list(FORMATS))


def make(w: Tensor, h: Tensor, fmt: Format, **options) -> Problem:
    return Problem(
        hessian=h, grid=Grid(fmt, fmt.global_scale(w.abs().amax(), 1.0), "mse"), **options
    )


@algorithms
@every
def test_results_are_codes_and_scales_that_can_be_stored(name: str, fmt: Format, problem) -> None:
    w, _, h = problem
    result = prepare(name, make(w, h, fmt)).solve(w)
    assert result.codes.dtype == torch.uint8 and result.scales.bits.dtype == fmt.bits_dtype
    assert result.codes.shape == w.shape
    values = fmt.element.decode(result.codes)
    assert bool((values.abs() <= fmt.element.max).all())  # neither NaN nor the spare code
    scales = fmt.decode_scale(result.scales.bits)
    assert bool((scales > 0).all() and scales.isfinite().all())
    assert torch.equal(fmt.element.encode(values), result.codes)  # zero is code 0


@algorithms
@deployed
@pytest.mark.parametrize("descent", [0, 4])
def test_rows_are_independent_given_the_hessian(
    name: str, fmt: Format, descent: int, problem
) -> None:
    """G25: rows may come in slices and in any order."""
    w, _, h = problem
    solve = prepare(name, make(w, h, fmt, descent=descent)).solve
    whole = solve(w)
    for rows in (slice(0, 7), slice(7, None), slice(None, None, 3)):
        part = solve(w[rows])
        assert (part.codes != whole.codes[rows]).float().mean() < 0.01  # sums in another order
        assert (part.scales.bits != whole.scales.bits[rows]).float().mean() < 0.01


@algorithms
@deployed
def test_inputs_are_not_modified(name: str, fmt: Format, problem) -> None:
    w, _, h = problem
    before = w.clone(), h.clone()
    prepare(name, make(w, h, fmt, descent=2)).solve(w)
    assert torch.equal(w, before[0]) and torch.equal(h, before[1])


@algorithms
@every
def test_white_inputs_leave_nothing_but_rounding(name: str, fmt: Format, problem) -> None:
    """G24: where no input says anything of another, the nearest code is the best; but refitted
    scales that are fine enough find better ones."""
    w = problem[0]
    result, nearest = (
        prepare(which, make(w, torch.eye(128), fmt)).solve(w) for which in (name, "rtn")
    )
    if name == "decoupleq" and fmt.bits_dtype != torch.uint8:
        assert torch.equal(result.codes, round_to(w, result.scales).codes)
        errors = [(w - q.dequantize()).square().sum(1) for q in (result, nearest)]
        assert bool((errors[0] <= errors[1]).all()) and float(errors[0].sum() - errors[1].sum()) < 0
    else:
        assert torch.equal(result.codes, nearest.codes)


@algorithms
@every
def test_no_algorithm_is_much_worse_than_rounding(name: str, fmt: Format, problem) -> None:
    w, _, h = problem
    errors = {
        which: float(output_error(w, prepare(which, make(w, h, fmt)).solve(w).dequantize(), h))
        for which in (name, "rtn")
    }
    assert errors[name] <= 1.01 * errors["rtn"]


@algorithms
@pytest.mark.parametrize("fmt", [MXFP4, MXINT4], ids=lambda f: f.name)
def test_powers_of_two_pass_through(name: str, fmt: Format, problem) -> None:
    """Weights twice as large have the same codes and scale bytes one higher."""
    w, _, h = problem
    one, two = (prepare(name, make(x, h, fmt)).solve(x) for x in (w, 2 * w))
    assert torch.equal(one.codes, two.codes)
    assert torch.equal(one.scales.bits + 1, two.scales.bits)


@algorithms
@deployed
def test_descent_never_raises_the_damped_loss(name: str, fmt: Format, problem) -> None:
    w, _, h = problem
    before = prepare(name, make(w, h, fmt)).solve(w)
    after = prepare(name, make(w, h, fmt, descent=4)).solve(w)
    h = damped(h, 0.01)
    losses = [quadratic_form(w.double() - q.dequantize().double(), h) for q in (before, after)]
    assert bool((losses[1] <= losses[0] * (1 + 1e-5)).all())


def test_damping_is_raised_until_there_is_a_factor(problem) -> None:
    """G13, and reported."""
    w, _, h = problem
    bad = h.clone()
    bad[0, 1] = bad[1, 0] = 1.02 * float((bad[0, 0] * bad[1, 1]).sqrt())
    prepared = prepare("gptq", make(w, bad, NVFP4, damping=1e-4))
    assert prepared.damping > 1e-4 and prepare("gptq", make(w, h, NVFP4)).damping == 0.01


@algorithms
def test_the_damping_of_the_descent_is_reported(name: str, problem) -> None:
    """0 says that no Hessian was damped."""
    w, _, h = problem
    refined = prepare(name, make(w, h, NVFP4, damping=0.03, descent=1))
    assert refined.damping == 0.03


def test_a_new_row_is_called_once_and_refined_under_a_name_that_says_so(
    problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, _, h = problem
    seen: list[Problem] = []

    def halved(problem: Problem) -> Prepared:
        seen.append(problem)
        return Prepared(name="halved", solve=lambda rows: prepare_rtn(problem).solve(rows / 2))

    monkeypatch.setitem(ALGORITHMS, "halved", halved)
    plain = prepare("halved", make(w, h, NVFP4))
    assert plain.name == "halved" and len(seen) == 1
    half = prepare("rtn", seen[0]).solve(w / 2)
    assert torch.equal(plain.solve(w).codes, half.codes)
    refined = prepare("halved", make(w, h, NVFP4, descent=4))
    assert refined.name == "halved+descent" and len(seen) == 2
    assert not torch.equal(refined.solve(w).codes, half.codes)


def test_an_unknown_name_lists_the_table(problem) -> None:
    with pytest.raises(ValueError, match="unknown algorithm 'awq'; choose from rtn, gptq"):
        prepare("awq", make(*problem[::2], NVFP4))
