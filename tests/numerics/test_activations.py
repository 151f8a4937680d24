"""The law of quantized activations (K1), checked in float64 and step
by step."""

import pytest
import torch

from ptq.numerics.activations import default_rule, quantize_inputs
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
    x = torch.zeros(3, 64)
    for t in (None, torch.tensor(0.01)):
        quantized = quantize_inputs(x, fmt, Rotation(16), t)
        assert (quantized.codes == 0).all()
        assert (quantized.scales.bits == 1).all()
        assert (quantized.dequantize() == 0).all()


def test_the_largest_and_smallest_exponents_stay_finite() -> None:
    x = torch.full((1, 32), 3e38)
    assert torch.isfinite(quantize_inputs(x, MXFP4, Rotation(1)).dequantize()).all()
    tiny = torch.full((1, 32), 1e-40)
    assert torch.isfinite(quantize_inputs(tiny, MXFP4, Rotation(1)).dequantize()).all()


def test_rules_of_the_other_scale_type_are_refused() -> None:
    with pytest.raises(ValueError, match="absmax"):
        quantize_inputs(torch.randn(1, 32), NVFP4, Rotation(1), None, "theta")


def test_sixteen_bit_inputs_are_not_modified_nor_rounded_on_the_way() -> None:
    x = torch.randn(4, 64).bfloat16()
    before = x.clone()
    wide, narrow = (
        quantize_inputs(x.float(), NVFP4, Rotation(16)),
        quantize_inputs(x, NVFP4, Rotation(16)),
    )
    assert torch.equal(wide.codes, narrow.codes)
    assert torch.equal(x, before)
