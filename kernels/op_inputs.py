"""Operators on inputs: rotation, and quantization in the same launch.

    rotate            x → x rotated, in 16 bits
    rotate_quantize   x → codes and scale bytes of the rotated inputs
    rotate_fp8        x → rotated inputs in fp8, and a factor per token

Global scales stay on the device, nothing synchronises, and no grid depends on data, so CUDA graphs
capture everything after one run outside the capture, which compiles. What a launch compiles is a
pure function of ``Variant`` and tile (``quantize_constants``), so that the compile checks build
exactly what runs.
"""
# pyright: reportArgumentType=false, reportCallIssue=false

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
from torch import Tensor

from ptq.kernels import coverage, gpu
from ptq.kernels.operands import NO_PROLOGUE, Encoding, Prologue, QuantizedInputs
from ptq.kernels.operator import INTERPRETED, define
from ptq.kernels.quantize import rotate_quantize_kernel

# Element → its largest number.
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
# Element → rules of e4m3 scales.
E4M3_RULES = {"e2m1": ("absmax", "four_six"), "int4": ("absmax",)}
# What a launch is told that encodes nothing.
NOTHING_ENCODED = Encoding("e2m1", "e4m3")


# ---------------------------------------------------------------- launch


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What one launch of ``rotate_quantize_kernel`` does.

    Attributes:
        k: features that are rotated.
        rotation: size of the rotation's blocks, 1 is none.
        prologue: none, rms_norm or silu_mul.
        keep: what the prologue makes is stored too.
        output: codes (and scale bytes), rotated (in the dtype of x) or fp8.
        global_scale: of the inputs; tensor (there is one, or none is needed), rows (one per token
            is read) or computed (one per token is taken and stored).
        swizzle: scale bytes in the 128 × 4 blocks of Blackwell.
    """

    k: int
    rotation: int
    encoding: Encoding = NOTHING_ENCODED
    prologue: str = "none"
    keep: bool = False
    output: str = "codes"
    global_scale: str = "tensor"
    swizzle: bool = False

    @property
    def whole_rows(self) -> bool:
        """Whether a program has to see whole rows, because it needs a statistic of them."""
        return self.prologue == "rms_norm" or self.global_scale == "computed"


@dataclass(frozen=True, kw_only=True)
class QuantizeTile:
    """Rows and columns that a program of ``rotate_quantize_kernel`` takes at a time, and its
    warps."""

    block_m: int
    block_k: int
    warps: int


def quantize_tile(variant: Variant, rows: int, arch: int = 0) -> QuantizeTile:
    """The tile of a launch over so many rows; architecture 0 is the interpreter."""
    if rows <= 16:  # decode: latency, so many small programs
        block_m, block_k, warps = 1, 2048, 4
    elif variant.rotation == 128:
        # at least 128 blocks of the rotation, so that the wide tensor-core instructions are used
        block_m, block_k, warps = 32, 512, 8
        if variant.prologue == "silu_mul" and arch in (80, 120):
            # mma.sync: every warp computes the SiLU of its operand; spills
            block_k = 256
    else:
        block_m, block_k, warps = 32, 256, 4
    if variant.whole_rows:
        block_m, block_k = min(block_m, 4), 2048
    narrow = min(block_k, triton.next_power_of_2(variant.k))
    block_k = max(narrow, 16 * variant.rotation // block_m, 64)
    return QuantizeTile(block_m=block_m, block_k=block_k, warps=warps)


def quantize_constants(variant: Variant, tile: QuantizeTile, arch: int = 0) -> dict[str, object]:
    """The constexpr arguments of ``rotate_quantize_kernel``."""
    element, scale, rule = variant.encoding.flat
    exponent, mantissa = (0, 0)
    if scale == "e8m0":
        exponent, mantissa = E8M0_RULES[element, "theta" if rule == "default" else rule]
    return {
        "K": variant.k,
        "ELEMENT": element,
        "SCALE": scale,
        "GROUP": coverage.GROUP_SIZE[scale],
        "LARGEST": LARGEST[element],
        "EXPONENT": exponent,
        "MANTISSA": mantissa,
        "FOUR_SIX": rule == "four_six",
        "ROTATION": variant.rotation,
        "PROLOGUE": variant.prologue,
        "KEEP": variant.keep,
        "OUTPUT": variant.output,
        "GLOBAL_SCALE": variant.global_scale,
        "SWIZZLE": variant.swizzle,
        "CVT": arch >= 100 and element == "e2m1",
        "BLOCK_M": tile.block_m,
        "BLOCK_K": tile.block_k,
        "CHUNKS": triton.cdiv(variant.k, tile.block_k) if variant.whole_rows else 1,
        "INTERPRETED": INTERPRETED,
    }


def launch_rotate_quantize(
    x: Tensor,
    prologue: Prologue,
    global_scale: Tensor | None,
    outputs: tuple[Tensor, Tensor] | Tensor,
    kept: Tensor,
    variant: Variant,
) -> None:
    """Fill (codes, scale bytes), or if ``outputs`` is one tensor the rotated inputs; and ``kept``,
    if the variant keeps what its prologue makes.

    Global scales (rows, 1) are filled too if they are to be computed; otherwise they are read.
    """
    rows, block = len(x), None
    if variant.rotation > 1:
        block = hadamard(variant.rotation, x.dtype, x.device)
    arch = 0 if INTERPRETED else gpu.architecture(x.device) or 0
    tile = quantize_tile(variant, rows, arch)
    constants = quantize_constants(variant, tile, arch)
    codes, scales = (outputs, outputs) if isinstance(outputs, Tensor) else outputs
    columns = tile.block_k * int(constants["CHUNKS"])
    rotate_quantize_kernel[triton.cdiv(rows, tile.block_m), triton.cdiv(variant.k, columns)](
        x,
        x if block is None else block,
        x if prologue.gain is None else prologue.gain,
        x if global_scale is None else global_scale,
        codes,
        scales,
        codes,
        kept,
        rows,
        variant.rotation**-0.5,
        prologue.epsilon,
        **constants,
        num_warps=tile.warps,
        num_stages=2,
        enable_fp_fusion=False,
    )


def hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """±1 of Sylvester's matrix, kept; made for itself in a recording that comes before the first
    call outside of one."""
    return (_made if gpu.capturing(device) else _hadamard)(size, dtype, device)


def _made(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The parity of the bits that row and column have in common."""
    index = torch.arange(size, device=device)
    common = index[:, None] & index[None, :]
    parity = torch.zeros_like(common)
    for bit in range(size.bit_length()):
        parity ^= (common >> bit) & 1
    return (1 - 2 * parity).to(dtype)


