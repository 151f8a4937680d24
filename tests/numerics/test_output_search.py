"""Laws of scales that are searched by the error of the output."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ptq.numerics.errors import quadratic_form
from ptq.numerics.formats import MXFP4, MXINT4, NVFP4, NVINT4, Format
from ptq.numerics.output_search import search_by_output
from ptq.numerics.rtn import rtn
from ptq.numerics.scales import Grid, round_to

deployed = pytest.mark.parametrize("fmt", [MXFP4, NVFP4, NVINT4, MXINT4], ids=lambda f: f.name)
Problem = tuple[Tensor, Tensor, Tensor]


def grid(w: Tensor, fmt: Format, rule: str = "mse") -> Grid:
    return Grid(fmt, fmt.global_scale(w.abs().amax(), 1.0), rule)


def losses(w: Tensor, q, h: Tensor) -> Tensor:
    return quadratic_form(w.double() - q.dequantize().double(), h)


@deployed
@pytest.mark.parametrize("rule", ["absmax", "mse"])
def test_no_row_is_worse_than_before_and_more_sweeps_lose_nothing(
    fmt: Format, rule: str, problem: Problem
) -> None:
    w, _, h = problem
    found = [losses(w, rtn(w, h, grid(w, fmt, rule)), h)]
    found += [losses(w, search_by_output(w, h, grid(w, fmt, rule), sweeps=n), h) for n in (1, 2, 6)]
    for before, after in pairwise(found):
        assert bool((after <= before * (1 + 1e-9)).all())
    assert float(found[2].sum()) < 0.98 * float(found[0].sum())


@deployed
def test_codes_are_the_nearest_to_the_scales_that_were_found(fmt: Format, problem: Problem) -> None:
    w, _, h = problem
    found = search_by_output(w, h, grid(w, fmt))
    assert torch.equal(found.codes, round_to(w, found.scales).codes)


def test_it_ends_where_no_single_scale_gains(problem: Problem) -> None:
    """Against trying every scale of some groups, in float64."""
    w, _, h = problem
    found = search_by_output(w, h, grid(w, NVFP4), sweeps=50)
    least = losses(w, found, h)
    for g in (0, 5):
        for step in (-2, -1, 1, 2):
            bits = found.scales.bits.clone()
            bits[:, g] = (bits[:, g].int() + step).clamp(1, 0x7E).to(torch.uint8)
            other = round_to(w, type(found.scales)(bits, found.scales.global_scale, NVFP4))
            assert bool((losses(w, other, h) >= least * (1 - 1e-9)).all())


def test_white_inputs_ask_for_least_squared_error(problem: Problem) -> None:
    w = problem[0]
    found = search_by_output(w, torch.eye(128), grid(w, MXFP4, "absmax"))
    assert torch.equal(found.codes, rtn(w, None, grid(w, MXFP4, "mse")).codes)
