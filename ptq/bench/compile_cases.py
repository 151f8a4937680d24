"""Everything that the tables can launch, as cases to compile: kernels with the types and constants
that their launches would give them.

Cases are made by the functions that launches use, so what is compiled is what runs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import triton

from ptq.kernels import coverage, gpu, tiles
from ptq.kernels.dequantize import dequantize_kernel
from ptq.kernels.grouped import grouped_w4a4_kernel, grouped_w4a16_kernel
from ptq.kernels.op_dequantize import BLOCK_K, BLOCK_N, dequantize_constants
from ptq.kernels.op_grouped import grouped_constants, w4a4_tile
from ptq.kernels.op_inputs import Variant, quantize_constants, quantize_tile
from ptq.kernels.op_matmul import w4a4_constants, w4a16_constants
from ptq.kernels.operands import UNIT_COLUMNS, UNIT_ROWS, Encoding
from ptq.kernels.quantize import rotate_quantize_kernel
from ptq.kernels.tiles import Row, Tile
from ptq.kernels.w4a4 import w4a4_kernel, w4a4_tma_kernel
from ptq.kernels.w4a16 import w4a16_kernel

PARTS = {name: parts for parts, name in coverage.FORMATS.items()}
MMA = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}
FP4_MMA = {100: "kind::mxf4", 120: "kind::mxf4nvf4"}
POINTERS = {
    "x_ptr": "*bf16",
    "out_ptr": "*bf16",
    "bias_ptr": "*bf16",
    "packed_ptr": "*u8",
    "scale_ptr": "*u8",
    "global_scale_ptr": "*fp32",
    "rows_ptr": "*i32",
    "offsets_ptr": "*i32",
    "workspace_ptr": "*fp32",
    "ticket_ptr": "*i32",
    "M": "i32",
    "N": "i32:16",
}
QUANTIZE = {
    "x_ptr": "*bf16",
    "block_ptr": "*bf16",
    "gain_ptr": "*bf16",
    "global_scale_ptr": "*fp32",
    "codes_ptr": "*u8",
    "scales_ptr": "*u8",
    "rotated_ptr": "*bf16",
    "kept_ptr": "*bf16",
    "M": "i32",
    "factor": "fp32",
    "epsilon": "fp32",
}
DEQUANTIZE = {
    "packed_ptr": "*u8",
    "scale_ptr": "*u8",
    "factor_ptr": "*fp32",
    "out_ptr": "*bf16",
    "N": "i32:16",
}
LONG, WIDE, EXPERTS = 14336, 6144, 64  # K: long enough that no loop is unrolled away
# (out, in) of layers as models have them, so that tiles get the splits that they get there: the
# short and the long side of Llama-3.1-8B, and gpt-oss, whose 2880 columns are no whole tiles
REAL = ((6144, 4096), (4096, 14336), (5120, 2880))
# (out, in), and one that is a multiple of no tile
SHAPE, ODD_SHAPE = (WIDE, LONG), (WIDE + 8, LONG + 32)
# Formats of inputs and the rotation that is usual with them.
USUAL = (("nvfp4", 16), ("mxfp4", 32), ("nvint4", 16))
PREFILL = 4096  # tokens


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kernel and all that its compilation needs.

    Attributes:
        signature: the type of every run-time argument.
        constants: the constexpr arguments.
        items: weights per trip of the loop, or elements per program.
        loop: whether instructions are counted in the main loop.
        mma: what the tensor-core instruction has to contain; empty if there need be none.
        programs: how many a launch for the sizes in its name has; 0 where it names none.
    """

    name: str
    kernel: triton.JITFunction
    signature: dict[str, str]
    constants: dict[str, object]
    warps: int
    stages: int
    items: int
    loop: bool
    mma: str
    fp_fusion: bool = True
    programs: int = 0

    @property
    def builds(self) -> tuple[object, ...]:
        """The same for two cases that compile to the same."""
        constants, types = frozenset(self.constants.items()), frozenset(self.signature.items())
        return id(self.kernel), constants, types, self.warps, self.stages


# ---------------------------------------------------------------- matmuls


