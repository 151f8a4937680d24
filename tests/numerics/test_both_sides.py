"""Errors paid back by later rows as well as by later columns."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ptq.numerics import both_sides as module
from ptq.numerics.algorithms import Problem, prepare
from ptq.numerics.both_sides import both_sides, cost, growing, parts
from ptq.numerics.descent import coordinate_descent
from ptq.numerics.errors import quadratic_form
from ptq.numerics.factor import damped
from ptq.numerics.formats import FORMATS, NVFP4, Format
from ptq.numerics.scales import Grid
from ptq.numerics.tensor import QuantizedTensor

formats = pytest.mark.parametrize("fmt", [FORMATS["nvfp4"], FORMATS["mxint4"]], ids=str)


def gradients_of(rows: int) -> Tensor:
    """G of outputs whose gradients go together, float64."""
    generator = torch.Generator().manual_seed(7)
    mix = torch.randn(rows, rows, generator=generator) * torch.logspace(0, -1.5, rows)
    g = torch.randn(600, rows, generator=generator) @ mix.T
    return (g.T @ g).double() / len(g)


def whole(problem: tuple[Tensor, Tensor, Tensor], fmt: Format, **options: Any) -> Problem:
    w, _, h = problem
    return Problem(
        hessian=h, grid=Grid(fmt, fmt.global_scale(w.abs().amax(), 1.5), "mse"), **options
    )


def test_what_errors_cost_is_the_trace_of_both_sides(problem) -> None:
    w, _, h = problem
    g = gradients_of(len(w))
    expected = torch.trace(g @ w.double() @ h @ w.double().T)
    assert float(cost(w, h, [g])) == pytest.approx(float(expected), rel=1e-6)
    alike = [torch.eye(20), torch.eye(28)]
    assert float(cost(w, h, alike)) == pytest.approx(float(quadratic_form(w, h).sum()), rel=1e-6)


@formats
def test_errors_cost_less_than_those_of_columns_alone(fmt: Format, problem) -> None:
    w, _, h = problem
    g = gradients_of(len(w))
    prepared = prepare("gptq", whole(problem, fmt, descent=4, order="group", in_loop="trial"))
    assert prepared.weighed is not None
    losses = [
        float(cost(w - q.dequantize(), h, [g]))
        for q in (prepared.solve(w), prepared.weighed(w, [g]))
    ]
    assert losses[1] < 0.8 * losses[0]


def test_outputs_that_count_alike_are_solved_as_ever(problem) -> None:
    w = problem[0]
    prepared = prepare("gptq", whole(problem, NVFP4, order="group", in_loop="trial"))
    assert prepared.weighed is not None
    for g in (torch.eye(len(w)) * 3, torch.zeros(len(w), len(w))):
        usual, weighed = (
            prepared.solve(w),
            module.both_sides(w, [g], prepared.solve, lambda rows, q: q, damping=0.0),
        )
        assert torch.equal(usual.codes, weighed.codes)
        assert torch.equal(usual.scales.bits, weighed.scales.bits)


def test_later_rows_get_the_best_target_for_errors_of_earlier_ones(problem) -> None:
    """With columns that do not see each other, against the minimum of the trace itself."""
    w, (first, rest) = problem[0], (slice(0, 16), slice(16, 48))
    g = gradients_of(len(w))
    g = g[g.diagonal().argsort(descending=True)][:, g.diagonal().argsort(descending=True)]
    grid = Grid(NVFP4, NVFP4.global_scale(w.abs().amax(), 1.5), "mse")
    problem_of = Problem(hessian=torch.eye(128).double(), grid=grid)
    targets: list[Tensor] = []

    def solve(rows: Tensor) -> QuantizedTensor:
        targets.append(rows)
        return prepare("rtn", problem_of).solve(rows)

    both_sides(w, [g], solve, lambda rows, q: q, sweeps=0, damping=0.0, together=16)
    error = (prepare("rtn", problem_of).solve(w[first]).dequantize() - w[first]).double()
    best = w[rest].double() - torch.linalg.solve(g[rest, rest], g[rest, first] @ error)
    assert torch.equal(targets[0], w[first])
    assert torch.allclose(targets[1].double(), best[: len(targets[1])], atol=1e-5)


@formats
def test_descent_lowers_what_errors_cost(fmt: Format, problem) -> None:
    w, _, h = problem
    g = gradients_of(len(w))
    prepared, hessian = prepare("gptq", whole(problem, fmt)), damped(h, 0.01).float()
    descend = partial(coordinate_descent, sweeps=1, damped_hessian=hessian)
    losses = [
        float(cost(w - result.dequantize(), h, [g]))
        for sweeps in (0, 4)
        for result in [
            both_sides(
                w, [g], prepared.solve, lambda r, q: descend(r, h, q), sweeps=sweeps, together=8
            )
        ]
    ]
    assert losses[1] < losses[0]


def test_blocks_of_rows_go_in_step_and_do_not_see_each_other(problem) -> None:
    w = problem[0]
    prepared = prepare("gptq", whole(problem, NVFP4, order="group", in_loop="trial", descent=2))
    assert prepared.weighed is not None
    costs = [gradients_of(32), gradients_of(16)]
    together = prepared.weighed(w, costs).dequantize()
    apart = [prepared.weighed(w[:32], costs[:1]), prepared.weighed(w[32:], costs[1:])]
    expected = torch.cat([part.dequantize() for part in apart])
    assert (together != expected).float().mean() < 0.01  # sums in another order


def test_nothing_is_modified(problem) -> None:
    w, _, h = problem
    g = gradients_of(len(w))
    before = w.clone(), h.clone(), g.clone()
    prepared = prepare("gptq", whole(problem, NVFP4, descent=1))
    assert prepared.weighed is not None
    prepared.weighed(w, [g])
    assert all(torch.equal(a, b) for a, b in zip((w, h, g), before, strict=True))


def test_gradients_that_are_not_finite_are_refused(problem) -> None:
    w = problem[0]
    prepared = prepare("gptq", whole(problem, NVFP4))
    assert prepared.weighed is not None
    with pytest.raises(ValueError, match="gradients of its outputs are not finite"):
        prepared.weighed(w, [torch.full((48, 48), torch.nan)])


def test_rounding_to_nearest_weighs_nothing(problem) -> None:
    assert prepare("rtn", whole(problem, NVFP4)).weighed is None


@pytest.mark.parametrize(("rows", "sizes"), [(5, [5]), (2048, [2048]), (4100, [1367, 1367, 1366])])
def test_rows_are_split_evenly(rows: int, sizes: list[int]) -> None:
    assert [part.stop - part.start for part in parts(rows)] == sizes


def test_fewer_rows_go_together_where_more_is_to_be_gained() -> None:
    sizes = [part.stop - part.start for part in growing(2048)]
    assert sizes == sorted(sizes) and sizes[0] == module.TOGETHER and len(sizes) < 16
    assert growing(10)[0] == slice(0, 16)
