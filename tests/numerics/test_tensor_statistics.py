"""Statistics of tensors: literal values and invariances."""

import math

import pytest
import torch

from ptq.numerics.tensor_statistics import BINS, channels, crest, crest_factors, excess_kurtosis


def test_crest_factors_of_known_blocks() -> None:
    flat, single = torch.ones(1, 16), torch.zeros(1, 16)
    single[0, 3] = -5.0
    x = torch.cat([flat, single, torch.zeros(1, 16)])  # zeros have none
    assert crest_factors(x, 16).tolist() == [1.0, 4.0]
    found = crest(x, 16)
    assert (found.minimum, found.maximum, found.mean) == (1.0, 4.0, 2.5)
    assert found.histogram[0] == found.histogram[BINS - 1] == 1 and sum(found.histogram) == 2


def test_crest_factors_of_gaussian_blocks_and_their_quartiles() -> None:
    found = crest(torch.randn(4000, 64), 32)
    assert found.mean == pytest.approx(2.365, abs=0.02)
    assert found.median == pytest.approx(2.321, abs=0.02)
    assert found.first_quartile < found.median < found.third_quartile < math.sqrt(32)


def test_zeros_alone_have_no_crest_factor() -> None:
    with pytest.raises(ValueError, match="all numbers are zero"):
        crest(torch.zeros(2, 32), 32)


def test_excess_kurtosis() -> None:
    signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert excess_kurtosis(signs) == -2
    assert excess_kurtosis(torch.randn(200_000)) == pytest.approx(0, abs=0.05)
    # an offset by column is centred away along rows only
    shifted = signs + torch.tensor([0.0, 100.0])
    assert excess_kurtosis(shifted, 0) == pytest.approx(-2)
    assert excess_kurtosis(torch.ones(3, 4), 1) == 0


def test_outlier_channels() -> None:
    x = torch.ones(10, 200)
    x[:, 7], x[:, 9] = 10.0, 30.0
    found = channels(x)
    assert (found.outliers, found.loudest, found.over_median) == (2, (9, 7), 30.0)
    assert found.top_share == pytest.approx((900 + 100) / (900 + 100 + 198))
    assert channels(torch.ones(3, 8)).outliers == 0
    assert channels(torch.zeros(3, 8)).top_share == 0
