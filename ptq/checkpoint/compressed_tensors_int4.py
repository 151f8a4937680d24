"""Integers of 4 bits as compressed-tensors packs them: ``weight_packed`` I32 (out, in / 8) with the
codes offset by 8, ``weight_scale`` BF16 (out, groups), ``weight_shape`` I64 [2].

All are exact: formats of bfloat16 scales have theirs; the global scale of NVINT4 is a power of two,
and multiplied in; scales of MXINT4 are powers of two. Keys are names without that of the layer;
tensors of other names are passed on.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ptq.numerics.formats import E4M3_LARGEST, MXINT4

INT4_TYPES: dict[str, tuple[torch.dtype, ...]] = {
    "weight_packed": (torch.int32,),
    "weight_scale": (torch.bfloat16, torch.float16, torch.float32),
    "weight_shape": (torch.int64, torch.int32),
}
MANTISSA = 0x7FFFFF  # of a float32


def fold_int4(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a layer of int4 with bfloat16 scales."""
    return dict(tensors) | _folded(tensors["weight_packed"], tensors["weight_scale"])


def unfold_int4(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`fold_int4`.

    Raises:
        ValueError: a scale is no bfloat16 number; or the shapes of the three tensors do not belong
            together.
    """
    _, rest = _unfolded(tensors)
    return rest | {"weight_scale": as_bfloat16(tensors["weight_scale"])}


def as_bfloat16(scale: Tensor) -> Tensor:
    """The same numbers in bfloat16.

    Raises:
        ValueError: they are none of it.
    """
    stored = scale.to(torch.bfloat16)
    if not torch.equal(stored.double(), scale.double()):
        raise ValueError(
            f"its {str(scale.dtype).removeprefix('torch.')} scales are no bfloat16 numbers, and "
            "would be rounded: quantize the model in bfloat16"
        )
    return stored


def fold_nvint4(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an NVINT4 layer as int4.

    Law: ``unfold_nvint4(fold_nvint4(x))`` stands for the same numbers.

    Raises:
        ValueError: a scale times the global scale is not a bf16 number, because the latter is no
            power of two.
    """
    divisor = tensors["weight_global_scale"]
    exact = tensors["weight_scale"].float() / divisor
    folded = exact.to(torch.bfloat16)
    if int(divisor.view(torch.int32)) & MANTISSA or not torch.equal(folded.float(), exact):
        raise ValueError(
            "its global scale is not a power of two in range, folding it into bf16 scales would "
            "round: requantize"
        )
    rest = {leaf: tensor for leaf, tensor in tensors.items() if leaf != "weight_global_scale"}
    return rest | _folded(tensors["weight_packed"], folded)


def unfold_nvint4(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`fold_nvint4`: the same codes and steps, though a step may be split into
    another E4M3 number and another power of two.

    Raises:
        ValueError: the scales have no such split, so this int4 checkpoint is not an NVINT4 one; or
            the shapes of the three tensors do not belong together.
    """
    scale, rest = _unfolded(tensors)
    # The smallest power of two t with max(scale) <= 448 t. One that fits existed (the writer's),
    # and moving scales up inside the range of E4M3 only adds precision to the small ones.
    fraction, exponent = torch.frexp(scale.max() / E4M3_LARGEST)  # fraction in [0.5, 1)
    t = torch.ldexp(torch.ones((), dtype=torch.float32), exponent - (fraction == 0.5).int())
    stored = (scale / t).to(torch.float8_e4m3fn)
    if not torch.equal(stored.float() * t, scale):
        raise ValueError(
            "its bf16 scales are no E4M3 scales times a power of two: this is int4, but not NVINT4"
        )
    return rest | {"weight_scale": stored, "weight_global_scale": (1 / t).reshape(1)}


def fold_mxint4(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an MXINT4 layer as int4."""
    scale = MXINT4.decode_scale(tensors["weight_scale"]).to(torch.bfloat16)
    return dict(tensors) | _folded(tensors["weight_packed"], scale)


def unfold_mxint4(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`fold_mxint4`.

    Raises:
        ValueError: a scale is no power of two that E8M0 has, so this int4 checkpoint is not an
            MXINT4 one; or the shapes of the three tensors do not belong together.
    """
    scale, rest = _unfolded(tensors)
    bits = scale.view(torch.int32)
    byte = (bits >> 23) & 0xFF
    if bool(((bits & MANTISSA) != 0).any() | (bits < 0).any() | (byte == 0).any()) or bool(
        (byte == 255).any()
    ):
        raise ValueError("its bf16 scales are no powers of two: this is int4, but not MXINT4")
    return rest | {"weight_scale": byte.to(torch.uint8)}


def _folded(packed: Tensor, scale: Tensor) -> dict[str, Tensor]:
    shape = torch.tensor([packed.shape[0], 2 * packed.shape[1]], dtype=torch.int64)
    return {
        "weight_packed": (packed ^ 0x88).view(torch.int32),
        "weight_scale": scale,
        "weight_shape": shape,
    }


def _unfolded(tensors: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Scales in float32, and the rest with codes as ours are packed."""
    packed, said = tensors["weight_packed"], tensors["weight_shape"].tolist()
    scale = tensors["weight_scale"].float()
    if packed.ndim != 2 or said != [packed.shape[0], 8 * packed.shape[1]]:
        raise ValueError(
            f"weight_shape is {said} and weight_packed has shape {tuple(packed.shape)}: the "
            "checkpoint is damaged, copy or quantize it again"
        )
    if not scale.numel():
        raise ValueError("weight_scale is empty: the checkpoint is damaged")
    rest = {leaf: t for leaf, t in tensors.items() if leaf not in ("weight_scale", "weight_shape")}
    return scale, rest | {"weight_packed": packed.view(torch.uint8) ^ 0x88}
