"""Random quantized tensors for the tests of kernels: codes and scale bytes, not rounded numbers."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from ptq.kernels.operands import PackedWeight
from ptq.numerics.formats import FORMATS, Format
from ptq.numerics.tensor import QuantizedTensor, Scales, pack

PACKED = ("mxfp4", "nvfp4", "nvint4", "mxint4")


@pytest.fixture(params=PACKED)
def fmt(request: pytest.FixtureRequest) -> Format:
    """Every format whose codes are packed two to a byte."""
    return FORMATS[request.param]


@pytest.fixture
def random_weight() -> Callable[..., tuple[QuantizedTensor, PackedWeight]]:
    """``make(fmt, rows, columns, t, device)``: all 16 codes, every byte that a scale may be; on the
    CPU, and as kernels take it on ``device``."""

    def make(
        fmt: Format, rows: int, columns: int, t: float = 0.37, device: str = "cpu"
    ) -> tuple[QuantizedTensor, PackedWeight]:
        codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
        # E4M3: subnormals to 448; E8M0: 2^-12 … 2^9
        low, high = (0, 0x7F) if fmt.has_global_scale else (115, 137)
        bits = torch.randint(low, high, (rows, columns // fmt.group_size), dtype=torch.uint8)
        scale = torch.tensor(t if fmt.has_global_scale else 1.0)
        weight = QuantizedTensor(codes, Scales(bits, scale, fmt))
        return weight, packed_weight(weight, device)

    return make


def packed_weight(weight: QuantizedTensor, device: str = "cpu") -> PackedWeight:
    """The weight as kernels take it; on the CPU its scale bytes are the same memory."""
    scales, fmt = weight.scales, weight.format
    return PackedWeight(
        packed=pack(weight.codes, fmt).to(device),
        scale_bits=scales.bits.to(device),
        global_scale=scales.global_scale.to(device),
        element=fmt.element.name,
        scale=fmt.scale_name,
    )


@pytest.fixture(name="packed_weight")
def _packed_weight() -> Callable[..., PackedWeight]:
    return packed_weight


@pytest.fixture
def stacked() -> Callable[[Sequence[PackedWeight]], PackedWeight]:
    """``stacked(weights)``: those of several experts in one."""

    def stack(weights: Sequence[PackedWeight]) -> PackedWeight:
        return replace(
            weights[0],
            packed=torch.stack([weight.packed for weight in weights]),
            scale_bits=torch.stack([weight.scale_bits for weight in weights]),
            global_scale=torch.stack([weight.global_scale for weight in weights]),
        )

    return stack