def _matmul(
    name: str,
    kernel: triton.JITFunction,
    tile: Tile,
    constants: dict[str, object],
    types: Mapping[str, str],
    mma: str,
) -> Case:
    types = {**POINTERS, **types}
    return Case(
        name=name,
        kernel=kernel,
        signature={key: types[key] for key in kernel.arg_names if key not in constants},
        constants=constants,
        warps=tile.warps,
        stages=tile.stages,
        items=tile.block_n * tile.block_k,
        loop=True,
        mma=mma,
    )


def _size(tile: Tile) -> str:
    return f"{tile.block_m}x{tile.block_n}x{tile.block_k}"


def w4a16_case(
    fmt: str,
    tile: Tile,
    *,
    arch: int,
    odd: bool = False,
    grouped: bool = False,
    half: torch.dtype = torch.bfloat16,
) -> Case:
    """A matmul with 16-bit inputs.

    Args:
        odd: with a bias, and of sizes that are a multiple of no tile.
        grouped: one per expert, with gathered rows.
    """
    (element, scale), (n, k) = PARTS[fmt], ODD_SHAPE if odd else SHAPE
    tiled = arch in gpu.UNIT_ARCHITECTURES and not odd  # odd sizes are no whole units
    constants = w4a16_constants(n, k, element, scale, tile, bias=odd, half=half, tiled=tiled)
    kernel = w4a16_kernel
    if grouped:
        constants = grouped_constants(constants, EXPERTS, gather=True)
        kernel = grouped_w4a16_kernel
    kind = "*bf16" if half == torch.bfloat16 else "*fp16"
    words = ["grouped" if grouped else "w4a16", fmt, _size(tile)]
    words += ["bias odd n odd k"] if odd else []
    words += ["fp16"] if half == torch.float16 else []
    types = {"x_ptr": kind, "out_ptr": kind, "bias_ptr": kind}
    return _matmul(" ".join(words), kernel, tile, constants, types, MMA[arch])


def w4a4_case(
    fmt: str, tile: Tile, *, arch: int, bias: bool, inputs: str, experts_k: int = 0
) -> Case:
    """A matmul with 4-bit inputs.

    Args:
        inputs: how many global scales they have: none, tensor or token.
        experts_k: if not 0, one matmul per expert, with gathered rows and so many input features.
    """
    scale, k = PARTS[fmt][1], experts_k or LONG
    if experts_k:
        tile, kernel = w4a4_tile(tile, k), grouped_w4a4_kernel
    else:
        kernel = w4a4_tma_kernel if tile.kernel == "w4a4_tma" else w4a4_kernel
    constants = w4a4_constants(k, scale, tile, bias=bias, inputs=inputs, programs=148)
    if experts_k:
        constants = grouped_constants(constants, EXPERTS, gather=True)
    scales = "*fp8e4nv" if scale == "e4m3" else "*u8"
    types = {"x_ptr": "*u8", "x_scale_ptr": scales, "scale_ptr": scales, "x_global_ptr": "*fp32"}
    words = ["grouped"] if experts_k else []
    words += [tile.kernel, fmt, _size(tile)]
    words += ["bias"] if bias else []
    words += ["per token"] if inputs == "token" else []
    words += [] if k % 128 == 0 else ["odd k"]
    return _matmul(" ".join(words), kernel, tile, constants, types, FP4_MMA[arch])


def row_cases(arch: int, row: Row, *, variants: bool) -> Iterator[Case]:
    """The cases of a row of a table; with ``variants`` also those with biases, odd sizes and
    experts."""
    fmt, tile = row.format, row.tile
    if row.operation in ("w4a16", "grouped"):
        grouped = row.operation == "grouped"
        yield w4a16_case(fmt, tile, arch=arch, grouped=grouped)
        if variants:
            # what dispatch takes there: the widest tiles have no registers left for masks
            odd = tiles.choose(arch, row.operation, fmt, row.tokens, *ODD_SHAPE)
            yield w4a16_case(fmt, replace(odd, split=1), arch=arch, grouped=grouped, odd=True)
        return
    yield w4a4_case(fmt, tile, arch=arch, bias=False, inputs="tensor")
    if variants:
        yield w4a4_case(fmt, tile, arch=arch, bias=True, inputs="token")
    if variants and tile.kernel == "w4a4":
        inputs = "token" if fmt == "nvfp4" else "none"
        for k in (SHAPE[1], ODD_SHAPE[1]):
            yield w4a4_case(fmt, tile, arch=arch, bias=True, inputs=inputs, experts_k=k)


