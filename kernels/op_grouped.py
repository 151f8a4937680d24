"""Operators with a matmul per expert, in one launch.

    grouped_w4a16     16-bit inputs × 4-bit weights
    grouped_w4a4      4-bit inputs × 4-bit weights (sm_100, sm_120)

    y[i] = x[rows[i]] · Ŵ[e]ᵀ (+ bias[e])   for offsets[e] ≤ i < offsets[e+1],
    y[i] = 0                                beyond the last offset

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

from ptq.kernels.grouped import grouped_w4a4_kernel, grouped_w4a16_kernel
from ptq.kernels.op_matmul import (
    as_tensor_cores_read,
    check_fp4,
    in_fragment_order,
    input_scales,
    w4a4_constants,
    w4a16_constants,
)
from ptq.kernels.operands import PackedWeight, QuantizedInputs
from ptq.kernels.operator import define, tile_for
from ptq.kernels.tiles import Tile

# ---------------------------------------------------------------- what both share


def _check_experts(
    operator: str, offsets: Tensor, weight: PackedWeight, rows: Tensor | None
) -> None:
    experts = weight.experts
    if not experts or offsets.shape != (experts + 1,) or offsets.dtype != torch.int32:
        raise ValueError(
            f"{operator}: {experts} experts need {experts + 1} int32 offsets and weights (experts, "
            "out, in/2)"
        )
    if weight.global_scale.shape != (experts,):
        raise ValueError(
            f"{operator}: {experts} experts need a global scale each, got shape "
            f"{tuple(weight.global_scale.shape)}"
        )
    if rows is not None and rows.dtype != torch.int32:
        raise ValueError(f"{operator}: the rows of the inputs must be int32, not {rows.dtype}")


def grouped_constants(
    single: dict[str, object], experts: int, *, gather: bool
) -> dict[str, object]:
    """The constexpr arguments of a grouped kernel, from those of the ``single`` matmul.

    Args:
        gather: whether rows of the inputs are looked up.
    """
    return {
        **{name: value for name, value in single.items() if name != "SPLIT"},
        "EXPERTS": experts,
        "POWER": triton.next_power_of_2(experts + 1),
        "GATHER": gather,
    }


def _grid(tile: Tile, m: int, experts: int, n: int) -> tuple[int, int]:
    # each expert, and nobody, may leave one tile partly filled
    tiles = min(m, triton.cdiv(m, tile.block_m) + experts + 1)
    return triton.cdiv(n, tile.block_n), tiles


def _per_expert(assignments: int, experts: int) -> int:
    """Tokens of an average expert, which choose the tile."""
    return math.ceil(assignments / experts)


# ---------------------------------------------------------------- grouped_w4a16


def grouped_w4a16(
    x: Tensor,
    offsets: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """One matmul per expert with 16-bit inputs: (assignments, out) in the dtype of x.

    Args:
        x: (tokens, in) bfloat16 (or float16 with e4m3 scales), rotated as the weights are.
        offsets: int32 (experts + 1,), ascending, from 0 to at most the number of assignments.
        weight: of all experts.
        bias: (experts, out) or None.
        rows: int32 (assignments,), the row of x for each; None if x is sorted already (assignments
            = tokens).

    Raises:
        ValueError: shapes that do not fit, or a format or dtype without a kernel.
    """
    weight.check("grouped_w4a16", x.shape[-1], x.dtype)
    _check_experts("grouped_w4a16", offsets, weight, rows)
    return torch.ops.ptq.grouped_w4a16(x, offsets, *weight.flat, bias, rows)


def _w4a16_fake(
    x: Tensor, offsets: Tensor, weight: PackedWeight, bias: Tensor | None, rows: Tensor | None
) -> Tensor:
    return x.new_empty(((x if rows is None else rows).shape[0], weight.out_features))


def _w4a16(
    x: Tensor, offsets: Tensor, weight: PackedWeight, bias: Tensor | None, rows: Tensor | None
) -> Tensor:
    out = _w4a16_fake(x, offsets, weight, bias, rows)
    if len(out):
        tokens, n = _per_expert(len(out), weight.experts), weight.out_features
        tile = tile_for(
            "grouped", x.device, weight.element, weight.scale, tokens, n, weight.in_features
        )
        launch_grouped_w4a16(x.contiguous(), offsets, weight, bias, rows, out, tile)
    return out


define(
    "grouped_w4a16(Tensor x, Tensor offsets, Tensor packed, Tensor scale_bits, "
    "Tensor global_scale, str element, str scale, Tensor? bias, Tensor? rows) -> Tensor",
    _w4a16,
    _w4a16_fake,
)


def launch_grouped_w4a16(
    x: Tensor,
    offsets: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    rows: Tensor | None,
    out: Tensor,
    tile: Tile,
) -> None:
    """Fill ``out`` (assignments, out)."""
    experts, n, k = weight.experts, weight.out_features, x.shape[1]
    single = w4a16_constants(
        n,
        k,
        weight.element,
        weight.scale,
        tile,
        bias=bias is not None,
        half=x.dtype,
        tiled=weight.tiled,
    )
    grouped_w4a16_kernel[_grid(tile, len(out), experts, n)](
        in_fragment_order(x) if single["ORDERED"] else x,
        x if rows is None else rows,
        offsets,
        weight.packed.contiguous(),
        weight.scale_bits.contiguous(),
        weight.global_scale,
        x if bias is None else bias.contiguous(),
        out,
        len(out),
        n,
        **grouped_constants(single, experts, gather=rows is not None),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


# ---------------------------------------------------------------- grouped_w4a4


def grouped_w4a4(
    inputs: QuantizedInputs,
    offsets: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """One matmul per expert with quantized inputs and E2M1 weights, on FP4 tensor cores:
    (assignments, out) in ``dtype``.

    Args:
        inputs: what ``rotate_quantize`` returned, of the weights' format, with scale bytes in rows.
        offsets, weight, bias, rows: as for :func:`grouped_w4a16`.

    Raises:
        ValueError: shapes that do not fit, or a format without a kernel.
    """
    check_fp4("grouped_w4a4", inputs, weight)
    _check_experts("grouped_w4a4", offsets, weight, rows)
    if inputs.scale_bits.ndim != 2:
        raise ValueError(
            "grouped_w4a4: scales of inputs must be in rows, not in 128 × 4 blocks (swizzle=False)"
        )
    return torch.ops.ptq.grouped_w4a4(*inputs.flat, offsets, *weight.flat, bias, rows, dtype)


def _w4a4_fake(
    inputs: QuantizedInputs,
    offsets: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    rows: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    assignments = (inputs.packed if rows is None else rows).shape[0]
    return inputs.packed.new_empty((assignments, weight.out_features), dtype=dtype)


def _w4a4(
    inputs: QuantizedInputs,
    offsets: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    rows: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    out = _w4a4_fake(inputs, offsets, weight, bias, rows, dtype)
    if len(out):
        tokens = _per_expert(len(out), weight.experts)
        n, k = weight.out_features, weight.in_features
        single = tile_for("w4a4", out.device, weight.element, weight.scale, tokens, n, k)
        launch_grouped_w4a4(inputs, offsets, weight, bias, rows, out, w4a4_tile(single, k))
    return out


define(
    "grouped_w4a4(Tensor x_packed, Tensor x_scale_bits, Tensor? x_global_scale, Tensor offsets, "
    "Tensor packed, Tensor scale_bits, Tensor global_scale, str element, str scale, Tensor? bias, "
    "Tensor? rows, ScalarType dtype) -> Tensor",
    _w4a4,
    _w4a4_fake,
)


def w4a4_tile(single: Tile, k: int) -> Tile:
    """The tile of a single W4A4 matmul as one of experts: K is not split, because there are many of
    them already.

    Where K is no multiple of the tile's, masks take registers: 64 × 128 × 256 spills 48–136 bytes
    on sm_120, and swapped 16 × 128 × 128 with more than two stages 24 bytes on sm_100 with Triton
    3.6.
    """
    if k % single.block_k == 0:
        return replace(single, split=1)
    return replace(single, split=1, block_k=128, stages=2 if single.swap else single.stages)


def launch_grouped_w4a4(
    inputs: QuantizedInputs,
    offsets: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    rows: Tensor | None,
    out: Tensor,
    tile: Tile,
) -> None:
    """Fill ``out`` (assignments, out)."""
    experts, n, k, scale = weight.experts, weight.out_features, weight.in_features, weight.scale
    single = w4a4_constants(k, scale, tile, bias=bias is not None, inputs=input_scales(inputs))
    grouped_w4a4_kernel[_grid(tile, len(out), experts, n)](
        inputs.packed,
        as_tensor_cores_read(inputs.scale_bits, scale),
        weight.global_scale if inputs.global_scale is None else inputs.global_scale,
        inputs.packed if rows is None else rows,
        offsets,
        weight.packed.contiguous(),
        as_tensor_cores_read(weight.scale_bits.contiguous(), scale),
        weight.global_scale,
        out if bias is None else bias.contiguous(),
        out,
        len(out),
        n,
        **grouped_constants(single, experts, gather=rows is not None),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
