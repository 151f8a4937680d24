"""Laws of nested codes: what is dropped, what is kept, and what the wide width may cost."""

import pytest
import torch
from torch import Tensor

from ptq.numerics.algorithms import ALGORITHMS, Problem, prepare
from ptq.numerics.errors import output_error
from ptq.numerics.formats import FORMATS, MXINT4, MXINT6, MXINT8, Format
from ptq.numerics.nested import drop, interval, narrower, widen, widths
from ptq.numerics.rtn import rtn
from ptq.numerics.scales import Grid
from ptq.numerics.tensor import QuantizedTensor, Scales

ONE = torch.ones(())
pairs = pytest.mark.parametrize(
    ("wide", "narrow"),
    [(MXINT8, MXINT4), (MXINT8, MXINT6), (MXINT6, MXINT4)],
    ids=lambda f: f.name,
)


def every_code(fmt: Format) -> QuantizedTensor:
    """All integers from -max to max, in rows of two groups, with the same scale."""
    largest = int(fmt.element.max)
    values = torch.arange(-largest, largest + 1, dtype=torch.float32)
    values = torch.cat([values, torch.zeros(-len(values) % 64)]).view(-1, 64)
    bits = torch.full((len(values), 2), 120, dtype=torch.uint8)
    return QuantizedTensor(fmt.element.encode(values), Scales(bits, ONE, fmt))


def test_integers_with_power_of_two_scales_nest_and_nothing_else_does() -> None:
    assert {name: found for name, fmt in FORMATS.items() if (found := widths(fmt))} == {
        "mxint6": [4],
        "mxint8": [4, 6],
    }
    assert narrower(MXINT8, 4) is MXINT4
    with pytest.raises(ValueError, match="of 5 bits within it: choose from 4, 6"):
        narrower(MXINT8, 5)
    with pytest.raises(ValueError, match="mxfp8 holds no format of 4 bits within it: integers"):
        narrower(FORMATS["mxfp8"], 4)


@pairs
def test_what_is_left_is_the_nearest_narrow_number_to_the_wide_one(
    wide: Format, narrow: Format
) -> None:
    """In float64: a code that is dropped to is at most half a narrow step away, the even one where
    two are as near, but beyond the largest."""
    codes = every_code(wide)
    left = drop(codes, narrow.element.bits)
    assert left.format is narrow
    shift = wide.element.bits - narrow.element.bits
    step = codes.scales.step().double()
    assert torch.equal(left.scales.step().double(), step * 2**shift)
    u = wide.element.decode(codes.codes).double()
    q = narrow.element.decode(left.codes).double()
    gap = (u / 2**shift - q).abs()
    inside = u.abs() <= narrow.element.max * 2**shift
    assert bool((gap[inside] <= 0.5).all())
    assert bool((q[inside & (gap == 0.5)] % 2 == 0).all())
    assert bool((q[~inside].abs() == narrow.element.max).all())


@pairs
def test_an_interval_is_all_that_is_dropped_to_its_code(wide: Format, narrow: Format) -> None:
    codes = every_code(wide)
    u = wide.element.decode(codes.codes)
    q = narrow.element.decode(drop(codes, narrow.element.bits).codes)
    low, high = interval(q, wide, narrow)
    assert bool(((low <= u) & (u <= high)).all())
    for value in q.unique():
        of_it = u[q == value]
        bounds = interval(value, wide, narrow)
        assert (of_it.min(), of_it.max()) == bounds


@pairs
@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("descent", [0, 3])
def test_narrow_codes_are_those_of_the_algorithm_alone(
    wide: Format, narrow: Format, name: str, descent: int, problem: tuple[Tensor, ...]
) -> None:
    w, _, h = problem
    alone = prepare(name, Problem(hessian=h, grid=Grid(narrow, ONE, "mse"), descent=descent))
    nested = prepare(
        name,
        Problem(
            hessian=h, grid=Grid(wide, ONE, "mse"), descent=descent, nested=narrow.element.bits
        ),
    )
    assert nested.name == alone.name
    one, both = alone.solve(w), nested.solve(w)
    left = drop(both, narrow.element.bits)
    assert both.format is wide and torch.equal(left.codes, one.codes)
    assert torch.equal(left.scales.bits, one.scales.bits)
    errors = [float(output_error(w.double(), q.dequantize().double(), h)) for q in (one, both)]
    # free codes would gain a factor of 4 for every bit; these are bound to narrow ones
    assert errors[1] < errors[0] / 3


def test_descent_lowers_the_error_of_the_wide_codes(problem: tuple[Tensor, ...]) -> None:
    w, _, h = problem
    narrow = rtn(w, None, Grid(MXINT4, ONE, "mse"))
    errors = []
    for sweeps in (0, 4):
        wide = widen(w, narrow, MXINT8, damped_hessian=h.float(), sweeps=sweeps)
        assert torch.equal(drop(wide, 4).codes, narrow.codes)
        errors.append(float(output_error(w.double(), wide.dequantize().double(), h)))
    assert errors[1] < 0.9 * errors[0]


def test_without_clipping_the_wide_codes_are_nearly_those_of_the_format_alone(
    problem: tuple[Tensor, ...],
) -> None:
    """With scales that clip nothing a wide code misses the nearest by the odd tie at most."""
    w = problem[0]
    narrow = rtn(w, None, Grid(MXINT4, ONE, "ceil"))
    wide = widen(w, narrow, MXINT8)
    error = (w.double() - wide.dequantize().double()).abs()
    step = wide.scales.step().double().repeat_interleave(32, dim=1)
    assert bool((error <= step).all()) and (error > step / 2).float().mean() < 0.07


def test_groups_of_zeros_and_the_smallest_numbers_keep_legal_scales() -> None:
    w = torch.zeros(2, 64)
    w[0, :32] = 3e-38
    w[1, :32] = torch.linspace(-1, 1, 32)
    narrow = rtn(w, None, Grid(MXINT4, ONE, "mse"))
    assert int(narrow.scales.bits.min()) < 5
    wide = widen(w, narrow, MXINT8)
    assert int(wide.scales.bits.min()) == 1
    left = drop(wide, 4)
    assert torch.equal(left.codes[1, :32], narrow.codes[1, :32])
    assert not left.codes[:, 32:].any()
    assert float((left.dequantize() - w)[0].abs().max()) <= 2.0**-122


def test_scales_that_the_narrow_format_does_not_have_are_refused() -> None:
    codes = every_code(MXINT8)
    codes.scales.bits.fill_(251)
    with pytest.raises(ValueError, match="mxint4 has none 16 times as large"):
        drop(codes, 4)
