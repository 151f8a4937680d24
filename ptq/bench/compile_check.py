"""Everything that the tables can launch, as compile cases: the gate against slow or broken code
without a GPU.

    python -m ptq.bench.compile_check 90              # registers, spills, instructions; exit code 1 on a problem
    python -m ptq.bench.compile_check 80 90 100 120 --all --json

Without ``--all`` one case per kernel and format. Instructions are counted per weight in the main
loop of matmuls, per element in the other kernels. Kernels must not be interpreted: run it in a
process of its own.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import triton

from ptq.bench.compile_without_gpu import SHARED_MEMORY, Compiled, compile_for
from ptq.kernels import dispatch, experts, launch
from ptq.kernels.dequantize import dequantize_kernel
from ptq.kernels.dispatch import Tile
from ptq.kernels.grouped import grouped_w4a4_kernel, grouped_w4a16_kernel
from ptq.kernels.quantize import rotate_quantize_kernel
from ptq.kernels.w4a4 import w4a4_kernel, w4a4_tma_kernel
from ptq.kernels.w4a16 import w4a16_kernel

PARTS = {name: parts for parts, name in dispatch.FORMATS.items()}
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
# Spills that are known and bearable, in bytes per thread, by (architecture, case): none.
SPILLS: dict[tuple[int, str], int] = {}
K, N = 14336, 6144  # long enough that no loop is unrolled away


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kernel and all that its compilation needs; ``items``: weights per trip of the loop, or
    elements per program."""

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


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was compiled, and what is wrong with it."""

    architecture: int
    name: str
    seconds: float
    problems: list[str]
    compiled: Compiled | None = None
    per_item: float = 0.0

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON: the counts that tests look at."""
        base: dict[str, object] = {
            "architecture": self.architecture,
            "name": self.name,
            "problems": self.problems,
        }
        if self.compiled is None:
            return base
        families = ("LDS", "LDSM", "STS", "STSM", "BAR")
        return base | {
            "per_item": round(self.per_item, 2),
            "registers": self.compiled.registers,
            "spill": self.compiled.spill,
            "shared": self.compiled.shared,
            "mma": list(self.compiled.mma),
            "loop": {family: self.compiled.count(family) for family in families},
            "div_full": "div.full" in self.compiled.ptx,
            "fused_multiply_adds": len(re.findall(r"\bfma\.rn\.f32", self.compiled.ptx)),
            "seconds": round(self.seconds, 2),
        }


# ---------------------------------------------------------------- cases


def _pointers(
    kernel: triton.JITFunction, constants: dict[str, object], **changes: str
) -> dict[str, str]:
    types = POINTERS | changes
    return {name: types[name] for name in kernel.arg_names if name not in constants}


def w4a16_case(
    fmt: str,
    tile: Tile,
    *,
    bias: bool = False,
    n: int = N,
    k: int = K,
    half: torch.dtype = torch.bfloat16,
    arch: int,
) -> Case:
    """A matmul with 16-bit inputs."""
    element, scale = PARTS[fmt]
    constants = launch.w4a16_constants(n, k, element, scale, tile, bias=bias, half=half)
    kind = "*bf16" if half == torch.bfloat16 else "*fp16"
    odd = (
        (" bias" if bias else "")
        + ("" if n % tile.block_n == 0 else " odd n")
        + ("" if k % 128 == 0 else " odd k")
    )
    return Case(
        name=f"w4a16 {fmt} {tile.block_m}x{tile.block_n}x{tile.block_k}{odd}{'' if kind == '*bf16' else ' fp16'}",
        kernel=w4a16_kernel,
        signature=_pointers(w4a16_kernel, constants, x_ptr=kind, out_ptr=kind, bias_ptr=kind),
        constants=constants,
        warps=tile.warps,
        stages=tile.stages,
        items=tile.block_n * tile.block_k,
        loop=True,
        mma=MMA[arch],
    )


def grouped_case(
    fmt: str, tile: Tile, *, arch: int, bias: bool = False, n: int = N, k: int = K
) -> Case:
    """A matmul per expert with 16-bit inputs: 64 experts, gathered rows."""
    element, scale = PARTS[fmt]
    constants = experts.w4a16_constants(n, k, 64, element, scale, tile, gather=True, bias=bias)
    odd = (
        (" bias" if bias else "")
        + ("" if n % tile.block_n == 0 else " odd n")
        + ("" if k % 128 == 0 else " odd k")
    )
    return Case(
        name=f"grouped {fmt} {tile.block_m}x{tile.block_n}x{tile.block_k}{odd}",
        kernel=grouped_w4a16_kernel,
        signature=_pointers(grouped_w4a16_kernel, constants),
        constants=constants,
        warps=tile.warps,
        stages=tile.stages,
        items=tile.block_n * tile.block_k,
        loop=True,
        mma=MMA[arch],
    )