_hadamard = lru_cache(maxsize=64)(_made)


# ---------------------------------------------------------------- rotate


def rotate(x: Tensor, rotation: int, prologue: Prologue = NO_PROLOGUE) -> Tensor:
    """Activations times a block-diagonal rotation, summed in fp32 and rounded once to their dtype:
    (*tokens, in).

    Arguments and errors as in :func:`rotate_quantize`. A rotation of 1 without a prologue returns x
    itself.
    """
    prologue.check("rotate")
    if rotation == 1 and prologue.kind == "none":
        return x
    return rotate_and_keep(x, rotation, prologue)[0]


def rotate_and_keep(x: Tensor, rotation: int, prologue: Prologue) -> tuple[Tensor, Tensor]:
    """What :func:`rotate` returns, and what the prologue made of x before it was rotated, if the
    prologue is to ``keep`` it: (*tokens, in) both. With a rotation of 1 they are one tensor."""
    prologue.check("rotate")
    k, alone = prologue.features(x), rotation == 1
    _check_rotation("rotate", x, rotation, k)
    flat = prologue.flat if not alone else replace(prologue, keep=False).flat
    y, kept = torch.ops.ptq.rotate(x.reshape(-1, x.shape[-1]), rotation, *flat)
    y = y.reshape(*x.shape[:-1], k)
    return y, (y if alone or not prologue.keep else kept.reshape(y.shape))


def _rotate_fake(x: Tensor, rotation: int, prologue: Prologue) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], prologue.features(x))), _kept(x, prologue)


def _kept(x: Tensor, prologue: Prologue) -> Tensor:
    """Room for what a prologue makes, (rows, in), if it is to be kept; else nothing, (0, in)."""
    return x.new_empty((x.shape[0] if prologue.keep else 0, prologue.features(x)))


