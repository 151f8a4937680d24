"""Rounding to the nearest grid point."""

import pytest
import torch

from ptq.numerics.errors import quadratic_form
from ptq.numerics.formats import FORMATS, MXFP4, MXINT4, NVFP4, NVINT4, Format
from ptq.numerics.rtn import rtn
from ptq.numerics.scales import Grid

deployed = pytest.mark.parametrize("fmt", [MXFP4, NVFP4, NVINT4, MXINT4], ids=lambda f: f.name)
every = pytest.mark.parametrize("fmt", list(FORMATS.values()), ids=list(FORMATS))


@every
def test_every_weight_goes_to_the_nearest_point_of_its_grid(fmt: Format, problem) -> None:
    """No other code of the element is nearer under the scale that was chosen."""
    w = problem[0][:4]
    result = rtn(w, torch.eye(128), Grid(fmt, fmt.global_scale(w.abs().amax()), "mse"))
    step = result.scales.step().repeat_interleave(fmt.size(128), dim=1)
    written = [v for v in fmt.element.values if abs(v) <= fmt.element.max]
    points = torch.tensor(written) * step.unsqueeze(-1)
    best = (points - w.unsqueeze(-1)).abs().amin(-1)
    assert torch.allclose((result.dequantize() - w).abs(), best, rtol=1e-5, atol=1e-7)


@deployed
def test_importance_moves_scales_to_the_columns_that_matter(fmt: Format, problem) -> None:
    w = problem[0]
    h = torch.diag(torch.where(torch.arange(128) % 16 == 0, 100.0, 0.01))
    grid = Grid(fmt, fmt.global_scale(w.abs().amax()), "mse")
    plain, weighted = rtn(w, h, grid), rtn(w, h, grid, weighted=True)
    losses = [quadratic_form(w - q.dequantize(), h).sum() for q in (plain, weighted)]
    assert losses[1] < losses[0]
    assert torch.equal(rtn(w, torch.eye(128), grid, weighted=True).codes, plain.codes)
