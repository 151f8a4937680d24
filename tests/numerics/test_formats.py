"""Elements and scale bytes against an independent implementation and worked vectors."""

import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptq.numerics.formats import (
    E2M1,
    E2M3,
    E4M3,
    FEW_SCALES,
    FORMATS,
    INT4,
    INT4_32,
    INT6,
    INT8,
    MICROSCALED,
    MXFP4,
    NVFP4,
    NVINT4,
    Element,
)

ELEMENTS = [E2M1, E2M3, E4M3, INT4, INT6, INT8]
elements = pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)
formats = pytest.mark.parametrize("fmt", list(FORMATS.values()), ids=list(FORMATS))


@pytest.fixture(scope="module")
def golden() -> dict[str, dict[str, list]]:
    return json.loads((Path(__file__).parents[1] / "golden" / "elements.json").read_text())


@elements
def test_every_value_tie_and_neighbour_of_a_tie_has_the_golden_code(
    element: Element, golden
) -> None:
    """F1, F2, F3, F4: midpoints go to the even code, magnitudes beyond the largest saturate, zero
    is code 0."""
    x = torch.tensor(golden[element.name]["x"], dtype=torch.float32)
    assert element.encode(x).tolist() == golden[element.name]["code"]


@elements
def test_codes_decode_to_the_golden_values(element: Element, golden) -> None:
    decoded = element.decode(torch.arange(len(element.values), dtype=torch.uint8)).tolist()
    expected = [math.nan if v is None else v for v in golden[element.name]["values"]]
    assert len(decoded) == 1 << element.bits
    np.testing.assert_array_equal(decoded, expected)


def test_ties_worked_out_by_hand() -> None:
    """F2, and the same for the other elements."""
    ties = {
        0.25: 0,
        0.75: 1,
        1.25: 1,
        1.75: 2,
        2.5: 2,
        3.5: 4,
        5: 4,
        5.0001: 6,
        1e30: 6,
        -0.25: 0,
        -2.5: -2,
        -5: -4,
        -1e30: -6,
    }
    x = torch.tensor(list(ties), dtype=torch.float32)
    assert E2M1.round(x).tolist() == list(ties.values())
    codes = {
        0.0625: 0,
        0.1875: 2,
        0.9375: 8,
        1.0625: 8,
        1.9375: 0x10,
        2.125: 0x10,
        2.375: 0x12,
        4.75: 0x1A,
        7.25: 0x1E,
        7.75: 0x1F,
    }
    assert E2M3.encode(torch.tensor(list(codes))).tolist() == list(codes.values())
    assert E4M3.encode(
        torch.tensor([2.0**-10, 1.5 * 2**-9, 1.0625, 17.0, 19.0, 432.0, 448.0, 1e9])
    ).tolist() == [
        0,
        2,
        0x38,
        0x58,
        0x5A,
        0x7E,
        0x7E,
        0x7E,
    ]
    assert INT4.round(torch.tensor([0.5, 1.5, 2.5, 6.5, 7.5, -7.5, -8.0])).tolist() == [
        0,
        2,
        2,
        6,
        7,
        -7,
        -7,
    ]


@elements
def test_encode_inverts_decode_on_every_code_that_is_written(element: Element) -> None:
    codes = torch.arange(1 << element.bits, dtype=torch.uint8)
    values = element.decode(codes)
    kept = (values.abs() <= element.max) & ~((values == 0) & (codes != 0))
    assert torch.equal(element.encode(values[kept]), codes[kept])
    assert not torch.isin(element.encode(torch.linspace(-1e3, 1e3, 100_001)), codes[~kept]).any()


@elements
@given(st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=20))
def test_no_other_value_is_nearer(element: Element, x: list[float]) -> None:
    values = torch.tensor([v for v in element.values if abs(v) <= element.max], dtype=torch.float64)
    wide = torch.tensor(x, dtype=torch.float32)
    rounded = element.round(wide).double()
    distance = (wide.double()[:, None] - values).abs().amin(1)
    assert torch.equal((wide.double() - rounded).abs(), distance)
    assert torch.equal(element.decode(element.encode(wide)).double(), rounded)


