"""Launches: from tensors to grids and constants. Shapes are checked in ``ops.py``, tiles chosen in
``dispatch.py``.

What a launch compiles is a pure function of shapes and tile (the ``…_constants`` below), so that
the compile checks build exactly what runs. Workspaces and tickets of split-K live as long as the
process, one set per device and stream: a captured CUDA graph may replay at any time.
"""
# pyright: reportArgumentType=false, reportCallIssue=false

import math

import torch
import triton
from torch import Tensor

from ptq.kernels import dispatch
from ptq.kernels.dequantize import dequantize_kernel
from ptq.kernels.dispatch import Tile
from ptq.kernels.quantize import rotate_quantize_kernel
from ptq.kernels.w4a4 import w4a4_kernel, w4a4_tma_kernel
from ptq.kernels.w4a16 import w4a16_kernel

# Triton decides at import, by TRITON_INTERPRET, whether kernels are compiled or interpreted on the
# CPU.
INTERPRETED = not isinstance(w4a16_kernel, triton.JITFunction)
# cvt.rn.bf16x2.e2m1x2 needs the assembler of Triton 3.9; before, weights are unpacked by integer
# operations.
NEW_ASSEMBLER = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 9)
LARGEST = {"e2m1": 6.0, "int4": 7.0}
# (element, rule) → by how much the exponent of the largest magnitude is lowered, and above which
# mantissa bits by one less (F6).
E8M0_RULES = {
    ("e2m1", "ceil"): (2, 0x400000),
    ("e2m1", "ocp"): (2, 0x7FFFFF),
    ("e2m1", "theta"): (2, 0x680000),
    ("int4", "ceil"): (2, 0x600000),
    ("int4", "ocp"): (2, 0x7FFFFF),
    ("int4", "theta"): (3, 0x180000),
}


def even(n: int, block: int) -> bool:
    return n % block == 0


# ---------------------------------------------------------------- rotate and quantize