def real_cases(arch: int, operation: str, fmt: str, tokens: int) -> Iterator[Case]:
    """What is launched for so many tokens on layers as models have them: with the tile and the
    split of that layer, and one token as a constant, as Triton compiles it.

    That M is a multiple of 16, which Triton compiles for itself too, changes no address.
    """
    shapes = {(row.n, row.k) for row in tiles.table(arch).rows if row.microseconds}
    for n, k in dict.fromkeys((*REAL, *sorted(shapes))):
        tile = tiles.choose(arch, operation, fmt, tokens, n, k)
        if tile.kernel in ("w4a16", "w4a4"):
            yield real_case(fmt, tile, arch=arch, operation=operation, tokens=tokens, n=n, k=k)


def real_case(
    fmt: str, tile: Tile, *, arch: int, operation: str, tokens: int, n: int, k: int
) -> Case:
    """The matmul of ``tokens`` rows with a weight of ``n`` × ``k``, by ``tile``."""
    element, scale = PARTS[fmt]
    types = dict(POINTERS)
    if operation == "w4a4":
        constants = w4a4_constants(k, scale, tile, bias=False, inputs="tensor")
        kernel, mma = w4a4_kernel, FP4_MMA[arch]
        scales = "*fp8e4nv" if scale == "e4m3" else "*u8"
        types |= {"x_ptr": "*u8", "x_scale_ptr": scales, "scale_ptr": scales}
        types |= {"x_global_ptr": "*fp32"}
    else:
        units = arch in gpu.UNIT_ARCHITECTURES and n % UNIT_ROWS == 0 and k % UNIT_COLUMNS == 0
        constants = w4a16_constants(n, k, element, scale, tile, bias=False, tiled=units)
        kernel, mma = w4a16_kernel, MMA[arch]
        if operation == "grouped":
            constants = grouped_constants(constants, EXPERTS, gather=True)
            kernel = grouped_w4a16_kernel
    words = [operation, fmt, f"{tokens}x{n}x{k}", "by", _size(tile), f"split {tile.split}"]
    case = _matmul(" ".join(words), kernel, tile, constants, types, mma)
    # short loops are unrolled: W4A4 with three stages on sm_120 at six steps
    case = replace(case, loop=k > 8 * tile.block_k * tile.split)
    programs = -(-tokens // tile.block_m) * -(-n // tile.block_n) * tile.split
    if operation == "grouped":  # as many tokens for each expert
        return replace(case, programs=programs * EXPERTS)
    if tokens == 1:
        signature = {name: kind for name, kind in case.signature.items() if name != "M"}
        case = replace(case, signature=signature, constants={**case.constants, "M": 1})
    return replace(case, programs=programs)


# ---------------------------------------------------------------- inputs and dense copies


def quantize_case(
    fmt: str,
    rotation: int,
    rows: int,
    *,
    arch: int,
    output: str = "codes",
    global_scale: str = "tensor",
    prologue: str = "none",
    keep: bool = False,
    rule: str = "default",
) -> Case:
    """Rotation and quantization of inputs, with the tile that a launch takes for so many rows."""
    variant = Variant(
        k=LONG,
        rotation=rotation,
        encoding=Encoding(*PARTS[fmt], rule),
        prologue=prologue,
        keep=keep,
        output=output,
        global_scale=global_scale,
    )
    tile = quantize_tile(variant, rows, arch)
    words = ["quantize" if output == "codes" else output, fmt, f"H{rotation}"]
    words.append(f"{tile.block_m}x{tile.block_k}")
    words += {"tensor": [], "rows": ["given rows"], "computed": ["per row"]}[global_scale]
    words += [] if prologue == "none" else [prologue]
    words += ["kept"] if keep else []
    words += [] if rule == "default" else [rule]
    return Case(
        name=" ".join(words),
        kernel=rotate_quantize_kernel,
        signature=QUANTIZE | ({"rotated_ptr": "*fp8e4nv"} if output == "fp8" else {}),
        constants=quantize_constants(variant, tile, arch),
        warps=tile.warps,
        stages=2,
        items=tile.block_m * tile.block_k,
        loop=False,
        mma="" if rotation == 1 else "mma",
        fp_fusion=False,
    )


def dequantize_case(fmt: str, *, arch: int, fp8: bool) -> Case:
    """Packed weights to bf16 or fp8."""
    element, scale = PARTS[fmt]
    return Case(
        name=f"dequantize {fmt} to {'fp8' if fp8 else 'bf16'}",
        kernel=dequantize_kernel,
        signature=DEQUANTIZE | {"out_ptr": "*fp8e4nv" if fp8 else "*bf16"},
        constants=dequantize_constants(
            LONG, element, scale, fp8=fp8, tiled=arch in gpu.UNIT_ARCHITECTURES
        ),
        warps=4,
        stages=3,
        items=BLOCK_N * BLOCK_K,
        loop=False,
        mma="",
    )


def input_variants(arch: int) -> Iterator[Case]:
    """Every size of rotation, output, kind of global scale and prologue, for few and many
    tokens."""
    for fmt, usual in USUAL:
        for rotation in coverage.ROTATIONS:
            yield quantize_case(fmt, rotation, 1, arch=arch)
            if rotation != usual:
                yield quantize_case(fmt, rotation, PREFILL, arch=arch)
    if arch >= 90:
        yield quantize_case("nvfp4", 128, PREFILL, arch=arch, output="fp8", global_scale="computed")
    yield quantize_case("nvfp4", 1, 1, arch=arch, rule="four_six")
    for rotation in (16, 32, 64):
        yield quantize_case("nvfp4", rotation, PREFILL, arch=arch, output="rotated")
    yield quantize_case("nvfp4", 128, 1, arch=arch, output="rotated")
    for rows in (1, PREFILL):
        yield quantize_case("nvfp4", 16, rows, arch=arch, global_scale="computed")
        for rotation in (16, 128):
            yield quantize_case("nvfp4", rotation, rows, arch=arch, global_scale="rows")
        yield quantize_case("nvfp4", 1, rows, arch=arch, global_scale="computed", rule="four_six")
        for prologue in ("rms_norm", "silu_mul"):
            yield quantize_case("nvfp4", 1, rows, arch=arch, prologue=prologue, rule="four_six")
            yield quantize_case("nvfp4", 128, rows, arch=arch, prologue=prologue)
            yield quantize_case("nvfp4", 128, rows, arch=arch, output="rotated", prologue=prologue)
        norm = {"prologue": "rms_norm", "keep": True}
        yield quantize_case("nvfp4", 1, rows, arch=arch, rule="four_six", **norm)
        yield quantize_case("nvfp4", 128, rows, arch=arch, output="rotated", **norm)


# ---------------------------------------------------------------- all of them


def cases(arch: int, *, all_rows: bool) -> Iterator[Case]:
    """The cases of an architecture: the narrowest matmul of each format, or every tile of its table
    and variants."""
    seen: set[str] = set()
    rows = tiles.table(arch).rows
    for row in rows:
        if row.tile.kernel == "dense" or not (all_rows or _stands_for_others(row)):
            continue
        for case in row_cases(arch, row, variants=all_rows):
            if case.name not in seen:
                seen.add(case.name)
                yield case
    for fmt, rotation in USUAL:
        yield quantize_case(fmt, rotation, PREFILL, arch=arch)
    yield quantize_case("nvfp4", 1, PREFILL, arch=arch, rule="four_six")
    yield quantize_case("nvfp4", 128, PREFILL, arch=arch, output="rotated")
    yield dequantize_case("nvfp4", arch=arch, fp8=False)
    if arch >= 90:
        yield dequantize_case("mxfp4", arch=arch, fp8=True)
    if not all_rows:
        return
    built: set[object] = set()
    for key in dict.fromkeys((row.operation, row.format, row.tokens) for row in rows):
        for case in real_cases(arch, *key) if key[0] != "w4a4_blocked" else ():
            if case.builds not in built:
                built.add(case.builds)
                yield case
    first = next(row.tile for row in rows if (row.operation, row.tokens) == ("w4a16", 1))
    for fmt in ("nvfp4", "nvint4"):
        yield w4a16_case(fmt, first, arch=arch, half=torch.float16)
    yield from input_variants(arch)


def _stands_for_others(row: Row) -> bool:
    """Whether its case is compiled without ``--all`` too."""
    narrow = row.tokens <= 8 or row.operation == "w4a4_blocked"
    return narrow and row.operation != "grouped" and row.format != "mxint4"
