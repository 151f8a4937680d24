"""Gates of formats: the parts by hand, the counts that the study's shape of a unit gives, and what
its own figures say beside them."""

import pytest

from ptq.numerics.formats import (
    E2M1,
    E2M3,
    E4M3,
    FORMATS,
    INT4,
    INT6,
    INT8,
    MXFP8,
    MXINT8,
    NVFP4,
    NVINT4,
)
from ptq.numerics.hardware_cost import (
    PUBLISHED,
    TENSOR_CORES,
    aligner_bits,
    gates,
    mac,
    relative_area,
    relative_traffic,
    scales,
    shape,
    sum_bits,
)
from ptq.numerics.int_vs_fp import PAIRS


def test_elements_by_exponent_and_mantissa() -> None:
    assert [shape(e) for e in (E4M3, E2M3, E2M1)] == [(4, 3), (2, 3), (2, 1)]
    assert [shape(e) for e in (INT8, INT6, INT4)] == [(0, 7), (0, 5), (0, 3)]
    assert [aligner_bits(e) for e in (E4M3, E2M3, E2M1)] == [24, 14, 10]


def test_a_lane_by_hand() -> None:
    assert mac(INT4, 16) == {"multiplier": pytest.approx(16 * 19 / 3), "adder": 8 * 5}
    parts = mac(E2M1, 16)
    assert parts["multiplier"] == pytest.approx(4 * 19 / 3)
    assert parts["adder"] == 10 * 5 and parts["exponent adder"] == 2 * 5
    assert parts["aligner"] == pytest.approx(10 * 3.321928 * 2)
    assert parts["normaliser"] == pytest.approx(10 * 3.321928 * (2 + 4 / 3) / 16)


def test_multiply_accumulate_alone_is_what_was_counted_before() -> None:
    """519, 485, 182 and 141 NAND2 equivalents: 0.93 and 0.78 for INT over FP."""
    counts = [int(sum(mac(f.element, f.group_size).values())) for f in (MXFP8, MXINT8)]
    counts += [int(sum(mac(f.element, f.group_size).values())) for f in (NVFP4, NVINT4)]
    assert counts == [519, 485, 182, 141]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0].name)
def test_integers_take_less_of_every_width(pair) -> None:
    assert gates(pair[0]) < gates(pair[1])


def test_scales_of_e4m3_cost_a_multiplication() -> None:
    assert scales(MXFP8) == 80
    assert (sum_bits(NVINT4), sum_bits(NVFP4), sum_bits(MXFP8)) == (12, 14, 24)
    assert scales(NVFP4) == pytest.approx((16 + 8 * 14) * 19 / 3 + 40)


def test_published_figures_have_our_order_and_direction() -> None:
    by_us = sorted(PUBLISHED, key=lambda name: gates(FORMATS[name]))
    assert by_us == sorted(PUBLISHED, key=lambda name: PUBLISHED[name].area)
    assert relative_area(MXFP8) == PUBLISHED["mxfp8"].area == PUBLISHED["mxfp8"].energy == 1
    assert relative_area(NVFP4, NVFP4) == 1


def test_ratios_of_throughput() -> None:
    assert relative_traffic(NVFP4) == 4.5 / 16
    assert TENSOR_CORES.keys() == {n for n, f in FORMATS.items() if f.element.mantissa_bits}