def quantize_tile(
    rows: int, k: int, rotation: int, *, whole_rows: bool, arch: int = 0, prologue: str = "none"
) -> tuple[int, int, int]:
    """(rows, columns, warps) of a program of ``rotate_quantize_kernel``."""
    if rows <= 16:  # decode: latency, so many small programs
        block_m, block_k, warps = 1, 2048, 4
    elif (
        rotation == 128
    ):  # at least 128 blocks of the rotation, so that the wide tensor-core instructions are used
        block_m, block_k, warps = 32, 512, 8
        if prologue == "silu_mul" and arch in (
            80,
            120,
        ):  # mma.sync: every warp computes the SiLU of its operand; spills
            block_k = 256
    else:
        block_m, block_k, warps = 32, 256, 4
    if whole_rows:
        block_m = min(block_m, 4)
        block_k = 2048
    block_k = max(min(block_k, triton.next_power_of_2(k)), 16 * rotation // block_m, 64)
    return block_m, block_k, warps


def quantize_constants(
    k: int,
    element: str,
    scale: str,
    rotation: int,
    block_m: int,
    block_k: int,
    *,
    arch: int = 0,
    rule: str = "theta",
    prologue: str = "none",
    output: str = "codes",
    global_scale: str = "tensor",
    swizzle: bool = False,
) -> dict[str, object]:
    """The constexpr arguments of ``rotate_quantize_kernel``."""
    exponent, mantissa = E8M0_RULES[element, rule] if scale == "e8m0" else (0, 0)
    whole_rows = prologue == "rms_norm" or global_scale == "computed"
    return {
        "K": k,
        "ELEMENT": element,
        "SCALE": scale,
        "GROUP": dispatch.GROUP_SIZE[scale],
        "LARGEST": LARGEST[element],
        "EXPONENT": exponent,
        "MANTISSA": mantissa,
        "ROTATION": rotation,
        "PROLOGUE": prologue,
        "OUTPUT": output,
        "GLOBAL_SCALE": global_scale,
        "SWIZZLE": swizzle,
        "CVT": arch >= 100 and element == "e2m1",
        "BLOCK_M": block_m,
        "BLOCK_K": block_k,
        "CHUNKS": triton.cdiv(k, block_k) if whole_rows else 1,
        "INTERPRETED": INTERPRETED,
    }


def rotate_quantize(
    x: Tensor,
    block: Tensor | None,
    factor: float,
    gain: Tensor | None,
    epsilon: float,
    global_scale: Tensor | None,
    outputs: tuple[Tensor, Tensor] | Tensor,
    *,
    k: int,
    element: str,
    scale: str,
    rule: str,
    prologue: str,
    computed: bool,
    swizzle: bool,
) -> None:
    """Fill (codes, scale bytes), or if ``outputs`` is one tensor the rotated inputs, in 16 bits or
    in fp8.

    Global scales (rows, 1) are filled too if they are to be ``computed``; otherwise they are read,
    as is a scalar.
    """
    rows, rotation = len(x), 1 if block is None else len(block)
    output = "codes"
    if isinstance(outputs, Tensor):
        output = "fp8" if outputs.dtype == torch.float8_e4m3fn else "rotated"
    arch = 0 if INTERPRETED else dispatch.architecture(x.device) or 0
    kind = (
        "computed"
        if computed
        else "rows"
        if global_scale is not None and global_scale.ndim == 2
        else "tensor"
    )
    whole_rows = computed or prologue == "rms_norm"
    block_m, block_k, warps = quantize_tile(
        rows, k, rotation, whole_rows=whole_rows, arch=arch, prologue=prologue
    )
    constants = quantize_constants(
        k,
        element,
        scale,
        rotation,
        block_m,
        block_k,
        arch=arch,
        rule=rule,
        prologue=prologue,
        output=output,
        global_scale=kind,
        swizzle=swizzle,
    )
    codes, scales = (outputs, outputs) if isinstance(outputs, Tensor) else outputs
    grid = (triton.cdiv(rows, block_m), triton.cdiv(k, block_k * int(constants["CHUNKS"])))
    rotate_quantize_kernel[grid](
        x,
        x if block is None else block,
        x if gain is None else gain,
        x if global_scale is None else global_scale,
        codes,
        scales,
        codes,
        rows,
        factor,
        epsilon,
        **constants,
        num_warps=warps,
        num_stages=2,
        enable_fp_fusion=False,
    )


# ---------------------------------------------------------------- dequantize


def dequantize_constants(k: int, element: str, scale: str, *, fp8: bool) -> dict[str, object]:
    """The constexpr arguments of ``dequantize_kernel``."""
    return {
        "K": k,
        "ELEMENT": element,
        "SCALE": scale,
        "GROUP": dispatch.GROUP_SIZE[scale],
        "FP8": fp8,
        "BLOCK_N": 32,
        "BLOCK_K": 256,
        "INTERPRETED": INTERPRETED,
    }


def dequantize(
    packed: Tensor, scale_bits: Tensor, factor: Tensor, out: Tensor, element: str, scale: str
) -> None:
    """Fill ``out`` (rows, in): fp32, bf16 or fp16 with ``factor`` the global scale; fp8 with the
    inverse of its row scales."""
    n, k = out.shape
    constants = dequantize_constants(k, element, scale, fp8=out.dtype == torch.float8_e4m3fn)
    dequantize_kernel[(triton.cdiv(n, 32), triton.cdiv(k, 256))](
        packed, scale_bits, factor, out, n, **constants, num_warps=4
    )


# ---------------------------------------------------------------- matmuls

_workspaces: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}
_outgrown: list[tuple[Tensor, Tensor]] = []  # captured graphs may still write there


