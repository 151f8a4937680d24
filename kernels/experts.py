"""Operators with a matmul per expert, in one launch: constants, launches, schemas, fakes and
checks.

    grouped_w4a16     16-bit inputs × 4-bit weights          grouped_w4a4      4-bit inputs × 4-bit weights (Blackwell)

    y[i] = x[rows[i]] · Ŵ[e]ᵀ (+ bias[e])   for offsets[e] ≤ i < offsets[e+1],   0 beyond the last offset

Assignments of tokens to experts are sorted by expert. How many each expert got is read on the
device: nothing synchronises, and shapes depend on the number of assignments alone, so CUDA graphs
capture a whole layer of experts.
"""
# pyright: reportArgumentType=false, reportCallIssue=false

import math
from dataclasses import replace

import torch
import triton
from torch import Tensor

from ptq.kernels import launch, ops
from ptq.kernels.dispatch import Tile
from ptq.kernels.grouped import grouped_w4a4_kernel, grouped_w4a16_kernel
from ptq.kernels.register import define, tile_for

__all__ = ["grouped_w4a4", "grouped_w4a16"]


# ---------------------------------------------------------------- launches


def w4a16_constants(
    n: int,
    k: int,
    experts: int,
    element: str,
    scale: str,
    tile: Tile,
    *,
    gather: bool,
    bias: bool,
    half: torch.dtype = torch.bfloat16,
) -> dict[str, object]:
    """The constexpr arguments of ``grouped_w4a16_kernel``."""
    constants = launch.w4a16_constants(n, k, element, scale, tile, bias=bias, half=half)
    return _grouped(constants, experts, gather=gather)


def w4a4_constants(
    k: int, experts: int, scale: str, tile: Tile, *, gather: bool, bias: bool, inputs: str
) -> dict[str, object]:
    """The constexpr arguments of ``grouped_w4a4_kernel``."""
    return _grouped(
        launch.w4a4_constants(k, scale, tile, bias=bias, inputs=inputs), experts, gather=gather
    )


def _grouped(constants: dict[str, object], experts: int, *, gather: bool) -> dict[str, object]:
    del constants["SPLIT"]
    return {
        **constants,
        "EXPERTS": experts,
        "POWER": triton.next_power_of_2(experts + 1),
        "GATHER": gather,
    }


def _grid(tile: Tile, m: int, experts: int, n: int) -> tuple[int, int]:
    tiles = min(
        m, triton.cdiv(m, tile.block_m) + experts + 1
    )  # each expert, and nobody, may leave one partly filled
    return triton.cdiv(n, tile.block_n), tiles