def w4a4_case(
    fmt: str,
    tile: Tile,
    *,
    bias: bool,
    inputs: str,
    arch: int,
    grouped: bool = False,
    n: int = N,
    k: int = K,
) -> Case:
    """A matmul with 4-bit inputs; ``grouped``: one per expert, 64 experts, gathered rows."""
    scale = PARTS[fmt][1]
    if grouped:
        tile, kernel = experts.w4a4_tile(tile, k), grouped_w4a4_kernel
        constants = experts.w4a4_constants(
            k, 64, scale, tile, gather=True, bias=bias, inputs=inputs
        )
    else:
        kernel = w4a4_tma_kernel if tile.kernel == "w4a4_tma" else w4a4_kernel
        constants = launch.w4a4_constants(k, scale, tile, bias=bias, inputs=inputs, programs=148)
    pointer = "*fp8e4nv" if scale == "e4m3" else "*u8"
    changes = {
        "x_ptr": "*u8",
        "x_scale_ptr": pointer,
        "scale_ptr": pointer,
        "x_global_ptr": "*fp32",
    }
    odd = (
        (" bias" if bias else "")
        + (" per token" if inputs == "token" else "")
        + ("" if k % 128 == 0 else " odd k")
    )
    return Case(
        name=f"{'grouped ' if grouped else ''}{tile.kernel} {fmt} {tile.block_m}x{tile.block_n}x{tile.block_k}{odd}",
        kernel=kernel,
        signature=_pointers(kernel, constants, **changes),
        constants=constants,
        warps=tile.warps,
        stages=tile.stages,
        items=tile.block_n * tile.block_k,
        loop=True,
        mma=FP4_MMA[arch],
    )


def quantize_case(
    fmt: str,
    rotation: int,
    rows: int,
    *,
    arch: int,
    output: str = "codes",
    global_scale: str = "tensor",
    prologue: str = "none",
) -> Case:
    """Rotation and quantization of inputs, with the tile that a launch takes for so many rows."""
    element, scale = PARTS[fmt]
    whole = global_scale == "computed" or prologue == "rms_norm"
    block_m, block_k, warps = launch.quantize_tile(
        rows, K, rotation, whole_rows=whole, arch=arch, prologue=prologue
    )
    constants = launch.quantize_constants(
        K,
        element,
        scale,
        rotation,
        block_m,
        block_k,
        arch=arch,
        prologue=prologue,
        output=output,
        global_scale=global_scale,
    )
    extra = {"tensor": "", "rows": " given rows", "computed": " per row"}[global_scale]
    extra += "" if prologue == "none" else f" {prologue}"
    return Case(
        name=f"{'quantize' if output == 'codes' else output} {fmt} H{rotation} {block_m}x{block_k}{extra}",
        kernel=rotate_quantize_kernel,
        signature=QUANTIZE | ({"rotated_ptr": "*fp8e4nv"} if output == "fp8" else {}),
        constants=constants,
        warps=warps,
        stages=2,
        items=block_m * block_k,
        loop=False,
        mma="" if rotation == 1 else "mma",
        fp_fusion=False,
    )


def dequantize_case(fmt: str, *, fp8: bool) -> Case:
    """Packed weights to bf16 or fp8."""
    element, scale = PARTS[fmt]
    return Case(
        name=f"dequantize {fmt} to {'fp8' if fp8 else 'bf16'}",
        kernel=dequantize_kernel,
        signature=DEQUANTIZE | {"out_ptr": "*fp8e4nv" if fp8 else "*bf16"},
        constants=launch.dequantize_constants(K, element, scale, fp8=fp8),
        warps=4,
        stages=3,
        items=32 * 256,
        loop=False,
        mma="",
    )


