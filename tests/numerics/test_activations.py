"""The law of quantized activations (K1), checked in float64 and step
by step."""

import pytest
import torch

from ptq.numerics.activations import (
    FEW_NUMBERS,
    best_rule,
    default_rule,
    input_rules,
    quantize_inputs,
    round_inputs,
)
from ptq.numerics.errors import sqnr
from ptq.numerics.formats import FORMATS, MXFP4, MXINT4, NVFP4, NVINT4
from ptq.numerics.rotation import Rotation
from ptq.numerics.scales import Grid, round_to

four_bit = pytest.mark.parametrize("fmt", [MXFP4, MXINT4, NVFP4, NVINT4], ids=lambda f: f.name)


@four_bit
@pytest.mark.parametrize("size", [1, 16, 32])
def test_activations_come_close_to_the_weight_rule(fmt, size: int) -> None:
    """One reciprocal per group instead of a division per element moves codes next to ties only."""
    x, rotation = torch.randn(64, 128), Rotation(size)
    y = rotation.exact(x)
    t = fmt.global_scale(y.abs().amax(), 2.0)
    quantized = quantize_inputs(x, fmt, rotation, t)
    expected = round_to(y, Grid(fmt, t, default_rule(fmt)).scales(y))
    assert torch.equal(quantized.scales.bits, expected.scales.bits)
    assert (quantized.codes != expected.codes).float().mean() < 1e-3
    assert float(sqnr(y, quantized.dequantize())) > 15


@four_bit
def test_codes_follow_the_law_in_exact_arithmetic(fmt) -> None:
    """On small integers every step but the reciprocal is exact, so float64 gives the same codes."""
    x = torch.randint(-8, 9, (50, 64)).float()
    t = torch.tensor(2.0**-9) if fmt.has_global_scale else torch.ones(())
    quantized = quantize_inputs(x, fmt, Rotation(1), t)
    step = fmt.decode_scale(quantized.scales.bits).double() * t.double()
    z = x.double() / step.repeat_interleave(fmt.group_size, 1)
    values = torch.tensor(
        sorted({v for v in fmt.element.values if abs(v) <= fmt.element.max}), dtype=torch.float64
    )
    distance = (z.unsqueeze(-1) - values).abs().amin(-1)
    assert torch.allclose(
        (z - fmt.element.decode(quantized.codes).double()).abs(), distance, atol=1e-6
    )


def test_four_or_six_is_chosen_by_the_error_of_the_group() -> None:
    """Worked out by hand, t = 1/6 and so s = amax: with the largest number on 6 the values are
    multiples of amax/12, with it on 4 of amax/8, and e4m3 holds both scales."""
    on_six = torch.tensor([12.0, 3.0, 4.0, 6.0, 8.0, 1.0])  # 12 on 6: 3 4 6 8 → 1.5 2 3 4, exact
    on_four = torch.tensor([8.0, 6.0, 5.9, 6.1, 4.0, 2.0])  # 8 on 4: 6 → 3; on 6 it is 4.5 → 4
    x = torch.zeros(3, 16)
    x[0, :6], x[1, :6], x[2, 3] = on_six, on_four, 1.0  # a single number is exact either way: 6
    quantized = quantize_inputs(x, NVFP4, Rotation(1), torch.tensor(1 / 6), "four_six")
    scales = NVFP4.decode_scale(quantized.scales.bits)[:, 0].tolist()
    assert scales == [12.0, 12.0, 1.0]
    assert NVFP4.element.decode(quantized.codes)[1, :6].tolist() == [4.0, 3.0, 3.0, 3.0, 2.0, 1.0]


@pytest.mark.parametrize("static", [True, False])
def test_four_six_takes_the_scale_of_less_error_in_float64(static: bool) -> None:
    """Both candidates recomputed from scratch; the choice is theirs unless they cost the same to
    1 %, which is what rounding distances to 2^-9 can move."""
    x = torch.randn(64, 256) * torch.logspace(-2, 2, 256)
    t = NVFP4.global_scale(x.abs().amax(), 2.0) if static else None
    quantized = quantize_inputs(x, NVFP4, Rotation(1), t, "four_six")
    t = quantized.scales.global_scale.double()
    wide = x.double().unflatten(1, (-1, 16))
    amax = wide.abs().amax(-1)
    values = torch.tensor(sorted(set(NVFP4.element.values)), dtype=torch.float64)
    bits, costs = [], []
    for largest in (6, 4):
        bits.append(NVFP4.encode_scale((amax / t / largest).float()))
        step = (NVFP4.decode_scale(bits[-1]).double() * t).unsqueeze(-1)
        distance = (wide / step).unsqueeze(-1).sub(values).abs().amin(-1)
        costs.append((distance * step).square().sum(-1))
    chosen = torch.where(costs[1] < costs[0], bits[1], bits[0])
    close = (costs[0] - costs[1]).abs() < 0.01 * costs[0]
    assert torch.equal(quantized.scales.bits[~close], chosen[~close])
    assert close.float().mean() < 0.1 and 0.2 < (costs[1] < costs[0]).float().mean() < 0.8
    absmax = quantize_inputs(x, NVFP4, Rotation(1), None if not static else t.float())
    assert sqnr(x, quantized.dequantize()) > sqnr(x, absmax.dequantize()) + 0.6


