"""Keys and values in 8 bits, as engines keep them in an FP8 cache: one scale a tensor.

A cache holds ``E4M3(x / s)``, saturating, and attention reads ``s · E4M3(x / s)``. s is a float32
number for all keys of an attention layer, and another one for its values, both calibrated (vLLM and
compressed-tensors: ``k_scale`` and ``v_scale``).
"""

import torch
from jaxtyping import Float, Float32
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448


def key_value_scale(amax: Float[Tensor, ""]) -> Float32[Tensor, "1"]:
    """The scale with which the largest number seen becomes the largest of E4M3; 1 where nothing but
    zeros was seen.

    Raises:
        ValueError: ``amax`` is negative, NaN or infinite.
    """
    if not 0 <= float(amax) < float("inf"):
        raise ValueError(f"the largest key or value seen is {float(amax)}: no scale can be made")
    scale = amax.float() / LARGEST
    return torch.where(scale > 0, scale, 1.0).reshape(1)


def round_key_values(
    x: Float[Tensor, "*shape"], scale: Float32[Tensor, "1"]
) -> Float[Tensor, "*shape"]:
    """What attention reads of keys or values ``x`` from an FP8 cache, in the type of ``x``.

    Computed in float32; numbers beyond the range become the largest one, NaN stays NaN.
    """
    codes = (x.float() / scale).clamp(-LARGEST, LARGEST).to(FP8)
    return (codes.float() * scale).to(x.dtype)
