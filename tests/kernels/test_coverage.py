"""Which layers the kernels cover, and why others are refused."""

import pytest
import torch

from ptq.kernels import coverage
from ptq.numerics.formats import FORMATS


def test_formats_have_the_group_sizes_of_numerics() -> None:
    for (element, scale), name in coverage.FORMATS.items():
        fmt = FORMATS[name]
        assert (fmt.element.name, fmt.scale_name) == (element, scale)
        assert fmt.group_size == coverage.GROUP_SIZE[scale] and fmt.packed


def test_obstacles_are_named() -> None:
    fine = ("e2m1", "e4m3", 16, 4096)
    assert coverage.obstacle(*fine, rotation=128) is None
    assert "no kernel for int8" in str(coverage.obstacle("int8", "e8m0", 32, 4096))
    assert "rotation of 256" in str(coverage.obstacle(*fine, rotation=256))
    assert "groups of 16" in str(coverage.obstacle("e2m1", "e4m3", 16, 40))
    assert "float32" in str(coverage.obstacle(*fine, dtype=torch.float32))
    assert "bfloat16" in str(coverage.obstacle("e2m1", "e8m0", 32, 64, dtype=torch.float16))
    high = torch.tensor([[130, 137]], dtype=torch.uint8)
    assert "136" in str(coverage.obstacle("e2m1", "e8m0", 32, 64, scale_bits=high))
    assert coverage.obstacle("e2m1", "e8m0", 32, 64, scale_bits=high.clamp(max=136)) is None


def test_operators_raise_the_obstacle_in_their_name() -> None:
    coverage.require("it", "e2m1", "e4m3", 64)
    with pytest.raises(ValueError, match=r"^it: a rotation of 64 is not one of"):
        coverage.require("it", "e2m1", "e4m3", 32, rotation=64)
    with pytest.raises(ValueError, match=r"^it: there is no kernel for e2m1 elements with fp32"):
        coverage.require("it", "e2m1", "fp32", 32)
