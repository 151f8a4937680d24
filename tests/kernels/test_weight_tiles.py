"""Weights in units: nothing but bytes and bits moves."""

from dataclasses import replace

import pytest
import torch

from ptq.kernels.operands import PackedWeight
from ptq.kernels.weight_tiles import tileable, tiled, untiled
from ptq.numerics.formats import Format


def test_the_rows_come_back(fmt: Format, random_weight) -> None:
    _, weight = random_weight(fmt, 192, 384)
    units = tiled(weight)
    groups = 128 // fmt.group_size
    assert units.packed.shape == (3, 3, 64, 64) and units.scale_bits.shape == (3, 3, 64, groups)
    assert units.packed.dtype == units.scale_bits.dtype == torch.uint8
    assert (units.out_features, units.in_features, units.experts) == (192, 384, 0)
    assert units.tiled and not units.blocked and not weight.tiled
    units.check("w4a16_matmul", 384)
    back = untiled(units)
    assert torch.equal(back.packed, weight.packed)
    assert torch.equal(back.scale_bits, weight.scale_bits)


def test_experts_are_tiled_one_by_one(fmt: Format, random_weight, stacked) -> None:
    weights = [random_weight(fmt, 64, 256)[1] for _ in range(3)]
    units = tiled(stacked(weights))
    assert (units.out_features, units.in_features, units.experts) == (64, 256, 3)
    assert not units.blocked
    for expert, weight in enumerate(weights):
        assert torch.equal(units.packed[expert], tiled(weight).packed)
        assert torch.equal(units.scale_bits[expert], tiled(weight).scale_bits)
    assert torch.equal(untiled(units).packed, stacked(weights).packed)


@pytest.mark.parametrize("element", ["e2m1", "int4"])
def test_where_the_bits_of_a_code_are(element: str) -> None:
    """Read as the docstring of the module says, word by word: column c holds code 15 − c."""
    codes = [15, 14, 13, 12, 11, 10, 9, 8]
    word = sum(code << (4 * column) for column, code in enumerate(codes))
    packed = torch.tensor([word]).to(torch.int32).view(torch.uint8)
    packed = packed.repeat(64, 16)  # 64 rows, 128 columns
    scale = torch.zeros(64, 8, dtype=torch.uint8)
    one = torch.ones(())
    weight = PackedWeight(
        packed=packed, scale_bits=scale, global_scale=one, element=element, scale="e4m3"
    )
    found = int(tiled(weight).packed.view(torch.int32).flatten()[0]) & 0xFFFFFFFF
    for column, code in enumerate(codes):
        pair, half = divmod(column, 2)
        bits = found >> (16 * half)
        if element == "int4":
            assert (bits >> (4 * pair)) & 15 == code ^ 8
        else:
            assert (bits >> (15, 12, 14, 13)[pair]) & 1 == code >> 3
            assert (bits >> (6, 3, 0, 9)[pair]) & 7 == code & 7


@pytest.mark.parametrize(("rows", "columns"), [(96, 128), (64, 192)])
def test_other_sizes_stay_in_rows(fmt: Format, rows, columns, random_weight) -> None:
    _, weight = random_weight(fmt, rows, columns)
    assert not tileable(weight)
    message = f"{rows} × {columns} does not consist of units of 64 × 128"
    with pytest.raises(ValueError, match=message):
        tiled(weight)


def test_units_that_do_not_fit_their_scales_are_refused(fmt: Format, random_weight) -> None:
    _, weight = random_weight(fmt, 64, 128)
    units = tiled(weight)
    with pytest.raises(ValueError, match="do not fit 128 inputs"):
        replace(units, scale_bits=weight.scale_bits).check("w4a16_matmul", 128)