def cases(arch: int, *, all_rows: bool) -> Iterator[Case]:
    """The cases of an architecture: the narrowest matmul of each format, or every tile of its table
    and variants."""
    seen: set[str] = set()
    for row in dispatch.table(arch).rows:
        tile = row.tile
        if tile.kernel == "dense" or (
            not all_rows and (row.operation == "grouped" or row.format == "mxint4")
        ):
            continue
        if not all_rows and row.operation in ("w4a16", "w4a4") and row.tokens > 8:
            continue
        found = []
        match row.operation:
            case "w4a16":
                found.append(w4a16_case(row.format, tile, arch=arch))
                if all_rows:
                    found.append(
                        w4a16_case(
                            row.format,
                            replace(tile, split=1),
                            arch=arch,
                            bias=True,
                            n=N + 8,
                            k=K + 32,
                        )
                    )
            case "grouped":
                found.append(grouped_case(row.format, tile, arch=arch))
                found.append(
                    grouped_case(row.format, tile, arch=arch, bias=True, n=N + 8, k=K + 32)
                )
            case _:
                found.append(w4a4_case(row.format, tile, bias=False, inputs="tensor", arch=arch))
                if all_rows:
                    found.append(w4a4_case(row.format, tile, bias=True, inputs="token", arch=arch))
                if all_rows and tile.kernel == "w4a4":
                    inputs = "token" if row.format == "nvfp4" else "none"
                    for k in (K, K + 32):
                        found.append(
                            w4a4_case(
                                row.format,
                                tile,
                                bias=True,
                                inputs=inputs,
                                arch=arch,
                                grouped=True,
                                k=k,
                            )
                        )
        for case in found:
            if case.name not in seen:
                seen.add(case.name)
                yield case
    for fmt, rotation in (("nvfp4", 16), ("mxfp4", 32), ("nvint4", 16)):
        yield quantize_case(fmt, rotation, 4096, arch=arch)
    yield quantize_case("nvfp4", 128, 4096, arch=arch, output="rotated")
    yield dequantize_case("nvfp4", fp8=False)
    if arch >= 90:
        yield dequantize_case("mxfp4", fp8=True)
    if not all_rows:
        return
    first = next(
        row.tile for row in dispatch.table(arch).rows if (row.operation, row.tokens) == ("w4a16", 1)
    )
    for fmt in ("nvfp4", "nvint4"):
        yield w4a16_case(fmt, first, arch=arch, half=torch.float16)
    for fmt in ("nvfp4", "mxfp4", "nvint4"):
        for rotation in (1, 16, 32, 64, 128):
            yield quantize_case(fmt, rotation, 1, arch=arch)
            if (fmt, rotation) not in (("nvfp4", 16), ("mxfp4", 32), ("nvint4", 16)):
                yield quantize_case(fmt, rotation, 4096, arch=arch)
    if arch >= 90:
        yield quantize_case("nvfp4", 128, 4096, arch=arch, output="fp8", global_scale="computed")
    for rotation in (16, 32, 64):
        yield quantize_case("nvfp4", rotation, 4096, arch=arch, output="rotated")
    yield quantize_case("nvfp4", 128, 1, arch=arch, output="rotated")
    for rows in (1, 4096):
        yield quantize_case("nvfp4", 16, rows, arch=arch, global_scale="computed")
        for rotation in (16, 128):
            yield quantize_case("nvfp4", rotation, rows, arch=arch, global_scale="rows")
        for prologue in ("rms_norm", "silu_mul"):
            yield quantize_case("nvfp4", 128, rows, arch=arch, prologue=prologue)
            yield quantize_case("nvfp4", 128, rows, arch=arch, output="rotated", prologue=prologue)


def build(arch: int, case: Case) -> Result:
    """Compile a case and judge it; a failure of the compiler is a problem like any other."""
    start = time.perf_counter()
    try:
        compiled = compile_for(
            arch,
            case.kernel,  # pyright: ignore[reportArgumentType]  (a kernel is a function to pyright)
            case.signature,
            case.constants,
            warps=case.warps,
            stages=case.stages,
            fp_fusion=case.fp_fusion,
        )
    except (RuntimeError, triton.CompilationError) as error:
        last = (str(error).strip().splitlines() or [""])[-1]
        return Result(
            architecture=arch,
            name=case.name,
            seconds=time.perf_counter() - start,
            problems=[f"{type(error).__name__}: {last[:200]}"],
        )
    problems = compiled.problems(case.mma, spill=SPILLS.get((arch, case.name), 0))
    if arch == 80 and compiled.shared > SHARED_MEMORY[86]:
        problems.append(
            f"shared memory {compiled.shared} is too much for sm_86 and sm_89, which share the "
            "table"
        )
    if case.loop and not compiled.loop:
        problems.append("no loop with a tensor-core instruction was found")
    return Result(
        architecture=arch,
        name=case.name,
        seconds=time.perf_counter() - start,
        problems=problems,
        compiled=compiled,
        per_item=compiled.per(case.items, loop=case.loop),
    )


def main() -> int:
    """Print the results of the architectures named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("architectures", nargs="+", type=int, choices=sorted(dispatch.FAMILIES))
    parser.add_argument(
        "--all", action="store_true", help="every row of the tables, odd shapes, biases, prologues"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object to a line")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args()
    bad = 0
    for arch in options.architectures:
        for case in cases(dispatch.FAMILIES[arch], all_rows=options.all):
            if options.only not in case.name:
                continue
            result = build(arch, case)
            bad += bool(result.problems)
            data = result.to_dict()
            if options.json:
                print(json.dumps(data), flush=True)
            else:
                facts = [
                    f"{key} {data[key]}" for key in ("registers", "spill", "shared") if key in data
                ]
                print(
                    f"sm_{arch:<3d} {case.name:46s} {result.per_item:6.2f}",
                    *facts,
                    "; ".join(result.problems),
                    sep="  ",
                    flush=True,
                )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