def test_e4m3_scale_bytes_equal_ml_dtypes_on_every_byte_and_between() -> None:
    finite = np.arange(1, 0x7F, dtype=np.uint8)
    values = finite.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    x = np.concatenate([values, (values[1:] + values[:-1]) / 2, values * np.float32(1.01)])
    expected = np.clip(x, 2.0**-9, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert NVFP4.encode_scale(torch.from_numpy(x)).tolist() == expected.tolist()
    assert NVFP4.decode_scale(torch.from_numpy(finite)).tolist() == values.tolist()


def test_e8m0_scales_decode_as_ml_dtypes_and_encode_upwards() -> None:
    codes = torch.arange(255, dtype=torch.uint8)
    expected = np.arange(255, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert MXFP4.decode_scale(codes).tolist() == expected.tolist()
    assert torch.equal(MXFP4.encode_scale(MXFP4.decode_scale(codes[1:])), codes[1:])
    assert MXFP4.encode_scale(torch.tensor([1.0, 1.0000001, 1.5, 2.0, 0.0, 3e38])).tolist() == [
        127,
        128,
        128,
        128,
        1,
        254,
    ]


@formats
def test_scale_bytes_are_never_zero_or_nan(fmt) -> None:
    """F11, F13, F19."""
    bits = fmt.encode_scale(torch.tensor([0.0, 1e-38, 1e-9, 448.00003, 1e9, 3.4e38]))
    assert bits.min() >= 1
    assert torch.isfinite(fmt.decode_scale(bits)).all()
    assert (fmt.decode_scale(bits) > 0).all()


@formats
def test_legal_scales_are_the_positive_finite_ones_in_order(fmt) -> None:
    first, last = fmt.legal_scales
    numbers = fmt.decode_scale(torch.arange(torch.iinfo(fmt.bits_dtype).max + 1).to(fmt.bits_dtype))
    subnormal = (numbers < 2.0**-126) & (fmt.bits_dtype == torch.int16)
    legal = torch.isfinite(numbers) & (numbers > 0) & ~subnormal
    assert legal.nonzero().flatten().tolist() == list(range(first, last + 1))
    assert (numbers[first : last + 1].diff() > 0).all()


def test_codes_that_are_no_numbers() -> None:
    found = {fmt.name: fmt.element.nan_codes for fmt in FORMATS.values() if fmt.element.nan_codes}
    assert found == dict.fromkeys(("mxfp8", "fp8-channel"), (0x7F, 0xFF))


@formats
@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_a_global_scale_survives_the_disk(fmt, amax: float) -> None:
    """F24: the divisor 1/t is stored, and 1/(1/t) must be t."""
    t = fmt.global_scale(torch.tensor(amax))
    assert torch.equal(1 / (1 / t), t)
    if fmt.power_of_two_global:
        assert math.frexp(float(t))[0] == 0.5
    if fmt.has_global_scale:  # the largest group scale stays storable
        assert amax / float(t) / fmt.element.max <= 448 * (1 + 1e-6)
    else:
        assert float(t) == 1


def test_a_tensor_of_zeros_has_the_global_scale_one() -> None:
    assert all(float(f.global_scale(torch.tensor(0.0))) == 1 for f in FORMATS.values())


def test_nvint4_steps_are_exact_in_bfloat16() -> None:
    t = NVINT4.global_scale(torch.tensor(0.7))
    steps = NVINT4.decode_scale(torch.arange(1, 0x7F, dtype=torch.uint8)) * t
    assert torch.equal(steps.bfloat16().float(), steps)


def test_bits_per_weight() -> None:
    bits = {f.name: f.bits_per_weight for f in FORMATS.values()}
    known = {
        "mxfp4": 4.25,
        "nvfp4": 4.5,
        "nvint4": 4.5,
        "mxint4": 4.25,
        "mxint6": 6.25,
        "mxfp6": 6.25,
        "mxint8": 8.25,
        "mxfp8": 8.25,
        "int4-g128": 4.125,
        "int4-g32": 4.5,
        "fp8-channel": 8.0,
    }
    assert bits == known


def test_bfloat16_scales_are_their_bits() -> None:
    """In the order of the numbers; those that are negative, subnormal, infinite or NaN are none."""
    first, last = INT4_32.legal_scales
    bits = torch.arange(first, last + 1, dtype=torch.int16)
    scales = INT4_32.decode_scale(bits)
    assert torch.equal(scales, bits.view(torch.bfloat16).float())
    assert (scales.diff() > 0).all() and scales.isfinite().all()
    assert scales[0] == 2.0**-126 and scales[-1] == torch.finfo(torch.bfloat16).max
    assert torch.equal(INT4_32.encode_scale(scales), bits)
    assert INT4_32.scale_name == "bf16" and not INT4_32.has_global_scale


@pytest.mark.parametrize(
    ("wanted", "stored"),
    [
        (1 + 2**-8, 1.0),  # a tie goes to the even mantissa
        (1 + 3 * 2**-8, 1 + 2**-6),
        (0.0, 2.0**-126),
        (1e-40, 2.0**-126),
        (3.4e38, torch.finfo(torch.bfloat16).max),
    ],
)
def test_bfloat16_scales_are_rounded_to_nearest(wanted: float, stored: float) -> None:
    scale = torch.tensor([wanted])
    assert float(INT4_32.nearest_scale(scale)) == stored
    assert float(INT4_32.decode_scale(INT4_32.encode_scale(scale))) == stored


def test_formats_that_are_compared_have_scales_of_a_byte() -> None:
    assert {n for n, f in FORMATS.items() if f.bits_dtype == torch.uint8} == MICROSCALED.keys()


def test_mantissas_and_normal_numbers():
    found = {e.name: (e.mantissa_bits, e.smallest_normal) for e in (E2M1, E2M3, E4M3, INT4, INT8)}
    assert found == {
        "e2m1": (1, 1.0),
        "e2m3": (3, 1.0),
        "e4m3": (3, 2.0**-6),
        "int4": (None, None),
        "int8": (None, None),
    }


@pytest.mark.parametrize("element", [f.element for f in FORMATS.values()], ids=FORMATS.keys())
def test_rounding_in_place_is_rounding(element) -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * element.max / 2
    before, expected = x.clone(), element.round(x)
    assert torch.equal(x, before)
    rounded = element.round_(x)
    assert rounded.data_ptr() == x.data_ptr()
    assert torch.equal(rounded.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("count", [64, FEW_SCALES + 1])
def test_the_nearest_scale_is_that_of_its_byte(fmt, count: int) -> None:
    exponents = torch.linspace(-12, 12, count)
    wanted = torch.cat((torch.exp2(exponents), torch.tensor([0.0, 448.0, 464.0, 1e30])))
    assert torch.equal(fmt.nearest_scale(wanted), fmt.decode_scale(fmt.encode_scale(wanted)))
