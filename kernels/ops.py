"""The operators that layers call: checks, schemas, and fake implementations for torch.compile.

    rotate_quantize   x → codes and scale bytes of the rotated inputs        rotate         x → x rotated
    w4a16_matmul      16-bit inputs × 4-bit weights                          dequantize     4-bit weights → dense
    w4a4_matmul       4-bit inputs × 4-bit weights (sm_100, sm_120)          experts.py     a matmul per expert

Each checks its arguments and calls one custom operator (``kernels/register.py``). Global scales
stay on the device, nothing synchronises, and no grid depends on data, so CUDA graphs capture
everything after one run outside the capture (which compiles, and allocates the workspace of
split-K). Elements and scale types are named as in ``ptq.kernels.dispatch.FORMATS``; groups have 16
columns with ``e4m3`` scales and 32 with ``e8m0``.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ptq.kernels import dispatch, launch
from ptq.kernels.dequantize import fp8_row_scale
from ptq.kernels.quantize import swizzle_scales
from ptq.kernels.register import features

__all__ = [
    "QuantizedInputs",
    "dequantize",
    "dequantize_fp8",
    "rotate",
    "rotate_fp8",
    "rotate_quantize",
    "swizzle_scales",
    "w4a4_matmul",
    "w4a8_matmul",
    "w4a16_matmul",
]


class QuantizedInputs(NamedTuple):
    """Quantized activations: x ≈ element[codes] · scale · global_scale.

    Attributes:
        packed: uint8 (tokens, in/2), the even column in the low nibble.
        scale_bits: uint8 (tokens, groups), or (blocks, blocks, 32, 4, 4) in the 128 × 4 blocks of
            Blackwell.
        global_scale: fp32, a scalar, or (tokens, 1) if each token has its own; None with e8m0
            scales, which have none.
    """

    packed: Tensor
    scale_bits: Tensor
    global_scale: Tensor | None


def check(
    name: str,
    element: str,
    scale: str,
    k: int,
    rotation: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Raise ValueError, with the reason, where no kernel serves such a layer."""
    if (
        reason := dispatch.obstacle(
            element, scale, dispatch.GROUP_SIZE.get(scale, 0), k, rotation=rotation, dtype=dtype
        )
    ) is not None:
        raise ValueError(f"{name}: {reason}")


# ---------------------------------------------------------------- inputs


def _check_inputs(
    name: str, x: Tensor, rotation: int | Tensor, prologue: str, gain: Tensor | None
) -> tuple[int, Tensor | None]:
    """(size of the rotation, its block or None for Hadamard), after checking what a launch relies
    on."""
    if prologue not in ("none", "rms_norm", "silu_mul"):
        raise ValueError(
            f"{name}: prologue {prologue!r} does not exist; choose none, rms_norm or silu_mul"
        )
    if (gain is None) == (prologue == "rms_norm"):
        raise ValueError(f"{name}: a gain belongs to the prologue rms_norm and to no other")
    if isinstance(rotation, int):
        return rotation, None
    if rotation.ndim != 2 or rotation.shape[0] != rotation.shape[1] or rotation.dtype != x.dtype:
        raise ValueError(
            f"{name}: a rotation block is square and has the dtype of x, got "
            f"{tuple(rotation.shape)} {rotation.dtype}"
        )
    return len(rotation), rotation.contiguous()


def rotate_quantize(
    x: Tensor,
    rotation: int | Tensor,
    element: str,
    scale: str,
    global_scale: Tensor | None = None,
    *,
    rule: str = "theta",
    prologue: str = "none",
    gain: Tensor | None = None,
    epsilon: float = 0.0,
    swizzle: bool = False,
) -> QuantizedInputs:
    """Rotate and quantize activations in one launch; bit-equal to
    ``ptq.numerics.activations.quantize_inputs`` but for code 8 (-0).

    Args:
        x: (*tokens, in) bfloat16 or float16; with the prologue ``silu_mul`` (*tokens, 2·in): gate
            and up side by side.
        rotation: size of the Hadamard blocks (1, 16, 32, 64, 128), or any square block of such a
            size in the dtype of x, already normalised: y = x · block.
        global_scale: fp32 on the device of x, a scalar or (tokens, 1); None takes one per token
            (e4m3 scales; e8m0 has none).
        rule: of e8m0 scales: ``theta``, ``ocp`` or ``ceil``.
        prologue: ``rms_norm`` (with ``gain`` (in,) and ``epsilon``) or ``silu_mul`` before the
            rotation.
        swizzle: scale bytes in the 128 × 4 blocks that ``w4a4_matmul`` wants where
            ``wants_blocked_scales`` says so.

    Raises:
        ValueError: a format, rule, rotation, prologue or dtype without a kernel, or another shape
            of global scales.
    """
    size, block = _check_inputs("rotate_quantize", x, rotation, prologue, gain)
    check(
        "rotate_quantize",
        element,
        scale,
        features(x, prologue),
        size,
        x.dtype if scale == "e4m3" else torch.bfloat16,
    )
    if scale == "e8m0" and (element, rule) not in launch.E8M0_RULES:
        raise ValueError(
            f"rotate_quantize: scale rule {rule!r} does not exist; choose theta, ocp or ceil"
        )
    flat = x.reshape(-1, x.shape[-1])
    given = None if scale == "e8m0" else global_scale
    if given is not None and given.ndim > 0 and given.shape != (len(flat), 1):
        raise ValueError(
            f"rotate_quantize: global scales {tuple(given.shape)} are neither one nor "
            f"({len(flat)}, 1), one per token"
        )
    packed, bits, rows = torch.ops.ptq.rotate_quantize(
        flat, size, block, element, scale, given, rule, prologue, gain, epsilon, swizzle
    )
    if scale == "e4m3":
        return QuantizedInputs(packed, bits, rows if global_scale is None else global_scale)
    return QuantizedInputs(packed, bits, None)


