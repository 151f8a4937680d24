"""Laws of refitted scales, in float64."""

import pytest
import torch
from torch import Tensor

from ptq.numerics import scale_refit
from ptq.numerics.errors import output_error, quadratic_form
from ptq.numerics.formats import MXFP4, MXINT4, NVFP4, NVINT4, Format
from ptq.numerics.gptq import gptq
from ptq.numerics.rtn import rtn
from ptq.numerics.scale_refit import exact_scales, nearest_bytes, refit_scales, rows_that_gain
from ptq.numerics.scales import Grid
from ptq.numerics.tensor import QuantizedTensor, Scales

deployed = pytest.mark.parametrize("fmt", [MXFP4, NVFP4, NVINT4, MXINT4], ids=lambda f: f.name)
Problem = tuple[Tensor, Tensor, Tensor]


def start(problem: Problem, fmt: Format) -> QuantizedTensor:
    w, _, h = problem
    return gptq(w, h, Grid(fmt, fmt.global_scale(w.abs().amax(), 1.5), "mse"))


def losses(w: Tensor, q: QuantizedTensor, h: Tensor) -> Tensor:
    return quadratic_form(w.double() - q.dequantize().double(), h)


def test_exact_scales_solve_the_normal_equations_of_every_row(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, _, h = problem
    values = NVFP4.element.decode(start(problem, NVFP4).codes)
    values[3, :16] = 0
    monkeypatch.setattr(scale_refit, "PART", 5 * (64 + 256))  # rows in slices
    scales = exact_scales(w, values, h, 16, damping=0.0)
    assert scales.dtype == torch.float64 and float(scales[3, 0]) == 0
    for row in range(len(w)):
        a = torch.block_diag(*values[row].double().view(-1, 16).unbind()).T  # (in, groups)
        live = a.any(0)
        expected = torch.linalg.lstsq(
            torch.linalg.cholesky(h).T @ a[:, live],
            (torch.linalg.cholesky(h).T @ w[row].double()).unsqueeze(1),
        ).solution[:, 0]
        torch.testing.assert_close(scales[row, live], expected, rtol=1e-7, atol=1e-9)
    spread = scales.repeat_interleave(16, 1) * values
    least = quadratic_form(w.double() - spread, h)
    for _ in range(5):
        other = (scales * (1 + 0.01 * torch.randn(scales.shape))).repeat_interleave(16, 1) * values
        assert bool((quadratic_form(w.double() - other, h) >= least).all())


@deployed
def test_the_nearest_byte_is_the_nearest_scale(fmt: Format) -> None:
    scales = Scales(torch.ones(1, 1, dtype=torch.uint8), torch.tensor(0.25), fmt)
    first, last = max(fmt.legal_scales[0], 1), fmt.legal_scales[1]
    legal = torch.arange(first, last + 1, dtype=torch.uint8)
    steps = fmt.decode_scale(legal).double() * 0.25
    wanted = torch.cat([torch.tensor([-1.0, 0.0]).double(), steps, steps * 1.2]).unsqueeze(0)
    found = fmt.decode_scale(nearest_bytes(wanted, scales)).double()[0] * 0.25
    gaps = (wanted[0].unsqueeze(1) - steps).abs().min(1).values
    assert torch.equal((found - wanted[0]).abs(), gaps)


@deployed
def test_no_row_loses_and_most_gain(fmt: Format, problem: Problem) -> None:
    w, _, h = problem
    before = start(problem, fmt)
    after = refit_scales(w, h, before)
    assert torch.equal(after.codes, before.codes)
    a, b = losses(w, before, h), losses(w, after, h)
    assert bool((b <= a).all())
    if fmt.has_global_scale:  # exponents hardly move
        assert (b < a).double().mean() > 0.3 and float(b.sum()) < 0.98 * float(a.sum())
    assert bool((losses(w, refit_scales(w, h, after), h) <= b).all())


def test_storable_scales_come_near_the_exact_ones(problem: Problem) -> None:
    """No storable scale can do better than the real ones; E4M3 loses little to them."""
    w, _, h = problem
    quantized = start(problem, NVFP4)
    values = NVFP4.element.decode(quantized.codes)
    exact = exact_scales(w, values, h, 16, damping=0.0).repeat_interleave(16, 1) * values
    bound = float(quadratic_form(w.double() - exact, h).sum())
    found = float(losses(w, refit_scales(w, h, quantized), h).sum())
    assert bound <= found < 1.15 * bound and found < float(losses(w, quantized, h).sum())


def test_rows_are_taken_where_they_gain(problem: Problem) -> None:
    w, _, h = problem
    grid = Grid(NVFP4, NVFP4.global_scale(w.abs().amax(), 1.5), "mse")
    near, swept = rtn(w, h, grid), gptq(w, h, grid)
    mixed = QuantizedTensor(swept.codes.clone(), swept.scales)
    mixed.codes[::2] = 0  # rows that lose everything
    best, gained = rows_that_gain(w, h, near, mixed)
    assert gained and torch.equal(best.codes[::2], near.codes[::2])
    better = losses(w, swept, h)[1::2] < losses(w, near, h)[1::2]
    assert torch.equal((best.codes[1::2] == swept.codes[1::2]).all(1) | ~better, ~better | better)
    assert not rows_that_gain(w, h, best, best)[1]
    assert float(output_error(w, best.dequantize(), h)) < float(
        output_error(w, near.dequantize(), h)
    )
