"""The extremes of a tensor tell whether all of it are numbers."""

import math

import pytest
import torch

from ptq.model.extremes import LARGEST, extremes

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def test_extremes_of_numbers():
    assert extremes(torch.tensor([3.0, -2.0])) == (-2.0, 3.0)
    assert extremes(torch.tensor(5.0)) == (5.0, 5.0)
    assert extremes(torch.empty(0, 3)) == (0.0, 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes_are_nan_wherever_that_lies(dtype: torch.dtype):
    for place in range(70):  # vectorized from some size on
        tensor = torch.zeros(70, dtype=dtype)
        tensor[place] = math.nan
        assert all(math.isnan(x) for x in extremes(tensor))
        tensor[place] = -math.inf
        assert extremes(tensor) == (-math.inf, 0.0)


def test_a_number_with_the_highest_bit_of_its_exponent_flipped_is_beyond_the_largest():
    ordinary = torch.tensor([1e-4, 0.02, 0.5, 1.0 - 2**-8, 1.5])
    flipped = (ordinary.view(torch.int32) ^ (1 << 30)).view(torch.float32)
    seen = [x.abs() >= LARGEST or not x.isfinite() for x in flipped]
    assert all(seen[:-1]) and not math.isfinite(flipped[-1])  # from 1 on it is NaN or infinity