def _rotate(x: Tensor, rotation: int, prologue: Prologue) -> tuple[Tensor, Tensor]:
    out, kept = _rotate_fake(x, rotation, prologue)
    if len(x):
        variant = Variant(
            k=out.shape[1],
            rotation=rotation,
            prologue=prologue.kind,
            keep=prologue.keep,
            output="rotated",
        )
        launch_rotate_quantize(x.contiguous(), prologue, None, out, kept, variant)
    return out, kept


define(
    "rotate(Tensor x, int rotation, str prologue, Tensor? gain, float epsilon, bool keep) "
    "-> (Tensor, Tensor)",
    _rotate,
    _rotate_fake,
)


def _check_rotation(operator: str, x: Tensor, rotation: int, k: int) -> None:
    if rotation not in coverage.ROTATIONS or k % rotation or k % 16:
        raise ValueError(
            f"{operator}: a rotation of {rotation} is not one of {coverage.ROTATIONS} that divides "
            f"{k} input features"
        )
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"{operator}: kernels take bfloat16 or float16 inputs, not {x.dtype}")


# ---------------------------------------------------------------- rotate_fp8


def rotate_fp8(x: Tensor, rotation: int, prologue: Prologue = NO_PROLOGUE) -> tuple[Tensor, Tensor]:
    """Rotated inputs in fp8 E4M3 (tokens, in), and fp32 factors (tokens, 1): each token's largest
    magnitude / 448.

    Arguments and errors as in :func:`rotate_quantize`; x is flattened to (tokens, in). Not for
    sm_80, which has no fp8.
    """
    prologue.check("rotate_fp8")
    prologue = replace(prologue, keep=False)
    _check_rotation("rotate_fp8", x, rotation, prologue.features(x))
    return torch.ops.ptq.rotate_fp8(x.reshape(-1, x.shape[-1]), rotation, *prologue.flat)


def _rotate_fp8_fake(x: Tensor, rotation: int, prologue: Prologue) -> tuple[Tensor, Tensor]:
    rows, k = x.shape[0], prologue.features(x)
    factors = x.new_empty((rows, 1), dtype=torch.float32)
    return x.new_empty((rows, k), dtype=torch.float8_e4m3fn), factors


def _rotate_fp8(x: Tensor, rotation: int, prologue: Prologue) -> tuple[Tensor, Tensor]:
    out, factors = _rotate_fp8_fake(x, rotation, prologue)
    if len(x):
        variant = Variant(
            k=out.shape[1],
            rotation=rotation,
            prologue=prologue.kind,
            output="fp8",
            global_scale="computed",
        )
        launch_rotate_quantize(x.contiguous(), prologue, factors, out, out, variant)
    return out, factors


define(
    "rotate_fp8(Tensor x, int rotation, str prologue, Tensor? gain, float epsilon, bool keep) "
    "-> (Tensor, Tensor)",
    _rotate_fp8,
    _rotate_fp8_fake,
)


# ---------------------------------------------------------------- rotate_quantize


def rotate_quantize(
    x: Tensor,
    rotation: int,
    encoding: Encoding,
    global_scale: Tensor | None = None,
    *,
    prologue: Prologue = NO_PROLOGUE,
    swizzle: bool = False,
) -> QuantizedInputs:
    """Rotate and quantize activations in one launch; bit-equal to
    ``ptq.numerics.activations.quantize_inputs`` but for code 8 (-0).

    Args:
        x: (*tokens, in) bfloat16 or float16; with the prologue ``silu_mul`` (*tokens, 2·in): gate
            and up side by side.
        rotation: size of the Hadamard blocks: 1, 16, 32, 64 or 128.
        global_scale: fp32 on the device of x, a scalar or (tokens, 1); None takes one per token
            (e4m3 scales; e8m0 has none).
        swizzle: scale bytes in the 128 × 4 blocks that ``w4a4_matmul`` wants where
            ``wants_blocked_scales`` says so.

    Raises:
        ValueError: a format, rule, rotation, prologue or dtype without a kernel, or another shape
            of global scales.
    """
    prologue = replace(prologue, keep=False)
    return quantize_and_keep(x, rotation, encoding, global_scale, prologue, swizzle=swizzle)[0]