def launch_w4a16(
    x: Tensor,
    offsets: Tensor,
    packed: Tensor,
    scale_bits: Tensor,
    global_scale: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    out: Tensor,
    element: str,
    scale: str,
    tile: Tile,
) -> None:
    """Fill ``out`` (assignments, out)."""
    (experts, n), k = packed.shape[:2], x.shape[1]
    constants = w4a16_constants(
        n,
        k,
        experts,
        element,
        scale,
        tile,
        gather=rows is not None,
        bias=bias is not None,
        half=x.dtype,
    )
    grouped_w4a16_kernel[_grid(tile, len(out), experts, n)](
        x,
        x if rows is None else rows,
        offsets,
        packed,
        scale_bits,
        global_scale,
        x if bias is None else bias.contiguous(),
        out,
        len(out),
        n,
        **constants,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def launch_w4a4(
    x_packed: Tensor,
    x_scale_bits: Tensor,
    x_global_scale: Tensor | None,
    offsets: Tensor,
    packed: Tensor,
    scale_bits: Tensor,
    global_scale: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    out: Tensor,
    scale: str,
    tile: Tile,
) -> None:
    """Fill ``out`` (assignments, out)."""
    (experts, n), k = packed.shape[:2], 2 * packed.shape[2]
    if scale == "e4m3" and not launch.INTERPRETED:
        x_scale_bits, scale_bits = (
            x_scale_bits.view(torch.float8_e4m3fn),
            scale_bits.view(torch.float8_e4m3fn),
        )
    inputs = launch.input_scales(x_global_scale)
    constants = w4a4_constants(
        k, experts, scale, tile, gather=rows is not None, bias=bias is not None, inputs=inputs
    )
    grouped_w4a4_kernel[_grid(tile, len(out), experts, n)](
        x_packed,
        x_scale_bits,
        global_scale if x_global_scale is None else x_global_scale,
        x_packed if rows is None else rows,
        offsets,
        packed,
        scale_bits,
        global_scale,
        out if bias is None else bias.contiguous(),
        out,
        len(out),
        n,
        **constants,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


# ---------------------------------------------------------------- schemas, implementations, fakes


def w4a4_tile(tile: Tile, k: int) -> Tile:
    """The tile of a single W4A4 matmul as one of experts: K is not split, because there are many of
    them already.

    Where K is no multiple of the tile's, masks take registers: 64 × 128 × 256 spills 48–136 bytes
    on sm_120, and swapped 16 × 128 × 128 with more than two stages 24 bytes on sm_100 with Triton
    3.6.
    """
    if k % tile.block_k == 0:
        return replace(tile, split=1)
    return replace(tile, split=1, block_k=128, stages=2 if tile.swap else tile.stages)


def _per_expert(assignments: int, experts: int) -> int:
    """Tokens of an average expert, which choose the tile."""
    return math.ceil(assignments / experts)


def _w4a16_fake(
    x: Tensor,
    offsets: Tensor,
    packed: Tensor,
    scale_bits: Tensor,
    global_scale: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    element: str,
    scale: str,
) -> Tensor:
    return x.new_empty((x.shape[0] if rows is None else rows.shape[0], packed.shape[1]))


def _w4a16(
    x: Tensor,
    offsets: Tensor,
    packed: Tensor,
    scale_bits: Tensor,
    global_scale: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    element: str,
    scale: str,
) -> Tensor:
    out = _w4a16_fake(x, offsets, packed, scale_bits, global_scale, bias, rows, element, scale)
    if len(out):
        tokens = _per_expert(len(out), len(packed))
        tile = tile_for("grouped", x.device, element, scale, tokens, packed.shape[1], x.shape[1])
        weight = (packed.contiguous(), scale_bits.contiguous(), global_scale, bias)
        launch_w4a16(x.contiguous(), offsets, *weight, rows, out, element, scale, tile)
    return out


def _w4a4_fake(
    x_packed: Tensor,
    x_scale_bits: Tensor,
    x_global_scale: Tensor | None,
    offsets: Tensor,
    packed: Tensor,
    scale_bits: Tensor,
    global_scale: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    scale: str,
    dtype: torch.dtype,
) -> Tensor:
    return x_packed.new_empty(
        (x_packed.shape[0] if rows is None else rows.shape[0], packed.shape[1]), dtype=dtype
    )


def _w4a4(
    x_packed: Tensor,
    x_scale_bits: Tensor,
    x_global_scale: Tensor | None,
    offsets: Tensor,
    packed: Tensor,
    scale_bits: Tensor,
    global_scale: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    scale: str,
    dtype: torch.dtype,
) -> Tensor:
    inputs = (x_packed, x_scale_bits, x_global_scale)
    out = _w4a4_fake(*inputs, offsets, packed, scale_bits, global_scale, bias, rows, scale, dtype)
    if len(out):
        tokens, (n, k) = _per_expert(len(out), len(packed)), (packed.shape[1], 2 * packed.shape[2])
        tile = w4a4_tile(tile_for("w4a4", x_packed.device, "e2m1", scale, tokens, n, k), k)
        weight = (packed.contiguous(), scale_bits.contiguous(), global_scale, bias)
        launch_w4a4(*inputs, offsets, *weight, rows, out, scale, tile)
    return out


define(
    "grouped_w4a16(Tensor x, Tensor offsets, Tensor packed, Tensor scale_bits, Tensor "
    "global_scale, Tensor? bias, "
    "Tensor? rows, str element, str scale) -> Tensor",
    _w4a16,
    _w4a16_fake,
)
define(
    "grouped_w4a4(Tensor x_packed, Tensor x_scale_bits, Tensor? x_global_scale, Tensor offsets, "
    "Tensor packed, "
    "Tensor scale_bits, Tensor global_scale, Tensor? bias, Tensor? rows, str scale, ScalarType "
    "dtype) -> Tensor",
    _w4a4,
    _w4a4_fake,
)


# ---------------------------------------------------------------- what layers call


def grouped_w4a16(
    x: Tensor,
    offsets: Tensor,
    packed: Tensor,
    scale_bits: Tensor,
    global_scale: Tensor,
    element: str,
    scale: str,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """One matmul per expert with 16-bit inputs.

    Args:
        x: (tokens, in) bfloat16 (or float16 with e4m3 scales), rotated as the weights are.
        offsets: int32 (experts + 1,), ascending, from 0 to at most the number of assignments.
        packed: uint8 (experts, out, in/2); scale_bits: uint8 (experts, out, groups); global_scale:
            fp32 (experts,).
        bias: (experts, out) or None.
        rows: int32 (assignments,), the row of x for each; None if x is sorted already (assignments
            = tokens).

    Returns:
        (assignments, out) in the dtype of x.

    Raises:
        ValueError: shapes that do not fit, or a format or dtype without a kernel.
    """
    ops.check("grouped_w4a16", element, scale, x.shape[-1], dtype=x.dtype)
    ops.check_weight("grouped_w4a16", x.shape[-1], packed, scale_bits, scale)
    _check_experts("grouped_w4a16", offsets, packed, global_scale, rows)
    return torch.ops.ptq.grouped_w4a16(
        x, offsets, packed, scale_bits, global_scale, bias, rows, element, scale
    )


def grouped_w4a4(
    inputs: ops.QuantizedInputs,
    offsets: Tensor,
    packed: Tensor,
    scale_bits: Tensor,
    global_scale: Tensor,
    scale: str,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """One matmul per expert with quantized inputs and E2M1 weights, on FP4 tensor cores.

    Args:
        inputs: what ``ops.rotate_quantize`` returned, of the weights' format, with scale bytes in
            rows.
        offsets, packed, scale_bits, global_scale, bias, rows: as for :func:`grouped_w4a16`.

    Returns:
        (assignments, out) in ``dtype``.

    Raises:
        ValueError: shapes that do not fit, or a format without a kernel.
    """
    k = 2 * inputs.packed.shape[-1]
    ops.check("grouped_w4a4", "e2m1", scale, k)
    ops.check_weight("grouped_w4a4", k, packed, scale_bits, scale)
    _check_experts("grouped_w4a4", offsets, packed, global_scale, rows)
    if inputs.scale_bits.ndim != 2:
        raise ValueError(
            "grouped_w4a4: scales of inputs must be in rows, not in 128 × 4 blocks (swizzle=False)"
        )
    return torch.ops.ptq.grouped_w4a4(
        *inputs, offsets, packed, scale_bits, global_scale, bias, rows, scale, dtype
    )


def _check_experts(
    name: str, offsets: Tensor, packed: Tensor, global_scale: Tensor, rows: Tensor | None
) -> None:
    experts = packed.shape[0]
    if packed.ndim != 3 or offsets.shape != (experts + 1,) or offsets.dtype != torch.int32:
        raise ValueError(
            f"{name}: {experts} experts need {experts + 1} int32 offsets and weights (experts, "
            "out, in/2)"
        )
    if global_scale.shape != (experts,):
        raise ValueError(
            f"{name}: {experts} experts need a global scale each, got shape "
            f"{tuple(global_scale.shape)}"
        )
    if rows is not None and rows.dtype != torch.int32:
        raise ValueError(f"{name}: the rows of the inputs must be int32, not {rows.dtype}")
