"""Laws of coordinate descent on codes."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ptq.numerics.descent import coordinate_descent
from ptq.numerics.errors import output_error, quadratic_form
from ptq.numerics.factor import damped
from ptq.numerics.formats import MXFP4, MXINT4, NVFP4, NVINT4, Format
from ptq.numerics.gptq import gptq
from ptq.numerics.rtn import rtn
from ptq.numerics.scales import Grid

deployed = pytest.mark.parametrize("fmt", [MXFP4, NVFP4, NVINT4, MXINT4], ids=lambda f: f.name)


def grid(w: Tensor, fmt: Format, rule: str = "mse", margin: float = 1.0) -> Grid:
    return Grid(fmt, fmt.global_scale(w.abs().amax(), margin), rule)


def loss(w: Tensor, quantized, h: Tensor) -> float:
    return float(output_error(w, quantized.dequantize(), h))


@deployed
def test_coordinate_descent_never_raises_the_damped_loss(fmt: Format, problem) -> None:
    w, _, h = problem
    for start in (rtn(w, h, grid(w, fmt)), gptq(w, h, grid(w, fmt), order="act")):
        losses = [
            quadratic_form(w - q.dequantize(), damped(h, 0.01))
            for q in (
                start,
                *(coordinate_descent(w, h, start, sweeps=n, block_size=32) for n in (1, 2, 8)),
            )
        ]
        for before, after in pairwise(losses):
            assert (after <= before * (1 + 1e-5)).all()
        assert losses[-1].sum() < losses[0].sum()
        refined = coordinate_descent(w, h, start, sweeps=50)
        assert torch.equal(refined.scales.bits, start.scales.bits)
        assert torch.equal(
            coordinate_descent(w, h, refined, sweeps=1).codes, refined.codes
        )  # a fixed point


def test_block_size_of_the_descent_does_not_matter(problem) -> None:
    w, _, h = problem
    start = rtn(w, h, grid(w, NVFP4))
    one, other = (coordinate_descent(w, h, start, sweeps=2, block_size=size) for size in (16, 128))
    assert (one.codes != other.codes).any(1).float().mean() < 0.1


def test_codes_stay_within_their_bounds_and_take_the_best_that_is_there(problem) -> None:
    w, _, h = problem
    start = rtn(w, h, grid(w, MXINT4))
    values = MXINT4.element.decode(start.codes)
    one = (values - 1).clamp(-7, 7), (values + 1).clamp(-7, 7)
    bounded = coordinate_descent(w, h, start, sweeps=8, within=one)
    moved = MXINT4.element.decode(bounded.codes) - values
    assert bool((moved.abs() <= 1).all()) and bool(moved.any())
    fixed = coordinate_descent(w, h, start, sweeps=8, within=(values, values))
    assert torch.equal(fixed.codes, start.codes)
    free = coordinate_descent(w, h, start, sweeps=8)
    assert loss(w, free, h) <= loss(w, bounded, h) < loss(w, start, h)
