"""Operators that multiply inputs with one packed weight.

    w4a16_matmul    16-bit inputs × 4-bit weight
    w4a8_matmul     inputs rounded to fp8 × fp8 copy of the weight (sm_89, sm_90)
    w4a4_matmul     4-bit inputs × 4-bit weight (sm_100, sm_120)

Global scales stay on the device, nothing synchronises, and no grid depends on data, so CUDA graphs
capture everything after one run outside the capture, which compiles. What a launch compiles is a
pure function of shapes and tile (the ``…_constants``), so that the compile checks build exactly
what runs.
"""
# pyright: reportArgumentType=false, reportCallIssue=false

import math

import torch
import triton
from torch import Tensor
from torch.nn.functional import linear

from ptq.kernels import coverage, gpu
from ptq.kernels.op_dequantize import dequantize_fp8
from ptq.kernels.op_inputs import rotate_fp8
from ptq.kernels.operands import Fp8Inputs, Fp8Weight, PackedWeight, QuantizedInputs
from ptq.kernels.operator import INTERPRETED, define, tile_for
from ptq.kernels.scale_words import scale_load
from ptq.kernels.tiles import Tile
from ptq.kernels.w4a4 import w4a4_kernel, w4a4_tma_kernel
from ptq.kernels.w4a16 import w4a16_kernel
from ptq.kernels.workspace import split_workspace

# cvt.rn.bf16x2.e2m1x2 needs the assembler of Triton 3.9; before, weights are unpacked by integer
# operations.
NEW_ASSEMBLER = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 9)

# Rows of tiles in a band of the persistent kernel: 148 programs on tiles of 128 × 256 are then 16 ×
# 9, which read 4,400 rows of the operands; down all 64 of 8192 tokens they read 8,800.
GROUP_ROWS = 16


# ---------------------------------------------------------------- w4a16


