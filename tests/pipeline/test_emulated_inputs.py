"""What layers with quantized inputs read while their block is calibrated."""

import pytest
import torch

from ptq.numerics.activations import best_rule, quantize_inputs
from ptq.numerics.rotation import Rotation
from ptq.pipeline.emulated_inputs import emulated
from ptq.pipeline.recipe import Recipe


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4", "nvint4"])
@pytest.mark.parametrize("rotation", [1, 32, "auto"])
def test_sequences_are_rounded_as_at_run_time_and_rotated_back(fmt: str, rotation) -> None:
    """G33: every sequence with a global scale of its own, twice its largest number."""
    recipe = Recipe(format=fmt, scheme="w4a4", rotation=rotation)
    x = torch.randn(3, 7, 64) * torch.tensor([1.0, 10.0, 0.1]).view(3, 1, 1)
    size = recipe.fmt.default_rotation if rotation == "auto" else rotation
    turn = Rotation(size)
    for sequence, result in zip(x, emulated(x, recipe), strict=True):
        amax = turn.exact(sequence).abs().amax()
        t = recipe.fmt.global_scale(amax, 2.0) if recipe.fmt.has_global_scale else None
        rule = best_rule(recipe.fmt, size)
        rounded = quantize_inputs(sequence, recipe.fmt, turn, t, rule).dequantize()
        assert torch.equal(result, turn.exact(rounded))
        assert 0 < (result - sequence).norm() / sequence.norm() < 0.2


def test_sixteen_bit_inputs_pass_as_they_are() -> None:
    x = torch.randn(2, 5, 64)
    assert emulated(x, Recipe(format="nvfp4")) is x


@pytest.mark.parametrize("shape", [(5, 64), (2, 5, 64), (2, 2, 5, 64), (0, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_and_dtypes_stay(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    result = emulated(torch.randn(shape).to(dtype), Recipe(format="nvfp4", scheme="w4a4"))
    assert result.shape == shape and result.dtype == dtype