def test_the_cost_of_a_group_is_exact_in_any_order() -> None:
    """Reversing the columns of every group changes no scale, however close the choice."""
    x = torch.randn(500, 64).unflatten(1, (-1, 16)) * torch.rand(500, 4, 1)
    t = torch.tensor(1e-3)
    one, other = (
        quantize_inputs(rows.flatten(1), NVFP4, Rotation(1), t, "four_six")
        for rows in (x, x.flip(-1))
    )
    assert torch.equal(one.scales.bits, other.scales.bits)


@pytest.mark.parametrize("fmt", list(FORMATS.values()), ids=list(FORMATS))
def test_the_best_rule_is_four_six_only_for_nvfp4_without_a_rotation(fmt) -> None:
    assert all(best_rule(fmt, size) in input_rules(fmt) for size in (1, 16))
    assert default_rule(fmt) == input_rules(fmt)[0] == best_rule(fmt, 16)
    assert (best_rule(fmt, 1) == "four_six") == (fmt is NVFP4)


def test_per_token_scales_do_not_depend_on_other_tokens() -> None:
    x = torch.randn(8, 64) * torch.logspace(-3, 3, 8).unsqueeze(1)
    together = quantize_inputs(x, NVFP4, Rotation(16))
    assert together.scales.global_scale.shape == (8, 1)
    for i in range(8):
        alone = quantize_inputs(x[i : i + 1], NVFP4, Rotation(16))
        assert torch.equal(alone.dequantize(), together.dequantize()[i : i + 1])


@pytest.mark.parametrize("fmt", list(FORMATS.values()), ids=list(FORMATS))
def test_tokens_of_zeros_stay_zero(fmt) -> None:
    """F19, with static and per-token scales; no NaN from a reciprocal."""
    x = torch.zeros(3, 128)
    for t in (None, torch.tensor(0.01)):
        for rule in input_rules(fmt):
            quantized = quantize_inputs(x, fmt, Rotation(16), t, rule)
            assert (quantized.codes == 0).all()
            assert (quantized.scales.bits == max(1, fmt.legal_scales[0])).all()
            assert (quantized.dequantize() == 0).all()


def test_the_largest_and_smallest_exponents_stay_finite() -> None:
    x = torch.full((1, 32), 3e38)
    assert torch.isfinite(quantize_inputs(x, MXFP4, Rotation(1)).dequantize()).all()
    tiny = torch.full((1, 32), 1e-40)
    assert torch.isfinite(quantize_inputs(tiny, MXFP4, Rotation(1)).dequantize()).all()


def test_rules_of_the_other_scale_type_are_refused() -> None:
    for fmt, rule in ((NVFP4, "theta"), (NVINT4, "four_six"), (MXFP4, "four_six")):
        with pytest.raises(ValueError, match=f"{fmt.name} have no scale rule '{rule}'; choose"):
            quantize_inputs(torch.randn(1, 32), fmt, Rotation(1), None, rule)


def test_sixteen_bit_inputs_are_not_modified_nor_rounded_on_the_way() -> None:
    x = torch.randn(4, 64).bfloat16()
    before = x.clone()
    wide, narrow = (
        quantize_inputs(x.float(), NVFP4, Rotation(16)),
        quantize_inputs(x, NVFP4, Rotation(16)),
    )
    assert torch.equal(wide.codes, narrow.codes)
    assert torch.equal(x, before)


@pytest.mark.parametrize("rotation", [1, 32])
@pytest.mark.parametrize("name", sorted(FORMATS))
def test_rounding_is_quantizing_and_dequantizing(name: str, rotation: int) -> None:
    """Bit by bit, zeros and their signs too, for every rule."""
    fmt = FORMATS[name]
    x = torch.randn(5, 128) * torch.logspace(-3, 3, 5).unsqueeze(1)
    x[1] = 0
    x[2, ::3] = -0.0
    x[3, 7] = 3e4
    for rule in input_rules(fmt):
        for t in (None, torch.tensor(0.003)):
            expected = quantize_inputs(x, fmt, Rotation(rotation), t, rule).dequantize()
            rounded = round_inputs(x, fmt, Rotation(rotation), t, rule)
            assert torch.equal(rounded.view(torch.int32), expected.view(torch.int32))


@four_bit
def test_many_tokens_are_rounded_as_few_are(fmt) -> None:
    """Maxima and scales of many are found another way: the same bits, whatever the number."""
    x = torch.randn(FEW_NUMBERS // 64, 128, generator=torch.Generator().manual_seed(0))
    x[0], x[1, :32] = 0.0, 0.0
    for rule in input_rules(fmt):
        for t in (None, torch.tensor(0.003)):
            many = round_inputs(x, fmt, Rotation(1), t, rule)
            apart = torch.cat([round_inputs(few, fmt, Rotation(1), t, rule) for few in x.split(7)])
            assert torch.equal(many.view(torch.int32), apart.view(torch.int32))
