"""Operators that make dense copies of packed weights.

dequantize        4-bit weights → fp32 or 16 bits
dequantize_fp8    4-bit weights → fp8 and a scale per row
"""
# pyright: reportArgumentType=false, reportCallIssue=false

from dataclasses import replace

import torch
import triton
from torch import Tensor

from ptq.kernels import coverage
from ptq.kernels.dequantize import dequantize_kernel, fp8_is_exact, fp8_row_scale
from ptq.kernels.operands import Fp8Weight, PackedWeight
from ptq.kernels.operator import INTERPRETED, define

BLOCK_N, BLOCK_K = 32, 256


def dequantize(weight: PackedWeight, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The weight (out, in) as float32 (bit-equal to ``QuantizedTensor.dequantize``), or rounded
    once to 16 bits.

    Raises:
        ValueError: a format or dtype without a kernel.
    """
    coverage.require("dequantize", weight.element, weight.scale, weight.in_features)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"dequantize: no kernel writes {dtype}; choose float32, bfloat16, float16, or "
            "dequantize_fp8"
        )
    return torch.ops.ptq.dequantize(*weight.flat, dtype)


def dequantize_fp8(weight: PackedWeight) -> tuple[Tensor, Tensor]:
    """An E4M3 copy (out, in) and its fp32 row scales (out, 1); the weight is copy · row scale ·
    global scale.

    Exact for e8m0 scales within 15 binades of a row; e4m3 scales are rounded a second time. Not for
    sm_80, which has no fp8.
    """
    coverage.require("dequantize_fp8", weight.element, weight.scale, weight.in_features)
    rows = fp8_row_scale(_scale_rows(weight), weight.element, weight.scale)
    scaled = replace(weight, global_scale=1 / rows)
    return torch.ops.ptq.dequantize(*scaled.flat, torch.float8_e4m3fn), rows


def fp8_weight(weight: PackedWeight) -> Fp8Weight:
    """The copy of :func:`dequantize_fp8`, as :func:`ptq.kernels.op_matmul.fp8_matmul` takes it.
    Waits for the device, to say whether it is exact."""
    values, rows = dequantize_fp8(weight)
    exact = fp8_is_exact(_scale_rows(weight), weight.scale)
    return Fp8Weight(values, (rows * weight.global_scale).t(), exact)


def _scale_rows(weight: PackedWeight) -> Tensor:
    """Scale bytes (out, groups), out of units too."""
    bits = weight.scale_bits
    return bits.transpose(-2, -3).flatten(-2).flatten(0, 1) if weight.tiled else bits


def _dequantize_fake(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    return weight.packed.new_empty((weight.out_features, weight.in_features), dtype=dtype)


def _dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    out = _dequantize_fake(weight, dtype)
    launch_dequantize(weight, out)
    return out


define(
    "dequantize(Tensor packed, Tensor scale_bits, Tensor global_scale, str element, str scale, "
    "ScalarType dtype) -> Tensor",
    _dequantize,
    _dequantize_fake,
)


def dequantize_constants(
    k: int, element: str, scale: str, *, fp8: bool, tiled: bool = False
) -> dict[str, object]:
    """The constexpr arguments of ``dequantize_kernel``."""
    return {
        "K": k,
        "ELEMENT": element,
        "SCALE": scale,
        "GROUP": coverage.GROUP_SIZE[scale],
        "TILED": tiled,
        "FP8": fp8,
        "BLOCK_N": BLOCK_N,
        "BLOCK_K": BLOCK_K,
        "INTERPRETED": INTERPRETED,
    }


def launch_dequantize(weight: PackedWeight, out: Tensor) -> None:
    """Fill ``out`` (rows, in): fp32, bf16 or fp16, or fp8, for which the weight's global scales are
    the inverse of the scales of its rows."""
    n, k = out.shape
    fp8 = out.dtype == torch.float8_e4m3fn
    dequantize_kernel[triton.cdiv(n, BLOCK_N), triton.cdiv(k, BLOCK_K)](
        weight.packed.contiguous(),
        weight.scale_bits.contiguous(),
        weight.global_scale,
        out,
        n,
        **dequantize_constants(k, weight.element, weight.scale, fp8=fp8, tiled=weight.tiled),
        num_warps=4,
    )
