"""Keys and values in E4M3: against float64, at the ends of the range, and once only."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptq.numerics.key_values import FP8, LARGEST, key_value_scale, round_key_values


def e4m3() -> torch.Tensor:
    """All finite numbers of E4M3, ascending, in float64."""
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).double()
    return codes[codes.isfinite()].unique()


@given(st.floats(1e-20, 1e20), st.integers(0, 2**31))
def test_the_nearest_number_of_the_grid_is_read(amax: float, seed: int) -> None:
    scale = key_value_scale(torch.tensor(amax))
    x = torch.randn(64, generator=torch.Generator().manual_seed(seed)) * amax / 3
    x = x.clamp(-amax, amax)
    read = round_key_values(x, scale)
    grid = e4m3() * scale.double()
    best = (x.double()[:, None] - grid).abs().min(1).values
    # the quotient is rounded to float32 before it is rounded to E4M3
    assert torch.all((x.double() - read.double()).abs() <= best + 2e-7 * x.double().abs() + 1e-30)


def test_the_largest_seen_is_exact_and_more_saturates() -> None:
    scale = key_value_scale(torch.tensor(7.0))
    x = torch.tensor([7.0, -7.0, 9.0, -1e30, 0.0])
    expected = torch.tensor([7.0, -7.0, 7.0, -7.0, 0.0])
    assert torch.allclose(round_key_values(x, scale), expected, rtol=1e-6)
    assert LARGEST == 448


def test_rounding_what_was_rounded_changes_nothing() -> None:
    x = torch.randn(4, 2, 8, 16, generator=torch.Generator().manual_seed(0))
    scale = key_value_scale(x.abs().amax())
    for dtype in (torch.float32, torch.float64):
        once = round_key_values(x.to(dtype), scale)
        assert once.dtype == dtype
        assert torch.equal(round_key_values(once, scale), once)


def test_nothing_seen_is_scale_one_and_nonsense_is_refused() -> None:
    assert key_value_scale(torch.zeros(())).tolist() == [1.0]
    for amax in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match="no scale can be made"):
            key_value_scale(torch.tensor(amax))
    assert round_key_values(torch.tensor([math.nan]), torch.ones(1)).isnan().all()