def rotate(
    x: Tensor,
    rotation: int | Tensor,
    *,
    prologue: str = "none",
    gain: Tensor | None = None,
    epsilon: float = 0.0,
) -> Tensor:
    """Activations times a block-diagonal rotation, summed in fp32 and rounded once to their dtype:
    (*tokens, in).

    Arguments and errors as in :func:`rotate_quantize`. A rotation of 1 without a prologue returns x
    itself.
    """
    size, block = _check_inputs("rotate", x, rotation, prologue, gain)
    if size == 1 and block is None and prologue == "none":
        return x
    k = _check_rotation("rotate", x, size, prologue)
    flat = torch.ops.ptq.rotate(x.reshape(-1, x.shape[-1]), size, block, prologue, gain, epsilon)
    return flat.reshape(*x.shape[:-1], k)


def rotate_fp8(
    x: Tensor,
    rotation: int | Tensor,
    *,
    prologue: str = "none",
    gain: Tensor | None = None,
    epsilon: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Rotated inputs in fp8 E4M3 (tokens, in), and fp32 factors (tokens, 1): each token's largest
    magnitude / 448.

    Arguments and errors as in :func:`rotate_quantize`; x is flattened to (tokens, in). Not for
    sm_80, which has no fp8.
    """
    size, block = _check_inputs("rotate_fp8", x, rotation, prologue, gain)
    _check_rotation("rotate_fp8", x, size, prologue)
    return torch.ops.ptq.rotate_fp8(
        x.reshape(-1, x.shape[-1]), size, block, prologue, gain, epsilon
    )


def _check_rotation(name: str, x: Tensor, size: int, prologue: str) -> int:
    """The number of features, after checking that there is a kernel."""
    k = features(x, prologue)
    if size not in dispatch.ROTATIONS or k % size or k % 16:
        raise ValueError(
            f"{name}: a rotation of {size} is not one of {dispatch.ROTATIONS} that divides {k} "
            "input features"
        )
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"{name}: kernels take bfloat16 or float16 inputs, not {x.dtype}")
    return k


# ---------------------------------------------------------------- weights


def dequantize(
    packed: Tensor,
    scale_bits: Tensor,
    global_scale: Tensor,
    element: str,
    scale: str,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """The weight (out, in) as float32 (bit-equal to ``QuantizedTensor.dequantize``), or rounded
    once to 16 bits.

    Args:
        packed: uint8 (out, in/2); scale_bits: uint8 (out, groups); global_scale: fp32 scalar on the
            same device.
    """
    check("dequantize", element, scale, 2 * packed.shape[1])
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"dequantize: no kernel writes {dtype}; choose float32, bfloat16, float16, or "
            "dequantize_fp8"
        )
    return torch.ops.ptq.dequantize(packed, scale_bits, global_scale, element, scale, dtype)


def dequantize_fp8(
    packed: Tensor, scale_bits: Tensor, element: str, scale: str
) -> tuple[Tensor, Tensor]:
    """An E4M3 copy (out, in) and its fp32 row scales (out, 1); the weight is copy · row scale ·
    global scale.

    Exact for e8m0 scales within 15 binades of a row; e4m3 scales are rounded a second time. Not for
    sm_80, which has no fp8.
    """
    check("dequantize_fp8", element, scale, 2 * packed.shape[1])
    rows = fp8_row_scale(scale_bits, element, scale)
    return torch.ops.ptq.dequantize(
        packed, scale_bits, 1 / rows, element, scale, torch.float8_e4m3fn
    ), rows


def w4a16_matmul(
    x: Tensor,
    packed: Tensor,
    scale_bits: Tensor,
    global_scale: Tensor,
    element: str,
    scale: str,
    bias: Tensor | None = None,
) -> Tensor:
    """x · Ŵᵀ + bias with a 4-bit weight: (*tokens, out) in the dtype of x; sums in fp32, one
    rounding.

    Few tokens multiply the packed weight directly; from where the table says ``dense`` the weight
    is first dequantized (rounding value · scale · global_scale once to the dtype of x) into a
    temporary matrix for the library's matmul.

    Args:
        x: (*tokens, in) bfloat16 (or float16 with e4m3 scales), rotated as the weight is.
        packed: uint8 (out, in/2); scale_bits: uint8 (out, groups), as checkpoints store them;
            global_scale: fp32 scalar.
        bias: (out,), any float dtype.

    Raises:
        ValueError: shapes that do not fit, or a format or dtype without a kernel.
    """
    check("w4a16_matmul", element, scale, x.shape[-1], dtype=x.dtype)
    check_weight("w4a16_matmul", x.shape[-1], packed, scale_bits, scale)
    y = torch.ops.ptq.w4a16_matmul(
        x.reshape(-1, x.shape[-1]), packed, scale_bits, global_scale, bias, element, scale
    )
    return y.reshape(*x.shape[:-1], packed.shape[0])


def check_weight(name: str, k: int, packed: Tensor, scale_bits: Tensor, scale: str) -> None:
    """Raise ValueError where packed codes (…, out, in/2) and row-major scale bytes (…, out, groups)
    do not fit."""
    groups = k // dispatch.GROUP_SIZE[scale]
    if packed.shape[-1] * 2 != k or (
        scale_bits.ndim <= packed.ndim and tuple(scale_bits.shape) != (*packed.shape[:-1], groups)
    ):
        raise ValueError(
            f"{name}: packed {tuple(packed.shape)} and scale bytes {tuple(scale_bits.shape)} do "
            f"not fit {k} inputs"
        )


def w4a8_matmul(
    x: Tensor,
    rotation: int | Tensor,
    packed: Tensor,
    scale_bits: Tensor,
    global_scale: Tensor,
    element: str,
    scale: str,
    bias: Tensor | None = None,
) -> Tensor:
    """rotate(x) · Ŵᵀ + bias in fp8, for prefill where tensor cores have fp8 but not FP4 (sm_89,
    sm_90): (*tokens, out).

    An approximation to choose, never a default: inputs are rounded to E4M3 (a factor per token),
    e4m3-scaled weights a second time (:func:`dequantize_fp8`); the sum is the library's, without
    fast accumulation.

    Raises:
        ValueError: as :func:`w4a16_matmul`; or features that are not multiples of 16.
    """
    check("w4a8_matmul", element, scale, x.shape[-1], dtype=x.dtype)
    check_weight("w4a8_matmul", x.shape[-1], packed, scale_bits, scale)
    if packed.shape[0] % 16 or x.shape[-1] % 16:
        raise ValueError(
            f"w4a8_matmul: {x.shape[-1]} inputs and {packed.shape[0]} outputs are not multiples of "
            "16"
        )
    inputs, tokens = rotate_fp8(x, rotation)
    weight, rows = dequantize_fp8(packed, scale_bits, element, scale)
    y = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        inputs,
        weight.t(),
        tokens,
        (rows * global_scale).t(),
        out_dtype=torch.bfloat16,
        use_fast_accum=False,
    )
    y = y if bias is None else y + bias
    return y.to(x.dtype).reshape(*x.shape[:-1], packed.shape[0])


def w4a4_matmul(
    inputs: QuantizedInputs,
    packed: Tensor,
    scale_bits: Tensor,
    global_scale: Tensor,
    scale: str,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Quantized inputs times a quantized E2M1 weight on FP4 tensor cores: (tokens, out) in
    ``dtype``.

    Args:
        inputs: what :func:`rotate_quantize` returned, of the weight's format.
        packed: uint8 (out, in/2); scale_bits: uint8 (out, groups), or both scales in 128 × 4 blocks
            (``swizzle=True`` and :func:`swizzle_scales`), which selects the persistent TMA kernel
            of sm_100.

    Raises:
        ValueError: shapes that do not fit, or only one of the scales in blocks.
    """
    k = 2 * inputs.packed.shape[-1]
    check("w4a4_matmul", "e2m1", scale, k)
    check_weight("w4a4_matmul", k, packed, scale_bits, scale)
    if inputs.scale_bits.ndim != scale_bits.ndim:
        raise ValueError(
            "w4a4_matmul: scales of inputs and weight must both be in rows or both in 128 × 4 "
            "blocks"
        )
    return torch.ops.ptq.w4a4_matmul(*inputs, packed, scale_bits, global_scale, bias, scale, dtype)


def wants_blocked_scales(device: torch.device, scale: str, tokens: int, n: int, k: int) -> bool:
    """Whether ``w4a4_matmul`` is faster with scales in 128 × 4 blocks: many tokens on sm_100, in
    sizes that TMA can address."""
    aligned = k % (4 * dispatch.GROUP_SIZE[scale]) == 0 and n % 8 == 0
    return aligned and tokens > 64 and dispatch.architecture(device) == 100
