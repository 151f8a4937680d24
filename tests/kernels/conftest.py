"""Random quantized tensors for the tests of kernels: codes and scale bytes, not rounded numbers."""

from collections.abc import Callable

import pytest
import torch

from ptq.numerics.formats import FORMATS, Format
from ptq.numerics.tensor import QuantizedTensor, Scales, pack

PACKED = ("mxfp4", "nvfp4", "nvint4", "mxint4")


@pytest.fixture(params=PACKED)
def fmt(request: pytest.FixtureRequest) -> Format:
    """Every format whose codes are packed two to a byte."""
    return FORMATS[request.param]


@pytest.fixture
def scale_kind() -> Callable[[Format], str]:
    """The name that kernels have for the scale type of a format."""
    return lambda fmt: "e4m3" if fmt.has_global_scale else "e8m0"


@pytest.fixture
def random_weight() -> Callable[..., tuple[QuantizedTensor, torch.Tensor]]:
    """``make(fmt, rows, columns, t)``: all 16 codes, every byte that a scale may be, and the packed
    codes."""

    def make(
        fmt: Format, rows: int, columns: int, t: float = 0.37
    ) -> tuple[QuantizedTensor, torch.Tensor]:
        codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
        low, high = (
            (0, 0x7F) if fmt.has_global_scale else (115, 137)
        )  # E4M3: subnormals to 448; E8M0: 2^-12 … 2^9
        bits = torch.randint(low, high, (rows, columns // fmt.group_size), dtype=torch.uint8)
        scale = torch.tensor(t if fmt.has_global_scale else 1.0)
        return QuantizedTensor(codes, Scales(bits, scale, fmt)), pack(codes, fmt)

    return make