def w4a16_matmul(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x · Ŵᵀ + bias with a 4-bit weight: (*tokens, out) in the dtype of x; sums in fp32, one
    rounding.

    Few tokens multiply the packed weight directly; from where the table says ``dense`` the weight
    is first dequantized (rounding value · scale · global_scale once to the dtype of x) into a
    temporary matrix for the library's matmul.

    Args:
        x: (*tokens, in) bfloat16 (or float16 with e4m3 scales), rotated as the weight is.
        bias: (out,), any float dtype.

    Raises:
        ValueError: shapes that do not fit, or a format or dtype without a kernel.
    """
    weight.check("w4a16_matmul", x.shape[-1], x.dtype)
    y = torch.ops.ptq.w4a16_matmul(x.reshape(-1, x.shape[-1]), *weight.flat, bias)
    return y.reshape(*x.shape[:-1], weight.out_features)


def _w4a16_fake(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.out_features))


def _w4a16(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    out = _w4a16_fake(x, weight, bias)
    if not len(x):
        return out
    element, scale = weight.element, weight.scale
    tile = tile_for("w4a16", x.device, element, scale, len(x), weight.out_features, x.shape[1])
    if tile.kernel == "dense":
        dense = torch.ops.ptq.dequantize(*weight.flat, x.dtype)
        return linear(x, dense, None if bias is None else bias.to(x.dtype))
    launch_w4a16(x.contiguous(), weight, bias, out, tile)
    return out


define(
    "w4a16_matmul(Tensor x, Tensor packed, Tensor scale_bits, Tensor global_scale, str element, "
    "str scale, Tensor? bias) -> Tensor",
    _w4a16,
    _w4a16_fake,
)


def w4a16_constants(
    n: int,
    k: int,
    element: str,
    scale: str,
    tile: Tile,
    *,
    bias: bool,
    half: torch.dtype = torch.bfloat16,
    tiled: bool = False,
) -> dict[str, object]:
    """The constexpr arguments of ``w4a16_kernel`` for inputs of dtype ``half``.

    Args:
        tiled: the weight lies in units.
    """
    order = "words" if tiled and tile.order == "natural" else tile.order
    if order == "natural" and (element != "e2m1" or not (NEW_ASSEMBLER or half == torch.float16)):
        order = "words"
    if order == "fragments" and (tile.block_k % 128 or tile.block_n % 64):
        order = "words"
    group = coverage.GROUP_SIZE[scale]
    load = scale_load(tile.block_n, tile.block_k, group, k, tile.warps, tiled=tiled)
    # where integers unpack into a register operand, scales that are taken apart take the weights
    # through shared memory: MXINT4 on sm_120 read it 157 times a trip instead of 24, and spilled.
    # Shifted ones of MXINT4 spilled in wide tiles of sm_90 as well.
    if (order == "words" and not tiled) or (load == "shifted" and element == "int4"):
        load = "bytes"
    return {
        "K": k,
        "ELEMENT": element,
        "SCALE": scale,
        "GROUP": group,
        "ORDER": order,
        "TILED": tiled,
        # in a wide tile the compiler stores x a second time to permute it: 128 tokens × 64 rows
        # take 5.0 instructions a weight instead of 5.9, of 256 rows none of them spills
        "ORDERED": tiled and order == "fragments" and tile.block_m > 16,
        "HAS_BIAS": bias,
        "EVEN_N": n % tile.block_n == 0,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "SPLIT": tile.split,
        "STAGES": tile.stages,
        "SCALE_LOAD": load,
        "INTERPRETED": INTERPRETED,
    }


def in_fragment_order(x: Tensor) -> Tensor:
    """x (tokens, in) with every 128 of its columns as ``ORDERED`` kernels read them."""
    # pairs of columns stay together: 32 bits each
    pairs = x.contiguous().view(torch.int32).unflatten(1, (-1, 4, 8, 2))
    return pairs.permute(0, 1, 3, 4, 2).reshape(len(x), -1).view(x.dtype)


def launch_w4a16(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, out: Tensor, tile: Tile
) -> None:
    """Fill ``out`` (tokens, out)."""
    (m, k), n = x.shape, weight.out_features
    grid = (triton.cdiv(m, tile.block_m), triton.cdiv(n, tile.block_n), tile.split)
    constants = w4a16_constants(
        n,
        k,
        weight.element,
        weight.scale,
        tile,
        bias=bias is not None,
        half=x.dtype,
        tiled=weight.tiled,
    )
    w4a16_kernel[grid](
        in_fragment_order(x) if constants["ORDERED"] else x,
        weight.packed.contiguous(),
        weight.scale_bits.contiguous(),
        weight.global_scale,
        x if bias is None else bias.contiguous(),
        out,
        *split_workspace(out, tile, grid[0] * grid[1]),
        m,
        n,
        **constants,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


# ---------------------------------------------------------------- w4a8


def w4a8_matmul(
    x: Tensor, rotation: int, weight: PackedWeight, bias: Tensor | None = None
) -> Tensor:
    """rotate(x) · Ŵᵀ + bias in fp8, for prefill where tensor cores have fp8 but not FP4 (sm_89,
    sm_90): (*tokens, out).

    An approximation to choose, never a default: inputs are rounded to E4M3 (a factor per token),
    e4m3-scaled weights a second time (``dequantize_fp8``); the sum is the library's, without fast
    accumulation.

    Raises:
        ValueError: as :func:`w4a16_matmul`; or features that are not multiples of 16.
    """
    k, n = x.shape[-1], weight.out_features
    weight.check("w4a8_matmul", k, x.dtype)
    if n % 16 or k % 16:
        raise ValueError(f"w4a8_matmul: {k} inputs and {n} outputs are not multiples of 16")
    values, rows = dequantize_fp8(weight)
    copy = Fp8Weight(values, (rows * weight.global_scale).t(), exact=False)
    y = fp8_matmul(Fp8Inputs(*rotate_fp8(x, rotation)), copy, bias, x.dtype)
    return y.reshape(*x.shape[:-1], n)


def fp8_matmul(
    inputs: Fp8Inputs, weight: Fp8Weight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """inputs · weightᵀ + bias on fp8 tensor cores (sm_89 and later): (tokens, out) in ``dtype``.

    The product is the library's, without fast accumulation, and is rounded to bfloat16 before the
    bias is added. Features on both sides are multiples of 16.
    """
    y = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        inputs.values,
        weight.values.t(),
        inputs.factors,
        weight.factors,
        out_dtype=torch.bfloat16,
        use_fast_accum=False,
    )
    return (y if bias is None else y + bias).to(dtype)


# ---------------------------------------------------------------- w4a4


def w4a4_matmul(
    inputs: QuantizedInputs,
    weight: PackedWeight,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Quantized inputs times a quantized E2M1 weight on FP4 tensor cores: (tokens, out) in
    ``dtype``.

    Args:
        inputs: what ``rotate_quantize`` returned, of the weight's format. Both scales in 128 × 4
            blocks (``swizzle=True`` and ``swizzle_scales``) select the persistent TMA kernel of
            sm_100.

    Raises:
        ValueError: shapes that do not fit, only one of the scales in blocks, or a weight of another
            element.
    """
    check_fp4("w4a4_matmul", inputs, weight)
    if inputs.scale_bits.ndim != weight.scale_bits.ndim:
        raise ValueError(
            "w4a4_matmul: scales of inputs and weight must both be in rows or both in 128 × 4 "
            "blocks"
        )
    return torch.ops.ptq.w4a4_matmul(*inputs.flat, *weight.flat, bias, dtype)


def check_fp4(operator: str, inputs: QuantizedInputs, weight: PackedWeight) -> None:
    """Raise ValueError where FP4 tensor cores do not multiply such a weight, or shapes do not
    fit."""
    if weight.element != "e2m1":
        raise ValueError(f"{operator}: tensor cores multiply e2m1 elements, not {weight.element}")
    if weight.tiled:
        raise ValueError(f"{operator}: tensor cores read rows, not the units of a tiled weight")
    weight.check(operator, 2 * inputs.packed.shape[-1])


def wants_blocked_scales(weight: PackedWeight, tokens: int) -> bool:
    """Whether :func:`w4a4_matmul` is faster with scales in 128 × 4 blocks: many tokens on sm_100,
    in sizes that TMA can address."""
    columns = 4 * coverage.GROUP_SIZE[weight.scale]
    aligned = weight.in_features % columns == 0 and weight.out_features % 8 == 0
    return aligned and tokens > 64 and gpu.architecture(weight.packed.device) == 100


def _w4a4_fake(
    inputs: QuantizedInputs, weight: PackedWeight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return inputs.packed.new_empty((inputs.packed.shape[0], weight.out_features), dtype=dtype)


def _w4a4(
    inputs: QuantizedInputs, weight: PackedWeight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    out = _w4a4_fake(inputs, weight, bias, dtype)
    if not len(out):
        return out
    operation = "w4a4_blocked" if weight.blocked else "w4a4"
    (m, n), k = out.shape, weight.in_features
    tile = tile_for(operation, out.device, weight.element, weight.scale, m, n, k)
    launch_w4a4(inputs, weight, bias, out, tile)
    return out


define(
    "w4a4_matmul(Tensor x_packed, Tensor x_scale_bits, Tensor? x_global_scale, Tensor packed, "
    "Tensor scale_bits, Tensor global_scale, str element, str scale, Tensor? bias, "
    "ScalarType dtype) -> Tensor",
    _w4a4,
    _w4a4_fake,
)


def w4a4_constants(
    k: int, scale: str, tile: Tile, *, bias: bool, inputs: str, programs: int = 0
) -> dict[str, object]:
    """The constexpr arguments of ``w4a4_kernel``, or of ``w4a4_tma_kernel`` if the tile says so.

    Args:
        inputs: what :func:`input_scales` says of them.
        programs: how many the persistent kernel has.
    """
    constants: dict[str, object] = {
        "K": k,
        "SCALE": scale,
        "GROUP": coverage.GROUP_SIZE[scale],
        "INPUT_SCALE": inputs,
        "HAS_BIAS": bias,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "STAGES": tile.stages,
        "INTERPRETED": INTERPRETED,
    }
    if tile.kernel == "w4a4_tma":
        persistent = {"PROGRAMS": programs, "GROUP_ROWS": GROUP_ROWS}
        return {**constants, **persistent, "WARP_SPECIALIZE": not INTERPRETED}
    loads = {
        name: scale_load(rows, tile.block_k, coverage.GROUP_SIZE[scale], k, tile.warps)
        for name, rows in (("X_SCALE_LOAD", tile.block_m), ("SCALE_LOAD", tile.block_n))
    }
    return {**constants, **loads, "SWAP": tile.swap, "SPLIT": tile.split}


def input_scales(inputs: QuantizedInputs) -> str:
    """INPUT_SCALE of the W4A4 kernels: how many global scales the inputs have."""
    t = inputs.global_scale
    return "none" if t is None else "token" if t.ndim == 2 else "tensor"


def as_tensor_cores_read(scale_bits: Tensor, scale: str) -> Tensor:
    """Scale bytes in the dtype by which ``tl.dot_scaled`` knows their type; the interpreter keeps
    bytes."""
    typed = scale == "e4m3" and not INTERPRETED
    return scale_bits.view(torch.float8_e4m3fn) if typed else scale_bits


def launch_w4a4(
    inputs: QuantizedInputs, weight: PackedWeight, bias: Tensor | None, out: Tensor, tile: Tile
) -> None:
    """Fill ``out`` (tokens, out). Scales are bytes in rows, for ``w4a4_tma`` in 128 × 4 blocks."""
    (m, n), k, scale = out.shape, weight.in_features, weight.scale
    operands = (
        inputs.packed,
        as_tensor_cores_read(inputs.scale_bits, scale),
        weight.global_scale if inputs.global_scale is None else inputs.global_scale,
        weight.packed.contiguous(),
        as_tensor_cores_read(weight.scale_bits.contiguous(), scale),
        weight.global_scale,
        out if bias is None else bias.contiguous(),
        out,
    )
    facts = {"bias": bias is not None, "inputs": input_scales(inputs)}
    if tile.kernel == "w4a4_tma":
        tiles = math.ceil(m / tile.block_m) * math.ceil(n / tile.block_n)
        programs = min(tiles, 2 if INTERPRETED else gpu.multiprocessors(out.device))
        constants = w4a4_constants(k, scale, tile, **facts, programs=programs)
        if not INTERPRETED:
            triton.set_allocator(_scratch)
        w4a4_tma_kernel[(programs,)](
            *operands, m, n, **constants, num_warps=tile.warps, num_stages=tile.stages
        )
        return
    grid = (triton.cdiv(m, tile.block_m), triton.cdiv(n, tile.block_n), tile.split)
    w4a4_kernel[grid](
        *operands,
        *split_workspace(out, tile, grid[0] * grid[1]),
        m,
        n,
        **w4a4_constants(k, scale, tile, **facts),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for descriptors that a kernel builds on the device."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
