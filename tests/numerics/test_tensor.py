"""Packing and the law value = element[code] * scale * global scale."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptq.numerics.formats import FORMATS, MXFP4, MXFP8, NVFP4, NVINT4, Format
from ptq.numerics.tensor import (
    QuantizedTensor,
    Scales,
    Unpacker,
    dequantize_packed,
    pack,
    unpack,
)


def some_scales(fmt: Format, rows: int, groups: int) -> torch.Tensor:
    """Legal bits from all over their range."""
    (first, last), generator = fmt.legal_scales, torch.Generator().manual_seed(2)
    shape = (rows, groups)
    return torch.randint(first, last + 1, shape, generator=generator, dtype=fmt.bits_dtype)


def test_golden_bytes() -> None:
    """F22, F4: the even column in the low nibble; zeros are +0."""
    row = torch.tensor([[0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]])
    assert pack(NVFP4.element.encode(row), NVFP4).tolist() == [
        [0x10, 0x32, 0x54, 0x76, 0x90, 0xBA, 0xDC, 0xFE]
    ]
    integers = torch.tensor([[0.0, 1, -1, 7, -7, 3, -3, 2]])
    assert pack(NVINT4.element.encode(integers), NVINT4).tolist() == [[0x10, 0x7F, 0x39, 0x2D]]


@given(st.integers(1, 5), st.integers(1, 20), st.integers(0, 10**6))
def test_unpack_inverts_pack(rows: int, pairs: int, seed: int) -> None:
    codes = torch.randint(
        0, 16, (rows, 2 * pairs), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    packed = pack(codes, MXFP4)
    assert packed.shape == (rows, pairs)
    assert torch.equal(unpack(packed, MXFP4), codes)


def test_eight_bit_codes_take_a_byte_each() -> None:
    codes = torch.randint(0, 256, (3, 8), dtype=torch.uint8)
    assert torch.equal(pack(codes, MXFP8), codes)
    assert torch.equal(unpack(codes, MXFP8), codes)


@pytest.mark.parametrize("fmt", list(FORMATS.values()), ids=list(FORMATS))
def test_dequantize_is_the_product_of_value_scale_and_global_scale(fmt) -> None:
    size = fmt.size(128)
    groups = 2 if fmt.group_size else 1
    codes = torch.arange(groups * size, dtype=torch.uint8).reshape(1, -1) % 8
    bits = some_scales(fmt, 1, groups)
    t = torch.tensor(0.3)
    expected = torch.stack(
        [
            torch.tensor(fmt.element.values)[codes[0, j].int()]
            * (fmt.decode_scale(bits)[0, j // size] * t)
            for j in range(groups * size)
        ]
    )
    quantized = QuantizedTensor(codes, Scales(bits, t, fmt))
    assert torch.equal(quantized.dequantize()[0], expected)


def test_rows_are_rows() -> None:
    codes, bits = (
        torch.randint(0, 16, (6, 32), dtype=torch.uint8),
        torch.randint(1, 120, (6, 2), dtype=torch.uint8),
    )
    for t in (torch.tensor(0.5), torch.rand(6, 1)):
        quantized = QuantizedTensor(codes, Scales(bits, t, NVFP4))
        assert torch.equal(quantized.rows(2, 5).dequantize(), quantized.dequantize()[2:5])


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_packed_weights_are_dequantized_to_the_same_bits(fmt, rows):
    generator = torch.Generator().manual_seed(rows)
    groups = 3 if fmt.group_size else 1
    width = groups * fmt.size(128) // (2 if fmt.packed else 1)
    packed = torch.randint(0, 256, (rows, width), generator=generator, dtype=torch.uint8)
    if not fmt.packed:
        packed &= (1 << fmt.element.bits) - 1
    scales = Scales(some_scales(fmt, rows, groups), torch.tensor(0.3), fmt)
    expected = QuantizedTensor(unpack(packed, fmt), scales).dequantize()
    found = dequantize_packed(packed, scales)
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
def test_an_unpacker_gives_the_same_bits_chunk_by_chunk(fmt):
    generator, unpacker = torch.Generator().manual_seed(1), Unpacker(fmt, torch.device("cpu"))
    for rows, groups, at_a_time in ((7, 3, 3), (5, 2, 5), (7, 3, 3), (40, 3, 16), (2, 1, 1)):
        groups = groups if fmt.group_size else 1
        width = groups * fmt.size(128) // (2 if fmt.packed else 1)
        packed = torch.randint(0, 256, (rows, width), generator=generator, dtype=torch.uint8)
        if not fmt.packed:
            packed &= (1 << fmt.element.bits) - 1
        scales = Scales(some_scales(fmt, rows, groups), torch.tensor(0.3), fmt)
        expected = dequantize_packed(packed, scales).split(at_a_time)
        for part, chunk in zip(expected, unpacker.chunks(packed, scales, at_a_time), strict=True):
            assert torch.equal(chunk.view(torch.int32), part.view(torch.int32))
