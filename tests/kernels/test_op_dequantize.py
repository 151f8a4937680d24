"""Dense copies of packed weights, against ``QuantizedTensor.dequantize``."""

import pytest
import torch

pytest.importorskip("triton")

from ptq.kernels.op_dequantize import dequantize, dequantize_fp8
from ptq.kernels.operands import PackedWeight
from ptq.kernels.operator import INTERPRETED
from ptq.kernels.weight_tiles import tiled
from ptq.numerics.formats import FORMATS, Format
from ptq.numerics.tensor import QuantizedTensor, Scales

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and not INTERPRETED:
    pytest.skip("kernels were imported without TRITON_INTERPRET=1", allow_module_level=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (33, 352), (64, 512)])
def test_it_is_the_oracle_rounded_once(fmt: Format, dtype, rows, columns, random_weight) -> None:
    weight, packed = random_weight(fmt, rows, columns, t=0.0371, device=DEVICE)
    assert torch.equal(dequantize(packed, dtype).cpu(), weight.dequantize().to(dtype))


def test_every_code_with_every_scale_byte(fmt: Format, packed_weight) -> None:
    """All 16 codes under all finite scale bytes, subnormals and the largest included, bit for bit
    in fp32."""
    count = 127 if fmt.has_global_scale else 252  # beyond, 8 · 2^125 overflows fp32
    codes = (torch.arange(fmt.group_size, dtype=torch.uint8) % 16).repeat(count, 1)
    bits = torch.arange(count, dtype=torch.uint8)[:, None]
    weight = QuantizedTensor(codes, Scales(bits, torch.tensor(0.3), fmt))
    dense = dequantize(packed_weight(weight, DEVICE), torch.float32)
    assert torch.equal(dense.cpu(), weight.dequantize())


@pytest.mark.parametrize("name", ["mxfp4", "mxint4"])
def test_the_fp8_copy_of_power_of_two_scales_is_exact(
    name: str, random_weight, packed_weight
) -> None:
    weight, _ = random_weight(FORMATS[name], 40, 256)
    weight.scales.bits.clamp_(min=123)  # 14 binades up to 136
    fp8, rows = dequantize_fp8(packed_weight(weight, DEVICE))
    assert fp8.dtype == torch.float8_e4m3fn
    assert torch.equal(fp8.cpu().float() * rows.cpu(), weight.dequantize())


@pytest.mark.parametrize("name", ["nvfp4", "nvint4"])
def test_the_fp8_copy_of_e4m3_scaled_formats_rounds_once_more(name: str, random_weight) -> None:
    fmt = FORMATS[name]
    weight, packed = random_weight(fmt, 40, 256, t=1.0, device=DEVICE)
    fp8, rows = dequantize_fp8(packed)
    step = fmt.decode_scale(weight.scales.bits) * (1 / rows.cpu())
    values = fmt.element.decode(weight.codes).unflatten(1, (-1, fmt.group_size))
    expected = (values * step[..., None]).flatten(1).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(fp8.cpu().float(), expected.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_in_units_is_that_of_its_rows(fmt: Format, dtype, random_weight) -> None:
    weight, packed = random_weight(fmt, 192, 384, device=DEVICE)
    units = tiled(packed)
    assert torch.equal(dequantize(units, dtype).cpu(), weight.dequantize().to(dtype))
    for part, expected in zip(dequantize_fp8(units), dequantize_fp8(packed), strict=True):
        assert torch.equal(part.float(), expected.float())


def test_a_dtype_without_a_kernel_is_named(random_weight) -> None:
    _, packed = random_weight(FORMATS["nvfp4"], 1, 32)
    with pytest.raises(ValueError, match="dequantize_fp8"):
        dequantize(packed, torch.float8_e4m3fn)


def test_an_element_without_a_kernel_is_named() -> None:
    packed, bits = torch.zeros(1, 16, dtype=torch.uint8), torch.ones(1, 1, dtype=torch.uint8)
    weight = PackedWeight(
        packed=packed, scale_bits=bits, global_scale=torch.ones(()), element="e2m3", scale="e8m0"
    )
    for operator in (dequantize, dequantize_fp8):
        with pytest.raises(ValueError, match=f"{operator.__name__}: there is no kernel for e2m3"):
            operator(weight)