def workspace(device: torch.device, elements: int, tiles: int) -> tuple[Tensor, Tensor]:
    """fp32 scratch and int32 tickets, all zero, of the current stream; allocated on first use: run
    once before capturing."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    held = _workspaces.get((device, stream))
    if held is None or len(held[0]) < elements or len(held[1]) < tiles:
        if held is not None:
            _outgrown.append(held)
        elements, tiles = (
            max(elements, 1 << 22),
            max(tiles, 1 << 14),
        )  # 16 MiB: enough for every row of the tables up to 64 tokens
        scratch = torch.empty(elements, dtype=torch.float32, device=device)
        held = _workspaces[device, stream] = (
            scratch,
            torch.zeros(tiles, dtype=torch.int32, device=device),
        )
    return held


def w4a16_constants(
    n: int,
    k: int,
    element: str,
    scale: str,
    tile: Tile,
    *,
    bias: bool,
    half: torch.dtype = torch.bfloat16,
) -> dict[str, object]:
    """The constexpr arguments of ``w4a16_kernel``."""
    order = tile.order
    if order == "natural" and (element != "e2m1" or not (NEW_ASSEMBLER or half == torch.float16)):
        order = "words"
    if order == "fragments" and (tile.block_k % 128 or tile.block_n % 64):
        order = "words"
    return {
        "K": k,
        "ELEMENT": element,
        "SCALE": scale,
        "GROUP": dispatch.GROUP_SIZE[scale],
        "ORDER": order,
        "HAS_BIAS": bias,
        "EVEN_N": even(n, tile.block_n),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "SPLIT": tile.split,
        "STAGES": tile.stages,
        "INTERPRETED": INTERPRETED,
    }


def _split_workspace(x: Tensor, tile: Tile, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    if tile.split == 1:
        return x, x
    tiles = grid[0] * grid[1]
    return workspace(x.device, tiles * tile.split * tile.block_m * tile.block_n, tiles)


def w4a16(
    x: Tensor,
    packed: Tensor,
    scale_bits: Tensor,
    global_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    element: str,
    scale: str,
    tile: Tile,
) -> None:
    """Fill ``out`` (tokens, out)."""
    (m, k), n = x.shape, len(packed)
    grid = (triton.cdiv(m, tile.block_m), triton.cdiv(n, tile.block_n), tile.split)
    scratch, tickets = _split_workspace(x, tile, grid)
    constants = w4a16_constants(n, k, element, scale, tile, bias=bias is not None, half=x.dtype)
    w4a16_kernel[grid](
        x,
        packed,
        scale_bits,
        global_scale,
        x if bias is None else bias.contiguous(),
        out,
        scratch,
        tickets,
        m,
        n,
        **constants,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def w4a4_constants(
    k: int, scale: str, tile: Tile, *, bias: bool, inputs: str, programs: int = 0
) -> dict[str, object]:
    """The constexpr arguments of ``w4a4_kernel``, or of ``w4a4_tma_kernel`` if the tile says so."""
    constants: dict[str, object] = {
        "K": k,
        "SCALE": scale,
        "GROUP": dispatch.GROUP_SIZE[scale],
        "INPUT_SCALE": inputs,
        "HAS_BIAS": bias,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "STAGES": tile.stages,
        "INTERPRETED": INTERPRETED,
    }
    if tile.kernel == "w4a4_tma":
        return {**constants, "PROGRAMS": programs, "WARP_SPECIALIZE": not INTERPRETED}
    return {**constants, "SWAP": tile.swap, "SPLIT": tile.split}


def input_scales(global_scale: Tensor | None) -> str:
    """INPUT_SCALE of the W4A4 kernels: how many global scales the inputs have."""
    return "none" if global_scale is None else "token" if global_scale.ndim == 2 else "tensor"


def w4a4(
    x_packed: Tensor,
    x_scale_bits: Tensor,
    x_global_scale: Tensor | None,
    packed: Tensor,
    scale_bits: Tensor,
    global_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    scale: str,
    tile: Tile,
) -> None:
    """Fill ``out`` (tokens, out). Scales are bytes in rows, for ``w4a4_tma`` in 128 × 4 blocks."""
    m, n, k = len(x_packed), len(packed), 2 * packed.shape[1]
    if scale == "e4m3" and not INTERPRETED:
        x_scale_bits, scale_bits = (
            x_scale_bits.view(torch.float8_e4m3fn),
            scale_bits.view(torch.float8_e4m3fn),
        )
    operands = (
        x_packed,
        x_scale_bits,
        global_scale if x_global_scale is None else x_global_scale,
        packed,
        scale_bits,
        global_scale,
        out if bias is None else bias.contiguous(),
        out,
    )
    inputs = input_scales(x_global_scale)
    if tile.kernel == "w4a4_tma":
        tiles = math.ceil(m / tile.block_m) * math.ceil(n / tile.block_n)
        programs = min(tiles, 2 if INTERPRETED else dispatch.multiprocessors(x_packed.device))
        constants = w4a4_constants(
            k, scale, tile, bias=bias is not None, inputs=inputs, programs=programs
        )
        if not INTERPRETED:
            triton.set_allocator(_scratch)
        w4a4_tma_kernel[(programs,)](
            *operands, m, n, **constants, num_warps=tile.warps, num_stages=tile.stages
        )
        return
    grid = (triton.cdiv(m, tile.block_m), triton.cdiv(n, tile.block_n), tile.split)
    scratch, tickets = _split_workspace(out, tile, grid)
    constants = w4a4_constants(k, scale, tile, bias=bias is not None, inputs=inputs)
    w4a4_kernel[grid](
        *operands, scratch, tickets, m, n, **constants, num_warps=tile.warps, num_stages=tile.stages
    )


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for descriptors that a kernel builds on the device."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