def quantize_and_keep(
    x: Tensor,
    rotation: int,
    encoding: Encoding,
    global_scale: Tensor | None,
    prologue: Prologue,
    *,
    swizzle: bool = False,
) -> tuple[QuantizedInputs, Tensor]:
    """What :func:`rotate_quantize` returns, and what the prologue made of x before it was rotated,
    (*tokens, in), if it is to ``keep`` it."""
    prologue.check("rotate_quantize")
    element, scale, rule = encoding.flat
    dtype = x.dtype if scale == "e4m3" else torch.bfloat16
    k = prologue.features(x)
    coverage.require("rotate_quantize", element, scale, k, rotation=rotation, dtype=dtype)
    if rule not in (known_rules := ("default", *_rules(element, scale))):
        raise ValueError(
            f"rotate_quantize: scale rule {rule!r} does not exist; choose from "
            f"{', '.join(known_rules)}"
        )
    flat = x.reshape(-1, x.shape[-1])
    known = None if scale == "e8m0" else global_scale
    if known is not None and known.ndim > 0 and known.shape != (len(flat), 1):
        raise ValueError(
            f"rotate_quantize: global scales {tuple(known.shape)} are neither one nor "
            f"({len(flat)}, 1), one per token"
        )
    packed, bits, per_token, kept = torch.ops.ptq.rotate_quantize(
        flat, rotation, *encoding.flat, known, *prologue.flat, swizzle
    )
    if prologue.keep:
        kept = kept.reshape(*x.shape[:-1], k)
    if scale == "e8m0":
        return QuantizedInputs(packed, bits, None), kept
    return QuantizedInputs(packed, bits, per_token if known is None else known), kept


def _rules(element: str, scale: str) -> tuple[str, ...]:
    """The scale rules that the kernel has."""
    if scale == "e4m3":
        return E4M3_RULES[element]
    return tuple(rule for name, rule in E8M0_RULES if name == element)


def _rotate_quantize_fake(
    x: Tensor,
    rotation: int,
    encoding: Encoding,
    global_scale: Tensor | None,
    prologue: Prologue,
    swizzle: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes, scale bytes, global scales that were computed: (rows, 1), or none of them; what is
    kept)."""
    rows, k = x.shape[0], prologue.features(x)
    groups = k // coverage.GROUP_SIZE[encoding.scale]
    packed = x.new_empty((rows, k // 2), dtype=torch.uint8)
    shape = ((rows + 127) // 128, (groups + 3) // 4, 32, 4, 4) if swizzle else (rows, groups)
    bits = x.new_empty(shape, dtype=torch.uint8)
    computed = encoding.scale == "e4m3" and global_scale is None
    per_token = x.new_empty((rows if computed else 0, 1), dtype=torch.float32)
    return packed, bits, per_token, _kept(x, prologue)


def _rotate_quantize(
    x: Tensor,
    rotation: int,
    encoding: Encoding,
    global_scale: Tensor | None,
    prologue: Prologue,
    swizzle: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    packed, bits, per_token, kept = _rotate_quantize_fake(
        x, rotation, encoding, global_scale, prologue, swizzle
    )
    if len(x):
        k = 2 * packed.shape[1]
        if swizzle and bits.numel() * coverage.GROUP_SIZE[encoding.scale] != len(x) * k:
            bits.zero_()  # scales of padding multiply zeros, so they must not be NaN
        scales, kind = (per_token, "computed") if len(per_token) else (global_scale, "tensor")
        if kind == "tensor" and scales is not None:
            scales, kind = scales.contiguous(), "rows" if scales.ndim == 2 else "tensor"
        variant = Variant(
            k=k,
            rotation=rotation,
            encoding=encoding,
            prologue=prologue.kind,
            keep=prologue.keep,
            global_scale=kind,
            swizzle=swizzle,
        )
        launch_rotate_quantize(x.contiguous(), prologue, scales, (packed, bits), kept, variant)
    return packed, bits, per_token, kept


define(
    "rotate_quantize(Tensor x, int rotation, str element, str scale, str rule, "
    "Tensor? global_scale, str prologue, Tensor? gain, float epsilon, bool keep, bool swizzle) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _rotate_quantize,
    _rotate_quantize_fake,
)
