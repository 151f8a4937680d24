"""What layers with quantized inputs read while their block is calibrated."""

import torch
from torch import Tensor

from ptq.numerics.activations import quantize_inputs
from ptq.numerics.rotation import Rotation
from ptq.pipeline.recipe import Recipe
from ptq.pipeline.solve import INPUT_MARGIN


def emulated(x: Tensor, recipe: Recipe) -> Tensor:
    """``x`` (*s, in) rotated, quantized as ``recipe`` says, and rotated back; in the dtype of
    ``x``.

    The global scale is not known yet: every sequence takes its own, with the margin of a static
    one (G33). A rotation that is still to be chosen counts as the format's default.
    """
    if not recipe.quantize_inputs:
        return x
    rotation = _expected_rotation(recipe, x.shape[-1])
    sequences = x.unsqueeze(0) if x.ndim == 2 else x.flatten(0, -3)
    rounded = [_rounded(rows, recipe, rotation) if len(rows) else rows for rows in sequences]
    return torch.stack(rounded).reshape(x.shape)


def _rounded(rows: Tensor, recipe: Recipe, rotation: Rotation) -> Tensor:
    fmt, scale = recipe.fmt, None
    if recipe.static_inputs:
        scale = fmt.global_scale(rotation.exact(rows).abs().amax().float(), INPUT_MARGIN)
    rule = recipe.rule_of_inputs(rotation.size)
    quantized = quantize_inputs(rows, fmt, rotation, scale, rule)
    return rotation.exact(quantized.dequantize()).to(rows.dtype)


def _expected_rotation(recipe: Recipe, features: int) -> Rotation:
    size = recipe.fmt.default_rotation if recipe.rotation == "auto" else int(recipe.rotation)
    return Rotation(size if features % size == 0 else 1)
