"""Kernel 1: block rotation and quantization of activations, in one launch, with an optional step
before the rotation.

    y = (x · B) · c        B: any square block, in the dtype of x
                           c: an fp32 factor (size^-½ for Hadamard blocks)
    codes, scale bytes     by the law of ``ptq.numerics.activations.quantize_inputs``, which is the
                           oracle of this kernel

One division per group, one product per element (a division per element is what bound other Triton
quantizers to 52–68 % of the bandwidth). The rotation is a ``tl.dot``: 4–6 instructions per element,
a butterfly of reshapes costs 19–23. Launch with ``enable_fp_fusion=False``: contracting a product
with an add that rounds would move ties.
"""
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from ptq.kernels.codec import (
    as_float,
    encode,
    encode_e4m3,
    encode_e8m0,
    encode_pairs_by_cvt,
    pack_pairs,
    round_fp8,
    round_half,
    round_to_e2m1,
    round_to_e4m3,
)


@triton.jit
def _load_inputs(
    x_ptr,
    gain_ptr,
    rows,
    columns,
    row_mask,
    root,
    K: tl.constexpr,
    PROLOGUE: tl.constexpr,
    EVEN: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """A tile of the layer's inputs: as stored, or RMS-normalised, or SiLU(gate) · up from rows
    [gate | up] of 2K numbers."""
    half: tl.constexpr = x_ptr.dtype.element_ty
    mask = row_mask[:, None] if EVEN else row_mask[:, None] & (columns[None, :] < K)
    if PROLOGUE == "silu_mul":
        place = x_ptr + rows[:, None] * (2 * K) + columns[None, :]
        gate = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(place + K, mask=mask, other=0.0).to(tl.float32)
        # the only approximate division: no part of the law of the quantizer, and an exact one
        # spills on sm_120
        swish = round_half(gate / (1.0 + tl.exp(-gate)), half, INTERPRETED)
        x = round_half(swish.to(tl.float32) * up, half, INTERPRETED)
    elif PROLOGUE == "rms_norm":
        x = tl.load(x_ptr + rows[:, None] * K + columns[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        gain = tl.load(gain_ptr + columns, mask=columns < K, other=0.0).to(tl.float32)
        normed = round_half(x * root[:, None], half, INTERPRETED)
        x = round_half(normed.to(tl.float32) * gain[None, :], half, INTERPRETED)
    else:
        x = tl.load(x_ptr + rows[:, None] * K + columns[None, :], mask=mask, other=0.0)
    return x


@triton.jit
def _rotate(
    x,
    block_ptr,
    factor,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROTATION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """x in blocks of ROTATION columns times the block, accumulated in fp32 and scaled afterwards:
    fp32 [BLOCK_M, BLOCK_K]."""
    if ROTATION == 1:
        y = x.to(tl.float32)
    else:
        index = tl.arange(0, ROTATION)
        block = tl.load(block_ptr + index[:, None] * ROTATION + index[None, :])
        x = x.reshape(BLOCK_M * BLOCK_K // ROTATION, ROTATION)
        if INTERPRETED:
            y = tl.dot(x.to(tl.float32), block.to(tl.float32), input_precision="ieee")
        else:
            y = tl.dot(x, block)
        y = (y * factor).reshape(BLOCK_M, BLOCK_K)
    return y


@triton.jit
def _e2m1_cost(y, inverse, scale):
    """``s² · Σ d²`` of groups of E2M1 with E4M3 scales: the rule ``four_six`` of
    ``ptq.numerics.activations``, whose sums are exact in any order."""
    z = tl.abs(y * tl.div_rn(inverse + tl.zeros_like(scale), scale)[:, :, None])
    distance = tl.minimum(tl.abs(z - round_to_e2m1(z)), 2.0)
    distance = (distance + 24576.0) - 24576.0
    return scale * scale * tl.sum(distance * distance, axis=2)


@triton.jit
def rotate_quantize_kernel(
    x_ptr,
    block_ptr,
    gain_ptr,
    global_scale_ptr,
    codes_ptr,
    scales_ptr,
    rotated_ptr,
    kept_ptr,
    M,
    factor,
    epsilon,
    K: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    LARGEST: tl.constexpr,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    FOUR_SIX: tl.constexpr,
    ROTATION: tl.constexpr,
    PROLOGUE: tl.constexpr,
    KEEP: tl.constexpr,
    OUTPUT: tl.constexpr,
    GLOBAL_SCALE: tl.constexpr,
    SWIZZLE: tl.constexpr,
    CVT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Grid (cdiv(M, BLOCK_M), cdiv(K, BLOCK_K · CHUNKS)); a program sees whole rows if it needs a
    statistic of them.

    OUTPUT: "codes" (packed codes and scale bytes), "rotated" (y in the dtype of x) or "fp8" (E4M3,
    a scale per row). GLOBAL_SCALE: one for the whole "tensor" or one for each of its "rows" is
    read, or one per row is "computed" and stored. KEEP: what the prologue made is stored too, as
    other operations read it, before it is rotated. SWIZZLE: scale bytes are stored in the 128 × 4
    blocks of Blackwell. LARGEST, EXPONENT, MANTISSA, FOUR_SIX: the element and scale rule.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < M
    rows = rows.to(tl.int64)
    first = tl.program_id(1) * CHUNKS
    offsets = tl.arange(0, BLOCK_K)
    EVEN: tl.constexpr = K % (BLOCK_K * CHUNKS) == 0
    GROUPS: tl.constexpr = BLOCK_K // GROUP

    root = tl.zeros((BLOCK_M,), tl.float32)
    if PROLOGUE == "rms_norm":
        squares = tl.zeros((BLOCK_M,), tl.float32)
        for chunk in range(0, CHUNKS):
            columns = chunk * BLOCK_K + offsets
            mask = row_mask[:, None] if EVEN else row_mask[:, None] & (columns[None, :] < K)
            x = tl.load(x_ptr + rows[:, None] * K + columns[None, :], mask=mask, other=0.0).to(
                tl.float32
            )
            squares += tl.sum(x * x, axis=1)
        root = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, K * 1.0) + epsilon))

    if OUTPUT == "fp8" or (OUTPUT == "codes" and SCALE == "e4m3"):
        if GLOBAL_SCALE == "computed":
            row_amax = tl.zeros((BLOCK_M,), tl.float32)
            for chunk in range(0, CHUNKS):
                columns = chunk * BLOCK_K + offsets
                x = _load_inputs(
                    x_ptr, gain_ptr, rows, columns, row_mask, root, K, PROLOGUE, EVEN, INTERPRETED
                )
                y = _rotate(x, block_ptr, factor, BLOCK_M, BLOCK_K, ROTATION, INTERPRETED)
                row_amax = tl.maximum(row_amax, tl.max(tl.abs(y), axis=1))
            # four_six: with room for 1.5 times the largest scale
            largest: tl.constexpr = 256.0 if FOUR_SIX else 448.0
            top: tl.constexpr = 448.0 if OUTPUT == "fp8" else largest * LARGEST
            t = tl.maximum(tl.div_rn(row_amax, top), 1.1754943508222875e-38)
            t = tl.where(row_amax > 0.0, t, 1.0)
            tl.store(global_scale_ptr + rows, t, mask=row_mask)
            inverse = tl.div_rn(1.0, t)[:, None]
        elif GLOBAL_SCALE == "rows":
            t = tl.load(global_scale_ptr + rows, mask=row_mask, other=1.0)
            inverse = tl.div_rn(1.0, t)[:, None]
        else:
            inverse = tl.div_rn(1.0, tl.load(global_scale_ptr))
        constant = inverse * (1.0 / LARGEST)

    for chunk in range(0, CHUNKS):
        columns = (first + chunk) * BLOCK_K + offsets
        x = _load_inputs(
            x_ptr, gain_ptr, rows, columns, row_mask, root, K, PROLOGUE, EVEN, INTERPRETED
        )
        if KEEP:
            mask = row_mask[:, None] if EVEN else row_mask[:, None] & (columns[None, :] < K)
            tl.store(kept_ptr + rows[:, None] * K + columns[None, :], x, mask=mask)
        y = _rotate(x, block_ptr, factor, BLOCK_M, BLOCK_K, ROTATION, INTERPRETED)
        if OUTPUT == "rotated":
            mask = row_mask[:, None] if EVEN else row_mask[:, None] & (columns[None, :] < K)
            half: tl.constexpr = rotated_ptr.dtype.element_ty
            tl.store(
                rotated_ptr + rows[:, None] * K + columns[None, :],
                round_half(y, half, INTERPRETED),
                mask=mask,
            )
        elif OUTPUT == "fp8":
            mask = row_mask[:, None] if EVEN else row_mask[:, None] & (columns[None, :] < K)
            tl.store(
                rotated_ptr + rows[:, None] * K + columns[None, :],
                round_fp8(y * inverse, INTERPRETED),
                mask=mask,
            )
        else:
            y = y.reshape(BLOCK_M, GROUPS, GROUP)
            amax = tl.max(tl.abs(y), axis=2)
            if SCALE == "e4m3":
                wanted = amax * constant
                scale = round_to_e4m3(wanted)
                if FOUR_SIX:
                    wider = round_to_e4m3(wanted * 1.5)
                    cheaper = _e2m1_cost(y, inverse, wider) < _e2m1_cost(y, inverse, scale)
                    scale = tl.where(cheaper, wider, scale)
                byte = encode_e4m3(scale)
                # div_rn does not broadcast
                to_code = tl.div_rn(inverse + tl.zeros_like(scale), scale)
            else:
                byte = encode_e8m0(amax, EXPONENT, MANTISSA)
                to_code = as_float((254 - byte) << 23)
            z = (y * to_code[:, :, None]).reshape(BLOCK_M, BLOCK_K // 2, 2)
            if CVT:
                even, odd = tl.split(z)
                packed = encode_pairs_by_cvt(even, odd)
            else:
                even, odd = tl.split(encode(z, ELEMENT))
                packed = pack_pairs(even, odd)
            halves = (first + chunk) * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
            groups = (first + chunk) * GROUPS + tl.arange(0, GROUPS)
            mask = row_mask[:, None] if EVEN else row_mask[:, None] & (halves[None, :] < K // 2)
            tl.store(codes_ptr + rows[:, None] * (K // 2) + halves[None, :], packed, mask=mask)
            mask = row_mask[:, None] if EVEN else row_mask[:, None] & (groups[None, :] < K // GROUP)
            if SWIZZLE:
                tiles: tl.constexpr = (K // GROUP + 3) // 4
                tile = (rows[:, None] // 128) * tiles + groups[None, :] // 4
                inside = (
                    (rows[:, None] % 32) * 16
                    + ((rows[:, None] % 128) // 32) * 4
                    + groups[None, :] % 4
                )
                place = scales_ptr + tile * 512 + inside
            else:
                place = scales_ptr + rows[:, None] * (K // GROUP) + groups[None, :]
            tl.store(place, byte.to(tl.uint8), mask=mask)


# ---------------------------------------------------------------- twins, for tests and layers


def swizzle_scales(scale_bits: Tensor) -> Tensor:
    """Scale bytes (rows, groups) in the 128 × 4 blocks that Blackwell's tensor cores read; padded
    with zeros (F25).

    Returns uint8 (ceil(rows/128), ceil(groups/4), 32, 4, 4): inside a block, row r and column c are
    at [r % 32, r // 32, c].
    """
    rows, groups = scale_bits.shape
    padded = scale_bits.new_zeros(-(-rows // 128) * 128, -(-groups // 4) * 4)
    padded[:rows, :groups] = scale_bits
    return padded.view(len(padded) // 128, 4, 32, -1, 4).permute(0, 3, 2, 1, 4).contiguous()


def rms_norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """What decoder blocks do before projections: normalised in fp32, rounded to the dtype of x,
    times the gain."""
    wide = x.float()
    root = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * root).to(x.dtype) * gain


def silu_mul(gate_up: Tensor) -> Tensor:
    """SiLU(gate) · up of rows [gate | up], each operation rounded to the dtype of the input."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
