"""Kernel 4: packed weights to a dense matrix, for prefill where no tensor core multiplies the
format.

    dense  ŵ = value · fl32(scale · t)      fp32 (bit-equal to ``QuantizedTensor.dequantize``), or
                                            rounded once to 16 bits
    fp8    ŵ ≈ e4m3 · row_scale[row] · t    exact for E8M0 scales within 15 binades of their row,
                                            rounded a second time otherwise
"""
# pyright: reportArgumentType=false

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ptq.kernels.codec import (
    decode,
    decode_scale,
    round_fp8,
    round_half,
    spread_scales,
    unpack_unit_words,
    unpack_words,
)
from ptq.kernels.w4a16 import packed_start, scale_start


@triton.jit
def dequantize_kernel(
    packed_ptr,
    scale_ptr,
    factor_ptr,
    out_ptr,
    N,
    K: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    TILED: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Grid (cdiv(N, BLOCK_N), cdiv(K, BLOCK_K)). factor: the global scale [1], or with FP8 1 /
    row_scale [N]."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows[:, None] < N
    words = tl.program_id(1) * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
    groups = tl.program_id(1) * (BLOCK_K // GROUP) + tl.arange(0, BLOCK_K // GROUP)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    wide = rows.to(tl.int64)
    word_rows = (packed_ptr + packed_start(wide, K, TILED)).to(
        tl.pointer_type(tl.int32), bitcast=True
    )
    scale_rows = scale_ptr + scale_start(wide, K, GROUP, TILED)
    if TILED:
        UNIT_GROUPS: tl.constexpr = 128 // GROUP
        word = (words // 16) * (64 * 16) + words % 16
        scale = (groups // UNIT_GROUPS) * (64 * UNIT_GROUPS) + groups % UNIT_GROUPS
    else:
        word = words
        scale = groups
    EVEN: tl.constexpr = K % BLOCK_K == 0
    packed = tl.load(
        word_rows[:, None] + word[None, :],
        mask=row_mask if EVEN else row_mask & (words[None, :] < K // 8),
        other=0,
    )
    bytes = tl.load(
        scale_rows[:, None] + scale[None, :],
        mask=row_mask if EVEN else row_mask & (groups[None, :] < K // GROUP),
        other=0,
    )
    if FP8:
        factor = tl.load(factor_ptr + rows, mask=rows < N, other=0.0)[:, None]
    else:
        factor = tl.load(factor_ptr)
    step = decode_scale(bytes, SCALE) * factor
    if TILED:
        codes = unpack_unit_words(packed, BLOCK_N, BLOCK_K, ELEMENT)
    else:
        codes = unpack_words(packed, BLOCK_N, BLOCK_K)
    dense = spread_scales(decode(codes, ELEMENT), step, BLOCK_N, BLOCK_K, GROUP)
    if FP8:
        result = round_fp8(dense, INTERPRETED)
    else:
        result = round_half(dense, out_ptr.dtype.element_ty, INTERPRETED)
    mask = row_mask if EVEN else row_mask & (columns[None, :] < K)
    tl.store(out_ptr + wide[:, None] * K + columns[None, :], result, mask=mask)


def fp8_row_scale(scale_bits: Tensor, element: str, scale: str) -> Tensor:
    """One fp32 factor per row (rows, 1) under which value · scale / factor fits E4M3 (magnitudes up
    to 448).

    For E8M0 scales it is a power of two, and the fp8 copy is exact while the row's scales lie
    within 15 binades. For E4M3 scales codes are rounded a second time (weight error of NVFP4 .0952
    → .1004, measured on Gaussian weights).
    """
    largest = 6.0 if element == "e2m1" else 8.0  # -8 is never written, but decoded where it stands
    if scale == "e8m0":
        room = math.floor(math.log2(448.0 / largest))
        top = scale_bits.int().amax(-1, keepdim=True)
        return torch.exp2((top - 127 - room).float())
    top = scale_bits.view(torch.float8_e4m3fn).float().amax(-1, keepdim=True)
    return top * (largest / 448.0)


def fp8_is_exact(scale_bits: Tensor, scale: str) -> bool:
    """Whether an fp8 copy has the numbers of the weight: of E8M0 scales within 15 binades of their
    row, from which the smallest number of an element is still one of E4M3."""
    if scale != "e8m0":
        return False
    return bool((scale_bits.amax(-1) - scale_bits.amin(-1)).amax() <= 14)
